"""What a page is made of, and where its pictures go. HTML and Markdown are two renderings of the same blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from model.arrays import Array
from tuner.report import style

Size = Literal["full", "half", "third"]


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Table:
    """Cells are plain text; `numeric` columns are aligned to the right, `strong` rows stand out. One with a `label` is
    also written for LaTeX."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    label: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Tables:
    """Side by side where there is room."""

    tables: Sequence[Table]
    kind: str = "tables"


@dataclass(frozen=True)
class Picture:
    file: str
    """relative to the report"""
    caption: str
    size: Size
    width: int
    height: int
    is_chart: bool
    """drawn on white, so that a dark page may turn its lightness around; a photo must stay as it is"""


@dataclass(frozen=True)
class Pictures:
    """Side by side where there is room."""

    pictures: Sequence[Picture]
    kind: str = "pictures"


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    interval: str | None
    """empty where there is none; None where nobody asks for one"""
    note: str


@dataclass(frozen=True)
class Cards:
    cards: Sequence[Card]
    kind: str = "cards"


@dataclass(frozen=True)
class Fold:
    """Shut until somebody opens it; open on paper and in Markdown."""

    title: str
    blocks: Sequence[Block]
    kind: str = "fold"


Block = Text | Code | Table | Tables | Pictures | Cards | Fold


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: Sequence[Block]


def stamped(section: Section, stamp: str) -> Section:
    """The section with a stamp on every table, picture and headline figure that does not say so itself."""

    def words(text: str) -> str:
        return text if stamp in text else f"{text} ({stamp})".strip()

    def mark(block: Block) -> Block:
        match block:
            case Table():
                return replace(block, caption=words(block.caption))
            case Tables():
                return replace(block, tables=[replace(t, caption=words(t.caption)) for t in block.tables])
            case Pictures():
                return replace(block, pictures=[replace(p, caption=words(p.caption)) for p in block.pictures])
            case Cards():
                return replace(block, cards=[replace(c, label=words(c.label)) for c in block.cards])
            case Fold():
                return replace(block, title=words(block.title), blocks=[mark(one) for one in block.blocks])
            case _:
                return block

    return replace(section, blocks=[mark(block) for block in section.blocks])


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    sections: Sequence[Section]
    """the first one has no heading: it is the head of the page"""


@dataclass(frozen=True)
class Gallery:
    """Saves pictures below the folder of a report."""

    folder: Path
    _names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        (self.folder / "figures").mkdir()

    def figure(self, figure: Any, name: str, caption: str, size: Size = "half") -> Picture:
        """Saves a matplotlib figure as figures/NAME.png."""
        file = self._path(name)
        figure.savefig(self.folder / file, dpi=style.DPI, metadata={"Software": None})
        width, height = (round(side * style.DPI) for side in figure.get_size_inches())
        return Picture(file, caption, size, width, height, is_chart=True)

    def image(self, pixels_HWC: Array, name: str, caption: str, size: Size = "full") -> Picture:
        """Saves an RGB image as figures/NAME.png."""
        file = self._path(name)
        save(self.folder / file, pixels_HWC)
        return Picture(file, caption, size, pixels_HWC.shape[1], pixels_HWC.shape[0], is_chart=False)

    def example(self, pixels_HWC: Array, name: str, caption: str) -> Picture:
        """Saves an RGB image as dices/NAME."""
        save(self.folder / "dices" / name, pixels_HWC)
        return Picture(f"dices/{name}", caption, "full", pixels_HWC.shape[1], pixels_HWC.shape[0], is_chart=False)

    def _path(self, name: str) -> str:
        assert name not in self._names, name
        self._names.add(name)
        return f"figures/{name}.png"


def save(path: Path, pixels_HWC: Array) -> None:
    """An RGB uint8 image as PNG; fast rather than small."""
    ok, data = cv2.imencode(".png", np.ascontiguousarray(pixels_HWC[..., ::-1]), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert ok
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.tobytes())

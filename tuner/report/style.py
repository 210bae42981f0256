"""The look of all figures, in one place. Colours are those of Okabe and Ito, which colour-blind readers tell apart."""

from __future__ import annotations

from functools import cache
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure

DPI = 150
FULL, HALF, THIRD = 11.0, 5.4, 3.6
"""inches; the page is 11 wide"""

INK, MUTED, RULE, PAPER = "#1f2933", "#66727f", "#dfe4e9", "#ffffff"
BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"

WINNER, BASELINE, VALIDATION = BLUE, "#8a949e", ORANGE
HIT, MISS, FALSE_ALARM = GREEN, ORANGE, PURPLE
STATUS = {"completed": BLUE, "stopped_early": SKY, "diverged": ORANGE, "failed": RED}

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": "#b7c0c9",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": "#b7c0c9",
    "ytick.color": "#b7c0c9",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


def panel(width: float = HALF, height: float = 3.5) -> tuple[Figure, Any]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def legend(axes: Any, columns: int = 3, handles: list[Any] | None = None) -> None:
    """Above the axes, where it never covers data."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderaxespad": 0, "ncols": columns}
    axes.legend(**({"handles": handles} if handles else {}), **place)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def drawable(text: str) -> str:
    """The text with a box for each character that the figures' font lacks."""
    return "".join(letter if ord(letter) in _glyphs() else "□" for letter in text)

"""A page as HTML that needs nothing beside it, and as Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import html as html_text
import re
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tuner.names import shown
from tuner.report.gallery import Block, Cards, Code, Fold, Page, Picture, Pictures, Table, Tables, Text


def html(page: Page, folder: Path) -> str:
    """Pictures are taken from `folder` and put into the page. Everything from outside is escaped."""

    def data_uri(picture: Picture) -> str:
        data, kind = (folder / picture.file).read_bytes(), "png"
        if not picture.is_chart:  # photos, which the page would be many times as large with
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            data, kind = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, 90])[1].tobytes(), "webp"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    pictures = [picture for section in page.sections for picture in _pictures(section.blocks)]
    with ThreadPoolExecutor() as pool:  # encoding releases the interpreter's lock
        found = dict(zip((picture.file for picture in pictures), pool.map(data_uri, pictures), strict=True))
    return _environment().get_template("page.html.j2").render(page=page, data_uri=lambda picture: found[picture.file])


def _pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    for block in blocks:
        if isinstance(block, Pictures):
            yield from block.pictures
        if isinstance(block, Fold):
            yield from _pictures(block.blocks)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def markdown(page: Page) -> str:
    """The same blocks; links are relative to the report."""
    parts = [f"# {escape(page.title)}", escape(page.subtitle)]
    for section in page.sections:
        parts += [f"## {escape(section.title)}"] if section.title else []
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def plain(page: Page) -> str:
    """The same blocks for a terminal: aligned columns, no pictures."""
    parts = [shown(page.title), shown(page.subtitle)]
    for section in page.sections:
        parts += [_plain_table(block) if isinstance(block, Table) else textwrap.fill(shown(block.text), 100)
                  for block in section.blocks if isinstance(block, Table | Text)]  # fmt: skip
    return "\n\n".join(parts)


def _plain_table(table: Table) -> str:
    cells = [[shown(" ".join(cell.split())) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if n in table.numeric else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([shown(table.caption), *map(line, cells)])


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line. Underlines inside a word mean nothing there."""
    text = html_text.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*\[\]|#~])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def _block(block: Block) -> str:
    match block:
        case Text():
            return escape(block.text)
        case Code():
            return "\n".join("    " + line for line in block.text.splitlines())
        case Pictures():
            return "\n\n".join(f"![{Path(p.file).stem}]({p.file})\n\n{escape(p.caption)}" for p in block.pictures)
        case Cards():
            rows = [[card.label, card.value, card.interval or "", card.note] for card in block.cards]
            return _block(Table(["figure", "winner", "95 % interval", ""], rows, numeric=frozenset({1})))
        case Tables():
            return "\n\n".join(map(_table, block.tables))
        case Table():
            return _table(block)
        case Fold():
            return "\n\n".join([f"**{escape(block.title)}**", *map(_block, block.blocks)])


def _table(table: Table) -> str:
    rules = ["---:" if column in table.numeric else "---" for column in range(len(table.header))]
    lines = [f"**{escape(table.caption)}**", ""] if table.caption else []
    lines += ["| " + " | ".join(map(escape, table.header)) + " |", "| " + " | ".join(rules) + " |"]
    for k, row in enumerate(table.rows):
        cells = [f"**{escape(cell)}**" if k in table.strong and cell else escape(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

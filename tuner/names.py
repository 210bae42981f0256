"""Names that users give to files, as they may stand in tables and messages."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal


def cell(name: str) -> str:
    """A file's name as a cell: a spreadsheet would run one that begins as a formula does, so it gets a ./ before it,
    which names the same file. Some take signs of full width for the plain ones, and skip what cannot be seen before
    them. Bytes that are no text are written as \\udcNN."""
    name = name.encode(errors="backslashreplace").decode()
    first = name[:1]
    is_unseen = first.isspace() or unicodedata.category(first or "a").startswith("C")
    return f"./{name}" if is_unseen or unicodedata.normalize("NFKC", first) in tuple("=+-@") else name


def quoting(names: Iterable[str]) -> Literal[0, 1]:
    """How a table with these names is to be quoted: before Python 3.13, csv leaves a carriage return bare."""
    return csv.QUOTE_ALL if any("\r" in name for name in names) else csv.QUOTE_MINIMAL


def shown(path: Path | str) -> str:
    """A name in a message: on one line, without what steers a terminal."""
    text = str(path)
    return text if text.isprintable() else ascii(text)[1:-1]

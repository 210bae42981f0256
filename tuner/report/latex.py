"""The labelled tables of a page for LaTeX. The output is pure ASCII, so that any engine and any encoding takes it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from tuner.report.gallery import Page, Table, Tables

_HEAD = r"""% Tables of the report on a hyperparameter search, by `tuner report`; numbers are those of index.html.
% Preamble: \usepackage{booktabs}    Text: \input{tables}, or copy the tables that you want.
% Labels are tab:test, tab:data, tab:configuration, tab:rules and so on; wide tables fit with \small or \resizebox.
% Characters that LaTeX's standard fonts lack stand as their code, [U+88C2].
"""
_MINUS = "\N{MINUS SIGN}"
_MARKS = {
    _MINUS: r"\ensuremath{-}",
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # Active in babel's German, and no straight quote in OT1.
    '"': r"\char34{}",
    "`": r"\char96{}",
    # At the start of a row they would be an argument of the \\ before.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "±": r"\ensuremath{\pm}",
    "\N{MULTIPLICATION SIGN}": r"\ensuremath{\times}",
    "²": r"\ensuremath{^2}",
    "°": r"\ensuremath{^\circ}",
    "µ": r"\ensuremath{\mu}",
    "μ": r"\ensuremath{\mu}",
    "≤": r"\ensuremath{\le}",
    "≥": r"\ensuremath{\ge}",
    "→": r"\ensuremath{\to}",
    "·": r"\ensuremath{\cdot}",
    "…": r"\ldots{}",
    "\N{EN DASH}": r"\textendash{}",
    "\N{EM DASH}": r"\textemdash{}",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "\N{LATIN SMALL LETTER DOTLESS I}": r"\i{}",
} | {mark: "\\" + mark for mark in "{}$&#_%"}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}


def tables(page: Page) -> str:
    """The content of tables.tex."""
    return "\n".join([_HEAD, *(table(one) for one in _labelled(page))])


def _labelled(page: Page) -> Iterator[Table]:
    for section in page.sections:
        for block in section.blocks:
            for one in block.tables if isinstance(block, Tables) else [block]:
                if isinstance(one, Table) and one.label:
                    yield one


def table(one: Table) -> str:
    columns = "".join("r" if k in one.numeric else "l" for k in range(len(one.header)))
    lines = [rf"\begin{{table}}\centering\caption{{{escape(one.caption)}}}\label{{tab:{one.label}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    if any(one.header):
        lines += [_row([escape(cell) for cell in one.header]), r"\midrule"]
    for k, row in enumerate(one.rows):
        cells = [escape(cell) for cell in row]
        if k in one.strong:
            cells[0] = rf"\textbf{{{cells[0]}}}"
        lines.append(_row(cells))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is, on one line; a minus before a number or between spaces is one."""
    plain = unicodedata.normalize("NFC", " ".join(text.split()))
    plain = re.sub(r"(?<![^ (])-(?=[\d ])", _MINUS, plain)
    printed = "".join(map(_character, plain))
    return re.sub(r"([-',])(?=\1)", r"\1{}", printed)  # no ligatures


def _character(letter: str) -> str:
    if letter in _MARKS:
        return _MARKS[letter]
    if " " <= letter <= "~":
        return letter
    plain = unicodedata.normalize("NFD", letter)
    base, accent = plain[0], plain[1:]
    if accent in _ACCENTS and base.isascii() and base.isalpha():
        dotless = f"\\{base}" if base in "ij" and accent != "\u0327" else base
        return f"{{\\{_ACCENTS[accent]}{{{dotless}}}}}"
    return f"{{[}}U+{ord(letter):04X}{{]}}"

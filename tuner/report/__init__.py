"""The report on a search: a pure function of the run directory.

It reads what docs/run-directory.md describes and nothing else (no data set, no network), so that it can be written
again anywhere, at any time, with the same figures. Before the winner is evaluated it tells of the search alone.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

from tuner.names import quoting
from tuner.records import OPEN_TEST
from tuner.report import (
    calibration,
    comparison,
    inputs,
    latex,
    masks_page,
    page,
    render,
    rules,
    style,
    tables,
    trust,
)  # fmt: skip
from tuner.report.gallery import Gallery, Page

__all__ = ["write", "write_comparison"]

_MARKS = ("index.html", "metrics.json")
_WRITTEN = (*_MARKS, "report.md", "predictions.csv", "tables.tex", "figures", "dices", OPEN_TEST)
"""what a report consists of; all else in its folder is somebody's, and stays"""
_COMPARISON_MARKS = ("index.html", "comparison.json")
"""files by which a folder is known as a report, or as a comparison"""
_ERRORS = "backslashreplace"
"""A file's name may be no UTF-8. It is written as \\udcNN, which JSON reads back."""


def write(run_directory: Path, out: Path | None = None) -> Path:
    """Writes the report of a run into `out` (RUN/report by default), whole or not at all; returns index.html.

    Where thresholds were chosen on test as well, a second report on these lies in its folder open-test/. An earlier
    report is replaced. Raises ValueError that says what is missing, or that `out` holds something else.
    """
    run = inputs.read(Path(run_directory))
    stamped = None
    if (Path(run_directory) / "evaluation" / OPEN_TEST / "selection.json").is_file():
        stamped = inputs.read(Path(run_directory), f"evaluation/{OPEN_TEST}")
    target = (Path(out) if out is not None else Path(run_directory) / "report").resolve()
    with _replaced(target, _MARKS) as fresh:
        _fill(run, fresh)
        if stamped is not None:
            (fresh / OPEN_TEST).mkdir()
            _fill(stamped, fresh / OPEN_TEST)
    return target / "index.html"


def write_comparison(searches: Sequence[comparison.Search], out: Path) -> Path:
    """Writes several searches side by side into `out`, in place of an earlier comparison; returns index.html."""
    target = out.resolve()
    with _replaced(target, _COMPARISON_MARKS) as fresh:
        with matplotlib.rc_context(style.RC):
            content = comparison.build(searches, Gallery(fresh))
        _write_pages(content, fresh)
        _write_json(fresh / "comparison.json", comparison.as_json(searches))
    return target / "index.html"


def _fill(run: inputs.Run, folder: Path) -> None:
    evaluated = run if isinstance(run, inputs.EvaluatedRun) else None
    results = tables.results(evaluated) if evaluated else None
    metrics = tables.metrics(run, results) | {
        "rules": rules.replay(evaluated, results) if evaluated and results else [],
        "calibration": calibration.figures(results.test) if results else None,
        "selection": trust.figures(run),
        "masks": masks_page.figures(run),
    }
    _write_json(folder / "metrics.json", metrics)
    if evaluated and results:
        names = [*results.validation.split.names, *results.test.split.names]
        with (folder / "predictions.csv").open("w", newline="", encoding="utf-8", errors=_ERRORS) as file:
            lines = csv.writer(file, lineterminator="\n", quoting=quoting(names))
            lines.writerows(tables.predictions(evaluated, results))
    with matplotlib.rc_context(style.RC):
        content = page.build(run, results, metrics, Gallery(folder))
    _write_pages(content, folder)
    (folder / "tables.tex").write_text(latex.tables(content), encoding="ascii")


def _write_pages(content: Page, folder: Path) -> None:
    (folder / "index.html").write_text(render.html(content, folder), encoding="utf-8", errors=_ERRORS)
    (folder / "report.md").write_text(render.markdown(content), encoding="utf-8", errors=_ERRORS)


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", errors=_ERRORS)


@contextmanager
def _replaced(target: Path, marks: Sequence[str]) -> Iterator[Path]:
    """An empty folder that takes the place of `target` when it is filled, or leaves it as it was."""
    _refuse_foreign(target, marks)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_after_kills(target)
    fresh = _sibling(target, "new")
    try:
        fresh.mkdir()
        yield fresh
        _keep_foreign(target, fresh)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_foreign(target: Path, marks: Sequence[str]) -> None:
    """A folder is only ever replaced if it is a report: `--out ~` must not cost anybody her home."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder for the report")
    if any(target.iterdir()) and not all((target / mark).is_file() for mark in marks):
        raise ValueError(f"{target} holds something that is not a report; name a new or an empty folder")


def _keep_foreign(target: Path, fresh: Path) -> None:
    """Somebody's notes beside an earlier report."""
    for path in target.iterdir() if target.exists() else ():
        if path.name not in (*_WRITTEN, *_COMPARISON_MARKS):
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, fresh / path.name)


def _clear_after_kills(target: Path) -> None:
    """What a process that was killed has left beside a report: an earlier one comes back if it has no successor."""
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.*.*")):
        *_, pid, word = path.name.split(".")
        if word not in ("new", "old") or not pid.isdigit() or _is_alive(int(pid)):
            continue
        if word == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sibling(target: Path, word: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{word}")


def _swap(fresh: Path, target: Path) -> None:
    old = _sibling(target, "old")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)

"""The report on a finished search: a pure function of the run directory.

It reads what docs/run-directory.md describes and nothing else (no data set, no network), so that it can be written
again anywhere, at any time, with the same figures.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import matplotlib

from tuner.records import OPEN_TEST
from tuner.report import calibration, inputs, latex, page, render, rules, style, tables
from tuner.report.gallery import Gallery

__all__ = ["write"]

_MARKS = ("index.html", "metrics.json")
"""files by which a folder is known as a report"""


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
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _sibling(target, "new")
    try:
        fresh.mkdir()
        _fill(run, fresh)
        if stamped is not None:
            (fresh / OPEN_TEST).mkdir()
            _fill(stamped, fresh / OPEN_TEST)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target / "index.html"


def _fill(run: inputs.Run, folder: Path) -> None:
    results = tables.results(run)
    metrics = tables.metrics(run, results) | {
        "rules": rules.replay(run, results),
        "calibration": calibration.figures(results.test),
    }
    (folder / "metrics.json").write_text(
        json.dumps(metrics, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(tables.predictions(run, results))
    with matplotlib.rc_context(style.RC):
        content = page.build(run, results, metrics, Gallery(folder))
    (folder / "index.html").write_text(render.html(content, folder), encoding="utf-8")
    (folder / "report.md").write_text(render.markdown(content), encoding="utf-8")
    (folder / "tables.tex").write_text(latex.tables(content), encoding="ascii")


def _refuse_foreign(target: Path) -> None:
    """A folder is only ever replaced if it is a report: `--out ~` must not cost anybody her home."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder for the report")
    if any(target.iterdir()) and not all((target / mark).is_file() for mark in _MARKS):
        raise ValueError(f"{target} holds something that is not a report; name a new or an empty folder")


def _sibling(target: Path, word: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{word}")


def _swap(fresh: Path, target: Path) -> None:
    old = _sibling(target, "old")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)

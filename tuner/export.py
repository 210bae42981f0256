"""What leaves a run: its best network as one file that answers as the evaluation did, or all of it in one zip."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from model import checkpoint, export, tiles
from model.config import RunConfig
from model.export import Deployable
from model.files import write_atomically, write_json
from model.parity import Judged, Mismatch, Parity, check_judged, compare
from model.thresholds import Thresholds
from model.tiles import Answerer
from tuner import report
from tuner.records import SearchFailed
from tuner.report import inputs, model_card, render, tables, words
from tuner.report.provenance import search_command
from tuner.run import Run

_FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
_COMPARED = "exports.json"
"""beside the exported files: their digests and those of what they were made from, and how far each is from it"""

_MADE_FROM = ("model.safetensors", "config.json", "thresholds.json", "images.json")

_EXTRA = ("onnx", "onnxscript", "onnxruntime")
_LONGEST_NAME = 100
_MEMBER_TIME = (1980, 1, 1, 0, 0, 0)
"""of all files in a zip: the same content is the same file"""


def export_run(run: Run, what: str) -> Path:
    """Writes one form (onnx, torch or report) into the run's directory; the file. Needs the run's lock.

    ValueError for a run that has no judged winner, or lacks a package; SearchFailed if the file would not answer as
    the network does, or the network not as the one that was judged: then no file of this format is left, not an
    earlier one either.
    """
    with run.locked():
        return _export_report(run) if what == "report" else _export_model(run, what)


def _export_model(run: Run, what: str) -> Path:
    if what == "onnx" and (missing := _missing_packages()):
        raise ValueError(
            f"exporting to ONNX needs the packages {', '.join(_EXTRA)}, found no {', '.join(missing)}; "
            "run: pip install 'segdec-tuner[export]'"
        )
    judged = inputs.read_evaluated(run.directory)
    best = run.directory / "best"
    path = best / _FILES[what]
    module = _deployable(best, judged)
    to_file: Callable[..., bytes] = export.to_onnx if what == "onnx" else export.to_torch
    run_file: Callable[[bytes], Answerer] = export.run_onnx if what == "onnx" else export.run_torch
    data = to_file(module, *judged.examples.image.shape[1:3], _about(run, judged, best))
    try:
        parity = compare(module, run_file(data), _judged(run, judged))
    except Mismatch as error:
        _forget(path)
        raise SearchFailed(str(error)) from error
    write_atomically(path, data)
    write_json(best / _COMPARED, _exports(best) | {path.name: _compared(best, data, parity, what)})
    _write_card(run, judged, module)
    return path


def _forget(path: Path) -> None:
    """An earlier file, what vouches for it, and the card, which speaks of it."""
    path.unlink(missing_ok=True)
    if (path.parent / _COMPARED).exists():
        write_json(path.parent / _COMPARED, _exports(path.parent))
    (path.parent / "README.md").unlink(missing_ok=True)


def _judged(run: Run, judged: inputs.EvaluatedRun) -> Judged:
    """What the evaluation found in its examples. ValueError if it does not say what it decided of one."""
    shown, test = judged.examples, judged.winner.test
    rows = {name: n for n, name in enumerate(test.names)}
    if missing := [name for name in shown.names if name not in rows]:
        raise ValueError(
            f"{run.directory / 'evaluation'}: each image of examples.npz must be in winner-test.npz, found no "
            f"{missing[0]!r}; restore evaluation/ from a copy of the run, or remove evaluation/selection.json and run "
            "`tuner finals`, which opens the test split again"
        )
    decisions = test.decision_logits[[rows[name] for name in shown.names]]
    return Judged(shown.names, shown.image, shown.probability, shown.mask, decisions)


def _missing_packages() -> list[str]:
    return [name for name in _EXTRA if importlib.util.find_spec(name) is None]


def _deployable(best: Path, judged: inputs.EvaluatedRun) -> Deployable:
    """ValueError if best/ is no model, or not the one that was judged: network, thresholds and figures are one
    thing."""
    network, config, thresholds = checkpoint.load_model(best, torch.device("cpu"))
    wanted = RunConfig.from_dict(judged.winner.config), Thresholds.from_dict(judged.winner.thresholds)
    if (config, thresholds) != wanted:
        raise ValueError(
            f"{best} must hold the network that was judged, with the configuration and the thresholds of "
            "evaluation/selection.json, found others; restore the folder from a copy of the run, or remove "
            "evaluation/selection.json and run `tuner finals`, which opens the test split again"
        )
    return Deployable(network, thresholds)


def _about(run: Run, judged: inputs.EvaluatedRun, best: Path) -> dict[str, Any]:
    """What a file says of itself, so that prediction can bring a photo to the right scale."""
    config = judged.winner.config
    return {
        "schema": 1,
        "input": {"height": config["input_height"], "width": config["input_width"]},
        "images": _read(best / "images.json"),
        "thresholds": _read(best / "thresholds.json"),
        "architecture": config["architecture"],
        "width": config["width"],
        "run": run.name,
        "trial": judged.winner.trial,
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; nothing where there is none: runs from before there was best/images.json have none. ValueError if
    it is broken."""
    try:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, found something else ({error}); restore it or remove it") from error
    return found


def _compared(best: Path, data: bytes, parity: Parity, what: str) -> dict[str, Any]:
    package = "onnxruntime" if what == "onnx" else "torch"
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "made_from": _made_from(best),
        "with": f"{package} {metadata.version(package)}",
        "compared": asdict(parity),
    }


def _exports(best: Path) -> dict[str, Any]:
    """What is known of the exported files that are there, are still as they were written, and were made from the
    network that lies beside them now."""
    found, made_from = _read(best / _COMPARED), _made_from(best)
    return {
        name: found[name]
        for name in _FILES.values()
        if name in found
        and _digest(best / name) == found[name]["sha256"]
        and found[name].get("made_from") == made_from  # an earlier version did not note it
    }


def _made_from(best: Path) -> dict[str, str | None]:
    return {name: _digest(best / name) for name in _MADE_FROM}


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _write_card(run: Run, judged: inputs.EvaluatedRun, module: Deployable) -> None:
    best = run.directory / "best"
    metrics = tables.metrics(judged, tables.results(judged))
    card = model_card.build(judged, metrics, _read(best / "images.json"), _exports(best), _tiling(module, judged))
    write_atomically(best / "README.md", render.markdown(card).encode())


def _tiling(module: Deployable, judged: inputs.EvaluatedRun) -> str:
    """What a photo larger than training's loses by tiles, measured on mosaics of test images; nothing where there are
    too few."""
    shown = judged.examples
    rows = np.random.default_rng(0).permutation(len(shown.names))  # they are sorted by Dice
    fours = [rows[k : k + 4] for k in range(0, len(rows) - 3, 4)]
    if not fours:
        return ""
    images = [tiles.mosaic(shown.image[four]) for four in fours]
    truths = [tiles.mosaic(shown.truth[four]) for four in fours]
    sizes = tiles.Sizes.of((shown.image.shape[1], shown.image.shape[2]), None)
    found = tiles.tiled_against_whole(module.answer, images, truths, sizes)
    alone = [tiles.dice(truth, tiles.mosaic(shown.mask[four])) for four, truth in zip(fours, truths, strict=True)]
    return (
        f"`tuner predict` answers photos that are larger than training's in tiles. Measured on "
        f"{words.plural(len(fours), 'mosaic')} of four of the evaluation's examples each, of twice the input's height "
        f"and width: mean Dice {found['tiled']:.3f} in tiles, {found['whole']:.3f} in one pass over the whole, "
        f"{np.mean(alone):.3f} with each image answered by itself. Compare these with one another alone: "
        f"{_picked(judged)}they are too few for an interval, and mosaics have edges where images meet, as no photo has."
    )


def _picked(judged: inputs.EvaluatedRun) -> str:
    """What the card says of how the examples were chosen; nothing where they are the whole split."""
    if len(judged.examples.names) == len(judged.winner.test):
        return ""
    return "half of the examples or more were picked, the worst failures and some of the best, "


def _export_report(run: Run) -> Path:
    """One zip with the report, the model and what reproduces them."""
    judged = inputs.read_evaluated(run.directory)
    module = _deployable(run.directory / "best", judged)
    best = run.directory / "best"
    if not _missing_packages() and _FILES["onnx"] not in _exports(best):
        _export_model(run, "onnx")
    else:
        try:
            check_judged(module, _judged(run, judged))
        except Mismatch as error:
            raise SearchFailed(str(error)) from error
        _write_card(run, judged, module)
    if (best / _COMPARED).exists():
        write_json(best / _COMPARED, _exports(best))
    report.write(run.directory)
    name = f"{_safe(run.name)}-report"
    path = run.directory / f"{name}.zip"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in _members(run, judged):
            info = zipfile.ZipInfo(f"{name}/{member}", _MEMBER_TIME)
            info.external_attr, info.create_system = 0o100644 << 16, 3  # a plain file, on any system
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    write_atomically(path, file.getvalue())
    return path


def _members(run: Run, judged: inputs.EvaluatedRun) -> Iterator[tuple[str, bytes]]:
    """Names inside the zip and what they hold, in order. W&B's files, the study and the checkpoints stay out, and
    exported files that are another network's."""
    best = run.directory / "best"
    stale = {best / name for name in _FILES.values()} - {best / name for name in _exports(best)}
    yield "README.md", _read_me(run, judged).encode()
    yield "space.yaml", yaml.safe_dump(judged.space, sort_keys=False, allow_unicode=True).encode()
    for name in ("run.json", "records.jsonl", "splits.json", "importance.json"):
        if (run.directory / name).is_file():
            yield name, (run.directory / name).read_bytes()
    for folder in ("best", "evaluation", "report"):
        for path in sorted((run.directory / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and not path.name.startswith(".") and path not in stale:
                yield path.relative_to(run.directory).as_posix(), path.read_bytes()


def _read_me(run: Run, judged: inputs.EvaluatedRun) -> str:
    facts = judged.facts
    model = "" if _FILES["onnx"] in _exports(run.directory / "best") else (
        "There is no model.onnx, for the packages that make it were not installed: pip install "
        "'segdec-tuner[export]', then tuner export with --format onnx.\n\n"
    )  # fmt: skip
    where = "" if facts["data_path"] == "synthetic" else (
        f"DATA is the folder of the data set; its fingerprint must be {judged.data['fingerprint']}. "
    )  # fmt: skip
    return (
        f"# Report of run {render.escape(facts['name'])}\n\n"
        "report/index.html is the report; best/README.md says what the model is and how it is used.\n\n"
        f"{model}"
        "This makes such a run again:\n\n"
        f"    pip install segdec-tuner=={facts['versions']['segdec-tuner']}\n"
        f"    {search_command(judged, 'DATA')}\n\n"
        f"{where}Trials that run at once end in an order of their own, so a search with several at a time does not "
        "repeat to the bit; the data, the splits and the training of a configuration do, on the same device.\n\n"
        "`tuner report` and `tuner export` take this folder, unpacked, as a run.\n"
    )


def _safe(name: str) -> str:
    """A name for a file, whatever the run's folder is called."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._-")[:_LONGEST_NAME] or "run"

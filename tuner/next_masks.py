"""`tuner next` as a story: which images have no mask, what the model is unsure of in each, in which order they would
teach it most; then the table and the pictures."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from model import deployed, splits
from model.arrays import Array
from model.config import RunConfig
from model.duplicates import different_first
from model.files import write_atomically
from model.inspection import HASH_SIDE, digest, perceptual_hash
from model.layouts import SPLITS
from model.sample import Sample, Supervision
from model.thresholds import Thresholds
from model.uncertainty import Maps, Uncertainty, look, usual_share
from tuner.names import cell, quoting, shown
from tuner.next_pictures import Entry, sheet, uncertainty_map
from tuner.photo_results import FAILURES, FULL, check_is_free, locked, make, progress, reason, write_image
from tuner.photos import NEXT, Photo, find, is_table, read
from tuner.records import SearchFailed
from tuner.run import Run, load_search

SHEET = "sheet.png"
MOST_ON_SHEET = 24

_COLUMNS = (
    "rank", "file", "score", "of_kind", "doubt_px", "disagreement_px", "contradiction_px", "defect_px", "mask_px",
    "height_px", "width_px", "decision", "label", "group", "note", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A photo that may get a mask, and what is known of it."""

    photo: Photo
    label: bool | None = None
    group: str = ""
    note: str = ""


@dataclass(frozen=True)
class Asked:
    """A candidate that the model has answered."""

    candidate: Candidate
    found: Uncertainty
    hash_B: Array
    height: int
    width: int


@dataclass
class Outcome:
    """How the ranking went."""

    out: Path
    first: str
    """the name of the image that would profit most; empty where none was ranked"""
    counts: Counter[str]
    """`ranked`, `left out` and `failed`"""

    def __str__(self) -> str:
        others = "".join(f", {self.counts[kind]} {kind}" for kind in ("left out", "failed") if self.counts[kind])
        first = f", first {shown(self.first)}" if self.first else ""
        return f"{shown(self.out / NEXT)}: {self.counts['ranked']} images ranked{first}{others}"


def propose(model: str, images: Sequence[str], out: str, count: int, console: Console) -> Outcome:
    """Writes next.csv, the uncertainty maps of the first `count` images, and a sheet of them into `out`.

    Without `images`, those of the model's run that have an image label and no mask. A broken file is told and does not
    stop the rest.
    """
    folder = Path(out)
    run = _run_of(Path(model))
    candidates, left_out = _named(images, folder, run) if images else _of_training(model, run, console)
    check_is_free(folder, lambda: is_table(folder / NEXT), "rankings")
    network = deployed.load(Path(model))
    if network.thresholds is None:
        raise ValueError(f"{model} must say its thresholds, found none; export it again with `tuner export`")
    if network.note:
        console.print(network.note, style="yellow", markup=False, highlight=False)
    make(folder)
    with locked(folder):
        asked, failed = _ask(candidates, network, network.thresholds, console)
        usual = usual_share(one.found for one in asked)
        order = different_first(
            [one.found.score(usual) for one in asked],
            [one.candidate.group for one in asked],
            np.array([one.hash_B for one in asked], bool).reshape(len(asked), HASH_SIDE**2),
        )
        ranked = [_row(rank, asked[k], usual, of_kind) for rank, (k, of_kind) in enumerate(order, start=1)]
        rows = [*ranked, *map(_remark, left_out), *failed]
        first = [asked[k] for k, _ in order[:count]]
        try:
            _write_table(folder, rows)
            problems = _draw(first, ranked, network, network.thresholds, folder, console)
            if problems:
                _write_table(folder, rows)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise SearchFailed(f"the disk is full ({error}); make room, then the same command begins anew") from error
    counts = Counter({"ranked": len(ranked), "left out": len(left_out), "failed": len(failed) + problems})
    return Outcome(folder, first[0].candidate.photo.name if first else "", counts)


def _run_of(model: Path) -> Run | None:
    """The run whose folder, best/ or exported file this is: it knows which images are not to be learnt from."""
    model = model.resolve()
    best = model.parent if model.is_file() else model if model.name == "best" else model / "best"
    return load_search(best.parent) if best.name == "best" and (best.parent / "run.json").is_file() else None


def _train_of(run: Run) -> list[Sample]:
    """The run's training images as its best trial saw them. ValueError if it has none yet."""
    if run.space.cross_validation:
        raise ValueError(
            "MODEL must be of a search without cross-validation, whose folds share out training and validation images, "
            f"found {run.directory}; name images, and as MODEL its exported ONNX file, copied to another folder"
        )
    file = run.directory / "best" / "config.json"
    try:
        config = RunConfig.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file} must hold the configuration of the best trial ({error}); `tuner finals {run.directory}` leaves it"
        ) from error
    return splits.keep_masks(run.splits().train, config.num_segmented, config.seed)


def _of_training(model: str, run: Run | None, console: Console) -> tuple[list[Candidate], list[Candidate]]:
    """The positives of the run's training split whose mask the best trial did not have; none is left out."""
    if run is None:
        raise ValueError(
            f"without IMAGE, MODEL must be the folder of a run, whose training images are then ranked, found {model}; "
            "name images that have no mask"
        )
    samples = [sample for sample in _train_of(run) if sample.supervision is Supervision.IMAGE]
    if not samples:
        raise ValueError(
            f"without IMAGE, a run must have training images with a label and no mask, found none in {run.directory}; "
            "name images that have no mask"
        )
    run.check_files([replace(sample, mask=None) for sample in samples], console)
    return [_candidate(Photo(s.image, s.image.relative_to(run.data_folder).as_posix()), s) for s in samples], []


def _named(images: Sequence[str], out: Path, run: Run | None) -> tuple[list[Candidate], list[Candidate]]:
    """What IMAGE stands for: candidates, and those that must not be or need not be, with the reason. ValueError if all
    are such."""
    photos = find(images, out)
    if run is None:
        return [Candidate(photo) for photo in photos], []
    sides = run.splits()._replace(train=_train_of(run))
    known = {s.digest: (side, s) for side, split in zip(SPLITS, sides, strict=True) for s in split}
    candidates, left_out = [], []
    for photo in photos:
        try:
            side, sample = known.get(digest(photo.path), ("", None))
        except OSError:  # told when it is read
            side, sample = "", None
        if sample is None:
            candidates.append(Candidate(photo))
        elif side != "train":
            why = f"left out: it is in the {side} split of the run, from which nothing may be learnt"
            left_out.append(Candidate(photo, sample.positive, sample.group, why))
        elif sample.supervision is Supervision.PIXEL:
            what = "its mask" if sample.positive else "that it has no defect"
            left_out.append(Candidate(photo, sample.positive, sample.group, f"left out: training has {what} already"))
        else:
            candidates.append(_candidate(photo, sample))
    if not candidates:
        whys = Counter(one.note.removeprefix("left out: ") for one in left_out)
        raise ValueError(
            "IMAGE must be images that have no mask and are of neither validation nor test, found "
            + "; ".join(f"{count} of which: {why}" for why, count in whys.items())
            + "; name others, or none for the run's own"
        )
    return candidates, left_out


def _candidate(photo: Photo, sample: Sample) -> Candidate:
    note = "the data set has a mask, which the best trial did not use (num_segmented)" if sample.mask else ""
    return Candidate(photo, sample.positive, sample.group, note)


def _ask(
    candidates: Sequence[Candidate], network: deployed.Deployed, thresholds: Thresholds, console: Console
) -> tuple[list[Asked], list[dict[str, Any]]]:
    """What the model says, and the rows of files that fail."""
    asked, failed = [], []
    with progress(console, len(candidates)) as told:
        try:
            for done, candidate in enumerate(candidates):
                photo = candidate.photo
                try:
                    image_HWC, note = read(photo.path)
                    found, _ = look(
                        image_HWC, network.answer, network.sizes, thresholds, candidate.label, told.of(photo, done)
                    )
                    hash_B = perceptual_hash(image_HWC)
                except (OSError, *FAILURES) as error:
                    problem = reason(error, photo)
                    failed.append(_remark(candidate) | {"error": problem})
                    told.say(photo, problem)
                    continue
                if note:
                    told.say(photo, note)
                    candidate = replace(candidate, note="; ".join(filter(None, (candidate.note, note))))
                asked.append(Asked(candidate, found, hash_B, *image_HWC.shape[:2]))
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"{len(asked) + len(failed)} of {len(candidates)} images were looked at, and nothing is written; the "
                "same command begins anew"
            ) from stop
    return asked, failed


def _remark(candidate: Candidate) -> dict[str, Any]:
    """What a row says of a photo, ranked or not."""
    row: dict[str, Any] = {"file": cell(candidate.photo.name), "note": candidate.note}
    row["group"] = cell(candidate.group)
    row["label"] = "" if candidate.label is None else int(candidate.label)
    return row


def _row(rank: int, asked: Asked, usual: float, of_kind: int) -> dict[str, Any]:
    found = asked.found
    px = {
        "doubt": found.doubt,
        "disagreement": found.disagreement,
        "contradiction": found.contradiction(usual),
        "defect": found.defect,
    }
    return {
        **_remark(asked.candidate),
        "rank": rank,
        "score": f"{found.score(usual):.6g}",
        "of_kind": of_kind,
        **{f"{name}_px": f"{value:.1f}" for name, value in px.items()},
        "mask_px": found.mask,
        "height_px": asked.height,
        "width_px": asked.width,
        "decision": "" if found.decision is None else f"{found.decision:.6g}",
    }


def _write_table(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    names = [str(row[column]) for row in rows for column in ("file", "group")]
    lines = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n", quoting=quoting(names))
    lines.writeheader()
    lines.writerows(rows)
    write_atomically(folder / NEXT, text.getvalue().encode(errors="backslashreplace"))


def _draw(
    first: Sequence[Asked],
    rows: Sequence[dict[str, Any]],
    network: deployed.Deployed,
    thresholds: Thresholds,
    folder: Path,
    console: Console,
) -> int:
    """Asks anew for the maps of the first images, which were not kept: there may be thousands. How many failed, whose
    rows say why."""
    entries = []
    problems = 0
    with progress(console, len(first)) as told:
        for done, (asked, row) in enumerate(zip(first, rows, strict=False)):
            photo, label = asked.candidate.photo, asked.candidate.label
            try:
                image_HWC, _ = read(photo.path)
                maps: Maps
                _, maps = look(image_HWC, network.answer, network.sizes, thresholds, label, told.of(photo, done))
                drawn_HWC = uncertainty_map(image_HWC, maps.error_HW)
                write_image(folder / "uncertainty" / f"{photo.name}.png", drawn_HWC[..., ::-1], [])
            except FAILURES as error:
                row["error"] = reason(error, photo)
                told.say(photo, row["error"])
                problems += 1
                continue
            if done < MOST_ON_SHEET:
                entries.append(Entry.of(row["rank"], photo.name, row["score"], image_HWC, maps.mask_HW, drawn_HWC))
    if entries:
        write_image(folder / SHEET, sheet(entries)[..., ::-1], [])
    return problems

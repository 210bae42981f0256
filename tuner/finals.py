"""Chooses the winner, and evaluates winner and baseline on validation and, once, on test.

The only reader of the test split. It runs on a worker with a trial's resources.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import checkpoint, failures, folds
from model.arrays import Array
from model.config import Judgement, RunConfig
from model.data import Cache, open_cache
from model.evaluate import Scores, predict, score
from model.files import write_atomically, write_json
from model.folds import Fold
from model.inspection import Read
from model.network import SegDecNet, build, describe
from model.splits import Splits, fingerprint_of_test
from model.thresholds import Thresholds, sigmoid
from tuner import checkpoints, records
from tuner.checkpoints import Torn, Trials
from tuner.cluster import Resources, run_on_worker
from tuner.records import OPEN_TEST, SearchFailed
from tuner.scratch import scratch_folder
from tuner.selection import Contender, Selection
from tuner.trial import take_device, weights_folder

logger = logging.getLogger(__name__)

SHOWN_EXAMPLES = 24
"""Test images whose maps are kept for the report."""

_BEST = 4
"""the best of them that show a defect, which head the report"""


@dataclass(frozen=True)
class Finalist:
    """A trained configuration that is to be evaluated."""

    trial: str
    checkpoint: str
    """address of the checkpoint that holds its weights"""
    config: RunConfig
    thresholds: Thresholds
    epoch: int
    value: float
    violations: dict[str, float] | None
    """how far beyond each constraint; None where there is none"""
    fold: int | None = None
    """which of its trial's folds judged this network, counted from 1; None where it has none"""

    def model(self, scratch: Path) -> Path:
        """The folder of its weights on this machine, copied below an empty folder."""
        return checkpoints.fetch(self.checkpoint, scratch / self.trial, weights_folder(self.epoch, self.fold))

    def describe(self) -> dict[str, Any]:
        """Its entry in selection.json."""
        return {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "thresholds": self.thresholds.to_dict(),
            "value": self.value,
            **({} if self.fold is None else {"fold": self.fold}),
            **({} if self.violations is None else {"violations": self.violations}),
        }


def evaluate(
    run_directory: Path,
    trials: Trials,
    splits: Splits,
    metric: str,
    resources: Resources,
    open_test: bool = False,
    read: Read = Path.read_bytes,
    dealt: Sequence[Fold] = (),
    selected: Selection | None = None,
) -> None:
    """Writes evaluation/ and best/. ValueError if that was done before.

    Where configurations were trained with several seeds, `selected` says which one has won. It is delivered as that of
    its networks which is best on validation; all that are left of it and of the baseline are judged on test. Without,
    the best single training has won. Where no trial meets the constraints, the one that is least beyond them stands in,
    and all that is written says so.

    `dealt` are the folds of trials that have some: then validation is the fold that chose a network's epoch and
    thresholds, which may be another one for the baseline.

    With `open_test` the thresholds, too, are chosen on test, as the public scripts do, and say so wherever they go;
    that lies apart, in evaluation/open-test/, and leaves the rest as it is. Configuration and epoch stay those of
    validation.
    """
    check_test_is_sealed(run_directory, open_test)
    found = records.read(run_directory)
    nearest = records.nearest(found)
    chosen, of_winner = _chosen(trials, selected) if selected else (None, [])
    winner = of_winner[0] if of_winner else _finalist(trials, nearest or records.best(found))
    if winner is None:
        raise SearchFailed("no trial has completed, so there is no best one; see the reasons in records.jsonl")
    if nearest:
        logger.warning("%s; it is evaluated all the same", records.none_feasible(nearest))
    baseline = _finalist(trials, records.baseline(found))
    of_baseline = _of_baseline(trials, selected, baseline)
    baseline = of_baseline[0] if of_baseline else baseline
    finalists = {"winner": winner} | ({"baseline": baseline} if baseline and baseline.trial != winner.trial else {})

    evaluation = run_directory / "evaluation"
    target = evaluation / OPEN_TEST if open_test else evaluation
    target.mkdir(parents=True, exist_ok=True)
    (target / "selection.json").unlink(missing_ok=True)  # written last: without it, nothing here counts
    is_repeated = max(len(of_winner), len(of_baseline)) > 1
    others = [*{one.trial: one for one in (*of_winner, *of_baseline)}.values()] if is_repeated else []
    names = [finalist.trial for finalist in (*finalists.values(), *others)]
    _note_opening(evaluation, list(dict.fromkeys(names)), fingerprint_of_test(splits), open_test)
    with ThreadPoolExecutor(1) as meanwhile:  # torch imports its compiler for networks without content: a second
        architectures = meanwhile.submit(_architectures, winner.config)
        try:
            files, applied, sizes, by_seed = run_on_worker(
                _evaluate_on_worker, resources, finalists, others, splits, dealt, metric, resources, open_test, read
            )
        except Torn as error:  # not what somebody has asked for
            raise SearchFailed(str(error)) from error
    for name, arrays in files.items():
        _write_arrays(target / name, arrays)
    write_json(target / "architecture.json", architectures.result())
    finalists = {role: replace(finalist, thresholds=applied[role]) for role, finalist in finalists.items()}
    if not open_test:
        _write_best(run_directory / "best", finalists["winner"], sizes)
    write_json(
        target / "selection.json",
        {
            "winner": winner.trial,
            "baseline": baseline.trial if baseline else None,
            "metric": metric,
            "mode": "max",
            "trials": {finalist.trial: finalist.describe() for finalist in finalists.values()},
            **({"configuration": chosen.trial, "prefer": selected.prefer} if selected and chosen else {}),
            **({"seeds": by_seed} if others else {}),
        },
    )


def check_test_is_sealed(run_directory: Path, open_test: bool) -> None:
    """ValueError if the test split was evaluated before and nobody asks to open it again.

    An evaluation that was cut short has shown nothing to anybody: it may be done again, and is logged again.
    """
    evaluation = run_directory / "evaluation"
    if (evaluation / "selection.json").exists() and not open_test:
        log = evaluation / "openings.jsonl"
        times = [json.loads(line)["time"] for line in log.read_text().splitlines()] if log.exists() else []
        raise ValueError(
            f"the test split is opened once a run, and it was at {times[0] if times else 'a time that is not logged'}; "
            "every further look makes its figures less honest. `tuner report` draws the report again; --open-test "
            "opens the split again, logs it and keeps what it finds apart"
        )


def _finalist(trials: Trials, record: dict[str, Any] | None) -> Finalist | None:
    """The trained network of a record. SearchFailed if its checkpoint is gone, or is of another epoch or threshold
    than the record: they are one thing."""
    if record is None or record["status"] != records.Status.COMPLETED:
        return None
    config = RunConfig.from_dict(record["config"])
    source = record["replayed_from"] or record["trial"]
    found = checkpoints.newest(trials, source, config)
    if found is None:
        raise SearchFailed(f"the checkpoint of trial {source} is gone from {trials.place.address}")
    replays = found.progress["replays"]
    unknown = {"epoch": None, "thresholds": None}
    kept = next((replay for replay in replays if Judgement.of(replay) == config.judgement()), unknown)
    fold = record.get("fold")
    wanted = record["best_epoch"], record["thresholds"], fold
    is_kept = (kept["epoch"], kept["thresholds"], kept.get("fold")) == wanted
    if not (is_kept and found.holds(weights_folder(record["best_epoch"], fold))):
        raise SearchFailed(
            f"the checkpoint {found.address} must hold epoch {record['best_epoch']} of trial {source} with the "
            f"thresholds of its record, found epoch {kept['epoch']} with {kept['thresholds']}; one of them was changed"
        )
    return Finalist(
        record["trial"],
        found.address,
        config,
        Thresholds.from_dict(record["thresholds"]),
        record["best_epoch"],
        record["value"],
        record.get("violations"),
        fold,
    )


def _networks(trials: Trials, contender: Contender) -> list[Finalist]:
    """The networks of a configuration that are left, the best on validation first and those that violate a constraint
    last. SearchFailed if none is."""
    found, why = [], None
    for training in sorted(contender.trainings, key=lambda one: (not records.is_feasible(one), -one["value"])):
        try:
            finalist = _finalist(trials, training)
        except SearchFailed as gone:
            why = why or gone
            continue
        assert finalist is not None
        found.append(finalist)
    if not found and why:
        raise why
    return found


def _chosen(trials: Trials, selected: Selection) -> tuple[Contender, list[Finalist]]:
    """The configuration that has won, with its networks; the next best where the search has removed its only one, which
    then had not been good enough to be repeated. SearchFailed if all are gone."""
    gone = None
    order = sorted(range(len(selected.contenders)), key=lambda n: (n != selected.winner, -selected.belief.means[n]))
    for contender in (selected.contenders[n] for n in order):
        try:
            return contender, _networks(trials, contender)
        except SearchFailed as error:
            gone = gone or error
            logger.warning("configuration %s is passed over: %s", contender.trial, error)
    assert gone is not None
    raise gone


def _of_baseline(trials: Trials, selected: Selection | None, baseline: Finalist | None) -> list[Finalist]:
    """All networks of the baseline, so that the best of several is compared with the best of several."""
    place = selected.index(baseline.trial) if selected and baseline else None
    return _networks(trials, selected.contenders[place]) if selected and place is not None else []


def _note_opening(evaluation: Path, trials: list[str], fingerprint: str, open_test: bool) -> None:
    path = evaluation / "openings.jsonl"
    before = path.read_text() if path.exists() else ""
    why = "the final evaluation of winner and baseline"
    if open_test:
        why = "asked for with --open-test, to choose thresholds on it"
    time = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"time": time, "trials": trials, "why": why, "fingerprint": fingerprint}
    write_atomically(path, (before + json.dumps(line) + "\n").encode())


def _evaluate_on_worker(
    finalists: dict[str, Finalist],
    others: list[Finalist],
    splits: Splits,
    dealt: Sequence[Fold],
    metric: str,
    resources: Resources,
    choose_on_test: bool,
    read: Read,
) -> tuple[dict[str, dict[str, Array]], dict[str, Thresholds], Array, list[dict[str, Any]]]:
    """Arrays by the name of their file, the thresholds that were applied by role, the (N, 2) sizes of the files of the
    winner's validation, and what each of the `others` comes to. Nothing is written here, for a worker may have another
    disk."""
    device = take_device(resources.gpus_per_trial, int(resources.cpus_per_trial))
    files: dict[str, dict[str, Array]] = {}
    applied = {}
    sizes: Array = np.empty((0, 2))
    for role, finalist in finalists.items():
        with scratch_folder() as scratch:
            network, _, _ = checkpoint.load_model(finalist.model(scratch), device)
        config = finalist.config
        size = config.input_height, config.input_width
        caches = {
            "validation": _validation_cache(splits, dealt, finalist.fold, size, read),
            "test": open_cache(splits.test, *size, read=read),
        }
        if role == "winner":
            sizes = caches["validation"].original_sizes
        thresholds = finalist.thresholds
        if choose_on_test:
            judgement = config.judgement()
            scores = score(network, caches["test"], config, device, (judgement.threshold_factor,))
            thresholds = scores.choose(judgement, chosen_on="test")
        for split, cache in caches.items():
            scores = score(network, cache, config, device, centre_lines_at=thresholds)
            files[f"{role}-{split}.npz"] = _split_arrays(cache, scores, thresholds)
            if (role, split) == ("winner", "test"):
                files["examples.npz"] = _example_arrays(network, cache, config, device, thresholds, scores)
        applied[role] = thresholds
    by_seed = [_on_test(other, splits, metric, choose_on_test, device, read) for other in others]
    return files, applied, sizes, by_seed


def _on_test(
    finalist: Finalist, splits: Splits, metric: str, choose_on_test: bool, device: torch.device, read: Read
) -> dict[str, Any]:
    """The objective of one network on validation, as its record says, and on test."""
    with scratch_folder() as scratch:
        network, _, _ = checkpoint.load_model(finalist.model(scratch), device)
    config = finalist.config
    judgement = config.judgement()
    cache = open_cache(splits.test, config.input_height, config.input_width, read=read)
    scores = score(network, cache, config, device, (judgement.threshold_factor,))
    thresholds = scores.choose(judgement, chosen_on="test") if choose_on_test else finalist.thresholds
    figures = scores.figures([thresholds])[0]
    return {"trial": finalist.trial, "seed": config.seed, "validation": finalist.value, "test": figures[metric]}


def _validation_cache(
    splits: Splits, dealt: Sequence[Fold], fold: int | None, size: tuple[int, int], read: Read
) -> Cache:
    """Of the images that chose a network's epoch and thresholds."""
    if fold is None:
        return open_cache(splits.validation, *size, read=read)
    pool, rows = folds.pool(splits), dealt[fold - 1].validation
    return open_cache(pool, *size, read=read).part(rows, [pool[row] for row in rows])


def _split_arrays(cache: Cache, scores: Scores, thresholds: Thresholds) -> dict[str, Array]:
    assert scores.centre_lines is not None
    return {
        "thresholds": np.array(json.dumps(thresholds.to_dict())),
        "names": np.array([sample.name for sample in cache.samples]),
        "groups": np.array([sample.group for sample in cache.samples]),
        "sources": np.array([sample.source for sample in cache.samples]),
        "labels": scores.labels,
        "decision_logits": scores.decision_logits.astype(np.float32),
        "centre_lines": np.stack(scores.centre_lines, axis=1),
        **scores.counts.arrays(),
    }


def example_rows(scores: Scores, thresholds: Thresholds) -> list[int]:
    """Rows from the worst Dice to the best: the failures that the report names, of the images with a defect the best
    and the one nearest to their median, and the rest spread over all ranks."""
    selected = thresholds.select(scores.counts, scores.decision_logits)
    dice, predicted, truth = selected.dice()[:, 0], selected.predicted[:, 0], selected.truth[:, 0]
    ranked = np.argsort(dice, kind="stable")
    if len(ranked) <= SHOWN_EXAMPLES:
        return [int(n) for n in ranked]
    decided = None if thresholds.decision_logit is None else thresholds.decide(scores.decision_logits)
    found = failures.find(scores.labels, decided, scores.decision_logits, predicted, truth, dice)
    rows = {n for _, n in found.shown()}
    with_truth = [int(n) for n in ranked if truth[n]]
    if with_truth:
        rows |= {*with_truth[-_BEST:], min(with_truth, key=lambda n: abs(dice[n] - np.median(dice[with_truth])))}
    others = [int(n) for n in ranked if n not in rows]
    rows |= {others[k] for k in np.linspace(0, len(others) - 1, SHOWN_EXAMPLES - len(rows)).round().astype(int)}
    return [int(n) for n in ranked if n in rows]


def _example_arrays(
    network: SegDecNet, cache: Cache, config: RunConfig, device: torch.device, thresholds: Thresholds, scores: Scores
) -> dict[str, Array]:
    rows = example_rows(scores, thresholds)
    answers = predict(network, cache.images[rows], config, device)
    decisions, logits = (torch.cat(part).cpu().numpy() for part in zip(*answers, strict=True))
    masks = [thresholds.mask(*answer) for answer in zip(logits, decisions, strict=True)]
    return {
        "names": np.array([cache.samples[n].name for n in rows]),
        "image": np.asarray(cache.images[rows]),
        "truth": np.asarray(cache.masks[rows]).astype(bool),
        "probability": sigmoid(logits).astype(np.float16),
        "mask": np.stack(masks),
    }


def _architectures(config: RunConfig) -> dict[str, Any]:
    """The stages of the original network and of the one used, read off the modules without computing anything."""
    with torch.device("meta"):
        original, used = build("segdecnet"), build(config.architecture, width=config.width, norm=config.norm)
    size = config.input_height, config.input_width
    return {"original": describe(original, *size), "used": describe(used, *size)}


def _write_arrays(path: Path, arrays: dict[str, Array]) -> None:
    building = path.with_name(f".{path.stem}.part.npz")
    np.savez_compressed(building, allow_pickle=False, **arrays)
    building.replace(path)


def _write_best(best: Path, winner: Finalist, sizes_N2: Array) -> None:
    """The model folder, and the sizes of the images that it has learnt from: prediction brings a photo to their scale.
    They are those of validation, which comes from where training comes from."""
    building = best.with_name(".best.part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    with scratch_folder() as scratch:
        shutil.copy2(winner.model(scratch) / "model.safetensors", building)
    write_json(building / "config.json", winner.config.to_dict())
    beyond = {"violations": winner.violations} if any((winner.violations or {}).values()) else {}
    write_json(building / "thresholds.json", winner.thresholds.to_dict() | {"epoch": winner.epoch} | beyond)
    write_json(building / "images.json", _image_sizes(sizes_N2))
    shutil.rmtree(best, ignore_errors=True)
    building.rename(best)


def _image_sizes(sizes_N2: Array) -> dict[str, int]:
    """px"""
    found = {"": np.median(sizes_N2, axis=0), "smallest_": sizes_N2.min(axis=0), "largest_": sizes_N2.max(axis=0)}
    return {
        f"{kind}{side}": round(float(found[kind][k])) for kind in found for k, side in enumerate(("height", "width"))
    }

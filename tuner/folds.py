"""A trial with cross-validation: a training a fold, one after another, each of them a plain trial (tuner/trial.py).

Network f is trained on all folds but f, which judges it and chooses its epoch and thresholds. Where it is nested, that
is done by the next fold, which is left out of training too, and f is only scored.

All networks map one decoded cache. What a trial reports is a fold, as a plain one reports an epoch: its value so far is
the mean over the folds that are done. What it hands over is one of its networks, a typical one: that of the fold whose
own value is the median of all, the lower one of two.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from model import checkpoint, folds
from model.config import Judgement, RunConfig
from model.data import Cache, open_cache
from model.evaluate import score
from model.files import write_json
from model.folds import Fold
from model.inspection import Read
from model.sample import Sample
from model.splits import Splits
from model.thresholds import Thresholds
from tuner.scratch import scratch_folder
from tuner.space import Space
from tuner.trial import Report, Task, TrialTask, batch_problem, nothing_yet, plain_rules, weights_folder


def task_of(space: Space, found: Splits, read: Read = Path.read_bytes) -> Task:
    """What a space asks of its trials. ValueError if the data cannot be dealt into so many folds."""
    if space.cross_validation is None:
        return TrialTask.of(space, found.train, found.validation, read)
    pool = folds.pool(found)
    return FoldsTask(TrialTask.of(space, [], [], read), pool, folds.deal(pool, space.cross_validation, space.seed))


@dataclass(frozen=True, kw_only=True)
class _FoldTask(TrialTask):
    """A plain trial on parts of one decoded cache."""

    pool: list[Sample]
    fold: Fold

    def training_cache(self, config: RunConfig) -> Cache:
        return self._whole(config).part(self.fold.train, self.training_samples(config))

    def validation_cache(self, config: RunConfig) -> Cache:
        return self._whole(config).part(self.fold.validation, self.validation)

    def outer_cache(self, config: RunConfig) -> Cache:
        return self._whole(config).part(self.fold.outer, [self.pool[row] for row in self.fold.outer])

    def _whole(self, config: RunConfig) -> Cache:
        return open_cache(self.pool, config.input_height, config.input_width, read=self.read)


@dataclass(frozen=True)
class FoldsTask:
    """What all trials of a search with cross-validation share."""

    plain: TrialTask
    """how networks are judged; without samples"""
    pool: list[Sample]
    folds: list[Fold]

    @property
    def decoded(self) -> list[list[Sample]]:
        return [self.pool]

    def traced(self, folder: Path) -> FoldsTask:
        """Of the first training."""
        return replace(self, plain=self.plain.traced(folder))

    def part(self, n: int) -> _FoldTask:
        """The plain trial of a fold, counted from 0."""
        fold = self.folds[n]
        own = {
            "train": [self.pool[row] for row in fold.train],
            "validation": [self.pool[row] for row in fold.validation],
        }
        return _FoldTask(**(vars(self.plain) | own), pool=self.pool, fold=fold)

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Report) -> None:
        """Trains fold after fold, from the checkpoint folder `resume` if there is one, reporting every fold.

        The progress is that of a plain trial, in folds: `epochs` counts those that are done, and a row of the history
        is their mean so far, with this fold's own value as `fold_value`. `best_epoch` and `thresholds` are of the
        network that is handed over, `fold` says which that is, and `folds` has `value`, `epoch`, `thresholds` of each,
        where it is nested `outer` too. So has every replay.
        """
        self._run(config, [device], resume, report)

    def run_together(
        self, config: RunConfig, devices: Sequence[torch.device], resume: Path | None, report: Report
    ) -> None:
        """The same, each network on several devices. ValueError as for a plain trial."""
        if problem := batch_problem(config.batch_size, len(devices)):
            raise ValueError(problem)
        self._run(config, devices, resume, report)

    def _run(self, config: RunConfig, devices: Sequence[torch.device], resume: Path | None, report: Report) -> None:
        with scratch_folder() as scratch:
            keeper = _Keeper(self, config, scratch, resume)
            if keeper.progress["epochs"] == len(self.folds):
                report(keeper.progress, keeper.directory)  # it was done, and only the word of it was lost
                return
            while keeper.progress["status"] == "running":
                started, before = time.monotonic(), keeper.progress["seconds"]
                number = keeper.progress["epochs"] + 1
                try:
                    reached, folder = self._train(number - 1, config, devices, scratch / f"fold-{number}")
                    if reached["status"] == "diverged":
                        raise FloatingPointError(reached["reason"])
                    keeper.add(reached, folder, self._outer_values(number - 1, config, devices[0], reached, folder))
                    shutil.rmtree(folder)
                except FloatingPointError as error:
                    keeper.progress |= {"status": "diverged", "reason": f"fold {number}: {error}"}
                keeper.progress["seconds"] = before + time.monotonic() - started
                report(keeper.progress, None if keeper.progress["status"] == "diverged" else keeper.checkpoint())

    def _train(
        self, n: int, config: RunConfig, devices: Sequence[torch.device], folder: Path
    ) -> tuple[dict[str, Any], Path]:
        """What the plain trial of a fold came to, and its last checkpoint, which is put into `folder`."""
        reached: dict[str, Any] = {}

        def heard(progress: dict[str, Any], at: Path | None) -> None:
            reached.update(progress)
            if progress["status"] == "completed" and at:
                shutil.copytree(at, folder)

        part = self.part(n)
        if len(devices) > 1:
            part.run_together(config, devices, None, heard)
        else:
            part.run(config, devices[0], None, heard)
        return reached, folder

    def _outer_values(
        self, n: int, config: RunConfig, device: torch.device, reached: Mapping[str, Any], folder: Path
    ) -> dict[Judgement, float]:
        """The objective on the outer fold by judgement, each with the weights and thresholds that the inner one chose;
        of those whose weights are kept. Nothing unless it is nested."""
        part = self.part(n)
        found: dict[Judgement, float] = {}
        if not part.fold.outer:
            return found
        cache = part.outer_cache(config)
        wanted = set(self.plain.judgements(config))
        for epoch in sorted({replay["epoch"] for replay in reached["replays"] if Judgement.of(replay) in wanted}):
            network, _, _ = checkpoint.load_model(folder / weights_folder(epoch), device)
            mine = [r for r in reached["replays"] if Judgement.of(r) in wanted and r["epoch"] == epoch]
            figures = score(network, cache, config, device).figures(
                [Thresholds.from_dict(r["thresholds"]) for r in mine]
            )
            # 0, the worst, where there is no such figure, as on validation
            found |= {Judgement.of(r): one[part.metric] or 0.0 for r, one in zip(mine, figures, strict=True)}
        return found


class _Keeper:
    """The progress of a trial and its files: the networks of the folds that are done and may be the one that is handed
    over, in `best/`."""

    def __init__(self, task: FoldsTask, config: RunConfig, scratch: Path, resume: Path | None) -> None:
        self.folds = len(task.folds)
        self.judgements = task.plain.judgements(config)
        self.directory = scratch / "checkpoint"
        self.progress = nothing_yet() | {"fold": None, "folds": []}
        self.rows: list[dict[str, Any]] = []
        """of each fold, the row of its history at the epoch that it keeps"""
        if resume:
            shutil.copytree(resume, self.directory)
            self.progress = checkpoint.load_progress(resume)
            self.rows = self.progress.pop("rows")
        else:
            self.directory.mkdir()

    def add(self, reached: Mapping[str, Any], folder: Path, outer: Mapping[Judgement, float]) -> None:
        """Takes in a fold that is done, from what its plain trial came to and its checkpoint."""
        number = len(self.rows) + 1
        replays = []
        for n, own in enumerate(reached["replays"]):
            way = Judgement.of(own)
            before = self.progress["replays"][n]["folds"] if number > 1 else []
            kept = {key: own[key] for key in ("value", "epoch", "thresholds", "figures") if key in own}
            folds = [*before, kept | ({"outer": outer[way]} if way in outer else {})]
            replays.append(way._asdict() | _together(folds))
        row = next(row for row in reached["history"] if row["epoch"] == reached["best_epoch"])
        self.rows.append({key: value for key, value in row.items() if key != "epoch"})
        history_row = {"epoch": number, **_means(self.rows), "fold_value": row["value"]}
        self._keep_weights(replays, folder, number)
        own = replays[0]
        by_way = {Judgement.of(replay): replay for replay in replays}
        self.progress |= {
            "status": "completed" if number == self.folds else "running",
            "epochs": number,
            "history": [*self.progress["history"], history_row],
            "replays": replays,
            "value": own["value"],
            "best_epoch": own["epoch"],
            "thresholds": own["thresholds"],
            "fold": own["fold"],
            "folds": own["folds"],
            "rules": {way.rule: by_way[way]["value"] for way in plain_rules(self.judgements)},
            "micro_batch": reached["micro_batch"] or self.progress["micro_batch"],
        }

    def _keep_weights(self, replays: list[dict[str, Any]], folder: Path, number: int) -> None:
        """Those that a judgement of this configuration, or one that the search may propose, may yet hand over."""
        wanted = set()
        for replay in replays:
            if Judgement.of(replay) in self.judgements:
                own = replay["folds"]
                wanted |= {weights_folder(own[n]["epoch"], n + 1) for n in may_be_median(_values(own), self.folds)}
        best = self.directory / "best"
        best.mkdir(exist_ok=True)
        for source in (folder / "best").iterdir():
            target = self.directory / weights_folder(int(source.name), number)
            if str(target.relative_to(self.directory)) in wanted and not target.exists():
                shutil.copytree(source, target)
        for there in best.iterdir():
            if str(there.relative_to(self.directory)) not in wanted:
                shutil.rmtree(there)
        shutil.rmtree(self.directory / "previews", ignore_errors=True)
        shutil.copytree(folder / "previews", self.directory / "previews")

    def checkpoint(self) -> Path:
        """A sealed folder."""
        write_json(self.directory / "progress.json", self.progress | {"rows": self.rows})
        checkpoint.seal(self.directory)
        return self.directory


def _together(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """What some folds come to, judged in one way."""
    values = _values(folds)
    middle = _ranked(values)[(len(values) - 1) // 2]
    found = {"value": fmean(values), "epoch": folds[middle]["epoch"], "thresholds": folds[middle]["thresholds"]}
    figures = {"figures": _means([fold["figures"] for fold in folds])} if "figures" in folds[0] else {}
    return found | figures | {"fold": middle + 1, "folds": folds}


def _values(folds: list[dict[str, Any]]) -> list[float]:
    return [fold["value"] for fold in folds]


def _ranked(values: Sequence[float]) -> list[int]:
    """Their places, the lowest value first; of equals the earlier fold."""
    return sorted(range(len(values)), key=lambda n: (values[n], n))


def may_be_median(values: Sequence[float], folds: int) -> list[int]:
    """The places of the values that may be the lower median when there are as many as there are folds."""
    middle, to_come = (folds - 1) // 2, folds - len(values)
    return [n for rank, n in enumerate(_ranked(values)) if rank <= middle <= rank + to_come]


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """By key; None where one of the rows has no such figure."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: None if None in values else fmean(value for value in values if value is not None)
        for key, values in columns.items()
    }

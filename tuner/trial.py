"""One trial: trains a configuration, judges it on validation after each epoch, keeps the best epoch.

Knows nothing of Ray, Optuna or W&B: whoever runs it passes a function that takes the progress and a checkpoint
folder. The test split is not among its arguments.
"""

from __future__ import annotations

import itertools
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch

from model import checkpoint, parallel, train
from model.arrays import Array
from model.config import JUDGING_FIELDS, Judgement, RunConfig
from model.data import Cache, open_cache
from model.evaluate import Scores, predict, score
from model.files import write_atomically, write_json
from model.inspection import Read
from model.parallel import ALONE, Team
from model.sample import Sample
from model.splits import counts, keep_masks
from model.step import give_memory_back
from model.thresholds import Thresholds, sigmoid
from tuner import gpu, tracing
from tuner.scratch import scratch_folder
from tuner.space import DECISION_METRICS, MASK_COSTS, Space
from tuner.tracing import mark

Report = Callable[[dict[str, Any], Path | None], None]
"""Takes the progress (keys: `TrialTask.run`) and a sealed checkpoint folder, which it must copy."""

_PREVIEWS = 4
_PREVIEW_SIDE_PX = 160


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a search share."""

    train: list[Sample]
    validation: list[Sample]
    metric: str
    compare: str
    """what schedulers compare: see `tuner.space.Scheduler`"""
    replayed: Mapping[str, tuple[Any, ...]]
    """values of JUDGING_FIELDS that a trained network is also judged by, beside the trial's own"""
    cost: str | None = None
    """one of `tuner.space.COSTS`"""
    constrained: tuple[str, ...] = ()
    """figures that constraints ask for: each replay carries those of its epoch"""
    read: Read = Path.read_bytes
    """how the samples' files are read"""
    labels_cost: bool = False
    """whether the space gives a price to a label"""
    trace: Path | None = None
    """an empty folder, where a trace of the training is left (tuner/tracing.py)"""

    @classmethod
    def of(cls, space: Space, train: list[Sample], validation: list[Sample], read: Read = Path.read_bytes) -> TrialTask:
        """What a space asks of its trials."""
        return cls(
            train,
            validation,
            space.objective.metric,
            space.scheduler.compare,
            space.replayed_values(),
            space.cost.metric if space.cost else None,
            tuple(bound.metric for bound in space.constraints),
            read,
            space.labelling is not None,
        )

    def traced(self, folder: Path) -> TrialTask:
        return replace(self, trace=folder)

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Report) -> None:
        """Trains to the end, from the checkpoint folder `resume` if there is one, reporting every epoch.

        Progress: `status` (running, completed or diverged), `reason`, `epochs`, `history`, `value` (the objective at
        the best epoch), `best_epoch`, `thresholds`, `rules`, `replays`, `seconds`, `num_segmented` (positives that
        kept their masks, where these are a cost), `labelled` (training images, where labels have a price), and
        `micro_batch`, set where memory ran out: smaller parts of a batch add up to the same step, so the trial goes on
        from its last epoch.
        """
        self._run(config, [device], resume, report)

    def run_together(
        self, config: RunConfig, devices: Sequence[torch.device], resume: Path | None, report: Report
    ) -> None:
        """The same on several devices at once, a process each, that share every batch; this process trains nothing.
        ValueError if there are more of them than images in a batch."""
        if problem := batch_problem(config.batch_size, len(devices)):
            raise ValueError(problem)
        self._run(config, devices, resume, report)

    def _run(self, config: RunConfig, devices: Sequence[torch.device], resume: Path | None, report: Report) -> None:
        with scratch_folder() as scratch:
            keeper = _Keeper(self, config, scratch, resume)
            if keeper.progress["epochs"] == config.epochs:
                report(keeper.progress, keeper.directory)  # it was done, and only the word of it was lost
                return
            small = config
            while True:
                started, before = time.monotonic(), keeper.progress["seconds"]
                try:
                    if len(devices) > 1:
                        self._train_together(small, keeper, devices, report)
                    else:
                        self._train(small, keeper, devices[0], report)
                    return
                except (train.TrainingDiverged, FloatingPointError) as error:
                    keeper.progress |= {"status": "diverged", "reason": str(error)}
                    keeper.progress["seconds"] = before + time.monotonic() - started
                    report(keeper.progress, None)
                    return
                except (MemoryError, RuntimeError) as error:
                    small = with_less_memory(small, error, len(devices))
                    keeper.progress["micro_batch"] = small.micro_batch
                if devices[0].type == "cuda" and len(devices) == 1:  # here, where the error holds no tensors any more
                    give_memory_back()

    def _train(
        self, config: RunConfig, keeper: _Keeper, device: torch.device, report: Report, team: Team = ALONE
    ) -> None:
        """From the keeper's last epoch to the end. Raises what diverging and running out of memory raise."""
        started, before = time.monotonic(), keeper.progress["seconds"]
        cache, validation = self.training_cache(config), self.validation_cache(config)
        training = train.start(config, device, keeper.training_state(device), team)
        factors = tuple({judgement.threshold_factor for judgement in keeper.judgements})
        with tracing.recorded(self.trace, training, cache) as recorder:
            for losses in train.fit(training, cache):
                with mark("validation"):
                    scores = score(training.network, validation, config, device, factors)
                keeper.add(training, losses, scores, validation)
                keeper.progress["seconds"] = before + time.monotonic() - started
                done = training.epochs_done == config.epochs
                keeper.progress["status"] = "completed" if done else "running"
                with mark("checkpoint"):
                    folder = keeper.checkpoint(done)
                if done:  # what is recorded travels with a report, and no other follows
                    recorder.epoch_ended()
                with mark("report"):
                    report(keeper.progress, folder)
                if not done:
                    recorder.epoch_ended()

    @property
    def decoded(self) -> list[list[Sample]]:
        """What a node must have decoded, a cache each."""
        return [self.train, self.validation]

    def training_samples(self, config: RunConfig) -> list[Sample]:
        """As many of them with their masks as a configuration wants."""
        return keep_masks(self.train, config.num_segmented, config.seed)

    def training_cache(self, config: RunConfig) -> Cache:
        """What a configuration is trained on."""
        return open_cache(self.training_samples(config), config.input_height, config.input_width, read=self.read)

    def validation_cache(self, config: RunConfig) -> Cache:
        """What it is judged on."""
        return open_cache(self.validation, config.input_height, config.input_width, read=self.read)

    def _train_together(
        self, config: RunConfig, keeper: _Keeper, devices: Sequence[torch.device], report: Report
    ) -> None:
        """The same with a team; the keeper takes over what the first of it has kept, epoch by epoch: that one may be in
        the middle of the next when another fails."""
        room = keeper.directory.parent / "team"
        room.mkdir()

        def heard(said: tuple[dict[str, Any], Path]) -> None:
            progress, reached = said
            keeper.take_over(progress, reached)
            report(keeper.progress, keeper.directory)

        try:
            parallel.run(_train_in_team, devices, (self, keeper.config, config, keeper.sealed(), room), heard)
        finally:
            shutil.rmtree(room)

    def judgements(self, config: RunConfig) -> list[Judgement]:
        """How a network of this configuration is judged: its own way first, then all others that the search may
        propose for the same weights."""
        own = config.judgement()
        choices = [(*self.replayed.get(name, ()), getattr(config, name)) for name in JUDGING_FIELDS]
        others = {
            Judgement.of(dict(zip(JUDGING_FIELDS, chosen, strict=True))) for chosen in itertools.product(*choices)
        }
        return [own, *sorted(others - {own})]


def _train_in_team(
    team: Team,
    device: torch.device,
    say: Callable[[Any], None],
    task: TrialTask,
    config: RunConfig,
    small: RunConfig,
    resume: Path | None,
    room: Path,
) -> None:
    """What each process of a team does; the first one also judges, and keeps its files in `room`."""
    if device.type == "cuda":
        gpu.take(device, 1.0)
    if team.rank == 0:
        keeper = _Keeper(task, config, room, resume)
        if small.micro_batch != config.micro_batch:
            keeper.progress["micro_batch"] = small.micro_batch
        task._train(small, keeper, device, lambda progress, folder: say((progress, folder)), team)
    else:
        state = checkpoint.load_training(resume, device) if resume else None
        for _ in train.fit(train.start(small, device, state, team), task.training_cache(small)):
            pass


class Task(Protocol):
    """What all trials of a search share: `TrialTask`, or `tuner.folds.FoldsTask`."""

    @property
    def decoded(self) -> list[list[Sample]]:
        """What a node must have decoded, a cache each."""

    def traced(self, folder: Path) -> Task:
        """The same task, whose trial leaves a trace of its training in an empty folder."""

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Report) -> None:
        """A trial on one device."""

    def run_together(
        self, config: RunConfig, devices: Sequence[torch.device], resume: Path | None, report: Report
    ) -> None:
        """A trial on several."""


def run_on(
    task: Task, config: RunConfig, device: torch.device, gpus: float, resume: Path | None, report: Report
) -> None:
    """A trial on the device that was taken for it, or on all its GPUs."""
    if gpus < 2:
        task.run(config, device, resume, report)
    else:
        task.run_together(config, [torch.device("cuda", n) for n in range(int(gpus))], resume, report)


def batch_problem(batch_size: int, devices: int) -> str | None:
    """Why a batch cannot be shared by so many devices, with the way out; None if it can."""
    if batch_size >= devices:
        return None
    return (
        f"a trial on {devices} GPUs shares each batch among them, so it needs batch_size of at least {devices}, found "
        f"{batch_size}; raise train.batch_size, or lower --gpus-per-trial"
    )


def plain_rules(judgements: list[Judgement]) -> Iterator[Judgement]:
    """The own judgement under every threshold rule, with the factors that any of them has, and 1."""
    own = judgements[0]
    yield own._replace(threshold_rule="min_of_max", threshold_factor=1)
    for factor in sorted({1} | {j.threshold_factor for j in judgements}):
        yield own._replace(threshold_rule="pr_curve", threshold_factor=factor)
    yield own._replace(threshold_rule="grid", threshold_factor=1)


def with_less_memory(config: RunConfig, error: Exception, devices: int = 1) -> RunConfig:
    """The same training in smaller parts, after an error that says that memory ran out; other errors are raised."""
    if not _is_out_of_memory(error):
        raise error
    of_one = -(-(config.batch_size + config.hard_mining_places) // devices)
    size = min(config.micro_batch or of_one, of_one)
    if size == 1:
        raise MemoryError(
            f"one image of {config.input_height}x{config.input_width} does not fit into memory at width "
            f"{config.width:g} ({error}); use a smaller input, or give a trial more of the device"
        ) from error
    return replace(config, micro_batch=size // 2)


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def take_device(gpus: float, threads: int) -> torch.device:
    """The device that this process was given, its memory free and held to the trial's share, with as many CPU threads
    as it may use. Of several GPUs it is the first, untouched: each is taken by a process of its own.

    NodeUnfit if it was given a GPU that torch cannot use (a silent CPU would take days), or whose memory others hold.
    """
    torch.set_num_threads(max(1, threads))
    if gpus == 0:
        return torch.device("cpu")
    gpu.check_cuda()
    device = torch.device("cuda", 0)
    if gpus <= 1:
        gpu.take(device, gpus)
    return device


class _Keeper:
    """The progress of a trial and its files: the best models so far and what it takes to go on.

    Each judgement has a best epoch of its own; the weights of all these epochs are kept in `best/EPOCH`.
    """

    def __init__(self, task: TrialTask, config: RunConfig, scratch: Path, resume: Path | None) -> None:
        self.metric, self.compare, self.constrained = task.metric, task.compare, task.constrained
        self.config = config
        self.judgements = task.judgements(config)
        self.rules = list(plain_rules(self.judgements))
        self.directory = scratch / "checkpoint"
        self.progress = nothing_yet()
        if task.cost in MASK_COSTS:
            kept = keep_masks(task.train, config.num_segmented, config.seed)
            self.progress["num_segmented"] = counts(kept)["segmented"]
        if task.labels_cost:
            self.progress["labelled"] = len(task.train)
        all_judgements = dict.fromkeys([*self.judgements, *self.rules])
        self.progress["replays"] = [judgement._asdict() | _UNJUDGED for judgement in all_judgements]
        self.highest: list[dict[str, float]] = [{} for _ in all_judgements]
        """what `is_best` compares with, for each replay"""
        if resume:
            shutil.copytree(resume, self.directory)
            self.progress = checkpoint.load_progress(resume)
            self.highest = self.progress.pop("highest")
        else:
            self.directory.mkdir()

    def sealed(self) -> Path | None:
        """The checkpoint so far, which another keeper may begin with."""
        return self.directory if checkpoint.is_whole(self.directory) else None

    def take_over(self, progress: dict[str, Any], folder: Path) -> None:
        """Goes on from another keeper's progress and its sealed folder, of which it keeps a copy."""
        aside = self.directory.with_name("taken-over")
        shutil.rmtree(aside, ignore_errors=True)  # of a copy that was cut short
        shutil.copytree(folder, aside)
        shutil.rmtree(self.directory)
        aside.rename(self.directory)
        self.progress = progress

    def training_state(self, device: torch.device) -> dict[str, Any] | None:
        """What training goes on from; None at its start."""
        known = (self.directory / "training.pt").exists()
        return checkpoint.load_training(self.directory, device) if known else None

    def add(self, training: train.Training, losses: dict[str, float], scores: Scores, validation: Cache) -> None:
        """Takes in an epoch; keeps its weights if some judgement finds them the best so far.

        The progress changes last, and at once: where memory runs out before, the same epoch comes again.
        """
        epoch = training.epochs_done
        highest_yet = [dict(highest) for highest in self.highest]
        replays = [dict(replay) for replay in self.progress["replays"]]
        with mark("thresholds"):
            found = [scores.choose(Judgement.of(replay)) for replay in replays]
            judged = scores.figures(found)
        decision_f1 = scores.decision[1]
        constrained = [self._constrained(scores, figures) for figures in judged]
        for replay, highest, thresholds, figures, bounded in zip(
            replays, highest_yet, found, judged, constrained, strict=True
        ):
            # The objective is 0, the worst, where this network has no such figure (precision of nothing predicted).
            row = {"value": figures[self.metric] or 0.0, "decision_f1": decision_f1, "dice_mean": figures["dice_mean"]}
            if is_best(row, highest, replay["best_by"]):
                replay |= {"value": row["value"], "epoch": epoch, "thresholds": thresholds.to_dict()}
                replay |= {"figures": bounded} if self.constrained else {}
            highest |= {key: max(highest.get(key, value), value) for key, value in row.items() if value is not None}
        own = replays[0]
        history_row = {"epoch": epoch, "value": judged[0][self.metric] or 0.0} | losses | judged[0]
        history_row["compared"] = self._compared(scores, judged[0])
        with mark("weights"):
            self._keep_weights(training, replays, found[0])
        if own["epoch"] == epoch:
            with mark("pictures"):
                self._draw(training, validation, found[0])
        if epoch < self.config.epochs:
            with mark("training state"):
                checkpoint.save_training(self.directory, training.state())
        self.highest = highest_yet
        self.progress |= {
            "epochs": epoch,
            "history": [*self.progress["history"], history_row | {"decision_f1": decision_f1} | constrained[0]],
            "replays": replays,
            "value": own["value"],
            "best_epoch": own["epoch"],
            "thresholds": own["thresholds"],
            "rules": {j.rule: _entry(replays, j)["value"] for j in self.rules},
        }

    def _constrained(self, scores: Scores, figures: Mapping[str, float | None]) -> dict[str, float | None]:
        """The figures that constraints ask for."""
        return {name: (dict(figures) | scores.decision_rates).get(name) for name in self.constrained}

    def _compared(self, scores: Scores, own: Mapping[str, float | None]) -> float:
        """The figure of this epoch that a scheduler compares."""
        plain = self.config.judgement()._replace(blacken=False, lower_threshold=1.0)
        figures = own
        if self.compare == "segmentation" and plain != self.config.judgement():
            figures = scores.figures([scores.choose(plain)])[0]
        metric = self.metric
        if self.compare == "segmentation" and metric in DECISION_METRICS:
            metric = "dice_mean"
        return figures[metric] or 0.0

    def _keep_weights(self, training: train.Training, replays: list[dict[str, Any]], thresholds: Thresholds) -> None:
        """Those of each epoch that is the best by a judgement of this configuration or one the search may propose."""
        best = self.directory / "best"
        epochs = {_entry(replays, judgement)["epoch"] for judgement in self.judgements}
        epoch = training.epochs_done
        if epoch in epochs:
            weights = training.network.state_dict()
            checkpoint.save_model(best / str(epoch), weights, self.config, thresholds, epoch)
        for folder in best.glob("*"):
            if int(folder.name) not in epochs:
                shutil.rmtree(folder)

    def checkpoint(self, done: bool) -> Path:
        """A sealed folder; without what it takes to go on where the trial is done."""
        if done:
            (self.directory / "training.pt").unlink(missing_ok=True)
        write_json(self.directory / "progress.json", self.progress | {"highest": self.highest})
        checkpoint.seal(self.directory)
        return self.directory

    def _draw(self, training: train.Training, validation: Cache, thresholds: Thresholds) -> None:
        """The predictions on a fixed handful of validation images."""
        folder = self.directory / "previews"
        folder.mkdir(exist_ok=True)
        rows = preview_rows(validation.positive)
        images = validation.images[rows]
        answers = predict(training.network, images, self.config, training.device)
        decisions, logits = (torch.cat(part).cpu().numpy() for part in zip(*answers, strict=True))
        for n, row in enumerate(rows):
            mask = thresholds.mask(logits[n], decisions[n])
            picture = preview(images[n], validation.masks[row], logits[n], mask)
            write_atomically(folder / f"{n}.png", cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


_UNJUDGED: dict[str, Any] = {"value": None, "epoch": None, "thresholds": None}


def nothing_yet() -> dict[str, Any]:
    """The progress of a trial that has not begun."""
    return {
        "status": "running", "reason": None, "epochs": 0, "history": [], "value": None, "best_epoch": None,
        "thresholds": None, "rules": {}, "replays": [], "seconds": 0.0, "micro_batch": None,
    }  # fmt: skip


def weights_folder(epoch: int, fold: int | None = None) -> str:
    """Where in a checkpoint the weights of an epoch lie; of a fold's epoch where a trial has folds."""
    return f"best/{epoch}" if fold is None else f"best/fold-{fold}-epoch-{epoch}"


def has_new_pictures(progress: Mapping[str, Any]) -> bool:
    """Whether the previews are of what was reported last: of the best epoch so far, or of each fold."""
    return "folds" in progress or progress["epochs"] == progress["best_epoch"]


def failure(error: Exception) -> dict[str, Any]:
    """What an exception makes of the progress of a trial: a result, with its reason."""
    trace = "".join(traceback.format_exception(error))
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": trace}


def _entry(replays: list[dict[str, Any]], judgement: Judgement) -> dict[str, Any]:
    return next(replay for replay in replays if Judgement.of(replay) == judgement)


def preview_rows(positive_N: Array) -> list[int]:
    """Which images of a split are watched: the first positives and one negative."""
    positives, negatives = np.flatnonzero(positive_N), np.flatnonzero(~positive_N)
    return [int(n) for n in (*positives[: _PREVIEWS - 1], *negatives[:1])]


def is_best(row: Mapping[str, Any], highest: Mapping[str, Any], best_by: str) -> bool:
    """Whether an epoch is the one to keep: better than all before in a figure, or (both) at least as good as all
    before in two, the decision's F measure and the mean Dice. `highest` holds the highest figures so far."""
    if best_by == "both":
        return all(row[key] >= highest.get(key, -np.inf) for key in ("decision_f1", "dice_mean"))
    key = {"objective": "value", "decision": "decision_f1", "segmentation": "dice_mean"}[best_by]
    return bool(row[key] > highest.get(key, -np.inf))


def previews(folder: Path) -> dict[str, bytes]:
    """The pictures in a checkpoint folder, PNG by name."""
    return {file.stem: file.read_bytes() for file in sorted(folder.glob("previews/*.png"))}


def preview(image_HW3: Array, truth_HW: Array, logits_HW: Array, mask_HW: Array) -> Array:
    """Input, truth, probability and mask side by side, RGB uint8."""
    grey = [truth_HW * 255, sigmoid(logits_HW) * 255, mask_HW * 255]
    panels = [np.asarray(image_HW3), *(np.repeat(panel.astype(np.uint8)[..., None], 3, axis=2) for panel in grey)]
    scale = min(1.0, _PREVIEW_SIDE_PX / max(truth_HW.shape))
    return np.hstack([cv2.resize(panel, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for panel in panels])

"""One trial: trains a configuration, judges it on validation after each epoch, keeps the best epoch.

Knows nothing of Ray, Optuna or W&B: whoever runs it passes a function that takes the progress and a checkpoint
folder. The test split is not among its arguments.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from model import checkpoint, train
from model.config import RunConfig, rule_name
from model.data import Cache, open_cache
from model.evaluate import Scores, predict, score
from model.files import write_atomically, write_json
from model.metrics import Array
from model.sample import Sample
from model.splits import keep_masks
from model.thresholds import Thresholds, sigmoid

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
    rules: tuple[tuple[str, int], ...]
    """threshold rules and factors that are replayed on every trained network"""

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Report) -> None:
        """Trains to the end, from the checkpoint folder `resume` if there is one, reporting every epoch.

        Progress: `status` (running, completed or diverged), `reason`, `epochs`, `history`, `value` (the objective at
        the best epoch), `best_epoch`, `thresholds`, `rules`, `rule_thresholds`, `seconds`.
        """
        started = time.monotonic()
        size = config.input_height, config.input_width
        cache = open_cache(keep_masks(self.train, config.num_segmented, config.seed), *size)
        validation = open_cache(self.validation, *size)
        with tempfile.TemporaryDirectory(prefix="segdec-trial-") as scratch:
            keeper = _Keeper(self, config, Path(scratch), resume)
            if resume and keeper.progress["epochs"] == config.epochs:
                report(keeper.progress, resume)  # it was done, and only the word of it was lost
                return
            training = train.start(config, device, checkpoint.load_training(resume, device) if resume else None)
            before = keeper.progress["seconds"]
            try:
                for losses in train.fit(training, cache):
                    factors = tuple(factor for rule, factor in self.rules if rule == "pr_curve")
                    scores = score(training.network, validation, config, device, factors)
                    keeper.add(training, losses, scores, validation)
                    keeper.progress["seconds"] = before + time.monotonic() - started
                    done = training.epochs_done == config.epochs
                    keeper.progress["status"] = "completed" if done else "running"
                    report(keeper.progress, keeper.checkpoint(None if done else training))
            except (train.TrainingDiverged, FloatingPointError) as error:
                keeper.progress |= {"status": "diverged", "reason": str(error)}
                keeper.progress["seconds"] = before + time.monotonic() - started
                report(keeper.progress, None)

    def value(self, scores: Scores, thresholds: Thresholds) -> float:
        """The objective; 0, the worst, where this network has no such figure (precision of nothing predicted)."""
        return scores.figures(thresholds)[self.metric] or 0.0


def take_device(gpus: float, threads: int) -> torch.device:
    """The device that this process was given, with as many CPU threads as it may use. RuntimeError if it was given a
    GPU that torch cannot use: a silent CPU would take days."""
    torch.set_num_threads(max(1, threads))
    if gpus > 0 and not torch.cuda.is_available():
        raise RuntimeError("this trial holds a GPU, but torch finds no CUDA here; install a CUDA build of torch")
    return torch.device("cuda" if gpus > 0 else "cpu")


class _Keeper:
    """The progress of a trial and its files: the best model so far and what it takes to go on."""

    def __init__(self, task: TrialTask, config: RunConfig, scratch: Path, resume: Path | None) -> None:
        self.task = task
        self.config = config
        self.directory = scratch / "checkpoint"
        self.progress: dict[str, Any] = {
            "status": "running", "reason": None, "epochs": 0, "history": [], "value": None, "best_epoch": None,
            "thresholds": None, "rules": {}, "rule_thresholds": {}, "seconds": 0.0,
        }  # fmt: skip
        if resume:
            shutil.copytree(resume, self.directory)
            self.progress = checkpoint.load_progress(resume)
        else:
            self.directory.mkdir()

    def add(self, training: train.Training, losses: dict[str, float], scores: Scores, validation: Cache) -> None:
        """Takes in an epoch; keeps its model if it is the best so far."""
        thresholds = scores.choose(self.config.threshold_rule, self.config.threshold_factor, self.config)
        value = self.task.value(scores, thresholds)
        epoch = training.epochs_done
        row = {"epoch": epoch, "value": value} | losses | scores.figures(thresholds)
        row["decision_f1"] = scores.decision()[1]
        self.progress["history"] = [*self.progress["history"], row]
        self.progress["epochs"] = epoch
        if not is_best(self.progress["history"], self.config.best_by):
            return
        by_rule = {rule_name(*rule): scores.choose(*rule, self.config) for rule in self.task.rules}
        self.progress |= {
            "value": value,
            "best_epoch": epoch,
            "thresholds": thresholds.to_dict(),
            "rules": {name: self.task.value(scores, found) for name, found in by_rule.items()},
            "rule_thresholds": {name: found.to_dict() for name, found in by_rule.items()},
        }
        checkpoint.save_model(self.directory / "best", training.network.state_dict(), self.config, thresholds, epoch)
        self._draw(training, validation, thresholds)

    def checkpoint(self, training: train.Training | None) -> Path:
        """A sealed folder; without what it takes to go on where the trial is done."""
        if training:
            checkpoint.save_training(self.directory, training.state())
        else:
            (self.directory / "training.pt").unlink(missing_ok=True)
        write_json(self.directory / "progress.json", self.progress)
        checkpoint.seal(self.directory)
        return self.directory

    def _draw(self, training: train.Training, validation: Cache, thresholds: Thresholds) -> None:
        """The predictions on a fixed handful of validation images."""
        folder = self.directory / "previews"
        folder.mkdir(exist_ok=True)
        rows = preview_rows(validation.positive)
        images = validation.images[rows]
        found = predict(training.network, images, self.config, training.device)
        decisions, logits = map(np.concatenate, zip(*found, strict=True))
        for n, row in enumerate(rows):
            mask = thresholds.mask(logits[n], decisions[n])
            picture = preview(images[n], validation.masks[row], logits[n], mask)
            write_atomically(folder / f"{n}.png", cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


def preview_rows(positive_N: Array) -> list[int]:
    """Which images of a split are watched: the first positives and one negative."""
    positives, negatives = np.flatnonzero(positive_N), np.flatnonzero(~positive_N)
    return [int(n) for n in (*positives[: _PREVIEWS - 1], *negatives[:1])]


def is_best(history: list[dict[str, Any]], best_by: str) -> bool:
    """Whether the last epoch is the one to keep: better than all before in a figure, or (both) at least as good as
    all before in two, the decision's F measure and the mean Dice."""
    *before, last = history
    if best_by == "both":
        keys = ("decision_f1", "dice_mean")
        return all(last[key] >= row[key] for row in before for key in keys)
    key = {"objective": "value", "decision": "decision_f1", "segmentation": "dice_mean"}[best_by]
    return all(last[key] > row[key] for row in before)


def preview(image_HW3: Array, truth_HW: Array, logits_HW: Array, mask_HW: Array) -> Array:
    """Input, truth, probability and mask side by side, RGB uint8."""
    grey = [truth_HW * 255, sigmoid(logits_HW) * 255, mask_HW * 255]
    panels = [np.asarray(image_HW3), *(np.repeat(panel.astype(np.uint8)[..., None], 3, axis=2) for panel in grey)]
    scale = min(1.0, _PREVIEW_SIDE_PX / max(truth_HW.shape))
    return np.hstack([cv2.resize(panel, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for panel in panels])

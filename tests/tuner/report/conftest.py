"""A small run directory made from nothing: cracks, maps and trials that look like real ones, the same each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from model.centre_lines import trace
from model.config import RunConfig
from model.counts import to_half
from model.thresholds import sigmoid
from tests.tables import count
from tuner import report

SIDE = 96
EVIL = "<script>alert(\"x\")</script> & 'ü/裂缝'|.png"
SEARCH = {
    "learning_rate": {"type": "float", "low": 0.001, "high": 2.0, "log": True},
    "delta_cls_loss": {"type": "float", "low": 0.0001, "high": 1.0, "log": True},
    "dilate": {"type": "int", "low": 1, "high": 15, "step": 2},
    "architecture": {"type": "categorical", "choices": ["segdecnet", "segdecnet_decoder", "segdecnet_plusplus"]},
    "threshold_rule": {"type": "categorical", "choices": ["min_of_max", "pr_curve", "grid"]},
    "threshold_factor": {"type": "int", "low": 1, "high": 10, "when": {"threshold_rule": ["pr_curve"]}},
}
STATUSES = ("completed", "completed", "stopped_early", "diverged", "completed", "failed", "stopped_early", "completed")


@dataclass(frozen=True)
class Made:
    """A made split, before anything was counted."""

    names: list[str]
    groups: list[str]
    labels: np.ndarray
    images: np.ndarray
    truths: np.ndarray
    logits: np.ndarray
    decision_logits: np.ndarray


def crack(rng: np.random.Generator) -> np.ndarray:
    """A random walk from one edge to the other, 1 to 4 px wide."""
    steps = 14
    x = np.linspace(0, SIDE - 1, steps)
    y = np.clip(np.cumsum(rng.normal(0, SIDE / 16, steps)) + rng.uniform(0.3, 0.7) * SIDE, 0, SIDE - 1)
    points = np.stack([x, y] if rng.random() < 0.5 else [y, x], axis=1).round().astype(np.int32)
    return cv2.polylines(np.zeros((SIDE, SIDE), np.uint8), [points], False, 1, int(rng.integers(1, 4))) > 0


def make_split(
    name: str, count: int, negatives: int, quality: float, seed: int, empty: frozenset[str], groups: int | None
) -> Made:
    """`quality` is how far the logits of defects lie above the others. The images depend on the seed alone. `empty` may
    hold truth and mask."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) >= negatives
    truths = np.array([crack(rng) if label else np.zeros((SIDE, SIDE), bool) for label in labels])
    wall = np.array([cv2.GaussianBlur(rng.normal(0, 1, (SIDE, SIDE)), (0, 0), 1.2) for _ in range(count)])
    grey = 150 + 60 * wall - 70 * truths
    images = np.clip(grey[..., None] + np.array([6, 0, -8]), 0, 255).astype(np.uint8)
    noise = np.array([cv2.GaussianBlur(rng.normal(0, 1, (SIDE, SIDE)), (0, 0), 2.5) for _ in range(count)]) * 5
    near = np.array([cv2.GaussianBlur(truth.astype(np.float64), (0, 0), 1.0) for truth in truths])
    ease = rng.uniform(0.3, 1.2, count)[:, None, None]
    logits = -4 + quality * ease * near * 8 + noise * 1.3
    decision_logits = np.where(labels, 2.0, -2.0) + rng.normal(0, 1.6 / quality**2, count)
    names = [f"{name}/wall {k:02d}.png" for k in range(count)]
    names[-1] = EVIL
    return Made(
        names,
        [f"photo{k // 2 if groups is None else k % groups}" for k in range(count)],
        labels,
        images,
        truths & ("truth" not in empty),
        logits - 50 * ("mask" in empty),
        decision_logits.astype(np.float32),
    )


def write_split(path: Path, made: Made, thresholds: dict[str, Any]) -> None:
    logit = thresholds["segmentation_logit"]
    masks = to_half(made.logits).astype(np.float64) >= logit
    sources = ["crackforest" if k % 3 else "crack <500>" for k in range(len(made.names))]
    np.savez(
        path,
        thresholds=np.array(json.dumps(thresholds)),
        names=np.array(made.names),
        groups=np.array(made.groups),
        sources=np.array(sources),
        labels=made.labels,
        decision_logits=made.decision_logits,
        centre_lines=np.array([trace(*pair) for pair in zip(made.truths, masks, strict=True)]),
        **count(made.truths, made.logits).arrays(),
    )


def make_thresholds(negatives: bool, logit: float) -> dict[str, Any]:
    decision = 0.25 if negatives else None
    return {
        "rule": "pr_curve",
        "factor": 2,
        "segmentation_logit": logit,
        "segmentation_probability": float(sigmoid(logit)),
        "decision_logit": decision,
        "blacken": False,
        "lower_threshold": 1.0,
        "decision_probability": float(sigmoid(decision)) if decision is not None else None,
    }


def make_history(epochs: int, top: float, negatives: bool) -> list[dict[str, Any]]:
    history = []
    for epoch in range(1, epochs + 1):
        dice = top * (1 - np.exp(-epoch / 4)) - 0.004 * max(0, epoch - 12) + 0.01 * np.sin(epoch * 2.1)
        history.append(
            {
                "epoch": epoch,
                "loss_segmentation": 0.4 * np.exp(-epoch / 6) + 0.02,
                "loss_decision": 0.7 * np.exp(-epoch / 9) if negatives else None,
                "loss_total": 0.4 * np.exp(-epoch / 6) + 0.025,
                "seconds": 31.0,
                "dice_mean": dice,
                "dice_std": 0.2,
                "dice_positive_mean": dice - 0.05,
                "iou_mean": dice * 0.8,
                "iou_std": 0.2,
                "precision": dice + 0.03,
                "recall": dice - 0.05,
                "f1": dice - 0.01,
                "two_pixel_f1": dice + 0.1,
                "decision_ap": min(0.99, 0.8 + epoch / 80) if negatives else None,
                "decision_auc": min(0.99, 0.7 + epoch / 60) if negatives else None,
                "threshold": 0.3 - 0.006 * epoch,
            }
        )
    return history


def make_replays(epoch: int, value: float, negatives: bool) -> list[dict[str, Any]]:
    """The trial's own way first; pr_curve/5 is best at another epoch."""
    ways = [
        ("pr_curve", 2, False, 1.0, epoch, -0.5),
        ("pr_curve", 3, False, 1.0, epoch, -0.3),
        ("pr_curve", 5, False, 1.0, epoch + 1, -0.2),
        ("min_of_max", 1, False, 1.0, epoch + 1, -1.0),
        ("pr_curve", 2, True, 1.0, epoch, -0.4),
        ("pr_curve", 2, False, 0.5, epoch, -0.5),
    ]
    return [
        {
            "threshold_rule": rule,
            "threshold_factor": factor,
            "blacken": blacken,
            "lower_threshold": lower,
            "best_by": "objective",
            "value": value,
            "epoch": at,
            "thresholds": make_thresholds(negatives, logit) | {"rule": rule, "factor": factor, "blacken": blacken},
        }
        for rule, factor, blacken, lower, at, logit in ways
    ]


def make_records(
    trials: int, negatives: bool, objectives: int, recall_beyond: list[float] | None
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    records = []
    for number in range(trials):
        status = STATUSES[number % len(STATUSES)]
        params: dict[str, Any] = {
            "learning_rate": float(10 ** rng.uniform(-3, 0.3)),
            "delta_cls_loss": float(10 ** rng.uniform(-4, 0)),
            "dilate": int(1 + 2 * rng.integers(0, 8)),
            "architecture": str(rng.choice(SEARCH["architecture"]["choices"])),
            "threshold_rule": str(rng.choice(SEARCH["threshold_rule"]["choices"])),
        }
        if params["threshold_rule"] == "pr_curve":
            params["threshold_factor"] = int(rng.integers(1, 11))
        if number == 0:
            params = {"learning_rate": 1.0, "delta_cls_loss": 0.01, "dilate": 1, "architecture": "segdecnet_decoder"}
            params |= {"threshold_rule": "pr_curve", "threshold_factor": 1}
        top = float(np.clip(rng.normal(0.62, 0.06), 0.2, 0.72)) + (0.04 if number == 1 else 0)
        done = status in ("completed", "stopped_early")
        epochs = {"completed": 20, "stopped_early": 5}.get(status, 2)
        history = make_history(epochs, top, negatives) if done else []
        best = int(np.argmax([e["dice_mean"] for e in history])) if done else 0
        value = history[best]["dice_mean"] if done else None
        reasons = {"stopped_early": "below the best third at epoch 5", "diverged": "loss is not finite in epoch 2"}
        reasons["failed"] = "CUDA out of memory: tried to allocate <2 GiB>"
        seconds = 31.0 * epochs
        records.append(
            {
                "trial": f"abc123-{number:04d}",
                "number": number,
                "baseline": number == 0,
                "seed": 0,
                "params": params,
                "config": RunConfig(epochs=20, input_height=128, input_width=128, **params).to_dict(),
                "status": status,
                "reason": reasons.get(status),
                "value": value,
                **({"values": [value, 20 + 10 * number] if done else None} if objectives == 2 else {}),
                **(
                    {"violations": {"recall": recall_beyond[number], "f1": 0.0} if done else None}
                    if recall_beyond
                    else {}
                ),
                "best_epoch": best + 1 if done else None,
                "epochs": epochs,
                "started": 340.0 * (number // 2) + 5 * (number % 2),
                "seconds": seconds,
                "device_seconds": seconds * 0.5,
                "thresholds": make_thresholds(negatives, -0.5) if done else None,
                "rules": {"min_of_max": top - 0.2, "pr_curve/2": top, "grid": top + 0.01} if done else {},
                "replays": make_replays(best + 1, value, negatives) if done else [],
                "replayed_from": "abc123-0001" if number == 7 else None,
                "history": history,
            }
        )
    return records


def make_stage(branch: str, operation: str, channels: int, side: int, parameters: int) -> dict[str, Any]:
    return {
        "branch": branch,
        "name": f"{branch}.{operation}",
        "operation": operation,
        "channels": channels,
        "height": side,
        "width": side,
        "parameters": parameters,
    }


def make_architecture(decoder: bool) -> list[dict[str, Any]]:
    block = "conv 5x5, norm, ReLU"
    stages = [make_stage("trunk", block, 32, 448, 2464)]
    stages += [make_stage("trunk", block, 64, 224, 102_528) for _ in range(3)]
    stages += [make_stage("trunk", block, 64, 112, 102_528) for _ in range(4)]
    stages.append(make_stage("trunk", "conv 15x15, norm, ReLU", 1024, 56, 14_747_648))
    if decoder:
        for side, channels in ((448, 32), (224, 64), (112, 64)):
            stages.append(make_stage("decoder", "conv 1x1", channels, side, channels**2))
            stages.append(make_stage("decoder", "squeeze-excitation gate", channels, 1, 8320))
        for side, channels, convs in ((112, 16, 1), (224, 16, 4), (448, 8, 3)):
            stages.append(make_stage("decoder", "up-convolution 5x5, stride 2", channels, side + 3, 409_616))
            stages += [make_stage("decoder", block, channels, side, 32_000) for _ in range(convs)]
        stages.append(make_stage("segmentation", "conv 5x5, norm", 1, 448, 203))
    else:
        stages.append(make_stage("segmentation", "conv 1x1, norm", 1, 56, 1027))
    for side, before, channels in ((28, 1025, 8), (14, 8, 16), (7, 16, 32)):
        stages.append(make_stage("decision", "max-pool 2x2", before, side, 0))
        stages.append(make_stage("decision", block, channels, side, 200 * channels))
    return [*stages, make_stage("decision", "linear", 1, 1, 67)]


def write_run(
    directory: Path,
    *,
    trials: int = 8,
    negatives: bool = True,
    baseline_wins: bool = False,
    objectives: int = 1,
    tests: int = 96,
    chosen_on: str = "validation",
    recall_beyond: list[float] | None = None,
    asha: bool = False,
    validations: int = 12,
    negative_tests: int | None = None,
    negative_validations: int = 4,
    empty: frozenset[str] = frozenset(),
    groups: int | None = None,
) -> dict[str, Made]:
    """Writes a run directory and returns what the winner was judged on. `recall_beyond`: how far each trial violates a
    constraint on recall; `asha`: the space has that scheduler, with rungs at epochs 5 and 15; `empty`: truth or mask, of
    all images; `groups`: how many a split has (two images each if not said); `negatives`: whether the data have any,
    and then how many the splits do."""
    evaluation = directory / "evaluation"
    evaluation.mkdir(parents=True)
    records = make_records(trials, negatives, objectives, recall_beyond)
    baseline, winner = records[0]["trial"], records[0 if baseline_wins else 1]["trial"]
    without = {"validation": 0, "test": 0}
    if negatives:
        without = {
            "validation": negative_validations,
            "test": tests // 2 if negative_tests is None else negative_tests,
        }
    logit = float(to_half(np.array(-0.6)))
    thresholds = make_thresholds(negatives, logit) | {"chosen_on": chosen_on}
    made = {}
    for role in ["winner"] if baseline_wins else ["winner", "baseline"]:
        quality = 1.0 if role == "winner" else 0.8
        for split, images, seed in (("validation", validations, 1), ("test", tests, 2)):
            made[f"{role}-{split}"] = make_split(split, images, without[split], quality, seed, empty, groups)
            write_split(evaluation / f"{role}-{split}.npz", made[f"{role}-{split}"], thresholds)
    chosen = {
        record["trial"]: {
            "config": record["config"],
            "epoch": record["best_epoch"],
            "thresholds": thresholds,
            "value": record["value"],
            **({"violations": record["violations"]} if recall_beyond else {}),
        }
        for record in records[:2]
    }
    selection = {"winner": winner, "baseline": baseline, "metric": "dice_mean", "mode": "max", "trials": chosen}
    _write_json(evaluation / "selection.json", selection)
    _write_json(
        evaluation / "architecture.json", {"original": make_architecture(False), "used": make_architecture(True)}
    )
    (evaluation / "openings.jsonl").write_text(
        json.dumps({"time": "2026-01-02T11:00:00Z", "trials": [winner, baseline], "why": "tuner search"}) + "\n"
    )
    _write_examples(evaluation / "examples.npz", made["winner-test"], logit)
    (directory / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    _write_json(directory / "run.json", _facts(negatives, objectives, bool(recall_beyond), asha))
    return made


EXAMPLES = 16


def _write_examples(path: Path, test: Made, logit: float) -> None:
    """Evenly over the ranks, and the one with the evil name."""
    masks = to_half(test.logits).astype(np.float64) >= logit
    hits = (masks & test.truths).sum(axis=(1, 2))
    order = np.argsort(2 * hits / np.maximum(masks.sum(axis=(1, 2)) + test.truths.sum(axis=(1, 2)), 1))
    if len(order) > EXAMPLES:
        spread = {
            *np.linspace(0, len(order) - 1, EXAMPLES - 1).round().astype(int),
            order.tolist().index(len(order) - 1),
        }
        order = order[sorted(spread)]
    np.savez(
        path,
        names=np.array(test.names)[order],
        image=test.images[order],
        truth=test.truths[order],
        probability=sigmoid(test.logits).astype(np.float16)[order],
        mask=masks[order],
    )


def _facts(negatives: bool, objectives: int, constraints: bool, asha: bool) -> dict[str, Any]:
    objective: Any = {"metric": "dice_mean", "mode": "max"}
    if objectives == 2:
        objective = [objective, {"metric": "num_segmented", "mode": "min"}]
    bounds = [{"metric": "recall", "min": 0.9}, {"metric": "f1", "min": 0.1}]
    more: dict[str, Any] = {"constraints": bounds} if constraints else {}
    if asha:
        more["scheduler"] = {"name": "asha", "min_epochs": 5, "reduction": 3, "keep": 3, "compare": "segmentation"}
    counts = {"positive": 40, "negative": 10 if negatives else 0, "segmented": 30}
    return {
        "schema": 1,
        "name": "walls <b>",
        "id": "abc123",
        "created": "2026-01-02T09:00:00Z",
        "command": "tuner search search_spaces/cracks.yaml --data '/data/cracks <i>'",
        "space": {"name": "cracks", "search": SEARCH, "objective": objective, "seed": 0} | more,
        "space_fingerprint": "f00d",
        "data_path": "/data/cracks <i>",
        "options": {"wandb": "off"},
        "versions": {"python": "3.13", "torch": "2.9", "wandb": None, "segdec-tuner": "0.1.0"},
        "state": "finished",
        "hardware": {"cpu": "a CPU", "cores": 8, "memory_gib": 31.4, "gpus": ["a GPU"]},
        "data": {
            "fingerprint": "beef",
            "layout": "folder",
            "height": SIDE,
            "width": SIDE,
            "channels": 3,
            **dict.fromkeys(("train", "validation", "test"), counts),
            "groups": {"train": 25, "validation": 6, "test": 12},
            "has_negatives": negatives,
        },
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


@dataclass(frozen=True)
class Written:
    """A made run, and the report on it."""

    directory: Path
    made: dict[str, Made]
    report: Path
    evil: str = EVIL

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.report / "metrics.json").read_text())


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Made]]]:
    """Makes one more run directory; arguments as of `write_run`."""

    def make(**options: Any) -> tuple[Path, dict[str, Made]]:
        directory = tmp_path_factory.mktemp("run") / "walls"
        return directory, write_run(directory, **options)

    return make


@pytest.fixture(scope="session")
def usual(make_run: Any) -> Written:
    """Eight trials that ended in all four ways, with negatives, a winner that is not the baseline."""
    directory, made = make_run()
    return Written(directory, made, report.write(directory).parent)


@pytest.fixture(scope="session")
def bare(make_run: Any) -> Written:
    """One trial, the baseline, on data without negatives."""
    directory, made = make_run(trials=1, negatives=False, baseline_wins=True)
    return Written(directory, made, report.write(directory).parent)

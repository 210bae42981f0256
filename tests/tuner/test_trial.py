"""A real trial on a small set, run by plain functions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from model import checkpoint, layouts, parallel, splits, synthetic, train
from model.config import Judgement, RunConfig
from model.data import open_cache
from model.evaluate import score
from model.files import write_json
from model.thresholds import Thresholds
from tuner.space import CONSTRAINED_METRICS, METRICS
from tuner.trial import TrialTask, _Keeper, is_best, nothing_yet

CPU = torch.device("cpu")
CONFIG = RunConfig(
    width=0.1, input_height=64, input_width=128, epochs=3, learning_rate=1.0, precision="float32", augment_flips=True
)
BOUNDED = ("recall", "decision_specificity", "decision_f1")
REPLAYED = {"threshold_rule": ("pr_curve", "grid"), "threshold_factor": (1, 3), "blacken": (True, False)}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> TrialTask:
    folder = tmp_path_factory.mktemp("trial") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    found = splits.assign(layouts.read(folder), folder, 0.25, 0.25, 0)
    return TrialTask(found.train, found.validation, "dice_positive_mean", "segmentation", REPLAYED)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path_factory.getbasetemp() / "trial-cache"))


class Reports:
    """Keeps what a trial reports, as Ray would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.progress = folder, []

    def __call__(self, progress: dict[str, Any], folder: Path | None) -> None:
        self.progress.append(json.loads(json.dumps(progress, allow_nan=False)))
        if folder:
            shutil.copytree(folder, self.folder / f"{len(self.progress)}")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_trial_reports_each_epoch_and_leaves_its_best_model(task: TrialTask, tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    task.run(CONFIG, CPU, None, reports)
    last = reports.progress[-1]
    assert [p["status"] for p in reports.progress] == ["running", "running", "completed"]
    assert [row["epoch"] for row in last["history"]] == [1, 2, 3]
    assert last["value"] == max(row["value"] for row in last["history"])
    assert last["history"][last["best_epoch"] - 1]["value"] == last["value"]
    assert set(last["rules"]) == {"min_of_max", "pr_curve/1", "pr_curve/3", "grid"}
    assert last["rules"]["pr_curve/1"] == last["value"]

    final = tmp_path / "3"
    assert checkpoint.is_whole(final)
    assert not (final / "training.pt").exists()
    cache = open_cache(task.validation, 64, 128)
    searched = set(task.judgements(CONFIG))
    for replay in last["replays"]:
        if Judgement.of(replay) in searched:  # weights, epoch and thresholds are one thing
            network, config, _ = checkpoint.load_model(final / "best" / str(replay["epoch"]), CPU)
            scores = score(network, cache, config, CPU)
            figures = scores.figures([Thresholds.from_dict(replay["thresholds"])])[0]
            assert figures["dice_positive_mean"] == pytest.approx(replay["value"], abs=1e-12)
    assert {p.name for p in (final / "best").iterdir()} == {
        str(replay["epoch"]) for replay in last["replays"] if Judgement.of(replay) in searched
    }
    _, _, thresholds = checkpoint.load_model(final / "best" / str(last["best_epoch"]), CPU)
    assert thresholds.to_dict() == last["thresholds"]
    pictures = sorted((final / "previews").glob("*.png"))
    assert len(pictures) == 4
    assert cv2.imread(str(pictures[0])).shape == (64, 4 * 128, 3)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_trial_that_goes_on_ends_as_if_it_had_not_stopped(task: TrialTask, tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "resumed").mkdir()
    straight, resumed = Reports(tmp_path / "straight"), Reports(tmp_path / "resumed")
    task.run(CONFIG, CPU, None, straight)
    task.run(CONFIG, CPU, tmp_path / "straight" / "1", resumed)
    assert len(resumed.progress) == 2
    wanted, found = straight.progress[-1], resumed.progress[-1]
    for key in ("value", "best_epoch", "thresholds", "rules", "replays", "history", "status"):
        assert found[key] == wanted[key], key
    again = Reports(tmp_path)
    task.run(CONFIG, CPU, tmp_path / "straight" / "3", again)
    assert [p["status"] for p in again.progress] == ["completed"]


@pytest.mark.slow
def test_dilation_moves_the_target_and_not_the_yardstick(task: TrialTask, tmp_path: Path) -> None:
    for dilate in (1, 9):
        cache = open_cache(task.validation, 64, 128)
        assert cache.masks.sum() == open_cache(task.validation, 64, 128).targets(1).sum()
        grown = cache.targets(dilate).sum()
        assert grown >= cache.masks.sum()
    reports = Reports(tmp_path)
    wide = RunConfig(**CONFIG.to_dict() | {"dilate": 9, "epochs": 1})
    task.run(wide, CPU, None, reports)
    network, _, thresholds = checkpoint.load_model(tmp_path / "1" / "best" / "1", CPU)
    truth = np.asarray(open_cache(task.validation, 64, 128).masks)
    scores = score(network, open_cache(task.validation, 64, 128), wide, CPU)
    assert scores.counts.truth().tolist() == truth.sum(axis=(1, 2)).tolist()
    assert scores.figures([thresholds])[0]["dice_positive_mean"] == pytest.approx(reports.progress[0]["value"])


@pytest.mark.slow
def test_a_trial_that_diverges_says_so(task: TrialTask, tmp_path: Path, monkeypatch) -> None:
    def diverge(*_: Any) -> None:
        raise train.TrainingDiverged("the loss of epoch 1 is not a finite number")

    monkeypatch.setattr(train, "train_epoch", diverge)
    reports = Reports(tmp_path)
    task.run(CONFIG, CPU, None, reports)
    assert [(p["status"], p["reason"]) for p in reports.progress] == [
        ("diverged", "the loss of epoch 1 is not a finite number")
    ]


@pytest.mark.parametrize(
    ("best_by", "kept"),
    [("objective", [1, 3]), ("decision", [1, 2]), ("segmentation", [1, 3, 4]), ("both", [1, 4, 5])],
)
def test_which_epochs_are_kept(best_by: str, kept: list[int]) -> None:
    rows = [
        {"value": 0.5, "decision_f1": 0.8, "dice_mean": 0.4},
        {"value": 0.4, "decision_f1": 0.9, "dice_mean": 0.3},
        {"value": 0.6, "decision_f1": 0.7, "dice_mean": 0.5},
        {"value": 0.6, "decision_f1": 0.9, "dice_mean": 0.6},
        {"value": 0.1, "decision_f1": 0.9, "dice_mean": 0.6},
    ]
    highest: dict[str, float] = {}
    found = []
    for n, row in enumerate(rows, start=1):
        if is_best(row, highest, best_by):
            found.append(n)
        highest = {key: max(value, highest.get(key, value)) for key, value in row.items()}
    assert found == kept


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("metric", ["decision_ap", "dice_positive_mean"])
def test_what_rungs_compare_does_not_depend_on_the_decision(task: TrialTask, tmp_path: Path, metric: str) -> None:
    """With dynamic balance the decision has hardly begun to learn; blackened by it, all masks may be empty."""
    config = RunConfig(**CONFIG.to_dict() | {"epochs": 1, "blacken": True, "lower_threshold": 0.9})
    compared = {}
    for compare in ("segmentation", "objective"):
        (tmp_path / compare).mkdir()
        reports = Reports(tmp_path / compare)
        TrialTask(task.train, task.validation, metric, compare, {}).run(config, CPU, None, reports)
        row = reports.progress[-1]["history"][0]
        compared[compare] = row["compared"]
        assert compare == "segmentation" or row["compared"] == row["value"]
    network, _, _ = checkpoint.load_model(tmp_path / "objective/1/best/1", CPU)
    scores = score(network, open_cache(task.validation, 64, 128), config, CPU)
    plain = scores.figures([scores.choose(CONFIG.judgement())])[0]
    assert compared["segmentation"] == plain["dice_mean" if metric == "decision_ap" else metric]


def test_a_network_is_judged_in_every_way_that_the_search_may_propose(task: TrialTask) -> None:
    found = task.judgements(CONFIG)
    assert found[0] == CONFIG.judgement()
    assert len(set(found)) == len(found) == 6  # pr_curve with two factors and grid, blackened or not
    assert {j.threshold_factor for j in found if j.threshold_rule == "grid"} == {1}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_replay_is_what_training_in_that_way_gives(task: TrialTask, tmp_path: Path) -> None:
    """Every judgement of one training against trainings of its own, best epoch and constraints' figures included."""
    task = replace(task, constrained=BOUNDED)
    (tmp_path / "one").mkdir()
    one = Reports(tmp_path / "one")
    task.run(CONFIG, CPU, None, one)
    for n, replay in enumerate(one.progress[-1]["replays"]):
        (tmp_path / str(n)).mkdir()
        own = Reports(tmp_path / str(n))
        config = RunConfig(**CONFIG.to_dict() | Judgement.of(replay)._asdict())
        replace(task, replayed={}).run(config, CPU, None, own)
        last = own.progress[-1]
        kept = last["history"][last["best_epoch"] - 1]
        assert replay["figures"] == last["replays"][0]["figures"] == {name: kept[name] for name in BOUNDED}
        assert None not in replay["figures"].values()
        assert (last["value"], last["best_epoch"]) == (replay["value"], replay["epoch"])
        assert last["thresholds"] == replay["thresholds"]
        assert last["rules"][Judgement.of(replay).rule] == last["value"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_trial_knows_what_its_masks_and_its_constraints_come_to(task: TrialTask, tmp_path: Path) -> None:
    positives = sum(sample.positive for sample in task.train)
    for kept, count in (("all", positives), (3, 3)):
        config = RunConfig(**CONFIG.to_dict() | {"epochs": 1, "num_segmented": kept})
        (tmp_path / str(kept)).mkdir()
        reports = Reports(tmp_path / str(kept))
        replace(task, cost="num_segmented", constrained=CONSTRAINED_METRICS).run(config, CPU, None, reports)
        [last] = reports.progress
        assert last["num_segmented"] == count
        assert "labelled" not in last
    (tmp_path / "priced").mkdir()
    priced = Reports(tmp_path / "priced")
    replace(task, cost="labelling_minutes", labels_cost=True).run(config, CPU, None, priced)
    assert (priced.progress[0]["num_segmented"], priced.progress[0]["labelled"]) == (3, len(task.train))
    figures = last["replays"][0]["figures"]
    assert set(figures) == set(CONSTRAINED_METRICS) >= set(METRICS)
    assert all(0 <= value <= 1 for value in figures.values())
    network, _, thresholds = checkpoint.load_model(tmp_path / "3/1/best/1", CPU)
    scores = score(network, open_cache(task.validation, 64, 128), config, CPU)
    negative = ~scores.labels
    specificity = 1 - thresholds.decide(scores.decision_logits)[negative].mean()
    assert figures["decision_specificity"] == pytest.approx(specificity)
    assert figures["decision_f1"] == pytest.approx(scores.decision[1])
    plain = Reports(tmp_path)
    task.run(replace(config, num_segmented="all"), CPU, None, plain)
    assert "num_segmented" not in plain.progress[0]
    assert not any("figures" in replay for replay in plain.progress[0]["replays"])
    assert "decision_specificity" not in plain.progress[0]["history"][0]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_blackening_in_a_trial_is_what_its_figures_say(task: TrialTask, tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    config = RunConfig(**CONFIG.to_dict() | {"epochs": 1, "blacken": True, "lower_threshold": 0.9})
    task.run(config, CPU, None, reports)
    network, _, thresholds = checkpoint.load_model(tmp_path / "1" / "best" / "1", CPU)
    assert (thresholds.blacken, thresholds.lower_threshold) == (True, 0.9)
    cache = open_cache(task.validation, 64, 128)
    scores = score(network, cache, config, CPU)
    selected = thresholds.select(scores.counts, scores.decision_logits)
    assert not selected.predicted[~thresholds.decide(scores.decision_logits)].any()
    assert scores.figures([thresholds])[0]["dice_positive_mean"] == pytest.approx(reports.progress[0]["value"])


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_where_memory_runs_out_a_trial_goes_on_in_smaller_parts(task, tmp_path: Path, monkeypatch, error) -> None:
    config = RunConfig(**CONFIG.to_dict() | {"batch_size": 4, "learning_rate": 0.05})  # large steps magnify rounding
    (tmp_path / "straight").mkdir()
    (tmp_path / "small").mkdir()
    straight, small = Reports(tmp_path / "straight"), Reports(tmp_path / "small")
    task.run(config, CPU, None, straight)
    train_epoch = train.train_epoch

    def fits_two(training: train.Training, cache: Any) -> dict[str, float]:
        if training.epochs_done == 1 and training.config.micro_batch != 2:
            raise error
        return train_epoch(training, cache)

    monkeypatch.setattr(train, "train_epoch", fits_two)
    task.run(config, CPU, None, small)
    wanted, found = straight.progress[-1], small.progress[-1]
    assert (wanted["micro_batch"], found["micro_batch"]) == (None, 2)
    assert [p["status"] for p in small.progress] == ["running", "running", "completed"]
    for key in ("loss_segmentation", "loss_decision", "dice_mean"):
        assert [r[key] for r in found["history"]] == pytest.approx([r[key] for r in wanted["history"]], rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("owner", "name"), [(_Keeper, "_draw"), (checkpoint, "save_training")])
def test_memory_that_runs_out_while_an_epoch_is_kept_doubles_nothing(
    task: TrialTask, tmp_path: Path, monkeypatch, owner: Any, name: str
) -> None:
    config = RunConfig(**CONFIG.to_dict() | {"batch_size": 2, "learning_rate": 0.05})
    whole, full = getattr(owner, name), [MemoryError("no memory for it")]

    def once(*arguments: Any) -> Any:
        if full:
            raise full.pop()
        return whole(*arguments)

    (tmp_path / "straight").mkdir()
    (tmp_path / "short").mkdir()
    straight, short = Reports(tmp_path / "straight"), Reports(tmp_path / "short")
    task.run(config, CPU, None, straight)
    monkeypatch.setattr(owner, name, once)
    task.run(config, CPU, None, short)
    wanted, found = straight.progress[-1], short.progress[-1]
    assert [p["epochs"] for p in short.progress] == [1, 2, 3]
    assert [[row["epoch"] for row in p["history"]] for p in short.progress] == [[1], [1, 2], [1, 2, 3]]
    losses = [[row["loss_segmentation"] for row in progress["history"]] for progress in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert checkpoint.is_whole(tmp_path / "short" / "3")
    assert not list((tmp_path / "short").rglob("*.part"))


def test_one_image_that_does_not_fit_is_said(task, tmp_path: Path, monkeypatch) -> None:
    def never(*_: Any) -> None:
        raise OUT_OF_MEMORY[0]

    monkeypatch.setattr(train, "train_epoch", never)
    config = RunConfig(**CONFIG.to_dict() | {"batch_size": 4})
    with pytest.raises(
        MemoryError, match=r"one image of 64x128 does not fit into memory at width 0.1 .CUDA out of mem"
    ):
        task.run(config, CPU, None, Reports(tmp_path))


def test_another_error_is_not_taken_for_memory(task, tmp_path: Path, monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "train_epoch", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        task.run(CONFIG, CPU, None, Reports(tmp_path))


class Cramped(TrialTask):
    """A task whose data leave no room for a whole batch after the first epoch, in any of the processes."""

    def training_cache(self, config: RunConfig) -> Any:
        cache = super().training_cache(config)
        if config.micro_batch != 1:
            plain = train.Steps._add_gradients

            def cramped(steps: Any, *batch: Any) -> Any:
                if steps.epoch == 1:
                    raise OUT_OF_MEMORY[0]
                return plain(steps, *batch)

            train.Steps._add_gradients = cramped
        return cache


def test_a_team_that_fails_while_it_keeps_an_epoch_goes_on_from_the_one_before(
    task, tmp_path: Path, monkeypatch
) -> None:
    """The first of it rewrites its folder when another one runs out of memory."""
    began_with: list[list[int]] = []

    def team(_function: Any, _devices: Any, arguments: Any, heard: Any) -> None:
        *_, resume, room = arguments
        progress = checkpoint.load_progress(resume) if resume else nothing_yet()
        began_with.append([progress["epochs"], checkpoint.is_whole(resume) if resume else 0])
        folder = room / "checkpoint"
        folder.mkdir()
        for epoch in range(progress["epochs"] + 1, CONFIG.epochs + 1):
            progress |= {"epochs": epoch, "status": "completed" if epoch == CONFIG.epochs else "running"}
            (folder / "training.pt").write_text(str(epoch))
            write_json(folder / "progress.json", progress)
            checkpoint.seal(folder)
            heard((dict(progress), folder))
            (folder / "training.pt").write_text(str(epoch + 1))
            if len(began_with) == 1 and epoch == 2:
                raise OUT_OF_MEMORY[0]

    monkeypatch.setattr(parallel, "run", team)
    reports = Reports(tmp_path)
    task.run_together(replace(CONFIG, batch_size=4), [CPU, CPU], None, reports)
    assert began_with == [[0, 0], [2, True]]
    assert [p["epochs"] for p in reports.progress] == [1, 2, 3]
    assert all(checkpoint.is_whole(tmp_path / str(n)) for n in (1, 2, 3))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_trial_on_two_devices_is_the_trial_on_one(task: TrialTask, tmp_path: Path) -> None:
    config = RunConfig(**CONFIG.to_dict() | {"batch_size": 4, "learning_rate": 0.05, "hard_mining_places": 1})
    names = ("one", "two", "one from two", "two from one", "cramped")
    for name in names:
        (tmp_path / name).mkdir()
    one, two, one_from_two, two_from_one, cramped = (Reports(tmp_path / name) for name in names)
    task.run(config, CPU, None, one)
    task.run_together(config, [CPU, CPU], None, two)
    task.run(config, CPU, tmp_path / "two" / "1", one_from_two)
    task.run_together(config, [CPU, CPU], tmp_path / "one" / "2", two_from_one)
    Cramped(**vars(task)).run_together(config, [CPU, CPU], None, cramped)
    assert [p["epochs"] for p in cramped.progress] == [1, 2, 3]
    assert [p["micro_batch"] for p in cramped.progress] == [None, 1, 1]
    for found in (two, one_from_two, two_from_one, cramped):
        last = found.progress[-1]
        assert last["status"] == "completed"
        for key in ("loss_segmentation", "loss_decision", "dice_mean"):
            wanted = [row[key] for row in one.progress[-1]["history"]]
            assert [row[key] for row in last["history"]] == pytest.approx(wanted, rel=0.02)
        folder = found.folder / str(len(found.progress))
        assert checkpoint.is_whole(folder)
        assert (folder / "best" / str(last["best_epoch"]) / "model.safetensors").exists()
    again = Reports(tmp_path)
    task.run_together(config, [CPU, CPU], tmp_path / "two" / "3", again)
    assert [p["status"] for p in again.progress] == ["completed"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_trial_on_two_devices_that_diverges_says_so(task: TrialTask, tmp_path: Path) -> None:
    config = RunConfig(**CONFIG.to_dict() | {"batch_size": 4, "learning_rate": 100.0, "dynamic_balance": False})
    reports = Reports(tmp_path)
    task.run_together(config, [CPU, CPU], None, reports)
    last = reports.progress[-1]
    assert last["status"] == "diverged"
    assert "not" in last["reason"]
    assert "finite" in last["reason"]
    assert last["seconds"] > 0


def test_a_batch_that_cannot_be_shared_is_refused(task: TrialTask, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs batch_size of at least 2, found 1; raise train\.batch_size, or lower"):
        task.run_together(CONFIG, [CPU, CPU], None, Reports(tmp_path))

"""What is timed, and what becomes of a configuration that does not fit into memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import layouts, splits, synthetic, train
from model.data import epoch_order, open_cache
from model.sample import Sample, Supervision
from model.splits import Splits
from tests.tuner.conftest import small_space
from tuner import timing

CPU = torch.device("cpu")


def samples(positives: int, negatives: int) -> list[Sample]:
    return [
        Sample(
            name=f"{n}", image=Path(f"{n}.png"), mask=None, positive=n < positives,
            supervision=Supervision.IMAGE, group=f"{n}", split=None, digest=f"{n}", mask_digest=None,
        )
        for n in range(positives + negatives)
    ]  # fmt: skip


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 40))
def test_what_is_timed_is_one_whole_batch(positives: int, negatives: int, count: int) -> None:
    """All of the chosen images are in an epoch of them, so it is one step."""
    chosen = timing._balanced(samples(positives, negatives), count)
    assert len({sample.name for sample in chosen}) == len(chosen)
    assert len(chosen) == min(count, positives + min(positives, negatives))
    labels = torch.tensor([sample.positive for sample in chosen]).numpy()
    assert len(epoch_order(labels, 0, 0)) == len(chosen)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Splits:
    folder = tmp_path_factory.mktemp("timing") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return splits.assign(layouts.read(folder), folder, 0.25, 0.25, 0)


def test_hard_images_are_part_of_the_step_that_is_timed(found: Splits, monkeypatch) -> None:
    seen = []
    plain = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", lambda t, cache: seen.append(len(cache.samples)) or plain(t, cache))
    space = small_space(train={"width": 0.1, "batch_size": 2, "hard_mining_places": 3})
    timing.time_corner(space, found, ("one",), space.config({}, 0), CPU)
    assert set(seen) == {5}
    assert len(seen) >= 1 + timing.TIMED_STEPS


def test_memory_that_runs_out_is_met_with_smaller_parts(found: Splits, monkeypatch) -> None:
    plain = train.train_epoch

    def with_room_for(images: int):
        def train_epoch(training: train.Training, cache) -> dict[str, float]:
            if (training.config.micro_batch or training.config.batch_size) > images:
                raise MemoryError("no more")
            return plain(training, cache)

        return train_epoch

    space = small_space(train={"width": 0.1, "batch_size": 4})
    monkeypatch.setattr(train, "train_epoch", with_room_for(1))
    corner = timing.time_corner(space, found, ("one",), space.config({}, 0), CPU)
    assert corner.micro_batch == 1
    monkeypatch.setattr(train, "train_epoch", with_room_for(0))
    with pytest.raises(ValueError, match=r"one: one image of 64x128 does not fit into memory .* use a smaller input"):
        timing.time_corner(space, found, ("one",), space.config({}, 0), CPU)


def test_a_set_without_negatives_can_be_timed(found: Splits, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path))
    positives = Splits(*([sample for sample in split if sample.positive] for split in found))
    space = small_space()
    corner = timing.time_corner(space, positives, ("one",), space.config({}, 0), CPU)
    assert min(corner.step_seconds, corner.image_seconds) > 0
    assert not list(tmp_path.iterdir())
    assert open_cache(positives.train, 64, 128).positive.all()


def test_a_trial_must_fit_the_machine() -> None:
    with (
        pytest.raises(ValueError, match=r"asks for 4096 cpus, found \d+; lower --cpus-per-trial"),
        timing.machine(4096, 0, None),
    ):
        pass
    with timing.machine(1, 0, 5) as (here, device):
        assert (here.concurrent, here.devices_per_trial, device.type) == (5, 1, "cpu")

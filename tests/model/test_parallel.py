"""A team of processes trains as one process does, and its end is seen however it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import data, layouts, parallel, synthetic, train
from model.config import RunConfig
from model.data import Cache, open_cache, step_rows
from model.parallel import Team

CPU = torch.device("cpu")
SMALL = {"width": 0.1, "input_height": 64, "input_width": 128, "epochs": 2, "precision": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    synthetic.write(folder / "set", count=9, height=64, width=128, positive_share=0.6)
    return folder


def cache_in(folder: Path) -> Cache:
    return open_cache(layouts.read(folder / "set"), 64, 128, folder / "cache")


def trained(team: Team, device: torch.device, say: Any, folder: Path, config: RunConfig, state: Any = None) -> None:
    """In float64: in single precision, sums in another order part within an epoch."""
    plain = data.to_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "to_input", lambda *arguments: plain(*arguments).double())
        training = train.start(config, device, None, team)
        training.network.double()
        if state:
            training.network.load_state_dict(state["network"])
            training.optimizer.load_state_dict(state["optimizer"])
            training.epochs_done, training.hardness = state["epochs_done"], dict(state["hardness"])
        losses = list(train.fit(training, cache_in(folder)))
    say((losses, training.state()))


def by_team(ranks: int, *arguments: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    heard: list[Any] = []
    parallel.run(trained, [CPU] * ranks, arguments, heard.append)
    [found] = heard
    return found


def by_one(*arguments: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    heard: list[Any] = []
    trained(parallel.ALONE, CPU, heard.append, *arguments)
    return heard[0]


def check_alike(found: Any, wanted: Any) -> None:
    for one, other in zip(found[0], wanted[0], strict=True):
        assert one == pytest.approx(other, rel=1e-6)  # the losses of an epoch are added in single precision
    assert list(found[1]["hardness"]) == list(wanted[1]["hardness"])
    assert found[1]["hardness"] == pytest.approx(wanted[1]["hardness"], rel=1e-9)
    for name, weights in wanted[1]["network"].items():
        torch.testing.assert_close(found[1]["network"][name], weights, rtol=1e-9, atol=1e-12)


HARD = {
    "batch_size": 4, "learning_rate": 0.1, "hard_mining_places": 3, "hard_mining_score": "errors", "weighted_loss": True,
    "delta_cls_loss": 0.5, "pixel_positive_weight": "balanced", "augment_flips": True, "schedule": "cosine",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "fields",
    [HARD, HARD | {"optimizer": "adam", "learning_rate": 0.001, "micro_batch": 1}],
    ids=["sgd", "adam in parts"],
)
def test_a_team_trains_as_one_process_does(folder: Path, fields: dict[str, Any]) -> None:
    """An odd last batch, hard images, weighted losses; and on from what the other has come to, either way."""
    config = RunConfig(**SMALL, **fields)
    steps = [len(rows) for rows in step_rows(cache_in(folder), config, 0)]
    assert steps[-1] % 2 == 1
    check_alike(by_team(2, folder, config), by_one(folder, config))
    if config.optimizer == "sgd":
        short = RunConfig(**SMALL | {"epochs": 1}, **fields)
        first = by_one(folder, short)[1]
        rest = by_one(folder, config, first)
        check_alike(by_team(2, folder, config, first), rest)
        check_alike(by_one(folder, config, by_team(2, folder, short)[1]), rest)


@pytest.mark.slow
@pytest.mark.timeout(240)
def with_gradients(team: Team, device: torch.device, say: Any) -> None:
    """A weight whose channels lie last in memory, of which only the first process has a gradient."""
    weight = torch.zeros(2, 3, 5, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    if team.rank == 0:
        weight.grad = torch.arange(150.0).view(2, 3, 5, 5)
    team.sum_gradients([weight])
    say((weight.stride(), weight.grad.stride(), weight.grad.tolist()))


def test_gradients_lie_in_memory_as_their_weights() -> None:
    """One kernel for all weights refuses others."""
    heard: list[Any] = []
    parallel.run(with_gradients, [CPU] * 2, (), heard.append)
    [(weight, gradient, values)] = heard
    assert gradient == weight
    assert values == torch.arange(150.0).view(2, 3, 5, 5).tolist()


def test_a_process_without_rows_joins_in_every_step(folder: Path) -> None:
    """Three processes, batches of four, the last of one."""
    config = RunConfig(**SMALL, batch_size=4, learning_rate=0.1)
    cache = cache_in(folder)
    assert min(len(rows) for rows in step_rows(cache, config, 0)) < 3
    check_alike(by_team(3, folder, config), by_one(folder, config))


def test_each_row_belongs_to_one_process() -> None:
    rows = np.arange(7)
    parts = [Team(rank, 3).own(rows) for rank in range(3)]
    assert sorted(np.concatenate(parts)) == list(rows)
    assert [len(part) for part in parts] == [3, 2, 2]


def test_alone_nothing_is_sent() -> None:
    values = torch.ones(2)
    assert parallel.ALONE.summed(values) is values
    assert list(parallel.ALONE.in_turn([[1, 2], [], [3]])) == [1, 2, 3]


def diverging(team: Team, device: torch.device, say: Any, folder: Path) -> None:
    training = train.start(RunConfig(**SMALL, batch_size=4), device, None, team)
    if team.rank == 1:
        with torch.no_grad():
            training.network.segment.norm.scale.fill_(float("nan"))
    list(train.fit(training, cache_in(folder)))


def out_of_memory(team: Team, _device: torch.device, _say: Any) -> None:
    if team.rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory, as torch says it")
    team.summed(torch.ones(1))


def killed(team: Team, _device: torch.device, _say: Any) -> None:
    if team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    team.summed(torch.ones(1))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_goes_wrong_in_one_process_is_raised(folder: Path) -> None:
    with pytest.raises(train.TrainingDiverged, match="the loss of epoch 1 is not a finite number"):
        parallel.run(diverging, [CPU, CPU], (folder,), print)
    with pytest.raises(torch.OutOfMemoryError, match="as torch says it") as caught:
        parallel.run(out_of_memory, [CPU, CPU], (), print)
    assert "in out_of_memory" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match=r"the process of device 1 \(cpu\) .* died \(SIGKILL\)"):
        parallel.run(killed, [CPU, CPU], (), print)


def says_where_it_is(team: Team, _device: torch.device, say: Any) -> None:
    pids = torch.zeros(team.ranks, dtype=torch.int64)
    pids[team.rank] = os.getpid()
    say(team.summed(pids).tolist())
    while True:
        team.summed(pids)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_team_ends_with_the_process_that_started_it() -> None:
    """Which is killed here, without a chance to say so."""
    code = """
import torch
from model import parallel
from tests.model.test_parallel import says_where_it_is
if __name__ == "__main__":
    parallel.run(says_where_it_is, [torch.device("cpu")] * 2, (), lambda pids: print(*pids, flush=True))
"""
    script = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert script.stdout is not None
    pids = [int(word) for word in script.stdout.readline().split()]
    assert len(pids) == 2
    assert all(is_there(pid) for pid in pids)
    script.kill()
    script.wait()
    while any(is_there(pid) for pid in pids):
        time.sleep(0.05)  # the test's time limit ends this


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

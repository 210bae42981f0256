"""Trials in the threads of one process: on a CPU, where equal is equal to the bit. What needs a GPU is bench/gpu.py."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model import layouts, splits, synthetic
from model.config import RunConfig
from tests.tuner.test_search import ScriptedTask
from tuner import gpu, pack
from tuner.pack import Asked, Host, HostLost
from tuner.records import NodeUnfit
from tuner.trial import TrialTask

CPU = torch.device("cpu")
CONFIG = RunConfig(
    width=0.1, input_height=64, input_width=128, epochs=3, learning_rate=1.0, precision="float32", augment_flips=True
)
CONFIGS = [
    CONFIG,
    replace(CONFIG, learning_rate=0.3, dilate=5, batch_size=4, seed=1),
    replace(CONFIG, epochs=2, optimizer="adam", learning_rate=0.01, hard_mining_places=2, batch_size=2),
]
DIVERGING = replace(CONFIG, learning_rate=100.0, dynamic_balance=False, batch_size=4)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> TrialTask:
    folder = tmp_path_factory.mktemp("pack") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    found = splits.assign(layouts.read(folder), folder, 0.25, 0.25, 0)
    return TrialTask(found.train, found.validation, "dice_positive_mean", "segmentation", {})


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path_factory.getbasetemp() / "pack-cache"))


class Kept:
    """What a trial reports, with copies of its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.progress = folder, []

    def __call__(self, progress: dict[str, Any], folder: Path | None, use: dict[str, float] | None = None) -> None:
        self.progress.append(json.loads(json.dumps(progress, allow_nan=False)))
        if folder:
            shutil.copytree(folder, self.folder / f"{len(self.progress)}")

    def files(self) -> dict[str, bytes]:
        """Weights, optimizers and pictures of all epochs; what names seconds is compared in `without_seconds`."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and path.suffix in (".safetensors", ".pt", ".png")
        }

    def without_seconds(self) -> list[dict[str, Any]]:
        return [{name: value for name, value in p.items() if name != "seconds"} for p in self.progress]


class Stopped(Exception):
    """What a report raises in a trial's process that is to stop."""


@pytest.fixture(scope="module")
def alone(task: TrialTask, tmp_path_factory) -> list[Kept]:
    """Each of CONFIGS by itself."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path_factory.getbasetemp() / "pack-cache"))
        found = [Kept(folder / f"{number}") for number in range(len(CONFIGS))]
        for config, kept in zip(CONFIGS, found, strict=True):
            task.run(config, CPU, None, kept)
    assert all(kept.files() for kept in found)
    return found


def assert_same(found: Kept, wanted: Kept) -> None:
    assert found.without_seconds() == wanted.without_seconds()
    assert found.files() == wanted.files()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_trials_of_one_host_train_as_they_do_alone_whatever_the_others_do(task, alone, tmp_path: Path) -> None:
    """Beside one that is stopped, one that diverges, one that fails and one that goes on from a checkpoint."""
    host = Host(task, CPU)
    together = threading.Barrier(len(CONFIGS) + 2)
    torn, scratch = tmp_path / "torn", tmp_path / "scratch"
    torn.mkdir()
    scratch.mkdir()

    def at_once(kept: Kept) -> pack.Heard:
        def heard(progress: dict[str, Any], folder: Path | None, use: dict[str, float]) -> None:
            if not kept.progress:
                together.wait(200)  # so none of them has ended before all have begun
            kept(progress, folder, use)
            assert use["cpu_percent"] > 0
            assert folder is None or scratch in folder.parents  # of who asked, and not of the host

        return heard

    def stop(progress: dict[str, Any], folder: Path | None, use: dict[str, float]) -> None:
        together.wait(200)
        raise Stopped

    def trained(config: RunConfig, heard: pack.Heard, resume: Path | None = None) -> None:
        pack.train_at(host.address, Asked(config, 0.1, 1, resume, scratch), heard)

    found = [Kept(tmp_path / f"{number}") for number in range(len(CONFIGS))]
    diverged, resumed = Kept(tmp_path / "diverged"), Kept(tmp_path / "resumed")
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(trained, c, at_once(kept)) for c, kept in zip(CONFIGS, found, strict=True)]
        running.append(pool.submit(trained, DIVERGING, at_once(diverged)))
        running.append(pool.submit(trained, CONFIG, resumed, alone[0].folder / "1"))
        stopped = pool.submit(trained, CONFIG, stop)
        failed = pool.submit(trained, CONFIG, Kept(tmp_path / "failed"), torn)
        for trial in running:
            trial.result()
        with pytest.raises(Stopped):
            stopped.result()
        with pytest.raises(FileNotFoundError) as error:
            failed.result()
    assert "torn" in str(error.value)
    assert "load_progress" in str(error.value.__cause__)  # where it happened in the host
    for kept, wanted in zip(found, alone, strict=True):
        assert_same(kept, wanted)
    assert diverged.progress[-1]["status"] == "diverged"
    assert resumed.without_seconds() == alone[0].without_seconds()[1:]
    wait_until_nothing_runs(host)


def wait_until_nothing_runs(host: Host) -> None:
    with host._together.share(1.0):
        pass


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_trials_side_by_side_without_a_search(task: TrialTask, alone: list[Kept], tmp_path: Path) -> None:
    found = [Kept(tmp_path / f"{number}") for number in range(len(CONFIGS))]
    trials = [partial(task.run, config, CPU, None, kept) for config, kept in zip(CONFIGS, found, strict=True)]
    pack.side_by_side(trials, CPU)
    for kept, wanted in zip(found, alone, strict=True):
        assert_same(kept, wanted)


def test_functions_side_by_side_answer_in_their_order() -> None:
    met = threading.Barrier(2)

    def answer(number: int) -> int:
        met.wait(50)
        return number

    assert pack.side_by_side([partial(answer, 1), partial(answer, 2)], CPU) == [1, 2]
    with pytest.raises(ValueError, match="not a number"):
        pack.side_by_side([partial(float, "1"), _fail], CPU)


def _fail() -> float:
    raise ValueError("not a number")


def test_the_checkpoint_that_is_handed_over_stays_until_it_was_copied(tmp_path: Path) -> None:
    host = Host(ScriptedTask(tmp_path), CPU)
    asked = Asked(replace(CONFIG, epochs=3), 0.5, 1, None, tmp_path)
    epochs: list[list[str]] = []

    def heard(progress: dict[str, Any], folder: Path | None, use: dict[str, float]) -> None:
        epochs.append((tmp_path / "epochs.txt").read_text().split()[1::2])

    pack.train_at(host.address, asked, heard)
    assert epochs == [["1"], ["1", "2"], ["1", "2", "3"]]  # the next one begins when this one was taken


@pytest.mark.timeout(240)
def test_a_trial_whose_process_is_killed_ends_and_gives_its_share_back(tmp_path: Path) -> None:
    host = Host(ScriptedTask(tmp_path), CPU)
    script = """
import sys
from pathlib import Path
from model.config import RunConfig
from tuner.pack import Address, Asked, train_at

def heard(progress, folder, use):
    print("heard", flush=True)
    sys.stdin.read()

address = Address(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
train_at(address, Asked(RunConfig(epochs=1000, input_height=64, input_width=128), 0.6, 1, None, Path()), heard)
"""
    command = [sys.executable, "-c", script, str(host.address.port), host.address.key.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"heard\n"
        process.kill()
    heard: list[Any] = []
    asked = Asked(replace(CONFIG, epochs=2, delta_cls_loss=1.0), 0.6, 1, None, tmp_path)  # no room for both
    pack.train_at(host.address, asked, lambda progress, *_: heard.append(progress["status"]))
    assert heard == ["running", "completed"]


def _dead_host(folder: Path, behaviour: str, act: Callable[[subprocess.Popen[bytes]], None] = lambda _: None) -> Any:
    """What a trial raises whose host is a process that dies."""
    script = """
import sys
from pathlib import Path
import torch
from tests.tuner.test_search import ScriptedTask
from tuner import gpu
from tuner.pack import Host

if sys.argv[2] == "crash":
    gpu.still_answers = lambda device: False
host = Host(ScriptedTask(Path(sys.argv[1]), {"1": sys.argv[2], "0.02": "wait"}), torch.device("cpu"))
print(host.address.port, host.address.key.hex(), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(folder), behaviour]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port, key = process.stdout.readline().split()
        address = pack.Address(int(port), bytes.fromhex(key.decode()))
        others: list[HostLost] = []

        def other() -> None:
            try:
                pack.train_at(address, asked(0.02), lambda *_: begun.set())
            except HostLost as error:
                others.append(error)

        def asked(delta: float) -> Asked:
            return Asked(replace(CONFIG, delta_cls_loss=delta), 0.3, 1, None, folder)

        begun = threading.Event()
        beside = threading.Thread(target=other)
        beside.start()
        assert begun.wait(200)
        try:
            with pytest.raises(HostLost) as found:
                pack.train_at(address, asked(1.0), lambda *_: act(process))
        finally:
            process.kill()
        beside.join()
        assert len(others) == 1
        with pytest.raises(HostLost, match="cannot be reached"):
            pack.train_at(address, asked(1.0), lambda *_: None)
        return found.value


@pytest.mark.timeout(240)
def test_the_death_of_a_host_is_told_to_all_of_its_trials(tmp_path: Path) -> None:
    error = _dead_host(tmp_path, "die")
    assert "the process that trained the trials of this GPU died" in str(error)
    assert "died" in str(_dead_host(tmp_path, "", lambda process: process.kill()))


@pytest.mark.timeout(240)
def test_a_device_that_answers_no_more_ends_the_host_before_any_trial_is_called_failed(tmp_path: Path) -> None:
    assert "died" in str(_dead_host(tmp_path, "crash"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_torch_cannot_use_is_a_problem_of_the_node(tmp_path: Path) -> None:
    host = Host(ScriptedTask(tmp_path), torch.device("cuda", 0))
    for _ in range(2):  # it gives back what it could not use
        with pytest.raises(NodeUnfit, match="this trial holds a GPU, but torch finds no CUDA here; install a CUDA"):
            pack.train_at(host.address, Asked(CONFIG, 1.0, 1, None, tmp_path), lambda *_: None)


def test_who_does_not_know_the_key_is_not_heard(tmp_path: Path) -> None:
    host = Host(ScriptedTask(tmp_path), CPU)
    with pytest.raises(HostLost, match="cannot be reached"):
        pack.train_at(replace(host.address, key=b"guessed"), Asked(CONFIG, 0.5, 1, None, tmp_path), lambda *_: None)
    heard: list[Any] = []
    pack.train_at(
        host.address, Asked(CONFIG, 0.5, 1, None, tmp_path), lambda progress, *_: heard.append(progress["epochs"])
    )
    assert heard == [1, 2, 3]
    assert "key" not in repr(host.address)


@dataclass(frozen=True)
class Threads(ScriptedTask):
    """Says how many CPU threads torch has in its thread."""

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Any) -> None:
        def noted(progress: dict[str, Any], folder: Path | None) -> None:
            report(progress | {"threads": torch.get_num_threads()}, folder)

        super().run(config, device, resume, noted)


def test_who_says_nothing_holds_up_nobody(task: TrialTask, tmp_path: Path) -> None:
    host = pack.Host(task, CPU)
    with socket.create_connection(("127.0.0.1", host.address.port)):
        heard: list[dict[str, Any]] = []
        pack.train_at(
            host.address, Asked(CONFIG, 0.5, 1, None, tmp_path), lambda progress, *_: heard.append(dict(progress))
        )
    assert heard[-1]["status"] == "completed"


def test_a_trial_has_the_threads_that_it_is_given(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        heard: list[int] = []
        host = Host(Threads(tmp_path), CPU)
        pack.train_at(
            host.address, Asked(CONFIG, 0.5, 3, None, tmp_path), lambda progress, *_: heard.append(progress["threads"])
        )
        assert heard == [3, 3, 3]
    finally:
        torch.set_num_threads(before)


def test_shares_wait_for_each_other(tmp_path: Path) -> None:
    together = gpu.Together(CPU)
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.set()
        with together.share(0.34):
            order.append("second")

    with together.share(0.33), together.share(0.33):
        with together.share(0.34):
            thread = threading.Thread(target=second)
            thread.start()
            assert inside.wait(55)
            order.append("first")
        thread.join()
    assert order == ["first", "second"]
    with together.share(1.0):
        pass

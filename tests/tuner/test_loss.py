"""What a search does when hosts die, are cut off, are taken away with notice, or cannot do their work: on real hosts."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from model import checkpoint
from model.config import RunConfig
from model.files import write_json
from tests import hosts
from tests.hosts import Host, Hosts
from tests.tuner.test_search import ends, optuna_trials, scripted_space
from tuner import cluster, search
from tuner.cluster import Resources
from tuner.records import NodeUnfit, SearchFailed
from tuner.sampler import SearchStudy
from tuner.space import Space
from tuner.tracking import Trackers
from tuner.trial import nothing_yet

needs_hosts = pytest.mark.skipif(not hosts.available(), reason="needs root, namespaces and iproute2")


@dataclass(frozen=True)
class HostTask:
    """Notes each epoch that it begins, with the host. Where it is told to, it waits until the test has done something,
    or finds that the host cannot run it."""

    folder: Path
    waits: tuple[str, ...] = ()
    """delta_cls_loss and epoch as text: there a file of that name is made, and waited for one that ends in " go\""""
    unfit: tuple[str, ...] = ()
    """hosts that say so"""
    disk: Path | None = None
    """where each epoch writes 2 MB"""

    def run(self, config: RunConfig, _device: torch.device, resume: Path | None, report: Any) -> None:
        host = socket.gethostname()
        if host in self.unfit:
            raise NodeUnfit("its driver is broken; install another")
        progress = checkpoint.load_progress(resume) if resume else nothing_yet()
        for epoch in range(progress["epochs"] + 1, config.epochs + 1):
            if self.disk:
                (self.disk / f"{os.getpid()}-{config.delta_cls_loss:g}").write_bytes(b"0" * 2_000_000)
            place = f"{config.delta_cls_loss:g} {epoch}"
            with (self.folder / "epochs.txt").open("a") as log:
                log.write(f"{place} {host}\n")
            if place in self.waits:
                (self.folder / place).write_text(host)
                wait_for(self.folder / f"{place} go")
            row = {"epoch": epoch, "value": epoch / 1000, "compared": epoch / 1000}
            progress |= {
                "epochs": epoch,
                "history": [*progress["history"], row],
                "value": row["value"],
                "best_epoch": epoch,
                "seconds": progress["seconds"] + 1.0,
                "status": "completed" if epoch == config.epochs else "running",
            }
            folder = self.folder / f"{host}-{os.getpid()}-{place}"
            folder.mkdir(exist_ok=True)
            write_json(folder / "progress.json", progress)
            checkpoint.seal(folder)
            report(progress, folder)


def wait_for(path: Path) -> None:
    while not path.exists() or path.stat().st_size == 0:
        time.sleep(0.02)


@contextmanager
def meanwhile(function: Callable[[], None]) -> Iterator[None]:
    """Runs a function beside the search; what went wrong in it is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(60)
    if raised:
        raise raised[0]


def run(space: Space, task: HostTask, concurrent: int = 1) -> str:
    study = SearchStudy(space, "abc123", task.folder / "study.journal")
    (task.folder / "trials").mkdir(exist_ok=True)
    return search.run_trials(study, task, task.folder, space.budget, Resources(concurrent=concurrent), Trackers())


def begun(folder: Path) -> list[tuple[str, str]]:
    """(delta and epoch, host) of each epoch that was begun."""
    lines = (folder / "epochs.txt").read_text().splitlines()
    return [(line.rpartition(" ")[0], line.rpartition(" ")[2]) for line in lines]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return sorted(record.getMessage() for record in [*caplog.records] if record.levelno == logging.WARNING)


def on_host(made: Hosts, folder: Path, place: str) -> Host:
    """Where an epoch waits."""
    wait_for(folder / place)
    name = (folder / place).read_text()
    return next(host for host in made.hosts if host.name == name)


def let_go_elsewhere(folder: Path, place: str, lost: Host) -> None:
    """Lets an epoch go on when it has begun again on another host than the one on which it was lost."""
    while (folder / place).read_text() in ("", lost.name):
        time.sleep(0.02)
    (folder / f"{place} go").write_text("go")


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_trial_that_loses_its_host_again_and_again_goes_on_from_its_last_epoch(tmp_path: Path) -> None:
    """As often as a trial may crash: by a host that dies, one that is cut off and comes back, and one that dies."""
    space = scripted_space([1.0, 2.0])
    waits = ("1 2", "1 3", "1 4", "2 2")

    with hosts.cluster() as made:
        for name in "abcd":
            made.add(name)

        def lose() -> None:
            killed = on_host(made, tmp_path, "1 2")
            killed.kill()
            let_go_elsewhere(tmp_path, "1 2", killed)
            cut = on_host(made, tmp_path, "1 3")
            cut.cut_off()
            let_go_elsewhere(tmp_path, "1 3", cut)  # and the one that is cut off: it trains its epoch to the end
            killed = on_host(made, tmp_path, "1 4")
            cut.join_again()
            killed.kill()
            wait_for(tmp_path / "2 2")
            (tmp_path / "2 2 go").write_text("go")  # its host is the last one
            let_go_elsewhere(tmp_path, "1 4", killed)

        with meanwhile(lose):
            assert run(space, HostTask(tmp_path, waits), concurrent=2) == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "completed"), (2, "completed")]
    again = {place: count for place, count in Counter(place for place, _ in begun(tmp_path)).items() if count > 1}
    assert again == {"1 2": 2, "1 3": 2, "1 4": 2}  # what was under way, and no other
    of_trial = [host for place, host in begun(tmp_path) if place.startswith("1 ")]
    assert len(set(of_trial)) == 4
    assert [trial.state.name for trial in optuna_trials(space, tmp_path)] == ["COMPLETE"] * 3


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_host_with_notice_ends_what_it_can_and_takes_nothing_new(tmp_path: Path) -> None:
    """One that has time, one that has not, and one that goes in the middle of an epoch: Tune would start that trial
    again by itself, with the checkpoint that it began with."""
    space = scripted_space([1.0, 2.0, 3.0])
    noticed: list[str] = []

    with hosts.cluster() as made:
        for name in "abcd":
            made.add(name)

        def give_notice() -> None:
            for place, seconds in (("1 2", 600), ("2 2", 1), ("3 2", 1)):
                host = on_host(made, tmp_path, place)
                host.drain(seconds)
                # Ray says so a little later; and a host that has not the time of an epoch left has none at all.
                while (left := cluster.draining().get(host.node_id)) is None or 0 < left < 10:
                    time.sleep(0.02)
                noticed.append(host.name)
                if place == "3 2":
                    host.cut_off()
                    let_go_elsewhere(tmp_path, place, host)
                (tmp_path / f"{place} go").write_text("go")

        with meanwhile(give_notice):
            assert run(space, HostTask(tmp_path, ("1 2", "2 2", "3 2")), concurrent=1) == "finished"
    assert [status for _, status in ends(tmp_path)] == ["completed"] * 4
    found = begun(tmp_path)
    assert {place for place, count in Counter(place for place, _ in found).items() if count > 1} == {"3 2"}
    by_epoch = dict(found)  # the last time
    assert [by_epoch[f"1 {epoch}"] for epoch in (2, 3, 4)] == [noticed[0]] * 3  # there was time
    assert by_epoch["2 1"] != noticed[0]
    assert by_epoch["2 2"] == noticed[1]
    assert not {by_epoch["2 3"], by_epoch["2 4"], by_epoch["3 1"]} & {*noticed[:2]}
    assert {by_epoch[f"3 {epoch}"] for epoch in (2, 3, 4)} == {*"abcd"} - {*noticed}


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_unfit_hosts_take_no_more_trials_and_a_search_without_others_ends(tmp_path: Path, caplog) -> None:
    space = scripted_space([1.0, 2.0, 3.0])
    disk = tmp_path / "disk"
    disk.mkdir()

    with hosts.cluster() as made:
        full = made.add("full", own_disks={disk: "1m"})
        odd = made.add("odd")
        nobody = HostTask(tmp_path, unfit=("odd", "full"))
        with pytest.raises(
            SearchFailed, match=r"no node is left .*full \(10.* is broken.*odd \(10.*tuner resume"
        ) as failed:
            run(space, nobody, concurrent=2)
        assert str(tmp_path) in str(failed.value)
        assert ends(tmp_path) == []
        assert {trial.state.name for trial in optuna_trials(space, tmp_path)} == {"WAITING"}

        made.add("good")
        caplog.clear()
        waits = tuple(f"{delta} 1" for delta in ("0.01", "1", "2", "3"))

        def wait_for_both() -> None:
            while len(warnings(caplog)) < 2:
                time.sleep(0.02)
            for place in waits:
                (tmp_path / f"{place} go").write_text("go")

        with meanwhile(wait_for_both):
            assert run(space, HostTask(tmp_path, waits, ("odd",), disk), concurrent=3) == "finished"
    said = warnings(caplog)
    assert len(said) == 2
    assert f"node full ({full.address}) takes no more trials in this session: [Errno 28] No space left" in said[0]
    assert f"node odd ({odd.address}) takes no more trials in this session: its driver is broken" in said[1]
    assert [status for _, status in ends(tmp_path)] == ["completed"] * 4
    assert {host for _, host in begun(tmp_path)} == {"good"}


@dataclass(frozen=True)
class FullDiskTask(HostTask):
    """Finds its disk full."""

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Any) -> None:
        if not (self.folder / "room").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")
        super().run(config, device, resume, report)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_full_disk_of_the_only_node_ends_the_search_as_that_of_the_driver_does(tmp_path: Path) -> None:
    space = scripted_space([1.0])
    with cluster.connected(None):
        with pytest.raises(OSError, match="No space left on device") as raised:
            run(space, FullDiskTask(tmp_path))
        assert raised.value.errno == errno.ENOSPC
        assert ends(tmp_path) == []
        (tmp_path / "room").touch()
        assert run(space, FullDiskTask(tmp_path)) == "finished"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "completed")]


def call(folder: str, unfit: tuple[str, ...]) -> str:
    """Waits on its first host."""
    host = socket.gethostname()
    if host in unfit:
        raise NodeUnfit(f"{host} will not do")
    with (Path(folder) / "calls").open("a") as log:
        log.write("called\n")
    wait_for(Path(folder) / "call go")
    return host


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_function_on_a_worker_outlives_its_host_and_avoids_unfit_ones(tmp_path: Path) -> None:
    with hosts.cluster() as made:
        made.add("bad")
        first = made.add("first")

        def kill() -> None:
            wait_for(tmp_path / "calls")
            made.add("second")
            first.kill()
            while (tmp_path / "calls").read_text().count("called") < 2:
                time.sleep(0.02)
            (tmp_path / "call go").write_text("go")

        with meanwhile(kill):
            assert cluster.run_on_worker(call, Resources(), str(tmp_path), ("bad",)) == "second"
        assert (tmp_path / "calls").read_text() == "called\n" * 2
        with pytest.raises(NodeUnfit, match="will not do"):
            cluster.run_on_worker(call, Resources(), str(tmp_path), ("bad", "second"))


_DRIVER = """
import sys
from pathlib import Path
from tests.tuner.test_loss import HostTask, run
from tests.tuner.test_search import scripted_space
from tuner import cluster
folder = Path(sys.argv[1])
with cluster.connected(sys.argv[2]):
    print(run(scripted_space([1.0]), HostTask(folder, ("1 3",))))
"""


@contextmanager
def a_head(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A head alone, with a CPU and a session of processes of its own."""
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
         "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--object-store-memory=100000000",
         "--disable-usage-stats"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        assert any(b"Ray runtime started" in line for line in head.stdout)
        yield head
    finally:
        kill_session(head)


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    """Kills a process and all that it has started, at once."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == leader.pid:
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # it has ended
            continue
    leader.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_driver_whose_head_is_gone_ends_with_a_message_and_goes_on_under_another(tmp_path: Path) -> None:
    port = free_port()
    with a_head(port) as head:
        command = [sys.executable, "-c", _DRIVER, str(tmp_path), f"127.0.0.1:{port}"]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(tmp_path / "1 3")
        kill_session(head)
        _, said = driver.communicate(timeout=70)
    assert driver.returncode == 1
    assert f"the head of the Ray cluster at 127.0.0.1:{port} has not answered for" in said
    assert "`tuner resume RUN` goes on" in said
    (tmp_path / "1 3 go").write_text("go")
    with a_head(port):
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "finished\n"
    assert ends(tmp_path) == [(0.01, "completed"), (1, "completed")]
    assert Counter(place for place, _ in begun(tmp_path))["1 2"] == 1
    assert len(begun(tmp_path)) == 9


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_cluster_of_another_version_is_refused() -> None:
    with hosts.cluster() as made:
        told = {"ray_version": "2.9.3", "python_version": "3.10.1"}
        ray.experimental.internal_kv._internal_kv_put(b"CLUSTER_METADATA", json.dumps(told), namespace=b"cluster")
        code = f"from tuner.cluster import connected\nwith connected({made.address!r}): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: the cluster at {made.address} must run the Ray and the Python of this process")
    assert f"found Ray 2.9.3 with Python 3.10.1 and Ray {ray.__version__} with Python" in last

"""Searches where clusters are launched: nodes that an autoscaler brings, a job that a laptop submits."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.conftest import heeds_ctrl_c
from tests.hosts import own_ports
from tests.tuner.conftest import small_space
from tuner.space import Space

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
HEAD = "f" * 51 + "00000"
"""the node id by which the fake provider knows the head"""
OWN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""a token, and Ray on 127.0.0.1 as on macOS, for all that a test starts"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def processes(pid: int) -> list[Any]:
    """One that we started, and all that descend from it."""
    assert ray  # which brings psutil along
    import psutil

    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def end(process: subprocess.Popen[Any]) -> None:
    import psutil

    if process.poll() is not None:
        return
    family = processes(process.pid)
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=20)
    for one in left:
        one.kill()
    process.wait()


@contextmanager
def head(*options: str, autoscaling: Callable[[str], Path] | None = None, **environment: str) -> Iterator[str]:
    """A cluster's head on 127.0.0.1, with the token, in a process group of its own; its address, of which the
    autoscaler's configuration may be made."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's sockets lie there
    address = f"127.0.0.1:{free_port()}"
    start = [sys.executable, RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1",
             f"--port={address.rpartition(':')[2]}", "--disable-usage-stats", "--object-store-memory=100000000",
             f"--temp-dir={folder}", *own_ports(), *options]  # fmt: skip
    if autoscaling:
        start.append(f"--autoscaling-config={autoscaling(address)}")
    with (folder / "head.txt").open("w") as said:
        process = subprocess.Popen(
            start, env=os.environ | OWN | environment, stdout=said, stderr=said, start_new_session=True
        )
    try:
        while "Ray runtime started" not in (folder / "head.txt").read_text():
            assert process.poll() is None, (folder / "head.txt").read_text()
            time.sleep(0.1)
        yield address
    except BaseException:
        print((folder / "head.txt").read_text())  # pytest shows it
        raise
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def autoscaled(address: str, cpus: int = 1, idle_minutes: float = 0.1) -> dict[str, Any]:
    """cluster.yaml for Ray's provider that starts nodes on this machine: its kinds of nodes and limits as they are, but
    for the CPUs of a worker, which this machine has fewer of, and for how long nobody waits here."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["provider"] = {
        "type": "fake_multinode", "gcs_address": address, "head_node_id": HEAD, "use_node_id_as_ip": True,
        "disable_node_updaters": True, "disable_launch_config_check": True,
    }  # fmt: skip
    kinds = config["available_node_types"]
    kinds["ray.head.default"] = kinds.pop(config["head_node_type"]) | {"max_workers": 0}  # as the provider calls it
    config["head_node_type"] = "ray.head.default"
    kinds["gpu_worker"]["resources"] |= {"CPU": cpus}
    config["idle_timeout_minutes"] = idle_minutes
    config["file_mounts"] = {}  # `make wheel` need not have run here
    defaults = {"cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [],
                "rsync_filter": [], "worker_setup_commands": [], "docker": {}, "upscaling_speed": 1.0}  # fmt: skip
    return defaults | config


def tuner(
    *words: str | Path | float, cwd: Path, timeout: float = 600, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """The command, in an environment with these variables, or without where one is None."""
    own = os.environ | OWN | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-m", "tuner", *map(str, words)], cwd=cwd, env={name: value for name, value in own.items() if value is not None},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def space_file(folder: Path, space: Space) -> Path:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(space.to_dict()))
    return file


def alive(address: str) -> int:
    """How many nodes the cluster has, asked from a process of its own."""
    code = f"import ray; ray.init({address!r}, log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | OWN, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_brings_nodes_that_go_when_it_is_over(tmp_path: Path) -> None:
    """The autoscaler with what cluster.yaml says, and a head that takes no trial."""
    config = tmp_path / "autoscaling.yaml"
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    space = space_file(tmp_path, small_space(budget={"trials": 3}))

    def configured(address: str) -> Path:
        config.write_text(yaml.safe_dump(autoscaled(address)))
        return config

    with head("--num-cpus=0", "--include-dashboard=false", autoscaling=configured, **environment) as at:
        assert alive(at) == 1
        done = tuner("search", space, "--data", "synthetic", "--address", at, "--gpus-per-trial", 0,
                     "--cpus-per-trial", 1, "--wandb", "off", cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "no node can take a trial yet: waiting for the autoscaler, whose limits allow 4 at once" in " ".join(
            done.stderr.split()
        )
        run = tmp_path / "runs" / "small"
        records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        assert [record["status"] for record in records] == ["completed"] * 3
        assert (run / "report" / "index.html").exists()
        while alive(at) > 1:  # pytest's timeout ends it
            time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_without_a_cluster_listens_on_loopback_alone(tmp_path: Path) -> None:
    space = space_file(tmp_path, small_space())
    search = subprocess.Popen(
        [sys.executable, "-m", "tuner", "search", str(space), "--data", "synthetic", "--wandb", "off", "--no-report"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        while not [*tmp_path.glob("runs/small/trials/attempt-1/*/checkpoint_*")]:
            assert search.poll() is None, search.stderr.read() if search.stderr else ""
            time.sleep(0.1)
        listening = [
            (process.name(), connection.laddr.ip)
            for process in processes(search.pid)
            for connection in process.net_connections("inet")
            if connection.status == "LISTEN"
        ]
    finally:
        end(search)
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert {ip.removeprefix("::ffff:") for _, ip in listening} == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_laptop_submits_a_search_to_a_cluster(tmp_path: Path) -> None:
    """Dashboard and token on; the laptop has the token in its home, another folder, and a space outside that."""
    laptop, home, elsewhere = (tmp_path / name for name in ("laptop", "home", "elsewhere"))
    for folder in (laptop, home, elsewhere):
        folder.mkdir()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    space = space_file(elsewhere, small_space(budget={"trials": 2}))
    (laptop / "notes.txt").write_text("travels")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    secret = "local-" + "f00d" * 10
    at_home = {"HOME": str(tmp_path), "RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": None, "WANDB_API_KEY": secret}
    options = ("--num-cpus=1", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}")
    with head(*options, HOME=str(home), PYTHONPATH=str(ROOT), PATH=f"{RAY.parent}:{os.environ['PATH']}"):
        done = tuner("search", space, "--data", "synthetic", "--wandb", "off", "--no-report", "--address", url,
                     cwd=laptop, **at_home)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        run = home / "runs" / "small"
        assert done.stdout.splitlines()[-1] == str(run)  # what the command there printed
        assert "no --storage: results will lie in ~/runs on the cluster's head" in done.stderr
        records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        assert [record["status"] for record in records] == ["completed"] * 2
        assert not (laptop / "runs").exists()
        again = tuner("search", space, "--data", "synthetic", "--address", url, cwd=laptop, **at_home)
        assert (again.returncode, "a run's name must be new" in again.stdout) == (2, True), again.stdout + again.stderr
        resumed = tuner("resume", "runs/small", "--address", url, cwd=laptop, **at_home)
        assert (resumed.returncode, resumed.stdout.splitlines()[-1]) == (0, str(run)), resumed.stderr
        stranger = tuner("search", space, "--address", url, cwd=laptop, **(at_home | {"HOME": str(laptop)}))
        assert (stranger.returncode, "asks for its token" in stranger.stderr) == (2, True), stranger.stderr
        submit = [RAY, "job", "submit", "--address", url, "--working-dir", elsewhere, "--",
                  "tuner", "search", "small.yaml", "--name", "by-ray", "--data", "synthetic", "--wandb", "off",
                  "--no-report", "--address", "auto", "--runs", str(home / "runs")]  # fmt: skip
        by_ray = subprocess.run(
            [sys.executable, *submit], env=os.environ | OWN, capture_output=True, text=True, check=False
        )
        assert by_ray.returncode == 0, by_ray.stdout + by_ray.stderr
        assert len((home / "runs" / "by-ray" / "records.jsonl").read_text().splitlines()) == 2
        listed = subprocess.run(
            [sys.executable, RAY, "job", "list", "--address", url],
            env=os.environ | OWN, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "--address auto" in listed.stdout
        assert secret not in listed.stdout
        interrupted(space, url, laptop, at_home, home / "runs" / "interrupted")


def interrupted(space: Path, url: str, laptop: Path, at_home: dict[str, str | None], run: Path) -> None:
    """Ctrl-C leaves the job running; the commands that it names follow it and stop it."""
    own = os.environ | OWN | {"PYTHONPATH": str(ROOT)} | at_home
    search = subprocess.Popen(
        [sys.executable, "-m", "tuner", "search", str(space), "--name", run.name, "--data", "synthetic", "--wandb", "off",
         "--trials", "500", "--address", url],
        cwd=laptop, env={name: value for name, value in own.items() if value is not None},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c,
    )  # fmt: skip
    while not (run / "records.jsonl").exists():
        assert search.poll() is None
        time.sleep(0.2)
    search.send_signal(signal.SIGINT)
    _, said = search.communicate(timeout=60)
    assert search.returncode == 130
    assert "the job goes on; follow it: RAY_AUTH_MODE=token ray job logs --follow raysubmit_" in said
    stop = shlex.split(said.partition("stop it: RAY_AUTH_MODE=token ray ")[2].splitlines()[0])
    assert json.loads((run / "run.json").read_text())["state"] == "running"
    subprocess.run([sys.executable, RAY, *stop], env=os.environ | OWN, capture_output=True, check=True)
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"  # it was given the time for it

"""Searches where clusters are launched: nodes that an autoscaler brings, a job that a laptop submits."""

from __future__ import annotations

import json
import os
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
             f"--temp-dir={folder}", *options]  # fmt: skip
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
    defaults = {"cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [],
                "rsync_filter": [], "worker_setup_commands": [], "docker": {}, "upscaling_speed": 1.0}  # fmt: skip
    return defaults | config


def tuner(*words: str | Path, cwd: Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    own = OWN | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "tuner", *map(str, words)], cwd=cwd, env=os.environ | own | environment,
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
@pytest.mark.timeout(420)
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
        assert "no node can take a trial yet: waiting for the autoscaler, which may bring room for 4" in " ".join(
            done.stderr.split()
        )
        run = tmp_path / "runs" / "small"
        records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        assert [record["status"] for record in records] == ["completed"] * 3
        assert (run / "report" / "index.html").exists()
        while alive(at) > 1:  # pytest's timeout ends it
            time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(240)
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

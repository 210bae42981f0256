"""What is asked of nodes before the first trial, on hosts that lack one thing each."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from rich.console import Console
from s3fs import S3FileSystem

from model import synthetic
from model.data import cached
from tests import hosts
from tests.tuner.conftest import small_space
from tuner import nodes, pipeline
from tuner import run as runs
from tuner.cluster import Resources
from tuner.records import NodeUnfit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not hosts.available(), reason="needs root, namespaces and iproute2"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # workers import from the driver's current folder first
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    synthetic.write(tmp_path / "set", count=24, height=64, width=128)
    return tmp_path / "set"


def before(folder: Path) -> dict[str, str]:
    """An environment in which what lies in a folder is found first."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}


def installed(folder: Path, name: str, version: str) -> dict[str, str]:
    """An environment in which another release of a package is installed."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return before(folder)


def refusal(made: hosts.Hosts, data: Path | str, folder: Path, **options) -> str:
    """Why a search on these hosts does not begin, which it says within a minute and leaves nothing."""
    started = time.monotonic()
    with pytest.raises(ValueError, match="every node must be fit for the search") as error:
        pipeline.run_search(small_space(), data, runs=folder / "runs", wandb="off", address=made.address, **options)
    assert time.monotonic() - started < 60
    assert not list((folder / "runs").iterdir())
    return str(error.value)


def lines_of(message: str, host: hosts.Host) -> list[str]:
    return re.findall(rf"^  node {host.name} \({re.escape(host.address)}\): (.*)$", message, re.MULTILINE)


@contextmanager
def s3(address: str, monkeypatch) -> Iterator[None]:
    """A real S3 server, with an empty bucket, that this process and what it starts from now on use for s3://."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{address}:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "her secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # one of these remembers its server
    try:
        S3FileSystem().makedirs("bucket", exist_ok=True)  # all servers of a process have the same buckets
        yield
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()


def test_nodes_with_other_versions_are_named(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "tuner").mkdir(parents=True)
    (broken / "tuner" / "__init__.py").write_text("raise ImportError('half installed')\n")
    with hosts.cluster() as made:
        good = made.add("good")
        project = made.add("project", environment=installed(tmp_path / "a", "segdec-tuner", "9.9"))
        torch = made.add("torch", environment=installed(tmp_path / "b", "torch", "2.7.0"))
        half = made.add("half", environment=before(broken))
        message = refusal(made, data, tmp_path)
    assert "found 3 of 5 nodes that are not" in message
    assert not lines_of(message, good)
    assert [line[:61] for line in lines_of(message, project)] == [
        "segdec-tuner must be 0.1.0 as the driver's is, found 9.9; ins"
    ]
    assert re.match(r"torch must be 2\.\d+\.\d\S* as the driver's is, found 2\.7\.0; inst", *lines_of(message, torch))
    assert re.match(r"cannot import this project \(ImportError: half installed\); inst", *lines_of(message, half))


def test_nodes_without_the_runs_folder_or_the_data_are_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with hosts.cluster() as made:
        made.add("good")
        apart = made.add("apart", own_disks={tmp_path / "runs": "1m"})
        bare = made.add("bare", own_disks={data: "1m"})
        message = refusal(made, data, tmp_path)
    assert "found 2 of 4 nodes that are not" in message
    assert re.search("put --runs on a mount that all nodes share, or say --storage", *lines_of(message, apart))
    assert re.match(r"lacks 36 of 36 files of the data, the first \S+/images/\d+.png; mount", *lines_of(message, bare))


def test_a_node_without_access_to_the_storage_is_named(data: Path, tmp_path: Path, monkeypatch) -> None:
    with hosts.cluster() as made, s3(f"{made.network}.1", monkeypatch):
        made.add("good")
        cut = made.add("cut", environment={"AWS_ENDPOINT_URL": f"http://{made.network}.200:9"})
        message = refusal(made, data, tmp_path, storage="s3://bucket/runs")
    assert "found 1 of 3 nodes that are not" in message
    assert re.search("s3://bucket/runs.*AWS_ENDPOINT_URL", *lines_of(message, cut))


def test_a_late_node_builds_its_own_cache(data: Path, tmp_path: Path, own_cache: Path) -> None:
    """And trains; what it did is said."""
    own_cache.mkdir()
    run = runs.create(small_space(), data, tmp_path / "runs")
    found = run.splits()
    splits = [found.train, found.validation]

    @ray.remote(num_cpus=1)
    def on_worker(needs: nodes.Needs) -> tuple[str | None, str | None, int]:
        return needs.make_ready(*splits), needs.make_ready(*splits), len(cached(own_cache))

    with hosts.cluster() as made:
        first = made.add("first")
        resources = Resources()
        place = tmp_path / "runs" / "small" / "trials"
        needs = nodes.needs(run.source, 64, 128, str(place), made.address)
        nodes.check(needs, found.train + found.validation, resources)
        nodes.prepare(needs, splits, resources, None)
        assert len(cached(own_cache)) == 2
        assert ray.get(on_worker.remote(needs)) == (None, None, 2)
        first.kill()
        late = made.add("late", own_disks={own_cache: "5m"})
        said, again, count = ray.get(on_worker.remote(needs))
        assert re.fullmatch(rf"node late \({late.address}\) decoded 18 images in \d+ s", said)
        assert (again, count) == (None, 2)
        late.kill()
        made.add("small", own_disks={own_cache: "100k"})
        with pytest.raises(NodeUnfit, match=r"No space left on device.*SEGDEC_TUNER_CACHE"):
            ray.get(on_worker.remote(needs))


def test_a_search_on_data_in_object_storage(data: Path, tmp_path: Path, own_cache: Path, monkeypatch) -> None:
    """A host that sees neither the driver's copy nor any folder of the data decodes, trains and evaluates."""
    own_cache.mkdir()
    with hosts.cluster() as made, s3(f"{made.network}.1", monkeypatch):
        for path in [*data.rglob("*.png"), data / "index.csv"]:
            S3FileSystem().pipe_file(f"bucket/set/{path.relative_to(data)}", path.read_bytes())
        own_disks = {own_cache: "5m", data: "1m"}
        made.add("worker", own_disks=own_disks, environment={"OMP_NUM_THREADS": "1"})
        space = small_space(budget={"trials": 1})
        options = {"wandb": "off", "address": made.address, "runs": tmp_path / "runs"}
        said = io.StringIO()
        run = pipeline.run_search(space, "s3://bucket/set", console=Console(file=said, width=200), **options)
    assert re.search(r"^10\.77\.\d+\.2: decoded 18 images$", said.getvalue(), re.MULTILINE)
    assert [record["status"] for record in run.records] == ["completed"]
    assert run.metrics["test"]["dice_mean"] > 0
    assert not cached(own_cache)

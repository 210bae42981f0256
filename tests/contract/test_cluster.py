"""The files that launch clusters: what Ray's own schema lets pass, and whether their commands work."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from tuner.cli import _parser

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster.yaml"
VARIANTS = ROOT / "docs" / "cluster"
CLOUDS = [CLUSTER, VARIANTS / "gcp.yaml"]
LAUNCHED = [*CLOUDS, VARIANTS / "onprem.yaml"]
"""by `ray up`"""


def read(file: Path) -> dict[str, Any]:
    found = yaml.safe_load(file.read_text())
    assert isinstance(found, dict)
    return found


def name(file: Path) -> str:
    return file.name


def values_at_the_top(file: Path) -> list[str]:
    """The anchors of a file, in their order."""
    return re.findall(r"^  \w+: &(\w+) ", file.read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", LAUNCHED, ids=name)
def test_ray_takes_the_file(file: Path) -> None:
    """Its schema, and what its loader makes of it."""
    config = read(file)
    head = config.get("head_node_type")
    prepared = prepare_config(json.loads(json.dumps(config)))
    validate_config(prepared)
    assert prepared["head_setup_commands"] == config["setup_commands"] + config["head_setup_commands"]
    assert prepared["worker_setup_commands"] == config["setup_commands"]
    assert head is None or prepared["available_node_types"][head]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("file", LAUNCHED, ids=name)
def test_what_users_change_is_at_the_top_and_used(file: Path) -> None:
    text = file.read_text()
    top, _, rest = text.partition("\nprovider:")
    anchors = values_at_the_top(file)
    assert anchors
    assert anchors == re.findall(r"(?<!\w)&(\w+)", text)  # there are none further down
    for anchor in anchors:
        assert re.search(rf"\*{anchor}\b", rest), anchor
        assert re.search(rf"&{anchor} [^#\n]*#", top), f"{anchor} has no comment"


@pytest.mark.parametrize("file", CLOUDS, ids=name)
def test_a_head_without_gpu_and_spot_workers_with_limits(file: Path) -> None:
    config = read(file)
    kinds = dict(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}  # no trial runs there
    assert "max_workers" not in head
    assert kinds
    for kind in kinds.values():
        assert kind["resources"]["GPU"] >= 1
        assert kind["resources"]["CPU"] >= 1
        assert kind["min_workers"] == 0
        assert 1 <= kind["max_workers"] <= config["max_workers"]
    assert 1 <= config["idle_timeout_minutes"] <= 30


def test_on_aws_the_price_is_limited_and_nothing_is_kept() -> None:
    config = read(CLUSTER)
    head, worker = (config["available_node_types"][kind]["node_config"] for kind in ("head", "gpu_worker"))
    assert not head["InstanceType"].startswith(("p", "g"))  # AWS's families with GPUs
    assert worker["InstanceType"].startswith(("p", "g"))
    market = worker["InstanceMarketOptions"]
    assert market["MarketType"] == "spot"
    assert 0 < float(market["SpotOptions"]["MaxPrice"]) < 5
    assert isinstance(market["SpotOptions"]["MaxPrice"], str)  # boto3 takes no number
    assert "InstanceMarketOptions" not in head
    assert config["provider"]["cache_stopped_nodes"] is False
    assert head["ImageId"] == worker["ImageId"]
    assert head["IamInstanceProfile"] != worker["IamInstanceProfile"]


def test_on_gcp_workers_are_spot_machines_with_a_gpu() -> None:
    config = read(VARIANTS / "gcp.yaml")
    head, worker = (config["available_node_types"][kind]["node_config"] for kind in ("head", "gpu_worker"))
    assert "guestAccelerators" not in head
    assert not head["machineType"].startswith(("a2", "a3", "g2"))
    assert worker["machineType"].startswith(("a2", "a3", "g2"))  # these bring their GPUs
    assert worker["scheduling"]["provisioningModel"] == "SPOT"


@pytest.mark.parametrize("file", LAUNCHED, ids=name)
def test_nodes_share_a_token_and_open_no_dashboard(file: Path) -> None:
    config = read(file)
    assert "~/.ray/auth_token" in config["file_mounts"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token ray start" in start
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("file", LAUNCHED, ids=name)
def test_all_nodes_are_set_up_alike(file: Path) -> None:
    config, first = read(file), read(CLUSTER)
    assert config["setup_commands"] == first["setup_commands"]
    assert config["file_mounts"] == first["file_mounts"]


@pytest.mark.parametrize("file", LAUNCHED, ids=name)
@pytest.mark.parametrize("has_pip", [True, False])
def test_packages_are_installed_where_python_lacks_them_once_the_lists_are_free(
    file: Path, has_pip: bool, tmp_path: Path
) -> None:
    """With an apt-get whose lists are locked at first, and a python3 without ensurepip or with it."""
    commands = read(file)["initialization_commands"]
    log = tmp_path / "log"
    scripts = {
        "python3": f"exit {0 if has_pip else 1}",
        "sudo": f'echo "$@" >> {log}; test "$(grep -c update {log})" != 1',
        "sleep": "",
    }
    for program, text in scripts.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    for command in commands:
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        subprocess.run(["bash", "--noprofile", "--norc", "-c", command], env=path, check=True, cwd=tmp_path)
    asked = log.read_text().splitlines() if log.exists() else []
    update = "apt-get update"
    assert asked[:2] == ([] if has_pip else [update, update])
    assert [line.rsplit(" ", 3)[1:] for line in asked[2:]] == ([] if has_pip else [["install", "-y", "python3-venv"]])


def mount(home: Path, wheel: Path) -> None:
    """Copies what a file mounts as Ray does: `~` is the node's home. The token is one of this test's own."""
    token = home.parent / "token"
    token.write_text("0" * 64)
    sources = {"dist": wheel.parent, "constraints.txt": ROOT / "constraints.txt", "~/.ray/auth_token": token}
    for remote, local in read(CLUSTER)["file_mounts"].items():
        target = home / remote.removeprefix("~/")
        target.parent.mkdir(parents=True, exist_ok=True)
        source = sources[local]
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_node_is_set_up_by_the_commands_as_they_stand(tmp_path: Path) -> None:
    """In an empty home, with the wheel that `make wheel` builds; twice, as `ray up` does after a change."""
    dist, home = tmp_path / "dist", tmp_path / "home"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    home.mkdir()
    mount(home, wheel)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # The node's own python3, for which this one stands.
    path = f"{Path(sys.base_prefix) / 'bin'}:{environment['PATH']}"

    def bash(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=environment | {"HOME": str(home), "PATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    commands = read(CLUSTER)["setup_commands"]
    for command in [*commands, *commands]:
        bash(command)
    (line,) = (home / ".bashrc").read_text().splitlines()  # the second time adds nothing
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert "search a space" in bash(f"{line}; tuner --help")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    code = (
        "import importlib.metadata as m, json, boto3, ray, s3fs, torch, tuner; "
        "print(json.dumps([*map(m.version, ('ray', 'segdec-tuner', 'torch')), ray.__file__, tuner.__file__]))"
    )
    ray, mine, torch, *files = json.loads(bash(f"{line}; python -c {shlex.quote(code)}").splitlines()[-1])
    pinned = dict(row.split("==") for row in (ROOT / "constraints.txt").read_text().split())
    assert (ray, mine) == (pinned["ray"], project["version"])
    assert torch.partition("+")[0] == pinned["torch"]
    assert all(file.startswith(str(home / "segdec-tuner" / "venv")) for file in files)
    assert bash(f"{line}; ray --version").split()[-1] == pinned["ray"]


def test_the_slurm_script_is_one_that_bash_and_ray_read() -> None:
    """It is not run here: at its end `ray symmetric-run` stops every Ray of the machine, whosesoever it is."""
    script = VARIANTS / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if "ray symmetric-run" in line and not line.startswith("#")]
    words = shlex.split(line.partition("ray symmetric-run")[2])
    start, command = words[: words.index("--")], words[words.index("--") + 1 :]
    assert curate_and_validate_ray_start_args(start) == ["--num-cpus=$SLURM_CPUS_PER_TASK", "--disable-usage-stats"]
    options = _parser().parse_args([*command[1:]])
    assert (command[0], options.verb, options.address) == ("tuner", "search", "auto")
    assert options.storage or options.runs.startswith("$HOME/")  # what all nodes share
    assert "--signal" not in text  # which reaches no search: srun and `ray symmetric-run` stand between


def test_the_ray_job_for_kubernetes_has_the_parts_of_one() -> None:
    job = read(VARIANTS / "rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    options = _parser().parse_args(shlex.split(spec["entrypoint"])[1:])
    assert (options.verb, options.address) == ("search", "auto")
    assert options.storage.startswith("s3://")  # the pods go with the search
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    pinned = dict(row.split("==") for row in (ROOT / "constraints.txt").read_text().split())
    assert cluster["rayVersion"] == pinned["ray"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert 0 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert options.concurrent == workers["maxReplicas"]  # Ray tells a driver no limits of KubeRay's autoscaler
    for group, gpus in ((head, 0), (workers, 1)):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
        assert container["resources"]["limits"]["memory"]

"""`tuner trial`: a real training in this process, and as a command that is interrupted, killed and run twice at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tuner
from model import checkpoint, synthetic, train
from tests.conftest import heeds_ctrl_c
from tests.tuner.conftest import small_space
from tuner import cli, single, tracking
from tuner import run as runs
from tuner.run import Run
from tuner.sampler import SearchStudy
from tuner.single import run_trial
from tuner.space_file import load as load_space
from tuner.tracking import RunInfo, Tracker, Trackers

pytestmark = pytest.mark.timeout(240)

POINT = {"learning_rate": 0.5, "threshold_rule": "grid"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return folder


@pytest.fixture(autouse=True)
def own_cache_and_no_agent(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path_factory.getbasetemp() / "single-cache"))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def place(data: Path, tmp_path: Path, monkeypatch) -> Path:
    """The current folder, with a space and a data set."""
    monkeypatch.chdir(tmp_path)
    Path("set").symlink_to(data)
    Path("small.yaml").write_text(yaml.safe_dump(small_space().to_dict()))
    return tmp_path


def trial(*arguments: str) -> int:
    return cli.main(["trial", "small.yaml", "--data", "set", "--wandb", "off", *arguments])


def collected() -> Run:
    return runs.load("runs/small-trials")


class Recording(Tracker):
    """Keeps what trackers are told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[Any, ...]]] = []
        self.info: RunInfo | None = None
        for event in ("trial_started", "epoch_ended", "trial_ended", "trial_held", "search_ended"):
            setattr(self, event, lambda *values, event=event: self.events.append((event, values)))

    def search_started(self, run: RunInfo) -> None:
        self.info = run


@pytest.fixture
def watched(monkeypatch) -> tuple[Recording, list[str]]:
    """What the trackers of a trial are told, and in which W&B modes they were asked for."""
    recording, modes = Recording(), []

    def build(wandb: str, **_: Any) -> Trackers:
        modes.append(wandb)
        return Trackers([recording])

    monkeypatch.setattr(tracking, "build", build)
    monkeypatch.setattr(tracking, "check_online", lambda: None)
    return recording, modes


@pytest.mark.slow
def test_a_trial_leaves_its_record_and_its_model(place: Path, capsys) -> None:
    assert trial("--set", "learning_rate=5e-1", "--set", "threshold_rule=grid") == 0
    run = collected()
    [record] = run.records
    name = f"{run.info['id']}-0000"
    assert (record["trial"], record["number"], record["params"]) == (name, 0, POINT)
    assert (record["status"], record["epochs"], record["baseline"]) == ("completed", 3, False)
    assert record["config"] == run.space.config(POINT, 0).to_dict()
    folder = checkpoint.newest((run.directory / "trials").glob(f"attempt-*/{name}/checkpoint_*"))
    model = folder / "best" / str(record["best_epoch"])
    _, config, thresholds = checkpoint.load_model(model, "cpu")
    assert (config.to_dict(), thresholds.to_dict()) == (record["config"], record["thresholds"])
    said = capsys.readouterr()
    assert said.out == (
        f"{name} completed: dice_mean {record['value']:.4g} at epoch {record['best_epoch']} of 3, threshold "
        f"{record['thresholds']['segmentation_probability']:.4g}, model in {model}\n"
    )
    lines = said.err.splitlines()
    assert lines[0] == f"trial {name}: learning_rate=0.5 threshold_rule=grid"
    assert [line.partition(":")[0] for line in lines[1:]] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
    last = record["history"][-1]
    assert lines[3] == f"epoch 3 of 3: loss {last['loss_total']:.4g}, dice_mean {last['value']:.4g}"


TIMES = ("started", "ended", "seconds", "device_seconds")


@pytest.mark.slow
@pytest.mark.parametrize(
    "goals",
    [{}, {"objective": [{"metric": "dice_mean"}, {"metric": "num_segmented"}], "constraints": [{"metric": "recall", "min": 0.99}]}],
    ids=["one objective", "two and a constraint"],
)  # fmt: skip
def test_a_trial_is_what_it_would_be_in_a_search(place: Path, capsys, goals: dict) -> None:
    """The baseline, for which nothing is set, to the last digit and key."""
    search = small_space().to_dict()["search"] | {"num_segmented": {"type": "categorical", "choices": [2, "all"]}}
    Path("small.yaml").write_text(yaml.safe_dump(small_space(search=search, **goals).to_dict()))
    assert trial() == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "not set, so as in the baseline: learning_rate=1.0, num_segmented=all, threshold_rule=pr_curve"
    command = [sys.executable, "-m", "tuner", "search", "small.yaml", "--data", "set", "--trials", "1", "--no-report", "--wandb", "off"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)

    def plain(run: Run) -> dict:
        [record] = run.records
        assert all(record[name] is not None for name in TIMES)
        return {name: value for name, value in record.items() if name not in (*TIMES, "trial")}

    [own] = collected().records
    assert plain(collected()) == plain(runs.load("runs/small"))
    assert own["baseline"]
    assert own["ended"] >= own["seconds"] == own["device_seconds"] > own["started"] == 0.0
    assert ("values" in own, "violations" in own) == (bool(goals), bool(goals))


@pytest.mark.slow
def test_trackers_are_told_of_a_trial_as_of_one_in_a_search(place: Path, watched, monkeypatch) -> None:
    recording, modes = watched
    outcome = run_trial("small.yaml", "set", POINT, seed=7, cpus_per_trial=1)
    assert modes == ["offline"]
    name = outcome.record["trial"]
    kinds = ["trial_started", *["epoch_ended"] * 3, "trial_ended", "search_ended"]
    assert [event for event, _ in recording.events] == kinds
    _, began = recording.events[0]
    assert began == (name, POINT, outcome.record["config"], [])
    epochs = [values for event, values in recording.events if event == "epoch_ended"]
    assert [figures for _, figures, _, _ in epochs] == outcome.record["history"]
    highest = -1.0
    for _, figures, _, pictures in epochs:
        assert bool(pictures) == (figures["value"] > highest)
        highest = max(highest, figures["value"])
    assert recording.events[-2][1] == (outcome.record,)
    assert recording.events[-1][1] == ("finished",)
    info = recording.info
    assert (info.name, info.id, info.metric) == ("small-trials", collected().info["id"], "dice_mean")
    assert (info.sweep, info.wandb_run, info.trials_asked) == (None, None, None)
    assert info.baseline["seed"] == outcome.record["seed"] == 7

    monkeypatch.setenv("WANDB_RUN_ID", "stray")  # of the user's own
    run_trial("small.yaml", "set", POINT, cpus_per_trial=1)
    assert recording.info.wandb_run is None


@pytest.mark.slow
def test_under_an_agent_the_run_is_the_one_that_it_has_asked_for(place: Path, watched, monkeypatch) -> None:
    recording, modes = watched
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "run456")
    words = [f"{name}={value}" for name, value in POINT.items()]
    run_trial("small.yaml", "set", words)
    assert (recording.info.sweep, recording.info.wandb_run, modes) == ("sweep123", "run456", ["online"])
    run_trial("small.yaml", "set", words, wandb="offline")
    assert modes == ["online", "offline"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "learning_rate=9", "x"], "tuner trial: --set: 2 problems:\n  must be words KEY=VALUE, found 'x'"),
        (["--cpus-per-trial", "0"], "--cpus-per-trial: must be a whole number of at least 1, found '0'"),
        (["--seed", "-1"], "from 0 to 2147483647, found '-1'"),
        (["--data", "nowhere"], "there is no such folder; name the one that holds"),
        (["--name", "../up"], "a run's name must be letters, digits"),
        (["--wandb", "online"], "--wandb online needs a W&B API key"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    place: Path, capsys, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("HOME", str(place))
    try:
        code = trial(*arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert message in said.err
    assert not Path("runs").exists()


def test_a_gpu_that_is_not_there_is_no_silent_cpu(place: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert trial("--gpus-per-trial", "1") == 2
    assert "this trial holds a GPU, but torch finds no CUDA here" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_what_a_trial_takes_where_nobody_says(monkeypatch) -> None:
    def share(**asked: float) -> tuple[float, float]:
        return single._share(single.Options(**asked))

    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert share() == (3, 1.0)
    assert share(gpus_per_trial=0.0) == (1, 0.0)
    assert share(cpus_per_trial=5) == (5, 1.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert share() == (1, 0.0)


def test_other_data_are_refused(place: Path, capsys) -> None:
    tuner.run.create(load_space("small.yaml"), "set", Path("runs"), "small-trials", kind="trials")
    synthetic.write(Path("other"), count=24, height=64, width=128, seed=1)
    assert trial("--data", "other") == 2
    said = capsys.readouterr().err
    assert "tuner trial: the data in" in said
    assert "must be what the run was created with, found" in said
    assert said.endswith("say with --data where the same data lie now, or name another collection with --name\n")
    assert collected().records == []
    assert not list(collected().directory.glob("trials/*/*"))


@pytest.mark.slow
def test_a_trial_that_crashes_is_a_record_and_a_failure(place: Path, capsys, monkeypatch) -> None:
    epoch = train.train_epoch
    epochs = []

    def crash(*arguments: Any) -> Any:
        epochs.append(1)
        if len(epochs) == 2:
            raise OSError("the disk [is] gone")
        return epoch(*arguments)

    monkeypatch.setattr(train, "train_epoch", crash)
    assert trial() == 1
    [record] = collected().records
    assert (record["status"], record["reason"], record["epochs"]) == ("failed", "OSError: the disk [is] gone", 1)
    assert len(record["history"]) == 1  # what it had reached stays known
    assert 'raise OSError("the disk [is] gone")' in record["traceback"]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith(f"tuner trial: {record['trial']} failed: OSError: the disk [is] gone\n")
    assert "Traceback" not in said.err
    assert not list(collected().directory.glob("trials/*/*/checkpoint_*"))
    assert not collected().is_running()


@pytest.mark.slow
def test_a_trial_that_diverges_is_a_record_and_a_failure(place: Path, capsys, monkeypatch) -> None:
    def diverge(*_: Any) -> None:
        raise train.TrainingDiverged("the loss of epoch 1 is not a finite number")

    monkeypatch.setattr(train, "train_epoch", diverge)
    assert trial() == 1
    [record] = collected().records
    assert (record["status"], record["value"], record.get("traceback")) == ("diverged", None, None)
    message = f"tuner trial: {record['trial']} diverged: the loss of epoch 1 is not a finite number\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "kept"), [(OSError("full"), 1, 1), (KeyboardInterrupt(), 130, 0)], ids=["error", "Ctrl-C"]
)
def test_a_checkpoint_that_was_copied_in_part_is_removed(
    place: Path, watched, monkeypatch, error: BaseException, code: int, kept: int
) -> None:
    def copy(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "progress.json").write_bytes((source / "progress.json").read_bytes())
        raise error

    monkeypatch.setattr(single.shutil, "copytree", copy)
    assert trial() == code
    assert [record["status"] for record in collected().records] == ["failed"] * kept
    recording, _ = watched
    assert recording.events[-1] == ("search_ended", ("finished" if kept else "stopped",))
    assert not list(collected().directory.glob("trials/*/*/checkpoint_*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_what_is_being_kept_is_kept(place: Path, monkeypatch, number: signal.Signals) -> None:
    """A signal between the last epoch and the record comes too late."""
    add = single.collection.add

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        add(*arguments)

    monkeypatch.setattr(single.collection, "add", interrupted)
    before = signal.getsignal(number)
    try:
        outcome = run_trial("small.yaml", "set", POINT, wandb="off", cpus_per_trial=1)
    except KeyboardInterrupt:
        pytest.fail("it was not waited for")
    assert collected().records == [outcome.record]
    assert outcome.completed
    assert checkpoint.is_whole(outcome.model.parents[1])
    assert signal.getsignal(number) == before


# As commands of their own


def start(*arguments: str, epochs: int = 3) -> subprocess.Popen[str]:
    Path(f"{epochs}.yaml").write_text(yaml.safe_dump(small_space(train={"width": 0.1, "epochs": epochs}).to_dict()))
    return subprocess.Popen(
        [sys.executable, "-m", "tuner", "trial", f"{epochs}.yaml", "--data", "set", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeds_ctrl_c,
    )  # fmt: skip


def first_epoch(process: subprocess.Popen[str]) -> None:
    for line in process.stderr:
        if line.startswith("epoch 1 of"):
            return
    raise AssertionError(process.communicate())


def until(condition: Callable[[], bool]) -> None:
    while not condition():  # the test's timeout ends it
        time.sleep(0.02)


LONG = 10_000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_keeps_nothing(place: Path, number: signal.Signals) -> None:
    process = start(epochs=LONG)
    first_epoch(process)
    run = collected()
    assert run.is_running()
    os.kill(process.pid, number)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, ""), err
    name = f"{run.info['id']}-0000"
    assert err.splitlines()[-1] == f"tuner trial: stopped at once; no record and no checkpoint of trial {name} is kept"
    assert run.records == []
    assert not run.is_running()
    assert not list(run.directory.glob("trials/*/*/checkpoint_*"))
    [logged] = (run.directory / "wandb").glob(f"offline-run-*-{name}")
    assert json.loads(inspect(logged))["summary"]["status"] == "interrupted"


def inspect(folder: Path) -> str:
    wandb = Path(sys.executable).with_name("wandb")
    command = [str(wandb), "leet", "inspect", "--json", "--summary", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_kill_leaves_the_collection_as_it_was(place: Path) -> None:
    killed = start("--wandb", "off", "--name", "some", epochs=LONG)
    first_epoch(killed)
    killed.kill()
    killed.communicate()
    run = runs.load("runs/some")
    assert (run.records, run.is_running()) == ([], False)
    process = start("--wandb", "off", "--name", "some", epochs=LONG)
    first_epoch(process)
    assert run.count_writers() == 1
    assert sorted(path.name[-4:] for path in run.directory.glob("trials/*/*")) == ["0000", "0001"]
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_two_at_once_are_two_trials_of_one_collection(place: Path) -> None:
    processes = [start("--set", f"learning_rate={rate}", "--wandb", "offline") for rate in (0.5, 1.0)]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    run = collected()
    found = {record["params"]["learning_rate"]: record for record in run.records}
    assert sorted(found) == [0.5, 1.0]
    assert sorted(record["number"] for record in found.values()) == [0, 1]
    for (out, _), rate in zip(said, (0.5, 1.0), strict=True):
        assert out.startswith(f"{found[rate]['trial']} completed: ")
    assert len(list((run.directory / "wandb").glob("offline-run-*"))) == 2
    sync = [sys.executable, "-m", "tuner", "sync", str(run.directory), "--dry-run"]
    done = subprocess.run(sync, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "2 would be uploaded")


@pytest.mark.slow
def test_a_search_is_warm_started_from_trials_by_hand(place: Path) -> None:
    for rate in (0.25, 1.0):
        run_trial("small.yaml", "set", POINT | {"learning_rate": rate}, wandb="off", cpus_per_trial=1)
    command = [
        sys.executable, "-m", "tuner", "search", "small.yaml", "--data", "set", "--trials", "1", "--no-report",
        "--wandb", "off", "--warm-start", "runs/small-trials",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"warm start: 2 completed trials of {place}/runs/small-trials" in done.stderr.replace("\n", "")
    run = runs.load("runs/small")
    study = SearchStudy(run.space, run.info["id"], run.study)
    assert study.warm_started() == (2, 0)
    known = [t for t in study._study.get_trials() if "warm_start" in t.user_attrs]
    theirs = collected().records
    assert [(t.params, t.value) for t in known] == [(record["params"], record["value"]) for record in theirs]


@pytest.mark.slow
def test_no_trial_waits_for_ray_or_optuna_or_wandb(place: Path) -> None:
    code = """
import sys
from tuner import cli
code = cli.main(["trial", "small.yaml", "--data", "set", "--wandb", "off"])
print(*({"ray", "optuna", "wandb"} & set(sys.modules)))
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ""), done.stderr

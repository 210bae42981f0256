"""The main job as a user runs it: the command line, relative paths, Ctrl-C, kill -9. Small, but nothing is faked."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench import kills
from model import layouts, splits, synthetic
from model.inspection import decode_image
from model.sample import Sample
from tuner import cli, space_file
from tuner import records as tuner_records
from tuner import run as runs
from tuner.run import Options, Run
from tuner.tracking.wandb_files import report_run

REPORT = "runs/small/report"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]

ROOT = Path(__file__).parents[2]

SPACE = """
name: small
data: {height: 64, width: 128, validation_share: 0.25, test_share: 0.25}
train: {width: 0.1, epochs: 4, precision: float32}
search:
  learning_rate:  {type: float, low: 0.1, high: 2.0, log: true}
  threshold_rule: {type: categorical, choices: [pr_curve, grid]}
objective: {metric: dice_positive_mean}
scheduler: {name: asha, min_epochs: 1, reduction: 2}
budget: {trials: 4}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a data set and a space, to run commands in."""
    synthetic.write(tmp_path / "set", count=32, height=64, width=128)
    (tmp_path / "small.yaml").write_text(SPACE)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RAY_"))}
    return own | {"SEGDEC_TUNER_CACHE": str(place / "cache"), "COLUMNS": "200"}


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a session of its own, as a terminal would hold it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuner", *arguments],
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def call(place: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(place, *arguments)
    out, err = process.communicate()
    return process.returncode, out, err


def call_here(place: Path, *arguments: str) -> tuple[int, str, str]:
    """As `call`, in this process, which has imported everything: a verb that asks little of a run would spend its time
    on imports."""
    out, err = io.StringIO(), io.StringIO()
    variables = mock.patch.dict(os.environ, environment(place), clear=True)
    with chdir(place), variables, redirect_stdout(out), redirect_stderr(err):
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def records(place: Path) -> list[dict]:
    path = place / "runs/small/records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checkpoints(place: Path, number: str) -> list[Path]:
    return list(place.glob(f"runs/small/trials/attempt-*/*-{number}/checkpoint_*/manifest.json"))


def check_whole(place: Path) -> None:
    """As many trials as asked for, none twice, each with every epoch once."""
    found = records(place)
    assert [record["number"] for record in found] == [0, 1, 2, 3]
    for record in found:
        assert [row["epoch"] for row in record["history"]] == list(range(1, record["epochs"] + 1))
        assert record["status"] in ("completed", "stopped_early")
    assert found[0]["baseline"]
    assert found[0]["status"] == "completed"
    assert (place / "runs/small/report/index.html").exists()


def test_from_a_space_to_a_report(place: Path) -> None:
    code, out, err = call(place, "search", "small.yaml", "--data", "set")
    assert (code, out) == (0, "runs/small/report/index.html\n"), err
    check_whole(place)
    metrics = json.loads((place / "runs/small/report/metrics.json").read_text())
    assert metrics["search"]["trials"] == 4
    best = max((r for r in records(place) if r["status"] == "completed"), key=lambda r: r["value"])
    assert metrics["best"]["trial"] == best["trial"]
    assert metrics["validation"]["dice_positive_mean"] == pytest.approx(best["value"], abs=1e-9)
    run_id = runs.load(place / "runs/small").info["id"]
    logged = [folder.name.split("-", 3)[-1] for folder in (place / "runs/small/wandb").glob("offline-run-*")]
    assert sorted(logged) == [*(record["trial"] for record in records(place)), report_run(run_id)]
    with (place / "runs/small/report/predictions.csv").open() as file:
        assert {row["split"] for row in csv.DictReader(file)} == {"validation", "test"}
    model = {path.name for path in (place / "runs/small/best").iterdir()}
    assert model == {"model.safetensors", "config.json", "thresholds.json", "images.json"}

    code, out, _ = call(place, "status", "runs/small", "--json")
    status = json.loads(out)
    assert (code, status["state"], status["trials"], status["running"]) == (0, "finished", 4, 0)
    assert status["best"]["value"] == best["value"]

    code, out, err = call(place, "export", "runs/small", "--format", "report")
    assert (code, out) == (0, "runs/small/small-report.zip\n"), err
    compared = json.loads((place / "runs/small/best/exports.json").read_text())["model.onnx"]["compared"]
    assert compared["probability"] <= 1e-4
    assert compared["unlike_judged"] <= 1e-5 * compared["pixels"]  # single precision there and here
    assert zipfile.is_zipfile(place / "runs/small/small-report.zip")

    code, _, err = call_here(place, "finals", "runs/small")
    assert code == 2
    assert "the test split is opened once a run" in err
    code, _, err = call_here(place, "search", "small.yaml", "--data", "set")
    assert code == 2
    assert "a run's name must be new, found runs/small" in err
    code, out, _ = call(place, "resume", "runs/small")
    assert (code, out) == (0, "runs/small/report/index.html\n")
    check_whole(place)
    assert len((place / "runs/small/evaluation/openings.jsonl").read_text().splitlines()) == 1


def search_for(place: Path, **goals: object) -> tuple[list[dict], dict, str, str]:
    """A search of the small space for other goals; its records, metrics.json, report and what it said."""
    space = yaml.safe_load(SPACE) | goals
    space["search"]["num_segmented"] = {"type": "categorical", "choices": [2, "all"]}
    del space["search"]["learning_rate"]  # so that the masks alone make another network
    space["train"]["epochs"] = 2
    (place / "small.yaml").write_text(yaml.safe_dump(space))
    code, out, err = call(place, "search", "small.yaml", "--data", "set", "--wandb", "off", "--trials", "3")
    assert (code, out) == (0, f"{REPORT}/index.html\n"), err
    metrics = json.loads((place / REPORT / "metrics.json").read_text())
    return records(place), metrics, (place / REPORT / "report.md").read_text(), err


def test_two_objectives_end_in_a_front(place: Path) -> None:
    objectives = [{"metric": "dice_positive_mean"}, {"metric": "labelling_minutes"}]
    prices = {"minutes_per_label": 0.25, "minutes_per_mask": 2.0}
    found, metrics, report, _ = search_for(place, objective=objectives, labelling=prices)
    train = runs.load(place / "runs/small").info["data"]["train"]
    images = train["positive"] + train["negative"]
    masks = {"all": train["segmented"], 2: 2}
    for record in found:
        kept = masks[record["config"]["num_segmented"]]
        assert (record["num_segmented"], record["labelled"]) == (kept, images)
        assert record["values"] == [record["value"], 0.25 * images + 2 * kept]
    assert {record["num_segmented"] for record in found} == {2, masks["all"]}
    assert metrics["masks"]["sentence"] in report
    assert [row["masks"] for row in metrics["masks"]["budgets"]] == [2, masks["all"]]
    front = tuner_records.front(found, ["max", "min"])
    assert metrics["front"] == front != []
    code, out, _ = call_here(place, "status", "runs/small", "--json")
    assert (code, json.loads(out)["front"]) == (0, front)
    code, out, _ = call_here(place, "status", "runs/small")
    assert f"on the front {front[0]['values'][0]:.4f} for {front[0]['values'][1]:g} by {front[0]['trial']}: " in out
    completed = [record for record in found if record["status"] == "completed"]
    assert metrics["best"]["trial"] == max(completed, key=lambda record: record["value"])["trial"]
    assert "![" in report
    assert "figures/pareto-front.png" in report


def test_constraints_that_nothing_meets_are_said_everywhere(place: Path) -> None:
    bounds = [{"metric": "recall", "min": 1.0}, {"metric": "precision", "min": 1.0}]
    found, metrics, report, err = search_for(place, constraints=bounds)
    for record in found:
        figures = record["replays"][0]["figures"] if not record["replayed_from"] else None
        if figures and record["value"] is not None:
            beyond = {name: 1.0 if figures[name] is None else 1 - figures[name] for name in ("recall", "precision")}
            assert record["violations"] == pytest.approx(beyond)
    nearest = tuner_records.nearest(found)
    message = tuner_records.none_feasible(nearest)
    assert f"{message}; it is evaluated all the same" in " ".join(err.split())
    code, out, _ = call_here(place, "status", "runs/small")
    assert (code, message in out, "best so far" in out) == (0, True, False)
    status = json.loads(call_here(place, "status", "runs/small", "--json")[1])
    assert (status["best"], status["nearest"]["trial"]) == (None, nearest["trial"])
    assert metrics["best"]["trial"] == nearest["trial"]
    assert "No completed trial meets the constraints." in report
    chosen = json.loads((place / "runs/small/evaluation/selection.json").read_text())
    assert chosen["trials"][nearest["trial"]]["violations"] == nearest["violations"]
    best = json.loads((place / "runs/small/best/thresholds.json").read_text())
    assert best["violations"] == nearest["violations"]


def test_no_test_pixel_is_seen_before_the_finals(place: Path) -> None:
    code, out, err = call(
        place, "search", "small.yaml", "--data", "set", "--no-report", "--trials", "2", "--wandb", "off"
    )
    assert (code, out) == (0, "runs/small\n"), err
    space = space_file.load(place / "small.yaml")
    found = splits.assign(layouts.read(place / "set"), place, 0.25, 0.25, space.seed)
    cached = np.concatenate([np.load(path) for path in (place / "cache").glob("*/images.npy")])
    assert len(cached) == len(found.train) + len(found.validation)
    for sample in found.test:
        assert not (cached == decode_image(sample.image)).all(axis=(1, 2, 3)).any()
    assert not (place / "runs/small/evaluation").exists()
    code, out, err = call(place, "resume", "runs/small")
    assert (code, out) == (0, "runs/small\n"), err
    assert not (place / "runs/small/evaluation").exists()  # sealed still: nobody asked for more

    code, _, err = call(place, "finals", "runs/small")
    assert code == 0, err
    code, out, err = call_here(place, "report", "runs/small", "--out", "elsewhere")
    assert (code, out) == (0, "elsewhere/index.html\n"), err

    code, out, err = call(place, "finals", "runs/small", "--open-test")
    assert code == 0, err
    code, out, err = call_here(place, "report", "runs/small")
    assert code == 0, err
    folders = (place / REPORT, place / REPORT / "open-test")
    honest, stamped = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert [m["thresholds_chosen_on"] for m in (honest, stamped)] == ["validation", "test"]
    assert [m["test_openings"] for m in (honest, stamped)] == [2, 2]
    before = json.loads((place / "elsewhere/metrics.json").read_text())
    assert honest == before | {"test_openings": 2}  # the honest figures are as they were
    assert honest["best"] == stamped["best"]
    assert stamped["test"]["decision_f1"] >= honest["test"]["decision_f1"]  # chosen for just that
    assert json.loads((place / "runs/small/best/thresholds.json").read_text())["chosen_on"] == "validation"


def create(place: Path, name: str) -> Run:
    """A run of two trials, one after another, that has not begun; its data are a copy of their own."""
    shutil.copytree(place / "set", place / f"data-{name}")
    options = Options(trials=2, concurrent=1, wandb="off", no_report=True)
    space = space_file.load(place / "small.yaml")
    space = replace(space, train=space.train | {"epochs": 2})
    return runs.create(space, place / f"data-{name}", place / "runs", name, options)


def spoil(samples: list[Sample]) -> None:
    """Garbage for images and masks: of every other sample bytes, else a picture as valid and as large as before."""
    rng = np.random.default_rng(0)
    for n, sample in enumerate(samples):
        for path in (sample.image, sample.mask):
            assert isinstance(path, Path)
            noise = rng.integers(0, 2, decode_image(path).shape[:2], np.uint8) * 255
            path.write_bytes(rng.bytes(1000) if n % 2 else cv2.imencode(".png", noise)[1].tobytes())


def without_times(record: dict, run: Run) -> dict:
    """A record as another run of the same search would have it."""
    kept = {key: value for key, value in record.items() if key not in ("started", "ended", "seconds", "device_seconds")}
    return kept | {"trial": record["trial"].removeprefix(run.info["id"])}


def test_garbage_in_the_test_split_changes_no_search_and_ends_the_finals(place: Path) -> None:
    spoilt, whole = create(place, "spoilt"), create(place, "whole")
    spoil(spoilt.splits().test)
    for run in (spoilt, whole):
        code, out, err = call(place, "resume", f"runs/{run.name}")
        assert (code, out) == (0, f"runs/{run.name}\n"), err
        shutil.rmtree(place / "cache")  # each decodes its own files
    assert len(whole.records) == 2
    assert [without_times(r, spoilt) for r in spoilt.records] == [without_times(r, whole) for r in whole.records]

    code, out, err = call(place, "finals", "runs/spoilt")
    found = spoilt.splits()
    assert (code, out) == (2, "")
    assert f"found {2 * len(found.test)} of {2 * len(found.validation + found.test)} files missing or changed" in err
    assert f"\n  {found.test[0].image}: has other bytes than it had\n  {found.test[0].mask}: has other bytes" in err
    assert "Traceback" not in err
    assert not (spoilt.directory / "evaluation").exists()

    (place / "data-whole").rename(place / "moved")
    code, out, err = call(place, "finals", "runs/whole", "--data", "moved")
    assert (code, out) == (0, "runs/whole/evaluation\n"), err
    assert whole.info["data_path"] == str(place / "moved")
    [opening] = [json.loads(line) for line in (whole.directory / "evaluation/openings.jsonl").read_text().splitlines()]
    assert opening["fingerprint"] == splits.fingerprint_of_test(spoilt.splits())
    assert opening["why"] == "the final evaluation of winner and baseline"


def test_ctrl_c_stops_cleanly_and_resume_goes_on(place: Path) -> None:
    process = start(place, "search", "small.yaml", "--data", "set", "--concurrent", "1")
    wait_until(lambda: bool(records(place)) and bool(checkpoints(place, "0001")), process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == "stopped; nothing is lost. Go on with: tuner resume runs/small\n"
    status = json.loads(call_here(place, "status", "runs/small", "--json")[1])
    assert (status["state"], status["running"]) == ("stopped", 0)
    code, _, err = call_here(place, "finals", "runs/small")
    assert code == 2
    assert "finals need a search that is finished, found one that is stopped" in err

    (place / "set").rename(place / "moved")
    code, out, err = call_here(place, "resume", "runs/small")
    assert (code, out) == (2, "")
    assert "there is no folder" in err
    code, out, err = call(place, "resume", "runs/small", "--data", "moved")
    assert (code, out) == (0, "runs/small/report/index.html\n"), err
    check_whole(place)
    assert json.loads((place / "runs/small/run.json").read_text())["data_path"] == str(place / "moved")


def test_kill_9_loses_nothing_that_was_finished(place: Path) -> None:
    process = start(place, "search", "small.yaml", "--data", "set", "--concurrent", "1")
    wait_until(lambda: bool(records(place)) and bool(checkpoints(place, "0001")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = records(place)
    status = json.loads(call_here(place, "status", "runs/small", "--json")[1])
    assert status["state"] == "stopped"

    code, _, err = call(place, "resume", "runs/small")
    assert code == 0, err
    check_whole(place)
    after = {record["trial"]: record for record in records(place)}
    for record in before:
        later = after[record["trial"]]
        went_on = later["epochs"] > record["epochs"]  # it was held at a rung, and so had not ended
        assert kills.is_kept(record, later) if went_on else later == record


@pytest.mark.parametrize("epochs", [1, 3])
def test_event_files_are_whole_after_a_kill(place: Path, epochs: int) -> None:
    """Of the second trial so many epochs are stored when the driver dies."""
    process = start(place, "search", "small.yaml", "--data", "set", "--concurrent", "1", "--no-report", "--wandb", "off",
                    "--tensorboard")  # fmt: skip
    wait_until(lambda: any((folder.parent / f"best/{epochs}").exists() for folder in checkpoints(place, "0001")) or
               len(records(place)) > 1, process)  # fmt: skip
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    code, _, err = call(place, "resume", "runs/small")
    assert code == 0, err
    for record in records(place):
        folder = place / "runs/small/tensorboard" / record["trial"]
        found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
        for tag, key in (("val/objective", "value"), ("loss/total", "loss_total"), ("val/dice_mean", "dice_mean")):
            curve = [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]
            assert curve == [(row["epoch"], row[key]) for row in record["history"]]
        if record["baseline"]:  # the driver may have died over the only pictures of the second
            assert found.Images("preview/0")
        (best,) = found.Scalars("best/value")
        assert best.value == pytest.approx(record["value"])


FULL = """
import resource, sys
from tuner import cli
from tuner.sampler import SearchStudy
report = SearchStudy.report
def full(self, number, epoch, compared):
    if number == 1 and epoch == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    report(self, number, epoch, compared)
SearchStudy.report = full
sys.exit(cli.main())
"""


def test_a_full_disk_is_one_message_and_resume_goes_on(place: Path) -> None:
    """As a limit on this process, which may write no more from the middle of a trial on, run.json neither."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, "search", "small.yaml", "--data", "set", "--concurrent", "1"],
        cwd=place, env=environment(place), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    message = (
        "tuner search: the disk is full ([Errno 27] File too large); make room, then `tuner resume runs/small` goes on"
    )
    assert done.stderr.splitlines()[-1] == message
    assert "Traceback" not in done.stderr
    status = json.loads(call_here(place, "status", "runs/small", "--json")[1])
    assert (status["state"], status["completed"]) == ("stopped", 1)
    code, _, err = call_here(place, "finals", "runs/small")
    assert code == 2
    assert "found one that is stopped" in err
    assert call_here(place, "report", "runs/small")[0] == 0
    page = (place / "runs/small/report/report.md").read_text()
    assert "it runs, or it was killed" in page  # run.json could not be written

    code, _, err = call(place, "resume", "runs/small")
    assert code == 0, err
    check_whole(place)


def test_a_budget_that_cannot_hold_the_baseline_is_refused_before_the_search(place: Path) -> None:
    code, out, err = call(place, "search", "small.yaml", "--data", "set", "--hours", "0.000001")
    assert (code, out) == (2, "")
    assert "tuner search: budget.hours must hold the baseline, which always runs to its end and takes about" in err
    assert "Traceback" not in err
    assert not list(place.glob("runs/*"))


def test_a_cache_that_cannot_be_written_is_said_before_the_first_trial(place: Path) -> None:
    (place / "cache").write_text("a file where the folder should be")
    code, out, err = call(place, "search", "small.yaml", "--data", "set", "--wandb", "off", "--concurrent", "1")
    assert (code, out) == (2, ""), err
    assert "tuner search: cannot decode the images into " in err
    assert "Traceback" not in err


def test_a_search_that_fails_says_why(place: Path) -> None:
    (place / "behaviour.json").write_text('{"0.01": "crash"}')
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.scripted", ".", "search", "small.yaml", "--data", "set", "--wandb", "off"],
        cwd=place, env=environment(place) | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    err = done.stderr
    assert (done.returncode, done.stdout) == (1, ""), err
    assert "tuner search: 3 trials in a row failed for the same reason: " in err
    assert "Traceback" not in err
    assert json.loads(call_here(place, "status", "runs/small", "--json")[1])["failed"] == 3
    assert "; how it went: runs/small/report/index.html" in err
    page = (place / "runs/small/report/report.md").read_text()
    assert "No trial has completed, so there is no best configuration yet. The search failed;" in page


def test_finals_repeat_the_best_stop_and_go_on_from_there(place: Path) -> None:
    """A search alone, then finals with repeats that its space does not ask for, killed in the middle."""
    (place / "small.yaml").write_text(SPACE.replace("scheduler: {name: asha, min_epochs: 1, reduction: 2}\n", ""))
    code, _, err = call(
        place, "search", "small.yaml", "--data", "set", "--wandb", "off", "--no-report", "--concurrent", "2"
    )
    assert code == 0, err
    run = place / "runs" / "small"
    searched = (run / "records.jsonl").read_text()
    code, _, err = call_here(place, "finals", "runs/small", "--seeds", "3", "--open-test")
    assert code == 2
    assert "--seeds must come before the test split is opened, found 3 with --open-test" in err
    process = start(place, "finals", "runs/small", "--seeds", "3")
    wait_until(lambda: bool([*run.glob("trials/attempt-2/*-r0000/checkpoint_*")]), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "evaluation").exists()  # nothing of test was opened
    assert json.loads(call_here(place, "status", "runs/small", "--json")[1])["repeats"]["state"] == "stopped"
    code, _, err = call_here(place, "finals", "runs/small", "--open-test")
    assert code == 2
    assert "--open-test needs a winner that is chosen" in err
    code, _, err = call(place, "finals", "runs/small")
    assert code == 0, err
    assert json.loads((run / "run.json").read_text())["repeats"] == {
        "trainings": None, "seeds": 3, "hours": None, "prefer": "best", "state": "finished",
    }  # fmt: skip
    assert (run / "records.jsonl").read_text() == searched
    repeats = [json.loads(line) for line in (run / "repeats.jsonl").read_text().splitlines()]
    assert repeats
    assert {repeat["status"] for repeat in repeats} == {"completed"}
    by_trial = {record["trial"]: record for record in map(json.loads, searched.splitlines())}
    for repeat in repeats:
        assert repeat["config"] == by_trial[repeat["repeats"]]["config"] | {"seed": repeat["seed"]}

    selection = json.loads((run / "evaluation" / "selection.json").read_text())
    known = {repeat["trial"]: repeat for repeat in repeats} | by_trial
    winner = known[selection["winner"]]
    assert winner.get("repeats", winner["trial"]) == selection["configuration"]
    of_winner = [one for one in known.values() if one.get("repeats", one["trial"]) == selection["configuration"]]
    assert winner["value"] == max(one["value"] for one in of_winner)
    judged = {one["trial"]: one for one in selection["seeds"]}
    assert judged[winner["trial"]]["validation"] == winner["value"]

    assert call_here(place, "report", "runs/small")[0] == 0
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["best"]["trial"] == selection["winner"]
    found = metrics["selection"]
    assert found["trial"] == selection["configuration"]
    assert found["ci95"][0] < found["corrected"] < found["ci95"][1]
    assert found["repeats"]["completed"] == len(repeats)
    assert judged[winner["trial"]]["test"] == pytest.approx(metrics["test"]["dice_positive_mean"], abs=1e-6)
    assert "How far the winner can be trusted" in (run / "report" / "report.md").read_text()
    code, _, err = call_here(place, "finals", "runs/small", "--seeds", "4")
    assert code == 2
    assert "the test split is opened once a run" in err

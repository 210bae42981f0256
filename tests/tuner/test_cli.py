"""The command line in this process: messages and exit codes of what does not need a search."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from model import layouts, synthetic
from model.data import open_cache
from tests.tuner.conftest import small_space
from tuner import cli, pipeline

VERBS = (
    ["search"], ["trial"], ["resume"], ["status"], ["dashboard"], ["finals"], ["report"], ["export"], ["plan"], ["data", "check"],
    ["data", "synth"], ["data", "convert"], ["data", "cache"], ["sync"],
    ["wandb-sweep"], ["schema"], ["predict"], ["next"],
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy that may be spoilt, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "set")
    Path("small.yaml").write_text(yaml.safe_dump(small_space().to_dict()))
    return Path("set")


def refused(capsys, *arguments: str) -> str:
    """The message of a command that ends with exit code 2 and leaves nothing behind."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert not list(Path().glob("runs/*"))
    assert not list(Path().glob("runs/.*"))
    return captured.err


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_with_an_example(verb: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb, "--help"])
    assert stop.value.code == 0
    assert f"example: tuner {' '.join(verb)}" in capsys.readouterr().out


def test_a_space_that_is_wrong(data: Path, capsys) -> None:
    document = small_space().to_dict()
    document["search"]["learning_rate"] |= {"low": 3.0}
    document["objectiv"] = document.pop("objective")
    Path("small.yaml").write_text(yaml.safe_dump(document))
    message = refused(capsys, "search", "small.yaml", "--data", "set")
    assert "tuner search: small.yaml: 2 problems:" in message
    assert "search.learning_rate: low must not be above high, found low 3, high 2; swap them" in message
    assert "objectiv: is not a known key; did you mean 'objective'?" in message


def broken_image(data: Path) -> None:
    next(data.glob("images/*")).write_bytes(b"\x89PNG cut short")


def other_size(data: Path) -> None:
    cv2.imwrite(str(next(data.glob("masks/*"))), np.zeros((32, 32), np.uint8))


def without_mask(data: Path) -> None:
    (data / "index.csv").unlink()
    next(data.glob("masks/*")).unlink()


def emptied(data: Path) -> None:
    for file in [*data.glob("*/*"), data / "index.csv"]:
        file.unlink()


def too_few_negatives(data: Path) -> None:
    (data / "index.csv").unlink()
    black = {path for path in data.glob("masks/*") if not cv2.imread(str(path), 0).any()}
    for path in sorted(black)[1:]:
        path.unlink()
        (data / "images" / path.name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_image, r"images/\S+: cannot be decoded as an image; replace the file or remove it"),
        (other_size, r"a mask must have its image's size, 128x64 px, found 32x32"),
        (without_mask, r"there is no mask for it; add masks/"),
        (emptied, r"images: no image found"),
        (too_few_negatives, r"the \w+ split needs negative images \(the data set has some\), found none"),
    ],
)
def test_data_that_cannot_be_used(data: Path, capsys, spoil, message: str) -> None:
    spoil(data)
    assert re.search(message, refused(capsys, "search", "small.yaml", "--data", "set"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "nothing.yaml"], "there is no such file, and no shipped search space of this name"),
        (["search", "small.yaml", "--data", "nowhere"], "there is no such folder; name the one that holds"),
        (["search", "small.yaml", "--trials", "0"], "must be a whole number of at least 1, found '0'"),
        (["search", "small.yaml", "--seed", "-5"], "must be a whole number from 0 to 2147483647, found '-5'"),
        (["search", "small.yaml", "--data", "set", "--seed", "3000000000"], "from 0 to 2147483647, found '3000000000'"),
        (
            ["search", "small.yaml", "--gpus-per-trial", "nan"],
            "must be a number from 0 to 1, or a whole number of GPUs, found 'nan'",
        ),
        (["search", "small.yaml", "--data", "set", "--runs", "small.yaml"], "--runs must be a folder, found the file"),
        (["data", "check", "set", "--test-share", "1.5"], "must be a share above 0 and below 0.9, found '1.5'"),
        (["search", "small.yaml", "--hours", "-1"], "must be a number above 0, found '-1'"),
        (
            ["search", "small.yaml", "--address", "ray://head:10001"],
            "must be host:port of a Ray cluster, auto, or local",
        ),
        (["search", "small.yaml", "--data", "set", "--name", "../up"], "a run's name must be letters, digits"),
        (
            ["search", "small.yaml", "--data", "set", "--name", "x" * 300],
            "letters, digits, - and _, at most 100, found",
        ),
        (["search", "small.yaml", "--data", ""], "or the word synthetic, found nothing; is a variable"),
        (["plan", "small.yaml", "--data", ""], "found nothing; is a variable of the shell unset?"),
        (
            ["search", "small.yaml", "--data", "set", "--address", "127.0.0.1:1"],
            "--address must be that of a running Ray cluster, found none at 127.0.0.1:1",
        ),
        (["search", "small.yaml", "--data", "set", "--address", "localhost:99999"], "found none at localhost:99999"),
        (["plan", "nothing.yaml"], "tuner plan: nothing.yaml: 1 problem"),
        (["plan", "small.yaml", "--data", "nowhere"], "there is no such folder; name the one that holds"),
        (["plan", "small.yaml", "--data", "set", "--cpus-per-trial", "4096"], "it asks for 4096 cpus, found"),
        (["resume", "s3://KEY:hush@bucket/runs/demo"], "storage must hold no secret, "),
        (["resume", "nowhere", "--address", "ray://head:10001"], "must be host:port of a Ray cluster, auto, or local"),
        (["finals", "nowhere", "--address", "local"], "nowhere must be the folder of a run, with a run.json"),
        (["finals", "s3://bucket/runs/demo", "--address", "http://127.0.0.1:1"], "finals need the run's folder on the"),
        (["resume", "nowhere", "--address", "http://127.0.0.1:1"], "found none at http://127.0.0.1:1 "),
        (["resume", "nowhere"], "nowhere must be the folder of a run, with a run.json"),
        (["status", "."], "must be the folder of a run"),
        (["search", "small.yaml", "--data", "set", "--warm-start", "nowhere"], "nowhere must be the folder of a run"),
        (
            ["search", "small.yaml", "--data", "set", "--study", "sqlite:///nowhere/study.db"],
            "found sqlite:///{here}/nowhere/study.db: unable to open database file; name a file that may be written",
        ),
        (["search", "small.yaml", "--data", "set", "--study", "sqlite://"], "found sqlite in memory; name a file"),
        (["search", "small.yaml", "--data", "set", "--study", "mysql+asyncpg9://h/x"], "install the driver's package"),
        (["search", "small.yaml", "--data", "set", "--study", "study.db"], "study must be the URL of a database"),
        (
            ["search", "small.yaml", "--data", "set", "--study", "env"],
            "variable SEGDEC_TUNER_STUDY_URL says, and it is not set",
        ),
        (["report", "nowhere"], "must be the folder of a run"),
        (
            ["data", "check", "nowhere"],
            "tuner data check: the data set nowhere cannot be used:\n  there is no such folder",
        ),
        (["data", "synth", "--out", "set"], "tuner data synth: a synthetic set needs a new or empty directory"),
        (["data", "convert", "set", "set"], "a converted set needs a new or empty folder, but set is in use"),
        (
            ["data", "convert", "set", "new", "--layout", "voc"],
            "tuner data convert: the layout must be one of auto, images_masks",
        ),
        (["data", "synth", "--out", "new", "--height", "100"], "100"),
        (["serch"], "invalid choice: 'serch'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_work(data: Path, capsys, arguments: list[str], message: str) -> None:
    assert message.format(here=Path.cwd()) in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConnectionError("Could not find any running Ray instance."), 2, "--address must be that of a running Ray"),
        (RuntimeError("no room for Ray"), 1, "tuner search: RuntimeError: no room for Ray\n"),
        (KeyboardInterrupt(), 130, "stopped at once"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_run_that_never_began_leaves_no_folder(
    data: Path, capsys, monkeypatch, error: BaseException, code: int, message: str
) -> None:
    import ray

    def fail(**_: object) -> None:
        assert list(Path().glob("runs/small"))
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    assert cli.main(["search", "small.yaml", "--data", "set", "--address", "auto"]) == code
    assert message in capsys.readouterr().err
    assert not list(Path().glob("runs/*"))


def test_data_that_are_not_named_are_the_synthetic_set_and_that_is_said(data: Path, capsys, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(pipeline, "run_search", lambda space, data, **_: asked.append(data))
    monkeypatch.setattr(cli, "_ended", lambda run: 0)
    assert cli.main(["search", "small.yaml"]) == 0
    assert "no --data: taking the procedural crack set" in capsys.readouterr().err
    assert cli.main(["search", "small.yaml", "--data", "synthetic"]) == 0
    assert capsys.readouterr().err == ""
    assert asked == ["synthetic", "synthetic"]


def test_online_logging_needs_a_key(data: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    message = refused(capsys, "search", "small.yaml", "--data", "set", "--wandb", "online")
    assert "--wandb online needs a W&B API key" in message


def test_a_plan_is_printed_for_people_and_for_programs(data: Path, capsys) -> None:
    assert cli.main(["plan", "small.yaml", "--data", "set"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("plan of small: 1 configuration timed on CPU")
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert cli.main(["plan", "small.yaml", "--data", "set", "--concurrent", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trials"], found["concurrent"]) == (4, 3)
    assert not Path("runs").exists()


def test_a_plan_whose_budget_cannot_hold_the_baseline(data: Path, capsys) -> None:
    document = small_space(budget={"hours": 1e-6}).to_dict()
    Path("small.yaml").write_text(yaml.safe_dump(document))
    message = refused(capsys, "plan", "small.yaml", "--data", "set")
    assert "tuner plan: budget.hours must hold the baseline" in message
    assert "found 1e-06; raise it" in message


def test_debug_shows_where(data: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        cli.main(["search", "nothing.yaml", "--debug"])


def test_data_check_counts(data: Path, capsys) -> None:
    assert cli.main(["data", "check", "set", "--test-share", "0.25", "--validation-share", "0.25"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("train ")
    assert re.search(r"fingerprint [0-9a-f]{16}; no broken file, no group or file in two splits", out)


def test_data_check_names_near_duplicates(data: Path, capsys) -> None:
    """The same picture, brighter and as a JPEG file, in a test split that is given."""
    with (data / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    picture = cv2.imread(str(data / "images" / f"{rows[0]['name']}.png"))
    cv2.imwrite(str(data / "images" / "copy.jpg"), cv2.convertScaleAbs(picture, beta=9))
    shutil.copy(data / "masks" / f"{rows[0]['name']}.png", data / "masks" / "copy.png")
    lines = [f"{row['name']},{row['group']},{'test' if n >= 16 else ''}" for n, row in enumerate(rows)]
    (data / "index.csv").write_text("\n".join(["name,group,split", *lines, "copy,copy,test"]) + "\n")
    assert cli.main(["data", "check", "set", "--validation-share", "0.3"]) == 0
    found = capsys.readouterr().out
    assert re.search(r"pairs of near-duplicates between splits; look at them:", found)
    assert re.search(
        rf"{rows[0]['name']}\.png \(\w+\) and set/images/copy\.jpg \(test\) look alike: .* of 256 bits", found
    )


def test_data_check_names_a_photo_and_a_file_on_two_sides(data: Path, capsys) -> None:
    names = sorted(path.stem for path in data.glob("images/*"))
    shutil.copy(data / "images" / f"{names[0]}.png", data / "images" / f"{names[23]}.png")
    sides = ["train"] * 8 + ["validation"] * 8 + ["test"] * 8
    lines = [
        f"{name},{'one' if n in (1, 9) else n},{side}" for n, (name, side) in enumerate(zip(names, sides, strict=True))
    ]
    (data / "index.csv").write_text("\n".join(["name,group,split", *lines]) + "\n")
    shutil.copy(data / "masks" / f"{names[0]}.png", data / "masks" / f"{names[23]}.png")
    message = refused(capsys, "data", "check", "set")
    assert (
        f"one group must not lie in two splits, found '{names[1]}' in train and '{names[9]}' in validation" in message
    )
    assert (
        f"one image file must not lie in two splits, found '{names[0]}' in train and '{names[23]}' in test" in message
    )


def test_convert_writes_what_check_reads(data: Path, capsys) -> None:
    assert cli.main(["data", "convert", "set", "plain", "--drop-leaks"]) == 0
    assert capsys.readouterr().out == "plain: 24 images, 0 left out\n"
    assert cli.main(["data", "check", "plain", "--test-share", "0.25", "--validation-share", "0.25"]) == 0


def test_help_names_every_layout() -> None:
    assert ", ".join(layouts.LAYOUTS) == cli._LAYOUTS


def test_nothing_of_the_current_folder_is_run(data: Path, capsys) -> None:
    Path("model.py").write_text("raise SystemExit('a user file was imported')")
    assert cli.main(["data", "check", "set", "--test-share", "0.25", "--validation-share", "0.25"]) == 0


def test_synth_writes_what_check_reads(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "synth", "--out", "cracks", "--count", "30", "--height", "64"]) == 0
    assert capsys.readouterr().out == "cracks\n"
    assert cli.main(["data", "check", "cracks"]) == 0


def test_the_cache_is_listed_and_cleared(made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    cache = open_cache(layouts.read(made), 64, 128)
    assert cli.main(["data", "cache"]) == 0
    assert str(cache.directory) in capsys.readouterr().out
    cache.use.close()
    assert cli.main(["data", "cache", "--clear"]) == 0
    assert "1 removed" in capsys.readouterr().out
    assert not cache.directory.exists()


def test_the_schema_is_printed(capsys) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "segdec-tuner search space"

"""`tuner next` on real files: with a small network that has learnt dark lines, and with one of random weights."""

import csv
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from model import deployed, export, layouts, splits, train
from model.arrays import Array
from model.checkpoint import load_model, save_model
from model.config import RunConfig
from model.data import open_cache
from model.evaluate import score
from model.files import write_json
from model.inspection import decode_image
from model.sample import Sample, Supervision
from model.uncertainty import look
from tests.conftest import heeds_ctrl_c
from tests.tuner.conftest import small_space
from tests.tuner.test_predict import EVIL
from tuner import run as runs
from tuner.cli import main
from tuner.next_masks import propose
from tuner.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # training takes 10 s of a core

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 64, 128
IMAGES = {"height": HEIGHT, "width": WIDTH, "largest_height": HEIGHT, "largest_width": WIDTH}


def wall(seed: int, contrast: int) -> tuple[Array, Array]:
    """RGB of grain with a line that is darker by `contrast`, and its mask."""
    rng = np.random.default_rng(seed)
    grain = cv2.GaussianBlur(rng.normal(0, 25, (HEIGHT, WIDTH)).astype(np.float32), (0, 0), 1)
    line = np.zeros((HEIGHT, WIDTH), np.uint8)
    ends = (
        (rng.integers(0, WIDTH // 3), rng.integers(HEIGHT)),
        (rng.integers(2 * WIDTH // 3, WIDTH), rng.integers(HEIGHT)),
    )
    cv2.line(line, *[(int(x), int(y)) for x, y in ends], 1, 3)
    grey = (150 + grain - contrast * line).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2), line * (contrast > 0)


def save(path: Path, image: Array, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **how)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 walls, a third without a line; of the training images three have a line and no mask."""
    folder = tmp_path_factory.mktemp("walls")
    rows = []
    for k in range(40):
        image, mask = wall(k, 0 if k % 3 == 0 else 90)
        split = "test" if k < 6 else "validation" if k < 14 else "train"
        segmented = int(not (split == "train" and k in (20, 22, 23)))
        save(folder / "images" / f"w{k:02d}.png", image)
        if mask.any() and k != 23:
            save(folder / "masks" / f"w{k:02d}.png", mask * 255)
        rows.append([f"w{k:02d}", split, int(k % 3 != 0), segmented, "photo" if k in (20, 22) else f"g{k}"])
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name", "split", "positive", "segmented", "group"], *rows])
    return folder


@pytest.fixture(scope="module")
def best(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: trained until it finds the lines."""
    folder = tmp_path_factory.mktemp("trained") / "best"
    config = RunConfig(
        width=0.1, input_height=HEIGHT, input_width=WIDTH, epochs=8, learning_rate=0.5, threshold_rule="grid",
        precision="float32", num_segmented=10,
    )  # fmt: skip
    found = splits.assign(layouts.read(data), data, 0.2, 0.2, 0)
    device = torch.device("cpu")
    training = train.start(config, device)
    for _ in train.fit(training, open_cache(found.train, HEIGHT, WIDTH)):
        pass
    scores = score(training.network, open_cache(found.validation, HEIGHT, WIDTH), config, device)
    thresholds = scores.choose(config.judgement())
    dice = scores.figures([thresholds])[0]["dice_positive_mean"]
    assert dice is not None
    assert dice > 0.7
    save_model(folder, training.network.state_dict(), config, thresholds, epoch=8)
    write_json(folder / "images.json", IMAGES)
    return folder


@pytest.fixture
def run(data: Path, best: Path, tmp_path: Path) -> Run:
    """A run whose winner kept 10 masks."""
    made = runs.create(small_space(), data, tmp_path / "runs")
    shutil.copytree(best, made.directory / "best")
    return made


def hidden(run: Run) -> list[str]:
    """Of training, the positives without a mask for the winner."""
    train_split: list[Sample] = splits.keep_masks(run.splits().train, 10, 0)
    return sorted(sample.name for sample in train_split if sample.supervision is Supervision.IMAGE)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "next.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ranked(model: Path, *images: Path | str, out: Path, count: int = 24) -> list[dict[str, str]]:
    propose(str(model), [str(one) for one in images], str(out), count, Console(file=io.StringIO()))
    return rows(out)


def test_faint_cracks_come_before_clear_ones_and_a_sure_empty_wall_is_last(best: Path, tmp_path: Path) -> None:
    for name, contrast in (("none", 0), ("clear", 90), ("faint", 35)):
        for k in range(4):
            save(tmp_path / "in" / f"{name}{k}.png", wall(100 + k, contrast)[0])
    found = ranked(best, tmp_path / "in", out=tmp_path / "out")
    mean = {
        name: np.mean([float(row["score"]) for row in found if row["file"].startswith(name)])
        for name in ("faint", "clear", "none")
    }
    assert mean["faint"] > 1.5 * mean["clear"]
    assert mean["clear"] > mean["none"]
    assert found[0]["file"].startswith("faint")
    assert {row["file"][:-5] for row in found[-2:]} == {"none"}
    assert [int(row["rank"]) for row in found] == list(range(1, 13))
    scores = [float(row["score"]) / int(row["of_kind"]) for row in found]
    assert scores == sorted(scores, reverse=True)


def test_mirror_images_get_the_same_score_and_a_copy_waits(best: Path, tmp_path: Path) -> None:
    image, _ = wall(7, 50)
    for k, axes in enumerate(((), (0,), (1,))):
        save(tmp_path / "in" / f"{k}.png", np.ascontiguousarray(np.flip(image, axes)))
    save(tmp_path / "in" / "copy.jpg", image, quality=95)
    found = {row["file"]: row for row in ranked(best, tmp_path / "in", out=tmp_path / "out")}
    scores = [float(found[f"{k}.png"]["score"]) for k in range(3)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)
    assert sorted(found[name]["of_kind"] for name in ("0.png", "copy.jpg")) == ["1", "2"]
    assert max(int(found[name]["rank"]) for name in ("0.png", "copy.jpg")) == 4


def test_a_row_says_what_the_score_is_made_of(best: Path, tmp_path: Path) -> None:
    image, _ = wall(7, 50)
    (row,) = ranked(best, save(tmp_path / "a.png", image), out=tmp_path / "out")
    network = deployed.load(best)
    assert network.thresholds is not None
    found, maps = look(image, network.answer, network.sizes, network.thresholds)
    assert float(row["score"]) == pytest.approx(found.score(found.mask / found.pixels), rel=1e-4)
    parts = [float(row[f"{name}_px"]) for name in ("doubt", "disagreement", "contradiction", "defect", "mask")]
    assert sum(parts[:3]) / max(found.held + found.mask, 1) == pytest.approx(float(row["score"]), abs=1e-3)
    assert parts[3:] == pytest.approx([found.defect, maps.mask_HW.sum()], abs=0.06)
    assert float(row["decision"]) == pytest.approx(found.decision)
    assert (row["height_px"], row["width_px"], row["label"], row["group"], row["error"]) == ("64", "128", "", "", "")


def test_without_images_those_of_training_that_the_winner_had_no_mask_of(run: Run, tmp_path: Path) -> None:
    names = hidden(run)
    assert {"w20", "w22", "w23"} < set(names)
    for model in (run.directory, run.directory / "best"):
        found = ranked(model, out=tmp_path / "out")
        assert sorted(row["file"] for row in found) == [f"images/{name}.png" for name in names]
    assert {row["label"] for row in found} == {"1"}
    of = {row["file"][7:10]: row for row in found}
    assert of["w20"]["group"] == of["w22"]["group"] == "photo"
    assert {of["w20"]["of_kind"], of["w22"]["of_kind"]} == {"1", "2"}
    assert of["w23"]["note"] == ""
    assert "the data set has a mask, which the best trial did not use" in of["w22"]["note"]


def test_images_of_validation_and_test_and_those_with_a_mask_are_left_out(
    run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "images", tmp_path / "in")
    save(tmp_path / "in" / "new.png", wall(99, 60)[0])
    out = tmp_path / "out"
    assert main(["next", str(run.directory), str(tmp_path / "in"), "--out", str(out), "--count", "2"]) == 0
    found = rows(out)
    assert sorted(row["file"] for row in found if row["rank"]) == sorted(
        ["new.png", *(f"{n}.png" for n in hidden(run))]
    )
    notes = {row["file"]: row["note"] for row in found if not row["rank"]}
    assert notes["w00.png"] == "left out: it is in the test split of the run, from which nothing may be learnt"
    assert notes["w06.png"] == "left out: it is in the validation split of the run, from which nothing may be learnt"
    assert notes["w15.png"] == "left out: training has that it has no defect already"
    assert len(list((out / "uncertainty").iterdir())) == 2
    assert f"{len(found) - len(notes)} images ranked, first " in capsys.readouterr().out
    only_test = [str(tmp_path / "in" / f"w0{k}.png") for k in range(6)]
    assert main(["next", str(run.directory / "best"), *only_test, "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "neither validation nor test, found 6 of which: it is in the test split" in said
    assert not (tmp_path / "other").exists()


def test_maps_and_the_sheet_are_pictures_of_their_sizes(best: Path, tmp_path: Path) -> None:
    for k in range(27):
        save(tmp_path / "in" / f"{k:02d}.png", wall(k, 60)[0])
    save(tmp_path / "in" / "tall" / "x.png", np.rot90(wall(50, 60)[0]).copy())
    found = ranked(best, tmp_path / "in", out=tmp_path / "out", count=25)
    maps = {
        path.relative_to(tmp_path / "out" / "uncertainty").as_posix() for path in (tmp_path / "out").rglob("*.png.png")
    }
    assert maps == {f"{row['file']}.png" for row in found[:25]}
    drawn = decode_image(tmp_path / "out" / "uncertainty" / f"{found[0]['file']}.png")
    assert drawn.shape == decode_image(tmp_path / "in" / found[0]["file"]).shape
    sheet = decode_image(tmp_path / "out" / "sheet.png")
    title = 29
    assert sheet.shape == (title + 12 * (title + 240 + 10), 2 * (3 * 240 + 2 * 6) + 6, 3)
    assert sheet.std() > 30
    (row,) = ranked(best, tmp_path / "in" / "00.png", out=tmp_path / "out")
    assert decode_image(tmp_path / "out" / "sheet.png").shape == (2 * title + 120 + 10, 3 * 240 + 2 * 6, 3)
    assert row["rank"] == "1"


def test_broken_files_have_a_row_and_odd_names_do_no_harm(
    best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, name in enumerate(EVIL):
        save(tmp_path / "in" / name, wall(k, 60)[0])
    (tmp_path / "in" / "\x1b[31mbroken\n.png").write_bytes(b"no image")
    long = tmp_path / "in" / ("n" * 250 + ".png")
    save(long, wall(60, 60)[0])
    out = tmp_path / "out"
    for _ in range(2):  # the second knows the folder as its own
        assert main(["next", str(best), str(tmp_path / "in"), "--out", str(out)]) == 1
    found = rows(out)
    failed = [row for row in found if row["error"]]
    assert {os.path.normpath(row["file"]) for row in found if not row["error"]} == set(EVIL)
    assert not [row for row in found if row["file"][0] in "=+-@\uff1d\uff20\t\r\n \u200b\xa0"]
    errors = {os.path.normpath(row["file"])[0]: (row["rank"], row["error"]) for row in failed}
    assert errors["\x1b"] == ("", "cannot be decoded as an image; replace the file or remove it")
    assert errors["n"][0] != ""
    assert errors["n"][1] == "names of what is written must have at most 255 bytes, found 258; rename the image"
    said = capsys.readouterr()
    assert "\x1b" not in said.err + said.out
    assert f"{len(EVIL) + 1} images ranked" in said.out
    assert "2 failed" in said.out


def test_nothing_but_broken_files_is_a_table_without_a_rank(
    best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    assert main(["next", str(best), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 1
    (row,) = rows(tmp_path / "out")
    assert (row["rank"], row["file"], row["error"][:17]) == ("", "a.png", "cannot be decoded")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["next.csv"]
    assert capsys.readouterr().out.endswith("next.csv: 0 images ranked, 1 failed\n")


def test_ctrl_c_says_that_nothing_is_written(best: Path, tmp_path: Path) -> None:
    for k in range(100):
        save(tmp_path / "in" / f"{k:03d}.png", np.tile(wall(k, 60)[0], (4, 4, 1)))
    (tmp_path / "in" / "001.png").write_bytes(b"no image")
    words = [sys.executable, "-m", "tuner", "next", best, tmp_path / "in", "--out", tmp_path / "out"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("001.png: cannot be decoded")
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130
    assert "of 100 images were looked at, and nothing is written; the same command begins anew" in said
    assert not list((tmp_path / "out").iterdir())


def test_an_onnx_file_ranks_alike_and_needs_no_torch(run: Run, best: Path, tmp_path: Path) -> None:
    network, _, thresholds = load_model(best, torch.device("cpu"))
    about = {
        "schema": 1,
        "input": {"height": HEIGHT, "width": WIDTH},
        "images": IMAGES,
        "thresholds": thresholds.to_dict(),
    }
    file = run.directory / "best" / "model.onnx"
    file.write_bytes(export.to_onnx(export.Deployable(network, thresholds), HEIGHT, WIDTH, about))
    code = f"""
import sys
class NoTorch:  # SciPy, which hashes need, stumbles over a module that is None
    def find_spec(self, name, *_):
        if name.split(".")[0] == "torch":
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
from tuner.cli import main
sys.exit(main(["next", {str(file)!r}, "--out", {str(tmp_path / "a")!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
    ours, theirs = ranked(run.directory, out=tmp_path / "b"), rows(tmp_path / "a")
    assert len(ours) == len(theirs) > 3
    by_name = {row["file"]: row for row in theirs}
    for row in ours:
        assert float(by_name[row["file"]]["score"]) == pytest.approx(float(row["score"]), abs=2e-3)


def test_a_network_without_a_decision_leaves_the_contradiction_out(best: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(best, tmp_path / "best"))
    values = json.loads((model / "thresholds.json").read_text())
    write_json(model / "thresholds.json", values | {"decision_logit": None})
    (row,) = ranked(model, save(tmp_path / "a.png", wall(3, 0)[0]), out=tmp_path / "out")
    assert (row["decision"], row["contradiction_px"]) == ("", "0.0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{best}"], "without IMAGE, MODEL must be the folder of a run"),
        (["{best}", "nothing.png"], "no such file or folder, and no pattern"),
        (["{best}", "in", "--count", "0"], "must be"),
        (["{best}", "in", "--out", "full"], "one of earlier rankings, found full with masks in it"),
        (["{best}", "in", "--out", "predicted"], "one of earlier rankings, found predicted with predictions.csv in it"),
        (["in", "in"], "MODEL must be the folder of a run that has finished"),
        (["{old}", "in"], "must say its thresholds, found none; export it again"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_message_before_anything_is_written(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in" / "a.png", wall(0, 60)[0])
    (tmp_path / "full" / "masks").mkdir(parents=True)
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted" / "predictions.csv").write_text("file,height_px,width_px,tiles,score\n")
    if "{old}" in words:
        network, _, thresholds = load_model(best, torch.device("cpu"))
        about = {"schema": 1, "input": {"height": HEIGHT, "width": WIDTH}, "images": IMAGES}
        data = export.to_onnx(export.Deployable(network, thresholds), HEIGHT, WIDTH, about)
        (tmp_path / "old.onnx").write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    arguments = [word.format(best=best, old="old.onnx") for word in words]
    arguments += [] if "--out" in arguments else ["--out", "out"]
    try:
        code = main(["next", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_that_cannot_be_asked_say_why(run: Run, data: Path, tmp_path: Path) -> None:
    config = json.loads((run.directory / "best" / "config.json").read_text())
    out = tmp_path / "out"
    moved = data.with_name("moved")
    data.rename(moved)
    try:
        with pytest.raises(ValueError, match="the data must lie where the run found them, but there is no folder"):
            ranked(run.directory, out=out)
    finally:
        moved.rename(data)
    write_json(run.directory / "best" / "config.json", config | {"num_segmented": 1000})
    with pytest.raises(ValueError, match="num_segmented must be at most"):
        ranked(run.directory, out=out)
    (run.directory / "best" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json must hold the configuration of the best trial"):
        ranked(run.directory, out=out)
    assert not out.exists()


def test_one_run_at_a_time_writes_and_predictions_do_not_read_its_pictures(best: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", wall(0, 60)[0])
    out = tmp_path / "in" / "next"
    first = ranked(best, tmp_path / "in", out=out)
    assert ranked(best, tmp_path / "in", out=tmp_path / "other") == first
    lock = os.open(out, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="must not be written by two runs at once"):
        ranked(best, tmp_path / "in", out=out)
    os.close(lock)

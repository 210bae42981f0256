"""`tuner predict` on real files, with a small network of random weights."""

import csv
import fcntl
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from rich.console import Console

from model import deployed, export, tiles
from model.arrays import Array
from model.checkpoint import load_model, save_model
from model.config import RunConfig
from model.crack_size import measure
from model.files import write_json
from model.inspection import decode_image, resize_image
from model.network import build
from model.thresholds import Thresholds
from tuner import photos
from tuner.cli import main
from tuner.names import cell
from tuner.photo_results import CRACK
from tuner.predict import _table, predict
from tuner.report import style

pytestmark = pytest.mark.timeout(300)  # torch takes its time to make an ONNX file

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 64, 128
IMAGES = {"height": 64, "width": 128, "largest_height": 80, "largest_width": 160}


def surface(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Array:
    """RGB: a smooth surface with a dark line."""
    rng = np.random.default_rng(seed)
    grain = cv2.GaussianBlur(rng.normal(0, 60, (height, width, 3)).astype(np.float32), (0, 0), 2)
    out = (150 + grain).clip(0, 255).astype(np.uint8)
    cv2.line(out, (0, height // 3), (width, height // 2), (30, 30, 30), 3)
    return out


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose masks have some pixels."""
    folder = tmp_path_factory.mktemp("run") / "best"
    torch.manual_seed(0)
    config = RunConfig(width=0.25, input_height=HEIGHT, input_width=WIDTH)
    network = build(config.architecture, width=config.width).eval()
    images = torch.from_numpy(np.stack([surface(seed=k) for k in range(4)])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        decisions, logits = network(images / 255)
    thresholds = Thresholds("grid", 1, float(logits.quantile(0.9)), float(decisions.mean()))
    save_model(folder, network.state_dict(), config, thresholds, epoch=1)
    write_json(folder / "images.json", IMAGES)
    return folder


@pytest.fixture(scope="session")
def onnx_file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a file that needs no torch."""
    network, _, thresholds = load_model(model, torch.device("cpu"))
    about = {"schema": 1, "input": {"height": HEIGHT, "width": WIDTH}, "images": IMAGES}
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    file.write_bytes(export.to_onnx(export.Deployable(network, thresholds), HEIGHT, WIDTH, about))
    return file


def save(path: Path, image: Array | None = None, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(surface() if image is None else image).save(path, **how)
    return path


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(model: Path, *images: Path | str, out: Path, **options: Any) -> list[dict[str, str]]:
    predict(str(model), [str(one) for one in images], str(out), options.get("mm_per_px"), Console(file=io.StringIO()))
    return rows(out)


def mask_of(out: Path, name: str) -> Array:
    return np.asarray(Image.open(out / "masks" / f"{name}.png"))


def test_a_photo_gets_the_networks_own_mask_and_its_size(model: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "photo.png")
    (row,) = run(model, file, out=tmp_path / "out", mm_per_px=0.5)
    _, mask, score, defect = deployed.load(model).answer(surface()[None])
    assert mask.any()
    assert np.array_equal(mask_of(tmp_path / "out", "photo.png"), mask[0] * 255)
    size = measure(mask[0])
    assert size.width_mean is not None
    assert row["file"] == "photo.png"
    assert (row["height_px"], row["width_px"], row["tiles"]) == ("64", "128", "1")
    assert (int(row["cracks"]), int(row["area_px"]), int(row["defect"])) == (size.cracks, mask.sum(), int(defect[0]))
    assert float(row["score"]) == pytest.approx(score[0], rel=1e-5)
    assert float(row["area_share"]) == pytest.approx(mask.mean(), rel=1e-5)
    assert float(row["length_px"]) == pytest.approx(size.length, abs=0.01)
    assert float(row["length_mm"]) == pytest.approx(0.5 * size.length, rel=1e-5)
    assert float(row["width_mean_mm"]) == pytest.approx(0.5 * size.width_mean, rel=1e-5)
    assert float(row["area_mm2"]) == pytest.approx(0.25 * size.area, rel=1e-5)
    assert (row["note"], row["error"]) == ("", "")


def test_a_large_photo_is_answered_in_tiles(model: Path, tmp_path: Path) -> None:
    photo = surface(200, 300)
    (row,) = run(model, save(tmp_path / "photo.png", photo), out=tmp_path / "out")
    network = deployed.load(model)
    found = tiles.segment(photo, network.answer, network.sizes)
    assert int(row["tiles"]) == found.tiles > 1
    assert np.array_equal(mask_of(tmp_path / "out", "photo.png"), found.mask_HW * 255)
    assert "length_mm" not in row


def test_a_photo_smaller_or_a_little_larger_than_the_input_is_stretched(model: Path, tmp_path: Path) -> None:
    photo = surface(80, 90)
    (row,) = run(model, save(tmp_path / "photo.png", photo), out=tmp_path / "out")
    _, mask, _, _ = deployed.load(model).answer(resize_image(photo, (HEIGHT, WIDTH))[None])
    assert row["tiles"] == "1"
    assert np.array_equal(mask_of(tmp_path / "out", "photo.png"), tiles.bring_back(mask[0], (80, 90)) * 255)


def test_the_overlay_is_grey_where_nothing_is_and_coloured_where_the_mask_is(model: Path, tmp_path: Path) -> None:
    run(model, save(tmp_path / "photo.png"), out=tmp_path / "out")
    overlay = decode_image(tmp_path / "out" / "overlays" / "photo.png.jpg").astype(int)
    mask = mask_of(tmp_path / "out", "photo.png") > 0
    colourful = overlay.max(axis=2) - overlay.min(axis=2)
    assert colourful[mask].mean() > 80  # also where it is one px wide
    assert colourful[~mask].mean() < 20
    assert to_rgb(style.RED) == pytest.approx(np.array(CRACK) / 255)


def test_all_three_forms_of_a_model_answer_alike_and_onnx_needs_no_torch(
    model: Path, onnx_file: Path, tmp_path: Path
) -> None:
    file = save(tmp_path / "photo.png", surface(150, 200))
    assert run(model.parent, file, out=tmp_path / "a") == run(model, file, out=tmp_path / "b")
    code = f"""
import sys
sys.modules["torch"] = None
from tuner.cli import main
sys.exit(main(["predict", {str(onnx_file)!r}, {str(file)!r}, "--out", {str(tmp_path / "c")!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    ours, theirs = rows(tmp_path / "a")[0], rows(tmp_path / "c")[0]
    assert float(theirs["score"]) == pytest.approx(float(ours["score"]), abs=1e-4)
    assert (mask_of(tmp_path / "a", "photo.png") != mask_of(tmp_path / "c", "photo.png")).mean() < 1e-3
    assert theirs["tiles"] == ours["tiles"]


def test_a_model_of_an_earlier_version_is_taken_at_its_inputs_size_and_that_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "best")
    (tmp_path / "best" / "images.json").unlink()
    file = save(tmp_path / "photo.png", surface(66, 128))
    assert main(["predict", str(tmp_path), str(file), "--out", str(tmp_path / "out")]) == 0
    assert rows(tmp_path / "out")[0]["tiles"] == "2"
    assert "taking the size of the network's input, 64x128 px" in " ".join(capsys.readouterr().err.split())


def test_folders_patterns_and_files_are_found_once_each_with_their_own_names(model: Path, tmp_path: Path) -> None:
    photo = surface()
    for name in (
        "a/x.jpg",
        "b/x.jpg",
        "b/x.png",
        "b/deep/er/y.TIF",
        "b/z.webp",
        "b/w.bmp",
        "b/.hidden.jpg",
        "b/._x.jpg",
    ):
        save(tmp_path / "in" / name, photo)
    (tmp_path / "in" / "b" / "notes.txt").write_text("no image")
    arguments = (
        tmp_path / "in" / "a" / "x.jpg",
        tmp_path / "in" / "a",
        f"{tmp_path}/in/b/**/*.*",
        tmp_path / "in" / "b",
    )
    found = run(model, *arguments, out=tmp_path / "out")
    assert sorted(row["file"] for row in found) == [
        "a/x.jpg", "b/deep/er/y.TIF", "b/w.bmp", "b/x.jpg", "b/x.png", "b/z.webp",
    ]  # fmt: skip
    masks = {str(path.relative_to(tmp_path / "out" / "masks")) for path in (tmp_path / "out" / "masks").rglob("*.png")}
    assert masks == {row["file"] + ".png" for row in found}


def test_a_second_run_does_not_read_what_the_first_has_written(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    out = tmp_path / "in" / "out"
    first = run(model, tmp_path / "in", out=out)
    assert run(model, tmp_path / "in", out=out) == first
    assert run(model, f"{tmp_path}/in/**/*.png", out=out) == first


def test_a_run_into_another_folder_does_not_read_what_an_earlier_one_has_written(model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", "sub/c\r.png"):  # a carriage return has the table quoted
        save(tmp_path / "in" / name)
    first = run(model, tmp_path / "in", out=tmp_path / "in" / "sub" / "one")
    assert run(model, tmp_path / "in", out=tmp_path / "in" / "two") == first
    assert run(model, f"{tmp_path}/in/**/*.*", out=tmp_path / "three") == first
    table = tmp_path / "in" / "two" / "predictions.csv"
    table.rename(table.with_name("predictions.csv.part"))  # as a kill leaves it
    assert run(model, tmp_path / "in", out=tmp_path / "in" / "two") == first
    (row,) = run(model, tmp_path / "in" / "two" / "masks" / "a.png.png", out=tmp_path / "four")  # named itself
    assert row["file"] == "a.png.png"
    save(tmp_path / "in" / "own" / "d.png")
    (tmp_path / "in" / "own" / "predictions.csv").write_text("image,truth\n")  # somebody's own
    assert len(run(model, tmp_path / "in", out=tmp_path / "five")) == len(first) + 1


def test_a_shell_may_expand_a_star_to_folders_of_earlier_runs(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "few" / "x.png")
    (tmp_path / "few" / "b").mkdir()
    for _ in range(2):
        (row,) = run(model, *sorted((tmp_path / "few").iterdir()), out=tmp_path / "few" / "b")
        assert row["file"] == "x.png"
    (row,) = run(model, *sorted((tmp_path / "few").iterdir()), out=tmp_path / "few" / "c")
    assert row["file"] == "x.png"


def test_a_folder_whose_name_looks_like_a_pattern_is_itself(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "b [2024]" / "x.png")
    save(tmp_path / "b 2" / "y.png")
    (row,) = run(model, f"{tmp_path}/b [2024]/*.png", out=tmp_path / "out")
    assert row["file"] == "x.png"
    (row,) = run(model, f"{tmp_path}/b [0-9]/*.png", out=tmp_path / "out")
    assert row["file"] == "b 2/y.png"


def test_names_that_cannot_both_be_and_long_ones_are_told_as_a_rule(model: Path, tmp_path: Path) -> None:
    long = "n" * 247 + ".png"  # whose mask has 255 bytes
    for name in ("c.jpg", "c.jpg.png/y.jpg", long, "m" * 250 + ".png"):
        save(tmp_path / "in" / name)
    found = {row["file"][:5]: row["error"] for row in run(model, tmp_path / "in", out=tmp_path / "out")}
    assert len(found) == 4 - 1
    assert found["nnnnn"] == ""
    assert found["mmmmm"] == "names of what is written must have at most 255 bytes, found 258; rename the image"
    both = [row["error"] for row in rows(tmp_path / "out") if row["file"].startswith("c.jpg")]
    assert sorted(bool(error) for error in both) == [False, True]
    assert "must not lie where the result of another image does" in max(both)
    assert mask_of(tmp_path / "out", long).any()
    assert not list((tmp_path / "out").rglob("*.part"))


def test_an_earlier_table_stays_until_there_is_another(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    first = run(model, tmp_path / "in", out=tmp_path / "out")
    table = tmp_path / "out" / "predictions.csv"
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="must not be written by two runs at once"):
        run(model, tmp_path / "in", out=tmp_path / "out")
    os.close(lock)
    with _table(tmp_path / "out", None, []):
        assert rows(tmp_path / "out") == first
    assert rows(tmp_path / "out") == first
    with _table(tmp_path / "out", None, []) as lines:
        lines.add({"file": "b.png"})
        assert rows(tmp_path / "out") == first
    assert [row["file"] for row in rows(tmp_path / "out")] == ["b.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["masks", "overlays", table.name]


def test_a_full_disk_is_one_message_and_what_is_done_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    rng = np.random.default_rng(0)
    save(tmp_path / "in" / "b.png", rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        assert main(["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["file"] for row in rows(tmp_path / "out")] == ["a.png"]
    said = capsys.readouterr().err
    assert "tuner predict: the disk is full (" in said
    assert "the same command begins anew; 1 of 2 images are in" in said


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(model: Path, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    file = save(tmp_path / "photo.png", exif=exif)
    (row,) = run(model, file, out=tmp_path / "out")
    turned = orientation > 4
    assert (row["height_px"], row["width_px"]) == (("128", "64") if turned else ("64", "128"))
    assert mask_of(tmp_path / "out", "photo.png").shape == ((128, 64) if turned else (64, 128))
    upright = np.asarray(Image.open(file).transpose(_TURNS[orientation]) if orientation > 1 else Image.open(file))
    assert np.array_equal(photos.read(file)[0], upright)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _grey_16(path: Path) -> None:
    cv2.imwrite(str(path), surface()[..., 0].astype(np.uint16) * 256 + 17)


def _colour_16(path: Path) -> None:
    cv2.imwrite(str(path), surface()[..., ::-1].astype(np.uint16) * 256)


@pytest.mark.parametrize(
    ("name", "write", "is_grey", "error"),
    [
        ("grey.png", lambda path: save(path, surface()[..., 0]), True, 0),
        ("grey16.png", _grey_16, True, 0),
        ("grey16.tif", _grey_16, True, 0),
        ("colour16.png", _colour_16, False, 0),
        ("colour16.tif", _colour_16, False, 1),
        ("alpha.png", lambda path: save(path, np.dstack([surface(), np.zeros((HEIGHT, WIDTH), np.uint8)])), False, 0),
        ("palette.png", lambda path: Image.fromarray(surface()).quantize(256).save(path), False, 20),
        ("cmyk.jpg", lambda path: Image.fromarray(surface()).convert("CMYK").save(path, quality=100), False, 8),
        ("cmyk.tif", lambda path: Image.fromarray(surface()).convert("CMYK").save(path), False, 1),
    ],
)
def test_every_kind_of_file_is_read_as_training_reads_it(
    tmp_path: Path, name: str, write: Callable[[Path], None], is_grey: bool, error: int
) -> None:
    write(tmp_path / name)
    image, note = photos.read(tmp_path / name)
    wanted = np.repeat(surface()[..., :1], 3, axis=2) if is_grey else surface()
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image.astype(int) - wanted).max() <= error
    assert np.array_equal(image, decode_image(tmp_path / name))
    assert note == ""


def test_16_bit_from_a_12_bit_camera_is_read_as_in_training_and_that_is_said(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "camera.png"
    cv2.imwrite(str(file), surface()[..., 0].astype(np.uint16) * 16)
    (row,) = run(model, file, out=tmp_path / "out")
    assert row["note"].startswith(f"16 bit whose largest value is {16 * int(surface()[..., 0].max())} of 65535")
    assert row["error"] == ""
    save(tmp_path / "night.png", np.full((HEIGHT, WIDTH, 3), 3, np.uint8))
    assert photos.read(tmp_path / "night.png")[1] == ""


def test_of_several_pages_the_first_is_read_and_that_is_said(tmp_path: Path) -> None:
    pages = [Image.fromarray(surface(seed=k)) for k in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    image, note = photos.read(tmp_path / "pages.tif")
    assert np.array_equal(image, surface())
    assert note == "3 pages, of which the first was read"


def test_broken_files_are_told_counted_and_do_not_stop_the_rest(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for k, suffix in enumerate(("jpg", "png", "tif", "bmp", "webp")):
        file = save(tmp_path / "in" / f"{k}-cut.{suffix}")
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    (tmp_path / "in" / "5-empty.jpg").touch()
    (tmp_path / "in" / "6-text.png").write_text("no image")
    huge = tmp_path / "in" / "7-huge.png"
    Image.new("1", (20_000, 20_000)).save(huge)
    cv2.imwrite(str(tmp_path / "in" / "8-float.tif"), np.zeros((HEIGHT, WIDTH), np.float32))
    save(tmp_path / "in" / "9-good.png")
    assert main(["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    found = rows(tmp_path / "out")
    assert [row["file"] for row in found if not row["error"]] == ["9-good.png"]
    assert len(found) == 10
    assert [row["score"] for row in found[:9]] == [""] * 9
    said = capfd.readouterr()
    for row in found[:9]:
        assert f"{row['file']}: {row['error']}" in said.err
    assert len(said.err.splitlines()) == 9  # and nothing of OpenCV's own
    assert "must have at most 150,000,000 px" in found[7]["error"]
    assert said.out.endswith("10 images, " + f"{found[9]['defect']} with a defect, 9 failed\n")


EVIL = (
    '=cmd|"x"!A1.png', "+1.png", "-x.png", "@sum.png", "\tx.png", "a'b\"c<d>&e.png", "two\nlines.png", "white space.png",
    "日本語 ß.png", "[bold]x.png", "\x1b[31mred.png", "a,b;c.png", "%41.png", " =1.png", "\n=1.png", "\uff1d1+1.png", "\uff20x.png",
    "\u200b=1.png", "\xa0=1.png", "a\r=1.png", "\r=1.png",
)  # fmt: skip


def test_no_name_does_harm(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in EVIL:
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "\x1b[31mbroken\n.png").touch()
    assert main(["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    found = {os.path.normpath(row["file"]) for row in rows(tmp_path / "out") if not row["error"]}
    assert found == set(EVIL)
    assert not [
        row for row in rows(tmp_path / "out") if row["file"][0] in "=+-@\uff1d\uff0b\uff0d\uff20\t\r\n \u200b\xa0"
    ]
    assert main(["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1  # known as ours
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {f"{name}.png" for name in EVIL}
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert len(said.splitlines()) == 2
    assert cell("a/=x.png") == "a/=x.png"


def test_bytes_that_are_no_text_make_no_table_that_is_none(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "good.png").rename(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.png"))
    (row,) = run(model, tmp_path / "in", out=tmp_path / "out")
    assert (row["file"], row["error"]) == ("\\udcff.png", "")


@pytest.mark.parametrize(
    ("images", "out", "message"),
    [
        (["nothing.jpg"], "out", "no such file or folder, and no pattern"),
        (["empty"], "out", "no image in there; images are files *.jpg, "),
        (["in/*.gif"], "out", "no image in there"),
        (["in"], "in", "--out must not hold the images"),
        (["in/a.png"], ".", "--out must not hold the images"),
        (["link"], "in", "--out must not hold the images"),
        (["in"], "full", "found full with masks in it"),
        (["in"], "file", "--out must be a folder, found the file file"),
        (["in"], "file/out", "but {tmp_path}/file is no folder; take another name"),
        ([""], "out", "IMAGE must be a file, a folder or a pattern, found ''; the current folder is ."),
        (["in", "nothing.jpg"], "out", "no such file or folder, and no pattern"),
    ],
)
def test_bad_input_ends_with_one_message_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    images: list[str], out: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "masks").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("in")
    before = sorted(tmp_path.rglob("*"))
    assert main(["predict", str(model), *images, "--out", out]) == 2
    assert message.format(tmp_path=tmp_path) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_model_is_bad_input(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(save(tmp_path / "a.png"))
    (tmp_path / "x.onnx").write_bytes(b"none")
    (tmp_path / "run").mkdir()
    (tmp_path / "folder.onnx").mkdir()
    for words, message in (
        ("run", "which has no best/model.safetensors; `tuner finals RUN` leaves best/"),
        ("x.onnx", "must be a model that `tuner export` made"),
        ("y.onnx", "no such file; `tuner export RUN --format onnx` makes one"),
        ("a.png", "which is none of them"),
        ("folder.onnx", "which has no best/model.safetensors"),
    ):
        assert main(["predict", str(tmp_path / words), file, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    for value in ("0", "1e300", "nan", "-1", "x"):
        with pytest.raises(SystemExit) as stopped:
            main(["predict", str(model), file, "--out", str(tmp_path / "out"), "--mm-per-px", value])
        assert stopped.value.code == 2
        assert "must be a number of mm from 0.000001 to 1000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_keeps_what_is_done_and_says_so(model: Path, tmp_path: Path) -> None:
    count = 2000  # more than any machine answers before the signal comes
    first = save(tmp_path / "in" / "0000.png", surface(200, 300))
    for k in range(1, count):
        (tmp_path / "in" / f"{k:04}.png").hardlink_to(first)
    (tmp_path / "in" / "0002.png").unlink()
    (tmp_path / "in" / "0002.png").write_bytes(b"broken")  # which is told at once
    words = [sys.executable, "-m", "tuner", "predict", model, tmp_path / "in", "--out", tmp_path / "out"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("0002.png: cannot be decoded")
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130
    done = rows(tmp_path / "out")
    assert 3 <= len(done) < count
    table = tmp_path / "out" / "predictions.csv"
    assert said == (
        f"tuner predict: stopped at once; {len(done)} of {count} images are in {table}; the same command begins anew\n"
    )
    for row in done:
        assert row["error"] or mask_of(tmp_path / "out", row["file"]).shape == (200, 300)


def test_progress_is_shown_on_a_terminal_alone(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "[red]x.png", surface(200, 300))
    (tmp_path / "in" / "y.png").touch()
    shown = io.StringIO()
    predict(
        str(model),
        [str(tmp_path / "in")],
        str(tmp_path / "out"),
        None,
        Console(file=shown, force_terminal=True, width=120),
    )
    assert "[red]x.png, tile" in shown.getvalue()
    assert "y.png: cannot be decoded" in shown.getvalue()


def test_an_onnx_file_says_what_it_was_trained_on(onnx_file: Path) -> None:
    assert deployed.load(onnx_file).sizes == tiles.Sizes((64, 128), (64, 128), (64, 128), (80, 160))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("thresholds.json", {"segmentation_logit": float("nan")}, "segmentation_logit must be a finite number"),
        ("thresholds.json", {"segmentation_logit": "-1"}, "segmentation_logit must be a finite number"),
        ("thresholds.json", {"decision_logit": float("nan")}, "decision_logit must be a finite number or null"),
        ("thresholds.json", {"lower_threshold": -1}, "lower_threshold must be a number above 0"),
        ("thresholds.json", {"blacken": "no"}, "blacken must be true or false, found 'no'"),
        ("images.json", {"height": 0}, "height of images must be a whole number above 0, found 0"),
        ("images.json", {"height": "abc"}, "height of images must be a whole number above 0, found 'abc'"),
        ("images.json", "[1]", "images.json must hold a JSON object, found [1]"),
        ("images.json", '{"height": 448}', "width of images must be"),
        ("images.json", "[" * 100_000, "images.json must hold JSON"),
        ("images.json", b"\xff\xfe{", "images.json must hold JSON"),
    ],
)
def test_a_broken_model_folder_is_bad_input(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, values: Any, message: str
) -> None:
    best = Path(shutil.copytree(model, tmp_path / "best"))
    if isinstance(values, dict):
        values = json.dumps(json.loads((best / name).read_text()) | values)
    (best / name).write_bytes(values if isinstance(values, bytes) else values.encode())
    file = save(tmp_path / "a.png")
    assert main(["predict", str(best), str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(best) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("about", "outputs", "message"),
    [
        (
            None,
            tiles.Answers._fields,
            "must be a model that `tuner export` made, from image to probability, mask, score",
        ),
        ("{}", ("mask",), "found one from image to mask"),
        ("{}", tiles.Answers._fields, "must say the network's input as height and width, px, found None"),
        ("[]", tiles.Answers._fields, "must hold a JSON object, found []"),
        ('{"input": [1]}', tiles.Answers._fields, "found [1]; make it again"),
        ('{"input": {"height": 64}}', tiles.Answers._fields, "found {'height': 64}"),
        ('{"input": {"height": 64, "width": 127}}', tiles.Answers._fields, "must say the network's input"),
        (
            '{"input": {"height": 64, "width": 128}, "images": [1]}',
            tiles.Answers._fields,
            "must be an object, found [1]",
        ),
    ],
)
def test_an_onnx_file_of_somebody_else_is_bad_input(
    tmp_path: Path, about: str | None, outputs: tuple[str, ...], message: str
) -> None:
    nodes = [onnx.helper.make_node("Identity", ["image"], [name]) for name in outputs]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in ("image", *outputs)]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    if about is not None:
        onnx.helper.set_model_props(made, {deployed.ONNX_KEY: about})
    file = tmp_path / "model.onnx"
    file.write_bytes(made.SerializeToString())
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        deployed.load(file)
    assert str(file) in str(refused.value)

"""What leaves a run: real files, read by a real onnxruntime and by processes that know nothing of this project."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml

from model import checkpoint, export
from model.config import RunConfig
from model.export import METADATA, Deployable
from model.network import build
from model.thresholds import Thresholds
from model.tiles import Answers
from tests.tuner.conftest import small_space
from tests.tuner.report.conftest import EVIL, write_run
from tuner import cli
from tuner.export import export_run
from tuner.records import SearchFailed
from tuner.run import Run

pytestmark = pytest.mark.timeout(300)

SIDES = 64, 128
SIZES = {"height": 480, "width": 640, "largest_height": 960, "largest_width": 1280}


def write_exportable(directory: Path) -> Run:
    """A made run whose winner is a real network, with the answers that it gives."""
    write_run(directory, tests=6)
    selection = json.loads((directory / "evaluation" / "selection.json").read_text())
    winner = selection["trials"][selection["winner"]]
    config = RunConfig(width=0.05, input_height=SIDES[0], input_width=SIDES[1], precision="float32")
    winner["config"] = config.to_dict()
    (directory / "evaluation" / "selection.json").write_text(json.dumps(selection))
    torch.manual_seed(0)
    network = build(config.architecture, width=config.width)
    thresholds = Thresholds.from_dict(winner["thresholds"])
    best = directory / "best"
    checkpoint.save_model(best, network.state_dict(), config, thresholds, winner["epoch"])
    (best / "images.json").write_text(json.dumps(SIZES))
    images = np.random.default_rng(0).integers(0, 256, (3, *SIDES, 3), np.uint8)
    module = Deployable(network, thresholds)
    probability, mask, _, _ = answer(module, images)
    names = np.array(["a.png", EVIL, "c\n# d.png"])
    with torch.inference_mode():
        decisions = module.logits(torch.from_numpy(images))[0].numpy()
    for role in ("winner", "baseline"):
        judge(directory / "evaluation" / f"{role}-test.npz", names, decisions)
    np.savez(
        directory / "evaluation" / "examples.npz",
        names=names, image=images, truth=mask > 0, probability=probability.astype(np.float16), mask=mask > 0,
    )  # fmt: skip
    return Run(directory=directory, space=small_space(), data="/data")


def judge(path: Path, names: np.ndarray, decisions: np.ndarray) -> None:
    """Lets a split hold images of these names, with these decisions."""
    with np.load(path) as found:
        arrays = dict(found)
    arrays["names"] = np.array(["a.png", "c\n# d.png", *arrays["names"][2:]])  # the last one is EVIL
    for name, decision in zip(names, decisions, strict=True):
        (row,) = np.flatnonzero(arrays["names"] == name)
        arrays["decision_logits"][row] = decision
    np.savez(path, **arrays)


def answer(module: Deployable, images: np.ndarray) -> Answers:
    with torch.inference_mode():
        return Answers(*(one.numpy() for one in module(torch.from_numpy(images))))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with both model files and the zip. Its folder has a name that no rule for names would let through."""
    run = write_exportable(tmp_path_factory.mktemp("export") / "<b> 'ü' \"x\"\n.. ")
    for what in ("torch", "onnx", "report"):
        export_run(run, what)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_exportable(tmp_path / "run")


def zip_of(run: Run) -> Path:
    (found,) = run.directory.glob("*.zip")
    return found


def python(code: str, cwd: Path, *arguments: str) -> str:
    """What a fresh process says that cannot import this project."""
    command = [sys.executable, "-I", "-c", code, *arguments]  # -I: neither the current folder nor PYTHONPATH
    blocked = "import sys\nfor name in ('model', 'tuner'): sys.modules[name] = None\n"
    command[3] = blocked + code
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
def test_onnx_without_torch_answers_as_the_network(exported: Run, tmp_path: Path) -> None:
    network, _, thresholds = checkpoint.load_model(exported.directory / "best", torch.device("cpu"))
    images = np.random.default_rng(1).integers(0, 256, (5, 128, 192, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    code = """
sys.modules["torch"] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
assert [one.name for one in session.get_inputs()] == ["image"]
names = [one.name for one in session.get_outputs()]
np.savez("answers.npz", **dict(zip(names, session.run(None, {"image": np.load("images.npy")}))))
"""
    python(code, tmp_path, str(exported.directory / "best" / "model.onnx"))
    wanted = answer(Deployable(network, thresholds), images)
    with np.load(tmp_path / "answers.npz") as found:
        assert sorted(found) == sorted(Answers._fields)
        for name, one in wanted._asdict().items():
            assert (found[name].dtype, found[name].shape) == (one.dtype, one.shape)
        np.testing.assert_allclose(found["probability"], wanted.probability, atol=1e-5)
        np.testing.assert_allclose(found["score"], wanted.score, atol=1e-5)
        np.testing.assert_array_equal(found["defect"], wanted.defect)
        assert (found["mask"] != wanted.mask).sum() <= 2  # noise under a fresh network: some pixel lies on the edge


@pytest.mark.slow
def test_the_torch_file_answers_without_this_project(exported: Run, tmp_path: Path) -> None:
    network, _, thresholds = checkpoint.load_model(exported.directory / "best", torch.device("cpu"))
    images = np.random.default_rng(1).integers(0, 256, (2, 72, 192, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    code = """
import json, numpy as np, torch
files = {"segdec_tuner": ""}
model = torch.export.load(sys.argv[1], extra_files=files).module()
with torch.no_grad():
    answers = [one.numpy() for one in model(torch.from_numpy(np.load("images.npy")))]
np.savez("answers.npz", *answers)
print(json.loads(files["segdec_tuner"])["architecture"])
"""
    assert python(code, tmp_path, str(exported.directory / "best" / "model.pt2")) == "segdecnet_decoder\n"
    with np.load(tmp_path / "answers.npz") as found:
        for k, one in enumerate(answer(Deployable(network, thresholds), images)):
            np.testing.assert_array_equal(found[f"arr_{k}"], one)


@pytest.mark.slow
def test_a_file_says_what_it_is(exported: Run) -> None:
    best = exported.directory / "best"
    model = onnx.load(best / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    about = json.loads({prop.key: prop.value for prop in model.metadata_props}[METADATA])
    assert about == {
        "schema": 1,
        "input": {"height": 64, "width": 128},
        "images": SIZES,
        "thresholds": json.loads((best / "thresholds.json").read_text()),
        "architecture": "segdecnet_decoder",
        "width": 0.05,
        "run": exported.name,
        "trial": "abc123-0001",
    }
    shapes = [[d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in model.graph.input]
    assert shapes == [["N", "H", "W", 3]]
    # Nothing of the machine that exported.
    for data in ((best / "model.onnx").read_bytes(), *_contents(best / "model.pt2")):
        assert not [
            word for word in (b"site-packages", b'.py"', str(Path(__file__).parents[2]).encode()) if word in data
        ]


def _contents(archive: Path) -> list[bytes]:
    with zipfile.ZipFile(archive) as file:
        return [file.read(name) for name in file.namelist()]


@pytest.mark.slow
def test_the_card_says_how_to_use_the_file_and_that_works(exported: Run, tmp_path: Path) -> None:
    best = exported.directory / "best"
    card = (best / "README.md").read_text()
    code = re.search(r"without torch:\n\n((?:    .*\n|\n)+)", card)[1].replace("\n    ", "\n").removeprefix("    ")
    for name in ("model.onnx", "model.pt2"):
        shutil.copy(best / name, tmp_path)
    import cv2

    cv2.imwrite(str(tmp_path / "photo.jpg"), np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    assert re.fullmatch(r"(defect|sound) 0\.\d+\n", python('sys.modules["torch"] = None\n' + code, tmp_path))
    assert cv2.imread(str(tmp_path / "mask.png"), 0).shape == SIDES
    more = re.search(r"H 64 to 120:\n\n((?:    .*\n|\n)+)", card)[1].replace("\n    ", "\n").removeprefix("    ")
    python(code + "\n" + more, tmp_path)


@pytest.mark.slow
def test_the_card_says_what_was_compared(exported: Run) -> None:
    card = (exported.directory / "best" / "README.md").read_text()
    assert "480 x 640 px (median, height x width), at most 960 x 1280. All" in card
    assert "The images of validation, which come from where those of training do, had" in card
    assert re.search(r"\| model\.onnx \| onnxruntime \S+ \| 3 \| \d\.\de-\d\d \|", card)
    assert re.search(r"\| model\.pt2 \| torch \S+ \| 3 \| 0\.0e\+00 \|", card)


@pytest.mark.slow
def test_a_file_that_was_replaced_is_no_longer_vouched_for(exported: Run, tmp_path: Path) -> None:
    shutil.copytree(exported.directory, tmp_path / "run")
    run = Run(directory=tmp_path / "run", space=exported.space, data="/data")
    (run.directory / "best" / "model.onnx").write_bytes(b"another")
    export_run(run, "torch")
    card = (run.directory / "best" / "README.md").read_text()
    assert "| model.pt2 |" in card
    assert "model.onnx" not in card


IMPORTANCE = {"epoch": 5, "trials": 8, "best": 1, "parameters": [], "records": 8}


def copy_of(run: Run, directory: Path) -> Run:
    shutil.copytree(run.directory, directory)
    return Run(directory=directory, space=run.space, data="/data")


def change_weights(run: Run, tensor: str, by: float) -> None:
    path = run.directory / "best" / "model.safetensors"
    weights = checkpoint.load_file(path)
    weights[tensor] += by
    checkpoint.save_file(weights, path)


@pytest.mark.slow
def test_a_zip_never_holds_two_networks(exported: Run, tmp_path: Path, monkeypatch) -> None:
    """The weights beside an exported file are others, near enough to what was judged."""
    run = copy_of(exported, tmp_path / "run")
    change_weights(run, "segment.norm.bias", 1e-3)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with zipfile.ZipFile(export_run(run, "report")) as archive:
        names = archive.namelist()
        assert not [name for name in names if name.endswith((".onnx", ".pt2"))]
        assert json.loads(archive.read("run-report/best/exports.json")) == {}
        assert "Nothing is exported yet" in archive.read("run-report/best/README.md").decode()
        assert "There is no model.onnx" in archive.read("run-report/README.md").decode()


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "by"), [("segment.norm.bias", 4.0), ("decision.linear.bias", 100.0)])
def test_a_zip_of_a_network_that_was_not_judged_is_refused(exported: Run, tmp_path: Path, tensor, by) -> None:
    run = copy_of(exported, tmp_path / "run")
    change_weights(run, tensor, by)
    with pytest.raises(SearchFailed, match="must answer as the one that was judged"):
        export_run(run, "report")


@pytest.mark.slow
def test_a_zip_is_made_of_what_there_is_now(exported: Run, tmp_path: Path) -> None:
    run = copy_of(exported, tmp_path / "run")
    for stale in ("report/index.html", "best/README.md"):
        (run.directory / stale).write_text("an earlier one")
    (run.directory / "importance.json").write_text(json.dumps(IMPORTANCE))
    with zipfile.ZipFile(export_run(run, "report")) as archive:
        for stale in ("report/index.html", "best/README.md"):
            assert archive.read(f"run-report/{stale}") != b"an earlier one"
        assert json.loads(archive.read("run-report/importance.json")) == IMPORTANCE
        assert {"run-report/best/model.onnx", "run-report/best/model.pt2"} <= {*archive.namelist()}


@pytest.mark.slow
def test_after_a_mismatch_no_earlier_file_is_left(exported: Run, tmp_path: Path) -> None:
    run = copy_of(exported, tmp_path / "run")
    change_weights(run, "segment.norm.bias", 4.0)
    with pytest.raises(SearchFailed, match="must answer as the one that was judged"):
        export_run(run, "torch")
    best = run.directory / "best"
    assert not (best / "model.pt2").exists()
    assert not (best / "README.md").exists()
    assert json.loads((best / "exports.json").read_text()) == {}  # model.onnx is of other weights than these


def test_an_example_that_was_not_judged_is_refused(run: Run) -> None:
    path = run.directory / "evaluation" / "examples.npz"
    with np.load(path) as found:
        arrays = dict(found)
    arrays["names"][0] = "z.png"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"must be in winner-test\.npz, found no 'z\.png'; restore"):
        export_run(run, "report")


@pytest.mark.slow
def test_the_zip_holds_what_is_to_be_handed_over(exported: Run, tmp_path: Path) -> None:
    path = zip_of(exported)
    assert path.name == "b_ü_x-report.zip"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    members = {name.removeprefix(folder.name + "/") for name in names}
    assert {"README.md", "space.yaml", "run.json", "records.jsonl", "best/model.onnx", "best/README.md",
            "best/model.safetensors", "best/config.json", "best/thresholds.json", "best/images.json",
            "report/index.html", "report/metrics.json", "evaluation/selection.json"} <= members  # fmt: skip
    assert not [name for name in names if re.search(r"^/|\\|(^|/)\.|\n|wandb|study", name)]
    assert yaml.safe_load((folder / "space.yaml").read_text()) == exported.info["space"]
    first = path.read_bytes()
    export_run(exported, "report")
    assert path.read_bytes() == first
    # As a run it gives the same again.
    again = Run(directory=folder, space=exported.space, data="/data")
    (folder / "best" / "model.onnx").unlink()
    assert export_run(again, "report").is_file()
    assert (folder / "best" / "model.onnx").is_file()


def is_tampered(function: Any, change: Any) -> Any:
    """An export whose file is not the network."""

    def to_onnx(*arguments: Any) -> bytes:
        model = onnx.load_model_from_string(function(*arguments))
        change(model.graph)
        return model.SerializeToString()

    return to_onnx


def nudge_weight(graph: Any) -> None:
    kernel = next(one for one in graph.initializer if one.name == "network.trunk1.0.conv.weight")
    values = onnx.numpy_helper.to_array(kernel) * np.float32(1.02)
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_left(run: Run, monkeypatch) -> None:
    monkeypatch.setattr(export, "to_onnx", is_tampered(export.to_onnx, nudge_weight))
    with pytest.raises(SearchFailed, match=r"must answer as the network .* for image 'a\.png'; no file is written"):
        export_run(run, "onnx")
    assert sorted(path.name for path in (run.directory / "best").iterdir()) == [
        "config.json", "images.json", "model.safetensors", "thresholds.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_weights_that_were_not_judged_are_not_exported(run: Run) -> None:
    path = run.directory / "best" / "model.safetensors"
    weights = checkpoint.load_file(path)
    weights["segment.norm.bias"] += 4
    checkpoint.save_file(weights, path)
    with pytest.raises(SearchFailed, match="must answer as the one that was judged"):
        export_run(run, "torch")
    assert not (run.directory / "best" / "model.pt2").exists()


def test_a_run_without_a_winner_is_refused(run: Run) -> None:
    (run.directory / "evaluation" / "selection.json").unlink()
    for what in ("onnx", "torch", "report"):
        with pytest.raises(ValueError, match="its winner is not evaluated yet; run `tuner finals"):
            export_run(run, what)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda best: shutil.rmtree(best), "must hold model.safetensors, config.json and thresholds.json"),
        (lambda best: (best / "model.safetensors").write_bytes(b"cut"), "must hold model.safetensors"),
        (lambda best: (best / "config.json").write_text("{"), "must hold model.safetensors"),
        (lambda best: (best / "thresholds.json").write_text("[]"), "must hold model.safetensors"),
        (
            lambda best: (best / "config.json").write_text(
                (best / "config.json").read_text().replace('"width": 0.05', '"width": 1.0')
            ),
            r"of one model \(Error.* for SegDecNet: size mismatch for \S+: [^\n]*\)$",
        ),
        (
            lambda best: (best / "thresholds.json").write_text(
                (best / "thresholds.json").read_text().replace('"segmentation_logit": -0.6', '"segmentation_logit": -0.7')
            ),
            "must hold the network that was judged",
        ),
    ],
)  # fmt: skip
def test_a_model_folder_that_is_broken_is_refused(run: Run, spoil: Any, message: str) -> None:
    spoil(run.directory / "best")
    for what in ("torch", "report"):
        with pytest.raises(ValueError, match=message):
            export_run(run, what)


def test_without_the_extra_it_says_what_to_install(run: Run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"found no onnxscript; run: pip install 'segdec-tuner\[export\]'"):
        export_run(run, "onnx")
    export_run(run, "report")
    with zipfile.ZipFile(zip_of(run)) as archive:
        assert "run-report/best/model.onnx" not in archive.namelist()
        assert "There is no model.onnx" in archive.read("run-report/README.md").decode()


def test_links_out_of_the_run_are_not_packed(run: Run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "secret").write_text("x")
    (run.directory / "best" / "secret").symlink_to(tmp_path / "secret")
    with zipfile.ZipFile(export_run(run, "report")) as archive:
        assert not [name for name in archive.namelist() if "secret" in name]


def test_the_command_line_refuses_what_is_no_search(tmp_path: Path, capsys) -> None:
    assert cli.main(["export", str(tmp_path), "--format", "onnx"]) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", str(tmp_path), "--format", "pickle"])

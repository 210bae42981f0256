"""The page, its pictures, and what happens to the folder."""

import csv
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.tuner.report.conftest import EXAMPLES
from tuner import records, report
from tuner.report import architecture, examples, words
from tuner.report.render import escape


class Page(HTMLParser):
    """Collects tags, the addresses that they load, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(usual) -> Page:
    return Page(usual.report / "index.html")


def test_page_loads_nothing_from_outside(page) -> None:
    assert page.loaded
    inside = ("data:image/png;base64,", "data:image/webp;base64,", "#")
    assert all(address.startswith(inside) for address in page.loaded)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import", page.text)


def test_links_of_the_page_lead_somewhere(usual, page) -> None:
    text = (usual.report / "index.html").read_text()
    for address in page.loaded:
        if address.startswith("#"):
            assert f'id="{address[1:]}"' in text


def test_names_are_escaped(usual, page) -> None:
    """Run, data set, source and image carry markup; it must arrive as text."""
    assert "cracks <i>" in page.text
    assert "crack <500>" in page.text
    assert not {"b", "i"} & set(page.tags)
    assert "<script" not in (usual.report / "report.md").read_text()
    assert escape("a|b <x> *y* _z_ learning_rate") == r"a\|b &lt;x&gt; \*y\* \_z\_ learning_rate"


def test_markdown_shows_every_figure(usual) -> None:
    linked = re.findall(r"!\[.*?\]\((.*?)\)", (usual.report / "report.md").read_text())
    made = [path for folder in ("figures", "dices") for path in (usual.report / folder).iterdir()]
    assert set(linked) == {f"{path.parent.name}/{path.name}" for path in made}
    for name in linked:
        assert cv2.imread(str(usual.report / name)) is not None


def test_page_and_markdown_have_the_same_sections(usual, page) -> None:
    titles = re.findall(r"^## (.*)$", (usual.report / "report.md").read_text(), re.MULTILINE)
    assert len(titles) == 10
    assert all(title in page.text for title in titles)


@pytest.mark.parametrize(
    "name", ["confusion", "roc", "precision-recall", "winner-and-baseline", "slice-learning_rate", "loss-decision"]
)
def test_figures_that_need_more_are_left_out(usual, bare, name) -> None:
    assert (usual.report / "figures" / f"{name}.png").is_file()
    assert (bare.report / "figures" / f"{name}.png").is_file() == (name == "slice-learning_rate")


def test_reasons_of_failures_are_told(page) -> None:
    assert "tried to allocate <2 GiB>" in page.text
    assert "loss is not finite in epoch 2" in page.text


def test_examples_run_from_the_worst_to_the_best(usual) -> None:
    names = sorted(path.name for path in (usual.report / "dices").iterdir())
    assert len(names) in (EXAMPLES - 1, EXAMPLES)
    assert all(re.fullmatch(r"\d{3}_[01]\.\d{3}_[A-Za-z0-9._-]+\.png", name) for name in names)
    values = [float(name.split("_")[1]) for name in names]
    assert values == sorted(values)
    assert any("script" in name for name in names)


def test_overlap_colours_hits_misses_and_false_alarms() -> None:
    truth, mask = np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0]], bool)
    image = np.full((1, 4, 3), 100, np.uint8)
    colours = examples.overlap(image, truth, mask)[0].tolist()
    assert colours == [[0, 158, 115], [230, 159, 0], [204, 121, 167], [50, 50, 50]]


def test_thin_cracks_keep_their_colour_when_shrunk() -> None:
    truth = np.zeros((8, 8), bool)
    truth[:, 3] = True
    shrunk = examples.overlap(np.zeros((4, 4, 3), np.uint8), truth, ~truth & False)
    assert (shrunk[:, 1] == [230, 159, 0]).all()


def test_file_names_are_plain() -> None:
    assert words.file_name("wall/ünder 'x'.PNG") == "wall_under_x"
    assert words.file_name("裂缝.png") == "image"
    assert len(words.file_name("a" * 500)) == 60


def test_rows_of_the_network_hold_what_belongs_together(usual) -> None:
    stages = json.loads((usual.directory / "evaluation" / "architecture.json").read_text())["used"]
    rows = dict(zip(range(len(stages)), architecture.row_sizes(stages), strict=True))
    operations = {(stages[k]["operation"], row) for k, row in rows.items()}
    assert ("squeeze-excitation gate", (112, 112)) in operations
    assert ("up-convolution 5x5, stride 2", (448, 448)) in operations
    assert ("linear", (1, 1)) in operations


def test_writing_again_changes_nothing(bare, tmp_path) -> None:
    before = {path.name: path.read_bytes() for path in bare.report.iterdir() if path.is_file()}
    again = report.write(bare.directory, tmp_path / "elsewhere").parent
    assert {path.name: path.read_bytes() for path in again.iterdir() if path.is_file()} == before
    (again / "notes.docx").write_text("somebody's")
    (again / "figures/stale.png").write_text("of an earlier report")
    report.write(bare.directory, again)
    assert (again / "notes.docx").read_text() == "somebody's"
    assert not (again / "figures/stale.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_report_that_a_kill_has_hidden_comes_back(bare, tmp_path) -> None:
    """Killed between the two renames: the new report is not there yet, and the old one not any more."""
    out = report.write(bare.directory, tmp_path / "out").parent
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = int(done.stdout)
    (out / "notes.txt").write_text("mine")
    out.rename(tmp_path / f".out.{dead}.old")
    (tmp_path / f".out.{dead}.new").mkdir()
    (tmp_path / f".out.{os.getpid()}.new").mkdir()  # of a process that is alive
    (tmp_path / f".out.{os.getpid()}.new").rmdir()
    report.write(bare.directory, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "notes.txt").read_text() == "mine"


def test_names_that_are_no_text_or_formulas_do_no_harm(make_run, tmp_path) -> None:
    directory, _ = make_run(trials=2, tests=6)
    names = [f"a\udcff{k}.jpg" for k in range(4)] + ["=1+1.jpg", "b\rc\nd.jpg"]
    for file in ("winner-test.npz", "baseline-test.npz", "examples.npz"):
        with np.load(directory / "evaluation" / file) as arrays:
            held = dict(arrays)
        np.savez(directory / "evaluation" / file, **held | {"names": np.array(names[: len(held["names"])])})
    folder = report.write(directory).parent
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        found = [row["name"] for row in csv.DictReader(file) if row["split"] == "test"]
    assert found == [*(f"a\\udcff{k}.jpg" for k in range(4)), "./=1+1.jpg", "b\rc\nd.jpg"]
    assert "a\\udcff0.jpg" in (folder / "index.html").read_text(encoding="utf-8")


def test_two_objectives_show_their_front(make_run) -> None:
    directory, _ = make_run(objectives=2, tests=6)
    folder = report.write(directory).parent
    text = (folder / "report.md").read_text()
    assert "The search had two objectives, Dice, all images and images with masks. The winner is the trial with" in text
    assert (folder / "figures/pareto-front.png").exists()
    found = json.loads((folder / "metrics.json").read_text())["front"]
    kept = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    assert found == records.front(kept, ["max", "min"])
    assert [point["values"][1] for point in found] == sorted(point["values"][1] for point in found)
    assert len(found) >= 2
    table = text[text.index("The Pareto front on validation") :]
    for point in found:
        assert point["trial"] in table


def test_one_objective_has_no_front(usual) -> None:
    assert usual.metrics["front"] is None
    assert not (usual.report / "figures/pareto-front.png").exists()
    assert "onstraint" not in (usual.report / "report.md").read_text()


def test_constraints_are_shown_and_met(make_run) -> None:
    directory, _ = make_run(tests=6, recall_beyond=[0.125, *[0.0] * 3, 0.25, *[0.0] * 3])
    text = (report.write(directory).parent / "report.md").read_text()
    assert "The baseline does not meet the constraints: recall 0.125 beyond its bound." in text
    assert "Constraints on validation; 2 of 4 completed trials meet all" in text
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["pixel recall at least 0.9", "met", "0.125 beyond"] in rows
    assert ["pixel F1 at least 0.1", "met", "met"] in rows
    top = [row for row in rows if len(row) > 6 and row[1].startswith("abc123")]
    completed = [row for row in top if row[2].startswith("completed")]
    assert [row[6] == "met" for row in completed] == [True, True, False, False]  # whatever their values
    assert "constraints not met" not in text


def test_a_winner_that_is_not_what_was_asked_for_is_stamped(make_run) -> None:
    directory, _ = make_run(tests=6, recall_beyond=[0.25, 0.125, *[0.5] * 6])
    text = (report.write(directory).parent / "report.md").read_text()
    assert text.startswith("# cracks &lt;i&gt;: the nearest to its constraints of 8 trials")
    assert (
        "No completed trial meets the constraints. Shown is the one that is least beyond them on validation: recall 0.125"
        in text
    )
    assert "test Dice, all images (constraints not met)" in text


def test_winner_that_is_a_repeat_borrows_its_curves(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    path = directory / "evaluation" / "selection.json"
    selection = json.loads(path.read_text())
    chosen = selection["trials"][selection["winner"]]
    selection["trials"]["repeat"] = chosen | {"config": chosen["config"] | {"seed": 7}}
    path.write_text(json.dumps(selection | {"winner": "repeat"}))
    text = (report.write(directory).parent / "report.md").read_text()
    assert "a repeat with another seed" in text
    assert "figures/validation-dice-iou.png" in text


def test_a_folder_that_is_no_run_is_told(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"is no run directory: run\.json is missing"):
        report.write(tmp_path)
    assert not (tmp_path / "report").exists()


def test_missing_files_of_the_baseline_are_named(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    (directory / "evaluation" / "baseline-test.npz").unlink()
    with pytest.raises(ValueError, match=r"has no evaluation/baseline-test\.npz"):
        report.write(directory)


def test_folder_that_is_no_report_is_left_alone(usual, tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is not a report"):
        report.write(usual.directory, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_torn_record_is_named(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    with (directory / "records.jsonl").open("a") as file:
        file.write('{"trial": ')
    with pytest.raises(ValueError, match=r"records\.jsonl, line 3 is not JSON"):
        report.write(directory)

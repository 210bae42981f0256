"""Several searches side by side."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from model.intervals import Ratio, difference_interval
from tuner import cli, report
from tuner.report import comparison, render


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def other(make_run) -> Path:
    """Another search on the same test images, whose winner is the worse network."""
    directory, _ = make_run()
    evaluation = directory / "evaluation"
    for split in ("validation", "test"):
        shutil.copy(evaluation / f"baseline-{split}.npz", evaluation / f"winner-{split}.npz")
    path = directory / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "other | run"}))
    return directory


def test_paired_differences_are_those_of_the_same_images(usual, other: Path) -> None:
    first, second = comparison.read([usual.directory, other])
    found = comparison.difference(second, first)
    assert found.images == len(usual.made["winner-test"].names)
    own = report.tables.differences(first.results)  # of winner and baseline, which is the other's winner
    for key, (value, interval) in found.figures.items():
        assert value == pytest.approx(-own[key].value, abs=1e-12)
        assert interval == pytest.approx((-own[key].interval[1], -own[key].interval[0]), abs=2e-3)  # other draws


def test_only_shared_images_count_wherever_they_stand(usual, other: Path, tmp_path: Path) -> None:
    """The other run has tested a part of the images, in another order."""
    part = tmp_path / "part"
    shutil.copytree(other, part)
    rows = np.random.default_rng(1).permutation(60)
    path = part / "evaluation/winner-test.npz"
    with np.load(path) as arrays:
        held = dict(arrays)
    lengths = np.diff(held["counts_offsets"])[rows]
    table = np.concatenate([np.arange(*held["counts_offsets"][row : row + 2]) for row in rows])
    for name, values in held.items():
        if name.startswith("counts_"):
            held[name] = values[table] if name != "counts_offsets" else np.cumsum([0, *lengths])
        elif name != "thresholds":
            held[name] = values[rows]
    np.savez(path, **held)
    evaluation = json.loads((part / "evaluation/selection.json").read_text())
    (part / "evaluation/selection.json").write_text(json.dumps(evaluation | {"baseline": None}))

    first, second = comparison.read([usual.directory, part])
    found = comparison.difference(second, first)
    assert found.images == 60
    ours, theirs = second.results.test, first.results.test
    a, b = ours.dice, theirs.dice[rows]
    assert [theirs.split.names[row] for row in rows] == ours.split.names
    value, interval = found.figures["dice_mean"]
    assert value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    every = np.ones(60)
    assert interval == difference_interval(Ratio(a, every), Ratio(b, every), theirs.groups[rows])


def test_tables_in_the_terminal_are_aligned(usual, other: Path, capsys) -> None:
    code, out, err = call(capsys, usual.directory, other)
    assert (code, err) == (0, "")
    assert "walls <b>" in out
    block = out[out.index("Winners on test") :].split("\n\n")[0].splitlines()
    assert len({len(line) for line in block[1:]}) == 1
    assert "2-pixel F1" in out
    assert "Paired difference to walls <b> on shared test images" in out


def test_json_holds_metrics_and_differences(usual, other: Path, capsys) -> None:
    code, out, _ = call(capsys, usual.directory, other, usual.directory.parent / "walls/../walls/.", "--json")
    assert code == 2  # one of them twice
    code, out, _ = call(capsys, usual.directory, other, "--json")
    found = json.loads(out)
    assert [run["name"] for run in found["runs"]] == ["walls <b>", "other | run"]
    metrics = found["runs"][0]["metrics"]
    assert metrics == {key: usual.metrics[key] for key in metrics}
    assert found["difference"][0]["figures"].keys() == set(comparison.FIGURES)
    assert found["difference"][0]["run"] == "other | run"


def test_a_page_replaces_an_earlier_one_and_nothing_else(usual, other: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "side by side"
    for _ in range(2):
        assert call(capsys, usual.directory, other, "--out", out)[0] == 0
    assert {path.name for path in out.iterdir()} == {"index.html", "report.md", "comparison.json", "figures"}
    text = (out / "index.html").read_text()
    assert "other | run" in text
    assert "walls &lt;b&gt;" in text
    assert "<b>" not in text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    code, _, err = call(capsys, usual.directory, other, "--out", tmp_path / "mine")
    assert code == 2
    assert "holds something that is not" in err


def test_images_of_one_name_and_other_masks_are_not_paired(usual, make_run, capsys) -> None:
    """Numbered images are in many sets."""
    foreign, made = make_run(tests=12)
    first, second = comparison.read([usual.directory, foreign])
    names = set(first.results.test.split.names) & set(second.results.test.split.names)
    assert len(names) == 12
    found = comparison.difference(second, first)
    equal = sum(
        a.any() == b.any() and a.sum() == b.sum()
        for a, b in zip(made["winner-test"].truths[:-1], usual.made["winner-test"].truths, strict=False)
    )
    assert (found.images if found else 0) <= equal + 1 < 12


def test_a_winner_that_misses_its_constraints_is_told(usual, make_run, capsys) -> None:
    beyond, _ = make_run(tests=6, recall_beyond=[0.25, 0.125, *[0.5] * 6])
    code, out, _ = call(capsys, usual.directory, beyond)
    assert code == 0
    assert "does not meet its constraints: recall 0.125 beyond its bound." in " ".join(out.split())
    assert "pixel recall at least 0.9" in out


def test_names_do_not_steer_the_terminal(usual, tmp_path: Path, capsys) -> None:
    evil = tmp_path / "evil"
    shutil.copytree(usual.directory, evil)
    facts = json.loads((evil / "run.json").read_text())
    (evil / "run.json").write_text(json.dumps(facts | {"name": "a\x1b]0;pwned\x07b"}))
    code, out, _ = call(capsys, usual.directory, evil)
    assert code == 0
    assert "\x1b" not in out
    assert "a\\x1b]0;pwned\\x07b" in out


def test_searches_that_share_nothing_are_told(usual, other: Path, make_run, tmp_path: Path, capsys) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(usual.directory, stopped)
    shutil.rmtree(stopped / "evaluation")
    bare, _ = make_run(trials=1, negatives=False, baseline_wins=True, tests=6)
    code, out, _ = call(capsys, usual.directory, stopped)
    assert code == 0
    assert "None shares evaluated test images with" in " ".join(out.split())
    assert "not evaluated" in out
    code, out, _ = call(capsys, usual.directory, bare)
    assert code == 0
    assert "nan" not in out.lower().split()


@pytest.mark.parametrize("runs", [["one"], ["one", "nowhere"]])
def test_bad_input_ends_with_one_message(usual, runs: list[str], tmp_path: Path, capsys) -> None:
    shutil.copytree(usual.directory, tmp_path / "one")
    code, out, err = call(capsys, *(tmp_path / run for run in runs))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_names_that_are_equal_are_told_apart(usual, tmp_path: Path) -> None:
    shutil.copytree(usual.directory, tmp_path / "again")
    names = [search.name for search in comparison.read([usual.directory, tmp_path / "again"])]
    assert names == [str(usual.directory), str(tmp_path / "again")]
    assert render.plain(comparison.build(comparison.read([usual.directory, tmp_path / "again"])))

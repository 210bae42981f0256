"""What a report says of luck: on made runs with and without repeats, evaluated and not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tuner import report, selection


def records_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]


def repeat(directory: Path, values: dict[str, list[float]], **more: Any) -> None:
    """Writes repeats of trials of the search, with seeds from 1 on, and says so in run.json."""
    by_trial = {record["trial"]: record for record in records_of(directory)}
    lines = []
    for trial, found in values.items():
        for seed, value in enumerate(found, start=1):
            again = {"trial": f"abc123-r{len(lines):04d}", "repeats": trial, "seed": seed, "value": value, "number": 0}
            config = by_trial[trial]["config"] | {"seed": seed}
            lines.append(by_trial[trial] | again | {"config": config, "baseline": False, "history": []} | more)
    (directory / selection.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def written(directory: Path) -> tuple[str, dict[str, Any]]:
    folder = report.write(directory).parent
    text = (folder / "report.md").read_text()
    assert "None" not in text
    assert "nan" not in text.split()
    return text, json.loads((folder / "metrics.json").read_text())["selection"]


def completed(directory: Path) -> list[dict[str, Any]]:
    found = [record for record in records_of(directory) if record["status"] == "completed"]
    return sorted((r for r in found if not r["replayed_from"]), key=lambda record: -record["value"])


def test_single_trainings_say_that_nothing_was_repeated(usual) -> None:
    found = usual.metrics["selection"]
    best = completed(usual.directory)[0]
    assert (found["trial"], found["trainings"], found["measured"]) == (best["trial"], 1, best["value"])
    assert found["corrected"] < found["measured"]
    assert found["ci95"][0] < found["corrected"] < found["ci95"][1]
    assert found["seeds"] == []
    text = (usual.report / "report.md").read_text()
    assert "No configuration was trained twice" in text
    assert "figures/standings.png" in text
    assert "Too few configurations that were drawn at random" in text


def test_repeats_of_the_winner_show_what_its_figure_owes_to_luck(make_run) -> None:
    directory, _ = make_run(tests=6)
    first, second, *_ = completed(directory)
    values = {
        first["trial"]: [first["value"] - 0.05, first["value"] - 0.052],
        second["trial"]: [second["value"] + 0.01],
    }
    repeat(directory, values)
    winner = json.loads((directory / "evaluation" / "selection.json").read_text())["winner"]
    assert winner == first["trial"]
    path = directory / "evaluation" / "selection.json"
    seeds = [
        {"trial": winner, "seed": 0, "validation": first["value"], "test": 0.61},
        {"trial": "abc123-r0000", "seed": 1, "validation": first["value"] - 0.05, "test": 0.59},
    ]
    chosen = {"configuration": first["trial"], "seeds": seeds, "prefer": "best"}
    path.write_text(json.dumps(json.loads(path.read_text()) | chosen))
    text, found = written(directory)
    assert found["trial"] == first["trial"]
    assert found["trainings"] == 3
    assert found["measured"] == pytest.approx(first["value"] - 0.034, abs=1e-9)
    assert found["best_single"] == first["value"]
    assert found["corrected"] < first["value"] - 0.01
    assert found["repeats"]["completed"] == 3
    assert found["seeds"] == seeds
    assert "the mean of 3 trainings" in text
    assert "On test its 2 networks came to 0.6000 ± 0.0141" in text
    assert second["trial"] in text[text.index("cannot be told from the best") :].split(".")[0]


def test_one_that_fell_out_is_named_with_the_reason(make_run) -> None:
    directory, _ = make_run(tests=6)
    third = completed(directory)[2]
    repeat(directory, {third["trial"]: [0.1]}, status="diverged", value=None)
    text, found = written(directory)
    assert f"Out of the race: {third['trial']} diverged with another seed" in text
    assert third["trial"] not in found["alike"]


def test_random_search_is_told_from_draws_at_random_and_the_search_itself_may_be_one(make_run) -> None:
    directory, _ = make_run(tests=6, trials=30)
    records = [record | {"drawn": "given" if record["baseline"] else "random"} for record in records_of(directory)]
    (directory / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text, found = written(directory)
    random = found["over_random"]
    assert random["told_by"] >= 4
    assert random["expected_ci95"][0] < random["expected"] < random["expected_ci95"][1]
    assert f"At the same cost, {random['trainings']} full trainings, random search would be expected to find" in text
    facts = json.loads((directory / "run.json").read_text())
    facts["space"]["sampler"] = "random"
    (directory / "run.json").write_text(json.dumps(facts))
    assert "The search itself was random search." in written(directory)[0]


def test_too_few_configurations_say_nothing(usual, tmp_path: Path) -> None:
    shutil.copy(usual.directory / "run.json", tmp_path)
    kept = completed(usual.directory)[:2]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    text, found = written(tmp_path)
    assert found is None
    assert "How far the winner can be trusted" not in text
    repeat(tmp_path, {kept[0]["trial"]: [kept[0]["value"]]})  # two that were looked at again say something
    text, found = written(tmp_path)
    assert found["trainings"] == 2
    assert "How far the winner can be trusted" in text
    (tmp_path / "records.jsonl").write_text(json.dumps(kept[0]) + "\n")
    assert written(tmp_path)[1]["trainings"] == 2

"""The section on masks, of searches over their number whose truth is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner import masks, report
from tuner.space import Labelling

COUNTS = (4, 8, 15, 30)
PRICES = {"minutes_per_label": 0.05, "minutes_per_mask": 2.0}


def searched(directory: Path, cost: str | None, labelling: dict[str, float] | None, counts: Any = COUNTS) -> None:
    """Makes the records of a made run those of a search over the number of masks, six trainings of each."""
    lines = (directory / "records.jsonl").read_text().splitlines()
    [done, *_] = [record for record in map(json.loads, lines) if record["status"] == "completed"]
    rng = np.random.default_rng(0)
    made = []
    for number in range(6 * len(counts)):
        kept = counts[number % len(counts)]
        value = float(0.75 - 0.6 * kept**-0.5 - 0.03 * rng.exponential() + 0.004 * rng.standard_normal())
        record = done | {"trial": f"abc123-{number:04d}", "number": number, "baseline": number == 0, "value": value}
        record |= {
            "params": done["params"] | {"num_segmented": kept},
            "config": done["config"] | {"num_segmented": kept},
        }
        record |= {"num_segmented": kept, "labelled": 50, "values": [value, kept]}
        made.append(record)
    (directory / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    facts = json.loads((directory / "run.json").read_text())
    facts["space"]["search"]["num_segmented"] = {"type": "categorical", "choices": list(counts)}
    figure = {"metric": "dice_positive_mean", "mode": "max"}
    facts["space"]["objective"] = [figure, {"metric": cost, "mode": "min"}] if cost else figure
    if labelling:
        facts["space"]["labelling"] = labelling
    (directory / "run.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("cost", "labelling"),
    [("labelling_minutes", PRICES), ("num_segmented", PRICES), ("num_segmented", None), (None, None)],
)
def test_a_search_over_masks_says_what_the_next_ones_would_bring(make_run, cost, labelling) -> None:
    directory, _ = make_run(tests=6)
    searched(directory, cost, labelling)
    folder = report.write(directory).parent
    metrics = json.loads((folder / "metrics.json").read_text())
    found = metrics["masks"]
    records = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    train = {"positive": 40, "negative": 10, "segmented": 30}
    prices = Labelling(**labelling) if labelling else None
    assert found == masks.annotation(records, train, prices, "validation Dice of positive images")
    assert found["tells"]
    text = (folder / "report.md").read_text()
    section = text[text.index("## Masks") :]
    start = "The next 10 masks" + (" (20 minutes)" if labelling else "")
    assert found["sentence"].startswith(f"{start} would raise the validation Dice of positive images by about 0.0")
    assert found["sentence"] in section
    assert "figures/annotation-curve.png" in section
    assert (folder / "figures/annotation-curve.png").exists()
    best = max(records, key=lambda one: one["value"])
    assert [row["masks"] for row in found["budgets"]] == list(COUNTS)
    assert found["budgets"][-1]["within"] == {
        "trial": best["trial"],
        "masks": best["num_segmented"],
        "value": best["value"],
    }
    header = next(line for line in section.splitlines() if "best of them" in line)
    assert ("| minutes |" in header) == bool(labelling)
    assert section.count(best["trial"]) >= 1
    assert 'id="masks"' in (folder / "index.html").read_text()


def test_what_the_data_do_not_tell_is_said_and_drawn_without_a_curve(make_run) -> None:
    directory, _ = make_run(tests=6)
    searched(directory, "num_segmented", None, counts=(5, 30))
    folder = report.write(directory).parent
    found = json.loads((folder / "metrics.json").read_text())["masks"]
    assert (found["tells"], found["curve"], found["next"]) == (False, [], None)
    assert found["sentence"] in (folder / "report.md").read_text()
    assert (folder / "figures/annotation-curve.png").exists()


def test_a_search_over_many_numbers_of_masks_shows_where_the_best_changes(make_run) -> None:
    directory, _ = make_run(tests=6)
    counts = tuple(range(2, 31))
    searched(directory, None, None, counts=counts)
    folder = report.write(directory).parent
    rows = json.loads((folder / "metrics.json").read_text())["masks"]["budgets"]
    assert len(rows) == len(counts)
    text = (folder / "report.md").read_text()
    section = text[text.index("## Masks") :]
    table = section[section.index("best of them") :].split("\n\n")[0]
    assert len(table.splitlines()) - 2 == len({row["within"]["trial"] for row in rows}) < len(counts)


def test_other_searches_have_no_such_section(usual) -> None:
    assert usual.metrics["masks"] is None
    assert "## Masks" not in (usual.report / "report.md").read_text()

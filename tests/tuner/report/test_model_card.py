"""The card as a function of the run directory; the files that it speaks of are tested in tests/tuner/test_export.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tuner.report import inputs, model_card, render, tables


def card(directory: Path, **parts: Any) -> str:
    run = inputs.read_evaluated(directory)
    parts = {"sizes": {}, "exports": {}} | parts
    return render.markdown(model_card.build(run, tables.metrics(run, tables.results(run)), **parts))


def test_it_says_what_a_reviewer_asks(usual: Any) -> None:
    text = card(usual.directory, tiling="Tiles cost 0.01 Dice.")
    number, interval = r"0\.\d{3}", r"0\.\d{3} to 0\.\d{3}"
    row = rf"\| Dice, all images \| {number} \| {interval} \| {number} \| {interval} \| [+-]{number} \([+-]"
    assert re.search(row, text)
    dice = f"| Dice, all images | {usual.metrics['test']['dice_mean']:.3f} |"
    assert dice in text
    assert "fingerprint beef" in text
    assert "    tuner search space.yaml --data DATA --seed 0\n" in text
    assert "Tiles cost 0.01 Dice." in text
    assert "Nothing is exported yet" in text


def test_text_from_users_is_escaped(usual: Any) -> None:
    text = card(usual.directory)
    assert "run walls &lt;b&gt;" in text
    assert not re.search("<[bi]>", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen_on": "test"}, "THRESHOLDS CHOSEN ON TEST"),
        ({"recall_beyond": [0.0, 0.2] + [0.0] * 6}, "CONSTRAINTS NOT MET"),
        ({"negatives": False}, "no decision was trained: an image is taken to have a defect where its mask has any"),
        ({"trials": 1, "baseline_wins": True}, "It is the baseline itself."),
    ],
)
def test_it_warns(make_run: Any, options: dict[str, Any], message: str) -> None:
    directory, _ = make_run(tests=12, **options)
    assert message in card(directory)

"""Small spaces and records for tests of the search."""

from __future__ import annotations

from typing import Any

import pytest

from tuner import space_file
from tuner.sampler import Proposal
from tuner.space import Space


def small_space(**parts: Any) -> Space:
    document = {
        "name": "small",
        "data": {"height": 64, "width": 128, "validation_share": 0.25, "test_share": 0.25},
        "train": {"width": 0.1, "epochs": 3, "precision": "float32"},
        "search": {
            "learning_rate": {"type": "float", "low": 0.1, "high": 2.0, "log": True},
            "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
        },
        "budget": {"trials": 4},
    }
    return space_file.parse(document | parts)


def ended(proposal: Proposal, status: str = "completed", value: float | None = 0.5, **more: Any) -> dict[str, Any]:
    """A record of a proposal, as the search writes it."""
    thresholds = {"rule": "grid", "factor": 1, "segmentation_logit": 0.0, "decision_logit": None}
    return {
        **proposal.identity(),
        "status": status,
        "reason": None if status == "completed" else "because",
        "value": value,
        "best_epoch": 1,
        "epochs": 3,
        "started": 0.0,
        "seconds": 10.0,
        "device_seconds": 10.0,
        "thresholds": thresholds,
        "rules": {"min_of_max": 0.1, "pr_curve/1": 0.4, "grid": 0.5},
        "replays": [
            proposal.config.judgement()._replace(threshold_rule=rule)._asdict()
            | {"value": found, "epoch": 1 if rule == "grid" else 2, "thresholds": thresholds | {"rule": rule}}
            for rule, found in (("min_of_max", 0.1), ("pr_curve", 0.4), ("grid", 0.5))
        ],
        "history": [],
    } | more


@pytest.fixture
def space() -> Space:
    return small_space()

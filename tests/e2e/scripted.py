"""The `tuner` command with trials that follow a script instead of training: `python -m tests.e2e.scripted FOLDER ...`.

FOLDER/behaviour.json says what the trials do (tests/tuner/test_search.py); they write there which epochs they ran.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from model.sample import Sample
from tests.tuner.test_search import ScriptedTask
from tuner import cli, pipeline


@dataclass(frozen=True)
class TaskWithData(ScriptedTask):
    """Its nodes have the data, although it does not look at them."""

    train: list[Sample] = field(default_factory=list)
    validation: list[Sample] = field(default_factory=list)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    behaviour = json.loads((folder / "behaviour.json").read_text())
    pipeline.TrialTask.of = lambda _space, train, validation, *_: TaskWithData(folder, behaviour, train, validation)  # type: ignore[method-assign,assignment]
    sys.exit(cli.main(sys.argv[2:]))

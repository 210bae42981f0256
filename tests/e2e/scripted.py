"""The `tuner` command with trials that follow a script instead of training: `python -m tests.e2e.scripted FOLDER ...`.

FOLDER/behaviour.json says what the trials do (tests/tuner/test_search.py); they write there which epochs they ran.
"""

import json
import sys
from pathlib import Path

from tests.tuner.test_search import ScriptedTask
from tuner import cli, folds

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    behaviour = json.loads((folder / "behaviour.json").read_text())
    folds.TrialTask.of = lambda _space, train, validation, *_: ScriptedTask(folder, behaviour, train, validation)  # type: ignore[method-assign,assignment]
    sys.exit(cli.main(sys.argv[2:]))

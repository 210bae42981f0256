"""What commands import that a user waits for (bench/startup.py measures them)."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "optuna", "wandb", "numpy", "scipy", "cv2", "matplotlib", "pandas", "pydantic", "yaml"}


def imported(*words: str) -> set[str]:
    """The packages that a command has imported at its end."""
    code = (
        "import atexit, json, sys; from tuner.cli import main\n"
        "atexit.register(lambda: print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr))\n"
        f"sys.exit(main({list(words)!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stderr.splitlines()[-1]))


@pytest.mark.parametrize("words", [["--help"], ["search", "--help"], ["plan", "--help"], ["trial", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert not imported(*words) & HEAVY


def test_the_schema_needs_no_torch() -> None:
    assert not imported("schema") & {"torch", "ray", "optuna", "wandb", "matplotlib"}

"""How long commands take that a user waits for.

    python -m bench.startup [--repeat N]

The first time of each is not counted: it may read from the disk.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tuner import space_file
from tuner.run import create

COMMANDS = [
    ("--help", 0.5),
    ("search --help", 0.5),
    ("schema", None),
    ("status RUN", None),
    ("plan demo --data synthetic", 15.0),
]
"""words after `tuner`, and what they may take, s"""


def seconds(words: list[str]) -> float:
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, "-m", "tuner", *words], check=False, capture_output=True, text=True)  # noqa: S603
    took = time.perf_counter() - began
    if ended.returncode:  # on a busy machine `plan` finds that the demo's minutes cannot hold its baseline
        print(ended.stderr.strip().splitlines()[-1], file=sys.stderr)
    return took


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    print(f"| command | s, median of {repeat} | slowest | at most |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        run = create(space_file.load("demo"), "synthetic", Path(folder), "demo").directory
        for command, limit in COMMANDS:
            words = command.replace("RUN", str(run)).split()
            seconds(words)
            found = [seconds(words) for _ in range(repeat)]
            wanted = "" if limit is None else f"{limit:g}"
            print(f"| `tuner {command}` | {statistics.median(found):.2f} | {max(found):.2f} | {wanted} |", flush=True)


if __name__ == "__main__":
    main()

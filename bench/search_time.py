"""Where the time of a whole search goes.

    python -m bench.search_time [SPACE] [--data PATH] [--repeat N] [--tree DIR] [OPTION OF tuner search...]

Runs `tuner search SPACE` as a command of its own and prints, as Markdown tables, the wall time by what the command did,
and the time of all places for trials by what was done on them. The share of training steps is their time over the wall
time x the places. `--tree` runs the project in another folder: two versions are compared by turns. Of one that ends Ray
beside its report, that time is in both rows.

Trials that share a GPU train in another process than theirs, and are not seen.

No line of the project knows of this: a `sitecustomize.py` before everything else on PYTHONPATH wraps functions in the
driver and in Ray's workers as their modules are imported, and each process writes down when they began and ended.
"""

from __future__ import annotations

import argparse
import functools
import importlib.abc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_FOLDER = "SEGDEC_TUNER_BENCH_MARKS"

WAITING = "report, wait for the driver"
_SECONDS_OF_AN_ANSWER = 5.0
"""The driver answers in less; a trial that is stopped waits in its report until its process ends."""

WRAPPED = {
    "tuner.cli": {"main": "command"},
    "ray": {"init": "Ray: start", "shutdown": "Ray: end"},
    "tuner.pipeline": {
        "create": "data: look at every file",
        "_measured": "baseline timed",
        "_ready": "data: verify, decode",
        "run_trials": "trials",
        "evaluate": "finals",
    },
    "tuner.report": {"write": "report"},
    "tuner.tracking": {"log_report": "report to trackers"},
    "tuner.importance": {"write": "importance"},
    "tuner.search": {"_trial_on_worker": "trial: start"},
    "tuner.plan": {"baseline_seconds": "baseline timed"},
    "tuner.finals": {"_evaluate_on_worker": "finals: on the worker"},
    "model.train": {"start": "trial: network", "train_epoch": "training steps"},
    "model.data": {"open_cache": "trial: caches"},
    "tuner.trial": {
        "score": "validation: forward, count tables",
        "_Keeper.__init__": "trial: start",
        "_Keeper.add": "validation: thresholds, figures",
        "_Keeper._draw": "pictures",
        "_Keeper._keep_weights": "checkpoint: written",
        "_Keeper.checkpoint": "checkpoint: written",
    },
    "model.checkpoint": {"save_training": "checkpoint: written"},
    "tuner.checkpoints": {"Writer.write": "checkpoint: copied to its place"},
    "ray.tune": {"report": WAITING},
}
"""functions by module, and under which words their own time counts"""


# In the processes of the search


def install() -> None:
    """Called by `sitecustomize.py`: wraps what is imported from now on."""
    out = Path(os.environ[_FOLDER]) / f"{os.getpid()}.jsonl"
    sys.meta_path.insert(0, _Finder(out))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as everybody else does, and wraps their functions when they have been executed."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in WRAPPED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _wrap_all(module, WRAPPED[name], self.out)

            spec.loader.exec_module = exec_module
        return spec


def _wrap_all(module: Any, names: dict[str, str], out: Path) -> None:
    for name, what in names.items():
        owner = module
        *parents, last = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        if (function := getattr(owner, last, None)) is not None:  # another version may not have it
            setattr(owner, last, _timed(function, what, out))


def _timed(function: Any, what: str, out: Path) -> Any:
    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*arguments, **named)
        finally:
            path = out.with_name(f"{os.getpid()}.jsonl")
            line = json.dumps([what, function.__qualname__, began, time.monotonic()]) + "\n"
            with suppress(OSError), path.open("a") as file:
                file.write(line)

    return timed


# In the command


Span = tuple[str, str, float, float]
"""what, which function, when it began and ended by the monotonic clock, which all processes share"""


def measure(space: str, data: str, tree: Path, options: list[str]) -> tuple[float, float, float, dict[str, list[Span]]]:
    """Runs a search; when it began and ended, processor seconds of all processes, and the spans of each process."""
    with tempfile.TemporaryDirectory(prefix="bench-search-") as folder:
        marks = Path(folder) / "marks"
        marks.mkdir()
        (Path(folder) / "sitecustomize.py").write_text(
            "import importlib.util\n"
            f"spec = importlib.util.spec_from_file_location('bench_search_time', {__file__!r})\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "module.install()\n"
        )
        places = [folder, str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), _FOLDER: str(marks)}
        command = [sys.executable, "-m", "tuner", "search", space, "--data", data, "--runs", f"{folder}/runs"]
        began = time.monotonic()
        busy = _busy()
        subprocess.run([*command, "--wandb", "off", *options], check=True, cwd=tree, env=environment)  # noqa: S603
        ended = time.monotonic()
        spans = {
            file.stem: [tuple(json.loads(line)) for line in file.read_text().splitlines()]
            for file in marks.glob("*.jsonl")
        }
        return began, ended, _busy() - busy, spans


def _busy() -> float:
    """Seconds that the cores of this machine have been busy, whoever kept them so; Linux alone."""
    with suppress(OSError):
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")
    return 0.0


def own_times(spans: list[Span]) -> Iterator[tuple[str, str, float, float, float]]:
    """Each span with its time less that of the spans within it."""
    stack: list[list[Any]] = []
    for what, function, began, ended in sorted(spans, key=lambda span: (span[2], -span[3])):
        while stack and stack[-1][3] <= began:
            yield tuple(stack.pop())
        if stack:
            stack[-1][4] -= ended - began
        stack.append([what, function, began, ended, ended - began])
    while stack:
        yield tuple(stack.pop())


def tables(began: float, ended: float, busy: float, spans: dict[str, list[Span]], places: int) -> tuple[str, float]:
    """Both tables, and the share of training steps."""
    trials = {pid: [s for s in found if s[1] == "_trial_on_worker"] for pid, found in spans.items()}
    workers = {pid: sorted(found, key=lambda s: s[2]) for pid, found in trials.items() if found}
    driver = next(found for found in spans.values() if any(s[0] == "command" for s in found))
    wall = ended - began
    searches = sorted((s for s in driver if s[0] == "trials"), key=lambda s: s[2])
    first = min(found[0][2] for found in workers.values())

    lines = ["| what the command did | s | share of the wall time |", "| --- | ---: | ---: |"]
    phases: dict[str, float] = {"until the first trial begins": first - began}
    for n, search in enumerate(searches):
        phases["search" if n == 0 else "repeats"] = search[3] - (max(first, search[2]))
        after = searches[n + 1][2] if n + 1 < len(searches) else None
        if after:
            phases["between search and repeats"] = after - search[3]
    last = searches[-1][3]
    for what in ("finals", "Ray: end", "report", "report to trackers"):
        phases[what] = sum(s[3] - s[2] for s in driver if s[0] == what and s[2] >= last)
    phases["the rest"] = wall - sum(phases.values())
    lines += [f"| {what} | {seconds:.1f} | {100 * seconds / wall:.1f} % |" for what, seconds in phases.items()]
    lines.append(f"| all | {wall:.1f} | cores of the machine busy for {busy:.0f} s |")
    within = [f"{what} {s:.1f} s" for what, s in _before(driver, first).items() if s >= 0.05]
    lines.append(f"\nWithin the time until the first trial: {', '.join(within)}.")

    used: dict[str, float] = defaultdict(float)
    count = 0
    for pid, found in workers.items():
        for what, _, start, _, own in own_times(spans[pid]):
            if any(trial[2] <= start <= trial[3] for trial in found):
                is_over = what == WAITING and own > _SECONDS_OF_AN_ANSWER  # it was stopped, and nothing came after it
                used["no trial on the place" if is_over else what] += own
        for _, _, search_began, search_ended in searches:
            own_trials = [s for s in found if search_began <= s[2] <= search_ended]
            count += len(own_trials)
            if own_trials:
                used["a worker between two trials"] += sum(
                    max(0.0, b[2] - a[3]) for a, b in itertools.pairwise(own_trials)
                )
    of_searches = sum(search[3] - max(first, search[2]) for search in searches)
    used["no trial on the place"] += places * of_searches - sum(used.values())
    total = places * wall
    used["outside of search and repeats"] = total - places * of_searches
    lines += ["", f"| {places} places x wall time | s | share |", "| --- | ---: | ---: |"]
    for what, seconds in sorted(used.items(), key=lambda item: -item[1]):
        lines.append(f"| {what} | {seconds:.1f} | {100 * seconds / total:.1f} % |")
    epochs = sum(s[1] == "train_epoch" for pid in workers for s in spans[pid])
    lines.append(f"\n{count} starts of trials on {len(workers)} processes, {epochs} epochs in trials.")
    return "\n".join(lines), used["training steps"] / total


def _before(driver: list[Span], first: float) -> dict[str, float]:
    """Own seconds by what was done, before the first trial."""
    found: dict[str, float] = defaultdict(float)
    for what, _, _, end, own in own_times([s for s in driver if s[0] != "command" and s[2] < first]):
        if end <= first:
            found[what] += own
    return found


def main() -> None:
    """Prints both tables for each run, and the shares together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", nargs="?", default="demo")
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--places", type=int, default=os.cpu_count(), help="trials at once")
    parser.add_argument("--tree", type=Path, action="append", help="the folder of a version; several take turns")
    options, of_search = parser.parse_known_args()
    trees = [tree.resolve() for tree in options.tree or [ROOT]]
    shares: dict[Path, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(options.repeat):
        for tree in trees:
            began, ended, busy, spans = measure(options.space, options.data, tree, of_search)
            text, share = tables(began, ended, busy, spans, options.places)
            shares[tree].append((ended - began, share))
            print(f"\n## {tree.name}\n\n{text}", flush=True)
    print("\n| version | wall s | share of training steps |\n| --- | --- | --- |")
    for tree, found in shares.items():
        walls, parts = (
            ", ".join(form) for form in zip(*((f"{w:.0f}", f"{100 * s:.0f} %") for w, s in found), strict=True)
        )
        print(f"| {tree.name} | {walls} | {parts} |")


if __name__ == "__main__":
    main()

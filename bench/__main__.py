"""Every comparison that this machine can make, in one run; what came out is added to bench/RESULTS.md.

    python -m bench [NAME...] [--list] [--quick] [--minutes N] [--data PATH] [--run PATH] [--out FILE]

Each comparison is a script of this folder, run in a process of its own within a time limit, three times what it usually
takes; one that fails is told with its error, and the others go on. PyTorch, numpy, scipy, OpenCV and safetensors are
enough; what needs more than the machine has is listed as left out, with the reason. The results file is written after
each comparison: newest first, below its preamble, and whatever it held stays.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from bench.measure import machine
from model.files import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "RESULTS.md"
PREAMBLE = "# Results\n\nKept as they came out, newest first.\n"

_LEAST_SECONDS = 300
"""of a time limit: a machine may be slow to start"""

_ERROR_LINES = 12


@dataclass(frozen=True)
class Comparison:
    """A script of this folder, and how it is run here. `{data}`, `{run}` and `{scratch}` stand for paths."""

    name: str
    minutes: float
    """about, on the machine that it is for"""
    needs: str = ""
    """what it takes beyond PyTorch and its usual company: packages; GPU; root; data, real images; run, its folder"""
    full: str = ""
    """arguments"""
    quick: str | None = ""
    """arguments of a small run, a minute or so; None if there is none"""

    @property
    def summary(self) -> str:
        """The first line of the script; nothing is imported for it."""
        source = Path(__file__).with_name(f"{self.name.split(':')[0]}.py").read_text()
        return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]

    def command(self, quick: bool, places: dict[str, Path]) -> list[str]:
        """What runs it."""
        words = shlex.split(self.quick or "" if quick else self.full)
        paths = {name: str(path) for name, path in places.items()}
        return [sys.executable, "-m", f"bench.{self.name.split(':')[0]}", *(word.format(**paths) for word in words)]

    def lacking(self, places: dict[str, Path]) -> str | None:
        """Why this machine cannot run it, and what would help; None if it can."""
        for need in self.needs.split():
            if need in _CONDITIONS:
                met, why = _CONDITIONS[need]
                if not met(places):
                    return why
            elif importlib.util.find_spec(need) is None:
                return f"it needs the package {need}, which is not here"
        return None


_CONDITIONS: dict[str, tuple[Callable[[dict[str, Path]], bool], str]] = {
    "GPU": (lambda _: torch.cuda.is_available(), "torch finds no CUDA here"),
    "root": (lambda _: sys.platform == "linux" and os.geteuid() == 0, "it needs root on Linux"),
    "data": (lambda places: "data" in places, "it needs real images; name their folder with --data"),
    "run": (lambda places: "run" in places, "it needs the folder of a finished run; name it with --run"),
}

_SMALL = "--height 128 --width 128 --width-factor 0.25 --seconds 0.5"

COMPARISONS = [
    Comparison("limits", 0.3, quick="--seconds 0.3"),
    Comparison("training_step", 5, quick=f"{_SMALL} --steps 100"),
    Comparison("schedule", 4, "GPU", quick="--seconds 3 --validation 200"),
    Comparison("loader", 2, quick="--height 128 --width 128 --width-factor 0.25 --seconds 0.3"),
    Comparison("side_by_side", 6, "GPU", quick="--counts 1 4 --width-factors 0.25 --seconds 2"),
    Comparison("gpu", 5, "GPU", quick="fraction wait"),
    Comparison("validation", 5, quick="--images 20 --side 128 --width 0.25"),
    Comparison("thresholds", 3, quick="--images 20 --side 128"),
    Comparison("cache_memory", 5, quick="--images 50 --side 128 --trials 1 2"),
    Comparison("coverage", 10, quick="--replications 100"),
    Comparison("selection", 5, quick="--repetitions 20"),
    Comparison("overhead", 15, "ray optuna", quick="--trials 100"),
    Comparison("scale", 15, "ray optuna", "--processes 1 10", quick="--processes 1 --simulated 1 10"),
    Comparison("tracking", 20, "ray optuna wandb tensorboardX",
               quick="--runs 4 --peers 1 --epochs 2 --repeats 1 --rounds 1 --search-epochs 2"),
    Comparison("startup", 1, "ray optuna rich", quick="--repeat 1"),
    Comparison("search_time", 4, "ray optuna rich"),
    Comparison("strategies", 15, "ray optuna", quick="--searches 2"),
    Comparison("kills", 12, "ray optuna", quick="--runs 1"),
    Comparison("chaos", 10, "ray optuna root", quick="--seconds 60"),
    Comparison("tiling:photo", 8, "rich onnx onnxruntime onnxscript", "photo",
               "photo --widths 0.25 --height 1000 --width 1500"),
    Comparison("tiling:dice", 5, "run rich onnx onnxruntime onnxscript", "dice {run}", None),
    Comparison("parity", 3, "run data onnx onnxruntime onnxscript", "{run} --data {data}",
               "{run} --data {data} --images 5"),
    Comparison("decoding", 2, "data", "{data}", "{data} --images 50 --times 1"),
    Comparison("annotation", 60, "data matplotlib optuna", "{data} --rows {scratch}/rows.csv", None),
    Comparison("next_masks", 90, "data imagehash skimage", "{data}", "{data} --repeats 1 --epochs 1"),
    Comparison("strategies_real", 240, "data ray optuna", "--data {data}", None),
]  # fmt: skip


class Entry:
    """What this run adds to the results file."""

    def __init__(self, file: Path, command: str) -> None:
        self.file = file
        self.text = f"## {date.today().isoformat()}, `{command}`\n\n{machine()}\n"
        self._written = ""

    def add(self, part: str) -> None:
        """Writes the file anew, with one more part: what others wrote there meanwhile stays."""
        self.text += f"\n{part.strip()}\n"
        known = self.file.read_text() if self.file.exists() else PREAMBLE
        if self._written and self._written in known:
            known = known.replace(self._written, self.text, 1)
        else:
            head, mark, rest = known.partition("\n## ")
            known = f"{head.rstrip()}\n\n{self.text}{mark}{rest}"
        write_atomically(self.file, known.encode())
        self._written = self.text


def run(command: list[str], seconds: float, say: Callable[[str], None]) -> str | None:
    """Hands on what a command prints, line by line; what went wrong. At the limit all that it started ends with it."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, cwd=ROOT
        ) as process,
    ):
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(process)

        limit = threading.Timer(seconds, end)
        limit.start()
        try:
            for line in process.stdout or ():
                say(line)
            code = process.wait()
        finally:
            limit.cancel()
            _kill(process)
        errors.seek(0)
        said = errors.read().strip()
    if said:
        print(said, file=sys.stderr, flush=True)
    if late.is_set():
        return f"no end within {seconds / 60:.0f} minutes"
    last = "\n".join(said.replace(f"{ROOT}/", "").splitlines()[-_ERROR_LINES:])
    return f"exit code {code}\n\n```\n{last}\n```" if code else None


def _kill(process: subprocess.Popen[str]) -> None:
    """With the processes that it started: its session is its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def compare(one: Comparison, options: argparse.Namespace, places: dict[str, Path], entry: Entry) -> bool:
    """Runs a comparison and adds it to the results, as far as it came; whether it did its work."""
    lines: list[str] = []

    def say(line: str) -> None:
        if "\x1b" not in line:  # Ray's warnings come in colours
            lines.append(line)
        print(line, end="", flush=True)

    command = one.command(options.quick, places)
    shown = shlex.join(["python", *command[1:]])
    for name, path in places.items():
        shown = shown.replace(str(path), name.upper())
    head = f"### {one.name}: {one.summary}\n\n`{shown}`"
    print(f"\n{head}\n", flush=True)
    began = time.monotonic()
    problem: str | None = "interrupted"
    try:
        problem = run(command, max(_LEAST_SECONDS, 180 * one.minutes), say)
    finally:
        for name, path in (*places.items(), ("~", Path.home())):
            lines = [line.replace(str(path), name.upper()) for line in lines]
            problem = problem and problem.replace(str(path), name.upper())
        took = f"({time.monotonic() - began:.0f} s)" if problem is None else f"**Failed: {problem}**"
        entry.add(f"{head}\n\n{''.join(lines).strip()}\n\n{took}")
        print(f"\n{took}", flush=True)
    return problem is None


def show_list(places: dict[str, Path]) -> None:
    """What there is, and what this machine lacks for it."""
    for one in COMPARISONS:
        print(f"{one.name}  {one.summary}")
        print(f"    about {one.minutes:g} min; needs {one.needs or 'PyTorch only'}; {one.lacking(places) or 'can run'}")


def main() -> int:
    """How many failed; 130 where it was interrupted."""
    names = [one.name for one in COMPARISONS]
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="those to run, all if left out: " + ", ".join(names))
    parser.add_argument("--list", action="store_true", help="what there is, what it needs and about how long it takes")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether all works, no figures to quote")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after these no comparison begins")
    parser.add_argument("--data", type=Path, help="real images, for the comparisons that need them")
    parser.add_argument("--run", type=Path, help="the folder of a finished run, likewise")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results file")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"a name must be one of {', '.join(names)}, found {', '.join(unknown)}")
    places = {name: path.resolve() for name in ("data", "run") if (path := getattr(options, name))}
    if missing := [path for path in places.values() if not path.is_dir()]:
        parser.error(f"--data and --run must be folders, found {missing[0]}")
    if options.list:
        show_list(places)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="segdec-bench-") as scratch:
        return run_all(options, places | {"scratch": Path(scratch)})


def run_all(options: argparse.Namespace, places: dict[str, Path]) -> int:
    """Runs what was asked for, one after the other."""
    said = ["python -m bench", *options.names, *(["--quick"] if options.quick else [])]
    entry = Entry(options.out, " ".join(said))
    print(entry.text, flush=True)
    left_out: list[str] = []
    failed: list[str] = []
    code = 0
    end = time.monotonic() + 60 * options.minutes
    for one in COMPARISONS:
        if options.names and one.name not in options.names:
            continue
        why = one.lacking(places)
        if options.quick and one.quick is None:
            why = "it has no small form"
        elif time.monotonic() >= end:
            why = why or f"the {options.minutes:g} minutes were over"
        if why:
            left_out.append(f"- {one.name}: {why}")
            continue
        try:
            if not compare(one, options, places, entry):
                failed.append(one.name)
        except KeyboardInterrupt:
            left_out.append("- all after it: the run was interrupted")
            code = 130
            break
    if left_out:
        entry.add("Left out:\n\n" + "\n".join(left_out))
        print("\nLeft out:\n\n" + "\n".join(left_out))
    print(f"\nFailed: {', '.join(failed) or 'none'}. Results: {options.out}", flush=True)
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

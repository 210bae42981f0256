"""What the measurements of speed share: clocks, tables, and synthetic splits as large as they need to be."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from model import layouts, synthetic
from model.config import RunConfig
from model.data import Cache, open_cache

MIB = 2**20


class Table:
    """Printed row by row, so that what was measured is there when a run is cut short."""

    def __init__(self, *head: object) -> None:
        self.add(*head)
        print("| --- " * len(head) + "|", flush=True)

    def add(self, *cells: object) -> None:
        """A row."""
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def table(*rows: tuple[Any, ...]) -> None:
    """A whole one; the first row is the head."""
    shown = Table(*rows[0])
    for row in rows[1:]:
        shown.add(*row)


def machine() -> str:
    """What figures are of: processor, memory, GPU, and the versions of what computes."""
    lines = [f"{_processor()}, {_cores()} cores, {_memory_gib():.0f} GiB; {_gpu()}"]
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        versions.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for name in ("numpy", "scipy", "opencv-python-headless", "ray", "optuna", "wandb", "albumentations"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "; ".join([*lines, ", ".join(versions)])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = facts.get("model name", platform.machine())
    kinds = [kind for kind in ("amx_bf16", "avx512f", "avx2") if kind in facts.get("flags", "").split()]
    return f"{name} ({kinds[0]})" if kinds else name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpu() -> str:
    asked = "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"
    return "GPU " + "; ".join(f"{line}" for line in found.splitlines())


def options_of(
    doc: str | None, seconds: float, argv: list[str] | None = None, **more: dict[str, Any]
) -> argparse.Namespace:
    """The options that measurements of the network share, and `more`: keyword arguments of `add_argument` by name.

    The device is set, and `threads` if they were given.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--height", type=int, default=448, help="px")
    parser.add_argument("--width", type=int, default=448, help="px")
    parser.add_argument("--width-factor", type=float, default=1.0, help="of the network's channels")
    parser.add_argument("--threads", type=int, help="of the CPU; all cores if left out")
    parser.add_argument("--seconds", type=float, default=seconds, help="of each measured speed, about")
    for name, arguments in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **arguments)
    options = parser.parse_args(argv)
    options.threads = options.threads or _cores()
    torch.set_num_threads(options.threads)
    return options


def config_of(options: argparse.Namespace, **fields: Any) -> RunConfig:
    """The results page's configuration, of the size that was asked for. Its learning rate of 1 is lowered: what is
    measured must not diverge on other data."""
    size = {"input_height": options.height, "input_width": options.width, "width": options.width_factor}
    return RunConfig(**{"learning_rate": 0.1, **size, **fields})


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, once."""
    began = now(device)
    work()
    return now(device) - began


def median_seconds(work: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> float:
    """Median over as many repeats as fit, after one to warm up."""
    work()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        times.append(seconds_of(work, device))
    return statistics.median(times)


@contextmanager
def split_of(options: argparse.Namespace, distinct: int = 32) -> Iterator[Cache]:
    """A few synthetic images, decoded: half of them with a crack, one of a kind after the other."""
    with tempfile.TemporaryDirectory(prefix="segdec-bench-") as folder:
        made, root = Path(folder) / "set", Path(folder) / "cache"
        synthetic.write(made, count=distinct, positive_share=0.5, height=options.height, width=options.width)
        samples = sorted(layouts.read(made), key=lambda sample: sample.name)
        kinds = [[sample for sample in samples if sample.positive is kind] for kind in (True, False)]
        mixed = [sample for pair in zip(*kinds, strict=True) for sample in pair]
        yield open_cache(mixed, options.height, options.width, root)


def repeated(cache: Cache, count: int) -> Cache:
    """So many images: those of the cache over and over, each under a name of its own."""
    rows = [n % len(cache.samples) for n in range(count)]
    return cache.part(rows, [replace(cache.samples[row], name=f"{n:06d}") for n, row in enumerate(rows)])

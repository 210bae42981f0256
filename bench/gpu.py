"""What a search does with GPUs, checked on a machine with one.

    python -m bench.gpu [PART...] [--minutes 5]

Prints a Markdown table for each part, the most important ones first; none begins after so many minutes. Each runs in a
process of its own, within a time limit; one that fails shows its traceback and does not stop the others. Parts with
`search` in their names need Ray, and say so where it is missing. Speed is measured elsewhere: bench/training_step.py,
bench/schedule.py, bench/side_by_side.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import MIB, machine, table
from model import layouts, splits, synthetic, train
from model.config import RunConfig
from model.data import Cache, open_cache
from model.evaluate import predict, score
from model.thresholds import sigmoid
from tuner import gpu, pack
from tuner.trial import TrialTask, take_device

SIZE = {"input_height": 448, "input_width": 448}
GPU = torch.device("cuda", 0)
_SECONDS_A_PART = 150
_THREADS = 4


def samples_in(folder: Path) -> list[Any]:
    return list(layouts.read(folder))


def images_of(folder: Path) -> Cache:
    return open_cache(samples_in(folder), 448, 448)


def space_of(**parts: Any) -> Any:
    from tuner import space_file

    document = {
        "name": "bench",
        "data": {"height": 448, "width": 448, "validation_share": 0.25, "test_share": 0.25},
        "train": {"epochs": 2, "batch_size": 4},
        "search": {
            "weighted_loss": {"type": "categorical", "choices": [False, True]},
            "hard_mining_places": {"type": "int", "low": 0, "high": 4},
            "optimizer": {"type": "categorical", "choices": ["sgd", "adam"]},
        },
        "budget": {"trials": 90},
    }
    return space_file.parse(document | parts)


def allocate_all(step: int = 64 * MIB) -> int:
    """Bytes that fit, in blocks."""
    blocks = []
    while True:
        try:
            blocks.append(torch.empty(step, dtype=torch.uint8, device=GPU))
        except torch.OutOfMemoryError:
            return len(blocks) * step


def _beside() -> int:
    free, total = torch.cuda.mem_get_info(GPU)
    return int(total - free - torch.cuda.memory_reserved(GPU)) // MIB


def _squeezed(folder: Path, total: int) -> tuple[Any, ...]:
    share = round((gpu.CONTEXT_BYTES + 2.5 * 2**30) / total, 4)
    device = take_device(share, _THREADS)
    samples = samples_in(folder)
    reports: list[dict[str, Any]] = []
    started = time.perf_counter()
    task = TrialTask(samples, samples[:8], "dice_mean", "objective", {})
    config = RunConfig(**SIZE, epochs=1, batch_size=16, learning_rate=0.1)
    task.run(config, device, None, lambda progress, _folder: reports.append(dict(progress)))
    last = reports[-1]
    return share, 16, last["micro_batch"], last["status"], f"{time.perf_counter() - started:.1f}"


def _hold(other_end: Connection, seconds: float) -> None:
    free, _ = torch.cuda.mem_get_info(GPU)
    blocks = [torch.empty(int(free * 0.8), dtype=torch.uint8, device=GPU)] if seconds else []
    other_end.send("held")
    time.sleep(min(seconds, 60))
    del blocks


def _peak_of(answer: Connection, task: TrialTask, config: RunConfig, share: float) -> None:
    device = take_device(share, _THREADS)
    reports: list[dict[str, Any]] = []
    task.run(replace(config, learning_rate=0.01), device, None, lambda p, _folder: reports.append(dict(p)))
    answer.send((torch.cuda.max_memory_reserved(device), reports[-1]))


class _Broken(TrialTask):
    """Reads outside of a tensor, which CUDA never gets over."""

    def run(self, config: RunConfig, device: torch.device, resume: Path | None, report: Any) -> None:
        torch.zeros(1, device=device)[torch.tensor([9], device=device)].item()


def _host_of_broken(answer: Connection) -> None:
    answer.send(pack.Host(_Broken([], [], "dice_mean", "objective", {}), GPU).address)
    time.sleep(120)


def _losses_at(address: pack.Address, config: RunConfig, share: float = 0.2) -> list[float]:
    reports: list[dict[str, Any]] = []
    asked = pack.Asked(config, share, _THREADS, None)
    pack.train_at(address, asked, lambda progress, _folder, _use: reports.append(dict(progress)))
    return [row["loss_total"] for row in reports[-1]["history"]]


def _search(name: str, options: tuple[str, ...]) -> None:
    if importlib.util.find_spec("ray") is None:
        print("skipped: no ray here")
        return
    with tempfile.TemporaryDirectory(prefix="segdec-bench-") as runs:
        what = "search", "demo", "--data", "synthetic", "--runs", runs, "--name", name, "--wandb", "off", "--no-report"
        command = [sys.executable, "-m", "tuner", *what, "--debug", *options]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_A_PART - 10)  # noqa: S603
        wall = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        print("\n".join(line for line in (done.stdout + done.stderr).splitlines() if "GPU" in line), flush=True)
        run = Path(runs) / name
        print(f"resources in run.json: {json.loads((run / 'run.json').read_text()).get('resources')}\n", flush=True)
        records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        rows: list[tuple[Any, ...]] = [("trial", "status", "epochs", "from s", "to s", "seconds", "device-seconds")]
        for record in records:
            clock = (f"{record[key] or 0:.1f}" for key in ("started", "ended", "seconds", "device_seconds"))
            rows.append((record["trial"], record["status"], record["epochs"], *clock))
        table(*rows)
        print(f"{wall:.0f} s in all")


@dataclass(frozen=True)
class Bench:
    """The parts."""

    folder: Path
    """a set of 448x448 px"""

    def fraction(self) -> None:
        """A quarter of a GPU is a quarter, and memory that runs out under a share takes smaller parts of a batch."""
        device = take_device(0.25, _THREADS)
        total = torch.cuda.get_device_properties(device).total_memory
        fits = allocate_all()
        free = torch.cuda.mem_get_info(device)[0]
        torch.cuda.empty_cache()
        rows = [("what", "MiB")]
        rows += [("a quarter of the GPU", total // 4 // MIB), ("tensors that fit", fits // MIB)]
        rows += [("taken of the GPU then, CUDA included", (total - free) // MIB)]
        table(*rows)
        if fits + gpu.CONTEXT_BYTES > total / 4 or fits < total / 4 - 2 * gpu.CONTEXT_BYTES:
            raise AssertionError("the share is not what was given")
        table(("share", "batch asked for", "micro-batch", "status", "s"), _squeezed(self.folder, total))

    def wait(self) -> None:
        """A trial begins when the memory of the one before is free, and says what is wrong where it never is."""
        rows: list[tuple[Any, ...]] = [("memory held by another process for", "a whole GPU was taken after, s", "said")]
        for held in (0.0, 3.0, math.inf):
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            other = multiprocessing.get_context("spawn").Process(target=_hold, args=(theirs, held), daemon=True)
            other.start()
            ours.recv()
            started, said = time.perf_counter(), ""
            if math.isinf(held):
                gpu._SECONDS_TO_WAIT = 2.0
            try:
                take_device(1.0, _THREADS)
            except ValueError as error:
                said = f"{type(error).__name__}: {error}"
            rows.append((f"{held:g} s", f"{time.perf_counter() - started:.2f}", said))
            other.kill()
            other.join()
        table(*rows)

    def context(self) -> None:
        """What a process takes of the GPU beside tensors."""
        free, total = torch.cuda.mem_get_info(GPU)
        rows = [("after", "taken beside torch's memory, MiB"), ("CUDA's start", (total - free) // MIB)]
        torch.ones(1, device=GPU)
        rows.append(("a first tensor", _beside()))
        training = train.start(RunConfig(**SIZE, batch_size=4), GPU)
        cache = images_of(self.folder)
        train.train_epoch(training, cache)
        rows.append(("an epoch of training, batch 4", _beside()))
        score(training.network, cache, training.config, GPU)
        rows.append(("a validation", _beside()))
        table(*rows, ("as a trial's share counts it", gpu.context_bytes(GPU) // MIB))

    def packed(self) -> None:
        """Trials in one host: losses and seconds against one after another, what they leave, and a broken kernel."""
        samples = samples_in(self.folder)
        task = TrialTask(samples, samples[:8], "dice_mean", "objective", {})
        small = RunConfig(**SIZE, width=0.25, epochs=2, precision="float32")
        configs = [
            replace(small, learning_rate=rate, dilate=d) for rate, d in ((0.3, 1), (0.1, 1), (0.3, 5), (0.03, 3))
        ]
        task.run(replace(small, epochs=1), GPU, None, lambda *_: None)  # what is made once: caches, kernels
        alone: list[list[float]] = []
        started = time.perf_counter()
        for config in configs:
            task.run(config, GPU, None, lambda p, _: alone.append([row["loss_total"] for row in p["history"]]))
        one_by_one = time.perf_counter() - started
        alone = alone[1::2]
        torch.cuda.empty_cache()
        host = pack.Host(task, GPU)
        started = time.perf_counter()
        with ThreadPoolExecutor(len(configs)) as pool:
            together = list(pool.map(lambda config: _losses_at(host.address, config), configs))
        packed = time.perf_counter() - started
        left = torch.cuda.memory_reserved(GPU) // MIB
        table(
            ("learning rate, dilation", "losses alone", "losses in a host"),
            *((f"{c.learning_rate:g}, {c.dilate}", *(", ".join(f"{loss:.6f}" for loss in losses) for losses in both))
              for c, *both in zip(configs, alone, together, strict=True)),
        )  # fmt: skip
        print(
            f"\nOne after another {one_by_one:.1f} s, in a host {packed:.1f} s; it keeps {left} MiB afterwards.",
            flush=True,
        )
        np.testing.assert_allclose(together, alone, rtol=0.05)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        broken = multiprocessing.get_context("spawn").Process(target=_host_of_broken, args=(theirs,), daemon=True)
        broken.start()
        try:
            _losses_at(ours.recv(), configs[0])
        except pack.HostLost as error:
            print(f"A kernel that goes wrong: {error}", flush=True)
        else:
            raise AssertionError("a host outlived its CUDA context")

    def crowd(self) -> None:
        """In one host: eight trials that begin at once, then forty in turn beside a long one; losses as alone."""
        samples = samples_in(self.folder)
        task = TrialTask(samples, samples[:8], "dice_mean", "objective", {})
        short = RunConfig(input_height=128, input_width=128, width=0.25, epochs=1, learning_rate=0.1)
        long = replace(short, epochs=40)
        alone: dict[int, list[float]] = {}
        for config in (short, long):
            task.run(
                config, GPU, None,
                lambda p, _, n=config.epochs: alone.update({n: [row["loss_total"] for row in p["history"]]}),
            )  # fmt: skip
        host = pack.Host(task, GPU)
        with ThreadPoolExecutor(8) as pool:
            at_once = list(pool.map(lambda _: _losses_at(host.address, short, 0.12), range(8)))
            beside = pool.submit(_losses_at, host.address, long, 0.12)
            in_turn = [_losses_at(host.address, short, 0.12) for _ in range(40)]
        found = at_once + in_turn
        table(
            ("trials", "largest difference of a loss to that alone"),
            (f"{len(found)} of one epoch", f"{max(abs(one[0] / alone[1][0] - 1) for one in found):.1e}"),
            ("the long one", f"{max(abs(a / b - 1) for a, b in zip(beside.result(), alone[40], strict=True)):.1e}"),
        )
        np.testing.assert_allclose([one[0] for one in found], alone[1][0], rtol=0.05)

    def search_chosen(self) -> None:
        """A search that chooses the share itself."""
        _search("chosen", ("--trials", "3"))

    def search_mixed(self) -> None:
        """One trial at a time without the GPU, beside those that have it."""
        _search("mixed", ("--trials", "3", "--cpu-trials", "1", "--gpus-per-trial", "1", "--cpus-per-trial", "2"))

    def several(self) -> None:
        """Two processes that train one network, on the one GPU that there is, against one process."""
        if importlib.util.find_spec("model.parallel") is None:
            print("skipped: there is no model/parallel.py yet")
            return

        samples = samples_in(self.folder)
        config = RunConfig(**SIZE, width=0.25, epochs=2, batch_size=5, learning_rate=0.1, hard_mining_places=2,
                           weighted_loss=True, precision="float32")  # fmt: skip
        task = TrialTask(samples, samples[:8], "dice_mean", "objective", {})
        found = []
        for devices in ([GPU], [GPU, GPU]):
            reports: list[dict[str, Any]] = []
            started = time.perf_counter()

            def heard(progress: dict[str, Any], _folder: Path | None, reports: list[dict[str, Any]] = reports) -> None:
                reports.append(json.loads(json.dumps(progress)))

            if len(devices) == 1:
                task.run(config, GPU, None, heard)
            else:
                task.run_together(config, devices, None, heard)
            found.append(([row["loss_total"] for row in reports[-1]["history"]], time.perf_counter() - started))
        table(
            ("processes", "losses", "s in all, with their start"),
            *((n + 1, ", ".join(f"{loss:.6f}" for loss in losses), f"{s:.1f}") for n, (losses, s) in enumerate(found)),
        )
        np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-3)

    def peak(self) -> None:
        """What `tuner plan` measures, and what trials in the share that it chooses really take."""
        from tuner import plan

        space = space_of()
        found = plan.plan(space, self.folder)
        print(plan.show(found), "\n", flush=True)
        torch.cuda.empty_cache()
        memory = found["memory"]
        share = memory["gpus_per_trial"]
        rows: list[tuple[Any, ...]] = [
            ("trial", "share", "measured for it, MiB", "torch held at its peak, MiB", "micro-batch", "status")
        ]
        found_splits = splits.assign(samples_in(self.folder), self.folder, 0.25, 0.25, 0)
        task = TrialTask.of(space, found_splits.train, found_splits.validation)
        for names, config in plan.corners_of(space).items():
            context_of = multiprocessing.get_context("spawn")
            ours, theirs = context_of.Pipe()
            process = context_of.Process(target=_peak_of, args=(theirs, task, config, share))
            process.start()
            theirs.close()
            held, last = ours.recv()
            process.join()
            measured = memory["trial_bytes"] // MIB
            rows.append((", ".join(names), share, measured, held // MIB, last["micro_batch"], last["status"]))
        table(*rows)

    def curves(self) -> None:
        """One training on the processor and twice on the GPU."""
        config = RunConfig(
            input_height=128, input_width=128, width=0.25, epochs=4, learning_rate=0.5, precision="float32"
        )
        cache = open_cache(samples_in(self.folder)[:24], 128, 128)
        torch.set_num_threads(os.cpu_count() or 1)

        def curve(device: torch.device) -> np.ndarray:
            return np.array([epoch["loss_total"] for epoch in train.fit(train.start(config, device), cache)])

        cpu, first, second = curve(torch.device("cpu")), curve(GPU), curve(GPU)
        rows: list[tuple[Any, ...]] = [("epoch", "CPU", "GPU", "GPU again", "largest difference to CPU")]
        for n, losses in enumerate(zip(cpu, first, second, strict=True)):
            apart = max(abs(losses[1] / losses[0] - 1), abs(losses[2] / losses[0] - 1))
            rows.append((n + 1, *(f"{loss:.6f}" for loss in losses), f"{apart:.1e}"))
        table(*rows)
        np.testing.assert_allclose(first, cpu, rtol=0.05)

    def recorded(self) -> None:
        """Losses of steps that are recorded and played back, and of the same steps kernel by kernel."""
        cache = open_cache(samples_in(self.folder), 128, 128)
        rows: list[tuple[Any, ...]] = [("training", "recorded", "kernel by kernel")]
        found = []
        for more in (
            {"learning_rate": 0.1},
            {"optimizer": "adam", "learning_rate": 1e-3, "hard_mining_places": 2, "weighted_loss": True},
            {
                "learning_rate": 0.1,
                "schedule": "cosine",
                "gradient_adjustment": False,
                "batch_size": 1,
                "pixel_positive_weight": "balanced",
                "image_positive_weight": "balanced",
            },
        ):
            config = RunConfig(**{**SIZE, "width": 0.25, "epochs": 4, "batch_size": 4, **more})
            config = replace(config, input_height=128, input_width=128)
            both = [
                [epoch["loss_total"] for epoch in train.fit(train.start(one, GPU), cache)]
                for one in (config, replace(config, cuda_graphs=False))
            ]
            found.append(both)
            rows.append((more, *(", ".join(f"{loss:.6f}" for loss in losses) for losses in both)))
        table(*rows)
        np.testing.assert_allclose(*zip(*found, strict=True), rtol=1e-3)

    def parity(self) -> None:
        """A network trained and judged on the GPU, and its ONNX file on the processor (model/parity.py)."""
        if missing := [n for n in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(n) is None]:
            print(f"skipped: no {', '.join(missing)} here")
            return
        from model import export
        from model.parity import Judged, compare

        rows: list[tuple[Any, ...]] = [
            ("precision on the GPU", "images", "probability to the file", "mask pixels unlike the GPU's",
             "probability to the GPU's", "decision's logit to the GPU's"),
        ]  # fmt: skip
        cache = images_of(self.folder)
        for precision in ("float32", "bfloat16"):
            config = RunConfig(**SIZE, width=0.25, epochs=4, learning_rate=0.5, precision=precision)
            training = train.start(config, GPU)
            list(train.fit(training, cache))
            scores = score(training.network, cache, config, GPU)
            thresholds = scores.choose(config.judgement())
            shown = np.array(cache.images[:8])
            answers = list(predict(training.network, shown, config, GPU))
            decisions, logits = (torch.cat(part).cpu().numpy() for part in zip(*answers, strict=True))
            masks = np.stack([thresholds.mask(*one) for one in zip(logits, decisions, strict=True)]) > 0
            names = [sample.name for sample in cache.samples[:8]]
            judged = Judged(names, shown, sigmoid(logits), masks, decisions)
            module = export.Deployable(training.network.cpu(), thresholds)
            found = compare(module, export.run_onnx(export.to_onnx(module, 448, 448, {})), judged)
            decision = "none" if found.judged_decision is None else f"{found.judged_decision:.1e}"
            rows.append((precision, found.images, f"{found.probability:.1e}", found.unlike_judged,
                         f"{found.judged_probability:.1e}", decision))  # fmt: skip
        table(*rows)

    def search_halves(self) -> None:
        """Two trials on a GPU at a time."""
        _search("halves", ("--trials", "3", "--gpus-per-trial", "0.5", "--cpus-per-trial", "2"))


PARTS = [name for name in vars(Bench) if callable(getattr(Bench, name)) and not name.startswith("_")]


def _data() -> Iterator[Path]:
    """A set of 448x448 px, made once."""
    with tempfile.TemporaryDirectory(prefix="segdec-bench-") as folder:
        os.environ["SEGDEC_TUNER_CACHE"] = str(Path(folder) / "cache")
        synthetic.write(Path(folder) / "set", count=40, height=448, width=448)
        yield Path(folder) / "set"


def main() -> int:
    """Runs the parts that are named, or all of them; how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", metavar="PART", nargs="*", choices=[[], *PARTS], help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=5, help="after these no part begins")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data:  # one part, in this process
        getattr(Bench(options.data), options.parts[0])()
        return 0
    print(machine(), flush=True)
    failed: list[str] = []
    begun = time.perf_counter()
    for folder in _data():
        for name in options.parts or PARTS:
            if time.perf_counter() - begun > 60 * options.minutes:
                print(f"\n### {name}: left out, the {options.minutes:g} minutes are over", flush=True)
                continue
            summary = (getattr(Bench, name).__doc__ or "").splitlines()[0]
            print(f"\n### {name}: {summary}\n", flush=True)
            started = time.perf_counter()
            command = [sys.executable, "-m", "bench.gpu", name, "--data", str(folder)]
            try:
                code = subprocess.run(command, timeout=_SECONDS_A_PART, stderr=subprocess.STDOUT).returncode  # noqa: S603
            except subprocess.TimeoutExpired:
                code = f"no end within {_SECONDS_A_PART} s"
            if code:
                failed.append(name)
            print(
                f"\n({name}: {'ok' if not code else f'FAILED, {code}'}, {time.perf_counter() - started:.0f} s)",
                flush=True,
            )
    print(f"\n{len(failed)} parts failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())

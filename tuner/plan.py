"""What a search would cost: a few steps of some configurations, timed here, and what follows from them.

Makes no run. The test split is looked at as a run's creation looks at it (are the files whole?), never by a network.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from model import folds, layouts, splits
from model.config import DEFAULTS, JUDGING_FIELDS, Judgement, RunConfig
from model.inspection import Read
from model.splits import Splits
from tuner import run, space_file
from tuner.options import Options
from tuner.schedulers import rungs
from tuner.shares import most_on_a_gpu, part_of_gpu
from tuner.space import Budget, FloatParam, Param, Repeats, Scheduler, Space
from tuner.timing import Corner, Machine, gpu_of, machine, time_corner
from tuner.trial import batch_problem, take_device

_COSTS: Mapping[str, tuple[Any, ...]] = {
    "architecture": (),
    "norm": ("root_std", "standard"),
    "optimizer": ("sgd", "adam"),
    "gradient_adjustment": (True, False),
    "weighted_loss": (False, True),
    "weight_per": ("image", "component"),
    "hard_mining_places": (),
    "hard_mining_score": ("loss", "disagreement", "errors"),
    "num_segmented": (),
    "augment_flips": (False, True),
    "augment_quarter_turns": (False, True),
    "augment_brightness": (),
    "augment_color": (),
}
"""Searchable fields that change what a step costs, with their values from the cheapest to the dearest; of numbers the
larger is the dearer one. (Width, epochs, batch and precision are the same for all trials of a space.)"""

_MARGIN = 1.05
"""Other batches and hours of them leave other fragments in torch's memory than those that were timed."""

Range = tuple[float, float]
"""the least and the most"""


def plan(
    space: Space | str | Path,
    data: str | Path,
    *,
    concurrent: int | None = None,
    cpus_per_trial: float | None = None,
    gpus_per_trial: float | None = None,
) -> dict[str, Any]:
    """Checks what creating a run would check, times a few steps on this machine and forecasts the search: plain
    values, ready for JSON.

    ValueError for anything that cannot work, and for a budget that cannot hold the baseline.
    """
    space = space if isinstance(space, Space) else space_file.load(space)
    Options(concurrent=concurrent, cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial)  # holds the rules
    if problem := batch_problem(space.baseline_config(space.seed).batch_size, int(gpus_per_trial or 1)):
        raise ValueError(problem)
    found = run.checked_splits(space, data)
    first = folds.splits_of_each(found, space.cross_validation, space.seed)[0]
    with machine(cpus_per_trial, gpus_per_trial, concurrent) as (here, device):
        corners = [
            time_corner(space, first, names, config, device, gpus_per_trial or 1)
            for names, config in corners_of(space).items()
        ]
    if here.on_gpu and gpus_per_trial is None:
        here = _sharing(here, _trial_bytes(corners, here.on_gpu), cpus_per_trial, concurrent, trials_of(space))
    return forecast(space, _images(space, found), corners, here)


def baseline_seconds(space: Space, found: Splits, cpus: float, gpus: float, read: Read = Path.read_bytes) -> float:
    """How long the baseline takes in this process, which has a trial's resources, by two of its steps."""
    device = take_device(gpus, int(cpus))
    first = folds.splits_of_each(found, space.cross_validation, space.seed)[0]
    corner = time_corner(space, first, ("baseline",), space.baseline_config(space.seed), device, gpus, read)
    return _trial_seconds(corner, _images(space, found))


def measure(space: Space, found: Splits, cpus: float, gpus: float, read: Read = Path.read_bytes) -> dict[str, Any]:
    """What a search asks of this process, which has a trial's resources with a whole GPU: how long the baseline takes,
    and how much of the GPU the largest of the space's trials."""
    device = take_device(gpus, int(cpus))
    first = folds.splits_of_each(found, space.cross_validation, space.seed)[0]
    corners = [
        time_corner(space, first, names, config, device, gpus, read) for names, config in corners_of(space).items()
    ]
    baseline = next(corner for corner in corners if "baseline" in corner.names)
    name, total = gpu_of(device)
    return {
        "baseline_seconds": _trial_seconds(baseline, _images(space, found)),
        "trial_bytes": _trial_bytes(corners, on_gpu=True),
        "gpu": name,
        "gpu_bytes": total,
    }


def chosen(measured: Mapping[str, Any], part: float, cpus: float) -> str:
    """In one line: what part of a GPU trials take, and why."""
    trials = f"{int(1 / part)} trials on a GPU" if part < 1 else "a whole GPU a trial"
    return (
        f"{trials}, --gpus-per-trial {part:g} --cpus-per-trial {cpus:g}: the largest takes "
        f"{_bytes(measured['trial_bytes'])} of the {_bytes(measured['gpu_bytes'])} of {measured['gpu']}"
    )


def _sharing(
    machine: Machine, trial_bytes: int, cpus: float | None, concurrent: int | None, trials: int | None
) -> Machine:
    """The machine with the part of a GPU that a search would choose here."""
    most = most_on_a_gpu(machine.cores, machine.gpus, cpus, at_once(concurrent, trials))
    part = part_of_gpu(trial_bytes, machine.memory_bytes, most)
    fit = machine.gpus * int(1 / part)
    return replace(machine, devices_per_trial=part, concurrent=concurrent or fit)


def at_once(concurrent: int | None, trials: int | None) -> int | None:
    """How many trials can run at once at most, whatever the machine has room for."""
    return min((limit for limit in (concurrent, trials) if limit), default=None)


def _trial_bytes(corners: list[Corner], on_gpu: bool) -> int:
    """What the largest trial needs."""
    need = max(corner.memory_bytes for corner in corners)
    return int(need * _MARGIN) if on_gpu else need


def _images(space: Space, found: Splits) -> dict[str, int]:
    """How many images an epoch and each split have. With cross-validation `trainings` says how many a trial is, and the
    others are of one of them, on average; `outer` are those that it only scores."""
    if space.cross_validation is None:
        return _images_of(found)
    each = folds.splits_of_each(found, space.cross_validation, space.seed)
    mean = {key: round(fmean(_images_of(one)[key] for one in each)) for key in _images_of(found)}
    outer = mean["validation"] if space.cross_validation.nested else 0
    return mean | {"outer": outer, "trainings": len(each)}


def _images_of(found: Splits) -> dict[str, int]:
    counts = splits.counts(found.train)
    return {
        "epoch": counts["positive"] + min(counts["negative"], counts["positive"]),
        "train": len(found.train),
        "validation": len(found.validation),
        "test": len(found.test),
    }


def corners_of(space: Space) -> dict[tuple[str, ...], RunConfig]:
    """What is timed: the baseline, and of each architecture the smallest and the largest corner by cost; those
    that cost the same are one, under all their names."""
    wanted = {"baseline": space.baseline_config(space.seed)}
    searched = space.search.get("architecture")
    architectures = searched.samples() if searched else (None,)
    for architecture in architectures:
        for name, place in (("smallest", 0), ("largest", -1)):
            params = {field: _by_cost(field, param)[place] for field, param in space.search.items()}
            if architecture:
                params["architecture"] = architecture
            label = name + (f" {architecture}" if len(architectures) > 1 else "")
            wanted[label] = space.config({field: params[field] for field in space.active(params)}, space.seed)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for label, config in wanted.items():
        alike.setdefault(tuple(_costs(config).items()), []).append(label)
    return {tuple(labels): wanted[labels[0]] for labels in alike.values()}


def _by_cost(field: str, param: Param) -> list[Any]:
    """Values of a parameter, the cheapest first."""
    order = _COSTS.get(field, ())

    def rank(value: Any) -> float:
        if value in order:
            return order.index(value)
        return math.inf if value == "all" else value if isinstance(value, int | float) else 0

    return sorted(param.samples(), key=rank)


def _costs(config: RunConfig) -> dict[str, Any]:
    """The fields that decide what a step costs; of an augmentation only whether there is one."""
    found = {name: getattr(config, name) for name in _COSTS}
    for name in ("augment_brightness", "augment_color"):
        found[name] = found[name] > 0
    if not found["weighted_loss"]:
        found |= {"weight_per": None, "num_segmented": None}
    if not found["hard_mining_places"]:
        found["hard_mining_score"] = None
    return found


def forecast(space: Space, images: Mapping[str, int], corners: list[Corner], machine: Machine) -> dict[str, Any]:
    """What follows from the times of some corners. `images` counts those of an epoch and of each split.

    ValueError if the budget cannot hold the baseline.
    """
    epochs, budget = corners[0].config.epochs, space.budget
    seconds = {corner.names: _trial_seconds(corner, images) for corner in corners}
    baseline = next(value for names, value in seconds.items() if "baseline" in names)
    check_budget(budget, baseline, machine.devices_per_trial)
    trials = trials_of(space)
    share = least_epochs(space.scheduler, space.trial_length, trials or 100) / space.trial_length
    others = (min(seconds.values()) * share, max(seconds.values()))
    return {
        "space": space.name,
        "device": machine.name,
        "on_gpu": machine.on_gpu,
        "devices_per_trial": machine.devices_per_trial,
        "concurrent": machine.concurrent,
        "images": dict(images),
        "epochs": epochs,
        "batch_size": corners[0].config.batch_size,
        "corners": [_describe(corner, seconds[corner.names], images, corners) for corner in corners],
        "baseline_hours": baseline / 3600,
        "trials": trials,
        "repeats": _repeats(space.repeats, trials, seconds.values(), machine.concurrent),
        "least_share_of_epochs": share,
        "search": _search(trials, baseline, others, machine, budget) if trials else None,
        "budget": _room(budget, trials, baseline, others, machine),
        "memory": _fits(corners, machine, space),
        "finals_hours": 2 * max(c.image_seconds for c in corners) * (images["validation"] + images["test"]) / 3600,
        "cache_bytes": sum(images.get(split, 0) for split in (*layouts.SPLITS, "outer"))
        * (4 * space.data.height * space.data.width),
    }  # fmt: skip


def _trial_seconds(corner: Corner, images: Mapping[str, int]) -> float:
    """All epochs of all trainings."""
    once = corner.config.epochs * _epoch_seconds(corner, images) + images.get("outer", 0) * corner.image_seconds
    return images.get("trainings", 1) * once


def _epoch_seconds(corner: Corner, images: Mapping[str, int]) -> float:
    steps = math.ceil(images["epoch"] / corner.config.batch_size)
    return steps * corner.step_seconds + images["validation"] * corner.image_seconds + corner.epoch_seconds


def _describe(corner: Corner, trial_seconds: float, images: Mapping[str, int], corners: list[Corner]) -> dict[str, Any]:
    baseline = next(other for other in corners if "baseline" in other.names).config
    before, costs = _costs(baseline), _costs(corner.config)
    differs = [name for name in _COSTS if costs[name] != before[name]]
    values = {name: getattr(corner.config, name) for name in differs}
    return {
        "names": list(corner.names),
        "differs": {name: value for name, value in values.items() if value != getattr(baseline, name)},
        "step_seconds": corner.step_seconds,
        "epoch_seconds": _epoch_seconds(corner, images),
        "trial_hours": trial_seconds / 3600,
        "memory_bytes": corner.memory_bytes,
        "micro_batch": corner.micro_batch,
    }


def trials_of(space: Space) -> int | None:
    """How many trials a search trains at most, the baseline among them; None where only time or money end it."""
    most = [space.budget.trials] if space.budget.trials else []
    if not space.search or space.sampler == "grid":
        countable = not any(isinstance(p, FloatParam) and p.step is None for p in space.search.values())
        assert countable  # a grid of anything else is refused when a space is read
        most.append(_networks(space))
    return min(most, default=None)


def _networks(space: Space) -> int:
    """How many trainings a grid takes, the baseline's among them: points that differ only in how a network is judged
    share one, where all these ways are replayed."""
    replayed = space.replayed_values()
    trained = [name for name in space_file.TUNABLE if name not in JUDGING_FIELDS]
    judged = [name for name in JUDGING_FIELDS if name not in replayed]
    fixed = DEFAULTS | dict(space.train)
    points = [*(fixed | point for point in space.grid()), space.baseline_config(space.seed).to_dict()]
    found = set()
    for point in points:
        judgement = Judgement.of(point)
        found.add(tuple(point[name] for name in trained) + tuple(getattr(judgement, name) for name in judged))
    return len(found)


def least_epochs(scheduler: Scheduler, epochs: int, trials: int) -> float:
    """Epochs of a trial on average, if at each rung no more than the best 1/reduction go on. That is as few as
    asha, hyperband and top_k come to; the other schedulers promise nothing."""
    if scheduler.name == "top_k":
        kept = min(scheduler.keep, trials)
        return (trials * scheduler.min_epochs + kept * (epochs - scheduler.min_epochs)) / trials
    total = 0.0
    for number in range(trials):
        stays, before = 1.0, 0
        for rung in rungs(scheduler, epochs, number):
            total += stays * (rung - before)
            stays, before = stays / scheduler.reduction, rung
        total += stays * (epochs - before)
    return total / trials


def _search(trials: int, baseline: float, others: Range, machine: Machine, budget: Budget) -> dict[str, Any]:
    """Ranges of a whole search: with the cheapest configurations and the strictest stopping, and with the dearest and
    none. Seconds in, hours out."""
    total = [(baseline + (trials - 1) * each) / 3600 for each in others]
    longest = max(baseline, others[1]) / 3600
    slots = min(machine.concurrent, trials)
    device_hours = [hours * machine.devices_per_trial for hours in total]
    price = budget.price_per_device_hour
    return {
        # The most: no trial waits for a slot that is free (Graham's bound on any order).
        "wall_hours": [max(baseline / 3600, total[0] / slots), total[1] / slots + (1 - 1 / slots) * longest],
        "device_hours": device_hours,
        "money": [hours * price for hours in device_hours] if price else None,
    }


def _repeats(
    repeats: Repeats | None, trials: int | None, seconds: Collection[float], slots: int
) -> dict[str, Any] | None:
    """How long the repeats take at most, with the cheapest and with the dearest configurations. None without any."""
    trainings = repeats and (repeats.trainings or (-(-trials // 2) if trials else None))
    if not (repeats and trainings):
        return None
    rounds = -(-trainings // slots)
    hours = [min(rounds * each / 3600, repeats.hours or math.inf) for each in (min(seconds), max(seconds))]
    return {"trainings": trainings, "wall_hours": hours}


def _room(budget: Budget, trials: int | None, baseline: float, others: Range, machine: Machine) -> dict[str, Any]:
    """For each limit of time or money: the fewest and the most trials that it has room for, the baseline among them."""
    found = {}
    least, most = others
    for name, hours in _hours_of_trials(budget, machine.devices_per_trial).items():
        slots, seconds = (machine.concurrent, hours * 3600) if name == "hours" else (1, hours * 3600)
        few = 1 + int((seconds - baseline) / most) + (slots - 1) * int(seconds / most)
        many = max(few, 1 + int((seconds * slots - baseline) / least))
        fits = [min(n, trials) if trials else n for n in (few, many)]
        found[name] = {"limit": getattr(budget, name), "trials": fits}
    return found


def _hours_of_trials(budget: Budget, devices: float) -> dict[str, float]:
    """Each limit as hours: of the clock, or of trials one after another."""
    found = {}
    if budget.hours is not None:
        found["hours"] = budget.hours
    if budget.device_hours is not None:
        found["device_hours"] = budget.device_hours / devices
    if budget.money is not None and budget.price_per_device_hour:
        found["money"] = budget.money / budget.price_per_device_hour / devices
    return found


def check_budget(budget: Budget, baseline: float, devices: float, margin: float = 1.0) -> None:
    """ValueError that names every limit that the baseline, which takes so many seconds, would exceed `margin` times."""
    hours = baseline / 3600
    problems = []
    for name, held in _hours_of_trials(budget, devices).items():
        if held * margin < hours:
            limit = getattr(budget, name)
            needed = limit * hours / held
            shown = f"{needed:,.0f}" if needed >= 100 else f"{needed:.3g}"
            problems.append(
                f"budget.{name} must hold the baseline, which always runs to its end and takes about "
                f"{shown} here, found {limit:g}; raise it, take a faster device, or lower "
                "train.epochs, train.width or the input size"
            )
    if problems:
        raise ValueError("\n  ".join([*problems, f"({_CAVEAT})"]))


def _fits(corners: list[Corner], machine: Machine, space: Space) -> dict[str, Any]:
    """How many trials fit into memory side by side; on a GPU also the part of it that a search takes unless it is told
    another."""
    need = _trial_bytes(corners, machine.on_gpu)
    part = None
    if machine.on_gpu:
        most = most_on_a_gpu(machine.cores, machine.gpus, None, trials_of(space))
        part = part_of_gpu(need, machine.memory_bytes, most)
    fit = int(1 / part) if part else machine.memory_bytes // need
    return {"trial_bytes": need, "device_bytes": machine.memory_bytes, "fit": fit, "gpus_per_trial": part}


_CAVEAT = "estimates from a few steps on this machine as busy as it was; trials side by side slow each other"


def show(found: Mapping[str, Any]) -> str:
    """The same for people, in 100 columns."""
    images, corners = found["images"], found["corners"]
    head = (
        f"plan of {found['space']}: {len(corners)} configuration{'s' * (len(corners) > 1)} timed on {found['device']}"
    )
    rows: list[tuple[str, ...]] = [("", "step", "epoch", "trial", "memory")]
    for corner in corners:
        times = (corner["step_seconds"], corner["epoch_seconds"], corner["trial_hours"] * 3600)
        rows.append((", ".join(corner["names"]), *map(_duration, times), _bytes(corner["memory_bytes"])))
    widths = [max(len(row[n]) for row in rows) for n in range(5)]
    lines = [head, ""]
    for row, corner in zip(rows, [None, *corners], strict=True):
        cells = [row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in range(1, 5))]
        lines.append("  ".join(cells).rstrip())
        if corner and (notes := _notes(corner)):
            lines += textwrap.wrap(notes, 100, initial_indent="  ", subsequent_indent="  ")
    lines.append("")
    sections = {
        "data": f"{images['train']} training images, {images['validation']} validation, {images['test']} test; "
        f"an epoch takes {images['epoch']} of them, {found['batch_size']} a step; {found['epochs']} epochs a "
        + (f"fold, {images['trainings']} folds a trial" if "trainings" in images else "trial"),
        "search": _search_text(found),
        **({"repeats": _repeats_text(found["repeats"])} if found["repeats"] else {}),
        "budget": _budget_text(found),
        "memory": _memory_text(found),
        "besides": f"evaluating winner and baseline at the end takes about {_hours(found['finals_hours'])}; "
        f"the decoded images {_bytes(found['cache_bytes'])} of disk",
    }
    for name, text in sections.items():
        lines += _wrapped(name, text)
    return "\n".join([*lines, "", _CAVEAT[0].upper() + _CAVEAT[1:] + "."])


def _notes(corner: Mapping[str, Any]) -> str:
    notes = [f"{name} {_plain(value)}" for name, value in corner["differs"].items()]
    if corner["micro_batch"]:
        notes.append(f"micro_batch {corner['micro_batch']}")
    return ", ".join(notes)


def _repeats_text(repeats: Mapping[str, Any]) -> str:
    count = repeats["trainings"]
    return (
        f"at most {count} further training{'s' * (count > 1)} of the best after the search: "
        f"{_span(repeats['wall_hours'], _hours)}, less where one is separated early"
    )


def _search_text(found: Mapping[str, Any]) -> str:
    side = f"{found['concurrent']} at once"
    if found["search"] is None:
        return f"no number of trials is given; {side}"
    search, unit = found["search"], "GPU-hours" if found["on_gpu"] else "core-hours"
    parts = [
        f"{found['trials']} trial{'s' * (found['trials'] > 1)}, {side}: {_span(search['wall_hours'], _hours)}",
        f"{_span(search['device_hours'], _figure)} {unit}",
    ]
    if search["money"]:
        parts.append(f"money {_span(search['money'], _figure)}")
    stopped = found["least_share_of_epochs"] < 1
    why = " (the most: nothing is stopped early)" if stopped and found["trials"] > 1 else ""
    return ", ".join(parts) + why


def _budget_text(found: Mapping[str, Any]) -> str:
    if not found["budget"]:
        return "trials alone"
    parts = []
    for name, limit in found["budget"].items():
        clock = f" ({_hours(limit['limit'])})" if name == "hours" else ""
        room = f"{_span(limit['trials'], str)} trial{'s' * (limit['trials'][1] > 1)}"
        parts.append(f"{name.replace('_', '-')} {_plain(limit['limit'])}{clock}: room for {room}")
    return "; ".join(parts) + "; the search ends at the first limit"


def _memory_text(found: Mapping[str, Any]) -> str:
    memory = found["memory"]
    if found["on_gpu"]:
        return (
            f"a trial needs about {_bytes(memory['trial_bytes'])} of the GPU's {_bytes(memory['device_bytes'])} "
            f"(the most that torch held, and CUDA itself): {memory['fit']} a GPU with --gpus-per-trial "
            f"{memory['gpus_per_trial']:g}, which a search takes if it is told nothing else"
        )
    text = (
        f"a trial needs about {_bytes(memory['trial_bytes'])} (this process at its peak, with its libraries): "
        f"{memory['fit']} fit into the machine's {_bytes(memory['device_bytes'])}"
    )
    return text + ("" if memory["fit"] >= found["concurrent"] else f"; TOO FEW for {found['concurrent']} at once here")


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=name.ljust(9), subsequent_indent=" " * 9, break_on_hyphens=False)


def _span(values: Any, form: Callable[[Any], str]) -> str:
    low, high = (form(value) for value in values)
    number, _, unit = low.partition(" ")
    return low if low == high else f"{number if unit == high.partition(' ')[2] else low} to {high}"


def _hours(hours: float) -> str:
    return _duration(hours * 3600)


def _duration(seconds: float) -> str:
    for unit, length, below in (("ms", 0.001, 1.0), ("s", 1, 90), ("min", 60, 5400), ("h", 3600, 72 * 3600)):
        if seconds < below:
            return f"{_figure(seconds / length)} {unit}"
    return f"{_figure(seconds / 86400)} days"


def _bytes(count: float) -> str:
    return f"{_figure(count / 2**30)} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _figure(value: float) -> str:
    """Two significant digits, or whole units: more would say too much."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)

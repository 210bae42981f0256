"""Numbers and names as the report prints them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from model.metrics import METRICS

NONE = "–"  # noqa: RUF001

_OTHER_FIGURES = {
    "tp": "true positives",
    "fp": "false positives",
    "fn": "false negatives",
    "tn": "true negatives",
    "threshold": "segmentation threshold",
    "num_segmented": "images with masks",
    "labelling_minutes": "minutes of labelling",
    "device_seconds": "device-seconds of training",
}
STATUS_NAMES = {
    "completed": "completed",
    "stopped_early": "stopped early",
    "diverged": "diverged",
    "failed": "failed",
}


def metric(name: str) -> str:
    return METRICS[name].title if name in METRICS else _OTHER_FIGURES.get(name, name)


def figure(value: Any, digits: int = 3) -> str:
    """A figure between 0 and 1, a count, or a dash where there is none."""
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def mean_std(mean: Any, std: Any) -> str:
    return NONE if mean is None else f"{figure(mean)} ± {figure(std)}"


def interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def difference(value: float | None, bounds: Sequence[float] | None) -> str:
    """A signed figure with its interval, if it has one."""
    if value is None:
        return ""
    return f"{value:+.3f}" + ("" if bounds is None else f" ({bounds[0]:+.3f} to {bounds[1]:+.3f})")


def probability(value: float | None) -> str:
    """A threshold: near 0 and near 1 its own digits matter."""
    if value is None:
        return NONE
    return f"{value:.3g}" if value < 0.1 else f"{value:.3f}" if value < 0.999 else f"1 - {1 - value:.2g}"


def rule(name: str, factor: int) -> str:
    """A threshold rule, with its factor where it has one."""
    return f"{name}/{factor}" if name == "pr_curve" else name


def setting(value: Any) -> str:
    """The value of a field of a configuration."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else NONE if value is None else str(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def parameters(count: int) -> str:
    """A count of weights, to three digits."""
    for size, letter in ((1_000_000, " M"), (1000, " k")):
        if count >= size:
            share = count / size
            return f"{share:.0f}{letter}" if share >= 100 else f"{share:.3g}{letter}"
    return str(count)


def search_range(parameter: dict[str, Any]) -> str:
    """The range of a searched parameter, as the space gives it."""
    if "choices" in parameter:
        text = ", ".join(setting(choice) for choice in parameter["choices"])
    else:
        text = f"{setting(parameter['low'])} to {setting(parameter['high'])}"
        text += ", logarithmic" if parameter.get("log") else ""
        text += f", step {setting(parameter['step'])}" if parameter.get("step") not in (None, 1) else ""
    if when := parameter.get("when"):
        text += "; when " + " and ".join(
            f"{name} is {' or '.join(map(setting, values))}" for name, values in when.items()
        )
    return text


def bound(constraint: dict[str, Any]) -> str:
    """A constraint of a space."""
    side, limit = ("at least", "min") if "min" in constraint else ("at most", "max")
    return f"{metric(constraint['metric'])} {side} {constraint[limit]:g}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shorten(text: str, length: int) -> str:
    """Cuts the middle out of a long name."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return text[:head] + "…" + text[len(text) - (length - 1 - head) :]


def file_name(text: str, length: int = 60) -> str:
    """ASCII letters, digits, dots and dashes, without a suffix: safe on every file system and in a link."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    plain = re.sub(r"\.[A-Za-z]{3,4}$", "", plain)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", plain).strip("._")[:length] or "image"

"""Where a run stands, read from its directory and its study; writes nothing, so that a search is not disturbed."""

from __future__ import annotations

import time
from typing import Any

from tuner import records, selection
from tuner.run import TRIALS, Run


def describe(run: Run) -> dict[str, Any]:
    """What `tuner status --json` prints (DESIGN: interfaces). Beyond that: `nearest`, the completed trial that is least
    beyond the constraints, where none meets them; `front`, where there are two objectives; `repeats`, how
    many ended in each way and their `state`, null where none were begun."""
    info, found = run.info, run.records
    running = run.is_running()
    state = info["state"] if running or info["state"] != "running" else "stopped"  # killed
    best = records.best(found)
    nearest = records.nearest(found)
    counts = records.count(found)
    elapsed = _elapsed(run, running)
    return {
        "run": str(run.directory),
        "state": "running" if running else "finished" if state == "finished" else "stopped",
        "trials": len(found),
        **counts,
        "running": _running(run) if running else 0,
        "reasons": records.reasons(found),
        "best": {key: best[key] for key in ("trial", "value", "params")} if best else None,
        "nearest": {key: nearest[key] for key in ("trial", "value", "params", "violations")} if nearest else None,
        "repeats": _repeats(run, running),
        "front": records.front(found, [objective.mode for objective in run.space.objectives]),
        "elapsed_seconds": round(elapsed, 1),
        "remaining_seconds": _remaining(run, found, elapsed) if state != "finished" else 0.0,
    }


def show(found: dict[str, Any]) -> str:
    """The same for people."""
    ends = ", ".join(f"{found[s.value]} {s.value.replace('_', ' ')}" for s in records.Status)
    lines = [f"{found['run']}: {found['state']}, {found['trials']} trials ended ({ends}), {found['running']} running"]
    if best := found["best"]:
        lines.append(f"best so far {best['value']:.4f} by {best['trial']}: {_params(best)}")
    if nearest := found["nearest"]:
        lines.append(f"{records.none_feasible(nearest)}; its value is {nearest['value']:.4f}: {_params(nearest)}")
    for point in found["front"] or []:
        value, cost = point["values"]
        lines.append(f"on the front {value:.4f} for {cost:g} by {point['trial']}: {_params(point)}")
    if repeats := found["repeats"]:
        lines.append(f"repeats of the best: {repeats['state']}, {repeats['completed']} completed")
    lines += [f"{count} {status.replace('_', ' ')}: {reason}" for status, reason, count in found["reasons"]]
    left = found["remaining_seconds"]
    lines.append(
        f"{found['elapsed_seconds'] / 60:.1f} minutes used"
        + (f", about {left / 60:.0f} minutes left" if left else ", time left unknown" if left is None else "")
    )
    return "\n".join(lines)


def _repeats(run: Run, running: bool) -> dict[str, Any] | None:
    asked = run.info.get("repeats")
    if not asked:
        return None
    state = "stopped" if asked["state"] == "running" and not running else asked["state"]
    return {"state": state, **records.count(selection.read(run.directory))}


def _params(trial: dict[str, Any]) -> str:
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial["params"].items())
    return ", ".join(shown) or "nothing searched"


def _elapsed(run: Run, running: bool) -> float:
    """Seconds of all sessions; of a collection's trials, which have none."""
    if run.kind == TRIALS:
        return sum(float(record["seconds"]) for record in run.records)
    total = 0.0
    sessions = run.info["sessions"]
    for n, session in enumerate(sessions):
        end = session["ended"]
        if end is None and running and n == len(sessions) - 1:
            end = time.time()
        elif end is None:
            end = max(session["started"], run.last_written())
        total += end - session["started"]
    return total


def _running(run: Run) -> int:
    if run.kind == TRIALS:
        return run.count_writers()
    from tuner.sampler import count_running, study_name

    return count_running(run.study, study_name(run.space, run.info["id"], run.study))


def _remaining(run: Run, found: list[dict[str, Any]], elapsed: float) -> float | None:
    """By the pace so far, and never more than the hours that are left; None before any trial has ended."""
    budget = run.space.budget
    limits = [budget.hours * 3600 - elapsed] if budget.hours else []
    charged = records.charged(found)
    # Where all trials have been seen, some that are held may still go on, for nobody knows how long.
    if budget.trials and 0 < len(charged) < budget.trials:
        limits.append((budget.trials - len(charged)) * elapsed / len(charged))
    device_hours = [budget.device_hours] if budget.device_hours else []
    if budget.money and budget.price_per_device_hour:
        device_hours.append(budget.money / budget.price_per_device_hour)
    if used := sum(record["device_seconds"] for record in charged):  # of trials that have ended: what runs is not seen
        limits += [(hours * 3600 / used - 1) * elapsed for hours in device_hours]
    return round(max(0.0, min(limits)), 1) if limits else None

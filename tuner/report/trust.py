"""How far the winner can be trusted: what luck has to do with its figure, which others may be as good, and whether the
search was worth its cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from tuner import records
from tuner.report import style, words
from tuner.report.gallery import Block, Gallery, Pictures, Section, Table, Text
from tuner.report.inputs import EvaluatedRun, Json, Run
from tuner.report.style import FULL
from tuner.report.tables import Results, differences
from tuner.selection import Contender, Selection, against_random

_SHOWN = 12
"""configurations"""
_FEWEST = 3
"""configurations that were trained to the end, below which nothing is said unless some were repeated"""


def figures(run: Run) -> Json | None:
    """What metrics.json says of it; None where too few configurations were trained to the end."""
    selected = _known(run)
    if selected is None:
        return None
    one = _winner(run, selected)
    standing, belief = selected.standing(one), selected.belief
    place = _baseline(run, selected)
    gain = None if place is None or place == one else belief.difference(one, place)
    random = against_random(selected, one, run.records, run.repeats)
    return {
        "trial": selected.contenders[one].trial,
        "trainings": standing.trainings,
        "measured": standing.measured,
        "best_single": max(contender.values[0] for contender in selected.contenders),
        "corrected": standing.mean,
        "ci95": list(standing.interval),
        "noise": belief.sigma,
        "probability_best": standing.best,
        "alike": [selected.contenders[n].trial for n in selected.alike],
        "prefer": selected.prefer,
        "repeats": records.count(run.repeats),
        "repeats_device_seconds": sum(repeat["device_seconds"] for repeat in run.repeats),
        "over_baseline": None if gain is None else {"value": gain[0], "ci95": list(gain[1])},
        "over_random": random
        and {
            "trainings": random.trainings,
            "told_by": random.told_by,
            "expected": random.value,
            "expected_ci95": list(random.value_interval),
            "value": random.gain,
            "ci95": list(random.gain_interval),
        },
        "seeds": run.seeds if isinstance(run, EvaluatedRun) else [],
    }


def trust(run: Run, results: Results | None, gallery: Gallery) -> list[Section]:
    """The section, if there is anything to say."""
    selected = _known(run)
    if selected is None:
        return []
    on_test = "on test, with thresholds chosen on it," if results and results.test.is_stamped else "on test"
    blocks: list[Block] = [Text(_luck(run, selected, on_test)), Text(_alike(run, selected))]
    blocks.append(Pictures([gallery.figure(_picture(run, selected), "standings", _CAPTION, "full")]))
    blocks.append(_standings(run, selected))
    if isinstance(run, EvaluatedRun) and run.seeds:
        blocks.append(_seeds(run, selected))
    blocks += [Text(text) for text in _worth(run, selected, results)]
    return [Section("trust", "How far the winner can be trusted", blocks)]


def _known(run: Run) -> Selection | None:
    selected = run.selection
    return selected if selected and (selected.is_repeated or len(selected.contenders) >= _FEWEST) else None


def _winner(run: Run, selected: Selection) -> int:
    """The contender that was evaluated, else the one that would be."""
    place = selected.index(run.configuration) if isinstance(run, EvaluatedRun) else None
    return selected.winner if place is None else place


def _baseline(run: Run, selected: Selection) -> int | None:
    record = records.baseline(run.records)
    return None if record is None else selected.index(record["trial"])


def _baseline_otherwise(run: Run, selected: Selection) -> int | None:
    """The contender that is the baseline's network, judged in another way that was better."""
    record = records.baseline(run.records)
    return None if record is None else selected.judged_otherwise(record["trial"])


def _name(run: Run, selected: Selection, one: int) -> str:
    trial = selected.contenders[one].trial
    return f"{trial} (baseline)" if one == _baseline(run, selected) else trial


def _luck(run: Run, selected: Selection, on_test: str) -> str:
    """The winner's figure as measured, and as corrected for having been chosen."""
    one = _winner(run, selected)
    standing, metric = selected.standing(one), words.metric(run.objectives[0]["metric"])
    count = len({contender.trial for contender in (*selected.contenders, *selected.out)})
    text = (
        f"The winner was chosen among {count} configurations by a figure that luck has a part in. Its validation "
        f"{metric} as measured is {standing.measured:.4f}"
        + (f", the mean of {standing.trainings} trainings" if standing.trainings > 1 else ", from a single training")
        + f"; corrected for having been chosen for its luck it is {standing.mean:.4f} (95 % interval "
        f"{standing.interval[0]:.4f} to {standing.interval[1]:.4f})."
    )
    if isinstance(run, EvaluatedRun):
        found = [seed["test"] for seed in _seeds_of(run, selected.contenders[one]) if seed["test"] is not None]
        if found:
            spread = f" ± {np.std(found, ddof=1):.4f}" if len(found) > 1 else ""
            text += (
                f" {on_test[0].upper()}{on_test[1:]} its {words.plural(len(found), 'network')} came to "
                f"{np.mean(found):.4f}{spread}."
            )
    if selected.is_repeated:
        text += f" One training lies {selected.belief.sigma:.4f} from its configuration's mean (standard deviation)."
    else:
        text += (
            " No configuration was trained twice, so how much luck is in one training is taken from another data set "
            f"(about {selected.belief.sigma:.3f}); `repeats` in the space, or `tuner finals --seeds`, would measure it."
        )
    return text


def _alike(run: Run, selected: Selection) -> str:
    """Which others may be as good."""
    one = _winner(run, selected)
    standing = selected.standing(one)
    others = [n for n in selected.alike if n != one]
    text = f"It is the best of them with a probability of {standing.best:.0%}."
    if not others:
        text += " Every other one can be told from it."
    else:
        names = ", ".join(_name(run, selected, n) for n in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        text += f" {'One' if len(others) == 1 else len(others)} cannot be told from the best: {names}{more}."
    if selected.prefer == "cheapest":
        text += " Of those that cannot be told from the best the cheapest was asked for."
    if selected.out:
        why = "; ".join(f"{one.trial} {_why_out(one)}" for one in selected.out)
        text += f" Out of the race: {why}."
    if selected.fell_back:
        text += " None of them is left, so the best single training stands for the winner, and is not to be trusted."
    return text


def _why_out(contender: Contender) -> str:
    if contender.diverged:
        return "diverged with another seed"
    return f"violates {' and '.join(map(words.metric, contender.beyond))} in the mean over its seeds"


_CAPTION = (
    "What is known of each configuration: a dot is a training on validation, hollow the one of the search; the mark "
    "is the mean over seeds, corrected for luck, and the bar its 95 % interval. Blue ones cannot be told from the best."
)


def _shown(run: Run, selected: Selection) -> list[int]:
    """The best by mean, the winner and the baseline among them."""
    order = [int(n) for n in np.argsort(-selected.belief.means, kind="stable")]
    wanted = {_winner(run, selected), _baseline(run, selected)} - {None}
    kept = order[:_SHOWN]
    return [*kept, *(n for n in order if n in wanted and n not in kept)]


def _picture(run: Run, selected: Selection) -> Any:
    shown = _shown(run, selected)
    figure, axes = style.panel(FULL, 1.0 + 0.3 * len(shown))
    winner, alike = _winner(run, selected), set(selected.alike)
    for row, one in enumerate(shown):
        standing, contender = selected.standing(one), selected.contenders[one]
        colour = style.WINNER if one == winner else style.BASELINE if one not in alike else style.SKY
        axes.plot(standing.interval, [row, row], color=colour, linewidth=5, alpha=0.45 if one in alike else 0.25,
                  solid_capstyle="butt", zorder=2)  # fmt: skip
        axes.plot([standing.mean], [row], "|", color=colour, markersize=13, markeredgewidth=2.2, zorder=3)
        first, *again = contender.values
        axes.plot(again, [row] * len(again), "o", color=style.INK, markersize=4, zorder=4)
        axes.plot([first], [row], "o", markerfacecolor=style.PAPER, markeredgecolor=style.INK, markersize=4.5, zorder=4)
    names = [_name(run, selected, one) + (" (winner)" if one == winner else "") for one in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"validation {words.metric(run.objectives[0]['metric'])}")
    axes.grid(axis="y", visible=False)
    return figure


def _standings(run: Run, selected: Selection) -> Table:
    shown, winner = _shown(run, selected), _winner(run, selected)
    by_time = len(run.objectives) < 2 or run.objectives[1]["metric"] == "device_seconds"
    cost = "time" if by_time else words.metric(run.objectives[1]["metric"])
    rows = []
    for one in shown:
        standing, contender = selected.standing(one), selected.contenders[one]
        rows.append([
            _name(run, selected, one), str(standing.trainings), f"{standing.measured:.4f}", f"{standing.mean:.4f}",
            f"{standing.interval[0]:.4f} to {standing.interval[1]:.4f}", f"{standing.best:.0%}",
            f"{standing.ranks[0]} to {standing.ranks[1]}", "yes" if one in selected.alike else "",
            words.duration(contender.cost) if by_time else f"{contender.cost:,.6g}",
        ])  # fmt: skip
    header = ["configuration", "trainings", "measured", "corrected", "95 % interval", "is the best", "rank",
              "may be the best", cost]  # fmt: skip
    strong = frozenset(n for n, one in enumerate(shown) if one == winner)
    caption = "Configurations by their mean over seeds on validation; rank is a 95 % interval among all"
    return Table(header, rows, caption, frozenset({1, 2, 3, 4, 5, 6, 8}), strong)


def _seeds_of(run: EvaluatedRun, contender: Contender) -> list[Json]:
    """Its networks that were judged on test."""
    trials = {training["trial"] for training in contender.trainings} | {contender.trained["trial"]}
    return [seed for seed in run.seeds if seed["trial"] in trials]


def _seeds(run: EvaluatedRun, selected: Selection) -> Table:
    metric = words.metric(run.objectives[0]["metric"])
    of_winner = {seed["trial"] for seed in _seeds_of(run, selected.contenders[_winner(run, selected)])}
    rows = [
        ["winner" if seed["trial"] in of_winner else "baseline", seed["trial"], str(seed["seed"]),
         words.figure(seed["validation"], 4), words.figure(seed["test"], 4)]
        for seed in run.seeds
    ]  # fmt: skip
    strong = frozenset(n for n, seed in enumerate(run.seeds) if seed["trial"] == run.winner.trial)
    caption = f"{metric} of each network of winner and baseline; the delivered one is the best on validation"
    return Table(
        ["configuration", "training", "seed", "validation", "test"], rows, caption, frozenset({2, 3, 4}), strong
    )


def _worth(run: Run, selected: Selection, results: Results | None) -> list[str]:
    """Was the search worth it? Against the results page's configuration, and against random search at its cost."""
    one, place = _winner(run, selected), _baseline(run, selected)
    texts = []
    otherwise = _baseline_otherwise(run, selected)
    if otherwise is not None:
        contender = selected.contenders[otherwise]
        worth = contender.record["value"] - (records.baseline(run.records) or {})["value"]
        texts.append(
            f"Was the search worth it? {'The winner' if otherwise == one else contender.trial} is the results page's "
            f"network judged in another way, which is worth {worth:+.4f} on the same validation images."
        )
        if otherwise != one:
            value, (low, high) = selected.belief.difference(one, otherwise)
            texts.append(
                f"Against that the winner's mean over seeds is {value:+.4f}, corrected for luck (95 % interval "
                f"{low:+.4f} to {high:+.4f})."
            )
    elif place is None:
        texts.append("Was the search worth it? No baseline has completed, so there is nothing to compare with.")
    elif place == one:
        texts.append(
            "Was the search worth it? It found no configuration that is better than that of the results page, which is "
            "the winner."
        )
    else:
        value, (low, high) = selected.belief.difference(one, place)
        verdict = (
            "more than luck explains" if low > 0 else "less" if high < 0 else "which is within what luck alone brings"
        )
        text = (
            f"Was the search worth it? Against the results page's configuration the winner's mean over seeds is "
            f"{value:+.4f} on validation, corrected for luck (95 % interval {low:+.4f} to {high:+.4f}): {verdict}."
        )
        if results is not None and "dice_mean" in (gains := differences(results)):
            gain = gains["dice_mean"]
            counts = [len(selected.contenders[n].trainings) for n in (one, place)]
            best_of = f", the best on validation of {counts[0]} and of {counts[1]}," if max(counts) > 1 else ""
            text += (
                f" On test the mean Dice of the two networks{best_of} differs by "
                f"{words.difference(gain.value, gain.interval)}."
            )
        texts.append(text)
    texts.append(_against_random(run, selected, one))
    return texts


def _against_random(run: Run, selected: Selection, one: int) -> str:
    if run.space.get("sampler") == "random":
        return "The search itself was random search."
    found = against_random(selected, one, run.records, run.repeats)
    if found is None:
        return (
            "Too few configurations that were drawn at random have been trained to the end to say what random search "
            "would have found at the same cost."
        )
    worse = f", {found.worse} were stopped early" if found.worse else ""
    low, high = found.gain_interval
    verdict = "better than that" if low > 0 else "worse than that" if high < 0 else "not to be told from that"
    return (
        f"At the same cost, {words.plural(found.trainings, 'full training')}, random search would be expected to find "
        f"{found.value:.4f} ({found.value_interval[0]:.4f} to {found.value_interval[1]:.4f}), by the {found.told_by} "
        f"trials here that were drawn at random and completed{worse}. The winner is {verdict}: {found.gain:+.4f} "
        f"({low:+.4f} to {high:+.4f})."
    )

"""The parts on rules, sizes, failures and calibration, on usual and on degenerate data; the tables for LaTeX."""

import itertools
import json
import re
import warnings
from dataclasses import replace

import cv2
import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.failures import Failures
from model.thresholds import logit, sigmoid
from tuner import report
from tuner.report import breakdown, calibration, charts, failures, inputs, latex, rules, style, tables, words
from tuner.report.gallery import Gallery


@pytest.fixture(scope="module")
def judged(usual) -> tables.Judged:
    return tables.results(inputs.read(usual.directory)).test


def section(written_report, title: str) -> str:
    text = (written_report / "report.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(text: str, caption: str) -> list[list[str]]:
    """Rows of the table under a caption, header first."""
    lines = text[text.index(f"**{caption}") :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" *") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [rows[0], *rows[2:]]


# Rules


def test_every_rule_is_replayed_at_the_winners_weights(usual) -> None:
    rows = {(r["rule"], r["factor"], r["blacken"], r["lower_threshold"]): r for r in usual.metrics["rules"]}
    own = rows.pop(("pr_curve", 2, False, 1.0))
    assert own["own"]
    assert own["difference"] is None
    assert own["threshold"] == usual.metrics["validation"]["threshold"]
    for key in ("dice_mean", "dice_std", "dice_positive_mean", "iou_mean", "iou_std", "f1"):
        assert own["test"][key] == usual.metrics["test"][key]
    assert own["validation"]["dice_mean"] == usual.metrics["validation"]["dice_mean"]
    assert set(rows) == {
        *(("min_of_max", 1, False, 1.0), ("pr_curve", 1, False, 1.0), ("grid", 1, False, 1.0)),
        *(("pr_curve", 3, False, 1.0), ("pr_curve", 5, False, 1.0)),
        *(("pr_curve", 2, True, 1.0), ("pr_curve", 2, False, 0.5)),
    }
    assert not any(row["own"] for row in rows.values())
    # Of a factor above 1 the tables are not kept: the record's threshold, if it is of the winner's epoch.
    assert logit(rows["pr_curve", 3, False, 1.0]["threshold"]) == pytest.approx(-0.3)
    assert logit(rows["pr_curve", 2, True, 1.0]["threshold"]) == pytest.approx(-0.4)
    assert rows["pr_curve", 5, False, 1.0]["threshold"] is rows["pr_curve", 5, False, 1.0]["test"] is None
    assert rows["pr_curve", 2, False, 0.5]["threshold"] == own["threshold"]
    text = section(usual.report, "Thresholds")
    assert "Left out: pr_curve/5; their thresholds come from tables of every n-th pixel" in text
    assert "Only the winner's own rule, which is set off, was chosen before the test split was opened" in text
    table = cells(text, "Every rule at the winner's weights")
    assert [row[:2] for row in table[1:]] == [
        *(["min_of_max", "as they are"], ["pr_curve/1", "as they are"], ["pr_curve/2", "as they are"]),
        *(["pr_curve/3", "as they are"], ["grid", "as they are"]),
        *(["pr_curve/2", "lowered to 0.5 of it"], ["pr_curve/2", "blackened"]),
    ]


def test_differences_of_rules_are_those_of_the_same_images(usual) -> None:
    rows = usual.metrics["rules"]
    own = next(row for row in rows if row["own"])
    for row in rows:
        if row["difference"]:
            gain = row["test"]["dice_mean"] - own["test"]["dice_mean"]
            assert row["difference"]["value"] == pytest.approx(gain)
            if row["difference"]["ci95"]:
                low, high = row["difference"]["ci95"]
                assert low <= gain <= high


def test_a_repeat_of_other_weights_has_no_thresholds_of_the_record(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    path = directory / "evaluation" / "selection.json"
    selection = json.loads(path.read_text())
    chosen = selection["trials"][selection["winner"]]
    selection["trials"]["repeat"] = chosen | {"config": chosen["config"] | {"seed": 7}}
    path.write_text(json.dumps(selection | {"winner": "repeat"}))
    run = inputs.read(directory)
    found = {(row["rule"], row["factor"]) for row in rules.replay(run, tables.results(run))}
    assert found == {("min_of_max", 1), ("pr_curve", 1), ("pr_curve", 2), ("grid", 1)}


@pytest.mark.parametrize("blacken", [True, False])
@pytest.mark.parametrize("lower", [1.0, 0.3])
def test_dice_by_threshold_passes_through_the_stated_dice(judged, lower: float, blacken: bool) -> None:
    """At a threshold that leaves masks of positives empty, so that lowering matters."""
    high = float(np.quantile(judged.split.counts.largest()[judged.split.labels], 0.7))
    changed = {"segmentation_logit": high, "segmentation_probability": float(sigmoid(high))}
    changed |= {"lower_threshold": lower, "blacken": blacken}
    one = replace(judged, thresholds=judged.thresholds | changed)
    axes = charts.dice_by_threshold(one, one).axes[0]
    for line in axes.lines[:2]:
        at = line.get_xdata().tolist().index(high)
        assert line.get_ydata()[at] == pytest.approx(one.figures["dice_mean"])
    probability, best = charts.best_threshold(one)
    again = replace(one, thresholds=one.thresholds | {"segmentation_logit": float(logit(probability))})
    assert best == pytest.approx(again.figures["dice_mean"], abs=1e-3)
    assert best >= one.figures["dice_mean"]
    if lower < 1:
        plain = replace(one, thresholds=one.thresholds | {"lower_threshold": 1.0})
        assert one.figures["dice_mean"] > plain.figures["dice_mean"]
        assert one.figures["ods"] == plain.figures["ods"]


# Width and area


@pytest.mark.parametrize("values", [[1.0] * 9, [1, 1, 1, 1, 1, 1, 1, 2, 3], [3, 1, 2], [*range(100)], [5, 5, 5, 1, 1]])
def test_equal_parts_keep_ties_together(values) -> None:
    values = np.array(values, float)
    parts = breakdown.equal_parts(values, 3)
    assert (np.sum(parts, axis=0) == 1).all()
    assert all(part.any() for part in parts)
    for low, high in itertools.pairwise(parts):
        assert values[low].max() < values[high].min()
    if len(set(values)) == len(values):
        sizes = [part.sum() for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_width_is_area_over_length(judged, usual) -> None:
    """A bar of 3 px is 3 px wide; an image without a mask has no width."""
    found = breakdown.widths(judged)
    made = usual.made["winner-test"]
    assert np.isnan(found[~made.truths.any(axis=(1, 2))]).all()
    lines = judged.split.centre_lines.truth
    for n in np.flatnonzero(np.isfinite(found)):
        assert found[n] == pytest.approx(made.truths[n].sum() / lines[n])
        assert breakdown.shares(judged)[n] == pytest.approx(100 * made.truths[n].mean())


def test_thirds_by_width_hold_all_positive_images(usual, judged) -> None:
    table = cells(section(usual.report, "Test"), "Positive test images by width of their defects")
    assert sum(int(row[1]) for row in table[1:]) == judged.split.labels.sum()
    weights = [int(row[1]) for row in table[1:]]
    dice = [float(row[table[0].index("Dice")]) for row in table[1:]]
    assert np.average(dice, weights=weights) == pytest.approx(usual.metrics["test"]["dice_positive_mean"], abs=1e-3)
    assert (usual.report / "figures/dice-by-width.png").is_file()


def test_intervals_by_size_and_source_need_20_groups(make_run, tmp_path) -> None:
    # Of the width's thirds, 32 images each, 40 groups give more than 20 to some.
    for groups, size, source in ((96, True, True), (40, True, True), (12, False, False)):
        directory, _ = make_run(trials=2, negative_tests=0, groups=groups)
        found = tables.results(inputs.read(directory))
        (tmp_path / str(groups)).mkdir()
        with matplotlib.rc_context(style.RC):
            blocks = breakdown.by_size(found.test, found.baseline_test, Gallery(tmp_path / str(groups)))
        by_width, by_area = blocks[1].tables
        by_source = breakdown.by_source(found.test, found.baseline_test)
        assert ("95 % interval" in by_width.header, "95 % interval" in by_area.header) == (size, size)
        assert ("95 % interval" in by_source.header) == source
        for table in (by_width, by_area, by_source):
            for row in table.rows:
                if "95 % interval" in table.header:
                    given = re.match(r"\d\.\d{3} to", row[table.header.index("95 % interval")])
                    assert bool(given) == (int(row[table.header.index("groups")].replace(",", "")) >= 20)


def of_sources(judged: tables.Judged, sources: list[str]) -> tables.Judged:
    return replace(judged, split=replace(judged.split, sources=sources))


def test_many_sources_are_cut_to_the_largest(judged) -> None:
    """40 sources of 96 images: the first 16 have 3, the others 2."""
    sources = [f"s{k % 40:02d}" for k in range(96)]
    table = breakdown.by_source(of_sources(judged, sources), None)
    assert len(table.rows) == 30
    assert [row[0] for row in table.rows[:-1]] == [f"s{k:02d}" for k in range(29)]
    assert table.rows[-1][0] == "11 others"
    counts = [int(row[1]) for row in table.rows]
    assert counts == [3] * 16 + [2] * 13 + [22]
    assert sum(counts) == len(sources)
    assert len(breakdown.by_source(of_sources(judged, [f"s{k % 30}" for k in range(96)]), None).rows) == 30


def test_a_source_an_image_is_said_and_one_source_is_not(judged) -> None:
    found = breakdown.by_source(of_sources(judged, [f"s{k}" for k in range(96)]), None)
    assert found.text.startswith("No figures by source: 96 sources for 96 test images")
    assert breakdown.by_source(of_sources(judged, ["s"] * 96), None) is None


# Examples


def test_examples_are_no_fair_sample_and_the_page_says_so(usual, judged) -> None:
    text = section(usual.report, "Example images")
    run = inputs.read(usual.directory)
    named = {judged.split.names[n] for _, n in failures.find(judged).shown()} & set(run.examples.names)
    assert f"are {len(run.examples.names)} of the 96 test images and no fair sample: {len(named)} of them" in text
    dice = judged.dice[judged.selected.truth[:, 0] > 0]
    median = float(np.median(dice))
    said = re.search(
        r"The example nearest to the median of all (\d+) test images with a defect \(Dice (.*?)\): .*, Dice (.*?)\.\n",
        text,
    )
    assert (int(said[1]), said[2]) == (len(dice), f"{median:.3f}")
    shown = run.examples.truth.any(axis=(1, 2))
    kept = judged.dice[[judged.split.names.index(n) for n, one in zip(run.examples.names, shown, strict=True) if one]]
    assert float(said[3]) == pytest.approx(kept[np.abs(kept - median).argmin()], abs=1e-3)


def test_all_images_of_a_small_split_are_examples(make_run) -> None:
    text = section(report.write(make_run(trials=2, tests=8)[0]).parent, "Example images")
    assert "The examples are all 8 test images." in text


# Failures


def test_failures_are_those_of_labels_and_masks(judged) -> None:
    found = failures.find(judged)
    split, truth, predicted = judged.split, judged.selected.truth[:, 0], judged.selected.predicted[:, 0]
    kinds = [set(found.missed), set(found.false_alarms), set(found.poor)]
    assert sum(map(len, kinds)) == len(set.union(*kinds))
    for n in range(len(split)):
        missed = split.labels[n] and (not judged.decisions[n] or predicted[n] == 0)
        alarm = not split.labels[n] and (judged.decisions[n] or predicted[n] > 0)
        assert (n in kinds[0], n in kinds[1]) == (missed, alarm)
        assert (n in kinds[2]) == (split.labels[n] and not missed and judged.dice[n] < 1)
    assert list(truth[found.missed]) == sorted(truth[found.missed], reverse=True)
    assert list(predicted[found.false_alarms]) == sorted(predicted[found.false_alarms], reverse=True)
    assert list(judged.dice[found.poor]) == sorted(judged.dice[found.poor])


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [((9, 9, 9), (4, 4, 4)), ((1, 0, 30), (1, 0, 11)), ((0, 0, 0), (0, 0, 0)), ((2, 30, 4), (2, 6, 4))],
)
def test_a_kind_with_few_failures_leaves_its_rows_to_others(sizes, kept) -> None:
    found = Failures(*(np.arange(size) for size in sizes))
    names = [kind for kind, _ in found.shown()]
    assert tuple(names.count(kind) for kind in ("missed", "false alarm", "poor mask")) == kept


def test_failures_name_their_picture(usual) -> None:
    table = cells(section(usual.report, "Example images"), "The worst failures on test images")
    files = {path.name[:3]: path.name for path in (usual.report / "dices").iterdir()}
    at = table[0].index("picture")
    assert len(table) == 13
    pictured = [row for row in table[1:] if row[at] != words.NONE]  # those among the examples that were kept
    assert pictured
    for row in pictured:
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", row[1].removesuffix(".png"))
        if "…" not in row[1]:
            assert stem in files[row[at]]
        assert float(row[table[0].index("Dice")]) == pytest.approx(float(files[row[at]].split("_")[1]), abs=1e-3)


def test_what_happened_is_said(judged) -> None:
    said = {failures.what_happened(judged, n) for n in range(len(judged.split))}
    assert any(text.startswith("decided positive, ") for text in said)
    assert any(text.startswith("decided negative, ") for text in said)
    assert failures._mask(100, 0, 0) == "mask empty"
    assert failures._mask(100, 50, 0) == "mask beside the defect"
    assert failures._mask(100, 25, 25) == "75 % of the defect not found"
    assert failures._mask(100, 400, 100) == "75 % of the mask false"
    assert failures._mask(100, 100, 20) == "20 % of the defect found, 80 % of the mask false"
    assert failures._mask(0, 7, 0) == "marked where nothing is"
    assert failures._mask(100, 100, 100) == "mask equals the truth"
    assert failures._mask(1000, 1001, 999) == "mask nearly equals the truth"
    assert failures._mask(1000, 996, 996) == "mask nearly equals the truth"
    assert failures._mask(1000, 980, 980) == "2 % of the defect not found"


# Calibration


def test_brier_score_and_calibration_error_are_their_definitions(usual) -> None:
    made, found = usual.made["winner-test"], usual.metrics["calibration"]
    scores = 1 / (1 + np.exp(-made.decision_logits.astype(np.float16).astype(float)))
    assert found["brier"] == pytest.approx(np.mean((scores - made.labels) ** 2), abs=1e-3)
    assert found["brier_ci95"][0] < found["brier"] < found["brier_ci95"][1]
    assert found["base_rate"] == made.labels.mean()
    assert sum(part["images"] for part in found["parts"]) == found["images"] == len(made.labels)
    gaps = [part["images"] * abs(part["score"] - part["share"]) for part in found["parts"]]
    assert found["ece"] == pytest.approx(sum(gaps) / len(made.labels))
    for part in found["parts"]:
        assert part["ci95"][0] <= part["share"] <= part["ci95"][1]
        if part["share"] == 0:
            assert part["ci95"][1] == pytest.approx(1 - 0.025 ** (1 / part["groups"]))


def test_scores_that_are_probabilities_are_calibrated(judged) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, 4000)
    labels = rng.random(4000) < 1 / (1 + np.exp(-logits))
    split = replace(
        judged.split, names=["x"] * 4000, groups=[str(k) for k in range(4000)], labels=labels, decision_logits=logits
    )
    honest = calibration.figures(replace(judged, split=split))
    assert honest["ece"] < 0.03
    inside = [part["ci95"][0] <= part["score"] <= part["ci95"][1] for part in honest["parts"]]
    assert sum(inside) >= 8
    too_sure = calibration.figures(replace(judged, split=replace(split, decision_logits=4 * logits)))
    assert too_sure["ece"] > 0.1
    assert too_sure["brier"] > honest["brier"]
    assert honest["brier"] < honest["brier_of_base_rate"]


def test_equal_scores_have_no_diagram(judged) -> None:
    equal = replace(judged, split=replace(judged.split, decision_logits=np.zeros(len(judged.split))))
    found = calibration.figures(equal)
    assert (found["parts"], found["ece"], found["brier"]) == ([], None, 0.25)


@pytest.mark.filterwarnings("error")
def test_a_part_whose_scores_are_all_1_is_drawn() -> None:
    parts = [
        {"score": score, "share": share, "ci95": [0.0, 1.0]} for score, share in ((0.0, 0.1), (0.5, 0.5), (1.0, 1.0))
    ]
    axes = charts.reliability(parts).axes[0]
    drawn = axes.containers[0].lines[0].get_xdata()
    assert np.isfinite(drawn).all()
    assert (drawn >= axes.get_xlim()[0]).all()
    assert (drawn <= axes.get_xlim()[1]).all()


# Degenerate data

DEGENERATE = {
    "no negatives in the data": ({"negatives": False}, "the decision was not trained"),
    "no positives in test": (
        {"negative_tests": 8},
        "The calibration of the decision is not judged: no test image has a defect.",
    ),
    "no negatives in test": (
        {"negative_tests": 0},
        "ROC and precision-recall need test images with a defect and without",
    ),
    "no positives in validation": ({"negative_validations": 12}, "Left out: min_of_max, pr_curve/1"),
    "one image with a defect": (
        {"tests": 1, "validations": 1, "negative_tests": 0, "negative_validations": 0},
        "all test images have a defect.",
    ),
    "one image without": (
        {"tests": 1, "validations": 1, "negative_tests": 1, "negative_validations": 1},
        "No figures by width and area of defects: 0 positive test images with a mask, 6 are needed.",
    ),
    "one group": ({"groups": 1}, "no expected calibration error: 8 test images, 40 are needed."),
    "no truth": ({"empty": frozenset({"truth"})}, "marked where nothing is"),
    "no mask": ({"empty": frozenset({"mask"})}, "mask empty"),
    "neither": ({"empty": frozenset({"truth", "mask"})}, "No figures by width and area of defects"),
    "the winner is the baseline": ({"baseline_wins": True}, "nothing better than the baseline"),
    "chosen on test": ({"chosen_on": "test"}, "and no estimates: their thresholds were chosen on the images they are"),
}


@pytest.mark.parametrize(("options", "why"), DEGENERATE.values(), ids=DEGENERATE.keys())
def test_the_page_stays_whole(make_run, options, why) -> None:
    """What is missing is said; nothing is empty."""
    directory, _ = make_run(**{"trials": 1 if "baseline_wins" in options else 2, "tests": 8, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = report.write(directory).parent
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert why in text
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert not re.search(r"\b(NaN|Infinity)\b", (folder / "metrics.json").read_text())
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert cv2.imread(str(folder / name)).std() > 0, f"{name} is empty"
    for rows in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len(rows.splitlines()) > 2, rows
    check_latex((folder / "tables.tex").read_text(encoding="ascii"))


# LaTeX


def check_latex(text: str) -> None:
    """Nothing but ASCII; braces and environments balance; each row has as many cells as its tabular has columns."""
    body = re.sub(r"(?m)^%.*$", "", text)
    columns = None
    for line in body.splitlines():
        if begun := re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", line):
            columns = len(begun[1])
        elif line == r"\end{tabular}":
            columns = None
        elif columns is not None and line not in (r"\toprule", r"\midrule", r"\bottomrule"):
            assert line.endswith(r" \\"), line
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1, line
            check_escaped(re.sub(r"(?<!\\) & ", " ", line[:-3]))
    assert body.count(r"\begin{") == body.count(r"\end{")


def check_escaped(printed: str) -> None:
    assert printed.isascii()
    rest = re.sub(r"\\[a-zA-Z]+", "", re.sub(r"\\char\d+", "", printed))
    rest = re.sub(r"\\[{}$&#_%`'^\"~=.]", "", rest).replace(r"^{\circ}", "")
    rest = re.sub(r"\{\^[2]?\}", "{}", rest)
    assert not re.search(r'[\\$&#_%^~<>|"`\n]', rest), printed
    depth = 0
    for letter in rest:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0, printed
    assert depth == 0, printed


@settings(max_examples=1000)
@given(
    st.text() | st.text("\\{}$&#^_~%<>|\"'`,-[]*?!/ \t\n\r\x00\x07ab09.éüßÅőłįĳ裂±²°µ…–—🧱\u0301\u200b\u2028")  # noqa: RUF001
)
def test_latex_escapes_every_text(text) -> None:
    printed = latex.escape(text)
    check_escaped(printed)
    assert not re.search(r"--|''|,,|(?<!\{)[\[\]]|\s{2}", printed)


def test_latex_prints_what_was_written() -> None:
    assert latex.escape("50 % of a_b & {c}\n\\d") == r"50 \% of a\_b \& \{c\} \textbackslash{}d"
    assert latex.escape("Škoda crack/ü 裂") == r"{\v{S}}koda crack/{\"{u}} {[}U+88C2{]}"
    assert latex.escape("-0.02 (-0.1 to +0.1), 2-pixel") == (r"\ensuremath{-}0.02 (\ensuremath{-}0.1 to +0.1), 2-pixel")


def test_latex_tables_hold_what_the_page_holds(usual) -> None:
    text = (usual.report / "tables.tex").read_text(encoding="ascii")
    check_latex(text)
    labels = re.findall(r"\\label\{tab:([a-z-]+)\}", text)
    assert labels == ["configuration", "data", "test", "by-width", "by-area", "by-source", "rules"]
    test = usual.metrics["test"]
    low, high = test["ci95"]["dice_positive_mean"]
    assert f"Dice, positive images & {test['dice_positive_mean']:.3f} & {low:.3f} to {high:.3f} & " in text
    assert r"crack \textless{}500\textgreater{} & 32" in text

"""What metrics.json and predictions.csv say, against brute force on the masks."""

import csv
import json
import shutil

import numpy as np
import pytest
from scipy import ndimage

from model.counts import to_half
from model.intervals import Ratio, difference_interval
from model.metrics import METRICS
from tuner import report
from tuner.report import inputs, tables

VALIDATION = {
    *("dice_mean", "dice_std", "dice_positive_mean", "iou_mean", "iou_std"),
    *("threshold", "threshold_rule", "decision_threshold", "decision_ap"),
}
TEST = {
    *("tp", "fp", "fn", "tn", "dice_mean", "dice_std", "dice_positive_mean", "iou_mean", "iou_std", "threshold"),
    *("decision_ap", "decision_auc", "precision", "recall", "f1", "two_pixel_f1", "ci95"),
} | set(METRICS)
WITHOUT_INTERVAL = {"dice_std", "iou_std"}
DECISION = ("tp", "fp", "fn", "tn", *(key for key in METRICS if key.startswith("decision")))


def selected_thresholds(written) -> dict:
    selection = json.loads((written.directory / "evaluation" / "selection.json").read_text())
    return selection["trials"][selection["winner"]]["thresholds"]


def masks_of(written, key: str) -> np.ndarray:
    return to_half(written.made[key].logits).astype(float) >= selected_thresholds(written)["segmentation_logit"]


def brute_force(truths, masks, labels) -> dict:
    dice, iou, two_pixel = [], [], []
    cross = np.array([abs(x) * abs(y) == 0 for x in range(-2, 3) for y in range(-2, 3)]).reshape(5, 5)
    for truth, mask in zip(truths, masks, strict=True):
        hits, either = (truth & mask).sum(), (truth | mask).sum()
        dice.append(2 * hits / (truth.sum() + mask.sum()) if either else 1.0)
        iou.append(hits / either if either else 1.0)
        near = (mask & ndimage.binary_dilation(truth, cross)).sum()
        precision, recall = near / max(mask.sum(), 1), near / max(near + (truth & ~mask).sum(), 1)
        two_pixel.append(2 * precision * recall / (precision + recall) if near else 0.0)
    hits = (truths & masks).sum()
    return {
        "dice_mean": np.mean(dice),
        "dice_std": np.std(dice),
        "dice_positive_mean": np.mean(np.array(dice)[labels]),
        "iou_mean": np.mean(iou),
        "iou_std": np.std(iou),
        "precision": hits / masks.sum(),
        "recall": hits / truths.sum(),
        "f1": 2 * hits / (masks.sum() + truths.sum()),
        "two_pixel_f1": np.mean(two_pixel),
    }


def test_keys_are_those_of_the_interface(usual) -> None:
    metrics = usual.metrics
    assert set(metrics) == {
        *("schema", "run", "best", "validation", "test", "baseline", "search", "data", "nested"),
        *(
            "difference",
            "thresholds_chosen_on",
            "test_openings",
            "front",
            "state",
            "evaluated",
            "rules",
            "calibration",
            "selection",
        ),
        "masks",
    }
    assert (metrics["thresholds_chosen_on"], metrics["test_openings"]) == ("validation", 1)
    assert (metrics["schema"], metrics["run"]) == (1, "walls <b>")
    assert set(metrics["best"]) == {"trial", "config"}
    assert set(metrics["validation"]) == VALIDATION
    assert set(metrics["test"]) == set(metrics["baseline"]) == TEST
    assert set(metrics["test"]["ci95"]) == set(metrics["baseline"]["ci95"]) == set(METRICS) - WITHOUT_INTERVAL
    assert set(metrics["search"]) == {
        *("trials", "completed", "stopped_early", "diverged", "failed", "wall_seconds", "device_seconds")
    }
    assert set(metrics["data"]) == {"train", "validation", "test", "height", "width", "channels"}
    assert metrics["data"]["train"] == {"positive": 40, "negative": 10, "segmented": 30}


@pytest.mark.parametrize("key", ["winner-validation", "winner-test"])
def test_figures_are_those_of_the_masks(usual, key) -> None:
    made = usual.made[key]
    expected = brute_force(made.truths, masks_of(usual, key), made.labels)
    found = usual.metrics[key.split("-")[1]]
    for name in found.keys() & expected.keys():
        assert found[name] == pytest.approx(expected[name], abs=1e-9), name
    assert found["threshold"] == selected_thresholds(usual)["segmentation_probability"]


def test_baseline_is_judged_on_its_own_maps(usual) -> None:
    made = usual.made["baseline-test"]
    expected = brute_force(made.truths, masks_of(usual, "baseline-test"), made.labels)
    assert usual.metrics["baseline"]["dice_mean"] == pytest.approx(expected["dice_mean"], abs=1e-9)
    assert usual.metrics["baseline"]["dice_mean"] < usual.metrics["test"]["dice_mean"]


def test_decision_counts_images_and_pairs(usual) -> None:
    made, test = usual.made["winner-test"], usual.metrics["test"]
    yes = made.decision_logits >= selected_thresholds(usual)["decision_logit"]
    counted = [(made.labels & yes).sum(), (~made.labels & yes).sum(), (made.labels & ~yes).sum()]
    assert [test["tp"], test["fp"], test["fn"]] == counted
    assert test["tp"] + test["fp"] + test["fn"] + test["tn"] == len(made.labels)
    better = made.decision_logits[made.labels][:, None] > made.decision_logits[~made.labels]
    assert test["decision_auc"] == pytest.approx(better.mean())


def test_intervals_hold_their_figures(usual) -> None:
    for judged in (usual.metrics["test"], usual.metrics["baseline"]):
        for name, (low, high) in judged["ci95"].items():
            assert low <= judged[name] <= high, name
        assert judged["ci95"]["dice_mean"][0] < judged["ci95"]["dice_mean"][1]


def test_differences_are_those_of_the_same_images(usual) -> None:
    metrics = usual.metrics
    for name, gain in metrics["difference"].items():
        assert gain["value"] == pytest.approx(metrics["test"][name] - metrics["baseline"][name]), name
        assert gain["ci95"][0] < gain["value"] < gain["ci95"][1], name
    keys = ("winner-test", "baseline-test")
    ours, theirs = (brute_force(usual.made[k].truths, masks_of(usual, k), usual.made[k].labels) for k in keys)
    for name in ("dice_mean", "dice_positive_mean", "iou_mean", "f1", "two_pixel_f1"):
        assert metrics["difference"][name]["value"] == pytest.approx(ours[name] - theirs[name], abs=1e-9), name


def test_every_figure_but_counts_has_a_paired_difference(usual) -> None:
    metrics = usual.metrics
    without = {"tp", "fp", "fn", "tn", "threshold", "dice_std", "iou_std"}
    assert metrics["difference"].keys() == metrics["test"].keys() - without - {"ci95"}


def test_differences_of_decisions_are_those_of_the_same_images(usual) -> None:
    found, labels = usual.metrics["difference"], usual.made["winner-test"].labels
    groups = np.unique(usual.made["winner-test"].groups, return_inverse=True)[1]
    threshold = selected_thresholds(usual)["decision_logit"]
    ours, theirs = (usual.made[f"{who}-test"].decision_logits >= threshold for who in ("winner", "baseline"))
    every = np.ones(len(labels))
    interval = difference_interval(Ratio(labels == ours, every), Ratio(labels == theirs, every), groups)
    assert found["decision_accuracy"]["value"] == pytest.approx((labels == ours).mean() - (labels == theirs).mean())
    assert found["decision_accuracy"]["ci95"] == pytest.approx(interval)
    for name in ("precision", "recall", "specificity", "f1"):
        low, high = found[f"decision_{name}"]["ci95"]
        assert low <= found[f"decision_{name}"]["value"] <= high


def test_thresholds_chosen_on_test_are_stamped_everywhere(make_run) -> None:
    """Beside a report that is not touched."""
    directory, _ = make_run(trials=2, tests=12)
    stamped, _ = make_run(trials=2, tests=12, chosen_on="test")
    shutil.copytree(stamped / "evaluation", directory / "evaluation/open-test")
    honest = report.write(directory).parent
    folder = honest / "open-test"
    assert [json.loads((f / "metrics.json").read_text())["thresholds_chosen_on"] for f in (honest, folder)] == [
        "validation",
        "test",
    ]
    assert "chosen on test" not in (honest / "report.md").read_text()
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert {row["thresholds_chosen_on"] for row in csv.DictReader(file)} == {"test"}
    text = (folder / "report.md").read_text()
    assert "figures are no estimates of what new images would give" in text
    head, *parts = text.split("\n## ")
    sections = {part.splitlines()[0]: part for part in parts}
    assert head.count("thresholds chosen on test") == 5  # four headline figures and the strip of examples
    for name in ("Test", "Example images"):
        lines = [line for line in sections[name].splitlines() if line]
        captions = [line for line in lines if line.startswith("**") and not line.startswith("| ")]
        captions += [lines[k + 1] for k, line in enumerate(lines) if line.startswith("![")]
        assert captions
        assert all(line.count("thresholds chosen on test") == 1 for line in captions)
    assert "Chosen on test, carried by the winner" in sections["Thresholds"]
    assert (
        sections["Thresholds"].count("chosen on test") == 1
    )  # the rules; those of the trial's record are validation's
    assert "and no estimates: their thresholds were chosen on the images they are judged on" in sections["Thresholds"]


@pytest.mark.parametrize("name", ["winner-test.npz", "examples.npz", "selection.json", "architecture.json"])
@pytest.mark.parametrize("content", [b"", b"PK", b"{}", b"[1]"])
def test_a_broken_file_is_named(make_run, name: str, content: bytes) -> None:
    directory, _ = make_run(trials=2, tests=6)
    (directory / "evaluation" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is"):
        report.write(directory)


def test_arrays_that_do_not_belong_together_are_refused(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    path = directory / "evaluation/winner-test.npz"
    with np.load(path) as file:
        arrays = dict(file)
    for change, why in (
        ({"labels": arrays["labels"][:-1]}, "one entry an image"),
        ({"decision_logits": np.full(6, np.nan)}, "hold numbers"),
        ({"thresholds": np.array(json.dumps({"rule": "grid"}))}, "it was judged at .*grid.*, selection.json says"),
    ):
        np.savez(path, **(arrays | change))
        with pytest.raises(ValueError, match=why):
            report.write(directory)


def test_states_and_time_of_the_search(usual) -> None:
    search = usual.metrics["search"]
    states = {key: search[key] for key in ("completed", "stopped_early", "diverged", "failed")}
    assert states == {"completed": 4, "stopped_early": 2, "diverged": 1, "failed": 1}
    assert search["trials"] == 8
    records = [json.loads(line) for line in (usual.directory / "records.jsonl").read_text().splitlines()]
    assert search["wall_seconds"] == max(record["started"] + record["seconds"] for record in records)
    assert search["device_seconds"] == sum(record["device_seconds"] for record in records)


def test_without_negatives_the_decision_is_null(bare) -> None:
    metrics = bare.metrics
    assert {metrics["test"][key] for key in DECISION} == {None}
    assert metrics["validation"]["decision_ap"] is metrics["validation"]["decision_threshold"] is None
    assert set(metrics["test"]["ci95"]) == {k for k in METRICS if "decision" not in k} - WITHOUT_INTERVAL
    assert "the decision was not trained" in (bare.report / "report.md").read_text()
    assert "the decision was not trained" in (bare.report / "index.html").read_text()


def test_winner_that_is_the_baseline_has_its_figures(bare) -> None:
    assert bare.metrics["baseline"] == bare.metrics["test"]
    assert "The search found nothing better than the baseline" in (bare.report / "report.md").read_text()


def test_predictions_hold_a_line_an_image(usual) -> None:
    with (usual.report / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "name",
        "split",
        "group",
        "label",
        "score",
        "decision",
        "dice",
        "iou",
        "precision",
        "recall",
    ]
    validation, test = usual.made["winner-validation"], usual.made["winner-test"]
    assert [row["name"] for row in rows] == validation.names + test.names
    assert [row["split"] for row in rows] == ["validation"] * len(validation.names) + ["test"] * len(test.names)
    assert rows[-1]["name"] == usual.evil
    assert np.mean([float(row["dice"]) for row in rows if row["split"] == "test"]) == pytest.approx(
        usual.metrics["test"]["dice_mean"], abs=1e-5
    )
    threshold = usual.metrics["validation"]["decision_threshold"]
    assert all((float(row["score"]) >= threshold) == (row["decision"] == "1") for row in rows)


def test_predictions_without_negatives_have_no_score(bare) -> None:
    with (bare.report / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert {(row["score"], row["decision"]) for row in csv.DictReader(file)} == {("", "")}


def test_a_single_group_has_no_interval(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    for path in (directory / "evaluation").glob("*.npz"):
        with np.load(path) as file:
            arrays = dict(file)
        if "groups" in arrays:
            np.savez(path, **(arrays | {"groups": np.full(len(arrays["groups"]), "one")}))
    metrics = json.loads((report.write(directory).parent / "metrics.json").read_text())
    assert metrics["test"]["ci95"] == {}
    text = (directory / "report" / "report.md").read_text()
    assert "no interval: 1 group, 20 are needed" in text
    assert "too few groups of images" in text


def test_no_baseline_gives_null_figures(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    path = directory / "evaluation" / "selection.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"baseline": None}))
    run = inputs.read(directory)
    baseline = tables.metrics(run, tables.results(run))["baseline"]
    assert set(baseline) == TEST
    assert baseline.pop("ci95") == {}
    assert set(baseline.values()) == {None}

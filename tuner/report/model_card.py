"""The model card: what the best network is, what its file takes and gives, how it did on test, and its limits."""

from __future__ import annotations

from collections.abc import Mapping

from model.config import ARCHITECTURES, REFERENCES
from tuner import records
from tuner.report import page, words
from tuner.report.gallery import Block, Code, Page, Section, Table, Text
from tuner.report.inputs import EvaluatedRun, Json
from tuner.report.provenance import search_command

_FIGURES = (
    *("dice_mean", "dice_positive_mean", "iou_mean", "precision", "recall", "f1", "two_pixel_f1"),
    *("decision_ap", "decision_auc", "decision_f1"),
)
_NETWORKS = dict(zip(ARCHITECTURES, ("[1]", "[1], with a decoder", "[2]"), strict=True))
_WITHOUT_TORCH = """import cv2
import numpy as np
import onnxruntime

model = onnxruntime.InferenceSession("model.onnx")
image = cv2.cvtColor(cv2.imread("photo.jpg"), cv2.COLOR_BGR2RGB)
# As training did. It must be a whole image of training's size, or a cut-out of one: see Data and Limits.
shrinks = image.shape[0] > {height} or image.shape[1] > {width}
image = cv2.resize(image, ({width}, {height}), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
probability, mask, score, defect = model.run(["probability", "mask", "score", "defect"], {{"image": image[None]}})
cv2.imwrite("mask.png", mask[0] * np.uint8(255))
print("defect" if defect[0] else "sound", float(score[0]))"""
_WITH_TORCH = """import torch

model = torch.export.load("model.pt2").module()
probability, mask, score, defect = model(torch.from_numpy(image[None]))"""


def build(
    run: EvaluatedRun, metrics: Json, sizes: Mapping[str, int], exports: Mapping[str, Json], tiling: str = ""
) -> Page:
    """`metrics` as in metrics.json, `sizes` as in best/images.json, `exports` what was compared by the name of each
    exported file. `tiling` is a sentence on what photos larger than the input lose by tiles."""
    kind = "nearest to its constraints" if run.winner.is_beyond else "best"
    data = page.data_name(run)
    return Page(
        title=f"Model card: the {kind} network of run {run.facts['name']}",
        subtitle=f"Segments defects in images like those of {data}, and decides for each image whether it has one.",
        sections=[
            Section("top", "", [*_warnings(run, metrics), _facts(run)]),
            Section("use", "Use", _use(run, exports)),
            Section("thresholds", "Thresholds", _thresholds(run, metrics)),
            Section("test", "Test figures", _test(run, metrics)),
            Section("data", "Data", _data(run, sizes)),
            Section("limits", "Limits", [*map(Text, _limits(run, tiling))]),
            Section("parity", "Exported files against the network", _parity(exports)),
            Section("origin", "Where it comes from", _origin(run)),
        ],
    )


def _warnings(run: EvaluatedRun, metrics: Json) -> list[Block]:
    """What must be known before anything else."""
    found: list[Block] = []
    if run.winner.is_beyond:
        beyond = records.beyond(run.winner.violations)
        found.append(Text(f"CONSTRAINTS NOT MET: no trial meets them; this is the one least beyond them: {beyond}."))
    if metrics["thresholds_chosen_on"] == "test":
        found.append(
            Text("THRESHOLDS CHOSEN ON TEST: the test figures are no estimates of what new images would give.")
        )
    return found


def _facts(run: EvaluatedRun) -> Table:
    config, weights = run.winner.config, sum(stage["parameters"] for stage in run.architecture["used"])
    rows = [
        ["network", f"{config['architecture']}, {_NETWORKS[config['architecture']]}"],
        ["width", f"{words.setting(config['width'])} of the published channels"],
        ["FeatureNorm", config["norm"]],
        ["weights", f"{weights:,}, single precision"],
        ["trial", ", ".join([run.winner.trial, *_fold(run), f"epoch {run.winner.epoch}"])],
        ["input while training", f"{config['input_height']} x {config['input_width']} px (height x width)"],
    ]
    return Table(["", ""], rows)


def _fold(run: EvaluatedRun) -> list[str]:
    return [f"network of fold {run.winner.fold} of {run.folds}"] if run.winner.fold else []


def _use(run: EvaluatedRun, exports: Mapping[str, Json]) -> list[Block]:
    config = run.winner.config
    score = (
        "the decision as a probability"
        if run.winner.thresholds["decision_logit"] is not None
        else "the largest probability in the image, for no decision was trained"
    )
    signature = Table(
        ["", "name", "type", "shape", "what"],
        [
            ["input", "image", "uint8", "N, H, W, 3", "RGB; H and W multiples of 8 px, one at least 64 and one 128"],
            ["output", "probability", "float32", "N, H, W", "that a pixel is of a defect"],
            ["output", "mask", "uint8", "N, H, W", "1 where it is taken for one, else 0"],
            ["output", "score", "float32", "N", score],
            ["output", "defect", "bool", "N", "whether the image is taken to have one"],
        ],
    )
    blocks: list[Block] = [
        Text("Scaling, thresholds and the rule of the decision are inside: nothing else is needed."),
        signature,
    ]
    if "model.onnx" in exports:
        code = _WITHOUT_TORCH.format(height=config["input_height"], width=config["input_width"])
        blocks += [Text("model.onnx, in Python without torch:"), Code(code)]
    if "model.pt2" in exports:
        sides = config["input_height"], config["input_width"]
        text = (
            "model.pt2 (torch.export), with torch and without this project, the image as above; H and W at least 128:"
        )
        if min(sides) < 128:
            short = "H" if sides[0] < 128 else "W"
            text = (
                f"model.pt2 (torch.export), with torch and without this project, the image as above; {short} 64 to 120:"
            )
        blocks += [Text(text), Code(_WITH_TORCH)]
    return [*blocks, Text("tuner predict does all this for folders and for large photos, at the right scale.")]


def _thresholds(run: EvaluatedRun, metrics: Json) -> list[Block]:
    found = run.winner.thresholds
    rule = found["rule"] + (f", every {found['factor']}th pixel" if found["factor"] > 1 else "")
    rows = [
        ["rule", rule],
        ["chosen on", str(metrics["thresholds_chosen_on"])],
        ["a pixel is of a defect from", _threshold(found["segmentation_probability"], found["segmentation_logit"])],
        ["an image has a defect from", _threshold(found["decision_probability"], found["decision_logit"])],
        ["mask of an image decided sound", "empty" if found["blacken"] else "as found"],
    ]
    if found["lower_threshold"] < 1:
        factor = words.setting(found["lower_threshold"])
        rows.append(["an image with a defect and an empty mask", f"once more at {factor} times the threshold"])
    text = "Logits are rounded to half precision and then compared, as the evaluation did; at the threshold counts."
    if found["decision_logit"] is None:
        text += (
            " There were no images without a defect, so no decision was trained: an image is taken to have a defect "
            "where its mask has any pixel."
        )
    return [Table(["", ""], rows), Text(text)]


def _threshold(probability: float | None, logit: float | None) -> str:
    return words.NONE if logit is None else f"probability {words.probability(probability)}, logit {logit:g}"


def _test(run: EvaluatedRun, metrics: Json) -> list[Block]:
    test, baseline = metrics["test"], metrics["baseline"]
    rows = []
    for key in _FIGURES:
        if test[key] is not None:
            row = [words.metric(key), words.figure(test[key]), words.interval(test["ci95"].get(key))]
            gain = metrics["difference"].get(key)
            shown = [words.figure(baseline[key]), words.interval(baseline["ci95"].get(key))]
            rows.append([*row, *shown, words.difference(gain["value"], gain["ci95"]) if gain else ""])
    columns = ["figure", "this network", "95 % interval", "baseline", "95 % interval", "difference (95 % interval)"]
    comparison = {True: " It is the baseline itself.", False: ""}[run.is_baseline]
    counts = run.data["test"]
    return [
        Table(columns, rows, numeric=frozenset({1, 3})),
        Text(
            f"On {counts['positive']:,} test images with a defect and {counts['negative']:,} without, in "
            f"{words.plural(run.data['groups']['test'], 'group')}; no test image took part in any choice unless said "
            f"above. Intervals are over groups, and there are none where groups are too few. The split was opened "
            f"{'once' if len(run.openings) == 1 else f'{len(run.openings)} times'}.{comparison}"
        ),
    ]


def _data(run: EvaluatedRun, sizes: Mapping[str, int]) -> list[Block]:
    data = run.data
    rows = [
        [split, *(f"{data[split][kind]:,}" for kind in ("positive", "negative", "segmented")),
         f"{data['groups'][split]:,}"]
        for split in page.SPLITS
    ]  # fmt: skip
    columns = ["split", "with a defect", "without", "with masks", "groups"]
    text = f"{page.data_name(run)}, layout {data['layout']}, fingerprint {data['fingerprint']}."
    if (kept := run.winner.config["num_segmented"]) != "all":
        text += f" The training kept the masks of {kept} images."
    if sizes:
        text += (
            f" The images of validation, which come from where those of training do, had {sizes['height']} x "
            f"{sizes['width']} px (median, height x width), at most {sizes['largest_height']} x "
            f"{sizes['largest_width']}. All were brought to {run.winner.config['input_height']} x "
            f"{run.winner.config['input_width']} px."
        )
    return [Text(text), Table(columns, rows, numeric=frozenset(range(1, 5)))]


def _limits(run: EvaluatedRun, tiling: str) -> list[str]:
    config = run.winner.config
    limits = [
        "It knows defects at the scale of its training: bring an image to the size, in px, that one like it had there. "
        "A photo taken from nearer or farther, or of another surface, is something else than what was tested.",
        "FeatureNorm and the decision look at the whole image: one that is much larger, or a cut-out, is judged "
        "otherwise. Give larger photos in tiles of the training size.",
    ]
    if tiling:
        limits.append(tiling)
    if not run.has_negatives:
        limits.append("It has seen no image without a defect: how often it finds one in a sound image is not known.")
    elif not run.data["test"]["negative"]:
        limits.append("There is no image without a defect in the test split: false alarms were not measured.")
    precision = config["precision"]
    if precision != "float32":
        where = "in bfloat16 where the device had it" if precision == "auto" else "in bfloat16"
        limits.append(f"It was trained and tested {where}; the files compute in single precision (see below).")
    limits.append("Whether the data allow what you want to do with a network trained on them is for you to find out.")
    return limits


def _parity(exports: Mapping[str, Json]) -> list[Block]:
    if not exports:
        return [Text("Nothing is exported yet: tuner export RUN --format onnx, or torch.")]
    rows = []
    for name, found in exports.items():
        compared = found["compared"]
        rows.append(
            [name, found["with"], f"{compared['images']:,}", f"{compared['probability']:.1e}",
             f"{compared['score']:.1e}", f"{compared['edge_pixels']:,} of {compared['pixels']:,}",
             f"{compared['unlike_judged']:,}", f"{compared['judged_probability']:.1e}",
             f"{compared['unlike_decided']:,}"]
        )  # fmt: skip
    columns = ["file", "with", "test images", "probability", "score", "mask pixels",
               "mask pixels, evaluation", "probability, evaluation", "decisions, evaluation"]  # fmt: skip
    return [
        Table(columns, rows, numeric=frozenset(range(2, 9))),
        Text(
            "Largest differences to the network in PyTorch, in single precision, on test images: each alone, some "
            "together, one at another size. All decisions are equal. A mask may differ where a logit lies within 0.001 "
            "of the number at which the answer turns; elsewhere, none does. The last three columns are the "
            "differences of these images to what the evaluation found, on its own device and in its own precision."
        ),
    ]


def _origin(run: EvaluatedRun) -> list[Block]:
    versions = ", ".join(f"{name} {version}" for name, version in run.facts["versions"].items() if version)
    return [
        Text(
            f"Search of {words.plural(len(run.records), 'trial')} in run {run.facts['name']} ({run.facts['id']}), "
            f"created {run.facts['created']}; seed {words.setting(run.winner.config['seed'])} of the training. "
            f"{versions}."
        ),
        Text("This command makes such a run, with the search space of the run as space.yaml:"),
        Code(search_command(run, "DATA")),
        *map(Text, REFERENCES),
    ]

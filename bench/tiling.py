"""What tiles cost: Dice against one pass over the whole image; memory and time of a large photo.

    python -m bench.tiling dice RUN
    python -m bench.tiling photo [--widths 0.25 1] [--height 4000] [--width 6000] [--side 448]

`dice`: synthetic images of twice the side of the network's input, whose cracks are as wide as those of training
(sensible for a run on the synthetic set alone), and mosaics of four of the run's test examples each. Rows are overlaps
of neighbouring tiles; "each by itself" answers the four pictures of a mosaic alone. `photo`: `tuner predict` in a
process of its own, with a network of random weights whose threshold leaves 3 % of the pixels.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from model import deployed, export, layouts, synthetic, tiles
from model.arrays import Array
from model.checkpoint import load_model, save_model
from model.config import RunConfig
from model.files import write_json
from model.inspection import decode_image, decode_mask
from model.network import build
from model.thresholds import Thresholds

_OVERLAPS = (0, 1 / 4, 2 / 3)


def dice(run: Path) -> None:
    network = deployed.load(run)
    side = network.sizes.input
    sizes = tiles.Sizes.of(side, None)  # examples and synthetic images have the scale of the input already
    examples = np.load(run / "evaluation" / "examples.npz")
    quarters = _shuffled(examples["image"], examples["truth"])
    alone = [[network.answer(image[None])[1][0] for image in images] for images, _ in quarters]
    scores = [
        tiles.dice(tiles.mosaic(truths), tiles.mosaic(masks))
        for (_, truths), masks in zip(quarters, alone, strict=True)
    ]
    sets = {"mosaics of test examples": [(tiles.mosaic(images), tiles.mosaic(truths)) for images, truths in quarters]}
    if json.loads((run / "run.json").read_text())["data_path"] == "synthetic":
        sets["synthetic"] = _synthetic(side)
    print("| images | overlap | tiles | tiled | whole at once | each by itself | tiled, positives | whole, positives |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, pairs in sets.items():
        images, truths = zip(*pairs, strict=True)
        seen = set()
        for overlap in _OVERLAPS:
            tiles.OVERLAP = overlap
            count = len(tiles.cuts(images[0].shape[:2], sizes))
            if count in seen:  # tiles are spread evenly, so these are the same
                continue
            seen.add(count)
            found = tiles.tiled_against_whole(network.answer, images, truths, sizes)
            itself = f"{np.mean(scores):.4f}" if name.startswith("mosaics") else ""
            print(
                f"| {len(images)} {name}, {images[0].shape[1]}x{images[0].shape[0]} | {overlap:g} | {count} | "
                f"{found['tiled']:.4f} | {found['whole']:.4f} | {itself} | {found['tiled_positives']:.4f} | "
                f"{found['whole_positives']:.4f} |",
                flush=True,
            )


def _shuffled(images: Array, truths: Array) -> list[tuple[Array, Array]]:
    """Fours of the examples, three times over."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(images))[: len(images) // 4 * 4].reshape(-1, 4) for _ in range(3)]
    return [(images[four], truths[four]) for order in orders for four in order]


def _synthetic(side: tuple[int, int]) -> list[tuple[Array, Array]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "set"
        synthetic.write(folder, count=40, height=2 * side[0], width=2 * side[1], seed=1)
        samples = layouts.read(folder)
        empty = np.zeros((2 * side[0], 2 * side[1]), np.uint8)
        return [(decode_image(s.image), decode_mask(s.mask) if s.mask else empty) for s in samples]


def photo(widths: list[float], size: tuple[int, int], side: int) -> None:
    print("| network | runtime | tiles | s | peak RSS, MiB |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "photo.jpg"
        cv2.imwrite(str(file), _surface(size))
        for width in widths:
            model = Path(scratch) / f"width-{width:g}"
            _write_model(model, width, side, decode_image(file)[:side, :side])
            for name, path in (("torch", model), ("onnxruntime", model / "model.onnx")):
                seconds, peak, row = _predict(path, file, Path(scratch) / f"out-{width:g}-{name}")
                print(
                    f"| width {width:g}, {side}x{side} | {name} | {row['tiles']} | {seconds:.0f} | {peak:.0f} |",
                    flush=True,
                )


def _surface(size: tuple[int, int]) -> Array:
    """Noise of several scales."""
    rng = np.random.default_rng(0)
    out = np.full((*size, 3), 128, np.float32)
    for scale in (1, 8, 64):
        grain = rng.normal(0, 20, (size[0] // scale + 1, size[1] // scale + 1)).astype(np.float32)
        out += cv2.resize(grain, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)[..., None]
    return out.clip(0, 255).astype(np.uint8)


def _write_model(folder: Path, width: float, side: int, image_HWC: Array) -> None:
    torch.manual_seed(0)
    config = RunConfig(width=width, input_height=side, input_width=side)
    network = build(config.architecture, width=width).eval()
    with torch.inference_mode():
        logits = network(torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)[None] / 255)[1].numpy()
    thresholds = Thresholds("grid", 1, float(np.quantile(logits, 0.97)), -100.0)
    save_model(folder, network.state_dict(), config, thresholds, epoch=1)
    images = dict.fromkeys(
        ("height", "width", "smallest_height", "smallest_width", "largest_height", "largest_width"), side
    )
    write_json(folder / "images.json", images)
    network, config, thresholds = load_model(folder, torch.device("cpu"))
    about = {"schema": 1, "input": {"height": side, "width": side}, "images": images}
    (folder / "model.onnx").write_bytes(export.to_onnx(export.Deployable(network, thresholds), side, side, about))


_MEASURED = """
import sys
from pathlib import Path
from tuner.cli import main
assert main(sys.argv[1:]) == 0
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
"""What a parent learns of a child's peak may be the parent's own, from before the child was another program."""


def _predict(model: Path, file: Path, out: Path) -> tuple[float, float, dict[str, str]]:
    """Seconds, peak MiB of the process, and the line of the table."""
    began = time.perf_counter()
    words = [sys.executable, "-c", _MEASURED, "predict", str(model), str(file), "--out", str(out)]
    said = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout  # noqa: S603
    seconds = time.perf_counter() - began
    with (out / "predictions.csv").open(newline="") as table:
        return seconds, int(said.split()[-1]) / 1024, next(csv.DictReader(table))


def main() -> None:
    """Measures one of both and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("dice").add_argument("run", type=Path)
    large = verbs.add_parser("photo")
    large.add_argument("--widths", type=float, nargs="+", default=[0.25, 1])
    large.add_argument("--height", type=int, default=4000, help="px")
    large.add_argument("--width", type=int, default=6000, help="px")
    large.add_argument("--side", type=int, default=448, help="px of the network's input")
    options = parser.parse_args()
    if options.verb == "dice":
        dice(options.run)
    else:
        photo(options.widths, (options.height, options.width), options.side)


if __name__ == "__main__":
    main()

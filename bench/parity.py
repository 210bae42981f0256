"""How far an ONNX file is from the network that it was made from, on real images.

    python -m bench.parity RUN --data DIR... [--images 50]

The images are spread evenly over each folder's `images/`, equal parts of each, and come to the network's input as in
training. Each is answered alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from model import export
from model.arrays import Array
from model.checkpoint import load_model
from model.inspection import decode_image, resize_image
from model.parity import EDGE
from model.tiles import Answerer, Answers


def spread(folder: Path, count: int) -> list[Path]:
    """Files from the first to the last."""
    files = sorted(path for path in (folder / "images").iterdir() if path.is_file())
    return [files[k] for k in np.linspace(0, len(files) - 1, count).round().astype(int)]


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--images", type=int, default=50)
    options = parser.parse_args()
    network, config, thresholds = load_model(options.run / "best", torch.device("cpu"))
    module = export.Deployable(network, thresholds)
    size = config.input_height, config.input_width
    answer = export.run_onnx(export.to_onnx(module, *size, {}))
    print(f"{config.architecture}, width {config.width:g}, {size[1]}x{size[0]} px")
    print(
        "| images of | number | probability | score | mask pixels that differ | of them beyond the edge | "
        "decisions that differ | decided positive |"
    )
    print("| --- " * 8 + "|")
    for folder in options.data:
        files = spread(folder, options.images // len(options.data))
        rows = [_compare(module, answer, resize_image(decode_image(file), size)[None]) for file in files]
        apart, found = np.array([row[:2] for row in rows]).max(axis=0), np.array([row[2:] for row in rows]).sum(axis=0)
        print(
            f"| {folder.name} | {len(files)} | {apart[0]:.1e} | {apart[1]:.1e} | "
            f"{found[0]:.0f} of {len(files) * size[0] * size[1]:,} | {found[1]:.0f} | {found[2]:.0f} | "
            f"{found[3]:.0f} |",
            flush=True,
        )


def _compare(module: export.Deployable, answer: Answerer, image_NHWC: Array) -> tuple[float, ...]:
    """Largest difference of probability and of score; pixels that differ, and of them beyond the edge; whether the
    decision differs, and is positive."""
    with torch.inference_mode():
        decision_N, segmentation_NHW = module.logits(torch.from_numpy(image_NHWC))
        wanted = Answers(*(one.numpy() for one in module.decide(decision_N, segmentation_NHW)))
    found = answer(image_NHWC)
    differs = wanted.mask != found.mask
    is_edge = (module.from_edge(segmentation_NHW) <= EDGE).numpy()
    return (
        float(np.abs(wanted.probability - found.probability).max()),
        float(np.abs(wanted.score - found.score).max()),
        int(differs.sum()),
        int((differs & ~is_edge).sum()),
        int((wanted.defect != found.defect).sum()),
        int(wanted.defect.sum()),
    )


if __name__ == "__main__":
    main()

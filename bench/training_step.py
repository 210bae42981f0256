"""One training step of the network, by precision, CPU threads and memory order of the images.

    python -m bench.training_step [--seconds 5] [--height 320] [--width 480]

Prints a Markdown table of medians and of the ratio to float32 with images in torch's default order.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from model.config import RunConfig
from model.data import to_input
from model.evaluate import autocast
from model.losses import decision_loss, segmentation_loss
from model.network import build


def step_seconds(config: RunConfig, channels_last: bool, seconds: float) -> float:
    """Median over as many steps as fit, after two to warm up."""
    device = torch.device("cpu")
    network = build(config.architecture, width=config.width)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pixels = torch.randint(0, 256, (1, config.input_height, config.input_width, 3), dtype=torch.uint8).numpy()
    target = torch.zeros(1, 1, config.input_height, config.input_width)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        images = to_input(pixels, device)
        with autocast(config, device):
            decision, segmentation = network(images if channels_last else images.contiguous())
        loss = segmentation_loss(segmentation, target, torch.ones(1)) + decision_loss(decision, torch.ones(1, 1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def main() -> None:
    """Measures every combination in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="for each combination")
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=480)
    options = parser.parse_args()
    size = {"input_height": options.height, "input_width": options.width}
    print("| threads | precision | images | s a step | ratio |\n| --- | --- | --- | --- | --- |")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        plain = None
        for precision, channels_last in itertools.product(("float32", "bfloat16"), (False, True)):
            found = step_seconds(RunConfig(width=0.25, precision=precision, **size), channels_last, options.seconds)
            plain = plain or found
            order = "channels last" if channels_last else "default"
            print(f"| {threads} | {precision} | {order} | {found:.3f} | {plain / found:.2f} |", flush=True)


if __name__ == "__main__":
    main()

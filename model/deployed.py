"""A trained model as a plain function of pixels, from a run, a model folder or an ONNX file, which needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.arrays import Array
from model.tiles import Answer, Sizes

ONNX_KEY = "segdec_tuner"
"""of the metadata of an exported file"""

_OUTPUTS = ("probability", "mask", "score", "defect")


class Answers(NamedTuple):
    """What a deployable model says of N images."""

    probability: Array
    """(N, H, W) float32 that a pixel is of a defect"""
    mask: Array
    """(N, H, W) uint8, 1 where it is taken for one"""
    score: Array
    """(N,) float32 that an image has a defect"""
    defect: Array
    """(N,) bool, whether it is taken to have one"""


Answerer = Callable[[Array], Answers]
"""answers images, uint8 (N, H, W, 3) RGB"""


@dataclass(frozen=True)
class Deployed:
    """What answers photos."""

    answer: Answer
    sizes: Sizes
    note: str
    """what the user ought to know of it, or nothing"""


def load(model: Path) -> Deployed:
    """From a run's folder, its `best/`, or an exported .onnx file. ValueError if it is none of them."""
    if model.suffix.lower() == ".onnx":
        return _load_onnx(model)
    for folder in (model / "best", model):
        if (folder / "model.safetensors").is_file():
            return _load_folder(folder)
    raise ValueError(
        f"MODEL must be the folder of a run that has finished, its best/, or an exported .onnx file, found {model}, "
        + ("which has no best/model.safetensors" if model.is_dir() else "which is none of them")
        + "; `tuner finals RUN` leaves best/"
    )


def _load_folder(folder: Path) -> Deployed:
    import torch

    from model.checkpoint import load_model
    from model.export import Deployable

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, config, thresholds = load_model(folder, device)
    module = Deployable(network, thresholds).to(device)

    def answer(image_NHWC: Array) -> tuple[Array, Array, Array, Array]:
        with torch.inference_mode():
            found = module(torch.from_numpy(np.ascontiguousarray(image_NHWC)).to(device))
        probability, mask, score, defect = (one.cpu().numpy() for one in found)
        return probability, mask, score, defect

    file = folder / "images.json"
    images = _parsed(file.read_text(), file) if file.is_file() else None
    return _deployed(answer, (config.input_height, config.input_width), images, folder)


def _load_onnx(file: Path) -> Deployed:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; `tuner export RUN --format onnx` makes one")
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"{file} needs onnxruntime, which is not installed; pip install 'segdec-tuner[export]'"
        ) from error
    options = session_options()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        described = session.get_modelmeta().custom_metadata_map[ONNX_KEY]
    except Exception as error:  # onnxruntime has a class for each way in which a file is broken
        raise ValueError(f"{file} must be a model that `tuner export` made ({error})") from error
    facts = _parsed(described, file)
    size = facts["input"]["height"], facts["input"]["width"]

    def answer(image_NHWC: Array) -> tuple[Array, Array, Array, Array]:
        probability, mask, score, defect = session.run(_OUTPUTS, {"image": image_NHWC})
        return probability, mask, score, defect

    return _deployed(answer, size, facts.get("images"), file)


def session_options() -> Any:
    """Of onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    cores = os.sched_getaffinity(0)  # the machine may have more than this process's share
    options.intra_op_num_threads = len(cores)
    options.enable_cpu_mem_arena = False  # it keeps what the largest layer ever took
    options.log_severity_level = 3
    return options


def _deployed(answer: Answer, size: tuple[int, int], images: Mapping[str, int] | None, source: Path) -> Deployed:
    note = ""
    if not images:
        note = (
            f"{source} does not say how large its training images were (it is of an earlier version); taking the size "
            f"of the network's input, {size[0]}x{size[1]} px"
        )
    return Deployed(answer, Sizes.of(size, images), note)


def _parsed(text: str, file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(text)
        return values
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} must hold JSON ({error}); export the model again") from error

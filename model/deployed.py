"""A trained model as a plain function of pixels, from a run, a model folder or an ONNX file, which needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import input_size_problem
from model.thresholds import Thresholds
from model.tiles import Answerer, Answers, Sizes

ONNX_KEY = "segdec_tuner"
"""of the metadata of an exported file"""

_WAY_OUT = "make it again with `tuner finals` or `tuner export`"


@dataclass(frozen=True)
class Deployed:
    """What answers photos."""

    answer: Answerer
    sizes: Sizes
    note: str
    """what the user ought to know of it, or nothing"""
    thresholds: Thresholds | None = None
    """what `answer` has applied; None where a file of an earlier version does not say"""


def load(model: Path) -> Deployed:
    """From a run's folder, its `best/`, or an exported .onnx file. ValueError if it is none of them."""
    if model.suffix.lower() == ".onnx" and not model.is_dir():
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

    file = folder / "images.json"
    images = _parsed(file.read_bytes(), file) if file.is_file() else None
    return _deployed(module.answer, (config.input_height, config.input_width), images, thresholds, folder)


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
    except Exception as error:  # onnxruntime has a class for each way in which a file is broken
        raise ValueError(f"{file} must be a model that `tuner export` made ({error})") from error
    described = session.get_modelmeta().custom_metadata_map.get(ONNX_KEY)
    takes, gives = ([one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs()))
    if described is None or takes != ["image"] or not set(gives) >= set(Answers._fields):
        raise ValueError(
            f"{file} must be a model that `tuner export` made, from image to {', '.join(Answers._fields)}, found one "
            f"from {', '.join(takes)} to {', '.join(gives)}"
            + ("" if described else f" without {ONNX_KEY} in its metadata")
        )
    facts = _parsed(described, file)
    size = _input_size(facts, file)

    return _deployed(answerer(session), size, facts.get("images"), _thresholds(facts, file), file)


def answerer(session: Any) -> Answerer:
    """Of an open onnxruntime session."""
    return lambda images_NHWC: Answers(*session.run(list(Answers._fields), {"image": images_NHWC}))


def session_options() -> Any:
    """Of onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    cores = os.sched_getaffinity(0)  # the machine may have more than this process's share
    options.intra_op_num_threads = len(cores)
    options.enable_cpu_mem_arena = False  # it keeps what the largest layer ever took
    options.log_severity_level = 3
    return options


def _deployed(
    answer: Answerer,
    size: tuple[int, int],
    images: Mapping[str, int] | None,
    thresholds: Thresholds | None,
    source: Path,
) -> Deployed:
    note = ""
    if not images:
        note = (
            f"{source} does not say how large its training images were (it is of an earlier version); taking the size "
            f"of the network's input, {size[0]}x{size[1]} px"
        )
    try:
        return Deployed(answer, Sizes.of(size, images), note, thresholds)
    except ValueError as error:
        raise ValueError(f"{source}: {error}; {_WAY_OUT}") from error


def _input_size(facts: Mapping[str, Any], file: Path) -> tuple[int, int]:
    """Of the network."""
    found = facts.get("input")
    height, width = (found.get(side) if isinstance(found, dict) else None for side in ("height", "width"))
    if not (type(height) is type(width) is int and min(height, width) > 0) or input_size_problem(height, width):
        raise ValueError(f"{file} must say the network's input as height and width, px, found {found!r}; {_WAY_OUT}")
    return height, width


def _thresholds(facts: Mapping[str, Any], file: Path) -> Thresholds | None:
    if not facts.get("thresholds"):
        return None
    try:
        return Thresholds.from_dict(facts["thresholds"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must say its thresholds ({type(error).__name__}: {error}); {_WAY_OUT}") from error


def _parsed(text: str | bytes, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold JSON ({error}); {_WAY_OUT}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, found {str(values)[:60]}; {_WAY_OUT}")
    return values

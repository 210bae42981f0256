"""A network and its thresholds as one module that answers as training judged, and that module as a file.

Shapes: N images, H x W px. onnx, onnxscript and onnxruntime are imported on use: a machine that trains has none.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.arrays import Array
from model.config import STRIDE, input_size_problem
from model.counts import to_half
from model.deployed import ONNX_KEY as METADATA
from model.deployed import answerer, session_options
from model.network import FeatureNorm, SegDecNet
from model.thresholds import Thresholds
from model.tiles import Answerer, Answers

OPSET = 20
"""of ONNX: what these networks need, and not newer, so that runtimes of 2024 read the files too"""

_SMALL = 128
"""px; a side below it gives a map of one position at the end of the decision branch, which torch.export treats apart"""


class Deployable(nn.Module):
    """Scaling, network, sigmoid, thresholds and the rule of the decision in one, in single precision.

    `forward(image)`: uint8 (N, H, W, 3) RGB, of a size that the network accepts (`model.config.input_size_problem`), ->
    - `probability` float32 (N, H, W) that a pixel is of a defect;
    - `mask` uint8 (N, H, W), 1 where it is taken for one: what `Thresholds.mask` finds, bit for bit;
    - `score` float32 (N) that an image has a defect; and
    - `defect` bool (N), whether it is taken to have one: what `Thresholds.decide` finds.

    A network that was trained without negatives has learnt no decision. `defect` then says whether the mask has any
    pixel, and `score` is the largest probability, which is what decides that.
    """

    def __init__(self, network: SegDecNet, thresholds: Thresholds) -> None:
        super().__init__()
        self.network = network.float().eval()
        self.thresholds = thresholds
        self._pixel = least_single(thresholds.segmentation_logit)
        self._lowered = least_single(thresholds.lowered())
        decision = thresholds.decision_logit
        self._image = None if decision is None else least_single(float(to_half(np.float64(decision))))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(probability, mask, score, defect)"""
        return self.decide(*self.logits(image))

    def answer(self, images_NHWC: Array) -> Answers:
        """The same of and with numpy arrays, on the device where the network is."""
        device = next(self.parameters()).device
        with torch.inference_mode():
            found = self(torch.from_numpy(np.ascontiguousarray(images_NHWC)).to(device))
        return Answers(*(one.cpu().numpy() for one in found))

    def logits(self, image_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Of the decision (N,) and of the segmentation (N, H, W)."""
        decision_N1, segmentation_N1HW = self.network(image_NHWC.permute(0, 3, 1, 2).float() / 255)
        return decision_N1[:, 0], segmentation_N1HW[:, 0]

    def decide(self, decision_N: Tensor, segmentation_NHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same from the network's logits, which are finite."""
        found_NHW = segmentation_NHW >= self._pixel
        largest_N = segmentation_NHW.amax(dim=(1, 2))
        positive_N = None if self._image is None else decision_N >= self._image
        if self.thresholds.lower_threshold < 1:
            is_lowered_N = largest_N < self._pixel
            if positive_N is not None:
                is_lowered_N = is_lowered_N & positive_N
            found_NHW = found_NHW | (is_lowered_N[:, None, None] & (segmentation_NHW >= self._lowered))
        if positive_N is not None and self.thresholds.blacken:
            found_NHW = found_NHW & positive_N[:, None, None]
        if positive_N is None:
            score_N, defect_N = torch.sigmoid(largest_N), largest_N >= self._lowered
        else:
            score_N, defect_N = torch.sigmoid(decision_N), positive_N
        return torch.sigmoid(segmentation_NHW), found_NHW.to(torch.uint8), score_N, defect_N

    def from_edge(self, segmentation_NHW: Tensor) -> Tensor:
        """(N, H, W) how far each logit is from a number at which a pixel's answer turns."""
        edges = {edge for edge in (self._pixel, self._lowered) if np.isfinite(edge)}
        distances = [(segmentation_NHW - edge).abs() for edge in edges]
        return torch.stack(distances).amin(dim=0) if distances else torch.full_like(segmentation_NHW, torch.inf)


def least_single(threshold: float) -> float:
    """The least number in single precision that reaches a threshold once it is rounded to half precision (`to_half`);
    -inf where all numbers do, inf where none does.

    Comparing with it is comparing in half precision, and no runtime can optimise the rounding away.
    """
    half = to_half(np.float64(threshold))
    with np.errstate(over="ignore"):  # beyond the largest lies infinity
        if float(half) < threshold:
            half = np.nextafter(half, np.float16(np.inf))
        below = np.nextafter(half, np.float16(-np.inf))
    if np.isinf(half):
        return float("inf")
    if np.isinf(below):
        return float("-inf")
    middle = np.float32((float(half) + float(below)) / 2)
    is_even = half.view(np.uint16) & 1 == 0  # to which a number in the middle is rounded
    return float(middle if is_even else np.nextafter(middle, np.float32(np.inf)))


def trace(module: Deployable, height: int, width: int) -> torch.export.ExportedProgram:
    """The module as a graph for any number of images of any size that is a multiple of 8 px. A side must be at least
    128 px, or below that where the network's input is."""

    def side(name: str, length: int) -> Any:
        eighths = torch.export.Dim(name, min=_SMALL // STRIDE)
        if length < _SMALL:
            eighths = torch.export.Dim(name, min=_SMALL // 2 // STRIDE, max=_SMALL // STRIDE - 1)
        return STRIDE * eighths

    assert input_size_problem(height, width) is None
    sizes = {0: torch.export.Dim("n", min=1), 1: side("h", height), 2: side("w", width)}
    example = torch.zeros(
        2, height, width, 3, dtype=torch.uint8
    )  # a size of 1 would be taken for one that never changes
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, (example,), dynamic_shapes={"image": sizes})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def std_mean_by_rows(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """What FeatureNorm takes from a map, added up within rows and then over rows. onnxruntime adds one number to the
    next: over a whole map at once its rounding errors are five times as large."""

    def mean_of(values_BCHW: Tensor) -> Tensor:
        return values_BCHW.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)

    mean = mean_of(x_BCHW)
    positions = x_BCHW.shape[2] * x_BCHW.shape[3]
    apart = x_BCHW - mean
    return torch.sqrt(mean_of(apart * apart) * (positions / (positions - 1))), mean


def other_size(images_NHWC: Array) -> Array:
    """The images, mirrored on at their right and lower edges up to another size that a traced module takes."""
    grown = [(0, STRIDE if side >= _SMALL else 0) for side in images_NHWC.shape[1:3]]
    return np.pad(images_NHWC, [(0, 0), *grown, (0, 0)], mode="reflect")


def to_torch(module: Deployable, height: int, width: int, about: dict[str, Any]) -> bytes:
    """The file that `torch.export.load` reads, in any process; `about` lies in it as extra file METADATA. `height` and
    `width` are the network's input."""
    file = io.BytesIO()
    with _quiet():
        torch.export.save(trace(module, height, width), file, extra_files={METADATA: _text(about)})
    return file.getvalue()


def to_onnx(module: Deployable, height: int, width: int, about: dict[str, Any]) -> bytes:
    """The file for onnxruntime, weights inside; `about` is METADATA among its properties."""
    import onnx

    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, FeatureNorm):
            part.std_mean = std_mean_by_rows
    program = trace(module, height, width)
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["image"],
            output_names=list(Answers._fields),
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    graph = model.graph
    _refuse_other_sizes(graph)
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph):
        del part.metadata_props[:]  # they name folders of this machine
    del graph.value_info[:]
    for one in (*graph.input, *graph.output):
        for dimension, letter in zip(one.type.tensor_type.shape.dim, "NHW", strict=False):
            dimension.dim_param = letter
    onnx.helper.set_model_props(model, {METADATA: _text(about)})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _refuse_other_sizes(graph: Any) -> None:
    """Puts a node before all others that fails at sizes that the network refuses (`input_size_problem`): without, a
    runtime answers them with something. Its name is the rule, for runtimes name the node that failed."""
    from onnx import TensorProto, helper

    def number(name: str, *values: int) -> str:
        graph.initializer.append(helper.make_tensor(f"size/{name}", TensorProto.INT64, [len(values)], values))
        return f"size/{name}"

    checks: list[Any] = []

    def node(kind: str, inputs: list[str], **attributes: Any) -> str:
        name = f"size/{len(checks)}"
        checks.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    sides = node("Shape", ["image"], start=1, end=3)
    # 0 where the sides are multiples; 0 where the decision branch's last map holds 2 positions (1/64 of the sides)
    beyond = node("ReduceMax", [node("Mod", [sides, number("stride", STRIDE)])], keepdims=1)
    positions = node("ReduceProd", [node("Div", [sides, number("smallest", STRIDE * 8)])], keepdims=1)
    lacking = node("Max", [node("Sub", [number("positions", 2), positions]), number("none", 0)])
    # A reshape to the shape that it has, or to one that cannot hold it.
    channels = node("Add", [number("channels", 3), node("Add", [beyond, lacking])])
    count = node("Shape", ["image"], start=0, end=1)
    shape = node("Concat", [count, sides, channels], axis=0)
    for one_node in graph.node:
        for k, name in enumerate(one_node.input):
            if name == "image":
                one_node.input[k] = "size/image"
    rule = f"image sides must be multiples of {STRIDE} px, one at least 64 and one 128"
    checks.append(helper.make_node("Reshape", ["image", shape], ["size/image"], name=rule, allowzero=1))
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*checks, *others])


def run_torch(data: bytes) -> Answerer:
    """Answers with a file of `to_torch`."""
    with _quiet():
        module = torch.export.load(io.BytesIO(data)).module()

    def answer(images_NHWC: Array) -> Answers:
        with torch.inference_mode():
            return Answers(*(one.numpy() for one in module(torch.from_numpy(images_NHWC))))

    return answer


def run_onnx(data: bytes) -> Answerer:
    """Answers with a file of `to_onnx`, on the processor, as prediction does."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"])
    return answerer(session)


def _text(about: dict[str, Any]) -> str:
    return json.dumps(about, allow_nan=False, sort_keys=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of its own parts and of packages that these networks do not need."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)

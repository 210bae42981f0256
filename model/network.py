"""The three networks: SegDecNet [1], its decoder variant, and SegDecNet++ [2] (papers: model/config.py).

Shapes: B images, C channels, H x W px of the input; h x w = H/8 x W/8 of the trunk's last map.
Images are RGB in 0..1. Both outputs are logits.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ARCHITECTURES, STRIDE, input_size_problem

_NARROWEST = 8
"""Channels that the width factor leaves: layers of 8 are cheap, and the decoder needs them to draw."""


def _std_mean(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    return torch.std_mean(x_BCHW, dim=(2, 3), keepdim=True)


class FeatureNorm(nn.Module):
    """Normalises each channel of each image over its positions.

    `root_std` divides by the root of the standard deviation, as the public code does: the variance of the result is
    not 1, and a factor on the input survives as its root. Learning rates near 1 only make sense with it. `standard`
    divides by the standard deviation. Needs at least two positions. No statistics of the batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kind = "root_std"
        self.std_mean = _std_mean
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = x_BCHW.float() if x_BCHW.dtype in (torch.bfloat16, torch.float16) else x_BCHW
        std, mean = self.std_mean(x)
        spread = std + 0.001
        factor = torch.rsqrt(spread) if self.kind == "root_std" else spread.reciprocal()
        return ((x - mean) * (self.scale * factor) + self.bias).to(x_BCHW.dtype)


class _ScaleGradient(torch.autograd.Function):
    """Identity forward, gradient times a factor backward. Written for torch.func, so that it can be batched."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:  # noqa: ARG004 (the factor is for the way back)
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ARG004
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, whose gradient is multiplied by a factor on the way back; with 0 there is none."""
    return x.detach() if factor == 0 else _ScaleGradient.apply(x, factor)


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution without bias, Xavier-normal, then FeatureNorm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.xavier_normal_(conv.weight)
    return nn.Sequential(OrderedDict(conv=conv, norm=FeatureNorm(out_channels)))


def _block(in_channels: int, out_channels: int, kernel: int = 5) -> nn.Sequential:
    block = _conv_norm(in_channels, out_channels, kernel)
    block.add_module("relu", nn.ReLU())
    return block


def _blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    sizes = [in_channels] + [out_channels] * count
    return nn.Sequential(*(_block(a, b) for a, b in itertools.pairwise(sizes)))


class Gate(nn.Module):
    """Squeeze-and-excitation over the mean of an image: channels -> sigmoid weights [2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels, 1)
        self.expand = nn.Conv2d(channels, channels, 1)
        for conv in (self.reduce, self.expand):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / conv.out_channels))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.weights(x_BCHW.mean(dim=(2, 3), keepdim=True))

    def weights(self, mean_BC11: Tensor) -> Tensor:
        """The weights of an image whose channels have these means."""
        return torch.sigmoid(self.expand(F.silu(self.reduce(mean_BC11))))


class DecoderStep(nn.Module):
    """Doubles the size of a map, joins the trunk's map of that size, and convolves."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 5, stride=2)
        self.convolve = _blocks(skip_channels + out_channels, out_channels, blocks)

    def forward(self, x_BChw: Tensor, skip_BCHW: Tensor) -> Tensor:
        up = self.up(x_BChw)[:, :, 2:-1, 2:-1]  # 2n + 3 positions: cropped by 2 and 1 to 2n
        return self.convolve(torch.cat([skip_BCHW, up], dim=1))


class Decision(nn.Module):
    """One logit an image, from the trunk, the reduced map and the map's own maximum and mean."""

    def __init__(self, trunk_channels: int, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, c = sizes
        self.convolve = nn.Sequential(
            nn.MaxPool2d(2), _block(trunk_channels + 1, a),
            nn.MaxPool2d(2), _block(a, b),
            nn.MaxPool2d(2), _block(b, c),
        )  # fmt: skip
        self.linear = nn.Linear(2 * c + 2, 1)

    def forward(self, trunk_BCHW: Tensor, reduced_B1HW: Tensor, map_B1HW: Tensor, multiplier: float) -> Tensor:
        joined = torch.cat([trunk_BCHW, reduced_B1HW], dim=1)
        features = self.convolve(_ScaleGradient.apply(joined, multiplier))
        parts = [
            features.amax(dim=(2, 3)),
            features.mean(dim=(2, 3)),
            _ScaleGradient.apply(map_B1HW.amax(dim=(2, 3)), multiplier),
            _ScaleGradient.apply(map_B1HW.mean(dim=(2, 3)), multiplier),
        ]
        return self.linear(torch.cat(parts, dim=1))


class SegDecNet(nn.Module):
    """Trunk, segmentation and decision, in the three published shapes.

    `forward(images_BCHW)` returns (decision_logits_B1, segmentation_logits_B1HW). `gradient_multiplier` is 0 with
    gradient-flow adjustment (the decision loss does not reach the segmentation) and 1 without.
    """

    def __init__(self, architecture: str, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(min(channels, _NARROWEST), round(channels * width))

        c1, c2, c3, c4 = scaled(32), scaled(64), scaled(64), scaled(1024)
        d1, d2, d3 = scaled(16), scaled(16), scaled(8)
        self.architecture = architecture
        self.gradient_multiplier = 0.0
        self.trunk1 = _blocks(in_channels, c1, 1)
        self.trunk2 = _blocks(c1, c2, 3)
        self.trunk3 = _blocks(c2, c3, 4)
        self.trunk4 = _block(c3, c4, kernel=15)
        self.decision = Decision(c4, (scaled(8), scaled(16), scaled(32)))
        if architecture == "segdecnet":
            self.segment = _conv_norm(c4, 1, kernel=1)
            return
        self.up1 = DecoderStep(c4, c3, d1, blocks=1)
        self.up2 = DecoderStep(d1, c2, d2, blocks=4)
        self.up3 = DecoderStep(d2, c1, d3, blocks=3)
        self.segment = _conv_norm(d3, 1, kernel=5)
        if architecture == "segdecnet_plusplus":
            self.skip1 = nn.Conv2d(c1, c1, 1, bias=False)
            self.skip2 = nn.Conv2d(c2, c2, 1, bias=False)
            self.skip3 = nn.Conv2d(c3, c3, 1, bias=False)
            self.gate1 = Gate(c1)
            self.gate23 = Gate(c2)  # one gate for two skips: the public code assigns the second one twice

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        if problem := input_size_problem(*images_BCHW.shape[2:]):
            raise ValueError(problem)
        full = self.trunk1(images_BCHW)
        half = self.trunk2(F.max_pool2d(full, 2))
        quarter = self.trunk3(F.max_pool2d(half, 2))
        eighth = self.trunk4(F.max_pool2d(quarter, 2))
        if self.architecture == "segdecnet":
            map_B1HW = reduced = self.segment(eighth)
            segmentation = F.interpolate(map_B1HW, scale_factor=STRIDE, mode="nearest")
        else:
            map_B1HW = segmentation = self._decode(eighth, quarter, half, full)
            reduced = F.avg_pool2d(map_B1HW, STRIDE)
        return self.decision(eighth, reduced, map_B1HW, self.gradient_multiplier), segmentation

    def _decode(self, eighth: Tensor, quarter: Tensor, half: Tensor, full: Tensor) -> Tensor:
        if self.architecture == "segdecnet_plusplus":
            full = self.skip1(full) * self.gate1(full)
            half = self.skip2(half) * self.gate23(half)
            quarter = self.skip3(quarter) * self.gate23(quarter)
        return self.segment(self.up3(self.up2(self.up1(eighth, quarter), half), full))


def build(architecture: str, in_channels: int = 3, width: float = 1.0, norm: str = "root_std") -> SegDecNet:
    """A network with fresh weights from torch's global random state. ValueError for an unknown architecture.

    `norm` is FeatureNorm's kind.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, found {architecture!r}")
    network = SegDecNet(architecture, in_channels, width)
    for module in network.modules():
        if isinstance(module, FeatureNorm):
            module.kind = norm
    return network


def load_public_state(module: SegDecNet, state: Mapping[str, Tensor], channels: str | None = None) -> None:
    """Loads weights under the public checkpoints' parameter names.

    `channels="bgr"` flips the first convolution, for weights that were trained on images as OpenCV reads them.
    ValueError for names or shapes that do not fit the module.
    """
    if channels not in (None, "bgr"):
        raise ValueError(f"channels must be None (as they are) or 'bgr', found {channels!r}")
    segment = "seg_mask" if module.architecture == "segdecnet" else "upsampling4"
    own = {_public_name(name, segment): name for name in module.state_dict()}
    if missing := sorted(own.keys() ^ state.keys()):
        raise ValueError(
            f"these weights are not of a {module.architecture}: names on one side only: {', '.join(missing[:6])}"
            f"{' …' if len(missing) > 6 else ''}; build the architecture that they were trained with"
        )
    renamed = {own[name]: value for name, value in state.items()}
    if channels == "bgr":
        renamed["trunk1.0.conv.weight"] = renamed["trunk1.0.conv.weight"].flip(1)
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if wrong := [name for name, value in renamed.items() if tuple(value.shape) != wanted[name]]:
        raise ValueError(
            f"{wrong[0]} must have shape {wanted[wrong[0]]}, found {tuple(renamed[wrong[0]].shape)}; "
            "build the module with the width and the channels that the weights were trained with"
        )
    module.load_state_dict(renamed)


_PUBLIC_PARTS = {
    "skip1": "conv1_s", "skip2": "conv2_s", "skip3": "conv3_s",
    "gate1.reduce": "se_module_diff1._se_reduce", "gate1.expand": "se_module_diff1._se_expand",
    "gate23.reduce": "se_module_diff2._se_reduce", "gate23.expand": "se_module_diff2._se_expand",
    "decision.linear": "fc",
}  # fmt: skip


def _public_name(name: str, segment: str) -> str:
    """The public checkpoints' name of one of our parameters; the last layer's differs by architecture."""
    part, parameter = name.rsplit(".", 1)
    if part in _PUBLIC_PARTS:
        return f"{_PUBLIC_PARTS[part]}.{parameter}"
    head, *rest = part.split(".")
    rest[-1] = {"conv": "0", "norm": "1"}.get(rest[-1], rest[-1])
    if head.startswith("trunk"):
        index = int(rest[0]) + 1 if len(rest) == 2 else 1
        return f"volume{head[-1]}.downsample.conv_block_{index}.{rest[-1]}.{parameter}"
    if head.startswith("up"):
        inner = "upsample" if rest == ["up"] else f"conv.conv_block_{int(rest[1]) + 1}.{rest[2]}"
        return f"upsampling{head[-1]}.{inner}.{parameter}"
    if head == "decision":
        return f"extractor.{rest[1]}.{rest[2]}.{parameter}"
    assert head == "segment", name
    return f"{segment}.{rest[0]}.{parameter}"


def describe(module: SegDecNet, height: int, width: int) -> list[dict[str, Any]]:
    """The stages of a network on an input of `height` x `width` px, in the order in which they run.

    Read off the modules themselves: branch, name, operation, output channels and size, parameters.
    """
    stages: list[dict[str, Any]] = []

    def note(name: str, stage: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            shape = [*output.shape[1:], 1, 1][:3]
            stages.append(
                {
                    "branch": _branch(name),
                    "name": name,
                    "operation": _operation(stage),
                    "channels": shape[0],
                    "height": shape[1],
                    "width": shape[2],
                    "parameters": sum(p.numel() for p in stage.parameters()),
                }
            )

        return hook

    handles = [m.register_forward_hook(note(n, m)) for n, m in module.named_modules() if _is_stage(n, m)]
    try:
        with torch.no_grad():
            first = next(module.parameters())
            module(torch.zeros(1, first.shape[1], height, width, dtype=first.dtype, device=first.device))
    finally:
        for handle in handles:
            handle.remove()
    return stages


def _is_stage(name: str, module: nn.Module) -> bool:
    if isinstance(module, Gate | nn.ConvTranspose2d | nn.Linear | nn.MaxPool2d):
        return True
    if isinstance(module, nn.Conv2d):
        return name.startswith("skip")
    return isinstance(module, nn.Sequential) and "conv" in module._modules


def _branch(name: str) -> str:
    head = name.split(".")[0]
    known = {"decision": "decision", "segment": "segmentation"}
    return known.get(head, "trunk" if head.startswith("trunk") else "decoder")


def _operation(stage: nn.Module) -> str:
    if isinstance(stage, nn.Sequential):
        conv = stage[0]
        assert isinstance(conv, nn.Conv2d)
        return f"conv {conv.kernel_size[0]}x{conv.kernel_size[1]}, norm" + (
            ", ReLU" if "relu" in stage._modules else ""
        )
    if isinstance(stage, nn.ConvTranspose2d):
        return "up-convolution 5x5, stride 2"
    if isinstance(stage, nn.Conv2d):
        return "conv 1x1"
    if isinstance(stage, Gate):
        return "squeeze-excitation gate"
    return "max-pool 2x2" if isinstance(stage, nn.MaxPool2d) else "linear"

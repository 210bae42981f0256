import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from model import network
from model.config import ARCHITECTURES
from model.losses import decision_loss, segmentation_loss
from model.network import build, describe, load_public_state

CASES = [
    (architecture, height, width, batch, multiplier)
    for architecture in ARCHITECTURES
    for height, width, batch in ((96, 128, 2), (128, 96, 1))
    for multiplier in (0.0, 1.0)
]


def golden_shapes(reference: Path, architecture: str) -> dict[str, list[int]]:
    return json.loads((reference / "parameters.json").read_text())[architecture]


@functools.lru_cache(maxsize=1)  # a hundred megabytes; the tests of an architecture follow each other
def golden_weights(reference: Path, architecture: str, salt: str) -> dict[str, torch.Tensor]:
    state = {}
    for name, shape in golden_shapes(reference, architecture).items():
        v = np.random.default_rng(zlib.crc32(f"{salt}:{name}".encode())).standard_normal(shape).astype(np.float32)
        if name.endswith("scale"):
            v = 1 + np.float32(0.1) * v
        elif name.endswith("bias"):
            v = np.float32(0.1) * v
        else:
            v = v * np.float32(math.sqrt(2 / (math.prod(shape[1:]) if len(shape) > 1 else 1)))
        state[name] = torch.from_numpy(v.astype(np.float64))
    return state


@pytest.mark.parametrize(("architecture", "height", "width", "batch", "multiplier"), CASES)
def test_equals_the_public_implementation(reference: Path, architecture, height, width, batch, multiplier) -> None:
    check_golden(reference, architecture, height, width, batch, multiplier)


def check_golden(reference: Path, architecture: str, height: int, width: int, batch: int, multiplier: float) -> None:
    """Forward values, both losses and every gradient norm, in float64."""
    row = next(
        row
        for row in json.loads((reference / "network.json").read_text())
        if (row["architecture"], row["height"], row["width"], row["batch"], row["gradient_multiplier"])
        == (architecture, height, width, batch, multiplier)
    )
    module = build(architecture).double()
    load_public_state(module, golden_weights(reference, architecture, row["salt"]))
    module.gradient_multiplier = multiplier

    rng = np.random.default_rng(zlib.crc32(f"{row['salt']}:input:{height}x{width}x{batch}".encode()))
    images = torch.from_numpy(rng.random((batch, 3, height, width), dtype=np.float32).astype(np.float64))
    truth = torch.from_numpy((rng.random((batch, 1, height, width)) > 0.9).astype(np.float64))
    labels = torch.tensor([[float(1 - n % 2)] for n in range(batch)], dtype=torch.float64)

    decision, segmentation = module(images)
    loss_seg = segmentation_loss(segmentation, truth, torch.ones(batch, dtype=torch.float64))
    loss_dec = decision_loss(decision, labels)
    (0.7 * loss_seg + 0.3 * loss_dec).backward()

    with np.load(reference / row["file"], allow_pickle=False) as golden:
        np.testing.assert_allclose(decision.detach().numpy(), golden["decision"], rtol=1e-8)
        scale = np.abs(golden["segmentation"]).max()
        np.testing.assert_allclose(segmentation.detach().numpy(), golden["segmentation"], atol=1e-6 * scale, rtol=1e-6)
    assert loss_seg.item() == pytest.approx(row["loss_seg"], rel=1e-8)
    assert loss_dec.item() == pytest.approx(row["loss_dec"], rel=1e-8)
    norms = gradient_norms_by_public_name(module, golden_shapes(reference, architecture))
    for name, norm in row["gradient_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-8, abs=1e-14), name


def standard_deviation(monkeypatch) -> None:
    def forward(self, x):
        std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
        return (x - mean) / (std + 0.001) * self.scale + self.bias

    monkeypatch.setattr(network.FeatureNorm, "forward", forward)


def biased_deviation(monkeypatch) -> None:
    def forward(self, x):
        std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True, correction=0)
        return (x - mean) / (std + 0.001).sqrt() * self.scale + self.bias

    monkeypatch.setattr(network.FeatureNorm, "forward", forward)


def map_reduced_by_its_maximum(monkeypatch) -> None:
    monkeypatch.setattr(network.F, "avg_pool2d", torch.nn.functional.max_pool2d)


def other_crop(monkeypatch) -> None:
    def forward(self, x, skip):
        return self.convolve(torch.cat([skip, self.up(x)[:, :, 1:-2, 1:-2]], dim=1))

    monkeypatch.setattr(network.DecoderStep, "forward", forward)


def upsampled_before_skip(monkeypatch) -> None:
    def forward(self, x, skip):
        return self.convolve(torch.cat([self.up(x)[:, :, 2:-1, 2:-1], skip], dim=1))

    monkeypatch.setattr(network.DecoderStep, "forward", forward)


def gate_of_the_maximum(monkeypatch) -> None:
    def forward(self, x):
        squeezed = x.amax(dim=(2, 3), keepdim=True)
        return torch.sigmoid(self.expand(torch.nn.functional.silu(self.reduce(squeezed))))

    monkeypatch.setattr(network.Gate, "forward", forward)


def gradient_let_through(monkeypatch) -> None:
    monkeypatch.setattr(network._ScaleGradient, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


@pytest.mark.parametrize(
    "break_it",
    [
        standard_deviation, biased_deviation, map_reduced_by_its_maximum, other_crop, upsampled_before_skip,
        gate_of_the_maximum, gradient_let_through,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_golden_numbers_notice_a_changed_definition(reference: Path, monkeypatch, break_it) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check_golden(reference, "segdecnet_plusplus", 128, 96, 1, 0.0)


def gradient_norms_by_public_name(module: torch.nn.Module, shapes: dict) -> dict[str, float]:
    """Tells which of our parameters a public name fills by loading a tagged state."""
    own = {name: parameter.grad for name, parameter in module.named_parameters()}
    tags = {name: torch.full(shape, float(k)) for k, (name, shape) in enumerate(shapes.items())}
    tagged = build(module.architecture).double()
    load_public_state(tagged, tags)
    names = list(shapes)
    return {
        names[int(value.flatten()[0])]: 0.0 if own[name] is None else own[name].norm().item()
        for name, value in tagged.named_parameters()
    }


def test_bgr_weights_see_flipped_channels(reference: Path) -> None:
    state = {name: value.float() for name, value in golden_weights(reference, "segdecnet", "shared").items()}
    plain, flipped = build("segdecnet"), build("segdecnet")
    load_public_state(plain, state)
    load_public_state(flipped, state, channels="bgr")
    rgb = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        torch.testing.assert_close(flipped(rgb)[0], plain(rgb.flip(1))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_and_the_width_factor(architecture: str) -> None:
    narrow = build(architecture, width=0.25)
    decision, segmentation = narrow(torch.rand(2, 3, 64, 136))
    assert decision.shape == (2, 1)
    assert segmentation.shape == (2, 1, 64, 136)
    share = sum(p.numel() for p in narrow.parameters()) / sum(p.numel() for p in build(architecture).parameters())
    assert 0.05 < share < 0.08


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(100, 128, "multiples of 8 px.*found 100x128; use 104x128"), (64, 64, "at least 2 positions, found 1")],
)
def test_an_input_that_cannot_work_is_refused(height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("segdecnet", width=0.25)(torch.rand(1, 3, height, width))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of segdecnet, segdecnet_decoder"):
        build("unet")
    with pytest.raises(ValueError, match=r"not of a segdecnet: names on one side only"):
        load_public_state(build("segdecnet", width=0.25), {"fc.weight": torch.zeros(1, 66)})


def test_with_gradient_adjustment_the_decision_leaves_the_trunk_alone() -> None:
    module = build("segdecnet_plusplus", width=0.25)
    images = torch.rand(1, 3, 64, 128)
    module(images)[0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for n, p in module.named_parameters() if not n.startswith("decision"))
    module.gradient_multiplier = 1.0
    module(images)[0].sum().backward()
    assert module.trunk1[0].conv.weight.grad.any()


def test_a_description_covers_every_parameter() -> None:
    module = build("segdecnet_plusplus")
    stages = describe(module, 96, 128)
    gates_twice = sum(p.numel() for p in module.gate23.parameters())
    assert sum(s["parameters"] for s in stages) - gates_twice == sum(p.numel() for p in module.parameters())
    assert stages[0] | {"parameters": 0} == {
        "branch": "trunk", "name": "trunk1.0", "operation": "conv 5x5, norm, ReLU",
        "channels": 32, "height": 96, "width": 128, "parameters": 0,
    }  # fmt: skip


def test_the_standard_norm_has_unit_variance_and_the_default_has_not() -> None:
    x = torch.randn(2, 3, 16, 16) * 9
    deviations = {}
    for kind in ("root_std", "standard"):
        norm = network.FeatureNorm(3)
        norm.kind = kind
        deviations[kind] = norm(x).std(dim=(2, 3)).mean().item()
    assert deviations["standard"] == pytest.approx(1, abs=0.01)
    assert deviations["root_std"] == pytest.approx(3, rel=0.1)
    built = build("segdecnet", width=0.1, norm="standard")
    assert {m.kind for m in built.modules() if isinstance(m, network.FeatureNorm)} == {"standard"}

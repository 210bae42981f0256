import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from model import losses


def test_balance_equals_the_public_implementation(reference: Path) -> None:
    for row in json.loads((reference / "method.json").read_text())["dynamic_balance"]:
        found = losses.balance(row["epoch"], row["epochs"], row["delta"], dynamic=True)
        assert found == pytest.approx((row["seg"], row["dec"]), rel=1e-12)


def test_without_dynamic_balance_both_weights_are_constant() -> None:
    assert {losses.balance(epoch, 9, 0.1, dynamic=False) for epoch in range(9)} == {(1.0, 0.1)}


@pytest.mark.parametrize(("p", "maximum"), [(1, 1), (2, 1), (2, 3), (0.5, 2)])
def test_distance_weights_equal_the_public_implementation(reference: Path, p, maximum) -> None:
    with np.load(reference / "masks.npz", allow_pickle=False) as golden:
        found = losses.distance_weight(golden["mask"], p, maximum, per="component")
        np.testing.assert_allclose(found, golden[f"distance_weight_p{p}_max{maximum}"], rtol=1e-6)


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40))), st.integers(0, 6))
def test_distances_are_exact(mask: np.ndarray, grown: int) -> None:
    """Where there is no edge at all, too."""
    mask = cv2.dilate(mask.astype(np.uint8), np.ones((2 * grown + 1, 2 * grown + 1), np.uint8)) > 0
    np.testing.assert_array_equal(losses._distance_to_edge(mask), ndimage.distance_transform_edt(mask))


def test_long_distances_are_exact() -> None:
    mask = np.ones((1100, 900), bool)
    mask[0, 0] = mask[700, 3] = False
    np.testing.assert_array_equal(losses._distance_to_edge(mask), ndimage.distance_transform_edt(mask))
    mask[1000, 850] = False
    np.testing.assert_array_equal(losses._distance_to_edge(mask), ndimage.distance_transform_edt(mask))


def test_distance_weights_per_image_know_one_largest_distance() -> None:
    mask = np.zeros((20, 20))
    mask[2:5, 2:5] = mask[8:17, 8:17] = 1
    weight = losses.distance_weight(mask, 1, 3)
    assert weight[12, 12] == 3
    assert weight[3, 3] == pytest.approx(3 * 2 / 5)
    assert (losses.distance_weight(np.zeros((4, 4)), 2, 3) == 1).all()


@given(st.lists(st.booleans(), min_size=1, max_size=4))
def test_an_image_without_a_mask_adds_nothing(segmented: list[bool]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(len(segmented), 1, 8, 8, requires_grad=True)
    target = (torch.rand_like(logits) > 0.5).float()
    flags = torch.tensor(segmented, dtype=torch.float32)
    loss = losses.segmentation_loss(logits, target, flags)
    alone = [
        losses.segmentation_loss(logits[n : n + 1], target[n : n + 1], flags[n : n + 1]) for n in range(len(flags))
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    loss.backward()
    assert [bool(gradient.any()) for gradient in logits.grad] == segmented


def test_losses_of_half_precision_logits_are_wide() -> None:
    logits = torch.full((1, 1, 2, 2), 30.0, dtype=torch.bfloat16)
    loss = losses.segmentation_loss(logits, torch.zeros(1, 1, 2, 2), torch.ones(1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(30.0)


def test_golden_numbers_notice_a_changed_definition(reference: Path) -> None:
    """The variants that the prose could be read as."""
    with np.load(reference / "masks.npz", allow_pickle=False) as golden:
        mask = golden["mask"]
        per_image = losses.distance_weight(mask, 2, 3, per="image")
        assert not np.allclose(per_image, golden["distance_weight_p2_max3"], rtol=1e-3)
    row = json.loads((reference / "method.json").read_text())["dynamic_balance"][1]
    from_one = losses.balance(row["epoch"] + 1, row["epochs"], row["delta"], dynamic=True)
    assert from_one != pytest.approx((row["seg"], row["dec"]), rel=1e-6)


def test_positive_weights_multiply_the_part_of_positives() -> None:
    logits = torch.zeros(1, 1, 2, 2)
    target = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    plain = losses.segmentation_losses(logits, target, torch.ones(1)).item()
    weighted = losses.segmentation_losses(logits, target, torch.ones(1), positive_weight=5.0).item()
    assert weighted == pytest.approx(plain * (5 + 3) / 4)
    labels = torch.tensor([[1.0], [0.0]])
    assert losses.decision_loss(torch.zeros(2, 1), labels, 3.0).item() == pytest.approx(2 * np.log(2))

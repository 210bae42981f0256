from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model.counts import to_half
from model.export import Deployable, least_single
from model.network import build
from model.thresholds import Thresholds

LOGITS = st.one_of(
    st.floats(-20, 20, width=32),
    st.floats(-20, 20, width=16),
    st.sampled_from([-70000.0, -65504.0, -1e-8, -0.0, 0.0, 1e-8, 2.0**-25, 65503.0, 65504.0, 70000.0]),
)
THRESHOLDS = st.one_of(LOGITS, st.floats(-10, 10))


@given(hnp.arrays(np.float32, (40,), elements=LOGITS), THRESHOLDS)
def test_a_comparison_in_single_precision_is_that_in_half_precision(logits, threshold) -> None:
    found = logits >= np.float32(least_single(threshold))
    np.testing.assert_array_equal(found, to_half(logits).astype(np.float64) >= threshold)


def test_it_holds_for_each_number_around_each_edge() -> None:
    """Of all thresholds in half precision: the numbers where rounding turns, and those beside them."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.unique(halves[np.isfinite(halves)])
    for half in halves[::7]:
        edge = np.float32(least_single(float(half)))
        if np.isfinite(edge):
            around = np.array([np.nextafter(edge, np.float32(-np.inf)), edge], np.float32)
            assert (to_half(around) >= half).tolist() == [False, True]


@given(
    hnp.arrays(np.float32, (3, 4, 5), elements=LOGITS),
    hnp.arrays(np.float32, (3,), elements=LOGITS),
    THRESHOLDS,
    st.none() | THRESHOLDS,
    st.booleans(),
    st.sampled_from([1.0, 0.9, 0.3]),
)
def test_it_decides_as_the_thresholds_do(logits, decisions, pixel, image, blacken, lower) -> None:
    thresholds = Thresholds("grid", 1, pixel, image, blacken, lower)
    module = Deployable(NETWORK, thresholds)
    _, mask, _, defect = (one.numpy() for one in module.decide(torch.from_numpy(decisions), torch.from_numpy(logits)))
    wanted = np.stack([thresholds.mask(*pair) for pair in zip(logits, decisions, strict=True)])
    np.testing.assert_array_equal(mask, wanted)
    decided = thresholds.decide(decisions) if image is not None else wanted.any(axis=(1, 2))
    np.testing.assert_array_equal(defect, decided)


NETWORK = build("segdecnet_decoder", width=0.05)


@pytest.mark.parametrize(("blacken", "lower", "decision"), product([False, True], [1.0, 0.5], [None, 0.1]))
def test_it_answers_images_of_bytes(blacken, lower, decision) -> None:
    thresholds = Thresholds("grid", 1, 0.2, decision, blacken, lower)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 128, 3), np.uint8))
    with torch.inference_mode():
        probability, mask, score, defect = Deployable(NETWORK, thresholds)(image)
        decisions, logits = NETWORK(image.permute(0, 3, 1, 2).float().div_(255))
    assert [(one.dtype, tuple(one.shape)) for one in (probability, mask, score, defect)] == [
        (torch.float32, (2, 64, 128)),
        (torch.uint8, (2, 64, 128)),
        (torch.float32, (2,)),
        (torch.bool, (2,)),
    ]
    assert torch.equal(probability, logits[:, 0].sigmoid())
    assert torch.equal(score, (logits.amax(dim=(1, 2, 3)) if decision is None else decisions[:, 0]).sigmoid())
    wanted = [thresholds.mask(one, two) for one, two in zip(logits[:, 0].numpy(), decisions[:, 0].numpy(), strict=True)]
    np.testing.assert_array_equal(mask.numpy(), np.stack(wanted))

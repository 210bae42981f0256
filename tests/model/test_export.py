from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model.config import input_size_problem
from model.counts import to_half
from model.export import Deployable, least_single, run_onnx, run_torch, std_mean_by_rows, to_onnx, to_torch
from model.network import build
from model.parity import Judged, Mismatch, check_judged, compare
from model.thresholds import Thresholds
from model.tiles import Answers

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


@pytest.mark.parametrize(("blacken", "lower", "decision"), [*product([False, True], [1.0, 0.5], [None, 0.1])])
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


def judged(module: Deployable, height: int, width: int, count: int = 3) -> Judged:
    """Images with what the module itself finds in them."""
    images = np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)
    with torch.inference_mode():
        decision, logits = module.logits(torch.from_numpy(images))
        probability, mask, _, _ = (one.numpy() for one in module.decide(decision, logits))
    return Judged([f"{k}.png" for k in range(count)], images, probability, mask > 0, decision.numpy())


ANSWERS_OF_ALL = [
    ("segdecnet", 0.05, "root_std", (64, 136), Thresholds("grid", 1, 0.2, None)),
    ("segdecnet_decoder", 0.1, "standard", (200, 72), Thresholds("grid", 1, 9.0, -9.0, True, 0.5)),
    ("segdecnet_plusplus", 0.05, "root_std", (136, 152), Thresholds("grid", 1, 0.2, 0.1, True, 0.9)),
    ("segdecnet_plusplus", 0.1, "standard", (128, 128), Thresholds("grid", 1, -0.3, 0.1)),
]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("architecture", "width", "norm", "size", "thresholds"), ANSWERS_OF_ALL)
def test_files_answer_as_the_network_at_any_size(architecture, width, norm, size, thresholds) -> None:
    torch.manual_seed(0)
    module = Deployable(build(architecture, width=width, norm=norm), thresholds)
    other = tuple(side + 64 if side >= 128 else side + 8 for side in size)
    for answer in (run_torch(to_torch(module, *size, {})), run_onnx(to_onnx(module, *size, {}))):
        for sides in (size, other):
            # A fresh network makes noise of noise: many pixels lie near the edge, and few of them may flip.
            found = compare(module, answer, judged(module, *sides))
            assert found.edge_pixels <= 1e-4 * found.pixels
            assert (found.probability, found.score) <= (1e-4, 1e-4)


@given(hnp.arrays(np.float32, (2, 3, 4, 5), elements=st.floats(-100, 100, width=32)))
def test_statistics_by_rows_are_those_of_feature_norm(x) -> None:
    for found, wanted in zip(
        std_mean_by_rows(torch.from_numpy(x)),
        torch.std_mean(torch.from_numpy(x), dim=(2, 3), keepdim=True),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


class Answering:
    """An answerer that changes what the module says, from the n-th call on."""

    def __init__(self, module: Deployable, from_call: int, change) -> None:
        self.module, self.calls_left, self.change = module, from_call, change

    def __call__(self, images: np.ndarray) -> Answers:
        with torch.inference_mode():
            answers = Answers(*(one.numpy().copy() for one in self.module(torch.from_numpy(images))))
        self.calls_left -= 1
        return answers if self.calls_left >= 0 else self.change(answers)


@pytest.mark.parametrize(
    ("from_call", "where"),
    [(1, "image '1.png'"), (3, "the first 3 images together"), (4, "image '0.png', mirrored on to 64x136 px")],
)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a._replace(probability=a.probability + np.float32(2e-4)), "each probability to within 0.0001"),
        (lambda a: a._replace(probability=a.probability * np.float32(np.nan)), "each probability to within 0.0001"),
        (lambda a: a._replace(score=a.score - np.float32(2e-4)), "each score to within 0.0001"),
        (lambda a: a._replace(mask=1 - a.mask), "equal masks"),
        (lambda a: a._replace(defect=~a.defect), "the decision"),
        (lambda a: a._replace(mask=a.mask.astype(np.int64)), "mask as uint8"),
        (lambda a: a._replace(probability=a.probability[:, 1:]), "probability as float32"),
    ],
)
def test_any_answer_that_differs_is_a_mismatch_that_says_where(from_call, where, change, said) -> None:
    module = Deployable(NETWORK, Thresholds("grid", 1, 0.2, 0.1))
    with pytest.raises(Mismatch) as caught:
        compare(module, Answering(module, from_call, change), judged(module, 64, 128))
    assert said in str(caught.value)
    assert where in str(caught.value)
    assert "no file is written" in str(caught.value)


@pytest.mark.parametrize("distance", [5e-4, -5e-4, 5e-3])
def test_a_pixel_on_the_edge_may_differ_and_is_counted(distance) -> None:
    thresholds = Thresholds("grid", 1, 0.2, None)
    network = build("segdecnet_decoder", width=0.05)
    module = Deployable(network, thresholds)
    image = torch.from_numpy(judged(module, 64, 128, count=1).image)
    with torch.inference_mode():
        nearest = module.from_edge(module.logits(image)[1])[0].argmin()
        logit = module.logits(image)[1][0].ravel()[nearest]
        network.segment.norm.bias += least_single(0.2) + distance - logit  # so far from the edge it comes to lie
    place = np.unravel_index(int(nearest), (64, 128))

    def flipped(answers: Answers) -> Answers:
        answers.mask[(0, *place)] ^= 1
        return answers

    shown = judged(module, 64, 128, count=1)
    answer = Answering(module, 0, lambda answers: flipped(answers) if answers.mask.shape[2] == 128 else answers)
    if abs(distance) < 1e-3:
        assert compare(module, answer, shown).edge_pixels == 2  # alone and as a batch; at another size it is elsewhere
    else:
        with pytest.raises(Mismatch, match="equal masks, found 1 pixels that differ"):
            compare(module, answer, shown)


def test_what_the_evaluation_found_otherwise_is_counted_or_refused() -> None:
    module = Deployable(NETWORK, Thresholds("grid", 1, 0.2, 0.1))
    shown = judged(module, 64, 128)
    other = shown._replace(mask=shown.mask ^ (np.arange(128) < 2), probability=shown.probability - np.float32(0.03))
    found = compare(module, Answering(module, 99, None), other)
    assert found.unlike_judged == 3 * 64 * 2
    assert found.judged_probability == pytest.approx(0.03, abs=1e-6)
    assert found.unlike_decided == 0
    assert found.judged_decision == pytest.approx(0, abs=1e-6)  # together and alone they are added up otherwise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda j: j._replace(probability=j.probability - np.float32(0.6)), r"0\.6 off, for image '0\.png'"),
        (lambda j: j._replace(decision=j.decision + np.float32([0, 9, 0])), r"decision's logit near .* image '1\.png'"),
        (
            lambda j: j._replace(mask=j.mask & (np.arange(128) < 64)),
            r"at most 20% of the mask .* the 3 images together",
        ),
    ],
)
@pytest.mark.parametrize(
    "check", [check_judged, lambda module, judged: compare(module, Answering(module, 99, None), judged)]
)
def test_another_network_than_the_one_that_was_judged_is_refused(change, message, check) -> None:
    module = Deployable(NETWORK, Thresholds("grid", 1, 0.2, 0.1))
    shown = judged(module, 64, 128)
    check(module, shown)
    with pytest.raises(Mismatch, match="must answer as the one that was judged.*" + message):
        check(module, change(shown))


def test_a_decision_at_the_threshold_may_turn_in_another_precision_and_is_counted() -> None:
    shown = judged(Deployable(NETWORK, Thresholds("grid", 1, 0.2, 0.1)), 64, 128)
    module = Deployable(NETWORK, Thresholds("grid", 1, 0.2, float(shown.decision[0]) - 0.01))
    other = shown._replace(decision=shown.decision - np.float32([0.02, 0, 0]))
    found = compare(module, Answering(module, 99, None), other)
    assert found.unlike_decided == 1
    assert found.judged_decision == pytest.approx(0.02, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_onnx_file_refuses_what_the_network_refuses() -> None:
    """Sizes beside each that is accepted; the smallest of both sides."""
    answer = run_onnx(to_onnx(Deployable(NETWORK, Thresholds("grid", 1, 0.2, 0.1)), 64, 128, {}))
    sides = (8, 56, 64, 72, 120, 127, 128, 129, 136, 192)
    for height, width in product(sides, sides):
        image = np.zeros((1, height, width, 3), np.uint8)
        if input_size_problem(height, width) is None:
            assert answer(image).mask.shape == (1, height, width)
        else:
            with pytest.raises(Exception, match="sides must be multiples of 8 px, one at least 64 and one 128"):
                answer(image)

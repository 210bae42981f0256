import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from model import intervals
from model.curves import area_under_roc, average_precision, curve
from model.intervals import (
    MIN_GROUPS,
    Ratio,
    ap_interval,
    auc_interval,
    contributing,
    decision_f1_interval,
    difference_interval,
    f1_of_jaccard,
    jackknife_difference_interval,
    jackknife_interval,
    mean_difference_interval,
    mean_interval,
    rate_interval,
    ratio_interval,
    why_none,
)

seeds = st.integers(0, 2**32 - 1)


def mean_of(values) -> Ratio:
    return Ratio(np.asarray(values), np.ones(len(values)))


def dice_like(uniform, mean=0.67, deviation=0.226):
    both = mean * (1 - mean) / deviation**2 - 1
    return stats.beta.ppf(uniform, mean * both, (1 - mean) * both)


def share_covered(found, truth) -> float:
    return float(np.mean([low <= truth <= high for low, high in found]))


# Coverage: what the intervals are for. 0.93 is what we promise; one seed, so no flakes.


@pytest.mark.parametrize(("images", "replications"), [(24, 2000), (60, 800), (200, 400)])
def test_coverage_of_means(images, replications) -> None:
    values_RN = dice_like(np.random.default_rng(images).random((replications, images)))
    found = [ratio_interval(mean_of(values), np.arange(images)) for values in values_RN]
    assert share_covered(found, 0.67) >= 0.93


@pytest.mark.parametrize(("images", "replications"), [(24, 2000), (60, 800), (200, 400)])
def test_coverage_of_paired_differences(images, replications) -> None:
    rng = np.random.default_rng(images)
    shared, own = rng.standard_normal((replications, images, 1)), rng.standard_normal((replications, images, 2))
    uniform = special.ndtr(np.sqrt(0.8) * shared + np.sqrt(0.2) * own)
    first, second = dice_like(uniform[..., 0]), dice_like(uniform[..., 1], 0.63, 0.24)
    found = [difference_interval(mean_of(a), mean_of(b), np.arange(images)) for a, b in zip(first, second, strict=True)]
    assert share_covered(found, 0.04) >= 0.93


@pytest.mark.parametrize("images", [33, 220])
@pytest.mark.parametrize("rate", [0.92, 0.996])
def test_coverage_of_rates(rate, images) -> None:
    successes = np.arange(images + 1)
    likely = stats.binom.pmf(successes, images, rate)
    covered = [
        low <= rate <= high
        for count in successes
        for low, high in [rate_interval(np.arange(images) < count, np.ones(images), np.arange(images))]
    ]
    assert likely @ covered >= 0.93


@pytest.mark.parametrize("images", [24, 60])
def test_coverage_of_the_jackknife(images) -> None:
    """On a figure with a known truth, the mean."""
    values_RN = dice_like(np.random.default_rng(images).random((2000, images)))
    without_RN = (values_RN.sum(axis=1, keepdims=True) - values_RN) / (images - 1)
    pairs = zip(values_RN.mean(axis=1), without_RN, strict=True)
    assert 0.93 <= share_covered([jackknife_interval(*pair) for pair in pairs], 0.67) <= 0.98


@pytest.mark.parametrize("without", [[0.5] * 30, [0.4, 0.6] * 9, [0.0, 0.5] * 15, [1.0, 0.5] * 15, [np.nan, 0.5] * 15])
def test_where_the_jackknife_says_nothing(without) -> None:
    assert jackknife_interval(0.5, np.array(without)) is None


def test_the_jackknife_of_a_difference_is_students_for_means_and_delongs_for_auc() -> None:
    rng = np.random.default_rng(3)
    gains = rng.normal(0.1, 0.2, 40)
    found = jackknife_difference_interval(gains.mean(), (gains.sum() - gains) / 39)
    assert found == pytest.approx(stats.t.interval(0.95, 39, gains.mean(), stats.sem(gains)))
    labels = np.arange(200) < 100
    scores = rng.normal(0, 1, (2, 200)) * 0.5 + rng.normal(0, 1, 200) + 1.5 * labels
    placed = [score[labels][:, None] > score[~labels] for score in scores]
    gain = placed[0].astype(float) - placed[1]
    delong = sum(gain.mean(axis=axis).var(ddof=1) / 100 for axis in (0, 1))

    def without(rows: np.ndarray) -> float:
        return float(np.subtract(*(area_under_roc(curve(labels[rows], score[rows])) for score in scores)))

    low, high = jackknife_difference_interval(gain.mean(), np.array([without(row) for row in ~np.eye(200, dtype=bool)]))
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 199) * np.sqrt(delong), rel=0.02)
    assert (high + low) / 2 == pytest.approx(gain.mean())


@pytest.mark.parametrize("without", [[0.1] * 30, [0.0, 0.2] * 9, [np.nan, 0.1] * 15])
def test_where_the_jackknife_of_a_difference_says_nothing(without) -> None:
    assert jackknife_difference_interval(0.1, np.array(without)) is None


def test_coverage_in_groups() -> None:
    rng = np.random.default_rng(0)
    shared, own = rng.standard_normal((600, 24, 1)), rng.standard_normal((600, 24, 4))
    values = dice_like(special.ndtr(np.sqrt(0.5) * shared + np.sqrt(0.5) * own)).reshape(600, 96)
    by_group = [ratio_interval(mean_of(row), np.repeat(np.arange(24), 4)) for row in values]
    by_image = [ratio_interval(mean_of(row), np.arange(96)) for row in values[:200]]
    assert share_covered(by_group, 0.67) >= 0.93
    assert share_covered(by_image, 0.67) < 0.85
    rates = rng.beta(0.92 * 2, 0.08 * 2, (600, 33))
    successes = rng.binomial(3, rates)
    found = [rate_interval(row, np.full(33, 3), np.arange(33)) for row in successes]
    assert share_covered(found, 0.92) >= 0.93


@pytest.mark.parametrize(
    ("positives", "negatives", "swapped"), [(33, 33, 0), (33, 220, 0), (220, 33, 0.05), (220, 220, 0.05)]
)
def test_coverage_of_areas(positives, negatives, swapped) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(positives + negatives) < positives
    shift = np.sqrt(2) * stats.norm.ppf(0.99)
    scores_RN = rng.standard_normal((300, len(labels))) + shift * (labels ^ (rng.random((300, len(labels))) < swapped))
    grid = np.linspace(12, -9, 20_001)
    hits, alarms = (
        (1 - part) * stats.norm.sf(grid - shift) + part * stats.norm.sf(grid) for part in (swapped, 1 - swapped)
    )
    true_ap = np.trapezoid(positives * hits / (positives * hits + negatives * alarms), hits)
    groups = np.arange(len(labels))
    aucs = [auc_interval(labels, scores, groups) for scores in scores_RN]
    aps = [ap_interval(labels, scores, groups) for scores in scores_RN]
    assert share_covered(aucs, np.trapezoid(hits, alarms)) >= 0.93
    assert share_covered(aps, true_ap) >= 0.93


# What they must equal, hold and not depend on.


@pytest.mark.parametrize("skewed", [True, False])
@given(seed=seeds)
@settings(max_examples=5)
def test_draw_by_draw(skewed, seed) -> None:
    """As the books have it, with skewed values, and with heavy tails, where Student's quantiles are the larger."""
    rng = np.random.default_rng(seed)
    top = rng.exponential(size=24) if skewed else rng.standard_t(3, 24)
    top, below = np.sort(top), np.ones(24)

    def error(values) -> float:
        return np.std(values, ddof=1) / 24**0.5

    t = []
    for counts in intervals._draws(24):
        drawn = np.repeat(top, counts)
        t.append((drawn.mean() - top.mean()) / error(drawn))
    t_low, t_high = np.sort(t)[[99, 3899]]
    student = stats.t.ppf(0.975, 23)
    expected = (
        top.mean() - max(t_high, student) * error(top),
        top.mean() - min(t_low, -student) * error(top),
    )
    assert ratio_interval(Ratio(top, below), np.arange(24), (-99, 99)) == pytest.approx(expected)


@given(st.integers(MIN_GROUPS, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_rate_of_single_images_is_clopper_pearson(counts) -> None:
    successes, trials = counts
    found = rate_interval(np.arange(trials) < successes, np.ones(trials), np.arange(trials))
    exact = stats.binomtest(successes, trials).proportion_ci(method="exact")
    assert found == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_effective_size_of_grouped_trials() -> None:
    """By hand: 30 groups of 4 trials, in 24 of which all succeed and in 6 half of them."""
    successes = np.repeat([4, 2], [24, 6])
    rate, trials = 0.9, 120
    variance = (24 * 0.4**2 + 6 * 1.6**2) / trials**2 * 30 / 29
    size = rate * (1 - rate) / variance * trials / (trials - 1)
    size *= (stats.t.ppf(0.975, trials - 1) / stats.t.ppf(0.975, 29)) ** 2
    assert 60 < size < trials
    expected = stats.beta.ppf([0.025, 0.975], [0.9 * size, 0.9 * size + 1], [0.1 * size + 1, 0.1 * size])
    assert rate_interval(successes, np.full(30, 4), np.arange(30)) == pytest.approx(tuple(expected))


def test_effective_size_is_at_most_the_trials() -> None:
    """Groups more alike than chance makes them."""
    exact = stats.binomtest(90, 120).proportion_ci(method="exact")
    assert rate_interval(np.full(30, 3), np.full(30, 4), np.arange(30)) == pytest.approx((exact.low, exact.high))


@given(seeds)
def test_intervals_hold_the_figure_and_stay_in_bounds(seed) -> None:
    rng = np.random.default_rng(seed)
    groups = np.arange(120) % 40
    labels, scores = rng.permutation(120) < 60, rng.integers(0, 9, 120)
    scores = scores + rng.integers(0, 9) * labels
    predicted = rng.integers(0, 3, 120) * rng.integers(1, 50, 120)
    hits = (predicted * rng.random(120) ** 0.1).astype(int)
    truth = hits + rng.integers(0, 9, 120)
    precision, recall = Ratio(hits, predicted), Ratio(hits, truth)
    points = curve(labels, scores)
    both = [hits.sum() / predicted.sum(), hits.sum() / truth.sum()]
    for figure, found, lowest in (
        (both[0], ratio_interval(precision, groups), 0),
        (both[0] - both[1], difference_interval(precision, recall, groups), -1),
        (np.mean(both), mean_interval([precision, recall], groups), 0),
        (labels.mean(), rate_interval(labels, np.ones(120), groups), 0),
        (area_under_roc(points), auc_interval(labels, scores, groups), 0),
        (average_precision(points), ap_interval(labels, scores, groups), 0),
    ):
        assert found is not None
        assert lowest <= found[0] <= figure <= found[1] <= 1
        assert found[1] - found[0] > 0.001


@given(seeds)
def test_order_and_codes_do_not_matter(seed) -> None:
    rng = np.random.default_rng(seed)
    groups = np.arange(90) // 3
    truth, predicted = rng.integers(1, 50, 90), rng.integers(0, 50, 90)
    hits = np.minimum(truth, predicted) // 2
    labels, scores = rng.permutation(90) < 45, rng.random(90)
    order, codes = rng.permutation(90), rng.permutation(1000)[:30]

    def found(rows, group_codes):
        recall, precision = Ratio(hits[rows], truth[rows]), Ratio(hits[rows], predicted[rows])
        of_images = (labels[rows], scores[rows], group_codes)
        yield ratio_interval(precision, group_codes)
        yield difference_interval(recall, precision, group_codes)
        yield rate_interval(labels[rows], np.ones(90), group_codes)
        yield auc_interval(*of_images)
        yield ap_interval(*of_images)

    for first, second in zip(found(np.arange(90), groups), found(order, codes[groups[order]]), strict=True):
        assert first == pytest.approx(second, rel=1e-9)


@given(seeds, st.sampled_from([2, 3, 5]))
def test_copies_in_a_group_add_nothing(seed, copies) -> None:
    rng = np.random.default_rng(seed)
    one, groups = rng.random(25), np.arange(25)
    many, grouped = np.repeat(one, copies), np.repeat(groups, copies)
    found = ratio_interval(mean_of(one), groups)
    assert ratio_interval(mean_of(many), grouped) == pytest.approx(found, rel=1e-9)
    other, other_many = one**2, many**2
    assert difference_interval(mean_of(many), mean_of(other_many), grouped) == pytest.approx(
        difference_interval(mean_of(one), mean_of(other), groups), rel=1e-9
    )
    as_if_independent = ratio_interval(mean_of(many), np.arange(len(many)))
    assert as_if_independent[1] - as_if_independent[0] < found[1] - found[0]

    right = one > 0.2
    single, copied = rate_interval(right, right >= 0, groups), rate_interval(many > 0.2, many >= 0, grouped)
    assert copied[0] <= single[0] + 1e-9
    assert copied[1] >= single[1] - 1e-9
    assert copied == pytest.approx(single, abs=0.04)


def test_copies_in_a_group_add_nothing_to_areas() -> None:
    rng = np.random.default_rng(0)
    labels, groups = np.arange(60) < 30, np.arange(60)
    scores = rng.standard_normal(60) + labels
    three = [np.repeat(column, 3) for column in (labels, scores, groups)]
    assert auc_interval(*three) == pytest.approx(auc_interval(labels, scores, groups), rel=1e-9)
    assert ap_interval(*three) == pytest.approx(ap_interval(labels, scores, groups), abs=0.02)
    for method in (auc_interval, ap_interval):
        grouped, independent = method(*three), method(*three[:2], np.arange(180))
        assert independent[1] - independent[0] < 0.75 * (grouped[1] - grouped[0])


def test_images_that_do_not_contribute_do_not_count() -> None:
    rng = np.random.default_rng(0)
    hits, predicted, groups = rng.integers(0, 9, 40), np.full(40, 9), np.arange(40)
    predicted[20:] = hits[20:] = 0
    assert contributing(predicted, groups) == 20
    assert ratio_interval(Ratio(hits, predicted), groups) == ratio_interval(
        Ratio(hits[:20], predicted[:20]), groups[:20]
    )
    assert rate_interval(hits, predicted, groups) == rate_interval(hits[:20], predicted[:20], groups[:20])


def test_a_difference_is_that_of_the_values_where_images_are_the_same() -> None:
    rng = np.random.default_rng(0)
    first, second, groups = rng.random(50), rng.random(50), np.arange(50)
    low, high = difference_interval(mean_of(first), mean_of(second), groups)
    # Other draws for each group, so not to the last digit.
    assert ratio_interval(mean_of(first - second), groups, (-1, 1)) == pytest.approx((low, high), abs=0.01)
    assert difference_interval(mean_of(second), mean_of(first), groups) == pytest.approx((-high, -low), abs=0.01)
    assert low > difference_interval(mean_of(first), mean_of(second), groups, (-9, low))[0] - 1e-12


def test_pairs_are_kept_together() -> None:
    rng = np.random.default_rng(0)
    first, groups = rng.random(50), np.arange(50)
    close, low_high = first - 0.01 + 0.001 * rng.random(50), (0.0, 0.02)
    low, high = difference_interval(mean_of(first), mean_of(close), groups)
    assert low_high[0] < low < high < low_high[1]


def test_mean_of_equal_ratios_is_the_ratio() -> None:
    rng = np.random.default_rng(0)
    ratio, groups = Ratio(rng.random(40), 1 + rng.random(40)), np.arange(40)
    assert mean_interval([ratio, ratio], groups) == pytest.approx(ratio_interval(ratio, groups), abs=1e-9)


def test_difference_of_means_of_ratios() -> None:
    """Of one ratio, or of equal ones, it is the difference of ratios; it holds the figure and stays in bounds."""
    rng = np.random.default_rng(0)
    groups = np.arange(40)
    one, other, third = (Ratio(rng.random(40), 1 + rng.random(40)) for _ in range(3))
    expected = difference_interval(one, other, groups)
    assert mean_difference_interval([one], [other], groups) == expected
    assert mean_difference_interval([one, one], [other, other], groups) == pytest.approx(expected, abs=1e-9)
    low, high = mean_difference_interval([one, third], [other, third], groups)
    # Other draws for each group, so not to the last digit.
    assert (low, high) == pytest.approx((expected[0] / 2, expected[1] / 2), abs=0.001)


@given(seeds)
def test_swapping_classes_mirrors_rate_and_auc(seed) -> None:
    rng = np.random.default_rng(seed)
    labels, scores, groups = np.arange(60) % 2 == 0, rng.integers(0, 20, 60), np.arange(60) // 2
    for method, swapped in (
        (auc_interval(labels, scores, groups), auc_interval(~labels, scores, groups)),
        (
            rate_interval(scores > 4, labels >= 0, groups),
            rate_interval(scores <= 4, labels >= 0, groups),
        ),
    ):
        assert swapped == pytest.approx((1 - method[1], 1 - method[0]), abs=1e-9)


@pytest.mark.parametrize("method", ["auc", "ap"])
def test_influence_is_the_derivative_by_the_weight_of_an_image(method, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(intervals, "_inflation", lambda influence, *rest: seen.append(influence) or 1.0)
    rng = np.random.default_rng(0)
    labels, groups = np.arange(50) < 22, np.arange(50)
    scores = rng.standard_normal(50) + labels
    (auc_interval if method == "auc" else ap_interval)(labels, scores, groups)

    def figure(weights) -> float:
        order = np.argsort(-scores)
        hits = np.cumsum((weights * labels)[order])
        if method == "auc":
            return (hits * (weights * ~labels)[order]).sum() / (hits[-1] * (weights * ~labels).sum())
        return ((weights * labels)[order] * hits / np.cumsum(weights[order])).sum() / hits[-1]

    step = 1e-5 * np.eye(50)
    slopes = [(figure(1 + row) - figure(1 - row)) / 2e-5 for row in step]
    np.testing.assert_allclose(seen[0], slopes, atol=1e-8)


def test_auc_solves_newcombes_equation() -> None:
    labels, scores, groups = np.arange(70) < 30, np.arange(70) % 31, np.arange(70)
    auc = area_under_roc(curve(labels, -scores))
    for end in auc_interval(labels, -scores, groups):
        variance = end * (1 - end) * (1 + 34 * (1 - end) / (2 - end) + 34 * end / (1 + end)) / (30 * 40)
        assert abs(auc - end) == pytest.approx(stats.norm.ppf(0.975) * variance**0.5, rel=0.05)


def test_few_false_alarms_on_top_widen_the_areas() -> None:
    labels, groups = np.arange(240) < 200, np.arange(240)
    on_top = np.where(labels, 1.0, np.where(np.arange(240) >= 236, 2.0, 0.0)) + np.linspace(0, 0.01, 240)
    spread = np.random.default_rng(0).standard_normal(240) + 1.81 * labels
    for method, area in ((auc_interval, area_under_roc), (ap_interval, average_precision)):
        top, even = method(labels, on_top, groups), method(labels, spread, groups)
        assert area(curve(labels, on_top)) == pytest.approx(area(curve(labels, spread)), abs=0.1)
        assert top[1] - top[0] > 1.3 * (even[1] - even[0])


def test_decision_f1_follows_from_jaccard() -> None:
    truth, decided = np.repeat([1, 1, 0, 0], [30, 4, 3, 60]), np.repeat([1, 0, 1, 0], [30, 4, 3, 60])
    jaccard = stats.binomtest(30, 37).proportion_ci(method="exact")
    expected = (f1_of_jaccard(jaccard.low), f1_of_jaccard(jaccard.high))
    assert decision_f1_interval(truth, decided, np.arange(97)) == pytest.approx(expected)
    assert f1_of_jaccard(30 / 37) == pytest.approx(60 / 67)
    assert decision_f1_interval(truth, decided, np.arange(97) // 8) is None


# Where there is none, or nothing to see.


@pytest.mark.parametrize("groups", [0, 1, 19, 20])
def test_too_few_groups(groups) -> None:
    codes = np.arange(40) % max(groups, 1)
    values = np.random.default_rng(0).random(40)
    weights = np.full(40, float(groups > 0))
    labels = np.random.default_rng(1).permutation(40) < 20 if groups < 20 else np.arange(40) < 20
    found = [
        ratio_interval(Ratio(values * weights, weights), codes),
        difference_interval(Ratio(values * weights, weights), mean_of(values**2), codes),
        rate_interval(weights, weights, codes),
        auc_interval(labels * weights, values, codes),
        ap_interval(labels * weights, values, codes),
    ]
    assert [interval is not None for interval in found] == [groups >= MIN_GROUPS] * 5


def test_why_none() -> None:
    assert why_none(12) == "no interval: 12 groups, 20 are needed"
    assert why_none(1) == "no interval: 1 group, 20 are needed"
    assert why_none(33) == "no interval: too few groups differ from the rest"


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_no_spread_is_no_certainty(value) -> None:
    groups = np.arange(30)
    weights = np.random.default_rng(0).random(30)
    assert ratio_interval(mean_of(np.full(30, value)), groups) is None
    assert ratio_interval(Ratio(weights * value, weights), groups) is None
    values = np.random.default_rng(1).random(30)
    assert difference_interval(mean_of(values), mean_of(values), groups) is None
    assert difference_interval(mean_of(values + value), mean_of(values), groups) is None


@pytest.mark.parametrize(("different", "given"), [(1, False), (3, False), (5, True)])
def test_a_few_groups_that_differ_are_too_few(different, given) -> None:
    values = np.ones(40)
    values[:different] = np.linspace(0.1, 0.5, different)
    assert (ratio_interval(mean_of(values), np.arange(40)) is not None) == given


def test_perfect_decisions() -> None:
    groups = np.arange(60) // 2
    labels, scores = groups % 2 == 0, (groups % 2 == 0) + np.linspace(0, 0.1, 60)
    # 30 groups with all trials right: each counts once.
    assert rate_interval(labels | True, np.ones(60), groups) == pytest.approx((0.025 ** (1 / 30), 1))
    assert rate_interval(labels & False, np.ones(60), groups) == pytest.approx((0, 1 - 0.025 ** (1 / 30)))
    singles = np.arange(60)
    assert ap_interval(labels, scores, singles) == pytest.approx((0.025 ** (1 / 30), 1))
    low, high = auc_interval(labels, scores, singles)
    assert high == 1
    assert 0.9 < low < 0.95
    assert auc_interval(labels, -scores, singles) == pytest.approx((0, 1 - low))


def test_successes_beyond_trials_are_our_mistake() -> None:
    with pytest.raises(AssertionError):
        rate_interval(np.full(30, 2), np.ones(30), np.arange(30))
    with pytest.raises(AssertionError):
        ratio_interval(Ratio(np.ones(30), np.full(30, -1.0)), np.arange(30))

"""How often the 95 % intervals of model/intervals.py hold the truth, on simulated test splits.

    python -m bench.coverage [--replications 4000]

Prints a Markdown table of coverage and mean width, beside the coverage of plain percentiles of bootstrap draws of whole
groups. Shapes: R replications, G groups, S images a group, N images. Images are drawn through a normal copula, so
that those of one group, and two models on one image, can be correlated whatever their distribution.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
from scipy import special, stats

from model.arrays import Array, Bools, Floats
from model.curves import area_under_roc, average_precision, curve
from model.intervals import (
    Interval,
    Ratio,
    ap_interval,
    auc_interval,
    difference_interval,
    jackknife_difference_interval,
    jackknife_interval,
    rate_interval,
    ratio_interval,
)

_PERCENTILE_DRAWS = 1000
_RANKING_REPLICATIONS = 400
"""of the percentile column for AUC, AP and ODS, which are slow to draw"""

Quantiles = Callable[[Floats], Floats]


def beta_quantiles(mean: float, deviation: float) -> Quantiles:
    """Of a beta distribution, from a table."""
    both = mean * (1 - mean) / deviation**2 - 1
    grid = np.linspace(0, 1, 20_001)
    table = stats.beta.ppf(grid, mean * both, (1 - mean) * both)
    return lambda uniform: np.interp(uniform, grid, table)


def dice_quantiles(mean: float, deviation: float) -> Quantiles:
    """3 % zeros (missed or false alarm), 13 % ones (nothing there, nothing predicted), the rest beta."""
    rest = beta_quantiles(mean, deviation)
    return lambda uniform: np.where(uniform < 0.03, 0, np.where(uniform > 0.87, 1, rest((uniform - 0.03) / 0.84)))


def correlated(rng: np.random.Generator, shape: tuple[int, ...], correlation: float) -> Floats:
    """Uniform numbers, correlated along the last axis."""
    shared = rng.standard_normal((*shape[:-1], 1))
    own = rng.standard_normal(shape)
    return np.asarray(special.ndtr(np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own))


def row(what: str, size: str, truth: float, intervals: list[Interval | None], percentiles_R2: Array) -> str:
    """A line of the table; coverage and width are of the replications that have an interval."""
    given = np.array([interval for interval in intervals if interval])

    def coverage(bounds_R2: Array) -> float:
        return float(np.mean((bounds_R2[:, 0] <= truth) & (truth <= bounds_R2[:, 1])))

    none = 1 - len(given) / len(intervals)
    width = np.mean(given[:, 1] - given[:, 0])
    return (
        f"| {what} | {size} | {100 * coverage(given):.1f} | {width:.3f} | {100 * none:.1f} "
        f"| {100 * coverage(percentiles_R2):.1f} |"
    )


def percentiles(rng: np.random.Generator, numerator_RG: Floats, denominator_RG: Floats) -> Floats:
    """(R, 2) plain percentiles of a ratio over bootstrap draws of groups."""
    groups = numerator_RG.shape[1]
    bounds = []
    # Other draws for every tenth, so that the luck of one set of draws is not in the whole row.
    for top_RG, below_RG in zip(np.array_split(numerator_RG, 10), np.array_split(denominator_RG, 10), strict=True):
        counts_DG = rng.multinomial(groups, np.full(groups, 1 / groups), size=_PERCENTILE_DRAWS).astype(np.float64)
        ratios_DR = counts_DG @ top_RG.T / (counts_DG @ below_RG.T)
        bounds.append(np.percentile(ratios_DR, [2.5, 97.5], axis=0).T)
    return np.concatenate(bounds)


def means(rng: np.random.Generator, replications: int) -> Iterator[str]:
    """Means over images, plain and in groups of 1 to 6."""
    kinds = {"beta": beta_quantiles(0.67, 0.226), "Dice mixture": dice_quantiles(0.67, 0.226)}
    truths = {"beta": 0.67, "Dice mixture": 0.13 + 0.84 * 0.67}
    for name, quantiles in kinds.items():
        for images in (24, 60, 200):
            values_RN = quantiles(rng.random((replications, images)))
            ones_N, groups_N = np.ones(images), np.arange(images)
            intervals = [ratio_interval(Ratio(values_N, ones_N), groups_N) for values_N in values_RN]
            plain = percentiles(rng, values_RN, np.ones_like(values_RN))
            yield row(f"mean, {name}", f"{images}", truths[name], intervals, plain)
    for name, quantiles in kinds.items():
        for groups in (24, 60):
            present_RGS = np.arange(6) < rng.integers(1, 7, (replications, groups, 1))
            values_RGS = quantiles(correlated(rng, present_RGS.shape, 0.5)) * present_RGS
            groups_N = np.repeat(np.arange(groups), 6)
            intervals = [
                ratio_interval(Ratio(values.ravel(), present.ravel()), groups_N)
                for values, present in zip(values_RGS, present_RGS, strict=True)
            ]
            plain = percentiles(rng, values_RGS.sum(axis=2), present_RGS.sum(axis=2).astype(np.float64))
            yield row(f"mean, {name}, groups of 1 to 6", f"{groups} groups", truths[name], intervals, plain)


def differences(rng: np.random.Generator, replications: int) -> Iterator[str]:
    """Differences of the means of two models on the same images."""
    for name, kind in {"beta": beta_quantiles, "Dice mixture": dice_quantiles}.items():
        first, second = kind(0.67, 0.226), kind(0.63, 0.24)
        truth = (0.67 - 0.63) * (1 if name == "beta" else 0.84)
        for images in (24, 60, 200):
            uniform_RN2 = correlated(rng, (replications, images, 2), 0.8)
            first_RN, second_RN = first(uniform_RN2[..., 0]), second(uniform_RN2[..., 1])
            ones_N, groups_N = np.ones(images), np.arange(images)
            intervals = [
                difference_interval(Ratio(first_N, ones_N), Ratio(second_N, ones_N), groups_N)
                for first_N, second_N in zip(first_RN, second_RN, strict=True)
            ]
            plain = percentiles(rng, first_RN - second_RN, np.ones_like(first_RN))
            yield row(f"paired difference, {name}", f"{images}", truth, intervals, plain)
        for groups in (24, 60):
            present_RGS = np.arange(6) < rng.integers(1, 7, (replications, groups, 1))
            # 12 numbers a group: 6 images x 2 models; two models on one image are closer than two images of a group.
            group_RG = rng.standard_normal((replications, groups, 1, 1))
            image_RGS = rng.standard_normal((replications, groups, 6, 1))
            own_RGS2 = rng.standard_normal((replications, groups, 6, 2))
            uniform = special.ndtr(np.sqrt(0.4) * group_RG + np.sqrt(0.4) * image_RGS + np.sqrt(0.2) * own_RGS2)
            first_RGS, second_RGS = first(uniform[..., 0]) * present_RGS, second(uniform[..., 1]) * present_RGS
            groups_N = np.repeat(np.arange(groups), 6)
            intervals = [
                difference_interval(Ratio(a.ravel(), here.ravel()), Ratio(b.ravel(), here.ravel()), groups_N)
                for a, b, here in zip(first_RGS, second_RGS, present_RGS, strict=True)
            ]
            sums_RG = (first_RGS - second_RGS).sum(axis=2)
            plain = percentiles(rng, sums_RG, present_RGS.sum(axis=2).astype(np.float64))
            yield row(f"paired difference, {name}, groups of 1 to 6", f"{groups} groups", truth, intervals, plain)


def rates(rng: np.random.Generator, replications: int) -> Iterator[str]:
    """Rates of decisions; images of a group have a beta rate of their own (intra-group correlation 0.3)."""
    for rate in (0.92, 0.996):
        for groups, size in ((33, 1), (220, 1), (33, 3), (73, 3)):
            both = 1 / 0.3 - 1
            rates_RG = rng.beta(rate * both, (1 - rate) * both, (replications, groups)) if size > 1 else rate
            successes_RG = rng.binomial(size, rates_RG, (replications, groups))
            trials_G, groups_G = np.full(groups, size), np.arange(groups)
            intervals = [rate_interval(successes_G, trials_G, groups_G) for successes_G in successes_RG]
            plain = percentiles(rng, successes_RG.astype(np.float64), np.full((replications, groups), float(size)))
            label = f"{groups}" if size == 1 else f"{groups} groups of {size}"
            yield row(f"rate {rate}", label, rate, intervals, plain)


def rankings(rng: np.random.Generator, replications: int) -> Iterator[str]:
    """AUC and AP of normal scores of equal variance, and with 1 in 20 images of either class scoring as the other."""
    for auc, mixed in ((0.9, 0.0), (0.99, 0.0), (0.998, 0.0), (0.998, 0.05)):
        shift = np.sqrt(2) * stats.norm.ppf(auc)
        for positives in (33, 220):
            for negatives in (33, 220):
                labels_N = np.arange(positives + negatives) < positives
                swapped_RN = rng.random((replications, len(labels_N))) < mixed
                scores_RN = rng.standard_normal(swapped_RN.shape) + shift * (labels_N ^ swapped_RN)
                true_auc, true_ap = ranking_truths(shift, mixed, positives, negatives)
                bounds = ranking_percentiles(rng, labels_N, scores_RN[:_RANKING_REPLICATIONS])
                size = f"{positives} + {negatives}"
                groups_N = np.arange(len(labels_N))
                for name, truth, method, plain in (
                    ("AUC", true_auc, auc_interval, bounds[0]),
                    ("AP", true_ap, ap_interval, bounds[1]),
                ):
                    intervals = [method(labels_N, scores_N, groups_N) for scores_N in scores_RN]
                    what = f"{name} {truth:.4f}" + (f", {100 * mixed:.0f} % swapped" if mixed else "")
                    yield row(what, size, truth, intervals, plain)


def ranking_differences(rng: np.random.Generator, replications: int) -> Iterator[str]:
    """Differences of AUC and AP of two models whose scores of one image have correlation 0.7."""
    for first, second, mixed in ((0.95, 0.9, 0.0), (0.99, 0.97, 0.0), (0.99, 0.97, 0.05)):
        shifts = np.sqrt(2) * stats.norm.ppf([first, second])
        for images in (33, 100):
            labels_N = np.arange(2 * images) < images
            swapped_RN = rng.random((replications, 2 * images)) < mixed
            noise_2RN = rng.standard_normal((2, *swapped_RN.shape))
            noise_2RN = np.sqrt(0.7) * rng.standard_normal(swapped_RN.shape) + np.sqrt(0.3) * noise_2RN
            scores_2RN = noise_2RN + shifts[:, None, None] * (labels_N ^ swapped_RN)
            gains_RJ2 = np.subtract(*(np.array([leave_one_out(labels_N, s) for s in ours]) for ours in scores_2RN))
            true = np.subtract(*(ranking_truths(shift, mixed, images, images) for shift in shifts))
            draws_2 = [ranking_draws(np.random.default_rng(1), labels_N, s[:_RANKING_REPLICATIONS]) for s in scores_2RN]
            plain_2R2 = np.percentile(draws_2[0] - draws_2[1], [2.5, 97.5], axis=-1).transpose(2, 1, 0)
            for kind, name in enumerate(("AUC", "AP")):
                gains_RJ = gains_RJ2[..., kind]
                intervals = [jackknife_difference_interval(float(gains[0]), gains[1:]) for gains in gains_RJ]
                what = f"paired difference, {name} {first} - {second}" + (
                    f", {100 * mixed:.0f} % swapped" if mixed else ""
                )
                yield row(what, f"{images} + {images}", true[kind], intervals, plain_2R2[kind])


def leave_one_out(labels_N: Bools, scores_N: Floats) -> Floats:
    """(1 + N, 2) AUC and AP, then the same without each image."""
    kept = [np.ones(len(labels_N), bool), *~np.eye(len(labels_N), dtype=bool)]
    curves = [curve(labels_N[rows], scores_N[rows]) for rows in kept]
    return np.array([(area_under_roc(points), average_precision(points)) for points in curves])


def ranking_truths(shift: float, mixed: float, positives: int, negatives: int) -> tuple[float, float]:
    """AUC and AP of endless data with the same share of positives."""
    grid = np.linspace(shift + 9, -9, 100_001)
    low, high = stats.norm.sf(grid), stats.norm.sf(grid - shift)
    hit_rate, alarm_rate = (1 - mixed) * high + mixed * low, (1 - mixed) * low + mixed * high
    precision = positives * hit_rate / (positives * hit_rate + negatives * alarm_rate)
    return float(np.trapezoid(hit_rate, alarm_rate)), float(np.trapezoid(precision, hit_rate))


def ranking_percentiles(rng: np.random.Generator, labels_N: Bools, scores_RN: Floats) -> Floats:
    """(2, R, 2) plain percentiles of AUC and AP."""
    return np.percentile(ranking_draws(rng, labels_N, scores_RN), [2.5, 97.5], axis=-1).transpose(2, 1, 0)


def ranking_draws(rng: np.random.Generator, labels_N: Bools, scores_RN: Floats) -> Floats:
    """(R, 2, D) AUC and AP of bootstrap draws, the same draws of images for all replications."""
    images = len(labels_N)
    counts_DN = rng.multinomial(images, np.full(images, 1 / images), size=_PERCENTILE_DRAWS // 2).astype(np.float64)
    drawn = []
    for scores_N in scores_RN:
        order = np.argsort(-scores_N)
        drawn_DN, positive_N = counts_DN[:, order], labels_N[order]
        hits_DN = drawn_DN * positive_N
        true_DN, all_DN = hits_DN.cumsum(axis=1), drawn_DN.cumsum(axis=1)
        false_DN = drawn_DN - hits_DN
        aucs = (true_DN * false_DN).sum(axis=1) / (true_DN[:, -1] * false_DN.sum(axis=1))
        aps = (hits_DN * true_DN / np.maximum(all_DN, 1)).sum(axis=1) / true_DN[:, -1]
        drawn.append([aucs, aps])
    return np.array(drawn)


def pooled_areas(rng: np.random.Generator, replications: int) -> Iterator[str]:
    """AP and ODS of all pixels pooled: 300 pixels an image, of which few are of the truth; images differ in how many,
    how bright and how well told apart."""
    truths = areas_of(pixel_histograms(rng, 1, 40_000).sum(axis=1))[:, 0]
    for groups in (24, 60):
        histograms_RG2L = pixel_histograms(rng, replications, groups)
        whole_R2L = histograms_RG2L.sum(axis=1)
        values = areas_of(whole_R2L)
        without = areas_of(whole_R2L[:, None] - histograms_RG2L)
        for name, truth, value_R, without_RG, kind in zip(
            ("pixel AP", "ODS"), truths, values, without, (0, 1), strict=True
        ):
            intervals = [jackknife_interval(float(v), w) for v, w in zip(value_R, without_RG, strict=True)]
            plain = []
            for histograms_G2L in histograms_RG2L[:_RANKING_REPLICATIONS]:
                counts_DG = rng.multinomial(groups, np.full(groups, 1 / groups), size=_PERCENTILE_DRAWS // 2)
                drawn = areas_of(np.tensordot(counts_DG, histograms_G2L, axes=1))[kind]
                plain.append(np.percentile(drawn, [2.5, 97.5]))
            yield row(name, f"{groups}", truth, intervals, np.array(plain))


def pooled_differences(rng: np.random.Generator, replications: int) -> Iterator[str]:
    """Differences of AP and ODS of all pixels pooled, of two models that share two thirds of an image's brightness."""
    truths = np.subtract(*(areas_of(one.sum(axis=1))[:, 0] for one in paired_histograms(rng, 1, 40_000)))
    for groups in (24, 60):
        first_RG2L, second_RG2L = paired_histograms(rng, replications, groups)
        parts = []
        for histograms_RG2L in (first_RG2L, second_RG2L):
            whole_R2L = histograms_RG2L.sum(axis=1)
            parts.append((areas_of(whole_R2L), areas_of(whole_R2L[:, None] - histograms_RG2L)))
        values, without = (a - b for a, b in zip(*parts, strict=True))
        plain = []
        for one_G2L, other_G2L in zip(*(h[:_RANKING_REPLICATIONS] for h in (first_RG2L, second_RG2L)), strict=True):
            counts_DG = rng.multinomial(groups, np.full(groups, 1 / groups), size=_PERCENTILE_DRAWS // 2)
            drawn = np.subtract(*(areas_of(np.tensordot(counts_DG, h, axes=1)) for h in (one_G2L, other_G2L)))
            plain.append(np.percentile(drawn, [2.5, 97.5], axis=1).T)
        for kind, name in enumerate(("pixel AP", "ODS")):
            pairs = zip(values[kind], without[kind], strict=True)
            intervals = [jackknife_difference_interval(float(v), w) for v, w in pairs]
            yield row(f"paired difference, {name}", f"{groups}", truths[kind], intervals, np.array(plain)[:, kind])


def paired_histograms(rng: np.random.Generator, replications: int, groups: int) -> tuple[Array, Array]:
    """`pixel_histograms` of two models: the same truths, the second one's defects stand out less."""
    pixels = 300
    shape = (replications, groups, 1)
    inside = rng.random((replications, groups, pixels)) < rng.beta(2, 30, shape)
    bright, shade, noise = rng.standard_normal(shape), rng.standard_normal(shape), rng.standard_normal(inside.shape)
    out = []
    for contrast in (1.5, 1.3):
        own = rng.standard_normal(shape)
        shift = inside * (contrast + 0.8 * (np.sqrt(2 / 3) * bright + np.sqrt(1 / 3) * own)) + 0.5 * shade
        mixed = np.sqrt(0.7) * noise + np.sqrt(0.3) * rng.standard_normal(inside.shape)
        out.append(histograms(inside, np.clip(63 - 12 * (mixed + shift), 0, 127).astype(np.int64)))
    return out[0], out[1]


def pixel_histograms(rng: np.random.Generator, replications: int, groups: int) -> Array:
    """(R, G, 2, 128) pixels outside and inside the truth of an image a group, by score, the highest first."""
    pixels = 300
    shape = (replications, groups, 1)
    inside = rng.random((replications, groups, pixels)) < rng.beta(2, 30, shape)
    shift = inside * (1.5 + 0.8 * rng.standard_normal(shape)) + 0.5 * rng.standard_normal(shape)
    return histograms(inside, np.clip(63 - 12 * (rng.standard_normal(inside.shape) + shift), 0, 127).astype(np.int64))


def histograms(inside: Bools, levels: Array) -> Array:
    """(R, G, 2, 128) pixels (R, G, P) outside and inside the truth by level."""
    replications, groups, _ = inside.shape
    image = np.arange(replications * groups).reshape(replications, groups, 1)
    bins = (image * 2 + inside) * 128 + levels
    return np.bincount(bins.ravel(), minlength=replications * groups * 256).reshape(replications, groups, 2, 128)


def areas_of(histograms_2L: Array) -> Floats:
    """(2, ...) AP by trapezoids and the best F1, of histograms (..., 2, L)."""
    false, true = np.moveaxis(histograms_2L.cumsum(axis=-1), -2, 0)
    total = true[..., -1:]
    precision, recall = true / np.maximum(true + false, 1), true / total
    steps = np.diff(recall, axis=-1, prepend=0)
    before = np.concatenate([np.ones_like(total, float), precision[..., :-1]], axis=-1)
    return np.stack([(steps * (precision + before) / 2).sum(axis=-1), (2 * true / (true + false + total)).max(axis=-1)])


def main() -> None:
    """Prints rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=4000)
    options = parser.parse_args()
    began = time.perf_counter()
    rng = np.random.default_rng(0)
    print("| figure | images | coverage, % | mean width | without interval, % | percentiles, coverage, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for table in (means, differences, rates, rankings, pooled_areas, ranking_differences, pooled_differences):
        for line in table(rng, options.replications):
            print(line, flush=True)
    print(
        f"\n{options.replications} replications a row ({_RANKING_REPLICATIONS} for percentiles of AUC, AP and ODS), ",
        end="",
    )
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()

"""The synthetic set: a function of its seed, fair between labels, beyond a threshold on darkness."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from model import synthetic

SIGMAS_PX = (3, 5, 9, 15)
HIGHEST_BASELINE_DICE = 0.30


def read(directory: Path) -> tuple[list[dict[str, str]], np.ndarray, np.ndarray]:
    with (directory / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    files = [f"{row['name']}.png" for row in rows]
    images = [cv2.imread(str(directory / "images" / file), cv2.IMREAD_COLOR_RGB) for file in files]
    masks = [cv2.imread(str(directory / "masks" / file), cv2.IMREAD_UNCHANGED) for file in files]
    return rows, np.stack(images), np.stack(masks)


@pytest.fixture(scope="module", params=[0, 1])
def default_set(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, str]], np.ndarray, np.ndarray]:
    directory = tmp_path_factory.mktemp("synthetic") / "set"
    synthetic.write(directory, seed=request.param)
    return read(directory)


def darkness(images: np.ndarray, sigma_px: float) -> np.ndarray:
    greys = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in images]
    return np.stack([cv2.GaussianBlur(grey, (0, 0), sigma_px) - grey for grey in greys])


def best_mean_dice(responses: np.ndarray, masks: np.ndarray) -> float:
    """The highest mean over images of Dice that one threshold for all of them reaches."""
    # Half of the thresholds among the darkest tenth of the pixels, where the cracks are.
    quantiles = np.concatenate([np.linspace(0, 0.9, 100, endpoint=False), np.linspace(0.9, 0.9999, 100)])
    thresholds = np.quantile(responses, quantiles)
    dices = []
    for response, mask in zip(responses, masks, strict=True):
        everywhere, on_crack = np.sort(response, axis=None), np.sort(response[mask > 0])
        predicted = everywhere.size - np.searchsorted(everywhere, thresholds)
        hit = on_crack.size - np.searchsorted(on_crack, thresholds)
        dices.append(2 * hit / (predicted + on_crack.size))
    return float(np.mean(dices, axis=0).max())


def test_baseline_finds_the_best_threshold() -> None:
    masks = np.zeros((2, 16, 16), np.uint8)
    masks[:, 4:8] = 1
    assert best_mean_dice(masks.astype(float), masks) == 1
    assert best_mean_dice(np.zeros((2, 16, 16)), masks) == pytest.approx(2 * 64 / (256 + 64))


@pytest.mark.parametrize("sigma_px", SIGMAS_PX)
def test_darkness_threshold_fails_on_positives(default_set, sigma_px: float) -> None:
    _, images, masks = default_set
    positive = masks.any((1, 2))
    assert best_mean_dice(darkness(images[positive], sigma_px), masks[positive]) <= HIGHEST_BASELINE_DICE


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_negatives_have_more_pixels_as_dark_as_a_crack_than_the_crack_has(quantile: float) -> None:
    # Pairs of one seed share surface and distractors: sets would compare other surfaces with other lamps.
    seeds = range(40)
    positives = [synthetic.scene(seed, True, 128, 128) for seed in seeds]
    negatives = np.stack([synthetic.scene(seed, False, 128, 128)[0] for seed in seeds])
    images, masks = np.stack([image for image, _ in positives]), np.stack([mask for _, mask in positives])
    for sigma_px in SIGMAS_PX:
        ratios = []
        for on_positive, on_negative, mask in zip(
            darkness(images, sigma_px), darkness(negatives, sigma_px), masks, strict=True
        ):
            crack = on_positive[mask > 0]
            level = np.quantile(crack, quantile)
            ratios.append((on_negative >= level).sum() / (crack >= level).sum())
        assert np.quantile(ratios, 0.25) > 2  # in three scenes of four


def test_same_arguments_same_scene() -> None:
    np.random.seed(0)  # the global state must not matter
    first = synthetic.scene(7, True, 64, 96)
    np.random.seed(1)
    for a, b in zip(first, synthetic.scene(7, True, 64, 96), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(first, synthetic.scene(8, True, 64, 96), strict=True):
        assert (a != b).any()


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (256, 128)])
@pytest.mark.parametrize("positive", [False, True])
def test_shapes_and_types(shape: tuple[int, int], positive: bool) -> None:
    image, mask = synthetic.scene(3, positive, *shape)
    assert (image.shape, image.dtype) == ((*shape, 3), np.uint8)
    assert (mask.shape, mask.dtype) == (shape, np.uint8)
    assert set(np.unique(mask)) == ({0, 1} if positive else {0})


@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (128, 128)])
def test_every_positive_has_a_crack_of_sensible_size(shape: tuple[int, int]) -> None:
    shares = [synthetic.scene(seed, True, *shape)[1].mean() for seed in range(60)]
    assert min(shares) > 0.003
    assert max(shares) < 0.20
    assert 0.01 < np.median(shares) < 0.10


def test_cracks_are_thin_but_not_hairlines() -> None:
    for seed in range(10):
        mask = synthetic.scene(seed, True, 128, 128)[1]
        # Twice the area over the outline's length is the width of a long thin shape.
        outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        assert 2 < 2 * mask.sum() / sum(cv2.arcLength(line, True) for line in outlines) < 6


def test_positive_differs_from_its_negative_by_the_crack_alone() -> None:
    for seed in range(10):
        positive, mask = synthetic.scene(seed, True, 128, 128)
        negative, _ = synthetic.scene(seed, False, 128, 128)
        near = cv2.dilate(mask, np.ones((17, 17), np.uint8)) > 0  # its bright edges, and the lens
        np.testing.assert_array_equal(positive[~near], negative[~near])
        change = positive.astype(float).mean(2) - negative.astype(float).mean(2)
        assert change[mask > 0].mean() < -8  # grey levels: the eye sees it


def test_written_set(default_set) -> None:
    rows, images, masks = default_set
    assert images.shape == (180, 128, 128, 3)
    assert set(np.unique(masks)) == {0, 255}
    assert [int(row["crack_pixels"]) for row in rows] == np.count_nonzero(masks, axis=(1, 2)).tolist()
    assert [row["positive"] == "1" for row in rows] == masks.any((1, 2)).tolist()
    assert sum(row["positive"] == "1" for row in rows) == 120


def test_groups_share_a_surface(default_set) -> None:
    rows, images, _ = default_set
    groups = [row["group"] for row in rows]
    assert {groups.count(group) for group in groups} == {1, 2, 3}
    colours = np.array([image.reshape(-1, 3).mean(0) / image.mean() for image in images])
    by_group = [colours[[g == group for g in groups]] for group in sorted(set(groups))]
    within = np.mean([tints.std(0).mean() for tints in by_group if len(tints) > 1])
    assert within < 0.1 * colours.std(0).mean()
    assert len(np.unique(images, axis=0)) == len(images)


def test_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        synthetic.write(tmp_path / "new" / name, count=4, height=64, width=72, seed=seed)
    files = sorted(path.relative_to(tmp_path / "new" / "a") for path in (tmp_path / "new" / "a").rglob("*.*"))
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "new" / "a" / file).read_bytes() == (tmp_path / "new" / "b" / file).read_bytes()
    assert (tmp_path / "new" / "a/index.csv").read_bytes() != (tmp_path / "new" / "c/index.csv").read_bytes()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a", "b", "c"}


@pytest.mark.parametrize(("share", "positives"), [(0, 0), (0.5, 2), (1, 3)])
def test_positive_share(tmp_path: Path, share: float, positives: int) -> None:
    synthetic.write(tmp_path, count=3, positive_share=share, height=64, width=64)  # into an empty directory
    rows, _, masks = read(tmp_path)
    assert sum(int(row["positive"]) for row in rows) == masks.any((1, 2)).sum() == positives


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, r"height must be a multiple of 8 px .* but is 100 px; use 104"),
        ({"width": 56}, r"width must be .* at least 64 px, but is 56 px; use 64"),
        ({"width": -8}, r"width must be .* but is -8 px; use 64"),
        ({"count": 0}, r"count must be at least 1 image, but is 0"),
        ({"positive_share": 1.5}, r"positive_share must lie in \[0, 1\], but is 1.5"),
        ({"positive_share": float("nan")}, r"positive_share must lie in \[0, 1\], but is nan"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic.write(tmp_path / "set", **options)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=r"new or empty directory, but .* is in use; name another"):
            synthetic.write(target, count=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_nothing_is_left_of_a_set_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_save", fail)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write(tmp_path / "set", count=1)
    assert not any(tmp_path.iterdir())

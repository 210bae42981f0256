"""A procedural crack set: photos of worn surfaces made from a seed, for demos and tests without a download.

An image is a product of fields over (H, W), each near 1: texture, light, whatever lies on the surface, and,
on a positive, the crack. Everything but the crack is drawn before it and from generators of its own, so a
positive and the negative of the same seed differ by the crack alone, and distractors cannot give the label
away.

The set is hard on purpose for a threshold on local darkness: joints and specks are at least as dark as
cracks, and a crack's depth follows the roughness of its surface, so that no one level suits all images. What
tells a crack is its shape, a jagged path that forks and changes its width, where joints are smooth and of one
width, and often a bright edge.
"""

import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

Fields = tuple[int, int]
"""Height and width of a field, px."""

_SUPERSAMPLING = 4
"""Lines are drawn this much larger and averaged down: OpenCV's widths are whole pixels."""
_REFERENCE_SIDE_PX = 128
"""Counts of distractors are given for a square of this side."""
_STRIDE_PX, _SMALLEST_PX = 8, 64
_LARGEST_GROUP = 3
_STEP_PX = 2.5
"""Length of one step of a crack's walk."""
_CRACK_WIDTH_PX = (2.0, 4.8)
_FAINTEST = 0.65
"""Contrast of a crack where it has faded most, as a share of its full depth: still visible."""
_GRAIN_SCALES_PX = (1, 2, 4, 8, 32)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A family of surfaces; ranges are (low, high)."""

    tone: tuple[float, float]
    """Mean reflectance, 0 to 1."""
    grain: tuple[float, float]
    """Standard deviation of the texture as a share of the mean."""
    weights: tuple[float, float, float, float, float]
    """Share of each of the grain scales."""
    stretch: int
    """Length of a grain over its height: 1 for stone, more for brushed metal."""
    pores: float
    """Mean count of dark pin holes."""
    stones: float
    """Contrast of aggregate, the little stones in asphalt, as a share of the grain."""
    tint: tuple[float, float, float]
    """Red, green, blue."""


_KINDS = (
    # asphalt, concrete, plaster, metal
    _Kind((0.34, 0.50), (0.09, 0.12), (0.6, 1.0, 0.5, 0.3, 0.3), 1, 20, 1.0, (1.00, 1.00, 1.02)),
    _Kind((0.50, 0.68), (0.05, 0.08), (0.6, 0.8, 0.6, 0.5, 0.7), 1, 90, 0.3, (1.02, 1.00, 0.96)),
    _Kind((0.62, 0.78), (0.03, 0.06), (0.4, 0.7, 0.9, 0.8, 0.6), 1, 25, 0.0, (1.05, 1.00, 0.92)),
    _Kind((0.42, 0.60), (0.04, 0.07), (0.5, 1.0, 0.7, 0.2, 0.4), 12, 15, 0.0, (0.98, 1.00, 1.04)),
)


@dataclass(frozen=True, slots=True)
class _Surface:
    """What the crops of one photo share."""

    kind: _Kind
    tone: float
    grain: float
    tint: np.ndarray


@dataclass(frozen=True, slots=True)
class _Blot:
    """A sort of stain; ranges are (low, high)."""

    radius_px: tuple[float, float]
    depth: tuple[float, float]
    soft: float
    """Width of the edge as a share of the radius."""


def scene(
    seed: int, positive: bool, height: int, width: int, surface_seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (H, W, 3) RGB and mask uint8 (H, W) of 0/1, which is empty for a negative.

    A pure function of its arguments. Scenes with one `surface_seed` (default: the seed) look like crops of
    one photo: same material, tone and roughness, another place.
    """
    shape = (height, width)
    surface = _surface(np.random.default_rng([0, seed if surface_seed is None else surface_seed]))
    rng = np.random.default_rng([1, seed])
    grey = surface.tone * _texture(rng, shape, surface) * _lighting(rng, shape)
    for field in _distractors(rng, shape, surface.grain):
        grey = grey * field
    mask = np.zeros(shape, np.uint8)
    noise = rng.normal(0, 0.008, (*shape, 3))  # the sensor's, drawn before the crack is
    if positive:
        field, mask = _crack(np.random.default_rng([2, seed]), shape, surface.grain)
        grey = grey * field
    grey = cv2.GaussianBlur(grey, (0, 0), 0.5)  # the lens
    rgb = grey[..., None] * surface.tint + noise
    return np.clip(rgb * 255, 0, 255).astype(np.uint8), mask


def _surface(rng: np.random.Generator) -> _Surface:
    kind = _KINDS[rng.integers(len(_KINDS))]
    tint = np.array(kind.tint) * rng.normal(1, 0.015, 3)
    return _Surface(kind, rng.uniform(*kind.tone), rng.uniform(*kind.grain), tint)


def _noise(rng: np.random.Generator, shape: Fields, scale_px: float, stretch: float = 1) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1 with features of about `scale_px`."""
    length_px = scale_px * stretch
    rows, columns = int(np.ceil(shape[0] / scale_px)) + 3, int(np.ceil(shape[1] / length_px)) + 3
    coarse = rng.standard_normal((rows, columns))
    size = (round(columns * length_px), round(rows * scale_px))
    fine = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)[: shape[0], : shape[1]]
    return (fine - coarse.mean()) / (fine.std() + 1e-6)


def _texture(rng: np.random.Generator, shape: Fields, surface: _Surface) -> np.ndarray:
    """Grain at several scales, aggregate and pin holes."""
    kind = surface.kind
    octaves = np.stack([_noise(rng, shape, scale, kind.stretch) for scale in _GRAIN_SCALES_PX], axis=-1)
    grain = octaves @ np.array(kind.weights) / np.linalg.norm(kind.weights)
    stones = np.tanh(2 * _noise(rng, shape, 3.5)) * _noise(rng, shape, 3)
    field = 1 + surface.grain * (grain + kind.stones * stones)
    pores = _blobs(rng, shape, kind.pores, radius_px=(0.6, 1.5))
    return np.maximum(field, 0.15) * (1 - 3 * surface.grain * pores).clip(0.3)


def _lighting(rng: np.random.Generator, shape: Fields) -> np.ndarray:
    """A lamp to one side, and a little unevenness."""
    slope = _along(shape, rng.uniform(0, 2 * np.pi)) / max(shape)
    return 1 + rng.uniform(0.05, 0.4) * slope + 0.05 * _noise(rng, shape, max(shape) / 2)


def _along(shape: Fields, angle: float, centre: tuple[float, float] | None = None) -> np.ndarray:
    """Distance in px of each pixel from `centre` (x, y; default the middle), measured along `angle`."""
    x0, y0 = centre or (shape[1] / 2, shape[0] / 2)
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)


def _place(rng: np.random.Generator, shape: Fields) -> tuple[float, float]:
    return rng.uniform(0, shape[1]), rng.uniform(0, shape[0])


def _distractors(rng: np.random.Generator, shape: Fields, grain: float) -> list[np.ndarray]:
    """What lies on, or was cut into, the surface of positives and negatives alike."""
    sides = (shape[0] * shape[1]) ** 0.5 / _REFERENCE_SIDE_PX
    stain, oil = _Blot((12, 30), (0.1, 0.3), 0.25), _Blot((3, 9), (0.3, 0.55), 0.1)
    fields = [_shadow(rng, shape) for _ in range(rng.integers(2))]
    fields += [_tyre_mark(rng, shape) for _ in range(rng.poisson(0.25))]
    fields += [_blot(rng, shape, stain) for _ in range(rng.poisson(0.8 * sides))]
    fields += [_blot(rng, shape, oil) for _ in range(rng.poisson(1.2 * sides))]
    fields += [_joint(rng, shape, grain) for _ in range(1 + rng.poisson(1.4 * sides))]
    fields += [_scratch(rng, shape, grain) for _ in range(rng.poisson(1.5 * sides))]
    specks = _blobs(rng, shape, 18, radius_px=(2, 6))  # leaves, pebbles, tar
    return [*fields, 1 - _depth(rng, grain, 6.5, 10.0) * specks]


def _shadow(rng: np.random.Generator, shape: Fields) -> np.ndarray:
    """The edge of a shadow that falls across the image, sharp or soft."""
    edge = _along(shape, rng.uniform(0, 2 * np.pi), _place(rng, shape)) + 4 * _noise(rng, shape, 40)
    return 1 - rng.uniform(0.2, 0.4) / (1 + np.exp(-np.clip(edge / rng.uniform(0.8, 5), -30, 30)))


def _blot(rng: np.random.Generator, shape: Fields, blot: _Blot) -> np.ndarray:
    """A stain or spot of irregular outline."""
    centre, radius = _place(rng, shape), rng.uniform(*blot.radius_px)
    distance = np.hypot(_along(shape, 0, centre), _along(shape, np.pi / 2, centre)) / radius
    outline = distance + 0.25 * _noise(rng, shape, radius * 0.8) - 1
    return 1 - rng.uniform(*blot.depth) / (1 + np.exp(np.clip(outline / blot.soft * 2, -30, 30)))


def _tyre_mark(rng: np.random.Generator, shape: Fields) -> np.ndarray:
    """A worn band of rubber with the grooves of its tread."""
    angle, centre = rng.uniform(0, np.pi), _place(rng, shape)
    bend = rng.uniform(-1e-3, 1e-3) * _along(shape, angle + np.pi / 2, centre) ** 2
    across = _along(shape, angle, centre) + bend
    half_px, groove_px = rng.uniform(8, 16), rng.uniform(6, 9)
    band = 1 / (1 + np.exp(np.clip((np.abs(across) - half_px) / 1.5, -30, 30)))
    tread = 0.65 + 0.35 * np.cos(2 * np.pi * across / groove_px)
    worn = (0.7 + 0.3 * _noise(rng, shape, 12)).clip(0, 1)
    return 1 - rng.uniform(0.2, 0.4) * band * tread * worn


def _blobs(rng: np.random.Generator, shape: Fields, mean: float, radius_px: tuple[float, float]) -> np.ndarray:
    """Coverage, 0 to 1, by small ragged discs; `mean` is how many there are on the reference square."""
    canvas = _canvas(shape)
    for _ in range(rng.poisson(mean * shape[0] * shape[1] / _REFERENCE_SIDE_PX**2)):
        angles = np.linspace(0, 2 * np.pi, 9)[:-1] + rng.uniform(0, 2 * np.pi)
        radii = rng.uniform(*radius_px) * rng.uniform(0.6, 1.2, 8)
        squash = np.array([1, rng.uniform(0.5, 1)])
        outline = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1) * squash + _place(rng, shape)
        cv2.fillPoly(canvas, [np.round(outline * _SUPERSAMPLING).astype(np.int32)], 255)
    return _shrink(canvas)


def _joint(rng: np.random.Generator, shape: Fields, grain: float) -> np.ndarray:
    """A joint, saw cut or cable: right across the image, straight or gently bent, of one width and depth."""
    angle, reach = rng.uniform(0, 2 * np.pi), float(sum(shape))
    bend = rng.choice([0.0, rng.uniform(-0.25, 0.25)]) / max(shape)
    t = np.linspace(-reach, reach, 200)
    direction, normal = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    path = _place(rng, shape) + t[:, None] * direction + (bend * t**2)[:, None] * normal
    canvas = _canvas(shape)
    _draw(canvas, path, np.full(len(t), rng.uniform(4, 10)))
    return 1 - _depth(rng, grain, 6.5, 10.0) * _shrink(canvas)


def _scratch(rng: np.random.Generator, shape: Fields, grain: float) -> np.ndarray:
    """A short bright line."""
    angle, half = rng.uniform(0, np.pi), rng.uniform(8, 40)
    ray = half * np.array([np.cos(angle), np.sin(angle)])
    middle = np.array(_place(rng, shape))
    canvas = _canvas(shape)
    _draw(canvas, np.stack([middle - ray, middle + ray]), np.full(2, rng.uniform(0.7, 1.8)))
    return 1 + _depth(rng, grain, 2, 4) * _shrink(canvas)


def _depth(rng: np.random.Generator, grain: float, low: float, high: float) -> float:
    """Contrast in multiples of the grain that it has to stand out from, kept visible and above black."""
    return float(np.clip(rng.uniform(low, high) * grain, 0.25, 0.75))


def _crack(rng: np.random.Generator, shape: Fields, grain: float) -> tuple[np.ndarray, np.ndarray]:
    """The field of a crack with its branches, and the mask of the pixels it covers by half or more."""
    covered, strength = _canvas(shape), _canvas(shape)
    side = rng.integers(4)
    inside = np.array([shape[1], shape[0]]) * rng.uniform(0.3, 0.7, 2)
    start = np.array([shape[1], shape[0]]) * [(0.02, 0.5), (0.98, 0.5), (0.5, 0.02), (0.5, 0.98)][side]
    start = start + rng.uniform(-0.3, 0.3, 2) * np.array([shape[1] * (side > 1), shape[0] * (side < 2)])
    heading = float(np.arctan2(*(inside - start)[::-1]))
    length_px, width_px = rng.uniform(0.7, 1.1) * max(shape), rng.uniform(2.9, 3.7)
    _grow(rng, covered, strength, start, heading, length_px, width_px, 0)
    share, dark = _shrink(covered), _shrink(strength)
    field = 1 - _depth(rng, grain, 5.5, 7.0) * dark
    if rng.random() < 0.9:  # spalled edges that catch the light
        edge = (2 * cv2.GaussianBlur(share, (0, 0), 1.5)).clip(0, 1) * (1 - share)
        field = field + rng.uniform(2, 3.5) * grain * edge
    return field, (share >= 0.5).astype(np.uint8)


def _grow(
    rng: np.random.Generator,
    covered: np.ndarray,
    strength: np.ndarray,
    start: np.ndarray,
    heading: float,
    length_px: float,
    width_px: float,
    order: int,
) -> None:
    """Walks one branch, draws it, and lets it fork; `order` counts the forks behind it."""
    steps = max(4, int(length_px / _STEP_PX))
    drift = np.cumsum(rng.normal(0, 0.10, steps))  # where it tends to
    kinks = np.repeat(rng.normal(0, 0.7, steps), rng.integers(1, 5, steps))[:steps]  # around grains
    angles = heading + drift + kinks
    path = start + _STEP_PX * np.cumsum(np.stack([np.cos(angles), np.sin(angles)], 1), 0)
    wobble = np.convolve(rng.normal(0, 0.9, steps + 4), np.ones(5) / 5, "valid")
    taper = np.linspace(1, 0.75, steps)
    widths = np.clip(width_px * taper * np.exp(wobble), *_CRACK_WIDTH_PX)
    fade = np.convolve(rng.normal(0.8, 0.5, steps + 10), np.ones(11) / 11, "valid")
    _draw(covered, path, widths)
    _draw(strength, path, widths, np.clip(fade, _FAINTEST, 1))
    for fork in np.flatnonzero(rng.random(steps) < 0.035) if order < 2 else ():
        turn = rng.choice([-1, 1]) * rng.uniform(0.5, 1.2)
        away, rest_px = heading + drift[fork] + turn, length_px * rng.uniform(0.15, 0.45)
        _grow(rng, covered, strength, path[fork], away, rest_px, width_px * 0.85, order + 1)


def _canvas(shape: Fields) -> np.ndarray:
    return np.zeros((shape[0] * _SUPERSAMPLING, shape[1] * _SUPERSAMPLING), np.uint8)


def _draw(canvas: np.ndarray, path: np.ndarray, widths: np.ndarray, values: np.ndarray | None = None) -> None:
    """A line through `path` (x, y in px) whose width and value (0 to 1) change along it."""
    points = np.round(path * _SUPERSAMPLING).astype(int).tolist()
    for i in range(len(points) - 1):
        value = 255 if values is None else round(255 * float(values[i]))
        cv2.line(canvas, points[i], points[i + 1], value, max(1, round(float(widths[i]) * _SUPERSAMPLING)))


def _shrink(canvas: np.ndarray) -> np.ndarray:
    size = (canvas.shape[1] // _SUPERSAMPLING, canvas.shape[0] // _SUPERSAMPLING)
    return cv2.resize(canvas, size, interpolation=cv2.INTER_AREA).astype(float) / 255


def write(
    directory: Path,
    *,
    count: int = 180,
    positive_share: float = 2 / 3,
    height: int = 128,
    width: int = 128,
    seed: int = 0,
) -> None:
    """Writes images/NAME.png, masks/NAME.png (0/255) and index.csv (name, group, positive, crack_pixels).

    Images of one group, one to three, are of one surface and belong on one side of a split. The directory
    appears complete or not at all.
    """
    target = Path(directory).resolve()
    _refuse(target, count, positive_share, height, width)
    rng = np.random.default_rng(seed)
    positive = rng.permutation(count) < round(count * positive_share)
    groups = np.repeat(np.arange(count), rng.integers(1, _LARGEST_GROUP + 1, count))[:count]
    scene_seeds, surface_seeds = rng.integers(2**62, size=(2, count)).tolist()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        root = Path(temporary) / target.name
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)
        with (root / "index.csv").open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["name", "group", "positive", "crack_pixels"])
            for i, group in enumerate(groups.tolist()):
                image, mask = scene(scene_seeds[i], bool(positive[i]), height, width, surface_seeds[group])
                _save(root / "images" / f"{i:04d}.png", image[..., ::-1])  # OpenCV's order is blue first
                _save(root / "masks" / f"{i:04d}.png", mask * 255)
                rows.writerow([f"{i:04d}", f"surface_{group:04d}", int(positive[i]), int(mask.sum())])
        root.rename(target)


def _refuse(target: Path, count: int, positive_share: float, height: int, width: int) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"a synthetic set needs a new or empty directory, but {target} is in use; name another")
    for name, value in (("height", height), ("width", width)):
        if value < _SMALLEST_PX or value % _STRIDE_PX:
            better = max(_SMALLEST_PX, -(-value // _STRIDE_PX) * _STRIDE_PX)
            raise ValueError(
                f"image {name} must be a multiple of {_STRIDE_PX} px (network stride) and at least "
                f"{_SMALLEST_PX} px, but is {value} px; use {better}"
            )
    if count < 1:
        raise ValueError(f"count must be at least 1 image, but is {count}; leave it out for the default")
    if not 0 <= positive_share <= 1:
        raise ValueError(f"positive_share must lie in [0, 1], but is {positive_share}; for 60 % give 0.6")


def _save(path: Path, pixels: np.ndarray) -> None:
    encoded, data = cv2.imencode(".png", np.ascontiguousarray(pixels))
    if not encoded:
        raise OSError(f"OpenCV could not encode {path}")
    path.write_bytes(data.tobytes())

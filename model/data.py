"""From files to batches: each split is decoded once a node into memory-mapped arrays that all trials share.

N images of a split, H x W px of the network's input.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch
from numpy.lib.format import open_memmap

from model.arrays import Array, Bools, Floats, Ints
from model.augment import augmentation
from model.config import RunConfig
from model.files import locked
from model.inspection import Read, decode_image, decode_mask, digest, resize_image
from model.losses import distance_weight
from model.sample import Batch, Rle, Sample, Supervision

_NAME_LENGTH = 24
"""hex digits of a cache's folder"""

_USED = "used"
"""A file whose time says when a cache was last opened."""

_FORMAT = 2
"""Part of a cache's name: raise it when what is stored changes."""

_SPARE_BATCHES = 3
"""of those made ahead: one that is copied, one that is due, one that waits"""

_FILES_AT_ONCE = 32
"""So many are read at once, for each may wait for a network; no more are decoded than there are cores."""


def cache_root() -> Path:
    """Where decoded splits lie: $SEGDEC_TUNER_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segdec-tuner"
    return Path(os.environ.get("SEGDEC_TUNER_CACHE") or default)


def cache_limit() -> int:
    """Bytes that the cache may hold: $SEGDEC_TUNER_CACHE_GIB, or 50 GiB."""
    return int(float(os.environ.get("SEGDEC_TUNER_CACHE_GIB") or 50) * 2**30)


@dataclass(frozen=True)
class Rows:
    """Some rows of a memory-mapped array, which are read when they are asked for: to index the array by all of them at
    once would copy them into memory."""

    array: Array | Rows
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> Array:
        found: Array = self.array[self.rows[which]]
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.array.shape[1:]


@dataclass(frozen=True)
class Cache:
    """One split, decoded and resized. The label and the kind of supervision come from the samples."""

    samples: list[Sample]
    directory: Path
    images: Array | Rows
    """(N, H, W, 3) uint8 RGB, memory-mapped"""
    masks: Array | Rows
    """(N, H, W) uint8 0/1, memory-mapped: the undilated truth that every trial is scored against"""
    original_sizes: Ints
    """(N, 2) height and width of the files, px"""
    use: IO[str] | None = None
    """an open file whose lock keeps the cache from being removed"""
    read: Read = Path.read_bytes
    """how the samples' files are read, for the masks are looked at again"""
    whole: Cache | None = None
    """the cache of which this one is a part"""

    def part(self, rows: Sequence[int], samples: list[Sample]) -> Cache:
        """Some rows of it as a cache of their own; `samples` are theirs, maybe trained without their masks. Nothing is
        copied, and what is made of the masks is made once for all parts."""
        mine = np.asarray(rows, np.int64)
        images, masks, sizes = Rows(self.images, mine), Rows(self.masks, mine), self.original_sizes[mine]
        return replace(self, samples=samples, images=images, masks=masks, original_sizes=sizes, whole=self)

    @cached_property
    def positive(self) -> Bools:
        """(N,) image labels."""
        return np.array([sample.positive for sample in self.samples])

    @cached_property
    def segmented(self) -> Bools:
        """(N,) whether an image is trained with its mask (negatives: with the empty one)."""
        return np.array([sample.supervision is Supervision.PIXEL for sample in self.samples])

    def targets(self, size: int) -> Array | Rows:
        """(N, H, W) uint8: the truth widened by a square of `size` px of the original, memory-mapped."""
        if size == 1:
            return self.masks
        if self.whole is not None and isinstance(self.masks, Rows):
            return replace(self.masks, array=self.whole.targets(size))
        path = self.directory / f"dilated_{size}.npy"
        with locked(self.directory / "dilate.lock"):
            if not path.exists():
                _write_dilated(path, self.samples, self.masks.shape[1:], size, self.read)
        return np.load(path, mmap_mode="r", allow_pickle=False)


def open_cache(
    samples: list[Sample], height: int, width: int, root: Path | None = None, read: Read = Path.read_bytes
) -> Cache:
    """The cache of a split at an input size; decodes the files, which `read` reads, if this node has not yet.

    Safe between processes: one builds, the others wait, and what a dead one left is removed. What was opened longest
    ago makes room for a new one.
    """
    directory = _directory(samples, height, width, root)
    with _building(directory):
        for _ in _build(directory, samples, (height, width), read):
            pass
        (directory / _USED).touch()
        use = _use_file(directory).open("a")
        fcntl.flock(use, fcntl.LOCK_SH)  # for as long as the cache is open: nobody removes it
    images, masks = (np.load(directory / n, mmap_mode="r", allow_pickle=False) for n in ("images.npy", "masks.npy"))
    return Cache(samples, directory, images, masks, np.load(directory / "sizes.npy", allow_pickle=False), use, read)


def build_cache(
    samples: list[Sample], height: int, width: int, root: Path | None = None, read: Read = Path.read_bytes
) -> Iterator[int]:
    """Makes the cache of a split ready to be opened; yields how many images are decoded, or nothing where this node had
    it. Building ends where the iterator is closed before its end."""
    directory = _directory(samples, height, width, root)
    with _building(directory):
        yield from _build(directory, samples, (height, width), read)


def is_cached(samples: list[Sample], height: int, width: int, root: Path | None = None) -> bool:
    """Whether this node has the cache of a split."""
    return _directory(samples, height, width, root).exists()


def _directory(samples: list[Sample], height: int, width: int, root: Path | None) -> Path:
    key = hashlib.sha256(json.dumps([_FORMAT, height, width, [(s.digest, s.mask_digest) for s in samples]]).encode())
    return (root or cache_root()) / key.hexdigest()[:_NAME_LENGTH]


@contextmanager
def _building(directory: Path) -> Iterator[None]:
    """The one process that may make a cache, or open it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.with_name(f"{directory.name}.lock")):
        yield


def _build(directory: Path, samples: list[Sample], size: tuple[int, int], read: Read) -> Iterator[int]:
    if directory.exists():
        return
    root = directory.parent
    for left in root.glob(f".{directory.name}-*"):  # by a process that died: this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(dir=root, prefix=f".{directory.name}-"))
    try:
        yield from _decode(building, samples, size, read)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    make_room(root, cache_limit(), keep=directory)


def cached(root: Path) -> list[tuple[Path, int]]:
    """The decoded splits of this node with their bytes, the one opened longest ago first."""
    found = [path for path in root.glob("[0-9a-f]" * _NAME_LENGTH) if (path / "images.npy").is_file()]
    found.sort(key=lambda path: (path / _USED).stat().st_mtime if (path / _USED).exists() else 0)
    return [(path, sum(file.stat().st_size for file in path.iterdir())) for path in found]


def make_room(root: Path, limit_bytes: int, keep: Path | None = None) -> list[Path]:
    """Removes what was opened longest ago until the rest fits; what is gone.

    What some process has open stays.
    """
    entries = cached(root)
    total = sum(size for _, size in entries)
    gone = []
    for path, size in entries:
        if total <= limit_bytes:
            break
        if path != keep and _remove_unused(path):
            gone.append(path)
            total -= size
    return gone


def _remove_unused(directory: Path) -> bool:
    """Removes a cache unless a process has it open; lock files stay, since others may wait at them."""
    with _use_file(directory).open("a") as use:
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(directory, ignore_errors=True)
        return True


def _use_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.use")


def _decode(building: Path, samples: list[Sample], size: tuple[int, int], read: Read) -> Iterator[int]:
    """Writes the arrays of a cache; yields how many images are done."""
    images = _array(building / "images.npy", (len(samples), *size, 3))
    masks = _array(building / "masks.npy", (len(samples), *size))
    sizes = np.empty((len(samples), 2), np.int64)

    def decode(n: int, image: bytes, mask: bytes) -> None:
        sample = samples[n]
        pixels = decode_image(sample.image, lambda _: image)
        images[n] = resize_image(pixels, size)
        sizes[n] = pixels.shape[:2]
        if sample.mask is not None:
            masks[n] = resize_mask(decode_mask(sample.mask, lambda _: mask), size)

    def fetch(sample: Sample) -> tuple[bytes, bytes]:
        return _bytes(sample.image, sample.digest, read), _bytes(sample.mask, sample.mask_digest, read)

    yield from _each(samples, fetch, decode)
    for array in (images, masks):
        array.flush()
    np.save(building / "sizes.npy", sizes, allow_pickle=False)


def _write_dilated(path: Path, samples: list[Sample], shape: tuple[int, ...], size: int, read: Read) -> None:
    """Masks dilated at their original size, then resized. A finished file appears at once."""
    building = path.with_suffix(".part")
    masks = _array(building, (len(samples), *shape))

    def decode(n: int, mask: bytes) -> None:
        if (source := samples[n].mask) is not None:
            masks[n] = resize_mask(dilate(decode_mask(source, lambda _: mask), size), shape)

    for _ in _each(samples, lambda sample: (_bytes(sample.mask, sample.mask_digest, read),), decode):
        pass
    masks.flush()
    building.rename(path)


def _array(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    """Zeros in a file, memory-mapped. OSError if the disk has no room: a write to memory that finds none ends the
    process."""
    array: np.memmap[Any, np.dtype[np.uint8]] = open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _each(
    samples: list[Sample], fetch: Callable[[Sample], tuple[bytes, ...]], decode: Callable[..., None]
) -> Iterator[int]:
    """Calls `decode(n, *fetch(sample))` for every sample, on all cores; yields how many are done, in their order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = threading.Semaphore(cores)

    def work(n: int) -> None:
        found = fetch(samples[n])
        with free:  # large photos fill the memory
            decode(n, *found)

    with ThreadPoolExecutor(max(cores, _FILES_AT_ONCE)) as pool:  # OpenCV and hashing release the interpreter's lock
        for done, _ in enumerate(pool.map(work, range(len(samples))), start=1):
            yield done


def _bytes(file: Path | Rle | None, expected: str, read: Read) -> bytes:
    """A file's bytes; none of what has no file of its own. ValueError unless they are those that the cache is named
    after: another node may see other files."""
    data = b"" if file is None or isinstance(file, Rle) else read(file)
    if file is not None and digest(file, lambda _: data) != expected:
        raise ValueError(f"{file}: has other bytes than the run was created with; restore it on every node")
    return data


def resize_mask(mask_HW: Array, size: tuple[int, ...]) -> Array:
    """A 0/1 mask at another size. Thin lines survive any shrinking.

    A pixel is set when at least half of what a line of one original pixel covers at most is covered. A plain cut at
    one half would lose three quarters of such lines at a factor of 8; keeping every touched pixel would widen all.
    """
    if mask_HW.shape == tuple(size):
        return mask_HW
    scale = min(1.0, size[0] / mask_HW.shape[0], size[1] / mask_HW.shape[1])
    coverage = cv2.resize(mask_HW.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return (coverage >= 0.499 * scale).astype(np.uint8)


def dilate(mask_HW: Array, size: int) -> Array:
    """The mask widened by a `size` x `size` square of ones, METHOD's dilation; 1 leaves it as it is."""
    return cv2.dilate(np.asarray(mask_HW, np.uint8), np.ones((size, size), np.uint8))


def negative_probability(use_counts: Array) -> Floats:
    """Chance of each negative to be drawn, from how often it was used: the less, the likelier ([1]).

    u = 1 - f / max(f), shifted so that its median is 1, to the power 4 ln N.
    """
    use = np.asarray(use_counts, np.float64)
    u = 1 - use / max(use.max(), 1)
    u = u - np.median(u) + 1
    p = u ** (4 * np.log(len(u)))
    return np.asarray(p / p.sum())


def epoch_order(positive_N: Bools, epoch: int, seed: int, frequency_sampling: bool = True) -> Ints:
    """The images of an epoch (counted from 0) in their order: every positive, and as many negatives if there are.

    The first epoch draws negatives evenly, later ones by how often each was used. The use counts are those of the
    epochs before, drawn again here: so the order depends on nothing but the arguments, whoever loads and resumes.
    """
    positives, negatives = np.flatnonzero(positive_N), np.flatnonzero(~positive_N)
    take = min(len(positives), len(negatives))
    use = np.zeros(len(negatives))
    drawn = np.arange(len(negatives))
    for past in range(epoch + 1):
        rng = np.random.default_rng([seed, past])
        if take < len(negatives):
            weighted = frequency_sampling and past > 0
            p = negative_probability(use) if weighted else None
            drawn = rng.choice(len(negatives), take, replace=False, p=p)
            use[drawn] += 1
    return rng.permutation(np.concatenate([positives, negatives[drawn]]))


def batches(
    cache: Cache, config: RunConfig, epoch: int, device: torch.device, hard_rows: Array | None = None
) -> Iterator[Batch]:
    """The training batches of an epoch (counted from 0), in the same order and augmented alike whenever asked."""
    load = loader(cache, config, epoch, device)
    return map(load, step_rows(cache, config, epoch, hard_rows))


def step_rows(cache: Cache, config: RunConfig, epoch: int, hard_rows: Array | None = None) -> Iterator[Ints]:
    """The rows of each step of an epoch.

    With `hard_rows`, `hard_mining_places` of them are added to each batch, drawn without repeating while they last.
    """
    order = epoch_order(cache.positive, epoch, config.seed, config.frequency_sampling)
    for start in range(0, len(order), config.batch_size):
        rows = order[start : start + config.batch_size]
        if hard_rows is not None and len(hard_rows):
            rng = np.random.default_rng([config.seed, epoch, start])
            rows = np.concatenate([rows, rng.permutation(hard_rows)[: config.hard_mining_places]])
        yield rows


@dataclass(frozen=True)
class HostBatch:
    """A batch in the memory of the host, small as it is stored; page-locked where it is for a GPU."""

    images_BHWC: torch.Tensor
    """uint8 RGB"""
    targets_BHW: torch.Tensor
    """uint8, 0 or 1: the dilated masks; zeros where there is none"""
    labels_B: torch.Tensor
    """float32, 0 or 1"""
    segmented_B: torch.Tensor
    """float32, 1 for pixel supervision"""
    weights_BHW: torch.Tensor | None
    """float32 loss weights, or None for 1"""
    rows: Ints
    """(B,) where the images stand in their split"""
    release: Callable[[torch.cuda.Event | None], None]
    """Gives its memory back for a batch to come, which is written when the event is over: pass `queued_so_far()` when
    the copies of this one are queued. Without one, this batch is over at once."""


def to_device(host: HostBatch, device: torch.device) -> Batch:
    """A batch as a training step sees it. Where the host's memory is page-locked, the copies are only queued."""

    def there(values: torch.Tensor) -> torch.Tensor:
        return values.to(device, non_blocking=True)

    return Batch(
        images_BCHW=to_input(host.images_BHWC, device),
        targets_B1HW=there(host.targets_BHW)[:, None].float(),
        weights_B1HW=None if host.weights_BHW is None else there(host.weights_BHW)[:, None].float(),
        labels_B1=there(host.labels_B)[:, None],
        segmented_B=there(host.segmented_B),
        rows=host.rows,
    )


def loader(cache: Cache, config: RunConfig, epoch: int, device: torch.device) -> Callable[[Ints], Batch]:
    """A function that makes a batch of rows; what it makes of an image depends on the epoch and on no other image."""
    fill, memory = _filling(cache, config, epoch), _memory(cache, config)

    def load(rows: Ints) -> Batch:
        arrays = memory(len(rows), False)
        for place, row in enumerate(rows):
            fill(arrays, place, int(row))
        return to_device(_host_batch(rows, arrays, lambda _: None), device)

    return load


def prefetched(
    cache: Cache, config: RunConfig, epoch: int, device: torch.device, steps: Iterable[Ints], threads: int | None = None
) -> Generator[Batch]:
    """The batches of some steps. On a GPU they are made by threads ahead of time and copied while it computes; on a
    processor here and now, for threads would take it from the training.

    Close it (`contextlib.closing`) if it may not come to its end.
    """
    if device.type != "cuda":
        yield from map(loader(cache, config, epoch, device), steps)
        return
    with closing(host_batches(cache, config, epoch, steps, threads, pinned=True)) as made:
        for host in made:
            batch = to_device(host, device)
            host.release(queued_so_far())
            yield batch


def queued_so_far() -> torch.cuda.Event:
    """Over when the device has done what the current stream holds now; who waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


def host_batches(
    cache: Cache,
    config: RunConfig,
    epoch: int,
    steps: Iterable[Ints],
    threads: int | None = None,
    pinned: bool = False,
) -> Generator[HostBatch]:
    """The batches of some steps, made by threads (as many as torch computes with, if not said) ahead of time in bounded
    memory: `release` each. An error in a thread is raised where its batch is due. Close it if it may not come to its
    end."""
    made = _made_ahead(steps, _memory(cache, config), _filling(cache, config, epoch), threads, pinned)
    with closing(made):
        for rows, arrays, release in made:
            yield _host_batch(rows, arrays, release)


def input_batches(images_NHWC: Array | Rows, device: torch.device, batch_size: int) -> Iterator[torch.Tensor]:
    """Images in their order as the networks take them; for a GPU read by threads ahead of time."""
    rows = np.arange(len(images_NHWC))
    steps = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if device.type != "cuda":
        for step in steps:
            yield to_input(images_NHWC[step[0] : step[-1] + 1], device)
        return
    shape = images_NHWC.shape[1:]

    def memory(size: int, pinned: bool) -> _Arrays:
        return (torch.empty((size, *shape), dtype=torch.uint8, pin_memory=pinned),)

    def fill(arrays: _Arrays, place: int, row: int) -> None:
        arrays[0].numpy()[place] = images_NHWC[row]

    with closing(_made_ahead(steps, memory, fill, None, pinned=True)) as made:
        for _, (images,), release in made:
            there = to_input(images, device)
            release(queued_so_far())
            yield there


def to_input(images_BHWC: Array | torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 RGB images as the networks take them: (B, 3, H, W) float32 in 0..1, no mean or deviation removed."""
    if not isinstance(images_BHWC, torch.Tensor):
        images_BHWC = torch.from_numpy(np.array(images_BHWC))  # torch wants memory that it may write to
    return images_BHWC.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


_Arrays = tuple[torch.Tensor, ...]
"""images, targets, labels, whether segmented and, where they are weighted, weights of so many places"""

_Memory = Callable[[int, bool], _Arrays]
"""Makes them for a number of places, page-locked or not."""

_Fill = Callable[[_Arrays, int, int], None]
"""Writes what belongs to a row to a place in them."""


def _memory(cache: Cache, config: RunConfig) -> _Memory:
    height_width = cache.images.shape[1:3]
    byte, real = torch.uint8, torch.float32
    kinds = [((*height_width, 3), byte), (height_width, byte), ((), real), ((), real)]
    if config.weighted_loss:
        kinds.append((height_width, real))
    return lambda size, pinned: tuple(torch.empty((size, *of), dtype=kind, pin_memory=pinned) for of, kind in kinds)


def _filling(cache: Cache, config: RunConfig, epoch: int) -> _Fill:
    """What an image comes to depends on the epoch and on nothing else; it may be asked in any thread."""
    masks, augment = cache.targets(config.dilate), augmentation(config)

    def fill(arrays: _Arrays, place: int, row: int) -> None:
        images, targets, labels, segmented, *weights = (array.numpy() for array in arrays)
        image, mask = np.asarray(cache.images[row]), np.asarray(masks[row])
        augment(image, mask, (config.seed, epoch, row), images[place], targets[place])
        labels[place], segmented[place] = cache.positive[row], cache.segmented[row]
        targets[place] *= cache.segmented[row]
        if weights:
            weights[0][place] = distance_weight(
                targets[place], config.weight_power, config.weight_maximum, config.weight_per
            )

    return fill


def _host_batch(rows: Ints, arrays: _Arrays, release: Callable[[torch.cuda.Event | None], None]) -> HostBatch:
    images, targets, labels, segmented, *weights = arrays
    return HostBatch(images, targets, labels, segmented, weights[0] if weights else None, rows, release)


class _Slot:
    """Memory of a batch, used again and again."""

    def __init__(self) -> None:
        self.arrays: _Arrays = ()
        self.copied: torch.cuda.Event | None = None
        """after which it may be written to"""

    def grow(self, size: int, memory: _Memory, pinned: bool) -> _Arrays:
        """Room for so many images."""
        if not self.arrays or len(self.arrays[0]) < size:
            self.arrays = memory(size, pinned)
        return tuple(array[:size] for array in self.arrays)


def _made_ahead(
    steps: Iterable[Ints], memory: _Memory, fill: _Fill, threads: int | None, pinned: bool
) -> Generator[tuple[Ints, _Arrays, Callable[[torch.cuda.Event | None], None]]]:
    """The rows of each step with what `fill` makes of them, in their order, and a function that gives the memory back;
    so many ahead that each thread has an image to make while one batch is copied and one is waited for."""
    threads = threads or torch.get_num_threads()
    waiting = iter(steps)
    free: deque[_Slot] = deque()
    made: deque[tuple[Ints, _Arrays, _Slot, list[Future[None]]]] = deque()
    slots = 0
    pool = ThreadPoolExecutor(threads, "images")

    def part(rows: Ints, places: Ints, arrays: _Arrays, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for place in places:
            fill(arrays, int(place), int(rows[place]))

    try:
        rows = next(waiting, None)
        while rows is not None or made:
            while rows is not None and (free or slots < _SPARE_BATCHES + -(-threads // max(1, len(rows)))):
                if not free:
                    slots += 1
                slot = free.popleft() if free else _Slot()
                arrays = slot.grow(len(rows), memory, pinned)
                parts = np.array_split(np.arange(len(rows)), min(threads, max(1, len(rows))))
                made.append((rows, arrays, slot, [pool.submit(part, rows, p, arrays, slot.copied) for p in parts]))
                rows = next(waiting, None)
            if not made:
                raise RuntimeError(f"all {slots} batches that are made ahead are still held; release each of them")
            now, arrays, slot, parts_made = made.popleft()
            for one in parts_made:
                one.result()

            def release(copied: torch.cuda.Event | None, slot: _Slot = slot) -> None:
                assert slot not in free, "a batch is released once"
                slot.copied = copied
                free.append(slot)

            yield now, arrays, release
    finally:
        pool.shutdown(cancel_futures=True)

import json
import multiprocessing
import os
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import data, layouts, splits, synthetic
from model.config import RunConfig
from model.inspection import digest
from model.sample import Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("set") / "synthetic"
    synthetic.write(path, count=12, height=64, width=128)
    return path


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[Sample]:
    return layouts.read(folder)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_node_with_other_files_is_told_which(tmp_path: Path, kind: str) -> None:
    synthetic.write(tmp_path / "set", count=6, height=64, width=128)
    samples = layouts.read(tmp_path / "set")
    file = getattr(samples[3], kind)
    file.write_bytes(getattr(samples[4], kind).read_bytes())
    with pytest.raises(ValueError, match=f"{file}: has other bytes than the run was created with"):
        data.open_cache(samples, 64, 128, tmp_path / "cache")
    assert not data.cached(tmp_path / "cache")


def test_dilations_equal_the_public_implementation(reference: Path) -> None:
    with np.load(reference / "masks.npz", allow_pickle=False) as golden:
        for size in (1, 3, 5, 7, 9, 15):
            np.testing.assert_array_equal(data.dilate(golden["mask"] > 0, size), golden[f"dilate_{size}"] > 0)


def test_sampling_equals_the_public_implementation(reference: Path) -> None:
    golden = json.loads((reference / "method.json").read_text())["frequency_of_use"]
    np.testing.assert_allclose(data.negative_probability(np.array(golden["counts"])), golden["probability"], rtol=1e-9)


def test_golden_numbers_notice_a_changed_definition(reference: Path, monkeypatch) -> None:
    golden = json.loads((reference / "method.json").read_text())["frequency_of_use"]
    counts = np.array(golden["counts"])
    monkeypatch.setattr(data.np, "median", np.mean)
    assert not np.allclose(data.negative_probability(counts), golden["probability"], rtol=1e-3)
    with np.load(reference / "masks.npz", allow_pickle=False) as masks:
        cross = cv2.dilate(masks["mask"], cv2.getStructuringElement(cv2.MORPH_CROSS, (5, 5)))
        assert (cross != masks["dilate_5"]).any()


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 6), st.booleans())
def test_an_epoch_sees_every_positive_and_as_many_negatives(positives, negatives, epoch, frequency) -> None:
    labels = np.array([True] * positives + [False] * negatives)
    order = data.epoch_order(labels, epoch, seed=3, frequency_sampling=frequency)
    assert len(set(order.tolist())) == len(order) == positives + min(negatives, positives)
    assert labels[order].sum() == positives
    np.testing.assert_array_equal(order, data.epoch_order(labels, epoch, seed=3, frequency_sampling=frequency))


def test_frequency_sampling_uses_negatives_evenly() -> None:
    labels = np.array([True] * 5 + [False] * 20)

    def spread(frequency: bool) -> float:
        orders = [data.epoch_order(labels, epoch, 0, frequency) for epoch in range(16)]
        return float(np.bincount(np.concatenate(orders), minlength=25)[5:].std())

    assert spread(True) < 0.6 * spread(False)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("vertical", [True, False])
def test_thin_lines_survive_shrinking(factor: int, vertical: bool) -> None:
    for at in range(16):
        mask = np.zeros((64, 64), np.uint8)
        mask[16 + at, :] = 1
        small = data.resize_mask(mask.T if vertical else mask, (64 // factor, 64 // factor))
        assert small.any(axis=0 if not vertical else 1).all(), at
        assert small.sum() <= 2 * 64 // factor


def test_shrinking_keeps_areas() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[12:48, 12:48] = 1
    assert data.resize_mask(mask, (30, 30)).sum() == 18 * 18
    assert data.resize_mask(mask, (60, 60)) is mask


def test_a_cache_holds_what_the_files_hold(samples: list[Sample], tmp_path: Path) -> None:
    cache = data.open_cache(samples, 64, 128, tmp_path)
    for n, sample in enumerate(samples):
        np.testing.assert_array_equal(cache.images[n], cv2.imread(str(sample.image))[..., ::-1])
        if sample.mask:
            np.testing.assert_array_equal(cache.masks[n], cv2.imread(str(sample.mask), 0) > 127)
    wide = cache.targets(5)
    np.testing.assert_array_equal(wide[0], data.dilate(cache.masks[0], 5))
    assert not cache.images.flags.writeable


def test_a_cache_knows_the_sizes_that_the_files_had(samples: list[Sample], tmp_path: Path) -> None:
    smaller = cv2.resize(cv2.imread(str(samples[1].image)), (70, 50))
    other = replace(samples[1], image=tmp_path / "other.png", mask=None, mask_digest="")
    cv2.imwrite(str(other.image), smaller)
    other = replace(other, digest=digest(other.image))
    for _ in range(2):  # built, then opened
        cache = data.open_cache([samples[0], other], 64, 128, tmp_path / "cache")
        assert cache.original_sizes.tolist() == [[64, 128], [50, 70]]


def test_a_cache_is_made_once(samples: list[Sample], tmp_path: Path, monkeypatch) -> None:
    first = data.open_cache(samples, 64, 128, tmp_path)
    monkeypatch.setattr(data, "decode_image", None)  # decoding again would fail
    assert data.open_cache(samples, 64, 128, tmp_path).directory == first.directory
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [first.directory.name]


def _open(samples: list[Sample], root: Path) -> int:
    return int(data.open_cache(samples, 64, 128, root).targets(3).sum())


def test_processes_that_start_together_share_one_cache(samples: list[Sample], tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.starmap(_open, [(samples, tmp_path)] * 3)
    assert len(set(sums)) == 1
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_batches_are_what_the_method_trains_on(samples: list[Sample], tmp_path: Path) -> None:
    hidden = splits.keep_masks(samples, 2)
    cache = data.open_cache(hidden, 64, 128, tmp_path)
    config = RunConfig(input_height=64, input_width=128, batch_size=3, dilate=3, weighted_loss=True)
    seen = list(data.batches(cache, config, 0, torch.device("cpu")))
    assert seen[0].images_BCHW.shape == (3, 3, 64, 128)
    assert 0 <= seen[0].images_BCHW.min() < seen[0].images_BCHW.max() <= 1
    labels = torch.cat([batch.labels_B1[:, 0] for batch in seen])
    segmented = torch.cat([batch.segmented_B for batch in seen])
    assert labels.sum() == sum(sample.positive for sample in samples)
    assert (labels * segmented).sum() == 2
    assert ((1 - labels) * (1 - segmented)).sum() == 0
    for batch in seen:
        without = batch.segmented_B == 0
        assert not batch.targets_B1HW[without].any()
        assert batch.weights_B1HW.shape == batch.targets_B1HW.shape


def test_flips_move_image_and_mask_together_and_are_fixed_by_the_seed(samples: list[Sample], tmp_path: Path) -> None:
    cache = data.open_cache(samples, 64, 128, tmp_path)
    plain = RunConfig(input_height=64, input_width=128)
    flipped = RunConfig(input_height=64, input_width=128, augment_flips=True)
    device = torch.device("cpu")
    first, again = (list(data.batches(cache, flipped, 1, device)) for _ in range(2))
    still = list(data.batches(cache, plain, 1, device))
    moved = 0
    for a, b, c in zip(first, again, still, strict=True):
        torch.testing.assert_close(a.images_BCHW, b.images_BCHW, rtol=0, atol=0)
        options = [c.images_BCHW.flip(d) for d in ((), (2,), (3,), (2, 3))]
        which = next(n for n, option in enumerate(options) if torch.equal(option, a.images_BCHW))
        assert torch.equal(a.targets_B1HW, c.targets_B1HW.flip(((), (2,), (3,), (2, 3))[which]))
        moved += which > 0
    assert moved > 0


def _die_while_building(samples: list[Sample], root: Path) -> None:
    data.decode_mask = lambda *_arguments, **_named: os._exit(9)
    data.open_cache(samples, 64, 128, root)


def test_a_builder_that_died_leaves_nothing_behind(samples: list[Sample], tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_die_while_building, args=(samples, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert list(tmp_path.glob(".*-*"))
    cache = data.open_cache(samples, 64, 128, tmp_path)
    assert len(cache.images) == len(samples)
    assert not list(tmp_path.glob(".*-*"))


def test_the_cache_is_bounded_and_what_is_open_stays(samples: list[Sample], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE_GIB", "0.0005")  # half a MiB: room for one split
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("of somebody else")
    old = data.open_cache(samples, 64, 128, tmp_path)
    data.open_cache(samples[:11], 64, 128, tmp_path)
    assert old.directory in [path for path, _ in data.cached(tmp_path)]
    assert old.targets(3).any()
    old.use.close()
    data.open_cache(samples[:10], 64, 128, tmp_path).use.close()
    assert old.directory not in [path for path, _ in data.cached(tmp_path)]
    data.make_room(tmp_path, 0)
    assert (tmp_path / "precious" / "thesis.txt").exists()
    data.open_cache(samples, 64, 128, tmp_path)


def test_how_many_lines_survive_shrinking() -> None:
    """One-pixel lines at every place, in both directions, at factors 2, 4 and 8: all do."""
    for factor in (2, 4, 8):
        survive = 0
        for at in range(32):
            mask = np.zeros((32, 32), np.uint8)
            mask[at] = 1
            small = data.resize_mask(mask, (32 // factor, 32 // factor))
            survive += bool(small.any(axis=0).all())
        assert survive == 32


@pytest.mark.parametrize(
    "field",
    [{"augment_brightness": 0.3}, {"augment_color": 0.3}, {"augment_quarter_turns": True}],
    ids=lambda f: next(iter(f)),
)
def test_each_augmentation_does_its_own(tmp_path: Path, field: dict) -> None:
    """Light and colour leave the target alone; a turn moves both, and repeats with the seed."""
    synthetic.write(tmp_path / "square", count=6, height=128, width=128)
    cache = data.open_cache(layouts.read(tmp_path / "square"), 128, 128, tmp_path / "cache")
    device = torch.device("cpu")
    size = {"input_height": 128, "input_width": 128}
    still = list(data.batches(cache, RunConfig(**size), 2, device))
    first, again = (list(data.batches(cache, RunConfig(**size, **field), 2, device)) for _ in range(2))
    changed = 0
    for a, b, c in zip(first, again, still, strict=True):
        assert torch.equal(a.images_BCHW, b.images_BCHW)
        assert torch.equal(a.targets_B1HW, b.targets_B1HW)
        changed += not torch.equal(a.images_BCHW, c.images_BCHW)
        if "augment_quarter_turns" in field:
            turns = [k for k in range(4) if torch.equal(c.images_BCHW.rot90(k, (2, 3)), a.images_BCHW)]
            assert torch.equal(c.targets_B1HW.rot90(turns[0], (2, 3)), a.targets_B1HW)
        else:
            assert torch.equal(a.targets_B1HW, c.targets_B1HW)
    assert changed > 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> data.Cache:
    """Twenty images, some of whose masks are hidden."""
    folder = tmp_path_factory.mktemp("wide")
    synthetic.write(folder / "set", count=20, height=128, width=128)
    return data.open_cache(splits.keep_masks(layouts.read(folder / "set"), 3), 128, 128, folder / "cache")


EVERYTHING = RunConfig(
    input_height=128, input_width=128, batch_size=3, augment_flips=True, augment_quarter_turns=True,
    augment_brightness=0.3, augment_color=0.3, weighted_loss=True, dilate=3,
)  # fmt: skip


def threads_that_make_images() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("images")]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("config", [EVERYTHING, replace(EVERYTHING, weighted_loss=False)], ids=["weighted", "plain"])
def test_batches_made_ahead_are_those_made_one_by_one(wide: data.Cache, threads: int, config: RunConfig) -> None:
    """In the same order, to the bit, whatever the threads, and though memory is used again."""
    device = torch.device("cpu")
    steps = [*data.step_rows(wide, config, 1), np.arange(7), np.arange(1)]  # larger ones too
    load, memory = data.loader(wide, config, 1, device), set()
    with closing(data.host_batches(wide, config, 1, iter(steps), threads)) as made:
        for rows, host in zip(steps, made, strict=True):
            for ours, theirs in zip(data.to_device(host, device), load(rows), strict=True):
                if isinstance(theirs, torch.Tensor):
                    assert torch.equal(ours, theirs)
                    assert ours.stride() == theirs.stride()
                else:
                    np.testing.assert_array_equal(ours, theirs)
            memory.add(host.images_BHWC.data_ptr())
            host.release(None)
    assert len(memory) <= 2 * (data._SPARE_BATCHES + threads)
    assert not threads_that_make_images()


def test_memory_is_written_again_only_when_it_was_copied(wide: data.Cache) -> None:
    """Each batch is looked at as late as its copy may be: when the event that it was released with is waited for."""
    config = replace(EVERYTHING, batch_size=1)
    seen, expected = {}, {}

    class Copy:
        def __init__(self, n: int, host: data.HostBatch) -> None:
            self.n, self.host = n, host

        def synchronize(self) -> None:
            seen[self.n] = self.host.images_BHWC.clone()

    with closing(data.host_batches(wide, config, 0, data.step_rows(wide, config, 0), 2)) as made:
        for n, host in enumerate(made):
            expected[n] = host.images_BHWC.clone()
            host.release(Copy(n, host))
    assert len(seen) == len(expected) - data._SPARE_BATCHES - 2
    assert all(torch.equal(image, expected[n]) for n, image in seen.items())


def test_an_error_in_a_thread_is_raised_where_its_batch_is_due(wide: data.Cache) -> None:
    steps = [np.array([0, 1]), np.array([2, 99]), np.array([3, 4])]
    made = data.host_batches(wide, EVERYTHING, 0, steps, 2)
    next(made).release(None)
    with pytest.raises(IndexError, match="99"):
        next(made)
    assert not threads_that_make_images()


def test_who_stops_early_leaves_no_threads(wide: data.Cache) -> None:
    made = data.host_batches(wide, EVERYTHING, 0, data.step_rows(wide, EVERYTHING, 0), 3)
    next(made)
    assert threads_that_make_images()
    made.close()
    assert not threads_that_make_images()


def test_who_keeps_all_batches_is_told(wide: data.Cache) -> None:
    with (
        closing(data.host_batches(wide, EVERYTHING, 0, [np.arange(3)] * 9, 1)) as made,
        pytest.raises(RuntimeError, match="all 4 batches that are made ahead are still held; release each of them"),
    ):
        list(made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_given_the_same_batches(wide: data.Cache) -> None:
    there, here = torch.device("cuda", 0), torch.device("cpu")
    steps = list(data.step_rows(wide, EVERYTHING, 2)) * 3
    for ours, theirs in zip(
        data.prefetched(wide, EVERYTHING, 2, there, steps, 4),
        data.prefetched(wide, EVERYTHING, 2, here, steps),
        strict=True,
    ):
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-7)
    images = np.array(wide.images)
    inputs = torch.cat(list(data.input_batches(images, there, 3))).cpu()
    torch.testing.assert_close(inputs, data.to_input(images, here), rtol=0, atol=1e-7)

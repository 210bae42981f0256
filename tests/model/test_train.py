"""Training itself: learns, repeats to the bit, goes on as if it had not stopped."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint, data, evaluate, layouts, splits, synthetic, train
from model.centre_lines import CentreLines, trace
from model.config import RunConfig
from model.data import Cache, open_cache
from model.losses import segmentation_losses
from model.sample import Batch
from model.thresholds import Thresholds

SMALL = {"width": 0.1, "input_height": 64, "input_width": 128, "epochs": 3, "precision": "float32"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    folder = tmp_path_factory.mktemp("train")
    synthetic.write(folder / "set", count=8, height=64, width=128)
    return open_cache(layouts.read(folder / "set"), 64, 128, folder / "cache")


def weights(training: train.Training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in training.network.parameters()])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_going_on_equals_never_having_stopped(cache: Cache, tmp_path: Path, optimizer: str) -> None:
    config = RunConfig(**SMALL, optimizer=optimizer, learning_rate=0.01, augment_flips=True)
    straight = train.start(config, CPU)
    losses = list(train.fit(straight, cache))

    broken = train.start(config, CPU)
    first = next(train.fit(broken, cache))
    checkpoint.save_training(tmp_path, broken.state())
    resumed = train.start(config, CPU, checkpoint.load_training(tmp_path, CPU))
    rest = list(train.fit(resumed, cache))

    assert [first, *rest] == losses
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed.epochs_done == 3


def test_one_seed_is_one_training(cache: Cache) -> None:
    config = RunConfig(**SMALL, learning_rate=0.5, augment_flips=True, augment_brightness=0.2)
    first, second = (train.start(config, CPU) for _ in range(2))
    assert list(train.fit(first, cache)) == list(train.fit(second, cache))
    assert torch.equal(weights(first), weights(second))


def test_a_network_learns(cache: Cache) -> None:
    config = RunConfig(**SMALL | {"epochs": 6}, learning_rate=1.0)
    losses = [epoch["loss_segmentation"] for epoch in train.fit(train.start(config, CPU), cache)]
    assert losses[-1] < 0.5 * losses[0]


def test_seeds_differ_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (train.start(RunConfig(**SMALL, seed=seed), CPU) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(weights(first), weights(second))


def test_total_loss_follows_the_balance(cache: Cache) -> None:
    config = RunConfig(**SMALL, learning_rate=0.01, delta_cls_loss=0.5)
    for epoch, losses in enumerate(train.fit(train.start(config, CPU), cache)):
        share = 1 - epoch / 3
        expected = share * losses["loss_segmentation"] + (1 - share) * 0.5 * losses["loss_decision"]
        assert losses["loss_total"] == pytest.approx(expected)


def test_without_gradient_adjustment_the_decision_trains_the_trunk(cache: Cache) -> None:
    def trunk(adjusted: bool) -> torch.Tensor:
        config = RunConfig(
            **SMALL, learning_rate=0.01, delta_cls_loss=1.0, dynamic_balance=False, gradient_adjustment=adjusted
        )
        training = train.start(config, CPU)
        next(train.fit(training, cache))
        return training.network.trunk1[0].conv.weight.detach()

    assert not torch.equal(trunk(True), trunk(False))


def test_without_negatives_the_decision_is_left_alone(cache: Cache) -> None:
    rows = np.flatnonzero(cache.positive)
    positives = Cache(
        [cache.samples[n] for n in rows],
        cache.directory,
        cache.images[rows],
        cache.masks[rows],
        cache.original_sizes[rows],
    )
    training = train.start(RunConfig(**SMALL, learning_rate=0.01), CPU)
    before = training.network.decision.linear.weight.detach().clone()
    list(train.fit(training, positives))
    assert torch.equal(training.network.decision.linear.weight, before)


def test_divergence_is_an_error_at_once(cache: Cache) -> None:
    training = train.start(RunConfig(**SMALL, learning_rate=100.0, dynamic_balance=False, delta_cls_loss=1000), CPU)
    with torch.no_grad():
        training.network.segment.norm.scale.fill_(float("nan"))
    with pytest.raises(train.TrainingDiverged, match="the loss of epoch 1 is not a finite number"):
        next(train.fit(training, cache))


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_batch_is_the_mean_of_its_images_however_it_is_cut(cache: Cache, micro_batch: int, monkeypatch) -> None:
    """FeatureNorm knows no batch, so one pass gives the mean of the single images' gradients. In float64."""
    hidden = dataclasses.replace(cache, samples=splits.keep_masks(cache.samples, 2))

    def weights_after(micro: int) -> torch.Tensor:
        config = RunConfig(
            **SMALL | {"epochs": 1}, batch_size=8, micro_batch=micro, learning_rate=1.0, dynamic_balance=False,
            delta_cls_loss=0.5, pixel_positive_weight=3.0, gradient_adjustment=False,
        )  # fmt: skip
        training = train.start(config, CPU)
        training.network.double()
        train.train_epoch(training, hidden)
        return weights(training)

    def in_double(*arguments):
        return plain(*arguments).double()

    plain = data.to_input
    monkeypatch.setattr(data, "to_input", in_double)
    torch.testing.assert_close(weights_after(micro_batch), weights_after(0), rtol=1e-9, atol=1e-12)


def test_bfloat16_trains_like_float32(cache: Cache) -> None:
    curves = []
    for precision in ("float32", "bfloat16"):
        config = RunConfig(**SMALL | {"precision": precision}, optimizer="adam", learning_rate=0.001)
        curves.append([e["loss_segmentation"] for e in train.fit(train.start(config, CPU), cache)])
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.05)


def test_a_model_folder_gives_the_same_scores(cache: Cache, tmp_path: Path) -> None:
    config = RunConfig(**SMALL)
    training = train.start(config, CPU)
    scores = evaluate.score(training.network, cache, config, CPU)
    thresholds = scores.choose(config.judgement())
    checkpoint.save_model(tmp_path / "m", training.network.state_dict(), config, thresholds, epoch=1)
    network, loaded, again = checkpoint.load_model(tmp_path / "m", CPU)
    assert (loaded, again) == (config, thresholds)
    assert evaluate.score(network, cache, config, CPU).figures([again]) == scores.figures([thresholds])
    (tmp_path / "m" / "thresholds.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"must hold model\.safetensors, config\.json and thresholds\.json of one model"
    ):
        checkpoint.load_model(tmp_path / "m", CPU)


def test_a_checkpoint_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    for epochs, name in ((1, "a"), (2, "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "progress.json").write_text(f'{{"epochs": {epochs}}}')
        (tmp_path / name / "training.pt").write_bytes(b"x" * 1000)
        checkpoint.seal(tmp_path / name)
    folders = [tmp_path / "a", tmp_path / "b"]
    assert checkpoint.newest(folders) == tmp_path / "b"
    (tmp_path / "b" / "training.pt").write_bytes(b"x" * 900)
    assert checkpoint.newest(folders) == tmp_path / "a"
    (tmp_path / "a" / "manifest.json").unlink()
    assert checkpoint.newest(folders) is None


def test_a_training_file_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"network": Attack()}, tmp_path / "training.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load_training(tmp_path, CPU)


def test_figures_of_a_split_equal_those_of_its_masks(cache: Cache) -> None:
    config = RunConfig(**SMALL, threshold_rule="grid")
    network = train.start(config, CPU).network
    thresholds = evaluate.score(network, cache, config, CPU).choose(config.judgement())
    scores = evaluate.score(network, cache, config, CPU, centre_lines_at=thresholds)
    figures = scores.figures([thresholds])[0]
    logits = np.concatenate([maps.numpy() for _, maps in evaluate.predict(network, cache.images, config, CPU)])
    masks = logits.astype(np.float16) >= thresholds.segmentation_logit
    truth = np.asarray(cache.masks).astype(bool)
    dice = [(2 * (m & t).sum() + 1e-15) / (m.sum() + t.sum() + 1e-15) for m, t in zip(masks, truth, strict=True)]
    assert figures["dice_mean"] == pytest.approx(np.mean(dice))
    assert figures["dice_positive_mean"] == pytest.approx(np.mean(np.array(dice)[cache.positive]))
    assert figures["precision"] == pytest.approx((masks & truth).sum() / masks.sum())
    assert Thresholds.from_dict(thresholds.to_dict()) == thresholds
    assert scores.centre_lines is not None
    lines = CentreLines(*np.array([trace(t, m) for t, m in zip(truth, masks, strict=True)]).T)
    np.testing.assert_array_equal(scores.centre_lines, lines)


def test_schedules() -> None:
    steps = RunConfig(schedule="step", schedule_step=2, schedule_gamma=0.5, learning_rate=1.0, epochs=6)
    assert [train.learning_rate(steps, epoch) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    cosine = RunConfig(schedule="cosine", learning_rate=2.0, epochs=4)
    found = [train.learning_rate(cosine, epoch) for epoch in range(4)]
    assert found[0] == 2.0
    assert found[2] == pytest.approx(1.0)
    assert found == sorted(found, reverse=True)
    assert found[-1] > 0


def test_the_step_size_of_an_epoch_is_used(cache: Cache) -> None:
    still = RunConfig(**SMALL, schedule="step", schedule_step=1, schedule_gamma=0.0, learning_rate=1.0)
    training = train.start(still, CPU)
    epochs = train.fit(training, cache)
    next(epochs)
    after_one = weights(training)
    next(epochs)
    assert torch.equal(weights(training), after_one)


def test_hard_images_take_extra_places_and_survive_a_stop(cache: Cache, tmp_path: Path) -> None:
    config = RunConfig(**SMALL, batch_size=4, hard_mining_places=2, hard_mining_share=0.2, learning_rate=0.5)
    straight = train.start(config, CPU)
    losses = list(train.fit(straight, cache))
    assert set(straight.hardness) <= {sample.name for sample in cache.samples}
    assert len(straight.hardness) > 4

    hard = train.hard_rows(straight.hardness, cache, config)
    scores = straight.hardness
    mean = np.mean(list(scores.values()))
    assert len(hard)
    assert all(scores[cache.samples[row].name] > mean for row in hard)
    first, *_ = data.batches(cache, config, 1, CPU, hard)
    assert len(first.rows) == 4 + min(2, len(hard))
    assert set(first.rows[4:]) <= set(hard)

    broken = train.start(config, CPU)
    first_losses = next(train.fit(broken, cache))
    checkpoint.save_training(tmp_path, broken.state())
    resumed = train.start(config, CPU, checkpoint.load_training(tmp_path, CPU))
    assert [first_losses, *train.fit(resumed, cache)] == losses
    assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.parametrize("score", ["loss", "errors", "disagreement"])
def test_what_is_hard(score: str) -> None:
    """A missed defect is harder than a found one, by each score."""
    target = torch.zeros(2, 1, 4, 4)
    target[:, :, 0] = 1
    maps = torch.full((2, 1, 4, 4), -8.0)
    maps[1, :, 0] = 8.0
    none = torch.zeros(0)
    batch = Batch(none, target, None, torch.ones(2, 1), torch.ones(2), np.arange(2))
    each = segmentation_losses(maps, target, torch.ones(2))
    missed, found = train.hardness(score, each, torch.full((2, 1), 8.0), maps, batch).tolist()
    assert missed > found


def test_what_an_optimizer_keeps_lies_in_memory_as_its_weights(cache: Cache, tmp_path: Path) -> None:
    """Also where an older version wrote it in another order."""
    config = RunConfig(**SMALL, optimizer="adam", learning_rate=0.001)
    training = train.start(config, CPU)
    train.train_epoch(training, cache)
    state = training.state()
    for kept in state["optimizer"]["state"].values():
        kept |= {name: value.contiguous() for name, value in kept.items()}
    again = train.start(config, CPU, state)
    for weight, kept in again.optimizer.state.items():
        assert {value.stride() for value in kept.values() if value.shape == weight.shape} == {weight.stride()}


def test_balanced_weights_count_training_targets(cache: Cache) -> None:
    config = RunConfig(**SMALL, pixel_positive_weight="balanced", image_positive_weight="balanced", dilate=3)
    losses = train.Steps(train.start(config, CPU), cache)
    targets = np.asarray(cache.targets(3))
    assert losses.pixel_weight == pytest.approx((targets == 0).sum() / (targets == 1).sum())
    assert losses.image_weight == pytest.approx((~cache.positive).sum() / cache.positive.sum())

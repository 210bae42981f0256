"""Checkpoints where they are to lie: here, and on a real S3 server."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model import checkpoint
from model.config import RunConfig
from model.files import write_json
from tests import s3
from tuner import checkpoints, remote
from tuner.checkpoints import Torn, Trials, Writer
from tuner.remote import Folder, StorageFailed

CONFIG = RunConfig(input_height=64, input_width=128)
TRIAL = "abc123-0001"


@pytest.fixture(scope="module")
def wire() -> Iterator[s3.Wire]:
    with s3.serving() as found:
        yield found


@pytest.fixture(params=["run", "mount", "s3"])
def trials(request, wire: s3.Wire, tmp_path: Path) -> Trials:
    there = {"run": None, "mount": Folder(str(tmp_path / "mount")), "s3": Folder(f"s3://bucket/{tmp_path.name}")}
    return Trials(tmp_path / "run" / "trials", there[request.param])


def sealed(folder: Path, epochs: int, **more: bytes) -> Path:
    """A checkpoint as a trial hands it over."""
    (folder / "best" / "1").mkdir(parents=True, exist_ok=True)
    (folder / "best" / "1" / "model.safetensors").write_bytes(b"weights")
    (folder / "training.pt").write_bytes(os.urandom(1000))
    for name, data in more.items():
        (folder / name).write_bytes(data)
    write_json(folder / "progress.json", {"epochs": epochs})
    checkpoint.seal(folder)
    return folder


def write(trials: Trials, source: Path, epochs: int, start: str = f"attempt-1/{TRIAL}", config=CONFIG) -> Writer:
    writer = Writer(trials, start, config.to_dict())
    writer.write(sealed(source, epochs), epochs, last=False)
    return writer


def reached(trials: Trials, trial: str = TRIAL, config: RunConfig | None = CONFIG) -> int | None:
    found = checkpoints.newest(trials, trial, config)
    return found.progress["epochs"] if found else None


def test_the_newest_of_all_attempts_is_found_and_comes_back_as_it_was(trials: Trials, tmp_path: Path) -> None:
    assert reached(trials) is None
    source = tmp_path / "source"
    write(trials, source, 3, f"attempt-1/{TRIAL}.2")
    write(trials, source, 12, f"attempt-2/{TRIAL}")
    write(trials, source, 2, f"attempt-3/{TRIAL}")
    write(trials, source, 20, f"attempt-3/{TRIAL}0")  # of another trial, whose name begins so
    write(trials, sealed(source, 12), 12, f"attempt-2/{TRIAL}")
    found = checkpoints.newest(trials, TRIAL, CONFIG)
    assert found is not None
    assert found.progress == {"epochs": 12}
    assert found.address.endswith(f"attempt-2/{TRIAL}/checkpoint_000012")
    assert found.holds("best/1")
    assert not found.holds("best/2")
    folder = checkpoints.fetch(found.address, tmp_path / "fetched")
    assert checkpoint.is_whole(folder)
    assert (folder / "training.pt").read_bytes() == (source / "training.pt").read_bytes()
    model = checkpoints.fetch(found.address, tmp_path / "model", "best/1")
    assert [path.name for path in model.iterdir()] == ["model.safetensors"]


def test_the_number_of_an_attempt_is_new_wherever_it_was_used(trials: Trials, tmp_path: Path) -> None:
    first = trials.new_attempt()
    write(trials, tmp_path / "source", 1, f"attempt-{first}/{TRIAL}")
    elsewhere = replace(trials, local=tmp_path / "elsewhere") if trials.there else trials
    assert (first, elsewhere.new_attempt()) == (1, 2)


def test_the_furthest_stays_though_a_worker_that_was_cut_off_writes_last(trials: Trials, tmp_path: Path) -> None:
    write(trials, tmp_path / "source", 4, f"attempt-1/{TRIAL}.2")
    write(trials, tmp_path / "late", 2, f"attempt-1/{TRIAL}")
    checkpoints.prune(trials, TRIAL, CONFIG)
    assert names(trials) == ["checkpoint_000004"]


def test_only_two_stay_of_a_start_and_as_many_as_asked_for_in_the_end(trials: Trials, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(trials, source, 1)
    writer = Writer(trials, f"attempt-2/{TRIAL}", CONFIG.to_dict())
    for epochs in range(2, 6):
        writer.write(sealed(source, epochs), epochs, last=False)
    assert names(trials) == ["checkpoint_000001", "checkpoint_000004", "checkpoint_000005"]
    if trials.there:  # else no number is given twice
        write(trials, source, 9, f"attempt-2/{TRIAL}.2", replace(CONFIG, learning_rate=0.5))
    checkpoints.prune(trials, TRIAL, CONFIG)
    assert names(trials) == ["checkpoint_000005"]
    assert reached(trials) == 5
    checkpoints.prune(trials, TRIAL, None)
    assert (names(trials), reached(trials)) == ([], None)


def names(trials: Trials) -> list[str]:
    return sorted({name.split("/")[2] for name in trials.place.files() if name.count("/") > 2})


def test_one_that_is_not_whole_or_another_trainings_is_none(trials: Trials, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(trials, source, 1)
    write(trials, source, 2, f"attempt-2/{TRIAL}", replace(CONFIG, learning_rate=0.5))  # the number was given twice
    assert reached(trials) == 1
    assert reached(trials, config=None) == 2
    judged_otherwise = replace(CONFIG, threshold_rule="grid")  # which the same network answers for
    write(trials, source, 3, f"attempt-3/{TRIAL}", judged_otherwise)
    assert reached(trials) == 3
    write(trials, source, 4, f"attempt-4/{TRIAL}")
    cut_short = trials.place / f"attempt-4/{TRIAL}/checkpoint_000004"
    cut_short.write("training.pt", b"shorter")
    assert reached(trials) == 3
    write(trials, source, 5, f"attempt-5/{TRIAL}")
    (trials.place / f"attempt-5/{TRIAL}/checkpoint_000005").remove(["manifest.json"])
    assert reached(trials) == 3


def test_one_of_an_earlier_version_says_nothing_of_its_training(tmp_path: Path) -> None:
    sealed(tmp_path / f"attempt-1/{TRIAL}/checkpoint_000000", 7)
    assert reached(Trials(tmp_path)) == 7


def test_a_size_that_is_right_does_not_hide_other_bytes(wire: s3.Wire, tmp_path: Path) -> None:
    trials = Trials(tmp_path / "trials", Folder("s3://bucket/bytes"))
    write(trials, tmp_path / "source", 1)
    found = checkpoints.newest(trials, TRIAL, CONFIG)
    assert found is not None
    Folder(found.address).write("training.pt", bytes(1000))
    with pytest.raises(Torn, match=r"checkpoint_000001 must be as it was sealed"):
        checkpoints.fetch(found.address, tmp_path / "fetched")
    checkpoints.discard(found.address)
    assert reached(trials) is None
    with pytest.raises(Torn, match="is not whole any more"):
        checkpoints.fetch(found.address, tmp_path / "again")


def test_an_outage_costs_a_checkpoint_and_the_last_one_arrives(wire: s3.Wire, tmp_path: Path, monkeypatch) -> None:
    trials = Trials(tmp_path / "trials", Folder("s3://bucket/outage"))
    writer = write(trials, tmp_path / "source", 1)
    wire.fail("cut")
    writer.write(sealed(tmp_path / "source", 2), 2, last=False)
    with pytest.raises(StorageFailed):
        checkpoints.newest(trials, TRIAL)
    waits: list[float] = []

    def pass_time(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            wire.mend()

    monkeypatch.setattr(remote.time, "sleep", pass_time)
    writer.write(sealed(tmp_path / "source", 3), 3, last=True)
    assert waits == [1, 2, 4]
    assert names(trials) == ["checkpoint_000001", "checkpoint_000003"]
    assert reached(trials) == 3


def test_a_storage_that_does_not_come_back_is_said_in_the_end(wire: s3.Wire, tmp_path: Path, monkeypatch) -> None:
    trials = Trials(tmp_path / "trials", Folder("s3://bucket/never"))
    monkeypatch.setattr(checkpoints, "_PATIENCE_S", 0.5)
    wire.fail("busy")
    try:
        with pytest.raises(StorageFailed, match="the storage s3://bucket/never"):
            Writer(trials, f"attempt-1/{TRIAL}", {}).write(sealed(tmp_path / "source", 1), 1, last=True)
    finally:
        wire.mend()


def test_a_full_disk_is_no_outage_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    trials = Trials(tmp_path / "trials")
    source = sealed(tmp_path / "source", 1)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "copy_durably", full)
    with pytest.raises(OSError, match="No space left") as caught:
        Writer(trials, f"attempt-1/{TRIAL}", {}).write(source, 1, last=False)
    assert caught.value.errno == errno.ENOSPC
    assert [path for path in tmp_path.glob("trials/**/*") if path.is_file()] == []


def test_a_mount_that_fails_is_an_outage(tmp_path: Path, monkeypatch) -> None:
    def stale(source: Path, target: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoints, "copy_durably", stale)
    writer = Writer(Trials(tmp_path / "trials"), f"attempt-1/{TRIAL}", {})
    writer.write(sealed(tmp_path / "source", 1), 1, last=False)
    assert reached(Trials(tmp_path / "trials")) is None


def test_previews_from_elsewhere_lie_where_those_of_here_would(trials: Trials) -> None:
    for epochs in (1, 3):
        checkpoints.keep_previews(trials, f"attempt-1/{TRIAL}", epochs, {"0": b"png", "1": b"another"})
    assert checkpoints.previews(trials, TRIAL) == {"0": b"png", "1": b"another"}
    (folder,) = trials.local.glob(f"attempt-1/{TRIAL}/*")
    assert folder.name == "checkpoint_000003"
    assert reached(trials) is None
    assert sorted(path.name for path in folder.glob("previews/*")) == ["0.png", "1.png"]


def test_the_furthest_stays_whichever_was_written_last(trials: Trials, tmp_path: Path) -> None:
    """A machine that was cut off comes back, and writes where it had been."""
    write(trials, tmp_path / "source", 6, f"attempt-1/{TRIAL}.2")
    write(trials, tmp_path / "source", 3)
    checkpoints.prune(trials, TRIAL, CONFIG)
    assert (names(trials), reached(trials)) == (["checkpoint_000006"], 6)
    checkpoints.prune(trials, TRIAL, replace(CONFIG, learning_rate=0.5))  # of which there is none
    assert reached(trials) == 6


def test_of_an_earlier_version_the_furthest_stays(tmp_path: Path) -> None:
    trials = Trials(tmp_path / "trials")
    sealed(trials.local / f"attempt-1/{TRIAL}/checkpoint_000001", 7)
    sealed(trials.local / f"attempt-2/{TRIAL}/checkpoint_000000", 5)
    checkpoints.prune(trials, TRIAL, CONFIG)
    found = checkpoints.newest(trials, TRIAL, CONFIG)
    assert found is not None
    assert found.progress == {"epochs": 7}
    weights = checkpoints.fetch(found.address, tmp_path / "scratch", "best/1")
    assert (weights / "model.safetensors").read_bytes() == b"weights"
    write(trials, tmp_path / "source", 9, f"attempt-3/{TRIAL}")  # it goes on, and says whose training it is
    checkpoints.prune(trials, TRIAL, CONFIG)
    assert (names(trials), reached(trials)) == (["checkpoint_000009"], 9)


def test_what_a_worker_that_died_left_half_written_goes_with_the_rest(trials: Trials, tmp_path: Path) -> None:
    write(trials, tmp_path / "source", 1)
    (trials.place / f"attempt-1/{TRIAL}/.checkpoint_000002.part").write("training.pt", b"a part")
    checkpoints.prune(trials, TRIAL, CONFIG)
    assert names(trials) == ["checkpoint_000001"]


def test_a_checkpoint_that_goes_while_it_is_looked_at_is_none(tmp_path: Path, monkeypatch) -> None:
    trials = Trials(tmp_path / "trials")
    write(trials, tmp_path / "source", 1)
    write(trials, tmp_path / "source", 2, f"attempt-2/{TRIAL}")
    is_whole = checkpoint.is_whole

    def looked_at(folder: Path, within: str = "") -> bool:
        found = is_whole(folder, within)
        if folder.name == "checkpoint_000002":
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(checkpoint, "is_whole", looked_at)
    assert reached(trials) == 1
    monkeypatch.setattr(checkpoints, "_folders", lambda *_: [tmp_path / "gone"])
    checkpoints.prune(trials, TRIAL, None)
    assert checkpoints.previews(trials, TRIAL) == {}


def test_what_is_fetched_stays_when_its_origin_goes(trials: Trials, tmp_path: Path) -> None:
    write(trials, tmp_path / "source", 1)
    found = checkpoints.newest(trials, TRIAL, CONFIG)
    assert found is not None
    folder = checkpoints.fetch(found.address, tmp_path / "scratch")
    checkpoints.prune(trials, TRIAL, None)
    assert checkpoint.is_whole(folder)


@pytest.mark.parametrize("name", ["../escaped", "{}/escaped"])
def test_a_manifest_cannot_name_what_lies_outside(trials: Trials, tmp_path: Path, name: str) -> None:
    place = trials.place / f"attempt-1/{TRIAL}/checkpoint_000001"
    name = name.format(tmp_path)
    (trials.place / f"attempt-1/{TRIAL}").write("escaped", b"12345")
    place.write("manifest.json", json.dumps({name: [5, 0]}).encode())
    with pytest.raises(Torn, match="which lies outside of it"):
        checkpoints.fetch(place.address, tmp_path / "scratch" / "checkpoint")
    assert not (tmp_path / "scratch/escaped").exists()

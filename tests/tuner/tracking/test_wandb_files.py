"""What a .wandb file holds, cut off anywhere: read back by wandb's own reader."""

import os
from pathlib import Path

import pytest

from tests.tuner.tracking import test_wandb_runs as offline
from tuner.tracking.wandb_files import Written, files_of, lost_parts, note_uploaded, uploaded, written

no_network_and_no_home = offline.no_network_and_no_home
info = offline.info
tracker = offline.tracker


@pytest.mark.slow
def test_a_file_tells_what_it_holds_wherever_it_is_cut_off(tracker, info, tmp_path) -> None:
    offline.start(tracker, 0)
    for number in (1, 2, 3):
        offline.epoch(tracker, 0, number, 0.1)
    tracker.trial_ended(offline.record(0, "failed"))
    tracker.search_ended("finished")
    (directory,) = offline.directories(info, 0)
    (file,) = directory.glob("*.wandb")
    assert written(file) == Written(3, 1)
    content, cut = file.read_bytes(), tmp_path / "cut.wandb"
    found = []
    for length in range(0, len(content), 97):
        cut.write_bytes(content[:length])
        found.append(written(cut))
    assert found == sorted(found, key=lambda one: one.epoch)
    assert {one.epoch for one in found} == {0, 1, 2, 3}
    assert {one.exit_code for one in found} == {None}


def test_what_a_server_did_not_take_is_found_in_the_log(tmp_path) -> None:
    log = tmp_path / "debug-internal.log"
    assert lost_parts(log) == []
    log.write_text(
        '{"level":"INFO","msg":"filestream: all is well"}\n'
        '{"level":"ERROR","msg":"api: HTTP error","status":401}\n'
        '{"level":"ERROR+4","msg":"filestream: fatal error:\\n  HTTP 500"}\n'
        '{"level":"ERROR","msg":"runupserter: failed to upload changes","error":"EOF"}\n'
        "not JSON\n"
        '{"level":"ERROR","msg":"filestream: cut o'
    )
    assert lost_parts(log) == ["filestream: fatal error: HTTP 500", "runupserter: failed to upload changes EOF"]


def test_of_one_second_comes_last_who_wrote_last(tmp_path: Path) -> None:
    """A run that could not be opened online, and its part of the next session, whose name sorts first."""
    parts = [("offline-run-20260101_000001-a-offline", "a-offline"), ("offline-run-20260101_000001-a", "a")]
    for seconds, (folder, run_id) in enumerate(parts):
        file = tmp_path / "wandb" / folder / f"run-{run_id}.wandb"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (seconds, seconds))
    assert [file.parent.name for file in files_of(tmp_path, "a")] == [folder for folder, _ in parts]


def test_what_a_server_has_is_known_as_far_as_it_was_written_down(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    assert uploaded(tmp_path) == {}
    note_uploaded(tmp_path, "a", Written(3, 255))
    note_uploaded(tmp_path, "b", Written(1, 0))
    note_uploaded(tmp_path, "a", Written(0, None))  # a part of which nothing but its start was written
    with (tmp_path / "wandb" / "uploaded.txt").open("a") as file:
        file.write("b 7")  # the disk was full
    assert uploaded(tmp_path) == {"a": Written(3, None), "b": Written(1, 0)}

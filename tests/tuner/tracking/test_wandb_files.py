"""What a .wandb file holds, cut off anywhere: read back by wandb's own reader."""

import pytest

from tests.tuner.tracking import test_wandb_runs as offline
from tuner.tracking.wandb_files import Written, lost_parts, written

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

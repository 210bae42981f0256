"""A few of the runs of bench/kills.py: real searches that are killed at random moments and resumed."""

import random
from pathlib import Path

import pytest

from bench import kills
from tests import s3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "study"), [(1, None), (2, "sqlite:///study.db"), (3, None)])
def test_a_search_that_is_killed_at_random_loses_nothing(tmp_path: Path, seed: int, study: str | None) -> None:
    random.seed(seed)
    hit, wrong = kills.one_run(tmp_path, kills=2, study=study)
    assert hit
    assert not wrong, (tmp_path / "stderr.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nor_does_one_whose_machine_is_gone_and_whose_storage_is_there(tmp_path: Path) -> None:
    random.seed(4)
    with s3.serving():
        hit, wrong = kills.one_run(tmp_path, kills=3, storage="s3://bucket/kills")
    assert any("machine" in one for one in hit)
    assert not wrong, (tmp_path / "stderr.txt").read_text()

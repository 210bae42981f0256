"""A short run of bench/chaos.py: a search whose hosts join, die, are cut off and drained."""

from pathlib import Path

import pytest

from bench import chaos
from tests import hosts


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not hosts.available(), reason="needs root, namespaces and iproute2")
def test_a_search_amid_chaos_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.one_search(tmp_path, seconds=40, seed=3, count=2, epoch=1.5) == 0, capsys.readouterr().out

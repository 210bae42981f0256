"""The hosts that tests of clusters are made of: they are apart, and gone afterwards."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
import ray

from tests import hosts


@pytest.mark.skipif(not hosts.available(), reason="needs root, namespaces and iproute2")
def test_processes_take_networks_of_their_own() -> None:
    taken = [hosts._own_bridge(), hosts._own_bridge()]
    try:
        assert len(set(taken)) == 2
    finally:
        for number in taken:
            subprocess.run(["ip", "link", "del", f"seg{number}"], check=True)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(not hosts.available(), reason="needs root, namespaces and iproute2")
def test_hosts_are_apart_and_gone_afterwards(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").touch()

    @ray.remote(num_cpus=1)
    def look(_: int) -> tuple[str, list[str]]:
        return socket.gethostname(), [path.name for path in place.iterdir()]

    with hosts.cluster() as made:
        without = made.add("without", own_disks={place: "1m"})
        assert dict([ray.get(look.remote(0))]) == {"without": []}
        made.add("with")
        without.kill()
        assert dict([ray.get(look.remote(1))]) == {"with": ["file"]}
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert made.bridge not in links

"""What nodes leave for the driver at a storage, and what it says of those whose file it does not find."""

from __future__ import annotations

from tests import s3
from tuner import nodes, remote


def test_the_driver_says_of_each_node_why_it_does_not_see_it() -> None:
    place = remote.Folder("s3://bucket/runs")
    with s3.serving() as wire:
        place.write(".mark-one", b"seen")
        place.write(".mark-other", b"something else")
        found = nodes._unseen(place, ["one", "two", "other"])
        assert sorted(found) == ["other", "two"]
        assert all("must find in s3://bucket/runs what the driver wrote there" in why for why in found.values())
        wire.fail("cut")
        found = nodes._unseen(place, ["one", "two"])
        assert sorted(found) == ["one", "two"]
        assert all("the driver cannot read it (the storage s3://bucket/runs failed: " in why for why in found.values())

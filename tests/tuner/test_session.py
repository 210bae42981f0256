"""What a session makes of nodes that cannot run a trial; the nodes are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tuner.test_search import scripted_space
from tuner import cluster
from tuner.checkpoints import Trials
from tuner.cluster import Resources
from tuner.datasets import Source
from tuner.mirror import Mirror
from tuner.remote import Folder
from tuner.sampler import SearchStudy
from tuner.session import UNFIT, UNREACHED, Session
from tuner.tracking import Trackers
from tuner.trial import nothing_yet


class Broken(Folder):
    """A storage that answers nobody."""

    def entries(self) -> dict[str, int | None]:
        raise OSError("no answer")


@pytest.fixture
def nodes(monkeypatch) -> set[str]:
    """Those of the cluster, which all could hold a trial."""
    alive = {"a", "b"}
    for name in ("nodes_alive", "nodes_that_stay"):
        monkeypatch.setattr(cluster, name, lambda: set(alive))
    monkeypatch.setattr(cluster, "able_nodes", lambda _: set(alive))
    monkeypatch.setattr(cluster, "name_of", lambda node: node)
    monkeypatch.setattr(cluster, "fit_at_once", lambda _: (2, ""))
    monkeypatch.setattr(cluster, "_startable", lambda _: ([], 0))
    monkeypatch.setattr(cluster, "better_may_come", lambda *_: False)
    return alive


def session_of(folder: Path, **options: Any) -> Session:
    (folder / "trials").mkdir()
    space = scripted_space([1.0, 2.0, 3.0])
    study = SearchStudy(space, "abc123", None)
    mirror = Mirror(folder)
    return Session(study, mirror.trials, space.budget, Resources(), Trackers(), mirror, **options)


def give_back(session: Session, key: str, status: str, node: str, reason: str = "no answer") -> None:
    assert isinstance(session.next(key), dict)
    session.began(key, node)
    told = nothing_yet() | {"status": status, "reason": reason, "errno": None}
    assert session.reported(key, told, node, {}, {})
    session.ended(key, crashed=True)


def test_no_node_is_blamed_for_a_storage_that_fails_here_too(nodes, tmp_path: Path) -> None:
    session = session_of(tmp_path)
    session.trials = type("Unreached", (Trials,), {"place": Broken("nowhere")})(tmp_path / "trials")
    give_back(session, "1", UNREACHED, "a")
    assert (session.unfit, session.failure, session.live) == ({}, None, {})
    assert session.next("2") is None  # it is not tried again at once
    assert {trial.state.name for trial in session.study._study.get_trials()} == {"WAITING"}


def test_no_node_is_blamed_for_data_that_are_gone_here_too(nodes, tmp_path: Path) -> None:
    session = session_of(tmp_path, source=Source.of(str(tmp_path / "set"), 64, 128))
    give_back(session, "1", UNREACHED, "a")
    assert session.unfit == {}


def test_a_node_that_alone_does_not_reach_the_storage_is_unfit(nodes, tmp_path: Path) -> None:
    session = session_of(tmp_path, source=Source.of(str(tmp_path), 64, 128))
    give_back(session, "1", UNREACHED, "a")
    assert session.unfit == {"a": "no answer"}
    assert session.failure is None
    give_back(session, "2", UNREACHED, "b")
    assert session.failure is not None


def test_a_search_waits_for_a_better_node_that_may_come(nodes, tmp_path: Path, monkeypatch, caplog) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(cluster, "better_may_come", lambda _, reasons: asked.append(reasons) or len(reasons) < 3)
    session = session_of(tmp_path)
    give_back(session, "1", UNFIT, "a", "no CUDA")
    give_back(session, "2", UNFIT, "b", "full")
    assert session.failure is None
    assert "waiting for one that the autoscaler starts" in caplog.text
    nodes.add("c")
    give_back(session, "3", UNFIT, "c", "broken")
    assert asked == [["no CUDA", "full"], ["no CUDA", "full", "broken"]]
    assert session.failure is not None

from pathlib import Path

from tuner import records
from tuner.records import RecordsFile


def record(trial: str, status: str = "completed", value: float | None = 0.5, **more: object) -> dict:
    return {"trial": trial, "status": status, "value": value, "baseline": False, "replayed_from": None} | more


def test_the_file_holds_the_records_in_their_order(tmp_path: Path) -> None:
    first, second, third = record("a"), record("b"), record("c")
    file = RecordsFile(tmp_path)
    file.write([first, third])
    assert records.read(tmp_path) == [first, third]
    file.write([first, second, third])  # an earlier trial that ended later
    assert records.read(tmp_path) == [first, second, third]
    before = (tmp_path / records.FILE).stat().st_mtime_ns
    file.write([first, second, third])
    assert (tmp_path / records.FILE).stat().st_mtime_ns == before


def test_a_new_session_writes_the_file_again_from_the_study(tmp_path: Path) -> None:
    (tmp_path / records.FILE).write_text("cut sho")
    RecordsFile(tmp_path).write([record("a")])
    assert records.read(tmp_path) == [record("a")]
    (tmp_path / records.FILE).write_text("x")
    RecordsFile(tmp_path).write([])
    assert records.read(tmp_path) == []


def test_only_what_was_completed_can_be_best() -> None:
    found = [record("a"), record("b", "stopped_early", 0.9), record("c", value=0.5), record("d", value=None)]
    assert records.best(found) == found[0]
    assert records.best(found[1:2]) is None
    assert records.charged([*found, record("e", replayed_from="a")]) == found
    assert records.count(found) == {"completed": 3, "stopped_early": 1, "diverged": 0, "failed": 0}
    assert records.reasons([record("a", reason=None), *[record(n, "failed", reason="a bug") for n in "bc"]]) == [
        ("failed", "a bug", 2)
    ]

import math

import pytest

from tests.tuner.conftest import small_space
from tuner import run_search
from tuner.options import STUDY_VARIABLE, Options, study_url
from tuner.plan import plan


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 0}, "trials must be a whole number of at least 1, found 0; leave it out"),
        ({"trials": 2.0}, "trials must be a whole number of at least 1, found 2.0"),
        ({"trials": True}, "trials must be a whole number of at least 1, found True"),
        ({"hours": -1}, "hours must be a number above 0, found -1"),
        ({"hours": "2"}, "hours must be a number above 0, found '2'"),
        ({"concurrent": 0}, "concurrent must be a whole number of at least 1, found 0"),
        ({"cpus_per_trial": 0}, "cpus_per_trial must be a number above 0, found 0"),
        ({"cpus_per_trial": math.inf}, "cpus_per_trial must be a number above 0, found inf"),
        ({"wandb_wait": 1e10}, "wandb_wait must be a number of seconds from 0 to 86400, a day, found 10000000000.0"),
        (
            {"gpus_per_trial": math.nan},
            "gpus_per_trial must be a number from 0 to 1, or a whole number of GPUs, found nan",
        ),
        ({"seed": -1}, "seed must be a whole number from 0 to 2147483647, found -1"),
        ({"seed": 3_000_000_000}, "seed must be a whole number from 0 to 2147483647, found 3000000000"),
        ({"wandb": "on"}, "wandb must be off, offline or online, found 'on'"),
        ({"wandb": None}, "wandb must be off, offline or online, found None"),
        (
            {"address": "ray://head:10001"},
            "address must be host:port of a Ray cluster, auto, or local, found 'ray://head:10001'",
        ),
        ({"no_report": "yes"}, "no_report must be True or False, found 'yes'"),
        ({"tensorboard": 1}, "tensorboard must be True or False, found 1"),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_refused_before_anything_is_made(values, message, tmp_path) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        run_search(small_space(), "synthetic", runs=tmp_path / "runs", **values)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_comes_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"trials must .*\n.*hours must"):
        Options(trials=0, hours=0)


def test_a_plan_has_the_same_rules(tmp_path) -> None:
    with pytest.raises(ValueError, match="concurrent must be a whole number of at least 1, found 0"):
        plan(small_space(), tmp_path, concurrent=0)


def test_what_may_be_said() -> None:
    Options(
        trials=1, hours=0.5, concurrent=1, cpus_per_trial=0.5, gpus_per_trial=0, seed=0, address="auto", study="env"
    )


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql+psycopg2://me:hunter2@host:5432/db",
        "postgresql://me:hun/ter2@host/db",
        "postgresql://me:hunt?er2@host/db",
        "postgresql://me:hunt@er2@host/db",
        "postgresql://host/db?user=me&password=hunter2",
        "mysql://host/db?passwd=hunter2",
        "postgresql://host/db?sslpassword=hunter2",
        "mssql+pyodbc:///?odbc_connect=PWD%3Dhunter2",
        "me:hunter2@host/db",
    ],
)
def test_a_password_is_refused_and_never_shown(url: str, tmp_path) -> None:
    with pytest.raises(ValueError, match="study must") as caught:
        run_search(small_space(), "synthetic", runs=tmp_path / "runs", study=url)
    assert "hunt" not in str(caught.value)
    assert STUDY_VARIABLE in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////data/a:b@c.db",
        "postgresql://me@host:5432/db?sslmode=require&passfile=/home/me/.pgpass",
        "mysql+pymysql://me@host/db?read_default_file=/home/me/.my.cnf",
    ],
)
def test_a_url_without_a_password_is_taken(url: str) -> None:
    assert study_url(str(Options(study=url).study)) == url


def test_the_environment_holds_the_whole_url(monkeypatch) -> None:
    monkeypatch.setenv(STUDY_VARIABLE, "postgresql://me:hunter2@host/db")
    assert study_url("env") == "postgresql://me:hunter2@host/db"
    monkeypatch.delenv(STUDY_VARIABLE)
    with pytest.raises(ValueError, match=f"the environment variable {STUDY_VARIABLE} says, and it is not set"):
        study_url("env")

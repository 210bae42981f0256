"""What a command line, or a call of `run_search`, may say beside the space; one set of rules for both."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl

from model.config import RULES
from tuner.space import is_number

STUDY_VARIABLE = "SEGDEC_TUNER_STUDY_URL"
"""the environment variable that holds the study's URL where `--study env` is said"""

HERE = "local"
"""the address that means a Ray of this command's own, as none does; a run that began on a cluster goes on so"""


@dataclass(frozen=True)
class Rule:
    """What values an option takes."""

    wanted: str
    holds: Callable[[Any], bool]
    way_out: str = "leave it out for the default"


COUNT = Rule("a whole number of at least 1", lambda v: type(v) is int and v >= 1)
POSITIVE = Rule("a number above 0", lambda v: is_number(v) and v > 0)
GPUS = Rule(
    "a number from 0 to 1, or a whole number of GPUs",
    lambda v: is_number(v) and v >= 0 and (v <= 1 or v == int(v)),
    "leave it out to have it chosen by what a trial needs",
)
SEVERAL = Rule("a whole number of at least 2", lambda v: type(v) is int and v >= 2)
NO_OR_COUNT = Rule("a whole number of at least 0", lambda v: type(v) is int and v >= 0)
MM_PER_PX = Rule(
    "a number of mm from 0.000001 to 1000, a metre",
    lambda v: is_number(v) and 1e-6 <= v <= 1000,
    "it is the length on the surface that one px of the photo shows; leave it out for px alone",
)
WAIT = Rule("a number of seconds from 0 to 86400, a day", lambda v: is_number(v) and 0 <= v <= 86400)
SEED = Rule(
    f"a whole number from 0 to {RULES['seed'].high}", lambda v: type(v) is int and RULES["seed"].problem(v) is None
)
PORT = Rule("a port, a whole number from 0 to 65535", lambda v: type(v) is int and 0 <= v <= 65535)
ADDRESS = Rule(
    f"host:port of a Ray cluster, auto, or {HERE}",
    lambda v: isinstance(v, str) and v != "" and "://" not in v,
    "with ray:// the search's files would lie on the cluster's head, so start the command there: from elsewhere, "
    "`tuner search` submits itself to http://HOST:PORT of the cluster's dashboard",
)
DASHBOARD = Rule(
    "http://HOST:PORT of a Ray cluster's dashboard",
    lambda v: isinstance(v, str) and re.fullmatch(r"https?://[^/@\s]+/?", v) is not None,
    "`ray dashboard cluster.yaml` brings it to http://127.0.0.1:8265",
)
ADDRESS_OR_DASHBOARD = Rule(
    f"{ADDRESS.wanted}, or {DASHBOARD.wanted}", lambda v: ADDRESS.holds(v) or DASHBOARD.holds(v), ADDRESS.way_out
)
WANDB = Rule("off, offline or online", ("off", "offline", "online").__contains__)
YES_OR_NO = Rule("True or False", lambda v: isinstance(v, bool))

_RULES = {
    "trials": COUNT,
    "hours": POSITIVE,
    "concurrent": COUNT,
    "cpus_per_trial": POSITIVE,
    "gpus_per_trial": GPUS,
    "cpu_trials": NO_OR_COUNT,
    "address": ADDRESS,
    "wandb": WANDB,
    "wandb_wait": WAIT,
    "tensorboard": YES_OR_NO,
    "seed": SEED,
    "profile": YES_OR_NO,
    "no_report": YES_OR_NO,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command line may say beside the space; None leaves the choice to the space or to the machine.

    ValueError with every value that breaks its rule.
    """

    trials: int | None = None
    hours: float | None = None
    concurrent: int | None = None
    cpus_per_trial: float | None = None
    gpus_per_trial: float | None = None
    cpu_trials: int = 0
    """trials at once that hold no GPU, beside those that do"""
    address: str | None = None
    wandb: Literal["off", "offline", "online"] = "offline"
    wandb_wait: float = 5.0
    """seconds that the end of the search waits for uploads to W&B; what is left goes on in the background"""
    tensorboard: bool = False
    seed: int | None = None
    warm_start: str | None = None
    """the folder of another run, whose completed trials the sampler knows from the start"""
    study: str | None = None
    """the URL of the database that keeps the study, without a password, or the word env; a journal if None"""
    storage: str | None = None
    """where checkpoints lie and the run is mirrored: a path or an address, without credentials (tuner/remote.py)"""
    profile: bool = False
    """whether a trace of the first trial is recorded (tuner/tracing.py)"""
    no_report: bool = False
    """the search alone: the test split stays sealed, also when the run is resumed"""

    def __post_init__(self) -> None:
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        problems = [
            f"{name} must be {rule.wanted}, found {value!r}; {rule.way_out}"
            for name, rule in _RULES.items()
            if (value := getattr(self, name)) is not defaults[name] and not rule.holds(value)
        ]
        if self.study is not None and (problem := _problem_of_study(self.study)):
            problems.append(problem)
        if self.storage is not None and (problem := problem_of_storage(self.storage)):
            problems.append(problem)
        if problems:
            raise ValueError("\n  ".join(problems))
        if self.address == HERE:  # Ray's own word for a Ray that listens on all addresses
            object.__setattr__(self, "address", None)


def study_url(study: str) -> str:
    """The URL that the option `study` stands for. ValueError if the environment should hold it and does not."""
    if study != "env":
        return study
    if url := os.environ.get(STUDY_VARIABLE):
        return url
    raise ValueError(
        f"the study lies where the environment variable {STUDY_VARIABLE} says, and it is not set; set it to the URL of "
        "the database, or leave --study out for a journal in the run's folder"
    )


def _problem_of_study(study: object) -> str | None:
    """Never with the value where it could hold a secret: run.json, logs and messages are handed around."""
    if study == "env":
        return None
    scheme, separator, rest = study.partition("://") if isinstance(study, str) else ("", "", "")
    if not separator or not re.fullmatch(r"\w+(\+\w+)?", scheme):
        return (
            "study must be the URL of a database, such as sqlite:///study.db or postgresql://HOST/NAME, or the word "
            f"env, which means the URL in the environment variable {STUDY_VARIABLE}; leave it out for a journal in the "
            "run's folder"
        )
    is_file = scheme.split("+")[0] == "sqlite"
    secrets = [key for key, _ in parse_qsl(rest.partition("?")[2], keep_blank_values=True) if is_secret(key)]
    if secrets or (not is_file and ":" in rest.rpartition("@")[0]):
        where = f"as {secrets[0]}=" if secrets else "before the @"
        return (
            f"study must hold no password, for run.json keeps it and the list of processes shows it; found one {where} "
            f"in {scheme}://...; leave it to the driver (PGPASSWORD or ~/.pgpass; for MySQL read_default_file=FILE in "
            f"the URL), or put the whole URL into the environment variable {STUDY_VARIABLE} and say --study env"
        )
    return None


def problem_of_storage(storage: object) -> str | None:
    """What is wrong with the form of a storage address; never with the value where it could hold a secret."""
    wanted = "storage must be a path, or an address such as s3://BUCKET/FOLDER"
    if not isinstance(storage, str) or not storage.strip():
        return f"{wanted}, found {storage!r}; leave it out for checkpoints in the run's own folder"
    scheme, separator, rest = storage.partition("://")
    if not separator:
        return None
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) or "::" in storage:
        return f"{wanted}, and not several addresses in one"
    if where := secret_in(storage):
        return (
            f"storage must hold no secret, for run.json keeps it and the list of processes shows it; found one {where} "
            f"in {scheme}://...; give credentials as the service's own tools find them, for S3 in the environment, in "
            "~/.aws or by the machine's role"
        )
    if scheme == "file" and not rest.startswith("/"):
        return f"{wanted}, found {storage}, whose path is not absolute; write file:///..., or a path alone"
    if not rest.partition("?")[0].strip("/"):
        return f"{wanted}, found no {'path' if scheme == 'file' else 'bucket or host'} in {storage}"
    return None


def secret_in(address: str) -> str | None:
    """Where an address of data or storage holds a secret, in words without it; None if it holds none.

    The form of the address is not checked: it may be anything that was typed.
    """
    for part in address.split("::"):
        rest = part.partition("://")[2]
        authority = re.split("[/?]", rest)[0]
        # The keys of some services hold a /, which ends what looks like the host; a port is digits alone.
        if ":" in authority.rpartition("@")[0] or re.match(r"[^/?@]*:(?!\d*([/?]|$)).*@", rest):
            return "before the @"
        for key, _ in parse_qsl("&".join(re.split("[?#]", part)[1:]), keep_blank_values=True):
            if is_secret(key) or re.search("key|sig|credential", key.lower()):
                return f"as {key}="
    return None


def is_secret(key: str) -> bool:
    """Of a URL's query: the drivers call it password, passwd, sslpassword, ..."""
    return key != "passfile" and re.search("pass|pwd|secret|token|odbc_connect", key.lower()) is not None

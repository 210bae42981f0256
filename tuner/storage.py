"""Where an Optuna study lies: in memory, in a journal that one process writes to, or in a database.

The database may hold the studies of many runs. It is reached through SQLAlchemy, as Optuna does; the package of its
driver is for the user to install.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.engine import URL

from tuner.options import is_secret, study_url
from tuner.records import SearchFailed

_SECONDS_FOR_A_LOCK = 60
"""so long another run may hold a SQLite file that several share"""


def open_storage(where: Path | str | None) -> BaseStorage:
    """A journal by its path, a database by its URL; None is memory. ValueError if the database cannot be opened."""
    if where is None:
        return InMemoryStorage()
    if isinstance(where, str):
        return _database(_parsed(where))
    _mend(where)
    return JournalStorage(JournalFileBackend(str(where), lock_obj=_KernelLock(where)))


def open_to_read(where: Path | str) -> BaseStorage:
    """The same for somebody who watches: nothing is written, also where a database is empty."""
    if isinstance(where, Path):
        return JournalStorage(JournalFileBackend(str(where), lock_obj=_KernelLock(where)))
    url = _parsed(where)
    if _is_sqlite(url) and not _is_uri(url):
        read_only = URL.create(url.drivername, database=f"file:{quote(str(url.database))}")
        url = read_only.set(query={**url.query, "mode": "ro", "uri": "true"})
    return _database(url, read_only=True)


def checked(study: str) -> str:
    """The option `study` as a run keeps it, with an absolute path, once the database has been opened and written to.

    ValueError if it cannot be.
    """
    url = _parsed(study_url(study))
    if _is_sqlite(url) and not _is_uri(url):
        path = Path(str(url.database)).expanduser()
        if study == "env" and not path.is_absolute():
            raise ValueError(
                f"a path in the environment's URL must be absolute, for a resume may start elsewhere, found {path}; "
                f"write {_sqlite_text(url, path.absolute())}"
            )
        url = url.set(database=str(path.absolute()))
        study = study if study == "env" else _sqlite_text(url, path.absolute())
    name = f"check-{uuid.uuid4().hex}"
    try:
        storage = _database(url)
        optuna.create_study(storage=storage, study_name=name)
        optuna.delete_study(storage=storage, study_name=name)
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise _refusal(url, error) from None
    return study


@contextmanager
def explained(where: Path | str) -> Iterator[None]:
    """Tells a database that fails while it is used as SearchFailed, with what its driver says."""
    try:
        yield
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        if isinstance(where, Path):
            raise
        reason = _reason(_parsed(where), error)
        message = (
            f"the study's database failed: {reason}; nothing that it has taken is lost, `tuner resume RUN` goes on"
        )
        raise SearchFailed(message) from None


def holds_long_text(storage: BaseStorage) -> bool:
    """Whether an attribute may be as long as a record.

    Optuna's columns are TEXT: without a limit in SQLite (1 GB) and PostgreSQL (1 GB), 64 KiB in MySQL, and who knows in
    others.
    """
    backend = getattr(storage, "_backend", storage)  # Optuna wraps a database in a cache
    return not isinstance(backend, RDBStorage) or backend.engine.dialect.name in ("sqlite", "postgresql")


def _parsed(text: str) -> URL:
    try:
        url = sqlalchemy.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        # Not even in part: whatever it is, it may hold a password.
        raise ValueError(
            "the study's URL must have the form dialect://user@host:port/name or sqlite:///path, and cannot be read; "
            "percent-encode special characters"
        ) from None
    if not _is_sqlite(url):
        return url
    if not url.database or ":memory:" in url.database or url.query.get("mode") == "memory":
        raise ValueError(f"the study must outlive the process, found {url.drivername} in memory; name a file")
    if _is_uri(url) and not url.database.startswith("file:/"):
        raise ValueError(f"the study's SQLite URI must hold an absolute path, found {url.database}; write file:/...")
    return url


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _is_uri(url: URL) -> bool:
    return str(url.database).startswith("file:")


def _sqlite_text(url: URL, path: Path) -> str:
    return url.set(database=str(path)).render_as_string()


def _database(url: URL, read_only: bool = False) -> RDBStorage:
    """ValueError, without the password, if it cannot be opened. Made ready for Optuna if it is empty."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # An epoch may take longer than a server or a firewall keeps an idle connection.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if _is_sqlite(url):
        options["connect_args"] = {"timeout": _SECONDS_FOR_A_LOCK}
    elif read_only and url.get_backend_name() == "postgresql":
        options["execution_options"] = {"postgresql_readonly": True}
    text = url.render_as_string(hide_password=False)
    try:
        return RDBStorage(text, engine_kwargs=options, skip_table_creation=read_only)
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError) as error:
        raise _refusal(url, error) from None


def _refusal(url: URL, error: Exception) -> ValueError:
    """One message: what was found, what the driver says, the way out."""
    shown = f"{url.drivername}://{url.host or ''}/{url.database or ''}"
    way_out = "see that the server runs, and that host, user, password and database are right"
    if isinstance(error, ImportError | sqlalchemy.exc.NoSuchModuleError):
        way_out = "install the driver's package, or name another one, as in postgresql+psycopg2://"
    elif _is_sqlite(url):
        way_out = "name a file that may be written, in a folder that exists"
    return ValueError(
        f"the study's database must be one that Optuna can open and write to, found {shown}: {_reason(url, error)}; "
        f"{way_out}"
    )


def _reason(url: URL, error: Exception) -> str:
    """What the driver says, in one line, with every secret of the URL struck out."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join(str(getattr(cause, "orig", None) or cause).split())
    for secret in (url.password, *(value for key, value in url.query.items() if is_secret(key))):
        reason = reason.replace(str(secret), "***") if secret else reason
    return reason


class _KernelLock(BaseJournalFileLock):
    """A lock that the kernel frees when the process ends; a leftover of Optuna's own costs half a minute."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._path = journal.with_name(journal.name + ".lock")
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        _mend(self._journal)  # a full disk may have torn the last write of this very process
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None


def _mend(journal: Path) -> None:
    """Cuts a torn last line off: Optuna would glue the next one to it and lose both."""
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if not size or (file.seek(size - 1) >= 0 and file.read(1) == b"\n"):
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.flush()
        os.fsync(file.fileno())

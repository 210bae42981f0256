"""Storage addresses: folders on this machine, on a mount, or in an object store, reached through fsspec.

An address is a path, a URI that fsspec knows (`s3://bucket/folder`), or a URI with a `?query`, which pyarrow reads.
Credentials come from where the service's own tools find them, never from the address.
"""

from __future__ import annotations

import inspect
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from model.files import FULL_DISK, write_atomically
from tuner.options import problem_of_storage

_SECONDS_TO_CONNECT = 5
_SECONDS_TO_ANSWER = 15
_BYTES_A_SECOND = 2**18
"""the slowest line on which a file may still arrive"""
_SECONDS_FOR_A_LISTING = 600
_SECONDS_FOR_A_TOKEN = 20.0
"""so long a storage may take to write and read a few bytes, before it counts as out of reach"""

_LONGEST_WAIT_S = 60.0
"""between two tries of what is done patiently"""

_FEEBLE = ("memory", "http", "https", "data", "github", "git", "zip", "tar", "ftp")
"""fsspec's, and nothing that several machines could write to"""

T = TypeVar("T")


class StorageFailed(OSError):
    """A storage that cannot be reached or refuses what is asked; the message says which, and what its driver says."""


class Unusable(ValueError):
    """An address that nothing here can open; the message says why, and the way out."""


@dataclass(frozen=True)
class Folder:
    """A folder at an address, whether it is there or not. All that is read or written is named relative to it.

    StorageFailed where the storage does not do what is asked; the OSError of the system where a disk of this machine is
    full. Holds no connection, so that it can be sent to other processes.
    """

    address: str

    def __truediv__(self, name: str) -> Folder:
        base, mark, query = self.address.partition("?") if "://" in self.address else (self.address, "", "")
        return Folder(f"{base.rstrip('/')}/{name}{mark}{query}")

    @property
    def local(self) -> Path | None:
        """Its path, if it is one of this machine's, mounts included."""
        scheme, separator, rest = self.address.partition("://")
        if not separator:
            return Path(self.address)
        return Path(rest) if scheme == "file" else None

    def entries(self) -> dict[str, int | None]:
        """What lies directly in it: sizes of files by name, None for folders."""
        with self._told():
            system, path = _opened(self.address)
            try:
                found = system.ls(path, detail=True, **_at_most(system))
            except FileNotFoundError:
                return {}
        names = {self._relative(path, one["name"]): one for one in found}
        return {name: None if one["type"] == "directory" else one["size"] for name, one in names.items() if name}

    def files(self, beginning: str = "") -> dict[str, int]:
        """Sizes of all files below it, by their relative path, of those that begin so: a folder's name, or the
        beginning of one in the deepest folder that is named whole."""
        parent, _, start = beginning.rpartition("/")
        with self._told():
            system, root = _opened(self.address)
            path = f"{root}/{parent}" if parent else root
            try:
                if _is_object_store(system):
                    found = system.find(path, detail=True, prefix=start, timeout=_SECONDS_FOR_A_LISTING)
                else:
                    within = [
                        one["name"] for one in system.ls(path, detail=True) if _last(one["name"]).startswith(start)
                    ]
                    found = {k: v for name in within for k, v in system.find(name, detail=True).items()}
            except FileNotFoundError:
                return {}
        sizes = {self._relative(root, k): one["size"] for k, one in found.items() if one["type"] != "directory"}
        return {name: size for name, size in sizes.items() if name.startswith(beginning)}

    def read(self, name: str) -> bytes:
        """FileNotFoundError if it is not there."""
        with self._told():
            system, path = _opened(self.address)
            found: bytes = system.cat_file(f"{path}/{name}", **_at_most(system, 2**26))
            return found

    def write(self, name: str, data: bytes) -> None:
        """A file that is whole, or as it was."""
        with self._told():
            if self.local:
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.local / name, data)
                return
            system, path = _opened(self.address)
            _make_room_for(system, f"{path}/{name}")
            system.pipe_file(f"{path}/{name}", data, **_at_most(system, len(data)))

    def put(self, source: Path, name: str) -> None:
        """Copies a local file there, whole or not at all."""
        with self._told():
            if self.local:
                _replace(source, self.local / name)
                return
            system, path = _opened(self.address)
            _make_room_for(system, f"{path}/{name}")
            system.put_file(str(source), f"{path}/{name}", **_at_most(system, source.stat().st_size))

    def get(self, name: str, target: Path) -> None:
        """Copies a file from there to a local path. FileNotFoundError if it is not there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._told(to_disk=True):
            system, path = _opened(self.address)
            system.get_file(f"{path}/{name}", str(target))

    def remove(self, names: Iterable[str]) -> None:
        """Files, in this order; those that are not there are none the less gone."""
        with self._told():
            system, path = _opened(self.address)
            for name in names:
                with suppress(FileNotFoundError):
                    system.rm_file(f"{path}/{name}", **_at_most(system))

    def clear(self) -> None:
        """Removes all that lies in it."""
        self.remove(self.files())
        if self.local:
            shutil.rmtree(self.local, ignore_errors=True)  # the folders

    @staticmethod
    def _relative(root: str, name: str) -> str:
        return name.strip("/")[len(root.strip("/")) :].lstrip("/")

    @contextmanager
    def _told(self, to_disk: bool = False) -> Iterator[None]:
        """Whatever a storage's driver raises is told as one kind of error, but for what is not there."""
        try:
            yield
        except (FileNotFoundError, StorageFailed, Unusable):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL_DISK and (self.local or to_disk):
                raise
            raise StorageFailed(f"the storage {self.address} failed: {_reason(error)}") from error


def checked(storage: str) -> str:
    """The option `storage` as a run keeps it, with an absolute path, once something was written there and read back.

    ValueError if it cannot be.
    """
    if problem := problem_of_storage(storage):
        raise ValueError(problem)
    if "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
    check_token(storage, "driver")
    return storage


def check_token(storage: str, name: str) -> None:
    """Writes, reads back and removes a file there, named after whoever asks. ValueError, with the way out, if that
    does not work within half a minute."""
    folder, token = Folder(storage), f".token-{name}-{secrets.token_hex(4)}"
    written = secrets.token_hex(16).encode()

    def ask() -> bytes:
        folder.write(token, written)
        found = folder.read(token)
        folder.remove([token])
        return found

    try:
        found = _within(_SECONDS_FOR_A_TOKEN, ask)
    except OSError as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"the storage must be one that can be written to and read, found {storage}: {_reason(cause)}; "
            f"{_way_out(folder, cause)}"
        ) from error
    if found != written:
        raise ValueError(f"the storage must give back what was written to it, found other bytes in {storage}/{token}")


def _way_out(folder: Folder, error: BaseException) -> str:
    said = f"{type(error).__name__} {error}"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return "make room there"
    if folder.local:
        return "name a folder that may be written, on a mount that all nodes share"
    if "Credentials" in said:
        return "give them as the service's own tools find them (for S3: the environment, ~/.aws, or the machine's role)"
    if "ucket does not exist" in said or "NoSuchBucket" in said:
        return "make the bucket first, or name another one"
    if isinstance(error, PermissionError) or "Denied" in said or "Forbidden" in said:
        return "let these credentials read, write and delete there"
    return "see that it can be reached from here (where it is no server of AWS, AWS_ENDPOINT_URL says which)"


def is_below(name: str) -> bool:
    """Whether a relative name that somebody else has given stays in its folder."""
    return not name.startswith("/") and ".." not in name.split("/")


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What the function returns or raises; StorageFailed when it takes longer. A mount that hangs cannot be asked for
    a timeout, so it is left to a thread of its own."""
    outcome: list[tuple[T | None, BaseException | None]] = []

    def call() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise StorageFailed(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _reason(error: BaseException) -> str:
    """What the driver says, in one line."""
    said = " ".join(str(error).split())
    return said if isinstance(error, StorageFailed) and said else f"{type(error).__name__}: {said}"


def _options(scheme: str) -> dict[str, Any]:
    """What a file system is opened with: no memory of listings, for others write there too."""
    if scheme not in ("s3", "s3a"):
        return {"use_listings_cache": False}
    # Whoever calls tries again, where that makes sense; several tries here would take minutes.
    seconds = {"connect_timeout": _SECONDS_TO_CONNECT, "read_timeout": _SECONDS_TO_ANSWER}
    return {"use_listings_cache": False, "config_kwargs": {**seconds, "retries": {"total_max_attempts": 1}}}


def _opened(address: str) -> tuple[Any, str]:
    """The file system of an address, which fsspec keeps, and the path in it."""
    if (local := Folder(address).local) is not None:
        return fsspec.filesystem("file"), str(local).rstrip("/")
    scheme = address.partition("://")[0]
    if "?" in address:
        return _opened_by_pyarrow(address)
    if scheme in _FEEBLE:
        raise Unusable(_unknown(address, f"{scheme}:// is nothing that several machines can write to"))
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise Unusable(_unknown(address, f"nobody knows {scheme}://")) from None
    except ImportError as error:
        package = "pip install 'segdec-tuner[cluster]'" if scheme in ("s3", "s3a") else str(error)
        raise Unusable(f"the storage {address} needs a package that is not installed; {package}") from None
    system, path = fsspec.core.url_to_fs(address, **_options(scheme))
    if hasattr(system, "retries"):
        system.retries = 1
    return system, str(path).rstrip("/")


def _opened_by_pyarrow(address: str) -> tuple[Any, str]:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    try:
        system, path = FileSystem.from_uri(address)
    except (ArrowException, ValueError) as error:
        raise Unusable(_unknown(address, f"pyarrow cannot read it ({_reason(error)})")) from None
    return ArrowFSWrapper(system), path.rstrip("/")


def _unknown(address: str, why: str) -> str:
    return (
        f"the storage must be a path, or an address that fsspec knows such as s3://BUCKET/FOLDER, or one with a ?query "
        f"that pyarrow knows, found {address}: {why}"
    )


def _at_most(system: Any, size: int = 0) -> dict[str, float]:
    """How long something may take, where fsspec can end it: s3fs alone would wait for ever for a server that accepts a
    file and never answers, and such a file might arrive after newer ones."""
    if not isinstance(system, AsyncFileSystem):
        return {}
    return {"timeout": _SECONDS_TO_CONNECT + _SECONDS_TO_ANSWER + size / _BYTES_A_SECOND}


def _is_object_store(system: Any) -> bool:
    """Whether it lists by the beginning of a name, and needs no folders."""
    return "prefix" in inspect.signature(system._find).parameters if hasattr(system, "_find") else False


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _make_room_for(system: Any, path: str) -> None:
    """The folders above a file, where the storage has such things."""
    if not _is_object_store(system):
        system.makedirs(path.rpartition("/")[0], exist_ok=True)


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.part")
    try:
        copy_durably(source, building)
        building.replace(target)
    except OSError:
        with suppress(OSError):
            building.unlink()
        raise


def patiently(
    function: Callable[[], T],
    seconds: float,
    may_pass: Callable[[OSError], bool] = lambda error: isinstance(error, StorageFailed),
) -> T:
    """Calls again after waits that grow, as long as what it raises may pass and there is time; then raises that."""
    deadline, wait = time.monotonic() + seconds, 1.0
    while True:
        try:
            return function()
        except OSError as error:
            if not may_pass(error) or time.monotonic() + wait > deadline:
                raise
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_S)


def copy_durably(source: Path, target: Path) -> None:
    """A copy that survives a power cut."""
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 2**20)
        write.flush()
        os.fsync(write.fileno())

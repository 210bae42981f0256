"""Where the images of a run lie: a folder, the synthetic set, or an address in object storage.

Paths of samples always begin with a folder. What lies in object storage has its copy there on the driver, which must
look at all of it; a node reads the files that it needs from the address, and keeps none. fsspec reads all addresses.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from model import synthetic
from model.files import locked, write_json
from tuner.options import secret_in
from tuner.remote import patiently

SYNTHETIC = "synthetic"

_FILES_AT_ONCE = 32

_PATIENCE_S = 180.0
"""so long a file is asked for again that cannot be read"""


class DataFailed(OSError):
    """Data that are there, as far as is known, and cannot be read: the storage fails, or refuses this machine. The
    message names the file."""


@dataclass(frozen=True)
class Source:
    """A data set as run.json names it, and the folder that the paths of its samples begin with."""

    name: str
    """an absolute path, an address, or the word synthetic"""
    folder: Path
    height: int
    width: int
    """px of the synthetic set"""

    @classmethod
    def of(cls, name: str, height: int, width: int) -> Source:
        """`name` as `checked` returns it."""
        if name == SYNTHETIC:
            made_by = hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()[:8]
            return cls(name, _in_cache(f"synthetic-{height}x{width}-{made_by}"), height, width)
        if is_address(name):
            return cls(name, _in_cache(f"data-{hashlib.sha256(name.encode()).hexdigest()[:12]}"), height, width)
        return cls(name, Path(name), height, width)

    @property
    def is_remote(self) -> bool:
        return is_address(self.name)

    def fetch(self, console: Console | None = None) -> None:
        """Makes the folder hold the data set, where that is ours to do: on the driver, all of it."""
        if self.is_remote:
            _copy(self.name, self.folder, console)
        self.make()

    def make(self) -> None:
        """Makes the synthetic set where it is not."""
        if self.name != SYNTHETIC or self.folder.exists():
            return
        try:
            synthetic.write(self.folder, height=self.height, width=self.width)
        except (OSError, ValueError):
            if not self.folder.exists():  # else another process or node made it meanwhile
                raise

    def read(self, path: Path) -> bytes:
        """The bytes of a sample's file, from where the data set lies. Tried again for some minutes where that fails,
        then DataFailed; FileNotFoundError at once."""
        try:
            return patiently(lambda: self.read_once(path), _PATIENCE_S, _may_pass)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataFailed(f"the data cannot be read: {error}") from error

    def is_out_of_reach(self) -> bool:
        """Whether nothing can be read of the data set from here at all."""
        if not self.is_remote:
            return not self.folder.exists()
        files, root = _opened(self.name)
        try:
            with _told_as_os_error(self.name):
                files.invalidate_cache()
                files.info(root)
        except OSError as error:
            return not isinstance(error, FileNotFoundError)
        return False

    def read_once(self, path: Path) -> bytes:
        """The same without patience. OSError if the bytes cannot be had."""
        if not self.is_remote:
            return path.read_bytes()
        files, root = _opened(self.name)
        name = posixpath.join(root, path.relative_to(self.folder).as_posix())
        with _told_as_os_error(f"{self.name}/{path.relative_to(self.folder).as_posix()}"):
            data: bytes = files.cat_file(name)
        return data


def _may_pass(error: OSError) -> bool:
    """Whether a file may be read later: nothing says that it is not there, or that we may not."""
    is_refused = any(isinstance(one, PermissionError) for one in (error, error.__cause__))
    return not (is_refused or isinstance(error, FileNotFoundError) or "Credentials" in str(error))


def is_address(name: str) -> bool:
    """Whether this is no path."""
    return "://" in name


def checked(data: str | Path) -> str:
    """The absolute path, the address, or the word synthetic. ValueError for what can be none of them."""
    if not str(data):  # which would be the current folder
        raise ValueError(
            "the data must be a folder, an address such as s3://BUCKET/FOLDER, or the word synthetic, found nothing; "
            "is a variable of the shell unset?"
        )
    if str(data) == SYNTHETIC:
        return SYNTHETIC
    if not is_address(str(data)):
        return str(Path(data).resolve())  # workers have another current folder
    address = str(data).rstrip("/")
    if problem := problem_of_address(address):
        raise ValueError(problem)
    _opened(address)
    return address


def problem_of_address(address: str) -> str | None:
    """What is wrong with the form of an address, never with a secret that is in it; opens nothing."""
    if not (where := secret_in(address)):
        return None
    scheme = address.partition("://")[0]
    return (
        "the data's address must hold no password or key, for run.json keeps it and the list of processes shows it; "
        f"found one {where} in {scheme}://...; leave it to where tools for {scheme} look for it: environment, files, "
        "the machine's role"
    )


@cache
def _opened(address: str) -> tuple[Any, str]:
    """The file system of an address, and the place there. ValueError if nothing here reads such addresses."""
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"the data must be a folder, or an address that fsspec reads, found {address} ({error}); for s3:// run: "
            "pip install 'segdec-tuner[cluster]'"
        ) from error
    return files, root


@contextmanager
def _told_as_os_error(what: str) -> Iterator[None]:
    """Each storage has errors of its own."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}: is missing") from error
    except Exception as error:
        raise OSError(f"{what}: cannot be read ({type(error).__name__}: {error})") from error


def _in_cache(name: str) -> Path:
    from model.data import cache_root  # needs torch, which a machine that only writes a report may lack

    return cache_root().absolute() / name


def _copy(address: str, folder: Path, console: Console | None) -> None:
    """Makes the folder hold what lies at the address now: fetches what is new or has changed, removes what is gone.

    ValueError if nothing lies there, or nobody lets us look.
    """
    files, root = _opened(address)
    folder.parent.mkdir(parents=True, exist_ok=True)
    index = folder.with_name(f"{folder.name}.json")
    with locked(folder.with_name(f"{folder.name}.lock")):
        try:
            with _told_as_os_error(address):
                files.invalidate_cache()
                listed = files.find(root, detail=True)
        except OSError as error:
            raise ValueError(
                f"the data must be where they can be read from here, found {error}; mend --data, or the credentials "
                "where tools for this storage look for them"
            ) from error
        there = _named(address, root, listed)
        versions = {name: _version(info) for name, info in there.items()}
        known = json.loads(index.read_text()) if index.exists() else {}
        for name in known.keys() - there.keys():
            (folder / name).unlink(missing_ok=True)
        have = {n: v for n, v in versions.items() if known.get(n) == v and (folder / n).exists()}
        missing = [name for name in there if name not in have]
        folder.mkdir(exist_ok=True)
        try:
            with _progress(console, address, sum(there[name]["size"] or 0 for name in missing)) as told:
                for name in _each(missing, lambda name: _fetch(files, there[name]["name"], folder / name)):
                    have[name] = versions[name]
                    told(there[name]["size"] or 0)
        finally:  # what is there need not be fetched again
            write_json(index, have)


def _named(address: str, root: str, listed: dict[str, Any]) -> dict[str, Any]:
    """What is listed below an address, by the names that it will have in a folder. ValueError if that cannot be."""
    there: dict[str, Any] = {}
    for key, info in listed.items():
        # Consoles of object storage make a folder as an empty object that is called like one.
        if key.endswith("/") or info["type"] == "directory":
            continue
        name = key.removeprefix(root.rstrip("/")).removeprefix("/")
        if not name:
            raise ValueError(f"the data must be a folder, found the file {address}; name the folder that it lies in")
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"names of files in {address} must be paths within it, found {name!r}; rename it")
        there[name] = info | {"name": key}
    if not there:
        raise ValueError(f"the data must be at the address that is given, found nothing at {address}; mend --data")
    return there


def _version(info: dict[str, Any]) -> list[Any]:
    """Of a file, in any storage: other bytes have another one."""
    changes = next((info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if info.get(key)), "")
    return [info["size"], str(changes)]


def _fetch(files: Any, source: str, target: Path) -> None:
    with _told_as_os_error(source):
        data = files.cat_file(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def _each(names: list[str], function: Any) -> Iterator[str]:
    """Calls the function for all names, many at once; yields those that are done."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for name, _ in zip(names, pool.map(function, names), strict=True):
            yield name


@contextmanager
def _progress(console: Console | None, address: str, size: int) -> Iterator[Any]:
    """A function that takes how many bytes have come."""
    if not size:
        yield lambda _: None
        return
    bar = Progress(
        TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), console=console, transient=True
    )
    with bar if console else nullcontext():
        task = bar.add_task(address, total=size)
        yield lambda come: bar.advance(task, come)

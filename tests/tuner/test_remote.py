"""Folders at addresses: here, on a real S3 server, and through pyarrow."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests import s3
from tuner import remote
from tuner.options import Options
from tuner.remote import Folder, StorageFailed


@pytest.fixture(scope="module")
def wire() -> Iterator[s3.Wire]:
    with s3.serving() as found:
        yield found


@pytest.fixture(params=["s3", "path", "file", "pyarrow"])
def folder(request, wire: s3.Wire, tmp_path: Path) -> Folder:
    query = f"endpoint_override=127.0.0.1:{wire.port}&scheme=http&region=us-east-1"
    return Folder(
        {
            "s3": f"s3://bucket/{tmp_path.name}",
            "path": str(tmp_path / "new"),
            "file": f"file://{tmp_path}/new",
            "pyarrow": f"s3://bucket/{tmp_path.name}?{query}",
        }[request.param]
    )


def test_what_is_written_can_be_listed_read_and_removed(folder: Folder, tmp_path: Path) -> None:
    assert (folder.entries(), folder.files(), folder.files("a/b")) == ({}, {}, {})
    with pytest.raises(FileNotFoundError):
        folder.read("one")
    (tmp_path / "source").write_bytes(b"12345")
    folder.write("one", b"1")
    folder.put(tmp_path / "source", "a/x-1/five")
    folder.put(tmp_path / "source", "a/x-12/five")
    folder.write("a/x-1.2/three", b"123")
    assert folder.entries() == {"one": 1, "a": None}
    assert (folder / "a").entries() == {"x-1": None, "x-12": None, "x-1.2": None}
    assert folder.files() == {"one": 1, "a/x-1/five": 5, "a/x-12/five": 5, "a/x-1.2/three": 3}
    assert folder.files("a/x-1") == {"a/x-1/five": 5, "a/x-12/five": 5, "a/x-1.2/three": 3}
    assert folder.files("a/x-12") == {"a/x-12/five": 5}
    assert (folder / "a").files() == {"x-1/five": 5, "x-12/five": 5, "x-1.2/three": 3}
    assert (folder / "a/x-1").read("five") == b"12345"
    folder.get("a/x-1/five", tmp_path / "got" / "here")
    assert (tmp_path / "got/here").read_bytes() == b"12345"
    folder.write("one", b"another")
    folder.remove(["a/x-1/five", "not there", "a/x-12/five"])
    assert folder.files() == {"one": 7, "a/x-1.2/three": 3}
    assert folder.read("one") == b"another"


def test_a_local_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "there"))
    folder.write("one", b"before")
    with pytest.raises(FileNotFoundError):
        folder.put(tmp_path / "none", "one")
    assert folder.read("one") == b"before"
    assert folder.files() == {"one": 6}


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("", "storage must be a path, or an address such as s3://BUCKET/FOLDER, found ''; leave it out"),
        ("s3://", "found no bucket or host in s3://"),
        ("file:///", "found no path in file:///"),
        ("S3://bucket", "and not several addresses in one"),
        ("simplecache::s3://bucket", "and not several addresses in one"),
        ("s3://key:hush@bucket/x", r"must hold no secret, .* found one before the @ in s3://\.\.\.; give credentials"),
        ("s3://bucket/x?secret_key=hush", r"found one as secret_key= in s3://"),
        ("abfs://c/x?sig=hush", r"found one as sig= in abfs://"),
    ],
)
def test_an_address_of_another_form_is_refused_without_its_secrets(storage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Options(storage=storage)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("nope://a/b", "found nope://a/b: nobody knows nope://"),
        ("memory://a", "memory:// is nothing that several machines can write to"),
        ("gs://a/b", "gs://a/b needs a package that is not installed; Please install gcsfs"),
        ("nope://a?b=1", "pyarrow cannot read it"),
        ("s3://none/x", "found s3://none/x: NoSuchBucket: .*; make the bucket first"),
        ("/proc/x", "found /proc/x: FileNotFoundError: .*; name a folder that may be written"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_with_the_way_out(wire: s3.Wire, storage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remote.checked(storage)


def test_without_s3fs_the_extra_is_named(wire: s3.Wire, monkeypatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"not installed; pip install 'segdec-tuner\[cluster\]'"):
        remote.checked("s3://bucket/x")


def test_without_credentials(wire: s3.Wire, monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"NoCredentialsError: .*; give them as the service's own tools find them"):
        remote.checked("s3://bucket/x")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_token_leaves_nothing(wire: s3.Wire, tmp_path: Path, monkeypatch) -> None:
    assert remote.checked("s3://bucket/token") == "s3://bucket/token"
    assert Folder("s3://bucket/token").files() == {}
    monkeypatch.chdir(tmp_path)
    assert remote.checked("share") == str(tmp_path / "share")  # workers have another current folder
    assert list((tmp_path / "share").iterdir()) == []


@pytest.mark.parametrize("state", ["cut", "busy"])
def test_a_server_that_fails_is_one_kind_of_error(wire: s3.Wire, state: str) -> None:
    folder = Folder("s3://bucket/fails")
    folder.write("one", b"1")
    wire.fail(state)
    try:
        for ask in (folder.entries, folder.files, lambda: folder.read("one"), lambda: folder.write("one", b"2")):
            with pytest.raises(StorageFailed, match=r"the storage s3://bucket/fails failed: \w+"):
                ask()
        with pytest.raises(ValueError, match="; see that it can be reached from here"):
            remote.check_token("s3://bucket/fails", "driver")
    finally:
        wire.mend()
    assert folder.read("one") == b"1"


def test_a_server_that_never_answers_is_an_error(wire: s3.Wire, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_SECONDS_TO_ANSWER", 1)
    monkeypatch.setattr(remote, "_SECONDS_TO_CONNECT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setitem(os.environ, "AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"found s3://bucket/x: .*Timeout.*; see that it can be reached"):
            remote.checked("s3://bucket/x")
        assert time.monotonic() - began < 20
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_disk_that_is_full_is_told_as_such_and_no_outage(tmp_path: Path, monkeypatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    (tmp_path / "one").write_bytes(b"1")
    monkeypatch.setattr(remote, "copy_durably", full)
    with pytest.raises(OSError, match="Disk quota exceeded") as caught:
        Folder(str(tmp_path / "there")).put(tmp_path / "one", "one")
    assert not isinstance(caught.value, StorageFailed)
    monkeypatch.setattr(remote, "write_atomically", lambda path, data: full(path, path))
    with pytest.raises(ValueError, match="Disk quota exceeded; make room there"):
        remote.checked(str(tmp_path / "there"))

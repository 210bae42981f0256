"""Data sets in object storage, on a real S3 server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

from model import synthetic
from model.data import open_cache
from tests import s3
from tests.tuner.conftest import small_space
from tuner import datasets, remote
from tuner import run as runs

ADDRESS = "s3://bucket/folder/set"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("datasets") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return folder


@pytest.fixture
def there(data: Path, tmp_path: Path, monkeypatch) -> Iterator[S3FileSystem]:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    datasets._opened.cache_clear()
    with s3.serving():
        files = S3FileSystem()
        upload(data, ADDRESS)
        yield files
    datasets._opened.cache_clear()


def upload(folder: Path, address: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            S3FileSystem().pipe_file(f"{address}/{path.relative_to(folder)}", path.read_bytes())


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_on_an_address_has_the_samples_of_its_folder(there: S3FileSystem, data: Path, tmp_path: Path) -> None:
    """Wherever its driver is; each machine has a copy of its own, and a run remembers the address."""
    run = runs.create(small_space(), ADDRESS + "/", tmp_path)
    assert run.info["data_path"] == ADDRESS
    assert files_in(run.data_folder) == files_in(data)
    assert run.info["data"] == runs.create(small_space(), data, tmp_path, "local").info["data"]
    shutil.rmtree(tmp_path / "cache")
    again = runs.load(run.directory)
    found = again.splits()
    again.verify(found.train)
    assert found.train[0].image.is_relative_to(tmp_path / "cache")
    assert files_in(again.data_folder) == files_in(data)
    moved = runs.load(tmp_path / "local", data=ADDRESS)
    moved.verify(moved.splits().test)
    assert moved.info["data_path"] == ADDRESS


def test_the_copy_follows_what_lies_there_and_fetches_only_that(
    there: S3FileSystem, data: Path, tmp_path: Path, monkeypatch
) -> None:
    run = runs.create(small_space(), ADDRESS, tmp_path)
    found = run.splits()
    image, mask = (path.relative_to(run.data_folder) for path in (found.train[0].image, found.train[1].mask))
    there.pipe_file(f"{ADDRESS}/{image}", b"x" * (data / image).stat().st_size)
    there.rm_file(f"{ADDRESS}/{mask}")
    fetched = []
    fetch = datasets._fetch
    monkeypatch.setattr(datasets, "_fetch", lambda *told: (fetched.append(told[2]), fetch(*told)))
    with pytest.raises(ValueError, match="found 2 of 36 files missing or changed") as error:
        run.verify(found.train + found.validation)
    assert f"\n  {ADDRESS}/{image}: has other bytes than it had\n" in str(error.value)
    assert f"\n  {ADDRESS}/{mask}: is missing\n" in str(error.value)
    assert fetched == [found.train[0].image]


def put(key: str, data: bytes = b"") -> None:
    boto3.client("s3").put_object(Bucket="bucket", Key=key, Body=data)


def test_folders_that_a_console_made_are_none_of_the_files(there: S3FileSystem, data: Path, tmp_path: Path) -> None:
    for marker in ("folder/set/", "folder/set/images/", "folder/set/nothing/"):
        put(marker)
    assert files_in(runs.create(small_space(), ADDRESS, tmp_path).data_folder) == files_in(data)


@pytest.mark.parametrize("name", ["../outside.png", "images/../../outside.png", "images//twice.png", "./here.png"])
def test_a_key_that_is_no_path_within_is_refused(there: S3FileSystem, name: str, tmp_path: Path) -> None:
    put(f"folder/set/{name}", b"x")
    with pytest.raises(ValueError, match="must be paths within it, found") as error:
        runs.create(small_space(), ADDRESS, tmp_path)
    assert repr(name) in str(error.value)


def test_the_address_of_a_file_is_refused(there: S3FileSystem, data: Path, tmp_path: Path) -> None:
    name = next(iter((data / "images").iterdir())).name
    with pytest.raises(ValueError, match=rf"must be a folder, found the file {ADDRESS}/images/{name}; name the folder"):
        runs.create(small_space(), f"{ADDRESS}/images/{name}", tmp_path)


def test_a_node_keeps_no_copy_of_what_it_reads(there: S3FileSystem, data: Path, tmp_path: Path) -> None:
    """Of masks neither, which are read again for each dilation."""
    run = runs.create(small_space(), ADDRESS, tmp_path)
    found = run.splits()
    shutil.rmtree(tmp_path / "cache")
    cache = open_cache(found.train, 64, 128, read=run.source.read)
    local = open_cache(runs.create(small_space(), data, tmp_path, "local").splits().train, 64, 128, tmp_path / "other")
    assert (cache.images == local.images).all()
    assert (cache.targets(5) == local.targets(5)).all()
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".npy", ".lock", ".use", ""}


def test_a_file_that_cannot_be_read_is_asked_for_again(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "image.png"
    path.symlink_to(path)  # too many levels of links
    waits = []

    def mend(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            path.unlink()
            path.write_bytes(b"image")

    monkeypatch.setattr(remote.time, "sleep", mend)
    source = datasets.Source.of(str(tmp_path), 64, 128)
    assert source.read(path) == b"image"
    assert waits == [1, 2, 4]
    with pytest.raises(FileNotFoundError):
        source.read(tmp_path / "none")
    path.unlink()
    path.symlink_to(path)
    monkeypatch.setattr(datasets, "_PATIENCE_S", 0.0)
    with pytest.raises(datasets.DataFailed, match=r"the data cannot be read: .*image\.png"):
        source.read(path)
    assert len(waits) == 3


def test_what_cannot_be_read_is_said(there: S3FileSystem, data: Path, tmp_path: Path, monkeypatch) -> None:
    run = runs.create(small_space(), ADDRESS, tmp_path)
    path = run.splits().train[0].image
    there.rm_file(f"{ADDRESS}/{path.relative_to(run.data_folder)}")
    with pytest.raises(FileNotFoundError, match=rf"{ADDRESS}/images/{path.name}: is missing"):
        run.source.read(path)
    assert not run.source.is_out_of_reach()
    with pytest.raises(ValueError, match="found nothing at s3://bucket/nowhere"):
        runs.create(small_space(), "s3://bucket/nowhere", tmp_path, "nowhere")
    with pytest.raises(ValueError, match=r"s3://no-bucket-at-all/x: .*; mend --data, or the credentials"):
        runs.create(small_space(), "s3://no-bucket-at-all/x", tmp_path, "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("", "found nothing; is a variable of the shell unset"),
        ("nobody://knows/this", "an address that fsspec reads, found nobody://knows/this"),
        ("ftp://me:secret@host/data", r"no password or key, .* found one before the @ in ftp://\.\.\.; leave it"),
        ("s3://KEY:abc/secret@bucket/data", r"no password or key, .* found one before the @ in s3://\.\.\.; leave it"),
        (
            "s3://bucket/data?access_key=abc",
            r"no password or key, .* found one as access_key= in s3://\.\.\.; leave it",
        ),
        ("https://host/data?sig=abc", r"no password or key, .* found one as sig= in https://\.\.\.; leave it"),
        ("https://host/d?X-Amz-Credential=abc", r"found one as X-Amz-Credential= in https://\.\.\.; leave it"),
        ("simplecache::s3://KEY:abc@bucket/data", r"found one before the @ in simplecache::s3://\.\.\.; leave it"),
        (
            "s3://bucket/data?secret_key=abc",
            r"no password or key, .* found one as secret_key= in s3://\.\.\.; leave it",
        ),
    ],
)
def test_addresses_that_cannot_work_are_refused(address: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=found) as error:
        runs.create(small_space(), address, tmp_path)
    assert "secret@" not in str(error.value)
    assert "abc" not in str(error.value)

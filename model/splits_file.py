"""The splits of a run as a file, written once when the run is created, and whether the data set still is what it says.

JSON, a line a sample: the fields of `model.sample.Sample`, without those that are empty. Paths inside the data folder
are relative to it, so that the folder may move. A mask given as runs (`Rle`) is stored whole: its CSV is read no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from model.files import write_atomically
from model.inspection import digest
from model.layouts import SPLITS
from model.sample import Rle, Sample, Supervision
from model.splits import Splits, fingerprint

_SCHEMA = 1
_SHOWN_FILES = 5
_EMPTY = {"mask": None, "source": "", "split": None, "mask_digest": ""}
"""fields that are left out where they are like this"""

_TEXTS = ("name", "group", "source", "digest", "mask_digest")


def write(path: Path, splits: Splits, folder: Path) -> None:
    """Writes the splits of the data set in `folder`, atomically."""
    sides = [
        f'"{side}": [\n' + ",\n".join(json.dumps(_to_json(sample, folder)) for sample in split) + "\n]"
        for side, split in zip(SPLITS, splits, strict=True)
    ]
    write_atomically(path, (f'{{"schema": {_SCHEMA},\n' + ",\n".join(sides) + "}\n").encode())


def read(path: Path, folder: Path, expected: str) -> Splits:
    """The splits that `write` was given, of the data set that now lies in `folder`; opens no file of it.

    ValueError if the file is broken, or is not the one with the fingerprint `expected`.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != _SCHEMA:
            raise ValueError(f"schema {document['schema']!r}, not {_SCHEMA}")
        found = Splits(*([_from_json(row, folder) for row in document[side]] for side in SPLITS))
        if (now := fingerprint(found)) != expected:
            raise ValueError(f"the fingerprint {now}, not {expected}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: must hold the splits that the run was created with ({_words(error)}); "
            "restore the file from a copy, or start a new run"
        ) from error
    return found


def check_files(samples: Iterable[Sample], folder: Path, way_out: str) -> None:
    """ValueError that names the files of these samples that are missing or have other bytes; decodes none.

    `folder` is the data set's, and `way_out` says what to do, both for the message.
    """
    digests: dict[Path, str] = {}
    for sample in samples:
        digests[sample.image] = sample.digest
        if isinstance(sample.mask, Path):
            digests[sample.mask] = sample.mask_digest
    with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter's lock
        problems = [problem for problem in pool.map(_file_problem, digests, digests.values()) if problem]
    if not problems:
        return
    if not folder.is_dir():
        raise ValueError(f"the data must lie where the run found them, but there is no folder {folder}; {way_out}")
    shown = problems[:_SHOWN_FILES]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    raise ValueError(
        f"the data in {folder} must be what the run was created with, found {len(problems)} of {len(digests)} files "
        "missing or changed:" + "".join(f"\n  {line}" for line in shown) + f"\n{way_out}"
    )


def _file_problem(path: Path, expected: str) -> str | None:
    try:
        return None if digest(path) == expected else f"{path}: has other bytes than it had"
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"


def _to_json(sample: Sample, folder: Path) -> dict[str, Any]:
    row = {
        "name": sample.name,
        "image": _relative(sample.image, folder),
        "mask": _mask_to_json(sample.mask, folder),
        "positive": sample.positive,
        "supervision": sample.supervision.value,
        "group": sample.group,
        "source": sample.source,
        "split": sample.split,
        "digest": sample.digest,
        "mask_digest": sample.mask_digest,
    }
    return {key: value for key, value in row.items() if key not in _EMPTY or value != _EMPTY[key]}


def _mask_to_json(mask: Path | Rle | None, folder: Path) -> Any:
    if isinstance(mask, Rle):
        return {
            "file": _relative(mask.file, folder),
            "image": mask.image,
            "height": mask.height,
            "width": mask.width,
            "runs": mask.runs,
        }
    return None if mask is None else _relative(mask, folder)


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _from_json(row: dict[str, Any], folder: Path) -> Sample:
    """ValueError, KeyError or TypeError if it is none of ours."""
    row = _EMPTY | row
    if not isinstance(row["positive"], bool) or not all(isinstance(row[key], str) for key in _TEXTS):
        raise TypeError(f"a field of {row['name']!r} has another type")
    mask = _mask_from_json(row["mask"], folder)
    if isinstance(mask, Rle) and digest(mask) != row["mask_digest"]:
        raise ValueError(f"the runs of {row['name']!r} do not have its mask_digest")
    return Sample(
        **row | {"image": folder / row["image"], "mask": mask, "supervision": Supervision(row["supervision"])}
    )


def _mask_from_json(mask: Any, folder: Path) -> Path | Rle | None:
    if isinstance(mask, dict):
        return Rle(**mask | {"file": folder / mask["file"], "runs": tuple(mask["runs"])})
    return None if mask is None else folder / mask


def _words(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)

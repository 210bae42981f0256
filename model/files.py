"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FULL_DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
"""a disk that is full, or a quota or a limit that is reached"""

_LONGEST = 255
"""bytes of a name, on common file systems"""


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, also after a power cut."""
    building = path.with_name(f".{path.name}.part")
    if len(os.fsencode(building.name)) > _LONGEST:  # the file's own name may fit
        building = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.part")
    try:
        with building.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            building.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """One JSON document, atomically. NaN is refused: a figure that does not exist is None."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that the kernel frees when the process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

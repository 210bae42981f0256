"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, also after a power cut."""
    building = path.with_name(f".{path.name}.part")
    with building.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    building.replace(path)


def write_json(path: Path, value: Any) -> None:
    """One JSON document, atomically. NaN is refused: a figure that does not exist is None."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

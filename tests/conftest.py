"""Where the shared reference material lies, if it does."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# What tests compute is small: threads of one process only wait for each other, and the suite runs a process a core.
# Here and not in a fixture: torch reads it once, and the commands that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# Kernels for CUDA are tested without a GPU too. Triton reads it when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Loaded machines are slow at times; tests have a timeout of their own.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


def heeds_ctrl_c() -> None:
    """For `preexec_fn`: a shell's background jobs, and so a suite that runs as one, ignore the signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Golden numbers of the public implementation."""
    return _shared("reference")


@pytest.fixture(scope="session")
def crackforest() -> Path:
    return _shared("data/crackforest")


@pytest.fixture(scope="session")
def crackseg448() -> Path:
    return _shared("data/crackseg448")


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs {name} in a folder 'shared' beside the checkout")
    return SHARED / name

"""Distributed hyperparameter search for surface-defect segmentation.

`run_search` and `run_trial` do what `tuner search` and `tuner trial` do; `load_run` opens the directory of a run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.pipeline import run_search
    from tuner.run import load as load_run
    from tuner.single import run_trial

__all__ = ["load_run", "run_search", "run_trial"]

_WHERE = {
    "run_search": ("tuner.pipeline", "run_search"),
    "run_trial": ("tuner.single", "run_trial"),
    "load_run": ("tuner.run", "load"),
}


def __getattr__(name: str) -> Any:
    """Imports Ray and torch only for those who ask for a search."""
    if name not in _WHERE:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)

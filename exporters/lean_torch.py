"""Imported by a worker that traces, this imports torch without two parts that tracing our own models does not need.

They take a quarter of torch's import time, of which a cold export mostly consists: `cuda.bindings`, by which torch
annotates CUDA graphs, and `torch._meta_registrations`, the shapes of operators on tensors without data (0.2 of 0.9 s;
seen with torch 2.13). They are imported when something asks for them, or by `complete`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, cast

META = "torch._meta_registrations"


class _Later(ModuleType):
    """Stands for the module until one of its names is used: then the module itself is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks a module that it finds
            raise AttributeError(name)
        complete()
        return getattr(sys.modules[META], name)


def complete() -> None:
    """Imports what was put off: a user's model may be built from tensors without data, or draw random numbers."""
    if isinstance(sys.modules.get(META), _Later):
        del sys.modules[META]
        importlib.import_module(META)


def _import_torch() -> None:
    hidden = "cuda.bindings" not in sys.modules
    if hidden:
        sys.modules["cuda.bindings"] = cast("Any", None)
    sys.modules[META] = _Later(META)
    importlib.import_module("torch")
    if hidden:
        del sys.modules["cuda.bindings"]


if "torch" not in sys.modules:
    _import_torch()

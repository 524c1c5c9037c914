"""Imports torch without two parts that none of our models needs and that take a quarter of its import time.

They are `cuda.bindings`, by which torch annotates CUDA graphs, and `torch._meta_registrations`, the shapes of operators
on tensors without data (0.2 of 0.9 s; seen with torch 2.13). A cold export is mostly the import of torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, cast

META = "torch._meta_registrations"


def import_torch() -> None:
    """`import torch`, unless somebody has; the parts come when something asks for them, or by `complete`."""
    if "torch" in sys.modules:
        return
    hidden = "cuda.bindings" not in sys.modules
    if hidden:
        sys.modules["cuda.bindings"] = cast("Any", None)
    sys.modules[META] = _Later(META)
    importlib.import_module("torch")
    if hidden:
        del sys.modules["cuda.bindings"]


def complete() -> None:
    """Imports what `import_torch` put off: a user's model may be built from tensors without data."""
    if isinstance(sys.modules.get(META), _Later):
        del sys.modules[META]
        importlib.import_module(META)


class _Later(ModuleType):
    """Stands for the module until one of its names is used: then the module itself is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks a module that it finds
            raise AttributeError(name)
        complete()
        return getattr(sys.modules[META], name)

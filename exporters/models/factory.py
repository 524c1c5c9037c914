"""The user's own code: `package.module:function` imported, and whatever it raises told in one line that names it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from exporters.errors import BadRequest, ExportgateError, first_line


def import_function(text: str, search: Sequence[Path], role: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; `role` ("factory", "feeds") is what messages call it.

    The folders of `search` come first while it is imported, as they do where `exporters.keys` digests its source.

    Raises:
        BadRequest: it cannot be imported.
    """
    module, _, name = text.partition(":")
    try:
        # Our own need nothing from there, and a folder of the user's may have an `onnx.py`.
        with _first(() if module.startswith("exporters.") else search):
            return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        # Importing runs the user's module, which may raise anything.
        what = f"{role} '{text}' cannot be imported ({type(error).__name__}: {first_line(error)})"
        raise BadRequest(what, "give an importable package.module:function") from error


@contextmanager
def telling(text: str, role: str) -> Generator[None]:
    """Within it, what the user's function raises becomes a BadRequest that names it; our own errors stay."""
    try:
        yield
    except ExportgateError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{role} '{text}' raised {type(error).__name__}: {first_line(error)}"
        raise BadRequest(what, f"correct the {role}") from error


@contextmanager
def _first(folders: Sequence[Path]) -> Generator[None]:
    """The import path with these folders in front, put back afterwards."""
    added = [str(p) for p in folders if str(p) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for path in added:
            with suppress(ValueError):  # the module may have changed the path itself
                sys.path.remove(path)

"""Arrays as files: how they cross processes, memory-mapped, never pickled."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import BadRequest

if TYPE_CHECKING:  # importing numpy takes longer than starting a worker, so what only passes arrays on does not
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:
    Array = Any

Feeds = Mapping[str, Array]


def save(arrays: Feeds, folder: Path) -> dict[str, str]:
    """Writes each array as folder/N.npy (the name may not be a legal file name) and returns name -> path."""
    import numpy as np

    paths: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, array) in enumerate(arrays.items()):
            path = folder / f"{number}.npy"
            np.save(path, array, allow_pickle=False)
            paths[name] = str(path)
    except OSError as error:
        # The folder of the run and not of the call, so that a full disk is told in the same words by every claim.
        place = next((p for p in folder.parents if p.name == "arrays"), folder)
        why = error.strerror or os.strerror(errno.ENOSPC)  # numpy tells how much was written
        raise BadRequest(
            f"arrays cannot be written to {place} ({why})",
            "make room there, or set TMPDIR to another folder",
        ) from None
    return paths


def load(paths: Mapping[str, str]) -> dict[str, Array]:
    """Memory-maps the arrays that `save` wrote."""
    import numpy as np

    return {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}

"""Arrays as files: how they cross processes, memory-mapped, never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing numpy takes longer than starting a worker, so what only passes arrays on does not
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:
    Array = Any

Feeds = Mapping[str, Array]


def save(arrays: Feeds, folder: Path) -> dict[str, str]:
    """Writes each array as folder/N.npy (the name may not be a legal file name) and returns name -> path."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, str] = {}
    for number, (name, array) in enumerate(arrays.items()):
        path = folder / f"{number}.npy"
        np.save(path, array, allow_pickle=False)
        paths[name] = str(path)
    return paths


def load(paths: Mapping[str, str]) -> dict[str, Array]:
    """Memory-maps the arrays that `save` wrote."""
    import numpy as np

    return {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}

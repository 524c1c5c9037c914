"""The cache's folder: what is made in it is made aside and renamed in whole, and a full disk is one line."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporters.errors import BadRequest
from exporters.toolchain import cache_root

ABANDONED = 86400.0  # seconds: longer than any limit on an export


@contextmanager
def writing() -> Generator[None]:
    """Within it, a full or forbidden disk is a BadRequest about the cache."""
    try:
        yield
    except OSError as error:
        raise BadRequest(
            f"the cache {cache_root()} cannot be written ({error.strerror or error})",
            "make room, or set EXPORTGATE_CACHE to a folder of yours",
        ) from None


def scratch() -> Path:
    """Where artifacts are while they are made or removed; on the file system of the finished ones."""
    return cache_root() / "tmp"


@contextmanager
def temporary_folder() -> Generator[Path]:
    """An empty folder that is removed afterwards if it is still there (a finished artifact was renamed away).

    Raises:
        BadRequest: it cannot be made.
    """
    folder = scratch() / uuid.uuid4().hex
    with writing():
        scratch().mkdir(parents=True, exist_ok=True)
        for stale in scratch().iterdir():  # of runs that were killed; process ids say nothing between containers
            with suppress(FileNotFoundError):
                if time.time() - stale.stat().st_mtime > ABANDONED:
                    shutil.rmtree(stale, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

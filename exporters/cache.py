"""The cache's folder: what is made in it is made aside and renamed in whole, and a full disk is one line."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from exporters.errors import BadRequest
from exporters.toolchain import cache_root


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
    import psutil  # here, since a cold export does not wait for what it need not

    folder = scratch() / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with writing():
        scratch().mkdir(parents=True, exist_ok=True)
        for stale in scratch().iterdir():  # of runs that were killed
            owner = stale.name.partition("-")[0]
            if owner.isdecimal() and not psutil.pid_exists(int(owner)):
                shutil.rmtree(stale, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

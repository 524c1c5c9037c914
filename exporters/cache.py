"""The cache's folder: made aside and renamed in whole, shown and pruned; a full disk is one line."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from exporters.errors import BadRequest
from exporters.toolchain import cache_root

ABANDONED = 86400.0  # seconds: longer than any limit on an export
DAY = 86400.0
# What the cache holds, by folder. `placed` remembers which of the user's files are ours, so that it is never pruned.
KINDS = {
    "artifacts": "exported files",
    "timing": "TensorRT's timing caches, one a GPU model and version",
    "calibration": "scales of implicit INT8",
    "ranges": "ranges of tensors on calibration sets",
    "ort-trt": "timing caches of ONNX Runtime's TensorRT provider",
    "feeds": "photographs that make a model fire",
    "logs": "of verbose builds that failed",
    "toolchains": "environments of formats",
    "tmp": "what killed runs left",
}


@dataclass(frozen=True)
class Entry:
    """One file or folder of the cache: its size in bytes, and when it was used last (seconds since the epoch)."""

    kind: str
    path: Path
    bytes: int
    used: float


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


@contextmanager
def alone(name: str) -> Generator[None]:
    """Within it no other process of this cache is within it by the same name."""
    from filelock import FileLock  # 60 ms, where most commands lock nothing

    scratch().mkdir(parents=True, exist_ok=True)
    with FileLock(scratch() / f"{name}.lock"):
        yield


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


def place(data: bytes, target: Path) -> None:
    """Writes a file in whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    temporary.replace(target)


def touch(path: Path) -> None:
    """Notes that this file is in use, so that `prune` leaves what it belongs to."""
    with suppress(OSError):  # a cache that may only be read
        os.utime(path)


def entries(kinds: Sequence[str] = ()) -> list[Entry]:
    """What the cache holds, by kind, the most recently used first; all kinds where none is named.

    Raises:
        BadRequest: it cannot be read.
    """
    found: list[Entry] = []
    try:
        for kind in kinds or KINDS:
            folder = cache_root() / kind
            here = [_entry(kind, path) for path in (folder.iterdir() if folder.is_dir() else ())]
            found += sorted(here, key=lambda e: -e.used)
    except PermissionError as error:
        raise BadRequest(
            f"the cache {cache_root()} cannot be read ({error.strerror})", "set EXPORTGATE_CACHE to a folder of yours"
        ) from None
    return found


def _entry(kind: str, path: Path) -> Entry:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    states = [p.stat() for p in files if p.exists()]
    return Entry(kind, path, sum(s.st_size for s in states), max((s.st_mtime for s in states), default=0.0))


def prune(days: float, kinds: Sequence[str]) -> list[Entry]:
    """Removes what was not used for `days`; returns what is gone. Each entry moves aside first: none is left in halves.

    Raises:
        BadRequest: the cache cannot be written.
    """
    gone: list[Entry] = []
    with writing():
        scratch().mkdir(parents=True, exist_ok=True)
        for entry in entries(kinds):
            # What runs make now lies in the same folder as what killed ones left.
            if time.time() - entry.used < (max(days * DAY, ABANDONED) if entry.kind == "tmp" else days * DAY):
                continue
            aside = scratch() / uuid.uuid4().hex
            with suppress(FileNotFoundError):  # another process did it
                entry.path.replace(aside)
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
                gone.append(entry)
    return gone

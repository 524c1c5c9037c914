"""The cache's folder: made aside and renamed in whole, shown and pruned; a full disk is one line."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from exporters.errors import BadRequest, ExportgateError
from exporters.toolchain import cache_root

ABANDONED = 86400.0  # seconds: longer than any limit on an export
DAY = 86400.0
LEAST = 1 << 20  # bytes: a disk with less is full
NO_ROOM = os.strerror(errno.ENOSPC)
FIX = "make room, or set EXPORTGATE_CACHE to a folder of yours"
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
        raise BadRequest(f"the cache {cache_root()} cannot be written ({error.strerror or error})", FIX) from None


@contextmanager
def alone(name: str, waiting: Callable[[], None] = lambda: None) -> Generator[float]:
    """Within it no other process of this cache is within it by the same name; a process that is killed is out.

    Gives the seconds that it waited; `waiting` is called once those are more than one.
    """
    from filelock import FileLock, Timeout  # 60 ms, where most commands lock nothing

    folder = cache_root() / "locks"  # none of KINDS: a lock that is pruned while it is held locks nothing
    folder.mkdir(parents=True, exist_ok=True)
    lock, begin = FileLock(folder / f"{name}.lock"), time.monotonic()
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield time.monotonic() - begin
    finally:
        lock.release()


def hold(folder: Path, *, shared: bool = False) -> int | None:
    """Marks a folder as in use until the descriptor is closed, by the system where this process is killed.

    None where that cannot be told: Windows, some file systems of a network.
    """
    with suppress(ImportError, OSError):
        return _locked(folder, shared=shared, wait=True)
    return None


@contextmanager
def unheld(folder: Path) -> Generator[bool | None]:
    """Whether no process of this machine holds a folder, and within it none begins to; None where nobody can tell."""
    free, descriptor = None, None
    try:
        descriptor = _locked(folder, shared=False, wait=False)
        free = True
    except BlockingIOError:
        free = False
    except (ImportError, OSError):
        pass
    try:
        yield free
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: Path, *, shared: bool, wait: bool) -> int:
    import fcntl  # not on Windows

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def held_folder(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """A new folder that is held; made again where another process took it for abandoned before it was."""
    while True:
        folder = make()
        held = hold(folder)
        if folder.is_dir():
            return folder, held
        if held is not None:
            os.close(held)


def scratch() -> Path:
    """Where artifacts are while they are made or removed; on the file system of the finished ones."""
    return cache_root() / "tmp"


@contextmanager
def temporary_folder() -> Generator[Path]:
    """An empty folder that is removed afterwards if it is still there (a finished artifact was renamed away).

    Raises:
        BadRequest: it cannot be made.
    """
    own = f"{platform.node()[:40]}-"

    def make() -> Path:
        made = scratch() / f"{own}{uuid.uuid4().hex}"
        made.mkdir()
        return made

    with writing():
        scratch().mkdir(parents=True, exist_ok=True)
        for stale in scratch().iterdir():  # of runs that were killed
            with unheld(stale) as free:
                # What another machine holds is not always told here, nor what a container with its own kernel does.
                if (free and stale.name.startswith(own)) or (free is not False and _age(stale) > ABANDONED):
                    shutil.rmtree(stale, ignore_errors=True)
        folder, held = held_folder(make)
    try:
        yield folder
    except BadRequest:
        raise
    except ExportgateError as error:  # C++ that writes to a full disk aborts, or says so in words of its own
        if _free(folder) < LEAST:
            raise BadRequest(f"the cache {cache_root()} cannot be written ({NO_ROOM}: {error.what})", FIX) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _free(folder: Path) -> int:
    """Bytes that can still be written."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return LEAST


def _age(path: Path) -> float:
    """Seconds since a file or folder was changed; 0 if it is gone."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0


def place(data: bytes, target: Path) -> None:
    """Writes a file in whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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
    except OSError as error:
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
            with unheld(entry.path) as free, suppress(FileNotFoundError):  # another process did it
                if free is False:  # whatever the clock says
                    continue
                entry.path.replace(aside)
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
                gone.append(entry)
    return gone

"""Timing caches: which kernels won on this GPU model with this TensorRT, kept so that a second build takes seconds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.cache import alone, place, writing
from exporters.errors import BadRequest
from exporters.spec import ExportSpec
from exporters.tensorrt.library import Library
from exporters.toolchain import cache_root

PACKED = ".xz"  # a timing cache in a repository: 21 MB become 1.5


@dataclass(frozen=True)
class Begun:
    """Where a build's timing cache is kept, how large it was, and what is to be said of it."""

    path: Path
    bytes: int
    note: str


def folder() -> Path:
    """Where timing caches are kept."""
    return cache_root() / "timing"


def kept_path(name: str, version: str, gpu: str) -> Path:
    """The timing cache of a GPU model and a TensorRT version: it holds for no other."""
    return folder() / f"{slug(gpu)}-{slug(name)}-{version}.cache"


def seed(stored: Path, gpu: str, tell: Callable[[str], None]) -> None:
    """Copies a GPU model's timing caches, where some lie below a folder, to where they are kept, unless they are there.

    So baselines bring along the cache that their engines were built with: the same tactics are found again, in seconds.
    One that cannot be read is told and left out: builds are slow without it, and as good.
    """
    paths = list(stored.glob(f"*/{slug(gpu)}-tensorrt*.cache{PACKED}")) if gpu else []
    if not paths:
        return
    try:
        import lzma
    except ImportError:  # some builds of Python lack it
        tell(f"this Python has no lzma, so that {paths[0]} is left out")
        return
    for path in paths:
        target = folder() / path.name.removesuffix(PACKED)
        if target.exists():
            continue
        try:
            data = lzma.decompress(path.read_bytes())
        except (EOFError, OSError, lzma.LZMAError) as error:
            tell(f"timing cache {path} cannot be read ({type(error).__name__}: {error}); it is left out")
            continue
        with writing():
            place(data, target)


def store(stored: Path, gpu: str) -> list[Path]:
    """Copies the kept timing caches of a GPU model into a folder, beside the baselines that were built with them."""
    import lzma

    made: list[Path] = []
    for path in sorted(folder().glob(f"{slug(gpu)}-tensorrt*.cache")):
        made.append(stored / (path.name + PACKED))
        place(lzma.compress(path.read_bytes(), preset=9), made[-1])
    return made


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def begin(found: Library, config: Any, spec: ExportSpec, gpu: Mapping[str, str]) -> Begun | None:
    """Gives the build the kept cache, and what the file that the request names adds to it; None where there is none.

    Raises:
        BadRequest: the named file is no timing cache of this TensorRT and GPU.
    """
    if spec.timing_cache == "off":
        config.set_flag(found.flag("DISABLE_TIMING_CACHE"))
        return None
    if not gpu or found.is_rtx:  # nothing is timed without a GPU
        return None
    path = kept_path(found.name, found.version, gpu["name"])
    data, note = b"", ""
    if path.is_file():
        data = path.read_bytes()
    with found.recording() as log:
        cache = config.create_timing_cache(data)
        if cache is None or (data and log.errors()):
            note = f"the timing cache {path} is damaged and was begun anew"
            data, cache = b"", config.create_timing_cache(b"")
    if spec.timing_cache:
        given = Path(spec.timing_cache)
        with found.recording() as log:
            other = config.create_timing_cache(given.read_bytes())
            if other is None or log.errors() or not cache.combine(other, False):
                raise BadRequest(
                    f"timing_cache '{given}' is none of {found.name} {found.version} on {gpu['name']} "
                    f"({next(iter(log.errors()), 'it does not fit')})",
                    "name one that was made here, or leave it out",
                )
    if not config.set_timing_cache(cache, False):
        note = f"the timing cache {path} was made elsewhere and is not used"
    return Begun(path, len(data), note)


def keep(config: Any, begun: Begun | None) -> str:
    """Keeps what the build has learnt, beside what others learnt meanwhile; returns a line for the record."""
    if begun is None:
        return ""
    cache = config.get_timing_cache()
    data = bytes(cache.serialize()) if cache is not None else b""
    if not data:
        return begun.note
    with writing(), alone(begun.path.name):
        if begun.path.is_file() and not begun.note:
            # Builds of one host run at once, one a GPU: the last to end must not undo what the others kept.
            now = config.create_timing_cache(begun.path.read_bytes())
            if now is not None and now.combine(cache, False):
                data = bytes(now.serialize())
        place(data, begun.path)
    line = f"timing cache {begun.path.name}: {begun.bytes >> 10} KiB before, {len(data) >> 10} KiB after"
    return f"{begun.note}; {line}" if begun.note else line

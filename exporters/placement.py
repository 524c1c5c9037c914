"""Puts an artifact's files where users look for them, and never over a file that somebody else made."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from exporters import toolchain
from exporters.artifact import Artifact, digest
from exporters.cache import writing
from exporters.errors import BadRequest


def place(artifact: Artifact, folder: Path, overwrite: bool = False) -> Path:
    """Copies the primary file or folder into `folder`, atomically; returns where it lies.

    Raises:
        BadRequest: the folder cannot be written, or a file of that name is there that exportgate did not make.
    """
    target = folder / artifact.primary  # a .tflite file lies in a folder of its checkpoint's name
    unique = uuid.uuid4().hex[:8]
    temporary, aside = target.with_name(f".{target.name}.{unique}"), target.with_name(f".{target.name}.{unique}.old")
    try:
        if target.exists() and not overwrite and not _is_ours(target):
            raise BadRequest(
                f"'{target}' exists and was not made by exportgate",
                "add --overwrite, or name another folder with --output",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if artifact.path.is_dir():
            shutil.copytree(artifact.path, temporary)
            if (
                target.exists()
            ):  # a folder cannot be replaced by a rename, so that the old one moves out of the way whole
                target.replace(aside)
        else:
            shutil.copyfile(artifact.path, temporary)
        temporary.replace(target)
    except OSError as error:
        raise BadRequest(
            f"'{target}' cannot be written ({error.strerror or error})",
            "name another folder with --output, or make room",
        ) from None
    finally:
        with suppress(OSError):
            if aside.exists() and not target.exists():
                aside.replace(target)
        _remove(temporary)
        _remove(aside)
    told = next((f.sha256 for f in artifact.files if f.path == artifact.primary), "")  # of a file; none of a folder
    _remember(target, told or _content(target))
    return target


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _remember(target: Path, content: str) -> None:
    """Notes in the cache what exportgate put there, so that it may replace it the next time."""
    mark = _mark(target)
    with writing():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"path": str(target.resolve()), "content": content}), encoding="utf-8")


def _is_ours(target: Path) -> bool:
    """Whether the file is, unchanged, what exportgate put there before."""
    try:
        return json.loads(_mark(target).read_text(encoding="utf-8"))["content"] == _content(target)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _mark(target: Path) -> Path:
    """Where it is remembered that exportgate made the file."""
    return toolchain.cache_root() / "placed" / hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:32]


def _content(target: Path) -> str:
    """Digest of a file, or of a folder's files."""
    if target.is_file():
        return digest(target)
    lines = [f"{p.relative_to(target).as_posix()} {digest(p)}" for p in sorted(target.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

"""Puts an artifact's files where users look for them, and never over a file that somebody else made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from exporters import toolchain
from exporters.artifact import Artifact, digest
from exporters.errors import BadRequest


def place(artifact: Artifact, folder: Path, overwrite: bool = False) -> Path:
    """Copies the primary file or folder into `folder`, atomically; returns where it lies.

    Raises:
        BadRequest: the folder cannot be written, or a file of that name is there that exportgate did not make.
    """
    target = folder / artifact.path.name
    if target.exists() and not overwrite and not _is_ours(target):
        raise BadRequest(f"'{target}' exists and was not made by exportgate", "add --overwrite, or name another folder with --output")
    temporary = folder / f".{artifact.path.name}.{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if artifact.path.is_dir():
            shutil.copytree(artifact.path, temporary)
            if target.exists():
                shutil.rmtree(target)
        else:
            shutil.copyfile(artifact.path, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise BadRequest(f"'{target}' cannot be written ({error.strerror or error})", "name another folder with --output, or make room") from None
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    mark = _mark(target)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"path": str(target.resolve()), "content": _content(target)}), encoding="utf-8")
    return target


def _is_ours(target: Path) -> bool:
    """Whether the file is, unchanged, what exportgate put there before."""
    try:
        return json.loads(_mark(target).read_text(encoding="utf-8"))["content"] == _content(target)
    except (OSError, ValueError, KeyError):
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

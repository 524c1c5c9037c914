"""Puts an artifact's files where users look for them, and never over a file that somebody else made."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from exporters import toolchain
from exporters.artifact import Artifact, digest
from exporters.cache import writing
from exporters.errors import BadRequest
from exporters.metadata import SIDE_CAR

NOTHING = hashlib.sha256(b"").hexdigest()  # content of a folder that holds no file but guests


def place(artifact: Artifact, folder: Path, overwrite: bool = False) -> Path:
    """Copies the primary file or folder into `folder`, atomically, with the side-car of a file that holds no metadata;
    returns where it lies. What exportgate put into a folder by itself, as a .tflite file into a SavedModel's, stays.

    Raises:
        BadRequest: the folder cannot be written, or a file of that name is there that exportgate did not make.
    """
    target = folder / artifact.primary  # a .tflite file lies in a folder of its checkpoint's name
    beside = artifact.path.with_name(SIDE_CAR)
    both = {artifact.path: target} | ({beside: target.with_name(SIDE_CAR)} if beside.is_file() else {})
    for path in () if overwrite else both.values():
        with _writing(path):
            theirs = path.exists() and not _is_ours(path)
        if theirs:
            raise BadRequest(
                f"'{path}' exists and was not made by exportgate",
                "name another folder with --output, or add --overwrite, which replaces all of it",
            )
    owner = "" if overwrite or beside not in both else _owner(both[beside])
    if owner not in ("", target.name) and target.with_name(owner).exists():
        raise BadRequest(
            f"'{both[beside]}' is of '{owner}', which has no other metadata",
            "name another folder with --output, or add --overwrite",
        )
    for source, path in both.items():
        _copy(source, path, target.name)
    return target


@contextmanager
def _writing(target: Path) -> Generator[None]:
    """Raises BadRequest with the target instead of the system's error."""
    try:
        yield
    except OSError as error:
        raise BadRequest(
            f"'{target}' cannot be written ({error.strerror or error})",
            "name another folder with --output, or make room",
        ) from None


def _copy(source: Path, target: Path, owner: str) -> None:
    unique = uuid.uuid4().hex[:8]
    temporary, aside = target.with_name(f".{target.name}.{unique}"), target.with_name(f".{target.name}.{unique}.old")
    try:
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, temporary)
                content = _content(temporary)
                for guest in _guests(target):
                    if not (kept := temporary / guest.relative_to(target)).exists():
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(guest, kept)
                if target.exists():
                    target.replace(aside)  # a folder cannot be replaced by a rename: the old one moves away whole
            else:
                shutil.copyfile(source, temporary)
                content = _content(temporary)
            temporary.replace(target)
    finally:
        with suppress(OSError):
            if aside.exists() and not target.exists():
                aside.replace(target)
        _remove(temporary)
        _remove(aside)
    _remember(target, content, owner)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _remember(target: Path, content: str, owner: str) -> None:
    """Notes in the cache what exportgate put there, so that it may replace it the next time, and for which artifact."""
    mark = _mark(target)
    with writing():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"path": str(target.resolve()), "content": content, "of": owner}), encoding="utf-8")


def _is_ours(target: Path) -> bool:
    """Whether the file or folder is, unchanged, what exportgate put there before, file by file or whole."""
    guests = _guests(target)
    try:
        content = _content(target, guests)
        if guests and content == NOTHING:
            return True
        return _noted(target)["content"] == content
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _owner(side_car: Path) -> str:
    """Name of the artifact that a side-car was put beside; "" where there is none, or it is not known."""
    try:
        return str(_noted(side_car).get("of", "")) if side_car.exists() else ""
    except (OSError, ValueError, AttributeError):
        return ""


def _noted(target: Path) -> dict[str, str]:
    return json.loads(_mark(target).read_text(encoding="utf-8"))


def _mark(target: Path) -> Path:
    """Where it is remembered that exportgate made the file."""
    return toolchain.cache_root() / "placed" / hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:32]


def _guests(folder: Path) -> list[Path]:
    """Files in a folder that exportgate put there by themselves."""
    return [p for p in folder.rglob("*") if p.is_file() and _is_ours(p)] if folder.is_dir() else []


def _content(target: Path, guests: Sequence[Path] = ()) -> str:
    """Digest of a file, or of a folder's files but for the guests."""
    if target.is_file():
        return digest(target)
    files = [p for p in sorted(target.rglob("*")) if p.is_file() and p not in guests]
    lines = [f"{p.relative_to(target).as_posix()} {digest(p)}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

"""Artifact: a directory with what was made, and its manifest: digests, toolchain, signature, achieved precision."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporters.errors import ArtifactError, BadRequest, UnsafeFile

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape (sizes, or names of axes that vary) and numpy dtype of one input or output of an artifact."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class FileInfo:
    """One file of an artifact: its path inside the directory, size in bytes and SHA-256."""

    path: str
    bytes: int
    sha256: str


# Transposed convolutions, for which runtimes have no 8-bit kernels worth having, and products of two computed tensors.
UNQUANTIZED = "operators that quantization leaves alone"
# TorchScript holds in each convolution whether a GPU may round FP32 to TF32; PyTorch's default while tracing is yes.
ALLOW_TF32 = "convolutions that allow tf32"


@dataclass(frozen=True)
class Achieved:
    """The precision read back from the artifact: `precision` in a word, `counts` and `exceptions` as evidence.

    `counts` maps what was counted ("Conv int8", "initializer fp16") to its number; `exceptions` names what is in
    another precision although the request covers it (empty when all is as asked); `rounded` names FP32 values that go
    through FP16 on their way to FP32 operators; `in_fp32` names what the file computes in FP32 beside convolutions and
    matrix products, where it says which module that belongs to, else None.
    """

    precision: str
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    exceptions: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    in_fp32: tuple[str, ...] | None = None

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Achieved:
        """The inverse of `asdict`, also after JSON."""
        return Achieved(
            data["precision"],
            data["counts"],
            tuple(data["exceptions"]),
            tuple(data["rounded"]),
            None if data["in_fp32"] is None else tuple(data["in_fp32"]),
        )


def main_precision(counts: Mapping[str, int]) -> str:
    """A file's precision in a word, from the number of its operators in each; "" where none is known.

    8 bits where any operator has them: the others may be what was to be kept in floating point, and be most of it.
    """
    known = {kind: n for kind, n in counts.items() if kind}
    return next((kind for kind in ("int8", "fp8") if known.get(kind)), max(known, key=known.__getitem__, default=""))


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk. `root` is its directory; `primary` the file that users know, relative to it."""

    root: Path
    key: str
    format: str
    primary: str
    spec: Mapping[str, Any]
    files: tuple[FileInfo, ...] = ()
    toolchain: Mapping[str, Any] = field(default_factory=dict[str, Any])
    achieved: Achieved = Achieved("")
    parents: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.root / self.primary

    @property
    def has_manifest(self) -> bool:
        """False for a file that somebody else made and that was brought to be checked."""
        return bool(self.files)

    def verify(self) -> None:
        """Compares sizes and digests with the manifest.

        Raises:
            ArtifactError: a file is missing, cannot be read, or differs.
        """
        for entry in self.files:
            path = self.root / entry.path
            if not path.is_file():
                raise ArtifactError(
                    f"artifact {self.root}: '{entry.path}' is missing", "delete the folder and export again"
                )
            try:
                same = path.stat().st_size == entry.bytes and digest(path) == entry.sha256
            except OSError as error:
                raise ArtifactError(
                    f"artifact {self.root}: '{entry.path}' cannot be read ({error.strerror})",
                    "check its permissions, or delete the folder and export again",
                ) from None
            if not same:
                raise ArtifactError(
                    f"artifact {self.root}: '{entry.path}' is not the file that its manifest describes",
                    "delete the folder and export again",
                )

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["root"] = str(self.root)
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Artifact:
        values = dict(data)
        values["root"] = Path(values["root"])
        values["files"] = tuple(FileInfo(**f) for f in values["files"])
        achieved = values["achieved"]
        values["achieved"] = Achieved.from_dict(achieved)
        values["parents"] = tuple(values["parents"])
        values["notes"] = tuple(values["notes"])
        return Artifact(**values)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(root: Path) -> tuple[FileInfo, ...]:
    """Every file below `root` but the manifest, with sizes and digests, in order of their paths."""
    found = sorted(p for p in root.rglob("*") if p.is_file() and p.relative_to(root).as_posix() != MANIFEST)
    return tuple(FileInfo(p.relative_to(root).as_posix(), p.stat().st_size, digest(p)) for p in found)


def commit(artifact: Artifact, final: Path) -> Artifact:
    """Writes the manifest into the artifact's (temporary) directory and renames the directory to `final`, atomically.

    Another process that finished the same artifact first wins; ours is thrown away. A crash leaves no half artifact.
    """
    made = Artifact.from_dict({**artifact.to_dict(), "root": str(final)})
    temporary = artifact.root / MANIFEST
    temporary.write_text(json.dumps(made.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        artifact.root.replace(final)
    except OSError:
        if (final / MANIFEST).is_file():
            shutil.rmtree(artifact.root, ignore_errors=True)
            return read_manifest(final)
        if not final.exists():
            raise
        discard(final, artifact.root.parent)  # what somebody left behind: a finished artifact has a manifest
        artifact.root.replace(final)
    return made


def discard(folder: Path, scratch: Path) -> None:
    """Removes an artifact's folder; it moves to `scratch` first, so that none is left in halves."""
    scratch.mkdir(parents=True, exist_ok=True)
    aside = scratch / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with suppress(FileNotFoundError):  # another process did it
        folder.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def read_manifest(root: Path) -> Artifact:
    """The artifact in `root`, by its manifest; digests are checked by `verify`.

    Raises:
        ArtifactError: no manifest, or one that cannot be read or that names no file.
    """
    path = root / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Artifact.from_dict({**values, "root": str(root)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"artifact {root}: its manifest cannot be read ({type(error).__name__}: {error})",
            "delete the folder and export again",
        ) from None
    if not found.files:
        raise ArtifactError(f"artifact {root}: its manifest names no file", "delete the folder and export again")
    for name in (found.primary, *(f.path for f in found.files)):
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ArtifactError(
                f"artifact {root}: its manifest names '{name}', which lies outside",
                "delete the folder and export again",
            )
    return found


def foreign(path: Path, format_id: str, spec: Mapping[str, Any], trust: bool, is_code: bool) -> Artifact:
    """An artifact that somebody else's exporter made, to be checked in place: it has no manifest and is not verified.

    Raises:
        BadRequest: there is no such file or folder.
        UnsafeFile: the format is code and the user did not say `--trust`.
    """
    if not path.exists():
        raise BadRequest(f"artifact '{path}' does not exist", "give the path of a file or folder that an exporter made")
    if is_code and not trust:
        raise UnsafeFile(
            f"'{path}' is a {format_id} file: loading one runs code that is in it",
            "add --trust if you know who made it",
        )
    return Artifact(path.parent.resolve(), "", format_id, path.name, spec)

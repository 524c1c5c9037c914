"""A .pt2 file, as torch.export.save and AOTInductor write it: a zip, read here without running anything that is in it.

Loading one runs code. torch.export.load unpickles the sample inputs, and tensors where the file says so; it evaluates
the sizes that vary as Python; and where the file holds a compiled library, too, it loads that.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from exporters.errors import ArtifactError, first_line

PROGRAM = "models/model.json"
LIBRARY = "data/aotinductor/model/"
AGAIN = "export it again"
# What Python's zipfile raises of damaged files.
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError, LookupError)


@dataclass(frozen=True)
class Pt2Archive:
    """A file whose records are intact. `names` maps those, without the top folder, to their names in the zip."""

    path: Path
    names: Mapping[str, str]

    @staticmethod
    def open(path: Path, wanted: str) -> Pt2Archive:
        """The archive, which has to be of the `wanted` format: "pt2" or "aotinductor".

        Raises:
            ArtifactError: it is no such archive, or a record is damaged.
        """
        try:
            with zipfile.ZipFile(path) as file:
                listed = [n for n in file.namelist() if not n.endswith("/")]
                damaged = file.testzip()
        except UNREADABLE as error:
            raise ArtifactError(f"'{path}' is no .pt2 archive ({first_line(error)})", AGAIN) from None
        if damaged is not None:
            raise ArtifactError(f"'{path}': its record '{damaged}' is damaged (another checksum)", AGAIN)
        found = Pt2Archive(path, {n.partition("/")[2]: n for n in listed})
        if len(found.names) < len(listed):
            raise ArtifactError(f"'{path}' is no .pt2 archive: two of its records have one name", AGAIN)
        if "archive_format" not in found.names or found.read("archive_format").strip() != b"pt2":
            raise ArtifactError(f"'{path}' is no .pt2 archive: its zip has no archive_format 'pt2'", AGAIN)
        held = {
            "pt2": PROGRAM in found.names,
            "aotinductor": any(n.startswith("data/aotinductor/") for n in found.names),
        }
        kinds = {"pt2": "a program of torch.export", "aotinductor": "a library that AOTInductor compiled"}
        other = next(k for k in kinds if k != wanted)
        if not held[wanted]:
            told = f"it holds {kinds[other]}" if held[other] else "it holds neither a program nor a library"
            fix = f"say --format {other}" if held[other] else AGAIN
            raise ArtifactError(f"'{path}' is no {wanted} file: {told}", fix)
        if held[other]:  # PyTorch loads both, whichever is asked for
            raise ArtifactError(f"'{path}' is not only {kinds[wanted]}: it holds {kinds[other]}, too", AGAIN)
        return found

    def read(self, name: str) -> bytes:
        """A record's bytes.

        Raises:
            ArtifactError: it is not there, or cannot be read.
        """
        if name not in self.names:
            raise ArtifactError(f"'{self.path}' has no record '{name}'", AGAIN)
        try:
            with zipfile.ZipFile(self.path) as file:
                return file.read(self.names[name])
        except UNREADABLE as error:
            raise ArtifactError(f"'{self.path}': '{name}' cannot be read ({first_line(error)})", AGAIN) from None

    def size(self, name: str) -> int:
        """A record's bytes, unpacked; 0 where it is not there."""
        with zipfile.ZipFile(self.path) as file:
            return file.getinfo(self.names[name]).file_size if name in self.names else 0

    def read_json(self, name: str) -> dict[str, Any]:
        """A record that is a JSON object."""
        try:
            value: Any = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"'{self.path}': '{name}' is not JSON ({first_line(error)})", AGAIN) from None
        if not isinstance(value, dict):
            raise ArtifactError(f"'{self.path}': '{name}' is no JSON object", AGAIN)
        return cast("dict[str, Any]", value)

    def extract(self, folder: Path) -> list[Path]:
        """Writes the records of the compiled model into a folder, by their last names.

        Raises:
            ArtifactError: two have one name, or the disk takes no more.
        """
        made: list[Path] = []
        for name in self.names:
            if name.startswith(LIBRARY):
                target = folder / PurePosixPath(name).name
                if target in made:
                    raise ArtifactError(f"'{self.path}' has two records '{target.name}'", AGAIN)
                made.append(target)
                try:
                    target.write_bytes(self.read(name))
                except OSError as error:
                    what = f"'{self.path}' cannot be unpacked into '{folder}' ({error.strerror})"
                    raise ArtifactError(what, "free some of that disk") from None
        return made

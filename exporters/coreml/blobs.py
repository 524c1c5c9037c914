"""Where an ML Program's weights lie: the records of weights/*.bin that its specification refers to."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporters.errors import ArtifactError

RECORD, SENTINEL = struct.Struct("<IIQQ"), 0xDEADBEEF  # of MILBlob's StorageFormat.hpp: type, bytes and place follow it
HEADER = 64  # bytes of a record


def blobs(program: Any) -> Iterator[Any]:
    """The values of a program's operators that lie in a file: its name, and the offset of a record there."""
    for function in program.functions.values():
        for block in function.block_specializations.values():
            yield from _of_block(block)


def _of_block(block: Any) -> Iterator[Any]:
    for op in block.operations:
        given = [b.value for i in op.inputs.values() for b in i.arguments if b.WhichOneof("binding") == "value"]
        for value in (*op.attributes.values(), *given):
            if value.WhichOneof("value") == "blobFileValue":
                yield value.blobFileValue
        for inner in op.blocks:
            yield from _of_block(inner)


def check_blobs(path: Path, program: Any, folder: Path) -> None:
    """Whether all weights are there, before a library maps their files into memory.

    Raises:
        ArtifactError: a file is missing, is too short for a weight, or holds something else at its offset.
    """
    again = "export it again"
    sizes: dict[str, int] = {}
    for blob in blobs(program):
        name, at = str(blob.fileName).rpartition("/")[2], int(blob.offset)
        file = folder / name
        try:
            if name not in sizes:
                sizes[name] = file.stat().st_size
            end, size = at + HEADER, sizes[name]
            if end <= size:
                with file.open("rb") as source:
                    source.seek(at)
                    mark, _, count, place = RECORD.unpack(source.read(RECORD.size))
                if mark != SENTINEL:
                    raise ArtifactError(f"'{path}': '{file}' holds no weight at byte {at}", again)
                end = place + count
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise ArtifactError(f"'{path}': its weights {name!r} cannot be read in {folder} ({why})", again) from None
        if end > size:
            what = f"has {size} bytes, and a weight in it ends at byte {end}: it is empty or was cut off"
            raise ArtifactError(f"'{path}': '{file}' {what}", again)

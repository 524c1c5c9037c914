"""The metadata header of an engine file: 4-byte little-endian signed length in bytes, UTF-8 JSON, then the plan.

The layout is that of the Ultralytics exporter, so that its users can load our engines and we theirs. Under the key
`plan` ours says in addition what made it and its inputs and outputs.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from exporters.errors import ArtifactError
from exporters.metadata import Metadata, normalize

LIMIT = 1 << 24  # bytes: class names of any data set fit; the magic of a plan, read as a length, is far above
MAGIC = b"trt"  # behind one letter: "ftrt" of TensorRT 8 to 11, "ptrt" of older ones, "vtrt" of TensorRT-RTX


@dataclass(frozen=True)
class Engine:
    """An engine file: its header (None for a plain plan) and where the plan begins, in bytes."""

    path: Path
    header: Mapping[str, Any] | None
    start: int

    def plan(self) -> bytes:
        """The plan's bytes.

        Raises:
            ArtifactError: they are not those that our header was written for.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read()
        told = self.facts.get("sha256")
        if told is not None and told != hashlib.sha256(data).hexdigest():
            raise ArtifactError(
                f"'{self.path}': the plan ({len(data)} bytes) is not the one that its metadata header describes",
                "export it again",
            )
        return data

    @property
    def facts(self) -> Mapping[str, Any]:
        """What our header says of the plan; empty for a plain plan or somebody else's."""
        found = (self.header or {}).get("plan", {})
        return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


def read_engine(path: Path) -> Engine:
    """Where header and plan are.

    Raises:
        ArtifactError: the file cannot be read, is empty, holds no plan, or its header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(4)
            if size < 8:
                raise ArtifactError(f"'{path}' has {size} bytes, which is no engine", "export it again")
            (length,) = struct.unpack("<i", first)
            if not 2 <= length <= LIMIT:
                if file.read(1) == b"{":  # no plan begins so
                    raise ArtifactError(f"'{path}': its metadata header has a length of {length}", "export it again")
                check_magic(path, first)
                return Engine(path, None, 0)
            text, magic = file.read(length), file.read(4)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", "give an engine file") from None
    if not text.lstrip().startswith(b"{"):
        check_magic(path, first)
        return Engine(path, None, 0)
    if len(text) < length:
        raise ArtifactError(f"'{path}' ends within its metadata header ({size} bytes)", "export it again")
    try:
        values: Any = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}': the metadata header is not JSON ({error})", "export it again") from None
    if size == 4 + length:
        raise ArtifactError(f"'{path}' ends behind its metadata header: there is no plan", "export it again")
    check_magic(path, magic)
    check_header(values, str(path))
    return Engine(path, cast("dict[str, Any]", values), 4 + length)


def check_magic(path: Path, magic: bytes) -> None:
    """Raises ArtifactError where these first bytes are no plan's."""
    if magic[1:4] != MAGIC:
        raise ArtifactError(f"'{path}' holds no plan of TensorRT (it begins with {magic!r})", "export it again")


def check_header(values: Any, where: str) -> None:
    """Raises ArtifactError where a header, or what ours says of the plan in it, has not the form that is read here."""

    def wrong(what: str, value: Any) -> ArtifactError:
        return ArtifactError(f"'{where}': {what} of the metadata header is {value!r:.80}", "export it again")

    if not isinstance(values, dict):
        raise wrong("the whole", values)
    header = cast("dict[str, Any]", values)
    try:
        length = len(_encoded(header))
    except UnicodeEncodeError as error:  # JSON can hold a lone surrogate, UTF-8 cannot
        raise wrong("a text", error.object[error.start : error.start + 1]) from None
    if length > LIMIT:
        raise wrong("the size in bytes", length)
    batch = header.get("batch", 1)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise wrong("batch", header["batch"])
    facts = header.get("plan")
    if not isinstance(facts, dict):  # somebody else's: the peer writes none
        return
    ours = cast("dict[str, Any]", facts)
    if not isinstance(ours.get("sha256", "" if "made_by" not in ours else None), str):  # ours always has it
        raise wrong("plan.sha256", ours.get("sha256"))
    network = ours.get("network", {})
    if not isinstance(network, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", network).values()):
        raise wrong("plan.network", network)
    for key in ("operators", "unquantized"):
        names = ours.get(key, [])
        if not isinstance(names, list) or not all(isinstance(n, str) for n in cast("list[Any]", names)):
            raise wrong(f"plan.{key}", names)
    for key in ("inputs", "outputs"):
        tensors = ours.get(key, [])
        if not isinstance(tensors, list) or not all(_is_tensor(t) for t in cast("list[Any]", tensors)):
            raise wrong(f"plan.{key}", tensors)


def _is_tensor(value: Any) -> bool:
    """Whether this is {"name": text, "shape": [whole numbers], "dtype": text}."""
    if not isinstance(value, dict):
        return False
    name, shape, dtype = (cast("dict[str, Any]", value).get(key) for key in ("name", "shape", "dtype"))
    numbers = isinstance(shape, list) and all(isinstance(d, int) for d in cast("list[Any]", shape))
    return isinstance(name, str) and isinstance(dtype, str) and numbers


def read_metadata(path: Path) -> Metadata:
    """What the header holds.

    Raises:
        ArtifactError: see `read_engine`; or there is none.
    """
    header = read_engine(path).header
    if header is None:
        raise ArtifactError(f"'{path}' holds no metadata (it is a plain plan)", "wrap it, or export it again")
    return normalize(header, str(path))


def engine_bytes(header: Mapping[str, Any], plan: bytes | memoryview) -> bytes:
    """Header and plan; the length counts bytes, not characters. What ours says of the plan is tied to it."""
    if isinstance(header.get("plan"), Mapping):
        header = {**header, "plan": {**header["plan"], "sha256": hashlib.sha256(plan).hexdigest()}}
    text = _encoded(header)
    return struct.pack("<i", len(text)) + text + bytes(plan)


def write_engine(path: Path, header: Mapping[str, Any], plan: bytes | memoryview) -> None:
    """Writes `engine_bytes`."""
    path.write_bytes(engine_bytes(header, plan))


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, ensure_ascii=False).encode("utf-8")

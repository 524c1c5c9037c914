"""What a .tflite file says of itself: a reader of the fields that matter here, by TensorFlow Lite's published schema
(FlatBuffers), and of the zip archive that exporters append with their metadata.

Slots are the fields' numbers in the tables of schema.fbs, where a union takes two.
"""

from __future__ import annotations

import ast
import io
import json
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.artifact import UNQUANTIZED, Achieved, main_precision
from exporters.errors import ArtifactError, first_line
from exporters.metadata import UNREADABLE, Metadata, normalize
from exporters.runtimes.flatbuffer import Table

AGAIN = "export it again"
ENTRY = "metadata.json"  # of the appended archive
LARGEST = 1 << 20  # bytes of metadata
IDENTIFIER = b"TFL3"
TYPES = {
    **{0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8"},
    **{10: "float64", 15: "uint32", 16: "uint16", 17: "int4", 18: "bfloat16"},
}
# BuiltinOperator's numbers: operators whose arithmetic decides an inference's precision, and their weights' place.
HEAVY = {
    **{3: ("CONV_2D", 1), 4: ("DEPTHWISE_CONV_2D", 1), 9: ("FULLY_CONNECTED", 1), 67: ("TRANSPOSE_CONV", 1)},
    **{126: ("BATCH_MATMUL", 1)},
}
DEQUANTIZE, CUSTOM, TRANSPOSED = 6, 32, 67
CONVOLUTIONS = (3, 4)
FLOATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
EIGHT = ("int8", "uint8")
FIXED = "with activations of fixed scales"


@dataclass(frozen=True)
class Tensor:
    """One tensor: name, shape (-1 where an axis varies), dtype, scales and zero points, and its constant's bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[float, ...]
    zeros: tuple[int, ...]
    constant: tuple[int, int]  # where its values lie, and how many bytes; 0 of what is computed

    @property
    def is_constant(self) -> bool:
        return self.constant[1] > 0


@dataclass(frozen=True)
class Operator:
    """One operator: BuiltinOperator's number, the name of a custom one, its tensors (-1 where one is left out), its
    options' table, and how many bytes of options a custom one has."""

    kind: int
    custom: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Table | None
    custom_bytes: int = 0


@dataclass(frozen=True)
class TfliteFile:
    """The first graph of a file. `signature` maps names of inputs and outputs to their tensors, where there is one."""

    path: Path
    data: bytes
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    signature: tuple[dict[str, int], dict[str, int]]

    def name(self, operator: Operator) -> str:
        """An operator by the tensor that it computes, without what a converter joins to it."""
        return self.tensors[operator.outputs[0]].name.partition(";")[0] if operator.outputs else operator.custom


def read(path: Path) -> TfliteFile:
    """The parts of a file.

    Raises:
        ArtifactError: it cannot be read, or is no TensorFlow Lite model, or one that was damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
    return parsed(data, path)


def parsed(data: bytes, path: Path) -> TfliteFile:
    """The parts of a file's bytes; `path` names it in errors."""
    try:
        if data[4:8] != IDENTIFIER:
            raise ValueError("it does not begin with TFL3")
        found = _parts(path, data)
    except (IndexError, ValueError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
        what = f"'{path}' is not a TensorFlow Lite model, or one that was cut off ({error})"
        raise ArtifactError(what if data else f"'{path}' is empty", AGAIN) from None
    if not found.operators or not found.inputs or not found.outputs:
        raise ArtifactError(f"'{path}' is not a TensorFlow Lite model (it holds no graph)", AGAIN)
    return found


def _parts(path: Path, data: bytes) -> TfliteFile:
    model = Table(data, struct.unpack_from("<I", data)[0])
    # A code above 127 stands in a field of its own, which older files lack.
    codes: list[tuple[int, str]] = [(max(c.number(0, "b"), c.number(3, "i")), c.text(1)) for c in model.tables(1)]
    buffers: list[tuple[int, int]] = [_held(b, len(data)) for b in model.tables(4)]
    graph = next(model.tables(2), None)
    if graph is None:
        raise ValueError("it holds no graph")
    tensors = tuple(_tensor(t, buffers) for t in graph.tables(0))
    count = len(tensors)

    def numbers(table: Table, slot: int) -> tuple[int, ...]:
        found = tuple(int(n) for n in table.array(slot, "<i4"))
        if any(not -1 <= n < count for n in found):
            raise ValueError(f"a tensor of {found} is asked for, and there are {count}")
        return found

    operators: list[Operator] = []
    for table in graph.tables(3):
        kind, custom = codes[int(table.number(0, "I"))]
        ends = numbers(table, 1), numbers(table, 2)
        operators.append(Operator(kind, custom, *ends, table.table(4), table.vector(5)[1]))
    ends = numbers(graph, 1), numbers(graph, 2)
    if any(n < 0 for n in (*ends[0], *ends[1])):
        raise ValueError("an input or output is left out")
    maps: list[dict[str, int]] = [{}, {}]
    for told in model.tables(7):
        if told.number(4, "I") == 0:
            maps = [{m.text(0): m.number(1, "I") for m in told.tables(slot)} for slot in (0, 1)]
            break
    if any(n not in ends[side] for side in (0, 1) for n in maps[side].values()):
        raise ValueError("its signature names what is neither input nor output")
    return TfliteFile(path, data, tensors, tuple(operators), *ends, (maps[0], maps[1]))


def _held(buffer: Table, size: int) -> tuple[int, int]:
    """Where a buffer's bytes lie: in it, or, in large files, behind the flatbuffer."""
    start, count = buffer.vector(0)
    if not count and (offset := buffer.number(1, "Q")) > 1:
        start, count = offset, buffer.number(2, "Q")
    if start + count > size:
        raise ValueError(f"byte {start + count} is asked for, and it has {size}")
    return start, count


def _tensor(table: Table, buffers: list[tuple[int, int]]) -> Tensor:
    shape = table.array(7, "<i4") if table.vector(7)[1] else table.array(0, "<i4")
    quantization, kind = table.table(4), table.number(1, "b")
    held: tuple[int, int] = buffers[int(table.number(2, "I"))]
    scales = quantization.array(2, "<f4") if quantization is not None else ()
    zeros = quantization.array(3, "<i8") if quantization is not None else ()
    return Tensor(
        table.text(3),
        tuple(int(n) for n in shape),
        TYPES.get(kind, f"type {kind}"),
        tuple(float(s) for s in scales),
        tuple(int(z) for z in zeros),
        held,
    )


def read_precision(path: Path) -> Achieved:
    """Each convolution and matrix product by the types of its weights and of what it takes; see `precisions`."""
    found = precisions(read(path))
    kinds = {name: kind for name, kind, _ in found if kind}
    counts = Counter(kind for _, kind, _ in found if kind)
    main = main_precision(counts)
    evidence = {f"operators {k}": n for k, n in counts.items()}
    left = sum(not kind for _, kind, _ in found)
    evidence |= {UNQUANTIZED: left} if left and main == "int8" else {}
    evidence |= {f"of them {form}": n for form, n in Counter(f for _, kind, f in found if kind == "int8").items()}
    return Achieved(main, evidence, tuple(sorted(n for n, k in kinds.items() if k != main)))


def precisions(file: TfliteFile) -> list[tuple[str, str, str]]:
    """Of each convolution and matrix product its name, its precision ("" of a product of two computed tensors in
    floating point), and in 8 bits whether activations have scales of their own or are quantized as they come."""
    makers = {n: op for op in file.operators for n in op.outputs}
    found: list[tuple[str, str, str]] = []
    for op in file.operators:
        if op.kind not in HEAVY or len(op.inputs) < 2:
            continue
        place = HEAVY[op.kind][1]
        given = file.tensors[op.inputs[2 if op.kind == TRANSPOSED and len(op.inputs) > 2 else 0]]
        weight, maker = file.tensors[op.inputs[place]], makers.get(op.inputs[place])
        if maker is not None and maker.kind == DEQUANTIZE and maker.inputs:
            weight = file.tensors[maker.inputs[0]]
        if given.dtype in EIGHT and weight.dtype in EIGHT:
            found.append((file.name(op), "int8", FIXED))
        elif not weight.is_constant:
            found.append((file.name(op), "" if weight.dtype in FLOATS else weight.dtype, ""))
        elif weight.dtype in EIGHT and given.dtype == "float32":
            form = "as weights alone" if maker is not None else "with activations quantized as they come"
            found.append((file.name(op), "int8", form))
        else:
            found.append((file.name(op), FLOATS.get(weight.dtype, weight.dtype), ""))
    return found


def quantization(file: TfliteFile) -> str:
    """The form of a file in 8 bits, as ExportSpec.quantization names it; "" of a file in floating point."""
    forms = {form for _, kind, form in precisions(file) if kind == "int8"}
    if not forms:
        return ""
    if all(file.tensors[n].dtype in EIGHT for n in (*file.inputs, *file.outputs)):
        return "full_integer"
    return "integer" if FIXED in forms else "dynamic"


def read_metadata(path: Path) -> Metadata:
    """Metadata from the zip archive behind the model: of the entry that we write, or of the only one, as JSON or as a
    Python literal.

    Raises:
        ArtifactError: there is none, or it cannot be read.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            entries = archive.infolist()
            entry = next((e for e in entries if e.filename == ENTRY), None)
            if entry is None:
                if len(entries) != 1:
                    raise ArtifactError(f"'{path}': {len(entries)} entries are appended, and none is {ENTRY}", AGAIN)
                entry = entries[0]
            if entry.file_size > LARGEST:
                raise ArtifactError(f"'{path}': its metadata is larger than {LARGEST >> 10} KiB", AGAIN)
            with archive.open(entry) as file:
                text = file.read(LARGEST + 1)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
    except zipfile.BadZipFile:
        raise ArtifactError(f"'{path}' holds no metadata (no zip archive is appended)", AGAIN) from None
    except (zlib.error, NotImplementedError, RuntimeError, EOFError, struct.error, *UNREADABLE) as error:
        raise ArtifactError(f"'{path}': its metadata cannot be read ({first_line(error)})", AGAIN) from None
    return normalize(_parsed(text, path), str(path))


def _parsed(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.decode())
    except (SyntaxError, MemoryError, *UNREADABLE) as error:
        told = first_line(error)
        raise ArtifactError(f"'{path}': its metadata are neither JSON nor a Python literal ({told})", AGAIN) from None


def with_metadata(data: bytes, metadata: Metadata) -> bytes:
    """A model with its metadata appended as a zip archive of one entry, which runtimes do not look at."""
    whole = io.BytesIO(data)
    whole.seek(0, io.SEEK_END)
    with zipfile.ZipFile(whole, "a") as archive:
        archive.writestr(zipfile.ZipInfo(ENTRY), metadata.as_json())
    return whole.getvalue()

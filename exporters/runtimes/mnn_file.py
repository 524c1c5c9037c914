"""What an .mnn file says of itself: a reader of the fields that matter here, by MNN's published schema (FlatBuffers).

Slots are the fields' numbers in the tables of schema/default/*.fbs, where a union takes two; new fields come last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporters.errors import ArtifactError
from exporters.runtimes.flatbuffer import Table

PLAIN = 12  # Convolution; the others are ConvolutionDepthwise, Deconvolution and DeconvolutionDepthwise
CONVOLUTIONS = (PLAIN, 13, 17, 18)
INTEGER = (513, 515)  # ConvInt8 and DepthwiseConvInt8: activations are in 8 bits, too
PRODUCTS = (33, 39, 106, 113)  # InnerProduct, MatMul, BatchMatMul and Convolution3D
CONST, INPUT = 11, 34  # of OpType; the rest are of OpParameter and DataType
BLOB, CONVOLUTION, INPUT_PARAMETER = 7, 9, 21
TYPES = {1: "float32", 2: "float64", 3: "int32", 4: "uint8", 6: "int8", 9: "int64", 19: "float16"}


@dataclass(frozen=True)
class Kernel:
    """A convolution's weights: how they are stored, and whether each output is a sum over one point."""

    terms: int  # of each output's sum
    is_pointwise: bool  # 1 x 1, without stride, padding, groups and an activation in it
    stored: str  # "fp32", "fp16", "int8", "int4" ...; "" where they are not in the file


@dataclass(frozen=True)
class Op:
    """One operator: its name and type (a number of OpType), names of what it takes, its parameters' type and table; the
    kernel of a convolution (None where its weights are computed), and the dtype of a constant."""

    name: str
    type: int
    inputs: tuple[str, ...]
    kind: int
    parameters: Table | None
    kernel: Kernel | None = None
    constant: str = ""

    def parameters_of(self, kind: int) -> Table | None:
        return self.parameters if self.kind == kind else None


@dataclass(frozen=True)
class MnnFile:
    """The buffer, `code` (bizCode), inputs by name (sizes, -1 where one varies, and dtype), outputs, operators."""

    data: bytearray
    code: str
    inputs: dict[str, tuple[tuple[int, ...], str]]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]


def read(path: Path) -> MnnFile:
    """The parts of a file.

    Raises:
        ArtifactError: it cannot be read, is no MNN model, or holds no operators.
    """
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", "export it again") from None
    try:
        net = Table(data, struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0)
        graphs = [(list(net.texts(7)), net, 3), *((list(g.texts(3)), g, 4) for g in net.tables(10))]
        ops = tuple(_op(table, names) for names, graph, slot in graphs for table in graph.tables(slot))
        inputs: dict[str, tuple[tuple[int, ...], str]] = {}
        for op in ops:
            given = op.parameters_of(INPUT_PARAMETER)
            if op.type == INPUT and given is not None:
                kind = given.number(1, "i", 1)
                inputs[op.name] = tuple(int(n) for n in given.array(0, "<i4")), TYPES.get(kind, f"type {kind}")
        found = MnnFile(data, net.text(0), inputs, tuple(net.texts(4)), ops)
    except (IndexError, ValueError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
        what = f"'{path}' is not an MNN model, or one that was cut off ({error})" if data else f"'{path}' is empty"
        raise ArtifactError(what, "export it again") from None
    if not found.ops or not found.inputs:
        raise ArtifactError(f"'{path}' is not an MNN model (it holds no graph)", "export it again")
    return found


def _op(table: Table, names: list[str]) -> Op:
    inputs = tuple(names[int(n)] for n in table.array(0, "<i4") if n >= 0)
    op = Op(table.text(3), table.number(5, "i"), inputs, table.number(1, "B"), table.table(2))
    held = op.parameters_of(BLOB) if op.type == CONST else None
    constant = TYPES.get(held.number(2, "i", 1), "") if held is not None else ""
    return replace(op, kernel=_kernel(op), constant=constant)


def _kernel(op: Op) -> Kernel | None:
    table = op.parameters_of(CONVOLUTION)
    common = table.table(0) if table is not None else None
    if table is None or common is None or len(op.inputs) > 1:
        return None
    width, height = common.number(2, "i", 1), common.number(3, "i", 1)
    group, outputs, inputs = common.number(9, "i", 1), common.number(10, "i"), common.number(11, "i")
    terms = max(1, inputs // max(group, 1)) * height * width
    ones = {width, height, group, *(common.number(n, "i", 1) for n in (4, 5, 6, 7))}  # strides and dilations
    padded = [common.number(n, "i") for n in (0, 1)] + common.array(14, "<i4").tolist()
    clipped = common.number(12, "?") or common.number(13, "?")
    return Kernel(terms, ones == {1} and not any(padded) and not clipped, _stored(table, outputs * terms))


def _stored(table: Table, count: int) -> str:
    """Type that so many weights are stored in; for quantized ones by the bytes that there are of them."""
    if table.vector(1)[1]:
        return "fp32"
    packed = table.table(3)
    if packed is None:
        return "int8" if table.table(4) is not None else ""
    size, kind = packed.vector(0)[1], packed.number(2, "i")
    if kind == 3:
        return "fp16" if size == 2 * count else ""
    if not size or not packed.vector(1)[1]:  # the scales
        return ""
    return "int8" if size >= count else f"int{max(1, 8 * size // count)}"


def floats(model: MnnFile) -> Iterator[tuple[str, int, int]]:
    """Every vector of FP32 weights and constants that MNN can store in 16 bits: (operator, first byte, count)."""
    for op in model.ops:
        constant, convolution = op.parameters_of(BLOB), op.parameters_of(CONVOLUTION)
        if convolution is not None and op.type in CONVOLUTIONS:
            yield op.name, *convolution.vector(1)
        if constant is not None and op.type == CONST and constant.number(2, "i", 1) == 1:
            yield op.name, *constant.vector(7)


def round_to_half(model: MnnFile) -> str:
    """Rounds weights and constants to what FP16 holds, to nearest even, in place; what does not fit, or "".

    MNN's converter cuts off the bits that FP16 lacks (half.hpp without a rounding mode), which errs twice as far and to
    one side: of weights that are rounded before it has nothing to cut off.
    """
    for name, start, count in floats(model):
        values = np.frombuffer(model.data, "<f4", count, start)
        with np.errstate(over="ignore"):  # told below
            rounded = values.astype(np.float16).astype("<f4")
        lost = np.isfinite(values) & ~np.isfinite(rounded)
        if lost.any():
            return f"{name} holds {values[lost][np.argmax(abs(values[lost]))]:g}"
        model.data[start : start + 4 * count] = rounded.tobytes()
    return ""


def let_vary(model: MnnFile, axes: dict[str, tuple[int, ...]]) -> None:
    """Writes -1 for axes of inputs, in place: the converter makes 1 of a batch that varies."""
    for op in model.ops:
        given = op.parameters_of(INPUT_PARAMETER)
        if op.type == INPUT and given is not None:
            start, count = given.vector(0)
            for axis in axes.get(op.name, ()):
                if axis < count:
                    struct.pack_into("<i", model.data, start + 4 * axis, -1)

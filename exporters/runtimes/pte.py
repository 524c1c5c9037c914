"""Reading a .pte file without running it: header, program and XNNPACK graphs, and the precision that they say.

A program is a flatbuffer (identifier ET12) behind an extended header, and data segments behind it. What XNNPACK runs
is one of the segments: a header (XH00) and a flatbuffer of nodes and values, whose weights are named by their SHA-256
in other segments. ExecuTorch's own readers and schemas decode both.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from exporters.artifact import UNQUANTIZED, Achieved, main_precision
from exporters.errors import ArtifactError, first_line

MAGIC, EXTENDED, XNN_MAGIC = b"ET12", b"eh00", b"XH00"
DELEGATE = "XnnpackBackend"
METHOD, MODULES = "forward", "modules"  # what is run; the constant with the module of each heavy node
AGAIN = "export it again"
# What a decoder of bytes that are no flatbuffer runs into.
DAMAGED = (
    *(struct.error, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(OverflowError, MemoryError, RecursionError, NotImplementedError, subprocess.CalledProcessError),
)

# XNNPACK's nodes whose arithmetic decides an inference's precision: with a filter, and products of two values.
FILTERED = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected")
PRODUCTS = ("XNNBatchMatrixMultiply", "XNNScaledDotProductAttention")
VALUES: dict[str, str] = {
    "xnn_datatype_fp32": "fp32",
    "xnn_datatype_pfp32": "fp32",
    "xnn_datatype_fp16": "fp16",
    "xnn_datatype_bf16": "bf16",
    "xnn_datatype_qint8": "int8",
    "xnn_datatype_quint8": "int8",
    "xnn_datatype_qcint8": "int8",
}
# The same arithmetic in portable kernels, and which of their arguments is the data.
KERNELS: dict[str, int] = {
    **dict.fromkeys(("aten::convolution", "aten::mm", "aten::bmm", "aten::linear", "aten::matmul"), 0),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm"), 1),
}
SCALARS: dict[str, str] = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BFLOAT16": "bf16",
    "DOUBLE": "fp64",
    "CHAR": "int8",
    "BYTE": "int8",
}


@dataclass(frozen=True)
class Kernel:
    """One call of a portable kernel: "aten::convolution.out", and the type of its data where it is heavy."""

    name: str
    precision: str


@dataclass(frozen=True)
class Heavy:
    """A convolution or matrix product of an XNNPACK graph: its module, precision, and whether it has a weight."""

    name: str
    precision: str
    stored: bool
    weight: str


def program_of(path: Path) -> Path:
    """The .pte file: other exporters make a folder of it and its metadata.

    Raises:
        ArtifactError: it is a folder without one, or with several.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.pte"))
    if len(found) != 1:
        raise ArtifactError(f"'{path}' holds {len(found)} .pte files, expected one", AGAIN)
    return found[0]


class Pte:
    """A program as its file says it.

    Attributes:
        plan: what is run, as ExecuTorch's schema has it.
        constants: methods that give one text.
        graphs: what each call of XNNPACK runs, as XNNPACK's schema has it.
        kernels: calls of portable kernels.

    Raises:
        ArtifactError: the file is empty, cut off, damaged, or no ExecuTorch program; or it asks for another delegate.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = program_of(path)
        self.segments: list[bytes] = []
        size, base = _header(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
        reader: Any = importlib.import_module("executorch.exir._serialize._flatbuffer_program")
        try:
            self.program: Any = reader._flatbuffer_to_program(data[:size])
            starts = [(base + int(s.offset), int(s.size)) for s in self.program.segments]
            self.segments = [data[start : start + size] for start, size in starts]
            plans: dict[str, Any] = {p.name: p for p in self.program.execution_plan}
        except DAMAGED as error:
            raise damaged(path, error) from None
        if METHOD not in plans:
            raise ArtifactError(f"'{path}' has no method '{METHOD}', only {sorted(plans) or 'none'}", AGAIN)
        self.plan: Any = plans[METHOD]
        self._whole()
        try:
            self.constants = {name: text for name, p in plans.items() if (text := _text(p)) is not None}
            self.calls = [i.instr_args for chain in self.plan.chains for i in chain.instructions]
            self.kernels = [self._kernel(c) for c in self.calls if type(c).__name__ == "KernelCall"]
            self.graphs = self._graphs()
        except DAMAGED as error:
            raise damaged(path, error) from None

    def _whole(self) -> None:
        """XNNPACK's weights are named by the SHA-256 of their bytes."""
        for entry in self.program.named_data or ():
            digest, number = str(entry.key).removeprefix("scale_"), int(entry.segment_index)
            if number >= len(self.segments):
                raise ArtifactError(f"'{self.path}' is damaged: it has no segment {number}", AGAIN)
            is_digest = len(digest) == 64 and set(digest) <= set("0123456789abcdef")
            if is_digest and hashlib.sha256(self.segments[number]).hexdigest() != digest:
                raise ArtifactError(f"'{self.path}' is damaged: weights {digest[:12]} have other bytes", AGAIN)

    def _kernel(self, call: Any) -> Kernel:
        operator = self.plan.operators[call.op_index]
        name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        if operator.name not in KERNELS:
            return Kernel(name, "")
        tensor = self.plan.values[call.args[KERNELS[operator.name]]].val
        kind = str(tensor.scalar_type.name)
        return Kernel(name, SCALARS.get(kind, kind.lower()))

    def _graphs(self) -> list[Any]:
        others = sorted({d.id for d in self.plan.delegates if d.id != DELEGATE})
        if others:
            raise ArtifactError(
                f"'{self.path}' is made for {', '.join(others)}, and {DELEGATE} alone is judged here",
                "export it for XNNPACK",
            )
        blobs: list[bytes] = []
        for entry in self.plan.delegates:
            inline = entry.processed.location.name == "INLINE"
            at = int(entry.processed.index)
            blobs.append(bytes(self.program.backend_delegate_data[at].data if inline else self.segments[at]))
        return list(_decoded(blobs))

    def heavy(self) -> list[Heavy]:
        """Convolutions and matrix products of the XNNPACK graphs, in order."""
        modules: dict[str, str] = json.loads(self.constants.get(MODULES, "{}"))
        found: list[Heavy] = []
        for graph in self.graphs:
            values = {v["id_out"]: v for v in (_value(x) for x in graph["xvalues"])}
            for node in graph["xnodes"]:
                kind, body = node["xnode_union_type"], node["xnode_union"]
                if kind not in (*FILTERED, *PRODUCTS):
                    continue
                number = str(node.get("debug_handle", ""))
                two = ("input1_id", "filter_id") if kind in FILTERED else _operands(kind)
                data, weight = (values[body[key]] for key in two)
                stored = bool(data.get("constant_buffer_idx", 0) or weight.get("constant_buffer_idx", 0))
                found.append(
                    Heavy(modules.get(number, f"{kind} {number}"), _precision(data, weight), stored, _type(weight))
                )
        return found

    def nodes(self) -> int:
        """How many nodes XNNPACK runs."""
        return sum(len(graph["xnodes"]) for graph in self.graphs)

    def portable(self) -> dict[str, int]:
        """Calls of portable kernels, by name."""
        return dict(Counter(k.name for k in self.kernels))


def damaged(path: Path, error: Exception) -> ArtifactError:
    """What a decoder ran into, in a line."""
    beyond = isinstance(error, struct.error)
    told = "an offset points beyond its end" if beyond else f"{type(error).__name__}: {first_line(error)}"
    return ArtifactError(f"'{path}' is damaged ({told})", AGAIN)


def _operands(kind: str) -> tuple[str, str]:
    return ("input1_id", "input2_id") if kind == "XNNBatchMatrixMultiply" else ("query_id", "key_id")


def _header(path: Path) -> tuple[int, int]:
    """(bytes of the program, offset of the segments), checked against the file's size.

    The runtime aborts or reads beyond the end where they are wrong.

    Raises:
        ArtifactError: the file is empty, too short, of another kind, or cut off.
    """
    try:
        with path.open("rb") as file:
            head = file.read(40)
        there = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
    if not head:
        raise ArtifactError(f"'{path}' is empty", AGAIN)
    if head[4:8] != MAGIC:
        raise ArtifactError(
            f"'{path}' is no ExecuTorch program: its bytes 4 to 8 are {head[4:8]!r}, expected {MAGIC!r}", AGAIN
        )
    if len(head) < 40:
        raise ArtifactError(f"'{path}' is cut off: it has {there} bytes, and its header 40", AGAIN)
    if head[8:12] != EXTENDED:  # a program without segments: nothing lies behind it
        return there, there
    size, base, behind = struct.unpack("<QQQ", head[16:40])
    if struct.unpack("<I", head[12:16])[0] <= 24:  # headers before segment_data_size was added
        behind = 0
    if there < max(size, base + behind):
        raise ArtifactError(
            f"'{path}' is cut off: it has {there} bytes, and its header says {max(size, base + behind)}", AGAIN
        )
    return size, base


def _text(plan: Any) -> str | None:
    """The text that a method gives, where it gives one and runs nothing."""
    if plan.operators or plan.delegates or len(plan.outputs) != 1:
        return None
    value = plan.values[plan.outputs[0]].val
    return value.string_val if type(value).__name__ == "String" else None


def _decoded(blobs: list[bytes]) -> Iterator[Any]:
    """XNNPACK graphs as JSON: ExecuTorch has a schema for them and no reader."""
    flatc: Any = importlib.import_module("executorch.exir._serialize._flatbuffer")
    serialization: Any = importlib.import_module("executorch.backends.xnnpack.serialization")
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(resources.files(serialization).joinpath(schema.name).read_bytes())
        for blob in blobs:
            start, size = 0, len(blob)
            if blob[4:8] == XNN_MAGIC:
                start, size = struct.unpack("<II", blob[10:18])
            if not 0 < size <= len(blob) - start:
                raise ValueError(f"an XNNPACK graph has {len(blob)} bytes, and its header says {start + size}")
            binary.write_bytes(blob[start : start + size])
            flatc._flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
            text = (Path(folder) / "graph.json").read_text(encoding="utf-8")
            # flatc writes the open end of a ReLU as inf, which is no JSON.
            yield json.loads(re.sub(r"(?<=: )[+-]?(?:inf|nan)(?=[,\s])", "null", text))


def _value(entry: Any) -> Any:
    """A value's tensor, quantized or not."""
    union = entry["xvalue_union"]
    return union.get("tensor_value", union)


def _type(value: Any) -> str:
    kind = str(value["datatype"])
    return VALUES.get(kind, kind.removeprefix("xnn_datatype_"))


def _precision(data: Any, weight: Any) -> str:
    """Precision of the arithmetic. FP16's weights lie in the file as FP32: XNNPACK rounds them as it packs them."""
    two = (_type(data), _type(weight))
    if two[0] == two[1] or two == ("fp16", "fp32"):
        return two[0]
    return f"{two[1]} weights on {two[0]}"


def read_precision(path: Path) -> Achieved:
    """Each convolution and matrix product by the type of its data and weight, whoever runs it.

    `exceptions` names those that differ, by module.
    """
    pte = Pte(path)
    try:
        heavy = pte.heavy()
    except DAMAGED as error:
        raise damaged(path, error) from None
    portable = [k for k in pte.kernels if k.precision]
    counts = Counter(h.precision for h in heavy if h.stored) + Counter(k.precision for k in portable)
    if not counts:
        counts = Counter(h.precision for h in heavy)
    main = main_precision(counts)
    left = [h for h in heavy if not h.stored]
    evidence = {f"operators {k}": n for k, n in counts.items()}
    evidence |= {f"weights {k}": n for k, n in Counter(h.weight for h in heavy if h.stored).items()}
    evidence |= {"nodes in XNNPACK": pte.nodes(), "calls of portable kernels": len(pte.kernels)}
    evidence |= {UNQUANTIZED: len(left)} if left and main == "int8" else {}
    others = [h.name for h in heavy if h.precision != main and (h.stored or main != "int8")]
    others += [k.name for k in portable if k.precision != main]
    return Achieved(main, evidence, tuple(sorted(others)))

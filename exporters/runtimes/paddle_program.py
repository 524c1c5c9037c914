"""What a Paddle model's files say of themselves: a reader of model.json (PIR's JSON) and of the parameters' file.

Paddle is not asked: what it makes of a damaged file may end its process. An operator of PIR is an object with "#" (its
name behind the number of a dialect, or "p" for a parameter), "A" (attributes), "I" and "O" (what it takes and gives, by
numbers "%" of values), a type is {"#": "0.t_dtensor", "D": [element type, shape, ...]}. A parameter in the .pdiparams
is a header (version, level of detail, version: 4, 8, 4 bytes of zeros), a Protocol Buffers message of type and sizes
behind its length, and the values; they lie in the order of the parameters' names, which are in the program alone.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from exporters.artifact import Achieved, main_precision
from exporters.errors import ArtifactError, first_line

AGAIN = "export it again"
PROGRAM, PARAMETERS = ".json", ".pdiparams"
BUILTIN, OPERATORS, CONTROL = "0", "1", "2"  # dialects, as PIR numbers them
# What would write or read files of the machine, or run what is in the file or elsewhere: Paddle has operators for it.
REFUSED = (
    *("save_combine", "load_combine", "read_file", "tensorrt_engine", "py_func", "pylayer", "run_program"),
    *("send_v2", "recv_v2", "p_send", "p_recv", "partial_send", "partial_recv"),
)
HEAVY = (
    *("conv2d", "conv3d", "depthwise_conv2d", "conv2d_transpose", "conv3d_transpose", "depthwise_conv2d_transpose"),
    *("conv2d_transpose_bias", "matmul", "matmul_v2", "bmm", "mv", "addmm", "fc", "mul"),
)
PASSING = ("cast", "reshape", "transpose", "unsqueeze", "squeeze", "scale", "share_data", "dequantize_linear")
TYPES = {
    **{"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "bool": "bool"},
    **{"i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "ui8": "uint8", "u8": "uint8"},
}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "uint8": "int8"}
STORED = {  # VarType.Type of Paddle's framework.proto
    **{0: "bool", 1: "int16", 2: "int32", 3: "int64", 4: "float16", 5: "float32", 6: "float64"},
    **{20: "uint8", 21: "int8", 22: "bfloat16"},
}
WIDTHS = {"bool": 1, "int8": 1, "uint8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4}
KINDS = (  # of errors, as Paddle writes them
    *("InvalidArgument", "InvalidType", "NotFound", "OutOfRange", "AlreadyExists", "PreconditionNotMet", "Unavailable"),
    *("PermissionDenied", "ExecutionTimeout", "ResourceExhausted", "Unimplemented", "Fatal", "External"),
)
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, RecursionError, struct.error, OverflowError)


@dataclass(frozen=True)
class Tensor:
    """Element type (numpy's name, or PIR's where there is none) and sizes; -1 where one varies."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operator: name, plain attributes, numbers of the values that it takes and gives, the first one's type."""

    kind: str
    attributes: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    made: Tensor | None


@dataclass(frozen=True)
class Program:
    """Inputs and outputs by name, in order; parameters by name; every operator."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    ops: tuple[Op, ...]

    def makers(self) -> dict[int, Op]:
        """The operator that gives each value."""
        return {number: op for op in self.ops for number in op.outputs}


def said(told: object) -> str:
    """What went wrong, of an exception of Paddle's or a log: it may say before where in its source it did, and behind
    it how to report it."""
    found = re.search(rf"(?:\((?:{'|'.join(KINDS)})\) |\w+Error: ).+", str(told))
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    return (found[0].strip() if found else (lines or ["it said nothing"])[0])[:300]


def files_of(path: Path) -> tuple[Path, Path]:
    """The program and the parameters of a model's folder, which X2Paddle leaves in a folder inference_model.

    Raises:
        ArtifactError: there is not one of each.
    """
    if not path.is_dir():
        raise ArtifactError(f"'{path}' is no folder with a {PROGRAM} and a {PARAMETERS}", AGAIN)
    folder = path if any(path.glob(f"*{PARAMETERS}")) or any(path.glob(f"*{PROGRAM}")) else path / "inference_model"
    found: list[Path] = []
    for suffix in (PROGRAM, PARAMETERS):
        files = sorted(folder.glob(f"*{suffix}"))
        if len(files) != 1:
            older = suffix == PROGRAM and any(folder.glob("*.pdmodel"))
            more = "; its .pdmodel is a program of Paddle 2, which is not read here" if older else ""
            names = ", ".join(f.name for f in files) or "none"
            raise ArtifactError(f"'{folder}' holds {len(files)} {suffix} files ({names}), expected one{more}", AGAIN)
        found.append(files[0])
    return found[0], found[1]


def read(path: Path) -> Program:
    """The program in a model's folder, held against the parameters' file.

    Raises:
        ArtifactError: a file is missing, damaged or another's, they do not belong together, or an operator is refused.
    """
    source, stored = files_of(path)
    found = read_program(source)
    _check(stored, found.parameters)
    return found


def read_program(path: Path) -> Program:
    """The program alone. Raises ArtifactError as `read` does."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
    try:
        whole = json.loads(data)
        begins = whole["base_code"]["magic"]
        ops = list(_ops(whole["program"]))
    except UNREADABLE as error:
        if not data:
            raise ArtifactError(f"'{path}' is empty", AGAIN) from None
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ArtifactError(f"'{path}' is no program of Paddle, or one that was cut off ({told})", AGAIN) from None
    if begins != "pir" or not ops:
        raise ArtifactError(f"'{path}' is no program of Paddle (its magic is {begins!r})", AGAIN)
    try:
        return _program(ops)
    except UNREADABLE as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ArtifactError(f"'{path}' is a damaged program of Paddle ({told})", AGAIN) from None
    except ArtifactError as error:
        raise ArtifactError(f"'{path}': {error.what}", error.fix) from None


def _ops(node: Mapping[str, Any]) -> Iterator[Any]:
    """Every operator, those of branches and loops too."""
    for region in node.get("regions", ()):
        for block in region["blocks"]:
            for op in block["ops"]:
                yield op
                yield from _ops(op)


def _program(raw: list[Any]) -> Program:
    inputs: dict[str, Tensor] = {}
    outputs: dict[int, tuple[str, Tensor]] = {}
    parameters: dict[str, Tensor] = {}
    ops: list[Op] = []
    for node in raw:
        if node["#"] == "p":
            name, made = str(node["A"][3]), _tensor(node["O"]["TT"])
            if name in parameters or made is None:
                raise ValueError(f"parameter '{name}' is there twice, or no tensor")
            parameters[name] = made
            ops.append(Op("p", {"name": name}, (), (_whole(node["O"]["%"]),), made))
            continue
        dialect, _, kind = str(node["#"]).partition(".")
        kind = kind.rstrip("_")
        if dialect not in (BUILTIN, OPERATORS, CONTROL) or kind in REFUSED or not kind:
            raise ArtifactError(
                f"operator '{node['#']}' is refused: it is of another library, or reads, writes or runs what is no "
                "tensor",
                "open only models without it",
            )
        given = {str(a["N"]): a["AT"].get("D") for a in node.get("A", ())}
        types = [_tensor(o["TT"]) for o in node["O"] if "TT" in o]
        taken, gives = (tuple(_whole(v["%"]) for v in node.get(key, ())) for key in ("I", "O"))
        op = Op(kind, given, taken, gives, types[0] if types else None)
        ops.append(op)
        if kind in ("data", "fetch"):
            name, made = str(given["name"]), op.made
            if made is None or name in inputs:
                raise ValueError(f"'{name}' is there twice, or no tensor")
            if kind == "data":
                inputs[name] = made
            else:
                outputs[_whole(given["col"])] = name, made
    named = dict(outputs[n] for n in sorted(outputs))
    if not inputs or not named or len(named) < len(outputs):
        raise ValueError(f"it has {len(inputs)} inputs, and {len(named)} names for {len(outputs)} outputs")
    return Program(inputs, named, parameters, tuple(ops))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{str(value)[:40]} is no whole number")
    return value


def _tensor(kind: Mapping[str, Any]) -> Tensor | None:
    """A dense tensor's type; None for another type's (a list of tensors)."""
    if kind["#"] != f"{BUILTIN}.t_dtensor":
        return None
    element, sizes = str(kind["D"][0]["#"]).rpartition("t_")[2], cast("list[Any]", kind["D"][1])
    return Tensor(TYPES.get(element, element), tuple(_whole(n) for n in sizes))


def _check(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Raises ArtifactError where the file does not hold these parameters, one behind the other, and nothing else."""
    size, ends = 0, [(name, stop) for name, _, stop in spans(path, parameters)]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
    if (ends and ends[-1][1] != size) or (not ends and size):
        last = ends[-1][1] if ends else 0
        raise ArtifactError(f"'{path}' has {size} bytes, and its program's parameters take {last}", AGAIN)


def spans(path: Path, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, int, int]]:
    """Where each parameter's values lie in a file: name, first byte and end, in order.

    Raises:
        ArtifactError: it cannot be read, or holds another tensor, or less than one, where a parameter should be.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            at = 0
            for name in sorted(parameters):
                file.seek(at)
                head = file.read(20)
                if len(head) < 20:
                    raise ValueError(f"it ends at byte {size}, before parameter '{name}'")
                versions, length = struct.unpack("<IQI", head[:16]), struct.unpack("<i", head[16:])[0]
                if any(versions) or not 0 < length <= 1024:
                    raise ValueError(f"no parameter begins at byte {at}, where '{name}' should be")
                found, want = _described(file.read(length)), parameters[name]
                if found != want:
                    raise ValueError(
                        f"byte {at} has {found.dtype} {list(found.shape)}, and '{name}' is "
                        f"{want.dtype} {list(want.shape)}"
                    )
                start = at + 20 + length
                at = start + math.prod(found.shape) * WIDTHS.get(found.dtype, 8)
                if at > size:
                    raise ValueError(f"it ends at byte {size}, and parameter '{name}' at {at}")
                yield name, start, at
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
    except (ValueError, IndexError) as error:
        told = f"'{path}' does not hold the parameters of its program ({first_line(error)})"
        raise ArtifactError(told, AGAIN) from None


def _described(message: bytes) -> Tensor:
    """Paddle's TensorDesc: field 1 is the type, field 2 the sizes, each a number of its own."""
    at, kind, sizes = 0, -1, list[int]()
    while at < len(message):
        key, at = _varint(message, at)
        value, at = _varint(message, at)
        if key == 8:
            kind = value
        elif key == 16:
            sizes.append(value)
        else:
            raise ValueError(f"a parameter's description has a field {key >> 3}")
    return Tensor(STORED.get(kind, f"type {kind}"), tuple(sizes))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if not byte & 128:
            return value, at
    raise ValueError("a number has more than 64 bits")


def rename(path: Path, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """Gives inputs and outputs of a program these names, by their present ones, in place."""
    whole = json.loads(path.read_bytes())
    for op in _ops(whole["program"]):
        names = {f"{OPERATORS}.data": inputs, f"{OPERATORS}.fetch": outputs}.get(op["#"], {})
        for attribute in op["A"] if names else ():
            if attribute["N"] == "name":
                attribute["AT"]["D"] = names[attribute["AT"]["D"]]
    path.write_text(json.dumps(whole, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def read_precision(path: Path) -> Achieved:
    """Each convolution and matrix product by the type of its stored weight, or, where both are computed, of what it
    gives. They have no names in the file but their weights'; `exceptions` names those that differ."""
    program = read(path)
    makers, kinds = program.makers(), dict[str, str]()
    for number, op in enumerate(program.ops):
        if op.kind in HEAVY:
            weights = [w for n in op.inputs[:3] if (w := _stored(makers.get(n), makers)) is not None]
            made = weights[0].made if weights else op.made
            name = str(weights[0].attributes["name"]) if weights else f"{op.kind}.{number}"
            kind = made.dtype if made else ""
            kinds[f"{name} of {op.kind}.{number}" if name in kinds else name] = SHORT.get(kind, kind)
    counts = Counter(kinds.values())
    main = main_precision(counts)
    evidence = {f"operators {k}": n for k, n in counts.items()}
    return Achieved(main, evidence, tuple(sorted(n for n, k in kinds.items() if k != main)))


def _stored(op: Op | None, makers: Mapping[int, Op]) -> Op | None:
    """The parameter that a value is, behind its conversion; None of what is computed."""
    for _ in makers:  # a damaged file may go round in circles
        if op is None or op.kind not in PASSING or not op.inputs:
            break
        op = makers.get(op.inputs[0])
    return op if op is not None and op.kind == "p" else None

"""Precision read back from an ONNX file: types of the weights, and which operators are surrounded by Q/DQ."""
# pyright: reportUnknownMemberType=false
# (onnx.load leaves the type of a path open)

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from exporters.artifact import UNQUANTIZED, Achieved, main_precision
from exporters.errors import ArtifactError, first_line

HEAVY = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int8",
}


def read_precision(path: Path) -> Achieved:
    """Each convolution and matrix product by the type of its weight, or int8 where input and weight come from Q/DQ.

    `exceptions` names those that differ, by node.

    Raises:
        ArtifactError: the file is not an ONNX model.
    """
    try:
        model = onnx.load(path)
        graph = model.graph
    except (DecodeError, OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' is not an ONNX model ({first_line(error)})", "export it again") from None
    if not graph.node:
        raise ArtifactError(f"'{path}' holds no graph", "export it again")
    stored = {i.name: TYPES.get(i.data_type, "other") for i in graph.initializer}
    kinds = _kinds(graph, stored)
    if "" in kinds.values():  # types of values are optional in a file
        kinds = _kinds(onnx.shape_inference.infer_shapes(model).graph, stored)
    counts = Counter(kinds.values())
    weights = Counter(TYPES.get(i.data_type, "other") for i in graph.initializer if len(i.dims) >= 2)
    evidence = {f"operators {k or 'unknown'}": n for k, n in counts.items()} | {
        f"weights {k}": n for k, n in weights.items()
    }
    evidence |= {
        k: n
        for k, n in Counter(n.op_type for n in graph.node).items()
        if k in ("QuantizeLinear", "DequantizeLinear", "Cast")
    }
    evidence["opset"] = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    main = main_precision(counts or dict.fromkeys(list(weights)[:1], 1))
    left = _unquantized(graph) if main == "int8" else set[str]()
    evidence |= {UNQUANTIZED: len(left)} if left else {}
    others = tuple(sorted(name for name, kind in kinds.items() if kind != main and name not in left))
    return Achieved(main, evidence, others, _rounded(model))


def _unquantized(graph: onnx.GraphProto) -> set[str]:
    """Names of transposed convolutions and of products of two computed tensors."""
    made_by = {output: node for node in graph.node for output in node.output}
    stored = {i.name for i in graph.initializer}

    def is_stored(name: str) -> bool:
        maker = made_by.get(name)
        return name in stored or (maker is not None and bool(maker.input) and maker.input[0] in stored)

    return {
        node.name or node.output[0]
        for node in graph.node
        if node.op_type == "ConvTranspose"
        or (node.op_type in ("MatMul", "Gemm") and not any(is_stored(n) for n in node.input[:2]))
    }


def _rounded(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of FP32 values that are cast to FP16 and back."""
    casts = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast"}

    def is_to(node: onnx.NodeProto, dtype: int) -> bool:
        return any(a.name == "to" and a.i == dtype for a in node.attribute)

    back = [n.input[0] for n in casts.values() if is_to(n, onnx.TensorProto.FLOAT) and n.input[0] in casts]
    through = {casts[name].input[0] for name in back if is_to(casts[name], onnx.TensorProto.FLOAT16)}
    if not through:
        return ()
    graph = onnx.shape_inference.infer_shapes(model).graph
    floats = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return tuple(sorted(through & floats))


def _kinds(graph: onnx.GraphProto, stored: dict[str, str]) -> dict[str, str]:
    """Type that each convolution and matrix product computes in, by its name."""
    made_by = {output: node for node in graph.node for output in node.output}
    types = {
        v.name: TYPES.get(v.type.tensor_type.elem_type, "") for v in (*graph.value_info, *graph.input, *graph.output)
    }
    return {n.name or n.output[0]: _kind(n, stored, made_by, types) for n in graph.node if n.op_type in HEAVY}


def _kind(
    node: onnx.NodeProto, stored: dict[str, str], made_by: dict[str, onnx.NodeProto], types: dict[str, str]
) -> str:
    """Type that a node computes in, from its first two inputs."""
    found: list[str] = []
    for name in node.input[:2]:
        maker = made_by.get(name)
        if name in stored:
            found.append(stored[name])
        elif maker is not None and maker.op_type == "DequantizeLinear":
            found.append("int8")
        else:
            found.append(types.get(name, ""))
    known = [k for k in found if k]
    if "int8" in known and known.count("int8") < 2:
        return next((k for k in known if k != "int8"), "fp32")  # half a pair of Q/DQ computes in floating point
    return known[-1] if known else ""

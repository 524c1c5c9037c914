"""FP32 -> FP16 by ONNX Runtime's converter, with FP32 inputs and outputs and the named parts left in FP32."""
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# (onnxruntime.transformers has no types)

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import onnx

from exporters.errors import ExportError, first_line
from exporters.models.spec import belongs


def to_fp16(graph: onnx.ModelProto, kept: Sequence[str]) -> onnx.ModelProto:
    """The graph with FP16 weights and arithmetic.

    Args:
        graph: FP32 graph; changed by the converter.
        kept: module paths ("model.22.decode") whose nodes stay in FP32.

    Raises:
        ExportError: the converter failed.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    graph = onnx.shape_inference.infer_shapes(graph)
    blocked = [node.name for node in graph.graph.node if belongs(node.name, kept)] + _counts(graph.graph)
    try:
        converted = convert_float_to_float16(
            graph, keep_io_types=True, node_block_list=blocked, disable_shape_infer=True
        )
    except Exception as error:
        # The converter raises ValueError, RuntimeError or KeyError, as the graph has it.
        what = f"the FP16 conversion failed: {type(error).__name__}: {first_line(error)}"
        raise ExportError(what, "report the graph") from error
    made = cast("onnx.ModelProto", converted)
    _merge_casts(made.graph)
    _drop_round_trips(made.graph)
    OnnxModel(made).topological_sort()  # the converter puts the casts of inputs last, which ONNX forbids
    return made


def _counts(graph: onnx.GraphProto) -> list[str]:
    """Names of the casts by which sizes reach a Range: FP16 has no odd number above 2048, so it would miscount."""
    wanted = {name for node in graph.node if node.op_type == "Range" for name in node.input}
    return [node.name for node in graph.node if node.op_type == "Cast" and node.output[0] in wanted]


def to_bf16(graph: onnx.ModelProto, kept: Sequence[str]) -> onnx.ModelProto:
    """The graph with BF16 weights and arithmetic: converted as for FP16, then every FP16 type made BF16.

    Weights are rounded once, from FP32 to nearest even.

    Raises:
        ExportError: the converter failed.
    """
    import numpy as np

    originals = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
    made = to_fp16(graph, kept)
    half, brain = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
    for tensor in made.graph.initializer:
        if tensor.data_type == half:
            values = originals.get(tensor.name, onnx.numpy_helper.to_array(tensor)).astype(np.float32)
            bits = values.view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, brain, values.shape, rounded.tobytes(), raw=True))
    for node in made.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = brain
    for info in made.graph.value_info:
        if info.type.tensor_type.elem_type == half:
            info.type.tensor_type.elem_type = brain
    return made


def _merge_casts(graph: onnx.GraphProto) -> None:
    """Drops repeated casts, in place: the converter adds one a consumer, all of one name, which is an invalid file."""
    seen: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Cast" and node.output[0] in seen:
            continue
        seen.update(node.output)
        nodes.append(node)
    names: set[str] = set()
    for number, node in enumerate(nodes):
        if node.name in names:
            node.name = f"{node.name}_{number}"
        names.add(node.name)
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _drop_round_trips(graph: onnx.GraphProto) -> None:
    """Takes FP32 values past pairs of casts to FP16 and back, in place.

    The converter puts such a pair between any two nodes that stay in FP32, and before an FP32 output of the graph: each
    rounds to FP16 what was to be kept from it.
    """
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    casts = {n.output[0]: n for n in graph.node if n.op_type == "Cast"}

    def is_to(node: onnx.NodeProto, dtype: int) -> bool:
        return any(a.name == "to" and a.i == dtype for a in node.attribute)

    original: dict[str, str] = {}  # name of the value that comes back -> that of the FP32 value that went out
    for name, back in casts.items():
        out = casts.get(back.input[0])
        if out is None or not is_to(back, onnx.TensorProto.FLOAT) or not is_to(out, onnx.TensorProto.FLOAT16):
            continue
        if types.get(out.input[0]) == onnx.TensorProto.FLOAT:
            original[name] = out.input[0]
    outputs = {o.name for o in graph.output}
    # An output of the graph keeps its name: the node that makes its value takes it over.
    taken = {source: name for name, source in original.items() if name in outputs}
    live = [n for n in graph.node if n.op_type != "Cast" or n.output[0] not in original]
    for node in live:
        for number, name in enumerate(node.input):
            source = original.get(name, name)
            node.input[number] = taken.get(source, source)
        for number, name in enumerate(node.output):
            node.output[number] = taken.get(name, name)
    used = outputs | {name for node in live for name in node.input}
    kept = [n for n in live if n.op_type != "Cast" or n.output[0] in used]
    alive = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
    del graph.node[:]
    graph.node.extend(alive)
    known = {name for node in alive for name in node.output}
    infos = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.value_info if v.name in known]
    del graph.value_info[:]
    graph.value_info.extend(infos)

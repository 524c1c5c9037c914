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

    graph = onnx.shape_inference.infer_shapes(graph)
    blocked = [node.name for node in graph.graph.node if belongs(node.name, kept)]
    try:
        converted = convert_float_to_float16(
            graph, keep_io_types=True, node_block_list=blocked, disable_shape_infer=True
        )
    except Exception as error:
        # The converter raises ValueError, RuntimeError or KeyError, as the graph has it.
        what = f"the FP16 conversion failed: {type(error).__name__}: {first_line(error)}"
        raise ExportError(what, "report the graph") from error
    made = cast("onnx.ModelProto", converted)
    _merge_casts(made)
    return made


def _merge_casts(graph: onnx.ModelProto) -> None:
    """Drops repeated casts, in place: the converter adds one a consumer, all of one name, which is an invalid file."""
    seen: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
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
    del graph.graph.node[:]
    graph.graph.node.extend(kept)

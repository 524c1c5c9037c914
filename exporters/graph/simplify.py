"""Simplification by OnnxSlim: constants folded, shapes resolved. A failure is an error, never passed over.

A graph of which we know that nothing else is to be done (a selftest holds it against OnnxSlim) has its constants folded
here, which takes 5 ms; OnnxSlim takes 250 ms, and its import of sympy more.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# (onnxslim has no stubs)

from __future__ import annotations

from typing import Any, cast

import onnx

from exporters.errors import ExportError, first_line


def simplify(graph: onnx.ModelProto, dynamic: bool) -> onnx.ModelProto:
    """The simplified graph.

    Shapes of a static graph are inferred by ONNX itself, which leaves the same nodes as OnnxSlim's symbolic inference
    in half the time; `dynamic` shapes need the symbolic one.

    Raises:
        ExportError: the simplifier failed, with its own words.
    """
    import onnxslim

    slim = cast("Any", onnxslim.slim)
    try:
        if dynamic:
            made = slim(graph)
        else:
            made = slim(onnx.shape_inference.infer_shapes(graph, data_prop=True), no_shape_infer=True)
    except Exception as error:
        # Whatever a graph makes it raise is the export's failure; there is no common base class.
        what = f"the simplifier failed: {type(error).__name__}: {first_line(error)}"
        raise ExportError(what, "export with simplify off") from error
    if not isinstance(made, onnx.ModelProto):
        raise ExportError(f"the simplifier returned {type(made).__name__}", "export with simplify off")
    return made


# What a graph of constants and activations alone has none of: operators that compute a shape, or that do nothing.
COMPUTES_SHAPES = frozenset(
    {"Cast", "ConstantOfShape", "Expand", "Gather", "Identity", "If", "Loop", "Range", "Shape", "Size", "Unsqueeze"}
)


def fold_constants(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its Constant nodes made initializers, in place; by OnnxSlim where more is to be done."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        values = [a.t for a in node.attribute if a.name == "value"] if node.op_type == "Constant" else []
        if values:
            tensor = graph.graph.initializer.add()
            tensor.CopyFrom(values[0])
            tensor.name = node.output[0]
        else:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    constants = {i.name for i in graph.graph.initializer}
    if any(n.op_type in COMPUTES_SHAPES or constants.issuperset(filter(None, n.input)) for n in nodes):
        return simplify(graph, dynamic=False)
    return graph

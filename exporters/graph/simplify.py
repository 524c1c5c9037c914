"""Simplification by OnnxSlim: constants folded, shapes resolved. A failure is an error, never passed over."""

from __future__ import annotations

import onnx

from exporters.errors import ExportError


def simplify(graph: onnx.ModelProto, dynamic: bool) -> onnx.ModelProto:
    """The simplified graph.

    Shapes of a static graph are inferred by ONNX itself, which leaves the same nodes as OnnxSlim's symbolic inference
    in half the time; `dynamic` shapes need the symbolic one.

    Raises:
        ExportError: the simplifier failed, with its own words.
    """
    import onnxslim

    try:
        if dynamic:
            made = onnxslim.slim(graph)
        else:
            made = onnxslim.slim(onnx.shape_inference.infer_shapes(graph, data_prop=True), no_shape_infer=True)
    except Exception as error:
        # Whatever a graph makes it raise is the export's failure; there is no common base class.
        line = " ".join(str(error).split())[:300]
        raise ExportError(f"the simplifier failed: {type(error).__name__}: {line}", "export with simplify off") from error
    if not isinstance(made, onnx.ModelProto):
        raise ExportError(f"the simplifier returned {type(made).__name__}", "export with simplify off")
    return made

"""Simplification by OnnxSlim: constants folded, shapes resolved. A failure is an error, never passed over."""
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

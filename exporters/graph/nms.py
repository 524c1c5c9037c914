"""Non-maximum suppression as part of an ONNX graph: a detector's anchors become at most `max_det` rows a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters.models.spec import detector_output
from exporters.session import Array
from exporters.spec import ExportSpec

MODULE = "nms"  # that the operators' names say they belong to


def suppress(graph: onnx.ModelProto, spec: ExportSpec) -> None:
    """Replaces the output of anchors (B, C, A) by detections (B, max_det, 6 + further channels), in place.

    A row holds x1, y1, x2, y2 in pixels, score, class, then what the anchor has beyond its classes; the highest score
    comes first, and rows beyond the last detection are zeros. An anchor has the class of its highest score; suppression
    is within classes, or across them where the request is agnostic.
    """
    entry = detector_output(spec.model)
    assert entry is not None
    score = next(g for g in entry.groups if g.kind == "score")
    first, last = score.start, int(score.stop or 0)
    made = _Nodes(graph.graph, graph.opset_import[0].version)
    raw = f"{entry.name}/anchors"
    for node in graph.graph.node:
        node.output[:] = [raw if name == entry.name else name for name in node.output]
        node.input[:] = [raw if name == entry.name else name for name in node.input]
    values = made.add("Transpose", [raw], perm=[0, 2, 1])  # (B, A, C)
    middle = made.add("Slice", [values, made.whole([0]), made.whole([2]), made.whole([2])])
    sides = made.add("Slice", [values, made.whole([2]), made.whole([4]), made.whole([2])])
    scores = made.add("Slice", [values, made.whole([first]), made.whole([last]), made.whole([2])])
    half = made.add("Mul", [sides, made.real(0.5)])
    boxes = made.add(
        "Concat", [made.add("Sub", [middle, half]), made.add("Add", [middle, half])], axis=2
    )  # (B, A, 4) corners
    best = made.largest(scores)  # (B, A, 1)
    label = made.add("ArgMax", [scores], axis=2, keepdims=1)
    if spec.agnostic_nms:
        rivals = best
    else:  # each anchor rivals for one class alone
        own = made.add("Equal", [label, made.constant(np.arange(last - first).reshape(1, 1, -1))])
        rivals = made.add("Where", [own, scores, made.real(0.0)])
    chosen = made.add(
        "NonMaxSuppression",
        [
            boxes,
            made.add("Transpose", [rivals], perm=[0, 2, 1]),
            made.whole([spec.max_det]),
            made.constant(np.array([spec.iou], np.float32)),
            made.constant(np.array([spec.conf], np.float32)),
        ],
    )  # (N, 3): picture, class, anchor
    places = made.add("Gather", [chosen, made.whole([0, 2])], axis=1)
    ones = made.add("Cast", [made.add("ReduceMax", [places], axes=[1], keepdims=0)], to=onnx.TensorProto.FLOAT)
    ones = made.add("Add", [made.add("Mul", [ones, made.real(0.0)]), made.real(1.0)])  # (N,)
    flat = made.add("Squeeze", [best, made.whole([2])])  # (B, A)
    kept = made.add("ScatterND", [made.add("Mul", [flat, made.real(0.0)]), places, ones])
    # Rows of zeros behind the anchors: where there are fewer of these than rows are asked for, too.
    ranked = made.add("Pad", [made.add("Mul", [flat, kept]), made.whole([0, 0, 0, spec.max_det])])
    top, where = made.add_two("TopK", [ranked, made.whole([spec.max_det])], axis=1)
    parts = [boxes, best, made.add("Cast", [label], to=onnx.TensorProto.FLOAT)]
    if _channels(graph, entry.name, last) > last:
        parts.append(made.add("Slice", [values, made.whole([last]), made.whole([1 << 30]), made.whole([2])]))
    rows = made.add("Pad", [made.add("Concat", parts, axis=2), made.whole([0, 0, 0, 0, spec.max_det, 0])])
    rows = made.add("GatherND", [rows, made.add("Unsqueeze", [where, made.whole([2])])], batch_dims=1)
    real = made.add("Cast", [made.add("Greater", [top, made.real(0.0)])], to=onnx.TensorProto.FLOAT)
    made.add("Mul", [rows, made.add("Unsqueeze", [real, made.whole([2])])], output=entry.name)
    for output in graph.graph.output:
        if output.name == entry.name:
            batch = output.type.tensor_type.shape.dim[0]
            size = batch.dim_param or batch.dim_value
            width = 6 + _channels(graph, entry.name, last) - last
            output.CopyFrom(
                helper.make_tensor_value_info(entry.name, onnx.TensorProto.FLOAT, [size, spec.max_det, width])
            )


def _channels(graph: onnx.ModelProto, name: str, least: int) -> int:
    """How many channels an output (B, C, A) has."""
    found = next(o for o in graph.graph.output if o.name == name)
    return int(found.type.tensor_type.shape.dim[1].dim_value) or least


class _Nodes:
    """Adds operators and constants to a graph, each with a name in MODULE."""

    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        self.graph, self.opset, self.count = graph, opset, 0

    def _name(self, kind: str) -> str:
        self.count += 1
        return f"/{MODULE}/{kind}_{self.count}"

    def constant(self, value: Array) -> str:
        name = self._name("constant")
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def whole(self, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def real(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def add(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        if kind == "ReduceMax" and self.opset >= 18:  # where the axes became an input
            inputs = [*inputs, self.whole(attributes.pop("axes"))]
        name = self._name(kind)
        self.graph.node.append(helper.make_node(kind, inputs, [output or f"{name}/out"], name, **attributes))
        return output or f"{name}/out"

    def add_two(self, kind: str, inputs: list[str], **attributes: Any) -> tuple[str, str]:
        name = self._name(kind)
        outputs = [f"{name}/out", f"{name}/out2"]
        self.graph.node.append(helper.make_node(kind, inputs, outputs, name, **attributes))
        return outputs[0], outputs[1]

    def largest(self, scores: str) -> str:
        return self.add("ReduceMax", [scores], axes=[2], keepdims=1)

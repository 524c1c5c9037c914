"""Convolutions of one tensor, each with its SiLU, merged into one: a detector's head begins with such at every scale.

TensorRT does so by itself where nothing is quantized, and not where weights are (seen on an H100 with 10.6: see
CHANGELOG). Every kernel that is not launched counts at batch 1. What is merged has one scale, so that `placement` lets
these tensors share theirs: the values stay those of the ONNX file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters.graph.padding import VECTOR


@dataclass(frozen=True)
class Branch:
    """A convolution and its SiLU, which alone reads it."""

    conv: onnx.NodeProto
    gate: onnx.NodeProto
    product: onnx.NodeProto

    @property
    def output(self) -> str:
        return self.product.output[0]


def siblings(graph: onnx.GraphProto) -> list[list[Branch]]:
    """Branches that differ in their weights alone, of whole vectors of channels, so that a cut between them is free."""
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return []  # a branch or a loop may read what is outside
    readers = _readers(graph)
    stored = {i.name: i for i in graph.initializer}
    makers = {o: n for n in graph.node for o in n.output}
    found: dict[tuple[object, ...], list[Branch]] = defaultdict(list)
    for node in graph.node:
        branch = _branch(node, readers) if node.op_type == "Conv" else None
        weight = _stored_weight(node.input[1], stored, makers) if branch else None
        # Of groups each reads channels of its own: behind another's weights they would read others.
        grouped = any(a.name == "group" and a.i != 1 for a in node.attribute)
        if branch is None or weight is None or weight.dims[0] % VECTOR or grouped:
            continue
        options = sorted(a.SerializeToString() for a in node.attribute)
        found[(node.input[0], tuple(weight.dims[1:]), len(node.input), *options)].append(branch)
    return [branches for branches in found.values() if len(branches) > 1]


def merge(model: onnx.ModelProto) -> None:
    """Merges them in a Q/DQ graph, in place, where all are quantized and the next operators' scales are the same."""
    graph = model.graph
    stored = {i.name: i for i in graph.initializer}
    makers = {o: n for n in graph.node for o in n.output}
    readers = _readers(graph)
    made: dict[str, list[onnx.NodeProto]] = {}  # name of what each stands in front of
    dropped: set[str] = set()
    for branches in siblings(graph):
        scales = {_scale_behind(b.output, readers, stored) for b in branches}
        weights = [makers.get(b.conv.input[1]) for b in branches]
        if None in scales or len(scales) > 1 or not all(w and _is_own(w, readers, stored) for w in weights):
            continue
        made[branches[0].conv.output[0]] = _merged(graph, branches, [w for w in weights if w], stored)
        gone = [n for b in branches for n in (b.conv, b.gate, b.product)] + [w for w in weights if w]
        dropped |= {n.output[0] for n in gone}
    order: list[onnx.NodeProto] = []
    for node in graph.node:
        order += made.get(node.output[0], [])
        order += [] if node.output[0] in dropped else [node]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in order]
    del graph.node[:]
    graph.node.extend(copies)
    used = {name for node in graph.node for name in node.input}
    left = [onnx.TensorProto.FromString(i.SerializeToString()) for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)


def _merged(
    graph: onnx.GraphProto,
    branches: Sequence[Branch],
    weights: Sequence[onnx.NodeProto],
    stored: Mapping[str, onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """The nodes of one convolution for all, whose product is cut into the branches' outputs."""
    name = " || ".join(b.conv.name for b in branches)  # as TensorRT calls its own

    def joined(what: Sequence[str], as_: str) -> str:
        values = np.concatenate([np.atleast_1d(numpy_helper.to_array(stored[n])) for n in what])
        graph.initializer.append(numpy_helper.from_array(values, f"{name}/{as_}"))
        return f"{name}/{as_}"

    parts = [joined([w.input[n] for w in weights], as_) for n, as_ in enumerate(("weight/q", "scale", "zero"))]
    inputs = [branches[0].conv.input[0], f"{name}/dq"]
    if len(branches[0].conv.input) > 2:
        inputs.append(joined([b.conv.input[2] for b in branches], "bias"))
    sizes = np.array([stored[w.input[0]].dims[0] for w in weights], np.int64)
    graph.initializer.append(numpy_helper.from_array(sizes, f"{name}/sizes"))
    conv = helper.make_node("Conv", inputs, [f"{name}/made"], name)
    conv.attribute.extend(branches[0].conv.attribute)
    return [
        helper.make_node("DequantizeLinear", parts, [f"{name}/dq"], f"{name}/DQ", axis=0),
        conv,
        helper.make_node("Sigmoid", [f"{name}/made"], [f"{name}/gate"], f"{name}/Sigmoid"),
        helper.make_node("Mul", [f"{name}/made", f"{name}/gate"], [f"{name}/product"], f"{name}/Mul"),
        helper.make_node(
            "Split", [f"{name}/product", f"{name}/sizes"], [b.output for b in branches], f"{name}/Split", axis=1
        ),
    ]


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor -> the nodes that read it; an output of the graph has one more, which is no node of it."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    for output in graph.output:
        readers[output.name].append(onnx.NodeProto(op_type="Output"))
    return readers


def _branch(conv: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> Branch | None:
    both = readers.get(conv.output[0], [])
    gate = next((n for n in both if n.op_type == "Sigmoid"), None)
    product = next((n for n in both if n.op_type == "Mul"), None)
    if len(both) != 2 or gate is None or product is None or [*readers.get(gate.output[0], [])] != [product]:
        return None
    return Branch(conv, gate, product)


def _stored_weight(
    name: str, stored: Mapping[str, onnx.TensorProto], makers: Mapping[str, onnx.NodeProto]
) -> onnx.TensorProto | None:
    """The stored weights, behind their DequantizeLinear where they have one."""
    maker = makers.get(name)
    if maker is not None and maker.op_type == "DequantizeLinear":
        return stored.get(maker.input[0])
    return stored.get(name)


def _is_own(
    weight: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]], stored: Mapping[str, onnx.TensorProto]
) -> bool:
    """Whether a DequantizeLinear holds stored weights of one convolution, scaled by output channel."""
    along_outputs = any(a.name == "axis" and a.i == 0 for a in weight.attribute)
    scaled = all(n in stored for n in weight.input) and len(weight.input) == 3
    return (
        along_outputs
        and scaled
        and len(readers[weight.output[0]]) == 1
        and list(stored[weight.input[1]].dims) == [stored[weight.input[0]].dims[0]]
    )


def _scale_behind(
    name: str, readers: Mapping[str, Sequence[onnx.NodeProto]], stored: Mapping[str, onnx.TensorProto]
) -> float | None:
    """The one scale with which whoever reads a tensor quantizes it; None where somebody does not, or scales differ."""
    found: set[float | None] = set()
    for reader in readers.get(name, []):
        quantizes = reader.op_type == "QuantizeLinear" and reader.input[1] in stored
        found.add(float(numpy_helper.to_array(stored[reader.input[1]])) if quantizes else None)
    return found.pop() if len(found) == 1 else None

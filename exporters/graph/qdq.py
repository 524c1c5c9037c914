"""INT8 and FP8 as explicit Q/DQ, symmetric, where `placement` says: activations and FP8's weights have one scale a
tensor, INT8's weights one a channel."""
# pyright: reportUnknownMemberType=false
# (onnx.load leaves the type of a path open)

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporters import calibration
from exporters.errors import ExportError
from exporters.graph.placement import HEAVY, Placement, measured, place
from exporters.graph.ranges import calibrated
from exporters.session import Array
from exporters.spec import ExportSpec, Precision

LARGEST = {Precision.INT8: 127.0, Precision.FP8: 448.0}  # of E4M3, see "FP8 Formats for Deep Learning" (2022)
TYPES = {Precision.INT8: TensorProto.INT8, Precision.FP8: TensorProto.FLOAT8E4M3FN}


def quantize(parent: Path, folder: Path, spec: ExportSpec) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The Q/DQ graph of an FP32 file, and lines for the record.

    Args:
        parent: the FP32 file.
        folder: for the calibrator's temporary file.
        spec: the request, INT8 or FP8.

    Raises:
        ExportError: nothing can be quantized, or the calibrator failed.
    """
    graph = onnx.load(parent)
    placement = place(graph.graph, kept_of(spec))
    if not placement.heavy:
        raise ExportError(
            f"model '{spec.model.name}' has no convolution or matrix product that could be quantized", "ask for fp16"
        )
    names = [n.name for n in graph.graph.node if n.op_type in HEAVY]
    spec.check_keep(names, "convolution or matrix product")
    ranges = calibrated(parent, folder, spec, measured(graph.graph, [path for path, _ in spec.model.fp32]))
    insert(graph, placement, ranges.largest, spec.precision)
    notes = [f"calibrated on {ranges.images} images ({spec.calibrator})"]
    if ranges.images < calibration.SMALL:
        notes.append(f"warning: fewer than {calibration.SMALL} calibration images; NVIDIA recommends 500")
    if spec.keep:
        notes.append(f"{len(spec.keep)} modules stay in floating point: {', '.join(spec.keep)}")
    return graph, tuple(notes)


def kept_of(spec: ExportSpec) -> list[str]:
    """Module paths that are not quantized: what the model keeps in FP32, and what the request does."""
    return [*(path for path, _ in spec.model.fp32), *spec.keep]


def insert(model: onnx.ModelProto, placement: Placement, ranges: Mapping[str, float], precision: Precision) -> None:
    """Inserts Q/DQ pairs and quantized weights, in place.

    Scales are numbers that FP16 has, too, so that converting the rest of the graph to FP16 changes none of them.
    """
    graph = model.graph
    shared: dict[str, float] = {}
    for tensor, name in placement.group.items():
        shared[name] = max(shared.get(name, 0.0), ranges[tensor])
    zero = _zero("exportgate/zero", (), precision)
    graph.initializer.append(zero)
    nodes = {n.name: n for n in graph.node}
    behind: dict[str, list[onnx.NodeProto]] = {}
    for tensor, readers in placement.points.items():
        largest = shared[placement.group[tensor]] if tensor in placement.group else ranges[tensor]
        scale = _grid(np.array(largest / LARGEST[precision])).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(scale, f"{tensor}/scale"))
        both = [f"{tensor}/scale", zero.name]
        behind[tensor] = [
            helper.make_node("QuantizeLinear", [tensor, *both], [f"{tensor}/q"], f"{tensor}/Q"),
            helper.make_node("DequantizeLinear", [f"{tensor}/q", *both], [f"{tensor}/dq"], f"{tensor}/DQ"),
        ]
        for reader in readers:
            node = nodes[reader]
            node.input[:] = [f"{tensor}/dq" if name == tensor else name for name in node.input]
    order = [node for name in placement.heavy for node in _weights(graph, nodes[name], precision)]
    order += [node for i in graph.input for node in behind.pop(i.name, [])]
    for node in graph.node:
        order.append(node)
        order += [made for output in node.output for made in behind.pop(output, [])]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in order]
    del graph.node[:]
    graph.node.extend(copies)
    used = {name for node in graph.node for name in node.input}
    left = [TensorProto.FromString(i.SerializeToString()) for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)


def _weights(graph: onnx.GraphProto, node: onnx.NodeProto, precision: Precision) -> list[onnx.NodeProto]:
    """Quantizes a node's weights, INT8's per output channel; returns the node that dequantizes them.

    The output channel is axis 0 of a convolution and of a transposed Gemm, the last axis of a product. FP8's weights
    have one scale: scales by channel are for matrix products alone (TensorRT's release notes, 10.6), and numbers with
    an exponent of their own need none.
    """
    stored = {i.name: i for i in graph.initializer}
    slot = next(n for n, name in enumerate(node.input[:2]) if name in stored)
    name = node.input[slot]
    values = numpy_helper.to_array(stored[name]).astype(np.float32)
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    axis = 0 if node.op_type == "Conv" or transposed else values.ndim - 1
    node.input[slot] = f"{name}/dq"
    if f"{name}/q" in stored:  # shared by another node
        return []
    if precision is Precision.INT8:
        others = tuple(a for a in range(values.ndim) if a != axis)
        scale = _grid(np.abs(values).max(others, keepdims=True) / LARGEST[precision])
    else:
        scale = _grid(np.abs(values).max() / LARGEST[precision])
    scaled, scale = values / scale, scale.reshape([-1] if scale.ndim else [])
    if precision is Precision.INT8:
        quantized = numpy_helper.from_array(np.clip(np.rint(scaled), -127, 127).astype(np.int8), f"{name}/q")
    else:
        quantized = helper.make_tensor(f"{name}/q", TYPES[precision], values.shape, scaled.reshape(-1).tolist())
    graph.initializer.append(quantized)
    graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}/scale"))
    graph.initializer.append(_zero(f"{name}/zero", scale.shape, precision))
    along: dict[str, Any] = {"axis": axis} if scale.ndim else {}
    inputs = [f"{name}/q", f"{name}/scale", f"{name}/zero"]
    return [helper.make_node("DequantizeLinear", inputs, [f"{name}/dq"], f"{name}/DQ", **along)]


def _zero(name: str, shape: tuple[int, ...], precision: Precision) -> TensorProto:
    """Zero points, as many as scales."""
    return helper.make_tensor(name, TYPES[precision], shape, [0] * math.prod(shape))


def _grid(scale: Array) -> Array:
    """Scales rounded up to numbers of FP16; a tensor that is zero everywhere gets the smallest normal one."""
    up = scale.astype(np.float16)
    up = np.where(up.astype(np.float64) < scale, np.nextafter(up, np.float16(np.inf)), up)
    return np.where(up > 0, up, np.finfo(np.float16).tiny).astype(np.float64)

"""INT8 and FP8 as explicit Q/DQ: symmetric, activations per tensor, weights per channel, where `placement` says.

The ranges are those that ONNX Runtime's calibrators find on the calibration set.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (onnxruntime.quantization has no types, and onnx.load leaves the type of a path open)

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporters import calibration
from exporters.errors import ExportError, ExportgateError, first_line
from exporters.graph.placement import Placement, place
from exporters.session import Array
from exporters.spec import ExportSpec, Precision

LARGEST = {Precision.INT8: 127.0, Precision.FP8: 448.0}  # of E4M3, see "FP8 Formats for Deep Learning" (2022)
TYPES = {Precision.INT8: TensorProto.INT8, Precision.FP8: TensorProto.FLOAT8E4M3FN}


class _Feeds:
    """ONNX Runtime's CalibrationDataReader over our calibration set."""

    def __init__(self, batches: Iterator[dict[str, Array]]) -> None:
        self.batches = batches
        self.images = 0

    def get_next(self) -> dict[str, Array] | None:
        feeds = next(self.batches, None)
        if feeds is not None:
            self.images += len(next(iter(feeds.values())))
        return feeds

    def __len__(self) -> int:
        return 0


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
    kept = [path for path, _ in spec.model.fp32]
    placement = place(graph.graph, kept)
    if not placement.heavy:
        raise ExportError(
            f"model '{spec.model.name}' has no convolution or matrix product that could be quantized", "ask for fp16"
        )
    # A graph with a fixed batch is calibrated with that batch; a short last batch is left out there.
    varies = spec.dynamic or spec.batch_axis
    size = calibration.calibration_batch(spec.batch) if varies else spec.batch
    batches = calibration.batches(spec, size)
    if not varies:
        batches = (b for b in batches if len(next(iter(b.values()))) == size)
    feeds = _Feeds(batches)
    ranges = _ranges(parent, folder, placement, feeds)
    insert(graph, placement, ranges, spec.precision)
    notes = [f"calibrated on {feeds.images} images (MinMax)"]
    if feeds.images < calibration.SMALL:
        notes.append(f"warning: fewer than {calibration.SMALL} calibration images; NVIDIA recommends 500")
    return graph, tuple(notes)


def _ranges(parent: Path, folder: Path, placement: Placement, feeds: _Feeds) -> dict[str, float]:
    """The largest magnitude of each tensor that is measured, on the calibration set."""
    import onnxruntime as ort
    from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater

    class Calibrater(MinMaxCalibrater):
        """Measures the tensors of the placement instead of every one."""

        def select_tensors_to_calibrate(self, model: onnx.ModelProto) -> tuple[set[str], dict[str, Any]]:
            _, known = super().select_tensors_to_calibrate(model)
            return set(placement.measured), cast("dict[str, Any]", known)

        def create_inference_session(self) -> None:
            options = ort.SessionOptions()
            options.graph_optimization_level = (
                ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            )  # as its own: all tensors stay
            # Exports may run at once, each with a thread a core: threads that spin while they wait starve the others
            # (seen: three calibrations on 32 cores took minutes instead of seconds).
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self.infer_session = ort.InferenceSession(
                self.augmented_model_path, options, providers=self.execution_providers
            )

    CalibrationDataReader.register(_Feeds)
    augmented = folder / "augmented.onnx"
    try:
        calibrater = Calibrater(str(parent), augmented_model_path=str(augmented))
        calibrater.augment_graph()
        calibrater.create_inference_session()
        calibrater.collect_data(cast("CalibrationDataReader", feeds))
        found: Any = calibrater.compute_data()
    except ExportgateError:
        raise  # of the calibration set, which is read meanwhile
    except Exception as error:
        # ONNX Runtime raises what it likes while it calibrates.
        what = f"the calibrator failed: {type(error).__name__}: {first_line(error)}"
        raise ExportError(what, "check the calibration set") from error
    finally:
        augmented.unlink(missing_ok=True)
    return {name: float(np.max(np.abs(np.asarray(data.range_value)))) for name, data in found.items()}


def insert(model: onnx.ModelProto, placement: Placement, ranges: Mapping[str, float], precision: Precision) -> None:
    """Inserts Q/DQ pairs and quantized weights, in place.

    Scales are numbers that FP16 has, too, so that converting the rest of the graph to FP16 changes none of them.
    """
    graph = model.graph
    shared: dict[str, float] = {}
    for tensor, name in placement.group.items():
        shared[name] = max(shared.get(name, 0.0), ranges[tensor])
    zero = _zero("exportgate/zero", 1, precision)
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
    """Quantizes a node's weights per output channel; returns the node that dequantizes them.

    The output channel is axis 0 of a convolution and of a transposed Gemm, the last axis of a product.
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
    others = tuple(a for a in range(values.ndim) if a != axis)
    scale = _grid(np.abs(values).max(others) / LARGEST[precision])
    shape = [-1 if a == axis else 1 for a in range(values.ndim)]
    scaled = values / scale.reshape(shape)
    if precision is Precision.INT8:
        quantized = numpy_helper.from_array(np.clip(np.rint(scaled), -127, 127).astype(np.int8), f"{name}/q")
    else:
        quantized = helper.make_tensor(f"{name}/q", TYPES[precision], values.shape, scaled.reshape(-1).tolist())
    graph.initializer.append(quantized)
    graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}/scale"))
    graph.initializer.append(_zero(f"{name}/zero", len(scale), precision))
    return [
        helper.make_node(
            "DequantizeLinear", [f"{name}/q", f"{name}/scale", f"{name}/zero"], [f"{name}/dq"], f"{name}/DQ", axis=axis
        )
    ]


def _zero(name: str, count: int, precision: Precision) -> TensorProto:
    """Zero points: a scalar, or one a channel."""
    return helper.make_tensor(name, TYPES[precision], [] if count == 1 else [count], [0] * count)


def _grid(scale: Array) -> Array:
    """Scales rounded up to numbers of FP16; a tensor that is zero everywhere gets the smallest normal one."""
    up = scale.astype(np.float16)
    up = np.where(up.astype(np.float64) < scale, np.nextafter(up, np.float16(np.inf)), up)
    return np.where(up > 0, up, np.finfo(np.float16).tiny).astype(np.float64)

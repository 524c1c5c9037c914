"""What 8 bits do to a graph: how much each module suffers from them, and what pictures reach of the ranges."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (onnxruntime and onnx leave types open)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from exporters import calibration
from exporters.errors import ExportError
from exporters.graph.placement import HEAVY, measured, place
from exporters.graph.qdq import insert, kept_of
from exporters.graph.ranges import calibrated, reached
from exporters.models.spec import ModelSpec, module_path
from exporters.session import Array
from exporters.spec import ExportSpec

IMAGES = 8  # of the calibration set, whose outputs are compared
MEANS = 64  # calibration images whose channels' means are told
STRONGEST = 100  # anchors of an image that count, by the score that the FP32 graph gives them


def sensitivity(parent: Path, folder: Path, spec: ExportSpec) -> dict[str, dict[str, float]]:
    """Noise by module path: the noise of the outputs in shares of their variance, the mean over channel groups.

    Args:
        parent: the FP32 ONNX file.
        folder: for temporary files.
        spec: the request, INT8 or FP8, whose calibration set and calibrator are used.

    Returns:
        "alone": where this module alone is quantized; "joint": by how much the noise of the graph in which all are
        falls when this one is not.

    Raises:
        ExportError: nothing can be quantized.
    """
    graph = onnx.load(parent)
    fp32 = [path for path, _ in spec.model.fp32]
    everything = place(graph.graph, fp32)
    modules = modules_of(graph.graph, everything.heavy)
    if not modules:
        raise ExportError(f"model '{spec.model.name}' has nothing that could be quantized", "ask for fp16")
    ranges = calibrated(parent, folder, spec, measured(graph.graph, fp32)).largest
    feeds = [dict(f) for f in islice(calibration.batches(spec, spec.batch), -(-IMAGES // spec.batch))]
    feeds = [f for f in feeds if len(next(iter(f.values()))) == spec.batch] or feeds
    wanted = [_run(graph, f) for f in feeds]

    def noise(kept: Sequence[str]) -> float:
        made = onnx.ModelProto.FromString(graph.SerializeToString())
        placement = place(made.graph, [*fp32, *kept])
        insert(made, placement, ranges, spec.precision)
        got = [_run(made, f) for f in feeds]
        return float(np.mean([_noise(w, g, spec.model) for w, g in zip(wanted, got, strict=True)]))

    whole = noise([])
    return {
        "alone": {m: noise([o for o in modules if o != m]) for m in modules},
        "joint": {m: whole - noise([m]) for m in modules} if len(modules) > 1 else {},
    }


def reach(parent: Path, folder: Path, spec: ExportSpec, feeds: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """What feeds reach of the calibrated ranges; see `exporters.pool.Pool.reached`."""
    graph = onnx.load(parent).graph
    tensors = place(graph, kept_of(spec)).measured
    known = calibrated(parent, folder, spec, measured(graph, [path for path, _ in spec.model.fp32]))
    name = spec.model.inputs[0].name
    means = [f[name].mean((0, 2, 3)).tolist() for f in islice(calibration.samples(spec), MEANS) if f[name].ndim == 4]
    return {
        "calibrated": {t: known.largest[t] for t in tensors},
        "images": known.images,
        "means": means,
        "reached": reached(parent, tensors, feeds),
    }


def modules_of(graph: onnx.GraphProto, heavy: Sequence[str]) -> list[str]:
    """Paths of the modules that quantized operators belong to, in the order of the graph."""
    found: dict[str, None] = {}
    for node in graph.node:
        if node.op_type in HEAVY and node.name in heavy:
            found[module_path(node.name.rpartition("/")[0])] = None
    return [path for path in found if path]


def _run(graph: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session: Any = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _noise(expected: Mapping[str, Array], observed: Mapping[str, Array], model: ModelSpec) -> float:
    """Mean square error over the variance of the expected, of each channel group, and the mean of these."""
    shares: list[float] = []
    for output in model.outputs:
        want, got = (np.asarray(side[output.name], np.float64) for side in (expected, observed))
        scores = next((g.channels for g in output.groups if g.kind == "score"), None)
        if scores is not None:  # of anchors those that can become a detection
            best = want[:, scores].max(1)
            chosen = np.argsort(-best, 1)[:, :STRONGEST][:, None]
            want, got = (np.take_along_axis(side, chosen, 2) for side in (want, got))
        for group in output.groups:
            a, b = want[:, group.channels], got[:, group.channels]
            shares.append(float(((a - b) ** 2).mean() / max(a.var(), 1e-12)))
    return float(np.mean(shares))

"""ONNX: FP32 from the module; FP16 and INT8 (Q/DQ) made from the FP32 file. Run by ONNX Runtime."""
# pyright: reportUnknownMemberType=false
# (torch.onnx.export, onnx.load and onnx.save leave the type of a path open)

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.artifact import Achieved, Artifact
from exporters.errors import BadRequest, ExportError, first_line
from exporters.formats import TENSOR_CORE_TERMS, Format, Job, Made, Runtime, Step, no_nms
from exporters.session import Session
from exporters.spec import NMS, ExportSpec, Precision

if TYPE_CHECKING:
    import onnx


TRACING = ("onnx", "exporters.lean_torch")


def parents(spec: ExportSpec) -> tuple[ExportSpec, ...]:
    """FP16 and INT8 are conversions of the FP32 graph; the calibration set belongs to the conversion alone."""
    if spec.nms:  # a graph of its own, so that what comes before it is judged by itself
        return (plain(spec),)
    if spec.precision is Precision.FP32:
        return ()
    return (spec.but(precision=Precision.FP32, data="", split="val", fraction=1.0, calibrator="max", keep=()),)


def plain(spec: ExportSpec) -> ExportSpec:
    """The request without suppression in the graph."""
    return spec.but(nms=False, conf=0.25, iou=0.7, max_det=300, agnostic_nms=False)


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """FP32 is traced where torch is, whose exporter imports onnx too; a conversion needs no torch at all.

    OnnxSlim, where it is needed, has a process of its own, which imports it (and sympy) while the other imports torch.
    """
    if spec.nms:
        return (Step("convert", with_nms, ("onnx",)),)
    if spec.precision is not Precision.FP32:
        return (Step("convert", convert, ("onnx", "onnxruntime")),)
    if spec.simplify and not is_plain(spec):
        return (Step("trace", trace, TRACING), Step("convert", finish, ("onnx", "onnxslim")))
    return (Step("trace", trace_and_finish, TRACING),)


def is_plain(spec: ExportSpec) -> bool:
    """Whether the traced graph needs its constants folded and nothing else: our YOLOv8 of fixed shape computes none."""
    return spec.model.factory.startswith("exporters.models.yolov8:") and not (spec.dynamic or spec.batch_axis)


def trace_and_finish(job: Job) -> Made:
    """Both in one process."""
    trace(job)
    return finish(job)


def trace(job: Job) -> Made:
    """Writes the graph of the module as PyTorch's exporter makes it."""
    import torch

    from exporters.models.build import build, example, for_export, one_thread

    spec, model = job.spec, job.spec.model
    axes: dict[str, dict[int, str]] | None = None
    if spec.dynamic or spec.batch_axis:
        varies = None if spec.dynamic else ("batch",)
        axes = {i.name: {n: d for n, d in enumerate(i.shape) if isinstance(d, str)} for i in model.inputs}
        axes |= {o.name: dict(o.axes) for o in model.outputs}
        axes = {k: {n: d for n, d in v.items() if varies is None or d in varies} for k, v in axes.items()}
    inputs = example(spec)
    if is_plain(spec):  # the layout that oneDNN convolves fastest; no node of the graph says it
        inputs = tuple(i.contiguous(memory_format=torch.channels_last) for i in inputs)
    target = job.folder / f"{job.stem}.onnx"
    with one_thread(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation of this exporter, and tracer warnings about shapes that we mean
        # The TorchScript-based exporter: it works at all opsets of the contract, where the newer one starts at 18.
        torch.onnx.export(
            for_export(build(model), spec.dynamic),
            inputs,
            str(target),
            input_names=[i.name for i in model.inputs],
            output_names=[o.name for o in model.outputs],
            opset_version=spec.opset,
            dynamic_axes=axes,
            dynamo=False,
            do_constant_folding=True,
        )
    return Made(target.name)


def finish(job: Job) -> Made:
    """Simplifies the traced graph and writes the metadata."""
    import onnx

    target = job.folder / f"{job.stem}.onnx"
    graph = onnx.load(target)
    notes: tuple[str, ...] = ()
    if job.spec.simplify:
        from exporters.graph.simplify import fold_constants, simplify

        before = len(graph.graph.node)
        graph = (
            fold_constants(graph) if is_plain(job.spec) else simplify(graph, job.spec.dynamic or job.spec.batch_axis)
        )
        notes = (f"simplified from {before} to {len(graph.graph.node)} nodes",)
    return _save(graph, target, job, notes)


def convert(job: Job) -> Made:
    """Makes FP16 or INT8 of the FP32 file."""
    import onnx

    graph = onnx.load(job.parents[0].path)
    notes: tuple[str, ...] = ()
    if job.spec.precision is Precision.FP16:
        from exporters.graph.fp16 import to_fp16

        graph = to_fp16(graph, [path for path, _ in job.spec.model.fp32])
    else:
        from exporters.graph.qdq import quantize

        graph, notes = quantize(job.parents[0].path, job.folder, job.spec)
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the converted graph is not valid ({first_line(error)})", "report the graph") from error
    return _save(graph, job.folder / f"{job.stem}.onnx", job, notes)


def with_nms(job: Job) -> Made:
    """Puts suppression behind the graph of the same precision."""
    import onnx

    from exporters.graph.nms import suppress

    graph = onnx.load(job.parents[0].path)
    suppress(graph, job.spec)
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the graph with NMS is not valid ({first_line(error)})", "report the graph") from error
    return _save(graph, job.folder / f"{job.stem}.onnx", job, ())


def _save(graph: onnx.ModelProto, target: Path, job: Job, notes: tuple[str, ...]) -> Made:
    import onnx

    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, job.metadata.as_strings())
    graph.producer_name, graph.producer_version = "exportgate", job.metadata.version
    onnx.save(graph, target)
    return Made(target.name, notes)


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the file in ONNX Runtime with the runtime's execution provider and no other."""
    from exporters.runtimes.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(artifact.path, spec, runtime, device)


def inspect(path: Path) -> Achieved:
    """See exporters.graph.precision."""
    from exporters.graph.precision import read_precision

    return read_precision(path)


def refusal(spec: ExportSpec) -> str:
    """INT8 needs a calibration set: that is a bad request, not a limit of the format."""
    if spec.precision is Precision.INT8 and not spec.data:
        raise BadRequest(
            "INT8 needs images to calibrate on and none are given (data '')",
            "add --data: a data set YAML, a folder of images, or module:factory",
        )
    return no_nms(spec)


FORMAT = Format(
    id="onnx",
    title="ONNX",
    suffix=".onnx",
    precisions=(Precision.FP32, Precision.FP16, Precision.INT8),
    options=frozenset(
        {"batch", "dynamic", "device", "simplify", "opset", "data", "split", "fraction", "calibrator", "keep", *NMS}
    ),
    toolchain="onnx",
    runtimes=(
        Runtime(
            "ort",
            "cpu",
            (Precision.FP32,),
            "ONNX Runtime's CPU provider casts FP16 convolutions to FP32, and joins Q/DQ to integer convolutions only "
            "where the output is quantized too, which TensorRT's placement (Conv, SiLU unquantized between them) does "
            "not do",
            imports=("onnxruntime",),
        ),
        Runtime(
            "ort",
            "cuda",
            (Precision.FP32, Precision.FP16),
            "ONNX Runtime's CUDA provider has no INT8 convolutions: it runs Q/DQ in floating point",
            imports=("torch", "onnxruntime"),
        ),
        Runtime(
            "ort-trt",
            "cuda",
            (),
            "ONNX Runtime tells which provider runs a subgraph, not in which precision TensorRT runs it",
            imports=("torch", "onnxruntime"),
            builds=True,
            fp16_terms=TENSOR_CORE_TERMS,
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=parents,
    refusal=refusal,
)

"""Core ML: an ML Program in a .mlpackage, made from the TorchScript trace. Run by macOS and iOS."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from exporters.artifact import Achieved, Artifact, TensorInfo
from exporters.formats import Format, Job, Made, Runtime, Step, fp32_trace, no_nms
from exporters.metadata import Metadata
from exporters.models.spec import classifier_output, detector_output
from exporters.session import Session
from exporters.spec import ExportSpec, Precision
from exporters.weights import Weight

MODULE = "exporters.coreml.convert"
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # what Core ML takes as a tensor's name
TASKS = ("box", "score")  # what anchors have that Core ML's suppression passes on
BECAUSE = "Core ML is part of macOS and iOS: here its files are made and read back, and it does not run"
COMPUTED = "computed by exportgate with PyTorch: Core ML itself runs on macOS"
UNTOLD = "Core ML does not tell in which precision it computes"
RUNTIME = Runtime(
    "coreml",
    "cpu",
    (),
    UNTOLD if sys.platform == "darwin" else BECAUSE,
    imports=("exporters.runtimes.coreml",),
    runs=sys.platform == "darwin",
    runs_elsewhere=True,
)
# Beside Core ML, so that a run on macOS can stand in for what is SKIPPED here, and what is computed here stands.
EVALUATOR = Runtime(
    "evaluator",
    "cpu",
    (),
    COMPUTED,
    imports=("exporters.runtimes.evaluator",),
    untimed=COMPUTED,
)


def export(job: Job) -> Made:
    """Converts the trace, compresses its weights for INT8, and puts the suppression behind it where it is asked for.

    Raises:
        BadRequest, ExportError: see exporters.coreml.convert.
    """
    from exporters.coreml import convert

    spec, notes = job.spec, list[str]()
    model = convert.convert(job, convert.PROGRAM)
    if spec.precision is Precision.INT8:
        model = convert.in_eight_bits(model, spec)
        how = "indices of tables of 256 values (k-means)" if spec.palettize else "linear, symmetric, a scale a channel"
        notes += [f"weights in 8 bits: {how}; arithmetic in FP16"]
        notes += [f"left in floating point: {', '.join(spec.keep)}"] if spec.keep else []
    if spec.nms:
        from exporters.coreml.pipeline import with_suppression

        model = with_suppression(model, spec)
        notes += ["Core ML's suppression has no limit of detections: max_det is for who reads them"]
    convert.describe(model, job)
    name = f"{job.stem}.mlpackage"
    convert.save(model, job.folder / name)
    return Made(name, tuple(notes))


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Loads it in Core ML, or to be computed with PyTorch."""
    if runtime.id == EVALUATOR.id:
        from exporters.runtimes.evaluator import EvaluatorSession

        return EvaluatorSession(artifact.path, spec, brought=not artifact.has_manifest)
    from exporters.runtimes.coreml import CoreMlSession

    return CoreMlSession(artifact.path, spec)


def inspect(path: Path) -> Achieved:
    """See exporters.coreml.weights."""
    from exporters.coreml.weights import read_precision

    return read_precision(path, "coreml")


def metadata(path: Path) -> Metadata:
    """See exporters.coreml.read."""
    from exporters.coreml.read import metadata

    return metadata(path)


def signature(path: Path, spec: ExportSpec) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """See exporters.coreml.read."""
    from exporters.coreml.read import signature

    return signature(path, spec)


def weights(path: Path) -> dict[str, Weight]:
    """See exporters.coreml.weights."""
    from exporters.coreml.weights import read_weights

    return read_weights(path)


def refusal(spec: ExportSpec) -> str:
    """One picture of one size; what Core ML cannot name; and options that go together."""
    model = spec.model
    if spec.batch != 1:
        return f"batch {spec.batch}: Core ML takes one picture at a time"
    if spec.dynamic:
        return "dynamic: a Core ML file is made for pictures of one size here"
    names = [*(i.name for i in model.inputs), *(o.name for o in model.outputs)]
    wrong = next((n for n in names if not IDENTIFIER.fullmatch(n)), None)
    if wrong is not None:
        return f"tensor '{wrong}': names in Core ML are letters, digits and underscores"
    labels = list(model.names.values())
    twice = next((n for n in labels if labels.count(n) > 1), None) if classifier_output(model) is not None else None
    if twice is not None:
        return f"two classes are named '{twice}', and Core ML gives a classifier's probabilities by name"
    return _no_suppression(spec)


def _no_suppression(spec: ExportSpec) -> str:
    """Why Core ML's suppression cannot follow this model, or ""."""
    output = detector_output(spec.model)
    if not spec.nms or output is None:
        return no_nms(spec)
    more = next((g for g in output.groups if g.kind not in TASKS), None)
    if more is not None or len(spec.model.outputs) > 1:
        what = more.name if more is not None else spec.model.outputs[1].name
        return f"nms: Core ML's suppression passes on boxes and scores alone, and this model has {what}, too"
    return ""


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One."""
    return (Step("convert", export, (MODULE,)),)


FORMAT = Format(
    id="coreml",
    aliases=("mlpackage", "mlprogram", "apple", "ios"),
    title="Core ML",
    suffix=".mlpackage",
    precisions=(Precision.FP32, Precision.FP16, Precision.INT8),
    options=frozenset({"batch", "dynamic", "device", "nms", "conf", "iou", "agnostic_nms", "keep", "palettize"}),
    toolchain="coreml",
    runtimes=(RUNTIME, EVALUATOR),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=fp32_trace,
    refusal=refusal,
    metadata=metadata,
    signature=signature,
    weights=weights,
)

"""Core ML's NeuralNetwork of systems before iOS 15 and macOS 12, in a .mlmodel file."""

from __future__ import annotations

from pathlib import Path

from exporters.artifact import Achieved
from exporters.formats import Format, Job, Made, Step, coreml, fp32_trace
from exporters.spec import ExportSpec, Precision


def export(job: Job) -> Made:
    """Converts the trace; FP16 and INT8 are what its weights are stored in.

    Raises:
        BadRequest, ExportError: see exporters.coreml.convert.
    """
    from exporters.coreml import convert

    model = convert.convert(job, convert.NETWORK)
    notes: tuple[str, ...] = ()
    if job.spec.precision is not Precision.FP32:
        model = convert.compressed(model, job.spec)
        notes = ("the system chooses the arithmetic of a NeuralNetwork: its file says what weights are stored in",)
    convert.describe(model, job)
    name = f"{job.stem}.mlmodel"
    convert.save(model, job.folder / name)
    return Made(name, notes)


def inspect(path: Path) -> Achieved:
    """See exporters.coreml.weights."""
    from exporters.coreml.weights import read_precision

    return read_precision(path, "mlmodel")


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One."""
    return (Step("convert", export, (coreml.MODULE,)),)


FORMAT = Format(
    id="mlmodel",
    aliases=("neuralnetwork",),
    title="Core ML NeuralNetwork",
    suffix=".mlmodel",
    precisions=(Precision.FP32, Precision.FP16, Precision.INT8),
    options=frozenset({"batch", "dynamic", "device", "keep"}),
    toolchain="coreml",
    runtimes=(coreml.RUNTIME, coreml.EVALUATOR),
    steps=steps,
    load=coreml.load,
    inspect=inspect,
    parents=fp32_trace,
    refusal=coreml.refusal,
    metadata=coreml.metadata,
    signature=coreml.signature,
    weights=coreml.weights,
)

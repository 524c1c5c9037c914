"""Core ML's NeuralNetwork of systems before iOS 15 and macOS 12, in a .mlmodel file."""

from __future__ import annotations

from exporters.errors import ExportError, first_line
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
        try:
            model = convert.compressed(model, job.spec)
        except convert.FAILURES as error:
            raise ExportError(f"coremltools failed ({first_line(error)})", "ask for fp32") from error
        notes = ("the system chooses the arithmetic of a NeuralNetwork: its file says what weights are stored in",)
    convert.describe(model, job)
    name = f"{job.stem}.mlmodel"
    convert.save(model, job.folder / name)
    return Made(name, notes)


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
    inspect=coreml.inspect,
    parents=fp32_trace,
    refusal=coreml.refusal,
    metadata=coreml.metadata,
    signature=coreml.signature,
    weights=coreml.weights,
)

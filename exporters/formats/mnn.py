"""MNN: FP32, FP16 and INT8 weights, converted from the ONNX file. Run by MNN on a CPU, in FP32."""

from __future__ import annotations

from pathlib import Path

from exporters.artifact import Achieved, Artifact
from exporters.errors import NotSupported
from exporters.formats import Format, Job, Made, Runtime, Step, fp32_onnx
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

MODULE = "exporters.runtimes.mnn"
# 8 bits, a scale and a zero point for 16 input channels (the smallest block that MNN takes; a channel's, where there
# are fewer), and those refined by half-quadratic quantization. Beside 32 and whole channels, with and without it, that
# moved boxes and scores least, for 8 % more bytes. (--weightQuantAsymmetric would make it symmetric: asymmetric is the
# default, and the word for it switches it off.)
INT8 = ("--weightQuantBits", "8", "--weightQuantBlock", "16", "--hqq")


def export(job: Job) -> Made:
    """Converts the ONNX file, with the metadata as bizCode.

    Raises:
        ExportError: the converter failed.
        NotSupported: FP16 cannot hold a weight or a constant.
    """
    from exporters.runtimes import mnn_file
    from exporters.runtimes.mnn import convert

    spec, source, target = job.spec, job.parents[0].path, job.folder / f"{job.stem}.mnn"
    notes: tuple[str, ...] = ()
    described = ("--bizCode", job.metadata.as_json())
    if spec.precision is Precision.INT8:
        convert(source, target, "ONNX", *described, *INT8)
        notes = ("weights in 8 bits by blocks of 16 input channels; no calibration set is needed",)
    else:
        convert(source, target, "ONNX", *described)
    if spec.precision is Precision.FP16:
        model = mnn_file.read(target)
        lost = mnn_file.round_to_half(model)
        if lost:
            raise NotSupported(f"FP16 ends at 65504, and {lost}")
        rounded = job.folder / "rounded.mnn"
        rounded.write_bytes(model.data)
        target.unlink()
        convert(rounded, target, "MNN", "--fp16", "--optimizeLevel", "0", *described)
        rounded.unlink()
    if spec.dynamic:
        model = mnn_file.read(target)
        axes = {i.name: tuple(n for n, d in enumerate(i.shape) if isinstance(d, str)) for i in spec.model.inputs}
        mnn_file.let_vary(model, axes)
        target.write_bytes(model.data)
    return Made(target.name, notes)


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the file in MNN's interpreter."""
    from exporters.runtimes.mnn import MnnSession

    return MnnSession(artifact.path, spec)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.mnn."""
    from exporters.runtimes.mnn import read_precision

    return read_precision(path)


def refusal(spec: ExportSpec) -> str:
    """MNN's tensors have no integers of 64 bits: its converter makes 32 of them without a word."""
    wide = next((i.name for i in spec.model.inputs if i.dtype in ("int64", "float64")), "")
    return f"MNN has no 64-bit tensors, and input '{wide}' of model '{spec.model.name}' is one" if wide else ""


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step, in a process with MNN."""
    return (Step("convert", export, (MODULE,)),)


FORMAT = Format(
    id="mnn",
    title="MNN",
    suffix=".mnn",
    precisions=(Precision.FP32, Precision.FP16, Precision.INT8),
    options=frozenset({"batch", "dynamic", "device"}),
    toolchain="mnn",
    runtimes=(
        Runtime(
            "mnn",
            "cpu",
            (Precision.FP32,),
            "MNN's CPU backend makes FP32 of weights of 16 and 8 bits when it opens a file, and computes in FP32",
            imports=(MODULE,),
            untold="MNN does not tell; convolutions over one point show it, and this model has none",
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=fp32_onnx,
    refusal=refusal,
)

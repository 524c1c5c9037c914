"""TensorFlow Lite: the traced program converted by litert-torch, quantized by AI Edge Quantizer. Run by LiteRT."""
# pyright: reportUnknownMemberType=false
# (torch leaves types open)

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporters import calibration
from exporters.artifact import Achieved, Artifact
from exporters.errors import BadRequest
from exporters.formats import Format, Job, Made, Runtime, Step, heads, needs_data
from exporters.formats.saved_model import FOLDER
from exporters.layout import FIRST, LAST, Layout
from exporters.metadata import Metadata
from exporters.models.traced import SAMPLES, TRACED
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

MODULE = "exporters.runtimes.litert"
SUFFIX = ".tflite"
# What users call each form: INT8 by what of it is in 8 bits.
NAMES = {"dynamic": "int8", "integer": "integer_quant", "full_integer": "full_integer_quant"}


def form_of(spec: ExportSpec) -> str:
    """The end of the file's name."""
    return {Precision.FP32: "float32", Precision.FP16: "float16"}.get(spec.precision, NAMES[spec.quantization])


def trace(job: Job) -> Made:
    """Writes the module as torch.export sees it, and the calibration set: both may be the user's code.

    Raises:
        ExportError: torch.export cannot export the model.
    """
    import torch

    from exporters.models.build import build, example, for_export, one_thread
    from exporters.models.traced import exported

    with one_thread(), torch.no_grad():
        program = exported(for_export(build(job.spec.model), dynamic=False), example(job.spec), job.spec.model)
        torch.export.save(program, job.folder / TRACED)
    if job.spec.data:
        calibration.keep_batches(job.spec, job.folder / SAMPLES)
    return Made(TRACED)


def lower(job: Job) -> Made:
    """Converts the program, quantizes it, and appends the metadata.

    Raises:
        BadRequest: `keep` names no module.
        ExportError, NotSupported: see exporters.litert.convert.
    """
    import torch

    from exporters.litert import convert, program, ranges
    from exporters.models.build import example, one_thread
    from exporters.models.traced import path_of
    from exporters.runtimes.tflite_file import with_metadata

    spec, notes = job.spec, list[str]()
    with one_thread(), torch.no_grad():
        module = program.module_of(torch.export.load(job.folder / TRACED))
        feeds = calibration.kept_batches(spec, job.folder / SAMPLES) if spec.data else []
        spec.check_keep({path_of(n) for n in module.graph.nodes if n.op == "call_function"}, "operator")
        largest = program.largest_coefficients(module, spec, feeds)
        divisors = program.finished(module, spec, largest)
        inputs, layout = example(spec), Layout(form_of(spec) == NAMES["full_integer"], divisors)
        if layout.last:
            program.channels_last(module)
            inputs = tuple(torch.from_numpy(layout.feed(i.numpy())) for i in inputs)
        data = convert.converted(module, inputs, spec)
    if spec.precision is Precision.FP16:
        data = convert.in_sixteen_bits(data)
    if spec.precision is Precision.INT8:
        kept = [*left_out(spec), *spec.keep]
        found = ranges.of(data, spec, feeds, layout) if feeds else None
        data = convert.in_eight_bits(data, kept, found, io=spec.quantization == "full_integer")
        notes = _notes(spec, feeds, kept)
    del feeds
    shutil.rmtree(job.folder / SAMPLES, ignore_errors=True)
    (job.folder / TRACED).unlink()
    folder = job.folder / f"{job.stem}{FOLDER}"
    folder.mkdir()
    path = folder / f"{job.stem}_{form_of(spec)}{SUFFIX}"
    path.write_bytes(with_metadata(data, described(job.metadata, layout)))
    return Made(f"{folder.name}/{path.name}", tuple(notes))


def described(metadata: Metadata, layout: Layout) -> Metadata:
    """The metadata of a file that says how its tensors differ from the model's."""
    divisors = {name: tuple(values) for name, values in layout.divisors.items()}
    return replace(metadata, layout=LAST if layout.last else FIRST, divisors=divisors)


def _notes(spec: ExportSpec, feeds: list[Any], kept: list[str]) -> list[str]:
    if spec.quantization == "dynamic":
        told = ["weights in 8 bits, activations quantized as they come; no calibration set is needed"]
        return told + ([f"left in floating point: {', '.join(kept)}"] if kept else [])
    return calibration.notes(feeds, "AI Edge Quantizer, smallest and largest values that matter", kept)


def left_out(spec: ExportSpec) -> tuple[str, ...]:
    """What INT8 leaves in floating point beside what the request keeps: nothing of a file that is all in 8 bits."""
    if spec.precision is not Precision.INT8 or spec.quantization == "full_integer":
        return ()
    own = tuple(path for path, _ in spec.model.fp32)
    return (*heads(spec), *own) if spec.quantization == "integer" else own


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the file in LiteRT's interpreter."""
    from exporters.runtimes.litert import LiteRtSession

    return LiteRtSession(artifact.path, spec)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.tflite_file."""
    from exporters.runtimes.tflite_file import read_precision

    return read_precision(path)


def contradiction(path: Path, spec: ExportSpec) -> str:
    """In 8 bits: another form than the one that is asked for."""
    from exporters.runtimes.tflite_file import quantization, read

    form = quantization(read(path)) if spec.precision is Precision.INT8 else ""
    wrong = form not in ("", spec.quantization)
    return f"the file's quantization is {form}, expected {spec.quantization}" if wrong else ""


def refusal(spec: ExportSpec) -> str:
    """Data where it is used, and only there; nothing is left out of a file that is all in 8 bits; no 64-bit inputs."""
    if spec.precision is Precision.INT8 and spec.quantization == "dynamic" and spec.data:
        raise BadRequest(
            f"data '{spec.data}' with quantization dynamic: activations are quantized as they come",
            "leave data out, or ask for --quantization integer or full_integer",
        )
    if spec.keep and spec.quantization == "full_integer":
        raise BadRequest(
            f"keep '{spec.keep[0]}' with quantization full_integer: all of it is in 8 bits",
            "leave keep out, or ask for --quantization integer",
        )
    wide = next((i.name for i in spec.model.inputs if i.dtype in ("int64", "float64")), "")
    if wide:
        return f"LiteRT's files are made without 64-bit inputs, and '{wide}' of model '{spec.model.name}' is one"
    return "" if spec.quantization == "dynamic" else needs_data(spec)


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """What runs the user's code has exportgate's own environment."""
    return (Step("trace", trace, ("torch",), toolchain="pytorch"), Step("lower", lower, (MODULE, "litert_torch")))


FORMAT = Format(
    id="tflite",
    title="TensorFlow Lite",
    suffix=SUFFIX,
    precisions=(Precision.FP32, Precision.FP16, Precision.INT8),
    options=frozenset({"batch", "device", "data", "split", "fraction", "keep", "quantization"}),
    toolchain="litert",
    runtimes=(
        Runtime(
            "litert",
            "cpu",
            (Precision.FP32, Precision.INT8),
            "LiteRT makes FP32 of weights of 16 bits when it opens a file, and computes in FP32 on a CPU",
            imports=(MODULE,),
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    refusal=refusal,
    contradiction=contradiction,
    keeps=left_out,
    says_layout=True,
)

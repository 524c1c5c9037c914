"""OpenVINO: FP32 and FP16 converted from the ONNX file, INT8 by NNCF. Run by OpenVINO on a CPU."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any, cast

from exporters import calibration
from exporters.artifact import Achieved, Artifact
from exporters.errors import ExportError, first_line
from exporters.formats import Format, Job, Made, Runtime, Step, fp32_onnx, heads, needs_data
from exporters.metadata import SIDE_CAR
from exporters.models.spec import belongs
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

MODULE = "exporters.runtimes.openvino"
FOLDER = "_openvino_model"
SAMPLES = "samples"  # of the calibration set, until they are used
# Quantized, they ran in FP32 all the same (seen), and they have a number for a name, by which no module keeps them.
TRANSPOSED = ["ConvolutionBackpropData", "GroupConvolutionBackpropData"]


def calibrate(job: Job) -> Made:
    """Writes the calibration set as arrays."""
    calibration.keep_batches(job.spec, job.folder / SAMPLES)
    return Made(SAMPLES)


def export(job: Job) -> Made:
    """Converts the ONNX file. FP16 stores weights in 16 bits; INT8 is quantized first.

    Raises:
        ExportError: OpenVINO or NNCF failed.
    """
    from exporters.runtimes.openvino import describe, library, read

    spec, notes = job.spec, list[str]()
    model = read(job.parents[0].path)
    if spec.precision is Precision.INT8:
        model, notes = _quantize(model, job)
    describe(model, job.metadata)
    folder = job.folder / f"{job.stem}{'_int8' if spec.precision is Precision.INT8 else ''}{FOLDER}"
    folder.mkdir()
    to_fp16 = spec.precision is Precision.FP16
    library.save_model(model, str(folder / f"{job.stem}.xml"), compress_to_fp16=to_fp16)
    (folder / SIDE_CAR).write_text(job.metadata.as_yaml(), encoding="utf-8")
    return Made(folder.name, tuple(notes))


def _quantize(model: Any, job: Job) -> tuple[Any, list[str]]:
    """The model in 8 bits but for the head and what the request keeps, by NNCF's post-training quantization."""
    nncf, spec = cast("Any", importlib.import_module("nncf")), job.spec
    feeds = calibration.kept_batches(spec, job.folder / SAMPLES)
    names = [op.get_friendly_name() for op in model.get_ordered_ops()]
    spec.check_keep(names, "operator")
    kept = [*heads(spec), *(path for path, _ in spec.model.fp32), *spec.keep]
    ignored = nncf.IgnoredScope(names=[n for n in names if belongs(n, kept)], types=TRANSPOSED, validate=False)
    try:
        quantized = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            preset=nncf.QuantizationPreset.MIXED,  # activations that SiLU leaves are not symmetric
            subset_size=len(feeds),
            ignored_scope=ignored,
        )
    except (RuntimeError, ValueError, nncf.ValidationError) as error:
        raise ExportError(f"NNCF failed ({first_line(error)})", "check the calibration set, or ask for fp16") from error
    shutil.rmtree(job.folder / SAMPLES)
    return quantized, calibration.notes(feeds, "NNCF, which recommends 300", kept)


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Compiles the model for the CPU in the precision that is judged."""
    from exporters.runtimes.openvino import OpenVinoSession

    return OpenVinoSession(artifact.path, spec, named=artifact.has_manifest)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.openvino."""
    from exporters.runtimes.openvino import read_precision

    return read_precision(path)


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """INT8 is calibrated on what a process of exportgate's own environment reads or, where that is code, calls."""
    if spec.precision is Precision.INT8:
        return (Step("calibrate", calibrate, toolchain="pytorch"), Step("quantize", export, (MODULE, "nncf")))
    return (Step("convert", export, (MODULE,)),)


FORMAT = Format(
    id="openvino",
    title="OpenVINO",
    suffix=FOLDER,
    precisions=(Precision.FP32, Precision.FP16, Precision.INT8),
    options=frozenset({"batch", "dynamic", "device", "data", "split", "fraction", "keep"}),
    toolchain="openvino",
    runtimes=(
        Runtime(
            "ov",
            "cpu",
            (Precision.FP32, Precision.INT8),
            "OpenVINO's CPU plugin reads weights of 16 bits and computes in FP32, as INFERENCE_PRECISION_HINT says",
            imports=(MODULE,),
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=fp32_onnx,
    refusal=needs_data,
    keeps=heads,
)

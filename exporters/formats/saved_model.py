"""SavedModel: converted from the ONNX file by onnx2tf, with channels last. Run by TensorFlow on a CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from exporters.artifact import Achieved, Artifact
from exporters.formats import Format, Job, Made, Runtime, Step, fp32_onnx
from exporters.layout import LAST
from exporters.metadata import SIDE_CAR
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

MODULE, CONVERTER = "exporters.runtimes.tensorflow", "exporters.runtimes.onnx_to_tf"
FOLDER = "_saved_model"
SCRATCH = "scratch"  # onnx2tf's working folder
TFLITE = "that is the tflite format, whose files users find in a SavedModel's folder"
BECAUSE = "TensorFlow's CPU kernels compute in the type of a graph's tensors, FP32"


def export(job: Job) -> Made:
    """Converts the ONNX file.

    Raises:
        ExportError: onnx2tf failed.
    """
    from exporters.runtimes.onnx_to_tf import convert, output_shapes, save

    source, scratch, folder = job.parents[0].path, job.folder / SCRATCH, job.folder / f"{job.stem}{FOLDER}"
    scratch.mkdir()
    save(convert(source, scratch, job.spec), folder, job.spec, output_shapes(source))
    shutil.rmtree(scratch)
    (folder / SIDE_CAR).write_text(replace(job.metadata, layout=LAST).as_yaml(), encoding="utf-8")
    return Made(folder.name)


def parents_of_others(spec: ExportSpec) -> tuple[ExportSpec, ...]:
    """The SavedModel of the same request, of which frozen graphs and TensorFlow.js' models are made."""
    return (ExportSpec(spec.model, "saved_model", Precision.FP32, spec.imgsz, spec.batch),)


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the folder's signature in TensorFlow, or what Keras loads of it where that was asked for."""
    from exporters.runtimes.tensorflow import KerasSession, SavedModelSession

    if spec.keras:
        return KerasSession(artifact.path, spec, named=artifact.has_manifest)
    return SavedModelSession(artifact.path, spec, named=artifact.has_manifest)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.tf_graph."""
    from exporters.runtimes.tf_graph import of_saved_model, read_precision

    return read_precision(of_saved_model(path))


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step, in a process of its own: onnx2tf changes settings of TensorFlow and of Python."""
    return (Step("convert", export, (CONVERTER,)),)


FORMAT = Format(
    id="saved_model",
    title="TensorFlow SavedModel",
    suffix=FOLDER,
    precisions=(Precision.FP32,),
    options=frozenset({"batch", "device", "keras"}),
    toolchain="tensorflow",
    runtimes=(Runtime("tf", "cpu", (Precision.FP32,), BECAUSE, imports=(MODULE,)),),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=fp32_onnx,
    is_code=True,  # operators of a graph read and write files, and call Python
    gone={Precision.FP16: TFLITE, Precision.INT8: TFLITE},
    says_layout=True,
)

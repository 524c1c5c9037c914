"""TensorFlow.js: a graph model converted from the SavedModel. Run by the wasm backend in Node.js and in Chromium."""

from __future__ import annotations

from pathlib import Path

from exporters.artifact import Achieved, Artifact
from exporters.formats import Format, Job, Made, Runtime, Step
from exporters.formats.saved_model import parents_of_others
from exporters.session import Session
from exporters.spec import ExportSpec, Precision
from exporters.tfjs.places import needs_chromium, needs_node

MODULE = "exporters.runtimes.tfjs"
FOLDER = "_web_model"
BECAUSE = (
    "TensorFlow.js makes FP32 of weights of 16 and 8 bits when it loads them, and its wasm backend computes in FP32"
)


def export(job: Job) -> Made:
    """Converts the SavedModel.

    Raises:
        ExportError: the converter failed.
        NotSupported: FP16 cannot hold a weight.
    """
    from exporters.tfjs.convert import convert

    folder = job.folder / f"{job.stem}{FOLDER}"
    notes = convert(job.parents[0].path, folder, job.spec, job.metadata)
    return Made(folder.name, notes)


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the model in a process of the runtime, which ends with the session."""
    from exporters.runtimes.tfjs import TfjsSession

    return TfjsSession(artifact.path, spec, runtime.id, named=artifact.has_manifest)


def inspect(path: Path) -> Achieved:
    """See exporters.tfjs.read."""
    from exporters.tfjs.read import read_precision

    return read_precision(path)


def refusal(spec: ExportSpec) -> str:
    """TensorFlow.js' tensors have no integers of 64 bits, and no numbers of 64 or 16."""
    alien = next((i for i in spec.model.inputs if i.dtype not in ("float32", "int32", "bool")), None)
    if alien is None:
        return ""
    return (
        f"TensorFlow.js has no tensors of {alien.dtype}, and input '{alien.name}' of model '{spec.model.name}' is one"
    )


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step, in a process that imports TensorFlow and the converter."""
    return (Step("convert", export, ("tensorflow",)),)


FORMAT = Format(
    id="tfjs",
    title="TensorFlow.js",
    suffix=FOLDER,
    precisions=(Precision.FP32, Precision.FP16, Precision.INT8),
    options=frozenset({"batch", "device"}),
    toolchain="tensorflow",
    runtimes=(
        Runtime("node", "cpu", (Precision.FP32,), BECAUSE, imports=(MODULE,), needs=needs_node),
        Runtime("chromium", "cpu", (Precision.FP32,), BECAUSE, imports=(MODULE,), needs=needs_chromium),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=parents_of_others,
    refusal=refusal,
    says_layout=True,
)

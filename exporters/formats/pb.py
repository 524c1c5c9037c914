"""Frozen graph: one GraphDef with its weights, made of the SavedModel. Run by TensorFlow on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from exporters.artifact import Achieved, Artifact
from exporters.formats import Format, Job, Made, Runtime, Step
from exporters.formats.saved_model import BECAUSE, MODULE, TFLITE, parents_of_others
from exporters.layout import LAST
from exporters.metadata import SIDE_CAR
from exporters.session import Session
from exporters.spec import ExportSpec, Precision


def export(job: Job) -> Made:
    """Freezes the SavedModel's signature; a GraphDef has no place for metadata, which lie beside it.

    Raises:
        ExportError: TensorFlow failed.
    """
    from exporters.runtimes.frozen_graph import freeze

    target = job.folder / f"{job.stem}.pb"
    freeze(job.parents[0].path, target, job.spec)
    target.with_name(SIDE_CAR).write_text(replace(job.metadata, layout=LAST).as_yaml(), encoding="utf-8")
    return Made(target.name)


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Imports the graph into a function of TensorFlow."""
    from exporters.runtimes.frozen_graph import FrozenGraphSession

    return FrozenGraphSession(artifact.path, spec, named=artifact.has_manifest)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.tf_graph."""
    from exporters.runtimes.tf_graph import of_frozen, read_precision

    return read_precision(of_frozen(path))


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step, in a process with TensorFlow."""
    return (Step("freeze", export, (MODULE,)),)


FORMAT = Format(
    id="pb",
    title="TensorFlow frozen graph",
    suffix=".pb",
    precisions=(Precision.FP32,),
    options=frozenset({"batch", "device"}),
    toolchain="tensorflow",
    runtimes=(Runtime("tf", "cpu", (Precision.FP32,), BECAUSE, imports=(MODULE,)),),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=parents_of_others,
    is_code=True,  # operators of a graph read and write files, and call Python
    gone={Precision.FP16: TFLITE, Precision.INT8: TFLITE},
    says_layout=True,
)

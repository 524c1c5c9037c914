"""PyTorch itself, eager: the reference, and the first row of every latency table. The artifact is the FP32 state."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (safetensors' stubs have no types)

from __future__ import annotations

from pathlib import Path

from exporters.artifact import Achieved, Artifact
from exporters.errors import ArtifactError
from exporters.formats import Format, Job, Made, Runtime, Step
from exporters.session import Session
from exporters.spec import ExportSpec, Precision


def export(job: Job) -> Made:
    """Writes the state that the reference runs with as safetensors, so that the artifact needs no checkpoint."""
    from safetensors.torch import save_file

    from exporters.models.build import build

    state = {k: v.contiguous().clone() for k, v in build(job.spec.model).state_dict().items()}
    save_file(state, job.folder / f"{job.stem}.safetensors")
    return Made(f"{job.stem}.safetensors")


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """The model of the request with the artifact's state."""
    from dataclasses import replace

    from exporters.models.build import build
    from exporters.models.reference import Reference, exact_fp32

    exact_fp32(device)
    # A module may have nothing to store: then its factory makes all of it.
    model = replace(spec.model, weights=artifact.path) if inspect(artifact.path).counts else spec.model
    return Reference(build(model), spec, device)


def inspect(path: Path) -> Achieved:
    """Counts the types of the stored tensors, from the file's header."""
    from collections import Counter

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            counts = Counter(str(file.get_slice(k).get_dtype()) for k in file.keys())  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{path}' is not a safetensors file ({error})", "export it again") from None
    others = tuple(k for k in counts if k not in ("F32", "I64"))
    return Achieved("fp32" if not others else "mixed", dict(counts), others)


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step, in a process with torch."""
    return (Step("export", export, ("torch",)),)


FORMAT = Format(
    id="pytorch",
    title="PyTorch",
    suffix=".safetensors",
    precisions=(Precision.FP32,),
    # The reference takes every shape: batch and dynamic are the cases', not the file's.
    options=frozenset({"batch", "dynamic", "device"}),
    toolchain="pytorch",
    runtimes=tuple(Runtime("eager", device, (Precision.FP32,), imports=("torch",)) for device in ("cpu", "cuda")),
    steps=steps,
    load=load,
    inspect=inspect,
    keeps_metadata=False,
    keeps_signature=False,
    gone={Precision.FP16: "it is the FP32 reference", Precision.INT8: "it is the FP32 reference"},
)

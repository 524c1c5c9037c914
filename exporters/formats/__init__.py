"""Formats: one file each, found by being here. This module holds what every file declares and the registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from exporters.artifact import Achieved, Artifact, TensorInfo
from exporters.errors import BadRequest, NotSupported, ToolchainMissing
from exporters.metadata import Metadata
from exporters.models.spec import detector_output
from exporters.session import Session
from exporters.spec import ExportSpec, Precision, near
from exporters.weights import Weight

# Why a format lacks what an engine has, where its file does not say otherwise.
ENGINES_ALONE: Mapping[Precision, str] = {
    Precision.TF32: "TF32 is how an NVIDIA GPU multiplies FP32 values, which only an engine's builder is asked for",
    Precision.BF16: "exportgate makes BF16 for engines alone, whose GPUs compute in it",
    Precision.FP8: "exportgate makes FP8 for engines alone, whose GPUs compute in it",
}
TENSOR_CORE_TERMS = 16  # products that a tensor core's instruction sums up before it rounds (m16n8k16, since Ampere)


def nothing_needed() -> None:
    """A format or runtime that needs nothing but the packages of its toolchain."""


@dataclass(frozen=True)
class Runtime:
    """What executes a format: id ("ort"), device ("cpu" or "cuda"), and the modules that its worker imports first.

    `executes` names the precisions whose arithmetic it really does; for another one of the format's precisions the
    claim about executed precision is NOT_SUPPORTED, with `because`. Where it `runs` nothing at all, artifacts are made
    for elsewhere, and every claim that needs a session is NOT_SUPPORTED with `because`, or, where exportgate runs them
    on another machine (`runs_elsewhere`), SKIPPED: that machine's run can stand in for it. One that `builds` an engine
    when it opens a file takes minutes over it the first time. Its FP16 kernels may round what they have summed up so
    far after every `fp16_terms` products; 0 where they sum up in FP32. `untold` is why it may not tell what it executes
    of some models, `untimed` why its latency is not that of what executes the format where it is deployed, so that it
    is not measured. `needs` raises ToolchainMissing where something is not here that it alone needs, beside its
    toolchain's packages.
    """

    id: str
    device: str
    executes: tuple[Precision, ...]
    because: str = ""
    imports: tuple[str, ...] = ()
    runs: bool = True
    runs_elsewhere: bool = False
    builds: bool = False
    fp16_terms: int = 0
    untold: str = ""
    untimed: str = ""
    needs: Callable[[], object] = nothing_needed

    def check_runs(self) -> None:
        """Raises NotSupported or ToolchainMissing where nothing here runs the format's files."""
        if not self.runs:
            raise ToolchainMissing(self.because) if self.runs_elsewhere else NotSupported(self.because)
        self.needs()


@dataclass(frozen=True)
class Job:
    """One export: the request, the empty folder to write into, the parents' artifacts, the metadata to embed."""

    spec: ExportSpec
    folder: Path
    parents: tuple[Artifact, ...]
    metadata: Metadata

    @property
    def stem(self) -> str:
        """The checkpoint's stem, which names the files; the model's name where there are no weights."""
        weights = self.spec.model.weights
        return weights.stem if weights else self.spec.model.name


@dataclass(frozen=True)
class Made:
    """What an export made: the primary file or folder, relative to the job's folder, and lines for the record."""

    primary: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One part of an export, run in a worker of its own role, so that each imports only what it needs.

    Steps of one export share the job's folder; the last one's `Made` counts. A step may have another toolchain than its
    format, as what runs the user's own code has.
    """

    role: str
    run: Callable[[Job], Made]
    imports: tuple[str, ...] = ()
    toolchain: str = ""


def no_parents(spec: ExportSpec) -> tuple[ExportSpec, ...]:
    """Parents of a format that is made from the module itself."""
    return ()


def fp32_onnx(spec: ExportSpec) -> tuple[ExportSpec, ...]:
    """Parents of a format that is made from the FP32 ONNX file: its tensors keep their names."""
    return (ExportSpec(spec.model, "onnx", Precision.FP32, spec.imgsz, spec.batch, spec.dynamic),)


def fp32_trace(spec: ExportSpec) -> tuple[ExportSpec, ...]:
    """Parents of a format that is made from the FP32 trace, which keeps the modules' paths.

    The module itself may need packages that the format's toolchain lacks.
    """
    return (ExportSpec(spec.model, "torchscript", Precision.FP32, spec.imgsz, spec.batch),)


def nothing_further(spec: ExportSpec) -> Mapping[str, str]:
    """A format whose artifact depends on nothing but what every format's depends on."""
    return {}


def nothing_left_out(spec: ExportSpec) -> tuple[str, ...]:
    """A format that leaves out no module but those that the model names and the request keeps."""
    return ()


def no_contradiction(path: Path, spec: ExportSpec) -> str:
    """Nothing beside its metadata."""
    return ""


def no_metadata(path: Path) -> Metadata:
    """A format whose metadata its sessions read."""
    raise NotImplementedError(f"the metadata of {path} is read by a session")


def no_refusal(spec: ExportSpec) -> str:
    """A format that can do every combination of the options and precisions that it declares."""
    return ""


def no_nms(spec: ExportSpec) -> str:
    """Why suppression cannot be part of this model's graph, or ""."""
    if not spec.nms:
        return ""
    output = detector_output(spec.model)
    if output is None:
        return f"nms: model {spec.model.name} has no boxes with scores"
    if any(group.kind == "angle" for group in output.groups):
        return "nms: ONNX has no operator that suppresses turned boxes"
    return ""


def heads(spec: ExportSpec) -> tuple[str, ...]:
    """A detector's head, which 8 bits leave out: the module whose parts the model keeps in FP32, as "model.22".

    It joins pixels and scores in one tensor: with the one scale of both every score is 0.
    """
    if spec.precision is not Precision.INT8 or not spec.model.task:
        return ()
    return tuple(dict.fromkeys(head for path, _ in spec.model.fp32 if (head := path.rpartition(".")[0])))


def needs_data(spec: ExportSpec) -> str:
    """INT8 needs a calibration set: that is a bad request, not a limit of the format."""
    if spec.precision is Precision.INT8 and not spec.data:
        raise BadRequest(
            "INT8 needs images to calibrate on and none are given (data '')",
            "add --data: a data set YAML, a folder of images, or module:factory",
        )
    return ""


@dataclass(frozen=True)
class Format:
    """Declaration of a format.

    Attributes:
        id, aliases, title: as users type and read it.
        suffix: of the primary file, or of the folder's name.
        precisions: that it can hold.
        options: fields of ExportSpec that it takes; anything else is refused.
        toolchain: environment that exports and runs it.
        toolchains: another one on a kind of device ("cpu"), by that.
        runtimes: what can execute it.
        steps: parts of an export of this request, in order.
        load: `load(artifact, spec, runtime, device)` opens a session, in a worker.
        inspect: `inspect(path)` reads the achieved precision back from the file, in a worker.
        metadata: `metadata(path)` reads the file's metadata where nothing here can run it; see `Runtime.runs`.
        signature: `signature(path, spec)` reads inputs and outputs where nothing here can run the file, under the
            model's names.
        weights: `weights(path)` reads the weights that are in the file, by their parameters' names, in a worker; None
            where a file is judged by what it computes alone.
        contradiction: `contradiction(path, spec)` tells what the file says that it was made for, and the request asks
            otherwise, beside what metadata holds; or "".
        parents: what it is made from.
        refusal: why a combination is not supported by its nature, or "".
        keeps: modules that its INT8 leaves in floating point, beside those that the model names and the request keeps.
        is_code: loading it runs code that is in it.
        keeps_metadata: whether the file holds metadata.
        keeps_signature: whether the file holds names and shapes of its inputs, so that its runtime refuses others.
        gone: precision -> why the format does not have it, where ENGINES_ALONE does not say it.
        depends: what else its artifact depends on, by name, for the cache.
        needs: raises ToolchainMissing where something beside its toolchain's packages is not here.
        smaller_batches: whether `batch` is the largest batch, and smaller ones run, too.
        shows_inside: whether it takes ExportSpec.inside.
        says_layout: whether its metadata say in which order the axes of its tensors are.
    """

    id: str
    title: str
    suffix: str
    precisions: tuple[Precision, ...]
    options: frozenset[str]
    toolchain: str
    runtimes: tuple[Runtime, ...]
    steps: Callable[[ExportSpec], tuple[Step, ...]]
    load: Callable[[Artifact, ExportSpec, Runtime, str], Session]
    inspect: Callable[[Path], Achieved]
    parents: Callable[[ExportSpec], tuple[ExportSpec, ...]] = no_parents
    refusal: Callable[[ExportSpec], str] = no_refusal
    metadata: Callable[[Path], Metadata] = no_metadata
    signature: Callable[[Path, ExportSpec], tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]] | None = None
    weights: Callable[[Path], Mapping[str, Weight]] | None = None
    contradiction: Callable[[Path, ExportSpec], str] = no_contradiction
    keeps: Callable[[ExportSpec], tuple[str, ...]] = nothing_left_out
    aliases: tuple[str, ...] = ()
    is_code: bool = False
    keeps_metadata: bool = True
    keeps_signature: bool = True
    gone: Mapping[Precision, str] = field(default_factory=dict[Precision, str])
    depends: Callable[[ExportSpec], Mapping[str, str]] = nothing_further
    needs: Callable[[], object] = nothing_needed
    smaller_batches: bool = False
    shows_inside: bool = False
    says_layout: bool = False
    toolchains: Mapping[str, str] = field(default_factory=dict[str, str])

    def chain(self, device: str) -> str:
        """Name of the toolchain on this device ("cpu", "cuda:0")."""
        return self.toolchains.get(device.partition(":")[0], self.toolchain)

    def check(self, spec: ExportSpec) -> None:
        """Raises BadRequest for an option that the format does not take, NotSupported for what it cannot do."""
        extra = next((name for name in spec.changed() if name not in self.options), None)
        if extra:
            raise BadRequest(
                f"format {self.id} does not take option '{extra}' (given: {getattr(spec, extra)!r})",
                f"{self.id} takes: " + (", ".join(sorted(self.options)) or "no option"),
            )
        because = self.because(spec)
        if because:
            raise NotSupported(because)

    def because(self, spec: ExportSpec) -> str:
        """Why the format cannot do this precision or combination, by its nature; "" where it can."""
        if spec.precision not in self.precisions:
            return (
                f"format {self.id} has no precision {spec.precision.value}: {self.lacks(spec.precision)}; it has "
                + ", ".join(self.precisions)
            )
        return self.refusal(spec)

    def lacks(self, precision: Precision) -> str:
        """Why it has no such precision."""
        return self.gone.get(precision) or ENGINES_ALONE[precision]

    def runtime(self, runtime_id: str, device: str) -> Runtime:
        """The declared runtime with this id on this kind of device."""
        kind = device.partition(":")[0]
        for entry in self.runtimes:
            if entry.id == runtime_id and entry.device == kind:
                return entry
        raise NotSupported(f"format {self.id} has no runtime {runtime_id} on {kind}")


@cache
def registry() -> dict[str, Format]:
    """Every format by id. A file in this folder without a FORMAT fails loudly."""
    found: dict[str, Format] = {}
    for info in pkgutil.iter_modules(__path__):
        module: ModuleType = importlib.import_module(f"{__name__}.{info.name}")
        declared: Any = getattr(module, "FORMAT", None)
        if not isinstance(declared, Format):
            raise TypeError(f"exporters/formats/{info.name}.py declares no FORMAT")
        for word in (declared.id, *declared.aliases):
            if any(word == f.id or word in f.aliases for f in found.values()):
                raise TypeError(f"exporters/formats/{info.name}.py: '{word}' names another format already")
        found[declared.id] = declared
    return found


def canonical(text: str) -> str:
    """The id of a format from its id or an exact alias, case-insensitively.

    Raises:
        BadRequest: unknown; the closest known word is a hint only.
    """
    word = text.strip().lower()
    for entry in registry().values():
        if word == entry.id or word in entry.aliases:
            return entry.id
    known = sorted(registry())
    words = known + [a for f in registry().values() for a in f.aliases]
    raise BadRequest(f"format '{text}' is not known{near(text, words)}", "formats: " + ", ".join(known))


def get(format_id: str) -> Format:
    """The format with this id."""
    return registry()[canonical(format_id)]

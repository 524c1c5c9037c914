"""Pool: what the suite and the command line use. Exports through the cache, opens sessions, owns the workers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from exporters import cache, formats, toolchain
from exporters.arrays import Array, Feeds, load, save
from exporters.artifact import MANIFEST, Achieved, Artifact, TensorInfo, commit, discard, list_files, read_manifest
from exporters.client import Caller, InProcess, Limits, Worker
from exporters.cuda.nvml import gpu_id
from exporters.errors import (
    ArtifactError,
    BadRequest,
    ExportError,
    ExportgateError,
    NotSupported,
    ParentFailed,
    ToolchainMissing,
    UnsafeFile,
)
from exporters.keys import export_key, factory_digest, weights_digest
from exporters.measure import MeasurementPlan, Samples
from exporters.metadata import Metadata, normalize
from exporters.models.spec import ModelSpec
from exporters.session import Execution, Layer
from exporters.spec import ExportSpec, is_factory
from exporters.weights import Parameters, Weight

PREFIX = "exportgate-run-"  # of the folders of runs


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an artifact's own files say: their metadata, and the precision read back from them.

    Where nothing here runs them also their `signature`, inputs and outputs; None where the format cannot tell it, or
    where it is wrong, with an error.
    """

    metadata: Metadata | None
    metadata_error: str
    achieved: Achieved
    signature: tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]] | None = None
    signature_error: str = ""

    @staticmethod
    def read(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The fields from what a worker answered."""
        told, tensors = data["metadata"], data.get("signature")
        return {
            "signature": tensors
            and tuple(tuple(TensorInfo(t["name"], tuple(t["shape"]), t["dtype"]) for t in side) for side in tensors),
            "signature_error": data.get("signature_error", ""),
            "metadata": normalize(told, str(path)) if told is not None else None,
            "metadata_error": data["metadata_error"],
            "achieved": Achieved.from_dict(data["achieved"]),
        }


@dataclass(frozen=True, kw_only=True)
class Description(Facts):
    """What a session says of itself: what executes it, and the facts of its files."""

    execution: Execution


class RemoteSession:
    """A session in a worker. `run` and the rest raise what the worker raised, WorkerCrash or WorkerTimeout."""

    def __init__(self, caller: Caller, opened: Mapping[str, Any], artifact: Artifact, folder: Path) -> None:
        self.caller, self.artifact, self.folder = caller, artifact, folder
        self.number: int = opened["session"]
        self.inputs = tuple(TensorInfo(i["name"], tuple(i["shape"]), i["dtype"]) for i in opened["inputs"])
        self.outputs = tuple(TensorInfo(o["name"], tuple(o["shape"]), o["dtype"]) for o in opened["outputs"])
        self.stride: int = opened["stride"]
        self.load_ms: float = 1e3 * opened["seconds"]  # from the files to a session, the runtime being imported
        self.calls = count(1)

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return self.caller.call(operation, session=self.number, **arguments)

    def _place(self) -> Path:
        return self.folder / f"{next(self.calls)}"

    def _arrays(self, operation: str, feeds: Feeds, **arguments: Any) -> dict[str, Array]:
        """Arrays by name that an operation makes of feeds: mapped files, without a name once they are mapped."""
        place = self._place()
        try:
            return load(self._call(operation, feeds=save(feeds, place / "in"), folder=str(place / "out"), **arguments))
        finally:
            if os.name != "nt":  # a mapped file that has no name lives as long as the array
                shutil.rmtree(place, ignore_errors=True)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs by name, as read-only arrays."""
        return self._arrays("run", feeds)

    def measure(self, feeds: Sequence[Feeds], plan: MeasurementPlan) -> Samples:
        """Raw samples of one process."""
        place = self._place()
        paths = [save(f, place / str(i)) for i, f in enumerate(feeds)]
        data = self._call("measure", feeds=paths, plan=asdict(plan))
        data.update({k: tuple(data[k]) for k in ("milliseconds", "notes")})
        data["throttled"] = None if data["throttled"] is None else tuple(data["throttled"])
        return Samples(**data)

    def describe(self) -> Description:
        data = self._call("describe", format=self.artifact.format, path=str(self.artifact.path))
        execution = data["execution"]
        execution.update(
            fallback=tuple(execution["fallback"]),
            notes=tuple(execution["notes"]),
            layers=tuple(replace(Layer(**layer), parts=tuple(layer["parts"])) for layer in execution["layers"]),
        )
        return Description(execution=Execution(**execution), **Facts.read(data, self.artifact.path))

    def parameters(self) -> Parameters:
        """Parameters as exporters fold them (sessions of the pytorch format only)."""
        place = self._place()
        told = self._call("parameters", folder=str(place))
        try:
            values, slack = ({k: v.copy() for k, v in load(told[part]).items()} for part in ("values", "slack"))
            return Parameters(values, tuple(told["used"]), slack, tuple(told["others"]), told["counts"])
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def layers(self) -> list[str]:
        """Names of the layers that can be damaged (sessions of the pytorch format only)."""
        return self._call("damaged")["layers"]

    def run_damaged(self, feeds: Feeds, damage: Mapping[str, Any]) -> dict[str, Array]:
        """Outputs of the reference with known damage (sessions of the pytorch format only)."""
        return self._arrays("damaged", feeds, damage=dict(damage))

    def run_rounded(self, feeds: Feeds, bits: int, seed: int, terms: int) -> dict[str, Array]:
        """Outputs of the reference in rounded arithmetic (sessions of the pytorch format only)."""
        return self._arrays("rounded", feeds, bits=bits, seed=seed, terms=terms)

    def modules(self) -> dict[str, str]:
        """Modules of the network whose outputs can be seen inside, in their order, with the node that makes each."""
        return self._call("inside")["modules"]

    def run_inside(self, feeds: Feeds, modules: Sequence[str], row: int) -> dict[str, Array]:
        """The outputs of some of `modules`, by module, of one row of a batch."""
        return self._arrays("inside", feeds, modules=list(modules), row=row)

    def excite(self, feeds: Feeds, steps: int, floor: float) -> dict[str, Array]:
        """Feeds changed until the model responds to them (sessions of the pytorch format only)."""
        return self._arrays("excite", feeds, steps=steps, floor=floor)

    def close(self) -> None:
        if self.caller.alive:
            with suppress(ExportgateError):
                self._call("close")
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Pool:
    """Workers of a run, keyed by toolchain, format and role, kept warm and replaced after a crash.

    Attributes:
        folder: the run's folder for logs, arrays and what workers put aside; a temporary one by default.
        in_process: answer calls here, for a debugger.
        progress: told what the pool waits for, one line each.
        variables: of the workers' environment, beside those of this process.
        environment: folder of an environment that every toolchain but PyTorch's, the reference's, is taken from.
    """

    limits: Limits = field(default_factory=Limits)
    folder: Path = Path()
    in_process: bool = False
    progress: Callable[[str], None] = lambda line: None
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    environment: Path | None = None
    workers: dict[tuple[str, str, str], Caller] = field(default_factory=dict[tuple[str, str, str], Caller])
    fresh: list[str] = field(default_factory=list[str])  # keys of artifacts that this pool made, not found
    sources: dict[tuple[str, str, str], str] = field(default_factory=dict[tuple[str, str, str], str])
    states: dict[str, str] = field(default_factory=dict[str, str])  # digest of what each factory made
    weights: dict[str, str] = field(default_factory=dict[str, str])  # digest of each weights file when first seen
    turn: threading.RLock = field(default_factory=threading.RLock)  # threads that ask for a worker take turns
    held: dict[Path, int] = field(default_factory=dict[Path, int])  # the folder and artifacts, so that none is pruned

    def __post_init__(self) -> None:
        if self.folder == Path():
            self.folder, held = _temporary()
            self._keep(self.folder, held)

    def _keep(self, folder: Path, held: int | None) -> None:
        if held is not None:
            self.held[folder] = held

    def worker(self, chain: str, format_id: str, role: str, imports: Sequence[str] = (), source: str = "") -> Caller:
        """The warm worker for this key; a new one where there is none or it died.

        `source` identifies the code of a model's factory: a process that imported another one would keep using it.
        """
        key = (chain, format_id, role)
        with self.turn:
            current = self.workers.get(key)
            if source and self.sources.get(key) != source:
                if current is not None and key in self.sources:
                    current.close()
                self.sources[key] = source
            if current is None or not current.alive:
                self.workers[key] = self._start(chain, "-".join(key), imports)
            return self.workers[key]

    def forget(self) -> None:
        """What was read once a run is read again: a process that uses the Python API outlives its user's edits."""
        self.states.clear()
        self.weights.clear()

    def _start(self, chain: str, name: str, imports: Sequence[str]) -> Caller:
        if self.in_process:
            return InProcess()
        environment = self.chain(chain)
        log = self.folder / f"{name}.log"
        aside = self.folder / "tmp"  # what a killed worker leaves in it is removed with the rest
        try:
            aside.mkdir(parents=True, exist_ok=True)
            variables = {"TMPDIR": str(aside), **self.variables}
            return Worker(name, environment.python, imports, log, self.limits, variables)
        except OSError as error:
            raise BadRequest(
                f"worker {name} cannot be started in {self.folder} ({error.strerror or error})",
                "make room there, or set TMPDIR to another folder",
            ) from None

    def chain(self, name: str) -> toolchain.Environment:
        """Where a toolchain's workers run."""
        if self.environment is None or name == "pytorch":
            return toolchain.resolve(name)
        return toolchain.resolve_in(name, self.environment)

    def start_early(self, format_id: str) -> None:
        """Starts the worker of a format's first FP32 step before the request is known, so that it imports meanwhile.

        Whether there are more steps depends on the model.
        """
        entry = formats.get(format_id)
        step = entry.steps(ExportSpec(ModelSpec("", ""), entry.id))[0]
        with suppress(ToolchainMissing):
            self.worker(entry.toolchain, entry.id, step.role, step.imports)

    def export(self, spec: ExportSpec) -> Artifact:
        """The artifact of a request, from the cache or made now.

        Raises:
            ParentFailed: what it is made from could not be made.
            ExportError, WorkerCrash, WorkerTimeout, ToolchainMissing, NotSupported: see their docstrings.
        """
        entry = formats.get(spec.format)
        entry.check(spec)
        environment = self.chain(entry.chain(spec.device))  # before anything is made for a toolchain that is not here
        parents: list[Artifact] = []
        for parent in entry.parents(spec):
            try:
                parents.append(self.export(parent))
            except (NotSupported, ToolchainMissing):
                raise
            except ExportgateError as error:
                raise ParentFailed(
                    f"parent {parent.format} {parent.precision.value} failed: {error.what}", error.fix
                ) from error
        before = _stamp(spec.model)
        if spec.model.weights is not None and str(spec.model.weights) not in self.weights:
            self.weights[str(spec.model.weights)] = weights_digest(spec.model) or ""
        key = export_key(spec, [p.key for p in parents], environment.packages, entry.depends(spec), self._state(spec))
        final = (
            toolchain.cache_root()
            / "artifacts"
            / f"{spec.model.name[:40]}-{entry.id}-{spec.precision.value}-{key[:16]}"
        )
        with cache.writing():  # a folder that may not be looked into
            is_there = final.exists()
        if is_there:
            self._hold(final)
            try:
                found = read_manifest(final)
                found.verify()
                cache.touch(final / MANIFEST)
                return found
            except ArtifactError:
                self._let_go(final)
                with cache.writing():
                    discard(final, cache.scratch())
        return self._make(spec, key, parents, environment, final, before)

    def _state(self, spec: ExportSpec) -> str:
        """Digest of what a user's factories make, the model and calibration feeds; "" for our own models on images.

        A factory may read files that no key knows of: what changed there must not be taken from the cache. Each is
        called once a run.
        """
        wanted: list[tuple[str, str]] = [("state", repr(spec.model))] if _source(spec) else []
        if spec.data and is_factory(spec.data):
            wanted.append(("samples", repr((spec.model, spec.data, spec.imgsz))))
        for operation, made in wanted:
            if made not in self.states:
                self.progress(f"building {spec.model.name if operation == 'state' else spec.data}")
                pytorch = formats.get("pytorch")
                step = pytorch.steps(spec)[0]
                worker = self.worker(pytorch.toolchain, pytorch.id, step.role, step.imports, _source(spec))
                self.states[made] = worker.call(operation, spec=spec.to_dict())["digest"]
        return " ".join(self.states[made] for _, made in wanted)

    def _make(
        self,
        spec: ExportSpec,
        key: str,
        parents: Sequence[Artifact],
        environment: toolchain.Environment,
        final: Path,
        before: Any,
    ) -> Artifact:
        entry = formats.get(spec.format)
        self.progress(f"exporting {spec.model.name} to {entry.title} {spec.precision.value}")
        source = _source(spec)
        workers = [
            self.worker(step.toolchain or entry.chain(spec.device), entry.id, step.role, step.imports, source)
            for step in entry.steps(spec)
        ]
        with cache.temporary_folder() as folder:
            seconds, notes, done = 0.0, (), dict[str, Any]()
            for number, worker in enumerate(workers):
                done = worker.call(
                    "export",
                    spec=spec.to_dict(),
                    folder=str(folder),
                    step=number,
                    parents=[p.to_dict() for p in parents],
                )
                seconds, notes = seconds + done["seconds"], (*notes, *done["notes"])
            if _stamp(spec.model) != before:  # the key may be of other weights than those that the worker read
                raise ExportError(f"weights '{spec.model.weights}' changed while they were exported", "export again")
            with cache.writing():
                files = list_files(folder)
            if not any(f.path == done["primary"] or f.path.startswith(done["primary"] + "/") for f in files):
                raise ExportError(
                    f"format {entry.id} said it made '{done['primary']}' and it is not there", "see the worker's log"
                )
            artifact = Artifact(
                folder,
                key,
                entry.id,
                done["primary"],
                spec.to_dict(),
                files,
                {
                    "name": entry.chain(spec.device),
                    "python": sys.version.split()[0],
                    "packages": dict(environment.packages),
                },
                Achieved.from_dict(done["achieved"]),
                tuple(p.key for p in parents),
                seconds,
                notes,
            )
            with cache.writing():
                finished = commit(artifact, final)
            self.fresh.append(key)
        self._hold(final)
        return finished

    def _hold(self, final: Path) -> None:
        """Before it is read: what is held is not pruned, and what was pruned before is not there."""
        if final not in self.held:
            self._keep(final, cache.hold(final, shared=True))

    def sensitivity(self, spec: ExportSpec) -> dict[str, dict[str, float]]:
        """See exporters.graph.sensitivity; `spec` asks for ONNX in 8 bits."""
        worker, parent = self._converter(spec)
        with cache.temporary_folder() as folder:
            return worker.call("sensitivity", spec=spec.to_dict(), parent=parent.to_dict(), folder=str(folder))

    def reached(self, spec: ExportSpec, feeds: Sequence[Feeds]) -> dict[str, Any]:
        """What feeds reach of the calibrated ranges; `spec` asks for ONNX in 8 bits.

        Returns:
            "calibrated": tensor -> largest magnitude on the calibration set of so many "images"; "reached": tensor ->
            largest magnitude on each feed; "means": of some calibration images, the mean of each channel.
        """
        worker, parent = self._converter(spec)
        with cache.temporary_folder() as folder:
            stored = [save(f, folder / f"feeds{n}") for n, f in enumerate(feeds)]
            return worker.call(
                "reached", spec=spec.to_dict(), parent=parent.to_dict(), folder=str(folder), feeds=stored
            )

    def _converter(self, spec: ExportSpec) -> tuple[Caller, Artifact]:
        """The worker that makes an artifact of its parent, and the parent."""
        entry = formats.get(spec.format)
        parent, step = self.export(entry.parents(spec)[0]), entry.steps(spec)[-1]
        return self.worker(entry.chain(spec.device), entry.id, step.role, step.imports, _source(spec)), parent

    def open(
        self, artifact: Artifact, spec: ExportSpec, runtime_id: str, device: str, replicate: int = 0
    ) -> RemoteSession:
        """Loads an artifact in its runtime's worker; `replicate` > 0 asks for a worker of its own (a fresh process).

        Raises:
            ArtifactError: the files are not those of the manifest; FallbackError: another provider or device.
            UnsafeFile: it is code and lies outside our cache: a manifest beside a stranger's file proves nothing.
        """
        entry = formats.get(spec.format)
        self._trust(artifact)
        runtime = entry.runtime(runtime_id, device)
        # A process of its own for each GPU: a context is one of a thread's.
        role = f"{runtime.id}-{device.replace(':', '')}" + (f"-{replicate}" if replicate else "")
        caller = self.worker(entry.chain(device), entry.id, role, runtime.imports, _source(spec))
        opened = caller.call(
            "build" if runtime.builds else "open",
            spec=spec.to_dict(),
            artifact=artifact.to_dict(),
            runtime=runtime_id,
            device=device,
        )
        return RemoteSession(caller, opened, artifact, self.folder / "arrays" / uuid.uuid4().hex)

    def inspect(self, artifact: Artifact, spec: ExportSpec) -> Facts:
        """What the files say of an artifact that nothing here can run.

        Raises:
            ArtifactError, UnsafeFile: as for `open`.
        """
        entry = formats.get(spec.format)
        self._trust(artifact)
        step = entry.steps(spec)[-1]
        worker = self.worker(entry.chain(spec.device), entry.id, step.role, step.imports, _source(spec))
        told = worker.call("inspect", format=entry.id, path=str(artifact.path), spec=spec.to_dict())
        return Facts(**Facts.read(told, artifact.path))

    def stored_weights(self, artifact: Artifact, spec: ExportSpec) -> dict[str, Weight]:
        """The weights that an artifact's files hold, by their parameters' names; of formats that have `weights`.

        Raises:
            ArtifactError, UnsafeFile: as for `open`.
        """
        entry = formats.get(spec.format)
        self._trust(artifact)
        step, folder = entry.steps(spec)[-1], self.folder / "arrays" / uuid.uuid4().hex
        worker = self.worker(entry.chain(spec.device), entry.id, step.role, step.imports, _source(spec))
        try:
            told = worker.call("weights", format=entry.id, path=str(artifact.path), folder=str(folder))
            parts = ("values", "step", "rounding", "table")
            values, step, rounding, table = ({k: v.copy() for k, v in load(told[part]).items()} for part in parts)
            return {name: Weight(v, step[name], rounding[name], table.get(name)) for name, v in values.items()}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _trust(self, artifact: Artifact) -> None:
        """Lets by what lies in our own cache with its digests intact, and what the user trusts; see `open`."""
        entry = formats.get(artifact.format)
        if artifact.has_manifest:
            inside = artifact.root.resolve().is_relative_to((toolchain.cache_root() / "artifacts").resolve())
            if entry.is_code and not inside:
                raise UnsafeFile(
                    f"'{artifact.path}' is a {entry.id} file outside exportgate's cache: loading one runs its code",
                    "export it again, or check it with --trust if you know who made it",
                )
            artifact.verify()

    @contextmanager
    def measuring(self, device: str) -> Generator[tuple[str, ...]]:
        """Within it no other run with this cache measures on this GPU, or on this CPU; gives notes on that."""
        owner = gpu_id(device) if device != "cpu" else ""
        with ExitStack() as stack:
            try:
                turn = cache.alone(
                    f"measure-{owner or platform.node()}",
                    lambda: self.progress("waiting for the measurement of another run"),
                )
                waited = stack.enter_context(turn)
                notes = (f"waited {waited:.0f} s for the measurement of another run",) if waited > 1 else ()
            except OSError as error:
                notes = (f"another run may have measured meanwhile: no lock in the cache ({error.strerror or error})",)
            yield notes

    def retire(self, spec: ExportSpec, runtime_id: str, device: str, replicate: int) -> None:
        """Ends the worker of one replicate."""
        entry = formats.get(spec.format)
        role = f"{runtime_id}-{device.replace(':', '')}-{replicate}"
        worker = self.workers.pop((entry.chain(device), entry.id, role), None)
        if worker is not None:
            worker.close()

    def leave(self) -> None:
        """Kills the workers without waiting for their end (50 ms after torch): for a process that ends next."""
        for worker in self.workers.values():
            worker.kill()
        self.workers.clear()

    def close(self) -> None:
        """Ends the workers and removes all but logs; the folder stays where something was logged."""
        for worker in self.workers.values():
            worker.kill()
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()
        _tidy(self.folder)
        for folder in list(self.held):
            self._let_go(folder)

    def _let_go(self, folder: Path) -> None:
        held = self.held.pop(folder, None)
        if held is not None:
            os.close(held)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _temporary() -> tuple[Path, int | None]:
    """A run's folder, which is held; what runs that were killed left in theirs is removed.

    Raises:
        BadRequest: no folder for temporary files can be written.
    """
    try:
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            if re.fullmatch(r"[a-z0-9_]{8}", left.name.removeprefix(PREFIX)):
                with cache.unheld(left) as free:
                    if free:
                        _tidy(left)
        return cache.held_folder(lambda: Path(tempfile.mkdtemp(prefix=PREFIX)))
    except OSError as error:
        raise BadRequest(
            f"no folder for temporary files can be written ({error.strerror or error})",
            "make room, or set TMPDIR to a folder of yours",
        ) from None


def _tidy(folder: Path) -> None:
    """Removes all of a run's folder but the logs that hold something."""
    for part in (*folder.glob("ahead-*"), folder):
        for name in ("arrays", "tmp"):
            shutil.rmtree(part / name, ignore_errors=True)
        with suppress(OSError):
            for log in part.glob("*.log"):
                if not log.stat().st_size:
                    log.unlink()
            part.rmdir()


def _stamp(model: ModelSpec) -> Any:
    """What changes when a weights file is replaced or written to; it costs no second digest."""
    if model.weights is None:
        return None
    with suppress(OSError):
        state = model.weights.stat()
        return state.st_ino, state.st_size, state.st_mtime_ns
    return "gone"


def _source(spec: ExportSpec) -> str:
    """Which code builds the model: "" for our own, which does not change during a run."""
    found = factory_digest(spec.model)
    return f"{found} {[str(p) for p in spec.model.search]}" if found else ""


shared: Pool | None = None  # of exporters.export and exporters.load
sharing = threading.Lock()

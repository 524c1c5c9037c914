"""Bench: what a claim works with. A run's shared state (Run) and one case on it (Bench), made when first asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from exporters import formats
from exporters.artifact import Artifact, TensorInfo
from exporters.errors import ExportgateError, NotSupported, ToolchainMissing, WorkerCrash, WorkerTimeout
from exporters.models.spec import ModelSpec
from exporters.pool import Description, Facts, Pool, RemoteSession
from exporters.session import Array
from exporters.spec import CALIBRATED, ExportSpec, Precision
from exporters.weights import Parameters, Weight
from suites.support.cases import Case
from suites.support.compare import DRAWS, FRACTION_BITS, Rounding
from suites.support.config import Project
from suites.support.detections import Matching, same_objects
from suites.support.feeds import FeedSet, make_feeds
from suites.support.suppression import as_anchors, matched, suppressed

if TYPE_CHECKING:
    from suites.accuracy.search import Found
    from suites.support.baseline import Baseline

T = TypeVar("T")
Outputs = dict[str, Array]
# Outputs held at a time (of each row of a batch, too), and their bytes: memory does not grow with the number of cases.
KEPT, KEPT_BYTES = 512, 1 << 30


class Run:
    """A run's workers, references, feeds and outputs, shared by its cases.

    `damage(artifact, spec)` may change a finished artifact before it is judged: the hook that selftests use. `old` has
    the workers of the toolchain that is to be replaced, where an upgrade is judged.
    """

    def __init__(
        self,
        project: Project,
        pool: Pool,
        damage: Callable[[Artifact, ExportSpec], Artifact | None] = lambda artifact, spec: None,
        old: Pool | None = None,
    ) -> None:
        self.project, self.pool, self.damage, self.old = project, pool, damage, old
        self.outputs: OrderedDict[Any, Outputs] = OrderedDict()
        self.measured: dict[str, list[list[float]]] = {}  # case -> milliseconds of single inferences by process
        self.figures: dict[str, dict[str, Any]] = {}  # case -> what else its measurement says
        self.before: dict[str, Baseline] = {}  # case -> what the old toolchain's artifact was measured at
        self.feed_sets: OrderedDict[Any, list[FeedSet]] = OrderedDict()
        self.layer_names: dict[str, list[str]] = {}
        self.open_reference: tuple[Any, RemoteSession] | None = None
        self.found: dict[Any, Any] = {}  # what accuracy is judged on, and the detections of each case
        self.failed: dict[str, ExportgateError] = {}  # case -> why its artifact, made ahead, could not be made

    def reference(self, model: ModelSpec) -> RemoteSession:
        """The eager FP32 session of a model; the one of the model before it is closed."""
        key = repr(model)
        if self.open_reference is not None:
            if self.open_reference[0] == key and self.open_reference[1].caller.alive:
                return self.open_reference[1]
            self.open_reference[1].close()
            self.open_reference = None
        spec = ExportSpec(model, "pytorch", imgsz=model.imgsz)
        session = self.pool.open(self.pool.export(spec), spec, "eager", "cpu")
        self.open_reference = (key, session)
        return session

    def kept(self, key: Any, make: Callable[[], Outputs]) -> Outputs:
        """Outputs from memory, or made now; the least recently used are dropped."""
        if key in self.outputs:
            self.outputs.move_to_end(key)
            return self.outputs[key]
        # Copies: the worker's files are removed when its session is closed.
        self.outputs[key] = {k: np.array(v) for k, v in make().items()}
        held = sum(v.nbytes for made in self.outputs.values() for v in made.values())
        while len(self.outputs) > KEPT or (held > KEPT_BYTES and len(self.outputs) > 1):
            held -= sum(v.nbytes for v in self.outputs.popitem(last=False)[1].values())
        return self.outputs[key]

    def feeds(self, spec: ExportSpec, batch: int, imgsz: tuple[int, int]) -> list[FeedSet]:
        """Sets of feeds of one shape."""
        key = (repr(spec.model), batch, imgsz)
        if key not in self.feed_sets:
            self.feed_sets[key] = make_feeds(spec, self.reference(spec.model), batch, imgsz)
            while len(self.feed_sets) > 4:
                self.feed_sets.popitem(last=False)
        return self.feed_sets[key]

    def expected(self, model: ModelSpec, feeds: FeedSet) -> Outputs:
        """The reference's outputs."""
        return self.kept(("reference", repr(model), _key(feeds)), lambda: self.reference(model).run(feeds.arrays))

    def damaged(self, model: ModelSpec, feeds: FeedSet, layer: str, size: float) -> Outputs:
        """The reference's outputs with noise on one layer's weights; kept once per model and feeds."""
        damage = {"layer": layer, "size": size}
        return self.kept(
            ("damaged", repr(model), _key(feeds), layer, size),
            lambda: self.reference(model).run_damaged(feeds.arrays, damage),
        )

    def rounding(self, model: ModelSpec, feeds: FeedSet, precision: Precision, terms: int) -> Rounding | None:
        """Standard deviation of each element of the reference in Monte Carlo arithmetic; None for precisions without.

        Kept once per model, row, width of the fraction, number of terms after which sums are rounded, and of draws;
        computed when it is called. A row of a batch has that of its image alone: each element is rounded by itself.
        """
        bits = FRACTION_BITS.get(precision)
        if bits is None:
            return None

        def spread(some: FeedSet, draws: int) -> Outputs:
            expected, before = self.expected(model, some), max((d for d in DRAWS if d < draws), default=0)
            squares = {k: np.zeros(v.shape) for k, v in expected.items()}
            if before:  # go on from there
                squares = {k: v.astype(np.float64) ** 2 * before for k, v in made(some, before).items()}
            for seed in range(before, draws):
                for name, drawn in self.reference(model).run_rounded(some.arrays, bits, seed, terms).items():
                    squares[name] += (drawn.astype(np.float64) - expected[name]) ** 2
            return {k: np.sqrt(v / draws).astype(np.float32) for k, v in squares.items()}

        def made(some: FeedSet, draws: int) -> Outputs:
            return self.kept(("rounding", repr(model), _key(some), bits, terms, draws), lambda: spread(some, draws))

        def rounding(draws: int, rows: Array | None) -> Outputs:
            if rows is None:
                return made(feeds, draws)
            each = [made(feeds.rows(slice(n, n + 1), f"row {n}"), draws) for n in rows]
            return {k: np.concatenate([one[k] for one in each]) for k in each[0]}

        return rounding

    def layers(self, model: ModelSpec) -> list[str]:
        """Layers of the reference that can be damaged, in order."""
        key = repr(model)
        if key not in self.layer_names:
            self.layer_names[key] = self.reference(model).layers()
        return self.layer_names[key]

    def close(self) -> None:
        if self.open_reference is not None:
            self.open_reference[1].close()
        self.pool.close()
        if self.old is not None:
            self.old.close()


def _key(feeds: FeedSet) -> Any:
    return tuple((k, v.shape, hash(v.tobytes())) for k, v in feeds.arrays.items())


class Bench:
    """One case being judged: its artifact, its open session and what the current claim observed.

    A worker that died or hung costs this case: its error is raised again by every later claim, without another try.
    """

    def __init__(self, run: Run, case: Case, brought: Artifact | None = None) -> None:
        self.run, self.case, self.brought = run, case, brought
        self.spec, self.model = case.spec, case.spec.model
        self.evidence: dict[str, Any] = {}
        self.opened: dict[str, RemoteSession] = {}
        self.made: Artifact | None = None
        self.described: Description | None = None
        self.read: Facts | None = None
        self.failure: Exception | None = None
        self.announced = False
        self.search: Found | None = None  # of the INT8 that keeps a budget

    def guard(self, work: Callable[[], T]) -> T:
        """Does the work unless the case is lost already; remembers what loses it."""
        if self.case.missing:
            raise ToolchainMissing(self.case.missing)
        if self.case.because:
            raise NotSupported(self.case.because)
        if self.failure is not None:
            raise self.failure.with_traceback(None)  # which would grow with every claim, and is formatted for each
        try:
            return work()
        except (WorkerCrash, WorkerTimeout) as error:
            self.failure = error
            raise

    def artifact(self) -> Artifact:
        """The case's artifact; an export that failed fails every claim with the same words."""
        if self.made is None:
            try:
                self.made = self.guard(self._export)
            except ExportgateError as error:
                self.failure = self.failure or error
                raise
        return self.made

    def _export(self) -> Artifact:
        if self.brought is not None:
            return self.brought
        if self.case.id in self.run.failed:
            raise self.run.failed[self.case.id].with_traceback(None)
        if self.case.budget:
            from suites.accuracy import judge, search  # which import this module

            self.search = search.search(self, lambda spec, budget: judge.judged(self, spec, budget), self.case.budget)
            self.spec = self.search.chosen.spec
        artifact = self.run.pool.export(self.spec)
        return self.run.damage(artifact, self.spec) or artifact

    def session(self) -> RemoteSession:
        """The open session of the artifact in the case's runtime.

        Raises:
            NotSupported, ToolchainMissing: the artifact is made here and run elsewhere.
        """
        self.artifact()
        self.case.runtime.check_runs()
        return self._open("", self.artifact(), self.spec)

    def _open(self, name: str, artifact: Artifact, spec: ExportSpec) -> RemoteSession:
        current = self.opened.get(name)
        if current is None or not current.caller.alive:
            runtime, device = self.runtime_of(spec, is_parent=bool(name))
            current = self.opened[name] = self.guard(lambda: self.run.pool.open(artifact, spec, runtime, device))
        return current

    def open_beside(self, spec: ExportSpec) -> RemoteSession:
        """Another request of this case's format, exported and opened in its runtime; who asks closes it."""
        return self.run.pool.open(self.run.pool.export(spec), spec, self.case.runtime.id, self.case.device)

    def runtime_of(self, spec: ExportSpec, is_parent: bool) -> tuple[str, str]:
        """A request's runtime and device: the case's own; a parent's on the CPU, by another program than is judged."""
        if not is_parent:
            return self.case.runtime.id, self.case.device
        chosen = next(r for r in formats.get(spec.format).runtimes if r.device == "cpu")
        return chosen.id, "cpu"

    def facts(self) -> Facts:
        """What the artifact's own files say: told by its session, or where nothing here runs it by who made it."""
        if self.case.runtime.runs:
            return self.describe()
        if self.read is None:
            artifact = self.artifact()
            self.read = self.guard(lambda: self.run.pool.inspect(artifact, self.spec))
        return self.read

    def signature(self) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        """Inputs and outputs: told by the session, or where nothing here runs the file by who reads it.

        Raises:
            NotSupported: its format cannot tell them without a session.
        """
        self.artifact()
        if self.case.runtime.runs or formats.get(self.spec.format).signature is None:
            session = self.session()
            return session.inputs, session.outputs
        facts = self.facts()
        assert facts.signature is not None, facts.signature_error
        inputs, outputs = facts.signature
        names = [o.name for o in self.model.outputs]
        if self.brought is not None and len(outputs) == len(names) and not {o.name for o in outputs} & set(names):
            # What a converter makes of a traced module is called as its trace is: there the place counts.
            outputs = tuple(replace(o, name=name) for o, name in zip(outputs, names, strict=True))
        return inputs, outputs

    def weights(self) -> dict[str, Weight]:
        """The weights that the artifact's files hold; of formats that can tell."""
        artifact = self.artifact()
        return self.guard(lambda: self.run.pool.stored_weights(artifact, self.spec))

    def parameters(self) -> Parameters:
        """The reference's parameters: see RemoteSession.parameters."""
        return self.guard(lambda: self.run.reference(self.model).parameters())

    def describe(self) -> Description:
        """What the session says of itself."""
        session = self.session()
        if self.described is None:
            self.described = self.guard(session.describe)
        return self.described

    def feeds(self) -> list[FeedSet]:
        """The case's feeds, of its batch and image size; what cannot be opened gets none, since they take a minute."""
        self.session()
        return self.feeds_of(self.spec)

    def feeds_of(self, spec: ExportSpec) -> list[FeedSet]:
        """The feeds of a request of this model, whatever there is of it."""
        made = self.guard(lambda: self.run.feeds(spec, spec.batch, spec.imgsz))
        return [f for f in made if not (f.undecided and spec.precision in CALIBRATED)]

    def expected(self, feeds: FeedSet) -> Outputs:
        """The reference's outputs, after the request's suppression where the graph has one."""
        raw = self.raw(feeds)
        return suppressed(raw, self.model, self.spec) if self.spec.nms else raw

    def raw(self, feeds: FeedSet) -> Outputs:
        """The reference's outputs as they are."""
        return self.guard(lambda: self.run.expected(self.model, feeds))

    def same_objects(self, feeds: FeedSet, observed: Outputs) -> Matching | None:
        """The artifact's detections matched with the reference's; None for a model without."""
        if self.spec.nms:
            return matched(self.raw(feeds), observed, self.model, self.spec)
        return same_objects(self.raw(feeds), observed, self.model, self.spec.precision)

    def readable(self, outputs: Mapping[str, Array]) -> Outputs:
        """What the artifact gave; detections of a graph with NMS in the layout of anchors."""
        return as_anchors(outputs, self.model, self.spec) if self.spec.nms else dict(outputs)

    def rounding(self, feeds: FeedSet, precision: Precision, own: bool = True) -> Rounding | None:
        """See Run.rounding; `own` of the case's runtime, else of one that the artifact was made from ran in."""
        terms = self.case.runtime.fp16_terms if own and precision is Precision.FP16 else 0
        made = self.run.rounding(self.model, feeds, precision, terms)
        return made and (lambda draws, rows: self.guard(lambda: made(draws, rows)))

    def outputs(self, feeds: FeedSet) -> Outputs:
        """The artifact's outputs; feeds are cast to the floating type that its inputs have."""
        session = self.session()
        return self.run.kept(
            ("case", self.case.id, session.artifact.root, _key(feeds)),
            lambda: self.readable(self.guard(lambda: session.run(cast(session, feeds.arrays)))),
        )

    def hops(self) -> list[tuple[str, ExportSpec, Artifact]]:
        """The chain from the first artifact to the case's own, as (name, request, artifact)."""
        chain: list[ExportSpec] = [self.spec]
        while self.brought is None and (parents := formats.get(chain[0].format).parents(chain[0])):
            chain.insert(0, parents[0])
        own = self.artifact()
        return [
            (
                f"{s.format} {s.precision.value}" + (" nms" if s.nms else ""),
                s,
                own if s is self.spec else self.guard(lambda s=s: self.run.pool.export(s)),
            )
            for s in chain
        ]

    def hop_session(self, name: str, spec: ExportSpec, artifact: Artifact) -> RemoteSession:
        """The session of one artifact of the chain."""
        return self.session() if spec is self.spec else self._open(name, artifact, spec)

    def hop_outputs(self, name: str, spec: ExportSpec, artifact: Artifact, feeds: FeedSet) -> Outputs:
        """Outputs of one artifact of the chain."""
        if spec is self.spec:
            return self.outputs(feeds)
        session = self.hop_session(name, spec, artifact)
        return self.run.kept(
            ("hop", artifact.key, _key(feeds)), lambda: self.guard(lambda: session.run(cast(session, feeds.arrays)))
        )

    def close(self) -> None:
        for session in self.opened.values():
            session.close()
        self.opened.clear()
        self.outputs_dropped()

    def outputs_dropped(self) -> None:
        """Forgets the case's own outputs; those of parents and references serve the next case."""
        for key in [k for k in self.run.outputs if k[0] == "case" and k[1] == self.case.id]:
            del self.run.outputs[key]


def cast(session: RemoteSession, feeds: Mapping[str, Array]) -> Outputs:
    """Feeds in the floating type that a session's inputs have (the peer's FP16 files take FP16)."""
    types = {i.name: np.dtype(i.dtype) for i in session.inputs}
    return {
        k: v.astype(types[k]) if k in types and v.dtype.kind == "f" and types[k].kind == "f" else v
        for k, v in feeds.items()
    }

"""The INT8 that keeps the accuracy that was asked for, with as few modules in floating point as are found.

Modules are ranked by how much they suffer from 8 bits (`exporters.graph.sensitivity`, on the calibration set); the
shortest beginning of that list that meets the budget on the evaluation set is found by halving, and then each of its
last SPARED modules that the others make needless is quantized after all: no set is proven to be the smallest.

An engine with mixed precisions takes minutes to build, so sets are tried in the ONNX file that it is made from, on the
CPU, and what is found is confirmed in the engine: more is kept until that meets the budget, too.

Each border between 8 and 16 bits costs a conversion. So on a GPU three sets more are looked for that leave one region
of the graph in 8 bits, with one border or two: its beginning, its end, or both stay in floating point. The smallest
that is confirmed and no slower than nothing in INT8 is taken, else the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from exporters import formats
from exporters.formats.onnx import plain
from exporters.measure import MeasurementPlan
from exporters.spec import CALIBRATED, CALIBRATORS, ExportSpec, Precision
from suites.accuracy.budget import Budget
from suites.accuracy.gate import Outcome
from suites.support.bench import Bench, cast
from suites.support.verdict import Verdict

SECONDS = 0.5  # of measurement a step: a figure for the picture, which nothing is gated on
SPARED = 8  # modules that are tried to be quantized after all, those that suffer least first


@dataclass(frozen=True)
class Step:
    """One try: what stayed in floating point, what both accuracy claims say, and the median latency in milliseconds,
    which what was tried in the ONNX file alone has none of."""

    name: str
    spec: ExportSpec
    outcomes: tuple[Outcome, ...]  # by labels where there are any, then by PyTorch's detections
    milliseconds: float | None

    @property
    def outcome(self) -> Outcome:
        """What the search goes by."""
        return self.outcomes[0]

    @property
    def meets(self) -> bool:
        return all(o.verdict is Verdict.PASS for o in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "name": self.name,
            "calibrator": self.spec.calibrator if self.spec.precision is Precision.INT8 else "",
            "kept": list(self.spec.keep),
            "metric": self.outcome.artifact.metric,
            "change": self.outcome.change,
            "low": self.outcome.low,
            "high": self.outcome.high,
            "agreement": self.outcomes[-1].change,
            "meets": self.meets,
            "milliseconds": self.milliseconds,
        }


@dataclass(frozen=True)
class Found:
    """The artifact's steps in the order of the tries, those of its ONNX file, the chosen one, the ranked modules."""

    steps: tuple[Step, ...]
    chosen: Step
    ranked: tuple[str, ...]
    noise: dict[str, dict[str, float]]

    @property
    def nothing(self) -> Step:
        """The one with nothing in 8 bits."""
        return next(s for s in self.steps if s.spec.precision is not Precision.INT8)

    def to_dict(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "share": self.chosen.outcome.budget.allowed,
            "metric": next(iter(self.chosen.outcome.artifact.values)),
            "reference": self.chosen.outcome.reference.metric,
            "chosen": next(n for n, s in enumerate(self.steps) if s is self.chosen),
            "steps": [s.to_dict() for s in self.steps],
            "noise": [
                {"module": m, "alone": self.noise["alone"][m], "joint": self.noise["joint"].get(m)} for m in self.ranked
            ],
        }


def search(case: Bench, judged: Callable[[ExportSpec, Budget], tuple[Outcome, ...]], share: float) -> Found:
    """The least set of modules that has to stay in floating point to keep this share of PyTorch's metric, and of its
    detections.

    Args:
        case: an INT8 case.
        judged: how a request's artifact ends in each of the accuracy claims.
        share: of the FP32 metric.

    The chosen step is the one with the best metric where none meets the budget.
    """
    tries, asked = _Tries(case, judged, share), case.case.spec
    firsts = [tries.rehearse(f"everything in INT8, {c}", asked.but(calibrator=c)) for c in CALIBRATORS]
    # Simpler first: where none meets the budget, another method has to be better by more than the first one's doubt.
    best = max(firsts, key=lambda s: s.outcome.change)
    doubtful = firsts[0] if best.outcome.change <= firsts[0].outcome.high else best
    first = next((s for s in firsts if s.meets), doubtful)
    base = tries.attempt(f"everything in INT8, {first.spec.calibrator}", first.spec)
    fp16 = asked.but(precision=Precision.FP16, data="", split="val", fraction=1.0, keep=())
    nothing = tries.attempt("nothing in INT8 (FP16)", fp16)
    if base.meets:
        return Found(tries.steps, base, (), {})
    noise = case.guard(lambda: case.run.pool.sensitivity(in_onnx(base.spec)))
    worst = {m: max(noise["alone"][m], noise["joint"].get(m, 0.0)) for m in noise["alone"]}
    ranked = sorted(worst, key=lambda m: -worst[m])

    def keeping(tried: Try, modules: Sequence[str], where: str) -> Step:
        kept = tuple(m for m in worst if m in modules)  # in the graph's order: the same set is the same request
        return tried(f"{len(kept)} modules{where} in floating point", base.spec.but(keep=kept))

    orders = {"": ranked}
    if saves_time(case):
        orders |= {" at the start": list(worst), " at the end": list(worst)[::-1], " at the ends": _outside_in(worst)}
    sets: dict[str, list[str]] = {}
    for where, order in orders.items():
        meets = partial(_meets, partial(keeping, tries.rehearse, where=where))
        sets[where] = _fewest(order, meets, 0 if where else SPARED)
    chosen: Step | None = None
    for where in sorted(sets, key=lambda where: len(sets[where])):
        step = _confirmed(orders[where], sets[where], partial(keeping, tries.attempt, where=where))
        chosen = step if step is not None and (chosen is None or _slower(chosen, step)) else chosen
        if chosen is not None and not _slower(chosen, nothing):
            break
    best_of = max((s for s in tries.made if s.spec.precision is Precision.INT8), key=lambda s: s.outcome.change)
    return Found(tries.steps, chosen or best_of, tuple(ranked), noise)


Try = Callable[[str, ExportSpec], Step]


def _meets(keeping: Callable[[Sequence[str]], Step], modules: Sequence[str]) -> bool:
    return keeping(modules).meets


class _Tries:
    """Requests tried in the artifact itself, and those rehearsed in the ONNX file that it is made from, once each."""

    def __init__(self, case: Bench, judged: Callable[[ExportSpec, Budget], tuple[Outcome, ...]], share: float) -> None:
        self.case, self.judged, self.budget = case, judged, Budget(share, True)
        self.is_of_onnx = _is_of_onnx(case.case.spec)
        self.tried, self.rehearsed = dict[str, Step](), dict[str, Step]()

    @property
    def made(self) -> list[Step]:
        """Of the artifact itself."""
        return list(self.tried.values())

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, the artifact's own first."""
        return (*self.tried.values(), *self.rehearsed.values())

    def attempt(self, name: str, spec: ExportSpec) -> Step:
        """A request's artifact, judged and timed."""
        return self._once(self.tried, name, spec, spec)

    def rehearse(self, name: str, spec: ExportSpec) -> Step:
        """The ONNX file that it is made from, judged; the artifact where it is made from none."""
        if not self.is_of_onnx:
            return self.attempt(name, spec)
        return self._once(self.rehearsed, f"{name}, as ONNX on the CPU", spec, in_onnx(spec))

    def _once(self, steps: dict[str, Step], name: str, spec: ExportSpec, judged: ExportSpec) -> Step:
        if repr(spec) not in steps:
            tell, title = self.case.run.pool.progress, f"budget of {self.budget.allowed:g}: {name}"
            tell(title)
            outcomes = self.judged(judged, self.budget)
            step = Step(name, spec, outcomes, _median(self.case, spec) if judged is spec else None)
            tell(f"{title}: {step.outcome.line()}" + (f", {step.milliseconds} ms" if step.milliseconds else ""))
            steps[repr(spec)] = step
        return steps[repr(spec)]


def saves_time(case: Bench) -> bool:
    """On a CPU a lower precision saves memory, not time."""
    return case.case.device != "cpu"


def _slower(step: Step, other: Step) -> bool:
    return step.milliseconds is not None and other.milliseconds is not None and step.milliseconds > other.milliseconds


def _outside_in(noise: Mapping[str, float]) -> list[str]:
    """Modules from both ends of the graph inwards, each time from the end whose half of what is left suffers more."""
    left, taken = list(noise), list[str]()
    while left:
        half = (len(left) + 1) // 2
        is_first = sum(noise[m] for m in left[:half]) >= sum(noise[m] for m in left[-half:])
        taken.append(left.pop(0 if is_first else -1))
    return taken


def _fewest(ranked: Sequence[str], meets: Callable[[Sequence[str]], bool], spared: int = 0) -> list[str]:
    """The shortest beginning of the list that meets the budget, without what the rest makes needless of its last
    modules; empty where none does."""
    low, high = 0, len(ranked) - 1  # none was tried before; of all of them nothing would be quantized
    if high < 1 or not meets(ranked[:high]):
        return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(ranked[:middle]) else (middle, high)
    kept = list(ranked[:high])
    for module in kept[::-1][:spared]:
        fewer = [m for m in kept if m != module]
        if fewer and meets(fewer):
            kept = fewer
    return kept


def _confirmed(ranked: Sequence[str], kept: Sequence[str], keeping: Callable[[Sequence[str]], Step]) -> Step | None:
    """The step of these modules in the artifact itself, or with as many more of the list as that needs: 1, 2, 4 ..."""
    more = 1
    while 0 < len(kept) < len(ranked):
        step = keeping(kept)
        if step.meets:
            return step
        kept, more = [*kept, *[m for m in ranked if m not in kept][:more]], 2 * more
    return None


def _is_of_onnx(spec: ExportSpec) -> bool:
    """Whether the artifact is of another format, made from an ONNX file in 8 bits."""
    parents = formats.get(spec.format).parents(spec)
    return spec.format != "onnx" and any(p.format == "onnx" and p.precision in CALIBRATED for p in parents)


def in_onnx(spec: ExportSpec) -> ExportSpec:
    """The ONNX request in 8 bits that another format's is made from, or one on the same calibration set."""
    if spec.format == "onnx":
        return plain(spec)
    of_module = ExportSpec(spec.model, "onnx", Precision.FP32, spec.imgsz, spec.batch, spec.dynamic)
    parent = next((p for p in formats.get(spec.format).parents(spec) if p.format == "onnx"), of_module)
    names = ("precision", "data", "split", "fraction", "keep")
    return plain(parent.but(**{} if parent.precision in CALIBRATED else {n: getattr(spec, n) for n in names}))


def _median(case: Bench, spec: ExportSpec) -> float:
    """Median milliseconds of an inference of a request's artifact in the case's runtime."""
    pool, runtime, device = case.run.pool, case.case.runtime.id, case.case.device
    session = case.guard(lambda: pool.open(pool.export(spec), spec, runtime, device))
    try:
        feeds = [cast(session, f.arrays) for f in case.feeds_of(spec)[:2]]
        with pool.measuring(device):
            found = case.guard(lambda: session.measure(feeds, MeasurementPlan(seconds=SECONDS)))
        return round(float(np.median(found.milliseconds)), 4)
    finally:
        session.close()

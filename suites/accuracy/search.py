"""The INT8 that keeps the accuracy that was asked for, with as few modules in floating point as are found.

Modules are ranked by how much they suffer from 8 bits (`exporters.graph.sensitivity`, on the calibration set); the
shortest beginning of that list that meets the budget on the evaluation set is found by halving, and then each of its
last SPARED modules that the others make needless is quantized after all: no set is proven to be the smallest.

Each border between 8 and 16 bits costs a conversion. Where the set is no faster than nothing in INT8, one region of the
graph in 8 bits is looked for, which has two borders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    """One try: what stayed in floating point, what both accuracy claims say, and the median latency in milliseconds."""

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
    """Every step in the order of the tries, the chosen one, and the ranked modules."""

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
    budget, tried = Budget(share, True), dict[str, Step]()

    def attempt(name: str, spec: ExportSpec) -> Step:
        key = repr(spec)
        if key not in tried:
            case.run.pool.progress(f"budget of {share:g}: {name}")
            step = tried[key] = Step(name, spec, judged(spec, budget), _median(case, spec))
            case.run.pool.progress(f"budget of {share:g}: {name}: {step.outcome.line()}, {step.milliseconds} ms")
        return tried[key]

    asked = case.case.spec
    firsts = [attempt(f"everything in INT8, {c}", asked.but(calibrator=c)) for c in CALIBRATORS]
    # Simpler first: where none meets the budget, another method has to be better by more than the first one's doubt.
    best = max(firsts, key=lambda s: s.outcome.change)
    doubtful = firsts[0] if best.outcome.change <= firsts[0].outcome.high else best
    base = next((s for s in firsts if s.meets), doubtful)
    noise, ranked = dict[str, dict[str, float]](), tuple[str, ...]()
    chosen: Step | None = base if base.meets else None
    if chosen is None:
        noise = case.guard(lambda: case.run.pool.sensitivity(in_onnx(base.spec)))
        joint = noise["joint"]
        ranked = tuple(sorted(noise["alone"], key=lambda m: -max(noise["alone"][m], joint.get(m, 0.0))))

        def keeping(modules: Sequence[str], where: str = "") -> Step:
            kept = [m for m in noise["alone"] if m in modules]  # in the graph's order: the same set is the same request
            return attempt(f"{len(kept)} modules{where} in floating point", base.spec.but(keep=tuple(kept)))

        chosen = _fewest(ranked, keeping, SPARED)
    fp16 = asked.but(precision=Precision.FP16, data="", split="val", fraction=1.0, keep=())
    nothing = attempt("nothing in INT8 (FP16)", fp16)
    if chosen is not None and ranked and saves_time(case) and _slower(chosen, nothing):
        inwards = _outside_in({m: max(noise["alone"][m], noise["joint"].get(m, 0.0)) for m in noise["alone"]})
        region = _fewest(inwards, lambda modules: keeping(modules, " at the ends"))
        chosen = region if region is not None and _slower(chosen, region) else chosen
    best_of = max((s for s in tried.values() if s.spec.precision is Precision.INT8), key=lambda s: s.outcome.change)
    return Found(tuple(tried.values()), chosen or best_of, ranked, noise)


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


def _fewest(ranked: Sequence[str], keeping: Callable[[Sequence[str]], Step], spared: int = 0) -> Step | None:
    """The step of the shortest beginning of the list that meets the budget, without what the rest makes needless of
    its last modules."""
    low, high = 0, len(ranked) - 1  # none was tried before; of all of them nothing would be quantized
    if high < 1 or not keeping(ranked[:high]).meets:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeping(ranked[:middle]).meets else (middle, high)
    kept = list(ranked[:high])
    for module in kept[::-1][:spared]:
        fewer = [m for m in kept if m != module]
        if fewer and keeping(fewer).meets:
            kept = fewer
    return keeping(kept)


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

"""Latency against the stored baseline, through pytest-benchmark's fixture so that its JSON and histograms work too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from exporters.errors import ExportgateError, MeasurementError, NotSupported
from exporters.session import Execution
from exporters.spec import Precision
from suites.performance.measuring import figures_of, held, in_turns, keep, new_side, of_old, old_side
from suites.support.baseline import GATED
from suites.support.bench import Bench
from suites.support.gate import Gate, percentiles, ratio_of, settle
from suites.support.machine import comparable, fingerprint
from suites.support.verdict import Judged, Verdict

pytestmark = pytest.mark.latency
# The precisions that a lower one has to beat, the next higher one first.
HIGHER = {
    Precision.TF32: (Precision.FP32,),
    Precision.FP16: (Precision.FP32,),
    Precision.BF16: (Precision.FP32,),
    Precision.FP8: (Precision.FP16, Precision.FP32),
    Precision.INT8: (Precision.FP16, Precision.FP32),
}


def test_p50_within_baseline(case: Bench, benchmark: Any) -> None:
    """The median of per-process medians has not slowed down by more than delta, and the gate could have seen it."""
    settings = case.run.project.latency_on(case.case.device)
    new, old = new_side(case), old_side(case)
    in_turns(new, old, settings.processes)
    execution = case.describe().execution
    here = comparable(case.case.device, _versions(case, execution))
    path, baseline = held(case)
    baseline = baseline if old is None else of_old(case, old)
    differences = baseline.differs(here) if baseline is not None and old is None else []
    gate: Gate | None = None
    if baseline is not None and not differences:

        def more() -> list[Sequence[float]] | None:
            return new.milliseconds if in_turns(new, old, settings.processes) else None

        gate = settle(baseline.processes, new.milliseconds, more, settings.delta, settings.must_detect)
    processes, milliseconds = new.processes, [list(p) for p in new.milliseconds]
    figures = keep(case, new, old)
    _replay(benchmark, milliseconds)
    found, notes = percentiles(milliseconds)
    notes += [f"process {i}: warm-up did not settle" for i, p in enumerate(processes) if not p.settled]
    notes += list(dict.fromkeys(note for p in processes for note in p.notes))
    throttled = sorted({reason for p in processes for reason in p.throttled or ()})
    notes += [f"throttled: {', '.join(throttled)}"] if throttled else []
    case.evidence["measurement"] = {
        "unit": "ms",
        "processes": milliseconds,
        **found,
        "warm_up": max(p.warm_up for p in processes),
        "timer": processes[0].timer,
        "threads": execution.threads or fingerprint()["cores"],
        "throttled": bool(throttled) if all(p.throttled is not None for p in processes) else None,
        "notes": notes,
        "conditions": {
            **figures,
            "measured for s": round(new.seconds, 1),
            **{f"GPU before, process {i}": dict(p.before) for i, p in enumerate(processes) if p.before},
            **{f"GPU after, process {i}": dict(p.after) for i, p in enumerate(processes) if p.after},
            "machine": path.parent.name,
            "comparable": here,
        },
    }
    if throttled:
        raise MeasurementError(
            f"the GPU held its clocks down ({', '.join(throttled)}), so this measurement does not stand",
            "measure again on a cool GPU that nobody else uses",
        )
    if baseline is None:
        raise Judged(
            Verdict.NO_BASELINE,
            f"no baseline {path.parent.name}/{path.name}: accept this measurement with "
            "'exportgate baseline accept RUN --reason ...'",
        )
    case.evidence["baseline"] = {
        "path": f"{path.parent.name}/{path.name}" if old is None else str(baseline.path),
        "date": baseline.date,
        "processes": baseline.processes,
        "p50": baseline.p50,
        "reason": baseline.reason,
    }
    if gate is None:
        raise Judged(Verdict.NOT_COMPARABLE, "the baseline was measured elsewhere: " + "; ".join(differences[:3]))
    case.evidence["gate"] = {k: v for k, v in gate.to_dict().items() if k != "verdict"}
    assert gate.verdict is not Verdict.FAIL, f"slower than the baseline: {gate.line()}"
    if gate.verdict is Verdict.INCONCLUSIVE:
        raise Judged(Verdict.INCONCLUSIVE, f"{gate.line()}, after {len(processes)} processes in {new.seconds:.0f} s")


def test_size_load_and_memory_within_baseline(case: Bench) -> None:
    """The artifact has not grown, nor takes it longer to load or more memory than what was accepted."""
    found = figures_of(case)
    path, stored = held(case)
    baseline = case.run.before.get(case.case.id, stored)
    known = {k: v for k, v in baseline.figures.items() if k in found} if baseline is not None else {}
    if not known:
        raise Judged(
            Verdict.NO_BASELINE,
            f"no baseline {path.parent.name}/{path.name} with a size: accept this run with "
            "'exportgate baseline accept RUN --reason ...'",
        )
    lines = [line for name, before in known.items() if (line := GATED[name].grown(name, before, found[name]))]
    assert not lines, "; ".join(lines)


def test_faster_than_the_next_precision(case: Bench) -> None:
    """On a GPU a lower precision pays for its accuracy with speed: measured in this run, beside the next higher one."""
    if case.case.device == "cpu":
        raise NotSupported("on a CPU a lower precision saves memory, not time")
    if case.spec.precision not in HIGHER:
        raise NotSupported(f"{case.spec.precision} is the highest precision that is measured")
    if case.case.id not in case.run.measured:
        raise NotSupported("this case was not measured in this run")
    for precision in HIGHER[case.spec.precision]:
        other = case.case.sibling(precision)
        theirs = case.run.measured.get(other)
        if theirs is None:
            continue
        ours = case.run.measured[case.case.id]
        found = ratio_of(theirs, ours)
        line = f"ratio to {other} {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"
        # One process a side has no spread: what this project calls no slow-down is INCONCLUSIVE then, and no FAIL.
        sure = len(theirs) > 1 or len(ours) > 1 or found.ratio > 1 + case.run.project.latency_on(case.case.device).delta
        assert found.low <= 1.0 or not sure, f"slower: {line}"
        if found.ratio > 1.0:
            raise Judged(Verdict.INCONCLUSIVE, f"it may be slower: {line}")
        return
    raise NotSupported("no higher precision of this case was measured in this run before it")


def _versions(case: Bench, execution: Execution) -> dict[str, str]:
    """Versions that a latency depends on: of the runtime, and on a CPU of what is loaded beside it."""
    own = {execution.runtime: execution.version}
    if case.case.device != "cpu":
        return own
    return {k: str(v) for k, v in case.artifact().toolchain.get("packages", {}).items()} | own


def _replay(benchmark: Any, milliseconds: list[list[float]]) -> None:
    """Hands the worker's samples to pytest-benchmark: a timer that advances by one sample a round.

    Raises:
        ExportgateError: the fixture is disabled (xdist, --benchmark-disable), so nothing would be recorded.
    """
    if benchmark.disabled:
        raise ExportgateError(
            "pytest-benchmark is disabled, so this measurement would not be recorded",
            "run latency without -n and without --benchmark-disable",
        )
    samples = [m / 1e3 for process in milliseconds for m in process]
    clock = _clock(samples)
    benchmark._timer = lambda: next(clock)  # the fixture takes a timer by option only
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1, warmup_rounds=0)


def _clock(samples: list[float]) -> Iterator[float]:
    """Start and end of each sample, in seconds."""
    now = 0.0
    for sample in samples:
        yield now
        now += sample
        yield now
    while True:  # pytest-benchmark asks for the precision of its timer
        now += 1e-9
        yield now

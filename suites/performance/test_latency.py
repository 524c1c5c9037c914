"""Latency against the stored baseline, through pytest-benchmark's fixture so that its JSON and histograms work too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from exporters.errors import ExportgateError
from exporters.measure import MeasurementPlan, Samples
from suites.support.baseline import baseline_path, read_baseline
from suites.support.bench import Bench, cast
from suites.support.gate import NEEDED, Gate, judge, percentiles
from suites.support.machine import comparable, fingerprint
from suites.support.verdict import Judged, Verdict

pytestmark = pytest.mark.latency
ROUNDS = 3  # of so many processes, before an interval that straddles the limit is INCONCLUSIVE


def test_p50_within_baseline(case: Bench, benchmark: Any) -> None:
    """The median of per-process medians has not slowed down by more than delta, and the gate could have seen it."""
    settings = case.run.project.latency
    processes = _processes(case, 0)
    execution = case.describe().execution
    packages = {k: str(v) for k, v in case.artifact().toolchain.get("packages", {}).items()} | {
        execution.runtime: execution.version
    }
    here = comparable(fingerprint(), packages)
    path = baseline_path(case.run.project.baselines, str(fingerprint()["id"]), case.case.id)
    baseline = read_baseline(path)
    differences = baseline.differs(here) if baseline is not None else []
    gate: Gate | None = None
    if baseline is not None and not differences:

        def judged() -> Gate:
            return judge(baseline.processes, [p.milliseconds for p in processes], settings.delta, settings.must_detect)

        gate = judged()
        while gate.verdict is Verdict.INCONCLUSIVE and len(processes) < ROUNDS * settings.processes:
            processes += _processes(case, len(processes))
            gate = judged()
    milliseconds = [list(p.milliseconds) for p in processes]
    _replay(benchmark, milliseconds)
    found, notes = percentiles(milliseconds)
    notes += [f"process {i}: warm-up did not settle" for i, p in enumerate(processes) if not p.settled]
    case.evidence["measurement"] = {
        "unit": "ms",
        "processes": milliseconds,
        **found,
        "warm_up": max(p.warm_up for p in processes),
        "timer": processes[0].timer,
        "threads": execution.threads or fingerprint()["cores"],
        "throttled": None,
        "notes": notes,
        "conditions": {
            "first call ms": round(float(np.median([p.first_call for p in processes])), 3),
            "peak RSS MiB": round(max(p.peak_rss for p in processes) / 2**20),
            "comparable": here,
        },
    }
    if baseline is None:
        raise Judged(
            Verdict.NO_BASELINE,
            f"no baseline {path.parent.name}/{path.name}: accept this measurement with "
            "'exportgate baseline accept RUN --reason ...'",
        )
    case.evidence["baseline"] = {
        "path": f"{path.parent.name}/{path.name}",
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
        raise Judged(Verdict.INCONCLUSIVE, f"{gate.line()}, after {len(processes)} processes")


def _processes(case: Bench, done: int) -> list[Samples]:
    """As many replicates as the project asks for, numbered after those that are done."""
    settings = case.run.project.latency
    return [_process(case, n, settings.seconds) for n in range(done + 1, done + settings.processes + 1)]


def _process(case: Bench, number: int, seconds: float) -> Samples:
    """One replicate: a fresh process that opens the artifact and measures."""
    pool, runtime, device = case.run.pool, case.case.runtime.id, case.case.device
    artifact, feeds = case.artifact(), case.feeds()[:2]
    try:
        session = case.guard(lambda: pool.open(artifact, case.spec, runtime, device, number))
        try:
            return case.guard(
                lambda: session.measure(
                    [cast(session, f.arrays) for f in feeds],
                    MeasurementPlan(seconds=seconds, inferences=-(-NEEDED[50] // case.run.project.latency.processes)),
                )
            )
        finally:
            session.close()
    finally:
        pool.retire(case.spec, runtime, device, number)


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

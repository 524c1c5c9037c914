"""How a case is measured: processes of its own, in turns with the artifact that it is to replace where there is one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import Artifact
from exporters.errors import NotSupported
from exporters.measure import MeasurementPlan, Samples
from exporters.pool import Pool
from suites.accuracy.judge import against_labels
from suites.accuracy.pictures import found_in, shown_to
from suites.support.baseline import GATED, Accuracy, Baseline, baseline_path, read_baseline
from suites.support.bench import Bench, cast
from suites.support.gate import NEEDED
from suites.support.machine import baseline_folder

LONGEST = 60.0  # seconds that a case is measured for, where the first round of processes does not take longer


@dataclass
class Side:
    """An artifact that is measured in one fresh process after the other; loads are in milliseconds.

    `seconds` is how long that took, without waiting for other runs.
    """

    case: Bench
    pool: Pool
    artifact: Artifact
    processes: list[Samples] = field(default_factory=list[Samples])
    milliseconds: list[Sequence[float]] = field(default_factory=list[Sequence[float]])
    loads: list[float] = field(default_factory=list[float])
    seconds: float = 0.0

    def measure(self) -> None:
        """One process more, which opens the artifact and measures."""
        case, runtime, device = self.case, self.case.case.runtime, self.case.case.device
        runtime.check_runs()
        if runtime.untimed:
            raise NotSupported(runtime.untimed)
        settings = case.run.project.latency_on(device)
        feeds, number = case.feeds_of(case.spec)[:2], len(self.processes) + 1
        plan = MeasurementPlan(seconds=settings.seconds, inferences=-(-NEEDED[50] // settings.processes))
        with self.pool.measuring(device) as notes:  # from the opening on, which would disturb who measures
            begun = time.monotonic()
            try:
                session = case.guard(lambda: self.pool.open(self.artifact, case.spec, runtime.id, device, number))
                try:
                    made = case.guard(lambda: session.measure([cast(session, f.arrays) for f in feeds], plan))
                finally:
                    session.close()
            finally:
                self.pool.retire(case.spec, runtime.id, device, number)
                self.seconds += time.monotonic() - begun
        self.processes.append(replace(made, notes=(*made.notes, *notes)))
        self.milliseconds.append(made.milliseconds)
        self.loads.append(session.load_ms)

    def figures(self) -> dict[str, Any]:
        """What is said beside latency: medians over the processes, and the largest memory."""
        files = [self.artifact.root / f.path for f in self.artifact.files] or [self.artifact.path]
        first = self.processes[0].figures
        return {
            "first call ms": round(float(np.median([p.first_call for p in self.processes])), 3),
            "load ms": round(float(np.median(self.loads)), 3),
            "artifact MiB": round(sum(f.stat().st_size for f in files) / 2**20, 3),
            "peak memory MiB": round(max(p.peak_rss for p in self.processes) / 2**20, 1),
            **{k: round(float(np.median([p.figures[k] for p in self.processes if k in p.figures])), 4) for k in first},
        }


def new_side(case: Bench) -> Side:
    """The case's artifact."""
    return Side(case, case.run.pool, case.artifact())


def old_side(case: Bench) -> Side | None:
    """The same request's artifact of the toolchain that is to be replaced, where an upgrade is judged."""
    old = case.run.old
    return None if old is None else Side(case, old, case.guard(lambda: old.export(case.spec)))


def in_turns(new: Side, old: Side | None, count: int) -> bool:
    """`count` processes more of each side, in the order A B B A, so that what drifts meets both alike.

    False, and none, where the case would be measured for more than LONGEST by that.
    """
    spent = sum(side.seconds for side in (new, old) if side is not None)
    if new.processes and spent * (1 + count / len(new.processes)) > LONGEST:
        return False
    for number in range(count):
        for side in (old, new) if number % 2 else (new, old):
            if side is not None:
                side.measure()
    return True


def keep(case: Bench, new: Side, old: Side | None) -> dict[str, Any]:
    """What both sides were measured at, for the next claim; the figures of the new one."""
    case.run.measured[case.case.id] = [list(p) for p in new.milliseconds]
    figures = case.run.figures[case.case.id] = new.figures() | dict(case.describe().execution.figures)
    if old is not None:
        case.run.before[case.case.id] = of_old(case, old)
    return figures


def figures_of(case: Bench) -> dict[str, Any]:
    """What the case was measured at, in this run or now."""
    if case.case.id not in case.run.figures:
        new, old = new_side(case), old_side(case)
        in_turns(new, old, case.run.project.latency_on(case.case.device).processes)
        keep(case, new, old)
    return case.run.figures[case.case.id]


def held(case: Bench) -> tuple[Path, Baseline | None]:
    """Where the case's baseline of this machine is, and what it says."""
    path = baseline_path(case.run.project.baselines, baseline_folder(case.case.device), case.case.id)
    return path, read_baseline(path)


def of_old(case: Bench, old: Side) -> Baseline:
    """What the old toolchain's artifact was measured at, in the place of a stored baseline."""
    packages: Mapping[str, str] = old.artifact.toolchain.get("packages", {})
    words = ", ".join(f"{k} {v}" for k, v in packages.items())
    figures = {k: float(v) for k, v in old.figures().items() if k in GATED}
    day = datetime.now(UTC).date().isoformat()
    return Baseline(case.case.id, Path(str(old.pool.environment)), day, words, {}, old.milliseconds, figures, None)


def metric_of_old(case: Bench, old: Pool) -> Accuracy:
    """The metric of the old toolchain's artifact on the same pictures."""
    artifact = case.guard(lambda: old.export(case.spec))
    session = case.guard(lambda: old.open(artifact, case.spec, case.case.runtime.id, case.case.device))
    try:
        found = found_in(case, session, case.spec, shown_to(case))
    finally:
        session.close()
    outcome = against_labels(case, found, case.run.project.accuracy[case.spec.precision])
    name = next(iter(outcome.artifact.values))
    return Accuracy(name, outcome.artifact.metric, outcome.reference.metric, shown_to(case).digest)

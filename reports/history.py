"""Many runs, oldest first: how each case's latency, error, metric and size went, and each run's verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from exporters.errors import BadRequest
from reports.comparison import artifact_bytes
from reports.findings import share
from reports.latency import machine, measured, point
from reports.markdown import LIMIT, code, text, within
from reports.record import Row, Run, Summary, merge, refuse_twice
from reports.wording import MISSING, change, milliseconds, moment, number, sentence, size

ERROR, BYTES = "worst error ÷ allowed", "size"
# Bytes of Markdown for the table of runs; the cases have the rest. Values of one figure that a line of it shows.
RUNS, SHOWN = 12_000, 8


@dataclass(frozen=True)
class Point:
    """A figure in one run, with its interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of a case: for each run a point, or None where the run has none; `shown` writes a value as text."""

    what: str
    points: tuple[Point | None, ...]
    shown: Callable[[float], str]

    def cell(self, run: int) -> str:
        """The value in a run with its interval, as text."""
        found = self.points[run]
        if found is None:
            return MISSING
        if found.low is None or found.high is None:
            return self.shown(found.value)
        return f"{self.shown(found.value)} ({self.shown(found.low)} to {self.shown(found.high)})"


@dataclass(frozen=True)
class Course:
    """A case over all runs: its row in each, the machine that each row is of (None: not part of that run), figures."""

    case: str
    rows: tuple[Row | None, ...]
    machines: tuple[str | None, ...]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class History:
    """The runs, oldest first, each as a summary of its own; the machines in the order in which they appear."""

    runs: tuple[Summary, ...]
    cases: tuple[Course, ...]
    machines: tuple[str, ...]

    @property
    def headline(self) -> str:
        """How many runs, from when to when, and their first and last verdict, in one line."""
        first, last = self.runs[0], self.runs[-1]
        since, until = (moment(side.runs[0].start.time) for side in (first, last))
        places = f"{len(self.machines)} machine{'' if len(self.machines) == 1 else 's'}"
        return f"{first.verdict} -> {last.verdict}: {len(self.runs)} runs on {places}, {since} to {until}"

    def letter(self, name: str) -> str:
        """The short name of a machine: A, B, ..., after Z its number."""
        index = self.machines.index(name)
        return chr(ord("A") + index) if index < 26 else str(index + 1)


def history(runs: Sequence[Run]) -> History:
    """The runs by the time in their records.

    Raises:
        BadRequest: fewer than two runs, one that is given twice, or a time that cannot be read.
    """
    if len(runs) < 2:
        raise BadRequest(
            f"--history takes two runs or more, and {len(runs)} given" + "".join(f": '{run.path}'" for run in runs),
            "name the folders of earlier runs as well",
        )
    refuse_twice(runs)
    sides = [merge([run]) for run in sorted(runs, key=_when)]
    found: dict[str, list[Row | None]] = {}
    for index, side in enumerate(sides):
        for row in side.rows:
            found.setdefault(row.case.case, [None] * len(sides))[index] = row
    places = [_machines(side) for side in sides]
    cases = tuple(_course(case, rows, places) for case, rows in found.items())
    names = dict.fromkeys(name for at in zip(*(c.machines for c in cases), strict=True) for name in at if name)
    hosts = dict.fromkeys(side.runs[0].machine for side in sides)
    return History(tuple(sides), cases, tuple(names or hosts))


def _when(run: Run) -> datetime:
    try:
        told = datetime.fromisoformat(run.start.time)
    except ValueError:
        raise BadRequest(
            f"{run.path}:1: the run's time is {run.start.time[:40]!r}, which orders it among no others",
            "it must be as 2026-11-22T17:05:01Z",
        ) from None
    return told if told.tzinfo else told.replace(tzinfo=UTC)


def _machines(side: Summary) -> dict[str, str]:
    """What each device of a run is called: a row that was not measured is of the same GPU as those that were."""
    return {row.case.device: machine(row) for row in side.rows if measured(row)}


def _course(case: str, rows: Sequence[Row | None], places: Sequence[dict[str, str]]) -> Course:
    machines = tuple(
        at.get(row.case.device, row.run.machine) if row else None for row, at in zip(rows, places, strict=True)
    )
    figures = [Figure("p50 ms", tuple(map(_p50, rows)), milliseconds), Figure(ERROR, tuple(map(_error, rows)), number)]
    figures += _metrics(rows)
    figures.append(Figure(BYTES, tuple(map(_bytes, rows)), lambda value: size(int(value))))
    return Course(case, tuple(rows), machines, tuple(figure for figure in figures if any(figure.points)))


def _p50(row: Row | None) -> Point | None:
    found = point(row) if row else None
    return Point(found.value, found.low, found.high) if found and found.value is not None else None


def _error(row: Row | None) -> Point | None:
    compared = [entry for claim in row.claims.values() for entry in claim.comparisons] if row else []
    shares = [found for entry in compared if (found := share(entry)) is not None]
    return Point(max(shares)) if shares else None


def _bytes(row: Row | None) -> Point | None:
    found = artifact_bytes(row) if row else None
    return Point(found) if found else None


def _metrics(rows: Sequence[Row | None]) -> Iterator[Figure]:
    """A figure for each claim that judged a metric: F1 against labels and agreement without them are two."""
    judged: dict[tuple[str, str], list[Point | None]] = {}
    for index, row in enumerate(rows):
        for name, claim in row.claims.items() if row else ():
            value = claim.accuracy.artifact.get(claim.accuracy.metric) if claim.accuracy else None
            if claim.accuracy and value is not None:
                judged.setdefault((claim.accuracy.metric, name), [None] * len(rows))[index] = Point(value)
    for (metric, name), points in judged.items():
        yield Figure(f"{metric}, {sentence(name)}", tuple(points), number)


def render(found: History) -> str:
    """As Markdown, small enough for a comment: a line for each figure of each case on each machine."""
    lines = [f"## {text(found.headline, 400)}", ""]
    lines += ["| run | time | machine | verdict | claims |", "| --- | --- | --- | --- | --- |"]
    lines += within(RUNS, map(_run, reversed(found.runs)), "runs")
    lines += ["", "### Cases, oldest run first", "", "| case | figure | machine | values | change |"]
    lines += ["| --- | --- | --- | --- | ---: |"]
    lines += within(LIMIT - RUNS - 1000, (line for course in found.cases for line in _lines(course)), "figures")
    return "\n".join(lines) + "\n"


def _run(side: Summary) -> str:
    run = side.runs[0]
    told = ", ".join(f"{count} {word}" for word, count in side.counts.items()) or MISSING
    return (
        f"| {code(run.start.run, 60)} | {text(moment(run.start.time), 40)} | {text(run.machine, 60)} "
        f"| {text(side.verdict)} | {text(told)} |"
    )


def _lines(course: Course) -> Iterator[str]:
    for figure in course.figures:
        for name in dict.fromkeys(filter(None, course.machines)):
            values = [p.value for p, m in zip(figure.points, course.machines, strict=True) if p and m == name]
            if not values:
                continue
            kept = [figure.shown(value) for value in values]
            kept = kept if len(kept) <= SHOWN else [kept[0], "…", *kept[2 - SHOWN :]]
            ratio = values[-1] / values[0] if len(values) > 1 and values[0] > 0 else math.nan
            moved = change(ratio) if math.isfinite(ratio) else MISSING
            yield (
                f"| {code(course.case, 120)} | {text(figure.what, 80)} | {text(name, 60)} | {' → '.join(kept)} "
                f"| {moved} |"
            )

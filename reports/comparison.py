"""Two runs beside each other: what got worse, what better, what appeared and what vanished; latency, accuracy, size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from reports.accuracy import scores
from reports.events import FAILING, GOOD, Verdict
from reports.latency import measured
from reports.markdown import code, text
from reports.record import Row, Summary
from reports.wording import MISSING, change, milliseconds, number, sentence, size

WORTH = 0.005  # a figure's change from which it is listed, as a share


@dataclass(frozen=True)
class Change:
    """A claim whose verdict is another one; `before` or `after` is "" where it is in one of the runs only."""

    case: str
    claim: str
    before: str
    after: str
    because: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of a case in both runs, as text, and their ratio (after / before)."""

    case: str
    what: str
    before: str
    after: str
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """What is different, each list in the order of the runs; figures by how much they changed."""

    before: Summary
    after: Summary
    worse: tuple[Change, ...]
    better: tuple[Change, ...]
    other: tuple[Change, ...]
    appeared: tuple[Change, ...]
    vanished: tuple[Change, ...]
    figures: tuple[Figure, ...]
    apart: str  # why latencies are not compared, or ""

    @property
    def headline(self) -> str:
        """How many of each, in one line."""
        counts = {
            "worse": self.worse,
            "better": self.better,
            "otherwise": self.other,
            "appeared": self.appeared,
            "vanished": self.vanished,
        }
        told = ", ".join(f"{len(found)} {word}" for word, found in counts.items())
        return f"{self.before.verdict} -> {self.after.verdict}: {told}"

    @property
    def is_worse(self) -> bool:
        """Whether something that held does not hold any more, or is no longer asked."""
        return bool(self.worse) or any(change.before in GOOD for change in self.vanished)


def compare(before: Summary, after: Summary) -> Comparison:
    """The second run against the first. A case that ran several times counts by its last row."""
    one, two = _claims(before), _claims(after)
    pairs = [
        Change(case, claim, one[case, claim][0], two[case, claim][0], two[case, claim][1])
        for case, claim in two
        if (case, claim) in one and one[case, claim][0] != two[case, claim][0]
    ]
    apart = _apart(before, after)
    return Comparison(
        before,
        after,
        worse=tuple(p for p in pairs if _rank(p.after) < _rank(p.before)),
        better=tuple(p for p in pairs if _rank(p.after) > _rank(p.before)),
        other=tuple(p for p in pairs if _rank(p.after) == _rank(p.before)),
        appeared=tuple(Change(*key, "", *two[key]) for key in two if key not in one),
        vanished=tuple(Change(*key, one[key][0], "") for key in one if key not in two),
        figures=tuple(sorted(_figures(before, after, apart), key=lambda f: -abs(math.log(f.ratio)))),
        apart=apart,
    )


def _claims(summary: Summary) -> dict[tuple[str, str], tuple[Verdict, str]]:
    return {
        (row.case.case, name): (claim.verdict, claim.because)
        for row in summary.rows
        for name, claim in row.claims.items()
    }


def _rank(verdict: str) -> int:
    return 0 if verdict in FAILING else 2 if verdict in GOOD else 1


def _apart(before: Summary, after: Summary) -> str:
    machines = [sorted({run.machine for run in side.runs}) for side in (before, after)]
    return "" if machines[0] == machines[1] else f"measured on {', '.join(machines[0])} and on {', '.join(machines[1])}"


def _figures(before: Summary, after: Summary, apart: str) -> Iterator[Figure]:
    rows = {row.case.case: row for row in before.rows}
    metrics = {(s.row.case.case, s.claim.claim): s.accuracy for s in scores(before)}
    for row in after.rows:
        other = rows.get(row.case.case)
        if other is None:
            continue
        case = row.case.case
        if not apart:
            yield from _figure(case, "p50 ms", _p50(other), _p50(row), milliseconds)
        yield from _figure(case, "size", artifact_bytes(other), artifact_bytes(row), lambda v: size(int(v or 0)))
    for score in scores(after):
        old, new = metrics.get((score.row.case.case, score.claim.claim)), score.accuracy
        if old and old.metric == new.metric:
            what = f"{new.metric}, {sentence(score.claim.claim)}"
            yield from _figure(
                score.row.case.case, what, old.artifact.get(old.metric), new.artifact.get(new.metric), number
            )


def _figure(
    case: str, what: str, before: float | None, after: float | None, shown: Callable[[float | None], str]
) -> Iterator[Figure]:
    if before and after and before > 0 and after > 0 and abs(after / before - 1) >= WORTH:
        yield Figure(case, what, shown(before), shown(after), after / before)


def _p50(row: Row) -> float | None:
    claim = measured(row)
    point = claim.measurement.p50 if claim and claim.measurement else None
    return point.value if point else None


def artifact_bytes(row: Row) -> float | None:
    """Size of a case's artifact with all its files; None where the record has none."""
    return float(sum(file.bytes for file in row.case.hops[-1].files)) if row.case.hops else None


def sections(found: Comparison) -> list[tuple[str, Sequence[Change]]]:
    """The lists of changes with their headings, empty ones left out."""
    named = [
        ("Worse", found.worse),
        ("Vanished", found.vanished),
        ("Better", found.better),
        ("Changed otherwise", found.other),
        ("Appeared", found.appeared),
    ]
    return [(heading, changes) for heading, changes in named if changes]


def render(found: Comparison) -> str:
    """As Markdown."""
    lines = [f"## {text(found.headline, 400)}", ""]
    for summary, word in ((found.before, "Before"), (found.after, "After")):
        runs = ", ".join(code(run.start.run) for run in summary.runs)
        lines.append(f"{word}: {runs}: {text(summary.headline, 400)}  ")
    for heading, changes in sections(found):
        lines += ["", f"### {heading}", "", "| case | claim | before | after | |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {code(c.case)} | {text(sentence(c.claim))} | {c.before or MISSING} | {c.after or MISSING} | "
            f"{text(c.because)} |"
            for c in changes
        ]
    if found.apart:
        lines += ["", f"Latencies are not compared: {text(found.apart)}."]
    if found.figures:
        lines += [
            "",
            "### Figures",
            "",
            "| case | figure | before | after | change |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {code(f.case)} | {text(f.what)} | {f.before} | {f.after} | {change(f.ratio)} |" for f in found.figures
        ]
    return "\n".join(lines) + "\n"

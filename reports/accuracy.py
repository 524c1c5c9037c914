"""Accuracy as a table: each case's metric beside PyTorch's, with the latency that it is paid for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reports.events import Accuracy, Claim
from reports.latency import measured
from reports.record import Row, Summary


@dataclass(frozen=True)
class Score:
    """A claim that judged a task's metric; `p50` in milliseconds where the case was measured."""

    row: Row
    claim: Claim
    accuracy: Accuracy
    p50: float | None


def scores(summary: Summary) -> tuple[Score, ...]:
    """Every claim about a task's metric, in the order of the matrix."""
    return tuple(_scores(summary))


def _scores(summary: Summary) -> Iterator[Score]:
    for row in summary.rows:
        timed = measured(row)
        point = timed.measurement.p50 if timed and timed.measurement else None
        for claim in row.claims.values():
            if claim.accuracy:
                yield Score(row, claim, claim.accuracy, point.value if point else None)

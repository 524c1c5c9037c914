"""Latencies as tables: one for each machine and device, PyTorch's own row first, the others relative to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from reports.events import Claim, Measurement, Percentile
from reports.record import Row, Summary

# Lower in this order costs accuracy, so it should at least be faster than what stands before it.
_PRECISIONS = ("fp32", "fp16", "int8")
# Options that only a precision brings along: how INT8 is calibrated.
_OF_THE_PRECISION = frozenset({"precision", "data", "split", "fraction", "trt_quant_algo"})


@dataclass(frozen=True)
class Timing:
    """One measured case; `speed_up` is relative to PyTorch on the same model, input and device, if measured."""

    row: Row
    claim: Claim
    measurement: Measurement
    speed_up: float | None
    note: str
    share: float

    @property
    def p50(self) -> float | None:
        return self.measurement.p50.value if self.measurement.p50 else None


@dataclass(frozen=True)
class Board:
    """The measured cases of one machine and device; `share` of each timing is relative to the slowest, 0 to 1."""

    machine: str
    device: str
    timings: tuple[Timing, ...]


def boards(summary: Summary) -> tuple[Board, ...]:
    """A table for each machine and device on which anything was measured."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in summary.rows:
        if measured(row):
            groups.setdefault((row.where or machine(row), row.case.device), []).append(row)
    return tuple(Board(machine, device, tuple(_timings(rows))) for (machine, device), rows in groups.items())


def machine(row: Row) -> str:
    """What the baselines' folder is named after: of a GPU, the GPU; the host says nothing of how fast that is."""
    claim = measured(row)
    found = claim.measurement.conditions.get("machine") if claim and claim.measurement else None
    return str(found or row.run.machine)


def measured(row: Row) -> Claim | None:
    """The claim of a row that carries its latency: the gated one where there are several."""
    carriers = [claim for claim in row.claims.values() if claim.measurement]
    return next((claim for claim in carriers if claim.gate), carriers[0] if carriers else None)


def _timings(rows: Sequence[Row]) -> Iterator[Timing]:
    ordered = sorted(rows, key=lambda row: row.case.format != "pytorch")
    eager = {_input(row): _p50(row) for row in ordered if row.case.format == "pytorch" and row.case.precision == "fp32"}
    siblings: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in ordered:
        siblings.setdefault(_kind(row), {})[row.case.precision] = row
    slowest = max((value for row in ordered if (value := _p50(row)) is not None), default=0.0)
    for row in ordered:
        claim = measured(row)
        if claim is None or claim.measurement is None:
            continue
        own, theirs = _p50(row), eager.get(_input(row))
        speed_up = theirs / own if theirs and own else None
        share = own / slowest if own and slowest else 0.0
        yield Timing(row, claim, claim.measurement, speed_up, _slower_for_less(row, siblings[_kind(row)]), share)


def point(row: Row) -> Percentile | None:
    """The median latency of a row with its interval, if it was measured."""
    claim = measured(row)
    return claim.measurement.p50 if claim and claim.measurement else None


def _p50(row: Row) -> float | None:
    found = point(row)
    return found.value if found and found.value is not None and math.isfinite(found.value) else None


def _input(row: Row) -> tuple[str, ...]:
    """What has to be equal for two latencies to be those of the same work."""
    return (row.case.model, *(repr(row.case.spec.get(key)) for key in ("imgsz", "batch")))


def _kind(row: Row) -> tuple[str, ...]:
    """What two cases share that differ in their precision alone, and so may be compared for what it brings."""
    options = {key: value for key, value in row.case.spec.items() if key not in _OF_THE_PRECISION}
    return (row.case.model, row.case.format, row.case.runtime, repr(sorted(options.items())))


def _slower_for_less(row: Row, siblings: Mapping[str, Row]) -> str:
    """Says when a lower precision is slower than a higher one, beyond both confidence intervals."""
    own, precision = point(row), row.case.precision
    if precision not in _PRECISIONS or own is None or own.low is None:
        return ""
    for higher in reversed(_PRECISIONS[: _PRECISIONS.index(precision)]):
        theirs = point(siblings[higher]) if higher in siblings else None
        if theirs and theirs.high is not None and own.low > theirs.high:
            return f"slower than {higher}: accuracy paid for nothing"
    return ""

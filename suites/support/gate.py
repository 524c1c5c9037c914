"""The latency gate: candidate against baseline by per-process medians, with a bootstrap interval and its power."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exporters.errors import BadRequest, MeasurementError
from suites.support.verdict import Verdict

RESAMPLES = 4000
ROUNDS = 5  # of so many processes, before an interval that straddles the limit is INCONCLUSIVE
# Inferences that a percentile needs, so that its 99 % confidence interval lies within the sample (order statistics).
NEEDED = {50: 10, 90: 64, 95: 130, 99: 662}


@dataclass(frozen=True)
class Gate:
    """Ratio candidate / baseline of medians with a 95 % interval; `mde` is the slow-down that the gate can detect."""

    ratio: float
    low: float
    high: float
    delta: float
    mde: float
    must_detect: float | None
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        return {k: (v.value if isinstance(v, Verdict) else v) for k, v in asdict(self).items()}

    def line(self) -> str:
        return (
            f"ratio to the baseline {self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}], allowed {1 + self.delta:.3f}; "
            f"a slow-down of {self.mde * 100:.1f} % would be noticed"
        )


def judge(
    baseline: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    delta: float,
    must_detect: float | None = None,
) -> Gate:
    """FAIL where the interval's lower end exceeds 1 + delta, PASS where its upper end is below, else INCONCLUSIVE.

    Args:
        baseline, candidate: milliseconds of single inferences, one sequence a process (the unit of replication).
        delta: slow-down that is let pass.
        must_detect: slow-down that has to be noticed; refused where the minimum detectable effect is larger.
    """
    a = np.array([float(np.median(p)) for p in baseline if p])
    b = np.array([float(np.median(p)) for p in candidate if p])
    if len(a) < 2 or len(b) < 1:
        raise MeasurementError(
            f"the gate has {len(a)} baseline and {len(b)} candidate processes",
            "a baseline needs at least two, a candidate one",
        )
    # One candidate process is as likely to be off as one of the baseline's: their spread stands for its own.
    spreads = [_cv(x) ** 2 for x in (a, b) if len(x) > 1]
    cv = math.sqrt(sum(spreads) / len(spreads))
    mde = detectable(cv, len(a), len(b), delta)
    if must_detect is not None and must_detect < mde:
        raise BadRequest(
            f"[latency] must_detect = {must_detect:g} lies below what {len(a)} + {len(b)} processes "
            f"can detect ({mde:.3f})",
            "measure more processes, on a quieter machine, or ask for less",
        )
    found = ratio_of(baseline, candidate)
    limit = 1 + delta
    verdict = Verdict.FAIL if found.low > limit else Verdict.PASS if found.high <= limit else Verdict.INCONCLUSIVE
    return Gate(found.ratio, found.low, found.high, delta, mde, must_detect, verdict)


def detectable(cv: float, baseline: int, candidate: int, delta: float) -> float:
    """The minimum detectable effect of so many processes a side, whose medians have this coefficient of variation.

    Source: delta + 2.8 CV sqrt(1/n_b + 1/n_c), 80 % power at 5 % error (1.96 + 0.84).
    """
    return delta + 2.8 * cv * math.sqrt(1 / baseline + 1 / candidate)


def settle(
    baseline: Sequence[Sequence[float]],
    first: Sequence[Sequence[float]],
    more: Callable[[], Sequence[Sequence[float]] | None],
    delta: float,
    must_detect: float | None = None,
) -> Gate:
    """Judges a candidate, and measures more of it while the interval straddles the limit, in ROUNDS rounds at most.

    Looking again raises the rate of false alarms a little: what it then is, `test_error_rates` says.

    Args:
        first: the first round of processes.
        more: measures another one; returns all of them so far, or None where there is no time for more.
    """
    gate = judge(baseline, first, delta, must_detect)
    for _ in range(ROUNDS - 1):
        processes = more() if gate.verdict is Verdict.INCONCLUSIVE else None
        if processes is None:
            break
        gate = judge(baseline, processes, delta, must_detect)
    return gate


@dataclass(frozen=True)
class Ratio:
    """Candidate / baseline of medians of per-process medians, with a 95 % bootstrap interval over processes."""

    ratio: float
    low: float
    high: float


def ratio_of(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Ratio:
    """See Ratio. A side of one process is resampled with the relative spread of the other side's processes."""
    a = np.array([float(np.median(p)) for p in baseline if p])
    b = np.array([float(np.median(p)) for p in candidate if p])
    ratio = float(np.median(b) / np.median(a))
    generator = np.random.default_rng(0)
    upper, lower = _resampled(b, a, generator), _resampled(a, b, generator)
    low, high = (float(x) for x in np.percentile(upper / lower, [2.5, 97.5]))
    return Ratio(ratio, low, high)


def _resampled(values: Any, other: Any, generator: Any) -> Any:
    """Medians of resampled processes."""
    if len(values) == 1 and len(other) > 1:
        return values[0] * other[generator.integers(0, len(other), RESAMPLES)] / np.median(other)
    return np.median(values[generator.integers(0, len(values), (RESAMPLES, len(values)))], 1)


def _cv(values: Any) -> float:
    """Coefficient of variation."""
    return float(np.std(values, ddof=1) / values.mean())


def percentiles(processes: Sequence[Sequence[float]]) -> tuple[dict[str, dict[str, float | None] | None], list[str]]:
    """Nearest-rank percentiles of all samples with 95 % intervals over resampled processes; None below their count.

    Of one process there is no interval: how much processes differ is not known.
    """
    values = np.sort(np.concatenate([np.asarray(p, float) for p in processes]))
    generator = np.random.default_rng(0)
    found: dict[str, dict[str, float | None] | None] = {}
    notes: list[str] = []
    chosen = generator.integers(0, len(processes), (200, len(processes)))
    for percent, needed in NEEDED.items():
        if len(values) < needed:
            found[f"p{percent}"] = None
            notes.append(f"p{percent} needs {needed} inferences, got {len(values)}")
            continue
        if len(processes) < 2:
            found[f"p{percent}"] = {"value": _rank(values, percent), "low": None, "high": None}
            continue
        spread = [_rank(np.sort(np.concatenate([processes[i] for i in row])), percent) for row in chosen]
        low, high = (float(x) for x in np.percentile(spread, [2.5, 97.5]))
        found[f"p{percent}"] = {"value": _rank(values, percent), "low": low, "high": high}
    return found, notes


def _rank(ordered: Any, percent: int) -> float:
    return float(ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)])

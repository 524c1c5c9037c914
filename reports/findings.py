"""What stands in the way of a qualification: each failure with the figure, its bound, the culprit and the next step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from reports.events import FAILING, Accuracy, Claim, Comparison, Damage
from reports.record import Row, Summary, Unmet
from reports.wording import ADVICE, MISSING, SLOWER, arrow, change, digits_apart, number, percent, with_unit

# Measures whose bound is a lower one, needed only where a figure is NaN and cannot show on which side it fell.
_HIGHER_IS_BETTER = frozenset({"cosine", "snr_db"})


@dataclass(frozen=True)
class Evidence:
    """The figure that decided: what, observed and allowed as text with units, and how far apart they are."""

    what: str
    observed: str
    allowed: str
    excess: str = ""


@dataclass(frozen=True)
class Finding:
    """One failure, or several claims of a case that fail for one reason (an export that crashed fails them all)."""

    case: str
    where: str
    verdict: str
    claims: tuple[str, ...]
    because: str
    evidence: Evidence | None
    culprit: str
    advice: str
    reproduce: str
    must_pass: bool


def findings(summary: Summary) -> tuple[Finding, ...]:
    """All failures in the order of the matrix, those that only the must-pass list makes failures last."""
    failing = [
        _finding(row, claim, must_pass=False)
        for row in summary.rows
        for claim in row.claims.values()
        if claim.verdict in FAILING
    ]
    return tuple(_folded([*failing, *map(_unmet, summary.unmet)]))


def evidence(claim: Claim) -> Evidence | None:
    """The figure behind a verdict; None where none was recorded."""
    decisive = decisive_comparison(claim.comparisons)
    if claim.verdict == "INSENSITIVE" and claim.power:
        return _unnoticed(claim.power.damages)
    if decisive and not decisive.passed:
        return _compared(decisive)
    if claim.gate:
        gate = claim.gate
        limit = None if gate.delta is None else 1 + gate.delta
        # What fails is the interval's lower end: it has to be told from the limit.
        digits = digits_apart(gate.low, limit)
        span = f" ({number(gate.low, digits)} to {number(gate.high, digits)})" if gate.low is not None else ""
        moved = "" if gate.ratio is None else f"{change(gate.ratio)} against its baseline"
        return Evidence("median latency", f"{number(gate.ratio)} ×{span}", f"≤ {number(limit, digits)} ×", moved)
    if claim.accuracy and not (claim.verdict == "FAIL" and _is_within(claim.accuracy)):
        return _accuracy(claim.accuracy)
    return _compared(decisive) if decisive else None


def decisive_comparison(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The worst failed comparison of the first hop that fails, since later hops inherit its damage; or the closest."""
    failed = [entry for entry in comparisons if not entry.passed]
    if failed:
        return max((entry for entry in failed if entry.hop == failed[0].hop), key=_severity)
    return max(comparisons, key=_severity, default=None)


def culprit(claim: Claim) -> str:
    """The first hop whose comparison failed; empty where none did."""
    return next((arrow(entry.hop) for entry in claim.comparisons if not entry.passed), "")


def bound(entry: Comparison) -> str:
    """≤ or ≥: the record keeps no direction, but the verdict shows on which side of the bound a figure has to be."""
    observed, allowed = entry.observed, entry.allowed
    if observed is None or allowed is None or math.isnan(observed) or observed == allowed:
        return "≥" if entry.measure in _HIGHER_IS_BETTER else "≤"
    return "≤" if entry.passed is (observed < allowed) else "≥"


def excess(entry: Comparison) -> str:
    """By how much a comparison misses its bound: a factor for an upper bound, a distance for a lower one."""
    observed, allowed = entry.observed, entry.allowed
    if entry.passed or observed is None or allowed is None or not math.isfinite(observed):
        return ""
    if bound(entry) == "≤":
        factor = observed / allowed if allowed > 0 else 0.0
        return "" if factor < 1 else "just over the allowed" if factor < 1.01 else f"{number(factor, 3)} × the allowed"
    return f"{with_unit(allowed - observed, _unit(entry))} below the allowed"


def share(entry: Comparison) -> float | None:
    """The error as a share of what is allowed, above 1 where it is too large; None of a measure that is no error.

    Of a cosine it is the distance from 1 that counts, of a signal-to-noise ratio the noise's amplitude: the plain ratio
    of observed and allowed would be 0.999 of every good cosine.
    """
    found, limit = entry.observed, entry.allowed
    if found is None or limit is None or math.isnan(found) or not math.isfinite(limit):
        return math.inf
    if entry.measure == "cosine":
        found, limit = max(1 - found, 0.0), 1 - limit
    elif entry.measure == "snr_db":
        # Beyond 6000 dB a power of ten is no float any more, and no such ratio is a measured one.
        found, limit = 10 ** (min(max(limit - found, -6000.0), 6000.0) / 20), 1.0
    elif bound(entry) == "≥":
        return None
    return found / limit if limit > 0 else 0.0 if found <= limit else math.inf


def subject(entry: Comparison) -> str:
    """What was compared: max abs of boxes (output0)."""
    place = f"{entry.group} ({entry.output})" if entry.group else entry.output
    return f"{entry.measure.replace('_', ' ')} of {place}"


def observed(entry: Comparison) -> str:
    """The gated figure with its unit, precise enough to be told from its bound."""
    return with_unit(entry.observed, _unit(entry), _digits(entry))


def allowed(entry: Comparison) -> str:
    """The bound with its direction and unit."""
    return f"{bound(entry)} {with_unit(entry.allowed, _unit(entry), _digits(entry))}"


def _digits(entry: Comparison) -> int:
    # A cosine says something only in its distance from 1.
    return max(6 if entry.measure == "cosine" else 4, digits_apart(entry.observed, entry.allowed))


def damage(found: Damage) -> str:
    """What was done to the reference: noise of 0.5 % on model.0.conv."""
    size = "" if _whole(found.size) else f" of {percent(found.size)}"
    return f"{found.kind}{size} on {found.layer}" if found.layer else f"{found.kind}{size}"


def cap(found: Damage) -> str:
    """The size up to which a damage may go unnoticed; empty where it has none."""
    return "" if _whole(found.cap) else percent(found.cap)


def _unit(entry: Comparison) -> str:
    """Only absolute figures carry the comparison's unit; ratios have none, and a signal-to-noise ratio its own."""
    if entry.measure == "snr_db":
        return "dB"
    return "" if entry.measure in {"cosine", "max_rel", "mean_rel", "fraction_outside"} else entry.unit


def _compared(entry: Comparison) -> Evidence:
    return Evidence(subject(entry), observed(entry), allowed(entry), excess(entry))


def _accuracy(found: Accuracy) -> Evidence:
    digits = digits_apart(found.change, found.allowed)
    span = f"{number(found.change, digits)} ({number(found.low)} to {number(found.high)})"
    limit = f"≥ {number(found.allowed)}" if found.share else f"within ± {number(found.allowed)}"
    what = f"{found.metric} {'as a share of' if found.share else 'less'} PyTorch's"
    return Evidence(what, span, limit)


def _is_within(found: Accuracy) -> bool:
    """Whether the metric kept its budget, so that something else failed."""
    if found.low is None or found.high is None:
        return False
    return found.low >= (found.allowed if found.share else -found.allowed) and (
        found.share or found.high <= found.allowed
    )


def _unnoticed(damages: Sequence[Damage]) -> Evidence | None:
    missed = next((entry for entry in damages if not entry.rejected), None)
    if missed is None:
        return None
    limit = "noticed" if _whole(missed.cap) else f"noticed at ≤ {percent(missed.cap)}"
    return Evidence("damage done on purpose", f"{damage(missed)} went unnoticed", limit)


def _whole(share: float | None) -> bool:
    """Whether a damage is done or not done (classes swapped), so that no size tells anything about it."""
    return share is None or share == 1


def _severity(entry: Comparison) -> float:
    """Orders comparisons by how close to, or far beyond, their bound they are; a NaN is the worst."""
    observed, allowed = entry.observed, entry.allowed
    if observed is None or allowed is None or math.isnan(observed):
        return math.inf
    if bound(entry) == "≥":
        observed, allowed = allowed, observed
    if allowed <= 0:
        return 0.0 if observed <= allowed else math.inf
    return observed / allowed


def _finding(row: Row, claim: Claim, *, must_pass: bool) -> Finding:
    return Finding(
        case=row.case.case,
        where=row.where,
        verdict=claim.verdict,
        claims=(claim.claim,),
        because=claim.because,
        evidence=evidence(claim),
        culprit=culprit(claim),
        advice=SLOWER if claim.verdict == "FAIL" and claim.gate else ADVICE.get(claim.verdict, ""),
        reproduce=claim.reproduce,
        must_pass=must_pass,
    )


def _unmet(entry: Unmet) -> Finding:
    if entry.row:
        return _finding(entry.row, entry.row.claims[entry.claim], must_pass=True)
    because = "the must-pass list names it, and no run has judged it"
    nothing = Evidence("verdict", MISSING, "PASS or WAIVED")
    return Finding(
        entry.case, "", entry.verdict, (entry.claim,), because, nothing, "", ADVICE[entry.verdict], "", must_pass=True
    )


def _folded(found: Sequence[Finding]) -> Iterator[Finding]:
    """Claims of one case with the same verdict for the same reason become one finding, at the place of the first."""
    groups: dict[tuple[str, ...], Finding] = {}
    for index, entry in enumerate(found):
        # A figure of its own makes a failure one of its own; so does a missing reason.
        apart = str(index) if entry.because == "" or (entry.evidence and entry.verdict in FAILING) else ""
        key = (entry.case, entry.where, entry.verdict, entry.because, apart)
        first = groups.get(key)
        groups[key] = replace(first, claims=first.claims + entry.claims) if first else entry
    yield from groups.values()

"""How names, figures and verdicts read: one spelling for all reports."""

from __future__ import annotations

import math
from datetime import UTC, datetime

# What a verdict word means, for the person who signs and has never seen the suite.
MEANING = {
    "PASS": "the claim was checked and holds",
    "FAIL": "the claim was checked and does not hold",
    "WAIVED": "it does not hold, and a waiver with an owner and an expiry lets it through",
    "NOT_SUPPORTED": "the format or runtime cannot do this by its nature",
    "SKIPPED": "the toolchain or the machine that it needs is not here, nothing was checked",
    "ERROR": "the check itself could not be made",
    "TIMEOUT": "the worker took longer than its limit and was stopped",
    "CRASH": "the worker's process died",
    "NO_BASELINE": "measured, with nothing accepted to hold it against",
    "NOT_COMPARABLE": "the baseline was taken on another machine or other versions",
    "INCONCLUSIVE": "measured up to the limit, the noise still hides the answer",
    "INSENSITIVE": "the comparison could not have failed, so it proves nothing",
    "NEVER RAN": "on the must-pass list, and no run has it",
}

# The next step for each verdict that stands in the way of a qualification.
ADVICE = {
    "FAIL": "Mend the export, or accept it with a waiver that names an owner and an expiry.",
    "ERROR": "Mend what the message names; the claim is not judged until then.",
    "TIMEOUT": "Find what hangs, or raise the time limit.",
    "CRASH": "Run the command with --in-process under a debugger; the worker's log holds its last words.",
    "INCONCLUSIVE": "Quieten the machine (fixed clocks, nothing else running), or allow more processes.",
    "INSENSITIVE": "Bring feeds that make the model fire (pictures, with --evaluate), or trained weights.",
    "NOT_SUPPORTED": "Take it off the must-pass list, or choose a runtime that supports it.",
    "SKIPPED": "Make the environment (exportgate toolchain sync NAME), or run it on the machine that is named.",
    "NO_BASELINE": "Accept a baseline for this case on this machine, with its reason.",
    "NOT_COMPARABLE": "Accept a baseline taken on this machine as it is now, or restore what changed.",
    "NEVER RAN": "Select the case, or take the entry off the must-pass list.",
}

# The same for a latency that fails its gate.
SLOWER = "Find what made it slower, or accept the new figure as the baseline, with its reason."

MISSING = "–"


def sentence(claim: str) -> str:
    """test_outputs_match_reference → outputs match reference; parameters of a test stay as they are."""
    name, bracket, parameters = claim.partition("[")
    return " ".join(name.removeprefix("test_").replace("_", " ").split()) + (f" [{parameters}" if bracket else "")


def number(value: float | int | None, digits: int = 4) -> str:
    """A figure with so many significant digits; the en dash stands for one that is not there."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def digits_apart(one: float | None, other: float | None) -> int:
    """Significant digits that two figures need to look different: 1.00004 against 1 must not read as 1 and 1."""
    if one is None or other is None or one == other or not (math.isfinite(one) and math.isfinite(other)):
        return 4
    return next((digits for digits in range(4, 17) if number(one, digits) != number(other, digits)), 17)


def milliseconds(value: float | None) -> str:
    """Three decimals below 10 ms, fewer above, so that a column of latencies keeps about four digits."""
    if value is None or not math.isfinite(value):
        return number(value)
    size = abs(value)
    return (
        f"{value:.4f}"
        if size < 0.1
        else f"{value:.3f}"
        if size < 10
        else f"{value:.2f}"
        if size < 100
        else f"{value:.1f}"
    )


def cosine(value: float | None) -> str:
    """Six decimals: a cosine says something only in its distance from 1."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:.6f}"


def percent(value: float | None) -> str:
    """A fraction as a percentage: 0.005 → 0.5 %."""
    return number(value) if value is None or not math.isfinite(value) else f"{number(value * 100, 3)} %"


def change(ratio: float) -> str:
    """A ratio as a signed percentage: 1.094 → +9.4 %."""
    return f"{(ratio - 1) * 100:+.1f} %"


def size(value: int | None) -> str:
    """Bytes in decimal units, as file managers and registries show them."""
    if value is None:
        return MISSING
    amount = float(value)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{int(amount)} B" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def duration(value: float | None) -> str:
    """Seconds as a person says them: 0.8 s, 92 s, 4 min 10 s."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value < 0.05:
        return "< 0.1 s"
    if value < 120:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def moment(text: str) -> str:
    """An ISO 8601 time as 2026-11-22 17:05 UTC; text that is none stays as it is."""
    try:
        parsed = datetime.fromisoformat(text)
        told = parsed.astimezone(UTC) if parsed.tzinfo else parsed
    except (ValueError, OverflowError):  # the latter: a time zone in front of year 1
        return text
    return f"{told:%Y-%m-%d %H:%M} UTC"


def with_unit(value: float | None, unit: str, digits: int = 4) -> str:
    """A figure and its unit, which is often empty."""
    return f"{number(value, digits)} {unit}".rstrip()


def arrow(hop: str) -> str:
    """The hop's two ends with a real arrow between them."""
    return hop.replace("->", "→")


def digest(text: str) -> str:
    """The first characters of a digest: enough to tell artifacts apart by eye."""
    return text.removeprefix("sha256:")[:12]

"""How a run's measurement becomes a baseline: checked as a stored one is, and written with all others or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from exporters.errors import BadRequest
from reports import events
from suites.support.baseline import GATED, Baseline, baseline_path, checked, read_baseline
from suites.support.config import Latency
from suites.support.gate import ROUNDS, detectable

# One folder or file of its own: ids have letters, digits, '.', '_' and '-', and what a data set's name brings.
NAME = re.compile(r"(?!\.)[^/\\:\x00-\x1f]+")

NOISE = 0.15  # coefficient of variation


@dataclass(frozen=True)
class Proposal:
    """A measurement as the baseline that it would be; `before` is what is in its place, `text` what would be."""

    now: Baseline
    before: Baseline | None
    text: str

    def changes(self) -> list[str]:
        """What else than latency accepting it would change, as lines "artifact MiB: 10 in the baseline, 12 here"."""
        if self.before is None:
            return []
        old, new = self.before.figures, self.now.figures
        lines = [
            f"{k}: {_told(old.get(k))} in the baseline, {_told(new.get(k))} here"
            + (f" ({new[k] / old[k] - 1:+.1%})" if old.get(k) and k in new else "")
            for k in GATED
            if old.get(k) != new.get(k)
        ]
        before, now = self.before.accuracy, self.now.accuracy
        if now is not None and now != before:
            lines.append(
                f"{now.metric}: {_told(before and before.value)} in the baseline, {now.value:g} here"
                + (f" ({now.value - before.value:+.4f})" if before else "")
                + (" on other pictures" if before and before.pictures != now.pictures else "")
            )
        return lines


def _told(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:g}"


def propose(
    folder: Path,
    machine: str,
    case: str,
    measurement: events.Measurement,
    reason: str,
    accuracy: events.Accuracy | None = None,
) -> Proposal:
    """A measurement of a run record as a baseline; a metric that the run did not judge is kept from before.

    Raises:
        BadRequest: the record says what no measurement gives, or the baseline that is there cannot be read.
    """
    conditions = measurement.conditions
    for what, name in (("case", case), ("machine", machine)):
        if not NAME.fullmatch(name):
            raise BadRequest(
                f"the run's record names the {what} {name!r}, which is no name of a file", "judge the case again"
            )
    path = baseline_path(folder, machine, case)
    before = read_baseline(path)
    kept = asdict(before.accuracy) if before and before.accuracy else None
    data: dict[str, Any] = {
        "case": case,
        "machine": machine,
        "date": datetime.now(UTC).date().isoformat(),
        "reason": reason.strip(),
        "before": _before(before) if before else None,
        "p50": None,
        "accuracy": _metric(accuracy) if accuracy else kept,
        "comparable": conditions.get("comparable"),
        "conditions": {
            "timer": measurement.timer,
            "threads": measurement.threads,
            "warm_up": measurement.warm_up,
            "notes": list(measurement.notes),
            **{k: v for k, v in conditions.items() if k not in ("comparable", "machine")},
        },
        "milliseconds": [[round(x, 4) for x in p] for p in measurement.processes],
    }
    try:
        now = checked(data, path)
    except ValueError as error:
        raise BadRequest(
            f"the run's measurement of case {case} cannot be a baseline ({error})", "judge the case again"
        ) from None
    return Proposal(now, before, _compact(data | {"p50": now.p50}))


def _metric(found: events.Accuracy) -> dict[str, Any]:
    return {
        "metric": found.metric,
        "value": found.artifact.get(found.metric),
        "reference": found.reference.get(found.metric),
        "pictures": found.pictures,
    }


def _before(old: Baseline) -> dict[str, Any]:
    """What is accepted in place of what: a review sees it in the file, whose history may be elsewhere."""
    metric = {old.accuracy.metric: old.accuracy.value} if old.accuracy else {}
    return {"date": old.date, "p50": old.p50, **old.figures, **metric}


def check(now: Baseline, throttled: bool | None, settings: Latency) -> None:
    """Whether a measurement stands, and the project's gate can work with it.

    Raises:
        BadRequest: it was throttled, or is too noisy.
    """
    medians = [float(np.median(p)) for p in now.processes]
    if throttled:
        raise BadRequest(f"case {now.case}: the measurement was throttled", "measure again on a cool machine")
    if len(medians) < 2:
        raise BadRequest(
            f"case {now.case}: one process was measured, which says nothing of the spread between processes",
            "measure with --replicates 10",
        )
    # An unchanged artifact lies as far below the limit 1 + delta as one that is 2 delta slower lies above it. With all
    # rounds of a candidate either has to be told from the limit at the gate's own power (80 %): otherwise the artifact
    # itself would end INCONCLUSIVE more often than one time in five. The formula is of first order in CV, hence NOISE.
    cv, delta = float(np.std(medians, ddof=1) / np.mean(medians)), settings.delta
    least = detectable(cv, len(medians), ROUNDS * settings.processes, delta)
    if cv > NOISE or least > 2 * delta:
        why = f"so that no slow-down below {least:.1%} is noticed, and delta = {delta:g} asks for {2 * delta:.1%}"
        raise BadRequest(
            f"case {now.case}: its {len(medians)} processes differ by {cv:.1%} (coefficient of variation), "
            + (why if least > 2 * delta else f"and the gate can reckon with {NOISE:.0%} at most"),
            "measure on a quieter machine, with more --replicates, or raise delta in [latency]",
        )


def write(proposals: Sequence[Proposal]) -> None:
    """Makes all of them baselines; where one cannot be written none is.

    Raises:
        BadRequest: names the file.
    """
    made: list[tuple[Path, Path]] = []
    replaced: list[tuple[Path, bytes | None]] = []
    path = Path()
    try:
        for proposal in proposals:
            path = proposal.now.path
            path.parent.mkdir(parents=True, exist_ok=True)
            made.append((path.with_suffix(".tmp"), path))
            made[-1][0].write_text(proposal.text, encoding="utf-8")
        for temporary, path in made:
            before = path.read_bytes() if path.exists() else None
            temporary.replace(path)
            replaced.append((path, before))
    except OSError as error:
        for one, before in replaced:
            one.unlink() if before is None else one.write_bytes(before)
        raise BadRequest(
            f"baseline {path} cannot be written ({error.strerror})", "correct 'baselines' in exportgate.toml"
        ) from None
    finally:
        for temporary, _ in made:
            temporary.unlink(missing_ok=True)


def _compact(data: Mapping[str, Any]) -> str:
    """JSON that is read in a review: one line a key, one line a process."""
    samples = ",\n  ".join(json.dumps(p) for p in data["milliseconds"])
    head = json.dumps({k: v for k, v in data.items() if k != "milliseconds"}, indent=1, ensure_ascii=False)
    return f'{head[:-2]},\n "milliseconds": [\n  {samples}\n ]\n}}\n'

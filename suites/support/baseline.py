"""Baselines: accepted measurements, one file a case and machine, reviewed like code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from exporters.errors import BadRequest
from reports.events import Measurement


@dataclass(frozen=True)
class Limit:
    """How much a figure may grow: to so many times the baseline's, and by at least `least`, to be called grown."""

    times: float
    least: float

    def grown(self, name: str, before: float, now: float) -> str:
        """A line where it has grown by more, else ""."""
        allowed = max(before * self.times, before + self.least)
        return f"{name} {now:g}, baseline {before:g}, allowed {allowed:.4g}" if now > allowed else ""


# What a baseline holds beside latency. A tenth of an FP16 file's weights left in FP32 are 10 % more of it, where other
# kernels and metadata are a percent or two. Memory is taken in whole arenas. Loading is read from a disk that others
# use; what compiles or builds something then takes many times as long.
GATED: Mapping[str, Limit] = {
    "artifact MiB": Limit(1.05, 0.01),
    "load ms": Limit(2.0, 50.0),
    "peak memory MiB": Limit(1.1, 16.0),
    "activation memory MiB": Limit(1.1, 1.0),
}


@dataclass(frozen=True)
class Accuracy:
    """A metric that was accepted, PyTorch's then, and the digest of the pictures that it is of."""

    metric: str
    value: float
    reference: float
    pictures: str


@dataclass(frozen=True)
class Baseline:
    """An accepted measurement: raw samples in milliseconds by process, and what must be equal to compare with it.

    `figures` are those of GATED that it holds, `accuracy` the metric where one was judged.
    """

    case: str
    path: Path
    date: str
    reason: str
    comparable: Mapping[str, Any]
    processes: Sequence[Sequence[float]]
    figures: Mapping[str, float]
    accuracy: Accuracy | None

    @property
    def p50(self) -> float:
        """Median of the per-process medians, in milliseconds."""
        return float(np.median([np.median(p) for p in self.processes]))

    def differs(self, here: Mapping[str, Any]) -> list[str]:
        """What is not equal, as lines "version of torch: 2.12 there, 2.13 here"."""
        keys = sorted({*self.comparable, *here})
        return [
            f"{k}: {self.comparable.get(k)} in the baseline, {here.get(k)} here"
            for k in keys
            if self.comparable.get(k) != here.get(k)
        ]


def baseline_path(folder: Path, machine: str, case: str) -> Path:
    return folder / machine / f"{case}.json"


def read_baseline(path: Path) -> Baseline | None:
    """The baseline in a file; None where there is no file.

    Raises:
        BadRequest: the file cannot be read.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Baseline(
            str(data["case"]),
            path,
            str(data["date"]),
            str(data["reason"]),
            dict(data["comparable"]),
            [[float(x) for x in p] for p in data["milliseconds"]],
            {k: float(v) for k, v in data["conditions"].items() if k in GATED},
            Accuracy(**data["accuracy"]) if data.get("accuracy") else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(
            f"baseline {path} cannot be read ({type(error).__name__}: {error})",
            "restore it from version control, or delete it and accept a new one",
        ) from None


def check(case: str, measurement: Measurement, reason: str) -> None:
    """Whether a measurement may become a baseline.

    Raises:
        BadRequest: no reason, or the measurement does not stand (throttled, or too noisy to detect anything).
    """
    if not reason.strip():
        raise BadRequest("a baseline is accepted without a reason", "say why with --reason")
    medians = [float(np.median(p)) for p in measurement.processes]
    if measurement.throttled:
        raise BadRequest(f"case {case}: the measurement was throttled", "measure again on a cool machine")
    if len(medians) < 2:
        raise BadRequest(
            f"case {case}: one process was measured, which says nothing of the spread between processes",
            "measure with --replicates 10",
        )
    cv = float(np.std(medians, ddof=1) / np.mean(medians))
    if cv > 0.15:
        raise BadRequest(
            f"case {case}: its processes differ by {cv * 100:.0f} % (coefficient of variation)",
            "measure again on a quiet machine (limit: 15 %)",
        )


def accept(
    folder: Path, machine: str, case: str, measurement: Measurement, reason: str, accuracy: Accuracy | None = None
) -> tuple[Path, float | None, float]:
    """Writes a measurement of a run record as the baseline of its case; returns (path, p50 before, p50 now).

    Accuracy that this run did not judge is kept from before.

    Raises:
        BadRequest: see `check`; or a folder that cannot be written.
    """
    check(case, measurement, reason)
    medians = [float(np.median(p)) for p in measurement.processes]
    path = baseline_path(folder, machine, case)
    before = read_baseline(path)
    accuracy = accuracy or (before.accuracy if before else None)
    data = {
        "case": case,
        "machine": machine,
        "date": datetime.now(UTC).date().isoformat(),
        "reason": reason.strip(),
        "p50_before": before.p50 if before else None,
        "p50": float(np.median(medians)),
        "accuracy": asdict(accuracy) if accuracy else None,
        "comparable": measurement.conditions["comparable"],
        "conditions": {
            "timer": measurement.timer,
            "threads": measurement.threads,
            "warm_up": measurement.warm_up,
            "notes": list(measurement.notes),
            **{k: v for k, v in measurement.conditions.items() if k not in ("comparable", "machine")},
        },
        "milliseconds": [[round(x, 4) for x in p] for p in measurement.processes],
    }
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(_compact(data), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise BadRequest(
            f"baseline {path} cannot be written ({error.strerror})", "correct 'baselines' in exportgate.toml"
        ) from None
    return path, before.p50 if before else None, float(np.median(medians))


def _compact(data: Mapping[str, Any]) -> str:
    """JSON that is read in a review: one line a key, one line a process."""
    samples = ",\n  ".join(json.dumps(p) for p in data["milliseconds"])
    head = json.dumps({k: v for k, v in data.items() if k != "milliseconds"}, indent=1, ensure_ascii=False)
    return f'{head[:-2]},\n "milliseconds": [\n  {samples}\n ]\n}}\n'

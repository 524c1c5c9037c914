"""Baselines: accepted measurements, one file a case and machine, reviewed like code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from exporters.errors import BadRequest

T = TypeVar("T")
WORDS: Mapping[type, str] = {dict: "an object", list: "a list", str: "a text"}


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

    @property
    def device(self) -> str:
        """What it was measured on: "cpu" or "cuda"."""
        return "cuda" if self.comparable.get("gpu name") else "cpu"

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
    """The baseline in a file; None where there is none.

    Raises:
        BadRequest: it cannot be read, holds what no measurement gives, or is of another case or machine than its path.
    """
    if not os.path.lexists(path):  # a folder and a broken link are there: not to be passed over as NO_BASELINE
        return None
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")), path)
    except OSError as error:
        why = error.strerror
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:
        why = str(error)
    raise BadRequest(
        f"baseline {path} cannot be read ({why})",
        "restore it from version control, or delete it and accept a new one",
    )


def checked(data: Any, path: Path) -> Baseline:
    """The baseline that decoded JSON holds, of a file or of a run's record.

    Raises:
        ValueError: names the field, and what it has.
    """
    if not isinstance(data, dict):
        raise ValueError(f"it is {_shown(data)}, expected an object")  # noqa: TRY004 as every other mistake in it
    for key, name in (("case", path.stem), ("machine", path.parent.name)):
        if _field(data, key, str) != name:
            raise ValueError(f"it is of {key} '{data[key]}', and its path says '{name}'")
    conditions = _field(data, "conditions", dict)
    return Baseline(
        path.stem,
        path,
        date.fromisoformat(_field(data, "date", str)).isoformat(),
        _field(data, "reason", str),
        _field(data, "comparable", dict),
        _processes(_field(data, "milliseconds", list)),
        # A file of some bytes has 0.000 MiB, an engine without activations none: 0 is a figure.
        {k: _number(conditions[k], k) for k in GATED if k in conditions},
        _accuracy(data["accuracy"]) if data.get("accuracy") is not None else None,
    )


def _processes(found: Sequence[Any]) -> list[list[float]]:
    """Samples by process: of a negative one every candidate would be faster."""
    if not found or not all(isinstance(p, list) and p for p in found):
        raise ValueError(f"milliseconds = {_shown(found)}, expected a list for each process, none of them empty")
    made = [[_number(x, "a sample of milliseconds") for x in p] for p in found]
    if not all(x > 0 for p in made for x in p):
        raise ValueError(f"a sample of milliseconds = {min(map(min, made)):g}, expected more than 0")
    return made


def _accuracy(found: Any) -> Accuracy:
    names = {f.name for f in fields(Accuracy)}
    if not isinstance(found, dict) or found.keys() != names:
        raise ValueError(f"accuracy = {_shown(found)}, expected an object with {', '.join(sorted(names))}")
    value, reference = (_number(found[k], f"accuracy {k}") for k in ("value", "reference"))
    if max(value, reference) > 1:
        raise ValueError(f"accuracy = {max(value, reference):g}, and a metric is at most 1")
    return Accuracy(_field(found, "metric", str), value, reference, _field(found, "pictures", str))


def _field(table: Mapping[str, Any], key: str, kind: type[T]) -> T:
    if not isinstance(value := table.get(key), kind):
        raise ValueError(f"{key} = {_shown(value)}, expected {WORDS[kind]}")  # noqa: TRY004
    return value


def _number(value: Any, name: str) -> float:
    # JSON as Python reads it has NaN and Infinity, beyond which nothing has grown; and whole numbers that no float has.
    if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} = {_shown(value)}, expected a finite number that is not negative")
    return float(value)


def _shown(value: Any) -> str:
    return f"{value!r:.60}"

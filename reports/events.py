"""The lines of a run record as frozen dataclasses, and how a JSON value becomes one.

`schema.json` describes the same fields with their units; a selftest holds the two against each other. Whatever a record
says is untrusted: a type that differs is refused with its place, and text loses what no report can show.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Verdict = Literal[
    "PASS",
    "FAIL",
    "WAIVED",
    "NOT_SUPPORTED",
    "SKIPPED",
    "ERROR",
    "TIMEOUT",
    "CRASH",
    "NO_BASELINE",
    "NOT_COMPARABLE",
    "INCONCLUSIVE",
    "INSENSITIVE",
]
GOOD: frozenset[str] = frozenset({"PASS", "WAIVED"})
NEUTRAL: frozenset[str] = frozenset({"NOT_SUPPORTED", "SKIPPED", "NO_BASELINE", "NOT_COMPARABLE"})
FAILING: frozenset[str] = frozenset(get_args(Verdict)) - GOOD - NEUTRAL

Open = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """The first line of a record: what was asked, where, with which versions."""

    schema: int
    run: str
    time: str
    command: tuple[str, ...]
    machine: Open
    exportgate: str = ""
    project: str | None = None
    release: bool = False
    must_pass: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class File:
    """A file of an artifact; size in bytes."""

    path: str
    bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class Toolchain:
    """The environment that made an artifact."""

    name: str
    packages: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Achieved:
    """The precision found in an artifact, as opposed to the one asked for."""

    summary: str
    counts: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Hop:
    """One artifact in the chain; seconds is the time of its export."""

    name: str
    format: str
    precision: str
    seconds: float | None = None
    cached: bool = False
    digest: str = ""
    files: tuple[File, ...] = ()
    toolchain: Toolchain | None = None
    achieved: Achieved | None = None


@dataclass(frozen=True)
class Case:
    """A case of the matrix and how its artifact was made."""

    time: str
    case: str
    model: str
    format: str
    precision: str
    runtime: str
    device: str
    spec: Open = field(default_factory=dict[str, Any])
    hops: tuple[Hop, ...] = ()
    artifact: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One output, or channel group, against the reference; absolute figures in `unit`, relative ones as fractions."""

    hop: str
    output: str
    measure: str
    observed: float | None
    allowed: float | None
    passed: bool
    feeds: str = ""
    group: str = ""
    unit: str = ""
    count: int | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    p99_abs: float | None = None
    max_rel: float | None = None
    mean_rel: float | None = None
    fraction_outside: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    worst_index: tuple[int, ...] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Damage:
    """Known damage done to the reference; size and cap as fractions of the layer's standard deviation."""

    kind: str
    rejected: bool
    layer: str | None = None
    size: float | None = None
    cap: float | None = None
    by: str | None = None


@dataclass(frozen=True)
class Power:
    """What a comparison would have noticed."""

    statement: str
    sensitive: bool
    damages: tuple[Damage, ...] = ()


@dataclass(frozen=True)
class Matching:
    """One-to-one matching of detections."""

    reference: int
    matched: int
    iou_floor: float | None = None
    lowest_iou: float | None = None


@dataclass(frozen=True)
class Percentile:
    """A percentile in milliseconds with its confidence interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measurement:
    """Raw latencies in milliseconds, one tuple a process, and their percentiles."""

    processes: tuple[tuple[float, ...], ...]
    p50: Percentile | None
    unit: str = "ms"
    p90: Percentile | None = None
    p95: Percentile | None = None
    p99: Percentile | None = None
    warm_up: int | None = None
    timer: str = ""
    threads: int | None = None
    throttled: bool | None = None
    notes: tuple[str, ...] = ()
    conditions: Open = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Baseline:
    """The accepted measurement that a candidate is held against; milliseconds."""

    p50: float | None
    path: str = ""
    date: str = ""
    processes: tuple[tuple[float, ...], ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Gate:
    """Candidate / baseline with its interval; delta, mde and must_detect as fractions."""

    ratio: float | None
    delta: float | None
    low: float | None = None
    high: float | None = None
    mde: float | None = None
    must_detect: float | None = None


@dataclass(frozen=True)
class Waiver:
    """Why a failing claim is let through, who answers for it, and until when."""

    reason: str
    issue: str
    owner: str
    expires: str


@dataclass(frozen=True)
class Claim:
    """One claim judged, with the numbers behind its verdict; seconds is the time the judgement took."""

    time: str
    case: str
    claim: str
    verdict: Verdict
    because: str = ""
    seconds: float | None = None
    reproduce: str = ""
    comparisons: tuple[Comparison, ...] = ()
    power: Power | None = None
    matching: Matching | None = None
    measurement: Measurement | None = None
    baseline: Baseline | None = None
    gate: Gate | None = None
    waiver: Waiver | None = None


@dataclass(frozen=True)
class Selftest:
    """How many tests of the suite itself passed and failed."""

    passed: int
    failed: int


@dataclass(frozen=True)
class End:
    """The last line: pytest's exit code and the run's length in seconds."""

    time: str
    exit: int
    seconds: float | None = None
    selftest: Selftest | None = None


class BadField(ValueError):
    """Raised when a field of a line is missing or of another type; says which one and what it holds."""


# No report can show these: control characters (XML has no way to write them), lone surrogates (UTF-8 has none), and
# marks that reorder the text around them, so that a name could read as another one.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

T = TypeVar("T")
Convert = Callable[[Any, str], Any]


def clean(text: str) -> str:
    """Text with each character that no report can show replaced by U+FFFD, so that it is seen that there was one."""
    return _UNSHOWABLE.sub("�", text.replace("\r\n", "\n"))


def build(kind: type[T], value: Any, place: str) -> T:
    """A dataclass of `kind` from a decoded JSON value; fields that it does not know are ignored.

    Raises:
        BadField: a field is missing or has another type; the message starts with `place`.
    """
    return _converter(kind)(value, place)


def _refuse(place: str, value: Any, wanted: str) -> BadField:
    shown = clean(repr(value))
    return BadField(f"{place} is {shown[:60]}{'…' if len(shown) > 60 else ''}, not {wanted}")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _refuse(place, value, "text")
    return clean(value)


def _truth(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise _refuse(place, value, "true or false")
    return value


def _whole(value: Any, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refuse(place, value, "a whole number")
    return value


def _number(value: Any, place: str) -> float:
    if isinstance(value, str) and value in _SPECIAL:
        return _SPECIAL[value]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _refuse(place, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _refuse(place, "an enormous whole number", "a number that can be shown") from None


def _anything(value: Any, place: str) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return tuple(_anything(item, place) for item in cast("list[Any]", value))
    if isinstance(value, dict):
        return _mapping(_anything)(value, place)
    return value


def _mapping(convert: Convert) -> Convert:
    def apply(value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise _refuse(place, value, "an object")
        items = cast("dict[str, Any]", value)
        return {clean(name): convert(item, f"{place}.{clean(name)}") for name, item in items.items()}

    return apply


def _sequence(convert: Convert) -> Convert:
    def apply(value: Any, place: str) -> Any:
        if not isinstance(value, list):
            raise _refuse(place, value, "a list")
        items = cast("list[Any]", value)
        # Samples come by the hundred thousand: a list that is all floats needs no second look.
        if convert is _number and all(type(item) is float for item in items):
            return tuple(items)
        return tuple([convert(item, f"{place}[{index}]") for index, item in enumerate(items)])

    return apply


def _optional(convert: Convert) -> Convert:
    return lambda value, place: None if value is None else convert(value, place)


def _one_of(words: tuple[str, ...]) -> Convert:
    def apply(value: Any, place: str) -> Any:
        if value not in words:
            raise _refuse(place, value, f"one of {' '.join(words)}")
        return value

    return apply


def _record(kind: type[Any]) -> Convert:
    hints = get_type_hints(kind)
    plan = [
        (entry.name, _converter(hints[entry.name]), entry.default is MISSING and entry.default_factory is MISSING)
        for entry in fields(kind)
    ]

    def apply(value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise _refuse(place, value, "an object")
        items = cast("dict[str, Any]", value)
        found: dict[str, Any] = {}
        for name, convert, required in plan:
            if name in items:
                found[name] = convert(items[name], f"{place}.{name}")
            elif required:
                raise BadField(f"{place} lacks {name}")
        return kind(**found)

    return apply


@cache
def _converter(hint: Any) -> Convert:
    """How a JSON value becomes what a type hint says; every hint used above has a branch."""
    plain: dict[Any, Convert] = {str: _text, bool: _truth, int: _whole, float: _number, Any: _anything}
    if hint in plain:
        return plain[hint]
    if is_dataclass(hint):
        return _record(cast("type[Any]", hint))
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return _sequence(_converter(inner[0]))
    if origin is Mapping:
        return _mapping(_converter(inner[1]))
    if origin is Literal:
        return _one_of(inner)
    if origin in (Union, types.UnionType):
        return _optional(_converter(inner[0]))
    raise TypeError(f"no converter for {hint!r}")

"""The lines of a run record as frozen dataclasses.

`schema.json` describes the same fields with their units; a selftest holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

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
class Accuracy:
    """A task's metric of the artifact and of the reference on the same images; `change` is a share where `share` is.

    `artifact` and `reference` have the gated metric first, by its name, then what else was computed; `pictures` is a
    digest of the images and their labels.
    """

    metric: str
    artifact: Mapping[str, float]
    reference: Mapping[str, float]
    change: float | None
    low: float | None
    high: float | None
    allowed: float
    share: bool
    images: int
    pictures: str = ""


@dataclass(frozen=True)
class Try:
    """A step of the search for an INT8 that keeps a budget.

    `change` is a share of the reference's metric, `agreement` of its own detections (F1).
    """

    name: str
    kept: tuple[str, ...]
    metric: float | None
    change: float | None
    low: float | None
    high: float | None
    meets: bool
    calibrator: str = ""
    milliseconds: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Noise:
    """How much a module suffers from 8 bits: noise of the outputs in shares of their variance."""

    module: str
    alone: float | None
    joint: float | None = None


@dataclass(frozen=True)
class Search:
    """The search for few modules that stay in floating point; `share` of the reference's metric is asked for.

    `chosen` is the number of a step, from 0.
    """

    share: float
    metric: str
    reference: float | None
    chosen: int
    steps: tuple[Try, ...]
    noise: tuple[Noise, ...] = ()


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
class Layer:
    """One layer of what executes: its precision ("" where it has none), milliseconds a run."""

    name: str
    kind: str = ""
    precision: str = ""
    milliseconds: float | None = None
    parts: tuple[str, ...] = ()


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
    accuracy: Accuracy | None = None
    search: Search | None = None
    measurement: Measurement | None = None
    baseline: Baseline | None = None
    gate: Gate | None = None
    layers: tuple[Layer, ...] = ()
    waiver: Waiver | None = None


@dataclass(frozen=True)
class Selftest:
    """How many tests of the suite itself passed and failed."""

    passed: int
    failed: int


@dataclass(frozen=True)
class End:
    """The last line: pytest's exit code, the run's length in seconds, and bytes of disk that it took at most."""

    time: str
    exit: int
    seconds: float | None = None
    selftest: Selftest | None = None
    disk: int | None = None

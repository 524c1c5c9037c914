"""Comparison: numbers only, per output and channel group; and the tolerances that gate them, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.models.spec import ChannelGroup, ModelSpec
from exporters.spec import Precision

Array = npt.NDArray[Any]
SCORE_FLOOR = 0.25  # the contract's default confidence: below it a deployment drops the box


@dataclass(frozen=True)
class Tolerance:
    """What is allowed of one measure. `relative` scales it by the group's extent (the image size for boxes)."""

    measure: str  # max_abs, p99_abs, cosine, snr_db ...
    allowed: float
    reason: str
    relative: bool = False

    @property
    def is_lower_bound(self) -> bool:
        return self.measure in ("cosine", "snr_db")


@dataclass(frozen=True)
class Comparison:
    """Observed against expected values of one channel group on one set of feeds; `measure` is the gated number."""

    hop: str
    feeds: str
    output: str
    group: str
    unit: str
    count: int
    max_abs: float
    mean_abs: float
    p99_abs: float
    max_rel: float
    mean_rel: float
    fraction_outside: float
    cosine: float
    snr_db: float
    worst_index: tuple[int, ...]
    measure: str
    observed: float
    allowed: float
    reason: str
    passed: bool

    def line(self) -> str:
        """ "boxes max_abs 1.7 px, allowed 1 px (pytorch -> onnx fp16, feeds photograph, worst at [0, 2, 811])" """
        unit = f" {self.unit}" if self.unit and self.measure.endswith("abs") else ""
        return (
            f"{self.output} {self.group}: {self.measure} {self.observed:.4g}{unit}, allowed {self.allowed:.4g}{unit} "
            f"({self.hop}, feeds {self.feeds}, worst at {list(self.worst_index)})"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"worst_index": list(self.worst_index)}


DFL = "DFL: 15 cells x stride 32 x FP16's half ulp 2^-11 = 0.23 px a rounding, four roundings deep"
DEFAULTS: Mapping[tuple[Precision, str], tuple[Tolerance, ...]] = {
    (Precision.FP32, "box"): (
        Tolerance(
            "max_abs", 1e-4, "FP32 sums of some 10^3 terms differ by about 10^3 x 2^-24 = 6e-5 of the range", True
        ),
    ),
    (Precision.FP32, "score"): (
        Tolerance("max_abs", 1e-4, "FP32 sums of some 10^3 terms differ by about 10^3 x 2^-24 = 6e-5", True),
    ),
    (Precision.FP32, "value"): (
        Tolerance(
            "max_abs", 1e-4, "FP32 sums of some 10^3 terms differ by about 10^3 x 2^-24 = 6e-5 of the range", True
        ),
    ),
    (Precision.FP16, "box"): (
        Tolerance("max_abs", 1.0, DFL),
        Tolerance("cosine", 0.999, "a scale error of 4 % turns 0.999 in one channel"),
    ),
    (Precision.FP16, "score"): (
        Tolerance("max_abs", 5e-3, "sigmoid's slope 1/4 x logits up to 10 x 2^-11 = 1.2e-3 a rounding, four deep"),
    ),
    (Precision.FP16, "value"): (
        Tolerance("max_abs", 5e-3, "2^-11 a rounding, some ten roundings deep", True),
        Tolerance("cosine", 0.999, "ten roundings of 2^-11 keep 1 - 1e-5; 0.999 leaves room for outliers"),
    ),
    # Elementwise limits say little about INT8: it is judged by matching, and by the task's metric.
    (Precision.INT8, "box"): (),
    (Precision.INT8, "score"): (),
    (Precision.INT8, "value"): (
        Tolerance(
            "snr_db",
            20.0,
            "8 bits at a crest factor of 4 give 41 dB a layer; 60 layers add 18 dB of noise; 3 dB margin",
        ),
    ),
}


def tolerances(
    precision: Precision, group: ChannelGroup, overrides: Sequence[Mapping[str, Any]] = ()
) -> tuple[Tolerance, ...]:
    """The limits of a channel group; an override of exportgate.toml replaces those of its group and precision."""
    chosen = tuple(
        Tolerance(str(o["measure"]), float(o["allowed"]), str(o["reason"]), bool(o.get("relative", False)))
        for o in overrides
        if o.get("precision") == precision.value and o.get("group") in (group.name, group.kind)
    )
    return chosen or DEFAULTS.get((precision, group.kind), DEFAULTS[(Precision.FP16, group.kind)])


def compare(
    expected: Mapping[str, Array],
    observed: Mapping[str, Array],
    model: ModelSpec,
    precision: Precision,
    *,
    hop: str = "",
    feeds: str = "",
    imgsz: tuple[int, int] = (0, 0),
    overrides: Sequence[Mapping[str, Any]] = (),
) -> list[Comparison]:
    """One Comparison for each output's channel group and each limit on it; names and shapes must be equal already.

    Box channels are compared on the anchors whose reference score is at least SCORE_FLOOR; where none is, they are
    left out (and the power check will say so).
    """
    rows: list[Comparison] = []
    for spec in model.outputs:
        want, got = np.asarray(expected[spec.name], np.float64), np.asarray(observed[spec.name], np.float64)
        score = next((g for g in spec.groups if g.kind == "score"), None)
        fires = (
            want[:, score.start : score.stop].max(1, keepdims=True) >= SCORE_FLOOR if score and want.ndim == 3 else None
        )
        for group in spec.groups:
            limits = tolerances(precision, group, overrides)
            if not limits:
                continue
            where = slice(group.start, group.stop)
            a, b = (want[:, where], got[:, where]) if want.ndim > 1 else (want, got)
            mask = np.broadcast_to(fires, a.shape) if fires is not None and group.kind == "box" else None
            if mask is not None and not mask.any():
                continue
            extent = group.extent or (float(max(imgsz)) if group.kind == "box" else float(np.ptp(a)) or 1.0)
            rows += [_row(a, b, mask, limit, extent, group, hop, feeds, spec.name) for limit in limits]
    return rows


def _row(
    a: Array,
    b: Array,
    mask: Array | None,
    limit: Tolerance,
    extent: float,
    group: ChannelGroup,
    hop: str,
    feeds: str,
    output: str,
) -> Comparison:
    allowed = limit.allowed * (extent if limit.relative else 1.0)
    # What is not finite is wrong without bound: no measure may call it close.
    b = np.where(np.isfinite(b), b, 1e300)
    error = np.abs(b - a)
    masked = error if mask is None else np.where(mask, error, -1.0)
    worst = tuple(int(i) for i in np.unravel_index(int(masked.argmax()), error.shape))
    if mask is not None:
        a, b, error = a[mask], b[mask], error[mask]
    magnitude = np.maximum(np.abs(a), 1e-12)
    with np.errstate(over="ignore", invalid="ignore"):
        return _judged(a, b, error, magnitude, limit, allowed, group, worst, hop, feeds, output)


def _judged(
    a: Array,
    b: Array,
    error: Array,
    magnitude: Array,
    limit: Tolerance,
    allowed: float,
    group: ChannelGroup,
    worst: tuple[int, ...],
    hop: str,
    feeds: str,
    output: str,
) -> Comparison:
    signal, noise = float(np.sum(a * a)), float(np.sum(error * error))
    norm = math.sqrt(signal) * float(np.linalg.norm(b))
    numbers = {
        "max_abs": float(error.max()),
        "mean_abs": float(error.mean()),
        "p99_abs": float(np.percentile(error, 99)),
        "max_rel": float((error / magnitude).max()),
        "mean_rel": float((error / magnitude).mean()),
        "cosine": float(np.sum(a * b) / norm) if norm > 0 else (1.0 if noise == 0 else 0.0),
        "snr_db": 10 * math.log10(signal / noise)
        if 0 < noise < math.inf and signal > 0
        else (300.0 if noise == 0 else -300.0),
    }
    # JSON has no infinity or NaN; a number this large reads as what it is.
    numbers = {
        k: (v if math.isfinite(v) else (-1e300 if k in ("cosine", "snr_db") else 1e300)) for k, v in numbers.items()
    }
    observed = numbers[limit.measure]
    passed = observed >= allowed if limit.is_lower_bound else observed <= allowed
    outside = float((error > allowed).mean()) if not limit.is_lower_bound else 0.0
    start = group.start
    index = (worst[0], worst[1] + start, *worst[2:]) if len(worst) > 1 else worst
    return Comparison(
        hop,
        feeds,
        output,
        group.name,
        group.unit,
        int(error.size),
        **numbers,
        fraction_outside=outside,
        worst_index=index,
        measure=limit.measure,
        observed=observed,
        allowed=allowed,
        reason=limit.reason,
        passed=passed,
    )

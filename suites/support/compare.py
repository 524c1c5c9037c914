"""Comparison: numbers only, per output and channel group; and the tolerances that gate them, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.errors import BadRequest
from exporters.models.spec import OF_ANCHORS, ChannelGroup, ModelSpec, OutputSpec
from exporters.spec import Precision

Array = npt.NDArray[Any]
Rounding = Callable[[int, Array | None], Mapping[str, Array]]
PIXELS = ("box", "point")  # kinds whose channels are coordinates of one thing
SCORE_FLOOR = 0.25  # the contract's default confidence: below it a deployment drops the box


@dataclass(frozen=True)
class Tolerance:
    """What is allowed of one measure. `relative` scales it by the group's extent (the image size for boxes).

    `reach` is the distance in pixels up to which `allowed` is argued: of an image that is smaller it is as much less.
    What belongs to anchors counts on those that fire, `everywhere` on all of them. `conditioned`: where Monte Carlo
    arithmetic moves an element of the reference so far that SIGMAS standard deviations of it are more than `allowed`,
    that much is allowed of this element. `of_logits`: `allowed` is of the logit behind a probability p, which moves by
    p (1 - p) as much, and never less than FP32's limit.
    """

    measure: str  # max_abs, p99_abs, cosine, snr_db ...
    allowed: float
    reason: str
    relative: bool = False
    conditioned: bool = False
    everywhere: bool = False
    reach: float = 0.0
    of_logits: bool = False

    def of(self, extent: float) -> float:
        """The limit in a group of this extent."""
        if self.relative:
            return self.allowed * extent
        return self.allowed * (min(1.0, extent / self.reach) if self.reach else 1.0)

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
        observed = f"{self.observed:.4g}{unit}" if abs(self.observed) < 1e300 else "not finite"
        return (
            f"{self.output} {self.group}: {self.measure} {observed}, allowed {self.allowed:.4g}{unit} "
            f"({self.hop}, feeds {self.feeds}, worst at {list(self.worst_index)})"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"worst_index": list(self.worst_index)}


# Rounding errors of a deep graph are sums of many small ones, nearly normal: beyond 6 sigma lies 2e-9 of them, and an
# eighth of that many elements is compared in a run. How far they reach depends on the element: a box whose distribution
# over distances is broad (its edge is an expectation, whose derivative by a logit is p_i (i - E)) moves tens of times
# farther than a sharp one under the same rounding, so that no constant fits both. TensorRT's FP16 kernels may also
# round their sums every 16 terms, XNNPACK's after each where the CPU adds in FP16, and a convolution of 64 channels,
# 3 x 3, has 576: there the draws round so, too. (Every 16 terms YOLOv8n's boxes move 1.7 times as far on average, its
# scores 1.9 times; an H100's engine against the same file in ONNX Runtime, whose sums are FP32: 1.8 and 2.3.)
SIGMAS = 6.0
# Draws of Monte Carlo arithmetic. A standard deviation of 8 draws is itself uncertain by 25 % (of a score; a box pools
# four coordinates): the error over it follows Student's t, which lies beyond 6 in 3e-4 of cases with 8 degrees of
# freedom and in 1e-6 with 32. So what is still beyond after the first is judged again with more, unless it lies so far
# beyond that no better estimate reaches it: a standard deviation of 8 draws is never (1e-5) a quarter of the true one.
DRAWS = (8, 32)
FAR = 4.0
FRACTION_BITS: Mapping[Precision, int] = {Precision.FP16: 10, Precision.TF32: 10, Precision.BF16: 7}
DFL = (
    "DFL: 15 cells x stride 32 x FP16's half ulp 2^-11 = 0.23 px a rounding, four deep, and less in an image of fewer "
    "than 480 px; more for a box that FP16 arithmetic itself moves farther (6 standard deviations of the reference in "
    "Monte Carlo arithmetic)"
)
REACH = {"box": 480.0, "point": 512.0}  # px: 15 cells x stride 32, and 2 x 32 x coordinates up to 8
SUMS = "FP32 sums of some 10^3 terms differ by about 10^3 x 2^-24 = 6e-5 of the range"
POINT = "2 x stride 32 x coordinates up to 8 x FP16's half ulp 2^-11 = 0.25 px a rounding, four deep; as for boxes"
ANGLE = "sigmoid's slope 1/4 x pi x logits up to 10 x 2^-11 = 3.8e-3 rad a rounding, four deep; as for boxes"
SIGMOID = "sigmoid's slope 1/4 x logits up to 10 x 2^-11 = 1.2e-3 a rounding, four deep; as for boxes"
SOFTMAX = "logits up to 5 x 2^-11 = 2.4e-3 a rounding, four deep, times softmax's slope p (1 - p); as for boxes"
SOFTMAX_LEAST = 1e-4  # FP32's
VALUE = "2^-11 a rounding, some ten roundings deep; as for boxes"
EIGHT = "8 times FP16's, since a rounding is; as for FP16"


def _halves(precision: Precision, times: float) -> dict[tuple[Precision, str], tuple[Tolerance, ...]]:
    """The limits of FP16, and of what rounds so many times as much, of what a task has beside boxes and classes."""
    limits = {
        "point": (1.0, POINT, False),
        "angle": (5e-3, ANGLE, True),  # of pi
        "visibility": (5e-3, SIGMOID, False),
        "probability": (1e-2, SOFTMAX, False),
        "mask": (5e-3, VALUE, True),
    }
    return {
        (precision, kind): (
            Tolerance(
                "max_abs",
                allowed * times,
                reason if times == 1 else EIGHT,
                relative,
                conditioned=True,
                reach=REACH.get(kind, 0.0),
                of_logits=kind == "probability",
            ),
        )
        for kind, (allowed, reason, relative) in limits.items()
    }


DEFAULTS: Mapping[tuple[Precision, str], tuple[Tolerance, ...]] = {
    (Precision.FP32, "box"): (Tolerance("max_abs", 1e-4, SUMS, relative=True, everywhere=True),),
    (Precision.FP32, "score"): (
        Tolerance("max_abs", 1e-4, "FP32 sums of some 10^3 terms differ by about 10^3 x 2^-24 = 6e-5", True),
    ),
    **{
        (Precision.FP32, kind): (Tolerance("max_abs", 1e-4, SUMS, relative=True, everywhere=True),)
        for kind in ("point", "mask", "visibility", "angle", "probability", "value")
    },
    (Precision.FP16, "box"): (
        Tolerance("max_abs", 1.0, DFL, conditioned=True, reach=REACH["box"]),
        Tolerance("cosine", 0.999, "a scale error of 4 % turns 0.999 in one channel"),
    ),
    (Precision.FP16, "score"): (
        Tolerance(
            "max_abs",
            5e-3,
            "sigmoid's slope 1/4 x logits up to 10 x 2^-11 = 1.2e-3 a rounding, four deep; as for boxes",
            conditioned=True,
        ),
    ),
    (Precision.FP16, "value"): (
        Tolerance("max_abs", 5e-3, VALUE, True, True),
        Tolerance("cosine", 0.999, "ten roundings of 2^-11 keep 1 - 1e-5; 0.999 leaves room for outliers"),
    ),
    **_halves(Precision.FP16, 1),
    # BF16 has 3 bits of fraction fewer than FP16: each rounding is 8 times as large.
    **_halves(Precision.BF16, 8),
    (Precision.BF16, "box"): (
        Tolerance("max_abs", 8.0, EIGHT, conditioned=True, reach=REACH["box"]),
        Tolerance("cosine", 0.999, "a scale error of 4 % turns 0.999 in one channel"),
    ),
    (Precision.BF16, "score"): (Tolerance("max_abs", 4e-2, EIGHT, conditioned=True),),
    (Precision.BF16, "value"): (
        Tolerance("max_abs", 4e-2, EIGHT, True, True),
        Tolerance("cosine", 0.999, "ten roundings of 2^-8 keep 1 - 1e-4; 0.999 leaves room for outliers"),
    ),
    # Elementwise limits say little about 8 bits: they are judged by matching, and by the task's metric.
    **{(p, kind): () for p in (Precision.INT8, Precision.FP8) for kind in (*OF_ANCHORS, "score", "probability")},
    (Precision.INT8, "value"): (
        Tolerance(
            "snr_db",
            20.0,
            "8 bits at a crest factor of 4 give 41 dB a layer; 60 layers add 18 dB of noise; 3 dB margin",
        ),
    ),
    (Precision.FP8, "value"): (
        Tolerance(
            "snr_db",
            10.0,
            "3 bits of fraction: a rounding of 2^-4 / sqrt(3) is 29 dB a layer; 60 layers add 18 dB; 1 dB margin",
        ),
    ),
}


def tolerances(
    precision: Precision, group: ChannelGroup, overrides: Sequence[Mapping[str, Any]] = ()
) -> tuple[Tolerance, ...]:
    """The limits of a channel group; an override of exportgate.toml replaces those of its group and precision.

    Where the default looks at every anchor, those that do not fire included, the override does.
    """
    defaults = DEFAULTS.get((precision, group.kind), DEFAULTS[(Precision.FP16, group.kind)])
    everywhere = any(d.everywhere for d in defaults)
    chosen = tuple(
        Tolerance(
            str(o["measure"]),
            float(o["allowed"]),
            str(o["reason"]),
            bool(o.get("relative", False)),
            everywhere=everywhere,
        )
        for o in overrides
        if o.get("precision") == precision.value and o.get("group") in (group.name, group.kind)
    )
    return chosen or defaults


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
    rounding: Rounding | None = None,
    same_graph: bool = False,
) -> list[Comparison]:
    """One Comparison for each output's channel group and each limit on it; names and shapes must be equal already.

    `rounding` gives, when a limit that is conditioned is passed, the standard deviation of each element of the
    reference in so many draws of Monte Carlo arithmetic of this precision: of the rows of a batch whose indices it is
    given, in their order, or of a model without a batch (None) of everything.

    8-bit detectors are judged by their detections, and element by element only where both sides ran the `same_graph`:
    then they differ by values that lie at the edge of a step and were rounded to the other side, which is less than the
    noise that the steps make. (In FP16, too, both sides then round.)

    Box channels are compared on the anchors whose reference score is at least SCORE_FLOOR, in FP32 on all; where none
    fires, the former are left out (and the power check will say so).

    Raises:
        BadRequest: a channel of an output belongs to no group, so that nothing would compare it.
    """
    rows: list[Comparison] = []
    for spec in model.outputs:
        want, got = np.asarray(expected[spec.name], np.float64), np.asarray(observed[spec.name], np.float64)
        _check_cover(spec, want)
        score = next((g for g in spec.groups if g.kind == "score"), None)
        is_matched = {"box", "score"} <= {g.kind for g in spec.groups}  # by `detections.match`
        fires = want[:, score.channels].max(1, keepdims=True) >= SCORE_FLOOR if score and want.ndim == 3 else None
        for group in spec.groups:
            limits = tolerances(precision, group, overrides)
            # Where nothing fires a score is the tail of a sigmoid, whose relative error says nothing.
            masked = group.kind in OF_ANCHORS
            if not limits and (same_graph or not is_matched):
                limits, masked = DEFAULTS[precision, "value"], masked or is_matched
            if not limits:
                continue
            where = group.channels
            a, b = (want[:, where], got[:, where]) if want.ndim > 1 else (want, got)
            firing = np.broadcast_to(fires, a.shape) if fires is not None and masked else None
            extent = group.extent or (float(max(imgsz)) if group.kind in PIXELS else float(np.ptp(a)) or 1.0)
            for limit in limits:
                mask = None if limit.everywhere else firing
                if mask is not None and not mask.any():
                    continue
                bound = least = np.full(a.shape, limit.of(extent))
                if limit.of_logits:
                    bound = least = np.maximum(least * a * (1 - a), SOFTMAX_LEAST)
                counts = DRAWS if limit.conditioned and rounding is not None else ()
                for draws in counts:
                    error = np.abs(b - a) if mask is None else np.abs(b - a) * mask
                    beyond = error > bound
                    if not beyond.any() or (draws > DRAWS[0] and (error > FAR * bound).any()):
                        break
                    assert rounding is not None
                    # Of the rows that need it alone: each draw of a row is an inference of the reference.
                    some = np.flatnonzero(beyond.reshape(len(beyond), -1).any(1)) if model.has_batch else None
                    spread = np.asarray(rounding(draws, some)[spec.name], np.float64)
                    spread = spread[:, where] if want.ndim > 1 else spread
                    if group.kind in PIXELS:
                        spread = np.sqrt(np.mean(spread**2, axis=1, keepdims=True))
                    # Two sides that both round differ by the root of two times what one differs from exact arithmetic.
                    moved = SIGMAS * spread * (math.sqrt(2) if same_graph else 1.0)
                    bound, chosen = bound.copy(), slice(None) if some is None else some
                    bound[chosen] = np.maximum(least[chosen], moved)
                rows.append(_row(a, b, mask, limit, bound, group, hop, feeds, spec.name))
    return rows


def _check_cover(spec: OutputSpec, want: Array) -> None:
    """Every channel is in a group, and every group has a channel."""
    if want.ndim < 2:
        return
    channels = range(want.shape[1])
    empty = next((g.name for g in spec.groups if not channels[g.channels]), None)
    free = next((c for c in channels if not any(c in channels[g.channels] for g in spec.groups)), None)
    if empty is not None or free is not None:
        raise BadRequest(
            f"output '{spec.name}' has {len(channels)} channels, "
            + (f"none in group '{empty}'" if empty is not None else f"and channel {free} is in no group"),
            "correct start and stop of its groups in exportgate.toml, so that every channel is compared",
        )


def _row(
    a: Array,
    b: Array,
    mask: Array | None,
    limit: Tolerance,
    bound: Array,
    group: ChannelGroup,
    hop: str,
    feeds: str,
    output: str,
) -> Comparison:
    # What is not finite is wrong without bound: no measure may call it close.
    b = np.where(np.isfinite(b), b, 1e300)
    error = np.abs(b - a)
    share = error / np.maximum(bound, 1e-300) if limit.measure == "max_abs" else error
    masked = share if mask is None else np.where(mask, share, -1.0)
    worst = tuple(int(i) for i in np.unravel_index(int(masked.argmax()), error.shape))
    allowed, at_worst = float(bound[worst]), float(error[worst])
    if mask is not None:
        a, b, error, bound = a[mask], b[mask], error[mask], bound[mask]
    magnitude = np.maximum(np.abs(a), 1e-12)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = _numbers(a, b, error, magnitude)
    observed = at_worst if limit.measure == "max_abs" else numbers[limit.measure]
    passed = observed >= allowed if limit.is_lower_bound else observed <= allowed
    outside = float((error > bound).mean()) if not limit.is_lower_bound else 0.0
    index = (worst[0], worst[1] * group.step + group.start, *worst[2:]) if len(worst) > 1 else worst
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


def _numbers(a: Array, b: Array, error: Array, magnitude: Array) -> dict[str, float]:
    """Every measure, of values that are compared."""
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
    return {
        k: (v if math.isfinite(v) else (-1e300 if k in ("cosine", "snr_db") else 1e300)) for k, v in numbers.items()
    }

"""Latencies as inline SVG: this run's distribution above a common axis in milliseconds, its baseline's below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeGuard

from markupsafe import Markup, escape

from reports.events import Baseline, Claim, Gate, Search
from reports.wording import milliseconds, number

WIDTH = 560
LEFT, RIGHT = 12, 548
BINS = 64
# More samples than this change no pixel of a histogram with BINS bars; every n-th is drawn instead.
ENOUGH = 4096
# Milliseconds (eleven days): a record may claim more, and then it is not drawn.
ABSURD = 1e9
# The axis leaves out the outermost samples of each side, which would squeeze everything else; the caption counts them.
TAIL = 0.005


@dataclass(frozen=True)
class _Lane:
    """One distribution: where its bars start (y), how high they may grow and in which direction (-1 is up)."""

    name: str
    style: str
    samples: list[float]
    medians: list[float]
    p50: float | None
    span: tuple[float, float] | None
    base: float
    room: float
    direction: int


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(LEFT + (RIGHT - LEFT) * min(max(share, 0.0), 1.0), 1)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def latency(claim: Claim) -> Markup:
    """The distribution of a claim's measurement beside its baseline's; empty without samples."""
    measurement = claim.measurement
    samples = thinned(measurement.processes) if measurement else []
    if measurement is None or not samples:
        return Markup("")
    p50 = measurement.p50
    span = (p50.low, p50.high) if p50 and drawable(p50.low) and drawable(p50.high) else None
    value = p50.value if p50 and drawable(p50.value) else None
    lanes = [_Lane("this run", "now", samples, _medians(measurement.processes), value, span, 119, 86, -1)]
    baseline = claim.baseline
    if baseline:
        name = f"baseline {baseline.date[:10]}".strip()
        below = thinned(baseline.processes)
        then = baseline.p50 if drawable(baseline.p50) else None
        lanes.append(_Lane(name, "then", below, _medians(baseline.processes), then, None, 121, 64, 1))
    axis = _axis(lanes)
    height = 237 if baseline else 161
    parts = [
        _axis_marks(axis, height),
        *(_drawn(lane, axis) for lane in lanes),
        _limit(axis, baseline, claim.gate, height),
    ]
    beyond = [sample for process in measurement.processes for sample in process if sample > axis.high]
    caption = f"; beyond the axis: {len(beyond):,}, the slowest {milliseconds(max(beyond))} ms" if beyond else ""
    return Markup('<figure class="picture">{}<figcaption>{}{}</figcaption></figure>').format(
        svg(height, f"Distribution of latency, {lanes[0].name}{' and ' + lanes[1].name if baseline else ''}", parts),
        "Share of inferences by latency; each dot is the median of one process, the band the confidence of p50",
        caption,
    )


def ratio(gate: Gate) -> Markup:
    """The gate: the ratio to the baseline with its interval, against the slow-down that is let pass."""
    if not drawable(gate.ratio) or not drawable(gate.delta):
        return Markup("")
    low = gate.low if drawable(gate.low) else gate.ratio
    high = gate.high if drawable(gate.high) else gate.ratio
    limit = 1 + gate.delta
    reach = max(abs(edge - 1) for edge in (low, high, limit, gate.ratio)) * 1.25 or 0.05
    axis = _Axis(1 - reach, 1 + reach)
    verdict = "bad" if low > limit else "good" if high < limit else "open"
    limit_x = axis.x(limit)
    parts = [
        Markup('<rect class="beyond" x="{}" y="20" width="{}" height="26"/>').format(
            limit_x, round(RIGHT - limit_x, 1)
        ),
        Markup('<line class="rule" x1="{0}" x2="{1}" y1="46" y2="46"/>').format(LEFT, RIGHT),
        _mark(axis.x(1), (20, 46), "one", "as fast as before", 60),
        _mark(limit_x, (20, 46), "limit", f"allowed {number(limit)}", 12),
        Markup('<line class="interval {}" x1="{}" x2="{}" y1="33" y2="33"/>').format(
            verdict, axis.x(low), axis.x(high)
        ),
        Markup('<circle class="interval {}" cx="{}" cy="33" r="5"/>').format(verdict, axis.x(gate.ratio)),
        _beside(axis.x(low), axis.x(high), f"{number(gate.ratio)} ×"),
    ]
    label = (
        f"Ratio to the baseline {number(gate.ratio)}, interval {number(low)} to {number(high)}, allowed {number(limit)}"
    )
    return Markup('<figure class="picture">{}</figure>').format(svg(66, label, parts))


def tradeoff(search: Search) -> Markup:
    """Accuracy against latency: each try a dot, the chosen one named, the budget a line; empty without latencies."""
    shown = [s for s in search.steps if drawable(s.milliseconds) and drawable(s.change)]
    chosen = search.steps[search.chosen] if search.chosen < len(search.steps) else None
    if len(shown) < 2:
        return Markup("")
    times = [s.milliseconds for s in shown if s.milliseconds is not None]
    room = (max(times) - min(times)) * 0.1 or max(times) * 0.1
    axis = _Axis(max(min(times) - room, 0.0), max(times) + room)
    shares = [s.change for s in shown if s.change is not None] + [1.0, search.share]
    low, high = min(shares), max(shares)
    span = (high - low) or 0.01
    height = 220

    def y(share: float) -> float:
        return round(34 + (height - 26 - 48) * (high - share) / span, 1)

    parts = [
        _axis_marks(axis, height),
        _level(y(search.share), f"asked for: {number(search.share)} of PyTorch's {search.metric}", "limit"),
    ]
    for step in shown:
        if step.milliseconds is None or step.change is None:  # drawable, which the type does not say
            continue
        x, here = axis.x(step.milliseconds), y(step.change)
        style = "good" if step.meets else "bad"
        parts.append(Markup('<circle class="interval {}" cx="{}" cy="{}" r="5"/>').format(style, x, here))
        if step is chosen:
            text = f"{step.name}: {number(step.change)}, {milliseconds(step.milliseconds)} ms"
            parts.append(_beside(x, x, text, here + 4, 250))
    label = f"Accuracy against latency of {len(shown)} tries; chosen: {chosen.name if chosen else 'none'}"
    return Markup('<figure class="picture">{}<figcaption>{}</figcaption></figure>').format(
        svg(height, label, parts),
        "Share of PyTorch's metric against the median latency of each try; where red, its interval reaches below what "
        "is asked for",
    )


def _level(y: float, text: str, style: str) -> Markup:
    """A horizontal line with its name above it."""
    return Markup(
        '<line class="mark {0}" x1="{1}" x2="{2}" y1="{3}" y2="{3}"/><text class="label {0}" x="{1}" y="{4}">{5}</text>'
    ).format(style, LEFT, RIGHT, y, round(y - 5, 1), text)


def _beside(left: float, right: float, text: str, y: float = 37, room: float = 70) -> Markup:
    """A label after an interval, or before it where there is no room."""
    x, anchor = (right + 10, "start") if right < RIGHT - room else (left - 10, "end")
    return Markup('<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        round(x, 1), round(y, 1), anchor, text
    )


def thinned(processes: Sequence[Sequence[float]]) -> list[float]:
    """Some ENOUGH samples of all processes, evenly spaced in the order they were taken, but not the undrawable."""
    total = sum(len(process) for process in processes)
    step = max(1, math.ceil(total / ENOUGH))
    flat = (sample for process in processes for sample in process[::step])
    return [sample for sample in flat if drawable(sample)]


def drawable(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) < ABSURD  # false for a NaN too


def _medians(processes: Sequence[Sequence[float]]) -> list[float]:
    return [median(process[:ENOUGH]) for process in processes if process]


def _axis(lanes: Sequence[_Lane]) -> _Axis:
    edges: list[float] = []
    for lane in lanes:
        ordered = sorted(lane.samples)
        cut = int(len(ordered) * TAIL)
        edges += ordered[cut : cut + 1] + ordered[len(ordered) - 1 - cut :][:1]
        edges += [edge for edge in (lane.p50, *(lane.span or ())) if edge is not None]
    low, high = min(edges), max(edges)
    # At least 1 % of the value on each side, so that neighbouring ticks differ in their labels.
    pad = max((high - low) * 0.06, abs(high) * 0.01, 1e-6)
    return _Axis(low - pad, high + pad)


def svg(height: int, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("").join(parts)
    )


def _axis_marks(axis: _Axis, height: int) -> Markup:
    floor = height - 26
    parts = [Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, RIGHT, floor, floor)]
    for value in _ticks(axis):
        x = axis.x(value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="26" y2="{}"/>').format(x, x, floor))
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                x, floor + 15, "middle" if 60 < x < 500 else "start" if x <= 60 else "end", f"{value:g} ms"
            )
        )
    return Markup("").join(parts)


def _ticks(axis: _Axis) -> list[float]:
    """Round values, four to seven of them."""
    rough = (axis.high - axis.low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.8)
    first = math.ceil(axis.low / step)
    # Rounding hides the dust of binary fractions (0.30000000000000004) in labels.
    return [round(index * step, 12) for index in range(first, math.floor(axis.high / step) + 1)][:12]


def _drawn(lane: _Lane, axis: _Axis) -> Markup:
    parts = [_bars(lane, axis)]
    if lane.span:
        left, right = axis.x(lane.span[0]), axis.x(lane.span[1])
        top = min(lane.base, lane.base + lane.direction * lane.room)
        band = Markup('<rect class="band {}" x="{}" y="{}" width="{}" height="{}"/>')
        parts.insert(0, band.format(lane.style, left, top, max(round(right - left, 1), 1), lane.room))
    dots = lane.base + lane.direction * 7
    parts += [
        Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.6"/>').format(lane.style, axis.x(value), dots)
        for value in lane.medians[:60]
        if axis.holds(value)
    ]
    if lane.p50 is not None:
        end = lane.base + lane.direction * lane.room
        text = end - 6 if lane.direction < 0 else end + 13
        label = f"{lane.name}: p50 {milliseconds(lane.p50)} ms"
        parts.append(_mark(axis.x(lane.p50), (lane.base, end), lane.style, label, text))
    return Markup("").join(parts)


def _bars(lane: _Lane, axis: _Axis) -> Markup:
    counts = [0] * BINS
    scale = BINS / (axis.high - axis.low)
    for sample in lane.samples:
        index = int((sample - axis.low) * scale) if axis.holds(sample) else -1
        if 0 <= index < BINS:
            counts[index] += 1
    tallest = max(counts)
    if not tallest:
        return Markup("")
    step = (RIGHT - LEFT) / BINS
    path = [f"M{LEFT} {lane.base}"]
    for index, count in enumerate(counts):
        y = lane.base + lane.direction * lane.room * count / tallest
        path.append(f"V{y:.1f}H{LEFT + step * (index + 1):.1f}")
    return Markup('<path class="bars {}" d="{}V{}Z"/>').format(lane.style, "".join(path), lane.base)


def _limit(axis: _Axis, baseline: Baseline | None, gate: Gate | None, height: int) -> Markup:
    if not baseline or not gate or not drawable(baseline.p50) or not drawable(gate.delta):
        return Markup("")
    limit = baseline.p50 * (1 + gate.delta)
    return _mark(axis.x(limit), (14, height - 26), "limit", "allowed", 11) if axis.holds(limit) else Markup("")


def _mark(x: float, span: tuple[float, float], style: str, label: str, text: float) -> Markup:
    """A vertical line from top to bottom (span), with a label at height `text` that stays inside the picture."""
    anchor = "middle" if 90 < x < WIDTH - 90 else "start" if x <= 90 else "end"
    return Markup(
        '<line class="mark {style}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
        '<text class="label {style}" x="{x}" y="{text}" text-anchor="{anchor}">{label}</text>'
    ).format(style=style, x=x, top=span[0], bottom=span[1], text=text, anchor=anchor, label=escape(label))

"""A figure of a case over many runs as inline SVG: a line for each machine, from run to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeGuard

from markupsafe import Markup

from reports.history import ERROR, Course, Figure, History, Point
from reports.picture import drawable, svg
from reports.wording import moment

LEFT, RIGHT, TOP, BOTTOM = 84, 520, 16, 96
HEIGHT = 122
STYLES = 3  # colours of lines; beyond as many machines the letters alone tell them apart


@dataclass(frozen=True)
class _Plane:
    """Where a value of a run stands; `runs` is their number, at least two."""

    runs: int
    low: float
    high: float

    def x(self, run: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * run / (self.runs - 1), 1)

    def y(self, value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low), 1)


def picture(found: History, course: Course, figure: Figure) -> Markup:
    """The figure's lines over all runs; empty where no value can be drawn. The table beside it has every value."""
    drawn = [entry for entry in figure.points if entry and drawable(entry.value)]
    if not drawn:
        return Markup("")
    edges = [edge for entry in drawn for edge in (entry.value, entry.low, entry.high) if drawable(edge)]
    # The bound belongs into the picture once an error comes near it; far below, it would flatten the line.
    edges += [1.0] if figure.what == ERROR and max(edges) > 0.5 else []
    # A twentieth of the value at least, so that noise in the fourth digit does not look like a trend.
    pad = max((max(edges) - min(edges)) * 0.08, max(map(abs, edges)) * 0.05, 1e-12)
    plane = _Plane(len(found.runs), min(edges) - pad, max(edges) + pad)
    names = list(dict.fromkeys(name for name in course.machines if name))
    parts = [_frame(found, figure, plane, min(edges), max(edges))]
    for name in names:
        letter = found.letter(name) if len(found.machines) > 1 else ""
        parts += _series(course, figure, plane, name, letter, f"line{found.machines.index(name) % STYLES}")
    label = f"{figure.what} of {course.case} over {len(found.runs)} runs; the table of this case has every value"
    return Markup('<figure class="picture"><figcaption>{}</figcaption>{}</figure>').format(
        figure.what, svg(HEIGHT, label, parts)
    )


def _frame(found: History, figure: Figure, plane: _Plane, low: float, high: float) -> Markup:
    """The axis with the first and the last run's time, the lowest and highest value, and the bound of an error."""
    rule = Markup('<line class="{}" x1="{}" x2="{}" y1="{y}" y2="{y}"/>')
    tick = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
    parts = [rule.format("rule", LEFT, RIGHT, y=BOTTOM + 4)]
    apart = max(0.0, 6 - (plane.y(low) - plane.y(high)) / 2)  # by how much close labels are moved so as not to overlap
    for value, shift in {low: apart, high: -apart}.items() if low < high else [(low, 0.0)]:
        parts.append(rule.format("grid", LEFT, RIGHT, y=plane.y(value)))
        parts.append(tick.format(LEFT - 10, round(plane.y(value) + 4 + shift, 1), "end", figure.shown(value)))
    if figure.what == ERROR and low <= 1 <= high:
        parts.append(rule.format("mark limit", LEFT, RIGHT, y=plane.y(1)))
    for run, anchor in ((0, "start"), (plane.runs - 1, "end")):
        when = moment(found.runs[run].runs[0].start.time)[:10]
        parts.append(tick.format(plane.x(run), BOTTOM + 20, anchor, when))
    return Markup("").join(parts)


def _seen(entry: Point | None) -> TypeGuard[Point]:
    return entry is not None and drawable(entry.value)


def _series(course: Course, figure: Figure, plane: _Plane, name: str, letter: str, style: str) -> Iterator[Markup]:
    """One machine's points, joined where neighbouring runs of this machine have a value that can be drawn."""
    own = [(run, figure.points[run]) for run, machine in enumerate(course.machines) if machine == name]
    for (run, one), (later, other) in pairwise(own):
        if _seen(one) and _seen(other):
            yield Markup('<line class="trend {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                style, plane.x(run), plane.x(later), plane.y(one.value), plane.y(other.value)
            )
    for run, entry in own:
        if not _seen(entry):
            continue
        x, y = plane.x(run), plane.y(entry.value)
        if drawable(entry.low) and drawable(entry.high):
            yield Markup('<line class="trend span {}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(
                style, plane.y(entry.low), plane.y(entry.high), x=x
            )
        yield Markup('<circle class="trend {}" cx="{}" cy="{}" r="3"/>').format(style, x, y)
    last = next(((run, entry) for run, entry in reversed(own) if _seen(entry)), None)
    if letter and last and last[1]:
        yield Markup('<text class="label" x="{}" y="{}">{}</text>').format(
            plane.x(last[0]) + 7, plane.y(last[1].value) + 4, letter
        )

"""Attribution: the first place inside a graph that leaves its tolerance, for the line of a comparison that failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from exporters.pool import RemoteSession
from exporters.session import Array, Feeds
from exporters.spec import CALIBRATED, INSIDE, ExportSpec, Precision

AT_ONCE = 16  # modules whose outputs are held at a time, of a few images; of a large batch a quarter
# An engine is built again to show what is inside: minutes where its kernels are not known yet. Eight outputs more leave
# most of its fusions alone, and find one of 500 modules in three builds; two more for modules that cannot be compared.
SHOWN, BUILDS = 8, 5
# Largest difference of a module's output, as a share of its range. FP32: sums of some 10^3 terms differ by 6e-5. FP16
# and TF32 round to 2^-11 of an element, some sixty times on the way, with peaks of five deviations; BF16 eight times as
# coarsely. In 8 bits a calibrator may cut the largest values off, so that the noise is what counts, as a share of the
# spread: 41 dB below it a layer, of sixty layers 23 dB, half of that again for what is cut off, and a margin of 6 dB.
ALLOWED: Mapping[Precision, float] = {
    Precision.FP32: 1e-4,
    Precision.TF32: 5e-3,
    Precision.FP16: 5e-3,
    Precision.BF16: 4e-2,
    Precision.FP8: 0.2,
    Precision.INT8: 0.2,
}


class Inside(Protocol):
    """What shows the outputs of modules, as sessions of ONNX files and of the reference do."""

    def modules(self) -> dict[str, str]: ...

    def run_inside(self, feeds: Feeds, modules: Sequence[str], row: int) -> dict[str, Array]: ...


class Rebuilt:
    """Inside an engine, which gives its outputs alone: it is built again from the same graph, with some more."""

    def __init__(self, spec: ExportSpec, opened: Callable[[ExportSpec], RemoteSession], graph: Inside) -> None:
        """`spec` is the engine's, `opened` exports and opens a request, `graph` knows which modules there are."""
        self.spec, self.opened, self.graph = spec, opened, graph

    def modules(self) -> dict[str, str]:
        return self.graph.modules()

    def run_inside(self, feeds: Feeds, modules: Sequence[str], row: int) -> dict[str, Array]:
        if self.spec.model.has_batch and self.spec.batch > 1:  # the row alone: a batch's insides are gigabytes
            feeds = {name: values[row : row + 1] for name, values in feeds.items()}
        session = self.opened(self.spec.but(inside=tuple(modules)))
        try:
            made = session.run(feeds)
            return {m: np.array(made[INSIDE + m]) for m in modules if INSIDE + m in made}
        finally:
            session.close()


@dataclass(frozen=True)
class Found:
    """How many modules were within, and the first node beyond; "" where all were within."""

    within: int
    node: str
    observed: float
    allowed: float
    of: str  # what these are shares of
    rebuilt: bool = False

    @property
    def line(self) -> str:
        if not self.within and not self.node:
            return ""
        where = "in an engine built again to show it" if self.rebuilt else "inside"
        if self.node:
            return (
                f"{where}, {self.within} modules in front are within their tolerance, and the first beyond is "
                f"{self.node}: {self.observed:.2g} of its {self.of} against {self.allowed:g}"
            )
        if self.rebuilt:
            return (
                f"{where}, the outputs of {self.within} modules are within {self.allowed:g} of their {self.of}, so "
                "that it happens behind them, or in this file alone"
            )
        return (
            f"the outputs of all {self.within} modules that can be told apart inside are within "
            f"{self.allowed:g} of their {self.of}, so that it happens behind them"
        )


def first_beyond(
    reference: Inside, inside: Inside, feeds: Feeds, cast: Feeds, precision: Precision, row: int = 0
) -> Found:
    """Compares the outputs of modules that an artifact's graph and the reference both name, in the graph's order.

    Modules are searched from the front, since behind the first one all others may be within again; in engines, where
    each look costs a build, by narrowing down where a module within is followed by one beyond.

    Args:
        feeds: for the reference.
        cast: the same in the types of the artifact's inputs.
        row: of a batch, that is compared.
    """
    theirs, ours = inside.modules(), reference.modules()
    shared = [m for m in theirs if m in ours]
    allowed = ALLOWED[precision]
    share, of = (_noise, "spread") if precision in CALIBRATED else (_largest, "range")

    def shares(some: Sequence[str]) -> dict[str, float]:
        """Of each module's output; without those that were joined with another, or filled up."""
        expected, observed = reference.run_inside(feeds, some, row), inside.run_inside(cast, some, row)
        return {
            m: share(np.asarray(expected[m], np.float64), np.asarray(observed[m], np.float64))
            for m in some
            if m in expected and m in observed and expected[m].shape == observed[m].shape
        }

    rebuilt = isinstance(inside, Rebuilt)
    at_once = AT_ONCE if len(next(iter(feeds.values()))) <= 4 else AT_ONCE // 4
    search = narrowed(shared, shares, allowed) if rebuilt else _in_order(shared, shares, allowed, at_once)
    within, module, observed = search
    return Found(within, theirs.get(module, ""), observed, allowed, of, rebuilt)


Shares = Callable[[Sequence[str]], dict[str, float]]


def _in_order(modules: Sequence[str], shares: Shares, allowed: float, at_once: int) -> tuple[int, str, float]:
    """How many modules are within, the first that is beyond ("" where none is), and its share."""
    within = 0
    for start in range(0, len(modules), at_once):
        for module, found in shares(modules[start : start + at_once]).items():
            if not found <= allowed:
                return within, module, found
            within += 1
    return within, "", 0.0


def narrowed(modules: Sequence[str], shares: Shares, allowed: float) -> tuple[int, str, float]:
    """The same, by looking at SHOWN modules at a time that are spread over those in question."""
    within, beyond, observed, open_ = 0, "", 0.0, list(modules)
    for _ in range(BUILDS):
        if not open_:
            break
        places = np.unique(np.linspace(0, len(open_), min(SHOWN, len(open_)) + 1).astype(int)[1:] - 1)
        some = [open_[p] for p in places]
        found = shares(some)
        first, last = 0, len(open_)
        for module in (m for m in some if m in found):
            if not found[module] <= allowed:
                beyond, observed, last = module, found[module], open_.index(module)
                break
            first, within = open_.index(module) + 1, within + 1
        open_ = [m for m in open_[first:last] if m not in some]
    return within, beyond, observed


def _largest(want: Array, got: Array) -> float:
    """Largest difference over the expected range; not finite where one is not."""
    return float(np.max(np.abs(got - want)) / (np.ptp(want) or 1.0)) if want.size else 0.0


def _noise(want: Array, got: Array) -> float:
    """Root of the mean squared difference over the expected standard deviation."""
    return float(np.sqrt(np.mean((got - want) ** 2)) / (np.std(want) or 1.0)) if want.size else 0.0

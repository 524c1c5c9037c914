"""The latency gate's own error rates: how often it cries wolf, and what it overlooks, on samples whose answer is known.

A false alarm is a FAIL of an artifact against itself. Beside it stands what `pytest-benchmark --benchmark-compare-fail`
says of the same samples, with the same limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.utils import PercentageRegressionCheck

from suites.support.baseline import read_baseline
from suites.support.gate import settle
from suites.support.verdict import Verdict

DELTA, PROCESSES, INFERENCES = 0.02, 10, 40
OCCASION = Path(__file__).with_name("h100_second_occasion.json")
RECORDED = Path(__file__).parents[2] / "baselines" / "nvidia-h100-80gb-hbm3-700w"
Made = Callable[[np.random.Generator], list[float]]  # one process of an artifact that takes 1 ms


def _around(center: float, shape: Callable[[np.random.Generator], np.ndarray]) -> Callable[[float], Made]:
    """Processes whose medians vary by `cv`, and inferences inside them by `shape` (relative, of unit spread)."""

    def of(cv: float) -> Made:
        def made(generator: np.random.Generator) -> list[float]:
            mine = center * (1 + cv * generator.standard_normal())
            return list(mine * (1 + 0.02 * shape(generator)))

        return made

    return of


def _autocorrelated(generator: np.random.Generator) -> np.ndarray:
    noise = generator.standard_normal(INFERENCES)
    for i in range(1, INFERENCES):
        noise[i] = 0.9 * noise[i - 1] + np.sqrt(1 - 0.81) * noise[i]
    return noise


def _bimodal_processes(cv: float) -> Made:
    """Three in ten processes meet a slower state: nothing inside a process tells."""

    def made(generator: np.random.Generator) -> list[float]:
        mine = 1 + cv * ((1.53 if generator.random() < 0.3 else -0.655) + 0.1 * generator.standard_normal())
        return list(mine * (1 + 0.002 * generator.standard_normal(INFERENCES)))

    return made


SHAPES: dict[str, Callable[[float], Made]] = {
    "normal": _around(1.0, lambda g: g.standard_normal(INFERENCES)),
    "two modes": _around(1.0, lambda g: np.where(g.random(INFERENCES) < 0.3, 1.53, -0.655)),
    "two modes of processes": _bimodal_processes,
    "drift": _around(1.0, lambda g: g.choice([-1, 1]) * np.sqrt(12) * np.linspace(-0.5, 0.5, INFERENCES)),
    "heavy tail": _around(1.0, lambda g: np.abs(g.standard_t(2, INFERENCES))),
    "autocorrelated": _around(1.0, _autocorrelated),
}


@dataclass
class Rate:
    """How often something happened, of how many runs; of the gate, and of pytest-benchmark's comparison."""

    runs: int = 0
    ours: int = 0
    theirs: int = 0
    undecided: int = 0
    measured: int = field(default=0)  # processes of the candidate

    def line(self, name: str) -> str:
        return (
            f"{name:42} {self.ours:5} of {self.runs} ({self.ours / self.runs:7.2%}), inconclusive "
            f"{self.undecided / self.runs:6.1%}, {self.measured / self.runs:4.1f} processes; pytest-benchmark "
            f"{self.theirs / self.runs:6.1%}"
        )


def _tried(baseline: Iterator[list[float]], candidate: Iterator[list[float]], rate: Rate) -> None:
    """One run of the gate, as `test_p50_within_baseline` does it, and of pytest-benchmark on its first round."""
    stored = [next(baseline) for _ in range(PROCESSES)]
    processes: list[list[float]] = []

    def more() -> list[list[float]]:
        processes.extend(next(candidate) for _ in range(PROCESSES))
        return processes

    gate = settle(stored, more(), more, DELTA)
    rate.runs += 1
    rate.ours += gate.verdict is Verdict.FAIL
    rate.undecided += gate.verdict is Verdict.INCONCLUSIVE
    rate.measured += len(processes)
    old, new = (float(np.median(np.concatenate(p))) for p in (stored, processes[:PROCESSES]))
    rate.theirs += bool(PercentageRegressionCheck("median", DELTA * 100).fails({"median": new}, {"median": old}))


def _processes(made: Made, generator: np.random.Generator, factor: float = 1.0) -> Iterator[list[float]]:
    while True:
        yield [x * factor for x in made(generator)]


def _rate(made: Made, runs: int, slower: float = 0.0) -> Rate:
    generator, rate = np.random.default_rng(7), Rate()
    for _ in range(runs):
        _tried(_processes(made, generator), _processes(made, generator, 1 + slower), rate)
    return rate


def upper(count: int, runs: int) -> float:
    """The 95 % upper bound (Clopper and Pearson, one-sided) of a rate: where so few would be seen in 5 % of cases."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        terms = [np.log1p(-middle) * runs]
        for k in range(1, count + 1):
            terms.append(terms[-1] + np.log((runs - k + 1) / k) + np.log(middle) - np.log1p(-middle))
        low, high = (middle, high) if np.exp(np.logaddexp.reduce(terms)) > 0.05 else (low, middle)
    return high


@cache
def _alarms(name: str) -> Rate:
    return _rate(SHAPES[name](0.02), 350)


def test_an_artifact_against_itself_is_rarely_alarmed() -> None:
    """2,100 runs at a coefficient of variation of 2 %, which is much: 95 % upper bound of the rate at most 1 %."""
    rates = {name: _alarms(name) for name in SHAPES}
    print(*(rate.line(f"A/A at CV 2 %, {name}") for name, rate in rates.items()), sep="\n")
    alarms, runs = sum(r.ours for r in rates.values()), sum(r.runs for r in rates.values())
    bound = upper(alarms, runs)
    print(f"alarms: {alarms} of {runs}, 95 % upper bound {bound:.2%}")
    assert runs >= 2000
    assert bound <= 0.01


@pytest.mark.parametrize(("slower", "cv"), [(0.07, 0.02), (0.05, 0.01)])
def test_a_slow_down_is_found(slower: float, cv: float) -> None:
    rates = {name: _rate(shape(cv), 120, slower) for name, shape in SHAPES.items()}
    print(*(rate.line(f"{slower:.0%} slower at CV {cv:.0%}, {name}") for name, rate in rates.items()), sep="\n")
    assert sum(r.ours for r in rates.values()) >= 0.99 * sum(r.runs for r in rates.values())


def _recorded() -> list[Sequence[Sequence[float]]]:
    """The processes of each stored measurement, in units of their median."""
    found: list[Sequence[Sequence[float]]] = []
    for baseline in (read_baseline(path) for path in sorted(RECORDED.glob("*.json"))):
        assert baseline is not None
        median = baseline.p50
        found.append([[x / median for x in p[:INFERENCES]] for p in baseline.processes])
    return found


@pytest.mark.parametrize("slower", [0.0, 0.05])
def test_recorded_processes_of_an_h100_are_judged_rightly(slower: float) -> None:
    """Drawn again from the ten processes of each stored engine: none alarms, and each slow-down of 5 % is found."""
    recorded, generator, rate = _recorded(), np.random.default_rng(3), Rate()
    assert recorded, f"{RECORDED} holds no baseline"
    for _ in range(2000 // len(recorded) + 1):
        for processes in recorded:

            def drawn(factor: float, own: Sequence[Sequence[float]] = processes) -> Iterator[list[float]]:
                while True:
                    process = own[int(generator.integers(len(own)))]
                    yield [x * factor for x in process]

            _tried(drawn(1.0), drawn(1 + slower), rate)
    print(rate.line(f"recorded on an H100, {slower:.0%} slower"))
    if slower:
        assert rate.ours >= 0.99 * rate.runs
    else:
        assert upper(rate.ours, rate.runs) <= 0.01


@pytest.mark.parametrize("slower", [0.0, 0.05, 0.07])
def test_processes_of_another_occasion_are_judged_rightly(slower: float) -> None:
    """Another day, another H100 of the model, engines built again: held against what was stored before."""
    cells = json.loads(OCCASION.read_text(encoding="utf-8"))["cells"]
    generator, rate = np.random.default_rng(5), Rate()
    for name, processes in cells.items():
        stored = read_baseline(RECORDED / f"{name}.json")
        assert stored is not None
        before = [p[:INFERENCES] for p in stored.processes]

        def drawn(own: Sequence[Sequence[float]], factor: float) -> Iterator[list[float]]:
            while True:
                yield [x * factor for x in own[int(generator.integers(len(own)))]]

        for _ in range(2000 // len(cells) + 1):
            _tried(drawn(before, 1.0), drawn(processes, 1 + slower), rate)
    print(rate.line(f"of another occasion on an H100, {slower:.0%} slower"))
    if slower:
        # Built again, an engine may be half a percent faster than the stored one: what is left of 5 % above 2 % is not
        # always beyond doubt with processes that differ by 2 %. But none of them passes.
        assert rate.ours >= (0.9 if slower == 0.05 else 0.99) * rate.runs
        assert rate.ours + rate.undecided == rate.runs
    else:
        assert upper(rate.ours, rate.runs) <= 0.01


def test_the_upper_bound_is_that_of_the_books() -> None:
    """No event in 300 runs bounds a rate below 1 % (the rule of three), and 12 in 2,100 below 0.95 %."""
    assert upper(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300), rel=1e-6)
    assert upper(12, 2100) == pytest.approx(0.00924, abs=2e-4)

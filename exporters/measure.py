"""The timed loop, run in the process where the session is: raw samples of one inference each, and the conditions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.errors import MeasurementError
from exporters.session import Array, Feeds, Session


@dataclass(frozen=True)
class MeasurementPlan:
    """How one process measures. Seconds of warm-up and of sampling, and the least number of inferences."""

    warm_up: float = 0.2
    seconds: float = 1.0
    inferences: int = 10
    agree: float = 0.05  # warm-up goes on until the medians of two windows differ by less than this share
    longest_warm_up: float = 3.0


@dataclass(frozen=True)
class Samples:
    """Milliseconds of single inferences in one process, in order (wall time, or what `timer` says), and what was seen.

    On a GPU `figures` are medians reported beside the samples, `before` and `after` its clocks and temperature, and
    `throttled` the reasons why its clocks were held down (None where nobody can tell).
    """

    milliseconds: tuple[float, ...]
    warm_up: int
    timer: str = "time.perf_counter_ns"
    first_call: float = 0.0
    settled: bool = True
    peak_rss: int = 0
    notes: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    before: Mapping[str, Any] = field(default_factory=dict[str, Any])
    after: Mapping[str, Any] = field(default_factory=dict[str, Any])
    throttled: tuple[str, ...] | None = None


def measure(session: Session, feeds: Sequence[Feeds], plan: MeasurementPlan) -> Samples:
    """Times inferences on feeds in rotation: warm-up until two windows agree, then at least `plan.seconds`.

    On a CPU it is the wall time of `session.run`; on a GPU see `exporters.cuda.measure`. The outputs of each set of
    feeds are checked against its first outputs during the loop, outside the timed part, so that a session that stops
    computing can't be fast.

    Raises:
        MeasurementError: no feeds, or outputs changed while measuring.
    """
    if not feeds:
        raise MeasurementError("a measurement needs feeds, got none", "give at least one set")
    device = session.timed_on
    if device:
        from exporters.cuda.measure import measure_on_device

        return measure_on_device(session, feeds, plan, device)
    start = time.perf_counter_ns()
    expected = [session.run(feeds[0])]
    first_call = (time.perf_counter_ns() - start) / 1e6
    expected += [session.run(f) for f in feeds[1:]]

    def once(number: int) -> float:
        start = time.perf_counter()
        session.run(feeds[number % len(feeds)])
        return time.perf_counter() - start

    warm, settled = until_settled(once, plan)
    samples: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < plan.seconds or len(samples) < plan.inferences:
        index = len(samples) % len(feeds)
        start = time.perf_counter_ns()
        outputs = session.run(feeds[index])
        samples.append((time.perf_counter_ns() - start) / 1e6)
        if len(samples) % 16 == 1:
            check_unchanged(expected[index], outputs)
    return Samples(tuple(samples), warm, first_call=first_call, settled=settled, peak_rss=peak_rss())


def check_unchanged(expected: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Raises MeasurementError where outputs differ from the first ones by more than the order of a sum may."""
    import numpy as np

    for name, value in expected.items():
        if np.array_equal(outputs[name], value, equal_nan=True):
            continue
        largest = float(np.max(np.abs(outputs[name].astype(np.float64) - value)))
        # Runtimes may sum in another order from one call to the next; anything larger is another result.
        if not largest <= 1e-3 * float(np.max(np.abs(value)) or 1.0):
            raise MeasurementError(
                f"output '{name}' changed by {largest:.3g} during the measurement",
                "the session is not deterministic or stopped computing; check the artifact",
            )


def until_settled(once: Callable[[int], float], plan: MeasurementPlan) -> tuple[int, bool]:
    """Warm-up: `once(n)` returns a time. For `plan.warm_up` seconds and on until the medians of two windows agree.

    Returns:
        How many inferences, and whether they agreed before `plan.longest_warm_up`.
    """
    import numpy as np

    count, previous, begin = 0, 0.0, time.perf_counter()
    while True:
        window: list[float] = []
        opened = time.perf_counter()
        while time.perf_counter() - opened < plan.warm_up / 2 or len(window) < 2:
            window.append(once(count))
            count += 1
        median = float(np.median(window))
        spent = time.perf_counter() - begin
        if spent >= plan.warm_up and previous and abs(median - previous) <= plan.agree * previous:
            return count, True
        if spent >= plan.longest_warm_up:
            return count, False
        previous = median


def peak_rss() -> int:
    """Peak resident memory of this process in bytes (0 where the system does not tell).

    On Linux with those that it started, which a session may compute in; what they share counts in each.
    """
    # Linux's ru_maxrss begins with what the process had that started this one; VmHWM is of this program alone.
    total, left = 0, ["self"]
    while left:
        place = Path("/proc") / left.pop()
        with suppress(OSError):
            lines = (place / "status").read_text(encoding="utf-8", errors="replace").splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
            for thread in (place / "task").iterdir():
                left += (thread / "children").read_text(encoding="ascii").split()
    if total:
        return total
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The timed loops of a session on a GPU: compute time by CUDA events, and beside it what a deployment sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from exporters.cuda.nvml import energy_mj, gpu_state
from exporters.errors import FeedError
from exporters.measure import MeasurementPlan, Samples, check_unchanged, peak_rss, until_settled
from exporters.session import Array, Feeds, OnDevice, Session

LOOK = 64  # inferences between two checks of the outputs: a look waits and copies, so the GPU idles meanwhile


def measure_on_device(session: Session, feeds: Sequence[Feeds], plan: MeasurementPlan, device: str) -> Samples:
    """GPU milliseconds of single inferences, by events; sets of feeds lie in GPU memory and take turns.

    A CUDA graph is used where the session can be captured, since at small batches the launches of kernels, not the
    kernels, would be timed otherwise. The figures beside it: host latency (copy in, compute, copy out), time to
    enqueue, compute without a graph, throughput, energy per inference, and the first inference at another size.

    Raises:
        MeasurementError: outputs changed while measuring.
    """
    start = time.perf_counter_ns()
    expected = [session.run(feeds[0])]
    first_call = (time.perf_counter_ns() - start) / 1e6
    expected += [session.run(f) for f in feeds[1:]]
    slots: list[OnDevice] = []
    try:
        for given in feeds:
            slots.append(session.on_device(given))
        graph = all([slot.capture() for slot in slots])
        count, settled = until_settled(lambda n: slots[n % len(slots)].compute_ms(graph), plan)
        before = gpu_state(device)
        samples: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < plan.seconds or len(samples) < plan.inferences:
            index, looks = len(samples) % len(slots), len(samples) % LOOK == 0
            if looks:
                slots[index].forget()  # else what was computed before would be seen again
            samples.append(slots[index].compute_ms(graph))
            if looks:
                check_unchanged(expected[index], slots[index].outputs())
        after = gpu_state(device)
        for index, slot in enumerate(slots):
            slot.forget()
            slot.enqueue(graph)
            check_unchanged(expected[index], slot.outputs())
        figures = _beside(session, slots, feeds, graph, device, max(plan.seconds / 4, 0.1))
    finally:
        for slot in slots:
            slot.close()
    throttled = sorted({*before.get("throttled", ()), *after.get("throttled", ())})
    notes = () if graph else ("without a CUDA graph: this session cannot be captured",)
    return Samples(
        tuple(samples),
        count,
        timer="CUDA events" + (", replayed as a CUDA graph" if graph else ""),
        first_call=first_call,
        settled=settled,
        peak_rss=peak_rss(),
        notes=notes,
        figures=figures,
        before=before,
        after=after,
        throttled=tuple(throttled) if "throttled" in after else None,
    )


def _beside(
    session: Session, slots: Sequence[OnDevice], feeds: Sequence[Feeds], graph: bool, device: str, seconds: float
) -> dict[str, float]:
    """Medians of what is reported beside the gated figure, in ms unless the name says otherwise."""
    figures: dict[str, float] = {}
    figures["host latency ms"] = _median(lambda n: _wall(lambda: session.run(feeds[n % len(feeds)])), seconds)
    figures["enqueue ms"] = _median(lambda n: _enqueue(slots[n % len(slots)], False), seconds)
    if graph:
        figures["compute without CUDA graph ms"] = _median(lambda n: slots[n % len(slots)].compute_ms(False), seconds)
        figures["enqueue of a CUDA graph ms"] = _median(lambda n: _enqueue(slots[n % len(slots)], True), seconds)
    batch = len(next(iter(feeds[0].values())))
    energy, begin, count = energy_mj(device), time.perf_counter(), 0
    while time.perf_counter() - begin < max(seconds, 0.3):  # NVML counts energy in steps of some 100 ms
        for slot in slots:
            slot.enqueue(graph)
            count += 1
        slots[-1].wait()
    spent = time.perf_counter() - begin
    figures["throughput per s"] = count * batch / spent
    after = energy_mj(device)
    if energy is not None and after is not None:
        figures["energy per input mJ"] = (after - energy) / (count * batch)
    figures |= _at_another_size(session, feeds[0])  # last: graphs were captured for the shapes before it
    return {name: round(value, 5) for name, value in figures.items()}


def _at_another_size(session: Session, feeds: Feeds) -> dict[str, float]:
    """Wall time of the first and second inference of a smaller input, where the session takes one."""
    smaller: dict[str, Array] = {}
    for info in session.inputs:
        array = feeds[info.name]
        for axis, name in enumerate(info.shape):
            if isinstance(name, str):
                size = 1 if name == "batch" else max(array.shape[axis] // 2 // session.stride, 1) * session.stride
                array = array.take(range(size), axis)
        smaller[info.name] = array
    if all(smaller[name].shape == feeds[name].shape for name in smaller):
        return {}
    try:
        first, second = (_wall(lambda: session.run(smaller)) for _ in range(2))
    except FeedError:  # a profile that does not reach so far down
        return {}
    session.run(feeds)
    return {"first inference at another size ms": first, "second one ms": second}


def _median(once: Callable[[int], float], seconds: float) -> float:
    found: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(found) < 10:
        found.append(once(len(found)))
    return median(found)


def _wall(work: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1e6


def _enqueue(slot: OnDevice, graph: bool) -> float:
    """Milliseconds until the call returns, the GPU being idle."""
    spent = _wall(lambda: slot.enqueue(graph))
    slot.wait()
    return spent

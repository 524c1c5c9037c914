"""Exports made before the first claim, several at a time: an engine takes minutes, and a measurement the host alone."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from exporters import formats
from exporters.cuda.nvml import same_gpus
from exporters.errors import ExportgateError
from exporters.pool import Pool
from exporters.spec import ExportSpec
from suites.support.cases import Case

FIRST = "cuda:0"


def exports_at_once(asked: int | None, cases: Sequence[Case]) -> int:
    """How many exports are made at a time: what the user asked for, else one a GPU of the host where cases need one."""
    if asked is not None:
        return asked
    devices = {c.spec.device for c in cases} - {"cpu"}
    return len(same_gpus(FIRST)) if devices == {FIRST} else 1


def export_ahead(pool: Pool, cases: Sequence[Case], count: int) -> dict[str, ExportgateError]:
    """Makes the artifacts of these cases in `count` processes, each on a GPU of its own where there are several.

    What they are made from (their parents) is made before, so that none is made twice. Every GPU used has the same name
    as the first, since an engine belongs to a GPU model; each process sees its GPU as the first, so that the requests,
    and their keys, are the same.

    Returns:
        What could not be made, by the case's id, for the claim that asks for it.
    """
    wanted = {repr(c.spec): c.spec for c in cases if not c.missing and not c.because and not c.budget}
    failed: dict[str, ExportgateError] = {}  # by the request
    gpus = same_gpus(FIRST) if {s.device for s in wanted.values()} <= {"cpu", FIRST} else []
    pools = [
        Pool(pool.limits, pool.folder / f"ahead-{n}", progress=pool.progress, variables=_seeing(gpus, n))
        for n in range(count)
    ]
    mine = threading.local()
    free = list(pools)

    def one(spec: ExportSpec) -> None:
        if not hasattr(mine, "pool"):
            mine.pool = free.pop()
        try:
            mine.pool.export(spec)
        except ExportgateError as error:  # of a parent: who needs it fails by it, in the words of its own export
            failed[repr(spec)] = error

    executor = ThreadPoolExecutor(count)
    try:
        for generation in generations(wanted.values()):
            # The longest first, as far as that is known: the largest batches.
            list(executor.map(one, sorted(generation, key=lambda s: -s.batch)))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for made in pools:
            pool.fresh += made.fresh
            made.close()
    return {c.id: failed[repr(c.spec)] for c in cases if repr(c.spec) in failed}


def generations(wanted: Iterable[ExportSpec]) -> list[list[ExportSpec]]:
    """The requests and what they are made from: first those that are made from nothing, each one once."""
    found: list[dict[str, ExportSpec]] = []

    def place(spec: ExportSpec) -> int:
        number = 1 + max((place(parent) for parent in formats.get(spec.format).parents(spec)), default=-1)
        found.extend({} for _ in range(number + 1 - len(found)))
        found[number][repr(spec)] = spec
        return number

    for spec in wanted:
        place(spec)
    return [list(specs.values()) for specs in found]


def _seeing(gpus: Sequence[str], number: int) -> dict[str, str]:
    """The variables by which a process sees one GPU as its first; none where there is only one."""
    if len(gpus) < 2:
        return {}
    # NVML, which named them, counts in the order of the bus; CUDA by default the fastest first.
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

"""Exports made before the first claim, several at a time: an engine takes minutes, and a measurement the host alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from exporters import formats
from exporters.cuda.nvml import same_gpus
from exporters.errors import ExportgateError
from exporters.pool import Pool
from exporters.spec import ExportSpec
from suites.support.cases import Case


def exports_at_once(asked: int | None, cases: Sequence[Case]) -> int:
    """How many exports are made at a time: what the user asked for, else one a GPU of the host where cases need one."""
    if asked is not None:
        return asked
    return len(same_gpus("cuda:0")) if any(c.spec.device != "cpu" for c in cases) else 1


def export_ahead(pool: Pool, cases: Sequence[Case], count: int) -> dict[str, ExportgateError]:
    """Makes the artifacts of these cases in `count` processes, each on a GPU of its own where there are several.

    What they share (their parents) is made first. Every GPU used has the same name as the first, since an engine
    belongs to a GPU model; each process sees its GPU as the first, so that the requests, and their keys, are the same.

    Returns:
        What could not be made, by the case's id, for the claim that asks for it.
    """
    wanted = {repr(c.spec): c for c in reversed(cases) if not c.missing and not c.because}
    failed: dict[str, ExportgateError] = {}

    def make(made_in: Pool, case: Case) -> None:
        try:
            made_in.export(case.spec)
        except ExportgateError as error:
            failed[case.id] = error

    for case in wanted.values():
        for parent in formats.get(case.spec.format).parents(case.spec):
            make(pool, replace(case, spec=parent))
    failed.clear()  # who needs that parent fails by it, in the words of its own export
    gpus = same_gpus("cuda:0") or [os.environ.get("CUDA_VISIBLE_DEVICES", "")]
    pools = [
        Pool(
            pool.limits,
            pool.folder / f"ahead-{number}",
            progress=pool.progress,
            variables={"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if len(gpus) > 1 else {},
        )
        for number in range(count)
    ]
    mine = threading.local()
    free = list(pools)

    def one(case: Case) -> None:
        if not hasattr(mine, "pool"):
            mine.pool = free.pop()
        make(mine.pool, case)

    executor = ThreadPoolExecutor(count)
    try:
        # The longest first, as far as that is known: the largest batches.
        list(executor.map(one, sorted(wanted.values(), key=_effort)))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for made in pools:
            pool.fresh += made.fresh
            made.close()
    return failed


def _effort(case: Case) -> tuple[int, str]:
    spec: ExportSpec = case.spec
    return -spec.batch, case.id

"""The result as one JSON document for programs: everything the record says but the raw samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from reports.events import Claim
from reports.record import Row, Run, Summary
from reports.wording import sentence

SCHEMA = 1


def render(summary: Summary) -> str:
    """The document as text. Figures that are not finite are the strings NaN, Infinity, -Infinity, as in the record."""
    document = {
        "schema": SCHEMA,
        "verdict": summary.verdict,
        "headline": summary.headline,
        "remarks": summary.remarks,
        "counts": summary.counts,
        "release": summary.release,
        "signed": summary.signed.by or None,
        "signature_wrong": summary.signed.wrong or None,
        "must_pass": {
            "entries": summary.must_pass,
            "unmet": [
                {"case": entry.case, "claim": entry.claim, "verdict": entry.verdict, "run": _run_of(entry.row)}
                for entry in summary.unmet
            ],
        },
        "runs": [_run(run) for run in summary.runs],
        "cases": [_row(row) for row in summary.rows],
    }
    # Not indented: that takes json's slow path, and triples the time and doubles the size for 500 cases.
    return json.dumps(_plain(document), ensure_ascii=False, allow_nan=False) + "\n"


def _run_of(row: Row | None) -> str | None:
    return row.run.start.run if row else None


def _run(run: Run) -> dict[str, Any]:
    return {**_fields(run.start), "record": str(run.path), "finished": not run.stopped, "end": run.end}


def _row(row: Row) -> dict[str, Any]:
    return {
        "run": row.run.start.run,
        "machine": row.run.machine,
        **_fields(row.case),
        "claims": [_claim(claim) for claim in row.claims.values()],
    }


def _claim(claim: Claim) -> dict[str, Any]:
    return {"sentence": sentence(claim.claim), **_fields(claim)}


def _fields(value: Any) -> dict[str, Any]:
    found = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    processes = found.pop("processes", None)
    if processes is not None:
        found["samples"] = [len(process) for process in processes]  # of each process
    return found


def _plain(value: Any) -> Any:
    """JSON's own types out of dataclasses, mappings and tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if is_dataclass(value):
        return _plain(_fields(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value

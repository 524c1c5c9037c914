"""Which records the report in a folder is of: a run's own, or copies of those that were given from elsewhere.

With the copies a merged report is signed, verified and made again where the folders of its runs are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from exporters.errors import BadRequest
from reports.record import NAME, Run, read_record

_COPY = re.compile(r"record-([1-9]\d{0,5})\.jsonl", re.ASCII)


def is_record(name: str) -> bool:
    """Whether a file of this name beside a report is a record."""
    return name == NAME or _COPY.fullmatch(name) is not None


def records_in(folder: Path) -> list[Path]:
    """The records of a folder in the order of its report; where there is none, the place of a run's own."""
    own = folder / NAME
    return [own] if own.exists() else _copies(folder) or [own]


def read_all(places: Sequence[Path]) -> list[Run]:
    """The runs of these folders, or record files.

    Raises:
        BadRequest: a record cannot be read.
    """
    files = [file for place in places for file in (records_in(place) if place.is_dir() else [place])]
    return [read_record(file) for file in files]


def named(runs: Sequence[Run], out: Path) -> Mapping[str, Path]:
    """Where the records are now, by the names that they have beside their report in `out`.

    Raises:
        BadRequest: `out` is the folder of a run, and the report is not of that run alone.
    """
    own = out / NAME
    if not own.exists():
        return {f"record-{number}.jsonl": run.path for number, run in enumerate(runs, start=1)}
    if len(runs) == 1 and own.samefile(runs[0].path):
        return {NAME: own}
    raise BadRequest(f"'{out}' is the folder of a run, whose own report is there", "name another folder with --output")


def copies(records: Mapping[str, Path]) -> dict[str, bytes]:
    """What is to be written beside a report: the records that are not a run's own."""
    return {name: path.read_bytes() for name, path in records.items() if name != NAME}


def drop(out: Path, records: Mapping[str, Path]) -> None:
    """Removes copies that an earlier report left, and that this one is not of."""
    for path in _copies(out):
        if path.name not in records:
            path.unlink()


def _copies(folder: Path) -> list[Path]:
    found = {path: match for path in folder.glob("record-*.jsonl") if (match := _COPY.fullmatch(path.name))}
    return sorted(found, key=lambda path: int(found[path][1]))

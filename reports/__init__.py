"""Reports from run records: HTML to read and sign, Markdown for a pull request, JUnit for CI, JSON for programs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exporters.errors import BadRequest
from reports import as_json, comparison, history, html, junit, kept, markdown, signature
from reports.record import Row, Run, Signed, Summary, merge, read_record, refuse_twice

__all__ = ["Row", "Run", "Summary", "merge", "read_record", "write", "write_comparison", "write_history"]

_REPORTS = {
    "html": ("report.html", html.render),
    "markdown": ("report.md", markdown.render),
    "junit": ("report.xml", junit.render),
    "json": ("report.json", as_json.render),
}


def write(runs: Sequence[Path], out: Path, signed: Signed | None = None) -> dict[str, Path]:
    """Writes report.html, .md, .xml and .json of these records (run folders or record files) into the folder `out`.

    Nothing is run again. Each file appears whole or not at all; the result's keys are html, markdown, junit and json.
    Records that lie elsewhere are copied beside them, so that `out` can be signed and its report made again.
    `signed` says by whom and when; by default what a signature in `out` says, if it holds and is of these records.

    Raises:
        BadRequest: a record cannot be read or is given twice, `out` is another run's folder, or cannot be written.
        ToolchainMissing: there is a signature in `out`, and no ssh-keygen that checks it.
    """
    records = kept.read_all(runs)
    refuse_twice(records)
    try:
        places = kept.named(records, out)
        # A report names its records as they lie beside it: it reads the same wherever its folder is.
        beside = [replace(run, path=Path(name)) for run, name in zip(records, places, strict=True)]
        summary = merge(beside)
        signed = signature.signed_by(out, places, summary.verdict) if signed is None else signed
        summary = replace(summary, signed=signed)
        texts = {kind: (out / name, render(summary)) for kind, (name, render) in _REPORTS.items()}
        copies = kept.copies(places)
        out.mkdir(parents=True, exist_ok=True)
        for name, data in copies.items():
            _replace(out / name, data)
        for path, text in texts.values():
            _replace(path, text)
        kept.drop(out, places)
    except OSError as error:
        again = f"exportgate report {shlex.join(map(str, runs))}"
        raise BadRequest(
            f"cannot write the report into {out}: {error.strerror}",
            f"make room there and run '{again}', or name another folder with --output",
        ) from None
    return {kind: path for kind, (path, _) in texts.items()}


def write_comparison(before: Path, after: Path, out: Path) -> comparison.Comparison:
    """Writes comparison.html and comparison.md of two records into the folder `out`; returns what is different.

    Raises:
        BadRequest: a record cannot be read, both are of one run, or `out` cannot be written.
    """
    records = [read_record(run) for run in (before, after)]
    refuse_twice(records)
    found = comparison.compare(*(merge([record]) for record in records))
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / "comparison.html", html.render_comparison(found))
        _replace(out / "comparison.md", comparison.render(found))
    except OSError as error:
        raise BadRequest(
            f"cannot write the comparison into {out}: {error.strerror}",
            "make room there, or name another folder with --output",
        ) from None
    return found


def write_history(runs: Sequence[Path], out: Path) -> history.History:
    """Writes history.html and history.md of two or more records into the folder `out`; returns how things went.

    Raises:
        BadRequest: a record cannot be read, is given twice, has no time or is the only one, or `out` cannot be written.
    """
    found = history.history([read_record(run) for run in runs])
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / "history.html", html.render_history(found))
        _replace(out / "history.md", history.render(found))
    except OSError as error:
        raise BadRequest(
            f"cannot write the history into {out}: {error.strerror}", "name a folder that is yours"
        ) from None
    return found


def _replace(path: Path, text: str | bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode() if isinstance(text, str) else text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

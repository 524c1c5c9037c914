"""The report that somebody signs: one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from reports import accuracy, comparison, findings, history, latency, picture, trend, wording
from reports.events import GOOD, NEUTRAL, Claim, Comparison, Layer
from reports.record import Row, Summary, Unmet

# The figures of a comparison beside the gated one: field, heading.
FIGURES = (
    ("max_abs", "max abs"),
    ("mean_abs", "mean abs"),
    ("p99_abs", "p99 abs"),
    ("max_rel", "max rel"),
    ("mean_rel", "mean rel"),
    ("fraction_outside", "outside"),
    ("cosine", "cosine"),
    ("snr_db", "SNR dB"),
)


@dataclass(frozen=True)
class Cell:
    """A field of the matrix: its word, its colour, and where its details are."""

    claim: str
    word: str
    tone: str
    anchor: str
    must_pass: bool


def render(summary: Summary) -> str:
    """The whole report as one HTML document."""
    environment = _environment()
    script = environment.get_template("report.js").render()
    matrix = [(row, list(_cells(summary, row, index))) for index, row in enumerate(summary.rows)]
    return environment.get_template("report.html.j2").render(
        summary=summary,
        found=findings.findings(summary),
        boards=latency.boards(summary),
        scores=accuracy.scores(summary),
        matrix=matrix,
        places={
            (row.where, row.case.case, cell.claim): cell.anchor
            for row, cells in matrix
            for cell in cells
            if cell.anchor
        },
        waivers=[(row, claim) for row in summary.rows for claim in row.claims.values() if claim.waiver],
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        figures=FIGURES,
        meaning=wording.MEANING,
        missing=wording.MISSING,
        overall=overall(summary),
    )


def render_comparison(found: comparison.Comparison) -> str:
    """Two runs beside each other as one HTML document."""
    template = _environment().get_template("comparison.html.j2")
    return template.render(found=found, sections=comparison.sections(found), missing=wording.MISSING)


def render_history(found: history.History) -> str:
    """Many runs as one HTML document."""
    return _environment().get_template("history.html.j2").render(found=found, missing=wording.MISSING)


def overall(summary: Summary) -> str:
    """The colour class of a run's own verdict."""
    return {"QUALIFIED": "good", "NOT QUALIFIED": "bad"}.get(summary.verdict, "warn")


def tone(verdict: str) -> str:
    """The colour class of a verdict; the word itself is always shown beside it."""
    if verdict in NEUTRAL:
        return "neutral"
    return {"PASS": "good", "WAIVED": "waived"}.get(verdict, "bad")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "sentence": wording.sentence,
        "number": wording.number,
        "ms": wording.milliseconds,
        "percent": wording.percent,
        "cosine": wording.cosine,
        "change": wording.change,
        "size": wording.size,
        "duration": wording.duration,
        "moment": wording.moment,
        "arrow": wording.arrow,
        "plain": plain,
        "tone": tone,
        "link": link,
        "by_hop": by_hop,
        "by_precision": by_precision,
        "percentiles": percentiles,
        "digest": wording.digest,
        "shell": shlex.join,
        "tally": tally,
        "overall": overall,
    }
    environment.filters.update(filters)  # pyright: ignore[reportUnknownMemberType]
    named: dict[str, Callable[..., Any]] = {
        "evidence": findings.evidence,
        "subject": findings.subject,
        "observed": findings.observed,
        "allowed": findings.allowed,
        "excess": findings.excess,
        "damage": findings.damage,
        "cap": findings.cap,
        "distribution": picture.latency,
        "ratio_picture": picture.ratio,
        "tradeoff_picture": picture.tradeoff,
        "trend_picture": trend.picture,
    }
    environment.globals.update(named)  # pyright: ignore[reportUnknownMemberType]
    return environment


def plain(value: Any) -> str:
    """A value of an open mapping as text: words as they are, everything else as JSON writes it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=dict) if value is not None else wording.MISSING


def link(url: str) -> str:
    """The URL if a click on it can only open a web page, otherwise nothing: a record may hold javascript: too."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return url if parts.scheme in {"http", "https"} and parts.netloc else ""


def by_hop(comparisons: Iterable[Comparison]) -> Iterator[tuple[str, str, list[Comparison]]]:
    """Neighbouring comparisons of the same hop on the same feeds, in the record's order."""
    for (hop, feeds), group in groupby(comparisons, key=lambda entry: (entry.hop, entry.feeds)):
        yield hop, feeds, list(group)


def by_precision(layers: Sequence[Layer]) -> list[tuple[str, int, float | None]]:
    """Name, number of layers and milliseconds of each precision, and of what only reformats; slowest first."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        name = "reformat" if layer.kind == "Reformat" else layer.precision or "without a type"
        groups.setdefault(name, []).append(layer)
    spent = {name: [x.milliseconds for x in group if x.milliseconds is not None] for name, group in groups.items()}
    rows = [(name, len(group), sum(spent[name]) if spent[name] else None) for name, group in groups.items()]
    return sorted(rows, key=lambda row: (-(row[2] or 0.0), -row[1]))


def percentiles(claim: Claim) -> list[tuple[str, Any]]:
    """Name and value of the percentiles of a claim's measurement."""
    found = claim.measurement
    return [(name, getattr(found, name)) for name in ("p50", "p90", "p95", "p99")] if found else []


def tally(row: Row) -> list[tuple[str, int]]:
    """The verdict words of a row with their numbers, failures first."""
    counts = Counter(claim.verdict for claim in row.claims.values())
    return sorted(counts.items(), key=lambda item: (item[0] in GOOD, item[0] in NEUTRAL, -item[1]))


def _cells(summary: Summary, row: Row, index: int) -> Iterator[Cell]:
    unmet = summary.unmet_claims(row)
    never = _never_ran(summary.unmet)
    for column, name in enumerate(summary.columns):
        claim = row.claims.get(name)
        if claim:
            wanted = name in unmet
            yield Cell(name, claim.verdict, "bad" if wanted else tone(claim.verdict), f"c{index}-{column}", wanted)
        elif (row.case.case, name) in never and row.run.start.release:
            yield Cell(name, "NEVER RAN", "bad", "", True)
        else:
            yield Cell(name, "", "empty", "", False)


def _never_ran(unmet: Iterable[Unmet]) -> Mapping[tuple[str, str], Unmet]:
    return {(entry.case, entry.claim): entry for entry in unmet if entry.row is None}

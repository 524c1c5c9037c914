"""A summary for a pull request, small enough for a comment (GitHub takes 65,536 characters) whatever the run's size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from reports.accuracy import Score, scores
from reports.events import FAILING, GOOD
from reports.findings import Finding, findings
from reports.latency import Board, boards
from reports.record import Row, Signed, Summary
from reports.wording import MISSING, change, milliseconds, moment, number, sentence

# Bytes that each section may take; together with what a line may add they stay below LIMIT.
LIMIT = 60_000
FINDINGS, MATRIX, ACCURACY, LATENCY = 19_000, 18_000, 10_000, 8_000
# Characters of one text from the record; beyond it the HTML report has the rest.
TEXT = 300

# What Markdown reads as markup wherever it stands, and what GitHub turns into links: mentions, issues, addresses.
_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
_LINKS = re.compile(r"[@#]|://|(?i:\bwww\.)")
_BREAK = "<!-- -->"


def render(summary: Summary) -> str:
    """The headline, failures with observed and allowed, the matrix, latencies; UTF-8 bytes stay below LIMIT."""
    mark = {"QUALIFIED": "✅", "NOT QUALIFIED": "❌"}.get(summary.verdict, "⚠️")
    parts = [f"## {mark} {text(summary.verdict)}", "", text(summary.headline, 2000), ""]
    for run in summary.runs[:10]:
        gpu = f", {text(str(run.start.machine['gpu']), 60)}" if run.start.machine.get("gpu") else ""
        parts.append(f"Run {code(run.start.run)} on {code(run.machine)}{gpu}, {text(moment(run.start.time), 40)}  ")
    parts.append(_signed(summary.signed))
    parts += [f"- {text(remark)}" for remark in summary.remarks[:10]]
    parts += _failures(findings(summary))
    parts += _matrix(summary)
    parts += _accuracy(scores(summary))
    parts += _latency(boards(summary))
    return "\n".join(parts) + "\n"


def _signed(found: Signed) -> str:
    if found.wrong:
        return f"**The signature in this folder {text(found.wrong)}**"
    return f"Signed by {text(found.by)}" if found.by else "Not signed"


def text(value: str, limit: int = TEXT) -> str:
    """Untrusted text for a paragraph or a table: one line, with nothing left that Markdown or HTML would read."""
    flat = _cut(value, limit)
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    flat = _MARKUP.sub(lambda found: "\\" + found.group(), flat)
    # An empty comment ends a word for GitHub's linker and shows nothing anywhere; entities come later than the linker.
    return _LINKS.sub(lambda found: found.group()[0] + _BREAK + found.group()[1:], flat)


def code(value: str, limit: int = TEXT) -> str:
    """Untrusted text as a code span, which may stand in a table."""
    flat = _cut(value, limit).replace("|", "¦")  # a span in a table cannot hold a bar in all dialects
    fence = "`" * (max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}" if flat else ""


def _cut(value: str, limit: int) -> str:
    flat = " ".join(value.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _block(command: str) -> str:
    flat = _cut(command, 600)
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    return f"  {fence}sh\n  {flat}\n  {fence}"


def within(budget: int, lines: Iterable[str], rest: str) -> list[str]:
    """As many lines as fit into the budget; the last line counts those left out."""
    kept: list[str] = []
    waiting = list(lines)
    for index, line in enumerate(waiting):
        budget -= len(line.encode()) + 1
        if budget < 0:
            return [*kept, "", f"… and {len(waiting) - index} more {rest}; the HTML report has all of them."]
        kept.append(line)
    return kept


def _failures(found: Sequence[Finding]) -> list[str]:
    if not found:
        return []
    return ["", "### What failed, and what to do", "", *within(FINDINGS, map(_failure, found), "findings")]


def _failure(entry: Finding) -> str:
    names = text(", ".join(sentence(name) for name in entry.claims), 200)
    must = " (must pass)" if entry.must_pass else ""
    where = f" on {code(entry.where)}" if entry.where else ""
    lines = [f"- **{text(entry.verdict)}**{must} {code(entry.case)}{where}: {names}  "]
    figures = entry.evidence
    if figures:
        far = f" ({text(figures.excess)})" if figures.excess else ""
        lines.append(
            f"  {text(figures.what)}: observed **{text(figures.observed)}**, allowed {text(figures.allowed)}{far}  "
        )
    if entry.because:
        lines.append(f"  {text(entry.because)}  ")
    if entry.culprit:
        lines.append(f"  First hop that differs: {text(entry.culprit)}  ")
    if entry.reproduce:
        lines.append(_block(entry.reproduce))
    return "\n".join(lines)


def _matrix(summary: Summary) -> list[str]:
    if not summary.rows:
        return []
    columns = summary.columns[:30]
    head = " | ".join(["case", *(text(sentence(name), 60) for name in columns)])
    lines = ["", "### Cases and claims", "", f"| {head} |", "|" + " --- |" * (len(columns) + 1)]
    if len(summary.columns) > len(columns):
        lines.insert(2, f"\n{len(summary.columns) - len(columns)} more claims are in the HTML report.")
    # Rows with failures come first, so that none of them is among those left out.
    rows = sorted(summary.rows, key=lambda row: not _fails(summary, row))
    return lines + within(MATRIX, (_row(summary, row, columns) for row in rows), "cases")


def _fails(summary: Summary, row: Row) -> bool:
    return bool(summary.unmet_claims(row)) or any(claim.verdict in FAILING for claim in row.claims.values())


def _row(summary: Summary, row: Row, columns: Sequence[str]) -> str:
    unmet = summary.unmet_claims(row)
    words: list[str] = []
    for name in columns:
        claim = row.claims.get(name)
        word = claim.verdict if claim else MISSING
        loud = name in unmet or (claim is not None and claim.verdict not in GOOD and claim.verdict in FAILING)
        words.append(f"**{text(word)}**" if loud else text(word))
    label = code(row.case.case, 120) + (f" {text(row.where, 60)}" if row.where else "")
    return f"| {label} | " + " | ".join(words) + " |"


def _accuracy(found: Sequence[Score]) -> list[str]:
    lines: list[str] = []
    for score in found:
        made, unit = score.accuracy, " ×" if score.accuracy.share else ""
        lines.append(
            f"| {code(score.row.case.case, 120)} | {text(sentence(score.claim.claim), 60)} | {text(made.metric, 30)} "
            f"| {number(made.artifact.get(made.metric))} | {number(made.reference.get(made.metric))} "
            f"| {number(made.change)}{unit} | {number(made.low)} to {number(made.high)} "
            f"| {'≥' if made.share else '±'} {number(made.allowed)}{unit} | {text(score.claim.verdict)} |"
        )
    if not lines:
        return []
    head = [
        "",
        "### Accuracy",
        "",
        "| case | claim | metric | artifact | PyTorch | change | confidence | allowed | verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    return head + within(ACCURACY, lines, "lines")


def _latency(found: Sequence[Board]) -> list[str]:
    lines: list[str] = []
    for board in found:
        lines += [f"| **{text(board.device, 30)}** on {text(board.machine, 60)} | | | | | |"]
        for timing in board.timings:
            gate = timing.claim.gate
            low_high = timing.measurement.p50
            span = (
                f"{milliseconds(low_high.low)} to {milliseconds(low_high.high)}"
                if low_high and low_high.low is not None
                else MISSING
            )
            faster = f"{number(timing.speed_up, 3)} ×" if timing.speed_up is not None else MISSING
            moved = change(gate.ratio) if gate and gate.ratio is not None else MISSING
            note = f" ({timing.note})" if timing.note else ""
            lines.append(
                f"| {code(timing.row.case.case, 120)}{note} | {milliseconds(timing.p50)} | {span} "
                f"| {faster} | {moved} | {text(timing.claim.verdict)} |"
            )
    if not lines:
        return []
    head = [
        "",
        "### Latency",
        "",
        "| case | p50 ms | confidence | speed against PyTorch | against baseline | verdict |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    return head + within(LATENCY, lines, "lines")

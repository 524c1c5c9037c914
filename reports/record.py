"""Reading run records, and merging those of several machines into one verdict.

Nothing is judged here again: the verdicts are the record's. What is added is what no single claim can say: whether the
run came to its end, whether the must-pass list is met, and whether anything was judged at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from exporters.errors import BadRequest
from reports.decode import FieldError, build
from reports.events import FAILING, GOOD, Case, Claim, End, Start, Verdict

SCHEMA = 1
NAME = "record.jsonl"
Word = Literal["QUALIFIED", "NOT QUALIFIED", "NOTHING JUDGED", "INTERRUPTED"]

# What a command that ends with a verdict exits with: pytest's codes.
EXITS: Mapping[Word, int] = {"QUALIFIED": 0, "NOT QUALIFIED": 1, "INTERRUPTED": 2, "NOTHING JUDGED": 5}
# pytest's exit codes for a session that was stopped, and for one that broke: both leave claims unjudged.
_STOPPED = {2: "was interrupted", 3: "broke with an internal error"}
# Claims that compare what an artifact computes with what PyTorch does.
VALUES = (
    "test_outputs_match_reference",
    "test_detections_match_reference",
    "test_accuracy_against_labels",
    "test_detections_agree_without_labels",
)


@dataclass(frozen=True)
class Run:
    """One record: `end` is None while it goes on or if it was cut off; `torn`: its last line was left out."""

    path: Path
    start: Start
    cases: tuple[Case, ...]
    claims: tuple[Claim, ...]
    end: End | None
    torn: bool

    @property
    def machine(self) -> str:
        return str(self.start.machine.get("id", ""))

    @property
    def stopped(self) -> str:
        """Why the run did not come to its end; empty when it did."""
        return "has no end event" if self.end is None else _STOPPED.get(self.end.exit, "")


@dataclass(frozen=True)
class Row:
    """A case of one run; `where` tells rows of several runs apart and is empty for a single run."""

    run: Run
    case: Case
    claims: Mapping[str, Claim]
    where: str


@dataclass(frozen=True)
class Unmet:
    """A must-pass entry that lacks PASS or WAIVED without being a failure itself; `row` is None where it never ran."""

    case: str
    claim: str
    row: Row | None

    @property
    def verdict(self) -> str:
        return self.row.claims[self.claim].verdict if self.row else "NEVER RAN"


@dataclass(frozen=True)
class Signed:
    """What a report says of its signature: by whom and when, or why the one beside it does not count."""

    by: str = ""
    wrong: str = ""


@dataclass(frozen=True)
class Summary:
    """Several records as one matrix: rows are cases, columns the names of claims."""

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    counts: Mapping[Verdict, int]
    must_pass: int
    unmet: tuple[Unmet, ...]
    remarks: tuple[str, ...]
    verdict: Word
    headline: str
    signed: Signed = Signed()

    @property
    def gist(self) -> str:
        """The headline without the verdict that it opens with, for a place that shows both."""
        return self.headline.partition(": ")[2]

    @property
    def release(self) -> bool:
        return any(run.start.release for run in self.runs)

    def unmet_claims(self, row: Row) -> frozenset[str]:
        """The claims of a row that the must-pass list wanted and that are neither good nor failures of their own."""
        return frozenset(entry.claim for entry in self.unmet if entry.row is row)


def read_record(path: Path) -> Run:
    """The run recorded in a folder's record.jsonl, or in the file itself.

    Raises:
        BadRequest: there is no record, or a line cannot be used; names file and line. Only the last one may be torn.
    """
    file = path / NAME if path.is_dir() else path
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise BadRequest(f"cannot read the run record {file}: {error.strerror}", "give a run's folder") from None
    while lines and not lines[-1].strip():
        lines.pop()
    draft = _Draft(file)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _read_line(draft, line, number, last=number == len(lines))
    if draft.start is None:
        raise BadRequest(f"{file} holds no run event", "give the record of a run that started")
    claims = tuple(draft.claims.values())
    return Run(file, draft.start, tuple(draft.cases.values()), claims, draft.end, draft.torn)


def merge(runs: Sequence[Run]) -> Summary:
    """One matrix of all runs. A case that ran several times keeps a row for each: no run hides another's failure.

    Raises:
        BadRequest: no run is given, or one is given twice.
    """
    if not runs:
        raise BadRequest("no run record is given", "name at least one run's folder")
    refuse_twice(runs)
    rows = tuple(row for run in runs for row in _rows(run, _where(run, runs)))
    counts: Counter[Verdict] = Counter(claim.verdict for row in rows for claim in row.claims.values())
    wanted, unmet = _must_pass(rows, runs)
    remarks, unfit = _remarks(rows, runs)
    verdict = _verdict(runs, counts, unfit=bool(unmet or unfit))
    return Summary(
        runs=tuple(runs),
        rows=rows,
        columns=_columns(rows),
        counts=counts,
        must_pass=wanted,
        unmet=unmet,
        remarks=(*unfit, *remarks),
        verdict=verdict,
        headline=_headline(verdict, runs, rows, counts=counts, unmet=unmet, unfit=unfit),
    )


def refuse_twice(runs: Sequence[Run]) -> None:
    """Each run counts once, whatever the names of the folders that it was copied to.

    Raises:
        BadRequest: a run is given twice; names it and where it lies.
    """
    for run_id, times in Counter(run.start.run for run in runs).items():
        if times > 1:
            places = " and ".join(f"'{run.path}'" for run in runs if run.start.run == run_id)
            raise BadRequest(f"run {run_id} is given {times} times: {places}", "give each record once")


@dataclass
class _Draft:
    file: Path
    start: Start | None = None
    cases: dict[str, Case] = field(default_factory=dict[str, Case])
    claims: dict[tuple[str, str], Claim] = field(default_factory=dict[tuple[str, str], Claim])
    end: End | None = None
    torn: bool = False


def _read_line(draft: _Draft, line: bytes, number: int, *, last: bool) -> None:
    place = f"{draft.file}:{number}"
    try:
        event: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        if last:
            draft.torn = True
            return
        raise BadRequest(f"{place}: not a JSON line ({error})", "only the last line may be torn; restore it") from None
    try:
        _take(draft, event)
    except (FieldError, RecursionError) as error:
        raise BadRequest(f"{place}: {error}", "the record must follow reports/schema.json") from None


def _take(draft: _Draft, event: Any) -> None:
    line = cast("dict[str, Any]", event) if isinstance(event, dict) else {}
    kind = line.get("event")
    if (kind == "run") is (draft.start is not None):
        raise FieldError("the run event comes first, once")
    if kind == "run":
        if line.get("schema") != SCHEMA:
            raise FieldError(f"the record has schema {line.get('schema')!r:.20}, this exportgate reads {SCHEMA}")
        draft.start = build(Start, event, "run")
        return
    draft.end = None  # whatever follows an end was added by a run that goes on
    if kind == "case":
        case = build(Case, event, "case")
        draft.cases[case.case] = case
    elif kind == "claim":
        claim = build(Claim, event, "claim")
        earlier = draft.claims.get((claim.case, claim.claim))
        # A claim judged twice keeps its worse verdict: trying again must not wipe out a failure.
        if earlier is None or _rank(claim.verdict) <= _rank(earlier.verdict):
            draft.claims[claim.case, claim.claim] = claim
    elif kind == "end":
        draft.end = build(End, event, "end")
    else:
        raise FieldError(f"unknown event {str(kind)[:40]!r}")


def _rank(verdict: str) -> int:
    return 0 if verdict in FAILING else 2 if verdict in GOOD else 1


def _where(run: Run, runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    twins = sum(other.machine == run.machine for other in runs)
    return run.machine if twins == 1 else f"{run.machine} {run.start.run}"


def _rows(run: Run, where: str) -> Iterator[Row]:
    claims: dict[str, dict[str, Claim]] = {case.case: {} for case in run.cases}
    for claim in run.claims:
        claims.setdefault(claim.case, {})[claim.claim] = claim
    known = {case.case: case for case in run.cases}
    for name, found in claims.items():
        # A worker may die before its case is described; what was claimed of it counts all the same.
        yield Row(run, known.get(name) or Case(run.start.time, name, "", "", "", "", ""), found, where)


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of claims in the order of the fullest row, which a case with few of them (PyTorch's own) would upset."""
    fullest = sorted(rows, key=lambda row: -len(row.claims))
    return tuple(dict.fromkeys(name for row in fullest for name in row.claims))


def _must_pass(rows: Sequence[Row], runs: Sequence[Run]) -> tuple[int, tuple[Unmet, ...]]:
    """How many entries the release runs want, and those unmet. What one run lacks, another release run may show."""
    release: dict[str, list[Row]] = {}
    for row in rows:
        if row.run.start.release:
            release.setdefault(row.case.case, []).append(row)
    shown = {(case, name) for case, found in release.items() for row in found for name in _good(row)}
    wanted: dict[tuple[str, str], None] = {}
    unmet: dict[tuple[str, str, str], Unmet] = {}
    for run in runs:
        if not run.start.release:
            continue
        entries = [_entry(text) for text in run.start.must_pass]
        for case, claim in entries or sorted({(claim.case, "*") for claim in run.claims}):
            found = [row for row in release.get(case, ()) if (row.claims if claim == "*" else claim in row.claims)]
            if not found:
                wanted[case, claim] = None
                unmet[case, claim, ""] = Unmet(case, claim, None)
            # Of a claim that this run did not have, what the others say of it counts.
            for row in [row for row in found if row.run is run] or found:
                for name in row.claims if claim == "*" else (claim,):
                    if claim == "*" and _by_nature(row.claims[name], found):
                        continue
                    wanted[case, name] = None
                    if not _met(row.claims[name], shown):
                        unmet[case, name, row.run.start.run] = Unmet(case, name, row)
    return len(wanted), tuple(unmet.values())


def _good(row: Row) -> set[str]:
    return {name for name, claim in row.claims.items() if claim.verdict in GOOD}


def _met(claim: Claim, shown: set[tuple[str, str]]) -> bool:
    """Whether an entry needs no line of its own: it is good, a failure already, or shown by another release run.

    Only SKIPPED can be shown elsewhere: the toolchain is missing, so that this machine says nothing of the artifact.
    The other neutral verdicts are answers of this machine, which another one's do not replace: what its runtime cannot
    do (NOT_SUPPORTED), and a measurement that its own baseline was to judge (NO_BASELINE, NOT_COMPARABLE).
    """
    return _rank(claim.verdict) != 1 or (claim.verdict == "SKIPPED" and (claim.case, claim.claim) in shown)


def _by_nature(claim: Claim, rows: Sequence[Row]) -> bool:
    """Whether a claim of a case that is wanted as a whole is let by: its format cannot have it, and others passed."""
    return claim.verdict == "NOT_SUPPORTED" and any(_good(row) for row in rows)


def _entry(text: str) -> tuple[str, str]:
    case, _, claim = text.rpartition("::")
    return case, claim


def _remarks(rows: Sequence[Row], runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Sentences about whole runs: those that a reader should know, and those that make the result unfit to qualify."""
    remarks: list[str] = []
    unfit: list[str] = []
    for run in runs:
        name = f"run {run.start.run}"
        verdicts = {claim.verdict for claim in run.claims}
        # By itself a release run fails for a must-pass claim that another machine's run may well show.
        _, alone = _must_pass([row for row in rows if row.run is run], [run])
        explained = bool(verdicts & FAILING or alone)
        judged = bool(verdicts & (FAILING | GOOD))
        if run.stopped:
            unfit.append(f"{name} {run.stopped}: claims that it had not reached are missing")
        elif run.end and run.end.exit and not explained and (judged or run.end.exit != 5):
            unfit.append(f"{name} ended with exit {run.end.exit} although none of its claims failed: see its log")
        elif not judged and len(runs) > 1:
            unfit.append(f"{name} on {run.machine} judged nothing")
        if run.end and run.end.selftest and run.end.selftest.failed:
            unfit.append(f"{name}: {run.end.selftest.failed} of the suite's own tests failed")
        if run.torn:
            remarks.append(f"the last line of {run.path} is torn and was left out")
    empty = [row.case.case for row in rows if not row.claims]
    if empty:
        listed = ", ".join(empty[:3]) + (", …" if len(empty) > 3 else "")
        remarks.append(f"{_count(len(empty), 'case')} without any claim: {listed}")
    return remarks, unfit


def _verdict(runs: Sequence[Run], counts: Mapping[Verdict, int], *, unfit: bool) -> Word:
    if any(run.stopped for run in runs):
        return "INTERRUPTED"
    if unfit or any(verdict in FAILING for verdict in counts):
        return "NOT QUALIFIED"
    return "QUALIFIED" if any(verdict in GOOD for verdict in counts) else "NOTHING JUDGED"


def _headline(
    verdict: Word,
    runs: Sequence[Run],
    rows: Sequence[Row],
    *,
    counts: Mapping[Verdict, int],
    unmet: Sequence[Unmet],
    unfit: Sequence[str],
) -> str:
    releases = sum(run.start.release for run in runs)
    mode = (
        f" (release, {releases} of {len(runs)} runs)" if 0 < releases < len(runs) else " (release)" if releases else ""
    )
    failing = {word: number for word, number in counts.items() if word in FAILING}
    others = {word: number for word, number in counts.items() if word not in FAILING}
    failed = f"{sum(failing.values())} of {_count(sum(counts.values()), 'claim')} failed"
    first = [failed + (f" ({_listed(failing)})" if failing else "")]
    if unmet:
        lacking = Counter("never ran" if entry.row is None else entry.verdict for entry in unmet)
        first.append(f"{len(unmet)} more on the must-pass list without PASS ({_listed(lacking)})")
    machines = len({run.machine for run in runs})
    cases = _count(len(rows), "case") + (f" on {machines} machines" if machines > 1 else "")
    blind = sum(_is_blind(row) for row in rows)
    cases += f", values of {blind} not compared" if blind else ""
    parts = [", ".join(first), *([_listed(others)] if others else []), cases, *unfit]
    return f"{verdict}{mode}: " + "; ".join(parts)


def _is_blind(row: Row) -> bool:
    """Whether no claim compared values with PyTorch's: those of an engine for another GPU, or of random weights."""
    found = [row.claims[name].verdict for name in VALUES if name in row.claims]
    return bool(found) and not any(verdict in GOOD or verdict in FAILING for verdict in found)


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{number} {word}" for word, number in sorted(counts.items(), key=lambda item: -item[1]))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

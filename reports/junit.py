"""JUnit XML as CI servers read it: a suite for each case, a test for each claim, and one for each run as a whole."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

from reports.events import FAILING, NEUTRAL, Claim
from reports.findings import evidence
from reports.record import Row, Run, Summary
from reports.wording import sentence

# JUnit's two words for a failure: what was judged and does not hold, and what could not be judged.
_ERRORS = frozenset({"ERROR", "TIMEOUT", "CRASH"})


def render(summary: Summary) -> str:
    """The XML document. WAIVED is shown as skipped with its reason, as pytest shows an expected failure."""
    root = ET.Element("testsuites", name="exportgate")
    for run in summary.runs:
        root.append(_run(summary, run))
    for row in summary.rows:
        root.append(_row(summary, row))
    never = [entry for entry in summary.unmet if entry.row is None]
    if never:
        suite = ET.SubElement(root, "testsuite", name="must-pass claims that never ran")
        for entry in never:
            test = ET.SubElement(suite, "testcase", classname=entry.case, name=sentence(entry.claim), time="0")
            message = "NEVER RAN: the must-pass list names it, and no run has judged it"
            ET.SubElement(test, "failure", message=message, type="NEVER_RAN")
    totals = [_count(suite) for suite in root]
    for name, values in zip(("tests", "failures", "errors", "skipped"), zip(*totals, strict=True), strict=True):
        root.set(name, str(sum(values)))
    root.set("time", f"{sum(float(suite.get('time', '0')) for suite in root):.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _count(suite: ET.Element) -> tuple[int, int, int, int]:
    """Sets a suite's counts from its tests, and returns them: tests, failures, errors, skipped."""
    counts = (
        len(suite.findall("testcase")),
        len(suite.findall("testcase/failure")),
        len(suite.findall("testcase/error")),
        len(suite.findall("testcase/skipped")),
    )
    for name, value in zip(("tests", "failures", "errors", "skipped"), counts, strict=True):
        suite.set(name, str(value))
    return counts


def _run(summary: Summary, run: Run) -> ET.Element:
    """A run that stopped, judged nothing or broke must be red in CI, even where each claim that it reached is green."""
    suite = ET.Element("testsuite", name=f"run {run.start.run}", timestamp=run.start.time, hostname=run.machine)
    _properties(suite, {"machine": run.machine, "exportgate": run.start.exportgate, "headline": summary.headline})
    test = ET.SubElement(
        suite, "testcase", classname="exportgate", name="the run judged its claims to the end", time="0"
    )
    problem = f"the run {run.stopped}" if run.stopped else ""
    unfit = [remark for remark in summary.remarks if run.start.run in remark]
    if not run.stopped and summary.verdict == "NOTHING JUDGED":
        problem = "no claim was judged"
    elif not run.stopped and run.end and run.end.exit and unfit:
        problem = "; ".join(unfit)
    if problem:
        ET.SubElement(test, "error", message=f"{summary.verdict}: {problem}", type=summary.verdict.replace(" ", "_"))
    return suite


def _row(summary: Summary, row: Row) -> ET.Element:
    case = row.case
    name = f"{case.case} ({row.where})" if row.where else case.case
    seconds = sum(_seconds(claim) for claim in row.claims.values())
    suite = ET.Element("testsuite", name=name, timestamp=case.time, hostname=row.run.machine, time=f"{seconds:.3f}")
    facts = {field: str(getattr(case, field)) for field in ("model", "format", "precision", "runtime", "device")}
    digest = case.hops[-1].digest if case.hops else ""
    _properties(suite, {**facts, "run": row.run.start.run, "machine": row.run.machine, "artifact": digest})
    unmet = summary.unmet_claims(row)
    for claim in row.claims.values():
        test = ET.SubElement(
            suite, "testcase", classname=name, name=sentence(claim.claim), time=f"{_seconds(claim):.3f}"
        )
        _properties(test, {"claim": claim.claim, "verdict": claim.verdict})
        _outcome(test, claim, must_pass=claim.claim in unmet)
    return suite


def _outcome(test: ET.Element, claim: Claim, *, must_pass: bool) -> None:
    message = f"{claim.verdict}: {claim.because}" if claim.because else claim.verdict
    if must_pass:
        message += " (on the must-pass list)"
    if claim.verdict in _ERRORS:
        node = ET.SubElement(test, "error", message=message, type=claim.verdict)
    elif claim.verdict in FAILING or must_pass:
        node = ET.SubElement(test, "failure", message=message, type=claim.verdict)
    elif claim.verdict in NEUTRAL or claim.verdict == "WAIVED":
        waiver = claim.waiver
        reason = (
            f" (waived by {waiver.owner} until {waiver.expires}: {waiver.reason}, {waiver.issue})" if waiver else ""
        )
        ET.SubElement(test, "skipped", message=message + reason, type=claim.verdict)
        return
    else:
        return
    figures = evidence(claim)
    lines = [claim.because]
    if figures:
        lines.append(
            f"{figures.what}: observed {figures.observed}, allowed {figures.allowed} {figures.excess}".rstrip()
        )
    if claim.reproduce:
        lines.append(f"reproduce: {claim.reproduce}")
    node.text = "\n".join(line for line in lines if line)


def _seconds(claim: Claim) -> float:
    return claim.seconds if claim.seconds is not None and math.isfinite(claim.seconds) else 0.0


def _properties(parent: ET.Element, values: dict[str, str]) -> None:
    properties = ET.SubElement(parent, "properties")
    for name, value in values.items():
        if value:
            ET.SubElement(properties, "property", name=name, value=value)

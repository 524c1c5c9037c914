"""Commands on baselines: a run's measurements accepted, shown beside what was accepted before, and listed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import BadRequest

if TYPE_CHECKING:  # the command line's parser waits for none of them
    from reports import Run
    from reports.events import Claim, Measurement
    from suites.support.acceptance import Proposal
    from suites.support.config import Project

AGAINST_BASELINE = (
    "test_p50_within_baseline",
    "test_size_load_and_memory_within_baseline",
    "test_accuracy_within_baseline",
)


def add_baseline(commands: Any) -> None:
    """`exportgate baseline accept|diff|show`."""
    text = "Accept measurements as baselines, or show them."
    baseline = commands.add_parser("baseline", help=text, description=text)
    baseline.set_defaults(command=_baseline)
    actions = baseline.add_subparsers(dest="action", metavar="ACTION", required=True)
    accept = actions.add_parser("accept", help="make a run's measurements the baselines")
    accept.add_argument("run", metavar="RUN", help="folder of the run")
    accept.add_argument("--reason", required=True, help="why; it is written into the file")
    accept.add_argument("--case", action="append", default=[], metavar="ID", help="only this case (repeatable)")
    accept.add_argument("--project", metavar="DIR")
    diff = actions.add_parser("diff", help="a run's measurements beside the baselines, before they are accepted")
    diff.add_argument("run", metavar="RUN", help="folder of the run")
    diff.add_argument("--project", metavar="DIR")
    show = actions.add_parser("show", help="list the baselines")
    show.add_argument("--project", metavar="DIR")


def _baseline(options: argparse.Namespace, further: list[str]) -> int:
    from suites.support.config import find_project

    project = find_project(options.project, Path.cwd())
    if options.action == "show":
        return _show(project.baselines)
    if options.action == "diff":
        return _diff(project.baselines, Path(options.run))
    return _accept(project, options)


def _accept(project: Project, options: argparse.Namespace) -> int:
    import reports
    from exporters.tensorrt import timing
    from reports.events import FAILING
    from suites.support.acceptance import check, write

    if not options.reason.strip():
        raise BadRequest("a baseline is accepted without a reason", "say why with --reason")
    run = reports.read_record(Path(options.run))
    measured = {k: m for k, m in _measured(run).items() if not options.case or k in options.case}
    absent = next((c for c in options.case if c not in measured), None)
    if absent or not measured:
        raise BadRequest(
            f"run {options.run} measured " + (f"no case '{absent}'" if absent else "nothing"),
            "give a run whose latency claims were judged",
        )
    wrong = {c.case: c for c in run.claims if c.verdict in FAILING and not _is_against_baseline(c)}
    proposals = [_proposed(project.baselines, run, case, options.reason) for case in measured]
    for one in proposals:  # all of them before any is written
        check(one.now, measured[one.now.case].throttled, project.latency_on(one.now.device))
        if one.now.case in wrong:
            raise BadRequest(
                f"case {one.now.case} failed {wrong[one.now.case].claim} in this run: how fast it is says nothing",
                "accept the other cases with --case, or mend this one",
            )
    write(proposals)
    for one in proposals:
        now, before = one.now.p50, one.before.p50 if one.before else None
        print(
            f"{one.now.path}: p50 {now:.3f} ms"
            + (f", before {before:.3f} ms ({now / before - 1:+.1%})" if before else ", new"),
            *one.changes(),
            sep="\n  ",
        )
    gpus = {one.now.path.parent: str(one.now.comparable.get("gpu name") or "") for one in proposals}
    for place, gpu in gpus.items():
        for path in timing.store(place, gpu) if gpu else ():
            print(f"{path}: the timing cache that engines are built with")
    return 0


def _diff(folder: Path, path: Path) -> int:
    """Each measured case beside its baseline: what accepting the run would change."""
    import reports
    from suites.support.gate import ratio_of

    run = reports.read_record(path)
    measured = _measured(run)
    if not measured:
        raise BadRequest(f"run {path} measured nothing", "give a run whose latency claims were judged")
    for one in [_proposed(folder, run, case) for case in measured]:
        now, before = one.now, one.before
        if before is None:
            print(f"{now.case}: p50 {now.p50:.3f} ms, no baseline")
            continue
        ratio = ratio_of(before.processes, now.processes)
        print(
            f"{now.case}: p50 {now.p50:.3f} ms, baseline {before.p50:.3f} ms of {before.date} "
            f"({ratio.ratio - 1:+.1%}, {ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"
        )
        for line in (*before.differs(now.comparable), *one.changes()):
            print(f"  {line}")
    return 0


def _is_against_baseline(claim: Claim) -> bool:
    """Whether a claim holds the case against the very baseline that is to be replaced: what it rejects may be meant."""
    return claim.claim in AGAINST_BASELINE and claim.verdict in ("FAIL", "INCONCLUSIVE")


def _measured(run: Run) -> dict[str, Measurement]:
    """The measurement of each case that has one."""
    return {c.case: c.measurement for c in run.claims if c.measurement}


def _proposed(folder: Path, run: Run, case: str, reason: str = "") -> Proposal:
    """A case of a run as the baseline that it would be."""
    from suites.support.acceptance import propose

    measurement = _measured(run)[case]
    claims = {c.claim: c for c in run.claims if c.case == case}
    labels = claims.get("test_accuracy_against_labels")
    machine = str(measurement.conditions.get("machine", run.machine))
    return propose(folder, machine, case, measurement, reason, labels.accuracy if labels else None)


def _show(folder: Path) -> int:
    from suites.support.baseline import read_baseline

    found = [b for path in sorted(folder.glob("*/*.json")) if (b := read_baseline(path))]
    for baseline in found:
        print(
            f"{baseline.path.parent.name}/{baseline.case}: p50 {baseline.p50:.3f} ms, "
            f"{len(baseline.processes)} processes, {baseline.date}, {baseline.reason}"
        )
    print(f"{len(found)} baselines in {folder}")
    return 0

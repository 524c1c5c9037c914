"""Commands on baselines: a run's measurements accepted, shown beside what was accepted before, and listed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from exporters.errors import BadRequest


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
        return _show_baselines(project.baselines)
    if options.action == "diff":
        return _diff_baselines(project.baselines, Path(options.run))
    import reports
    from exporters.tensorrt import timing
    from reports.events import FAILING
    from suites.support.baseline import Accuracy, accept, baseline_path, check, read_baseline

    run = reports.read_record(Path(options.run))
    claims = [
        (c.case, c.measurement) for c in run.claims if c.measurement and (not options.case or c.case in options.case)
    ]
    absent = next((c for c in options.case if c not in {case for case, _ in claims}), None)
    if absent or not claims:
        raise BadRequest(
            f"run {options.run} measured " + (f"no case '{absent}'" if absent else "nothing"),
            "give a run whose latency claims were judged",
        )
    wrong = {c.case: c for c in run.claims if c.verdict in FAILING and c.measurement is None}
    for case, measurement in claims:  # all of them before any is written
        check(case, measurement, options.reason)
        read_baseline(baseline_path(project.baselines, _folder(measurement, run.machine), case))
        if case in wrong:
            raise BadRequest(
                f"case {case} failed {wrong[case].claim} in this run: how fast it is says nothing",
                "accept the other cases with --case, or mend this one",
            )
    metrics = {
        c.case: Accuracy(a.metric, a.artifact[a.metric], a.reference[a.metric], a.pictures)
        for c in run.claims
        if c.claim == "test_accuracy_against_labels" and (a := c.accuracy)
    }
    gpus: dict[Path, str] = {}
    for case, measurement in claims:
        machine = _folder(measurement, run.machine)
        path, before, after = accept(project.baselines, machine, case, measurement, options.reason, metrics.get(case))
        print(
            f"{path}: p50 {after:.3f} ms"
            + (f", before {before:.3f} ms ({after / before - 1:+.1%})" if before else ", new")
        )
        gpus[path.parent] = str(measurement.conditions["comparable"].get("gpu name") or "")
    for folder, gpu in gpus.items():
        for path in timing.store(folder, gpu) if gpu else ():
            print(f"{path}: the timing cache that engines are built with")
    return 0


def _diff_baselines(folder: Path, run: Path) -> int:
    """Each measured case beside its baseline: what accepting the run would change."""
    import numpy as np

    import reports
    from suites.support.baseline import baseline_path, read_baseline
    from suites.support.gate import ratio_of

    record = reports.read_record(run)
    measured = {c.case: c.measurement for c in record.claims if c.measurement}
    if not measured:
        raise BadRequest(f"run {run} measured nothing", "give a run whose latency claims were judged")
    for case, measurement in measured.items():
        now = float(np.median([np.median(p) for p in measurement.processes]))
        found = read_baseline(baseline_path(folder, _folder(measurement, record.machine), case))
        if found is None:
            print(f"{case}: p50 {now:.3f} ms, no baseline")
            continue
        ratio = ratio_of(found.processes, measurement.processes)
        print(
            f"{case}: p50 {now:.3f} ms, baseline {found.p50:.3f} ms of {found.date} ({ratio.ratio - 1:+.1%}, "
            f"{ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"
        )
        for line in found.differs(measurement.conditions["comparable"]):
            print(f"  {line}")
        for name, before in found.figures.items():
            if before != (after := measurement.conditions.get(name, before)):
                print(f"  {name}: {before:g} in the baseline, {after:g} here")
    return 0


def _folder(measurement: Any, machine: str) -> str:
    """Name of the folder of a measurement's baseline."""
    return str(measurement.conditions.get("machine", machine))


def _show_baselines(folder: Path) -> int:
    from suites.support.baseline import read_baseline

    found = [b for path in sorted(folder.glob("*/*.json")) if (b := read_baseline(path))]
    for baseline in found:
        print(
            f"{baseline.path.parent.name}/{baseline.case}: p50 {baseline.p50:.3f} ms, "
            f"{len(baseline.processes)} processes, {baseline.date}, {baseline.reason}"
        )
    print(f"{len(found)} baselines in {folder}")
    return 0

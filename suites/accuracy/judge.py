"""A case's detections judged: against labels, or against PyTorch's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exporters.spec import ExportSpec
from suites.accuracy.budget import Budget
from suites.accuracy.deploy import Detections, above
from suites.accuracy.gate import Outcome, judge
from suites.accuracy.metrics import as_labels, evaluate
from suites.accuracy.pictures import classes_of, found_in, kept, reference_of, shown_to, task_of
from suites.support.bench import Bench
from suites.support.compare import SCORE_FLOOR
from suites.support.detections import MARGIN

DOUBTFUL = 0.05  # score from which a detection of PyTorch's excuses one of the artifact's


def against_labels(case: Bench, found: Sequence[Detections], budget: Budget) -> Outcome:
    """The task's metric of detections of the case's pictures beside PyTorch's, by their labels."""
    task, count, items = task_of(case.model), classes_of(case.model), shown_to(case).items
    reference = kept(case, "labels", lambda: evaluate(task, items, reference_of(case), count))
    return judge(evaluate(task, items, found, count), reference, budget)


def agreement(case: Bench, found: Sequence[Detections], budget: Budget) -> Outcome:
    """The same with what PyTorch is sure of taken as the labels, where an overlap of 0.5 is enough.

    As in `suites.support.detections`: what lies within the precision's margin of the score floor, or below it, may be
    found by either side or not.
    """
    task, count = task_of(case.model), classes_of(case.model)
    theirs = reference_of(case)
    sure = SCORE_FLOOR + MARGIN[case.spec.precision]
    truth = [
        replace(item, labels=as_labels(above(side, DOUBTFUL, task), task == "segment", sure))
        for item, side in zip(shown_to(case).items, theirs, strict=True)
    ]
    reference = kept(case, ("agreement", sure), lambda: evaluate(task, truth, theirs, count).at_half())
    return judge(evaluate(task, truth, found, count).at_half(), reference, budget)


def judged(case: Bench, spec: ExportSpec, budget: Budget) -> tuple[Outcome, ...]:
    """The outcomes of another request's artifact in the case's runtime: by labels where there are any, then without."""
    pool, shown = case.run.pool, shown_to(case)
    session = case.guard(lambda: pool.open(pool.export(spec), spec, case.case.runtime.id, case.case.device))
    try:
        found = found_in(case, session, spec, shown)
    finally:
        session.close()
    without = agreement(case, found, budget)
    return (against_labels(case, found, budget), without) if shown.labelled else (without,)

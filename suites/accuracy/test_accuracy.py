"""Accuracy: the task's own metric against labels, and agreement with PyTorch's detections where there are none."""

from __future__ import annotations

import pytest

from exporters.errors import NotSupported
from exporters.spec import Precision
from suites.accuracy.budget import Budget
from suites.accuracy.gate import Outcome
from suites.accuracy.judge import against_labels, agreement, drift
from suites.accuracy.pictures import artifact_of, shown_to
from suites.accuracy.search import saves_time
from suites.performance.measuring import held, metric_of_old
from suites.support.bench import Bench
from suites.support.verdict import Judged, Verdict

pytestmark = [pytest.mark.values, pytest.mark.accuracy]


def test_accuracy_against_labels(case: Bench) -> None:
    """The artifact's metric on labelled images is PyTorch's within the precision's budget."""
    if not shown_to(case).labelled:
        raise NotSupported("the pictures have no labels; agreement with PyTorch is judged on them")
    _conclude(case, against_labels(case, artifact_of(case), _budget(case)))


def test_accuracy_within_baseline(case: Bench) -> None:
    """The artifact's metric has not fallen from what was accepted, on the same pictures, by more than the budget.

    PyTorch's may have fallen, too: then the checkpoint is another.
    """
    if not shown_to(case).labelled:
        raise NotSupported("the pictures have no labels")
    found = artifact_of(case)
    path, baseline = held(case)
    before, day = (baseline.accuracy, baseline.date) if baseline is not None else (None, "")
    if case.run.old is not None:
        before, day = metric_of_old(case, case.run.old), "the old toolchain"
    if before is None:
        raise Judged(
            Verdict.NO_BASELINE,
            f"no baseline {path.parent.name}/{path.name} with a metric: accept this run with "
            "'exportgate baseline accept RUN --reason ...'",
        )
    if before.pictures != shown_to(case).digest:
        raise Judged(Verdict.NOT_COMPARABLE, f"the metric of {day} was taken on other pictures")
    outcome = against_labels(case, found, _budget(case))
    budget, now, theirs = outcome.budget, outcome.artifact.metric, outcome.reference.metric
    least = before.value * budget.allowed if budget.is_share else before.value - budget.allowed
    assert now >= least, (
        f"{before.metric} {now:.4f}, baseline {before.value:.4f} of {day}, allowed {least:.4f} "
        f"(PyTorch: {theirs:.4f}, then {before.reference:.4f})"
    )


def test_detections_agree_without_labels(case: Bench) -> None:
    """What PyTorch is sure of, taken as the truth, the artifact finds again, and nothing else as surely.

    Neither scores nor places of all of them are changed in one direction.
    """
    found = artifact_of(case)
    _conclude(case, agreement(case, found, _budget(case)))
    drifted = drift(case, found)
    assert not drifted, drifted


def test_int8_meets_its_budget(case: Bench) -> None:
    """With as few modules in floating point as the budget needs: better than all in INT8, faster than none."""
    if not case.case.budget:
        raise NotSupported("no budget was asked for (--int8-budget)")
    found = artifact_of(case)
    assert case.search is not None
    case.evidence["search"] = case.search.to_dict()
    judge = against_labels if shown_to(case).labelled else agreement
    _conclude(case, judge(case, found, Budget(case.case.budget, True)))
    everything = next(s for s in case.search.steps if not s.spec.keep and s.spec.precision is Precision.INT8)
    nothing, chosen = case.search.nothing, case.search.chosen
    assert chosen.outcome.change >= min(everything.outcome.change, 1.0), (
        f"{chosen.name} keeps {chosen.outcome.change:.4f} of the metric, "
        f"{everything.name} {everything.outcome.change:.4f}"
    )
    if saves_time(case) and chosen.milliseconds and nothing.milliseconds:
        assert chosen.milliseconds <= nothing.milliseconds, (
            f"{chosen.name} takes {chosen.milliseconds:.3f} ms, {nothing.name} {nothing.milliseconds:.3f} ms"
        )


def _budget(case: Bench) -> Budget:
    return Budget(case.case.budget, True) if case.case.budget else case.run.project.accuracy[case.spec.precision]


def _conclude(case: Bench, outcome: Outcome) -> None:
    case.evidence["accuracy"] = outcome.to_dict() | {"pictures": shown_to(case).digest}
    assert outcome.verdict is not Verdict.FAIL, outcome.line()
    if outcome.verdict is not Verdict.PASS:
        raise Judged(outcome.verdict, outcome.line())

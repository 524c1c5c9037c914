"""Accuracy: the task's own metric against labels, and agreement with PyTorch's detections where there are none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporters.errors import NotSupported
from suites.accuracy.deploy import above
from suites.accuracy.gate import Outcome, judge
from suites.accuracy.metrics import as_labels, evaluate
from suites.accuracy.pictures import RELIABLE, classes_of, of_case, task_of
from suites.support.bench import Bench
from suites.support.verdict import Judged, Verdict

pytestmark = [pytest.mark.values, pytest.mark.accuracy]


def test_accuracy_against_labels(case: Bench) -> None:
    """The artifact's metric on labelled images is PyTorch's within the precision's budget."""
    task, count = task_of(case.model), classes_of(case.model)
    shown, ours, theirs = of_case(case)
    if not shown.labelled:
        raise NotSupported("the pictures have no labels; agreement with PyTorch is judged on them")
    artifact, reference = (evaluate(task, shown.items, found, count) for found in (ours, theirs))
    _conclude(case, judge(artifact, reference, case.run.project.accuracy[case.spec.precision]))


def test_detections_agree_without_labels(case: Bench) -> None:
    """What PyTorch is sure of, taken as the truth, the artifact finds again, and nothing else as surely.

    An overlap of 0.5 is enough: a box that lies a little beside PyTorch's may be as near to the object.
    """
    task, count = task_of(case.model), classes_of(case.model)
    shown, ours, theirs = of_case(case)
    truth = [
        replace(item, labels=as_labels(above(found, RELIABLE, task), polygons=task == "segment"))
        for item, found in zip(shown.items, theirs, strict=True)
    ]
    artifact, reference = (evaluate(task, truth, found, count).at_half() for found in (ours, theirs))
    _conclude(case, judge(artifact, reference, case.run.project.accuracy[case.spec.precision]))


def _conclude(case: Bench, outcome: Outcome) -> None:
    case.evidence["accuracy"] = outcome.to_dict()
    assert outcome.verdict is not Verdict.FAIL, outcome.line()
    if outcome.verdict is not Verdict.PASS:
        raise Judged(outcome.verdict, outcome.line())

"""A case's detections judged: against labels, or against PyTorch's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from exporters.spec import ExportSpec
from suites.accuracy.budget import Budget
from suites.accuracy.deploy import Array, Detections, above
from suites.accuracy.gate import Outcome, judge
from suites.accuracy.metrics import Evaluation, as_labels, evaluate
from suites.accuracy.pictures import classes_of, found_in, kept, reference_of, shown_to, task_of
from suites.support.bench import Bench
from suites.support.compare import SCORE_FLOOR
from suites.support.detections import MARGIN, NMS_IOU, iou, rotated_iou
from suites.support.suppression import NEARLY

DOUBTFUL = 0.05  # score from which a detection of PyTorch's excuses one of the artifact's
OVERLAP = 0.5  # a box that lies a little beside PyTorch's may be as near to the object
DRIFT = 0.02  # of a box's size: 1 px of a box of 50, far more than the mean of hundreds of roundings


def against_labels(case: Bench, found: Sequence[Detections], budget: Budget) -> Outcome:
    """The task's metric of detections of the case's pictures beside PyTorch's, by their labels."""
    task, count, items = task_of(case.model), classes_of(case.model), shown_to(case).items
    reference = kept(case, "labels", lambda: evaluate(task, items, reference_of(case), count))
    return judge(evaluate(task, items, found, count), reference, budget)


def agreement(case: Bench, found: Sequence[Detections], budget: Budget) -> Outcome:
    """F1 with what PyTorch is sure of taken as the labels, where an overlap of 0.5 is enough; of a classifier top-1.

    As in `suites.support.detections`: what lies within the precision's margin of a deployment's confidence, or nearly
    overlaps so much that it is suppressed, may be found by either side or not.
    """
    task, count = task_of(case.model), classes_of(case.model)
    theirs = reference_of(case)
    least, sure = _confidences(case)

    def doubted(side: Detections) -> Detections:
        return replace(side, scores=np.where(_rivals(side, case), np.minimum(side.scores, least), side.scores))

    truth = [
        replace(item, labels=as_labels(doubted(above(side, DOUBTFUL, task)), task == "segment", sure))
        for item, side in zip(shown_to(case).items, theirs, strict=True)
    ]

    def taken(side: Sequence[Detections]) -> Evaluation:
        shown = [doubted(above(f, least, task)) for f in side]
        return evaluate(task, truth, shown, count).deployed(OVERLAP, sure)

    return judge(taken(found), kept(case, ("agreement", sure), lambda: taken(theirs)), budget)


def drift(case: Bench, found: Sequence[Detections]) -> str:
    """What all detections that both sides have share of a change, where it is more than rounding leaves of it, or "".

    Rounding has no direction: of hundreds of scores and places its mean is far less than of one. A rank, and so average
    precision, does not change where all scores do.
    """
    theirs, margin = reference_of(case), MARGIN[case.spec.precision]
    if task_of(case.model) == "classify":
        firsts = [int(a.scores.argmax()) for a in theirs]
        rows = [(b.scores[k] - a.scores[k], 0.0, 0.0) for k, a, b in zip(firsts, theirs, found, strict=True)]
    else:
        _, sure = _confidences(case)
        rows = [row for a, b in zip(theirs, found, strict=True) for row in _changes(a, b, sure)]
    worst = max((float(f.scores.max()) for f in found if len(f.scores)), default=0.0)
    if worst > 1 + margin:
        return f"a score is {worst:.4g}, and none is more than 1"
    if not rows:
        return ""
    score, *places = np.mean(rows, 0)
    if abs(score) > margin:
        return f"scores differ by {score:+.4f} on average over {len(rows)} that PyTorch is sure of, allowed {margin:g}"
    if max(map(abs, places)) > DRIFT:
        moved = max(places, key=abs)
        return f"boxes are moved by {moved:+.4f} of their size on average over {len(rows)}, allowed {DRIFT:g}"
    return ""


def _changes(theirs: Detections, ours: Detections, sure: float) -> list[tuple[float, float, float]]:
    """Of each detection that PyTorch is sure of: score, x and y (in sizes of the box) of ours that it overlaps most."""
    rows: list[tuple[float, float, float]] = []
    table = iou(theirs.boxes, ours.boxes) * (theirs.classes[:, None] == ours.classes[None])
    for place in np.flatnonzero((theirs.scores >= sure) & (table.max(1, initial=0) >= OVERLAP)):
        best = int(table[place].argmax())
        a, b = theirs.boxes[place], ours.boxes[best]
        moved = (b[:2] + b[2:] - a[:2] - a[2:]) / 2 / np.maximum(a[2:] - a[:2], 1.0)
        rows.append((float(ours.scores[best] - theirs.scores[place]), float(moved[0]), float(moved[1])))
    return rows


def _rivals(found: Detections, case: Bench) -> Array:
    """(N,) which overlap a stronger one of their class by just so much that suppression leaves them."""
    limit = case.spec.iou if case.spec.nms else NMS_IOU
    if not len(found.boxes):
        return np.zeros(len(found.scores), bool)
    table = iou(found.boxes, found.boxes) if found.turned is None else rotated_iou(found.turned, found.turned)
    near = (table > limit - NEARLY) & (table <= limit) & (found.classes[:, None] == found.classes[None])
    return (near & (found.scores[:, None] <= found.scores[None])).any(1)


def _confidences(case: Bench) -> tuple[float, float]:
    """Score from which a deployment may take a detection, and from which it surely does."""
    floor, margin = case.spec.conf if case.spec.nms else SCORE_FLOOR, MARGIN[case.spec.precision]
    return floor - margin, floor + margin


def judged(case: Bench, spec: ExportSpec, budget: Budget) -> tuple[Outcome, ...]:
    """The outcomes of another request's artifact, of this case or of what it is made from: by labels where there are
    any, then without."""
    pool, shown = case.run.pool, shown_to(case)
    runtime, device = case.runtime_of(spec, is_parent=spec.format != case.spec.format)
    session = case.guard(lambda: pool.open(pool.export(spec), spec, runtime, device))
    try:
        found = found_in(case, session, spec, shown)
    finally:
        session.close()
    without = agreement(case, found, budget)
    return (against_labels(case, found, budget), without) if shown.labelled else (without,)

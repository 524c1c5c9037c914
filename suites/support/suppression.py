"""Detections of a graph that suppresses by itself, and the reference's after the same suppression, in one layout.

Both are brought into the layout of anchors (B, 4 + classes + more, N), one column a detection and zeros behind them, so
that everything that reads a detector's outputs reads these, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.models.spec import ModelSpec
from exporters.spec import ExportSpec
from suites.support.detections import IOU_FLOOR, MARGIN, Candidates, Matching, detector_output, iou

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
TINY = 1e-6  # score of what is a detection at all, and no row of zeros
NEARLY = 0.05  # by which the overlap of two that rival may be rounded


def as_anchors(outputs: Outputs, model: ModelSpec, spec: ExportSpec) -> dict[str, Array]:
    """What a graph with NMS gave, rows x1, y1, x2, y2, score, class and more, as anchors.

    Raises:
        AssertionError: the output has another shape, or a class that there is not.
    """
    entry, first, last = _places(model)
    rows = np.asarray(outputs[entry])
    assert rows.ndim == 3 and rows.shape[1] == spec.max_det and rows.shape[2] >= 6, (
        f"output {entry} has shape {list(rows.shape)}, expected [batch, {spec.max_det}, 6 or more] of a graph with NMS"
    )
    labels = rows[..., 5].astype(int)
    assert ((labels >= 0) & (labels < last - first)).all(), (
        f"output {entry} has class {int(labels.max())}, and the model {last - first} classes"
    )
    made = np.zeros((len(rows), last + rows.shape[2] - 6, spec.max_det), rows.dtype)
    made[:, :2] = ((rows[..., :2] + rows[..., 2:4]) / 2).transpose(0, 2, 1)
    made[:, 2:4] = (rows[..., 2:4] - rows[..., :2]).transpose(0, 2, 1)
    np.put_along_axis(made[:, first:last], labels[:, None], rows[:, None, :, 4], 1)
    made[:, last:] = rows[..., 6:].transpose(0, 2, 1)
    return {**outputs, entry: made}


def suppressed(outputs: Outputs, model: ModelSpec, spec: ExportSpec) -> dict[str, Array]:
    """The reference's anchors after the request's suppression: PyTorch and NMS, as a deployment has them."""
    entry, first, last = _places(model)
    anchors = np.asarray(outputs[entry])
    made = np.zeros((len(anchors), anchors.shape[1], spec.max_det), anchors.dtype)
    for image, values in zip(made, anchors, strict=True):
        scores = values[first:last]
        best, label = scores.max(0), scores.argmax(0)
        left = np.flatnonzero(best > spec.conf)
        left = left[np.argsort(-best[left], kind="stable")]
        low, high = values[:2] - values[2:4] / 2, values[:2] + values[2:4] / 2
        boxes = np.concatenate((low, high)).T.astype(np.float64)
        for place in range(spec.max_det):
            if not len(left):
                break
            one, rest = left[0], left[1:]
            image[:, place] = values[:, one]
            image[first:last, place] = 0
            image[first + label[one], place] = best[one]
            same = np.ones(len(rest), bool) if spec.agnostic_nms else label[rest] == label[one]
            left = rest[(iou(boxes[one : one + 1], boxes[rest])[0] * same) <= spec.iou]
    return {**outputs, entry: made}


def matched(raw: Outputs, observed: Outputs, model: ModelSpec, spec: ExportSpec) -> Matching:
    """Matches what a graph with NMS gave one to one with the reference's detections, none of it suppressed again.

    Two detections may take each other's place where their scores are as good as equal, so that which of them suppresses
    the other is rounding: that of the artifact has to be an anchor of the reference then.

    Args:
        raw: the reference's anchors.
        observed: the artifact's detections, as `as_anchors` has them.
    """
    entry = detector_output(model)
    assert entry is not None
    floor, margin = IOU_FLOOR.get(spec.precision, 0.9), MARGIN.get(spec.precision, 1e-2)
    wanted = suppressed(raw, model, spec)
    total = found_again = 0
    lowest, lost, extra = 1.0, list[str](), list[str]()
    for number in range(len(wanted[entry.name])):
        sides = [{o.name: np.asarray(side[o.name])[number] for o in model.outputs} for side in (wanted, observed, raw)]
        found = Candidates(sides[:2], model, entry, TINY)
        want, got = np.arange(found.count), np.arange(found.count, len(found.rows))
        scores = found.rows[:, 4]
        sure = spec.conf + margin
        if len(want) == spec.max_det:  # which comes last is decided by little
            sure = max(sure, float(scores[want].min()) + margin)
        table, pair = found.similar(want, got), dict[int, int]()
        for row in want[np.argsort(-scores[want], kind="stable")]:
            likeness = np.where(np.isin(got, list(pair.values())), 0.0, table[row]) if len(got) else np.zeros(1)
            if likeness.max() >= floor:
                pair[int(row)] = int(got[likeness.argmax()])
                lowest = min(lowest, float(likeness.max()))
        missing = [int(r) for r in want if int(r) not in pair]
        surplus = [int(r) for r in got if int(r) not in pair.values()]
        known = Candidates([sides[2], sides[1]], model, entry, max(spec.conf - margin, TINY))
        for row in list(missing):
            overlaps = iou(found.rows[row : row + 1, :4], found.rows[surplus, :4])[0] if surplus else np.zeros(0)
            for other, overlap in zip(list(surplus), overlaps, strict=True):
                here = np.array([other - found.count + known.count])
                near = overlap > spec.iou - NEARLY and abs(scores[row] - scores[other]) <= margin
                if near and known.similar(here, np.arange(known.count)).max() >= floor:
                    pair[row] = other
                    missing.remove(row)
                    surplus.remove(other)
                    break
        certain = want[scores[want] >= sure]
        total += len(certain)
        found_again += sum(int(r) in pair for r in certain)
        for rows, told in ((missing, lost), (surplus, extra)):
            told += [
                f"image {number}: class {int(found.rows[r, 5])} score {scores[r]:.3f}"
                for r in rows
                if scores[r] >= sure
            ]
    return Matching(total, found_again, floor, lowest, tuple(lost), tuple(extra))


def _places(model: ModelSpec) -> tuple[str, int, int]:
    """Name of the output of anchors, and where its scores begin and end."""
    spec = detector_output(model)
    assert spec is not None
    score = next(g for g in spec.groups if g.kind == "score")
    return spec.name, score.start, int(score.stop or 0)

"""Detections of every task: likeness of turned boxes, key points and masks, and classes; outputs of every head."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from exporters.models.catalog import TASKS, outputs_of
from exporters.models.spec import ModelSpec
from exporters.spec import Precision
from suites.support.compare import compare
from suites.support.detections import Outputs, match, oks, rotated_iou, same_objects

NC, SIZE, POINTS = 3, 64, (2, 3)
ANCHORS = 6


def model(task: str) -> ModelSpec:
    return ModelSpec(task, "nowhere:at_all", outputs=outputs_of(task, NC, POINTS), task=task)


def scene(task: str) -> dict[str, np.ndarray[Any, Any]]:
    """Two objects of different classes in the first two of ANCHORS anchors, with whatever the task adds."""
    spec = model(task)
    if task == "classify":
        return {"output0": np.array([[0.7, 0.2, 0.1]], np.float32)}
    last = max(g.stop or 0 for g in spec.outputs[0].groups)
    output = np.zeros((1, last, ANCHORS), np.float32)
    output[0, :4, 0], output[0, 4, 0] = (20, 20, 16, 24), 0.9
    output[0, :4, 1], output[0, 5, 1] = (44, 40, 20, 12), 0.8
    outputs: dict[str, np.ndarray[Any, Any]] = {"output0": output}
    if task == "segment":
        # The first prototype is a disc, the second everything.
        y, x = np.mgrid[: SIZE // 4, : SIZE // 4]
        prototypes = np.zeros((1, 32, SIZE // 4, SIZE // 4), np.float32)
        prototypes[0, 0] = np.where((x - 5) ** 2 + (y - 5) ** 2 < 6, 4.0, -4.0)
        prototypes[0, 1] = 4.0
        output[0, 4 + NC, 0] = output[0, 5 + NC, 1] = 1.0
        outputs["output1"] = prototypes
    if task == "pose":
        output[0, 4 + NC :, 0] = (16, 12, 0.9, 24, 28, 0.8)
        output[0, 4 + NC :, 1] = (36, 40, 0.9, 52, 42, 0.1)
    if task == "obb":
        output[0, 4 + NC, :2] = (0.3, 1.2)
    return outputs


def changed(outputs: Outputs, name: str, where: Any, value: float) -> Outputs:
    copy = {k: v.copy() for k, v in outputs.items()}
    copy[name][where] = value
    return copy


@pytest.mark.parametrize("task", TASKS)
def test_the_same_outputs_match(task: str) -> None:
    found = same_objects(scene(task), scene(task), model(task), Precision.FP32)
    assert found is not None
    assert found.passed and found.reference == found.matched == (1 if task == "classify" else 2)


@pytest.mark.parametrize(
    ("task", "name", "where", "value"),
    [
        ("segment", "output0", (0, 4 + NC, 0), -1.0),  # the disc becomes what is around it
        ("segment", "output1", (0, 0, slice(0, 5)), -4.0),  # half of the disc is gone
        ("pose", "output0", (0, 4 + NC, 0), 30.0),
        ("obb", "output0", (0, 4 + NC, 0), 0.8),
        ("classify", "output0", (0, 1), 0.9),
        ("detect", "output0", (0, 2, 0), 30.0),
    ],
)
def test_what_the_task_adds_is_matched(task: str, name: str, where: Any, value: float) -> None:
    """The boxes and classes stay as they are; the mask, a point, the angle, or the first class does not."""
    outputs = scene(task)
    found = same_objects(outputs, changed(outputs, name, where, value), model(task), Precision.INT8)
    assert found is not None
    assert not found.passed and found.matched < found.reference


def test_two_classes_that_are_as_likely_may_change_places() -> None:
    outputs = {"output0": np.array([[0.45, 0.449, 0.101]], np.float32)}
    other = changed(outputs, "output0", (0, 1), 0.451)
    found = same_objects(outputs, other, model("classify"), Precision.FP16)
    assert found is not None and found.passed


@pytest.mark.parametrize(
    ("task", "group", "where", "value"),
    [
        ("segment", "mask coefficients", (0, 4 + NC, 0), 1.1),
        ("segment", "prototypes", (0, 3, 2, 2), 0.1),
        ("pose", "points x", (0, 4 + NC, 0), 18.0),
        ("pose", "points y", (0, 5 + NC, 1), 42.0),
        ("pose", "visibility", (0, 6 + NC, 1), 0.8),
        ("obb", "angle", (0, 4 + NC, 1), 1.25),
        ("classify", "probabilities", (0, 0), 0.71),
    ],
)
def test_every_group_of_channels_is_compared(task: str, group: str, where: Any, value: float) -> None:
    """One value of one group beyond its FP16 limit fails that group, with its own index, and no other."""
    name = "output1" if group == "prototypes" else "output0"
    outputs = scene(task)
    rows = compare(outputs, changed(outputs, name, where, value), model(task), Precision.FP16, imgsz=(SIZE, SIZE))
    bad = [r for r in rows if not r.passed and r.measure == "max_abs"]
    assert [r.group for r in bad] == [group]
    assert bad[0].worst_index == where
    # On an anchor where nothing fires it says nothing.
    if name == "output0" and task != "classify":
        silent = changed(outputs, name, (0, where[1], ANCHORS - 1), value)
        assert all(r.passed for r in compare(outputs, silent, model(task), Precision.FP16, imgsz=(SIZE, SIZE)))


def test_turned_boxes_overlap_as_geometry_says() -> None:
    square, turned = np.array([[0, 0, 2, 2, 0.0]]), np.array([[0, 0, 2, 2, math.pi / 4]])
    octagon = 8 * (math.sqrt(2) - 1)  # area of the square's intersection with itself turned by 45 degrees
    assert rotated_iou(square, turned)[0, 0] == pytest.approx(octagon / (8 - octagon))
    # A box turned by a right angle is the one with its sides exchanged.
    assert rotated_iou(np.array([[5, 5, 4, 2, math.pi / 2]]), np.array([[5, 5, 2, 4, 0.0]]))[0, 0] == pytest.approx(1)


def test_key_points_are_as_similar_as_coco_says() -> None:
    points = np.zeros((1, 17, 2))
    moved = points + np.array([3.0, 4.0])  # by 5 px
    k = np.array([0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087,
                  0.087, 0.089, 0.089])  # fmt: skip
    want = np.exp(-25 / (2 * 900 * (2 * k) ** 2)).mean()
    assert oks(points, moved, np.array([900.0]))[0, 0] == pytest.approx(want)


def test_turned_boxes_suppress_each_other_by_their_own_overlap() -> None:
    """Two long boxes that cross have nearly the same upright box when only their angles differ; both stay."""
    outputs = scene("obb")
    output = outputs["output0"]
    output[0, :, 2] = output[0, :, 1]
    output[0, 4 + NC, 2] = output[0, 4 + NC, 1] + math.pi / 2
    found = match(outputs, outputs, model("obb"), Precision.FP32)
    assert found.reference == 3

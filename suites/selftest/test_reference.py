"""The reference data and trainings: pictures are always the same, labels are where objects are, losses are right."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.models.catalog import TASKS, from_checkpoint
from exporters.models.yolov8 import build
from suites.reference import losses, scenes, train
from suites.support.detections import rotated_iou


def test_a_picture_is_always_the_same() -> None:
    one, again = scenes.picture("val", 3, "detect"), scenes.picture("val", 3, "detect")
    assert np.array_equal(one.image, again.image)
    assert [t.outline.tolist() for t in one.things] == [t.outline.tolist() for t in again.things]
    others = (scenes.picture("val", 4, "detect"), scenes.picture("train", 3, "detect"))
    assert not any(np.array_equal(one.image, other.image) for other in others)


def test_labels_are_where_the_objects_are() -> None:
    """The visible outline lies in the turned box; the key points are in the middle of its sides, front first."""
    from shapely import Polygon

    count = 0
    for number in range(20):
        for thing in scenes.picture("train", number, "pose").things:
            count += 1
            assert Polygon(scenes.corners(thing.turned)).buffer(1e-6).contains(Polygon(thing.outline))
            cx, cy, w, _, angle = thing.turned
            if thing.points[0, 2]:
                front = (cx + math.cos(angle) * w / 2, cy + math.sin(angle) * w / 2)
                assert thing.points[0, :2] == pytest.approx(front)
            for x, y, seen in thing.points:
                assert (0 <= x < scenes.SIZE and 0 <= y < scenes.SIZE) if seen else (x, y) == (0, 0)
    assert count > 40


@pytest.mark.parametrize("task", TASKS)
def test_a_data_set_is_written_as_yolo_reads_it(tmp_path: Path, task: str) -> None:
    made = scenes.write(tmp_path, task, {"train": 2, "val": 3})
    assert len(list(tmp_path.rglob("*.bmp"))) == 5
    if task == "classify":
        assert {p.parent.name for p in (tmp_path / "val").rglob("*.bmp")} <= set(scenes.NAMES.values())
        return
    assert made.is_file()
    for number in range(3):
        things = scenes.picture("val", number, task).things
        lines = (tmp_path / "labels" / "val" / f"{number:05}.txt").read_text().splitlines()
        assert len(lines) == len(things)
        for line, thing in zip(lines, things, strict=True):
            label, *values = line.split()
            assert int(label) == thing.label
            wanted = {"detect": 4, "segment": 2 * len(thing.outline), "pose": 16, "obb": 8}[task]
            assert len(values) == wanted
            places = [v for n, v in enumerate(map(float, values)) if task != "pose" or n < 4 or (n - 4) % 3 < 2]
            assert all(0 <= v <= 1 for v in places)


@pytest.mark.parametrize("how", list(itertools.product((False, True), repeat=3)))
def test_labels_turn_with_their_picture(how: tuple[bool, bool, bool]) -> None:
    """Of the turned picture's own instance map: boxes, turned boxes and key points still lie on their objects."""
    batch = train.pictures_of([("train", n, "pose") for n in range(4)])
    made = train.turned_about(batch, *how)
    for b, m in made.valid.nonzero().tolist():
        y, x = np.nonzero(made.instances[b].numpy() == m + 1)
        pixels = np.stack((x, y), 1) * 4 + 2.0
        low, high = pixels.min(0), pixels.max(0)
        box = made.boxes[b, m].numpy()
        assert np.abs(np.concatenate((low, high)) - box).max() < 10  # a tip is thinner than the cells
        turned = made.turned[b, m].numpy().astype(np.float64)
        local = losses.own_frame(torch.tensor(pixels), torch.tensor(turned)[None, None])[0, 0].abs().numpy()
        assert (local <= turned[2:4] / 2 + 2).all()
        front = turned[:2] + np.array([math.cos(turned[4]), math.sin(turned[4])]) * turned[2] / 2
        sides = made.points[b, m].numpy()
        if sides[0, 2]:
            assert sides[0, :2] == pytest.approx(front, abs=1e-3)
        if sides[2, 2]:  # the left one is to the left of the direction, in a picture whose y points down
            across = (math.cos(turned[4]) * (sides[2, 1] - turned[1])) - math.sin(turned[4]) * (sides[2, 0] - turned[0])
            assert across < 0


def test_ciou_is_that_of_its_publication() -> None:
    a = torch.tensor([[0.0, 0, 4, 2]])
    assert float(losses.ciou(a, a)) == pytest.approx(1, abs=1e-5)
    b = torch.tensor([[2.0, 0, 6, 2]])  # IoU 1/3; centres 2 apart, the box around both has the diagonal sqrt(40)
    assert float(losses.ciou(a, b)) == pytest.approx(1 / 3 - 4 / 40, abs=1e-5)
    c = torch.tensor([[1.0, -1, 3, 3]])  # the same centre, sides exchanged: IoU 1/3, shapes differ
    v = 4 / math.pi**2 * (math.atan(2 / 4) - math.atan(4 / 2)) ** 2
    assert float(losses.ciou(a, c)) == pytest.approx(1 / 3 - v * v / (v - 1 / 3 + 1), abs=1e-5)


def test_probiou_knows_that_a_quarter_turn_exchanges_sides() -> None:
    a = torch.tensor([[10.0, 10, 8, 4, 0.3]])
    same = torch.tensor([[10.0, 10, 4, 8, 0.3 - math.pi / 2]])
    assert float(losses.probiou(a, a)) > 0.999
    assert float(losses.probiou(a, same)) > 0.999
    moves = ((1.0, 0.0), (4.0, 0.0), (0.0, 0.5), (0.0, 1.5))
    values = [float(losses.probiou(a, a + torch.tensor([[shift, 0, 0, 0, turn]]))) for shift, turn in moves]
    assert 1 > values[0] > values[1] > 0
    assert 1 > values[2] > values[3] > 0


@pytest.mark.parametrize("angle", np.linspace(-3, 3, 13).tolist())
def test_the_nearest_description_of_a_box_is_the_same_box(angle: float) -> None:
    box = torch.tensor([[10.0, 10, 8, 4, 0.3]], dtype=torch.float64)
    found = losses.nearest_angle(box, torch.tensor([angle]))
    assert abs(float(found[0, 4]) - angle) <= math.pi / 4 + 1e-6
    assert rotated_iou(box.numpy(), found.numpy())[0, 0] == pytest.approx(1)


def test_assignment_takes_the_best_aligned_anchors() -> None:
    """Anchor 1 is best for the first object, 3 for the second; anchor 2 is wanted by both and learns the nearer."""
    scores = torch.full((1, 5, 2), 0.5)
    overlap = torch.tensor([[[0.2, 0.9, 0.6, 0.0, 0.0], [0.0, 0.0, 0.7, 0.8, 0.1], [0.9, 0.9, 0.9, 0.9, 0.9]]])
    inside = torch.tensor([[[True, True, True, False, False], [False, False, True, True, False], [True] * 5]])
    found = losses.assign(scores, overlap, inside, torch.tensor([[0, 1, 0]]), torch.tensor([[True, True, False]]))
    assert found.positive.tolist() == [[True, True, True, True, False]]
    assert found.number[0, :4].tolist() == [0, 0, 1, 1]
    assert found.weight[0, 1] == pytest.approx(0.9) and found.weight[0, 3] == pytest.approx(0.8)
    assert found.weight[0, 0] < 0.01


def test_the_distribution_s_loss_is_least_at_its_distance() -> None:
    def at(distance: float) -> float:
        logits = torch.full((1, 4, 16), -20.0)
        logits[..., 3] = logits[..., 4] = 0.0  # half and half: 3.5
        return float(losses.distribution(logits, torch.full((1, 4), distance)))

    assert at(3.5) == pytest.approx(math.log(2), abs=1e-4)
    assert at(3.5) < at(2.5) and at(3.5) < at(4.5)


def test_masks_cost_nothing_where_they_are_right() -> None:
    """Of three pictures, of which the second has no object, and the third two."""
    instances = torch.zeros((3, 8, 8), dtype=torch.uint8)
    instances[0, 2:5, 2:6] = 1
    instances[2, 2:5, 1:3], instances[2, 2:5, 5:7] = 1, 2
    prototypes = torch.zeros((3, 32, 8, 8))
    coefficients, rows, number = torch.zeros((3, 32)), torch.tensor([0, 2, 2]), torch.tensor([0, 0, 1])
    for anchor in range(3):
        shown = instances[rows[anchor]] == number[anchor] + 1
        prototypes[rows[anchor], anchor] = torch.where(shown, 20.0, -20.0)
        coefficients[anchor, anchor] = 1
    boxes = torch.tensor([[1.0, 1, 7, 6], [0, 1, 4, 6], [4, 1, 8, 6]])
    assert float(losses.masks(coefficients, prototypes, rows, instances, number, boxes)) < 1e-6
    assert float(losses.masks(-coefficients, prototypes, rows, instances, number, boxes)) > 10
    assert float(losses.masks(coefficients[[0, 2, 1]], prototypes, rows, instances, number, boxes)) > 3


def test_only_labelled_key_points_cost() -> None:
    wanted = torch.tensor([[[5.0, 5, 2], [0, 0, 0]]])
    exact = torch.tensor([[[5.0, 5], [99, 99]]])
    assert float(losses.key_points(exact, wanted, torch.tensor([100.0]))) == 0
    assert 0.1 < float(losses.key_points(exact + 2, wanted, torch.tensor([100.0]))) < 1


@pytest.mark.parametrize("task", TASKS)
def test_a_training_learns_and_its_file_is_read_back(tmp_path: Path, task: str) -> None:
    """A few steps on eight pictures lower the loss; what is saved is a checkpoint that says what it is."""
    data = train.pictures_of([("train", n, task) for n in range(8)])
    told: list[float] = []

    def tell(parts: dict[str, Any]) -> None:
        told.append(sum(float(v.detach()) for v in parts.values()))

    model = train.train(task, data, epochs=10, size=8, rate=2e-3, seed=0, device="cpu", tell=tell)
    assert np.mean(told[-3:]) < np.mean(told[:3])
    path = tmp_path / f"{task}.safetensors"
    train.save(model, task, path, {"command": "none"})
    spec = from_checkpoint(path)
    assert (spec.task, spec.arguments["scale"], dict(spec.names)) == (task, "p", scenes.NAMES)
    assert spec.kpt_shape == (scenes.KPT_SHAPE if task == "pose" else ())
    assert {k for k in model.state_dict() if "num_batches" not in k} == set(
        build("p", 6, task=task, kpt_shape=scenes.KPT_SHAPE).state_dict()
    ) - {k for k in model.state_dict() if "num_batches" in k}


def test_each_scale_learns_the_objects_that_fit_it() -> None:
    sides, strides = torch.tensor([[10.0, 40.0, 100.0, 180.0, 900.0]]), torch.tensor([[8.0], [16.0], [32.0]])
    wanted = [
        [True, False, False],
        [True, True, False],
        [False, True, True],
        [False, False, True],
        [False, False, True],
    ]
    assert losses.fitting(sides, strides).tolist() == [wanted]

"""Metrics with known answers, the reader of labelled data and its refusals, and places in the original image."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from exporters.calibration import keep_batches, kept_batches
from exporters.calibration.images import fitted, read_image
from exporters.errors import BadRequest, NotSupported
from exporters.models.catalog import TASKS, outputs_of
from exporters.models.spec import InputSpec, ModelSpec, Preprocess
from exporters.spec import ExportSpec, request
from suites.accuracy.budget import Budget
from suites.accuracy.dataset import Item, read_dataset, rectangle
from suites.accuracy.deploy import Detections, above, deploy
from suites.accuracy.gate import judge
from suites.accuracy.metrics import Evaluation, as_labels, evaluate
from suites.accuracy.pictures import pictures_of
from suites.reference import scenes
from suites.support.detections import rotated_iou
from suites.support.verdict import Verdict

Array = np.ndarray[Any, Any]
COUNT = 12
NC = len(scenes.NAMES)


FEEDS = """
import numpy as np

def feeds(spec):
    for number in range(3):
        yield {"b": np.ones((1, 2), np.float32), "a": np.full((1, 2), number, np.float32)}

def half(spec):
    yield {"b": np.ones((1, 2), np.float32)}
"""


def test_calibration_arrays_go_to_their_own_inputs(tmp_path: Path) -> None:
    """Whatever their order; a set that fills no batch, or lacks an input, is refused."""
    (tmp_path / "own_feeds.py").write_text(FEEDS, encoding="utf-8")
    inputs = tuple(InputSpec(name, ("batch", 2)) for name in "ab")
    model = ModelSpec("two", "own_feeds:feeds", search=(tmp_path,), inputs=inputs)

    def asked(data: str, batch: int) -> ExportSpec:
        return request(model, "openvino", int8=True, data=data, batch=batch)

    keep_batches(asked("own_feeds:feeds", 3), tmp_path / "kept")
    (kept,) = kept_batches(asked("own_feeds:feeds", 3), tmp_path / "kept")
    assert np.array_equal(kept["a"][:, 0], [0, 1, 2]) and (kept["b"] == 1).all()
    with pytest.raises(BadRequest, match="fewer samples than a batch of 4"):
        keep_batches(asked("own_feeds:feeds", 4), tmp_path / "none")
    with pytest.raises(BadRequest, match="gives b, and not a"):
        keep_batches(asked("own_feeds:half", 1), tmp_path / "half")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("scenes")
    return {task: scenes.write(made / task, task, {"val": COUNT}) for task in TASKS}


@pytest.fixture(scope="module")
def items(folder: dict[str, Path]) -> dict[str, list[Item]]:
    shape = scenes.KPT_SHAPE
    return {task: list(read_dataset(path, "val", task, shape).items) for task, path in folder.items()}


def found_of(item: Item, task: str) -> Detections:
    """Perfect detections: the labels."""
    from pycocotools import mask as runs

    labels, count = item.labels, len(item.labels.classes)
    if task == "classify":
        return Detections(np.eye(NC)[labels.classes[0]] * 0.9 + 0.01, np.arange(NC), np.zeros((0, 4)))
    coded: Any = runs
    masks = tuple(coded.merge(coded.frPyObjects([p.ravel().tolist()], *item.size)) for p in labels.polygons)
    points = labels.points if task == "pose" else None
    turned = labels.turned if task == "obb" else None
    return Detections(np.linspace(0.9, 0.5, count), labels.classes, labels.boxes, points, turned, masks)


def judged(
    task: str, items: list[Item], change: Callable[[Detections, int], Detections] = lambda d, n: d
) -> Evaluation:
    return evaluate(task, items, [change(found_of(item, task), n) for n, item in enumerate(items)], NC)


# ---- the reader -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_read_as_they_were_made(items: dict[str, list[Item]], task: str) -> None:
    assert len(items[task]) == COUNT
    if task == "classify":
        assert all(scenes.NAMES.values())
        return
    for number, item in enumerate(items[task]):
        things = scenes.picture("val", number, task).things
        assert item.labels.classes.tolist() == [t.label for t in things]
        for place, thing in enumerate(things):
            if task == "obb":
                assert rotated_iou(item.labels.turned[place : place + 1], thing.turned[None])[0, 0] > 0.999
            else:
                assert item.labels.boxes[place] == pytest.approx(np.clip(thing.box, 0, scenes.SIZE), abs=1e-3)
            if task == "pose":
                assert item.labels.points[place] == pytest.approx(thing.points, abs=1e-3)
            if task == "segment":
                assert item.labels.polygons[place] == pytest.approx(thing.outline, abs=1e-3)


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        ("detect", "0 0.5 x 0.1 0.1", ("line 1", "'x'", "not a number")),
        ("detect", "nan 0.5 0.5 0.1 0.1", ("line 1", "class nan")),
        ("detect", "inf 0.5 0.5 0.1 0.1", ("line 1", "class inf")),
        ("detect", "0 0.5 0.5 0.1", ("line 1", "4 numbers", "5 numbers")),
        ("detect", "6 0.5 0.5 0.1 0.1", ("class 6", "0 to 5")),
        ("detect", "0.5 0.5 0.5 0.1 0.1", ("class 0.5",)),
        ("detect", "0 0.5 0.5 0.1 120", ("120", "from 0 to 1")),
        ("detect", "0 nan 0.5 0.1 0.1", ("nan", "from 0 to 1")),
        ("segment", "0 0.1 0.1 0.2 0.2", ("5 numbers", "three points")),
        ("obb", "0 0.1 0.1 0.2 0.2", ("5 numbers", "9 numbers")),
        ("pose", "0 0.5 0.5 0.1 0.1 0.5 0.5", ("7 numbers", "17 numbers")),
        ("pose", "0 0.5 0.5 0.1 0.1" + " 0.5 0.5 7" * 4, ("visibility 7",)),
    ],
)
def test_a_line_that_is_no_label_is_named(tmp_path: Path, task: str, line: str, words: tuple[str, ...]) -> None:
    data = scenes.write(tmp_path, task, {"val": 1})
    path = tmp_path / "labels" / "val" / "00000.txt"
    path.write_text(line + "\n")
    with pytest.raises(BadRequest) as caught:
        read_dataset(data, "val", task, scenes.KPT_SHAPE)
    assert all(w in str(caught.value) for w in (*words, "00000.txt")), str(caught.value)


def test_data_without_what_it_needs_is_refused(tmp_path: Path) -> None:
    data = scenes.write(tmp_path / "a", "detect", {"val": 1})
    data.write_text(data.read_text().partition("names:")[0])
    with pytest.raises(BadRequest, match="no names"):
        read_dataset(data, "val", "detect")
    with pytest.raises(BadRequest, match="folder without labels"):
        read_dataset(tmp_path / "a", "val", "detect")
    with pytest.raises(BadRequest, match="a class"):
        read_dataset(tmp_path / "a", "val", "classify")


def test_an_image_without_a_label_file_has_no_objects(tmp_path: Path) -> None:
    data = scenes.write(tmp_path, "detect", {"val": 2})
    (tmp_path / "labels" / "val" / "00001.txt").unlink()
    first, second = read_dataset(data, "val", "detect").items
    assert len(first.labels.classes) and not len(second.labels.classes)


def test_the_least_rectangle_around_its_own_corners_is_itself() -> None:
    box = np.array([50.0, 40, 30, 10, 0.7])
    assert rotated_iou(rectangle(scenes.corners(box))[None], box[None])[0, 0] == pytest.approx(1)


# ---- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_perfect_detections_are_perfect(items: dict[str, list[Item]], task: str) -> None:
    found = judged(task, items[task])
    assert found.metric == pytest.approx(1.0)
    assert all(v == pytest.approx(1.0) for v in found.values.values())


def none(found: Detections) -> Detections:
    return replace(found, scores=found.scores[:0], classes=found.classes[:0], boxes=found.boxes[:0])


def moved(array: Array | None, by: tuple[float, ...]) -> Array | None:
    return None if array is None else array + np.array(by)


DAMAGES: dict[str, tuple[str, Callable[[Detections, int], Detections]]] = {
    "boxes moved": ("detect", lambda d, _: replace(d, boxes=d.boxes + 12)),
    "classes swapped": ("detect", lambda d, _: replace(d, classes=(d.classes + 1) % NC)),
    "half lost": ("detect", lambda d, n: d if n % 2 else none(d)),
    "angles turned": ("obb", lambda d, _: replace(d, turned=moved(d.turned, (0, 0, 0, 0, 0.5)))),
    "points moved": ("pose", lambda d, _: replace(d, points=moved(d.points, (15, 15, 0)))),
    "masks of another": ("segment", lambda d, _: replace(d, masks=tuple(reversed(d.masks)))),
    "first class": ("classify", lambda d, n: replace(d, scores=d.scores if n % 2 else np.roll(d.scores, 1))),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_lowers_the_metric_and_the_interval_says_so(items: dict[str, list[Item]], name: str) -> None:
    task, change = DAMAGES[name]
    good, bad = judged(task, items[task]), judged(task, items[task], change)
    assert bad.metric < 0.75
    if name == "half lost":
        assert bad.values["precision"] == pytest.approx(1.0)
        assert bad.values["recall"] < 0.75
    if name == "first class":
        assert bad.values["top-1"] == pytest.approx(0.5)
    found = judge(bad, good, Budget(0.001, False))
    assert found.low <= found.change <= found.high < -0.001
    assert found.verdict is Verdict.FAIL


@pytest.mark.parametrize("task", TASKS)
def test_equal_detections_do_not_differ(items: dict[str, list[Item]], task: str) -> None:
    good = judged(task, items[task])
    found = judge(good, good, Budget(0.001, False))
    assert (found.change, found.low, found.high) == (0.0, 0.0, 0.0)


def test_our_accumulation_is_the_library_s(items: dict[str, list[Item]]) -> None:
    """On every image once it gives the library's own number, of detections that are neither perfect nor useless."""
    generator = np.random.default_rng(0)

    def noisy(found: Detections, number: int) -> Detections:
        boxes = found.boxes + generator.normal(0, 4, found.boxes.shape)
        wrong = generator.uniform(0, scenes.SIZE, (3, 2))[:, [0, 1, 0, 1]] + np.array([0, 0, 30, 30])
        return Detections(
            generator.uniform(0.1, 1, len(boxes) + 3),
            np.concatenate((found.classes, generator.integers(0, NC, 3))),
            np.concatenate((boxes, wrong)),
        )

    found = judged("detect", items["detect"], noisy)
    assert 0.1 < found.metric < 0.9
    assert found.resampled(np.ones(COUNT)) == pytest.approx(found.metric, abs=1e-12)
    doubted = [
        replace(i, labels=replace(i.labels, uncertain=generator.random(len(i.labels.classes)) < 0.3))
        for i in items["detect"]
    ]
    excused = judged("detect", doubted, noisy)
    assert excused.metric != found.metric
    assert excused.resampled(np.ones(COUNT)) == pytest.approx(excused.metric, abs=1e-12)


def test_what_the_reference_doubts_need_not_be_found(items: dict[str, list[Item]]) -> None:
    """A detection of an uncertain object is no error, and its absence no loss."""
    half = [
        replace(i, labels=replace(i.labels, uncertain=np.arange(len(i.labels.classes)) % 2 == 1))
        for i in items["detect"]
    ]
    sure = lambda d, _: above(replace(d, scores=np.where(np.arange(len(d.scores)) % 2, 0.1, 0.9)), 0.5, "detect")  # noqa: E731
    assert judged("detect", half).metric == pytest.approx(1.0)
    assert judged("detect", half, sure).metric == pytest.approx(1.0)
    assert judged("detect", items["detect"], sure).metric < 0.75


@pytest.mark.parametrize("task", TASKS)
def test_detections_agree_with_themselves(items: dict[str, list[Item]], task: str) -> None:
    found = [found_of(item, task) for item in items[task]]
    truth = [
        Item(i.path, i.size, as_labels(f, polygons=task == "segment")) for i, f in zip(items[task], found, strict=True)
    ]
    assert evaluate(task, truth, found, NC).metric == pytest.approx(1.0)


# ---- the verdict -----------------------------------------------------------------------------------------------------


def lose(items: list[Item], count: int) -> Evaluation:
    """Perfect detections but for the first `count` images, in which nothing is found."""
    return judged("detect", items, lambda d, n: none(d) if n < count else d)


@pytest.mark.parametrize(
    ("copies", "lost", "budget", "verdict"),
    [
        (4, 0, Budget(0.001, False), Verdict.PASS),
        (1, 0, Budget(0.001, False), Verdict.INCONCLUSIVE),  # 12 images
        (4, 24, Budget(0.005, False), Verdict.FAIL),
        (4, 1, Budget(0.02, False), Verdict.INCONCLUSIVE),  # one of 48: the interval reaches from 0 beyond it
        (4, 1, Budget(0.5, True), Verdict.PASS),
        (4, 24, Budget(0.99, True), Verdict.FAIL),
    ],
)
def test_the_verdict_follows_from_interval_and_budget(
    items: dict[str, list[Item]], copies: int, lost: int, budget: Budget, verdict: Verdict
) -> None:
    several = items["detect"] * copies
    found = judge(lose(several, lost), lose(several, 0), budget)
    assert found.verdict is verdict, found.line()
    assert (verdict is not Verdict.INCONCLUSIVE) or "images" in found.line().rpartition(";")[2]


@pytest.mark.parametrize(("images", "verdict"), [(300, Verdict.INCONCLUSIVE), (400, Verdict.PASS)])
def test_so_few_images_without_a_loss_say_little(images: int, verdict: Verdict) -> None:
    """0.99 of top-1: with one loss in 100, 300 images show none in 5 % of draws, 400 in 2 %."""
    empty = np.zeros(0)
    right = Evaluation(1.0, {"top-1": 1.0}, rows=((empty, np.ones((2, images)), empty, empty),), images=images)
    assert judge(right, right, Budget(0.99, True)).verdict is verdict


def test_an_artifact_that_is_better_is_another_model(items: dict[str, list[Item]]) -> None:
    several = items["detect"] * 4
    better, worse = lose(several, 0), lose(several, 24)
    assert judge(better, worse, Budget(0.005, False)).verdict is Verdict.FAIL
    assert judge(better, worse, Budget(0.99, True)).verdict is Verdict.PASS


def test_a_reference_that_finds_nothing_has_nothing_to_lose(items: dict[str, list[Item]]) -> None:
    several = items["detect"] * 4
    nothing = lose(several, len(several))
    assert judge(nothing, nothing, Budget(0.001, False)).verdict is Verdict.INSENSITIVE


# ---- the pictures ----------------------------------------------------------------------------------------------------


def detector(evaluate: str | Path, names: list[str] | None = None) -> ModelSpec:
    named = dict(enumerate(names or scenes.NAMES.values()))
    return ModelSpec(
        "m", "none:none", task="detect", outputs=outputs_of("detect", NC), names=named, evaluate=str(evaluate)
    )


def test_labels_get_the_model_s_numbers_by_name(folder: dict[str, Path], items: dict[str, list[Item]]) -> None:
    turned = list(scenes.NAMES.values())[::-1]
    found = pictures_of(detector(folder["detect"], turned))
    assert found.labelled
    for ours, theirs in zip(found.items, items["detect"], strict=True):
        assert ours.labels.classes.tolist() == [NC - 1 - k for k in theirs.labels.classes]


def test_pictures_without_labels_and_models_without_pictures(folder: dict[str, Path], tmp_path: Path) -> None:
    images = folder["detect"].parent / "images" / "val"
    found = pictures_of(detector(images))
    assert len(found.items) == COUNT and not found.labelled
    with pytest.raises(NotSupported, match="--evaluate"):
        pictures_of(detector(""))
    lost = tmp_path / "data.yaml"
    lost.write_text(f"path: {tmp_path}\nval: images\nnames: {list(scenes.NAMES.values())}\n")
    shutil.copytree(images, tmp_path / "images")
    with pytest.raises(BadRequest, match=f"none for {COUNT} images"):
        pictures_of(detector(lost))
    with pytest.raises(BadRequest, match="'fish' only in the data, 'rocket' only in the model"):
        pictures_of(detector(folder["detect"], [*list(scenes.NAMES.values())[:-1], "rocket"]))
    with pytest.raises(BadRequest, match="nowhere"):
        pictures_of(detector("nowhere:made"))


# ---- the deployment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 200), (333, 77), (64, 64)])
def test_what_the_network_sees_comes_back_to_its_place(size: tuple[int, int]) -> None:
    """Objects are put into raw outputs at the place that the letterbox gives them, and found again where they were."""
    imgsz = (160, 128)
    (height, width), (top, left) = fitted(size, imgsz, Preprocess())
    scale = np.array([width / size[1], height / size[0]])
    box = np.array([10.0, 20.0, 50.0, 60.0])
    for task in TASKS[:-1]:
        model = ModelSpec(task, "none:none", task=task, outputs=outputs_of(task, NC, (2, 3)))
        last = max(g.stop or 0 for g in model.outputs[0].groups)
        output = np.zeros((1, last, 3), np.float32)
        middle, sides = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        output[0, :2, 1] = middle * scale + (left, top)
        output[0, 2:4, 1] = sides * scale
        output[0, 4 + 2, 1] = 0.8
        outputs: dict[str, Array] = {"output0": output}
        if task == "pose":
            output[0, 4 + NC :, 1] = np.concatenate([[*((12, 30) * scale + (left, top)), 0.9]] * 2)
        if task == "obb":
            output[0, 4 + NC, 1] = 0.3
        if task == "segment":
            output[0, 4 + NC, 1] = 1
            outputs["output1"] = np.full((1, 32, imgsz[0] // 4, imgsz[1] // 4), 5, np.float32)
        found = deploy(outputs, 0, model, imgsz, size, 0.25)
        assert found.classes.tolist() == [2]
        assert found.boxes[0] == pytest.approx(np.clip(box, 0, [size[1], size[0]] * 2), abs=1e-3)
        if found.points is not None:
            assert found.points[0, 0, :2] == pytest.approx((12, 30), abs=1e-3)
        if found.turned is not None:
            assert found.turned[0, :2] == pytest.approx(middle, abs=1e-3)
        if found.masks:
            from pycocotools import mask as runs

            shown: Any = runs.decode(found.masks[0])
            inside = shown[20:60, 10:50]
            assert inside.all() and shown.sum() == inside.size


def test_suppression_is_within_classes_and_limited() -> None:
    model = ModelSpec("m", "none:none", outputs=outputs_of("detect", NC))
    output = np.zeros((1, 4 + NC, 1000), np.float32)
    output[0, :4] = np.array([[30], [30], [20], [20]])
    output[0, 4, :500], output[0, 5, 500:] = 0.5, 0.6
    found = deploy({"output0": output}, 0, model, (64, 64), (64, 64), 0.25)
    assert sorted(found.classes.tolist()) == [0, 1]
    output[0, 0] = np.arange(1000) * 30
    assert len(deploy({"output0": output}, 0, model, (64, 64), (64, 64), 0.25).classes) == 300


def test_a_picture_is_turned_as_its_camera_noted(tmp_path: Path) -> None:
    image, noted = PIL.Image.new("RGB", (40, 20)), PIL.Image.Exif()
    noted[0x0112] = 6  # orientation: a quarter turn
    image.save(tmp_path / "phone.jpg", exif=noted)
    assert read_image(tmp_path / "phone.jpg").shape == (40, 20, 3)


def test_pictures_are_read_as_they_were_written(folder: dict[str, Path]) -> None:
    image = read_image(folder["detect"].parent / "images" / "val" / "00002.bmp")
    assert np.array_equal(image, scenes.picture("val", 2, "detect").image)
    assert not math.isnan(float(image.mean()))

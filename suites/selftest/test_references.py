"""The reference checkpoints: what they say of themselves, that it holds, and damage that one kind of claim sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors import safe_open

from exporters.models.catalog import TASKS
from exporters.models.yolov8 import build
from exporters.spec import Precision
from suites.accuracy import test_accuracy as accuracy
from suites.accuracy import test_calibration as calibration
from suites.conformance import test_outputs as outputs
from suites.reference import scenes, train
from suites.selftest.conftest import Judge, Workshop
from suites.selftest.test_broken_accuracy import behind
from suites.selftest.test_nms import changed
from suites.support.bench import Bench
from suites.support.verdict import Verdict

pytestmark = pytest.mark.filterwarnings("ignore:.*__array__ implementation:DeprecationWarning")  # of pycocotools
FOLDER = Path(train.__file__).parent
GOAL = {"classify": ("top-1", 0.95)}
LABELS, AGREEMENT = accuracy.test_accuracy_against_labels, accuracy.test_detections_agree_without_labels
ELEMENTS, MATCHING = outputs.test_outputs_match_reference, outputs.test_detections_match_reference
CELLS = {8: 1024, 16: 256, 32: 64}  # anchors of each stride at 256 px, in the order of the output


def facts(task: str) -> dict[str, str]:
    with safe_open(FOLDER / f"{task}.safetensors", "np") as file:
        return dict(file.metadata())


def test_all_together_are_small() -> None:
    files = [FOLDER / f"{task}.safetensors" for task in TASKS]
    assert sum(f.stat().st_size for f in files) <= 8 << 20


@pytest.mark.parametrize("task", TASKS)
def test_a_reference_says_what_made_it(task: str) -> None:
    found = facts(task)
    assert found["command"].startswith(f"python -m suites.reference.train {task} ") and "--seed" in found["command"]
    assert "torch" in found["version"] and found["device"] and found["license"] == "Apache-2.0"
    name, least = GOAL.get(task, ("mAP50-95", 0.60))
    assert json.loads(found["metric"])[name] >= least


@pytest.mark.parametrize("task", TASKS)
def test_its_metric_is_what_it_says(task: str) -> None:
    """On the first 60 of the pictures: 0.08 is three standard errors of so few."""
    model = build(train.SCALE, len(scenes.NAMES), task=task, kpt_shape=scenes.KPT_SHAPE)
    own = {k for k in model.state_dict() if "num_batches" not in k}
    assert train.begin_from(model, FOLDER / f"{task}.safetensors") == len(own)
    name, least = GOAL.get(task, ("mAP50-95", 0.60))
    found = train.measured(model, task, 60).values[name]
    assert found >= least
    assert found == pytest.approx(json.loads(facts(task)["metric"])[name], abs=0.08)


def dead(stride: int) -> Callable[[Path, Workshop], None]:
    """Nothing is found at one of the three scales any more."""
    mask = np.concatenate([np.full(n, float(s != stride), np.float32) for s, n in CELLS.items()])
    both = np.concatenate((np.ones((4, mask.size), np.float32), np.tile(mask, (len(scenes.NAMES), 1))))
    return behind("output0 = Mul (inner, mask)", mask=both[None])


@pytest.mark.parametrize("stride", CELLS)
def test_a_dead_scale_costs_the_metric(workshop: Workshop, stride: int) -> None:
    """In 8 bits no element is compared, so labels, and without them PyTorch's detections, are what notices."""
    for claim in (LABELS, AGREEMENT):
        assert workshop.judge("detect onnx int8", claim) == (Verdict.PASS, ""), "the good artifact fails"
        verdict, because = workshop.judge("detect onnx int8", claim, dead(stride))
        assert verdict is Verdict.FAIL, because
    for claim in (ELEMENTS, MATCHING):
        assert workshop.judge("detect onnx int8", claim, dead(stride))[0] is Verdict.NOT_SUPPORTED


@pytest.mark.parametrize("order", [1, -1], ids=["RGB", "BGR"])
def test_colours_in_another_order_are_noticed(workshop: Workshop, judge: Judge, tmp_path: Path, order: int) -> None:
    """The metric would not notice: the colours of the shapes have no order, those of the photographs behind them do."""
    for number in range(100):
        image = scenes.picture("train", number, "detect").image[..., ::order]
        PIL.Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / f"{number:03}.bmp")
    case = workshop.case("detect onnx int8")
    bench = Bench(workshop.run, replace(case, spec=case.spec.but(data=str(tmp_path))))
    try:
        verdict, because = judge(calibration.test_calibration_fits_the_pictures, bench)
        assert (verdict is Verdict.PASS) == (order == 1) and ("red and blue" in because) == (order == -1), because
    finally:
        bench.close()


def scores_times(factor: float) -> Callable[[Path, Workshop], None]:
    by = np.array([1] * 4 + [factor] * len(scenes.NAMES), np.float32).reshape(1, -1, 1)
    return behind("output0 = Mul (inner, by)", by=by)


def boxes_moved(pixels: float) -> Callable[[Path, Workshop], None]:
    by = np.array([pixels, 0, 0, 0] + [0] * len(scenes.NAMES), np.float32).reshape(1, -1, 1)
    return behind("output0 = Add (inner, by)", by=by)


FLAT = behind("small = Mul (inner, by)\noutput0 = Add (small, more)", by=np.float32(0.1), more=np.float32(0.15))


@pytest.mark.parametrize(
    ("name", "damage", "word"),
    [
        ("detect onnx int8", scores_times(0.2), "share"),
        ("detect onnx int8", scores_times(0.5), "scores differ by"),
        ("detect onnx int8", scores_times(2), "none is more than 1"),
        ("detect onnx int8", boxes_moved(4), "boxes are moved by"),
        ("detect onnx int8 nms", changed("NonMaxSuppression", 3, 0.99), "share"),
        ("classify onnx int8", FLAT, "scores differ by"),
    ],
    ids=["scores a fifth", "scores half", "scores twice", "boxes moved by 4 px", "NMS at 0.99", "flat probabilities"],
)
def test_in_8_bits_a_deployment_would_see_it(
    workshop: Workshop, name: str, damage: Callable[[Path, Workshop], None], word: str
) -> None:
    """Where no rank changes, or no labels are at hand, PyTorch's detections at a deployment's confidence are left."""
    assert workshop.judge(name, AGREEMENT) == (Verdict.PASS, ""), "the good artifact fails"
    verdict, because = workshop.judge(name, AGREEMENT, damage)
    assert verdict is Verdict.FAIL and word in because, because


SCORES_LOWER = scores_times(0.9995)
SHARPER = behind(
    """
    odds = Log (inner)
    sharper = Mul (odds, by)
    output0 = Softmax <axis = 1> (sharper)
    """,
    by=np.float32(1.01),
)


@pytest.mark.parametrize(
    ("name", "damage", "misses"),
    [
        ("detect onnx fp32", SCORES_LOWER, [LABELS, AGREEMENT, MATCHING]),
        ("classify onnx fp16", SHARPER, [LABELS, AGREEMENT, MATCHING]),
    ],
    ids=["scores 0.05 % lower", "logits 1 % larger"],
)
def test_what_no_metric_sees_the_elements_show(
    workshop: Workshop, name: str, damage: Callable[[Path, Workshop], None], misses: list[Callable[..., None]]
) -> None:
    """What keeps the order of scores keeps the metric: a threshold in a deployment would see it, and so do we."""
    for claim in misses:
        assert workshop.judge(name, claim, damage) == (Verdict.PASS, "")
    verdict, because = workshop.judge(name, ELEMENTS, damage)
    assert verdict is Verdict.FAIL, because


@pytest.mark.parametrize("name", ["classify onnx fp16", "classify onnx int8"])
def test_a_classifier_is_shown_what_it_cannot_decide(workshop: Workshop, name: str) -> None:
    """Where two classes are as probable damage shows; 8 bits do not keep that, and are not asked to."""
    bench = workshop.bench(name)
    try:
        undecided = [f for f in bench.feeds() if f.undecided]
        assert bool(undecided) == (bench.spec.precision is Precision.FP16)
        for feeds in undecided:
            best = np.sort(bench.raw(feeds)["output0"], 1)[:, -2:]
            assert best.min() > 0.1 and np.ptp(best) < 0.02
    finally:
        bench.close()

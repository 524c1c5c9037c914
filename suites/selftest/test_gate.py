"""The latency gate, the percentiles and the comparison on numbers whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporters.artifact import TensorInfo
from exporters.errors import BadRequest, MeasurementError
from exporters.measure import MeasurementPlan, measure
from exporters.models.catalog import detect_outputs
from exporters.models.spec import ChannelGroup, ModelSpec, OutputSpec
from exporters.session import Feeds, OnDevice, Session
from exporters.spec import Precision
from suites.performance import test_latency
from suites.selftest.conftest import Workshop, judged
from suites.support.bench import Bench
from suites.support.compare import DRAWS, compare
from suites.support.detections import iou, match
from suites.support.gate import judge, percentiles
from suites.support.power import Power, Shown, prove
from suites.support.verdict import Verdict

DETECTOR = ModelSpec("detector", "", outputs=detect_outputs(3), imgsz=(640, 640))
VALUES = ModelSpec("values", "", outputs=(OutputSpec("y", ((0, "batch"),), (ChannelGroup("values", "value"),)),))


def processes(generator: np.random.Generator, count: int, center: float, cv: float) -> list[list[float]]:
    """Processes whose medians vary by `cv`, with a little noise inside each."""
    return [
        list(m * (1 + 0.002 * generator.standard_normal(50)))
        for m in center * (1 + cv * generator.standard_normal(count))
    ]


def test_a_slow_down_beyond_the_limit_fails() -> None:
    generator = np.random.default_rng(1)
    gate = judge(processes(generator, 10, 10.0, 0.01), processes(generator, 10, 10.7, 0.01), 0.02)
    assert gate.verdict is Verdict.FAIL
    assert 1.05 < gate.ratio < 1.09


def test_the_same_speed_passes() -> None:
    generator = np.random.default_rng(2)
    assert (
        judge(processes(generator, 10, 10.0, 0.005), processes(generator, 10, 10.0, 0.005), 0.02).verdict
        is Verdict.PASS
    )


def test_noise_that_hides_the_answer_is_inconclusive() -> None:
    generator = np.random.default_rng(3)
    assert (
        judge(processes(generator, 4, 10.0, 0.2), processes(generator, 4, 10.2, 0.2), 0.02).verdict
        is Verdict.INCONCLUSIVE
    )


def test_a_slow_down_that_cannot_be_detected_may_not_be_asked_for() -> None:
    generator = np.random.default_rng(4)
    with pytest.raises(BadRequest, match=r"must_detect = 0.05 lies below what 3 \+ 3 processes can detect"):
        judge(processes(generator, 3, 10.0, 0.1), processes(generator, 3, 10.0, 0.1), 0.02, 0.05)


def test_one_process_is_no_measurement() -> None:
    with pytest.raises(MeasurementError, match="at least two"):
        judge([[1.0, 1.0]], [[1.0], [1.0]], 0.02)


@pytest.mark.parametrize(
    ("fp16", "int8", "verdict"),
    [
        ([[1.0] * 9, [1.001] * 9, [0.999] * 9], [[0.9] * 9, [0.901] * 9, [0.899] * 9], Verdict.PASS),
        ([[1.0] * 9, [1.001] * 9, [0.999] * 9], [[1.1] * 9, [1.101] * 9, [1.099] * 9], Verdict.FAIL),
        ([[1.0] * 9, [1.05] * 9, [0.95] * 9], [[1.01] * 9, [1.06] * 9, [0.96] * 9], Verdict.INCONCLUSIVE),
        ([[1.0] * 9], [[0.999] * 9], Verdict.PASS),
        ([[1.0] * 9], [[1.001] * 9], Verdict.INCONCLUSIVE),
        ([[1.0] * 9], [[1.2] * 9], Verdict.FAIL),
    ],
    ids=["faster", "slower", "within the spread", "one process, faster", "one process, near", "one process, slower"],
)
@pytest.mark.parametrize("budget", [0.0, 0.99])
def test_a_lower_precision_that_is_slower_fails(
    workshop: Workshop, fp16: list[list[float]], int8: list[list[float]], verdict: Verdict, budget: float
) -> None:
    """Somebody would pay accuracy for nothing. An INT8 that was searched for is held against the same FP16."""
    cases = [replace(workshop.case("blobs engine int8 cuda"), budget=budget), workshop.case("blobs engine fp16 cuda")]
    run = workshop.run
    run.measured = {case.id: measured for case, measured in zip(cases, (int8, fp16), strict=True)}
    try:
        found, because = judged(test_latency.test_faster_than_the_next_precision, Bench(run, cases[0]))
    finally:
        run.measured = {}
    assert found is verdict, because
    assert verdict is Verdict.PASS or cases[1].id in because


class _Idle(OnDevice):
    """Feeds on a GPU that this machine lacks, whose CUDA graph computes nothing where `works` is false."""

    def __init__(self, works: bool) -> None:
        self.works, self.value = works, np.ones(3, np.float32)

    def enqueue(self, graph: bool = False) -> None:
        if self.works or not graph:
            self.value = np.ones(3, np.float32)

    def capture(self) -> bool:
        return True

    def compute_ms(self, graph: bool = False) -> float:
        self.enqueue(graph)
        return 1.0

    def wait(self) -> None: ...

    def forget(self) -> None:
        self.value = np.full(3, np.nan, np.float32)

    def outputs(self) -> dict[str, Any]:
        return {"y": self.value}

    def close(self) -> None: ...


class _OnGpu(Session):
    timed_on = "cuda:0"
    inputs = (TensorInfo("x", (1,), "float32"),)

    def __init__(self, works: bool) -> None:
        self.works = works

    def _run(self, feeds: Feeds) -> dict[str, Any]:
        return {"y": np.ones(3, np.float32)}

    def on_device(self, feeds: Feeds) -> OnDevice:
        return _Idle(self.works)

    def execution(self) -> Any: ...

    def metadata(self) -> Any: ...


def test_a_graph_that_computes_nothing_is_no_measurement() -> None:
    """The loop of a GPU: outputs are destroyed before it looks at them. `test_gpu` does the same to a real engine."""
    feeds, plan = [{"x": np.zeros(1, np.float32)}], MeasurementPlan(0.0, 0.01, 10)
    assert measure(_OnGpu(works=True), feeds, plan).milliseconds
    with pytest.raises(MeasurementError, match="output 'y' changed by nan"):
        measure(_OnGpu(works=False), feeds, plan)


def test_percentiles_are_nearest_rank_and_refused_below_their_count() -> None:
    found, notes = percentiles([[float(i) for i in range(1, 101)]])
    assert found["p50"] is not None
    assert found["p50"] == {"value": 50.0, "low": None, "high": None}  # one process tells nothing of others
    assert found["p90"] is not None
    assert found["p90"]["value"] == 90.0
    assert found["p99"] is None
    assert "p99 needs 662 inferences, got 100" in notes


finite = st.floats(-100, 100, width=32)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (2, 5), elements=finite), st.floats(1e-3, 10))
def test_a_difference_beyond_the_tolerance_never_passes(values: np.ndarray, size: float) -> None:
    extent = float(np.ptp(values.astype(np.float64))) or 1.0
    damaged = values.copy().astype(np.float64)
    damaged[1, 2] += 2e-4 * extent * (1 + size)
    assert not compare({"y": values}, {"y": damaged}, VALUES, Precision.FP32)[0].passed
    assert compare({"y": values}, {"y": values}, VALUES, Precision.FP32)[0].passed


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_never_pass(wrong: float) -> None:
    values = np.linspace(0, 1, 10).reshape(2, 5)
    damaged = values.copy()
    damaged[0, 3] = wrong
    for precision in (Precision.FP32, Precision.FP16, Precision.INT8):
        assert not any(r.passed for r in compare({"y": values}, {"y": damaged}, VALUES, precision))


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ((ChannelGroup("a", "value", "", 0, 3),), "channel 3 is in no group"),
        ((ChannelGroup("a", "value"), ChannelGroup("b", "value", "", 5)), "none in group 'b'"),
    ],
)
def test_a_channel_that_nothing_would_compare_is_refused(groups: tuple[ChannelGroup, ...], says: str) -> None:
    values = np.zeros((2, 5))
    with pytest.raises(BadRequest, match=says):
        compare(
            {"y": values}, {"y": values}, ModelSpec("m", "", outputs=(OutputSpec("y", (), groups),)), Precision.FP16
        )


@pytest.mark.parametrize("kind", ["score", "box"])
def test_int8_scores_without_boxes_are_compared_by_value(kind: str) -> None:
    """Detections are matched where there are both; alone, either would be compared by nothing."""
    model = ModelSpec("classes", "", outputs=(OutputSpec("y", (), (ChannelGroup("scores", kind),)),))
    values = np.linspace(0.3, 1, 100).reshape(2, 50)
    damaged = values[:, ::-1]
    assert [r.passed for r in compare({"y": values}, {"y": damaged}, model, Precision.INT8)] == [False]
    assert [r.passed for r in compare({"y": values}, {"y": values}, model, Precision.INT8)] == [True]


def test_cosine_alone_would_let_a_scale_error_pass_and_the_gate_does_not() -> None:
    values = np.linspace(1, 2, 100).reshape(2, 50)
    rows = compare({"y": values}, {"y": values * 1.02}, VALUES, Precision.FP16)
    assert {r.measure: r.passed for r in rows} == {"max_abs": False, "cosine": True}


def _output(boxes: list[tuple[float, float, float, float, int, float]]) -> np.ndarray:
    """A detector's raw output (1, 7, 20): cx, cy, w, h, class, score."""
    made = np.full((1, 7, 20), 1e-4)
    made[:, :4] = 5.0
    for i, (cx, cy, w, h, label, score) in enumerate(boxes):
        made[0, :4, i] = cx, cy, w, h
        made[0, 4 + label, i] = score
    return made


GOOD = [(100.0, 100.0, 40.0, 60.0, 0, 0.9), (300.0, 200.0, 80.0, 80.0, 1, 0.8), (500.0, 400.0, 50.0, 30.0, 2, 0.6)]


@pytest.mark.parametrize(
    ("change", "lost", "extra"),
    [
        (GOOD, 0, 0),
        (GOOD[:2], 1, 0),
        ([*GOOD, (50.0, 50.0, 20.0, 20.0, 1, 0.7)], 0, 1),
        ([(100.0, 100.0, 40.0, 60.0, 1, 0.9), *GOOD[1:]], 1, 1),
        ([(110.0, 100.0, 40.0, 60.0, 0, 0.9), *GOOD[1:]], 1, 1),
        ([*GOOD[:2], (500.0, 400.0, 50.0, 30.0, 2, 0.2)], 1, 0),
    ],
)
def test_matching_is_one_to_one_by_class(
    change: list[tuple[float, float, float, float, int, float]], lost: int, extra: int
) -> None:
    found = match({"output0": _output(GOOD)}, {"output0": _output(change)}, DETECTOR, Precision.FP16)
    assert (len(found.lost), len(found.extra)) == (lost, extra)


# Two anchors of one object: they overlap by 0.74, so NMS keeps the one with the higher score.
PAIR = ((100.0, 100.0, 40.0, 60.0), (106.0, 100.0, 40.0, 60.0))


@pytest.mark.parametrize(
    ("scores", "others", "lost", "extra"),
    [
        ((0.9004, 0.9000), (0.9001, 0.9003), 0, 0),  # a tie: which of them stays is rounding
        ((0.95, 0.90), (0.90, 0.95), 1, 1),  # no tie: the order of the scores changed
        ((0.9004, 0.9000), (0.1, 0.9003), 1, 0),  # the first is not there at all
    ],
)
def test_which_of_two_tied_anchors_nms_keeps_is_no_difference(
    scores: tuple[float, float], others: tuple[float, float], lost: int, extra: int
) -> None:
    a, b = (_output([(*box, 0, score) for box, score in zip(PAIR, s, strict=True)]) for s in (scores, others))
    found = match({"output0": a}, {"output0": b}, DETECTOR, Precision.FP16)
    assert (len(found.lost), len(found.extra)) == (lost, extra)


def test_two_boxes_that_overlap_by_just_the_limit_of_nms_may_become_one() -> None:
    apart, joined = (_output([(*PAIR[0], 0, 0.9), (100.0 + shift, *PAIR[0][1:], 0, 0.6)]) for shift in (7.2, 6.8))
    assert match({"output0": apart}, {"output0": joined}, DETECTOR, Precision.FP16).passed
    assert match({"output0": joined}, {"output0": apart}, DETECTOR, Precision.FP16).passed
    assert not match({"output0": apart}, {"output0": _output([(*PAIR[0], 0, 0.9)])}, DETECTOR, Precision.FP16).passed


def test_only_the_box_that_rounding_moves_is_allowed_more() -> None:
    """A box may move by six standard deviations of Monte Carlo arithmetic where that is more than the constant."""
    reference = _output(GOOD)
    spread = np.zeros_like(reference)
    spread[0, :4, 1] = 0.5  # the second box: 3 px

    def passes(anchor: int, pixels: float, precision: Precision = Precision.FP16) -> bool:
        moved = reference.copy()
        moved[0, 2, anchor] += pixels
        outputs = {"output0": reference}, {"output0": moved}
        rows = compare(*outputs, DETECTOR, precision, imgsz=(640, 640), rounding=lambda *_: {"output0": spread})
        return all(r.passed for r in rows)

    assert passes(0, 0.9) and passes(1, 2.9)
    assert not passes(0, 1.1) and not passes(1, 3.1)
    assert not passes(1, 0.9, Precision.FP32)


@pytest.mark.parametrize(("size", "limit"), [(640, 1.0), (480, 1.0), (240, 0.5)])
def test_a_box_of_a_small_image_may_move_less(size: int, limit: float) -> None:
    """Distances in it are shorter, and so are their roundings."""

    def passes(pixels: float) -> bool:
        reference = _output(GOOD)
        moved = reference.copy()
        moved[0, 2, 0] += pixels
        outputs = {"output0": reference}, {"output0": moved}
        return all(r.passed for r in compare(*outputs, DETECTOR, Precision.FP16, imgsz=(size, size)))

    assert passes(limit * 0.9) and not passes(limit * 1.1)


def test_more_draws_judge_what_few_reject() -> None:
    """A standard deviation of few draws may be far too small; what no better one reaches is not drawn again."""
    reference = _output(GOOD)
    asked: list[int] = []

    def rounding(draws: int, rows: Any) -> dict[str, np.ndarray[Any, Any]]:
        asked.append(draws)
        return {"output0": np.full_like(reference, 0.2 if draws == DRAWS[0] else 0.4)}  # 1.2 px, then 2.4

    def passes(pixels: float) -> bool:
        moved = reference.copy()
        moved[0, 2, 1] += pixels
        outputs = {"output0": reference}, {"output0": moved}
        asked.clear()
        return all(r.passed for r in compare(*outputs, DETECTOR, Precision.FP16, imgsz=(640, 640), rounding=rounding))

    assert passes(1.1) and asked == [8]
    assert passes(2.3) and asked == [8, 32]
    assert not passes(2.5) and asked == [8, 32]
    assert not passes(5.0) and asked == [8]


def test_of_a_batch_only_rows_beyond_their_limit_are_drawn() -> None:
    """Each row costs inferences of the reference; a row that the first draws excuse stays excused by them."""
    reference = np.concatenate([_output(GOOD)] * 3)
    asked: list[tuple[int, list[int]]] = []

    def rounding(draws: int, rows: Any) -> dict[str, np.ndarray[Any, Any]]:
        asked.append((draws, list(rows)))
        return {"output0": np.full_like(reference[rows], 0.2 if draws == DRAWS[0] else 0.4)}

    def passes(*pixels: float) -> bool:
        moved = reference.copy()
        moved[:, 2, 1] += pixels
        outputs = {"output0": reference}, {"output0": moved}
        asked.clear()
        return all(r.passed for r in compare(*outputs, DETECTOR, Precision.FP16, imgsz=(640, 640), rounding=rounding))

    assert passes(0.9, 1.1, 2.3) and asked == [(8, [1, 2]), (32, [2])]
    assert not passes(0.9, 2.5, 0.0) and asked == [(8, [1]), (32, [1])]


def test_an_override_of_the_user_is_not_widened() -> None:
    reference = _output(GOOD)
    moved = reference.copy()
    moved[0, 0, 0] += 0.2
    override = {"precision": "fp16", "group": "boxes", "measure": "max_abs", "allowed": 0.1, "reason": "tight"}
    rows = compare(
        {"output0": reference}, {"output0": moved}, DETECTOR, Precision.FP16, imgsz=(640, 640), overrides=[override],
        rounding=lambda *_: {"output0": np.ones_like(reference)},
    )  # fmt: skip
    assert not all(r.passed for r in rows)


def test_boxes_that_overlap_by_half_have_an_iou_of_a_third() -> None:
    a, b = np.array([[0.0, 0, 10, 10]]), np.array([[5.0, 0, 15, 10]])
    assert iou(a, b)[0, 0] == pytest.approx(1 / 3)


def test_a_model_that_never_fires_proves_nothing() -> None:
    """The flat output of untrained weights: everything passes, so the verdict must be INSENSITIVE."""
    silent = {"output0": _output([])}
    power = prove([Shown(silent, lambda layer, size: silent)], ["a", "b", "c"], DETECTOR, Precision.FP32, (640, 640))
    assert not power.sensitive
    assert "no anchor" in power.statement


def test_a_model_that_ignores_its_weights_proves_nothing() -> None:
    fires = {"output0": _output(GOOD)}
    power = prove([Shown(fires, lambda layer, size: fires)], ["a", "b", "c"], DETECTOR, Precision.FP32, (640, 640))
    assert not power.sensitive
    assert "does not notice noise" in power.statement


def test_a_model_without_weights_to_damage_proves_nothing() -> None:
    """No damage was tried, so none was missed: that is no proof."""
    reference = {"y": np.ones((1, 4))}
    power = prove([Shown(reference, lambda layer, size: reference)], [], VALUES, Precision.FP32, (0, 0))
    assert not power.sensitive and "no layer with weights" in power.statement


def test_an_output_that_no_damage_reaches_proves_nothing() -> None:
    """One output notices every damage, the other one is zero whatever the weights are."""
    model = ModelSpec("two", "", outputs=(OutputSpec("y"), OutputSpec("dead")))
    reference = {"y": np.arange(4.0).reshape(1, 4), "dead": np.zeros((1, 4))}

    def damaged(layer: str, size: float) -> dict[str, np.ndarray]:
        return {**reference, "y": reference["y"] * (1 + size)}

    power = prove([Shown(reference, damaged)], ["a", "b", "c"], model, Precision.FP32, (0, 0))
    assert not power.sensitive and "of dead" in power.statement
    alone = ModelSpec("one", "", outputs=(OutputSpec("y"),))
    assert prove([Shown(reference, damaged)], ["a", "b", "c"], alone, Precision.FP32, (0, 0)).sensitive


def test_one_set_of_feeds_may_notice_what_another_does_not() -> None:
    """All of them are judged; what none notices is still no proof."""
    reference = {"y": np.arange(4.0).reshape(1, 4)}

    def only(*noticed: str) -> Shown:
        return Shown(reference, lambda layer, size: {"y": reference["y"] * (1 + size * (layer in noticed))})

    def tried(*shown: Shown) -> Power:
        return prove(shown, ["a", "b", "c"], VALUES, Precision.FP32, (0, 0))

    assert tried(only("a", "b"), only("c")).sensitive
    assert not tried(only("a", "b"), only("a")).sensitive


def test_an_override_looks_at_the_anchors_that_the_default_looks_at() -> None:
    """FP32 compares boxes of every anchor; a stricter limit of the user's does not look away from some."""
    expected = np.zeros((1, 7, 2))
    expected[0, 4, 0] = 0.9
    observed = expected.copy()
    observed[0, 0, 1] = 300.0  # the box of an anchor that does not fire
    strict = {"precision": "fp32", "group": "box", "measure": "max_abs", "allowed": 0.001, "reason": "r"}
    for overrides in ((), (strict,)):
        rows = compare(
            {"output0": expected}, {"output0": observed}, DETECTOR, Precision.FP32, imgsz=(64, 64), overrides=overrides
        )
        assert not all(r.passed for r in rows if r.group == "boxes")

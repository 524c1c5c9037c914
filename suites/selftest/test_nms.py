"""NMS in the graph: the same detections as PyTorch and NMS, on crowds, on nothing, in batches; and broken ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from exporters.errors import BadRequest, NotSupported
from exporters.models.catalog import outputs_of
from exporters.models.spec import ModelSpec
from exporters.spec import ExportSpec, request
from suites.conformance import test_dynamic as dynamic
from suites.conformance import test_metadata as metadata
from suites.conformance import test_outputs as outputs
from suites.conformance import test_shapes as shapes
from suites.support.suppression import as_anchors, matched, suppressed
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

onnx = pytest.importorskip("onnx", reason="the toolchain onnx is not installed")
Array = np.ndarray[Any, Any]
NC, ANCHORS = 6, 400


def anchors(task: str, images: int = 3) -> dict[str, Array]:
    """Anchors of a crowd (400 boxes of 20 to 60 px on 100 px), the last picture without any above the score."""
    generator = np.random.default_rng(0)
    channels = outputs_of(task, NC, (4, 3))[0].groups[-1].stop or 0
    made = generator.normal(size=(images, channels, ANCHORS)).astype(np.float32)
    made[:, :2], made[:, 2:4] = (generator.uniform(a, b, (images, 2, ANCHORS)) for a, b in ((0, 100), (20, 60)))
    made[:, 4 : 4 + NC] = generator.random((images, NC, ANCHORS)) ** 3
    made[-1, 4 : 4 + NC] = 0.2
    return {"output0": made}


def in_graph(raw: Array, spec: ExportSpec) -> Array:
    """What ONNX Runtime makes of raw anchors by the graph that `suppress` builds."""
    import onnxruntime

    from exporters.graph.nms import suppress

    shape = ["batch", raw.shape[1], "anchors"]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("raw", "output0")]
    node = onnx.helper.make_node("Identity", ["raw"], ["output0"], "head")
    opset = onnx.helper.make_opsetid("", spec.opset)
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    suppress(model, spec)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"raw": raw})[0])


@pytest.mark.parametrize("task", ["detect", "segment", "pose"])
@pytest.mark.parametrize(
    "options", [{}, {"agnostic_nms": True}, {"iou": 0.3, "conf": 0.6}, {"max_det": 7}, {"opset": 17}], ids=str
)
def test_the_graph_suppresses_as_the_reference_does(task: str, options: dict[str, Any]) -> None:
    model = ModelSpec(task, "none:none", task=task, outputs=outputs_of(task, NC, (4, 3)), imgsz=(128, 128), stride=32)
    spec = request(model, "onnx", nms=True, **options)
    raw = anchors(task)
    got = as_anchors({"output0": in_graph(raw["output0"], spec)}, model, spec)["output0"]
    want = suppressed(raw, model, spec)["output0"]
    assert (want[0, 4 : 4 + NC].max(0) > 0).sum() >= min(spec.max_det, 20)
    assert not want[-1].any(), "a picture without detections"
    # Corners and back: half an ulp of 160 for each of four operations.
    assert np.abs(got - want).max() <= 160 * 2**-22
    few = as_anchors({"output0": in_graph(raw["output0"][..., :5], spec)}, model, spec)["output0"]
    assert few.shape == (3, want.shape[1], spec.max_det), "fewer anchors than rows"


def test_which_of_two_equals_suppresses_the_other_is_rounding() -> None:
    """Not so where the artifact's box is none of the reference's."""
    model = ModelSpec("m", "none:none", task="detect", outputs=outputs_of("detect", NC), imgsz=(128, 128), stride=32)
    spec = request(model, "onnx", nms=True, max_det=5)
    raw = np.zeros((1, 4 + NC, 3), np.float32)
    raw[0, :4] = np.array([[50, 52, 90], [50, 50, 90], [40, 40, 10], [40, 40, 10]])
    raw[0, 4 + 1] = (0.9, 0.8999, 0.7)
    kept = suppressed({"output0": raw}, model, spec)
    assert (kept["output0"][0, 5] > 0).sum() == 2
    other = suppressed({"output0": raw[..., 1:]}, model, spec)
    assert matched({"output0": raw}, other, model, spec).passed
    other["output0"][0, 0, 0] += 1
    found = matched({"output0": raw}, other, model, spec)
    assert len(found.lost) == len(found.extra) == 1


@pytest.mark.parametrize("task", ["obb", "classify"])
def test_what_cannot_be_suppressed_in_the_graph_is_refused(task: str) -> None:
    model = ModelSpec(task, "none:none", task=task, outputs=outputs_of(task, NC), imgsz=(64, 64))
    with pytest.raises(NotSupported, match="nms"):
        request(model, "onnx", nms=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conf": 0.5}, "'conf'"),
        ({"nms": True, "iou": 1.5}, "iou '1.5'"),
        ({"nms": True, "max_det": 0}, "max_det '0'"),
        ({"nms": True, "max_det": 5000}, "3840"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], words: str) -> None:
    model = ModelSpec("m", "none:none", task="detect", outputs=outputs_of("detect", NC), imgsz=(64, 64))
    with pytest.raises(BadRequest, match=words):
        request(model, "onnx", **options)


# ---- broken exporters -----------------------------------------------------------------------------------------------


def changed(kind: str, place: int, value: Any) -> Callable[[Path, Workshop], None]:
    """Another constant for one input of the graph's operator of this kind."""

    def damage(path: Path, workshop: Workshop) -> None:
        model = onnx.load(path)
        name = next(n for n in model.graph.node if n.op_type == kind and n.name.startswith("/nms/")).input[place]
        stored = next(i for i in model.graph.initializer if i.name == name)
        old = onnx.numpy_helper.to_array(stored)
        stored.CopyFrom(onnx.numpy_helper.from_array(np.full(old.shape, value, old.dtype), name))
        onnx.save(model, path)

    return damage


def another_class(path: Path, workshop: Workshop) -> None:
    """Classes counted from the second."""
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.op_type == "Cast" and n.input[0].startswith("/nms/ArgMax"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2, np.int64), "/nms/three"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "/nms/one"))
    wrong = onnx.helper.make_node("Sub", ["/nms/three", node.input[0]], ["/nms/wrong"], "/nms/Sub_wrong")
    place = list(model.graph.node).index(node)
    node.input[0] = "/nms/wrong"
    model.graph.node.insert(place, wrong)
    onnx.save(model, path)


MATCHING = outputs.test_detections_match_reference


@pytest.mark.parametrize(
    ("name", "damage", "word"),
    [
        ("blobs onnx fp32 nms", changed("NonMaxSuppression", 4, 0.6), "lost"),
        ("blobs onnx fp16 nms pair", changed("NonMaxSuppression", 4, 0.6), "lost"),
        ("blind onnx int8 nms", another_class, "lost"),
        ("onnx fp32 nms", changed("NonMaxSuppression", 3, 0.05), "lost"),
        ("onnx fp32 nms", changed("NonMaxSuppression", 3, 0.99), "added"),
        ("onnx fp32 nms", changed("Mul", 1, 0.4), "lost"),
    ],
    ids=["score", "score, batch", "class", "overlap too small", "overlap too large", "half of a side"],
)
def test_a_broken_suppression_is_caught(
    workshop: Workshop, name: str, damage: Callable[[Path, Workshop], None], word: str
) -> None:
    assert workshop.judge(name, MATCHING) == (Verdict.PASS, "")
    verdict, because = workshop.judge(name, MATCHING, damage)
    assert verdict is Verdict.FAIL and word in because, because


def test_every_claim_knows_a_graph_with_nms(workshop: Workshop) -> None:
    """Also in shapes that vary; and a file without NMS is not taken for one with it."""
    for name, claims in (
        (
            "blobs onnx fp32 nms dynamic",
            (dynamic.test_random_shapes_match_reference, outputs.test_outputs_match_reference),
        ),
        (
            "blobs onnx fp32 nms pair",
            (
                dynamic.test_batch_rows_equal_single_images,
                shapes.test_output_shapes_match_reference,
                outputs.test_same_feeds_give_the_same_outputs,
                metadata.test_metadata_describes_the_request,
            ),
        ),
    ):
        for claim in claims:
            assert workshop.judge(name, claim) == (Verdict.PASS, ""), claim.__name__

    def without(path: Path, other: Workshop) -> None:
        path.write_bytes(other.good("blobs onnx fp32 pair").path.read_bytes())

    verdict, because = workshop.judge("blobs onnx fp32 nms pair", shapes.test_output_shapes_match_reference, without)
    assert verdict is Verdict.FAIL and "300, 6 or more" in because, because

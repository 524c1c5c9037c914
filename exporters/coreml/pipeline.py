"""A detector with Core ML's own non-maximum suppression behind it, as one model."""

from __future__ import annotations

import importlib
from typing import Any

from exporters.coreml.convert import library
from exporters.coreml.read import BOXES, SCORES
from exporters.models.spec import detector_output
from exporters.spec import ExportSpec

IOU, CONFIDENCE = "iouThreshold", "confidenceThreshold"  # inputs that an app may set, as Apple's detectors have them
FIRST = 4  # specification version of iOS 13


def with_suppression(model: Any, spec: ExportSpec) -> Any:
    """The pipeline: the model's scores (A, classes) and boxes (A, 4) become those of the detections.

    The fields are those of Core ML's NonMaximumSuppression.proto. It has none for the number of detections.
    """
    messages: Any = importlib.import_module("coremltools.proto.Model_pb2")
    types: Any = importlib.import_module("coremltools.proto.FeatureTypes_pb2")
    inner = model.get_spec()
    made = messages.Model(specificationVersion=FIRST)
    classes = len(spec.model.names) or _classes(spec)
    for name, width in ((SCORES, classes), (BOXES, 4)):
        given = next(o for o in inner.description.output if o.name == name)
        made.description.input.add().CopyFrom(given)
        output = made.description.output.add(name=name)
        output.type.multiArrayType.dataType = types.ArrayFeatureType.FLOAT32
        sizes = output.type.multiArrayType.shapeRange.sizeRanges
        sizes.add(lowerBound=0, upperBound=-1)
        sizes.add(lowerBound=width, upperBound=width)
    for name, text in (
        (IOU, f"Overlap above which a detection is suppressed (default {spec.iou:g})"),
        (CONFIDENCE, f"Score from which on detections count (default {spec.conf:g})"),
    ):
        threshold = made.description.input.add(name=name, shortDescription=text)
        threshold.type.doubleType.SetInParent()
        threshold.type.isOptional = True
    step = made.nonMaximumSuppression
    step.confidenceInputFeatureName = step.confidenceOutputFeatureName = SCORES
    step.coordinatesInputFeatureName = step.coordinatesOutputFeatureName = BOXES
    step.iouThresholdInputFeatureName, step.confidenceThresholdInputFeatureName = IOU, CONFIDENCE
    step.iouThreshold, step.confidenceThreshold = spec.iou, spec.conf
    step.pickTop.perClass = not spec.agnostic_nms
    step.stringClassLabels.vector.extend(spec.model.names.get(n, str(n)) for n in range(classes))
    return library.utils.make_pipeline(model, library.models.MLModel(made, skip_model_load=True))


def _classes(spec: ExportSpec) -> int:
    """How many classes a detector without names has."""
    output = detector_output(spec.model)
    assert output is not None
    score = next(g for g in output.groups if g.kind == "score")
    return int(score.stop or 0) - score.start

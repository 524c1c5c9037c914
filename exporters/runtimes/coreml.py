"""Core ML on macOS, through coremltools' predict; what any session of a Core ML file takes and gives stands here."""

from __future__ import annotations

import importlib
import platform
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from exporters.coreml.convert import feature, is_image, normalizes
from exporters.coreml.read import BOXES, SCORES, File, labels_of, metadata, of_format, signature
from exporters.errors import ArtifactError, first_line
from exporters.metadata import Metadata
from exporters.session import Array, Execution, Feeds, Session
from exporters.spec import ExportSpec

library: Any = importlib.import_module("coremltools")
_types: Any = importlib.import_module("coremltools.proto.FeatureTypes_pb2")


class FileSession(Session):
    """A Core ML file, whoever computes it: feeds are the model's, outputs have its names.

    Pictures are given as arrays of values in 0..255: as pictures they would be rounded to 8 bits, which feeds are not.
    """

    def __init__(self, path: Path, spec: ExportSpec) -> None:
        self.path, self.spec, self.stride = path, spec, spec.model.stride
        self.file = of_format(path, spec.format)
        self.inputs, self.outputs = signature(path, spec)
        self.labels = labels_of(self.file)

    @abstractmethod
    def predict(self, given: Feeds) -> Mapping[str, Array]:
        """Outputs by the session's names for features by the file's; a classifier's are (1, classes) in the order of
        its labels, of a pipeline with suppression SCORES (N, classes) and BOXES (N, 4) of what is left."""

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        given: dict[str, Array] = {}
        for entry in self.spec.model.inputs:
            value = feeds[entry.name]
            if is_image(entry):
                value = self._pixels(value)
            given[feature(entry.name)] = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
        found = self.predict(given)
        if self.file.suppression is not None:
            return {self.outputs[0].name: self._detections(found[SCORES], found[BOXES])}
        return dict(found)

    def _pixels(self, value: Array) -> Array:
        """Values in 0..255 of what the model takes."""
        if normalizes(self.spec.model):
            prepared = self.spec.model.preprocess
            mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (prepared.mean, prepared.std))
            value = value * std + mean
        return value * np.float32(255)

    def _detections(self, scores: Array, boxes: Array) -> Array:
        """Rows of x1, y1, x2, y2 in pixels, score and class, the highest score first, as every graph with NMS has."""
        height, width = self.spec.imgsz
        rows = np.zeros((1, self.spec.max_det, 6), np.float32)
        best = scores.max(1, initial=0.0)
        order = np.argsort(-best, kind="stable")[: self.spec.max_det]
        centre, half = boxes[order, :2], boxes[order, 2:] / 2
        size = np.array([width, height, width, height], np.float32)
        rows[0, : len(order), :4] = np.concatenate((centre - half, centre + half), 1) * size
        rows[0, : len(order), 4] = best[order]
        rows[0, : len(order), 5] = scores[order].argmax(1) if len(order) else 0
        return rows

    def metadata(self) -> Metadata:
        return metadata(self.path)


class CoreMlSession(FileSession):
    """A loaded model. It was written where nothing runs it, from coremltools' documentation: no macOS has seen it yet.

    A copy of the specification says that pictures are arrays. The program behind them is the file's.
    """

    def __init__(self, path: Path, spec: ExportSpec) -> None:
        super().__init__(path, spec)
        try:
            self.model = library.models.MLModel(
                _with_arrays(self.file), weights_dir=str(self.file.weights), compute_units=library.ComputeUnit.CPU_ONLY
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ArtifactError(
                f"'{path}' cannot be loaded by Core ML ({first_line(error)})", "export it again"
            ) from None

    def predict(self, given: Feeds) -> Mapping[str, Array]:
        found = cast("Mapping[str, Any]", self.model.predict(dict(given)))
        if self.file.suppression is not None:
            return {name: np.asarray(found[name]) for name in (SCORES, BOXES)}
        told = self.file.whole.description
        if told.predictedFeatureName:
            shares = found[told.predictedProbabilitiesName]
            return {self.outputs[0].name: np.array([[shares[label] for label in self.labels]], np.float32)}
        return {o.name: np.asarray(found[o.name], np.float32) for o in self.outputs}

    def execution(self) -> Execution:
        return Execution("coreml", f"macOS {platform.mac_ver()[0]}", "cpu")

    def close(self) -> None:
        del self.model


def _with_arrays(file: File) -> Any:
    """The specification with an array where it takes a picture."""
    whole = type(file.whole)()
    whole.CopyFrom(file.whole)
    models = [whole, *(whole.pipeline.models if file.suppression is not None else ())]
    for model in models:
        for entry in model.description.input:
            if entry.type.WhichOneof("Type") != "imageType":
                continue
            image = entry.type.imageType
            channels = 1 if image.colorSpace == _types.ImageFeatureType.GRAYSCALE else 3
            shape = (1, channels, int(image.height), int(image.width))
            entry.type.multiArrayType.shape.extend(shape)
            entry.type.multiArrayType.dataType = _types.ArrayFeatureType.FLOAT32
    return whole

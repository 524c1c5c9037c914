"""What a Core ML file says, read back without running it: its program, interface, labels and metadata."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from exporters.artifact import TensorInfo
from exporters.coreml.blobs import check_blobs
from exporters.errors import ArtifactError, first_line
from exporters.metadata import Metadata, normalize
from exporters.models.spec import ModelSpec
from exporters.spec import ExportSpec

_messages: Any = importlib.import_module("coremltools.proto.Model_pb2")
_types: Any = importlib.import_module("coremltools.proto.FeatureTypes_pb2")
_decode: Any = importlib.import_module("google.protobuf.message")
_program: Any = importlib.import_module("coremltools.converters.mil.frontend.milproto.load")

AGAIN = "export it again"
# What coremltools raises where it fails, and while it reads a program that does not hold together.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    AssertionError,
)
KINDS = {"coreml": "an ML Program", "mlmodel": "a NeuralNetwork"}  # that a format's files hold
LARGEST = 1 << 20  # bytes of a manifest
SCALE = 1 / 255
NETWORKS = ("neuralNetwork", "neuralNetworkClassifier", "neuralNetworkRegressor")
DTYPES: Mapping[str, str] = {"FLOAT32": "float32", "FLOAT16": "float16", "DOUBLE": "float64", "INT32": "int32"}
BOXES, SCORES = "coordinates", "confidence"  # as Core ML's own detectors name them, and Apple's Vision expects


@dataclass(frozen=True)
class File:
    """A file or package, with its specification; of a pipeline `network` is the first of its models."""

    path: Path
    whole: Any
    weights: Path

    @property
    def network(self) -> Any:
        """The model that has the weights."""
        return self.whole.pipeline.models[0] if self.suppression is not None else self.whole

    @property
    def suppression(self) -> Any:
        """The non-maximum suppression of a pipeline, or None."""
        if self.whole.WhichOneof("Type") != "pipeline":
            return None
        models = self.whole.pipeline.models
        if len(models) != 2 or models[1].WhichOneof("Type") != "nonMaximumSuppression":
            kinds = ", ".join(str(m.WhichOneof("Type")) for m in models) or "nothing"
            raise ArtifactError(f"'{self.path}' is a pipeline of {kinds}, expected a model and its suppression", AGAIN)
        return models[1].nonMaximumSuppression

    @property
    def layers(self) -> Any:
        """The NeuralNetwork of an older file, or None where there is an ML Program."""
        kind = self.network.WhichOneof("Type")
        if kind in NETWORKS:
            return getattr(self.network, kind)
        if kind == "mlProgram":
            return None
        raise ArtifactError(f"'{self.path}' holds no ML Program and no NeuralNetwork but {kind or 'no model'}", AGAIN)

    @cached_property
    def main(self) -> Any:
        """The program's function, its types inferred again from its operators.

        Raises:
            ArtifactError: it does not hold together, or its weights are missing or cut off.
        """
        check_blobs(self.path, self.network.mlProgram, self.weights)
        try:
            version = self.network.specificationVersion
            made = _program.load(self.network, specification_version=version, file_weights_dir=str(self.weights))
            return made.functions["main"]
        except FAILURES as error:
            raise ArtifactError(f"'{self.path}': its program cannot be read ({first_line(error)})", AGAIN) from None


def open_file(path: Path) -> File:
    """The specification of a .mlpackage folder or a .mlmodel file.

    Raises:
        ArtifactError: it is missing, empty, cut off, or no Core ML file; or a folder where users expect a file.
    """
    is_package = path.is_dir()
    if path.suffix in (".mlpackage", ".mlmodel") and is_package != (path.suffix == ".mlpackage"):
        kinds = ("a folder", "a file") if is_package else ("a file", "a folder")
        raise ArtifactError(f"'{path}' is {kinds[0]}, and what is named {path.suffix} is {kinds[1]}", AGAIN)
    source = _root(path) if is_package else path
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ArtifactError(f"'{source}' cannot be read ({error.strerror})", AGAIN) from None
    whole = _messages.Model()
    try:
        whole.ParseFromString(data)
    except _decode.DecodeError as error:
        raise ArtifactError(f"'{source}' is no Core ML model ({first_line(error)})", AGAIN) from None
    kind = whole.WhichOneof("Type")
    if kind is None or not whole.specificationVersion:
        raise ArtifactError(f"'{source}' ({len(data)} bytes) holds no Core ML model", AGAIN)
    return File(path, whole, source.parent / "weights")


def of_format(path: Path, format_id: str) -> File:
    """The specification of a file of this format: an ML Program for coreml, a NeuralNetwork for mlmodel.

    Raises:
        ArtifactError: see `open_file`; or it is the other one's.
    """
    file = open_file(path)
    found = next(f for f in KINDS if (f == "mlmodel") == (file.layers is not None))
    if found != format_id:
        told = f"is {KINDS[found]}, and {format_id} is {KINDS[format_id]}: say --format {found}"
        raise ArtifactError(f"'{path}' {told}", "or " + AGAIN)
    return file


def _root(package: Path) -> Path:
    """The specification's file in a package, by the package's manifest."""
    manifest = package / "Manifest.json"
    try:
        with manifest.open("rb") as file:
            values: Any = json.loads(file.read(LARGEST))
        place = str(values["itemInfoEntries"][values["rootModelIdentifier"]]["path"])
    except OSError as error:
        raise ArtifactError(f"'{manifest}' cannot be read ({error.strerror})", AGAIN) from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ArtifactError(f"'{manifest}' is no manifest of a package ({type(error).__name__})", AGAIN) from None
    if ".." in Path(place).parts or Path(place).is_absolute():
        raise ArtifactError(f"'{manifest}' names '{place}', which lies outside", AGAIN)
    if not place.isprintable():  # a NUL or half of a surrogate pair, with which nothing can be opened
        raise ArtifactError(f"'{manifest}' names {place!a}, which is no path", AGAIN)
    return package / "Data" / place


def metadata(path: Path) -> Metadata:
    """What user_defined_metadata holds.

    Raises:
        ArtifactError: there is none; or the labels, or Core ML's own fields, say otherwise.
    """
    file = open_file(path)
    told = file.whole.description.metadata
    values = dict(told.userDefined)
    if "names" not in values and "stride" not in values:
        raise ArtifactError(f"'{path}' holds no metadata (user_defined_metadata has none of ours)", AGAIN)
    own = {"description": told.shortDescription, "author": told.author, "license": told.license}
    own |= {"version": told.versionString}
    found = normalize({key: value for key, value in own.items() if value} | values, str(path))
    for key, value in own.items():  # other exporters write them here alone
        if key in values and value != getattr(found, key):
            raise ArtifactError(f"'{path}' says {key} {value!r}, and in its metadata {getattr(found, key)!r}", AGAIN)
    labels = labels_of(file)
    has_labels = bool(labels) or file.suppression is not None or found.task == "classify"
    if has_labels and found.names and labels != [n for _, n in sorted(found.names.items())]:
        few = f"{labels[:3]} ... {labels[-1:]}" if len(labels) > 4 else str(labels)
        raise ArtifactError(
            f"'{path}': its {len(labels)} class labels {few} are not the {len(found.names)} names in its metadata",
            AGAIN,
        )
    return found


def labels_of(file: File) -> list[str]:
    """Class labels of a classifier or of a suppression; none where there are none."""
    if file.suppression is not None:
        return list(file.suppression.stringClassLabels.vector)
    if file.layers is not None:
        kind = file.network.WhichOneof("Type")
        return list(file.layers.stringClassLabels.vector) if kind == "neuralNetworkClassifier" else []
    found = next((op for op in file.main.operations if op.op_type == "classify"), None)
    return [str(getattr(v, "val", v)) for v in found.classes.val] if found is not None else []


def signature(path: Path, spec: ExportSpec) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Inputs and outputs under the model's names; of a suppression what it takes, in the layout of anchors.

    Raises:
        ArtifactError: see `of_format`; a picture has other channels, or is scaled otherwise than to 0..1; a
            suppression has other thresholds.
    """
    file = of_format(path, spec.format)
    described = file.whole.description
    own = file.suppression  # whose thresholds may be given at every call, or are those in the file
    thresholds = (own.iouThresholdInputFeatureName, own.confidenceThresholdInputFeatureName) if own is not None else ()
    given = [f for f in described.input if not f.type.isOptional and f.name not in thresholds]
    inputs = tuple(_input(file, f, spec.model) for f in given)
    if file.suppression is not None:
        names = {f.name for f in described.output}
        if names != {BOXES, SCORES}:
            raise ArtifactError(f"'{path}' gives {sorted(names)}, expected {BOXES} and {SCORES}", AGAIN)
        return inputs, (_anchors(file, spec),)
    if described.predictedFeatureName:
        return inputs, (_probabilities(file),)
    return inputs, tuple(_array(f) for f in described.output)


def _input(file: File, entry: Any, model: ModelSpec) -> TensorInfo:
    """An input; a picture is one of values in 0..1 in three channels."""
    name = (
        next((i.name for i in model.inputs if i.name == "images"), entry.name) if entry.name == "image" else entry.name
    )
    if entry.type.WhichOneof("Type") != "imageType":
        return TensorInfo(name, _array(entry).shape, _array(entry).dtype)
    image = entry.type.imageType
    colours = _types.ImageFeatureType.ColorSpace.Name(image.colorSpace)
    channels = {"RGB": 3, "GRAYSCALE": 1}.get(colours)
    if channels is None:
        raise ArtifactError(f"'{file.path}': input {entry.name} is in {colours}, expected RGB", AGAIN)
    scale = _scale(file, entry.name)
    if scale is None or abs(scale - SCALE) > 2.0**-11 * SCALE:  # as FP16 holds it
        told = f"scaled by {scale:.6g}" if scale is not None else "not scaled, or shifted"
        raise ArtifactError(f"'{file.path}': input {entry.name} is {told}, expected 1/255", AGAIN)
    return TensorInfo(name, (1, channels, int(image.height), int(image.width)), "float32")


def _scale(file: File, name: str) -> float | None:
    """What a picture's values are multiplied by first; None where nothing multiplies them, or a bias is added."""
    if file.layers is not None:
        steps = [p.scaler for p in file.layers.preprocessing if p.featureName in ("", name)]
        if len(steps) != 1 or any((steps[0].redBias, steps[0].greenBias, steps[0].blueBias, steps[0].grayBias)):
            return None
        return float(steps[0].channelScale)
    var = file.main.inputs.get(name)
    while var is not None and len(var.child_ops) == 1 and var.child_ops[0].op_type == "cast":
        var = var.child_ops[0].outputs[0]
    if var is None or len(var.child_ops) != 1 or var.child_ops[0].op_type != "mul":
        return None
    op = var.child_ops[0]
    if any("__biased__" in str(then.name) for then in op.outputs[0].child_ops):  # as coremltools calls what it adds
        return None
    factor = (op.y if op.x is var else op.x).val
    return float(factor) if factor is not None and getattr(factor, "size", 1) == 1 else None


def _anchors(file: File, spec: ExportSpec) -> TensorInfo:
    """What a suppression with the request's thresholds takes: scores (A, classes) and boxes (A, 4)."""
    told = file.suppression
    found = (told.iouThreshold, told.confidenceThreshold, not told.pickTop.perClass)
    if found != (wanted := (spec.iou, spec.conf, spec.agnostic_nms)):
        words = ["iou {:g}, conf {:g}, agnostic {}".format(*values) for values in (found, wanted)]
        raise ArtifactError(f"'{file.path}' suppresses with {words[0]}, expected {words[1]}", AGAIN)
    given = {f.name: _array(f) for f in file.network.description.output}
    names = (told.confidenceInputFeatureName, told.coordinatesInputFeatureName)  # others' have names of their own
    scores, boxes = (list(given[name].shape) if name in given else [] for name in names)
    if len(scores) != 2 or len(boxes) != 2 or scores[0] != boxes[0]:
        raise ArtifactError(f"'{file.path}': its suppression takes scores {scores} and boxes {boxes}", AGAIN)
    channels = int(boxes[1]) + int(scores[1])
    return TensorInfo(spec.model.outputs[0].name, (1, channels, scores[0]), given[names[0]].dtype)


def _array(entry: Any) -> TensorInfo:
    kind = entry.type.WhichOneof("Type")
    if kind != "multiArrayType":
        return TensorInfo(entry.name, (), str(kind))
    told = entry.type.multiArrayType
    dtype = _types.ArrayFeatureType.ArrayDataType.Name(told.dataType)
    return TensorInfo(entry.name, tuple(int(n) for n in told.shape), DTYPES.get(dtype, dtype))


def _probabilities(file: File) -> TensorInfo:
    """A classifier's probabilities, which come as a dictionary by label."""
    count = len(labels_of(file))
    if file.layers is not None:
        return TensorInfo(str(file.layers.labelProbabilityLayerName), (1, count), "float32")
    op = next((op for op in file.main.operations if op.op_type == "classify"), None)
    if op is None:
        raise ArtifactError(f"'{file.path}' is described as a classifier, and its program is none", AGAIN)
    var = op.probabilities
    return TensorInfo(str(var.name), tuple(int(cast("int", n)) for n in var.shape), "float32")

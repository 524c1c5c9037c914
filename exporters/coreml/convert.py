"""From a traced module to a Core ML model: an ML Program, or the NeuralNetwork of older systems."""
# pyright: reportUnknownMemberType=false
# (torch's jit has no types)

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from exporters.coreml.naming import HEAVY, LAYERS, Modules, add_pass, told, weight_inputs
from exporters.coreml.read import BOXES, FAILURES, SCORES
from exporters.errors import BadRequest, ExportError, first_line
from exporters.formats import Job
from exporters.models.build import as_tuple, example, one_thread
from exporters.models.spec import InputSpec, ModelSpec, belongs, classifier_output
from exporters.spec import ExportSpec, Precision

library: Any = importlib.import_module("coremltools")

PROGRAM, NETWORK = "mlprogram", "neuralnetwork"
NMS = "nms"  # the module that makes of anchors what suppression takes
NAMES = {"images": "image"}  # of inputs whose name users of Core ML know otherwise


def is_image(entry: InputSpec) -> bool:
    """Whether an input is a picture, grey or in colours: what Core ML takes as one."""
    return entry.shape[-2:] == ("height", "width") and entry.shape[1:-2] in ((3,), (1,)) and entry.dtype == "float32"


class Wrapped(nn.Module):
    """The module behind a picture's values in 0..1; with `nms`, giving scores (A, classes) and boxes (A, 4).

    Boxes are centre, width and height as shares of the image. The model's own normalization stands in the graph, since
    Core ML scales all channels of a picture alike.
    """

    def __init__(self, inner: nn.Module, spec: ExportSpec) -> None:
        super().__init__()
        self.inner, self.spec = inner, spec
        self.nms = _Split(spec) if spec.nms else None
        prepared = spec.model.preprocess
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (prepared.mean, prepared.std))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: list[Tensor] = []
        for x, entry in zip(inputs, self.spec.model.inputs, strict=True):
            prepares = is_image(entry) and normalizes(self.spec.model)
            values.append((x - self.mean) / self.std if prepares else x)
        outputs = as_tuple(self.inner(*values))
        if self.nms is not None:
            return cast("tuple[Tensor, ...]", self.nms(outputs[0]))
        return outputs[0] if len(outputs) == 1 else outputs


class _Split(nn.Module):
    """Anchors (1, 4 + classes, A) -> scores (A, classes), and boxes (A, 4) as shares of the image."""

    def __init__(self, spec: ExportSpec) -> None:
        super().__init__()
        height, width = spec.imgsz
        self.size = torch.tensor([width, height, width, height], dtype=torch.float32)

    def forward(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        rows = anchors[0].transpose(0, 1)
        return rows[:, 4:], rows[:, :4] / self.size


def normalizes(model: ModelSpec) -> bool:
    """Whether the deployment subtracts a mean or divides by a deviation."""
    prepared = model.preprocess
    return model.has_images and (any(prepared.mean) or any(v != 1.0 for v in prepared.std))


def feature(name: str) -> str:
    """An input's name in a Core ML file."""
    return NAMES.get(name, name)


def labels_of(model: ModelSpec) -> list[str]:
    """A classifier's class names in order; none where it has none."""
    return [name for _, name in sorted(model.names.items())] if classifier_output(model) is not None else []


def convert(job: Job, kind: str) -> Any:
    """The model that coremltools makes of the parent's trace, in FP32 or FP16 arithmetic.

    Raises:
        BadRequest: a module that is to stay in floating point does not exist.
        ExportError: coremltools failed.
    """
    spec, kept = job.spec, kept_in_fp32(job.spec)
    with one_thread(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation of torch.jit, and tracer warnings about shapes that we mean
        graph = cast("Any", torch.jit.load(str(job.parents[0].path), map_location="cpu"))
        parameters = {name: p.numpy() for name, p in graph.state_dict().items() if p.is_floating_point()}
        for path in (*(p for p, _ in spec.model.fp32), *spec.keep):
            _check_module(graph, path, spec.model.name)
        modules = Modules(parameters)
        pipeline: Any = library.PassPipeline()
        add_pass(pipeline, modules, kept)
        options = _interface(spec) | {"convert_to": kind, "pass_pipeline": pipeline, "skip_model_load": True}
        if kind == PROGRAM:
            options["minimum_deployment_target"] = library.target.iOS16  # the first with weights in 8 bits
            options["compute_precision"] = library.precision.FLOAT32
            if spec.precision is not Precision.FP32:

                def in_fp16(op: Any) -> bool:
                    return not modules.is_kept(op, kept)

                options["compute_precision"] = library.transform.FP16ComputePrecision(in_fp16)
        try:
            if spec.nms or normalizes(spec.model):
                wrapped = Wrapped(graph, spec)
                graph = cast("Any", torch.jit.trace(wrapped, example(spec), strict=False, check_trace=False))
            model = library.convert(graph, **options)
        except FAILURES as error:
            raise ExportError(f"coremltools failed ({first_line(error)})", "see the worker's log") from error
    if kind != NETWORK:
        return model
    whole = model.get_spec()
    modules.name_layers(getattr(whole, whole.WhichOneof("Type")))
    return library.models.MLModel(whole, skip_model_load=True)


def kept_in_fp32(spec: ExportSpec) -> tuple[str, ...]:
    """Modules that stay in FP32."""
    return (*(path for path, _ in spec.model.fp32), *([NMS] if spec.nms else []))


def _check_module(graph: Any, path: str, model: str) -> None:
    part = graph
    for name in path.split("."):
        part = getattr(part, name, None)
        if part is None:
            raise BadRequest(
                f"'{path}' is to stay in floating point, and model '{model}' has no module of that name",
                "name modules as PyTorch does, as in model.0.conv",
            )


def _interface(spec: ExportSpec) -> dict[str, Any]:
    """Inputs, outputs and class labels."""
    inputs: list[Any] = []
    for entry in spec.model.inputs:
        shape = spec.model.shape(entry, spec.batch, spec.imgsz)
        if is_image(entry):
            layout = library.colorlayout.RGB if entry.shape[1] == 3 else library.colorlayout.GRAYSCALE
            inputs.append(library.ImageType(feature(entry.name), shape, scale=1 / 255, color_layout=layout))
        else:
            dtype = np.float32 if np.dtype(entry.dtype).kind == "f" else np.int32  # Core ML has no other integers
            inputs.append(library.TensorType(feature(entry.name), shape, dtype=dtype))
    names = [SCORES, BOXES] if spec.nms else [o.name for o in spec.model.outputs]
    made: dict[str, Any] = {"inputs": inputs, "outputs": [library.TensorType(n, dtype=np.float32) for n in names]}
    labels = labels_of(spec.model)
    if labels:
        made["classifier_config"] = library.ClassifierConfig(labels, predicted_probabilities_output=names[0])
    return made


def in_eight_bits(model: Any, spec: ExportSpec) -> Any:
    """An ML Program with the weights of convolutions and matrix products in 8 bits, but those that stay.

    Linear and symmetric around 0 with a scale for each output channel; or a table of 256 values, found by k-means.

    Raises:
        ExportError: coremltools failed.
    """
    optimize: Any = importlib.import_module("coremltools.optimize.coreml")
    kept = [*kept_in_fp32(spec), *spec.keep]
    if spec.palettize:
        how, work = optimize.OpPalettizerConfig(mode="kmeans", nbits=8, weight_threshold=0), optimize.palettize_weights
    else:
        how = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
        work = optimize.linear_quantize_weights
    by_name = {
        var.name: None
        for op in model._mil_program.functions["main"].operations
        if op.op_type in HEAVY
        for _, var in weight_inputs(op)
        if belongs(told(var.name), kept) or belongs(told(op.name), kept)
    }
    config = optimize.OptimizationConfig(
        global_config=None, op_type_configs={kind: how for kind in HEAVY}, op_name_configs=by_name
    )
    try:
        return work(model, config)
    except FAILURES as error:
        raise ExportError(f"coremltools failed ({first_line(error)})", "ask for fp16") from error


def compressed(model: Any, spec: ExportSpec) -> Any:
    """A NeuralNetwork with its weights in 16 bits, or in 8: linear, with a scale for each output channel.

    Raises:
        ExportError: coremltools failed.
    """
    tools: Any = importlib.import_module("coremltools.models.neural_network.quantization_utils")
    kept = [*kept_in_fp32(spec), *spec.keep]

    class Chosen(tools.QuantizedLayerSelector):
        def do_quantize(self, layer: Any, **further: Any) -> bool:
            chosen = layer.WhichOneof("layer") in LAYERS and not belongs(told(layer.name), kept)
            own: Any = super()
            return chosen and bool(own.do_quantize(layer, **further))

    bits, how = (16, "linear") if spec.precision is Precision.FP16 else (8, "linear_symmetric")
    try:
        return tools.quantize_weights(model, bits, how, selector=Chosen())
    except FAILURES as error:
        raise ExportError(f"coremltools failed ({first_line(error)})", "ask for fp32") from error


def describe(model: Any, job: Job) -> None:
    """Writes the metadata: all under the names that every format has, and what Core ML has fields for there, too."""
    metadata = job.metadata
    model.short_description, model.author = metadata.description, metadata.author
    model.license, model.version = metadata.license, metadata.version
    for key, value in metadata.as_strings().items():
        model.user_defined_metadata[key] = value


def save(model: Any, path: Path) -> None:
    """Writes the file, readable for whom the folder is (coremltools makes parts of it for its user alone)."""
    model.save(str(path))
    for part in path.rglob("*") if path.is_dir() else ():
        if part.is_file():
            part.chmod(0o644)

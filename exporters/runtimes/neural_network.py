"""A NeuralNetwork's layers, computed one by one with PyTorch as Apple's NeuralNetwork.proto defines them."""
# pyright: reportUnknownMemberType=false
# (torch's from_numpy and nn.functional have no types)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from exporters.coreml.read import AGAIN, File
from exporters.coreml.weights import shape_in_layer, stored_in_layer
from exporters.errors import ArtifactError, NotSupported, first_line
from exporters.runtimes.kernels import convolve, convolve_transposed, pad, pool, repeated, same_padding, sliced
from exporters.runtimes.ml_program import FAILS, check_inputs
from exporters.session import Array

EXACT = 1  # arrayInputShapeMapping and imageInputShapeMapping: tensors have the axes that they are given with
AXES = {0: -3, 1: -2, 2: -1}  # CHANNEL_AXIS, HEIGHT_AXIS, WIDTH_AXIS of what ends in channels, height and width


class Layer:
    """One layer: its parameters, its inputs in FP32, its weights."""

    def __init__(self, layer: Any, weights: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> None:
        self.kind = str(layer.WhichOneof("layer"))
        self.params: Any = getattr(layer, self.kind)
        self.weights, self.inputs = weights, inputs

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    def refuse(self, what: str) -> NotSupported:
        """This layer in a form that is not computed here."""
        return NotSupported(f"exportgate does not compute the layer {self.kind} with {what}")


def _edges(amounts: Any, axes: int) -> list[int]:
    """Begin and end of each axis, of BorderAmounts; none where nothing is said."""
    told = [int(n) for edge in amounts.borderAmounts for n in (edge.startEdgeSize, edge.endEdgeSize)]
    return told or [0] * 2 * axes


def _convolution(layer: Layer) -> Tensor:
    p, x, weight = layer.params, layer.x, layer.weights["weights"]
    kernel = list(weight.shape[2:])
    strides, dilations = list(p.stride) or [1, 1], list(p.dilationFactor) or [1, 1]
    how, groups = p.WhichOneof("ConvolutionPaddingType"), int(p.nGroups) or 1
    amounts = _edges(p.valid.paddingAmounts, len(kernel))
    if not p.isDeconvolution:
        if how == "same":
            amounts = same_padding(x.shape[2:], kernel, strides, dilations, not p.same.asymmetryMode)
        return convolve(x, weight, layer.weights.get("bias"), strides, amounts, dilations, groups)
    if how == "same":
        raise layer.refuse("the padding 'same' of a deconvolution")
    made = convolve_transposed(x, weight, layer.weights.get("bias"), strides, amounts, dilations, groups)
    if p.outputShape and list(p.outputShape) != list(made.shape[2:]):
        raise layer.refuse(f"outputShape {list(p.outputShape)}, and its padding gives {list(made.shape[2:])}")
    return made


def _pooling(layer: Layer) -> Tensor:
    p, x = layer.params, layer.x
    kind = {p.MAX: "max", p.AVERAGE: "avg"}.get(p.type)
    if kind is None:
        raise layer.refuse("type L2")
    if p.globalPooling:
        return x.amax((-2, -1), keepdim=True) if kind == "max" else x.mean((-2, -1), keepdim=True)
    kernel, strides = list(p.kernelSize) or [3, 3], list(p.stride) or [1, 1]
    how = p.WhichOneof("PoolingPaddingType")
    if how == "includeLastPixel":
        raise layer.refuse("the padding 'includeLastPixel'")
    amounts = _edges(p.valid.paddingAmounts, 2)
    if how == "same":
        amounts = same_padding(x.shape[2:], kernel, strides, [1, 1], not p.same.asymmetryMode)
    return pool(x, kind, kernel, strides, amounts, not p.avgPoolExcludePadding)


def _activation(layer: Layer) -> Tensor:
    kind, x = str(layer.params.WhichOneof("NonlinearityType")), layer.x
    p = getattr(layer.params, kind)
    known: Mapping[str, Callable[[], Tensor]] = {
        "linear": lambda: x * p.alpha + p.beta,
        "ReLU": x.relu,
        "leakyReLU": lambda: functional.leaky_relu(x, p.alpha),
        "thresholdedReLU": lambda: torch.where(x >= p.alpha, x, 0.0),
        "tanh": x.tanh,
        "scaledTanh": lambda: p.alpha * (p.beta * x).tanh(),
        "sigmoid": x.sigmoid,
        "sigmoidHard": lambda: (x * p.alpha + p.beta).clamp(0, 1),
        "ELU": lambda: functional.elu(x, p.alpha),
        "softsign": lambda: functional.softsign(x),
        "softplus": lambda: functional.softplus(x),
    }
    if kind not in known:
        raise layer.refuse(kind)
    return known[kind]()


def _added(layer: Layer) -> Tensor:
    return layer.x + layer.params.alpha if len(layer.inputs) == 1 else reduce(torch.add, layer.inputs)


def _multiplied(layer: Layer) -> Tensor:
    return layer.x * layer.params.alpha if len(layer.inputs) == 1 else reduce(torch.mul, layer.inputs)


def _concat(layer: Layer) -> Tensor:
    if layer.kind == "concat" and layer.params.sequenceConcat:
        raise layer.refuse("sequenceConcat")
    if layer.kind == "concatND" and layer.params.interleave:
        raise layer.refuse("interleave")
    return torch.cat(list(layer.inputs), -3 if layer.kind == "concat" else layer.params.axis)


def _split(layer: Layer) -> list[Tensor]:
    p, x = layer.params, layer.x
    sizes = [int(n) for n in p.splitSizes] or [x.shape[p.axis] // int(p.numSplits)] * int(p.numSplits)
    return list(cast("Sequence[Tensor]", x.split(sizes, p.axis)))


def _slice(layer: Layer) -> Tensor:
    p, x = layer.params, layer.x
    if p.endIndex < 0:
        raise layer.refuse(f"endIndex {p.endIndex}")
    places = [slice(None)] * x.ndim
    places[AXES[p.axis]] = slice(int(p.startIndex), int(p.endIndex), int(p.stride) or 1)
    return x[tuple(places)]


def _slice_static(layer: Layer) -> Tensor:
    p = layer.params
    squeeze = list(p.squeezeMasks) or [False] * layer.x.ndim
    return sliced(layer.x, p.beginIds, p.endIds, p.strides, p.beginMasks, p.endMasks, squeeze)


def _upsample(layer: Layer) -> Tensor:
    p = layer.params
    if p.mode != p.NN or p.fractionalScalingFactor:
        raise layer.refuse("interpolation or fractions")
    return repeated(layer.x, [int(n) for n in p.scalingFactor] or [1, 1])


def _inner_product(layer: Layer) -> Tensor:
    if layer.x.ndim > 3:
        raise layer.refuse(f"{layer.x.ndim} axes")
    return functional.linear(layer.x, layer.weights["weights"], layer.weights.get("bias"))


def _matmul(layer: Layer) -> Tensor:
    p, x = layer.params, layer.x
    if len(layer.inputs) == 1:
        return functional.linear(x, layer.weights["weights"], layer.weights.get("bias"))
    y = layer.inputs[1]
    x = x.transpose(-1, -2) if p.transposeA else x
    return x @ (y.transpose(-1, -2) if p.transposeB else y)


def _batchnorm(layer: Layer) -> Tensor:
    p, w = layer.params, layer.weights
    if p.computeMeanVar:
        raise layer.refuse("computeMeanVar")
    return functional.batch_norm(layer.x, w["mean"], w["variance"], w["gamma"], w["beta"], eps=p.epsilon)


def _unary(layer: Layer) -> Tensor:
    p = layer.params
    x = layer.x * p.scale + p.shift
    kind = p.Operation.Name(p.type)
    known: Mapping[str, Callable[[], Tensor]] = {
        "SQRT": x.sqrt,
        "RSQRT": (x + p.epsilon).rsqrt,
        "INVERSE": (x + p.epsilon).reciprocal,
        "POWER": lambda: x.pow(p.alpha),
        "EXP": x.exp,
        "LOG": x.log,
        "ABS": x.abs,
        "THRESHOLD": lambda: x.clamp_min(p.alpha),
    }
    if kind not in known:
        raise layer.refuse(kind)
    return known[kind]()


def _reduced(work: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Layer], Tensor]:
    def made(layer: Layer) -> Tensor:
        p = layer.params
        axes = list(range(layer.x.ndim)) if p.reduceAll or not p.axes else [int(n) for n in p.axes]
        return work(layer.x, axes, bool(p.keepDims))

    return made


def _expanded(layer: Layer) -> Tensor:
    x, axes = layer.x, [int(n) for n in layer.params.axes]
    for axis in sorted(n % (x.ndim + len(axes)) for n in axes):
        x = x.unsqueeze(axis)
    return x


def _squeezed(layer: Layer) -> Tensor:
    p = layer.params
    return layer.x.squeeze() if p.squeezeAll else layer.x.squeeze(tuple(int(n) for n in p.axes))


def _padded(layer: Layer) -> Tensor:
    p = layer.params
    if p.WhichOneof("PaddingType") != "constant":
        raise layer.refuse(str(p.WhichOneof("PaddingType")))
    return pad(layer.x, _edges(p.paddingAmounts, 2), p.constant.value)


def _of_two(work: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Layer], Tensor]:
    return lambda layer: work(layer.inputs[0], layer.inputs[1])


def _of_x(work: Callable[[Tensor], Tensor]) -> Callable[[Layer], Tensor]:
    return lambda layer: work(layer.x)


LAYERS: Mapping[str, Callable[[Layer], Tensor | list[Tensor]]] = {
    "convolution": _convolution,
    "pooling": _pooling,
    "activation": _activation,
    "add": _added,
    "multiply": _multiplied,
    "addBroadcastable": _of_two(torch.add),
    "subtractBroadcastable": _of_two(torch.sub),
    "multiplyBroadcastable": _of_two(torch.mul),
    "divideBroadcastable": _of_two(torch.true_divide),
    "powBroadcastable": _of_two(torch.pow),
    "maxBroadcastable": _of_two(torch.maximum),
    "minBroadcastable": _of_two(torch.minimum),
    "concat": _concat,
    "concatND": _concat,
    "splitND": _split,
    "slice": _slice,
    "sliceStatic": _slice_static,
    "upsample": _upsample,
    "innerProduct": _inner_product,
    "batchedMatmul": _matmul,
    "batchnorm": _batchnorm,
    "bias": lambda layer: layer.x + layer.weights["bias"],
    "scale": lambda layer: layer.x * layer.weights["scale"] + layer.weights.get("bias", 0.0),
    "softmaxND": lambda layer: layer.x.softmax(layer.params.axis),
    "unary": _unary,
    "sin": _of_x(torch.sin),
    "cos": _of_x(torch.cos),
    "erf": _of_x(torch.erf),
    "clip": lambda layer: layer.x.clamp(layer.params.minVal, layer.params.maxVal),
    "reduceMean": _reduced(lambda x, axes, keep: x.mean(axes, keep)),
    "reduceSum": _reduced(lambda x, axes, keep: x.sum(axes, keep)),
    "reduceMax": _reduced(lambda x, axes, keep: x.amax(axes, keep)),
    "reduceMin": _reduced(lambda x, axes, keep: x.amin(axes, keep)),
    "reshapeStatic": lambda layer: layer.x.reshape([int(n) for n in layer.params.targetShape]),
    "transpose": lambda layer: layer.x.permute([int(n) for n in layer.params.axes]),
    "expandDims": _expanded,
    "squeeze": _squeezed,
    "tile": lambda layer: layer.x.tile([int(n) for n in layer.params.reps]),
    "padding": _padded,
    "loadConstantND": lambda layer: layer.weights["data"],
    "copy": _of_x(lambda x: x),
}


class Network:
    """The layers of a NeuralNetwork.

    All of it is computed in FP32, with the weights as they are stored: what Core ML computes in the file does not say.

    Raises:
        ArtifactError: weights of another number than their layer says.
        NotSupported: a layer, an input's mapping or a step of preprocessing that is not known here, by name.
    """

    def __init__(self, file: File) -> None:
        self.file, self.network = file, file.layers
        unknown = sorted({str(layer.WhichOneof("layer")) for layer in self.network.layers} - LAYERS.keys())
        if unknown:
            raise NotSupported(f"exportgate does not compute the layers {', '.join(unknown)} of '{file.path}'")
        inputs = file.network.description.input
        images = {e.name for e in inputs if e.type.WhichOneof("Type") == "imageType"}
        mapped = [self.network.imageInputShapeMapping] * bool(images)
        mapped += [self.network.arrayInputShapeMapping] * (len(images) < len(inputs))
        if any(how != EXACT for how in mapped):
            raise NotSupported(f"exportgate does not compute '{file.path}', whose inputs are mapped to five axes")
        self.scaled: dict[str, tuple[float, list[float]]] = {}
        for step in self.network.preprocessing:
            if step.WhichOneof("preprocessor") != "scaler":
                raise NotSupported(f"exportgate does not subtract the mean image of '{file.path}'")
            how, name = step.scaler, step.featureName or inputs[0].name
            self.scaled[name] = (how.channelScale, [how.redBias, how.greenBias, how.blueBias, how.grayBias])
        self.weights = [self._weights(layer) for layer in self.network.layers]

    def _weights(self, layer: Any) -> dict[str, Tensor]:
        """All weights of a layer in FP32, by their fields' names, in PyTorch's layout."""
        kind = str(layer.WhichOneof("layer"))
        params, found = getattr(layer, kind), dict[str, Tensor]()
        for field, value in params.ListFields():
            if field.message_type is None or field.message_type.name != "WeightParams":
                continue
            shape: tuple[int, ...] = (-1,)
            if kind in ("bias", "scale", "loadConstantND"):
                told = {"scale": "shapeScale", "bias": "shapeBias" if kind == "scale" else "shape", "data": "shape"}
                shape = tuple(int(n) for n in getattr(params, told[field.name])) or (-1,)
            elif field.name == "weights":
                shape = shape_in_layer(kind, params)
            turned = field.name == "weights" and kind == "convolution" and bool(params.isDeconvolution)
            made = stored_in_layer(f"{layer.name}.{field.name}", value, shape, False, self.file, turned)
            found[field.name] = torch.from_numpy(np.array(made.weight.values, np.float32))
        return found

    @torch.inference_mode()
    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by the network's names, in FP32; of a classifier its probabilities, (1, classes).

        Raises:
            ArtifactError: layers that do not fit each other, or take what nothing gives.
            NotSupported: a form of a layer that is not computed here.
        """
        check_inputs(self.file, self.scaled, feeds)
        values = {name: torch.from_numpy(np.array(value)).float() for name, value in feeds.items()}
        for name, (scale, bias) in self.scaled.items():
            along = bias[:3] if values[name].shape[1] == 3 else bias[3:]
            values[name] = values[name] * scale + torch.tensor(along).view(1, -1, 1, 1)
        for layer, weights in zip(self.network.layers, self.weights, strict=True):
            try:
                given = Layer(layer, weights, [values[name] for name in layer.input])
                made = LAYERS[given.kind](given)
                every = [made] if isinstance(made, Tensor) else made
                values.update(zip(layer.output, every, strict=True))
            except FAILS as error:
                what = f"{layer.WhichOneof('layer')} {layer.name} cannot be computed ({first_line(error)})"
                raise ArtifactError(f"'{self.file.path}': {what}", AGAIN) from error
        described = self.file.network.description
        names = [str(o.name) for o in described.output]
        if described.predictedFeatureName:
            names = [str(self.network.labelProbabilityLayerName)]
        absent = next((n for n in names if n not in values), None)
        if absent is not None:
            raise ArtifactError(f"'{self.file.path}': no layer gives the output {absent}", AGAIN)
        return {name: values[name].numpy() for name in names}

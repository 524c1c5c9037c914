"""Weights of a Core ML file: the precision that they and their operators have, and their values."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import UNQUANTIZED, Achieved, main_precision
from exporters.coreml.naming import HEAVY, LAYERS, is_stored, told, weight_inputs
from exporters.coreml.read import AGAIN, FAILURES, File, of_format, open_file
from exporters.errors import ArtifactError, first_line
from exporters.session import Array
from exporters.weights import COUNTED, Weight

_builtin: Any = importlib.import_module("coremltools.converters.mil.mil.types")


FEWEST = 10  # values of a weight: coremltools stores fewer beside their operator, and never in 8 bits


@dataclass(frozen=True)
class Stored:
    """One weight: its parameter's name as the file says it, the precision it is stored in, that of its operator."""

    name: str
    kind: str
    computed: str
    weight: Weight
    is_bias: bool


def read_precision(path: Path, format_id: str) -> Achieved:
    """Each convolution and matrix product by the type of its weights: in 8 bits, or else that of its arithmetic.

    `exceptions` names those that differ. What else has a module's name was to stay in FP32. The arithmetic of a
    NeuralNetwork is not in its file: there the type of the weights alone counts.

    Raises:
        ArtifactError: see `every_weight`; or the file is another format's.
    """
    file = of_format(path, format_id)
    found = {s.name: s for s in every_weight(file) if not s.is_bias}
    kinds = {name: s.kind if s.kind == "int8" else s.computed for name, s in found.items()}
    counts = Counter(kinds.values())
    main = main_precision(counts)
    evidence = {f"operators {k}": n for k, n in counts.items()}
    evidence |= {f"weights {k}": n for k, n in Counter(s.kind for s in found.values()).items()}
    computed, kept = list[tuple[str, str]](), dict[str, str]()
    spared = {n for n, s in found.items() if main == "int8" and kinds[n] != main and s.weight.values.size < FEWEST}
    if file.layers is None:
        evidence |= {f"arithmetic {k}": n for k, n in Counter(s.computed for s in found.values()).items()}
        pure = [op for op in file.main.operations if op.op_type in HEAVY and not weight_inputs(op)]
        computed = [(told(op.name), _short(op.outputs[0].dtype)) for op in pure]  # products of two computed tensors
        kept = {told(op.name): _short(op.outputs[0].dtype) for op in file.main.operations if _is_of_module(op)}
        left = len(spared) + (len(pure) if main == "int8" else 0)
        evidence |= {UNQUANTIZED: left} if left else {}
    arithmetic = "fp16" if main == "int8" else main
    evidence |= {f"of kind {k}": n for k, n in Counter(_kinds(file)).items()}
    others = [n for n, k in kinds.items() if k != main and n not in spared]
    others += [n for n, k in computed if k != arithmetic]
    return Achieved(
        main,
        evidence,
        tuple(sorted(others)),
        tuple(n for n, kind in kept.items() if kind == "fp16"),
        None if file.layers is not None else tuple(n for n, kind in kept.items() if kind == "fp32"),
    )


def _is_of_module(op: Any) -> bool:
    """Whether an operator is named by its module and computes; a cast may stand at the module's border."""
    is_weight = op.op_type == "const" or op.op_type.startswith("constexpr_")
    return "." in told(op.name) and not is_weight and op.op_type not in (*HEAVY, "cast")


def _kinds(file: File) -> Iterator[str]:
    """Those in COUNTED, one by one."""
    if file.layers is None:
        yield from (COUNTED[op.op_type] for op in file.main.operations if op.op_type in COUNTED)
        return
    for layer in file.layers.layers:
        kind = layer.WhichOneof("layer")
        word = layer.activation.WhichOneof("NonlinearityType") if kind == "activation" else ""
        if word in COUNTED:
            yield COUNTED[word]
        elif kind == "convolution":
            yield kind
        elif kind == "pooling" and layer.pooling.type == layer.pooling.MAX:
            yield "max_pool"


def read_weights(path: Path) -> dict[str, Weight]:
    """Weights and biases of all convolutions and matrix products, by their parameters' names."""
    return {s.name: s.weight for s in every_weight(open_file(path))}


def every_weight(file: File) -> Iterator[Stored]:
    """All weights and biases.

    Raises:
        ArtifactError: see `open_file` and `File.main`; or a layer has another number of values than it says.
    """
    try:
        yield from _of_program(file) if file.layers is None else _of_network(file)
    except FAILURES as error:
        raise ArtifactError(f"'{file.path}': its weights cannot be read ({first_line(error)})", AGAIN) from None


def _of_program(file: File) -> Iterator[Stored]:
    for op in file.main.operations:
        if op.op_type not in HEAVY:
            continue
        for name, var in weight_inputs(op):
            data = op.inputs["y" if name == "x" else "x"]
            yield _stored(var, _short(data.dtype), False)
        bias = op.inputs.get("bias")
        if bias is not None and is_stored(bias):
            yield _stored(bias, _short(op.inputs["x"].dtype), True)


def _stored(var: Any, computed: str, is_bias: bool) -> Stored:
    op, stored_as = var.op, _short(var.dtype)
    if op.op_type == "const":
        values = np.asarray(var.val)
        return Stored(told(var.name), stored_as, computed, _plain(values), is_bias)
    scale, data = op.inputs.get("scale"), op.inputs.get("quantized_data") or op.inputs.get("data")
    if op.op_type != "constexpr_lut_to_dense" and (scale is None or data is None):
        raise ArtifactError(f"weight {told(var.name)} is stored by {op.op_type}, which is not read here", AGAIN)
    values = np.asarray(op.materialized_val_inference())
    step, table = np.zeros((1,) * values.ndim, np.float32), None
    if op.op_type == "constexpr_lut_to_dense":
        table = np.sort(_floats(np.asarray(op.lut.val)).ravel())
        is_8_bits = table.size == 256
    else:
        is_8_bits = _short(data.dtype) in ("int8", "uint8")
        step = 0.5 * _spread(np.asarray(scale.val, np.float32), values.shape, op.inputs.get("axis"))
    kind = "int8" if is_8_bits else f"{_short(var.dtype)} {op.op_type}"
    # coremltools quantizes FP16 weights in FP16: the weight, its scale, their quotient (each by a share of the weight,
    # 2^-11, that is a step of FP16 at most) and the product are rounded, too. A weight is what it was rounded to and
    # half a step at most.
    rounding = np.zeros((1,) * values.ndim, np.float32)
    if values.dtype == np.float16:
        rounding = 3 * np.spacing((np.abs(_floats(values)) + step).astype(np.float16)).astype(np.float32)
    return Stored(told(var.name), kind, computed, Weight(_floats(values), step, rounding, table), is_bias)


def _spread(scale: Array, shape: tuple[int, ...], axis: Any) -> Array:
    """A scale for each channel or block, for each value."""
    if axis is not None and scale.ndim == 1:
        return scale.reshape([-1 if n == int(axis.val) else 1 for n in range(len(shape))])
    for n, (size, wanted) in enumerate(zip(scale.shape, shape, strict=False)):
        scale = np.repeat(scale, wanted // size, n) if 1 < size < wanted else scale
    return scale


def _plain(values: Array) -> Weight:
    """Values as they are: FP16 is rounded by half a step at most, FP32 not at all."""
    zero = np.zeros((1,) * values.ndim, np.float32)
    if values.dtype != np.float16:
        return Weight(_floats(values), zero, zero)
    return Weight(_floats(values), zero, np.spacing(np.abs(values)).astype(np.float32) / 2)


def _floats(values: Array) -> Array:
    return values.astype(np.float32)


def _short(dtype: Any) -> str:
    return str(_builtin.builtin_to_string(dtype))


def _of_network(file: File) -> Iterator[Stored]:
    for layer in file.layers.layers:
        kind = layer.WhichOneof("layer")
        if kind not in LAYERS:
            continue
        params, name = getattr(layer, kind), told(layer.name)
        if params.HasField("weights"):
            turned = kind == "convolution" and bool(params.isDeconvolution)
            yield stored_in_layer(f"{name}.weight", params.weights, shape_in_layer(kind, params), False, file, turned)
        if params.HasField("bias"):
            yield stored_in_layer(f"{name}.bias", params.bias, (-1,), True, file)


def shape_in_layer(kind: str, params: Any) -> tuple[int, ...]:
    """PyTorch's shape of a layer's weights."""
    if kind == "innerProduct":
        return int(params.outputChannels), int(params.inputChannels)
    if kind == "batchedMatmul":
        return int(params.weightMatrixSecondDimension), int(params.weightMatrixFirstDimension)
    outer, inner = int(params.outputChannels), int(params.kernelChannels)
    shape = (inner, outer // max(int(params.nGroups), 1)) if params.isDeconvolution else (outer, inner)
    return (*shape, *(int(n) for n in params.kernelSize))


def stored_in_layer(
    name: str, params: Any, shape: tuple[int, ...], is_bias: bool, file: File, turned: bool = False
) -> Stored:
    try:
        if params.rawValue or params.int8RawValue:
            how = params.quantization
            if how.numberOfBits != 8 or how.WhichOneof("QuantizationType") is None:
                raise ArtifactError(
                    f"'{file.path}': {name} has {how.numberOfBits} bits, which are not read here", AGAIN
                )
            whole = np.frombuffer(params.rawValue, np.uint8)
            if how.WhichOneof("QuantizationType") == "lookupTableQuantization":
                table = np.array(how.lookupTableQuantization.floatValue, np.float32)
                values, zero = table[whole].reshape(shape), np.zeros((1,) * len(shape), np.float32)
                return Stored(name, "int8", "int8", Weight(values, zero, zero, np.sort(table)), is_bias)
            scale, bias = (np.array(getattr(how.linearQuantization, f), np.float32) for f in ("scale", "bias"))
            along = [1] * len(shape)
            along[int(turned)] = -1  # output channels, which come second in a transposed convolution
            scale = scale.reshape(along)
            values = whole.reshape(shape) * scale + (bias.reshape(along) if bias.size else np.float32(0))
            rounding = np.full((1,) * len(shape), 4 * np.spacing(np.abs(bias).max(initial=0.0)))  # of the sum
            return Stored(name, "int8", "int8", Weight(values, 0.5 * scale, rounding), is_bias)
        if params.float16Value:
            values = np.frombuffer(params.float16Value, np.float16).reshape(shape)
            return Stored(name, "fp16", "fp16", _plain(values), is_bias)
        return Stored(name, "fp32", "fp32", _plain(np.array(params.floatValue, np.float32).reshape(shape)), is_bias)
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"'{file.path}': {name} does not fit its layer ({error})", AGAIN) from None

"""From a traced program to the bytes of a TensorFlow Lite file: converted by LiteRT, quantized by AI Edge Quantizer."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporters.errors import ExportError, NotSupported, first_line
from exporters.models.spec import belongs
from exporters.session import Array
from exporters.spec import ExportSpec

INTERNAL = (RuntimeError, ValueError, TypeError, AssertionError, KeyError, IndexError, NotImplementedError)
FULLY_CONNECTED, INT8 = 9, 9  # of BuiltinOperator, and of TensorType
FLOAT_CASTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED")


def converted(module: Any, example: Sequence[Any], spec: ExportSpec) -> bytes:
    """The file in FP32, whose tensors have the model's names for inputs and outputs and else those of modules.

    Raises:
        ExportError: LiteRT cannot convert the model.
    """
    litert: Any = importlib.import_module("litert_torch")
    try:
        data = litert.convert(module, tuple(example)).model_content()
    except INTERNAL as error:
        raise ExportError(
            f"litert-torch cannot convert model '{spec.model.name}' ({type(error).__name__}: {first_line(error)})",
            "see its log for the operator, or export to onnx",
        ) from error
    model = _opened(data)
    graph = model.subgraphs[0]
    signature = model.signatureDefs[0]
    wanted = (
        (signature.inputs, [i.name for i in spec.model.inputs]),
        (signature.outputs, [o.name for o in spec.model.outputs]),
    )
    for maps, names in wanted:
        if len(maps) != len(names):
            raise ExportError(
                f"litert-torch made {len(maps)} tensors of {', '.join(names)} of model '{spec.model.name}'",
                "let the model return each tensor once, and use each input",
            )
        for entry in maps:
            name = names[int(entry.name.decode().rpartition("_")[2])].encode()
            entry.name = name
            graph.tensors[entry.tensorIndex].name = name
    return _packed(model)


def _opened(data: bytes) -> Any:
    return importlib.import_module("ai_edge_litert.tools.flatbuffer_utils").read_model_from_bytearray(bytearray(data))


def _packed(model: Any) -> bytes:
    return bytes(importlib.import_module("ai_edge_litert.tools.flatbuffer_utils").convert_object_to_bytearray(model))


def in_sixteen_bits(data: bytes) -> bytes:
    """Weights in FP16, from which the runtime makes FP32.

    Raises:
        NotSupported: FP16 cannot hold a weight.
        ExportError: AI Edge Quantizer failed.
    """
    for name, values in _weights(data):
        with np.errstate(over="ignore"):
            lost = np.isfinite(values) & ~np.isfinite(values.astype(np.float16))
        if lost.any():
            raise NotSupported(f"FP16 ends at 65504, and {name} holds {values[lost][np.argmax(abs(values[lost]))]:g}")
    quantizer, names = _quantizer(data), importlib.import_module("ai_edge_quantizer.qtyping").TFLOperationName
    for kind in FLOAT_CASTED:
        quantizer.add_weight_only_config(".*", names[kind], 16, algorithm_key="float_casting")
    return _quantized(quantizer, None)


def in_eight_bits(
    data: bytes, kept: Sequence[str], ranges: Mapping[str, tuple[float, float]] | None, io: bool
) -> bytes:
    """Weights in 8 bits, symmetric, a scale a channel, and where `ranges` are given activations with a scale a tensor.

    Args:
        kept: modules that stay in floating point.
        ranges: of each tensor that is computed, by its name; None leaves activations to the runtime.
        io: whether inputs and outputs are in 8 bits, too.

    Raises:
        ExportError: AI Edge Quantizer failed.
    """
    quantizer, names = _quantizer(data), importlib.import_module("ai_edge_quantizer.qtyping").TFLOperationName
    if ranges is None:
        quantizer.add_dynamic_config(".*", names.ALL_SUPPORTED, 8)
    else:
        quantizer.add_static_config(".*", names.ALL_SUPPORTED, 8, 8)
    left = [re.escape(scope) for scope in _scopes(data, kept)]
    if left:
        quantizer.update_quantization_recipe(
            f"^(?:{'|'.join(left)})$", names.ALL_SUPPORTED, algorithm_key="no_quantize"
        )
    if ranges is not None and not io:
        for end in (names.INPUT, names.OUTPUT):
            quantizer.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
    return _exact(data, _quantized(quantizer, ranges and _statistics(data, ranges)))


def _quantizer(data: bytes) -> Any:
    return importlib.import_module("ai_edge_quantizer.quantizer").Quantizer(bytearray(data))


def _quantized(quantizer: Any, statistics: Any) -> bytes:
    try:
        made = quantizer.quantize(statistics).quantized_model
    except INTERNAL as error:
        raise ExportError(
            f"AI Edge Quantizer failed ({type(error).__name__}: {first_line(error)})", "ask for fp32 or fp16"
        ) from error
    return bytes(made)


def _statistics(data: bytes, ranges: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Ranges as the quantizer takes them: of the rank of their tensors."""
    found: dict[str, Any] = {}
    for tensor in _opened(data).subgraphs[0].tensors:
        name = tensor.name.decode()
        if name in ranges:
            shape = (1,) * len(tensor.shape if tensor.shape is not None else ())
            low, high = ranges[name]
            found[name] = {"min": np.full(shape, low, np.float32), "max": np.full(shape, high, np.float32)}
    return found


def _scopes(data: bytes, kept: Sequence[str]) -> list[str]:
    """What the quantizer calls the operators of modules that are kept: by the tensors that they compute. What computes
    an output is of the module whose tensors it joins."""
    graph = _opened(data).subgraphs[0]
    names = [t.name.decode() for t in graph.tensors]
    makers = {int(n): op for op in graph.operators for n in op.outputs}
    outputs = {int(n) for n in graph.outputs}

    def is_kept(op: Any) -> bool:
        made = [int(n) for n in op.outputs]
        if not outputs & set(made):
            return belongs(names[made[0]].partition(";")[0], kept)
        before = [makers[int(n)] for n in op.inputs if int(n) in makers]
        return bool(before) and all(is_kept(one) for one in before)

    return ["".join(f"{names[int(n)]};" for n in op.outputs) for op in graph.operators if kept and is_kept(op)]


def _weights(data: bytes) -> list[tuple[str, Array]]:
    """Constants in FP32, by name."""
    model = _opened(data)
    return [
        (t.name.decode(), np.frombuffer(bytes(held), "<f4"))
        for t in model.subgraphs[0].tensors
        if t.type == 0 and (held := model.buffers[t.buffer].data) is not None and len(held)
    ]


def _exact(data: bytes, quantized: bytes) -> bytes:
    """With weights that are small whole numbers, as those of an expectation over bins, held without rounding.

    A scale that is the largest of 127 steps would move every one of them: 15 bins by up to 3 % of one.
    """
    before, after = _opened(data), _opened(quantized)
    sides = [[op for op in m.subgraphs[0].operators if _kind(m, op) == FULLY_CONNECTED] for m in (before, after)]
    if len(sides[0]) != len(sides[1]):
        raise ExportError(
            f"AI Edge Quantizer made {len(sides[1])} matrix products of {len(sides[0])}", "ask for fp32 or fp16"
        )
    for old, new in zip(*sides, strict=True):
        tensor, made = before.subgraphs[0].tensors[old.inputs[1]], after.subgraphs[0].tensors[new.inputs[1]]
        held = before.buffers[tensor.buffer].data
        has_bias = len(old.inputs) > 2 and old.inputs[2] >= 0
        if held is None or not len(held) or tensor.type != 0 or made.type != INT8 or has_bias:
            continue
        values = np.frombuffer(bytes(held), "<f4").reshape(tuple(tensor.shape))
        largest = np.abs(values).max(1)
        if (values != np.rint(values)).any() or not ((largest > 0) & (largest <= 127)).all():
            continue
        steps = 2.0 ** -np.floor(np.log2(127 / largest))
        if len(made.quantization.scale) == 1:
            steps = np.full(1, steps.max())
        made.quantization.scale = steps.astype(np.float32).tolist()
        whole = (values / steps.reshape(-1, 1)).astype(np.int8)
        after.buffers[made.buffer].data = np.frombuffer(whole.tobytes(), np.uint8)
    return _packed(after)


def _kind(model: Any, operator: Any) -> int:
    code = model.operatorCodes[operator.opcodeIndex]
    return max(int(code.builtinCode), int(code.deprecatedBuiltinCode))

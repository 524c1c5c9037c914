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

SIGNATURE = "serving_default"
INTERNAL = (RuntimeError, ValueError, TypeError, AssertionError, KeyError, IndexError, NotImplementedError)
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
    return _quantized(quantizer, ranges and _statistics(data, ranges))


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


def ranges_of(
    data: bytes, spec: ExportSpec, feeds: Sequence[Mapping[str, Array]], threads: int
) -> dict[str, tuple[float, float]]:
    """The smallest and largest value of each tensor that the file computes, on these feeds."""
    interpreter: Any = importlib.import_module("ai_edge_litert.interpreter").Interpreter(
        model_content=data, experimental_preserve_all_tensors=True, num_threads=threads
    )
    interpreter.allocate_tensors()
    model = _opened(data)
    tensors = model.subgraphs[0].tensors
    computed = [
        n
        for n, t in enumerate(tensors)
        if t.type == 0 and ((held := model.buffers[t.buffer].data) is None or not len(held))
    ]
    places = {d["name"]: d["index"] for d in interpreter.get_input_details()}
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    for batch in feeds:
        for entry in spec.model.inputs:
            interpreter.set_tensor(places[entry.name], np.array(batch[entry.name]))
        interpreter.invoke()
        for n in computed:
            values = interpreter.get_tensor(n)
            low[n], high[n] = min(low[n], float(values.min())), max(high[n], float(values.max()))
    return {tensors[n].name.decode(): (low[n], high[n]) for n in computed}

"""What an engine is made of, by TensorRT's engine inspector: layers, their precision, and where it is not the asked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from exporters.artifact import UNQUANTIZED, Achieved, main_precision
from exporters.errors import ArtifactError
from exporters.session import Layer
from exporters.tensorrt.header import Engine

TYPES = {
    "Float": "fp32",
    "Half": "fp16",
    "BFloat16": "bf16",
    "BF16": "bf16",
    "Int8": "int8",
    "FP8": "fp8",
    "TF32": "tf32",
}
# Types in the descriptions of older versions: "Channel major FP16 format where channel % 8 == 0".
WORDS = (
    ("int8", "int8"),
    ("fp8", "fp8"),
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("half", "fp16"),
    ("tf32", "tf32"),
    ("fp32", "fp32"),
    ("float", "fp32"),
)
# Kinds of layers. What pads a convolution's channels names its node, too, and reads FP32 (seen: BF16, dynamic, 10.6).
MULTIPLIES = re.compile("conv|correlation|gemm|matrix|matmul", re.IGNORECASE)
HEAVY = re.compile(r"(Conv|ConvTranspose|MatMul|Gemm)(_\d+)?$")


def layers_of(text: str, times: Mapping[str, float]) -> list[Layer]:
    """Layers from the inspector's JSON, with milliseconds where the profiler gave them.

    A layer's precision is the type of what it computes on: its first input's, or its weights' where it has some.

    Raises:
        ArtifactError: the text is not what an inspector writes, or the engine was built without layer details.
    """
    try:
        found: list[Any] = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the engine inspector's text cannot be read ({error})", "export the engine again"
        ) from None
    if found and not isinstance(found[0], dict):
        raise ArtifactError(
            "the engine tells names of its layers only, not their precision",
            "it was built without ProfilingVerbosity.DETAILED; export it again",
        )
    return [_layer(cast("Mapping[str, Any]", entry), times) for entry in found]


def _layer(entry: Mapping[str, Any], times: Mapping[str, float]) -> Layer:
    name, kind = str(entry.get("Name", "")), str(entry.get("LayerType", ""))
    inputs = cast("Sequence[Mapping[str, Any]]", entry.get("Inputs", ()))
    precision = _type(str(inputs[0].get("Format/Datatype", ""))) if inputs else ""
    weights = entry.get("Weights")
    if isinstance(weights, Mapping):
        precision = _type(str(cast("Mapping[str, Any]", weights).get("Type", ""))) or precision
    # A TF32 kernel reads and writes FP32: only its tactic's name tells.
    if precision == "fp32" and re.search(r"tf32", str(entry.get("TacticName", ""))):
        precision = "tf32"
    parts = re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(entry.get("Metadata", "")))
    return Layer(name, kind, precision, times.get(name), tuple(parts) or tuple(_named_in(name)))


def _named_in(name: str) -> list[str]:
    """ONNX nodes that a fused layer's name holds, for engines whose layers carry no metadata."""
    return [part for part in re.split(r"[\s+(),]+", name) if part.startswith("/")]


def _type(text: str) -> str:
    """The type in the inspector's words."""
    if text in TYPES:
        return TYPES[text]
    lowered = text.lower()
    return next((kind for word, kind in WORDS if word in lowered), "")


def heavy_of(layers: Sequence[Layer]) -> dict[str, Layer]:
    """Convolutions and matrix products by ONNX node, with the layer that computes them."""
    found: dict[str, Layer] = {}
    for layer in layers:
        if layer.kind in ("Reformat", "NoOp", "Constant"):
            continue
        for part in layer.parts:
            # Where a second layer names the node, too, the one that multiplies is the one that counts.
            better = part not in found or (MULTIPLIES.search(layer.kind) and not MULTIPLIES.search(found[part].kind))
            if HEAVY.search(part) and better:
                found[part] = layer
    return found


def precision_word(layers: Sequence[Layer]) -> tuple[str, tuple[str, ...]]:
    """The precision of convolutions and matrix products in a word, and lines that say how many have which."""
    counts = Counter(layer.precision for layer in heavy_of(layers).values())
    lines = tuple(f"{n} of the convolutions and matrix products in {kind or 'unknown'}" for kind, n in counts.items())
    moves = sum(layer.kind == "Reformat" for layer in layers)
    spent = sum(layer.milliseconds or 0.0 for layer in layers if layer.kind == "Reformat")
    whole = sum(layer.milliseconds or 0.0 for layer in layers)
    note = f"{len(layers)} layers, {moves} of them reformat" + (f" ({spent:.3f} of {whole:.3f} ms)" if whole else "")
    return main_precision(counts), (*lines, note)


def achieved(layers: Sequence[Layer], facts: Mapping[str, Any] | None = None) -> Achieved:
    """The precision of an engine with the evidence; `exceptions` names the ONNX nodes that compute in another one.

    Args:
        facts: what its header says that it was made of. Convolutions and matrix products of the network that no layer
            names are exceptions; where it had none, what most layers read counts.

    Raises:
        ArtifactError: none is found in an engine that must have some.
    """
    found, facts = heavy_of(layers), facts or {}
    if not found and facts.get("operators") == []:
        kinds = Counter(layer.precision for layer in layers if layer.precision)
        return Achieved(kinds.most_common(1)[0][0] if kinds else "", {f"layers {k}": n for k, n in kinds.items()})
    if not found:
        raise ArtifactError(
            "the engine has no layer that is known to be a convolution or matrix product", "export the engine again"
        )
    kinds = dict.fromkeys(cast("Sequence[str]", facts.get("operators", ())), "")  # "": no layer names it
    kinds |= {name: layer.precision for name, layer in found.items()}
    made = _counted(kinds, facts)
    more = {"layers": len(layers), "reformats": sum(layer.kind == "Reformat" for layer in layers)}
    return replace(made, counts={**made.counts, **more})


def _counted(kinds: Mapping[str, str], facts: Mapping[str, Any]) -> Achieved:
    """What operators compute in, and which do not; 8 bits are not for what explicit quantization leaves alone."""
    counts = Counter(kinds.values())
    main = main_precision(counts)
    evidence = {f"operators {kind or 'unknown'}": n for kind, n in counts.items()}
    left = set(cast("Sequence[str]", facts.get("unquantized", ()))) if main in ("int8", "fp8") else set[str]()
    evidence |= {UNQUANTIZED: len(left)} if left else {}
    return Achieved(main, evidence, tuple(sorted(n for n, kind in kinds.items() if kind != main and n not in left)))


def achieved_of_plan(path: Path) -> Achieved:
    """Deserializes the plan in this process and asks its inspector."""
    from exporters.cuda.context import current
    from exporters.runtimes.tensorrt import open_plan
    from exporters.tensorrt.library import library

    engine, file = open_plan(path, current())
    inspector = engine.create_engine_inspector()
    text = str(inspector.get_engine_information(library().module.LayerInformationFormat.JSON))
    return achieved(layers_of(text, {}), file.facts)


def achieved_of_network(file: Engine) -> Achieved:
    """The types of the network that an engine was built from, where no GPU can load the plan.

    Raises:
        ArtifactError: the header does not hold them, or describes another plan.
    """
    file.plan()
    kinds = cast("Mapping[str, str]", file.facts.get("network", {}))
    if not kinds:
        raise ArtifactError(f"'{file.path}' does not say what its network computes in", "export it again")
    return _counted(kinds, file.facts)

"""A model.json and its shards, read and checked before anything runs them: graph, signature, weights, precision."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from exporters.arrays import Array
from exporters.artifact import UNQUANTIZED, Achieved, TensorInfo, main_precision
from exporters.errors import ArtifactError, first_line, shown
from exporters.metadata import read_up_to

MODEL = "model.json"
LARGEST = 256 << 20  # bytes of a model.json, which holds no weights
MOST_AXES = 6  # of a tensor in TensorFlow.js
# Types of tensors and of stored weights; TensorFlow.js has no others, and reads whole numbers of any size as int32.
TYPES = {"DT_FLOAT": "float32", "DT_INT32": "int32", "DT_BOOL": "bool", "DT_INT64": "int64", "DT_DOUBLE": "float64"}
STORED = {"float32": "<f4", "int32": "<i4", "bool": "?", "uint8": "u1", "uint16": "<u2", "float16": "<f2"}
WORDS = {"float32": "fp32", "float16": "fp16", "uint8": "int8", "uint16": "int16"}
# Convolutions and matrix products.
HEAVY = frozenset(
    {"Conv1D", "Conv2D", "_FusedConv2D", "Conv2DBackpropInput", "Conv3D", "Conv3DBackpropInputV2"}
    | {"DepthwiseConv2d", "DepthwiseConv2dNative", "FusedDepthwiseConv2dNative"}
    | {"MatMul", "_FusedMatMul", "BatchMatMul", "BatchMatMulV2", "Einsum"}
)
FUSED = frozenset({"_FusedConv2D", "FusedDepthwiseConv2dNative", "_FusedMatMul"})  # with a bias behind the weight
PASSING = frozenset({"Identity", "Reshape", "Transpose"})
AGAIN = "export it again"


@dataclass(frozen=True)
class Node:
    """An operator of the graph; inputs without the numbers of outputs, and without those for control alone."""

    name: str
    op: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """A weight: shape, the type that it is computed in, the type that it is stored in, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    group: int
    start: int
    scale: float = 1.0
    least: float = 0.0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(STORED[self.stored]).itemsize


@dataclass(frozen=True)
class TfjsFile:
    """What a model.json says. Inputs and outputs are as its signature has them, in their order there."""

    folder: Path
    nodes: Mapping[str, Node]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    groups: tuple[tuple[str, ...], ...]
    weights: Mapping[str, Stored]
    metadata: Any

    @property
    def names(self) -> tuple[str, ...]:
        """Files in the folder that are the model."""
        return (MODEL, *(shard for group in self.groups for shard in group))

    def constant(self, name: str) -> str:
        """The weight that a tensor is, "" where it is computed."""
        for _ in range(len(self.nodes)):
            node = self.nodes.get(name)
            if node is None or node.op not in PASSING or not node.inputs:
                break
            name = node.inputs[0]
        return name if name in self.weights else ""

    def kernels(self) -> dict[str, str]:
        """The weight of each convolution and matrix product; "" where both of its inputs are computed."""
        heavy = [n for n in self.nodes.values() if n.op in HEAVY]
        # A transposed convolution's first input is the size of its output.
        read = {n.name: n.inputs[1:2] if "Backprop" in n.op else n.inputs[:2] for n in heavy}
        return {
            name: next((c for i in reversed(inputs) if (c := self.constant(i))), "") for name, inputs in read.items()
        }

    def values(self) -> dict[str, Array]:
        """Every weight as it is stored."""
        data = [b"".join((self.folder / shard).read_bytes() for shard in group) for group in self.groups]
        return {
            w.name: np.frombuffer(data[w.group], STORED[w.stored], math.prod(w.shape), w.start).reshape(w.shape)
            for w in self.weights.values()
        }


def read(path: Path) -> TfjsFile:
    """The model in a folder, or of a model.json.

    Raises:
        ArtifactError: a file is missing, cut off or another's, or they do not fit each other.
    """
    path = path / MODEL if path.is_dir() or not path.exists() else path
    text = read_up_to(LARGEST, path, AGAIN)
    try:
        model = _table(json.loads(text), "it")
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"'{path}' is no model.json of TensorFlow.js ({first_line(error)})", AGAIN) from None
    if model.get("format") != "graph-model":
        raise ArtifactError(
            f"'{path}' has format {shown(model.get('format'))}, expected 'graph-model'",
            "convert a SavedModel; layers-model files are not judged",
        )
    try:
        nodes = _nodes(_table(model.get("modelTopology"), "modelTopology"))
        groups, weights = _manifest(model.get("weightsManifest"))
        signature = _table(model.get("signature", {}), "signature")
        inputs = tuple(_tensors(signature.get("inputs"), "inputs")) or tuple(_placeholders(model["modelTopology"]))
        outputs = tuple(_tensors(signature.get("outputs"), "outputs"))
    except (ValueError, TypeError, OverflowError) as error:
        raise ArtifactError(f"'{path}': {first_line(error)}", AGAIN) from None
    found = TfjsFile(path.parent, nodes, inputs, outputs, groups, weights, model.get("userDefinedMetadata"))
    _check_shards(found)
    absent = next((n.name for n in nodes.values() if n.op == "Const" and n.name not in weights), None)
    if absent is not None:
        raise ArtifactError(f"'{path}': constant {shown(absent)} has no weight in weightsManifest", AGAIN)
    return found


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {shown(value)}, expected a mapping")
    return cast("dict[str, Any]", value)


def _rows(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is {shown(value)}, expected a list")
    return cast("list[Any]", value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {shown(value)}, expected text")
    return value


def _nodes(topology: Mapping[str, Any]) -> dict[str, Node]:
    found: dict[str, Node] = {}
    for row in _rows(topology.get("node"), "modelTopology.node"):
        told = _table(row, "a node")
        name = _text(told.get("name"), "a node's name")
        inputs = [_text(i, f"an input of {name}") for i in _rows(told.get("input", []), f"the inputs of {name}")]
        if name in found:
            raise ValueError(f"two nodes are called {shown(name)}")
        found[name] = Node(
            name,
            _text(told.get("op"), f"the operator of {name}"),
            tuple(i.partition(":")[0] for i in inputs if not i.startswith("^")),
        )
    for node in found.values():
        stray = next((i for i in node.inputs if i not in found), None)
        if stray is not None:
            raise ValueError(f"node {shown(node.name)} reads {shown(stray)}, which is no node")
    return found


def _shape(value: Any, name: str) -> tuple[int | str, ...]:
    """Sizes of a tensorShape; an axis that varies is -1 there."""
    sizes: list[int | str] = []
    for row in _rows(_table(value, f"the shape of {name}").get("dim", []), f"the shape of {name}"):
        text = str(_table(row, f"a size of {name}").get("size", ""))
        if not text.removeprefix("-").isdecimal() or len(text) > 18:
            raise ValueError(f"a size of {name} is {shown(text)}, expected a whole number")
        sizes.append(int(text) if int(text) >= 0 else f"axis{len(sizes)}")
    return tuple(sizes)


def _tensors(value: Any, side: str) -> list[TensorInfo]:
    found: list[TensorInfo] = []
    for name, row in _table(value if value is not None else {}, f"signature.{side}").items():
        told = _table(row, f"signature.{side}.{name}")
        kind = str(told.get("dtype", ""))
        found.append(TensorInfo(name, _shape(told.get("tensorShape", {}), name), TYPES.get(kind, kind)))
    return found


def _placeholders(topology: Mapping[str, Any]) -> list[TensorInfo]:
    """Inputs of a graph whose signature tells none, as that of a converted frozen graph."""
    found: list[TensorInfo] = []
    for row in topology["node"]:
        if row["op"] == "Placeholder":
            told = _table(row.get("attr", {}), f"attr of {row['name']}")
            shape = _table(_table(told.get("shape", {}), "shape").get("shape", {}), "shape")
            kind = str(_table(told.get("dtype", {}), "dtype").get("type", ""))
            found.append(TensorInfo(row["name"], _shape(shape, row["name"]), TYPES.get(kind, kind)))
    return found


def _manifest(value: Any) -> tuple[tuple[tuple[str, ...], ...], dict[str, Stored]]:
    """Names of shards by group, and weights by name."""
    groups: list[tuple[str, ...]] = []
    weights: dict[str, Stored] = {}
    for number, row in enumerate(_rows(value, "weightsManifest")):
        told = _table(row, "a group of weightsManifest")
        groups.append(tuple(_shard(path) for path in _rows(told.get("paths"), "the paths of a group")))
        _check_order(groups[-1])
        start = 0
        for entry in _rows(told.get("weights"), "the weights of a group"):
            weight = _weight(_table(entry, "a weight"), number, start)
            if weight.name in weights:
                raise ValueError(f"two weights are called {shown(weight.name)}")
            weights[weight.name] = weight
            start += weight.bytes
    names = [name for group in groups for name in group]
    twice = next((n for n, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"shard {shown(twice)} is named twice in weightsManifest")
    return tuple(groups), weights


def _shard(value: Any) -> str:
    """The name of a file in the folder."""
    name = _text(value, "the path of a shard")
    if name in (".", "..", MODEL) or any(sign in name for sign in "/\\:\0?#%"):
        raise ValueError(f"shard {shown(name)} is no file of the folder of {MODEL}")
    return name


def _check_order(shards: Sequence[str]) -> None:
    """The converter's names count them: group1-shard2of3.bin."""
    numbers = [n.removesuffix(".bin").partition("-shard")[2].partition("of") for n in shards]
    if all(one.isdecimal() and all_.isdecimal() for one, _, all_ in numbers):
        for place, ((one, _, all_), name) in enumerate(zip(numbers, shards, strict=True), 1):
            if int(one) != place or int(all_) != len(shards):
                raise ValueError(f"shard {shown(name)} is number {place} of {len(shards)} in weightsManifest")


def _weight(told: Mapping[str, Any], group: int, start: int) -> Stored:
    name = _text(told.get("name"), "a weight's name")
    shape = _rows(told.get("shape"), f"the shape of {name}")
    if len(shape) > MOST_AXES or any(type(n) is not int or not 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"weight {shown(name)} has shape {shown(shape)}")
    dtype, stored, scale, least = told.get("dtype"), told.get("dtype"), 1.0, 0.0
    if "quantization" in told:
        how = _table(told["quantization"], f"the quantization of {name}")
        stored = how.get("dtype")
        if stored not in ("uint8", "uint16", "float16") or dtype not in ("float32", "int32"):
            raise ValueError(f"weight {shown(name)} is {shown(dtype)} stored as {shown(stored)}")
        if stored != "float16":
            scale, least = (_number(how.get(word), f"{word} of weight {name}") for word in ("scale", "min"))
    elif dtype not in ("float32", "int32", "bool"):
        raise ValueError(f"weight {shown(name)} has type {shown(dtype)}, expected float32, int32 or bool")
    return Stored(name, tuple(shape), str(dtype), str(stored), group, start, scale, least)


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {shown(value)}, expected a number")
    return float(value)


def _check_shards(found: TfjsFile) -> None:
    """Raises ArtifactError where the shards of a group are not as long as its weights."""
    for number, group in enumerate(found.groups):
        wanted, held = sum(w.bytes for w in found.weights.values() if w.group == number), 0
        for shard in group:
            path = found.folder / shard
            if not path.is_file():
                raise ArtifactError(f"'{path}' {'is no file' if path.exists() else 'is missing'}", AGAIN)
            held += path.stat().st_size
        if held != wanted:
            told = f"'{found.folder / group[0]}'" if len(group) == 1 else f"'{found.folder}': weight group {number + 1}"
            raise ArtifactError(f"{told} holds {held} bytes, and the weights in {MODEL} take {wanted}", AGAIN)


def read_precision(path: Path) -> Achieved:
    """Each convolution and matrix product by the type that its weight is stored in; `exceptions` names the others."""
    found = read(path)
    kernels = found.kernels()
    left = [name for name, weight in kernels.items() if not weight]  # both are computed
    kinds = {n: WORDS.get(found.weights[w].stored, found.weights[w].stored) for n, w in kernels.items() if w}
    counts = Counter(kinds.values())
    main = main_precision(counts)
    evidence = {f"operators {k}": n for k, n in counts.items()}
    evidence |= {UNQUANTIZED: len(left)} if left and main == "int8" else {}
    return Achieved(main, evidence, tuple(sorted(n for n, k in kinds.items() if k != main)))

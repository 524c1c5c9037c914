"""What is in TensorFlow's files, read without running them: graphs and their functions, the precision of operators,
and operators that reach outside of a model."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.artifact import Achieved, main_precision
from exporters.errors import ArtifactError, first_line

SIGNATURE, TAG, MODEL = "serving_default", "serve", "saved_model.pb"
KERAS = "keras_metadata.pb"  # in the folder of one that Keras 2 loads
AGAIN = "export it again"
LARGEST = (1 << 31) - 1  # bytes of a protobuf message
HEAVY = {
    *("Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2", "Einsum"),
    *("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "_FusedConv2D", "_FusedMatMul"),
}
INT32 = 3  # of sizes, which a convolution's gradient takes as well
NO_OUTPUT = ("Const", "NoOp", "Placeholder", "Assert", "PlaceholderWithDefault")
LONGEST = 1000  # nodes that pass a constant on
TYPES = {1: "fp32", 2: "fp64", 19: "fp16", 14: "bf16", 4: "int8", 6: "int8", 11: "int8", 12: "int8"}  # of DataType
# Operators that read or write files, call Python, or other machines: no part of what a network computes.
OUTSIDE = {
    *("ReadFile", "WriteFile", "MatchingFiles", "FileSystemSetConfiguration", "ImmutableConst", "DumpGraph"),
    *("PyFunc", "PyFuncStateless", "EagerPyFunc", "RpcCall", "RpcClient", "RpcServer"),
    *("ReaderReadV2", "ReaderReadUpToV2", "TFRecordReaderV2", "WholeFileReaderV2", "TextLineReaderV2"),
    *("TextLineDataset", "TFRecordDataset", "TFRecordDatasetV2", "SqlDataset", "DataServiceDataset"),
    *("FixedLengthRecordDataset", "FixedLengthRecordDatasetV2", "DataServiceDatasetV2", "DataServiceDatasetV4"),
    *("SaveDataset", "SaveDatasetV2", "LoadDataset", "SnapshotDataset", "SnapshotDatasetV2"),
    *("CreateSummaryFileWriter", "CreateSummaryDbWriter", "DebugIdentityV2", "DebugIdentityV3"),
}
# Those with which a SavedModel's own save and restore functions read and write its variables.
CHECKPOINT = {
    *("Save", "SaveV2", "SaveSlices", "Restore", "RestoreV2", "RestoreSlice", "MergeV2Checkpoints"),
    *("CheckpointExists", "GenerateVocabRemapping", "LoadAndRemapMatrix"),
}
CALLS = ("PartitionedCall", "StatefulPartitionedCall", "TPUPartitionedCall")
PASSING = ("Identity", "Cast", "ReadVariableOp", "Reshape", "Transpose", "StopGradient", "Dequantize")


@dataclass(frozen=True)
class Scope:
    """The nodes of a graph or function by name, and what a function's arguments are, in the scope that calls it."""

    nodes: Mapping[str, Any]
    arguments: Mapping[str, tuple[Scope, str]] = field(default_factory=dict[str, Any])

    def stored(self, tensor: str) -> Any:
        """The constant or variable that a tensor is of, however it is converted; None of what is computed."""
        scope, name = self, _node(tensor)
        for _ in range(LONGEST):
            if name in scope.arguments:
                scope, name = scope.arguments[name]
                continue
            node = scope.nodes.get(name)
            if node is None or node.op not in PASSING or not node.input:
                return node if node is not None and node.op in ("Const", "VarHandleOp", "VariableV2") else None
            name = _node(node.input[0])
        return None


@dataclass(frozen=True)
class Graph:
    """A file's graph. `outputs` are the tensors that it is there to compute."""

    path: Path
    definition: Any
    outputs: tuple[str, ...]
    meta: Any = None  # of a SavedModel, with its signatures

    def computed(self) -> Iterator[tuple[Scope, Any]]:
        """The nodes that the outputs need, and all of the functions that are called on the way, with their scopes."""
        scope = Scope({n.name: n for n in self.definition.node})
        functions = {f.signature.name: f for f in self.definition.library.function}
        todo, seen = [_node(o) for o in self.outputs], set[str]()
        calls = list[tuple[Scope, Any]]()
        while todo:
            if (name := todo.pop()) in seen or name not in scope.nodes:
                continue
            seen.add(name)
            node = scope.nodes[name]
            yield scope, node
            todo += [_node(i) for i in node.input]
            calls.append((scope, node))
        done = set[str]()
        while calls:
            outer, call = calls.pop()
            for name in _called(call):
                if name in done or name not in functions:
                    continue
                done.add(name)
                function = functions[name]
                given = [(outer, _node(i)) for i in call.input] if call.op in CALLS else []
                names = [a.name for a in function.signature.input_arg]
                inner = Scope({n.name: n for n in function.node_def}, dict(zip(names, given, strict=False)))
                for node in function.node_def:
                    yield inner, node
                    calls.append((inner, node))

    def everything(self) -> Iterator[Any]:
        """Every node, whether anything needs it or not."""
        yield from self.definition.node
        for function in self.definition.library.function:
            yield from function.node_def


def _node(tensor: str) -> str:
    """The node that a tensor, or a control input, is of."""
    return tensor.removeprefix("^").partition(":")[0]


def _called(node: Any) -> list[str]:
    """The functions that a node calls, by whatever attribute, or as its operator."""
    found = [str(node.op)]
    for value in node.attr.values():
        found += [str(value.func.name)] if value.HasField("func") else [str(f.name) for f in value.list.func]
    return found


def parsed(path: Path, kind: str, what: str) -> Any:
    """A protobuf message from a file.

    Raises:
        ArtifactError: it cannot be read, or is none of this kind.
    """
    core: Any = importlib.import_module("google.protobuf.message")
    module, _, name = kind.rpartition(".")
    message = getattr(importlib.import_module(module), name)()
    try:
        if path.stat().st_size > LARGEST:
            raise ArtifactError(f"'{path}' has more than 2 GiB, which no {what} can have", AGAIN)
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
    try:
        message.ParseFromString(data)
    except (core.DecodeError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"'{path}' is no {what} ({first_line(error)})", AGAIN) from None
    return message


def of_saved_model(path: Path) -> Graph:
    """The graph of a SavedModel's folder that is tagged to serve.

    Raises:
        ArtifactError: it has none, or no signature that gives anything.
    """
    file = path / MODEL
    message = parsed(file, "tensorflow.core.protobuf.saved_model_pb2.SavedModel", "SavedModel")
    meta = next((m for m in message.meta_graphs if TAG in m.meta_info_def.tags), None)
    if meta is None:
        raise ArtifactError(f"'{file}' holds no graph that is tagged '{TAG}'", AGAIN)
    if SIGNATURE not in meta.signature_def or not meta.signature_def[SIGNATURE].outputs:
        raise ArtifactError(f"'{file}' has no signature '{SIGNATURE}' with outputs", AGAIN)
    outputs = tuple(str(o.name) for o in meta.signature_def[SIGNATURE].outputs.values())
    return Graph(file, meta.graph_def, outputs, meta)


def of_frozen(path: Path) -> Graph:
    """A GraphDef; a node that no other one takes anything from is an output, in the order of their numbers.

    Raises:
        ArtifactError: it has no such node.
    """
    if path.name == MODEL and path.with_name("variables").is_dir():
        raise ArtifactError(f"'{path}' is part of a SavedModel", "name its folder, which is saved_model")
    definition = parsed(path, "tensorflow.core.framework.graph_pb2.GraphDef", "GraphDef")
    taken = {_node(i) for n in definition.node for i in n.input if not i.startswith("^")}
    ends = [str(n.name) for n in definition.node if n.name not in taken and n.op not in NO_OUTPUT]
    if not ends:
        raise ArtifactError(
            f"'{path}' is no frozen graph: none of its {len(definition.node)} nodes is an output", AGAIN
        )
    return Graph(path, definition, tuple(sorted(ends, key=natural)))


def natural(name: str) -> list[tuple[int, str]]:
    """A name with its numbers as such: output_10 comes after output_9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def refuse_outside(graph: Graph) -> None:
    """Raises ArtifactError where the graph has an operator that reaches outside of a model."""
    found = next((n for n in graph.everything() if n.op in OUTSIDE), None)
    found = found or next((n for _, n in graph.computed() if n.op in CHECKPOINT), None)
    if found is not None:
        raise ArtifactError(
            f"'{graph.path}' calls {found.op} (node '{found.name}'), which reads or writes outside of the model",
            "export the network alone",
        )


def read_precision(graph: Graph) -> Achieved:
    """Each convolution and matrix product by the type that it computes in, or that its weight is stored in.

    `exceptions` names those that differ.
    """
    heavy, names = list[tuple[str, str]](), Counter[str]()  # two functions may have operators of one name
    for scope, node in graph.computed():
        if node.op in HEAVY:
            names[str(node.op)] += 1
            stored = [s for i in node.input if (s := scope.stored(i)) is not None]
            kinds = {_type(node, "T"), *(_type(s, "dtype") for s in stored if s.attr["dtype"].type != INT32)}
            heavy.append((str(node.name), next((k for k in sorted(kinds) if k != "fp32"), "fp32")))
    counts = Counter(kind for _, kind in heavy)
    main = main_precision(counts)
    evidence = {f"operators {k}": n for k, n in counts.items()} | {f"of {k}": n for k, n in names.items()}
    return Achieved(main, evidence, tuple(sorted(n for n, k in heavy if k != main)))


def _type(node: Any, attribute: str) -> str:
    number = int(node.attr[attribute].type)
    return TYPES.get(number, f"type {number}")

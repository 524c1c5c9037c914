"""Frozen graphs of TensorFlow: how one is made of a SavedModel, and how one is run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.errors import ArtifactError, ExportError
from exporters.metadata import SIDE_CAR
from exporters.runtimes.tensorflow import WRONG, GraphSession, library, told
from exporters.runtimes.tf_graph import AGAIN, LARGEST, SIGNATURE, of_frozen, refuse_outside
from exporters.spec import ExportSpec

INNER = "model"  # scope of the network's own nodes, so that none has the name of an input or output


def freeze(source: Path, target: Path, spec: ExportSpec) -> None:
    """Writes the graph of a SavedModel's signature, with variables as constants, and inputs and outputs as nodes of
    the request's names.

    Raises:
        ExportError: TensorFlow cannot, or the graph is larger than a GraphDef can be.
    """
    constants: Any = importlib.import_module("tensorflow.python.framework.convert_to_constants")
    names = [o.name for o in spec.model.outputs]
    try:
        function = library.saved_model.load(str(source)).signatures[SIGNATURE]
        frozen = constants.convert_variables_to_constants_v2(function)
        # Structures of functions are sorted by name, and so are the tensors of a flat one.
        given = [t for t in frozen.inputs if t.dtype != library.resource]
        made = dict(zip(sorted(function.structured_outputs), frozen.outputs, strict=True))
        with library.Graph().as_default() as graph:
            feeds = {t.name: library.compat.v1.placeholder(t.dtype, t.shape, str(t.op.name)) for t in given}
            tensors = library.graph_util.import_graph_def(
                frozen.graph.as_graph_def(), feeds, [made[name].name for name in names], name=INNER
            )
            nodes = [library.identity(tensor, name) for name, tensor in zip(names, tensors, strict=True)]
        wrong = next((n for n, t in zip(names, nodes, strict=True) if t.op.name != n), None)
        wrong = wrong or next((i.name for i in spec.model.inputs if i.name not in [t.op.name for t in given]), None)
        if wrong is not None:
            raise ExportError(f"TensorFlow has no node '{wrong}' in the graph", "rename this input or output")
        definition = graph.as_graph_def()
        if definition.ByteSize() > LARGEST:
            raise ExportError(f"the graph has {definition.ByteSize()} bytes, and a GraphDef at most 2 GiB", "use onnx")
        target.write_bytes(definition.SerializeToString(deterministic=True))
    except WRONG as error:
        raise ExportError(f"TensorFlow cannot freeze model '{spec.model.name}' ({told(error)})", AGAIN) from error


class FrozenGraphSession(GraphSession):
    """A GraphDef: what nothing gives it are its inputs, what nothing takes its outputs."""

    def __init__(self, path: Path, spec: ExportSpec, *, named: bool) -> None:
        graph = of_frozen(path)
        refuse_outside(graph)
        given = [str(n.name) for _, n in graph.computed() if n.op == "Placeholder"]
        if not given:
            raise ArtifactError(f"'{path}' has no inputs: no Placeholder is among its nodes", AGAIN)

        def build() -> None:
            library.graph_util.import_graph_def(graph.definition, name="")

        try:
            whole = library.compat.v1.wrap_function(build, [])
            feeds = {name: whole.graph.get_tensor_by_name(f"{name}:0") for name in given}
            made = {name: whole.graph.get_tensor_by_name(f"{name}:0") for name in graph.outputs}
            function = whole.prune(list(feeds.values()), list(made.values()))
        except WRONG as error:
            raise ArtifactError(f"'{path}' cannot be imported by TensorFlow ({told(error)})", AGAIN) from None

        def call(**arrays: Any) -> Mapping[str, Any]:
            return dict(zip(made, function(*(arrays[name] for name in feeds)), strict=True))

        super().__init__(graph, call, (feeds, made), path.with_name(SIDE_CAR), spec, named=named)

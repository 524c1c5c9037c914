"""What happens inside an ONNX graph: the output of each module of the network that it was traced from."""
# pyright: reportUnknownMemberType=false
# (onnx.load leaves the type of a path open)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from exporters.models.spec import module_path


def modules(path: Path) -> dict[str, tuple[str, str]]:
    """Module paths in the order of the graph, with the tensor that is the module's output and the node that makes it.

    A node's name begins with its module's ("/model.0/conv/Conv"); of several nodes of a module the last makes its
    output. The node is told as "Conv /model.0/conv/Conv".
    """
    graph = onnx.load(path, load_external_data=False).graph
    found: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        module = module_path(node.name.rpartition("/")[0])
        if module and node.output:
            found.pop(module, None)  # behind what it is made from
            found[module] = node.output[0], f"{node.op_type} {node.name}"
    return found


def with_outputs(path: Path, tensors: Sequence[str]) -> bytes:
    """The file's graph, serialized, with these tensors as its only outputs."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return model.SerializeToString()

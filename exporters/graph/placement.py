"""Where Q/DQ stands: which convolutions compute in 8 bits, which tensors are quantized for them, which share a scale.

The rules follow what TensorRT fuses (measured on an H100 with 10.6; the medians stand in CHANGELOG):
- one Q/DQ a tensor, shared by every consumer, so that nothing is quantized twice;
- none between a convolution and its SiLU: both run in one kernel, which writes 8 bits;
- except before a residual addition: there SiLU and addition run in a kernel of their own, which reads 8 bits only where
  both of its inputs are dequantized; so that convolution's output is quantized, too;
- an addition right behind a convolution runs in the convolution's kernel, if its other input alone is quantized;
- convolutions of one tensor that `siblings` merges share the scale of their activations;
- tensors that are joined, cut or passed on (Concat, Slice, Split, MaxPool, Resize) share the largest scale, so that
  these operators move 8 bits without converting them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from exporters.graph.siblings import siblings
from exporters.models.spec import belongs

HEAVY = ("Conv", "MatMul", "Gemm")
PASSING = ("MaxPool", "Resize", "Slice", "Split")  # the same values leave as came in


@dataclass
class Placement:
    """What `qdq` inserts.

    Attributes:
        heavy: names of the operators whose weights and data are quantized.
        points: tensor -> names of the nodes that read it dequantized.
        group: tensor -> name of the group that shares its scale (its own name where it stands alone).
        measured: tensors whose range is needed for this placement.
    """

    heavy: tuple[str, ...] = ()
    points: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    group: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def measured(self) -> list[str]:
        return sorted({*self.points, *self.group})


class _Groups:
    """Tensors that share a scale: a union-find structure."""

    def __init__(self) -> None:
        self.above: dict[str, str] = {}

    def find(self, name: str) -> str:
        self.above.setdefault(name, name)
        while self.above[name] != name:
            name = self.above[name]
        return name

    def join(self, names: Iterable[str]) -> None:
        first, *others = [self.find(n) for n in names]
        for other in others:
            self.above[other] = first


def measured(graph: onnx.GraphProto, kept: Sequence[str]) -> list[str]:
    """Tensors whose range is needed for a placement that keeps these modules and maybe more.

    With every module that is kept, an addition may read 8 bits elsewhere: both of its sides are measured.
    """
    placement = place(graph, kept)
    makers, names = {o: n for n in graph.node for o in n.output}, set(placement.heavy)
    found = set(placement.measured)
    for node in graph.node:
        if node.op_type == "Add" and not belongs(node.name, kept):
            before = [_before_activation(i, makers) for i in node.input]
            found |= {b for b in before if b in makers and makers[b].name in names}
    return sorted(found)


def place(graph: onnx.GraphProto, kept: Sequence[str]) -> Placement:
    """The placement for a graph; `kept` names module paths that stay in floating point."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    weights = {i.name: tuple(i.dims) for i in graph.initializer}
    heavy = [n for n in graph.node if n.op_type in HEAVY and _is_possible(n, weights, kept)]
    data = {n.name: next(i for i in n.input[:2] if i not in weights) for n in heavy}
    points: dict[str, list[str]] = {}
    for node in heavy:
        points.setdefault(data[node.name], []).append(node.name)
    groups = _Groups()
    for node in graph.node:
        if not belongs(node.name, kept) and _reaches(node, readers, set(data.values())):
            tensors = [i for i in node.input if i and i not in weights]
            if node.op_type == "Concat":
                groups.join([*tensors, *node.output])
            elif node.op_type in PASSING:
                groups.join([tensors[0], *node.output])
    _residuals(graph, readers, heavy, points, weights, kept)
    names = {n.name for n in heavy}
    for branches in siblings(graph):
        together = [b.output for b in branches if b.conv.name in names and b.output in points]
        if len(together) == len(branches) and not any(b.conv.output[0] in points for b in branches):
            groups.join(together)
    return Placement(tuple(n.name for n in heavy), points, {t: groups.find(t) for t in groups.above})


def _is_possible(node: onnx.NodeProto, weights: Mapping[str, tuple[int, ...]], kept: Sequence[str]) -> bool:
    """Whether an operator has constant weights and may be converted."""
    if belongs(node.name, kept) or sum(i in weights for i in node.input[:2]) != 1:
        return False
    return node.op_type == "Conv" or len(next(weights[i] for i in node.input[:2] if i in weights)) == 2


def _reaches(node: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]], wanted: set[str]) -> bool:
    """Whether what a node passes on is read by a quantized operator, at once or through others that pass on."""
    for name in node.output:
        if name in wanted:
            return True
        # What passes on has its values in front; behind them stand numbers, as the sizes of a Resize.
        onward = (r for r in readers[name] if r.op_type == "Concat" or (r.op_type in PASSING and r.input[0] == name))
        if any(_reaches(r, readers, wanted) for r in onward):
            return True
    return False


def _residuals(
    graph: onnx.GraphProto,
    readers: Mapping[str, Sequence[onnx.NodeProto]],
    heavy: Sequence[onnx.NodeProto],
    points: dict[str, list[str]],
    weights: Mapping[str, tuple[int, ...]],
    kept: Sequence[str],
) -> None:
    """Lets residual additions read 8 bits: the tensor that skips, and the convolution before an activation."""
    makers = {o: n for n in graph.node for o in n.output}
    names = {n.name for n in heavy}
    for node in graph.node:
        if node.op_type != "Add" or any(i in weights for i in node.input) or belongs(node.name, kept):
            continue
        skips = [i for i in node.input if i in points]
        branches = {i: _before_activation(i, makers) for i in node.input if i not in points}
        if not branches or any(b not in makers or makers[b].name not in names for b in branches.values()):
            continue
        if not skips and list(branches) == list(branches.values()) and len(branches) == 2:
            points[node.input[1]] = [node.name]  # of two convolutions one adds the other's output
        elif len(skips) == 1:
            points[skips[0]].append(node.name)
            for before in (b for branch, b in branches.items() if b != branch):
                points.setdefault(before, []).extend(r.name for r in readers[before] if not belongs(r.name, kept))


def _before_activation(name: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor that an activation (SiLU as Sigmoid and Mul, or one operator) was applied to; itself without one."""
    maker = makers.get(name)
    if maker is None:
        return name
    if maker.op_type == "Mul":
        for one, other in ((0, 1), (1, 0)):
            gate = makers.get(maker.input[other])
            if gate is not None and gate.op_type == "Sigmoid" and gate.input[0] == maker.input[one]:
                return maker.input[one]
    return maker.input[0] if maker.op_type in ("Relu", "Sigmoid", "LeakyRelu", "Clip", "HardSwish") else name

"""Channels of an INT8 graph aligned to the vectors that TensorRT's 8-bit kernels work on, by channels of zeros.

TensorRT holds 8-bit tensors in vectors of 32 channels. Where one is cut or joined inside a vector, both sides are
converted, which costs more than the convolutions between (seen on an H100 with 10.6: see CHANGELOG). So every part is
filled up to whole vectors: the weights of the convolution that makes it get rows of zeros, those of who reads it get
columns of zeros, and every other value stays what it was.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import numpy_helper

from exporters.session import Array

VECTOR = 32
# Operators that treat each channel by itself, so that channels of zeros change no other one.
CHANNELWISE = frozenset(
    {"Add", "Clip", "HardSwish", "LeakyRelu", "MaxPool", "Mul", "Relu", "Sigmoid", "QuantizeLinear", "DequantizeLinear"}
)
Layout = tuple[tuple[int, int], ...]  # parts of a tensor's channels: how many are real, and how many with the zeros


class _CannotPad(Exception):
    """An operator that is not known here reads a tensor that would be filled up."""


def pad(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every part that is cut or joined filled up to whole vectors; itself where nothing needs it.

    Where a filled tensor meets an operator that is not known here, the graph stays as it is: slower, never wrong.
    """
    padder = _Padder(model.graph)
    layouts = padder.wanted()
    if not layouts:
        return model
    copied = onnx.ModelProto.FromString(model.SerializeToString())
    try:
        _Padder(copied.graph).apply(layouts)
        onnx.shape_inference.infer_shapes(copied, check_type=True, strict_mode=True)
    except (_CannotPad, onnx.shape_inference.InferenceError):
        return model
    return copied


class _Padder:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.stored = {i.name: i for i in graph.initializer}
        self.made_by = {output: node for node in graph.node for output in node.output}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(o.name for o in graph.output)
        self.added = 0

    # ---- what is to be filled up -------------------------------------------------------------------------------------

    def wanted(self) -> dict[str, Layout]:
        """Output of a convolution -> its layout, for those whose output is cut or joined inside a vector."""
        cuts = self._cuts()
        layouts: dict[str, Layout] = {}
        for node in self.graph.node:
            if node.op_type != "Concat" or _attribute(node, "axis", 0) != 1:
                continue
            makers = {_key(m): m for name in node.input for m in self._behind(name)}
            offset, whole = 0, True
            for name in node.input:
                channels = self._channels(name)
                whole = whole and channels > 0 and offset % VECTOR == 0
                offset += channels
            inside = any(c % VECTOR for maker in makers for c in cuts[maker])
            if (not whole or inside) and all(self._channels_of(m) > 0 for m in makers.values()):
                layouts |= {name: self._layout(self._channels_of(m), cuts[name]) for name, m in makers.items()}
        changed = bool(layouts)
        while changed:  # what lies between two of them, and is narrower than a vector
            changed = False
            for node in self.graph.node:
                if node.op_type == "Conv" and _key(node) not in layouts and 0 < self._channels_of(node) < VECTOR:
                    before = self._behind(node.input[0])
                    if before and all(_key(b) in layouts for b in before):
                        layouts[_key(node)] = self._layout(self._channels_of(node), set())
                        changed = True
        return layouts if any(real != filled for layout in layouts.values() for real, filled in layout) else {}

    def _layout(self, channels: int, cuts: set[int]) -> Layout:
        bounds = sorted({0, channels, *cuts})
        return tuple((b - a, -(-(b - a) // VECTOR) * VECTOR) for a, b in pairwise(bounds))

    def _cuts(self) -> dict[str, set[int]]:
        """Output of a convolution -> channels at which it is cut."""
        cuts: dict[str, set[int]] = defaultdict(set)
        for node in self.graph.node:
            bounds: list[int] = []
            if node.op_type == "Slice" and (found := self._sliced(node)):
                bounds = list(found)
            if node.op_type == "Split" and _attribute(node, "axis", 0) == 1 and len(node.input) > 1:
                bounds = list(np.cumsum(self._values(node.input[1])))
            for maker in self._behind(node.input[0]) if bounds else ():
                cuts[_key(maker)] |= {b for b in bounds if 0 < b < self._channels_of(maker)}
        return cuts

    def _sliced(self, node: onnx.NodeProto) -> tuple[int, int] | None:
        """First and last channel of a Slice over channels; None for another one."""
        if len(node.input) < 4 or any(name not in self.stored for name in node.input[1:] if name):
            return None
        starts, ends, axes = (self._values(name) for name in node.input[1:4])
        steps = self._values(node.input[4]) if len(node.input) > 4 else [1]
        if axes != [1] or steps != [1]:
            return None
        channels = self._channels(node.input[0])
        start, end = (min(v if v >= 0 else v + channels, channels) for v in (starts[0], ends[0]))
        return (start, end) if channels > 0 else None

    def _behind(self, tensor: str) -> list[onnx.NodeProto]:
        """The convolutions whose channels a tensor has, through what treats channels by themselves."""
        found: dict[str, onnx.NodeProto] = {}
        todo, seen = [tensor], set[str]()
        while todo:
            node = self.made_by.get(todo.pop())
            if node is None or node.output[0] in seen:
                continue
            seen.add(node.output[0])
            if node.op_type == "Conv":
                found[_key(node)] = node
            elif node.op_type in (*CHANNELWISE, "Resize", "Slice", "Split"):
                todo += [name for name in node.input if name and name not in self.stored]
        return list(found.values())

    def _channels(self, tensor: str) -> int:
        """Channels of a tensor; 0 where they are not known."""
        node = self.made_by.get(tensor)
        if node is None:
            return 0
        if node.op_type == "Conv":
            return self._channels_of(node)
        if node.op_type == "Concat":
            parts = [self._channels(name) for name in node.input]
            return sum(parts) if all(parts) and _attribute(node, "axis", 0) == 1 else 0
        if node.op_type == "Slice":
            found = self._sliced(node)
            return found[1] - found[0] if found else 0
        if node.op_type == "Split":
            sizes = self._values(node.input[1]) if len(node.input) > 1 else []
            return sizes[list(node.output).index(tensor)] if sizes else 0
        if node.op_type in (*CHANNELWISE, "Resize"):
            return next((c for name in node.input if (c := self._channels(name))), 0)
        return 0

    def _channels_of(self, node: onnx.NodeProto) -> int:
        """Output channels of a convolution; 0 where its weights are computed, or it has groups."""
        weight = self._weight(node.input[1])
        return int(weight.dims[0]) if weight is not None and _attribute(node, "group", 1) == 1 else 0

    def _weight(self, name: str) -> onnx.TensorProto | None:
        """The stored weights, behind their DequantizeLinear where they have one; None where they are computed."""
        maker = self.made_by.get(name)
        if maker is None:
            return self.stored.get(name)
        return self.stored.get(maker.input[0]) if maker.op_type == "DequantizeLinear" else None

    def _values(self, name: str) -> list[int]:
        return [int(v) for v in numpy_helper.to_array(self.stored[name]).reshape(-1)] if name in self.stored else []

    # ---- filling up --------------------------------------------------------------------------------------------------

    def apply(self, wanted: Mapping[str, Layout]) -> None:
        """Fills up, in place.

        Raises:
            _CannotPad: something reads a filled tensor that is not known here; the graph is then half changed.
        """
        if any(a.HasField("g") or a.graphs for node in self.graph.node for a in node.attribute):
            raise _CannotPad  # a branch or a loop may read what is outside
        if any(i.name in self.stored for i in self.graph.input):
            raise _CannotPad  # weights that may be replaced
        layouts: dict[str, Layout] = {}  # tensors that are filled up
        for node in self.graph.node:
            inputs = [layouts[name] for name in node.input if name in layouts]
            made: Layout | None = None
            if node.op_type == "Conv":
                given, made = layouts.get(node.input[0]), wanted.get(_key(node))
                if given or made:
                    if _attribute(node, "group", 1) != 1:
                        raise _CannotPad
                    self._widen(node, made, given)
            elif inputs and node.op_type in CHANNELWISE:
                data = [name for name in node.input if name and name not in self.stored]
                is_one = len(set(inputs)) == 1 and len(inputs) == len(data) and len(node.output) == 1
                if not is_one or not self._is_scalar(node, data):
                    raise _CannotPad
                made = inputs[0]
            elif inputs and node.op_type == "Resize" and self._scales_only_places(node):
                made = inputs[0]
            elif inputs and node.op_type == "Slice":
                made = self._cut(node, inputs[0])
            elif inputs and node.op_type == "Split":
                self._split(node, inputs[0], layouts)
                continue
            elif inputs and node.op_type == "Concat" and _attribute(node, "axis", 0) == 1:
                parts = [layouts.get(n) or ((c, c),) if (c := self._known(n, layouts)) else None for n in node.input]
                if None in parts:
                    raise _CannotPad
                made = tuple(part for layout in parts if layout for part in layout)
            elif inputs:
                raise _CannotPad
            if made:
                layouts |= dict.fromkeys(node.output, made)
        if any(o.name in layouts for o in self.graph.output):
            raise _CannotPad
        # What is stored of shapes is of the graph before.
        left = [v for v in self.graph.value_info if v.name not in layouts]
        del self.graph.value_info[:]
        self.graph.value_info.extend(left)

    def _scales_only_places(self, node: onnx.NodeProto) -> bool:
        """Whether a Resize has stored scales, of which that of the channels is 1."""
        if len(node.input) != 3 or node.input[2] not in self.stored or any(a.name == "axes" for a in node.attribute):
            return False
        scales = numpy_helper.to_array(self.stored[node.input[2]]).reshape(-1)
        return len(scales) > 1 and float(scales[1]) == 1.0

    def _known(self, name: str, layouts: Mapping[str, Layout]) -> int:
        return sum(r for r, _ in layouts[name]) if name in layouts else self._channels(name)

    def _is_scalar(self, node: onnx.NodeProto, data: Sequence[str]) -> bool:
        """Whether what is stored of an operator's inputs is one number for all channels."""
        return all(int(np.prod(self.stored[n].dims)) == 1 for n in node.input if n in self.stored and n not in data)

    def _widen(self, node: onnx.NodeProto, made: Layout | None, given: Layout | None) -> None:
        """Rows of zeros for filled outputs and columns of zeros for filled inputs."""
        maker, weight = self.made_by.get(node.input[1]), self._weight(node.input[1])
        if weight is None or (maker is not None and self.readers[node.input[1]] > 1):
            raise _CannotPad
        if maker is not None and not all(name in self.stored for name in maker.input):
            raise _CannotPad
        if maker is not None and _attribute(maker, "axis", 1) != 0 and not self._is_scalar(maker, maker.input[:1]):
            raise _CannotPad  # scales along the inputs
        values = numpy_helper.to_array(weight)
        values = _spread(values, made, 0) if made else values
        self._store(weight.name, _spread(values, given, 1) if given else values)
        if made and maker is not None and int(np.prod(self.stored[maker.input[1]].dims)) > 1:
            self._store(maker.input[1], _spread(numpy_helper.to_array(self.stored[maker.input[1]]), made, 0, fill=1.0))
            if len(maker.input) > 2 and int(np.prod(self.stored[maker.input[2]].dims)) > 1:
                self._store(maker.input[2], _spread(numpy_helper.to_array(self.stored[maker.input[2]]), made, 0))
        if made and len(node.input) > 2 and node.input[2]:
            if node.input[2] not in self.stored:
                raise _CannotPad
            self._store(node.input[2], _spread(numpy_helper.to_array(self.stored[node.input[2]]), made, 0))

    def _store(self, name: str, values: Array) -> None:
        if self.readers[name] > 1:  # somebody else reads it as it was
            raise _CannotPad
        self.stored[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))

    def _constant(self, values: Sequence[int]) -> str:
        """A stored tensor of its own: others may read the one that was there."""
        self.added += 1
        made = numpy_helper.from_array(np.array(values, np.int64), f"exportgate/padded/{self.added}")
        self.graph.initializer.append(made)
        self.stored[made.name] = self.graph.initializer[-1]
        return made.name

    def _cut(self, node: onnx.NodeProto, layout: Layout) -> Layout:
        """Moves a Slice to where its parts are now."""
        axes = self._values(node.input[3]) if len(node.input) > 3 else []
        if axes and min(axes) >= 0 and 1 not in axes:
            return layout
        starts, ends = self._values(node.input[1]), self._values(node.input[2])
        steps = self._values(node.input[4]) if len(node.input) > 4 and node.input[4] else [1]
        if axes != [1] or steps != [1] or not starts or not ends:
            raise _CannotPad
        channels = sum(real for real, _ in layout)
        start, end = (min(v if v >= 0 else v + channels, channels) for v in (starts[0], ends[0]))
        first, last, parts = _places(layout, start, end)
        node.input[1], node.input[2] = self._constant([first]), self._constant([last])
        return parts

    def _split(self, node: onnx.NodeProto, layout: Layout, layouts: dict[str, Layout]) -> None:
        sizes = self._values(node.input[1]) if len(node.input) > 1 else []
        if _attribute(node, "axis", 0) != 1 or not sizes:
            raise _CannotPad
        at, wide = 0, list[int]()
        for name, size in zip(node.output, sizes, strict=True):
            first, last, layouts[name] = _places(layout, at, at + size)
            wide.append(last - first)
            at += size
        node.input[1] = self._constant(wide)


def _key(node: onnx.NodeProto) -> str:
    """What tells a convolution from the others: its output, since names may be missing."""
    return node.output[0]


def _places(layout: Layout, start: int, end: int) -> tuple[int, int, Layout]:
    """Where real channels start..end lie among filled ones, and their layout."""
    at, place, parts = 0, 0, list[tuple[int, int]]()
    first = last = 0
    for real, filled in layout:
        if at == start:
            first = place
        if start <= at and at + real <= end:
            parts.append((real, filled))
        at, place = at + real, place + filled
        if at == end:
            last = place
    if sum(real for real, _ in parts) != end - start:
        raise _CannotPad  # cut inside a part
    return first, last, tuple(parts)


def _spread(values: Array, layout: Layout, axis: int, fill: float = 0.0) -> Array:
    """Values along an axis at their new places, `fill` between them."""
    shape = list(values.shape)
    shape[axis] = sum(filled for _, filled in layout)
    wide = np.full(shape, fill, values.dtype)
    at = place = 0
    for real, filled in layout:
        index = [slice(None)] * values.ndim
        source = list(index)
        index[axis], source[axis] = slice(place, place + real), slice(at, at + real)
        wide[tuple(index)] = values[tuple(source)]
        at, place = at + real, place + filled
    return wide


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)

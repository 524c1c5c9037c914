"""A traced program made ready for 8 bits: constants folded, softmax over the last axis, products by constants as linear
layers, channels that are no scores divided, and every node named after its module.

All of it is sound for FP32 as well, so that the file of each precision has the same graph.
"""
# pyright: reportUnknownMemberType=false
# (torch.fx leaves types open)

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from exporters.models.spec import OutputSpec
from exporters.models.traced import path_of
from exporters.session import Array
from exporters.spec import ExportSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

PLACES = ("box", "point")  # kinds of channels that are pixels of the image: x and y in turn
LARGEST = 1 << 24  # values of a constant that is computed ahead


def divisors_of(
    output: OutputSpec, channels: int, imgsz: tuple[int, int], largest: Mapping[str, float]
) -> tuple[float, ...]:
    """What each channel of an output is divided by, so that pixels, radians and coefficients do not take the scale of 8
    bits from the scores beside them; () where none is.

    Places by the image's width and height; an angle, -pi/4 to 3 pi/4, by pi; the coefficients of masks, where the
    `largest` of them is known by the group's name, by four times the power of two above it: what is below 0 is of no
    use to the places, whose steps grow with it.
    """
    found = np.ones(channels)
    for group in output.groups:
        numbers = np.arange(channels)[group.channels]
        if group.kind == "box":  # x and y in turn: centre, then size
            found[numbers] = np.where(np.arange(len(numbers)) % 2, imgsz[0], imgsz[1])
        elif group.kind == "point":
            found[numbers] = imgsz[0] if group.name.endswith(" y") else imgsz[1]
        elif group.kind == "angle":
            found[numbers] = math.pi
        elif group.kind == "mask" and largest.get(group.name, 0.0) > 0:
            found[numbers] = 4 * 2.0 ** math.ceil(math.log2(largest[group.name]))
    return () if (found == 1).all() else tuple(float(v) for v in found)


def module_of(program: ExportedProgram) -> Any:
    """The program as a module whose constants are folded and whose operators are those that 8 bits have."""
    module = cast("Any", program.module())
    _fold(module)
    _softmax_last(module.graph)
    _linear(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def finished(module: Any, spec: ExportSpec, largest: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
    """Divides the channels of `module`'s outputs in place, names its nodes, and returns the divisors by output.

    `largest` is of the coefficients of masks, by their group's name.
    """
    from torch.fx.graph import CodeGen

    graph = module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    flat = output.args[0]
    values = list(cast("Sequence[Any]", flat)) if isinstance(flat, (list, tuple)) else [flat]
    divisors: dict[str, tuple[float, ...]] = {}
    for number, (told, node) in enumerate(zip(spec.model.outputs, values, strict=False)):
        shape = _shape(node)
        found = divisors_of(told, shape[1], spec.imgsz, largest) if len(shape) > 1 else ()
        if found:
            factors = (1.0 / np.asarray(found)).reshape(1, -1, *([1] * (len(shape) - 2)))
            values[number] = _times(module, node, factors, output)
            divisors[told.name] = found
    output.args = (tuple(values),)
    graph.set_codegen(CodeGen())  # a flat tuple, whatever the model returned
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "call_function":  # a converter makes names of tensors of this
            node.meta["nn_module_stack"] = {"path": ("", f"{path_of(node)}.{node.name}".lstrip("."))}
    module.recompile()
    return divisors


def channels_last(module: Any) -> None:
    """Lets images come and go with their channels last, in place, as the operators take them: a transposition would be
    the first of them, and the Edge TPU has none."""
    import torch

    aten, graph = cast("Any", torch.ops.aten), module.graph
    for node in list(graph.nodes):
        if str(node.target) == "_guards_fn":  # of the shapes before
            graph.erase_node(node)
        if node.op == "placeholder" and len(_shape(node)) == 4:
            value = node.meta["val"]
            with graph.inserting_after(node):
                turned = graph.call_function(aten.permute.default, (node, [0, 3, 1, 2]))
            turned.meta = {"val": value}
            node.replace_all_uses_with(turned, _not(turned))
            node.meta["val"] = value.permute(0, 2, 3, 1)
    output = next(n for n in graph.nodes if n.op == "output")
    values: list[Any] = []
    for node in output.args[0]:
        with graph.inserting_before(output):
            four = len(_shape(node)) == 4
            values.append(graph.call_function(aten.permute.default, (node, [0, 2, 3, 1])) if four else node)
        if four:
            values[-1].meta = {**node.meta, "val": node.meta["val"].permute(0, 2, 3, 1)}
    output.args = (tuple(values),)
    graph.lint()
    module.recompile()


def _not(node: Any) -> Any:
    """Of users all but this one."""

    def others(user: Any) -> bool:
        return user is not node

    return others


def largest_coefficients(module: Any, spec: ExportSpec, feeds: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """The largest magnitude of masks' coefficients on these feeds, by their group's name."""
    import torch

    from exporters.models.build import as_tuple

    found: dict[str, float] = {}
    wanted = [(n, g) for n, o in enumerate(spec.model.outputs) for g in o.groups if g.kind == "mask"]
    for batch in feeds if wanted else ():
        outputs = as_tuple(module(*(torch.from_numpy(np.array(batch[i.name])) for i in spec.model.inputs)))
        for number, group in wanted:
            values = outputs[number][:, group.channels].abs().max()
            found[group.name] = max(found.get(group.name, 0.0), float(values))
    return found


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def _like(graph: Any, node: Any, target: Any, args: tuple[Any, ...], shape: Sequence[int] | None = None) -> Any:
    """A new node at the place of another, of its module; `shape` where its value has another one."""
    made = graph.call_function(target, args)
    made.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    value = node.meta["val"]
    made.meta["val"] = value if shape is None else value.new_empty(tuple(shape))
    return made


def _constant(module: Any, value: Any, before: Any) -> Any:
    """A node of a constant, in a buffer of its own."""
    name = f"constant_{sum(1 for n, _ in module.named_buffers() if n.startswith('constant_'))}"
    module.register_buffer(name, value)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta["val"] = value
    return node


def _held(module: Any, node: Any) -> Any:
    """The tensor of a node that is a constant or a parameter; None of another."""
    import torch

    if getattr(node, "op", "") != "get_attr":
        return None
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, torch.Tensor) else None


def _fold(module: Any) -> None:
    """Computes what depends on no input: anchors, whose arithmetic would be in 8 bits otherwise."""
    import torch
    from torch.fx.node import map_arg

    known: dict[Any, Any] = {}
    for node in list(module.graph.nodes):
        held = _held(module, node)
        if held is not None:
            known[node] = held.detach()
            continue
        used = node.all_input_nodes
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.numel() > LARGEST:
            continue
        if any(n not in known for n in used) or "rand" in str(node.target):
            continue
        given = cast("Any", map_arg)((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            known[node] = node.target(*given[0], **given[1])
        made = _constant(module, known[node].contiguous(), node)
        known[made] = known[node]
        made.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)


def _softmax_last(graph: Any) -> None:
    """Softmax over the last axis, which is the operator that TensorFlow Lite has."""
    import torch

    aten = cast("Any", torch.ops.aten)
    for node in list(graph.nodes):
        if node.target is not aten.softmax.int:
            continue
        rank, shape = len(_shape(node)), list(_shape(node))
        axis = node.args[1] % rank
        if axis == rank - 1:
            continue
        shape[axis], shape[-1] = shape[-1], shape[axis]
        with graph.inserting_before(node):
            turned = _like(graph, node, aten.transpose.int, (node.args[0], axis, rank - 1), shape)
            made = _like(graph, node, aten.softmax.int, (turned, rank - 1), shape)
            back = _like(graph, node, aten.transpose.int, (made, axis, rank - 1))
        node.replace_all_uses_with(back)
        graph.erase_node(node)


def _linear(module: Any) -> None:
    """A constant matrix times a tensor as the linear layer that it is: its weights are quantized as weights are."""
    import torch

    aten, graph = cast("Any", torch.ops.aten), module.graph
    for node in list(graph.nodes):
        if node.target is not aten.matmul.default:
            continue
        weight, given = _held(module, node.args[0]), node.args[1]
        if weight is None or weight.dim() != 2 or len(_shape(given)) < 3:
            continue
        shape, rank = _shape(given), len(_shape(given))
        turned_shape = (*shape[:-2], shape[-1], shape[-2])
        with graph.inserting_before(node):
            if given.target is aten.transpose.int and {a % rank for a in given.args[1:]} == {rank - 2, rank - 1}:
                turned = given.args[0]
            else:
                turned = _like(graph, node, aten.transpose.int, (given, rank - 2, rank - 1), turned_shape)
            product = _like(
                graph, node, aten.linear.default, (turned, node.args[0]), (*turned_shape[:-1], weight.shape[0])
            )
            if weight.shape[0] == 1:
                back = _like(graph, node, aten.reshape.default, (product, list(_shape(node))))
            else:
                back = _like(graph, node, aten.transpose.int, (product, rank - 2, rank - 1))
        node.replace_all_uses_with(back)
        graph.erase_node(node)


def _compressed(factors: Array) -> Array:
    """With one value along each axis along which all are the same."""
    for axis in range(factors.ndim):
        first = np.take(factors, [0], axis)
        if (factors == first).all():
            factors = first
    return factors


def _times(module: Any, node: Any, factors: Array, before: Any) -> Any:
    """A node of `node` times `factors` (of its rank), multiplied as early as it can be: before values are joined that
    have a scale of their own, before sums of cells, whose size differs by the level, and into constants and weights."""
    import torch

    aten, graph = cast("Any", torch.ops.aten), module.graph
    factors = _compressed(factors)
    if (factors == 1).all():
        return node
    shape = _shape(node)
    if node.target is aten.cat.default:
        parts, axis = list(node.args[0]), (node.args[1] if len(node.args) > 1 else 0) % len(shape)
        ends = np.cumsum([_shape(p)[axis] for p in parts])[:-1]
        whole = np.broadcast_to(factors, [shape[n] if n == axis else f for n, f in enumerate(factors.shape)])
        split = np.split(whole, ends, axis)
        scaled = [_times(module, p, f, before) for p, f in zip(parts, split, strict=True)]
        with graph.inserting_before(before):
            return _like(graph, node, node.target, (scaled, axis))
    if node.target in (aten.view.default, aten.reshape.default, aten.flatten.using_ints):
        inner = _compressed(np.broadcast_to(factors, shape).reshape(_shape(node.args[0])))
        scaled = _times(module, node.args[0], inner, before)
        with graph.inserting_before(before):
            return _like(graph, node, node.target, (scaled, *node.args[1:]))
    if node.target in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        sides = [_side(module, a) for a in node.args[:2]]
        shapes = [_shape(a) if held is None else None for a, held in zip(node.args, sides, strict=False)]
        if node.target is aten.mul.Tensor and (shapes[0] is None) != (shapes[1] is None):
            given, held = (node.args[0], sides[1]) if shapes[1] is None else (node.args[1], sides[0])
            if _shape(given) == shape:
                return _times(module, given, held * factors, before)
        if node.target is aten.mul.Tensor and shapes == [shape, shape]:
            scaled = _times(module, node.args[0], factors, before)
            with graph.inserting_before(before):
                return _like(graph, node, node.target, (scaled, node.args[1]))
        if node.target is not aten.mul.Tensor and len(node.args) == 2 and all(s in (None, shape) for s in shapes):
            parts = [
                _times(module, a, factors, before)
                if held is None
                else _constant(module, torch.from_numpy(_compressed(held * factors).astype(np.float32)), before)
                for a, held in zip(node.args, sides, strict=True)
            ]
            with graph.inserting_before(before):
                return _like(graph, node, node.target, tuple(parts))
    if node.target is aten.conv2d.default and factors.size == factors.shape[1]:
        weight, bias = (_held(module, a) for a in (node.args[1], node.args[2] if len(node.args) > 2 else None))
        if weight is not None and bias is not None and len(node.users) == 1:
            by_channel = torch.from_numpy(np.broadcast_to(factors, (1, shape[1], 1, 1)).astype(np.float32)).reshape(-1)
            made = [
                _constant(module, w.detach() * by_channel.reshape(-1, *[1] * (w.dim() - 1)), before)
                for w in (weight, bias)
            ]
            with graph.inserting_before(before):
                return _like(graph, node, node.target, (node.args[0], *made, *node.args[3:]))
    constant = _constant(module, torch.from_numpy(factors.astype(np.float32)), before)
    with graph.inserting_before(before):
        return _like(graph, node, aten.mul.Tensor, (node, constant))


def _side(module: Any, argument: Any) -> Array | None:
    """An operand that is a constant; None of one that is computed."""
    if isinstance(argument, (int, float)):
        return np.asarray(float(argument))
    held = _held(module, argument)
    return None if held is None else held.detach().double().numpy()

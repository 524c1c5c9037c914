"""An ML Program's operators, computed one by one with PyTorch as MIL (iOS 15, 16) defines them."""
# pyright: reportUnknownMemberType=false
# (torch's from_numpy and nn.functional have no types)

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from exporters.coreml.read import AGAIN, FAILURES, File
from exporters.errors import ArtifactError, NotSupported, first_line
from exporters.session import Array

_builtin: Any = importlib.import_module("coremltools.converters.mil.mil.types")
TYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
MAXIMA = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
MEANS = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


class Given:
    """What one operator is given by name: tensors, those in FP16 as FP32, and plain values.

    Raises:
        NotSupported: a value that decides how an operator computes is itself computed from the feeds.
    """

    def __init__(self, kind: str, values: Mapping[str, Any]) -> None:
        self.kind, self.values = kind, values

    def __call__(self, name: str) -> Tensor:
        return _tensor(self.values[name])

    def maybe(self, name: str) -> Tensor | None:
        """A tensor that need not be there."""
        return None if self.values.get(name) is None else _tensor(self.values[name])

    def all(self, name: str) -> list[Tensor]:
        """Several tensors under one name."""
        return [_tensor(v) for v in self.values[name]]

    def plain(self, name: str, default: Any = None) -> Any:
        """A constant: a number, a word, or an array as a list; `default` where it is left out."""
        value = self.values.get(name)
        if value is None:
            return default
        return cast("Any", value).tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value

    def refuse(self, what: str) -> NotSupported:
        """This operator in a form that is not computed here."""
        return NotSupported(f"exportgate does not compute the operator {self.kind} with {what}")


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.from_numpy(np.array(value))
    return value.float() if value.dtype == torch.float16 else value


# ---- shared with the layers of a NeuralNetwork -----------------------------------------------------------------------


def same_padding(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], more_at_end: bool
) -> list[int]:
    """Begin and end of each axis, so that an axis of n values gives ceil(n / stride) of them."""
    made: list[int] = []
    for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        made += [total // 2, total - total // 2] if more_at_end else [total - total // 2, total // 2]
    return made


def pad(x: Tensor, amounts: Sequence[int], value: float = 0.0, mode: str = "constant") -> Tensor:
    """Begin and end of each of the last axes, in the order of the axes (PyTorch's begins with the last)."""
    if not any(amounts):
        return x
    pairs = [amounts[n : n + 2] for n in range(0, len(amounts), 2)]
    turned = [int(v) for pair in reversed(pairs) for v in pair]
    return functional.pad(x, turned, mode, value) if mode == "constant" else functional.pad(x, turned, mode)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    amounts: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution over the last axes of (N, C, ...)."""
    work = cast("Any", CONVOLUTIONS[weight.ndim - 3])
    return work(pad(x, amounts), weight, bias, list(strides), 0, list(dilations), groups)


def convolve_transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    amounts: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    """A transposed convolution; `amounts` are cut off begin and end of each axis of what it gives."""
    work = cast("Any", TRANSPOSED[weight.ndim - 3])
    made: Tensor = work(x, weight, bias, list(strides), 0, 0, groups, list(dilations))
    for n, axis in enumerate(range(2, made.ndim)):
        begin, end = amounts[2 * n], amounts[2 * n + 1]
        made = made.narrow(axis, begin, made.shape[axis] - begin - end)
    return made


def pool(
    x: Tensor, kind: str, kernel: Sequence[int], strides: Sequence[int], amounts: Sequence[int], counts_padding: bool
) -> Tensor:
    """Maxima ("max") or means ("avg") over windows; what was padded counts as zeros of a mean, or not at all."""
    at = len(kernel) - 1
    if kind == "max":
        return cast("Any", MAXIMA[at])(pad(x, amounts, float("-inf")), list(kernel), list(strides))
    means = cast("Any", MEANS[at])
    made: Tensor = means(pad(x, amounts), list(kernel), list(strides))
    if counts_padding or not any(amounts):
        return made
    return made / means(pad(torch.ones_like(x[:1, :1]), amounts), list(kernel), list(strides))


def sliced(
    x: Tensor,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int],
    from_begin: Sequence[bool],
    to_end: Sequence[bool],
    squeeze: Sequence[bool],
) -> Tensor:
    """numpy's x[begin:end:stride] of every axis; of one that is squeezed the value at `begin`."""
    places = tuple(
        b if one else slice(None if first else b, None if last else e, s)
        for b, e, s, first, last, one in zip(begin, end, stride, from_begin, to_end, squeeze, strict=True)
    )
    return torch.from_numpy(np.ascontiguousarray(x.numpy()[places]))  # torch has no negative strides


def repeated(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Each value of the last axes so many times: upsampling to the nearest neighbour by whole factors."""
    for axis, factor in zip(range(-len(factors), 0), factors, strict=True):
        x = x.repeat_interleave(factor, axis)
    return x


# ---- operators -------------------------------------------------------------------------------------------------------

Made = Tensor | Sequence[Tensor]


def _window(g: Given, kernel: Sequence[int], dilations: Sequence[int], strides: Sequence[int]) -> list[int]:
    kind, axes = g.plain("pad_type", "valid"), len(kernel)
    if kind == "valid":
        return [0] * 2 * axes
    if kind == "custom":
        return [int(n) for n in g.plain("pad", [0] * 2 * axes)]
    if kind not in ("same", "same_lower"):
        raise g.refuse(f"pad_type {kind}")
    return same_padding(g("x").shape[2:], kernel, strides, dilations, kind == "same")


def _conv(g: Given) -> Tensor:
    weight = g("weight")
    kernel = list(weight.shape[2:])
    strides, dilations = (g.plain(n, [1] * len(kernel)) for n in ("strides", "dilations"))
    amounts = _window(g, kernel, dilations, strides)
    return convolve(g("x"), weight, g.maybe("bias"), strides, amounts, dilations, g.plain("groups", 1))


def _conv_transpose(g: Given) -> Tensor:
    weight = g("weight")
    axes = weight.ndim - 2
    strides, dilations = (g.plain(n, [1] * axes) for n in ("strides", "dilations"))
    if g.plain("pad_type", "valid") not in ("valid", "custom"):
        raise g.refuse(f"pad_type {g.plain('pad_type')}")
    amounts = _window(g, list(weight.shape[2:]), dilations, strides)
    made = convolve_transposed(g("x"), weight, g.maybe("bias"), strides, amounts, dilations, g.plain("groups", 1))
    wanted = g.plain("output_shape", list(made.shape))
    if list(wanted)[2:] != list(made.shape)[2:]:
        raise g.refuse(f"output_shape {wanted}, and its padding gives {list(made.shape)}")
    return made


def _pool(kind: str) -> Callable[[Given], Tensor]:
    def work(g: Given) -> Tensor:
        kernel = g.plain("kernel_sizes")
        strides = g.plain("strides", [1] * len(kernel))
        if g.plain("ceil_mode", False):
            raise g.refuse("ceil_mode")
        amounts = _window(g, kernel, [1] * len(kernel), strides)
        return pool(g("x"), kind, kernel, strides, amounts, not g.plain("exclude_padding_from_average", False))

    return work


def _matmul(g: Given) -> Tensor:
    x, y = g("x"), g("y")
    x = x.transpose(-1, -2) if g.plain("transpose_x", False) else x
    return x @ (y.transpose(-1, -2) if g.plain("transpose_y", False) else y)


def _batch_norm(g: Given) -> Tensor:
    return functional.batch_norm(
        g("x"), g("mean"), g("variance"), g.maybe("gamma"), g.maybe("beta"), eps=g.plain("epsilon", 1e-5)
    )


def _instance_norm(g: Given) -> Tensor:
    return functional.instance_norm(g("x"), weight=g.maybe("gamma"), bias=g.maybe("beta"), eps=g.plain("epsilon", 1e-5))


def _layer_norm(g: Given) -> Tensor:
    x = g("x")
    axes = sorted(n % x.ndim for n in g.plain("axes", range(x.ndim)))
    if axes != list(range(axes[0], x.ndim)):
        raise g.refuse(f"axes {axes} of {x.ndim}")
    return functional.layer_norm(
        x, list(x.shape[axes[0] :]), g.maybe("gamma"), g.maybe("beta"), g.plain("epsilon", 1e-5)
    )


def _concat(g: Given) -> Tensor:
    if g.plain("interleave", False):
        raise g.refuse("interleave")
    return torch.cat(g.all("values"), int(g.plain("axis")))


def _split(g: Given) -> list[Tensor]:
    x, axis = g("x"), int(g.plain("axis"))
    sizes = g.plain("split_sizes")
    if sizes is None:
        count = int(g.plain("num_splits"))
        sizes = [x.shape[axis] // count] * count
    return list(cast("Sequence[Tensor]", x.split([int(n) for n in sizes], axis)))


def _reshape(g: Given) -> Tensor:
    x = g("x")
    return x.reshape([x.shape[n] if size == 0 else int(size) for n, size in enumerate(g.plain("shape"))])


def _slice_by_index(g: Given) -> Tensor:
    x = g("x")
    masks = [g.plain(n, [False] * x.ndim) for n in ("begin_mask", "end_mask", "squeeze_mask")]
    return sliced(x, g.plain("begin"), g.plain("end"), g.plain("stride", [1] * x.ndim), *masks)


def _slice_by_size(g: Given) -> Tensor:
    x = g("x")
    for axis, (begin, size) in enumerate(zip(g.plain("begin"), g.plain("size"), strict=True)):
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def _pad(g: Given) -> Tensor:
    mode = g.plain("mode", "constant")
    if mode not in ("constant", "reflect", "replicate"):
        raise g.refuse(f"mode {mode}")
    return pad(g("x"), g.plain("pad"), g.plain("constant_val", 0.0), mode)


def _upsample(g: Given) -> Tensor:
    factors = [g.plain(f"scale_factor_{n}", 1) for n in ("height", "width")]
    if any(f != int(f) for f in factors):
        raise g.refuse(f"the factors {factors}")
    return repeated(g("x"), [int(f) for f in factors])


def _squeeze(g: Given) -> Tensor:
    x, axes = g("x"), g.plain("axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _expand_dims(g: Given) -> Tensor:
    x, axes = g("x"), g.plain("axes")
    for axis in sorted(n % (x.ndim + len(axes)) for n in axes):
        x = x.unsqueeze(axis)
    return x


def _gelu(g: Given) -> Tensor:
    mode = g.plain("mode", "EXACT")
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise g.refuse(f"mode {mode}")
    return functional.gelu(g("x"), approximate="none" if mode == "EXACT" else "tanh")


def _of_x(work: Callable[[Tensor], Tensor]) -> Callable[[Given], Tensor]:
    return lambda g: work(g("x"))


def _of_two(work: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Given], Tensor]:
    return lambda g: work(g("x"), g("y"))


def _reduced(work: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Given], Tensor]:
    def made(g: Given) -> Tensor:
        x = g("x")
        return work(x, list(g.plain("axes", range(x.ndim))), bool(g.plain("keep_dims", False)))

    return made


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((n % x.ndim for n in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


OPERATORS: Mapping[str, Callable[[Given], Made]] = {
    "add": _of_two(torch.add),
    "sub": _of_two(torch.sub),
    "mul": _of_two(torch.mul),
    "real_div": _of_two(torch.true_divide),
    "floor_div": _of_two(torch.floor_divide),
    "mod": _of_two(torch.remainder),
    "pow": _of_two(torch.pow),
    "maximum": _of_two(torch.maximum),
    "minimum": _of_two(torch.minimum),
    "equal": _of_two(torch.eq),
    "not_equal": _of_two(torch.ne),
    "greater": _of_two(torch.gt),
    "greater_equal": _of_two(torch.ge),
    "less": _of_two(torch.lt),
    "less_equal": _of_two(torch.le),
    "logical_and": _of_two(torch.logical_and),
    "logical_or": _of_two(torch.logical_or),
    "logical_not": _of_x(torch.logical_not),
    "select": lambda g: torch.where(g("cond").bool(), g("a"), g("b")),
    "identity": _of_x(lambda x: x),
    "cast": _of_x(lambda x: x),  # to the type of what it gives, which every result is rounded to
    "abs": _of_x(torch.abs),
    "ceil": _of_x(torch.ceil),
    "floor": _of_x(torch.floor),
    "sign": _of_x(torch.sign),
    "square": _of_x(torch.square),
    "sqrt": _of_x(torch.sqrt),
    "rsqrt": lambda g: torch.rsqrt(g("x") + g.plain("epsilon", 1e-12)),
    "inverse": lambda g: torch.reciprocal(g("x") + g.plain("epsilon", 1e-4)),
    "exp": _of_x(torch.exp),
    "exp2": _of_x(torch.exp2),
    "log": lambda g: torch.log(g("x") + g.plain("epsilon", 1e-45)),
    "erf": _of_x(torch.erf),
    "sin": _of_x(torch.sin),
    "cos": _of_x(torch.cos),
    "tan": _of_x(torch.tan),
    "atan": _of_x(torch.atan),
    "tanh": _of_x(torch.tanh),
    "sigmoid": _of_x(torch.sigmoid),
    "silu": _of_x(functional.silu),
    "relu": _of_x(torch.relu),
    "relu6": _of_x(functional.relu6),
    "softplus": _of_x(functional.softplus),
    "softsign": _of_x(functional.softsign),
    "gelu": _gelu,
    "clip": lambda g: g("x").clamp(g.plain("alpha"), g.plain("beta")),
    "leaky_relu": lambda g: functional.leaky_relu(g("x"), g.plain("alpha", 0.01)),
    "elu": lambda g: functional.elu(g("x"), g.plain("alpha", 1.0)),
    "prelu": lambda g: functional.prelu(g("x"), g("alpha")),
    "sigmoid_hard": lambda g: (g("x") * g.plain("alpha", 0.2) + g.plain("beta", 0.5)).clamp(0, 1),
    "linear_activation": lambda g: g("x") * g.plain("alpha", 1.0) + g.plain("beta", 0.0),
    "softmax": lambda g: g("x").softmax(int(g.plain("axis", -1))),
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": lambda g: functional.linear(g("x"), g("weight"), g.maybe("bias")),
    "matmul": _matmul,
    "max_pool": _pool("max"),
    "avg_pool": _pool("avg"),
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "reduce_mean": _reduced(lambda x, axes, keep: x.mean(axes, keep)),
    "reduce_sum": _reduced(lambda x, axes, keep: x.sum(axes, keep)),
    "reduce_max": _reduced(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_min": _reduced(lambda x, axes, keep: x.amin(axes, keep)),
    "reduce_prod": _reduced(_product),
    "reduce_argmax": lambda g: g("x").argmax(int(g.plain("axis", -1)), bool(g.plain("keep_dims", False))),
    "concat": _concat,
    "stack": lambda g: torch.stack(g.all("values"), int(g.plain("axis"))),
    "split": _split,
    "reshape": _reshape,
    "transpose": lambda g: g("x").permute(g.plain("perm")),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "tile": lambda g: g("x").tile(g.plain("reps")),
    "pad": _pad,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "upsample_nearest_neighbor": _upsample,
}
LABELS = "classify"  # which gives probabilities their names, and computes nothing


class Program:
    """The main function of an ML Program.

    Every operator is computed in FP32 and its result then rounded to the type that the program gives it. That is what
    FP16 hardware does at best, which sums up in FP32 and rounds once; PyTorch's own FP16 kernels on a CPU do the same
    for some operators only. So the file is judged, and not one processor's order of sums.

    Raises:
        ArtifactError: see `File.main`.
        NotSupported: an operator that is not known here, by name.
    """

    def __init__(self, file: File) -> None:
        self.file, self.main = file, file.main
        self.constants: dict[int, Any] = {}
        self.operations: list[Any] = []
        for op in self.main.operations:
            if op.op_type == "const" or op.op_type.startswith("constexpr_"):
                self.constants[id(op.outputs[0])] = self._constant(op)
            elif op.op_type != LABELS:
                self.operations.append(op)
        unknown = sorted({op.op_type for op in self.operations} - OPERATORS.keys())
        if unknown:
            raise NotSupported(f"exportgate does not compute the operators {', '.join(unknown)} of '{file.path}'")
        # What is not needed any more after each operator: of a large model all values are many times its outputs.
        wanted = {id(var) for var in self.main.outputs} | {id(self.probabilities(op)) for op in self.main.operations}
        last = {id(var): n for n, op in enumerate(self.operations) for var in _vars(op)}
        self.done: list[list[int]] = [[] for _ in self.operations]
        for key, n in last.items():
            if key not in wanted and key not in self.constants:
                self.done[n].append(key)

    def probabilities(self, op: Any) -> Any:
        """What a classifier's last operator takes; None of any other operator."""
        return op.inputs["probabilities"] if op.op_type == LABELS else None

    def _constant(self, op: Any) -> Any:
        """A constant's value; of weights in 8 bits what they stand for."""
        try:
            value: Any = op.outputs[0].val if op.op_type == "const" else op.materialized_val_inference()
        except FAILURES as error:
            what = f"its constant {op.outputs[0].name} cannot be read ({first_line(error)})"
            raise ArtifactError(f"'{self.file.path}': {what}", AGAIN) from None
        array: Any = np.array(value)
        if array.dtype.kind not in "fiub":  # a word
            return value
        return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)

    @torch.inference_mode()
    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by the program's names, in its types; of a classifier its probabilities, (1, classes).

        Raises:
            ArtifactError: operators that do not fit each other, or give another shape than the program says.
            NotSupported: a form of an operator that is not computed here.
        """
        values: dict[int, Any] = dict(self.constants)
        for name, var in self.main.inputs.items():
            values[id(var)] = torch.from_numpy(np.array(feeds[name])).to(_type(var))
        for op, done in zip(self.operations, self.done, strict=True):
            made = self._computed(op, values)
            for var, value in zip(op.outputs, made, strict=True):
                said = [int(cast("int", n)) if isinstance(n, (int, np.integer)) else None for n in var.shape]
                if len(said) != value.ndim or any(n not in (None, m) for n, m in zip(said, value.shape, strict=True)):
                    raise ArtifactError(
                        f"'{self.file.path}': {op.op_type} {op.name} gives {list(value.shape)}, and says {said}", AGAIN
                    )
                values[id(var)] = value.to(_type(var))
            for key in done:
                del values[key]
        ends = [self.probabilities(op) for op in self.main.operations if op.op_type == LABELS]
        return {str(var.name): values[id(var)].numpy() for var in (ends or self.main.outputs)}

    def _computed(self, op: Any, values: Mapping[int, Any]) -> Sequence[Tensor]:
        given: dict[str, Any] = {}
        for name, var in op.inputs.items():
            if isinstance(var, (list, tuple)):
                given[name] = [values[id(v)] for v in cast("Sequence[Any]", var)]
            elif var is not None:
                given[name] = values[id(var)]
        try:
            made = OPERATORS[op.op_type](Given(op.op_type, given))
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            what = f"{op.op_type} {op.name} cannot be computed ({first_line(error)})"
            raise ArtifactError(f"'{self.file.path}': {what}", AGAIN) from error
        return [made] if isinstance(made, Tensor) else made


def _vars(op: Any) -> list[Any]:
    """All values that an operator takes."""
    found: list[Any] = []
    for var in op.inputs.values():
        found += list(cast("Sequence[Any]", var)) if isinstance(var, (list, tuple)) else [var]
    return [var for var in found if var is not None]


def _type(var: Any) -> torch.dtype:
    name = str(_builtin.builtin_to_string(var.dtype))
    if name not in TYPES:
        raise NotSupported(f"exportgate does not compute values of type {name}, as {var.name} is")
    return TYPES[name]

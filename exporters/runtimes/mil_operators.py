"""Operators of MIL (iOS 15, 16), Core ML's intermediate language, each as a function of what it is given."""
# pyright: reportUnknownMemberType=false
# (torch's from_numpy and nn.functional have no types)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from exporters.errors import NotSupported
from exporters.runtimes.kernels import convolve, convolve_transposed, pad, pool, repeated, same_padding, sliced


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

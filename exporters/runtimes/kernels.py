"""Convolutions, windows and slices as Core ML pads and places them, for both kinds of its files."""
# pyright: reportUnknownMemberType=false
# (torch's from_numpy and nn.functional have no types)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
MAXIMA = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
MEANS = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


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

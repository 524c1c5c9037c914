"""Weights as a file holds them, for formats whose files can be read where nothing runs them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from exporters.arrays import Array
from exporters.errors import ArtifactError

# What a file that nothing runs must have as many of as the model, by the names of ATen and of Core ML. A SiLU is a
# product with a sigmoid, and is written as either.
COUNTED: Mapping[str, str] = {
    **{f"conv{turned}{n}d": "convolution" for turned in ("", "_transpose") for n in (1, 2, 3)},
    **{word: "convolution" for word in ("convolution", "conv", "conv_transpose")},
    **{word: word for word in ("sigmoid", "relu", "leaky_relu", "tanh", "max_pool")},
    **{"silu": "sigmoid", "ReLU": "relu", "leakyReLU": "leaky_relu", "max_pool2d": "max_pool"},
    "max_pool2d_with_indices": "max_pool",
}


@dataclass(frozen=True)
class Weight:
    """A weight's values as they are computed with (FP32), and how they are stored.

    `step` and `rounding` are broadcast to the values: half a step of whole numbers (0 where values are stored as they
    are), and how far rounding to the file's floating point may move a value. `table` holds the entries that a value
    may have, in ascending order, where it is one of a table.
    """

    values: Array
    step: Array
    rounding: Array
    table: Array | None = None


@dataclass(frozen=True)
class Parameters:
    """A model's parameters as exporters fold them.

    `used` names those of convolutions and matrix products: weights, and biases that are not 0. `slack` is how far those
    that a normalization was folded into may differ at each value, in FP32. `others` names parameters of other layers.
    `counts` says how much of each kind in COUNTED is computed; the same of the same values counts once.
    """

    values: Mapping[str, Array]
    used: tuple[str, ...]
    slack: Mapping[str, Array]
    others: tuple[str, ...]
    counts: Mapping[str, int]


def by_short(names: Iterable[str], where: str) -> dict[str, str]:
    """Names by what `short` makes of them.

    Raises:
        ArtifactError: it makes the same of two.
    """
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(short(name), name)) != name:
            raise ArtifactError(
                f"{where}: '{other}' and '{name}' are told apart by signs alone, which formats write differently",
                "rename one of them",
            )
    return found


def short(name: str) -> str:
    """A parameter's name in letters and digits alone, since files write ".", "/" or "_" between modules."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name)

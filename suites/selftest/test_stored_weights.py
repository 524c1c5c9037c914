"""Weights read back from a file: what 8 bits may cost, and files whose own scale or table asks for too little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporters.errors import ArtifactError
from exporters.weights import Weight, by_short
from suites.conformance.test_weights import compare

Array = np.ndarray[Any, Any]
WANT = np.random.default_rng(0).normal(size=(16, 300)).astype(np.float32)
LARGEST = np.abs(WANT).max()
NONE = np.zeros((1, 1), np.float32)


def linear(levels: int, widest: float = LARGEST) -> Weight:
    """Whole numbers of -levels to levels, and a scale."""
    scale = np.full((1, 1), widest / levels, np.float32)
    return Weight(np.clip(np.round(WANT / scale), -levels, levels) * scale, scale / 2, NONE)


def tabled(table: Array) -> Weight:
    """The nearest entry of a table."""
    table = np.sort(table.astype(np.float32))
    return Weight(table[np.abs(WANT[..., None] - table).argmin(-1)], NONE, NONE, table)


EQUAL = np.linspace(WANT.min(), WANT.max(), 256)


def test_eight_bits_pass() -> None:
    """The nearest whole number or entry is half a step off at most, and some are nearly that."""
    for weight in (linear(127), tabled(EQUAL)):
        assert 0.9 < compare("w", WANT, weight, NONE) <= 1


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (linear(7), "values of weight w are not"),
        (linear(63), "values of weight w are not"),
        (Weight(0 * WANT, np.full((1, 1), LARGEST, np.float32), NONE), "values of weight w are not"),
        (tabled(EQUAL[:: 255 // 15]), "the table of weight w is coarser than 8 bits"),
        (tabled(EQUAL[[0, -1]]), "the table of weight w is coarser than 8 bits"),
        (Weight(WANT + np.float32(1e-3), NONE, NONE), "values of weight w are not"),
        (Weight(np.where(WANT.max() == WANT, WANT.min(), tabled(EQUAL).values), NONE, NONE, EQUAL), "1 of 4800"),
    ],
    ids=["4 bits", "7 bits", "no bits, a large scale", "16 entries", "2 entries", "FP32 moved", "an entry far off"],
)
def test_less_is_seen(weight: Weight, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        compare("w", WANT, weight, NONE)


def test_names_that_differ_by_signs_alone_are_not_mixed_up() -> None:
    assert by_short(["conv.1.weight", "conv.2.weight"], "here") == {
        "conv_1_weight": "conv.1.weight",
        "conv_2_weight": "conv.2.weight",
    }
    with pytest.raises(ArtifactError, match=r"'conv\.1\.weight' and 'conv_1\.weight' are told apart by signs"):
        by_short(["conv.1.weight", "conv_1.weight"], "here")

"""Weights: where a file can be read without being run, those that it holds are the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from exporters import formats
from exporters.errors import NotSupported
from exporters.session import Array
from exporters.weights import Weight, by_short, short
from suites.support.bench import Bench

LEVELS = 254  # that 8 bits have around 0: half a step is a 254th of the largest value
SCALE = 1 + 2.0**-9  # a scale may be held in FP16


def test_weights_match_the_checkpoint(case: Bench) -> None:
    """Every weight in the file is the checkpoint's within half a step of what it is stored in, none is missing, and
    there are as many convolutions and activations of each kind as in the model."""
    entry = formats.get(case.spec.format)
    if entry.weights is None:
        raise NotSupported(f"what a {entry.title} file holds is judged by what it computes")
    stored, parameters = case.weights(), case.parameters()
    names = by_short(stored, f"'{case.artifact().path}'")
    known = by_short(parameters.values, f"model '{case.model.name}'")
    if case.brought is not None and not names.keys() & known.keys():  # of a module that others put around it
        prefix = next((n.removesuffix(k) for k in known for n in names if n.endswith(f"_{k}")), "")
        names = {n.removeprefix(prefix): name for n, name in names.items()}
    missing = [name for name in parameters.used if short(name) not in names]
    assert not missing, f"{len(missing)} parameters of the checkpoint are not in the file: {', '.join(missing[:5])}"
    furthest = 0.0
    for key in names.keys() & known.keys():
        slack = parameters.slack.get(known[key], np.zeros(1, np.float32))
        furthest = max(furthest, compare(known[key], parameters.values[known[key]], stored[names[key]], slack))
    strangers = [name for key, name in names.items() if key not in known]
    others = [name for name in parameters.others if short(name) not in names]
    compared = len(names) - len(strangers)
    case.evidence["weights"] = {"compared": compared, "strangers": strangers, "furthest": furthest}
    assert compared, f"none of the file's {len(names)} weights has the name of a parameter"
    counts = case.facts().achieved.counts
    computed = {k.removeprefix("of kind "): n for k, n in counts.items() if k.startswith("of kind ")}
    # What multiplies by the weights of other layers (a decode's) may be written as a convolution, too.
    more = sum(short(name) in names for name in parameters.others) if case.brought is not None else 0
    as_convolutions = {**parameters.counts, "convolution": parameters.counts.get("convolution", 0) + more}
    assert computed in (parameters.counts, as_convolutions), (
        f"the file computes {_said(computed)}, and the model {_said(parameters.counts)}"
    )
    if strangers:
        raise NotSupported(
            f"{compared} weights are the checkpoint's, and {len(strangers)} are of no one parameter, which the "
            f"converter computed: {', '.join(strangers[:5])}"
        )
    if others:
        raise NotSupported(
            f"{compared} weights are the checkpoint's, and {len(others)} parameters of other layers are not read back: "
            f"{', '.join(others[:5])}"
        )


def _largest(values: Array, shape: tuple[int, ...]) -> Array:
    """The largest value of each channel that has a scale of its own, or of all, broadcast to the values."""
    joined = tuple(n for n, size in enumerate(shape) if size == 1)
    # A scale for each block of a channel is repeated for its values: then no axis tells which are one block.
    return np.abs(values).max(joined or None, initial=0.0, keepdims=True)


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {word}" for word, n in sorted(counts.items())) or "none"


def compare(name: str, want: Array, weight: Weight, slack: Array) -> float:
    """How much of what it may differ by a weight does, at most; it fails where that is more than 1."""
    got = weight.values.astype(np.float64)
    assert got.size == want.size, f"weight {name} has {got.size} values, expected {want.size}"
    more = slack.reshape(got.shape) if slack.size == got.size else slack
    want = want.reshape(got.shape).astype(np.float64)
    off, rounding = np.abs(got - want), weight.rounding.astype(np.float64) + more
    if weight.table is not None:  # the nearest entry stands for a value
        table = weight.table.astype(np.float64)
        after = np.clip(np.searchsorted(table, want), 1, max(len(table) - 1, 1))
        ends = (table[after - 1], table[np.minimum(after, len(table) - 1)])
        allowed = np.minimum(*(np.abs(want - end) for end in ends)) + rounding
    else:
        # By the checkpoint, too: a file with a larger scale than its values need holds fewer than 8 bits of them.
        finest = _largest(want, weight.step.shape) / LEVELS * SCALE
        allowed = np.minimum(weight.step.astype(np.float64), finest) + rounding
    allowed = np.broadcast_to(allowed, got.shape) * (1 + 2.0**-20)  # the sum and the difference are rounded, too
    wrong = ~(off <= allowed)
    if wrong.any():
        at = np.unravel_index(int(np.argmax(np.where(wrong, off, -1.0))), got.shape)
        raise AssertionError(
            f"{int(wrong.sum())} of {got.size} values of weight {name} are not the checkpoint's: at "
            f"{[int(n) for n in at]} {got[at]:.6g}, expected {want[at]:.6g} within {allowed[at]:.2g}"
        )
    if weight.table is not None:
        # 256 equal steps are one such table, whose entries are nowhere farther off than this.
        most = np.ptp(want) / 510 + float(rounding.max(initial=0.0))
        mean = float(np.sqrt(np.mean(off**2)))
        assert mean <= most, f"the table of weight {name} is coarser than 8 bits: {mean:.2g} off, at most {most:.2g}"
    return float((off / np.maximum(allowed, 1e-30)).max(initial=0.0))

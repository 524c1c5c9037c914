"""Weights: where a file can be read without being run, those that it holds are the checkpoint's."""

from __future__ import annotations

import numpy as np

from exporters import formats
from exporters.errors import NotSupported
from exporters.session import Array
from exporters.weights import Weight, short
from suites.support.bench import Bench

# FP32 arithmetic of a folded normalization, gain / sqrt(variance + eps) times weight: four operations, each of which
# rounds by 2^-24; of a bias the difference of two such products.
FOLDED = 16 * 2.0**-24


def test_weights_match_the_checkpoint(case: Bench) -> None:
    """Every weight in the file is the checkpoint's within half a step of what it is stored in; none is missing."""
    entry = formats.get(case.spec.format)
    if entry.weights is None:
        raise NotSupported(f"what a {entry.title} file holds is judged by what it computes")
    stored = {short(name): (name, weight) for name, weight in case.weights().items()}
    parameters, used, folded = case.parameters()
    known = {short(name): name for name in parameters}
    slack = {short(name) for name in folded} | {short(name.replace(".weight", ".bias")) for name in folded}
    missing = [name for name in used if short(name) not in stored]
    assert not missing, f"{len(missing)} weights of the checkpoint are not in the file: {', '.join(missing[:5])}"
    furthest = 0.0
    for key, (_, weight) in stored.items():
        if key in known:
            share = _check(known[key], parameters[known[key]], weight, key in slack)
            furthest = max(furthest, share)
    strangers = [name for key, (name, _) in stored.items() if key not in known]
    compared = len(stored) - len(strangers)
    case.evidence["weights"] = {"compared": compared, "strangers": strangers, "furthest": furthest}
    assert compared, f"none of the file's {len(stored)} weights has the name of a parameter"
    if strangers:
        raise NotSupported(
            f"{compared} weights are the checkpoint's, and {len(strangers)} are of no one parameter, which the "
            f"converter computed: {', '.join(strangers[:5])}"
        )


def _check(name: str, want: Array, weight: Weight, folded: bool) -> float:
    """How much of what it may differ by a weight does, at most; it fails where that is more than 1."""
    got = weight.values
    assert got.size == want.size, f"weight {name} has {got.size} values, expected {want.size}"
    want = want.reshape(got.shape)
    largest = float(np.abs(want).max(initial=0.0))
    allowed = np.broadcast_to(weight.within, got.shape).astype(np.float64)
    # The sum of what is allowed and the difference itself are rounded, too.
    allowed = allowed * (1 + 2.0**-20) + (FOLDED * largest if folded else 0.0)
    off = np.abs(got.astype(np.float64) - want)
    wrong = ~(off <= allowed)
    if wrong.any():
        at = np.unravel_index(int(np.argmax(np.where(wrong, off, -1.0))), got.shape)
        raise AssertionError(
            f"{int(wrong.sum())} of {got.size} values of weight {name} are not the checkpoint's: at "
            f"{[int(n) for n in at]} {got[at]:.6g}, expected {want[at]:.6g} within {allowed[at]:.2g}"
        )
    return float((off / np.maximum(allowed, 1e-30)).max(initial=0.0))

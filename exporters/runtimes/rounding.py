"""In which precision a runtime computes that does not tell, from what goes into one of its operators and comes out."""

from __future__ import annotations

import numpy as np

from exporters.session import Array


def rounding(given: Array, made: Array) -> tuple[float, float] | None:
    """How far the channels of `made` (n, c, ...) are from linear in those of `given`, and how far FP32 may be.

    The former is the largest residual of the best linear map, as a share of the sum of its terms' magnitudes; a sum of
    n terms in FP32 errs by at most n x 2^-24 of that (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
    Whatever the weights were stored in, one that rounds what goes into it to FP16, BF16 or 8 bits errs by hundreds of
    times as much. None where there are too few points to tell.
    """
    x, y = (np.moveaxis(a.astype(np.float64), 1, -1).reshape(-1, a.shape[1]) for a in (given, made))
    x = np.hstack([x, np.ones((len(x), 1))])
    if len(x) < 4 * x.shape[1]:
        return None
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    terms = np.maximum(abs(x) @ abs(weights), np.finfo(np.float32).tiny)
    return float(np.max(abs(x @ weights - y) / terms)), x.shape[1] * 2.0**-24

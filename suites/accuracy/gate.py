"""The verdict on a metric: what an artifact may lose of it, and whether these images are enough to tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from suites.accuracy.budget import Budget
from suites.accuracy.metrics import Evaluation
from suites.support.verdict import Verdict

CONFIDENCE = 0.95
LEAST_IMAGES = 30  # of which something can be lost: below, a percentile interval over images says too little
LEAST_METRIC = 0.05  # of the reference: what detects next to nothing has nothing to lose


@dataclass(frozen=True)
class Outcome:
    """Metric of an artifact beside its reference's on the same images.

    Attributes:
        change: the difference, or the share where the budget is one; `low` and `high` its interval over images.
        images: how many images there are, `telling` of them with something that could be lost.
    """

    artifact: Evaluation
    reference: Evaluation
    budget: Budget
    change: float
    low: float
    high: float
    images: int
    telling: int

    @property
    def verdict(self) -> Verdict:
        if self.reference.metric < LEAST_METRIC:
            return Verdict.INSENSITIVE
        least, most = self.bounds
        if self.high < least or self.low > most:
            return Verdict.FAIL
        enough = self.telling >= LEAST_IMAGES
        return Verdict.PASS if enough and self.low >= least and self.high <= most else Verdict.INCONCLUSIVE

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest change that the budget lets by."""
        return (self.budget.allowed, np.inf) if self.budget.is_share else (-self.budget.allowed, self.budget.allowed)

    def line(self) -> str:
        """What was found, and of an unclear outcome why, as one line."""
        name = next(iter(self.artifact.values))
        text = f"{name} {self.artifact.metric:.4f} where PyTorch has {self.reference.metric:.4f}: "
        text += (
            f"{'share' if self.budget.is_share else 'change'} {self.change:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"
        )
        text += f" over {self.images} images, allowed {self.budget.line()}"
        if self.verdict is Verdict.INSENSITIVE:
            text += f"; a reference below {LEAST_METRIC:g} has nothing to lose"
        elif self.verdict is Verdict.INCONCLUSIVE and self.telling < LEAST_IMAGES:
            text += f"; only {self.telling} of the images have objects, and {LEAST_IMAGES} are needed"
        elif self.verdict is Verdict.INCONCLUSIVE:
            text += "; the set is too small to tell: give more images"
        return text

    def to_dict(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "metric": next(iter(self.artifact.values)),
            "artifact": dict(self.artifact.values),
            "reference": dict(self.reference.values),
            "change": self.change,
            "low": self.low,
            "high": self.high,
            "allowed": self.budget.allowed,
            "share": self.budget.is_share,
            "images": self.images,
        }


def judge(artifact: Evaluation, reference: Evaluation, budget: Budget) -> Outcome:
    """Holds the metric of an artifact against the reference's, both of the same images.

    The interval is a percentile bootstrap over images, which both sides are drawn with alike: what an image's
    difficulty does to both is no difference between them.
    """

    def change(ours: float, theirs: float) -> float:
        if budget.is_share:
            return ours / theirs if theirs > 0 else 1.0
        return ours - theirs

    draws = [change(a, b) for a, b in zip(artifact.resamples, reference.resamples, strict=True)]
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if budget.is_share and artifact.is_of_classes:
        # Draws of images none of which is lost are all alike: of n without a loss the next may be one all the same.
        low = min(low, ((1 - CONFIDENCE) / 2) ** (1 / artifact.images))
    return Outcome(
        artifact,
        reference,
        budget,
        change(artifact.metric, reference.metric),
        float(low),
        float(high),
        artifact.images,
        artifact.telling,
    )

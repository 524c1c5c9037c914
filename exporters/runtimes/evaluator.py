"""exportgate's own evaluation of a Core ML file, on any CPU: what the file computes, not what Core ML makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.coreml.read import AGAIN, BOXES, SCORES
from exporters.errors import ArtifactError
from exporters.runtimes.coreml import FileSession
from exporters.runtimes.ml_program import Program
from exporters.runtimes.neural_network import Network
from exporters.session import Array, Execution, Feeds
from exporters.spec import ExportSpec


class EvaluatorSession(FileSession):
    """A file whose operators are computed one by one with PyTorch; see `Program` and `Network` for their arithmetic.

    Args:
        path: a .mlpackage or .mlmodel.
        brought: whether somebody else made it: where none of its outputs has a name of the model's, as after a
            conversion that named them by a trace, the place counts.

    Raises:
        ArtifactError: the file does not hold together.
        NotSupported: it has an operator or a layer that is not computed here; the message names it.
    """

    def __init__(self, path: Path, spec: ExportSpec, brought: bool) -> None:
        super().__init__(path, spec)
        self.evaluated = Program(self.file) if self.file.layers is None else Network(self.file)
        own = [o.name for o in self.outputs]
        self.names = dict(zip(own, own, strict=True))
        wanted = [o.name for o in spec.model.outputs]
        if brought and len(own) == len(wanted) and not set(own) & set(wanted):
            self.names = dict(zip(own, wanted, strict=True))
            self.outputs = tuple(replace(o, name=self.names[o.name]) for o in self.outputs)

    def predict(self, given: Feeds) -> Mapping[str, Array]:
        found = self.evaluated(given)
        told = self.file.suppression
        names = list(self.names)
        if told is not None:
            names = [told.confidenceInputFeatureName, told.coordinatesInputFeatureName]
        absent = next((n for n in names if n not in found), None)
        if absent is not None:
            raise ArtifactError(f"'{self.path}' describes the output {absent}, and gives {', '.join(found)}", AGAIN)
        if told is not None:
            scores, boxes = (found[name].astype(np.float32) for name in names)
            kept = suppressed(scores, boxes, told)
            return {SCORES: scores[kept], BOXES: boxes[kept]}
        return {self.names[name]: found[name] for name in names}

    def execution(self) -> Execution:
        return Execution("evaluator", f"PyTorch {torch.__version__}", "cpu")

    def close(self) -> None:
        del self.evaluated


def suppressed(scores: Array, boxes: Array, told: Any) -> Array:
    """Indices of what a NonMaximumSuppression leaves, the highest score first, with the thresholds in the file.

    A box has the class of its highest score. In turn the highest is kept, and those left overlap it by at most
    `iouThreshold` or, where `pickTop.perClass` says so, are of another class.

    Args:
        scores: (A, classes) in 0..1.
        boxes: (A, 4) centre, width and height.
    """
    best, label = scores.max(1, initial=0.0), scores.argmax(1)
    left = np.flatnonzero(best > told.confidenceThreshold)
    left = left[np.argsort(-best[left], kind="stable")]
    low, high = (boxes[:, :2] + sign * boxes[:, 2:] / 2 for sign in (-1, 1))
    kept: list[int] = []
    while len(left):
        one, left = left[0], left[1:]
        kept.append(int(one))
        sides = np.minimum(high[one], high[left]) - np.maximum(low[one], low[left])
        shared = sides.clip(min=0).prod(1)
        whole = boxes[one, 2:].prod() + boxes[left, 2:].prod(1) - shared
        rivals = label[left] == label[one] if told.pickTop.perClass else np.ones(len(left), bool)
        left = left[~(rivals & (shared > told.iouThreshold * whole))]
    return np.array(kept, int)

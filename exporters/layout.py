"""How a file's tensors differ from the model's: channels last, values divided. Sessions feed and give the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from exporters.arrays import Array
from exporters.errors import ArtifactError
from exporters.metadata import Metadata
from exporters.models.spec import ModelSpec

LAST, FIRST = "NHWC", "NCHW"


@dataclass(frozen=True)
class Layout:
    """Of one file. `last` says that tensors of four axes have their channels last, where the model has them second;
    `divisors` maps an output to what each channel (axis 1 of the model's) was divided by."""

    last: bool = False
    divisors: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])

    @staticmethod
    def of(metadata: Metadata, model: ModelSpec, shapes: Sequence[Sequence[int | str]], where: str) -> Layout:
        """As the file's metadata says; of somebody else's, which does not say, as the shapes of its inputs show.

        Args:
            shapes: of the file's inputs, in the model's order.
            where: names the file in errors.

        Raises:
            ArtifactError: divisors are of an output that the model lacks.
        """
        names = [o.name for o in model.outputs]
        unknown = next((n for n in metadata.divisors if n not in names), None)
        if unknown is not None:
            raise ArtifactError(
                f"{where}: its metadata has divisors of '{unknown}', and the outputs are {', '.join(names)}",
                "export it again",
            )
        if metadata.layout:
            return Layout(metadata.layout == LAST, metadata.divisors)
        channels = [(i.shape[1], shape) for i, shape in zip(model.inputs, shapes, strict=False) if len(i.shape) == 4]
        last = any(len(shape) == 4 and isinstance(c, int) and shape[3] == c and shape[1] != c for c, shape in channels)
        return Layout(last, metadata.divisors)

    def shape(self, shape: Sequence[int | str]) -> tuple[int | str, ...]:
        """The model's shape of a tensor that has this one in the file."""
        return (shape[0], shape[3], shape[1], shape[2]) if self.last and len(shape) == 4 else tuple(shape)

    def feed(self, array: Array) -> Array:
        """An input as the file takes it, of one that is the model's."""
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if self.last and array.ndim == 4 else array

    def output(self, name: str, array: Array) -> Array:
        """An output as the model gives it, of one that is the file's.

        Raises:
            ArtifactError: it has not as many channels as there are divisors.
        """
        array = array.transpose(0, 3, 1, 2) if self.last and array.ndim == 4 else array
        divisors = self.divisors.get(name)
        if divisors is None:
            return np.ascontiguousarray(array)
        if array.ndim < 2 or array.shape[1] != len(divisors):
            raise ArtifactError(
                f"output '{name}' has shape {list(array.shape)}, and the metadata {len(divisors)} divisors of axis 1",
                "export it again",
            )
        factors = np.asarray(divisors, array.dtype).reshape(1, -1, *([1] * (array.ndim - 2)))
        return np.ascontiguousarray(array * factors)

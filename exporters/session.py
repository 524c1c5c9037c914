"""Session: a loaded artifact. It says what really executes it, checks feeds, and runs."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from exporters.arrays import Array, Feeds
from exporters.artifact import TensorInfo
from exporters.errors import FeedError
from exporters.metadata import Metadata

__all__ = ["Array", "Execution", "Feeds", "Layer", "OnDevice", "Session", "check_feeds", "cpus"]


def cpus() -> int:
    """How many CPUs this process may use: threads of a session."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Layer:
    """One layer of what executes: its precision ("" where it has none), milliseconds a run, the nodes it is made of."""

    name: str
    kind: str
    precision: str
    milliseconds: float | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Execution:
    """What really executes: runtime and version, provider, device, precision of the arithmetic, and the evidence.

    `providers` counts the nodes that each execution provider took; `fallback` names what ran elsewhere than asked.
    `precision` is "" where the runtime does not tell; `layers` are told by runtimes that know them, with the time of
    each. `figures` are sizes, by name and unit. `operators` counts the convolutions and matrix products that ran in
    each precision, where that is known beside what the file says.
    """

    runtime: str
    version: str
    device: str
    precision: str = ""
    providers: Mapping[str, int] = field(default_factory=dict[str, int])
    fallback: tuple[str, ...] = ()
    threads: int = 0
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    operators: Mapping[str, int] = field(default_factory=dict[str, int])


class OnDevice(ABC):
    """One set of feeds in GPU memory, ready to be timed again and again without transfers."""

    @abstractmethod
    def enqueue(self, graph: bool = False) -> None:
        """One inference, without waiting for it; `graph` replays the captured CUDA graph."""

    @abstractmethod
    def capture(self) -> bool:
        """Captures a CUDA graph of it; False where that cannot be done."""

    @abstractmethod
    def compute_ms(self, graph: bool = False) -> float:
        """GPU milliseconds of one inference, by CUDA events on its stream."""

    @abstractmethod
    def wait(self) -> None:
        """Until everything enqueued is done."""

    @abstractmethod
    def forget(self) -> None:
        """Destroys the outputs of the last inference, and waits: what `outputs` gives next has been computed since."""

    @abstractmethod
    def outputs(self) -> dict[str, Array]:
        """Outputs of the last inference, by name.

        Raises:
            MeasurementError: there was none since `forget`.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives the memory back."""


class Session(ABC):
    """A loaded artifact. Subclasses fill in `_run`; the base checks what goes in.

    Attributes:
        inputs, outputs: signature as the runtime reports it; an axis that may vary is a name instead of a size.
        stride: sizes of the axes height and width must be multiples of it.
        timed_on: "cuda:N" where `on_device` gives something to time there; "" where wall time is what counts.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    stride: int = 1
    timed_on: str = ""

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs by name for feeds by name; every array as the signature says.

        Raises:
            FeedError: a missing or unknown name, another dtype or shape; the message says expected and got.
        """
        import numpy as np

        check_feeds(self.inputs, feeds, self.stride)
        return self._run({i.name: np.ascontiguousarray(feeds[i.name]) for i in self.inputs})

    @abstractmethod
    def _run(self, feeds: Feeds) -> dict[str, Array]: ...

    @abstractmethod
    def execution(self) -> Execution:
        """What really executes, read from the runtime, never from the request."""

    @abstractmethod
    def metadata(self) -> Metadata:
        """The metadata that the artifact's own files hold."""

    def on_device(self, feeds: Feeds) -> OnDevice:
        """Feeds in GPU memory, to be timed by CUDA events; sessions with `timed_on` have it."""
        raise NotImplementedError(f"{type(self).__name__} does not run on a GPU")

    def modules(self) -> dict[str, str]:
        """Modules of the network whose outputs can be seen inside, in their order, with the node that makes each."""
        return {}

    def run_inside(self, feeds: Feeds, modules: Sequence[str], row: int) -> dict[str, Array]:
        """The outputs of some of `modules`, by module: of one row of a batch, since all are many times the outputs."""
        raise NotImplementedError(f"{type(self).__name__} shows nothing inside")

    def close(self) -> None:
        """Frees what the session holds; it is not used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_feeds(inputs: tuple[TensorInfo, ...], feeds: Feeds, stride: int) -> None:
    """Raises FeedError with expected and got where feeds do not fit the signature."""
    expected = {i.name: i for i in inputs}
    wanted = ", ".join(f"{i.name} {i.dtype} {list(i.shape)}" for i in inputs)
    for name in feeds:
        if name not in expected:
            raise FeedError(f"unknown input '{name}': expected {wanted}", "feed exactly these names")
    bound: dict[str, int] = {}
    for name, info in expected.items():
        if name not in feeds:
            raise FeedError(
                f"missing input '{name}': expected {wanted}, got {sorted(feeds) or 'nothing'}", "feed every input"
            )
        array = feeds[name]
        if str(array.dtype) != info.dtype:
            raise FeedError(
                f"input '{name}' has dtype {array.dtype}: expected {info.dtype}", f"convert it to {info.dtype}"
            )
        fits = len(array.shape) == len(info.shape) and all(
            got == want if isinstance(want, int) else got >= 1
            for got, want in zip(array.shape, info.shape, strict=False)
        )
        if not fits:
            raise FeedError(
                f"input '{name}' has shape {list(array.shape)}: expected {list(info.shape)}", "feed that shape"
            )
        for got, axis in zip(array.shape, info.shape, strict=True):
            if isinstance(axis, str) and bound.setdefault(axis, got) != got:
                raise FeedError(
                    f"input '{name}': axis {axis} is {got}, and {bound[axis]} in another input", "make them equal"
                )
            if axis in ("height", "width") and got % stride:
                raise FeedError(
                    f"input '{name}': {axis} {got} is not a multiple of the stride {stride}", "pad the image"
                )

"""Feeds of a session of PyTorch's own runtimes in GPU memory, timed by PyTorch's CUDA events."""
# pyright: reportUnknownMemberType=false
# (torch's events and streams leave types open)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from exporters.errors import MeasurementError
from exporters.session import Array, OnDevice


class TorchFeeds(OnDevice):
    """Tensors on the GPU and what is called with them; there is no CUDA graph: users of PyTorch run without one."""

    def __init__(self, call: Callable[..., tuple[Any, ...]], tensors: Sequence[Any], names: Sequence[str]) -> None:
        self.call, self.names = call, tuple(names)
        self.tensors: tuple[Any, ...] = tuple(tensors)
        self.values: tuple[Any, ...] = ()
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    @torch.inference_mode()
    def enqueue(self, graph: bool = False) -> None:
        self.values = self.call(*self.tensors)

    def capture(self) -> bool:
        return False

    def compute_ms(self, graph: bool = False) -> float:
        stream = torch.cuda.current_stream(self.tensors[0].device)  # not the first GPU's
        self.start.record(stream)
        self.enqueue()
        self.end.record(stream)
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end))

    def wait(self) -> None:
        torch.cuda.synchronize(self.tensors[0].device)

    def forget(self) -> None:
        self.wait()
        self.values = ()

    def outputs(self) -> dict[str, Array]:
        if not self.values:
            raise MeasurementError("an inference left no outputs", "the session stopped computing; check the artifact")
        return {name: value.cpu().numpy() for name, value in zip(self.names, self.values, strict=True)}

    def close(self) -> None:
        self.tensors, self.values = (), ()

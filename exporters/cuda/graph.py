"""CUDA graphs: what a stream was given, captured once and replayed by one launch. PyCUDA has no interface to them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from exporters.errors import ExportError


class Graph:
    """A captured graph. It holds addresses: it is void when a buffer moves.

    Args:
        stream: handle of the stream.
        work: enqueues on the stream; it must neither synchronize nor allocate.

    Raises:
        ExportError: the work cannot be captured.
    """

    def __init__(self, stream: int, work: Callable[[], None]) -> None:
        cuda: Any = importlib.import_module("cuda.bindings.driver")  # PyTorch brings it
        self.cuda = cuda
        self.stream = cuda.CUstream(stream)
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._do("begin", cuda.cuStreamBeginCapture(self.stream, mode))
        try:
            work()
        finally:
            ended = cuda.cuStreamEndCapture(self.stream)
        self._do("end", ended)
        graph = ended[1]
        made = cuda.cuGraphInstantiate(graph, 0)
        cuda.cuGraphDestroy(graph)
        self._do("instantiate", made)
        self.executable: Any = made[1]

    def _do(self, what: str, result: Any) -> None:
        if int(result[0]) != 0:
            raise ExportError(f"a CUDA graph cannot be made ({what}: {result[0].name})", "")

    def launch(self) -> None:
        """Enqueues the whole graph."""
        self._do("launch", self.cuda.cuGraphLaunch(self.executable, self.stream))

    def close(self) -> None:
        """Frees it."""
        if self.executable is not None:
            self.cuda.cuGraphExecDestroy(self.executable)
            self.executable = None

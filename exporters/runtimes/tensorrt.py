"""A session of TensorRT on PyCUDA: pinned buffers, one stream, CUDA graphs, dynamic and data-dependent shapes."""
# pyright: reportUnknownMemberType=false
# (neither TensorRT nor PyCUDA has types)

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import TensorInfo
from exporters.cuda.context import driver, enter, free_bytes
from exporters.cuda.graph import Graph
from exporters.cuda.memory import Buffer
from exporters.errors import ArtifactError, BadRequest, ExportError, FeedError
from exporters.metadata import Metadata
from exporters.session import Array, Execution, Feeds, OnDevice, Session
from exporters.spec import ExportSpec
from exporters.tensorrt.header import Engine, read_engine, read_metadata
from exporters.tensorrt.inspector import Layer, layers_of, precision_word
from exporters.tensorrt.library import Log, library, runtime

TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
PROFILED = 10  # inferences that a layer's time is averaged over


def open_plan(path: Path, device: str) -> tuple[Any, Engine]:
    """The engine in a file, and its header.

    Raises:
        ArtifactError: it cannot be deserialized here; says what made it and what is here.
    """
    gpu = enter(device)
    found, file = library(), read_engine(path)
    with found.recording() as log:
        engine = runtime().deserialize_cuda_engine(file.plan())
    if engine is None:
        raise _not_ours(file, gpu, log)
    return engine, file


def _not_ours(file: Engine, gpu: dict[str, str], log: Log) -> ArtifactError | BadRequest:
    """Why TensorRT refused a plan."""
    found, said = library(), next(iter(log.errors()), "no words")
    here = f"{found.name} {found.version} on {gpu['name']} (compute capability {gpu['compute_capability']})"
    facts = file.facts
    made = ""
    if facts:
        made = f"; it was made by {facts.get('made_by')} for {facts.get('gpu') or 'another GPU'} " + (
            f"(compute capability {facts.get('compute_capability')})"
        )
    if "out of memory" in " ".join(log.errors()).lower() or "OutOfMemory" in " ".join(log.errors()):
        free, total = free_bytes()
        return BadRequest(
            f"'{file.path}': the GPU has no room for this engine ({free >> 20} of {total >> 20} MiB are free: {said})",
            "lower batch or imgsz, or free memory of the GPU",
        )
    return ArtifactError(f"'{file.path}' cannot be loaded by {here}: {said}{made}", "export it again on this machine")


class TensorRtSession(Session):
    """An engine with one execution context."""

    def __init__(self, path: Path, spec: ExportSpec, device: str) -> None:
        self.path, self.spec, self.device = path, spec, device
        self.timed_on = device
        self.engine, self.file = open_plan(path, device)
        self.context = self._new_context()
        self.stream = driver().Stream()
        self.stride = spec.model.stride
        self.profile = 0
        self.bound: Slot | None = None  # whose shapes and addresses the context has
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = tuple(self._info(n) for n in self.names if self._is_input(n))
        self.outputs = tuple(self._info(n) for n in self.names if not self._is_input(n))
        self.slot = Slot(self)

    def _new_context(self) -> Any:
        found = library()
        with found.recording() as log:
            context = self.engine.create_execution_context()
        if context is None:
            free, total = free_bytes()
            raise BadRequest(
                f"'{self.path}': no execution context ({next(iter(log.errors()), 'no words')}; "
                f"{free >> 20} of {total >> 20} MiB of the GPU are free)",
                "lower batch or imgsz, or free memory of the GPU",
            )
        return context

    def _is_input(self, name: str) -> bool:
        return str(self.engine.get_tensor_mode(name)).rpartition(".")[2].split(":")[0] == "INPUT"

    def _info(self, name: str) -> TensorInfo:
        """Shape and dtype; an axis that varies has the model's name for it."""
        named = {i.name: i.shape for i in self.spec.model.inputs}
        axes = {o.name: dict(o.axes) for o in self.spec.model.outputs}
        shape: list[int | str] = []
        for axis, size in enumerate(self.engine.get_tensor_shape(name)):
            word = named[name][axis] if name in named else axes.get(name, {}).get(axis, f"axis{axis}")
            shape.append(int(size) if size >= 0 else str(word))
        kind = str(self.engine.get_tensor_dtype(name)).rpartition(".")[2].split(":")[0]
        if kind not in TYPES:
            raise ArtifactError(
                f"tensor '{name}' of the engine is {kind}, which numpy does not have",
                "build it with FP32 or FP16 there",
            )
        return TensorInfo(name, tuple(shape), TYPES[kind])

    def bounds(self, profile: int, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest shape of an input in a profile."""
        low, _, high = self.engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)

    def fitting_profile(self, feeds: Feeds) -> int:
        """The first profile that takes these shapes, the current one if it does.

        Raises:
            FeedError: none does; says what they take and what it got.
        """
        count = int(self.engine.num_optimization_profiles)
        order = [self.profile, *(p for p in range(count) if p != self.profile)]
        for profile in order:
            if all(self._fits(profile, i.name, feeds[i.name].shape) for i in self.inputs):
                return profile
        name = next(i.name for i in self.inputs if not self._fits(order[0], i.name, feeds[i.name].shape))
        takes = " or ".join(
            f"{list(low)} to {list(high)}" for low, high in (self.bounds(p, name) for p in range(count))
        )
        raise FeedError(
            f"input '{name}' has shape {list(feeds[name].shape)}: expected {takes} (the engine's profiles)",
            "feed such a shape, or export with a larger --batch or other --profiles",
        )

    def _fits(self, profile: int, name: str, shape: Sequence[int]) -> bool:
        low, high = self.bounds(profile, name)
        return len(low) == len(shape) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def use_profile(self, profile: int) -> None:
        """Switches the context to another profile."""
        if profile != self.profile:
            if not self.context.set_optimization_profile_async(profile, self.stream.handle):
                raise ExportError(f"TensorRT refused to switch to profile {profile + 1}", "see the worker's log")
            self.stream.synchronize()
            self.profile = profile

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        """The first inference of a shape enqueues kernel by kernel; from the second on its CUDA graph is replayed."""
        slot = self.slot
        slot.fill(feeds)
        again = self.bound is slot
        if not again:  # a graph is void once its context was told anything else
            slot.release_graph()
        slot.enqueue(graph=again and slot.capture())
        return slot.outputs()

    def on_device(self, feeds: Feeds) -> Slot:
        """Feeds in GPU memory of their own, to be timed."""
        slot = Slot(self)
        slot.fill(feeds)
        slot.enqueue()  # TensorRT wants a shape to have run before it is captured
        slot.wait()
        return slot

    def execution(self) -> Execution:
        found = library()
        layers = self.layers()
        main, notes = precision_word(layers)
        return Execution(
            found.name,
            found.version,
            self.device,
            main,
            {found.name: len(layers)},
            notes=notes,
            layers=tuple(layers),
            figures=self._figures(),
        )

    def _figures(self) -> dict[str, float]:
        size = getattr(self.engine, "device_memory_size_v2", None) or getattr(self.engine, "device_memory_size", 0)
        return {
            "activation memory MiB": round(float(size) / 2**20, 3),
        }

    def layers(self) -> list[Layer]:
        """The engine's layers with their precision, and their time in a context of its own, by TensorRT's profiler."""
        found = library()
        inspector = self.engine.create_engine_inspector()
        text = str(inspector.get_engine_information(found.module.LayerInformationFormat.JSON))
        return layers_of(text, self._layer_times())

    def _layer_times(self) -> dict[str, float]:
        """Mean milliseconds a layer, by name."""
        found, totals = library(), dict[str, float]()

        class Profiler(found.module.IProfiler):
            def __init__(self) -> None:
                found.module.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                totals[layer_name] = totals.get(layer_name, 0.0) + ms

        session = copy.copy(self)
        session.context, session.profile, session.bound = self._new_context(), 0, None
        slot = Slot(session)
        try:
            slot.fill({i.name: np.zeros(self._typical(i), i.dtype) for i in self.inputs})
            slot.enqueue()
            slot.wait()
            profiler = Profiler()
            session.context.profiler = profiler
            for _ in range(PROFILED):
                slot.enqueue()
                slot.wait()
        finally:
            slot.close()
            del session.context
        return {name: ms / PROFILED for name, ms in totals.items()}

    def _typical(self, info: TensorInfo) -> tuple[int, ...]:
        """The shape that the engine was optimized for."""
        if all(isinstance(d, int) for d in info.shape):
            return tuple(int(d) for d in info.shape)
        return tuple(self.engine.get_tensor_profile_shape(info.name, 0)[1])

    def metadata(self) -> Metadata:
        return read_metadata(self.path)

    def close(self) -> None:
        self.slot.close()
        del self.slot, self.context, self.engine, self.stream


class Slot(OnDevice):
    """Buffers of one set of feeds and its outputs, and the graph that was captured with their addresses."""

    def __init__(self, session: TensorRtSession) -> None:
        self.session = session
        self.buffers: dict[str, Buffer] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile = 0
        self.allocators: dict[str, Any] = {}
        self.graph: Graph | None = None
        self.captured = False
        self.events: tuple[Any, Any] | None = None

    def fill(self, feeds: Feeds) -> None:
        """Sets shapes, reserves what outputs need and uploads, without waiting.

        Raises:
            FeedError: no profile takes these shapes.
        """
        session = self.session
        self.profile = session.fitting_profile(feeds)
        shapes = {i.name: tuple(feeds[i.name].shape) for i in session.inputs}
        changed = shapes != {n: self.shapes.get(n) for n in shapes}
        for info in session.inputs:
            buffer = self.buffers.setdefault(info.name, Buffer())
            before = buffer.bytes
            buffer.upload(feeds[info.name], session.stream)
            changed = changed or buffer.bytes != before
        if changed:
            self.release_graph()
            self.shapes = dict(shapes)
            session.bound = None  # bound again before the next inference

    def _bind(self) -> None:
        """Tells the context shapes and addresses, and reserves room for the outputs."""
        context = self.session.context
        self.session.bound = None  # until everything is: after an error nothing may run with addresses that are gone
        self.session.use_profile(self.profile)
        for info in self.session.inputs:
            if any(isinstance(d, str) for d in info.shape) and not context.set_input_shape(
                info.name, self.shapes[info.name]
            ):
                raise FeedError(
                    f"input '{info.name}': TensorRT refuses the shape {list(self.shapes[info.name])}",
                    "feed a shape within the engine's profile",
                )
            context.set_tensor_address(info.name, int(self.buffers[info.name].device))
        for info in self.session.outputs:
            shape = tuple(int(d) for d in context.get_tensor_shape(info.name))
            buffer = self.buffers.setdefault(info.name, Buffer())
            if -1 in shape:  # known only when it has been computed
                allocator = self.allocators.setdefault(info.name, _allocator(buffer))
                context.set_output_allocator(info.name, allocator)
                continue
            self.shapes[info.name] = shape
            buffer.reserve(int(np.prod(shape)) * np.dtype(info.dtype).itemsize)
            context.set_tensor_address(info.name, int(buffer.device))
        self.session.bound = self

    def enqueue(self, graph: bool = False) -> None:
        """One inference on the stream, without waiting; `graph` launches the captured one."""
        if graph:
            assert self.graph is not None
            self.graph.launch()
            return
        if self.session.bound is not self:
            self._bind()
        if not self.session.context.execute_async_v3(self.session.stream.handle):
            with library().recording() as log:  # once more, to hear this refusal's words and no older ones
                self.session.context.execute_async_v3(self.session.stream.handle)
            said = next(iter(log.errors()), "no words")
            raise ExportError(f"TensorRT refused to enqueue this inference ({said})", "report it with the engine")

    def capture(self) -> bool:
        """Captures a CUDA graph; False where this engine cannot be captured."""
        if not self.captured:
            self.captured = True
            if not self.allocators:
                self.enqueue()
                self.wait()
                try:
                    self.graph = Graph(int(self.session.stream.handle), self.enqueue)
                except ExportError:
                    self.graph = None
        return self.graph is not None

    def wait(self) -> None:
        self.session.stream.synchronize()

    def compute_ms(self, graph: bool = False) -> float:
        """Milliseconds of one inference by CUDA events around it."""
        cuda, stream = driver(), self.session.stream
        self.events = self.events or (cuda.Event(), cuda.Event())
        start, end = self.events
        start.record(stream)
        self.enqueue(graph)
        end.record(stream)
        end.synchronize()
        return float(start.time_till(end))

    def forget(self) -> None:
        """Fills the outputs with bytes of 255, which are NaN, and -1 of whole numbers."""
        for info in self.session.outputs:
            buffer = self.buffers.get(info.name)
            if buffer is not None and buffer.bytes:
                driver().memset_d8_async(int(buffer.device), 0xFF, buffer.bytes, self.session.stream)
        self.wait()

    def outputs(self) -> dict[str, Array]:
        """Copies of the outputs, after waiting."""
        views: dict[str, Array] = {}
        if self.allocators:
            self.wait()  # their shapes are known now
        for info in self.session.outputs:
            if info.name in self.allocators:
                self.shapes[info.name] = self.allocators[info.name].shape
            views[info.name] = self.buffers[info.name].download(self.shapes[info.name], info.dtype, self.session.stream)
        self.wait()
        return {name: view.copy() for name, view in views.items()}

    def release_graph(self) -> None:
        """Frees the captured graph, if there is one; the next `capture` makes another."""
        if self.graph is not None:
            self.graph.close()
        self.graph, self.captured = None, False

    def close(self) -> None:
        """Gives the memory back."""
        self.release_graph()
        for buffer in self.buffers.values():
            buffer.free()
        self.buffers.clear()


def _allocator(buffer: Buffer) -> Any:
    """Gives TensorRT the room that an output turns out to need, and remembers the shape it turns out to have."""

    class Allocator(library().module.IOutputAllocator):
        def __init__(self) -> None:
            library().module.IOutputAllocator.__init__(self)
            self.shape: tuple[int, ...] = ()

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return buffer.reserve(int(size))

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return buffer.reserve(int(size))

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(int(d) for d in shape)

    return Allocator()

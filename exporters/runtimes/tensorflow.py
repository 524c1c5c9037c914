"""TensorFlow on a CPU: a SavedModel's signature, or what Keras loads of it, called as a concrete function."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import TensorInfo, main_precision
from exporters.errors import ArtifactError, first_line
from exporters.layout import Layout
from exporters.metadata import SIDE_CAR, Metadata, read_yaml
from exporters.runtimes.rounding import rounding
from exporters.runtimes.tf_graph import (
    AGAIN,
    HEAVY,
    KERAS,
    SIGNATURE,
    TYPES,
    Graph,
    natural,
    of_saved_model,
    refuse_outside,
)
from exporters.session import Array, Execution, Feeds, Session, cpus
from exporters.spec import ExportSpec

library: Any = importlib.import_module("tensorflow")

# What loading and running damaged files raises, beside TensorFlow's own errors.
WRONG: tuple[type[Exception], ...] = (
    library.errors.OpError,
    *(OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, RecursionError),
)


# Before anything runs; both are as many as TensorFlow takes by itself, which does not say how many.
library.config.threading.set_intra_op_parallelism_threads(cpus())
library.config.threading.set_inter_op_parallelism_threads(cpus())


class GraphSession(Session):
    """A concrete function whose tensors are those of a file, which may have channels last.

    `function` takes tensors by name and gives them by name. `named` is whether its tensors must have names of ours:
    others' may have any, and are taken in the order of the numbers in them.
    """

    def __init__(
        self,
        graph: Graph,
        function: Callable[..., Mapping[str, Any]],
        signature: tuple[Mapping[str, Any], Mapping[str, Any]],
        side_car: Path,
        spec: ExportSpec,
        *,
        named: bool,
    ) -> None:
        self.graph, self.function, self.spec, self.stride = graph, function, spec, spec.model.stride
        self.side_car = side_car
        given, made = signature
        # The model's name -> the file's.
        self.feeds = _known(list(given), [i.name for i in spec.model.inputs], named=named)
        self.results = _known(list(made), [o.name for o in spec.model.outputs], named=named)
        shapes = [_sizes(given[name]) for name in self.feeds.values()]
        self.layout = Layout.of(self._metadata(), spec.model, shapes, f"'{side_car}'")
        axes = {t.name: dict(enumerate(t.shape)) for t in spec.model.inputs} | {
            o.name: dict(o.axes) for o in spec.model.outputs
        }
        self.inputs = tuple(self._infos(self.feeds, given, axes))
        self.outputs = tuple(self._infos(self.results, made, axes))

    def _metadata(self) -> Metadata:
        """For the layout alone: what is wrong with it is told by `metadata`."""
        try:
            return read_yaml(self.side_car)
        except ArtifactError:
            return Metadata()

    def _infos(
        self, names: Mapping[str, str], tensors: Mapping[str, Any], axes: Mapping[str, Mapping[int, Any]]
    ) -> Iterator[TensorInfo]:
        for name, own in names.items():
            sizes = self.layout.shape(_sizes(tensors[own]))
            known = axes.get(name, {})
            shape = tuple(d if isinstance(d, int) else str(known.get(n, f"axis{n}")) for n, d in enumerate(sizes))
            yield TensorInfo(name, shape, str(library.as_dtype(tensors[own].dtype).name))

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        made = self._made({own: self.layout.feed(feeds[name]) for name, own in self.feeds.items()})
        return {name: self.layout.output(name, made[own].numpy()) for name, own in self.results.items()}

    def _made(self, feeds: Mapping[str, Array]) -> Mapping[str, Any]:
        try:
            return self.function(**{name: library.constant(array) for name, array in feeds.items()})
        except WRONG as error:
            raise ArtifactError(f"'{self.graph.path}' does not run ({told(error)})", AGAIN) from None

    def execution(self) -> Execution:
        kinds = self._executed()
        error, bound = _rounds()
        main = main_precision(kinds)
        notes = [f"{n} of the convolutions and matrix products in {k}" for k, n in kinds.items()]
        notes.append(f"a convolution rounds by {error:.1g} of its terms, FP32's bound is {bound:.1g}")
        return Execution(
            "tensorflow",
            str(library.__version__),
            "cpu",
            "less than fp32" if main == "fp32" and error > bound else main,
            threads=int(library.config.threading.get_intra_op_parallelism_threads()),
            notes=tuple(notes),
            operators=dict(kinds),
        )

    def _executed(self) -> Counter[str]:
        """Types of the convolutions and matrix products in the graph that TensorFlow runs, after its optimizations."""
        context: Any = importlib.import_module("tensorflow.python.eager.context").context()
        zeros = {
            name: np.zeros([d if isinstance(d, int) else 1 for d in shape], dtype) for name, shape, dtype in self._fed()
        }
        context.enable_run_metadata()
        try:
            self._made(zeros)
            told = context.export_run_metadata()
        finally:
            context.disable_run_metadata()
        found = Counter[str]()
        for graphs in told.function_graphs:
            for node in graphs.post_optimization_graph.node:
                if re.sub(r"^_(Mkl)?(Native)?(Fused)?", "", node.op) in HEAVY or node.op in HEAVY:
                    number = int(node.attr["T"].type)
                    found[TYPES.get(number, f"type {number}")] += 1
        return found

    def _fed(self) -> Iterator[tuple[str, Sequence[Any], str]]:
        """The file's inputs for a request: name, shape, type."""
        sizes = {"batch": self.spec.batch, "height": self.spec.imgsz[0], "width": self.spec.imgsz[1]}
        for info in self.inputs:
            shape = [d if isinstance(d, int) else sizes.get(d, 1) for d in info.shape]
            yield self.feeds[info.name], self.layout.feed(np.zeros(shape, bool)).shape, info.dtype

    def metadata(self) -> Metadata:
        return read_yaml(self.side_car)

    def close(self) -> None:
        del self.function


class SavedModelSession(GraphSession):
    """The signature of a SavedModel's folder."""

    def __init__(self, path: Path, spec: ExportSpec, *, named: bool) -> None:
        graph = of_saved_model(path)
        refuse_outside(graph)
        try:
            self.model = library.saved_model.load(str(path))  # what its functions need, they do not hold
            function = self.model.signatures[SIGNATURE]
            signature = function.structured_input_signature[1], function.structured_outputs
        except WRONG as error:
            raise ArtifactError(f"'{path}' cannot be loaded by TensorFlow ({told(error)})", AGAIN) from None
        super().__init__(graph, function, signature, path / SIDE_CAR, spec, named=named)

    def close(self) -> None:
        super().close()
        del self.model


class KerasSession(GraphSession):
    """What Keras 2 loads of a SavedModel's folder; its tensors have an order, and names of layers."""

    def __init__(self, path: Path, spec: ExportSpec, *, named: bool) -> None:
        graph = of_saved_model(path)
        refuse_outside(graph)
        if not (path / KERAS).is_file():  # TensorFlow alone would load it all the same
            raise ArtifactError(f"'{path}' is no model of Keras: it has no {KERAS}", "export it again with --keras")
        keras: Any = importlib.import_module("tf_keras")
        try:
            model = keras.models.load_model(str(path), compile=False)
            given = {i.name: t for i, t in zip(spec.model.inputs, model.inputs, strict=True)}
            made = {o.name: t for o, t in zip(spec.model.outputs, model.outputs, strict=True)}
            wanted = [library.TensorSpec(t.shape, t.dtype, name) for name, t in given.items()]

            def infer(*feeds: Any) -> dict[str, Any]:
                found: Any = model(list(feeds))
                return dict(zip(made, found if len(made) > 1 else [found], strict=True))

            function = library.function(infer, input_signature=wanted, autograph=False).get_concrete_function()
        except WRONG as error:
            raise ArtifactError(f"'{path}' cannot be loaded by Keras ({told(error)})", AGAIN) from None

        def call(**arrays: Any) -> Mapping[str, Any]:
            return function(*(arrays[name] for name in given))

        super().__init__(graph, call, (given, made), path / SIDE_CAR, spec, named=named)


def told(error: BaseException) -> str:
    """What went wrong, in a line."""
    return first_line(error) if str(error).strip() else type(error).__name__


def _sizes(tensor: Any) -> list[int | str]:
    """Sizes of a tensor's axes, "" where they vary; none where even their number does."""
    return ["" if size is None else int(size) for size in tensor.shape] if tensor.shape.rank is not None else []


def _known(own: list[str], names: list[str], *, named: bool) -> dict[str, str]:
    """The file's names by the model's; where they are others' and all are strange, their order tells."""
    if named or set(own) & set(names) or len(own) != len(names):
        return {name: name for name in (*[n for n in names if n in own], *[n for n in own if n not in names])}
    return dict(zip(names, sorted(own, key=natural), strict=True))


def _rounds() -> tuple[float, float]:
    """How a convolution over one point rounds in this process (see `rounding`), and FP32's bound."""
    random = np.random.default_rng(0)
    given, weights = random.random((1, 16, 16, 32), np.float32), random.random((1, 1, 32, 64), np.float32) - 0.5
    made = library.nn.conv2d(library.constant(given), library.constant(weights), 1, "VALID").numpy()
    found = rounding(given.transpose(0, 3, 1, 2), made.transpose(0, 3, 1, 2))
    assert found is not None
    return found

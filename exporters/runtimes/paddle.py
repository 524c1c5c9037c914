"""Paddle Inference on a CPU: a session of Paddle's own kernels in FP32, and what they give inside."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import TensorInfo, main_precision
from exporters.errors import ArtifactError
from exporters.metadata import SIDE_CAR, Metadata, read_yaml
from exporters.runtimes.paddle_program import AGAIN, HEAVY, SHORT, Program, Tensor, files_of, read, said
from exporters.runtimes.rounding import rounding
from exporters.session import Array, Execution, Feeds, Session, cpus
from exporters.spec import ExportSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that ccache is missing, which only those need who compile operators
    library: Any = importlib.import_module("paddle")
    inference: Any = importlib.import_module("paddle.inference")

PADDLE = (RuntimeError, ValueError, TypeError, LookupError, OSError, ArithmeticError, MemoryError)  # what it raises
MOST_TERMS = 256  # of a sum that is looked at: the bound grows with them


class PaddleSession(Session):
    """A model in Paddle Inference. `named` is whether its tensors must have names of ours: X2Paddle's are numbers."""

    def __init__(self, path: Path, spec: ExportSpec, *, named: bool) -> None:
        self.folder, self.files, self.spec = path, files_of(path), spec
        self.stride = spec.model.stride
        self.program: Program = read(path)
        self.predictor = self._predictor()
        axes = {i.name: dict(enumerate(i.shape)) for i in spec.model.inputs} | {
            o.name: dict(o.axes) for o in spec.model.outputs
        }
        asked = [[t.name for t in tensors] for tensors in (spec.model.inputs, spec.model.outputs)]
        self.fed = _called(self.program.inputs, asked[0], named=named)
        self.given = _called(self.program.outputs, asked[1], named=named)
        self.moved = ", ".join(f"{b} is {a}" for a, b in (*self.fed.items(), *self.given.items()) if a != b)
        self.inputs = tuple(_infos(self.program.inputs, self.fed, axes))
        self.outputs = tuple(_infos(self.program.outputs, self.given, axes))
        for told, own in (
            (self.predictor.get_input_names(), self.program.inputs),
            (self.predictor.get_output_names(), self.program.outputs),
        ):
            if set(told) != set(own):
                raise ArtifactError(
                    f"'{self.files[0]}': Paddle has the tensors {', '.join(told)}, expected {', '.join(own)}", AGAIN
                )

    def _predictor(self) -> Any:
        """A predictor with Paddle's own kernels: oneDNN's are refused by Paddle itself for a detector (3.3.1), and were
        not faster for a classifier.

        Raises:
            ArtifactError: Paddle cannot load the files.
        """
        config = inference.Config(*map(str, self.files))
        config.disable_gpu()
        config.disable_mkldnn()
        config.disable_glog_info()
        config.set_cpu_math_library_num_threads(cpus())
        self.threads = int(config.cpu_math_library_num_threads())
        try:
            return inference.create_predictor(config)
        except PADDLE as error:
            raise ArtifactError(f"'{self.files[0]}' cannot be loaded by Paddle ({said(error)})", AGAIN) from None

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return self._computed(self.predictor, feeds)

    def _computed(self, predictor: Any, feeds: Feeds) -> dict[str, Array]:
        try:
            for name, own in self.fed.items():
                predictor.get_input_handle(own).copy_from_cpu(feeds[name])
            predictor.run()
            return {n: predictor.get_output_handle(own).copy_to_cpu() for n, own in self.given.items()}
        except PADDLE as error:
            what = f"'{self.files[0]}': Paddle fails on these feeds ({said(error)})"
            raise ArtifactError(what, AGAIN) from None

    def execution(self) -> Execution:
        """Of one inference on noise with hooks: in which type convolutions and matrix products are computed, and how a
        convolution over one point rounds."""
        look, predictor = _Look(), self._predictor()
        predictor.register_input_hook(look.taken)
        predictor.register_output_hook(look.made)
        random = np.random.default_rng(0)
        sizes = {"batch": self.spec.batch, "height": self.spec.imgsz[0], "width": self.spec.imgsz[1]}
        shapes = [tuple(n if isinstance(n, int) else sizes.get(n, 1) for n in i.shape) for i in self.inputs]
        feeds = {i.name: random.random(s).astype(i.dtype) for i, s in zip(self.inputs, shapes, strict=True)}
        self._computed(predictor, feeds)
        notes = tuple(f"{n} of the convolutions and matrix products in {k}" for k, n in look.kinds.items())
        if look.found is not None:
            name, error, bound = look.found
            notes = (*notes, f"{name} rounds by {error:.1g} of its terms, FP32's bound is {bound:.1g}")
        if self.moved:
            notes = (*notes, f"tensors without names of the model are taken in order: {self.moved}")
        rounds = look.found is not None and look.found[1] > look.found[2]
        return Execution(
            "paddle",
            str(library.__version__),
            "cpu",
            "less than fp32" if rounds and main_precision(look.kinds) == "fp32" else main_precision(look.kinds),
            threads=self.threads,
            notes=notes,
            operators=dict(look.kinds),
        )

    def metadata(self) -> Metadata:
        return read_yaml(self.folder / SIDE_CAR)

    def close(self) -> None:
        del self.predictor


class _Look:
    """Hooks of one inference. Paddle calls one with each tensor that an operator takes, then one with what it made.

    `kinds` counts convolutions and products by their type; `found` is how the first convolution over one point rounds
    (see `rounding`): its name, the error and FP32's bound.
    """

    def __init__(self) -> None:
        self.kinds, self.given = Counter[str](), list[Array]()
        self.last = ""
        self.found: tuple[str, float, float] | None = None

    def taken(self, op: str, variable: str, tensor: Any) -> None:
        if _is_heavy(op):
            if op != self.last:
                self.last, self.given = op, []
            self.given.append(np.array(tensor.numpy()))

    def made(self, op: str, variable: str, tensor: Any) -> None:
        if not _is_heavy(op):
            return
        made: Array = np.array(tensor.numpy())  # Paddle writes the next operator's values over it
        types = {str(a.dtype) for a in (*self.given, made) if a.dtype.kind in "fiu" and a.size > 1}
        # The narrowest of them: 16 bits that go into an operator are all that comes out of it.
        kind = min(types, key=lambda t: np.dtype(t).itemsize, default="")
        self.kinds[SHORT.get(kind, kind)] += 1
        if self.found is None and op.partition(":")[0].endswith("conv2d"):
            for weight in (a for a in self.given if a.ndim == 4 and a.shape[2:] == (1, 1) and a.shape[1] <= MOST_TERMS):
                for x in (a for a in self.given if a is not weight and a.ndim == 4 and a.shape[1] == weight.shape[1]):
                    pair = rounding(x, made) if x.shape[2:] == made.shape[2:] else None
                    self.found = self.found or (pair and (op, *pair))


def _is_heavy(op: str) -> bool:
    """Of "pd_op.conv2d:0", or of what an optimizer joined ("fused_conv2d_add_act")."""
    kind = op.partition(":")[0].rpartition(".")[2].rstrip("_")
    return kind in HEAVY or (kind.startswith("fused_") and any(word in kind for word in ("conv", "fc", "matmul")))


def _called(own: Iterable[str], asked: list[str], *, named: bool) -> dict[str, str]:
    """The file's own names by ours, in the model's order; in the file's where none of them is one of the model's."""
    found = list(own)
    if not named and not set(found) & set(asked):
        return dict(zip([*asked, *(f"unnamed{n}" for n in range(len(asked), len(found)))], found, strict=False))
    return {name: name for name in sorted(found, key=lambda n: asked.index(n) if n in asked else len(asked))}


def _infos(tensors: Mapping[str, Tensor], names: Mapping[str, str], axes: Mapping[str, Any]) -> Iterator[TensorInfo]:
    """The signature; an axis that varies gets the name that the model gives it."""
    for name, own in names.items():
        known = axes.get(name, {})
        shape = tuple(s if s >= 0 else str(known.get(n, f"axis{n}")) for n, s in enumerate(tensors[own].shape))
        yield TensorInfo(name, shape, tensors[own].dtype)

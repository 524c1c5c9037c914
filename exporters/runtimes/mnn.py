"""MNN on a CPU: a session that computes in FP32, the converter, and precision read back from a file."""

from __future__ import annotations

import importlib
import os
import re
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from exporters.artifact import UNQUANTIZED, Achieved, TensorInfo, main_precision
from exporters.errors import ArtifactError, ExportError, first_line
from exporters.metadata import Metadata, read_json
from exporters.runtimes import mnn_file
from exporters.runtimes.rounding import rounding
from exporters.session import Array, Execution, Feeds, Session, cpus
from exporters.spec import ExportSpec

# This package installs another one by pip when it is imported, which reports each conversion to MNN's makers.
sys.modules["MNN.tools"] = cast("Any", None)
library: Any = importlib.import_module("MNN")

THREADS = 4  # of MNN's codes of what a session tells
WINOGRAD, SMALL_TILES = 3, 2  # of MNN's hints, and a value that leaves tiles of 2 x 2
MOST_TERMS = 256  # of a sum that is looked at: the bound grows with them


def convert(source: Path, target: Path, framework: str, *options: str) -> None:
    """Runs MNN's converter, whose library prints what went wrong and returns as if nothing had.

    Raises:
        ExportError: it made no file, in its own words.
    """
    converter: Any = importlib.import_module("_tools")
    words = ["mnnconvert", "-f", framework, "--modelFile", str(source), "--MNNModel", str(target), *options]
    with tempfile.TemporaryFile() as log:
        kept = [os.dup(n) for n in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            converter.mnnconvert(words)
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
        log.seek(0)
        said = log.read().decode(errors="replace")
    print(said, file=sys.stderr)
    if not target.is_file() or "Converted Success" not in said:
        lines = [re.sub(r"^\[[\d:]+\] :\d+: ", "", line.strip()) for line in said.splitlines() if line.strip()]
        told = next((line for line in lines if "Not Support" in line or "rror" in line), (lines or ["no word"])[-1])
        raise ExportError(f"MNN's converter failed ({told[:300]})", "see which operators MNN has, or export to onnx")


class MnnSession(Session):
    """An .mnn file on the CPU backend, in high precision: FP32, whatever faster types the CPU has."""

    def __init__(self, path: Path, spec: ExportSpec) -> None:
        self.path, self.spec, self.stride = path, spec, spec.model.stride
        self.file = mnn_file.read(path)
        try:
            self.net = library.Interpreter(str(path))
        except Exception as error:
            if type(error) is not Exception:  # MNN raises no other
                raise
            what = f"'{path}' cannot be loaded by MNN ({first_line(error)})"
            raise ArtifactError(what, "export it again") from None
        # Larger tiles of Winograd's algorithm multiply and divide by up to 36 on the way: a hundred times FP32's
        # rounding, where those of 2 x 2 have factors of 1 and 1/2.
        self.net.setSessionHint(WINOGRAD, SMALL_TILES)
        self.session = self.net.createSession({"backend": "CPU", "numThread": cpus(), "precision": "high"})
        axes = {i.name: i.shape for i in spec.model.inputs}
        self.inputs = tuple(
            TensorInfo(name, tuple(_axis(n, at, axes.get(name, ())) for at, n in enumerate(sizes)), dtype)
            for name, (sizes, dtype) in self.file.inputs.items()
        )
        self.varies = any(isinstance(n, str) for i in self.inputs for n in i.shape)
        tensors = self.net.getSessionOutputAll(self.session)
        absent = [name for name in self.file.outputs if name not in tensors]
        if absent:
            raise ArtifactError(f"'{path}' gives no output {absent[0]}, which it names", "export it again")
        self.outputs = tuple(
            TensorInfo(
                name,
                () if self.varies else tuple(tensors[name].getShape()),
                str(tensors[name].getNumpyData().dtype),
            )
            for name in self.file.outputs
        )

    def _feed(self, feeds: Feeds) -> None:
        """Resizes where shapes are others than before, and copies: a run uses its inputs' memory for other tensors."""
        tensors = {i.name: self.net.getSessionInput(self.session, i.name) for i in self.inputs}
        if self.varies and any(tuple(t.getShape()) != feeds[n].shape for n, t in tensors.items()):
            for name, tensor in tensors.items():
                self.net.resizeTensor(tensor, feeds[name].shape)
            self.net.resizeSession(self.session)
        for name, tensor in tensors.items():
            given = library.Tensor(
                feeds[name].shape, tensor.getDataType(), feeds[name], library.Tensor_DimensionType_Caffe
            )
            tensor.copyFrom(given)

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        self._feed(feeds)
        code = self.net.runSession(self.session)
        if code:
            raise ArtifactError(f"'{self.path}': MNN fails with error {code} on these feeds", "export it again")
        return {o.name: _values(self.net.getSessionOutput(self.session, o.name)) for o in self.outputs}

    def execution(self) -> Execution:
        found, told = self._rounding(), self.net.getSessionInfo(self.session, THREADS)
        notes = ("Winograd's algorithm in tiles of 2 x 2",)
        if found is not None:
            name, error, bound = found
            notes = (f"{name} rounds by {error:.1g} of its terms, FP32's bound is {bound:.1g}", *notes)
        return Execution(
            "mnn",
            str(library.version()),
            "cpu",
            "" if found is None else "fp32" if found[1] <= found[2] else "less than fp32",
            threads=struct.unpack("<i", struct.pack("<f", told))[0],  # MNN's Python takes the number's bits for a float
            notes=notes,
        )

    def _rounding(self) -> tuple[str, float, float] | None:
        """A convolution that sums over one point, how it rounds (see `rounding`), and the bound; None without such.

        MNN does not tell in which precision it computes, but shows what goes into an operator and what comes out.
        """
        kernels = {op.name: op.kernel for op in self.file.ops if op.type == mnn_file.PLAIN and op.kernel is not None}
        named = {n: k.terms for n, k in kernels.items() if k.is_pointwise and k.terms <= MOST_TERMS}
        shapes = {i.name: self.spec.model.shape(i, self.spec.batch, self.spec.imgsz) for i in self.spec.model.inputs}
        if not named or any(i.name not in shapes for i in self.inputs):
            return None
        chosen, seen = min(named, key=lambda n: named[n]), dict[str, Array]()

        def look(word: str) -> Callable[[Any, Any], bool]:
            def see(tensors: Any, info: Any) -> bool:
                if info.getName() == chosen and info.getType() == "Convolution":
                    seen[word] = _values(tensors[0])
                return True

            return see

        random = np.random.default_rng(0)
        self._feed({i.name: random.random(shapes[i.name]).astype(i.dtype) for i in self.inputs})
        self.net.runSessionWithCallBackInfo(self.session, look("in"), look("out"))
        found = rounding(seen["in"], seen["out"]) if set(seen) == {"in", "out"} else None
        return found and (chosen, *found)

    def metadata(self) -> Metadata:
        return read_metadata(self.file, self.path)

    def close(self) -> None:
        del self.session, self.net


def _axis(size: int, number: int, names: tuple[int | str, ...]) -> int | str:
    """A size, or the name that the model gives an axis that varies."""
    known = names[number] if number < len(names) else ""
    return size if size >= 0 else known if isinstance(known, str) and known else f"axis{number}"


def _values(tensor: Any) -> Array:
    """A copy of what is in a tensor of a session, whose own memory is laid out in blocks of channels."""
    shape, dtype = tuple(tensor.getShape()), tensor.getNumpyData().dtype
    host = library.Tensor(shape, tensor.getDataType(), np.zeros(shape, dtype), library.Tensor_DimensionType_Caffe)
    tensor.copyToHostTensor(host)
    return np.array(host.getNumpyData()).reshape(shape)


def read_metadata(model: mnn_file.MnnFile, path: Path) -> Metadata:
    """Metadata from bizCode; MNN writes a word of its own where a converter was given none."""
    if not model.code.startswith("{"):
        raise ArtifactError(f"'{path}' holds no metadata (bizCode is '{model.code[:40]}')", "export it again")
    return read_json(model.code, str(path))


def read_precision(path: Path) -> Achieved:
    """Each convolution and matrix product by the type that its weights are stored in; `exceptions` names the others."""
    model = mnn_file.read(path)
    constants = {op.name: op.constant for op in model.ops if op.constant}
    short = {"float32": "fp32", "float16": "fp16"}
    kinds: dict[str, str] = {}
    left: list[str] = []
    for op in model.ops:
        if op.type in mnn_file.INTEGER:
            kinds[op.name] = "int8"
        elif op.type in mnn_file.CONVOLUTIONS or op.type in mnn_file.PRODUCTS:
            stored = op.kernel.stored if op.kernel else next((constants[n] for n in op.inputs if n in constants), "")
            if stored or op.kernel:
                kinds[op.name] = short.get(stored, stored or "unknown")
            else:  # both are computed
                left.append(op.name)
    counts = Counter(kinds.values())
    main = main_precision(counts)
    evidence = {f"operators {k}": n for k, n in counts.items()}
    evidence |= {UNQUANTIZED: len(left)} if left and main == "int8" else {}
    return Achieved(main, evidence, tuple(sorted(n for n, k in kinds.items() if k != main)))

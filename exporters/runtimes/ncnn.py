"""ncnn on a CPU: a session that computes in FP32, or in FP16 where ncnn's operators do so on this CPU."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import TensorInfo
from exporters.errors import ArtifactError, FeedError
from exporters.metadata import SIDE_CAR, Metadata, read_yaml
from exporters.models.spec import InputSpec
from exporters.runtimes.ncnn_files import AGAIN, Layer, files_of, library, read_param, read_weights
from exporters.session import Array, Execution, Feeds, Session
from exporters.spec import ExportSpec, Precision

# Options that let ncnn store or compute in 16 bits. It is an operator's affair whether it does on this CPU.
NARROW = ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage")
LARGEST = 1 << 30  # values of an input
TAKEN = {"float32": "float32", "int32": "int32", "int64": "int32"}  # an input's type -> what ncnn takes


class NcnnSession(Session):
    """A loaded model. The files name its blobs in0, out0 and so on: the names are the request's, in order."""

    def __init__(self, path: Path, spec: ExportSpec) -> None:
        self.folder, self.spec = path if path.is_dir() else path.parent, spec
        self.param, weights = files_of(path)
        self.stride = spec.model.stride
        layers = read_param(self.param)
        read_weights(self.param, weights, layers)
        self.net = library.Net()
        if spec.precision is Precision.FP32:
            for option in NARROW:
                setattr(self.net.opt, f"use_{option}", False)
        if self.net.load_param(str(self.param)) or self.net.load_model(str(weights)):
            raise ArtifactError(f"'{self.param}' and {weights.name} cannot be loaded by ncnn", AGAIN)
        self.sizes = {layer.tops[0]: layer.sizes for layer in layers if layer.kind == "Input"}
        if not self.sizes:
            raise ArtifactError(f"'{self.param}' has no input", AGAIN)
        self.feeding, self.giving = _ordered(self.net.input_names()), _ordered(self.net.output_names())
        self.inputs = tuple(self._input(blob, number) for number, blob in enumerate(self.feeding))
        # ncnn keeps a batch apart from the axes of a blob, and gives each output the one of what it was made of.
        self.batched = any(len(self.sizes[b] or i.shape[1:]) < len(i.shape) for b, i in self._pairs())
        zeros = {i.name: np.zeros(self._sane(i), i.dtype) for i in self.inputs}
        self.bits = self._try(layers, zeros)
        names = [o.name for o in spec.model.outputs]
        names += [f"unnamed{number}" for number in range(len(names), len(self.giving))]
        self.names = tuple(names[: len(self.giving)])
        self.outputs = tuple(TensorInfo(n, a.shape, str(a.dtype)) for n, a in self._run(zeros).items())

    def _sane(self, info: TensorInfo) -> list[int]:
        """An input's shape, before memory is taken for what the files say."""
        sizes = [int(s) for s in info.shape]
        if min(sizes, default=1) < 1 or math.prod(sizes) > LARGEST:
            what = f"of {list(sizes)} is more than {LARGEST} values" if min(sizes) > 0 else f"has the sizes {sizes}"
            raise ArtifactError(f"'{self.param}': input {info.name} {what} (the batch is of {SIDE_CAR})", AGAIN)
        return sizes

    def _pairs(self) -> zip[tuple[str, TensorInfo]]:
        return zip(self.feeding, self.inputs, strict=True)

    def _input(self, blob: str, number: int) -> TensorInfo:
        """An input's signature: sizes as the .param file says, the batch (and, where it says none, sizes) as the
        metadata do."""
        known = self.spec.model.inputs
        entry = known[number] if number < len(known) else InputSpec(f"unnamed{number}", ())
        sizes, dtype = self.sizes[blob], entry.dtype if entry.dtype in TAKEN else "float32"
        if number >= len(known) or len(sizes) == len(entry.shape):
            return TensorInfo(entry.name, sizes, dtype)
        found = Metadata()
        with suppress(ArtifactError):  # that claims about metadata tell
            found = read_yaml(self.folder / SIDE_CAR)
        whole = self.spec.model.shape(entry, found.batch, found.imgsz)
        if not sizes and all(whole):
            return TensorInfo(entry.name, whole, dtype)
        if len(sizes) + 1 != len(whole):
            what = f"has the sizes {list(sizes)}" if sizes else f"has no size, and {SIDE_CAR} says no imgsz"
            raise ArtifactError(f"'{self.param}': input {blob} {what}, expected {list(entry.shape)}", AGAIN)
        return TensorInfo(entry.name, (whole[0], *sizes), dtype)

    def _try(self, layers: Sequence[Layer], feeds: Feeds) -> Counter[int]:
        """Computes each blob once, in order: in how many bits ncnn holds them.

        Raises:
            ArtifactError: a layer fails, or reshapes to a size that its input has not, which ncnn does not notice.
        """
        extractor, counts, bits = self._extractor(feeds), dict[str, int](), Counter[int]()
        for layer in layers:
            for blob in layer.tops:
                code, mat = extractor.extract(blob, type=1)  # as it is held
                if code or mat.empty():
                    raise ArtifactError(
                        f"'{self.param}': ncnn gives nothing for layer '{layer.name}' (code {code})", AGAIN
                    )
                counts[blob] = mat.w * mat.h * mat.d * mat.c * mat.elempack
                bits[int(mat.elembits())] += layer.kind != "Input"
            if layer.kind == "Reshape" and counts[layer.tops[0]] != counts[layer.bottoms[0]]:
                given = ", ".join(f"{i.name} {list(i.shape)}" for i in self.inputs)
                what = f"layer '{layer.name}' makes {counts[layer.tops[0]]} values of {counts[layer.bottoms[0]]}"
                raise ArtifactError(f"'{self.param}' is made for another size than {given}: {what}", AGAIN)
        return bits

    def _extractor(self, feeds: Feeds) -> Any:
        """One inference, fed."""
        extractor = self.net.create_extractor()
        for blob, info in self._pairs():
            array = feeds[info.name]
            if info.dtype == "int64" and array.size and max(-int(array.min()) - 1, int(array.max())) >= 2**31:
                raise FeedError(
                    f"input '{info.name}' holds {array.min()} to {array.max()}: expected 32 bits, which ncnn takes",
                    "feed smaller numbers",
                )
            array = np.ascontiguousarray(array, TAKEN[info.dtype])
            has_batch = len(self.sizes[blob] or info.shape[1:]) < len(info.shape)
            # A copy: layers that work in place would write into the feeds.
            mat = (library.Mat(array, batch_index=0) if has_batch else library.Mat(array)).clone()
            code = extractor.input(blob, mat)
            if code:
                raise ArtifactError(f"'{self.param}': ncnn does not take input {blob} (code {code})", AGAIN)
        return extractor

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        extractor, made = self._extractor(feeds), dict[str, Array]()
        for blob, name in zip(self.giving, self.names, strict=True):
            code, mat = extractor.extract(blob)
            if code or mat.empty():
                raise ArtifactError(f"'{self.param}': ncnn gives nothing for output {blob} (code {code})", AGAIN)
            made[name] = np.array(mat.numpy(batch_index=0) if self.batched else mat.numpy())
        return made

    def execution(self) -> Execution:
        allowed = [option for option in NARROW if getattr(self.net.opt, f"use_{option}")]
        notes = (
            ", ".join(f"{n} values between layers in {bits} bits" for bits, n in self.bits.items()),
            f"options that allow 16 bits: {', '.join(allowed) or 'none'}",
        )
        is_wide = not allowed and set(self.bits) == {32}
        threads = int(self.net.opt.num_threads)
        return Execution(
            "ncnn", str(library.__version__), "cpu", "fp32" if is_wide else "", threads=threads, notes=notes
        )

    def metadata(self) -> Metadata:
        found = read_yaml(self.folder / SIDE_CAR)
        axes = self.spec.model.inputs[0].shape
        own = self.inputs[0].shape
        if self.spec.model.has_images and len(own) == len(axes):
            size = tuple(own[axes.index(axis)] for axis in ("height", "width"))
            if size != found.imgsz:
                what = f"says imgsz {list(found.imgsz)}, and {self.param.name} is made for {list(size)}"
                raise ArtifactError(f"'{self.folder / SIDE_CAR}' {what}", AGAIN)
        return found

    def close(self) -> None:
        del self.net


def _ordered(names: Sequence[str]) -> list[str]:
    """in0, in1 ... by their numbers, as pnnx calls them; others' as they stand."""
    found = [re.fullmatch(r"(?:in|out)(\d+)", name) for name in names]
    if not all(found):
        return list(names)
    return sorted(names, key=lambda name: int(re.sub(r"\D", "", name)))

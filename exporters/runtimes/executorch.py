"""ExecuTorch on a CPU: a session of its Python runtime with the XNNPACK delegate.

What executes is told by the runtime's event tracer: XNNPACK names the kernel of each node, as in
"Convolution (NHWC, QC8) IGEMM".
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import metadata as distributions
from pathlib import Path
from typing import Any, cast

import numpy as np

from exporters.artifact import TensorInfo, main_precision
from exporters.errors import ArtifactError, FeedError, first_line
from exporters.metadata import SIDE_CAR, Metadata, read_json, read_yaml
from exporters.runtimes.pte import AGAIN, DAMAGED, DELEGATE, METHOD, Pte, damaged, program_of
from exporters.session import Array, Execution, Feeds, Layer, Session
from exporters.spec import ExportSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that the runtime's interface is experimental
    torch: Any = importlib.import_module("torch")
    runtime: Any = importlib.import_module("executorch.runtime")
    bindings: Any = importlib.import_module("executorch.extension.pybindings.portable_lib")

METADATA, INPUTS, OUTPUTS = "metadata", "input_names", "output_names"  # methods that give constants
HEAVY = ("Convolution", "Deconvolution", "Fully Connected", "Batch Matrix Multiply")  # XNNPACK's names of kernels
TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "QS8": "int8", "QC8": "int8", "QU8": "int8"}
DTYPES: dict[str, str] = {
    **{"FLOAT": "float32", "HALF": "float16", "DOUBLE": "float64", "BOOL": "bool"},
    **{"LONG": "int64", "INT": "int32", "SHORT": "int16", "CHAR": "int8", "BYTE": "uint8"},
}


def _loaded(path: Path, method: str, *, traced: bool = False) -> tuple[Any, Any]:
    """The program and one of its methods.

    Raises:
        ArtifactError: the runtime cannot load it.
    """
    try:
        program = runtime.Runtime.get().load_program(path, enable_etdump=traced)
        return program, program.load_method(method)
    except (RuntimeError, KeyError) as error:
        raise ArtifactError(f"'{path}' cannot be loaded by ExecuTorch ({first_line(error)})", AGAIN) from None


class ExecuTorchSession(Session):
    """A loaded program. Names of tensors are those that the file holds as constants; others' files have none."""

    def __init__(self, path: Path, spec: ExportSpec) -> None:
        self.path, self.spec, self.stride = (path := program_of(path)), spec, spec.model.stride
        self.pte = Pte(path)  # refuses what the runtime would read beyond the end of
        self.program, self.method = _loaded(path, METHOD)
        try:
            self.inputs = tuple(self._infos(self.pte.plan.inputs, INPUTS, [i.name for i in spec.model.inputs]))
            self.outputs = tuple(self._infos(self.pte.plan.outputs, OUTPUTS, [o.name for o in spec.model.outputs]))
        except DAMAGED as error:
            raise damaged(path, error) from None
        self.largest = {
            info.name: tuple(self.method.metadata.input_tensor_meta(n).sizes()) for n, info in enumerate(self.inputs)
        }

    def _infos(self, indices: list[int], constant: str, names: list[str]) -> Iterator[TensorInfo]:
        """The signature; an axis that varies gets the name that the model gives it: the file says of a tensor that it
        varies, and not where."""
        if constant in self.pte.constants:
            told: Any = json.loads(self.pte.constants[constant])
            if not isinstance(told, list):
                raise ArtifactError(f"'{self.path}' is damaged: '{constant}' is no list of names", AGAIN)
            names = [str(name) for name in cast("list[Any]", told)]
        axes = {t.name: dict(enumerate(t.shape)) for t in self.spec.model.inputs} | {
            o.name: dict(o.axes) for o in self.spec.model.outputs
        }
        for number, index in enumerate(indices):
            tensor = self.pte.plan.values[index].val
            name = names[number] if number < len(names) else f"unnamed{number}"
            varies = {} if tensor.shape_dynamism.name == "STATIC" else axes.get(name, {})
            shape = tuple(v if isinstance(v := varies.get(n, d), str) else d for n, d in enumerate(tensor.sizes))
            kind = str(tensor.scalar_type.name)
            yield TensorInfo(name, shape, DTYPES.get(kind, kind.lower()))

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        for name, most in self.largest.items():
            if any(got > limit for got, limit in zip(feeds[name].shape, most, strict=True)):
                raise FeedError(
                    f"input '{name}' has shape {list(feeds[name].shape)}: expected at most {list(most)}",
                    "export for a larger --imgsz or --batch",
                )
        # Feeds from another process are mapped read-only, of which torch warns.
        arrays = (feeds[i.name] for i in self.inputs)
        tensors = [torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays]
        return self._outputs(self.method, tensors)

    def _outputs(self, method: Any, tensors: list[Any]) -> dict[str, Array]:
        try:
            values = method.execute(tensors)
        except RuntimeError as error:
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            raise ArtifactError(f"'{self.path}' does not run on {shapes} ({first_line(error)})", AGAIN) from None
        return {o.name: v.numpy() for o, v in zip(self.outputs, values, strict=True)}

    def execution(self) -> Execution:
        portable = self.pte.portable()
        providers = {DELEGATE: self.pte.nodes()} | ({"portable kernels": sum(portable.values())} if portable else {})
        layers = tuple(self._traced())
        kinds = Counter(layer.precision for layer in layers if layer.kind in HEAVY)
        notes = [f"{n} of the convolutions and matrix products in {k}" for k, n in kinds.items()]
        if portable:
            told = ", ".join(f"{n} {name}" for name, n in portable.items())
            notes.append(f"in portable kernels: {told}")
        return Execution(
            "executorch",
            distributions.version("executorch"),
            "cpu",
            main_precision(kinds),
            providers,
            # What XNNPACK has no node for runs in portable kernels; a convolution there takes 170 times as long (seen).
            fallback=tuple(k.name for k in self.pte.kernels if k.precision),
            threads=int(bindings._threadpool_get_thread_count()),
            notes=tuple(notes),
            layers=layers,
            operators=dict(kinds),
        )

    def _traced(self) -> Iterator[Layer]:
        """What one inference on zeros ran, as the event tracer tells; nothing where the runtime was built without."""
        etdump: Any = importlib.import_module("executorch.devtools.etdump.serialize")
        program, method = _loaded(self.path, METHOD, traced=True)
        sizes = {"batch": self.spec.batch, "height": self.spec.imgsz[0], "width": self.spec.imgsz[1]}
        shapes = [tuple(d if isinstance(d, int) else sizes[d] for d in i.shape) for i in self.inputs]
        zeros = [torch.from_numpy(np.zeros(s, i.dtype)) for i, s in zip(self.inputs, shapes, strict=True)]
        self._outputs(method, zeros)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.etdp"
            program.write_etdump_result_to_file(str(path), str(path.with_suffix(".bin")))
            if not path.is_file():
                return
            dump = etdump.deserialize_from_etdump_flatcc(path.read_bytes())
        for run in dump.run_data:
            for event in run.events or ():
                told = event.profile_event
                if told is None:
                    continue
                name = told.delegate_debug_id_str or told.name or ""
                kernel = re.fullmatch(r"(.+?) \((.+?)\)(.*)", name)
                if not kernel and not name.startswith("native_call_"):  # of the whole, or of a delegate's call
                    continue
                kind = kernel[1] if kernel else name.removeprefix("native_call_")
                types = kernel[2].split(", ") if kernel else []
                kinds = [TYPES[word] for word in types if word in TYPES]
                yield Layer(name, kind, kinds[-1] if kinds else "", (told.end_time - told.start_time) / 1e6)

    def metadata(self) -> Metadata:
        if METADATA not in self.pte.constants:
            if (side_car := self.path.with_name(SIDE_CAR)).is_file():
                return read_yaml(side_car)
            raise ArtifactError(f"'{self.path}' holds no metadata (constant method '{METADATA}')", AGAIN)
        return read_json(self.pte.constants[METADATA], str(self.path))

    def close(self) -> None:
        del self.method, self.program

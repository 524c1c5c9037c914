"""OpenVINO on a CPU: reading, precision, and a session that computes in FP32 or in the 8 bits that the file says."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from exporters.artifact import UNQUANTIZED, Achieved, TensorInfo, main_precision
from exporters.errors import ArtifactError
from exporters.metadata import SIDE_CAR, Metadata, read_yaml
from exporters.session import Array, Execution, Feeds, Session
from exporters.spec import ExportSpec

# OpenVINO and NNCF report each import and call to their makers through this package, unless it cannot be imported.
sys.modules["openvino_telemetry"] = cast("Any", None)
library: Any = importlib.import_module("openvino")

INFO = "model_info"
HEAVY = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "f64": "fp64", "i8": "int8", "u8": "int8"}
PASSING = ("MaxPool", "Interpolate", "Slice", "StridedSlice", "Split", "VariadicSplit", "Reshape", "Transpose")
LAYERS = ("Convolution", "Deconvolution", "MatMul", "FullyConnected")  # the names of HEAVY in what executes
DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "u8": "uint8", "i8": "int8"}


def read(path: Path) -> Any:
    """The model in a file that OpenVINO reads (.xml with its .bin, .onnx).

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        return library.Core().read_model(str(path))
    except RuntimeError as error:
        raise ArtifactError(f"'{path}' cannot be read by OpenVINO ({_last(error)})", "export it again") from None


def _last(error: RuntimeError) -> str:
    """What went wrong: OpenVINO says first where in its source it did."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def xml_of(path: Path) -> Path:
    """The one .xml of a model's folder, or the file itself.

    Raises:
        ArtifactError: there is none, or more than one; it is something else, or has no .bin beside it.
    """
    found = sorted(path.glob("*.xml")) if path.is_dir() else [path]
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise ArtifactError(f"'{path}' holds {len(found)} .xml files ({names}), expected one", "export it again")
    try:
        with found[0].open("rb") as file:
            begin = file.read(512)
    except OSError as error:
        raise ArtifactError(f"'{found[0]}' cannot be read ({error.strerror})", "export it again") from None
    if b"<net" not in begin:  # OpenVINO goes by the content, and reads ONNX and others under this name
        raise ArtifactError(f"'{found[0]}' is no OpenVINO IR: it does not begin with <net>", "export it again")
    weights = found[0].with_suffix(".bin")
    if not weights.is_file():
        state = "is no file" if weights.exists() else "is missing"
        raise ArtifactError(f"'{found[0]}' has no weights: {weights.name} {state}", "export it again")
    return found[0]


def describe(model: Any, metadata: Metadata) -> None:
    """Writes what OpenVINO's Model API reads of a YOLO model: how pictures are prepared, labels, suppression."""
    for key, value in _described(metadata).items():
        model.set_rt_info(value, [INFO, key])


def _described(metadata: Metadata) -> dict[str, Any]:
    if not metadata.task:
        return {}
    info: dict[str, Any] = {
        "model_type": "YOLO",
        "reverse_input_channels": True,
        "pad_value": 114,
        "scale_values": [255],
        "iou_threshold": 0.7,
        "labels": labels(metadata),
    }
    if metadata.task != "classify":
        info["resize_type"] = "fit_to_window_letterbox"
    return info


def labels(metadata: Metadata) -> list[str]:
    """Class names in order, as rt_info has them: what reads it divides them by blanks of any kind."""
    return [re.sub(r"\s", "_", name) or "_" for _, name in sorted(metadata.names.items())]


class OpenVinoSession(Session):
    """A compiled model. `named` is whether its tensors must have names of ours: others' may have any, or none."""

    def __init__(self, path: Path, spec: ExportSpec, *, named: bool) -> None:
        self.folder, self.xml, self.spec = path if path.is_dir() else path.parent, xml_of(path), spec
        self.stride, self.named = spec.model.stride, named
        self.model = read(self.xml)
        # BF16 is the default where the CPU has it; the precision that is judged is the one that is computed in.
        hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        try:
            self.compiled = library.Core().compile_model(self.model, "CPU", hints)
        except RuntimeError as error:
            raise ArtifactError(
                f"'{self.xml}' cannot be compiled by OpenVINO ({_last(error)})", "export it again"
            ) from None
        self.request = self.compiled.create_infer_request()
        self.inputs = tuple(_infos(self.compiled.inputs, [i.name for i in spec.model.inputs], spec, named=named))
        self.outputs = tuple(_infos(self.compiled.outputs, [o.name for o in spec.model.outputs], spec, named=named))

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        self.request.infer([feeds[i.name] for i in self.inputs], share_inputs=True)
        return {o.name: self.request.get_output_tensor(n).data.copy() for n, o in enumerate(self.outputs)}

    def execution(self) -> Execution:
        kinds: Counter[str] = Counter()
        for op in self.compiled.get_runtime_model().get_ordered_ops():
            facts = op.get_rt_info()
            if facts["layerType"].astype(str) in LAYERS:
                kernel = str(facts["primitiveType"].astype(str)).rpartition("_")[2].lower()  # "brgconv_avx512_I8"
                kinds[TYPES.get(kernel, kernel)] += 1
        notes = tuple(f"{n} of the convolutions and matrix products in {k}" for k, n in kinds.items())
        return Execution(
            "openvino",
            str(library.__version__),
            "cpu",
            main_precision(kinds),
            threads=int(self.compiled.get_property("INFERENCE_NUM_THREADS")),
            notes=notes,
            operators=dict(kinds),
        )

    def metadata(self) -> Metadata:
        found = read_yaml(self.folder / SIDE_CAR)
        told = _told(self.model, "labels")
        if told is None and self.named and found.task:
            raise ArtifactError(f"'{self.xml}' has lost its labels: it holds no rt_info {INFO}", "export it again")
        if told is not None and found.task and told.split() != labels(found):
            raise ArtifactError(
                f"'{self.xml}': its labels are not the names in {SIDE_CAR}: {told[:80]!r}", "export it again"
            )
        for key, value in _described(found).items() if self.named else ():  # others may prepare pictures otherwise
            if key != "labels" and (info := _told(self.model, key)) != _written(value):
                raise ArtifactError(
                    f"'{self.xml}' says {key} {info!r} in its rt_info, expected {_written(value)!r}", "export it again"
                )
        return found

    def close(self) -> None:
        del self.request, self.compiled, self.model


def _written(value: Any) -> str:
    """A value as an .xml has it."""
    if isinstance(value, bool):
        return "YES" if value else "NO"
    return " ".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else str(value)


def _told(model: Any, key: str) -> str | None:
    """A value of rt_info's model_info."""
    return str(model.get_rt_info([INFO, key]).astype(str)) if model.has_rt_info([INFO, key]) else None


def _infos(ports: Any, names: list[str], spec: ExportSpec, *, named: bool) -> Iterator[TensorInfo]:
    """The signature; an axis that varies gets the name that the model gives it."""
    axes = {t.name: dict(enumerate(t.shape)) for t in spec.model.inputs} | {
        o.name: dict(o.axes) for o in spec.model.outputs
    }
    for number, port in enumerate(ports):
        nameless = f"unnamed{number}"
        known = names[number] if number < len(names) else nameless
        asked = [n for n in names if n in port.names]  # a tensor may have several
        if known not in asked:
            # What OpenVINO makes of a traced module is called as its trace is: there the place counts.
            known = next(iter(asked), (port.any_name if port.names else nameless) if named else known)
        shape = tuple(
            d.get_length() if d.is_static else str(axes.get(known, {}).get(n, f"axis{n}"))
            for n, d in enumerate(port.partial_shape)
        )
        kind = str(port.element_type.get_type_name())
        yield TensorInfo(known, shape, DTYPES.get(kind, kind))


def read_precision(path: Path) -> Achieved:
    """Each convolution and matrix product by the type of its stored weight; int8 where its data is quantized, too.

    `exceptions` names those that differ.
    """
    model = read(xml_of(path))
    kinds: dict[str, str] = {}
    left: list[str] = []
    for op in model.get_ordered_ops():
        if op.get_type_name() not in HEAVY:
            continue
        data, weight = (op.input_value(n).get_node() for n in range(2))
        stored = [_stored(weight), _stored(data)]
        name = op.get_friendly_name()
        if not any(stored):  # both are computed
            left.append(name)
            continue
        kind = next(k for k in stored if k)
        other = data if stored[0] else weight
        kinds[name] = kind if kind != "int8" or _is_quantized(other) else "fp32"
        left += [name] if "Backprop" in op.get_type_name() and kind != "int8" else []
    counts = Counter(kinds.values())
    main = main_precision(counts)
    spared = set(left) if main == "int8" else set[str]()
    evidence = {f"operators {k}": n for k, n in counts.items()} | ({UNQUANTIZED: len(spared)} if spared else {})
    others = tuple(sorted(n for n, k in kinds.items() if k != main and n not in spared))
    return Achieved(main, evidence, others)


def _stored(node: Any) -> str:
    """Type that a constant is stored in, behind its decompression; "" of what is computed."""
    kind = node.get_type_name()
    if kind == "Constant":
        stored = str(node.get_element_type().get_type_name())
        return TYPES.get(stored, stored)
    if kind == "FakeQuantize":
        return "int8" if _stored(node.input_value(0).get_node()) else ""
    if kind in ("Convert", "Subtract", "Multiply", "Reshape"):
        return _stored(node.input_value(0).get_node())
    return ""


def _is_quantized(node: Any) -> bool:
    """Whether a value is in 8 bits: quantized, or passed on from such values alone."""
    kind = node.get_type_name()
    if kind == "Concat":
        return all(_is_quantized(value.get_node()) for value in node.input_values())
    if kind in PASSING:
        return _is_quantized(node.input_value(0).get_node())
    return kind == "FakeQuantize"

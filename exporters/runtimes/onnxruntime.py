"""A session of ONNX Runtime. What really executes is read from a profile of one inference, node by node."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# (onnxruntime has no stubs)

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort

from exporters.artifact import TensorInfo, digest
from exporters.cache import place, writing
from exporters.cuda.nvml import gpu_facts
from exporters.errors import ArtifactError, FallbackError, MeasurementError, ToolchainMissing, first_line
from exporters.formats import Runtime
from exporters.graph import inside
from exporters.metadata import Metadata, normalize
from exporters.session import Array, Execution, Feeds, OnDevice, Session
from exporters.spec import ExportSpec, Precision
from exporters.tensorrt import timing
from exporters.toolchain import cache_root

# Execution providers by runtime and device.
PROVIDERS = {
    ("ort", "cpu"): "CPUExecutionProvider",
    ("ort", "cuda"): "CUDAExecutionProvider",
    ("ort-trt", "cuda"): "TensorrtExecutionProvider",
}
TYPES = {
    "float": "float32",
    "float16": "float16",
    "double": "float64",
    "int64": "int64",
    "int32": "int32",
    "int8": "int8",
    "uint8": "uint8",
    "bool": "bool",
}
# Operators whose arithmetic decides an inference's precision; ONNX Runtime's fused names included.
HEAVY = (
    "Conv",
    "FusedConv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "FusedMatMul",
    "FusedGemm",
    "NhwcFusedConv",
    "ConvInteger",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
)
PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}


class OnnxRuntimeSession(Session):
    """An ONNX file on one execution provider; a session that got another one is refused."""

    def __init__(self, path: Path, spec: ExportSpec, runtime: Runtime, device: str) -> None:
        self.path, self.device, self.spec = path, device, spec
        self.provider = PROVIDERS[runtime.id, runtime.device]
        self.timed_on = "" if device == "cpu" else device
        self.stream: Any = _prepare_cuda(device) if device != "cpu" else None
        self.session = self._open(self._options())
        got: list[str] = self.session.get_providers()
        if got[0] != self.provider:
            available = cast("list[str]", ort.get_available_providers())
            raise FallbackError(
                f"ONNX Runtime gave {got[0]} where {self.provider} was asked for",
                f"this onnxruntime has {', '.join(available)}",
            )
        self.stride = spec.model.stride
        self.inputs = tuple(_info(i) for i in self.session.get_inputs())
        self.outputs = tuple(_info(o) for o in self.session.get_outputs())

    def _options(self) -> Any:
        options = cast("Any", ort.SessionOptions())
        options.log_severity_level = 3  # its warnings are about its own optimizer
        return options

    def _open(self, options: Any) -> Any:
        try:
            providers = [(self.provider, self._provider_options())]
            # Else a provider that fails is replaced by others, and the error is a line of its log.
            return cast("Any", ort.InferenceSession(str(self.path), options, providers=providers, enable_fallback=0))
        except Exception as error:
            # ONNX Runtime's exception types are generated and share no base but Exception.
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            what = f"'{self.path}' cannot be loaded by ONNX Runtime ({first_line(error)})"
            raise ArtifactError(what, "export it again") from None

    def _provider_options(self) -> dict[str, str]:
        """Which GPU, our stream, and for TensorRT the precision, its engine cache and its timing cache."""
        if self.stream is None:
            return {}
        options = {"device_id": self.device.partition(":")[2], "user_compute_stream": str(self.stream.cuda_stream)}
        if self.provider == "CUDAExecutionProvider":
            return options | {"use_tf32": "0"}
        # The provider names its engines by the graph without its weights: a folder for each file keeps them apart.
        version, gpu = _tensorrt_version(), str(gpu_facts(self.device).get("name", ""))
        folder = cache_root() / "ort-trt" / timing.slug(f"{gpu} {version} {ort.__version__}")
        engines = folder / f"{digest(self.path)[:32]}-{self.spec.precision}"
        with writing():
            engines.mkdir(parents=True, exist_ok=True)
        _share_timing(self.device, version, folder)
        return options | {
            "trt_engine_cache_enable": "True",  # its parser knows no other words, "1" is refused
            "trt_engine_cache_path": str(engines),
            "trt_fp16_enable": str(self.spec.precision in (Precision.FP16, Precision.INT8)),
            "trt_int8_enable": str(self.spec.precision is Precision.INT8),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(folder),
            "trt_max_workspace_size": str(4 << 30),
        }

    def on_device(self, feeds: Feeds) -> OnDevice:
        return _Bound(self, feeds)

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        names = [o.name for o in self.outputs]
        values: Iterable[Array] = self.session.run(names, dict(feeds))
        return dict(zip(names, values, strict=True))

    def execution(self) -> Execution:
        events = self._profile()
        providers = Counter(str(e["args"].get("provider", "")) for e in events)
        elsewhere: set[str] = set()
        for event in events:
            name, facts = event["name"].removesuffix("_kernel_time"), event["args"]
            if facts.get("provider") != self.provider and not _is_of_shapes(facts):
                elsewhere.add(f"{facts.get('op_name')} {name} on {facts.get('provider')}")
        kinds: Counter[str] = Counter()
        for event in events:
            if event["args"].get("op_name") in HEAVY:
                types = cast("list[dict[str, Any]]", event["args"].get("input_type_shape") or [{}])
                kinds[PRECISIONS.get(next(iter(types[0]), ""), "")] += 1
        casts = sum(e["args"].get("op_name") == "Cast" for e in events)
        heavy = (f"{n} of the convolutions and matrix products in {k}" for k, n in kinds.items())
        notes = (*heavy, f"{casts} casts")
        # Where several occur, the one that did most of the work counts.
        main = kinds.most_common(1)[0][0] if kinds else ""
        return Execution(
            "onnxruntime",
            ort.__version__,
            self.device,
            main,
            dict(providers),
            tuple(sorted(elsewhere)),
            self._options().intra_op_num_threads,
            notes,
        )

    def _profile(self) -> list[dict[str, Any]]:
        """Kernel events of one inference on zeros, in a session of its own, so that this one stays as fast as it is."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._open(options)
            sizes = {"batch": self.spec.batch, "height": self.spec.imgsz[0], "width": self.spec.imgsz[1]}
            feeds = {
                i.name: np.zeros([d if isinstance(d, int) else sizes.get(d, 1) for d in i.shape], i.dtype)
                for i in self.inputs
            }
            session.run(None, feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return [e for e in events if e.get("cat") == "Node" and e.get("name", "").endswith("_kernel_time")]

    def modules(self) -> dict[str, str]:
        return {module: node for module, (_, node) in inside.modules(self.path).items()}

    def run_inside(self, feeds: Feeds, modules: Sequence[str], row: int) -> dict[str, Array]:
        tensors = {module: tensor for module, (tensor, _) in inside.modules(self.path).items() if module in modules}
        names = list(dict.fromkeys(tensors.values()))
        # On a CPU, whatever the provider: what is asked is what the graph says.
        graph = inside.with_outputs(self.path, names)
        session = cast("Any", ort.InferenceSession(graph, self._options(), providers=["CPUExecutionProvider"]))
        made = zip(names, session.run(names, dict(feeds)), strict=True)
        values: dict[str, Array] = {name: value[row : row + 1] for name, value in made}
        return {module: values[tensor] for module, tensor in tensors.items()}

    def metadata(self) -> Metadata:
        values = dict(self.session.get_modelmeta().custom_metadata_map)
        if "names" not in values and "stride" not in values:
            raise ArtifactError(f"'{self.path}' holds no metadata (metadata_props)", "export it again")
        return normalize(values, str(self.path))

    def close(self) -> None:
        del self.session


class _Bound(OnDevice):
    """Feeds and outputs bound to GPU memory, run on the session's own stream."""

    def __init__(self, session: OnnxRuntimeSession, feeds: Feeds) -> None:
        import torch

        self.session, self.stream = session, session.stream
        number = int(session.device.partition(":")[2])
        self.binding = session.session.io_binding()
        self.held = [ort.OrtValue.ortvalue_from_numpy(feeds[i.name], "cuda", number) for i in session.inputs]
        for info, value in zip(session.inputs, self.held, strict=True):
            self.binding.bind_ortvalue_input(info.name, value)
        self.number = number
        self._bind_outputs()
        self.options = ort.RunOptions()
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # events time it instead
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _bind_outputs(self) -> None:
        for info in self.session.outputs:
            self.binding.bind_output(info.name, "cuda", self.number)

    def forget(self) -> None:
        self.wait()
        self.binding.clear_binding_outputs()
        self._bind_outputs()

    def enqueue(self, graph: bool = False) -> None:
        self.session.session.run_with_iobinding(self.binding, self.options)

    def capture(self) -> bool:
        return False

    def compute_ms(self, graph: bool = False) -> float:
        self.start.record(self.stream)
        self.enqueue()
        self.end.record(self.stream)
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end))

    def wait(self) -> None:
        self.stream.synchronize()

    def outputs(self) -> dict[str, Array]:
        self.wait()
        values = self.binding.copy_outputs_to_cpu()
        if len(values) < len(self.session.outputs):
            raise MeasurementError("an inference left no outputs", "the session stopped computing; check the artifact")
        return {info.name: value for info, value in zip(self.session.outputs, values, strict=True)}

    def close(self) -> None:
        self.held.clear()
        del self.binding


def _prepare_cuda(device: str) -> Any:
    """Loads the CUDA libraries that PyTorch brings, where ONNX Runtime finds them, and makes a stream.

    Raises:
        ToolchainMissing: PyTorch sees no GPU.
    """
    # TensorRT rounds FP32 to TF32 unless it is told not to, for which its provider has no option.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    import torch

    if not torch.cuda.is_available():
        raise ToolchainMissing("PyTorch sees no NVIDIA GPU", "run it on a machine with an NVIDIA GPU and driver")
    torch.cuda.set_device(device)
    cast("Any", ort).preload_dlls()
    _tensorrt_version()  # loads libnvinfer, which TensorrtExecutionProvider links against
    return torch.cuda.Stream(device)


def _tensorrt_version() -> str:
    """Version of the TensorRT whose libraries the provider finds; "" where its Python package is not here."""
    try:
        return str(importlib.import_module("tensorrt").__version__)
    except (ImportError, OSError, RuntimeError):  # a library that cannot be loaded, too
        return ""


def _share_timing(device: str, version: str, folder: Path) -> None:
    """Begins the provider's timing cache with that of the engine format: the same tactics of the same TensorRT."""
    facts = gpu_facts(device)
    ours = timing.kept_path("TensorRT", version, str(facts.get("name", "")))
    capability = str(facts.get("compute_capability", "")).replace(".", "")
    theirs = folder / f"TensorrtExecutionProvider_cache_sm{capability}.timing"  # its name for it
    if ours.is_file() and not theirs.exists():
        with writing():
            place(ours.read_bytes(), theirs)


def _is_of_shapes(facts: Mapping[str, Any]) -> bool:
    """Whether a node computes whole numbers on the CPU: ONNX Runtime leaves arithmetic of shapes there, on purpose."""
    made = cast("list[dict[str, Any]]", facts.get("output_type_shape") or [])
    types = {name for output in made for name in output}
    return facts.get("provider") == "CPUExecutionProvider" and bool(types) and types <= {"int64", "int32", "bool"}


def _info(value: Any) -> TensorInfo:
    """A tensor's name, shape and dtype as ONNX Runtime reports them."""
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")
    shape = tuple(d if isinstance(d, int) else str(d or f"axis{n}") for n, d in enumerate(value.shape))
    return TensorInfo(value.name, shape, TYPES.get(kind, kind))

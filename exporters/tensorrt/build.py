"""Engines from networks: configuration, profiles, timing caches, and the builder's log made one line with a fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.cache import place, writing
from exporters.errors import BadRequest, ExportError, NotSupported
from exporters.graph.inside import modules
from exporters.models.spec import belongs
from exporters.spec import INSIDE, ExportSpec, Precision
from exporters.tensorrt import timing
from exporters.tensorrt.calibrators import Calibration, calibrator, size_of
from exporters.tensorrt.library import Library, Log, builder, library
from exporters.tensorrt.network import Bounds, Network, parse, precision_of, profiles_of, show, unquantized
from exporters.toolchain import cache_root

GIB = 1 << 30
FLAGS = {Precision.TF32: ("TF32",), Precision.FP16: ("FP16",), Precision.BF16: ("BF16",)}


@dataclass(frozen=True)
class Built:
    """A plan, what made it (for the header), lines for the record, and the builder's log where it was asked for."""

    plan: bytes
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    log: str


def build(path: Path, spec: ExportSpec, gpu: Mapping[str, str], folder: Path) -> Built:
    """Builds the engine of a request from its ONNX file.

    Args:
        path: the ONNX file, whose types are the precision (explicit Q/DQ for INT8 and FP8).
        spec: the request.
        gpu: name and compute capability of the GPU that is built for; empty on a CPU, where TensorRT-RTX builds.
        folder: where a calibration cache is left.

    Raises:
        NotSupported: this TensorRT or this GPU cannot do it, in its own words.
        BadRequest, ArtifactError, ExportError: see `network` and `_told`.
    """
    on_cpu = not gpu
    found = library(on_cpu)
    implicit = bool(spec.trt_quant_algo)
    _check(found, spec)
    network = parse(path, found, on_cpu, strongly_typed=not is_weakly_typed(spec))
    network.network.name = spec.model.name  # else it is numbered, and two builds differ by that
    heavy = precision_of(network)
    if spec.inside:
        made = modules(path)
        show(found, network, {made[m][0]: INSIDE + m for m in spec.inside if m in made})
    kinds = heavy if network.strongly_typed else {}
    config = builder(on_cpu).create_builder_config()
    bounds = profiles_of(spec, network)
    _add_profiles(found, config, bounds, on_cpu)
    _configure(found, config, spec, network, on_cpu)
    calibration: Calibration | None = None
    if implicit:
        calibration = calibrator(found, spec, path, gpu, folder)
        config.int8_calibrator = calibration.object
        if bounds:
            config.set_calibration_profile(_calibration_profile(spec, on_cpu))
    begun = timing.begin(found, config, spec, gpu)
    with found.recording(spec.verbose) as log:
        serialized: Any = builder(on_cpu).build_serialized_network(network.network, config)
    if calibration is not None and calibration.error is not None:
        raise calibration.error
    if serialized is None:
        raise _told(found, spec, log)
    notes = (timing.keep(config, begun), *(calibration.notes if calibration else ()))
    facts: dict[str, Any] = {
        "made_by": f"{found.name} {found.version}",
        "gpu": gpu.get("name", ""),
        "compute_capability": gpu.get("compute_capability", spec.compute_capability),
        "inputs": _signature(network, True),
        "outputs": _signature(network, False),
        "profiles": [{name: [list(s) for s in shapes] for name, shapes in b.items()} for b in bounds],
        "operators": sorted(heavy),  # convolutions and matrix products
        "unquantized": unquantized(network),
        "typing": "strong" if network.strongly_typed else "weak",
        "quantization": f"implicit {spec.trt_quant_algo}" if implicit else "",
        "network": _tf32(kinds) if spec.precision is Precision.TF32 and config.get_flag(found.flag("TF32")) else kinds,
    }
    return Built(bytes(serialized), facts, tuple(n for n in notes if n), log.text() if spec.verbose else "")


def _tf32(kinds: Mapping[str, str]) -> dict[str, str]:
    """FP32 operators of a graph whose builder may use TF32."""
    return {name: "tf32" if kind == "fp32" else kind for name, kind in kinds.items()}


def is_weakly_typed(spec: ExportSpec) -> bool:
    """Whether the builder may choose between the graph's types and lower ones, where this TensorRT still can.

    Implicit quantization needs it. INT8 Q/DQ gains by it (measured on an H100 with 10.6: see CHANGELOG): a strongly
    typed network runs what stands between convolutions in kernels that convert to FP32 and back.
    """
    found = library(spec.device == "cpu")
    return found.has_weak_typing and spec.precision is Precision.INT8


def _check(found: Library, spec: ExportSpec) -> None:
    """Refuses before minutes of work what this version or GPU cannot do."""
    if spec.trt_quant_algo and not found.has_weak_typing:
        raise NotSupported(
            f"trt_quant_algo {spec.trt_quant_algo}: {found.name} {found.version} has no calibrators (8.6 to 10.x have)"
        )
    if spec.compute_capability and not found.is_rtx:
        raise BadRequest(
            f"compute_capability {spec.compute_capability}: {found.name} builds for the GPU that it runs on",
            "leave it out, or build with TensorRT-RTX",
        )
    if spec.dla is not None:
        cores = int(getattr(builder(found.is_rtx), "num_DLA_cores", 0))
        if spec.dla >= cores:
            raise NotSupported(f"dla {spec.dla}: this device has {cores} DLA cores ({found.name} {found.version})")
    if spec.hardware_compatibility != "none" and (found.is_rtx or not _compatibility(found, spec)):
        raise NotSupported(
            f"hardware_compatibility {spec.hardware_compatibility}: {found.name} {found.version} does not have it"
        )
    for name, wanted in (("version_compatible", spec.version_compatible), ("refit", spec.refit)):
        if wanted and (found.is_rtx or found.flag(_FLAG[name]) is None):
            raise NotSupported(f"{name}: {found.name} {found.version} does not have it without a GPU")


_FLAG = {"version_compatible": "VERSION_COMPATIBLE", "refit": "REFIT"}


def _compatibility(found: Library, spec: ExportSpec) -> Any:
    levels = getattr(found.module, "HardwareCompatibilityLevel", None)
    return getattr(levels, spec.hardware_compatibility.upper(), None)


def _calibration_profile(spec: ExportSpec, on_cpu: bool) -> Any:
    """The shapes of a calibration batch: TensorRT reads as many images of the size that this profile is best for."""
    made = builder(on_cpu).create_optimization_profile()
    for entry in spec.model.inputs:
        shape = spec.model.shape(entry, size_of(spec), spec.imgsz)
        made.set_shape(entry.name, shape, shape, shape)
    return made


def _add_profiles(found: Library, config: Any, bounds: Sequence[Bounds], on_cpu: bool) -> None:
    for number, profile in enumerate(bounds):
        made = builder(on_cpu).create_optimization_profile()
        for name, (low, best, high) in profile.items():
            made.set_shape(name, low, best, high)
        if config.add_optimization_profile(made) < 0:
            raise BadRequest(f"profile {number + 1} is refused by {found.name}", "check its shapes against the model")


def _configure(found: Library, config: Any, spec: ExportSpec, network: Network, on_cpu: bool) -> None:
    """Everything that the builder is told beside the network."""
    module = found.module
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, int(spec.workspace * GIB))
    config.builder_optimization_level = spec.builder_level
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # the inspector's evidence
    shared = getattr(getattr(module, "PreviewFeature", None), "PROFILE_SHARING_0806", None)
    if shared is not None:  # 8.6: else a second context of a dynamic engine finds no free profile
        config.set_preview_feature(shared, True)
    if found.flag("TF32") is not None and spec.precision is not Precision.TF32:
        config.clear_flag(found.flag("TF32"))  # on by default: FP32 would not be FP32
    if not network.strongly_typed:
        names = FLAGS.get(spec.precision, ())
        names += ("INT8", "FP16") if spec.precision is Precision.INT8 else ()
        names += ("FP8", "FP16") if spec.precision is Precision.FP8 else ()
        for name in names:
            if found.flag(name) is None:
                raise NotSupported(f"precision {spec.precision}: {found.name} {found.version} has no flag {name}")
            config.set_flag(found.flag(name))
        _keep_fp32(found, config, spec, network)
    if spec.version_compatible:
        config.set_flag(found.flag("VERSION_COMPATIBLE"))
        if found.flag("EXCLUDE_LEAN_RUNTIME") is not None:
            config.set_flag(found.flag("EXCLUDE_LEAN_RUNTIME"))  # else the plan carries code of its own
    if spec.refit:
        config.set_flag(found.flag("REFIT"))
    if spec.hardware_compatibility != "none":
        config.hardware_compatibility_level = _compatibility(found, spec)
    if spec.dla is not None:
        config.default_device_type = module.DeviceType.DLA
        config.DLA_core = spec.dla
        config.set_flag(found.flag("GPU_FALLBACK"))
    if found.is_rtx:
        _target(found, config, spec)


def _keep_fp32(found: Library, config: Any, spec: ExportSpec, network: Network) -> None:
    """Binds the layers of what the model keeps in FP32 to it, where the builder may choose."""
    kept = [*(path for path, _ in spec.model.fp32), *(["nms"] if spec.nms else [])]
    flag = found.flag("OBEY_PRECISION_CONSTRAINTS")
    if not kept or flag is None:
        return
    config.set_flag(flag)
    single = found.module.DataType.FLOAT
    for number in range(network.network.num_layers):
        layer = network.network.get_layer(number)
        floats = [s for s in range(layer.num_outputs) if layer.get_output(s).dtype == single]
        if floats and belongs(layer.name, kept) and not str(layer.type).endswith(("CONSTANT", "SHAPE")):
            layer.precision = single
            for slot in floats:
                layer.set_output_type(slot, single)


def _target(found: Library, config: Any, spec: ExportSpec) -> None:
    """The GPUs that TensorRT-RTX builds for; that of this machine where none is named.

    Raises:
        NotSupported: it does not build for one of them.
    """
    members: Any = found.module.ComputeCapability
    known = [name for name in dir(members) if name.startswith("SM")]
    wanted = [c for c in spec.compute_capability.split(",") if c]
    if not wanted:
        return
    config.num_compute_capabilities = len(wanted)
    for number, capability in enumerate(wanted):
        name = f"SM{capability.replace('.', '')}"
        if name not in known:
            has = ", ".join(f"{n[2:-1]}.{n[-1]}" for n in sorted(known, key=lambda n: int(n[2:])))
            raise NotSupported(f"{found.name} {found.version} does not build for {capability}: it builds for {has}")
        config.set_compute_capability(getattr(members, name), number)


def _signature(network: Network, inputs: bool) -> list[dict[str, Any]]:
    count = network.network.num_inputs if inputs else network.network.num_outputs
    get = network.network.get_input if inputs else network.network.get_output
    return [
        {"name": t.name, "shape": [int(d) for d in t.shape], "dtype": str(t.dtype).rpartition(".")[2].split(":")[0]}
        for t in (get(i) for i in range(count))
    ]


def _told(found: Library, spec: ExportSpec, log: Log) -> ExportError | NotSupported | BadRequest:
    """What the builder's log says, as one line with the fix; a verbose build's whole log is kept."""
    kept = cache_root() / "logs" / f"{timing.slug(f'{spec.model.name} {spec.precision}')}-builder.log"
    if spec.verbose:
        with writing():
            place(log.text().encode(), kept)
    errors = log.errors()
    said = next((e for e in errors if "Could not find any implementation" in e), errors[0] if errors else "no words")
    text = " ".join(errors)
    made = f"{found.name} {found.version} built no engine of {spec.model.name} {spec.precision} ({said[:300]})"
    if "UNSUPPORTED_STATE" in text or "UNSUPPORTED_STATE" in log.text():
        return BadRequest(made, f"lower workspace (it is {spec.workspace:g} GiB)")
    if "OutOfMemory" in text or "out of memory" in text.lower() or "cudaErrorMemoryAllocation" in text:
        return BadRequest(made, "lower batch or imgsz, or free memory of the GPU")
    if "workspace" in text.lower() and any(w in text.lower() for w in ("insufficient", "increas", "greater than")):
        return BadRequest(made, f"raise workspace (it is {spec.workspace:g} GiB)")
    if "Could not find any implementation" in text and spec.trt_quant_algo:
        return NotSupported(f"{made}; the calibrator {spec.trt_quant_algo} has no kernels for it")
    if "Could not find any implementation" in text:
        return ExportError(made, f"raise workspace (it is {spec.workspace:g} GiB), or lower builder_level")
    if "is not supported" in said and found.is_rtx:
        return NotSupported(made)
    return ExportError(made, f"read {kept}" if spec.verbose else "add --verbose, which keeps the builder's log")

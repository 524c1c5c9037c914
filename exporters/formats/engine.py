"""Engine: TensorRT 8.6 to 11 on the GPU that builds it, or TensorRT-RTX ahead of time; made from the ONNX file."""
# pyright: reportUnknownMemberType=false
# (onnx.load and onnx.save leave the type of a path open)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from exporters.artifact import Achieved, Artifact
from exporters.errors import BadRequest
from exporters.formats import TENSOR_CORE_TERMS, Format, Job, Made, Runtime, Step, no_nms
from exporters.session import Session
from exporters.spec import NMS, ExportSpec, Precision
from exporters.tensorrt.header import read_engine, read_metadata, write_engine

BUILDER_LOG = "builder.log"
LARGEST = 2**31 - 1  # elements of a tensor
# The precision of the ONNX file that an engine is made from. No CPU runs BF16 or FP8 graphs to compare them with, so
# those are made of the FP32 file by the engine's own step.
GRAPHS = {
    Precision.FP32: Precision.FP32,
    Precision.TF32: Precision.FP32,
    Precision.FP16: Precision.FP16,
    Precision.BF16: Precision.FP32,
    Precision.FP8: Precision.FP32,
    Precision.INT8: Precision.INT8,
}


def parents(spec: ExportSpec) -> tuple[ExportSpec, ...]:
    """The ONNX file in the precision that the graph carries; FP32 where TensorRT itself quantizes.

    `batch` is the largest batch: the ONNX file's batch axis varies where it is above 1.
    """
    precision = Precision.FP32 if spec.trt_quant_algo else GRAPHS[spec.precision]
    made = ExportSpec(
        spec.model,
        "onnx",
        precision,
        spec.imgsz,
        spec.batch if spec.dynamic else 1,
        spec.dynamic,
        simplify=spec.simplify,
        opset=spec.opset,
        batch_axis=spec.batch > 1 and not spec.dynamic,
    )
    if precision is Precision.INT8:
        names = ("data", "split", "fraction", "calibrator", "keep")
        made = replace(made, **{name: getattr(spec, name) for name in names})
    return (replace(made, **{name: getattr(spec, name) for name in NMS}),)


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One: the builder's process is the one that calibrates, too."""
    return (Step("build", make, ("onnx",)),)


def make(job: Job) -> Made:
    """Builds the plan and writes it behind its header; a verbose request keeps the builder's log beside it."""
    from exporters.tensorrt.build import build

    gpu: Mapping[str, str] = {}
    if job.spec.device != "cpu":
        from exporters.cuda.context import enter

        gpu = enter(job.spec.device)
    source = _in_precision(job)
    try:
        built = build(source, job.spec, gpu, job.folder)
    finally:
        if source != job.parents[0].path:
            source.unlink()
    target = job.folder / f"{job.stem}.engine"
    write_engine(target, {**job.metadata.values(), "plan": built.facts}, built.plan)
    if built.log:
        (job.folder / BUILDER_LOG).write_text(built.log, encoding="utf-8")
    return Made(target.name, built.notes)


def _in_precision(job: Job) -> Path:
    """The ONNX file whose types are the request's: the parent's, or one that is made of it and removed afterwards."""
    import onnx

    from exporters.tensorrt.build import is_weakly_typed

    source, spec = job.parents[0].path, job.spec
    if spec.trt_quant_algo or spec.precision not in (Precision.INT8, Precision.FP8, Precision.BF16):
        return source
    from exporters.graph.fp16 import to_bf16, to_fp16
    from exporters.graph.padding import pad
    from exporters.graph.qdq import quantize
    from exporters.graph.siblings import merge

    kept = [*(path for path, _ in spec.model.fp32), *(["nms"] if spec.nms else [])]
    graph = onnx.load(source)
    if spec.precision is Precision.FP8:
        graph, _ = quantize(source, job.folder, replace(spec, batch_axis=parents(spec)[0].batch_axis))
    if spec.precision is Precision.INT8:
        graph = pad(graph)
    if spec.precision is Precision.BF16:
        graph = to_bf16(graph, kept)
    else:
        merge(graph)
        if spec.precision is Precision.FP8 or not is_weakly_typed(spec):  # else the builder chooses FP16 for the rest
            graph = to_fp16(graph, kept)
    target = job.folder / "graph.onnx"
    onnx.save(graph, target)
    return target


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Deserializes the plan, which is native code: callers have checked where it comes from."""
    from exporters.runtimes.tensorrt import TensorRtSession

    return TensorRtSession(artifact.path, spec, device)


def inspect(path: Path) -> Achieved:
    """The engine inspector's word; of TensorRT-RTX's plans the types of the network that they were built from."""
    file = read_engine(path)
    from exporters.tensorrt.inspector import achieved_of_network, achieved_of_plan

    # Where there is a GPU the library that is loaded is TensorRT, which reads no plan of TensorRT-RTX.
    is_rtx = str(file.facts.get("made_by", "")).startswith("TensorRT-RTX")
    return achieved_of_network(file) if is_rtx else achieved_of_plan(path)


def contradiction(path: Path, spec: ExportSpec) -> str:
    """What our header says that the plan was built for, and the request asks otherwise; "" where it says nothing."""
    facts = read_engine(path).facts
    built = [c for c in str(facts.get("compute_capability", "")).split(",") if c]
    for asked in (c for c in spec.compute_capability.split(",") if c):
        if built and asked not in built:
            return f"the engine was built for compute capability {', '.join(built)}, and {asked} is asked for"
    for what, tensors in (("inputs", spec.model.inputs), ("outputs", spec.model.outputs)):
        has, wanted = _names(facts.get(what)), [t.name for t in tensors]
        if has and sorted(has) != sorted(wanted):
            return f"the engine has the {what} {', '.join(has)}, and the model {', '.join(wanted)}"
    for entry in () if spec.dynamic or spec.profiles else spec.model.inputs:
        wanted = list(spec.model.shape(entry, spec.batch, spec.imgsz))
        has = next((list(t["shape"]) for t in facts.get("inputs", []) if t["name"] == entry.name), wanted)
        if len(has) != len(wanted) or any(h not in (-1, w) for h, w in zip(has, wanted, strict=True)):
            return f"the engine's input {entry.name} has shape {has}, and {wanted} is asked for"
    told = facts.get("profiles")
    if spec.profiles and told is not None:
        asked_shapes = [
            {i.name: [list(spec.model.shape(i, b, (h, w))) for b, h, w in profile] for i in spec.model.inputs}
            for profile in spec.profiles
        ]
        if told != asked_shapes:
            return f"the engine was built with the profiles {told}, and {asked_shapes} are asked for"
    return ""


def _names(told: Any) -> list[str]:
    """Names of the tensors that a header lists, whatever it holds there."""
    entries = cast("list[Any]", told) if isinstance(told, list) else []
    return [str(cast("dict[str, Any]", e).get("name")) if isinstance(e, dict) else str(e) for e in entries]


def depends(spec: ExportSpec) -> Mapping[str, str]:
    """An engine belongs to a GPU model; what was given to time or calibrate with is part of the request."""
    from exporters.artifact import digest
    from exporters.cuda.nvml import gpu_facts

    found = {"gpu": str(gpu_facts(spec.device).get("name", "")) if spec.device != "cpu" else ""}
    for name in ("timing_cache", "calibration_cache"):
        value = str(getattr(spec, name))
        found[name] = digest(Path(value)) if value not in ("", "off") else value
    return found


def refusal(spec: ExportSpec) -> str:
    """What no TensorRT can do, or what the request forgot.

    Raises:
        BadRequest: INT8 without a calibration set, options that exclude each other, a profile that the model or the
            batch contradicts.
    """
    model = spec.model
    if spec.precision in (Precision.INT8, Precision.FP8) and not (spec.data or spec.calibration_cache):
        raise BadRequest(
            f"{spec.precision.name} needs images to calibrate on and none are given (data '')",
            "add --data: a data set YAML, a folder of images, or module:factory",
        )
    implicit = bool(spec.trt_quant_algo)
    explicit = next((k for k in ("calibrator", "keep") if k in spec.changed()), None) if implicit else None
    if explicit:
        raise BadRequest(
            f"option '{explicit}' with trt_quant_algo {spec.trt_quant_algo}: there TensorRT itself chooses ranges and "
            "layers",
            "leave one of them out",
        )
    if implicit and spec.precision is not Precision.INT8:
        raise BadRequest(f"trt_quant_algo {spec.trt_quant_algo} with {spec.precision}", "ask for int8, or leave it out")
    if spec.calibration_cache and not implicit:
        raise BadRequest(
            f"calibration_cache '{spec.calibration_cache}' without trt_quant_algo: explicit Q/DQ holds its own scales",
            "add --trt-quant-algo, or leave it out",
        )
    if spec.device == "cpu" and spec.nms:
        return "nms: TensorRT-RTX has no kernel for NonMaxSuppression (seen with 1.7.1)"
    if spec.device == "cpu" and implicit:
        return "implicit quantization calibrates on the GPU, and TensorRT-RTX has none"
    for precision, least, name in ((Precision.FP8, 8.9, "Ada"), (Precision.BF16, 8.0, "Ampere")):
        old = next((c for c in spec.compute_capability.split(",") if c and float(c) < least), "")
        if old and spec.precision is precision:
            return f"{precision} needs compute capability {least} ({name}) or newer, and {old} is asked for"
    if spec.device != "cpu" and spec.compute_capability:
        raise BadRequest(
            f"compute_capability {spec.compute_capability} with device {spec.device}: the engine is built for that GPU",
            "leave one of them out",
        )
    for entry in model.inputs:
        values = math.prod(model.shape(entry, spec.batch, spec.imgsz))
        if values > LARGEST:
            raise BadRequest(
                f"batch {spec.batch}: input '{entry.name}' would have {values:.3g} values, and TensorRT counts to "
                f"{LARGEST}",
                "lower batch or imgsz",
            )
    if spec.profiles and not spec.dynamic:
        raise BadRequest("profiles are given and the shape is fixed", "add --dynamic, or leave profiles out")
    if spec.profiles:
        _check_profiles(spec)
    if spec.device == "cpu" and spec.timing_cache:
        raise BadRequest(
            f"timing_cache '{spec.timing_cache}' with device cpu: nothing is timed without a GPU", "leave it out"
        )
    if spec.dynamic and spec.precision is Precision.INT8 and implicit and not model.has_images:
        return "implicit quantization of dynamic inputs that are no images"
    if because := no_nms(spec):
        return because
    if spec.device == "cpu" and not spec.compute_capability:
        raise BadRequest(
            "an engine is built on its GPU, or ahead of time for a compute capability, and neither is named",
            "add --device 0, or --compute-capability, as in 8.6,8.9,12.0",
        )
    return ""


def _check_profiles(spec: ExportSpec) -> None:
    """TensorRT builds these with a warning at most, and the engine then fails, or answers for another size."""
    stride, largest = spec.model.stride, max(profile[2][0] for profile in spec.profiles)
    for entry in spec.model.inputs:
        for batch, *size in (profile[2] for profile in spec.profiles):
            shape = spec.model.shape(entry, batch, (size[0], size[1]))
            if math.prod(shape) > LARGEST:
                raise BadRequest(
                    f"profile max {batch}x{size[0]}x{size[1]}: input '{entry.name}' would have {math.prod(shape):.3g} "
                    "values, and TensorRT counts to 2147483647",
                    "lower it",
                )
    for profile in spec.profiles:
        for name, shape in zip(("min", "opt", "max"), profile, strict=True):
            wrong = next((s for s in shape[1:] if s % stride), None)
            if wrong is not None and spec.model.has_images:
                words = "x".join(map(str, shape))
                raise BadRequest(
                    f"profile {name} {words}: {wrong} is not a multiple of the model's stride {stride}",
                    f"use {max(wrong // stride, 1) * stride} or {(wrong // stride + 1) * stride}",
                )
    if spec.batch != largest:
        raise BadRequest(
            f"batch {spec.batch} is not the largest of the profiles ({largest})",
            f"add --batch {largest}, or change them",
        )
    sizes = [(low[1:], high[1:]) for low, _, high in spec.profiles]
    if spec.model.has_images and not any(
        all(a <= s <= b for a, s, b in zip(low, spec.imgsz, high, strict=True)) for low, high in sizes
    ):
        raise BadRequest(
            f"imgsz {spec.imgsz[0]}x{spec.imgsz[1]} lies in none of the profiles", "add --imgsz, or change them"
        )


FORMAT = Format(
    id="engine",
    aliases=("tensorrt", "trt"),
    title="TensorRT",
    suffix=".engine",
    precisions=tuple(Precision),
    options=frozenset(
        {
            "batch",
            "dynamic",
            "device",
            "simplify",
            "opset",
            "verbose",
            "data",
            "split",
            "fraction",
            "calibrator",
            "keep",
            *NMS,
            "workspace",
            "profiles",
            "builder_level",
            "timing_cache",
            "hardware_compatibility",
            "version_compatible",
            "refit",
            "dla",
            "trt_quant_algo",
            "calibration_cache",
            "compute_capability",
        }
    ),
    toolchain="tensorrt",
    toolchains={"cpu": "rtx"},
    runtimes=(
        # Its kernels have an accumulator of their own type (`xmma_..._f16f16_f16f16_f16` or `..._f16f16_f16f32_f32`;
        # github.com/NVIDIA/TensorRT/issues/1237 and 2942), and the faster one is taken.
        Runtime("trt", "cuda", tuple(Precision), fp16_terms=TENSOR_CORE_TERMS),
        Runtime(
            "rtx",
            "cpu",
            (),
            "an engine that TensorRT-RTX builds ahead of time runs on the GPUs that it was built for, and on no CPU",
            runs=False,
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=parents,
    refusal=refusal,
    metadata=read_metadata,
    contradiction=contradiction,
    depends=depends,
    smaller_batches=True,
    shows_inside=True,
    is_code=True,
)

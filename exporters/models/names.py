"""The names that a checkpoint's pickle may use, exactly; others are refused, unknown layers by their family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from exporters.models.refusal import STATE_ONLY, RefusalError, shown
from exporters.models.stand_ins import Make, Name, Role, Stub, as_list, as_tuple, keys, set_items
from exporters.models.tensors import (
    NOT_NUMPY,
    NUMPY,
    STORAGES,
    UNTYPED,
    from_type,
    parameter,
    tensor_v2,
    tensor_v3,
)

# Layers by which a family of models that exportgate does not know is recognized, the most telling first.
_FAMILIES = {
    "an RT-DETR model": "RTDETRDetectionModel RTDETRDecoder HGStem HGBlock AIFI",
    "a YOLO-World model": "WorldModel WorldDetect C2fAttn ImagePoolingAttn",
    "a YOLOE model": "YOLOEModel YOLOESegModel YOLOEDetect YOLOESegment SAVPE",
    "a YOLOv10 model": "v10Detect C2fCIB CIB SCDown PSA",
    "a YOLO12 model": "A2C2f ABlock AAttn",
    "a YOLO26 model": "Segment26 Pose26 OBB26 Proto26",
    "a YOLO11 or YOLO26 model": "C3k2 C2PSA C3k",
    "a YOLOv9 model": "RepNCSPELAN4 ELAN1 AConv ADown SPPELAN CBLinear CBFuse",
    "a YOLOv8 model with Ghost layers": "GhostConv C3Ghost GhostBottleneck",
    "a YOLOv5 model": "C3",
}
_FACTORY = "use a YOLOv8 checkpoint, or give the model as an importable factory (package.module:function)"


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in arguments[0] if arguments else ():
        set_items(made, pair)
    return made


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    return set(keys(as_list(arguments[0]) if arguments else ()))


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return as_tuple(arguments[0])


def _method(arguments: tuple[Any, ...]) -> Stub:
    # Real files hold bound methods: heads of 8.0.x keep `Detect.forward` as an attribute, a fused model its
    # `forward_fuse`. Python pickles both as a call of getattr. The stand-in has a name and can do nothing.
    owner, attribute = arguments
    origin: Any = owner.origin if type(owner) is Stub else owner
    if type(origin) is Name and origin.role is Role.CLASS and attribute in ("forward", "forward_fuse", "forward_split"):
        return Stub(Name("builtins", "getattr", Role.CLASS), {})
    raise _unsafe("builtins", "getattr")


def _unsafe(module: str, name: str) -> RefusalError:
    what = f"names {shown(module)}.{shown(name)}, which no checkpoint needs and which would run if it were unpickled"
    return RefusalError(what, f"do not load this file; {STATE_ONLY}", unsafe=True)


def _names() -> Iterable[Name]:
    layers = {
        "conv": "Conv Concat",
        "block": "C2f SPPF Bottleneck DFL Proto",
        "head": "Detect Segment Pose OBB Classify",
    }
    # Until 8.0.50 or so `ultralytics.nn.modules` was one file.
    classes = {f"ultralytics.nn.modules.{module}": names for module, names in layers.items()}
    classes["ultralytics.nn.modules"] = " ".join(layers.values())
    classes["ultralytics.nn.tasks"] = "DetectionModel SegmentationModel PoseModel OBBModel ClassificationModel"
    modules = {
        "activation": "SiLU ReLU ReLU6 LeakyReLU PReLU ELU GELU Mish Hardswish Hardsigmoid Sigmoid Tanh Softmax",
        "batchnorm": "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm",
        "container": "Sequential ModuleList ModuleDict",
        "conv": "Conv1d Conv2d Conv3d ConvTranspose2d",
        "dropout": "Dropout Dropout2d",
        "flatten": "Flatten",
        "linear": "Linear Identity",
        "loss": "BCEWithLogitsLoss CrossEntropyLoss",
        "normalization": "LayerNorm GroupNorm",
        "padding": "ZeroPad2d",
        "pooling": "MaxPool2d AvgPool2d AdaptiveAvgPool2d AdaptiveMaxPool2d",
        "sparse": "Embedding",
        "upsampling": "Upsample UpsamplingNearest2d",
    }
    classes |= {f"torch.nn.modules.{module}": names for module, names in modules.items()}
    # Not layers: what trainings of 8.0.100 to 8.4 left in their checkpoints, beside the weights.
    classes |= {
        "ultralytics.utils": "IterableSimpleNamespace",
        "ultralytics.yolo.utils": "IterableSimpleNamespace",
        "ultralytics.utils.tal": "TaskAlignedAssigner RotatedTaskAlignedAssigner",
        "ultralytics.utils.loss": "v8DetectionLoss v8SegmentationLoss v8PoseLoss v8OBBLoss v8ClassificationLoss "
        "BboxLoss RotatedBboxLoss KeypointLoss DFLoss",
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "pathlib": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
        "pathlib._local": "PosixPath WindowsPath",
        "torch": "device",
        "numpy": "dtype",
        "numpy.core.multiarray": "scalar",
        "numpy._core.multiarray": "scalar",
        "_codecs": "encode",
    }
    for module, names in classes.items():
        yield from (Name(module, name, Role.CLASS) for name in names.split())
    functions: dict[tuple[str, str], Make] = {
        ("collections", "OrderedDict"): _ordered_dict,
        ("__builtin__", "set"): _set, ("builtins", "set"): _set,
        ("__builtin__", "frozenset"): _set, ("builtins", "frozenset"): _set,
        ("__builtin__", "getattr"): _method, ("builtins", "getattr"): _method,
        ("torch", "Size"): _size,
        ("torch._utils", "_rebuild_tensor_v2"): tensor_v2,
        ("torch._utils", "_rebuild_tensor_v3"): tensor_v3,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): from_type,
    }  # fmt: skip
    yield from (Name(module, name, Role.FUNCTION, make) for (module, name), make in functions.items())
    for name, dtype in STORAGES.items():
        yield Name("torch", name, Role.STORAGE, dtype=dtype)
    yield Name("torch.storage", "UntypedStorage", Role.STORAGE, dtype=UNTYPED)
    yield from (Name("torch", name, Role.CONSTANT, dtype=name) for name in (*NUMPY, *NOT_NUMPY))
    yield Name("torch", "Tensor", Role.CONSTANT)
    yield from (Name("torch.nn.parameter", name, Role.CONSTANT) for name in ("Parameter", "Buffer"))


_TABLE = {(name.module, name.name): name for name in _names()}


def resolved(module: str, name: str, unknown: dict[str, Name]) -> Name:
    """The entry of the table, or a stand-in for an unknown layer, which is added to `unknown`.

    Raises:
        RefusalError: unsafe for any other name; not unsafe for the models of YOLOv5's and YOLOv7's own repositories.
    """
    found = _TABLE.get((module, name))
    if found is not None:
        return found
    if module.startswith(("ultralytics.nn.", "torch.nn.modules.")) and name.isidentifier() and not name.startswith("_"):
        return unknown.setdefault(name, Name(module, name, Role.UNKNOWN))
    if module in ("models.yolo", "models.common", "models.experimental") and name.isidentifier():
        what = f"is a YOLOv5 or YOLOv7 model of its own repository (it has {shown(module)}.{shown(name)})"
        raise RefusalError(f"{what}, which exportgate does not know", _FACTORY)
    raise _unsafe(module, name)


def unknown_layers(unknown: dict[str, Name]) -> RefusalError:
    """The refusal of a model with layers outside the table; says its family where the layers tell it."""
    listed = ", ".join(shown(name) for name in list(unknown)[:6]) + (", ..." if len(unknown) > 6 else "")
    for family, layers in _FAMILIES.items():
        if not unknown.keys().isdisjoint(layers.split()):
            what = f"is {family} (it has {listed}), which exportgate does not know"
            return RefusalError(what, _FACTORY)
    module = next(iter(unknown.values())).module
    plural = "s" if len(unknown) > 1 else ""
    return RefusalError(f"has layer{plural} that exportgate does not know: {listed} (of {shown(module)})", _FACTORY)

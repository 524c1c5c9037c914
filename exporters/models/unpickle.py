"""Reads the pickle of a torch.save archive into inert objects; nothing of the file is ever executed.

This is a machine of its own for the few opcodes that torch.save writes, not a subclass of `pickle.Unpickler`. That one
calls `__setstate__`, `append`, `extend` and `__setitem__` of what it has built, reserves memory for any memo index that
the file names, and hashes tuples nested as deep as the file likes. Here a name of the file is looked up in an exact
table, and the result is a `Stub`, a `Tensor` or a plain container that this module made itself.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from exporters.errors import CheckpointError, UnsafeFile

Array = npt.NDArray[Any]
Make = Callable[[tuple[Any, ...]], Any]
_T = TypeVar("_T")

# The largest pickle seen (YOLOv9t) has 0.34 MB. The caps keep what a hostile file can claim under about 1 GB of memory:
# each byte of a pickle can make an object of some 60 bytes, each container one of some 200.
MAX_PICKLE = 8 * 2**20
MAX_OBJECTS = 2**20
MAX_DIMENSIONS = 32

_AGAIN = "copy or download the file again"
_STATE_ONLY = "have its owner save model.state_dict() alone, as .safetensors or with torch.save"

# torch's dtypes that numpy can hold; bfloat16 is widened to float32, which is exact.
NUMPY = {
    "float32": "<f4", "float16": "<f2", "float64": "<f8", "bfloat16": "<u2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "|i1", "uint8": "|u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "bool": "|u1",
    "complex64": "<c8", "complex128": "<c16",
}  # fmt: skip
_NOT_NUMPY = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "complex32")
_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "DoubleStorage": "float64", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_UNTYPED = "bytes"


class Role(Enum):
    """What a name of the file may be used for."""

    CLASS = auto()  # becomes a Stub when it is instantiated
    FUNCTION = auto()  # replaced by a function of this module
    STORAGE = auto()  # the type in a persistent id
    CONSTANT = auto()  # a dtype or a tensor type, only ever passed on
    UNKNOWN = auto()  # a layer outside the table: reading goes on, so that the refusal can name the model's family


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Name:
    """A global of the file, as a name only: nothing is imported for it."""

    module: str
    name: str
    role: Role
    make: Make | None = None
    dtype: str = ""


@dataclass(slots=True, eq=False, repr=False)
class Stub:
    """Stands for an instance of a class that is not imported: its name, and the attributes that the file gave it."""

    origin: Name
    attrs: dict[Any, Any]


@dataclass(frozen=True, slots=True, repr=False)
class Storage:
    """The values of one or more tensors: an entry of the archive named `data/<key>`, of `size` elements of `dtype`."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True, slots=True, repr=False)
class Tensor:
    """A view into a storage, in elements; its bounds were checked when it was made."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class RefusalError(Exception):
    """Raised inside the reader, which adds the file's name: what is wrong, the fix, and whether code would run."""

    def __init__(self, what: str, fix: str, *, unsafe: bool = False) -> None:
        super().__init__(what)
        self.what, self.fix, self.unsafe = what, fix, unsafe

    def of(self, file: str) -> CheckpointError | UnsafeFile:
        """This refusal as the error that people see."""
        return (UnsafeFile if self.unsafe else CheckpointError)(f"{file} {self.what}", self.fix)


def widened(raw: bytes | bytearray | memoryview, dtype: str) -> Array:
    """The elements of little-endian `raw`, 1-d, of torch's `dtype`: bfloat16 as float32, others as themselves."""
    flat = np.frombuffer(raw, dtype=NUMPY[dtype])
    if dtype == "bfloat16":
        # bfloat16 is the upper half of a float32.
        return (flat.astype(np.uint32) << 16).view(np.float32)
    # A byte other than 0 and 1 is no valid bool of numpy.
    return flat != 0 if dtype == "bool" else flat


def array(tensor: Tensor, raw: bytes) -> Array:
    """The tensor's values as a contiguous, writable array of its own.

    Args:
        tensor: a view whose bounds `unpickle` has checked.
        raw: the bytes of its storage, of exactly the size that the storage says.
    """
    itemsize = np.dtype(NUMPY[tensor.dtype]).itemsize
    reach = 0 if 0 in tensor.shape else _reach(tensor.shape, tensor.stride) + 1
    # Only what the view reaches is widened: many may share one storage.
    flat = widened(memoryview(raw)[tensor.offset * itemsize : (tensor.offset + reach) * itemsize], tensor.dtype)
    if tensor.stride == _row_major(tensor.shape):
        return flat.reshape(tensor.shape).copy()
    steps = [step * flat.itemsize for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, steps, writeable=False).copy(order="C")


def shown(text: str) -> str:
    """A string of the file in printable ASCII and at most 100 characters, for one line of a message."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= 100 else f"{plain[:97]}..."


def unpickle(data: bytes) -> Any:
    """The pickle's root: None, bool, int, float, str, bytes, list, tuple, dict, set, Tensor, Storage, Name or Stub.

    Args:
        data: the whole pickle, of at most MAX_PICKLE bytes.

    Raises:
        RefusalError: unsafe, when the pickle names or calls something that is not in the table; otherwise it is
            damaged, has too many objects, or has layers that are not known (the family of the model is named).
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    unknown: dict[str, Name] = {}
    end, position, made = len(data), 0, 0

    def take(start: int, size: int) -> bytes:
        if start + size > end:
            raise ValueError("the pickle ends early")
        return data[start : start + size]

    def popped() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    try:
        while True:
            op = data[position]
            position += 1
            # In the order of how often torch.save writes them: this chain is the reader's inner loop.
            if op == 0x68:  # BINGET
                stack.append(memo[data[position]])
                position += 1
            elif op == 0x72:  # LONG_BINPUT
                memo[int.from_bytes(take(position, 4), "little")] = stack[-1]
                position += 4
            elif op == 0x52:  # REDUCE
                arguments = stack.pop()
                stack[-1] = _called(stack[-1], arguments)
                made += 1
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif op == 0x28:  # MARK
                marks.append(len(stack))
            elif op == 0x7D:  # EMPTY_DICT
                stack.append({})
                made += 1
            elif op == 0x74:  # TUPLE
                stack.append(tuple(popped()))
            elif op == 0x89:  # NEWFALSE
                stack.append(False)
            elif op == 0x58:  # BINUNICODE
                size = int.from_bytes(take(position, 4), "little")
                stack.append(take(position + 4, size).decode())
                position += 4 + size
            elif op == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif op == 0x75:  # SETITEMS
                items = popped()
                _set_items(stack[-1], items)
            elif op == 0x51:  # BINPERSID
                stack[-1] = _storage(stack[-1])
                made += 1
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x86:  # TUPLE2
                second = stack.pop()
                stack[-1] = (stack[-1], second)
            elif op == 0x87:  # TUPLE3
                third, second = stack.pop(), stack.pop()
                stack[-1] = (stack[-1], second, third)
            elif op == 0x5D:  # EMPTY_LIST
                stack.append([])
                made += 1
            elif op == 0x47:  # BINFLOAT
                stack.append(struct.unpack(">d", take(position, 8))[0])
                position += 8
            elif op == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif op == 0x81:  # NEWOBJ
                stack.pop()
                stack[-1] = _instance(stack[-1])
                made += 1
            elif op == 0x62:  # BUILD
                state = stack.pop()
                _build(stack[-1], state)
            elif op == 0x4D:  # BININT2
                stack.append(int.from_bytes(take(position, 2), "little"))
                position += 2
            elif op == 0x88:  # NEWTRUE
                stack.append(True)
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[int.from_bytes(take(position, 4), "little")])
                position += 4
            elif op == 0x4A:  # BININT
                stack.append(int.from_bytes(take(position, 4), "little", signed=True))
                position += 4
            elif op == 0x73:  # SETITEM
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], (key, value))
            elif op == 0x65:  # APPENDS
                items = popped()
                _list(stack[-1]).extend(items)
            elif op == 0x61:  # APPEND
                value = stack.pop()
                _list(stack[-1]).append(value)
            elif op == 0x63:  # GLOBAL
                middle = data.index(b"\n", position)
                last = data.index(b"\n", middle + 1)
                stack.append(_resolved(data[position:middle].decode(), data[middle + 1 : last].decode(), unknown))
                position = last + 1
            elif op == 0x93:  # STACK_GLOBAL
                name, module = _of(stack.pop(), str), _of(stack.pop(), str)
                stack.append(_resolved(module, name, unknown))
            elif op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
                made += 1
            elif op == 0x8C:  # SHORT_BINUNICODE
                stack.append(take(position + 1, data[position]).decode())
                position += 1 + data[position]
            elif op == 0x8A:  # LONG1
                stack.append(int.from_bytes(take(position + 1, data[position]), "little", signed=True))
                position += 1 + data[position]
            elif op == 0x43:  # SHORT_BINBYTES
                stack.append(take(position + 1, data[position]))
                position += 1 + data[position]
            elif op == 0x8F:  # EMPTY_SET
                stack.append(set())
                made += 1
            elif op == 0x90:  # ADDITEMS
                items = popped()
                cast("set[Any]", _of(stack[-1], set)).update(_keys(items))
            elif op == 0x95:  # FRAME
                position += 8
            elif op == 0x80:  # PROTO
                if data[position] > 5:
                    raise ValueError(f"protocol {data[position]}")
                position += 1
            elif op == 0x2E:  # STOP
                root = stack.pop()
                break
            else:
                raise _opcode_refused(op)
            if made > MAX_OBJECTS:
                raise RefusalError(f"has a data.pkl of more than {MAX_OBJECTS} objects", _STATE_ONLY)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        reason = "it refers to what it has not stored" if isinstance(error, KeyError) else shown(str(error))
        raise RefusalError(
            f"is damaged: its data.pkl cannot be read past byte {position} ({reason})", _AGAIN
        ) from error
    if unknown:
        raise _unknown_layers(unknown)
    return root


# Opcodes that call code by name, or by a number or text that a program registered.
_CALLING = {
    0x69: "INST", 0x6F: "OBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x50: "PERSID"
}  # fmt: skip


def _opcode_refused(op: int) -> RefusalError:
    if op in _CALLING:
        what = f"uses the pickle opcode {_CALLING[op]}, which torch.save never writes and which can call any code"
        return RefusalError(what, f"do not load this file; {_STATE_ONLY}", unsafe=True)
    return RefusalError(f"is damaged, or not written by torch.save: its data.pkl has the opcode {op:#04x}", _AGAIN)


def _of(value: Any, kind: type[_T]) -> _T:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, got {type(value).__name__}")
    return value


def _tuple(value: Any) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", _of(value, tuple))


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", _of(value, list))


def _dict(value: Any) -> dict[Any, Any]:
    return cast("dict[Any, Any]", _of(value, dict))


def _keys(values: Iterable[Any]) -> list[Any]:
    """The values, when each may be hashed safely: nested tuples and huge integers can make hashing take for ever."""
    checked = list(values)
    for value in checked:
        if type(value) is int:
            if abs(value) >= 2**60:
                raise ValueError("a key is an integer above 2**60")
        elif value is not None and type(value) not in (str, float, bool, bytes):
            raise TypeError(f"a key is a {type(value).__name__}")
    return checked


def _set_items(target: Any, items: list[Any] | tuple[Any, ...]) -> None:
    _dict(target).update(zip(_keys(items[::2]), items[1::2], strict=True))


def _instance(origin: Any) -> Stub:
    name = _of(origin, Name)
    if name.role not in (Role.CLASS, Role.UNKNOWN):
        raise TypeError(f"{shown(name.name)} is not a class")
    return Stub(name, {})


def _called(callee: Any, arguments: Any) -> Any:
    name = _of(callee, Name)
    return name.make(_tuple(arguments)) if name.make is not None else _instance(name)


def _build(target: Any, state: Any) -> None:
    if type(target) is Stub:
        # Objects with slots give (dict or None, dict of the slots); other states (numpy's dtype) are not needed.
        parts = _tuple(state) if type(state) is tuple else (state,)
        target.attrs = {key: value for part in parts if type(part) is dict for key, value in _dict(part).items()}
    else:
        # A state dict's own attributes, `_metadata`: versions of modules, which have no values.
        _dict(target)


def _storage(pid: Any) -> Storage:
    kind, origin, key, _location, size = _tuple(pid)
    if kind != "storage" or _of(origin, Name).role is not Role.STORAGE:
        raise ValueError("a persistent id that is no storage")
    if _of(size, int) < 0:
        raise ValueError("a storage of negative size")
    return Storage(_of(key, str), origin.dtype, size)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements behind a view's first element its last one lies."""
    return sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))


def _view(storage: Any, dtype: str, offset: Any, shape: Any, stride: Any) -> Tensor:
    if dtype not in NUMPY:
        raise RefusalError(f"holds a tensor of {shown(dtype)}, which numpy has not", "save the weights in FP16 or FP32")
    elements = _of(storage, Storage).size
    if storage.dtype == _UNTYPED:
        elements //= np.dtype(NUMPY[dtype]).itemsize
    extents, steps = _tuple(shape), _tuple(stride)
    if len(extents) != len(steps) or len(extents) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(extents)} dimensions and {len(steps)} strides")
    for value in (offset, *extents, *steps):
        if type(value) is not int or not 0 <= value < 2**60:
            raise ValueError("a tensor whose offset, shape or stride is no natural number")
    if 0 in extents:
        # No element is read, so nothing is out of bounds; but numpy multiplies the other extents.
        if math.prod(filter(None, extents)) >= 2**31:
            raise ValueError("an empty tensor of a huge shape")
        return Tensor(storage, dtype, 0, extents, _row_major(extents))
    last = offset + _reach(extents, steps)
    if last >= elements:
        raise ValueError(f"a tensor that reaches element {last} of a storage of {elements}")
    return Tensor(storage, dtype, offset, extents, steps)


def _tensor_v2(arguments: tuple[Any, ...]) -> Tensor:
    storage = _of(arguments[0], Storage)
    return _view(storage, storage.dtype, *arguments[1:4])


def _tensor_v3(arguments: tuple[Any, ...]) -> Tensor:
    storage, dtype = _of(arguments[0], Storage), _of(arguments[6], Name).dtype
    if storage.dtype not in (_UNTYPED, dtype):
        raise ValueError(f"a {shown(dtype)} tensor over a storage of {storage.dtype}")
    return _view(storage, dtype, *arguments[1:4])


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    return _of(arguments[0], Tensor)


def _from_type(arguments: tuple[Any, ...]) -> Tensor:
    # Only these two, by name: a chain of types within types could be as deep as the file likes.
    rebuild = {"_rebuild_tensor_v2": _tensor_v2, "_rebuild_tensor_v3": _tensor_v3}[_of(arguments[0], Name).name]
    return rebuild(_tuple(arguments[2]))


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in arguments[0] if arguments else ():
        _set_items(made, pair)
    return made


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    return set(_keys(_list(arguments[0]) if arguments else ()))


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return _tuple(arguments[0])


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
    return RefusalError(what, f"do not load this file; {_STATE_ONLY}", unsafe=True)


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
        ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    }  # fmt: skip
    yield from (Name(module, name, Role.FUNCTION, make) for (module, name), make in functions.items())
    for name, dtype in _STORAGES.items():
        yield Name("torch", name, Role.STORAGE, dtype=dtype)
    yield Name("torch.storage", "UntypedStorage", Role.STORAGE, dtype=_UNTYPED)
    yield from (Name("torch", name, Role.CONSTANT, dtype=name) for name in (*NUMPY, *_NOT_NUMPY))
    yield Name("torch", "Tensor", Role.CONSTANT)
    yield from (Name("torch.nn.parameter", name, Role.CONSTANT) for name in ("Parameter", "Buffer"))


_TABLE = {(name.module, name.name): name for name in _names()}

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


def _resolved(module: str, name: str, unknown: dict[str, Name]) -> Name:
    found = _TABLE.get((module, name))
    if found is not None:
        return found
    if module.startswith(("ultralytics.nn.", "torch.nn.modules.")) and name.isidentifier() and not name.startswith("_"):
        return unknown.setdefault(name, Name(module, name, Role.UNKNOWN))
    if module in ("models.yolo", "models.common", "models.experimental") and name.isidentifier():
        what = f"is a YOLOv5 or YOLOv7 model of its own repository (it has {shown(module)}.{shown(name)})"
        raise RefusalError(f"{what}, which exportgate does not know", _FACTORY)
    raise _unsafe(module, name)


_FACTORY = "use a YOLOv8 checkpoint, or give the model as an importable factory (package.module:function)"


def _unknown_layers(unknown: dict[str, Name]) -> RefusalError:
    listed = ", ".join(shown(name) for name in list(unknown)[:6]) + (", ..." if len(unknown) > 6 else "")
    for family, layers in _FAMILIES.items():
        if not unknown.keys().isdisjoint(layers.split()):
            what = f"is {family} (it has {listed}), which exportgate does not know"
            return RefusalError(what, _FACTORY)
    module = next(iter(unknown.values())).module
    plural = "s" if len(unknown) > 1 else ""
    return RefusalError(f"has layer{plural} that exportgate does not know: {listed} (of {shown(module)})", _FACTORY)

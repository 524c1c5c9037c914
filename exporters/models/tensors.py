"""Tensors of a torch.save archive: torch's dtypes as numpy's, and views into storages, checked before they are read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.models.refusal import RefusalError, shown
from exporters.models.stand_ins import Name, Role, Storage, Tensor, as_tuple, of

Array = npt.NDArray[Any]

MAX_DIMENSIONS = 32

# torch's dtypes that numpy can hold; bfloat16 is widened to float32, which is exact.
NUMPY = {
    "float32": "<f4", "float16": "<f2", "float64": "<f8", "bfloat16": "<u2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "|i1", "uint8": "|u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "bool": "|u1",
    "complex64": "<c8", "complex128": "<c16",
}  # fmt: skip
NOT_NUMPY = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "complex32")
STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "DoubleStorage": "float64", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
UNTYPED = "bytes"


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
        tensor: a view whose bounds were checked when it was made.
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


def storage_of(pid: Any) -> Storage:
    """The storage that a persistent id names: ("storage", its type, key, device, number of elements)."""
    kind, origin, key, _location, size = as_tuple(pid)
    if kind != "storage" or of(origin, Name).role is not Role.STORAGE:
        raise ValueError("a persistent id that is no storage")
    if of(size, int) < 0:
        raise ValueError("a storage of negative size")
    return Storage(of(key, str), origin.dtype, size)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements behind a view's first element its last one lies."""
    return sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))


def _view(storage: Any, dtype: str, offset: Any, shape: Any, stride: Any) -> Tensor:
    if dtype not in NUMPY:
        raise RefusalError(f"holds a tensor of {shown(dtype)}, which numpy has not", "save the weights in FP16 or FP32")
    elements = of(storage, Storage).size
    if storage.dtype == UNTYPED:
        elements //= np.dtype(NUMPY[dtype]).itemsize
    extents, steps = as_tuple(shape), as_tuple(stride)
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


def tensor_v2(arguments: tuple[Any, ...]) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: storage, offset, shape, stride, and what inference does not need."""
    storage = of(arguments[0], Storage)
    return _view(storage, storage.dtype, *arguments[1:4])


def tensor_v3(arguments: tuple[Any, ...]) -> Tensor:
    """`torch._utils._rebuild_tensor_v3`, whose seventh argument is the dtype of a view into untyped storage."""
    storage, dtype = of(arguments[0], Storage), of(arguments[6], Name).dtype
    if storage.dtype not in (UNTYPED, dtype):
        raise ValueError(f"a {shown(dtype)} tensor over a storage of {storage.dtype}")
    return _view(storage, dtype, *arguments[1:4])


def parameter(arguments: tuple[Any, ...]) -> Tensor:
    """`torch._utils._rebuild_parameter`: the tensor itself."""
    return of(arguments[0], Tensor)


def from_type(arguments: tuple[Any, ...]) -> Tensor:
    """`torch._tensor._rebuild_from_type_v2`: a tensor rebuilt by another function, here named first."""
    # Only these two, by name: a chain of types within types could be as deep as the file likes.
    rebuild = {"_rebuild_tensor_v2": tensor_v2, "_rebuild_tensor_v3": tensor_v3}[of(arguments[0], Name).name]
    return rebuild(as_tuple(arguments[2]))

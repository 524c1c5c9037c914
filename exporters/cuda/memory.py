"""Buffers: memory of the GPU with pinned memory of the host beside it, which grow and are freed when told."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (PyCUDA has no types)

from __future__ import annotations

from typing import Any

import numpy as np

from exporters.cuda.context import driver
from exporters.errors import BadRequest
from exporters.session import Array


class Buffer:
    """A piece of GPU memory and a pinned host array of the same size. Both grow with what is asked of them."""

    def __init__(self) -> None:
        self.device: Any = None
        self.host: Any = None
        self.bytes = 0

    def reserve(self, count: int) -> int:
        """At least `count` bytes; returns the device's address. What it held is lost when it grows.

        Raises:
            BadRequest: the GPU or the host has no memory left.
        """
        count = max(count, 1)  # an empty tensor needs an address, too
        if count > self.bytes:
            self.free()
            cuda = driver()
            try:
                self.device = cuda.mem_alloc(count)
                self.host = cuda.pagelocked_empty(count, np.uint8)
            except cuda.MemoryError as error:
                self.free()
                free, total = (int(x) for x in cuda.mem_get_info())
                raise BadRequest(
                    f"the GPU has no room for a tensor of {count / 2**20:.0f} MiB ({free / 2**20:.0f} of "
                    f"{total / 2**20:.0f} MiB are free: {str(error).splitlines()[0]})",
                    "lower batch or imgsz, or free memory of the GPU",
                ) from None
            self.bytes = count
        return int(self.device)

    def view(self, shape: tuple[int, ...], dtype: str) -> Array:
        """The host array as an array of this shape."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.host[:count].view(dtype).reshape(shape)

    def fill(self, array: Array) -> int:
        """Copies an array to the GPU and waits; returns the device's address."""
        address = self.reserve(array.nbytes)
        self.view(array.shape, str(array.dtype))[...] = array
        driver().memcpy_htod(self.device, self.host[: array.nbytes])
        return address

    def upload(self, array: Array, stream: Any) -> int:
        """Copies an array to pinned memory and from there to the GPU on a stream, without waiting."""
        address = self.reserve(array.nbytes)
        self.view(array.shape, str(array.dtype))[...] = array
        driver().memcpy_htod_async(self.device, self.host[: array.nbytes], stream)
        return address

    def download(self, shape: tuple[int, ...], dtype: str, stream: Any) -> Array:
        """Copies from the GPU to pinned memory on a stream, without waiting: the result is a view, filled later."""
        found = self.view(shape, dtype)
        if found.nbytes:
            driver().memcpy_dtoh_async(self.host[: found.nbytes], self.device, stream)
        return found

    def free(self) -> None:
        """Gives both pieces back."""
        if self.device is not None:
            self.device.free()
        self.device, self.host, self.bytes = None, None, 0

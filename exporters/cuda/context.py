"""PyTorch's primary context, through PyCUDA: one context a GPU and process, whoever asked for it first."""
# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# (PyCUDA has no types, and is not installed where there is no GPU)

from __future__ import annotations

import atexit
import importlib
from functools import cache
from typing import Any

from exporters.errors import BadRequest, ToolchainMissing


@cache
def driver() -> Any:
    """`pycuda.driver`, initialized.

    Raises:
        ToolchainMissing: PyCUDA or the NVIDIA driver is not there, or there is no GPU; says which.
    """
    try:
        importlib.import_module("pycuda")
    except ImportError:
        raise ToolchainMissing("package pycuda is not installed", "install exportgate[tensorrt]") from None
    try:
        found: Any = importlib.import_module("pycuda.driver")
    except ImportError as error:  # it links against libcuda.so.1, which the driver brings
        raise ToolchainMissing(
            f"there is no NVIDIA driver here ({str(error).splitlines()[0]})", "run it on a machine with an NVIDIA GPU"
        ) from None
    try:
        found.init()
        count = int(found.Device.count())
    except Exception as error:  # noqa: BLE001 (PyCUDA's exceptions are made at run time, one a CUDA error)
        raise ToolchainMissing(
            f"CUDA does not start ({str(error).splitlines()[0]})", "check nvidia-smi and CUDA_VISIBLE_DEVICES"
        ) from None
    if not count:
        raise ToolchainMissing("CUDA sees no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return found


def enter(device: str) -> dict[str, str]:
    """Makes the primary context of "cuda:N" current in this thread; returns the GPU's name and compute capability.

    Raises:
        BadRequest: there is no such GPU.
    """
    found = driver()
    number = int(device.partition(":")[2] or 0)
    count = int(found.Device.count())
    if number >= count:
        raise BadRequest(f"device '{device}': this machine has {count} GPUs", f"use cuda:0 to cuda:{count - 1}")
    chosen, name = found.Device(number), f"cuda:{number}"
    if current() != name or not _entered:
        context = _entered.pop(name, None) or chosen.retain_primary_context()
        context.push()
        if not _entered:
            atexit.register(_leave)
        _pushed.append(context)
        _entered[name] = context  # the last one is the current one
    major, minor = chosen.compute_capability()
    return {"name": str(chosen.name()), "compute_capability": f"{major}.{minor}"}


_entered: dict[str, Any] = {}  # device -> its context, which is held as long as the process lives
_pushed: list[Any] = []  # every push


def _leave() -> None:
    """Takes back every push: PyCUDA aborts a process that ends with a context on its stack."""
    while _pushed:
        _pushed.pop()
        driver().Context.pop()


def current() -> str:
    """The device that was entered last; "cuda:0" where none was."""
    return next(reversed(_entered), "cuda:0")


def free_bytes() -> tuple[int, int]:
    """(free, total) memory of the current GPU in bytes."""
    free, total = driver().mem_get_info()
    return int(free), int(total)

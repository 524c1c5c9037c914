"""What NVML says of a GPU: what it is, its clocks, temperature, throttling, other processes, energy."""
# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# (nvidia-ml-py has no types)

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from functools import cache
from typing import Any

REASONS = {
    0x4: "power cap",
    0x8: "hardware slow-down",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


@cache
def _nvml() -> Any:
    """pynvml, initialized; None where there is no driver."""
    try:
        found: Any = importlib.import_module("pynvml")
        found.nvmlInit()
    except Exception:  # noqa: BLE001 (no package, no driver, no GPU: each has an exception of its own)
        return None
    return found


def _handle(device: str) -> Any:
    nvml = _nvml()
    if nvml is None:
        return None
    number = int(device.partition(":")[2] or 0)
    visible = _visible()
    try:
        if visible is None:
            return nvml.nvmlDeviceGetHandleByIndex(number)
        if number >= len(visible):  # CUDA sees no such GPU
            return None
        if not visible[number].isdecimal():
            return nvml.nvmlDeviceGetHandleByUUID(visible[number])
        return nvml.nvmlDeviceGetHandleByIndex(int(visible[number]))
    except Exception:  # noqa: BLE001 (NVML's errors: no such GPU, no permission)
        return None


def _visible() -> list[str] | None:
    """The GPUs that CUDA is allowed to see, in its order; None where it sees all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if given is None else [v.strip() for v in given.split(",") if v.strip()]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def gpu_facts(device: str = "cuda:0") -> dict[str, Any]:
    """What the GPU is: name, driver, power cap in W, memory in MiB, largest clocks in MHz; empty without a driver."""
    nvml, handle = _nvml(), _handle(device)
    if handle is None:
        return {}
    facts: dict[str, Any] = {
        "name": _text(nvml.nvmlDeviceGetName(handle)),
        "driver": _text(nvml.nvmlSystemGetDriverVersion()),
    }
    with suppress(Exception):
        facts["power_cap_w"] = round(nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)
    with suppress(Exception):
        facts["memory_mib"] = int(nvml.nvmlDeviceGetMemoryInfo(handle).total) >> 20
    with suppress(Exception):
        facts["max_sm_mhz"] = int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
        facts["max_memory_mhz"] = int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
    with suppress(Exception):
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        facts["compute_capability"] = f"{major}.{minor}"
    with suppress(Exception):
        version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        facts["cuda"] = f"{version // 1000}.{version % 1000 // 10}"
    return facts


def gpu_id(device: str) -> str:
    """What tells a GPU from every other one, whatever a process calls it; "" without a driver."""
    nvml, handle = _nvml(), _handle(device)
    with suppress(Exception):
        return _text(nvml.nvmlDeviceGetUUID(handle))
    return ""


def same_gpus(device: str) -> list[str]:
    """The GPUs of this host that have the name of this one, it first, as CUDA_VISIBLE_DEVICES names them."""
    nvml, wanted = _nvml(), gpu_facts(device).get("name")
    if wanted is None:
        return []
    visible = _visible() or [str(n) for n in range(int(nvml.nvmlDeviceGetCount()))]
    numbers = sorted(range(len(visible)), key=lambda n: f"cuda:{n}" != device)
    return [visible[n] for n in numbers if gpu_facts(f"cuda:{n}").get("name") == wanted]


def gpu_state(device: str) -> dict[str, Any]:
    """What the GPU is doing: clocks in MHz, temperature in °C, power in W, throttle reasons, other processes."""
    nvml, handle = _nvml(), _handle(device)
    if handle is None:
        return {}
    state: dict[str, Any] = {}
    with suppress(Exception):
        state["sm_mhz"] = int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        state["memory_mhz"] = int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))
    with suppress(Exception):
        state["celsius"] = int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    with suppress(Exception):
        state["watts"] = round(nvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1)
    with suppress(Exception):
        bits = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        state["throttled"] = [name for bit, name in REASONS.items() if bits & bit]
    with suppress(Exception):
        own = os.getpid()
        found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        state["other_processes"] = sum(int(p.pid) != own for p in found)
    with suppress(Exception):
        state["used_mib"] = int(nvml.nvmlDeviceGetMemoryInfo(handle).used) >> 20
    return state


def energy_mj(device: str) -> int | None:
    """Millijoules since the driver was loaded; None where the GPU does not count them."""
    nvml, handle = _nvml(), _handle(device)
    if handle is None:
        return None
    try:
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except Exception:  # noqa: BLE001 (not supported before Volta)
        return None

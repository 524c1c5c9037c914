"""Machine: the fingerprint that a measurement and its baseline have to share."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from exporters.cuda.nvml import gpu_facts
from exporters.session import cpus


class DiskPeak:
    """How many bytes more of a folder's disk are in use, at most, than when this was made, looked at twice a second.

    What others write meanwhile counts, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = next(p for p in (folder, *folder.parents) if p.is_dir())
        self.before = self.most = shutil.disk_usage(self.folder).used
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.ended.wait(0.5):
            self.most = max(self.most, shutil.disk_usage(self.folder).used)

    def end(self) -> int:
        self.ended.set()
        return max(self.most, shutil.disk_usage(self.folder).used) - self.before


@cache
def fingerprint() -> dict[str, Any]:
    """What this machine is. `id` names the folder of its CPU's baselines: processor, cores and instruction sets."""
    name, flags = _processor()
    cores = cpus()
    gpu = gpu_facts()
    facts: dict[str, Any] = {
        "cpu": name,
        "cores": cores,
        "instruction_sets": flags,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": gpu.get("name"),
        "driver": gpu.get("driver"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    facts |= {"gpu_facts": gpu} if gpu else {}
    facts["id"] = f"{_slug(name)}-{cores}c-{hashlib.sha256(flags.encode()).hexdigest()[:6]}"
    return facts


def baseline_folder(device: str) -> str:
    """Name of the folder of a device's baselines: of the GPU with its power cap, or of the machine."""
    if device == "cpu":
        return str(fingerprint()["id"])
    gpu = gpu_facts(device)
    return f"{_slug(str(gpu.get('name', 'gpu')))}-{gpu.get('power_cap_w', 0)}w"


def comparable(device: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """What must be equal for two measurements to be compared: the device, and the versions of the runtimes.

    What a GPU computes between two events does not depend on the CPU; its name, clocks, power cap and driver do.
    """
    found: dict[str, Any] = {f"version of {k}": v for k, v in sorted(versions.items())}
    if device == "cpu":
        return {k: fingerprint()[k] for k in ("cpu", "cores", "instruction_sets", "gpu", "driver")} | found
    gpu = gpu_facts(device)
    names = (
        "name",
        "compute_capability",
        "memory_mib",
        "power_cap_w",
        "max_sm_mhz",
        "max_memory_mhz",
        "driver",
        "cuda",
    )
    return {f"gpu {k}": gpu.get(k) for k in names} | found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def _processor() -> tuple[str, str]:
    """Model name, and the vector instruction sets that decide which kernels run."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), platform.machine()

    def field(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    flags = sorted(f for f in field("flags").split() if re.match(r"avx|amx|fma|sse4", f))
    return field("model name") or platform.machine(), f"{field('cpu family')}.{field('model')} " + " ".join(flags)

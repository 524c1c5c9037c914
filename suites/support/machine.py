"""Machine: the fingerprint that a measurement and its baseline have to share."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import psutil


@cache
def fingerprint() -> dict[str, Any]:
    """What this machine is. `id` names its folder below baselines/: processor, cores and instruction sets."""
    name, flags = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    facts: dict[str, Any] = {
        "cpu": name,
        "cores": cores,
        "instruction_sets": flags,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": None,
        "driver": None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    facts["id"] = f"{word}-{cores}c-{hashlib.sha256(flags.encode()).hexdigest()[:6]}"
    return facts


def comparable(facts: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """What must be equal for two measurements to be compared: the processor and the versions of the runtimes."""
    return {
        "cpu": facts["cpu"],
        "cores": facts["cores"],
        "instruction_sets": facts["instruction_sets"],
        "gpu": facts["gpu"],
        "driver": facts["driver"],
        **{f"version of {k}": v for k, v in sorted(versions.items())},
    }


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

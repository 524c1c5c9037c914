"""The instruction set of this machine's CPU, and the part of it that a C++ compiler uses. No torch is imported."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from exporters.errors import ToolchainMissing, first_line

# Where a compiler's macro and /proc/cpuinfo have different names, both without underscores.
NAMES = {
    **{"bmi": "bmi1", "lzcnt": "abm", "pclmul": "pclmulqdq", "rdrnd": "rdrand", "sha": "shani", "sse3": "pni"},
    **{"neon": "asimd", "fp16vectorarithmetic": "asimdhp", "matmulint8": "i8mm"},
}
# Instructions of systems and of programs that name them: no compiler uses one of its own accord.
NAMED_ONLY = frozenset(
    {"clflushopt", "clwb", "clzero", "fsgsbase", "fxsr", "mwaitx", "pku", "rdpid", "rdrand", "rdseed", "serialize"}
    | {"waitpkg", "wbnoinvd", "xsave", "xsavec", "xsaveopt", "xsaves"}
)
# What PyTorch calls the instruction set of its vectorized code (AOTI_CPU_ISA), as flags of /proc/cpuinfo.
VECTORS = {
    "avx512": ("avx512f", "avx512dq", "avx512vl", "avx512bw", "fma"),
    "avx2": ("avx2", "fma", "f16c"),
}


@cache
def of_this_cpu() -> frozenset[str]:
    """Flags of /proc/cpuinfo without underscores ("avx512vnni"); empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    told = next((v for k, _, v in (line.partition(":") for line in lines) if k.strip() in ("flags", "Features")), "")
    return frozenset(told.replace("_", "").split())


def compiler() -> str:
    """The C++ compiler that PyTorch calls: $CXX, or g++ (clang++ on macOS).

    Raises:
        ToolchainMissing: it is not there.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise ToolchainMissing(
            f"AOTInductor compiles C++, and the compiler '{name}' is not on the PATH",
            "install it (apt-get install g++), or set CXX to another",
        )
    return name


@cache
def compiled_for() -> tuple[str, str]:
    """(flags that compiled code may use, in order; the compiler's version) with -march=native, as PyTorch has it.

    The compiler tells by its macros (`__AVX512VNNI__`), of which those are taken that the CPU has as a flag.

    Raises:
        ToolchainMissing: there is no compiler, or it does not run.
    """
    name = compiler()
    try:
        native = ["-march=native"] if of_this_cpu() else []
        call = [name, *native, "-dM", "-E", "-x", "c++", os.devnull]
        told = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainMissing(f"the compiler '{name}' does not run ({first_line(error)})", "set CXX") from None
    found: list[str] = re.findall(r"#define __(?:ARM_FEATURE_)?(\w+?)(?:__)? ", told)
    macros = {m.lower().replace("_", "") for m in found}
    version = re.search(r'#define __VERSION__ "(.*)"', told)
    used = {NAMES.get(m, m) for m in macros} & of_this_cpu() - NAMED_ONLY
    return " ".join(sorted(used)), version[1] if version else ""


def lacking(machine: str, vectors: str, flags: str) -> str:
    """What this machine lacks of what code was compiled for, in words; "" where it has all, or does not tell.

    Args:
        machine: architecture, as x86_64; "" where it is not known.
        vectors: PyTorch's words for it ("AVX512 AVX512_VNNI").
        flags: those of `compiled_for`.
    """
    here = platform.machine()
    if machine and machine != here:
        return f"it is for {machine}, and this machine is {here}"
    words = vectors.lower().split() if "invalid" not in vectors.lower() else []
    wanted = {flag for word in words for flag in VECTORS.get(word, (word,))} | set(flags.lower().split())
    missing = sorted({w.replace("_", "") for w in wanted} - of_this_cpu()) if of_this_cpu() else []
    return f"it uses {', '.join(missing)}, and this CPU has no such instructions" if missing else ""

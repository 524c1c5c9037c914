"""What this machine can do, cell by cell: format x precision x runtime."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from exporters import formats
from exporters.spec import Precision
from suites.support.cases import missing_gpu, what_is_missing


@dataclass(frozen=True)
class Cell:
    """`state` is available, missing or not supported; the last two come with `because`."""

    format: str
    precision: str
    runtime: str
    device: str
    state: str
    because: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def cells() -> list[Cell]:
    """Every format x (fp32, fp16, int8 and whatever else one has) x runtime."""
    known = [p for p in Precision if any(p in f.precisions for f in formats.registry().values())]
    rows: list[Cell] = []
    for entry in formats.registry().values():
        for precision in known:
            for runtime in entry.runtimes:
                missing = what_is_missing(entry, runtime.device, runtime)
                if precision not in entry.precisions:
                    state, because = "not supported", entry.lacks(precision)
                elif missing:
                    state, because = "missing", missing
                elif missing_gpu(runtime.device):
                    state, because = "missing", "no NVIDIA GPU"
                elif not runtime.runs:
                    state, because = "available", f"made here, run elsewhere: {runtime.because}"
                elif not runtime.executes:
                    state, because = "available", runtime.because
                else:
                    state, because = (
                        "available",
                        "" if precision in runtime.executes else f"executed in another precision: {runtime.because}",
                    )
                rows.append(Cell(entry.id, precision.value, runtime.id, runtime.device, state, because))
    return rows

"""In which precision PyTorch really runs: the types that its convolutions and matrix products are given."""
# pyright: reportUnknownMemberType=false
# (torch.profiler leaves types open)

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ExecutionTraceObserver

# Operators whose arithmetic decides an inference's precision, as ATen names those that do the work.
HEAVY = frozenset(
    {"aten::_convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "prepacked::conv2d_clamp_run"}
)
TYPES = {"float": "fp32", "c10::Half": "fp16", "c10::BFloat16": "bf16", "double": "fp64", "signed char": "int8"}


def executed(call: Callable[[], Any]) -> tuple[str, tuple[str, ...]]:
    """(precision of most convolutions and matrix products, lines that say how many ran in which) of one call."""
    observer = ExecutionTraceObserver()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "trace.json"
        observer.register_callback(str(path))
        observer.start()
        try:
            call()
        finally:
            observer.stop()
            observer.unregister_callback()
        nodes: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    kinds: Counter[str] = Counter()
    for node in nodes:
        if node["name"] in HEAVY:
            kind = str(node["inputs"]["types"][0]).removeprefix("Tensor(").removesuffix(")")
            kinds[TYPES.get(kind, kind)] += 1
    lines = tuple(f"{n} of the convolutions and matrix products in {kind}" for kind, n in kinds.items())
    return (kinds.most_common(1)[0][0] if kinds else ""), lines


@contextmanager
def _quiet() -> Generator[None]:
    """Sends what C++ writes to standard error nowhere: the observer tells that it was switched on and off."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

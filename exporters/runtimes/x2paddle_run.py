"""X2Paddle on one TorchScript file, as a program: `python -P x2paddle_run.py TRACE FOLDER INPUTS`.

A process of its own, since X2Paddle exits where Paddle raises, imports the code that it writes, and leaves Paddle in a
state after a failure in which the next conversion may crash (seen). INPUTS is JSON: shape and dtype of each.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

WRONG = "X2Paddle raised "  # begins the line that says what


def main(trace: str, folder: str, inputs: str) -> int:
    """0 where X2Paddle says nothing, whether it made the files or not; 1 after a line that says what it raised."""
    torch: Any = importlib.import_module("torch")
    convert: Any = importlib.import_module("x2paddle.convert")
    torch.set_num_threads(1)
    graph = torch.jit.load(trace, map_location="cpu")
    # Of a trace, no more than shapes and types are used; X2Paddle reports to its makers unless told not to.
    examples = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in json.loads(inputs)]
    try:
        convert.pytorch2paddle(graph, folder, jit_type="trace", input_examples=examples, disable_feedback=True)
    except Exception as error:  # noqa: BLE001 (it runs code that it wrote)
        print(f"\n{WRONG}{type(error).__name__}: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

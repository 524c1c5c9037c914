"""The two sides, each in a process of its own: `python -P sides.py ROLE`. Reads a JSON object a line, answers with one.

Started by path, with nothing of the suite imported, so that a side holds no more than what it measures. The peer is
used by its public interface alone (YOLO(...).export, .fuse, .predict); none of its code was read.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Call = dict[str, Any]


def export_ours() -> Callable[[Call], Call]:
    """The whole export stage in this warm process, into an empty cache: checkpoint read, built, traced, inspected.

    `again` is the same stage a second time, by a new pool.
    """
    from exporters.models.catalog import from_checkpoint
    from exporters.pool import Pool
    from exporters.spec import request

    pool: Pool | None = None

    def answer(call: Call) -> Call:
        nonlocal pool
        folder = Path(call["folder"])
        os.environ["EXPORTGATE_CACHE"] = str(folder / "cache")
        pool = pool or Pool(in_process=True, folder=folder / "run")
        spec = request(from_checkpoint(Path(call["checkpoint"])), call["format"], imgsz=640)
        start = time.perf_counter()
        made = pool.export(spec)
        between = time.perf_counter()
        found = Pool(in_process=True, folder=folder / "again").export(spec)
        end = time.perf_counter()
        assert found.root == made.root, "the second export made another artifact"
        if not gc.get_freeze_count():
            gc.freeze()  # as our workers do behind their imports: coremltools collects garbage in every conversion
        return {"seconds": between - start, "again": end - between, "path": str(made.path)}

    return answer


def export_theirs() -> Callable[[Call], Call]:
    """`YOLO(...).export(...)` in this warm process; the checkpoint is loaded anew before the clock starts."""
    from ultralytics import YOLO  # pyright: ignore[reportMissingImports] (installed by tox -e peer only)

    def answer(call: Call) -> Call:
        options = {"simplify": True} if call["format"] == "onnx" else {"nms": True} if call.get("nms") else {}
        model: Any = YOLO(call["checkpoint"])
        start = time.perf_counter()
        path = model.export(format=call["format"], imgsz=640, **options)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "path": str(Path(path).resolve())}

    return answer


def forward_theirs() -> Callable[[Call], Call]:
    """The peer's own PyTorch model in FP32 on each file of feeds: as trained, and with batch normalization folded."""
    import torch
    from ultralytics import YOLO  # pyright: ignore[reportMissingImports] (installed by tox -e peer only)

    def run(model: Any, feeds: np.ndarray[Any, Any]) -> Any:
        with torch.no_grad():
            made = model(torch.from_numpy(feeds))
        return (made[0] if isinstance(made, (tuple, list)) else made).numpy()

    def answer(call: Call) -> Call:
        feeds = [np.load(path) for path in call["feeds"]]
        whole: Any = YOLO(call["checkpoint"])
        whole.model.float().eval()
        made = {"unfused": [run(whole.model, f) for f in feeds]}
        whole.fuse()
        made["fused"] = [run(whole.model, f) for f in feeds]
        paths: Call = {}
        for kind, values in made.items():
            paths[kind] = [str(Path(call["folder"]) / f"{kind}{n}.npy") for n in range(len(values))]
            for path, value in zip(paths[kind], values, strict=True):
                np.save(path, value)
        return paths

    return answer


def variant_theirs() -> Callable[[Call], Call]:
    """A checkpoint of the peer's architecture of any task and scale, and what its own PyTorch model makes of feeds.

    Every parameter and statistic is random: with those of a fresh model outputs hardly depend on the input.
    """
    import torch
    from ultralytics import YOLO  # pyright: ignore[reportMissingImports] (installed by tox -e peer only)

    def tensors(value: Any) -> list[Any]:
        if isinstance(value, torch.Tensor):
            return [value]
        return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []

    def answer(call: Call) -> Call:
        whole: Any = YOLO(call["yaml"])
        generator = torch.Generator().manual_seed(0)
        for name, value in whole.model.state_dict().items():
            if name.endswith(("running_var", "bn.weight")):
                value.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(0.0, 0.1, generator=generator)
        whole.save(call["checkpoint"])  # in FP16, so it is read again
        again: Any = YOLO(call["checkpoint"])
        with torch.no_grad():
            made = again.model.float().eval()(torch.from_numpy(np.load(call["feeds"])))
        first: Any = made[0] if isinstance(made, (tuple, list)) else made
        for number, value in enumerate(tensors(first)):
            np.save(Path(call["folder"]) / f"output{number}.npy", value.numpy())
        return {"outputs": len(tensors(first))}

    return answer


def predict_theirs() -> Callable[[Call], Call]:
    """What the peer's `predict` says of an image (H, W, 3) BGR with one file: names, boxes, confidences, classes."""
    import openvino  # pyright: ignore[reportMissingImports] (installed by tox -e peer only)
    from ultralytics import YOLO  # pyright: ignore[reportMissingImports] (installed by tox -e peer only)

    core: Any = openvino.Core
    compile_model = core.compile_model

    def in_fp32(self: Any, model: Any, device_name: str, config: Any = None) -> Any:
        """BF16 is OpenVINO's default where the CPU has it: boxes of either file would be rounded to a pixel."""
        return compile_model(self, model, device_name, {**(config or {}), "INFERENCE_PRECISION_HINT": "f32"})

    core.compile_model = in_fp32

    def answer(call: Call) -> Call:
        model: Any = YOLO(call["path"], task="detect")
        options = {"imgsz": 640, "conf": 0.25, "device": "cpu", "verbose": False, "save": False}
        found = model.predict(np.load(call["image"]), **options)[0]
        boxes = found.boxes
        return {
            "names": {str(k): v for k, v in found.names.items()},
            "boxes": boxes.xyxy.tolist(),
            "scores": boxes.conf.tolist(),
            "classes": [int(c) for c in boxes.cls.tolist()],
        }

    return answer


def latency() -> Callable[[Call], Call]:
    """Milliseconds of inferences of an ONNX file; the first of each call is not counted, since threads may sleep."""
    import onnxruntime as ort

    session: Any = None
    feeds: dict[str, Any] = {}

    def answer(call: Call) -> Call:
        nonlocal session
        if "path" in call:
            options = ort.SessionOptions()
            options.intra_op_num_threads = call["threads"]
            session = ort.InferenceSession(call["path"], options, providers=["CPUExecutionProvider"])
            feeds[session.get_inputs()[0].name] = np.load(call["feeds"])
        samples: list[float] = []
        for _ in range(call["inferences"] + 1):
            start = time.perf_counter_ns()
            session.run(None, feeds)
            samples.append((time.perf_counter_ns() - start) / 1e6)
        return {"milliseconds": samples[1:]}

    return answer


ROLES: dict[str, Callable[[], Callable[[Call], Call]]] = {
    "export-ours": export_ours,
    "export-theirs": export_theirs,
    "forward-theirs": forward_theirs,
    "predict-theirs": predict_theirs,
    "variant-theirs": variant_theirs,
    "latency": latency,
}


def main() -> int:
    """Serves until standard input ends. What libraries print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer = ROLES[sys.argv[1]]()
    for line in sys.stdin:
        channel.write(json.dumps(answer(json.loads(line))) + "\n")
        channel.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

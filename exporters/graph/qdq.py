"""INT8 as explicit Q/DQ around convolutions and products: symmetric, activations per tensor, weights per channel."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# (onnxruntime.quantization has no types, and onnx.load leaves the type of a path open)

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import onnx

from exporters import calibration
from exporters.errors import ExportError, ExportgateError, first_line
from exporters.models.spec import belongs
from exporters.session import Array
from exporters.spec import ExportSpec

HEAVY = ["Conv", "MatMul", "Gemm"]


class _Feeds:
    """ONNX Runtime's CalibrationDataReader over our calibration set."""

    def __init__(self, batches: Iterator[dict[str, Array]]) -> None:
        self.batches = batches
        self.images = 0

    def get_next(self) -> dict[str, Array] | None:
        feeds = next(self.batches, None)
        if feeds is not None:
            self.images += len(next(iter(feeds.values())))
        return feeds

    def __len__(self) -> int:
        return 0


def quantize(parent: Path, folder: Path, spec: ExportSpec) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The Q/DQ graph of an FP32 file, and lines for the record.

    Bounds are the largest magnitudes seen (MinMax): ONNX Runtime's entropy method gave the same scales. Only heavy
    operators are quantized; what the model keeps in FP32 (a detector's decode) stays so, since one scale for pixels and
    scores makes every score 0.

    Raises:
        ExportError: the quantizer failed.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    # A graph with a fixed batch is calibrated with that batch; a short last batch is left out there.
    size = calibration.calibration_batch(spec.batch) if spec.dynamic else spec.batch
    batches = calibration.batches(spec, size)
    if not spec.dynamic:
        batches = (b for b in batches if len(next(iter(b.values()))) == size)
    feeds = _Feeds(batches)
    CalibrationDataReader.register(_Feeds)
    kept = [path for path, _ in spec.model.fp32]
    excluded = [n.name for n in onnx.load(parent, load_external_data=False).graph.node if belongs(n.name, kept)]
    target = folder / "quantized.onnx"
    options: dict[str, Any] = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    try:
        quantize_static(
            str(parent),
            str(target),
            cast("CalibrationDataReader", feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=HEAVY,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options=options,
        )
        made = onnx.load(target)
    except ExportgateError:
        raise  # of the calibration set, which is read while the quantizer runs
    except Exception as error:
        # The quantizer raises ValueError or RuntimeError, or what ONNX Runtime raises while it calibrates.
        what = f"the INT8 quantizer failed: {type(error).__name__}: {first_line(error)}"
        raise ExportError(what, "check the calibration set") from error
    finally:
        target.unlink(missing_ok=True)
    notes = [f"calibrated on {feeds.images} images (MinMax)"]
    if feeds.images < calibration.SMALL:
        notes.append(f"warning: fewer than {calibration.SMALL} calibration images; NVIDIA recommends 500")
    return made, tuple(notes)

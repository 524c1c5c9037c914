"""SavedModel to TensorFlow.js with its makers' converter, in a process of its own: the converter prints and imports."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from exporters.errors import ExportError, NotSupported, ToolchainMissing
from exporters.layout import LAST
from exporters.metadata import SIDE_CAR, Metadata
from exporters.spec import ExportSpec, Precision
from exporters.tfjs import read

# It imports them for models of other kinds, and they are not in its toolchain.
UNNEEDED = ("tensorflow_decision_forests", "tensorflow_hub", "jax", "flax")
STORED = {Precision.FP16: "float16", Precision.INT8: "uint8"}
KEYS = "structuredOutputKeys"


def library(name: str) -> Any:
    """A module of tensorflowjs, whose packages import much more than it when they are imported themselves."""
    if "tensorflowjs" not in sys.modules:
        for other in UNNEEDED:
            sys.modules.setdefault(other, ModuleType(other))
        found = importlib.util.find_spec("tensorflowjs")
        if found is None or not found.submodule_search_locations:
            raise ToolchainMissing("tensorflowjs is not installed", "run 'exportgate toolchain sync tensorflow'")
        folder = Path(found.submodule_search_locations[0])
        for package, place in (("tensorflowjs", folder), ("tensorflowjs.converters", folder / "converters")):
            bare = ModuleType(package)
            bare.__path__ = [str(place)]
            sys.modules[package] = bare
        sys.modules["tensorflowjs"].__dict__["__version__"] = importlib.import_module("tensorflowjs.version").version
    return importlib.import_module(f"tensorflowjs.{name}")


def convert(source: Path, folder: Path, spec: ExportSpec, metadata: Metadata) -> tuple[str, ...]:
    """Writes the folder: model.json with the model's names and the metadata, shards, metadata.yaml.

    Raises:
        ExportError: the converter failed, or the SavedModel has other outputs than the model.
        NotSupported: FP16 cannot hold a weight.
    """
    converter, metadata = library("converters.tf_saved_model_conversion_v2"), replace(metadata, layout=LAST)
    try:
        converter.convert_tf_saved_model(str(source), str(folder), use_structured_outputs_names=True)
    except Exception as error:
        if not isinstance(error, (ValueError, RuntimeError, KeyError, OSError)) and type(error) is not Exception:
            raise
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise ExportError(
            f"TensorFlow.js' converter failed ({told})", "see which operators it has, or export to saved_model"
        ) from error
    path, notes = folder / read.MODEL, tuple[str, ...]()
    model = json.loads(path.read_text(encoding="utf-8"))
    _name(model["signature"], model["userDefinedMetadata"][KEYS], spec)
    model["userDefinedMetadata"] = metadata.values()
    path.write_text(json.dumps(model), encoding="utf-8")
    if spec.precision is not Precision.FP32:
        notes = _store(folder, model, STORED[spec.precision])
        path.write_text(json.dumps(model), encoding="utf-8")
    (folder / SIDE_CAR).write_text(metadata.as_yaml(), encoding="utf-8")
    return notes


def _name(signature: dict[str, Any], keys: list[str], spec: ExportSpec) -> None:
    """Gives the signature's tensors their names, in the model's order; the converter loses those of one shape.

    Inputs are operators of their names. Outputs are Identity, Identity_1 ... in the order of their names, as TensorFlow
    flattens the mapping that a signature returns.
    """
    told = {side: {str(t["name"]).partition(":")[0]: t for t in signature[side].values()} for side in signature}
    known = {re.sub(r"[^\w.\-/]", "_", i.name): i.name for i in spec.model.inputs}
    inputs = {known.get(op, op): op for op in told["inputs"]}
    outputs = dict(zip(sorted(keys), sorted(told["outputs"], key=_number), strict=False))
    model = spec.model
    for side, found, tensors in (("inputs", inputs, model.inputs), ("outputs", outputs, model.outputs)):
        wanted = [t.name for t in tensors]
        if set(found) != set(wanted):
            raise ExportError(
                f"the graph of the SavedModel has {side} {', '.join(sorted(found))}, expected {', '.join(wanted)}",
                "an input that nothing reads cannot be exported",
            )
        signature[side] = {name: told[side][found[name]] for name in wanted}


def _number(operator: str) -> int:
    return int(operator.rpartition("_")[2]) if operator.rpartition("_")[2].isdecimal() else 0


def _store(folder: Path, model: dict[str, Any], kind: str) -> tuple[str, ...]:
    """Stores what convolutions and matrix products read in fewer bits, biases in 16 too; the rest stays as it is.

    That are anchors and strides, which fewer bits would move, and numbers of few bytes.
    """
    found = read.read(folder)
    chosen = {weight for weight in found.kernels().values() if weight}
    if kind == "float16":
        chosen |= {
            c for n in found.nodes.values() if n.op in read.FUSED for i in n.inputs[2:] if (c := found.constant(i))
        }
    values = found.values()
    chosen = {name for name in chosen if values[name].dtype == np.float32}
    if kind == "float16":
        with np.errstate(over="ignore"):
            lost = next((n for n in sorted(chosen) if not np.isfinite(values[n].astype(np.float16)).all()), "")
        if lost:
            raise NotSupported(f"FP16 ends at 65504, and weight '{lost}' has {np.abs(values[lost]).max():.6g}")
    for shard in found.names[1:]:
        (folder / shard).unlink()
    rows = [{"name": n, "data": np.array(v)} for n, v in values.items()]
    words = {kind: [glob.escape(name) for name in sorted(chosen)]}
    model["weightsManifest"] = library("write_weights").write_weights(
        [rows], str(folder), write_manifest=False, quantization_dtype_map=words
    )
    how = (
        "16 bits"
        if kind == "float16"
        else "8 bits, each with one scale and one zero point; no calibration set is needed"
    )
    return (f"{len(chosen)} weights of convolutions and matrix products in {how}",)

"""onnx2tf: a Keras model of an ONNX file, and the SavedModel that is made of it. For a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporters.errors import ExportError, first_line
from exporters.runtimes.tf_graph import SIGNATURE, of_saved_model
from exporters.spec import ExportSpec

onnx: Any = importlib.import_module("onnx")
onnx2tf: Any = importlib.import_module("onnx2tf")  # which says by a variable that TensorFlow's Keras is Keras 2
tensorflow: Any = importlib.import_module("tensorflow")
keras: Any = importlib.import_module("tf_keras")
protobuf: Any = importlib.import_module("google.protobuf.message")

# onnx2tf takes pictures to try its operators on from a file of this name in its working folder, and where there is
# none from the network. What is in them decides nothing of FP32 but where it transposes, which any noise shows.
SAMPLES, SHAPE = "calibration_image_sample_data_20x128x128x3_float32.npy", (20, 128, 128, 3)
FIX = "see which operators onnx2tf has, or export to onnx"


def convert(source: Path, scratch: Path, spec: ExportSpec) -> Any:
    """The Keras model that onnx2tf makes, in a working folder of its own; it writes over the file that it reads.

    Raises:
        ExportError: it failed, in its own words.
    """
    shutil.copy2(source, scratch / source.name)
    np.save(scratch / SAMPLES, np.random.default_rng(0).random(SHAPE, np.float32))
    # Inputs of four axes get their channels last; others stay as they are.
    kept = [i.name for i in spec.model.inputs if len(i.shape) != 4]
    said = io.StringIO()
    try:
        with contextlib.chdir(scratch), contextlib.redirect_stdout(said):
            return onnx2tf.convert(
                input_onnx_file_path=source.name,
                output_folder_path="made",
                output_signaturedefs=True,  # names that a SavedModel can have
                not_use_onnxsim=True,
                keep_ncw_or_nchw_or_ncdhw_input_names=kept or None,
                disable_model_save=True,  # it would make .tflite files as well
                verbosity="error",
            )
    except (MemoryError, OSError):
        raise
    except (Exception, SystemExit) as error:
        # It raises whatever its operators do, and ends the process over what it does not know.
        told = re.sub(r"\x1b\[\d+m", "", said.getvalue())
        at = re.findall(r"onnx_op_name: (\S+)", told)
        lines = [line.removeprefix("ERROR:").strip() for line in told.splitlines() if line.startswith("ERROR:")]
        what = next((line for line in lines if "not yet implemented" in line), first_line(error))
        where = f" at {re.sub('^wa/', '/', at[-1])}" if at else ""
        raise ExportError(f"onnx2tf cannot convert model '{spec.model.name}'{where} ({what})", FIX) from error
    finally:
        print(said.getvalue(), file=sys.stderr)


def save(model: Any, folder: Path, spec: ExportSpec, shapes: Mapping[str, tuple[int | str, ...]]) -> None:
    """Writes a SavedModel whose one signature has the request's names, as one of Keras's where that was asked for.

    Raises:
        ExportError: the model has other inputs or outputs, or TensorFlow cannot write it.
    """
    names, results = ([t.name for t in tensors] for tensors in (spec.model.inputs, spec.model.outputs))
    if (len(model.inputs), len(model.outputs)) != (len(names), len(results)):
        raise ExportError(
            f"onnx2tf made {len(model.inputs)} inputs and {len(model.outputs)} outputs of model '{spec.model.name}', "
            f"expected {len(names)} and {len(results)}",
            FIX,
        )

    holder = tensorflow.Module()
    wanted = [tensorflow.TensorSpec(t.shape, t.dtype, n) for t, n in zip(model.inputs, names, strict=True)]
    made = [_arranged(t, name, shapes[name]) for name, t in zip(results, model.outputs, strict=True)]
    try:
        whole = keras.Model(model.inputs, made)

        def infer(*feeds: Any) -> dict[str, Any]:
            found: Any = whole(list(feeds))
            return dict(zip(results, found if len(results) > 1 else [found], strict=True))

        function = tensorflow.function(infer, input_signature=wanted, autograph=False).get_concrete_function()
        signatures = {SIGNATURE: function}
        if spec.keras:
            keras.models.save_model(whole, str(folder), save_format="tf", signatures=signatures, save_traces=False)
        else:
            holder.weights = whole.variables
            tensorflow.saved_model.save(holder, str(folder), signatures=signatures)
    except (tensorflow.errors.OpError, protobuf.EncodeError, ValueError, TypeError, AssertionError, KeyError) as error:
        what = f"what onnx2tf made of model '{spec.model.name}' cannot be saved"
        raise ExportError(f"{what} ({_told(error)})", FIX) from error
    known = of_saved_model(folder).meta.signature_def[SIGNATURE].inputs
    lost = next((name for name in names if name not in known), None)
    if lost is not None:
        raise ExportError(f"TensorFlow gives input '{lost}' another name", "rename it: letters, digits and _")
    # Nothing reads it, and none is written by TensorFlow before 2.12.
    (folder / "fingerprint.pb").unlink(missing_ok=True)


def _told(error: BaseException) -> str:
    """What went wrong: Keras says first which of its layers called."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    inner = [line for line in lines if "{{" in line or "incompatible" in line]
    return (inner or lines or [type(error).__name__])[0][:300]


def _arranged(tensor: Any, name: str, shape: tuple[int | str, ...]) -> Any:
    """An output with its channels last where it has four axes, as the model has it elsewhere.

    onnx2tf leaves tensors in either order, whatever it did before.

    Raises:
        ExportError: neither order gives the shape that the output has in the ONNX file.
    """
    rank, got = len(shape), tuple(tensor.shape)
    as_is, last = tuple(range(rank)), (0, *range(2, rank), 1)
    want, other = (tuple(shape[n] for n in last), last) if rank == 4 else (shape, tuple(np.argsort(last).tolist()))
    for order in (as_is, other)[: 2 if rank > 2 else 1]:
        if len(got) == rank and _fits(tuple(got[n] for n in order), want):
            return tensor if order == as_is else tensorflow.transpose(tensor, order)
    raise ExportError(f"onnx2tf gives output '{name}' the shape {list(got)}, and ONNX has {list(shape)}", FIX)


def _fits(got: tuple[int | None, ...], want: tuple[int | str, ...]) -> bool:
    return all(g is None or isinstance(w, str) or g == w for g, w in zip(got, want, strict=True))


def output_shapes(source: Path) -> dict[str, tuple[int | str, ...]]:
    """Shapes of an ONNX file's outputs, by name; an axis that varies is a name."""
    graph = onnx.load(str(source), load_external_data=False).graph
    return {
        o.name: tuple(
            int(d.dim_value) if d.HasField("dim_value") else str(d.dim_param) for d in o.type.tensor_type.shape.dim
        )
        for o in graph.output
    }

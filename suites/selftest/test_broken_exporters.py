"""Broken exporters: each damages a good artifact on disk as a real mistake would, and a claim must name the culprit.

The damaged artifact goes the whole way: a worker opens and runs it, the claim compares it. Every claim is also seen to
pass on the same artifact undamaged.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import suites
from exporters.models.checkpoint import read_checkpoint
from exporters.pool import Pool
from suites.conformance import test_dynamic as dynamic
from suites.conformance import test_export as export
from suites.conformance import test_metadata as metadata
from suites.conformance import test_outputs as outputs
from suites.conformance import test_precision as precision
from suites.conformance import test_robustness as robustness
from suites.conformance import test_shapes as shapes
from suites.support import attribution
from suites.support.bench import Bench, Run
from suites.support.verdict import Verdict, one_line, verdict_of

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

onnx = pytest.importorskip("onnx", reason="the toolchain onnx is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:Converting a tensor to a Python integer"
)

Damage = Callable[[Path, "Workshop"], None]
ARGS = {
    "batch": 1,
    "precision": "fp32",
    "half": False,
    "int8": False,
    "dynamic": False,
    "simplify": True,
    "opset": 20,
    "optimize": False,
}
ANCHORS, LAST_SCALE = 2100, 100  # of a 320x320 image: 40 x 40 + 20 x 20 + 10 x 10


@dataclass(frozen=True)
class Broken:
    """A broken exporter: what it does, on which case, which claim sees it, and a word that names the culprit."""

    name: str
    case: str
    damage: Damage
    claim: Callable[[Bench], None]
    word: str
    verdict: Verdict = Verdict.FAIL
    rewrites_manifest: bool = True


# ---- tools ---------------------------------------------------------------------------------------------------------


def graph_damage(change: Callable[..., None]) -> Callable[..., Damage]:
    """Makes `change(model, ...)` a damage of an ONNX file."""

    @wraps(change)
    def given(*arguments: Any, **options: Any) -> Damage:
        def damage(path: Path, workshop: Workshop) -> None:
            model = onnx.load(path)
            change(model, *arguments, **options)
            onnx.save(model, path)

        return damage

    return given


def script_damage(change: Callable[..., Any]) -> Callable[..., Damage]:
    """Makes `change(module, texts, ...)` a damage of a TorchScript file; it may return another module to be saved."""

    @wraps(change)
    def given(*arguments: Any, **options: Any) -> Damage:
        def damage(path: Path, workshop: Workshop) -> None:
            import torch

            texts: dict[str, Any] = {"config.txt": ""}
            module = torch.jit.load(str(path), _extra_files=texts)
            with torch.no_grad():
                changed = change(module, texts, *arguments, **options) or module
            changed.save(str(path), _extra_files=texts)

        return damage

    return given


def at_the_end(
    model: Any, operator: str, *constants: np.ndarray[Any, Any], output: str = "output0", **attributes: Any
) -> None:
    """Puts one more operator behind an output, which keeps its name."""
    maker = next(n for n in model.graph.node if output in n.output)
    maker.output[list(maker.output).index(output)] = inner = f"{output}/inner"
    inputs = [inner]
    for number, value in enumerate(constants):
        inputs.append(f"{output}/damage{number}")
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, inputs[-1]))
    model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], f"/damage/{operator}", **attributes))
    _forget_shape(next(o for o in model.graph.output if o.name == output))


def at_the_start(model: Any, operator: str, *constants: np.ndarray[Any, Any], **attributes: Any) -> None:
    """Puts one more operator between the input and what takes it."""
    for node in model.graph.node:
        node.input[:] = ["images/inner" if name == "images" else name for name in node.input]
    inputs = ["images"]
    for number, value in enumerate(constants):
        inputs.append(f"images/damage{number}")
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, inputs[-1]))
    model.graph.node.insert(
        0, onnx.helper.make_node(operator, inputs, ["images/inner"], f"/damage/{operator}", **attributes)
    )


def _forget_shape(value: Any) -> None:
    """The runtime infers it again."""
    value.type.tensor_type.ClearField("shape")


def weight(model: Any, name: str) -> Any:
    """An initializer of an ONNX graph."""
    return next(i for i in model.graph.initializer if i.name == name)


def replace_weight(model: Any, name: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    entry = weight(model, name)
    value = onnx.numpy_helper.to_array(entry)
    entry.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(change(value)).astype(value.dtype), name))


def channels(boxes: Sequence[float], scores: float) -> np.ndarray[Any, Any]:
    """One number for each of the detector's ten channels, to broadcast over anchors."""
    return np.array([*boxes, *[scores] * 6], np.float32).reshape(1, 10, 1)


def another(case: str) -> Damage:
    """Passes the file of another case off as this one's."""

    def damage(path: Path, workshop: Workshop) -> None:
        shutil.copyfile(workshop.good(case).path, path)

    return damage


def truncated(path: Path, workshop: Workshop) -> None:
    """A copy that ended early."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---- outputs -------------------------------------------------------------------------------------------------------


@graph_damage
def two_classes_swapped(model: Any) -> None:
    at_the_end(model, "Gather", np.array([0, 1, 2, 3, 6, 5, 4, 7, 8, 9]), axis=1)


@graph_damage
def output_transposed(model: Any) -> None:
    at_the_end(model, "Transpose", perm=[0, 2, 1])


@graph_damage
def multiplied(model: Any, factors: np.ndarray[Any, Any]) -> None:
    at_the_end(model, "Mul", factors)


@graph_damage
def moved(model: Any, pixels: float) -> None:
    """An anchor's centre taken elsewhere in its cell."""
    at_the_end(model, "Add", channels([pixels, pixels, 0, 0], 0))


@graph_damage
def boxes_as_corners(model: Any) -> None:
    """x1, y1, x2, y2 where cx, cy, w, h are asked for."""
    matrix = np.eye(10, dtype=np.float32)
    matrix[:4, :4] = [[1, 0, -0.5, 0], [0, 1, 0, -0.5], [1, 0, 0.5, 0], [0, 1, 0, 0.5]]
    at_the_end(model, "Einsum", matrix, equation="bca,dc->bda")


@graph_damage
def scores_as_logits(model: Any) -> None:
    node = next(n for n in model.graph.node if n.name == "/model.22/decode/Sigmoid")
    node.op_type = "Identity"


@graph_damage
def last_scale_dead(model: Any) -> None:
    alive = np.ones((1, 1, ANCHORS), np.float32)
    alive[..., -LAST_SCALE:] = 0
    at_the_end(model, "Mul", alive)


@graph_damage
def preprocessed_twice(model: Any) -> None:
    at_the_start(model, "Div", np.float32(255).reshape(1))


@graph_damage
def blue_for_red(model: Any) -> None:
    at_the_start(model, "Gather", np.array([2, 1, 0]), axis=1)


@graph_damage
def noise_on_a_layer(model: Any, name: str, size: float) -> None:
    generator = np.random.default_rng(0)
    replace_weight(model, name, lambda w: w + generator.normal(0, size * w.std(), w.shape))


@graph_damage
def untrained(model: Any) -> None:
    """The same graph with another model's weights."""
    generator = np.random.default_rng(0)
    for entry in [i.name for i in model.graph.initializer if i.name.endswith("conv.weight") and "dfl" not in i.name]:
        replace_weight(model, entry, lambda w: generator.permutation(w.ravel()).reshape(w.shape))


def folded_with_another_epsilon(path: Path, workshop: Workshop) -> None:
    """Batch normalizations folded with PyTorch's default of 1e-5, where the model's is 1e-3."""
    checkpoint = workshop.models["obstacles"].weights
    assert checkpoint is not None
    state = read_checkpoint(checkpoint).state
    model = onnx.load(path)
    for key in [k for k in state if k.endswith("bn.running_var")]:
        layer = key.removesuffix(".bn.running_var")
        ratio = np.sqrt((state[key] + 1e-3) / (state[key] + 1e-5))
        replace_weight(model, f"{layer}.conv.weight", lambda w, r=ratio: w * r[:, None, None, None])
        beta = state[f"{layer}.bn.bias"]
        replace_weight(model, f"{layer}.conv.bias", lambda b, r=ratio, beta=beta: beta + (b - beta) * r)
    onnx.save(model, path)


@graph_damage
def nan_in_a_weight(model: Any) -> None:
    def broken(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        value = value.copy()
        value.flat[0] = np.nan
        return value

    replace_weight(model, "model.22.cv3.1.2.weight", broken)


@graph_damage
def another_result_each_time(model: Any) -> None:
    model.graph.node.append(
        onnx.helper.make_node("RandomNormalLike", ["output0/inner"], ["output0/noise"], "/damage/noise", scale=1e-2)
    )
    at_the_end(model, "Add")
    model.graph.node[-1].input.append("output0/noise")
    model.graph.node.insert(len(model.graph.node) - 1, model.graph.node.pop(len(model.graph.node) - 2))


# ---- signature -----------------------------------------------------------------------------------------------------


@graph_damage
def output_renamed(model: Any) -> None:
    at_the_end(model, "Identity")
    model.graph.node[-1].output[0] = model.graph.output[0].name = "detections"


@graph_damage
def output_added(model: Any) -> None:
    name = next(n.output[0] for n in model.graph.node if n.name == "/model.22/decode/Concat")
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))


@graph_damage
def output_missing(model: Any) -> None:
    del model.graph.output[1]


@graph_damage
def outputs_exchanged(model: Any) -> None:
    swap = {"left": "right", "right": "left"}
    for node in model.graph.node:
        node.output[:] = [swap.get(name, name) for name in node.output]


@graph_damage
def output_cast(model: Any, kind: str) -> None:
    at_the_end(model, "Cast", to=getattr(onnx.TensorProto, kind))
    model.graph.output[0].type.tensor_type.elem_type = getattr(onnx.TensorProto, kind)


@graph_damage
def input_cast(model: Any, kind: str) -> None:
    """The file wants its images in another type."""
    at_the_start(model, "Cast", to=onnx.TensorProto.FLOAT)
    model.graph.input[0].type.tensor_type.elem_type = getattr(onnx.TensorProto, kind)


@graph_damage
def input_renamed(model: Any) -> None:
    at_the_start(model, "Identity")
    model.graph.node[0].input[0] = model.graph.input[0].name = "x"


# ---- shapes that vary, and batches ---------------------------------------------------------------------------------


@graph_damage
def first_row_for_all(model: Any) -> None:
    at_the_end(model, "Gather", np.array([0, 0]), axis=0)


@graph_damage
def first_row_for_any_batch(model: Any) -> None:
    """Row 0 spread over a batch of any size: output[0:1] + 0 * output."""
    at_the_end(model, "Add")
    add = model.graph.node[-1]
    zero, start, end = (np.float32(0).reshape(1), np.array([0]), np.array([1]))
    for name, value in (("zero", zero), ("start", start), ("end", end)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, f"damage/{name}"))
    first = onnx.helper.make_node(
        "Slice", [add.input[0], "damage/start", "damage/end"], ["damage/first"], "/damage/Slice"
    )
    nothing = onnx.helper.make_node("Mul", [add.input[0], "damage/zero"], ["damage/nothing"], "/damage/Mul")
    add.input[:] = ["damage/first", "damage/nothing"]
    for node in (first, nothing):
        model.graph.node.insert(len(model.graph.node) - 1, node)


def declared_dynamic_but_baked(path: Path, workshop: Workshop) -> None:
    """The graph of one shape, whose signature says that the shape varies."""
    model = onnx.load(workshop.good("onnx fp32").path)
    for value, axes in (
        (model.graph.input[0], {0: "batch", 2: "height", 3: "width"}),
        (model.graph.output[0], {0: "batch", 2: "anchors"}),
    ):
        for axis, name in axes.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.value_info[:]
    onnx.save(model, path)


def of_any_height(path: Path, workshop: Workshop) -> None:
    """The graph of any shape, whose signature says all of the fixed one but the height."""
    model = onnx.load(workshop.good("onnx fp32 dynamic").path)
    fixed = onnx.load(workshop.good("onnx fp32").path).graph.input[0].type.tensor_type.shape.dim
    for axis, dim in enumerate(model.graph.input[0].type.tensor_type.shape.dim):
        if axis != 2:
            dim.dim_value = fixed[axis].dim_value
    del model.graph.value_info[:]
    onnx.save(model, path)


@graph_damage
def right_for_squares_only(model: Any) -> None:
    """Boxes are moved by a share of width - height, as where the two were exchanged in the anchors."""
    at_the_end(model, "Add")
    add = model.graph.node[-1]
    new = onnx.helper.make_node
    for name, value in (("height", np.array([2])), ("width", np.array([3])), ("boxes", channels([0.1, -0.1, 0, 0], 0))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, f"damage/{name}"))
    nodes = [
        new("Shape", ["images"], ["damage/shape"], "/damage/Shape"),
        new("Gather", ["damage/shape", "damage/height"], ["damage/h"], "/damage/Height"),
        new("Gather", ["damage/shape", "damage/width"], ["damage/w"], "/damage/Width"),
        new("Sub", ["damage/w", "damage/h"], ["damage/whole"], "/damage/Sub"),
        new("Cast", ["damage/whole"], ["damage/real"], "/damage/Cast", to=onnx.TensorProto.FLOAT),
        new("Mul", ["damage/real", "damage/boxes"], ["damage/shift"], "/damage/Mul"),
    ]
    for node in nodes:
        model.graph.node.insert(len(model.graph.node) - 1, node)
    add.input.append("damage/shift")


# ---- precision -----------------------------------------------------------------------------------------------------


@graph_damage
def one_layer_left_in_fp32(model: Any, layer: str) -> None:
    """FP16 file: the layer's weights are FP32, between casts."""
    node = next(n for n in model.graph.node if n.name == layer)
    for name in node.input[1:]:
        value = onnx.numpy_helper.to_array(weight(model, name))
        weight(model, name).CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    place = list(model.graph.node).index(node)
    taken, given = node.input[0], node.output[0]
    node.input[0], node.output[0] = "damage/taken", "damage/given"
    model.graph.node.insert(
        place, onnx.helper.make_node("Cast", [taken], ["damage/taken"], "/damage/in", to=onnx.TensorProto.FLOAT)
    )
    model.graph.node.insert(
        place + 2, onnx.helper.make_node("Cast", ["damage/given"], [given], "/damage/out", to=onnx.TensorProto.FLOAT16)
    )


@graph_damage
def decode_rounded(model: Any) -> None:
    """FP16 file: what the decode multiplies by the strides goes through FP16, as the converter itself would have it."""
    node = next(n for n in model.graph.node if n.name == "/model.22/decode/Mul_1")
    place = list(model.graph.node).index(node)
    source, node.input[0] = node.input[0], "damage/back"
    for name, taken, dtype in (("/damage/in", source, "FLOAT16"), ("/damage/out", "damage/there", "FLOAT")):
        given = "damage/there" if dtype == "FLOAT16" else "damage/back"
        kind = getattr(onnx.TensorProto, dtype)
        model.graph.node.insert(place, onnx.helper.make_node("Cast", [taken], [given], name, to=kind))
        place += 1


def only_the_weights_in_fp16(path: Path, workshop: Workshop) -> None:
    """Every weight is stored in FP16 and cast to FP32 where it is used: a small file, and no FP16 arithmetic."""
    model = onnx.load(workshop.good("onnx fp32").path)
    for entry in [i for i in model.graph.initializer if len(i.dims) == 4]:
        value, name = onnx.numpy_helper.to_array(entry).astype(np.float16), entry.name
        entry.CopyFrom(onnx.numpy_helper.from_array(value, f"{name}/stored"))
        model.graph.node.insert(
            0, onnx.helper.make_node("Cast", [f"{name}/stored"], [name], f"/damage/{name}", to=onnx.TensorProto.FLOAT)
        )
    onnx.save(model, path)


@graph_damage
def one_layer_not_quantized(model: Any) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Conv" and "score" in n.name)
    made_by = {output: n for n in model.graph.node for output in n.output}
    dequantized = made_by[node.input[0]]
    node.input[0] = made_by[dequantized.input[0]].input[0]


@graph_damage
def scale_doubled(model: Any) -> None:
    """The scale of one layer's weights is written twice too large."""
    node = next(n for n in model.graph.node if n.op_type == "Conv" and "box" in n.name)
    dequantize = next(n for n in model.graph.node if node.input[1] in n.output)
    replace_weight(model, dequantize.input[1], lambda scale: scale * 2)


def weights_of_another_type(path: Path, workshop: Workshop) -> None:
    """The state of the model in FP16."""
    from safetensors.numpy import load_file, save_file

    save_file({k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in load_file(path).items()}, path)


def noise_on_the_state(path: Path, workshop: Workshop) -> None:
    from safetensors.numpy import load_file, save_file

    state = load_file(path)
    key = "model.12.cv1.conv.weight"
    state[key] = state[key] + np.random.default_rng(0).normal(0, 0.01 * state[key].std(), state[key].shape).astype(
        np.float32
    )
    save_file(state, path)


@script_damage
def script_computes_in_fp32(module: Any, texts: dict[str, Any]) -> Any:
    """The weights stay FP16, so that the file is as small as asked, and every convolution is computed in FP32."""
    import torch
    from torch.nn import functional

    class Changed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = torch.nn.ParameterList(p.clone() for p in module.state_dict().values())

        def forward(self, images: Any) -> Any:
            weights = [p.float() for p in self.state]
            pairs = (sorted(weights[i : i + 2], key=lambda w: -w.ndim) for i in (0, 2))
            return tuple(functional.conv2d(images, weight, bias) for weight, bias in pairs)

    return torch.jit.trace(Changed(), torch.zeros(1, 3, 32, 32), check_trace=False)


# ---- metadata ------------------------------------------------------------------------------------------------------


@graph_damage
def added(model: Any, value: np.ndarray[Any, Any]) -> None:
    """Something is added to the output."""
    at_the_end(model, "Add", value)


def silent_boxes(pixels: float) -> np.ndarray[Any, Any]:
    """An offset of the boxes of 20 anchors in a corner of the image, where the model sees nothing."""
    value = np.zeros((1, 10, ANCHORS), np.float32)
    value[:, :2, :20] = pixels
    return value


@graph_damage
def property_changed(model: Any, key: str, value: str | None) -> None:
    """One metadata property is another one, or lost."""
    kept = {p.key: p.value for p in model.metadata_props if p.key != key} | ({key: value} if value is not None else {})
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)


@graph_damage
def opset_of_another_version(model: Any) -> None:
    model.opset_import[0].version = 18


@graph_damage
def metadata_lost(model: Any) -> None:
    del model.metadata_props[:]


@graph_damage
def names_shuffled(model: Any) -> None:
    entry = next(p for p in model.metadata_props if p.key == "names")
    entry.value = entry.value.replace("'Car'", "'?'").replace("'Person'", "'Car'").replace("'?'", "'Person'")


@script_damage
def config_changed(module: Any, texts: dict[str, Any], **changes: Any) -> None:
    texts["config.txt"] = json.dumps({**json.loads(texts["config.txt"]), **changes})


@script_damage
def config_lost(module: Any, texts: dict[str, Any]) -> None:
    texts.clear()


# ---- TorchScript ---------------------------------------------------------------------------------------------------


@script_damage
def script_noise(module: Any, texts: dict[str, Any], name: str, size: float) -> None:
    import torch

    value = module.state_dict()[name]
    value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * (float(value.std()) * size))


@script_damage
def script_nan(module: Any, texts: dict[str, Any]) -> None:
    module.state_dict()["model.22.cv2.0.2.weight"].view(-1)[0] = float("nan")


@script_damage
def script_output(module: Any, texts: dict[str, Any], change: Callable[[Any], Any]) -> Any:
    """What the module returns is changed."""
    import torch

    class Changed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, images: Any) -> Any:
            return change(self.inner(images))

    return torch.jit.trace(Changed(), torch.zeros(1, 3, 320, 320), check_trace=False)


def script_layer_left_in_fp32(path: Path, workshop: Workshop) -> None:
    """FP16 file, traced with one layer in FP32 between casts."""
    import torch

    from exporters.models.build import build, for_export
    from exporters.models.fp16 import in_fp16

    module = in_fp16(
        for_export(build(workshop.models["obstacles"]), False), tuple(p for p, _ in workshop.models["obstacles"].fp32)
    )
    layer = module.get_submodule("inner.model.6.cv1.conv")
    layer.float()
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    layer.register_forward_hook(lambda _, inputs, output: output.half())
    texts: dict[str, Any] = {"config.txt": ""}
    torch.jit.load(str(path), _extra_files=texts)
    with torch.no_grad():
        traced: Any = torch.jit.trace(module, torch.zeros(1, 3, 320, 320), check_trace=False)
        traced.save(str(path), _extra_files=texts)


def script_that_allows_tf32(path: Path, workshop: Workshop) -> None:
    """FP32 file, traced with PyTorch's default for convolutions on a GPU."""
    import torch

    from exporters.models.build import build, for_export

    texts: dict[str, Any] = {"config.txt": ""}
    torch.jit.load(str(path), _extra_files=texts)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=True):
        module = for_export(build(workshop.models["obstacles"]), False)
        traced: Any = torch.jit.trace(module, torch.zeros(1, 3, 320, 320), check_trace=False)
    traced.save(str(path), _extra_files=texts)


COCO = str({i: f"coco {i}" for i in range(80)})
values, detections = outputs.test_outputs_match_reference, outputs.test_detections_match_reference
names, owner = metadata.test_class_names_survive_the_round_trip, metadata.test_metadata_names_the_owner
request = metadata.test_metadata_describes_the_request
achieved, executed = (
    precision.test_achieved_precision_is_the_requested,
    precision.test_executed_precision_is_the_requested,
)
rows, sizes = dynamic.test_batch_rows_equal_single_images, dynamic.test_random_shapes_match_reference
signature, output_names = shapes.test_input_signature_is_the_requested, shapes.test_output_names_match_reference

BROKEN = (
    # Outputs
    Broken("two classes swapped", "onnx fp32", two_classes_swapped(), values, "scores"),
    Broken("two classes swapped, by detections", "onnx fp32", two_classes_swapped(), detections, "lost"),
    Broken(
        "output transposed",
        "onnx fp32",
        output_transposed(),
        shapes.test_output_shapes_match_reference,
        "[1, 2100, 10]",
    ),
    Broken("scores times 1.01", "onnx fp32", multiplied(channels([1, 1, 1, 1], 1.01)), values, "scores"),
    Broken(
        "scores times 1.05",
        "onnx fp16",
        multiplied(channels([1, 1, 1, 1], 1.05)),
        values,
        "onnx fp32 -> onnx fp16: output0 scores",
    ),
    Broken("boxes moved by a pixel", "onnx fp32", moved(1.0), values, "boxes"),
    Broken("boxes moved by half a cell", "onnx fp16", moved(4.0), values, "onnx fp32 -> onnx fp16: output0 boxes"),
    Broken("boxes as corners", "onnx fp32", boxes_as_corners(), detections, "IoU"),
    Broken("boxes as shares of the image", "onnx fp32", multiplied(channels([1 / 320] * 4, 1)), values, "boxes"),
    Broken("scores without the sigmoid", "onnx fp32", scores_as_logits(), values, "scores"),
    Broken("stride 32 dead", "onnx fp32", last_scale_dead(), values, "output0"),
    Broken("stride 32 dead, in FP16", "onnx fp16", last_scale_dead(), values, "onnx fp16"),
    Broken("images divided by 255 again", "onnx fp32", preprocessed_twice(), detections, "lost"),
    Broken("red and blue exchanged", "onnx fp32", blue_for_red(), values, "output0"),
    Broken("1 % noise on a layer", "onnx fp32", noise_on_a_layer("model.12.cv1.conv.weight", 0.01), values, "output0"),
    Broken(
        "10 % noise on a layer", "onnx fp16", noise_on_a_layer("model.12.cv1.conv.weight", 0.1), values, "onnx fp16"
    ),
    Broken("batch normalization with another epsilon", "onnx fp32", folded_with_another_epsilon, values, "output0"),
    Broken("another model's weights", "onnx fp32", untrained(), detections, "0 of"),
    Broken("a NaN among the weights", "onnx fp32", nan_in_a_weight(), shapes.test_outputs_are_finite, "NaN"),
    Broken("a NaN among the weights, by values", "onnx fp32", nan_in_a_weight(), values, "scores"),
    Broken(
        "another result each time",
        "onnx fp32",
        another_result_each_time(),
        outputs.test_same_feeds_give_the_same_outputs,
        "changed by",
    ),
    Broken(
        "1 % noise on a layer, TorchScript",
        "torchscript fp32",
        script_noise("model.12.cv1.conv.weight", 0.01),
        values,
        "output0",
    ),
    Broken(
        "a NaN among the weights, TorchScript", "torchscript fp32", script_nan(), shapes.test_outputs_are_finite, "NaN"
    ),
    Broken("1 % noise on a layer, PyTorch", "pytorch fp32", noise_on_the_state, values, "output0"),
    Broken("two outputs exchanged", "twins onnx fp32", outputs_exchanged(), values, "left"),
    # Signature
    Broken("output renamed", "onnx fp32", output_renamed(), output_names, "missing ['output0'], added ['detections']"),
    Broken("output renamed, by values", "onnx fp32", output_renamed(), values, "output0 is missing"),
    Broken("output added", "onnx fp32", output_added(), output_names, "added ['/model.22/decode/Concat_output_0']"),
    Broken(
        "output added, TorchScript",
        "torchscript fp32",
        script_output(lambda x: (x, x[:, :4])),
        output_names,
        "added ['unnamed1']",
    ),
    Broken("output missing", "twins onnx fp32", output_missing(), output_names, "missing ['right']"),
    Broken("output missing, by values", "twins onnx fp32", output_missing(), values, "right is missing"),
    Broken("output in FP16", "onnx fp32", output_cast("FLOAT16"), shapes.test_output_dtypes_are_floating, "float16"),
    Broken(
        "output in FP16, TorchScript",
        "torchscript fp16",
        script_output(lambda x: x.half()),
        shapes.test_output_dtypes_are_floating,
        "float16",
    ),
    Broken("input in FP16", "onnx fp16", input_cast("FLOAT16"), signature, "float16"),
    Broken("input in FP64", "onnx fp32", input_cast("DOUBLE"), robustness.test_wrong_dtype_is_refused, "float64"),
    Broken("input renamed", "onnx fp32", input_renamed(), signature, "['x']"),
    # Shapes that vary, and batches
    Broken(
        "boxes moved where nothing fires",
        "onnx fp32",
        added(silent_boxes(50.0)),
        values,
        "output0 boxes: max_abs",
    ),
    Broken("first row for all", "onnx fp32 pair", first_row_for_all(), rows, "row 1 of a batch of 2"),
    Broken("first row for all, by values", "onnx fp32 pair", first_row_for_all(), values, "output0"),
    Broken("first row for any batch", "onnx fp32 dynamic", first_row_for_any_batch(), rows, "row 1 of a batch of 3"),
    Broken("declared dynamic, but baked", "onnx fp32 dynamic", declared_dynamic_but_baked, sizes, "Reshape"),
    Broken("right for squares only", "onnx fp32 dynamic", right_for_squares_only(), sizes, "boxes"),
    Broken(
        "fixed where dynamic is asked",
        "onnx fp32 dynamic",
        another("onnx fp32"),
        signature,
        "axis 0 is 1, expected an axis that varies",
    ),
    Broken(
        "dynamic where fixed is asked",
        "onnx fp32",
        another("onnx fp32 dynamic"),
        dynamic.test_other_shapes_are_refused,
        "was taken",
    ),
    Broken(
        "any height where fixed is asked",
        "onnx fp32",
        of_any_height,
        dynamic.test_other_shapes_are_refused,
        "was taken",
    ),
    # Precision
    Broken("FP32 passed off as FP16", "onnx fp16", another("onnx fp32"), achieved, "asked for fp16, the file is fp32"),
    Broken("FP16 passed off as FP32", "onnx fp32", another("onnx fp16"), achieved, "asked for fp32, the file is fp16"),
    Broken("FP16 passed off as FP32, by values", "onnx fp32", another("onnx fp16"), values, "output0"),
    Broken(
        "one layer left in FP32",
        "onnx fp16",
        one_layer_left_in_fp32("/model.6/cv1/conv/Conv"),
        achieved,
        "/model.6/cv1/conv/Conv",
    ),
    Broken("the FP32 decode rounded to FP16", "onnx fp16", decode_rounded(), achieved, "go through FP16"),
    Broken(
        "only the weights in FP16, TorchScript",
        "twins torchscript fp16",
        script_computes_in_fp32(),
        executed,
        "executes fp32",
    ),
    Broken("only the weights in FP16", "onnx fp16", only_the_weights_in_fp16, achieved, "the file is fp32"),
    Broken(
        "FP32 passed off as FP16, TorchScript",
        "torchscript fp16",
        another("torchscript fp32"),
        achieved,
        "the file is fp32",
    ),
    Broken(
        "FP32 executed for FP16, TorchScript",
        "torchscript fp16",
        another("torchscript fp32"),
        executed,
        "libtorch executes fp32",
    ),
    Broken(
        "FP16 passed off as FP32, TorchScript",
        "torchscript fp32",
        another("torchscript fp16"),
        achieved,
        "the file is fp16",
    ),
    Broken(
        "one layer left in FP32, TorchScript",
        "torchscript fp16",
        script_layer_left_in_fp32,
        achieved,
        "model.6.cv1.conv",
    ),
    Broken(
        "TF32 allowed, TorchScript", "torchscript fp32", script_that_allows_tf32, achieved, "TF32 in 63 convolutions"
    ),
    Broken("FP16 passed off as FP32, PyTorch", "pytorch fp32", weights_of_another_type, achieved, "F16"),
    Broken(
        "FP32 passed off as INT8",
        "blobs onnx int8",
        another("blobs onnx fp32"),
        achieved,
        "asked for int8, the file is fp32",
    ),
    Broken("one layer not quantized", "blobs onnx int8", one_layer_not_quantized(), achieved, "/score/Conv"),
    Broken("nothing kept", "blobs onnx int8 kept", another("blobs onnx int8"), achieved, "asked to keep box"),
    Broken("a scale doubled", "blind onnx int8", scale_doubled(), detections, "lost"),
    Broken(
        "another operator set",
        "onnx fp32",
        opset_of_another_version(),
        precision.test_opset_is_the_requested,
        "opset is 18, asked for 20",
    ),
    # Metadata
    Broken("metadata lost", "onnx fp32", metadata_lost(), names, "holds no metadata"),
    Broken("class names lost", "onnx fp32", property_changed("names", None), names, "index 0: None, expected 'Animal'"),
    Broken("class names shuffled", "onnx fp32", names_shuffled(), names, "index 1: 'Person', expected 'Car'"),
    Broken("another model's class names", "onnx fp32", property_changed("names", COCO), names, "80 names, expected 6"),
    Broken("key points lost", "pose onnx fp32", property_changed("kpt_shape", None), request, "kpt_shape is ()"),
    Broken(
        "key points of another model, TorchScript",
        "pose torchscript fp32",
        config_changed(kpt_shape=[17, 3]),
        request,
        "kpt_shape is (17, 3)",
    ),
    Broken(
        "metadata of another image size",
        "onnx fp32",
        property_changed("imgsz", "[640, 640]"),
        request,
        "imgsz is (640, 640)",
    ),
    Broken(
        "metadata of another precision",
        "onnx fp32",
        property_changed("args", str({**ARGS, "half": True, "precision": "fp16"})),
        request,
        "args say precision = 'fp16', expected 'fp32'",
    ),
    Broken("metadata without the options", "onnx fp32", property_changed("args", "{}"), request, "args lack batch"),
    Broken("metadata of another stride", "onnx fp32", property_changed("stride", "16"), request, "stride is 16"),
    Broken(
        "author is the exporter's",
        "onnx fp32",
        property_changed("author", "The Exporter"),
        owner,
        "author is 'The Exporter'",
    ),
    Broken("license is the exporter's", "onnx fp32", property_changed("license", "MIT"), owner, "license is 'MIT'"),
    Broken("metadata lost, TorchScript", "torchscript fp32", config_lost(), names, "holds no metadata (config.txt)"),
    Broken(
        "class names shuffled, TorchScript",
        "torchscript fp32",
        config_changed(names=["Car", "Animal", "Person", "Rock", "Trash", "Tree"]),
        names,
        "index 0",
    ),
    Broken(
        "metadata of another batch, TorchScript", "torchscript fp32", config_changed(batch=8), request, "batch is 8"
    ),
    # Files
    Broken(
        "truncated after the manifest",
        "onnx fp32",
        truncated,
        export.test_files_match_the_manifest,
        "best.onnx",
        rewrites_manifest=False,
    ),
    Broken(
        "truncated before the manifest",
        "onnx fp32",
        truncated,
        export.test_artifact_loads_from_its_files_alone,
        "cannot be loaded",
    ),
    Broken(
        "a file of another format",
        "onnx fp32",
        another("torchscript fp32"),
        export.test_artifact_loads_from_its_files_alone,
        "cannot be loaded",
    ),
    Broken(
        "truncated, TorchScript",
        "torchscript fp32",
        truncated,
        export.test_artifact_loads_from_its_files_alone,
        "cannot be loaded",
    ),
)
CONTROLS = tuple(dict.fromkeys((b.case, b.claim) for b in BROKEN))


@pytest.mark.parametrize(
    ("cell", "damage", "words"),
    [
        ("onnx fp32", noise_on_a_layer("model.12.cv1.conv.weight", 0.01), "Conv /model.12/cv1/conv/Conv: "),
        ("onnx fp16", noise_on_a_layer("model.12.cv1.conv.weight", 0.1), "Conv /model.12/cv1/conv/Conv: "),
        ("onnx fp32 pair", noise_on_a_layer("model.12.cv1.conv.weight", 0.01), "Conv /model.12/cv1/conv/Conv: "),
        ("onnx fp32", preprocessed_twice(), "Conv /model.0/conv/Conv: "),
        ("onnx fp32", nan_in_a_weight(), "cv3.1/cv3.1.2/Conv: nan of its range"),
        ("onnx fp32", multiplied(channels([1, 1, 1, 1], 1.01)), "so that it happens behind them"),
        ("twins onnx fp32", outputs_exchanged(), "so that it happens behind them"),
    ],
    ids=["noise", "noise, FP16", "noise, batch", "first layer", "NaN", "behind all modules", "names of outputs"],
)
def test_a_failure_names_where_it_begins(workshop: Workshop, cell: str, damage: Damage, words: str) -> None:
    """The first node inside the graph whose output leaves its tolerance stands in the failure's line."""
    verdict, because = workshop.judge(cell, values, damage)
    assert verdict is Verdict.FAIL
    assert words in because, because


@given(data=st.data(), count=st.integers(0, 500))
def test_an_engine_is_narrowed_down_in_few_builds(data: st.DataObject, count: int) -> None:
    """The first module beyond where all can be compared; with some that cannot, one that is beyond, or none."""
    modules = [f"model.{n}" for n in range(count)]
    bad = data.draw(st.integers(0, count), "first that is beyond; as many as there are: none")
    unseen = data.draw(st.sets(st.sampled_from(modules)) if modules else st.just(set[str]()), "cannot be compared")
    for gone in (set[str](), unseen):
        asked: list[list[str]] = []

        def shares(some: Sequence[str], asked: list[list[str]] = asked, gone: set[str] = gone) -> dict[str, float]:
            asked.append(list(some))
            return {m: float("nan") if modules.index(m) >= bad else 0.0 for m in some if m not in gone}

        within, beyond, observed = attribution.narrowed(modules, shares, 0.1)
        looks = [m for some in asked for m in some]
        assert len(asked) <= (attribution.BUILDS if gone else 3) and len(looks) == len(set(looks))
        assert all(1 <= len(some) <= attribution.SHOWN for some in asked)
        assert not beyond or (modules.index(beyond) >= bad and np.isnan(observed))
        assert within == sum(m not in gone and modules.index(m) < bad for m in looks)
        if not gone:
            assert beyond == (modules[bad] if bad < count else "")


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: b.name)
def test_a_broken_exporter_is_caught(
    workshop: Workshop, broken: Broken, record_property: Callable[[str, object], None]
) -> None:
    verdict, because = workshop.judge(broken.case, broken.claim, broken.damage, broken.rewrites_manifest)
    record_property("caught", [broken.name, broken.case, broken.claim.__name__, str(verdict), because])
    assert verdict is broken.verdict, f"{broken.claim.__name__} says {verdict} ({because}), expected {broken.verdict}"
    assert broken.word in because, f"'{broken.word}' is not in the line that is to name the culprit: {because}"


@pytest.mark.parametrize(("cell", "claim"), CONTROLS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_the_same_claim_passes_on_the_good_artifact(
    workshop: Workshop, cell: str, claim: Callable[[Bench], None]
) -> None:
    verdict, because = workshop.judge(cell, claim)
    assert verdict is Verdict.PASS, because


def test_values_of_an_int8_detector_are_not_called_right(workshop: Workshop) -> None:
    """Nothing of an INT8 detector is compared element by element; a PASS would be absence that looks like success."""
    verdict, because = workshop.judge("blind onnx int8", values, scale_doubled())
    assert verdict is Verdict.NOT_SUPPORTED, f"{verdict}: {because}"
    assert "matching" in because


# ---- what the runtime does -----------------------------------------------------------------------------------------

OTHER_PROVIDER = """
import onnxruntime
onnxruntime.InferenceSession.get_providers = lambda session: ["AzureExecutionProvider", "CPUExecutionProvider"]
"""
SOME_NODES_ELSEWHERE = """
import json, onnxruntime
from pathlib import Path
finish = onnxruntime.InferenceSession.end_profiling

def end_profiling(session):
    path = Path(finish(session))
    events = json.loads(path.read_text())
    for event in events:
        if event.get("args", {}).get("op_name") == "Softmax":
            event["args"]["provider"] = "AzureExecutionProvider"
    path.write_text(json.dumps(events))
    return str(path)

onnxruntime.InferenceSession.end_profiling = end_profiling
"""


@pytest.mark.parametrize(
    ("runtime", "word"),
    [(OTHER_PROVIDER, "gave AzureExecutionProvider"), (SOME_NODES_ELSEWHERE, "Softmax")],
    ids=["the whole session", "some nodes"],
)
def test_a_fall_back_to_another_provider_fails(
    workshop: Workshop, runtime: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose ONNX Runtime tells that other providers took over."""
    (tmp_path / "sitecustomize.py").write_text(runtime, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with Pool() as pool:
        bench = Bench(Run(workshop.run.project, pool), workshop.case("onnx fp32"))
        with pytest.raises(Exception) as caught:
            precision.test_every_node_runs_on_the_requested_provider(bench)
        bench.close()
    assert verdict_of(caught.value) is Verdict.FAIL, caught.value
    assert word in one_line(caught.value)


def test_every_node_of_the_good_artifact_runs_where_it_should(workshop: Workshop) -> None:
    verdict, because = workshop.judge("onnx fp32", precision.test_every_node_runs_on_the_requested_provider)
    assert verdict is Verdict.PASS, because


# ---- the whole suite -----------------------------------------------------------------------------------------------

PLUGIN = '''
"""A broken exporter as a pytest plugin: class names get lost."""
import os, shutil
from dataclasses import replace
from pathlib import Path
import onnx
from exporters.artifact import list_files

def pytest_exportgate_export_end(artifact, spec):
    root = Path(os.environ["BROKEN"]) / artifact.root.name
    shutil.copytree(artifact.root, root)
    model = onnx.load(root / artifact.primary)
    kept = {p.key: p.value for p in model.metadata_props if p.key != "names"}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, root / artifact.primary)
    return replace(artifact, root=root, files=list_files(root))
'''


def test_the_suite_fails_a_broken_exporter_and_judges_everything_else(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "names_lost.py").write_text(PLUGIN, encoding="utf-8")
    (tmp_path / "exportgate.toml").write_text("[latency]\nprocesses = 2\nseconds = 0.1\n", encoding="utf-8")
    root = Path(suites.__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)]),
        "BROKEN": str(tmp_path / "broken"),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "suites.plugin",
        "-p",
        "names_lost",
        "-p",
        "no:cacheprovider",
        "--model",
        str(trained),
        "--format",
        "onnx",
        "--precision",
        "fp32",
        "--imgsz",
        "320",
        "--project",
        str(tmp_path),
        "--report",
        str(tmp_path / "report"),
        str(root / "suites"),
    ]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:] + done.stderr[-3000:]
    assert "NOT QUALIFIED" in done.stdout
    lines = (tmp_path / "report" / "record.jsonl").read_text(encoding="utf-8").splitlines()
    verdicts = {e["claim"]: e["verdict"] for e in map(json.loads, lines) if e["event"] == "claim"}
    assert verdicts.pop("test_class_names_survive_the_round_trip") == "FAIL"
    assert set(verdicts.values()) <= {"PASS", "NOT_SUPPORTED", "NO_BASELINE"}, verdicts
    for chapter in (dynamic, export, metadata, outputs, precision, robustness, shapes):
        missing = {n for n in vars(chapter) if n.startswith("test_")} - {
            *verdicts,
            "test_class_names_survive_the_round_trip",
        }
        assert not missing, f"claims of {chapter.__name__} were not judged: {missing}"
    assert verdicts["test_outputs_match_reference"] == verdicts["test_metadata_describes_the_request"] == "PASS"
    assert "test_p50_within_baseline" in verdicts

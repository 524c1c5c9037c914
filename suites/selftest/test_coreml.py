"""Core ML where nothing runs it: what its files say is read back, and damage to it is seen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from exporters import formats, toolchain
from exporters.artifact import foreign
from exporters.errors import BadRequest, NotSupported, ToolchainMissing
from exporters.formats.coreml import COMPUTED
from exporters.models.spec import ModelSpec, OutputSpec
from exporters.spec import request
from suites.accuracy import test_accuracy
from suites.conformance import test_metadata, test_outputs, test_precision, test_shapes, test_weights
from suites.performance import test_latency
from suites.selftest.conftest import Claim, Judge, Workshop
from suites.support.bench import Bench
from suites.support.cases import Case
from suites.support.verdict import Verdict


def is_here() -> bool:
    try:
        toolchain.resolve("coreml")
    except ToolchainMissing:
        return False
    return True


pytestmark = [
    pytest.mark.formats,
    pytest.mark.skipif(not is_here(), reason="the toolchain is not here: exportgate toolchain sync coreml"),
]
WEIGHTS = test_weights.test_weights_match_the_checkpoint
INPUTS = test_shapes.test_input_signature_is_the_requested
LAYER = "model.4.cv1.conv"  # one with four axes and enough values for every precision

# Run by the toolchain's interpreter, which alone can read the files: changes a specification, or bytes of the weights.
TOOL = r'''
import json, pathlib, struct, sys
from coremltools.proto import Model_pb2

path, what = pathlib.Path(sys.argv[1]), sys.argv[2]
folder = path / "Data" / "com.apple.CoreML"
source = folder / "model.mlmodel" if path.is_dir() else path
model = Model_pb2.Model()
model.ParseFromString(source.read_bytes())
inner = model.pipeline.models[0] if model.WhichOneof("Type") == "pipeline" else model
network = None if inner.WhichOneof("Type") == "mlProgram" else getattr(inner, inner.WhichOneof("Type"))


def operators():
    for function in inner.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from block.operations


def change_bytes(value, change):
    """Bytes of a value in weight.bin: a 64-byte record of magic, type, size and place stands before them."""
    weights = folder / "weights" / value.blobFileValue.fileName.rpartition("/")[2]
    data = bytearray(weights.read_bytes())
    magic, _, size, place = struct.unpack_from("<IIQQ", data, value.blobFileValue.offset)
    assert magic == 0xDEADBEEF and size
    data[place : place + size] = change(bytes(data[place : place + size]))
    weights.write_bytes(data)


def nudged(data):
    """The last byte but one of the first value, which holds exponent or fraction."""
    return data[:1] + bytes([data[1] ^ 8]) + data[2:]


if what == "weight" and network is not None:
    layer = next(l for l in network.layers if l.name == sys.argv[3].replace(".", "__"))
    params = layer.convolution.weights
    if params.rawValue:
        params.rawValue = bytes([params.rawValue[0] ^ 2]) + params.rawValue[1:]
    elif params.float16Value:
        params.float16Value = nudged(params.float16Value)
    else:
        params.floatValue[0] *= 1 + 2**-20
elif what == "weight":
    name = sys.argv[3].replace(".", "__") + "__weight"
    op = next(o for o in operators() if o.outputs[0].name.startswith(name))
    if op.type == "const":
        change_bytes(op.attributes["val"], nudged)
    else:
        values = op.attributes["quantized_data" if "quantized_data" in op.attributes else "indices"]
        change_bytes(values, lambda data: bytes([(data[0] + 2) % 256]) + data[1:])
elif what == "scales":
    name = sys.argv[3].replace(".", "__") + "__weight"
    op = next(o for o in operators() if o.outputs[0].name.startswith(name))
    change_bytes(op.attributes["scale" if "scale" in op.attributes else "lut"], lambda data: nudged(data))
elif what == "coarse":
    import numpy as np

    name = sys.argv[3].replace(".", "__") + "__weight"
    op = next(o for o in operators() if o.outputs[0].name.startswith(name))
    if "lut" in op.attributes:  # 16 values instead of 256

        def flat(data):
            table = np.frombuffer(data, np.float16)
            order = np.argsort(table)
            fewer = table.copy()
            fewer[order] = np.repeat(table[order].reshape(16, 16).mean(1), 16)
            return fewer.tobytes()

        change_bytes(op.attributes["lut"], flat)
    else:  # 7 bits instead of 8
        change_bytes(op.attributes["quantized_data"], lambda data: (np.frombuffer(data, np.int8) // 2).tobytes())
        change_bytes(op.attributes["scale"], lambda data: (np.frombuffer(data, np.float16) * 2).tobytes())
elif what == "shift" and network is not None:
    network.preprocessing[0].scaler.redBias = -0.5
elif what == "shift":  # as coremltools writes a picture's bias
    function = next(iter(inner.mlProgram.functions.values()))
    ops = next(iter(function.block_specializations.values())).operations
    at = next(n for n, o in enumerate(ops) if o.type == "mul" and o.outputs[0].name.startswith("image__scaled__"))
    old, whole = ops[at].outputs[0].name, [type(o).FromString(o.SerializeToString()) for o in ops]
    added = type(whole[at]).FromString(whole[at].SerializeToString())
    added.type, added.outputs[0].name = "add", "image__biased__"
    if "name" in added.attributes:
        added.attributes["name"].immediateValue.tensor.strings.values[0] = "image__biased__"
    first = next(k for k, i in added.inputs.items() if "__scaled__" not in i.arguments[0].name)
    added.inputs[first].arguments[0].name = old
    for later in whole[at + 1 :]:
        for given in (a for i in later.inputs.values() for a in i.arguments if a.name == old):
            given.name = "image__biased__"
    del ops[:]
    ops.extend([*whole[: at + 1], added, *whole[at + 1 :]])
elif what == "activation" and network is not None:
    next(l for l in network.layers if l.WhichOneof("layer") == "activation").activation.ReLU.SetInParent()
elif what == "activation":
    next(o for o in operators() if o.type == "silu").type = "relu"
elif what in ("concat", "permuted") and network is not None:
    pairs = [l for l in network.layers if l.WhichOneof("layer") == "concatND" and len(l.input) == 2]
    layer = pairs[-1 if what == "permuted" else -2]
    layer.input[:] = layer.input[::-1]
elif what in ("concat", "permuted"):  # of box centre and size; of boxes and scores, the last one
    pairs = [o.inputs["values"].arguments for o in operators() if o.type == "concat"]
    both = [a for a in pairs if len(a) == 2][-1 if what == "permuted" else -2]
    both[0].name, both[1].name = both[1].name, both[0].name
elif what == "strides" and network is not None:
    data = next(l for l in network.layers if l.name == "strides.1").loadConstantND.data
    data.floatValue[:] = [2 * v for v in data.floatValue]
elif what == "strides":  # in pixels, by which the decode multiplies boxes
    import numpy as np

    op = next(o for o in operators() if o.type == "const" and o.outputs[0].name == "strides_1")
    change_bytes(op.attributes["val"], lambda data: (np.frombuffer(data, np.float32) * 2).tobytes())
elif what == "sub" and network is not None:  # where the converter writes b - a as b + (-a)
    negative = [l for l in network.layers if l.activation.linear.alpha == -1][-1]
    added = next(l for l in network.layers if negative.output[0] in l.input)
    other = next(n for n, name in enumerate(added.input) if name != negative.output[0])
    negative.input[0], added.input[other] = added.input[other], negative.input[0]
elif what == "sub":
    op = [o for o in operators() if o.type == "sub"][-1]
    x, y = op.inputs["x"].arguments[0], op.inputs["y"].arguments[0]
    x.name, y.name = y.name, x.name
elif what == "wiring" and network is not None:
    first, second = (next(l for l in network.layers if l.name == name.replace(".", "__")) for name in sys.argv[3:])
    second.input[0] = first.input[0]
elif what == "wiring":
    names = [name.replace(".", "__") + "__weight" for name in sys.argv[3:]]
    convolutions = [o for o in operators() if o.type == "conv"]
    first, second = (
        next(o for o in convolutions if o.inputs["weight"].arguments[0].name.startswith(name)) for name in names
    )
    second.inputs["x"].arguments[0].name = first.inputs["x"].arguments[0].name
elif what == "mean" and network is not None:  # added to pictures, its negative
    data = next(l for l in network.layers if l.WhichOneof("layer") == "loadConstantND").loadConstantND.data
    data.floatValue[:] = list(data.floatValue)[::-1]
elif what == "mean":
    op = next(o for o in operators() if o.type in ("sub", "add"))
    names = {a.name for i in op.inputs.values() for a in i.arguments}
    tensor = next(o for o in operators() if o.outputs[0].name in names and o.type == "const").attributes["val"]
    values = tensor.immediateValue.tensor.floats.values
    values[:] = list(values)[::-1]
elif what == "unknown" and network is not None:
    layer = next(l for l in network.layers if l.WhichOneof("layer") == "activation")
    layer.asin.SetInParent()
elif what == "unknown":
    next(o for o in operators() if o.type == "silu").type = "asin"
elif what == "layer":
    functions = inner.mlProgram.functions.values()
    blocks = [b.operations for f in functions for b in f.block_specializations.values()]
    there = network.layers if network is not None else blocks[0]
    is_one = (lambda o: o.type == "conv") if network is None else (lambda o: o.WhichOneof("layer") == "convolution")
    at = next(n for n, o in enumerate(there) if is_one(o))
    whole = [type(o).FromString(o.SerializeToString()) for o in there]
    added = type(whole[at]).FromString(whole[at].SerializeToString())
    if network is None:
        added.outputs[0].name = "one__more"
        if "name" in added.attributes:
            added.attributes["name"].immediateValue.tensor.strings.values[0] = "one__more"
    else:
        added.name = added.output[0] = "one__more"
    del there[:]
    there.extend([*whole[: at + 1], added, *whole[at + 1 :]])
elif what == "theirs":
    network, step = (m for m in model.pipeline.models)
    for n, given in enumerate(network.description.output):
        step.description.input[n].name = f"var_{n}"
        if step.nonMaximumSuppression.confidenceInputFeatureName == given.name:
            step.nonMaximumSuppression.confidenceInputFeatureName = f"var_{n}"
        else:
            step.nonMaximumSuppression.coordinatesInputFeatureName = f"var_{n}"
        given.name = f"var_{n}"
elif what == "labels" and model.WhichOneof("Type") == "pipeline":
    del model.pipeline.models[1].nonMaximumSuppression.stringClassLabels.vector[:]
elif what == "rename":
    old = sys.argv[3].replace(".", "__") + "__" + (sys.argv[4:] or ["weight"])[0]
    for op in operators():
        for named in [*op.outputs, *(b for i in op.inputs.values() for b in i.arguments)]:
            named.name = named.name.replace(old, "other") if old in named.name else named.name
elif what == "picture" and network is not None:
    network.preprocessing[0].scaler.channelScale = 1.0
elif what == "picture":
    value = next(o for o in operators() if o.outputs[0].name.startswith("image__scaled___y")).attributes["val"]
    value.immediateValue.tensor.floats.values[0] = 1 / 128
elif what == "colours":
    model.description.input[0].type.imageType.colorSpace = 30
elif what == "size":
    model.description.input[0].type.imageType.width //= 2
elif what == "threshold":
    model.pipeline.models[1].nonMaximumSuppression.iouThreshold = 0.5
elif what == "label" and network is not None:
    network.stringClassLabels.vector[1] = "other"
elif what == "label":
    value = next(o for o in operators() if o.type == "classify").inputs["classes"].arguments[0].value
    value.immediateValue.list.values[1].immediateValue.tensor.strings.values[0] = "other"
elif what == "author":
    model.description.metadata.author = "somebody"
elif what == "names":
    del model.description.metadata.userDefined["names"]
else:
    raise SystemExit(f"no such damage: {what}")
source.write_bytes(model.SerializeToString())
'''


def injury(*words: str) -> Callable[[Path, Workshop], None]:
    """A damage of TOOL."""

    def damage(path: Path, _: Workshop) -> None:
        python = toolchain.resolve("coreml").python
        done = subprocess.run(
            [str(python), "-c", TOOL, str(path), *words], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:  # no failed claim
            raise RuntimeError(done.stderr)

    return damage


GOOD: dict[tuple[str, Claim], tuple[Verdict, str]] = {}  # what is said of good files


def caught(workshop: Workshop, judge: Judge, name: str, claim: Claim, *words: str) -> str:
    """The line by which a claim that does not fail on the good artifact fails on the damaged one."""
    if (name, claim) not in GOOD:  # proving that a comparison could have failed takes half a minute
        GOOD[name, claim] = judge(claim, workshop.bench(name))
    good, because = GOOD[name, claim]
    # A NeuralNetwork has no convolution of the decode's constants, so that the claim is one of the others alone.
    assert good is Verdict.PASS or (claim is WEIGHTS and "1 parameters of other layers" in because), because
    verdict, because = workshop.judge(name, claim, injury(*words))
    assert verdict is Verdict.FAIL, (verdict, because)
    return because


@pytest.mark.parametrize(
    "name",
    [
        "detect coreml fp32",
        "detect coreml fp16",
        "detect coreml int8",
        "detect coreml int8 palettize",
        "detect coreml fp16 nms",
        "detect mlmodel fp32",
        "detect mlmodel fp16",
        "detect mlmodel int8",
    ],
)
def test_one_value_of_one_weight_is_seen(workshop: Workshop, judge: Judge, name: str) -> None:
    because = caught(workshop, judge, name, WEIGHTS, "weight", LAYER)
    assert f"1 of 1024 values of weight {LAYER}.weight are not the checkpoint's" in because


@pytest.mark.parametrize("name", ["detect coreml int8", "detect coreml int8 palettize"])
def test_a_scale_or_an_entry_of_a_table_is_seen(workshop: Workshop, judge: Judge, name: str) -> None:
    assert f"weight {LAYER}.weight are not" in caught(workshop, judge, name, WEIGHTS, "scales", LAYER)


@pytest.mark.parametrize("name", ["detect coreml fp32", "detect mlmodel fp32"])
def test_one_more_layer_is_seen(workshop: Workshop, judge: Judge, name: str) -> None:
    assert re.search(r"computes 64 convolution.*the model 63 conv", caught(workshop, judge, name, WEIGHTS, "layer"))


@pytest.mark.parametrize("name", ["detect coreml fp32", "detect mlmodel fp32"])
def test_another_activation_is_seen(workshop: Workshop, judge: Judge, name: str) -> None:
    assert "1 relu" in caught(workshop, judge, name, WEIGHTS, "activation")


def test_a_weight_of_no_layer_is_missed(workshop: Workshop, judge: Judge) -> None:
    for words in ((), ("bias",)):
        because = caught(workshop, judge, "detect coreml fp32", WEIGHTS, "rename", LAYER, *words)
        assert because.startswith("1 parameters of the checkpoint are not in the file") and LAYER in because


@pytest.mark.parametrize("name", ["detect coreml int8", "detect coreml int8 palettize"])
def test_fewer_bits_in_the_place_of_eight_are_seen(workshop: Workshop, judge: Judge, name: str) -> None:
    """Whose own scale or table says that each value is as near as it can be."""
    because = caught(workshop, judge, name, WEIGHTS, "coarse", LAYER)
    assert f"values of weight {LAYER}.weight are not the checkpoint's" in because


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("detect coreml fp32", "picture", "scaled by 0.0078125, expected 1/255"),
        ("detect mlmodel fp32", "picture", "scaled by 1, expected 1/255"),
        ("detect coreml fp32", "shift", "not scaled, or shifted"),
        ("detect mlmodel fp32", "shift", "not scaled, or shifted"),
        ("detect coreml fp32", "colours", "in BGR, expected RGB"),
        ("detect coreml fp32", "size", "axis 3 is 128, expected 256"),
        ("detect coreml fp16 nms", "threshold", "suppresses with iou 0.5, conf 0.25"),
    ],
)
def test_another_interface_is_seen(workshop: Workshop, judge: Judge, name: str, damage: str, words: str) -> None:
    assert words in caught(workshop, judge, name, INPUTS, damage)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("classify coreml fp32", "label", "class labels"),
        ("classify mlmodel fp32", "label", "class labels"),
        ("detect coreml fp16 nms", "labels", "class labels []"),
        ("detect coreml fp32", "names", "class names differ at index 0"),
    ],
)
def test_other_labels_are_seen(workshop: Workshop, judge: Judge, name: str, damage: str, words: str) -> None:
    claim = test_metadata.test_class_names_survive_the_round_trip
    assert words in caught(workshop, judge, name, claim, damage)


def test_another_author_is_seen(workshop: Workshop, judge: Judge) -> None:
    because = caught(workshop, judge, "detect mlmodel fp32", test_metadata.test_metadata_names_the_owner, "author")
    assert "says author 'somebody'" in because


@pytest.mark.parametrize("format_id", ["coreml", "mlmodel"])
def test_a_file_of_another_precision_is_seen(workshop: Workshop, judge: Judge, format_id: str) -> None:
    claim = test_precision.test_achieved_precision_is_the_requested
    for asked, made in (("fp16", "fp32"), ("int8", "fp16"), ("fp32", "int8")):
        other = workshop.good(f"detect {format_id} {made}").path

        def damage(path: Path, _: Workshop, other: Path = other) -> None:
            if path.is_dir():
                shutil.rmtree(path)
                shutil.copytree(other, path)
            else:
                shutil.copyfile(other, path)

        assert judge(claim, workshop.bench(f"detect {format_id} {asked}")) == (Verdict.PASS, "")
        verdict, because = workshop.judge(f"detect {format_id} {asked}", claim, damage)
        assert verdict is Verdict.FAIL and f"asked for {asked}, the file is {made}" in because


NORMALIZED = """
import torch
from torch import nn


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, bias=False), nn.ConvTranspose2d(8, 16, 2, 2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(16)])
        for norm in self.norms:
            for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
                values.uniform_(0.5, 2.0)
        self.last = nn.Linear(16, 24)

    def forward(self, images):
        x = images
        for layer, norm in zip(self.layers, self.norms):
            x = norm(layer(x)).relu()
        return self.last(x.mean((2, 3)))


def normalized():
    return Normalized()
"""


@pytest.mark.parametrize("format_id", ["coreml", "mlmodel"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_normalizations_that_the_converter_folds_are_folded_here(
    workshop: Workshop, judge: Judge, tmp_path: Path, format_id: str, precision: str
) -> None:
    """A user's own module, whose pictures are prepared by a mean and a deviation."""
    (tmp_path / "normalized_model.py").write_text(NORMALIZED)
    model = ModelSpec(
        "normalized", "normalized_model:normalized", search=(tmp_path,), outputs=(OutputSpec("out"),), imgsz=(32, 32)
    )
    prepared = replace(model.preprocess, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    spec = request(replace(model, preprocess=prepared), format_id, precision=precision)
    bench = Bench(workshop.run, Case(spec, formats.get(format_id).runtimes[0]))
    for claim in (WEIGHTS, INPUTS, test_precision.test_achieved_precision_is_the_requested):
        assert judge(claim, bench) == (Verdict.PASS, "")
    assert bench.evidence["weights"]["compared"] == 6
    bench.close()


def test_a_suppression_may_call_what_it_takes_as_it_likes(workshop: Workshop) -> None:
    """Others' pipelines do; what goes from one part of a file to the other is nobody else's concern."""
    claim, damage = test_shapes.test_output_shapes_match_reference, injury("theirs")
    assert workshop.judge("detect coreml fp16 nms", claim, damage) == (Verdict.PASS, "")


def test_a_decode_that_does_not_stay_in_fp32_is_seen(workshop: Workshop, judge: Judge) -> None:
    """FP16 has steps of 1 px from 1024 on, and where nothing runs the file no box shows it."""

    def damage(path: Path, workshop: Workshop) -> None:
        spec = workshop.case("detect coreml fp16").spec
        made = workshop.run.pool.export(spec.but(model=replace(spec.model, fp32=())))
        shutil.rmtree(path)
        shutil.copytree(made.path, path)

    claim = test_precision.test_achieved_precision_is_the_requested
    assert judge(claim, workshop.bench("detect coreml fp16")) == (Verdict.PASS, "")
    verdict, because = workshop.judge("detect coreml fp16", claim, damage)
    assert verdict is Verdict.FAIL and "model.22.decode" in because and "nothing of them" in because, because


OUTPUTS, ACCURACY = test_outputs.test_outputs_match_reference, test_accuracy.test_detections_agree_without_labels
WIRING = ("wiring", "model.2.m.0.cv1.conv", "model.2.m.0.cv2.conv")


@pytest.mark.parametrize("words", [("concat",), ("permuted",), ("strides",), ("sub",), WIRING], ids=lambda w: w[0])
@pytest.mark.parametrize("name", ["coreml fp32", "coreml fp16", "mlmodel fp32"])
def test_a_program_that_computes_something_else_is_seen(
    workshop: Workshop, judge: Judge, name: str, words: tuple[str, ...]
) -> None:
    """No weight, type or number of operators differs: its outputs do, and they are computed anywhere."""
    assert "comparisons fail" in caught(workshop, judge, f"detect {name} evaluator", OUTPUTS, *words)


@pytest.mark.parametrize("damage", ["concat", "strides"])
@pytest.mark.parametrize("name", ["coreml int8", "coreml int8 palettize", "mlmodel int8"])
def test_in_8_bits_too(workshop: Workshop, judge: Judge, name: str, damage: str) -> None:
    """Which is judged by what is found in pictures."""
    assert caught(workshop, judge, f"detect {name} evaluator", ACCURACY, damage)


@pytest.mark.parametrize("damage", ["concat", "strides", "sub"])
def test_behind_it_a_suppression_too(workshop: Workshop, judge: Judge, damage: str) -> None:
    claim = test_outputs.test_detections_match_reference
    assert "detections found again" in caught(workshop, judge, "detect coreml fp16 nms evaluator", claim, damage)


@pytest.mark.parametrize("name", ["coreml fp32", "coreml fp16", "mlmodel fp32", "mlmodel fp16"])
@pytest.mark.parametrize("model", ["blobs", "twins", "classify", "segment"])
def test_good_files_compute_what_pytorch_does(workshop: Workshop, judge: Judge, model: str, name: str) -> None:
    assert judge(OUTPUTS, workshop.bench(f"{model} {name} evaluator")) == (Verdict.PASS, "")


@pytest.mark.parametrize("name", ["coreml fp32", "mlmodel fp32"])
def test_an_operator_that_is_not_known_is_named_and_not_guessed(workshop: Workshop, judge: Judge, name: str) -> None:
    verdict, because = workshop.judge(f"detect {name} evaluator", OUTPUTS, injury("unknown"))
    assert verdict is Verdict.NOT_SUPPORTED and "does not compute" in because and "asin" in because, because


@pytest.mark.parametrize("format_id", ["coreml", "mlmodel"])
def test_what_is_computed_with_pytorch_is_not_taken_for_core_ml(
    workshop: Workshop, judge: Judge, format_id: str
) -> None:
    for claim in (test_precision.test_executed_precision_is_the_requested, _latency):
        verdict, because = judge(claim, workshop.bench(f"classify {format_id} fp16 evaluator"))
        assert (verdict, because) == (Verdict.NOT_SUPPORTED, COMPUTED)


def _latency(bench: Bench) -> None:
    test_latency.test_p50_within_baseline(bench, None)


ACHIEVED = test_precision.test_achieved_precision_is_the_requested


@pytest.mark.parametrize(
    ("asked", "made", "name", "words"),
    [
        ("mlmodel", "coreml", "a.mlpackage", "is an ML Program, and mlmodel is a NeuralNetwork: say --format coreml"),
        ("coreml", "mlmodel", "a.mlmodel", "is a NeuralNetwork, and coreml is an ML Program: say --format mlmodel"),
        ("coreml", "mlmodel", "a.mlpackage", "is a file, and what is named .mlpackage is a folder"),
        ("mlmodel", "coreml", "a.mlmodel", "is a folder, and what is named .mlmodel is a file"),
    ],
)
def test_a_file_of_the_other_kind_is_told(
    workshop: Workshop, judge: Judge, tmp_path: Path, asked: str, made: str, name: str, words: str
) -> None:
    good, path = workshop.good(f"classify {made} fp32").path, tmp_path / name
    shutil.copytree(good, path) if good.is_dir() else shutil.copy2(good, path)
    for runtime in formats.get(asked).runtimes:
        case = replace(workshop.case(f"classify {asked} fp32"), runtime=runtime)
        bench = Bench(workshop.run, case, foreign(path, asked, case.spec.to_dict(), trust=True, is_code=False))
        for claim in (INPUTS, ACHIEVED):
            verdict, because = judge(claim, bench)
            assert verdict is Verdict.ERROR and words in because, (verdict, because)
        bench.close()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("com.apple.CoreML/model.mlmodel\0", "names 'com.apple.CoreML/model.mlmodel\\x00', which is no path"),
        ("\ud800", "names '\\ud800', which is no path"),
        ("../../other.mlmodel", "which lies outside"),
    ],
)
def test_a_manifest_that_names_no_path_is_told_in_one_line(workshop: Workshop, place: str, words: str) -> None:
    def damage(path: Path, _: Workshop) -> None:
        manifest = json.loads((path / "Manifest.json").read_text())
        manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = place
        (path / "Manifest.json").write_text(json.dumps(manifest))

    verdict, because = workshop.judge("classify coreml fp32", ACHIEVED, damage)
    assert verdict is Verdict.ERROR and words in because and "\n" not in because, because


WEIGHT_FILE = Path("Data") / "com.apple.CoreML" / "weights" / "weight.bin"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda file: file.write_bytes(b""),
            r"weight\.bin' has 0 bytes, and a weight in it ends at byte \d+: it is empty",
        ),
        (lambda file: os.truncate(file, 5000), r"has 5000 bytes, and a weight in it ends at byte \d+: .* cut off"),
        (lambda file: file.rename(file.with_name("w.bin")), r"weights 'weight\.bin' cannot be read in .*No such file"),
        (lambda file: file.write_bytes(bytes(file.stat().st_size)), r"weight\.bin' holds no weight at byte 64"),
    ],
    ids=["empty", "cut", "renamed", "zeros"],
)
def test_weights_that_are_not_there_are_named(workshop: Workshop, change: Callable[[Path], object], words: str) -> None:
    def damage(path: Path, _: Workshop) -> None:
        change(path / WEIGHT_FILE)

    for runtime in ("coreml", "evaluator"):
        verdict, because = workshop.judge(f"classify coreml fp32 {runtime}", ACHIEVED, damage)
        assert verdict is Verdict.ERROR and re.search(words, because) and "\n" not in because, because


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS runs it")
def test_what_needs_macos_is_left_to_a_machine_that_has_it(workshop: Workshop, judge: Judge) -> None:
    """SKIPPED, which another machine's run can stand in for, where NOT_SUPPORTED would be the last word."""
    for claim in (test_shapes.test_outputs_are_finite, test_precision.test_executed_precision_is_the_requested):
        verdict, because = judge(claim, workshop.bench("detect coreml fp32"))
        assert verdict is Verdict.SKIPPED and "macOS" in because, (verdict, because)


@pytest.mark.parametrize(
    ("model", "format_id", "options", "words"),
    [
        ("detect", "coreml", {"batch": 2}, "batch 2: Core ML takes one picture"),
        ("detect", "coreml", {"dynamic": True}, "pictures of one size"),
        ("segment", "coreml", {"nms": True}, "boxes and scores alone, and this model has"),
        ("obb", "coreml", {"nms": True}, "this model has"),
        ("classify", "coreml", {"nms": True}, "has no boxes with scores"),
        ("detect", "coreml", {"palettize": True}, "option 'palettize' (True) with fp32"),
        ("detect", "mlmodel", {"nms": True}, "mlmodel does not take option 'nms'"),
        ("detect", "coreml", {"nms": True, "max_det": 5}, "does not take option 'max_det'"),
        ("detect", "coreml", {"int8": True, "data": "coco.yaml"}, "does not take option 'data'"),
        ("detect", "coreml", {"int8": True, "keep": "model.99"}, "no module of that name"),
    ],
)
def test_what_core_ml_cannot_do_is_refused(
    workshop: Workshop, model: str, format_id: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises((BadRequest, NotSupported)) as caught:
        workshop.run.pool.export(request(workshop.models[model], format_id, **options))
    assert words in str(caught.value)


def test_classes_of_one_name_are_refused(workshop: Workshop) -> None:
    classifier = workshop.models["classify"]
    twice = replace(classifier, names={**classifier.names, 1: classifier.names[0]})
    with pytest.raises(NotSupported, match="two classes are named"):
        request(twice, "coreml")


def test_windows_and_paddings_are_placed_as_core_ml_places_them() -> None:
    """Held against PyTorch's own where that has the same, and against MIL's formula of "same" where it has not."""
    import torch
    from torch.nn import functional

    from exporters.runtimes import kernels

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator) for s in ((1, 4, 7, 6), (4, 2, 3, 3)))
    own = kernels.pool(x, "avg", [3, 3], [2, 2], [1, 1, 1, 1], False)
    assert torch.allclose(own, functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False))
    own = kernels.pool(x, "avg", [3, 3], [2, 2], [1, 1, 1, 1], True)
    assert torch.allclose(own, functional.avg_pool2d(x, 3, 2, 1))
    assert torch.equal(kernels.pool(x, "max", [3, 3], [1, 1], [1, 1, 1, 1], True), functional.max_pool2d(x, 3, 1, 1))
    own = kernels.convolve_transposed(x, weight, None, [2, 2], [1, 0, 1, 0], [1, 1], 1)
    assert torch.allclose(own, functional.conv_transpose2d(x, weight, None, 2, 1, 1), atol=1e-5)
    own = kernels.convolve(x, weight.transpose(0, 1), None, [2, 2], [1, 1, 0, 0], [1, 1], 1)
    assert torch.allclose(own, functional.conv2d(x, weight.transpose(0, 1), None, 2, (1, 0)), atol=1e-5)
    assert kernels.same_padding([6], [3], [2], [1], True) == [0, 1]
    assert kernels.same_padding([6], [3], [2], [1], False) == [1, 0]
    assert kernels.same_padding([5], [3], [2], [1], True) == [1, 1]
    assert torch.equal(kernels.sliced(x, [0, 3, 1, -1], [1, 0, 0, 0], [1, -1, 2, 1], [False] * 4, [True] * 4,
                                      [False, False, False, True]), x[:1].flip(1)[:, :, 1::2, -1])  # fmt: skip

"""Graph passes on graphs of their own, and on the real model's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.errors import NotSupported
from exporters.graph.fp16 import to_fp16
from exporters.graph.padding import VECTOR, pad
from exporters.graph.placement import measured, place
from exporters.graph.qdq import insert
from exporters.graph.sensitivity import modules_of
from exporters.graph.siblings import merge
from exporters.graph.simplify import fold_constants, simplify
from exporters.models.catalog import from_checkpoint
from exporters.models.checkpoint import read_checkpoint
from exporters.models.spec import InputSpec, ModelSpec, OutputSpec, belongs, module_path
from exporters.pool import Pool
from exporters.spec import OPSETS, ExportSpec, Precision


def scaled(names: list[str]) -> onnx.ModelProto:
    """x (1, 4) -> x + 1 -> times 1000 -> plus 0.1: nodes of these names, in FP32."""
    constants = [numpy_helper.from_array(np.array([v], np.float32), f"c{i}") for i, v in enumerate((1, 1000, 0.1))]
    values = ["x", "a", "b", "y"]
    nodes = [
        helper.make_node(op, [values[i], f"c{i}"], [values[i + 1]], name=names[i])
        for i, op in enumerate(("Add", "Mul", "Add"))
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "scaled", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_what_is_kept_in_fp32_is_not_rounded_between_its_nodes() -> None:
    """2000.1 is no FP16 number: it comes out only where nothing between the kept nodes goes through FP16."""
    import onnxruntime

    made = to_fp16(scaled(["/body/Add", "/decode/Mul", "/decode/Add"]), ["decode"])
    onnx.checker.check_model(made, full_check=True)
    casts = [n for n in made.graph.node if n.op_type == "Cast"]
    assert len(casts) == 2, "one into FP16 for the body, one back for what is kept"
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = np.array([[1.046875, 0, 1, 2]], np.float32)  # FP16 holds these, and these plus 1
    got = np.asarray(session.run(None, {"x": feeds})[0])
    np.testing.assert_array_equal(got, (feeds + 1) * 1000 + np.float32(0.1))
    assert not np.array_equal(got, got.astype(np.float16))


def test_a_graph_that_is_all_fp16_has_casts_at_its_ends_only() -> None:
    made = to_fp16(scaled(["/a/Add", "/b/Mul", "/c/Add"]), [])
    onnx.checker.check_model(made, full_check=True)
    assert [n.op_type for n in made.graph.node] == ["Cast", "Add", "Mul", "Add", "Cast"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as made:
        yield made


@pytest.fixture(scope="module")
def raw(trained: Path, pool: Pool) -> onnx.ModelProto:
    """The real model's graph as PyTorch's exporter makes it."""
    return onnx.load(pool.export(ExportSpec(from_checkpoint(trained), "onnx", imgsz=(320, 320), simplify=False)).path)


def test_onnxslim_finds_nothing_that_folding_left(raw: onnx.ModelProto) -> None:
    """The short cut of `fold_constants` is one only while OnnxSlim would do no more; here it has as many nodes."""
    folded = fold_constants(onnx.ModelProto.FromString(raw.SerializeToString()))
    onnx.checker.check_model(folded, full_check=True)
    assert len(folded.graph.node) < len(raw.graph.node)
    slim = simplify(onnx.ModelProto.FromString(raw.SerializeToString()), dynamic=False)
    assert len(folded.graph.node) <= len(slim.graph.node)


def test_a_graph_that_computes_a_shape_goes_to_onnxslim(raw: onnx.ModelProto) -> None:
    """A node that only constants feed is not left in the file: OnnxSlim gets the graph."""
    graph = onnx.ModelProto.FromString(raw.SerializeToString())
    first = next(n for n in graph.graph.node if n.op_type == "Conv")
    doubled = numpy_helper.from_array(np.array([2], np.float32), "two")
    graph.graph.initializer.append(doubled)
    graph.graph.node.insert(0, helper.make_node("Mul", ["two", "two"], ["four"], name="/four"))
    graph.graph.node.insert(1, helper.make_node("Mul", [first.input[0], "four"], ["scaled"], name="/scaled"))
    next(n for n in graph.graph.node if n.op_type == "Conv").input[0] = "scaled"
    made = fold_constants(graph)
    assert "/four" not in {n.name for n in made.graph.node}


@pytest.mark.parametrize("opset", range(OPSETS[0], OPSETS[1] + 1))
def test_every_opset_gives_the_same_outputs(trained: Path, pool: Pool, opset: int) -> None:
    """All opsets of the contract export, say so in the file, and compute what PyTorch does."""
    model = from_checkpoint(trained)
    spec = ExportSpec(model, "onnx", imgsz=(64, 96), opset=opset)
    feeds = {"images": np.random.default_rng(0).uniform(0, 1, (1, 3, 64, 96)).astype(np.float32)}
    made = pool.export(spec)
    assert onnx.load(made.path).opset_import[0].version == opset
    reference = ExportSpec(model, "pytorch", imgsz=(64, 96))
    wanted = pool.open(pool.export(reference), reference, "eager", "cpu").run(feeds)["output0"]
    got = pool.open(made, spec, "ort", "cpu").run(feeds)["output0"]
    assert np.abs(got[:, :4] - wanted[:, :4]).max() <= 1e-4 * 96
    assert np.abs(got[:, 4:] - wanted[:, 4:]).max() <= 1e-4


def test_optimize_for_mobile_is_made_or_refused_with_the_reason(trained: Path, pool: Pool) -> None:
    """PyTorch's mobile optimizer needs XNNPACK, which some builds lack: then the refusal names it."""
    import torch
    from torch.backends import xnnpack

    spec = ExportSpec(from_checkpoint(trained), "torchscript", imgsz=(64, 96), optimize=True)
    if xnnpack.enabled:  # pyright: ignore[reportAttributeAccessIssue]
        assert pool.export(spec).achieved.precision == "fp32"
    else:
        with pytest.raises(NotSupported, match=f"{torch.__version__.partition('+')[0]}.*XNNPACK"):
            pool.export(spec)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_monte_carlo_arithmetic_rounds_as_the_precision_does(trained: Path, pool: Pool, precision: Precision) -> None:
    """Its scatter is that of the precision: absent at 23 bits of fraction, and at 10 as large as FP16's own error."""
    model = from_checkpoint(trained)
    spec = ExportSpec(model, "pytorch", imgsz=(64, 64))
    feeds = {"images": np.random.default_rng(0).uniform(0, 1, (1, 3, 64, 64)).astype(np.float32)}
    bits = 23 if precision is Precision.FP32 else 10
    session = pool.open(pool.export(spec), spec, "eager", "cpu")
    plain = np.array(session.run(feeds)["output0"])
    first, again, other = (np.array(session.run_rounded(feeds, bits, seed, 0)["output0"]) for seed in (0, 0, 1))
    after = np.array(session.run(feeds)["output0"])
    np.testing.assert_array_equal(plain, after)
    np.testing.assert_array_equal(first, again)
    scores = np.abs(first - plain)[:, 4:] / np.maximum(np.abs(plain[:, 4:]), 1e-9)
    if bits == 23:
        assert scores.max() < 1e-3
    else:
        assert not np.array_equal(first, other)
        # Below 2^-11 no rounding would have happened; a hundred operators deep it is far below 1.
        assert 2**-11 < np.median(scores) < 0.2


@pytest.mark.parametrize("count", [16, 1])  # of a tensor core, of fused multiply-adds
@pytest.mark.parametrize("kind", ["convolution", "transposed", "product"])
def test_sums_in_fp16_scatter_as_sums_that_are_rounded_on_the_way(kind: str, count: int) -> None:
    """Against the thing itself: terms in random order, rounded to FP16 after each `count`, single ones to nearest."""
    import torch

    from exporters.models.reference import Reference

    torch.manual_seed(0)
    x = torch.rand(1, 128, 4, 4).half().float()
    if kind == "convolution":  # without padding: each of 2 x 2 places has all 1152 terms
        layer, columns = torch.nn.Conv2d(128, 24, 3), torch.nn.functional.unfold(x, 3)[0].T
    elif kind == "transposed":  # whose stride is its size: each place has 128 terms
        layer, columns = torch.nn.ConvTranspose2d(128, 24, 2, 2), x[0].flatten(1).T
    else:
        layer, x = torch.nn.Linear(640, 24), torch.rand(8, 640).half().float()
        columns = x
    weight = layer.weight.detach().half().float()
    layer.weight.data.copy_(weight)
    torch.nn.init.zeros_(cast(torch.Tensor, layer.bias))  # it is added behind the sum
    rows = weight.flatten(2).permute(1, 2, 0).reshape(-1, 128) if kind == "transposed" else weight.flatten(1)
    terms = (columns[:, None, :] * rows[None]).double()  # places x channels x terms
    exact, draws = terms.sum(2), 60
    generator, squares = torch.Generator().manual_seed(1), 0.0
    for _ in range(draws):
        order = torch.randperm(terms.shape[2], generator=generator)
        total = torch.zeros_like(exact)
        for block in order.split(count):
            total += terms[:, :, block].sum(2)
            unit = 2.0 ** (total.abs().clamp_min(2.0**-14).log2().floor() - 10)
            half = torch.full_like(total, 0.5)
            up = half if count == 1 else torch.rand(total.shape, generator=generator, dtype=total.dtype)
            total = (total / unit + up).floor() * unit
        squares += float(((total - exact) ** 2).mean())

    name = "images"
    spec = ModelSpec("sums", "none:none", inputs=(InputSpec(name, tuple(x.shape)),), outputs=(OutputSpec("y"),))
    reference = Reference(layer, ExportSpec(spec, "pytorch"), "cpu")
    plain = reference.run({name: x.numpy()})["y"].astype(np.float64)
    drawn = [reference.run_rounded({name: x.numpy()}, 10, seed, count)["y"].astype(np.float64) for seed in range(draws)]
    once = [reference.run_rounded({name: x.numpy()}, 10, seed, 0)["y"].astype(np.float64) for seed in range(draws)]
    ours, results = (np.mean([(d - plain) ** 2 for d in of]) for of in (drawn, once))
    assert ours == pytest.approx(squares / draws, rel=0.2)  # of the variance
    assert ours > 2 * results  # rounding results alone tells far less


# ---- channels filled up to the vectors of 8-bit kernels -------------------------------------------------------------

# name -> (operators behind x as ONNX text, what of it is filled up). Wk_c_d are weights of d -> c channels.
BLOCKS = {
    "halves": (
        """y = Conv(x, W1_32_8, B_32)  b = Slice(y, "16", "32", "1")  m = Conv(b, W2_16_16)  s = Sigmoid(m)
        n = Mul(m, s)  c = Conv(n, W3_16_16)  r = Add(b, c)  j = Concat(y, r)  z = Conv(j, W4_8_48)""",
        {"W1_32_8": (64, 8), "B_32": (64,), "W2_16_16": (32, 32), "W3_16_16": (32, 32), "W4_8_48": (8, 96)},
    ),
    "split": (
        """y = Conv(x, W1_40_8)  a, b = Split(y, "24,16")  c = Conv(b, W2_48_16)  j = Concat(a, c, b)
        z = Conv(j, W3_8_88)""",
        {"W1_40_8": (64, 8), "W2_48_16": (64, 32), "W3_8_88": (8, 128)},
    ),
    "aligned": (
        """y = Conv(x, W1_64_8)  b = Slice(y, "32", "64", "1")  c = Conv(b, W2_32_32)  j = Concat(y, c)
        z = Conv(j, W3_8_96)""",
        {},
    ),
    "a chain": ("""y = Conv(x, W1_16_8)  b = Relu(y)  z = Conv(b, W2_8_16)""", {}),
    "an operator that is not known": (
        """y = Conv(x, W1_32_8)  b = Slice(y, "16", "32", "1")  c = Conv(b, W2_16_16)  d = Softmax(c)  j = Concat(y, d)
        z = Conv(j, W3_8_48)""",
        {},
    ),
    "a shared bias": (
        """y = Conv(x, W1_16_8, B_16)  b = Conv(x, W2_16_8, B_16)  j = Concat(y, b)  z = Conv(j, W3_8_32)""",
        {},
    ),
    "an axis from behind": (
        """y = Conv(x, W1_32_8)  b = Slice(y, "16", "32", "-3")  j = Concat(b, y)  z = Conv(j, W3_8_48)""",
        {},
    ),
    "every second channel": (
        """y = Conv(x, W1_32_8)  b = Slice(y, "0", "32", "1", "2")  j = Concat(b, y)  z = Conv(j, W3_8_48)""",
        {},
    ),
    "an output": ("""y = Conv(x, W1_20_8)  b = Conv(x, W2_20_8)  z = Concat(y, b)""", {}),
    "shared weights": (
        """y = Conv(x, W1_16_8)  b = Conv(x, W1_16_8)  c = Conv(x, W2_16_8)  j = Concat(y, b, c)
        z = Conv(j, W3_8_48)""",
        {},
    ),
}


def block(text: str) -> onnx.ModelProto:
    """A graph of x (1, 8, 6, 6) -> z from "name = Operator(tensors and numbers)" entries."""
    random = np.random.default_rng(0)
    stored: dict[str, np.ndarray[Any, Any]] = {}
    nodes: list[onnx.NodeProto] = []
    for outputs, operator, inside in re.findall(r"([a-z, ]+?) = (\w+)\(([^)]*)\)", text):
        names: list[str] = []
        for word in re.findall(r'[-\w,]+(?=")|\w+(?!")\b', inside):
            if word[0] in "WB":
                stored[word] = random.normal(size=[*map(int, word.split("_")[1:]), *([3, 3] if word[0] == "W" else [])])
                stored[word] = stored[word].astype(np.float32)
            elif word[0] in "-0123456789":
                stored[f"n{word}"] = np.array([int(v) for v in word.split(",")])
            names.append(f"n{word}" if word[0] in "-0123456789" else word)
        options: dict[str, Any] = {"Concat": {"axis": 1}, "Split": {"axis": 1}, "Softmax": {"axis": 1}}.get(
            operator, {}
        )
        options |= {"pads": [1, 1, 1, 1]} if operator == "Conv" else {}
        nodes.append(helper.make_node(operator, names, [o.strip() for o in outputs.split(",")], **options))
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 6])]
    out = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, "channels", 6, 6])]
    constants = [numpy_helper.from_array(v, k) for k, v in stored.items()]
    graph = helper.make_graph(nodes, "block", ends, out, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_sizes_of_a_resize_are_not_quantized() -> None:
    """They are numbers behind the values, and reach the next convolution through a Concat, too."""
    text = """y = Conv(x, W1_16_8)  s = Shape(y)  t = Slice(s, "0", "2")  u = Slice(s, "2", "4")  v = Concat(t, u)
        r = Resize(y, , , v)  z = Conv(r, W2_8_16)"""
    model = block(text)
    next(n for n in model.graph.node if n.output[0] == "v").attribute[0].i = 0
    for number, node in enumerate(model.graph.node):
        node.name = f"/{node.op_type}_{number}"
    resize = next(n for n in model.graph.node if n.op_type == "Resize")
    resize.input[:] = ["y", "", "", "v"]
    assert set(place(model.graph, []).measured) == {"x", "y", "r"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # An addition right behind a convolution is part of its kernel: the convolution's own output stays as it is.
        (
            "a = Conv(x, W1_16_8)  y = Relu(a)  b = Conv(y, W2_16_16)  s = Add(b, y)  r = Relu(s)  "
            "z = Conv(r, W3_8_16)",
            {"x": ["Conv"], "y": ["Conv", "Add"], "r": ["Conv"]},
        ),
        (
            "a = Conv(x, W1_16_8)  b = Conv(x, W2_16_8)  s = Add(a, b)  z = Conv(s, W3_8_16)",
            {"x": ["Conv", "Conv"], "b": ["Add"], "s": ["Conv"]},
        ),
        # With an activation between it is a kernel of its own, which reads both in 8 bits.
        (
            "a = Conv(x, W1_16_8)  b = Conv(a, W2_16_16)  g = Sigmoid(b)  m = Mul(b, g)  s = Add(a, m)  "
            "z = Conv(s, W3_8_16)",
            {"x": ["Conv"], "a": ["Conv", "Add"], "b": ["Sigmoid", "Mul"], "s": ["Conv"]},
        ),
    ],
    ids=["behind a convolution", "of two convolutions", "behind an activation"],
)
def test_residual_additions_read_8_bits_where_that_saves_a_kernel(text: str, wanted: dict[str, list[str]]) -> None:
    model = block(text)
    for number, node in enumerate(model.graph.node):
        node.name = f"/{node.op_type}_{number}"
    placement = place(model.graph, [])
    assert {k: [n[1:].partition("_")[0] for n in v] for k, v in placement.points.items()} == wanted
    insert(model, placement, dict.fromkeys(placement.measured, 8.0), Precision.INT8)
    onnx.checker.check_model(model, full_check=True)


SHORT = """s = Conv(x, W1_16_8)  r = Relu(s)  c = Conv(r, W2_16_16)  d = Conv(r, W3_16_16)  e = Conv(c, W4_16_16)
    a = Add(c, d)  b = Add(a, e)  z = Conv(b, W5_8_16)"""
SILU = """a = Conv(x, W1_16_8)  b = Conv(a, W2_16_16)  g = Sigmoid(b)  m = Mul(b, g)  s = Add(a, m)
    c = Conv(m, W3_16_16)  t = Add(s, c)  z = Conv(t, W4_8_16)"""


@pytest.mark.parametrize(
    "text", [SHORT, SILU], ids=["a shortcut that is read twice", "an activation that is read twice"]
)
def test_whatever_is_kept_its_ranges_are_measured(text: str) -> None:
    model = block(text)
    for number, node in enumerate(model.graph.node):
        node.name = f"/m{number}/{node.op_type}"
    known = set(measured(model.graph, []))
    paths = [f"m{n}" for n in range(len(model.graph.node))]
    for kept in [[p] for p in paths] + [[p, q] for p in paths for q in paths]:
        placement = place(model.graph, kept)
        assert set(placement.measured) <= known, kept
        readers = {name for names in placement.points.values() for name in names}
        assert not any(name.startswith(f"/{p}/") for name in readers for p in kept), "what is kept reads 8 bits"


def computed(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(feeds))[0])


@pytest.mark.parametrize("name", BLOCKS)
def test_filled_channels_change_no_value(name: str) -> None:
    """What is cut or joined inside a vector is filled up, nothing else, and the outputs are the same to rounding."""
    text, wanted = BLOCKS[name]
    model = block(text)
    before = {i.name: tuple(i.dims) for i in model.graph.initializer}
    made = pad(model)
    onnx.checker.check_model(made, full_check=True)
    shapes = {i.name: tuple(i.dims) for i in made.graph.initializer}
    changed = {k: shapes[k][:2] for k in before if shapes[k] != before[k]}
    assert changed == {k: v for k, v in wanted.items() if v != before[k][:2]}
    assert (made is model) == (not wanted), "a graph that needs nothing stays the same one"
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 8, 6, 6)).astype(np.float32)}
    want, got = computed(model, feeds), computed(made, feeds)
    # Sums of at most 9 * 128 FP32 products whose order may differ.
    assert np.abs(got - want).max() <= 9 * 128 * 2**-24 * np.abs(want).max()


def test_the_real_graph_is_filled_up_and_computes_the_same(raw: onnx.ModelProto) -> None:
    """Of YOLOv8n one block is narrower than a vector: its three convolutions and who reads them."""
    model = fold_constants(onnx.ModelProto.FromString(raw.SerializeToString()))
    placement = place(model.graph, ["model.22.dfl", "model.22.decode"])
    insert(model, placement, dict.fromkeys(placement.measured, 8.0), Precision.INT8)
    before = {i.name: tuple(i.dims) for i in model.graph.initializer}
    made = pad(model)
    shapes = {i.name: tuple(i.dims) for i in made.graph.initializer}
    changed = {k for k in before if shapes.get(k, before[k]) != before[k] and k.endswith("/q")}
    block = ("cv1", "m.0.cv1", "m.0.cv2", "cv2")
    assert changed == {f"model.2.{part}.conv.weight/q" for part in block}
    assert all(size % VECTOR == 0 for part in block[:3] for size in shapes[f"model.2.{part}.conv.weight/q"][:2])
    feeds = {"images": np.random.default_rng(0).uniform(0, 1, (1, 3, 320, 320)).astype(np.float32)}
    np.testing.assert_allclose(computed(made, feeds), computed(model, feeds), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/model.22/cv2.0/cv2.0.0/conv/Conv", "model.22.cv2.0.0.conv.Conv"),
        ("/model/model.0/conv/Conv", "model.0.conv.Conv"),
        ("/model.2/m.0/cv1/conv/Conv", "model.2.m.0.cv1.conv.Conv"),
        ("model.22.dfl", "model.22.dfl"),
    ],
)
def test_a_node_belongs_to_the_module_that_pytorch_names(name: str, path: str) -> None:
    assert module_path(name) == path
    assert belongs(name, [path.rpartition(".")[0]])


def test_every_quantized_operator_of_the_real_graph_has_a_module_of_its_own(
    raw: onnx.ModelProto, trained: Path
) -> None:
    """What `--keep` and the search name are modules of the checkpoint."""
    model = fold_constants(onnx.ModelProto.FromString(raw.SerializeToString()))
    placement = place(model.graph, ["model.22.dfl", "model.22.decode"])
    modules = modules_of(model.graph, placement.heavy)
    assert len(modules) == len(placement.heavy)
    stored = read_checkpoint(trained).state
    assert [m for m in modules if f"{m}.weight" not in stored] == []


# ---- convolutions of one tensor merged into one ---------------------------------------------------------------------

HEAD = """y = Conv(x, W1_32_8)  a = Conv(y, W2_64_32, B_64)  e = Sigmoid(a)  m = Mul(a, e)
    b = Conv(y, W3_32_32, B_32)  f = Sigmoid(b)  n = Mul(b, f)  c = Conv(m, W4_8_64)  d = Conv(n, W5_8_32)
    z = Add(c, d)"""


def quantized(text: str, precision: Precision, kept: Sequence[str] = ()) -> onnx.ModelProto:
    """A block with Q/DQ, every tensor with a range of its own."""
    model = block(text)
    for number, node in enumerate(model.graph.node):
        node.name = f"/{node.op_type}_{number}"
    placement = place(model.graph, kept)
    ranges = {name: 4.0 + number for number, name in enumerate(placement.measured)}
    insert(model, placement, ranges, precision)
    return model


def convolutions(model: onnx.ModelProto) -> list[str]:
    return [n.name for n in model.graph.node if n.op_type == "Conv"]


def test_the_first_convolutions_of_a_head_become_one() -> None:
    """They share the scale behind their SiLU, so that every value stays what it was."""
    import onnxruntime

    model = quantized(HEAD, Precision.INT8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 8, 6, 6)).astype(np.float32)}
    sessions = [onnxruntime.InferenceSession(model.SerializeToString(), options)]
    merge(model)
    onnx.checker.check_model(model, full_check=True)
    assert convolutions(model) == ["/Conv_0", "/Conv_1 || /Conv_4", "/Conv_7", "/Conv_8"]
    sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
    before, after = (np.asarray(s.run(None, feeds)[0]) for s in sessions)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (HEAD, ["Conv_4"]),
        (HEAD, ["Conv_8"]),
        (HEAD.replace("B_64", "").replace(", )", ")"), []),
        (HEAD.replace("W3_32_32, B_32", "W3_48_32, B_48").replace("W5_8_32", "W5_8_48"), []),
        (HEAD.replace("W2_64_32, B_64", "W3_32_32, B_32").replace("W4_8_64", "W4_8_32"), []),
        (HEAD.replace("z = Add(c, d)", "k = Add(c, d)  z = Concat(k, n)"), []),
        (HEAD.replace("f = Sigmoid(b)", "f = Relu(b)"), []),
    ],
    ids=["one kept", "a reader kept", "one with a bias", "half a vector", "shared weights", "an output", "no SiLU"],
)
def test_what_cannot_be_merged_stays(text: str, kept: list[str]) -> None:
    model = quantized(text, Precision.INT8, kept)
    before = convolutions(model)
    merge(model)
    assert convolutions(model) == before
    onnx.checker.check_model(model, full_check=True)


def test_convolutions_with_one_scale_for_all_their_weights_are_not_merged() -> None:
    """FP8 has one scale a tensor: side by side in one tensor, the weights would need another one."""
    model = quantized(HEAD, Precision.FP8)
    before = convolutions(model)
    merge(model)
    assert convolutions(model) == before
    onnx.checker.check_model(model, full_check=True)


def test_convolutions_in_groups_are_not_merged() -> None:
    """Each group reads channels of its own: side by side in one convolution they would read others'."""
    model = quantized(HEAD.replace("W2_64_32", "W2_64_16").replace("W3_32_32", "W3_32_16"), Precision.INT8)
    for node in model.graph.node:
        if node.name in ("/Conv_1", "/Conv_4"):
            node.attribute.append(helper.make_attribute("group", 2))
    onnx.checker.check_model(model, full_check=True)
    before = convolutions(model)
    merge(model)
    assert convolutions(model) == before


def test_what_is_quantized_with_two_scales_is_not_merged() -> None:
    """As in a file that our placement did not make."""
    model = quantized(HEAD, Precision.INT8)
    scale = next(i for i in model.graph.initializer if i.name == "n/scale")
    scale.CopyFrom(numpy_helper.from_array(np.array(0.5, np.float32), "n/scale"))
    before = convolutions(model)
    merge(model)
    assert convolutions(model) == before


def test_what_a_branch_of_the_graph_may_read_is_not_merged() -> None:
    """The body of an If reads tensors of the graph around it without naming them as inputs."""
    model = quantized(HEAD, Precision.INT8)
    ends = [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)]
    body = helper.make_graph([helper.make_node("Identity", ["a"], ["inside"])], "body", [], ends)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["chosen"], then_branch=body, else_branch=body))
    before = convolutions(model)
    merge(model)
    assert convolutions(model) == before
    onnx.checker.check_model(model, full_check=True)

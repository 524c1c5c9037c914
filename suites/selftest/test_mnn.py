"""MNN: weights in 16 bits are rounded, in 8 bits by blocks; its file's reader; what its package would do on its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters import toolchain
from exporters.artifact import Artifact
from exporters.errors import ArtifactError, BadRequest, ExportError, NotSupported, ToolchainMissing
from exporters.models.spec import InputSpec, ModelSpec, OutputSpec
from exporters.pool import Pool
from exporters.runtimes import mnn_file
from exporters.runtimes.rounding import rounding
from exporters.spec import request

pytestmark = pytest.mark.formats
ROOT = Path(__file__).resolve().parents[2]

MODULES = """
import torch
from torch import nn


class Far(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("far", torch.linspace(1.0, 1e5, 32))

    def forward(self, images):
        return images * self.far


class Endless(nn.Module):
    def forward(self, images):
        return torch.isinf(images).float()


class Counted(nn.Module):
    def forward(self, images, count):
        return images * count


def far():
    return Far()


def endless():
    return Endless()


def counted():
    return Counted()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    folder = tmp_path_factory.mktemp("mnn")
    (folder / "mnn_models.py").write_text(MODULES, encoding="utf-8")

    def model(name: str, inputs: tuple[InputSpec, ...] = ModelSpec.inputs) -> ModelSpec:
        outputs = (OutputSpec("output0", ((0, "batch"),)),)
        return ModelSpec(
            name, f"mnn_models:{name}", search=(folder,), inputs=inputs, outputs=outputs, stride=32, imgsz=(32, 32)
        )

    count = InputSpec("count", ("batch", 1, 1, 1), "int64")
    return {"counted": model("counted", (*ModelSpec.inputs, count)), "far": model("far"), "endless": model("endless")}


@pytest.fixture(scope="module")
def detect() -> ModelSpec:
    from exporters.models.catalog import from_checkpoint

    return replace(from_checkpoint(ROOT / "suites/reference/detect.safetensors"), evaluate="")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    try:
        toolchain.resolve("mnn")
        toolchain.resolve("onnx")
    except ToolchainMissing as error:
        pytest.skip(str(error))
    made = Pool()
    yield made
    made.close()


@pytest.fixture(scope="module")
def made(pool: Pool, detect: ModelSpec) -> dict[str, Artifact]:
    """The reference detector by precision, and with shapes that vary."""
    wanted = {p: request(detect, "mnn", precision=p) for p in ("fp32", "fp16", "int8")}
    return {k: pool.export(s) for k, s in (wanted | {"dynamic": request(detect, "mnn", dynamic=True)}).items()}


def convolutions(artifact: Artifact) -> dict[str, mnn_file.Table]:
    ops = mnn_file.read(artifact.path).ops
    tables = {op.name: op.parameters_of(mnn_file.CONVOLUTION) for op in ops}
    return {name: table for name, table in tables.items() if table is not None}


def test_weights_of_16_bits_are_the_nearest_and_not_cut_off(made: dict[str, Artifact]) -> None:
    """MNN's own converter cuts off: half of the weights are then one step of FP16 nearer to zero."""
    whole, halves = convolutions(made["fp32"]), convolutions(made["fp16"])
    assert len(whole) > 60
    assert set(whole) == set(halves)
    cut = 0
    for name, table in halves.items():
        packed, values = table.table(3), whole[name].array(1, "<f4")
        assert packed is not None, name
        found = packed.array(0, "i1").view("<f2")
        assert np.array_equal(found, values.astype(np.float16)), name
        cut += int((np.abs(found.astype(np.float32)) > np.abs(values)).sum())
    assert cut > 100_000, "weights that were rounded away from zero"


def test_weights_of_8_bits_have_a_scale_and_a_zero_point_for_each_block(made: dict[str, Artifact]) -> None:
    """The word --weightQuantAsymmetric switches off what it is called for."""
    blocks = 0
    for name, table in convolutions(made["int8"]).items():
        common, packed = table.table(0), table.table(3)
        assert common is not None, name
        assert packed is not None, name
        inputs, outputs = common.number(11, "i"), common.number(10, "i")
        scales = packed.vector(1)[1]
        assert scales % (2 * outputs) == 0, f"{name}: {scales} numbers for {outputs} channels"
        # A block is of 16 input channels, all of the kernel's points included.
        each = scales // (2 * outputs)
        assert each in (1, inputs // 16), name
        blocks += each > 1
    assert blocks > 40


def test_a_batch_that_varies_says_so_in_the_file(made: dict[str, Artifact]) -> None:
    """MNN's own converter writes 1 for it."""
    assert mnn_file.read(made["dynamic"].path).inputs == {"images": ((-1, 3, -1, -1), "float32")}
    assert mnn_file.read(made["fp32"].path).inputs == {"images": ((1, 3, 256, 256), "float32")}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_arithmetic_is_measured_to_be_fp32(
    made: dict[str, Artifact], pool: Pool, precision: str, detect: ModelSpec
) -> None:
    spec = request(detect, "mnn", precision=precision)
    session = pool.open(made[precision], spec, "mnn", "cpu")
    try:
        execution = session.describe().execution
    finally:
        session.close()
    assert execution.precision == "fp32", execution.notes
    assert execution.threads >= 1
    assert "FP32's bound" in execution.notes[0]


def test_arithmetic_of_fewer_bits_is_seen_in_what_an_operator_gives() -> None:
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(1, 16, 40, 40)).astype(np.float32), generator.normal(size=(8, 16))

    def error(rounded: np.ndarray) -> tuple[float, float]:
        found = rounding(x, np.einsum("oi,nihw->nohw", w, rounded.astype(np.float64)).astype(np.float32))
        assert found is not None
        return found

    step = np.abs(x).max() / 127
    bits = ((x.view(np.uint32) + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)
    assert error(x)[0] <= error(x)[1]
    for fewer in (x.astype(np.float16), bits, np.round(x / step) * step):
        observed, bound = error(fewer)
        assert observed > 20 * bound
    assert rounding(x[..., :4, :4], x[..., :4, :4]) is None, "16 points tell nothing of 17 unknowns"


def test_a_constant_that_fp16_cannot_hold_is_refused(pool: Pool, models: dict[str, ModelSpec]) -> None:
    pool.export(request(models["far"], "mnn"))
    with pytest.raises(NotSupported, match=r"FP16 ends at 65504, and .* holds 100000"):
        pool.export(request(models["far"], "mnn", half=True))


def test_an_operator_that_mnn_lacks_is_told_in_its_words(pool: Pool, models: dict[str, ModelSpec]) -> None:
    with pytest.raises(ExportError, match="Not Support: ONNX::IsInf") as caught:
        pool.export(request(models["endless"], "mnn"))
    assert "\n" not in str(caught.value)


def test_inputs_of_64_bits_are_refused(models: dict[str, ModelSpec]) -> None:
    with pytest.raises(NotSupported, match="no 64-bit tensors, and input 'count'"):
        request(models["counted"], "mnn")


def test_8_bits_need_no_calibration_set_and_take_none(detect: ModelSpec) -> None:
    assert request(detect, "mnn", int8=True).data == ""
    with pytest.raises(BadRequest, match="does not take option 'data'"):
        request(detect, "mnn", int8=True, data="suites.reference.scenes:training")


def test_the_package_that_installs_another_and_reports_is_never_imported(pool: Pool) -> None:
    """MNN.tools runs `pip install` when it is imported, and reports each conversion to MNN's makers."""
    code = "import exporters.runtimes.mnn\nimport MNN.tools.mnnconvert"
    python = toolchain.resolve("mnn").python
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "No module named 'MNN.tools" in done.stderr
    assert "pip" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(made: dict[str, Artifact]) -> bytes:
    return made["int8"].path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut off, or with four bytes of the structure changed: never another exception, never without an end."""
    path = tmp_path_factory.getbasetemp() / "damaged.mnn"
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for position in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 4)), max_size=4)):
        damaged[position : position + 4] = data.draw(st.binary(min_size=4, max_size=4))
    path.write_bytes(damaged)
    try:
        mnn_file.read(path)
    except ArtifactError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)

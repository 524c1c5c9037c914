"""Paddle: the reader of its files, what X2Paddle cannot convert or leaves out, and injuries that only it can have."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters import toolchain
from exporters.artifact import Artifact, foreign
from exporters.errors import ArtifactError, ExportError, FeedError, NotSupported, ToolchainMissing
from exporters.metadata import SIDE_CAR
from exporters.models.spec import InputSpec, ModelSpec, OutputSpec
from exporters.pool import Pool
from exporters.runtimes import paddle_program, x2paddle_run
from exporters.spec import ExportSpec, request
from suites.conformance import test_export as export
from suites.conformance import test_metadata as metadata
from suites.conformance import test_outputs as outputs
from suites.conformance import test_precision as precision
from suites.conformance import test_shapes as shapes
from suites.selftest.conftest import Claim
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

pytestmark = pytest.mark.formats
ROOT = Path(__file__).resolve().parents[2]
PROGRAM, PARAMETERS = "model.json", "model.pdiparams"
CELL = "classify paddle fp32"

MODULES = """
import torch
from torch import nn


class Mish(nn.Module):
    def forward(self, images):
        return nn.functional.mish(images)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 2, 2, groups=3)

    def forward(self, images):
        return self.up(images)


class Averaged(nn.Module):
    def forward(self, images):
        return nn.functional.avg_pool2d(images, 8)


class Many(nn.Module):
    def forward(self, images, *others):
        total = images.sum((1, 2, 3))
        for number, other in enumerate(others):
            total = total + other.flatten(1).sum(1) * 2.0 ** number
        return total


class Idle(nn.Module):
    def forward(self, images, a0):
        return images * 2


def mish():
    return Mish()


def grouped():
    return Grouped()


def averaged():
    return Averaged()


def many():
    return Many()


def idle():
    return Idle()
"""


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    try:
        toolchain.resolve("paddle")
    except ToolchainMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    folder = tmp_path_factory.mktemp("paddle")
    (folder / "paddle_models.py").write_text(MODULES, encoding="utf-8")

    def model(name: str, others: int = 0) -> ModelSpec:
        inputs = (*ModelSpec.inputs, *(InputSpec(f"a{n}", ("batch", 2)) for n in range(others)))
        made = (OutputSpec("output0", ((0, "batch"),)),)
        return ModelSpec(
            name, f"paddle_models:{name}", search=(folder,), inputs=inputs, outputs=made, stride=32, imgsz=(32, 32)
        )

    others = {"mish": 0, "grouped": 0, "averaged": 0, "many": 12, "idle": 1}
    return {name: model(name, number) for name, number in others.items()}


@pytest.fixture(scope="module")
def classify() -> ModelSpec:
    from exporters.models.catalog import from_checkpoint

    return replace(from_checkpoint(ROOT / "suites/reference/classify.safetensors"), evaluate="")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


@pytest.fixture(scope="module")
def made(pool: Pool, classify: ModelSpec) -> Artifact:
    return pool.export(request(classify, "paddle"))


@pytest.fixture
def copy(made: Artifact, tmp_path: Path) -> Path:
    """A copy of the model's folder, to be damaged."""
    return Path(shutil.copytree(made.path, tmp_path / made.path.name))


def ops(program: Any) -> list[Any]:
    return program["program"]["regions"][0]["blocks"][0]["ops"]


def change(folder: Path, act: Callable[[Any], None]) -> None:
    """Rewrites a folder's program."""
    whole = json.loads((folder / PROGRAM).read_text(encoding="utf-8"))
    act(whole)
    (folder / PROGRAM).write_text(json.dumps(whole), encoding="utf-8")


def parts(folder: Path) -> dict[str, tuple[int, int]]:
    """Where each parameter's values lie, by name."""
    program = paddle_program.read(folder)
    found = paddle_program.spans(folder / PARAMETERS, program.parameters)
    return {name: (start, stop) for name, start, stop in found}


# ---- what is made ---------------------------------------------------------------------------------------------------


def test_the_folder_holds_three_files_and_nothing_that_the_converter_wrote_on_its_way(made: Artifact) -> None:
    assert sorted(f.name for f in made.path.rglob("*")) == sorted([SIDE_CAR, PROGRAM, PARAMETERS])
    assert not [f for f in made.root.iterdir() if f.is_dir() and f != made.path]


def test_inputs_and_outputs_have_the_models_names_in_the_file(made: Artifact) -> None:
    program = paddle_program.read(made.path)
    assert program.inputs == {"images": paddle_program.Tensor("float32", (1, 3, 256, 256))}
    assert program.outputs == {"output0": paddle_program.Tensor("float32", (1, 6))}


def test_precision_is_read_back_of_every_operator(made: Artifact) -> None:
    found = paddle_program.read_precision(made.path)
    assert (found.precision, dict(found.counts), found.exceptions) == ("fp32", {"operators fp32": 27}, ())


def test_the_arithmetic_is_measured_to_be_fp32(made: Artifact, pool: Pool, classify: ModelSpec) -> None:
    session = pool.open(made, request(classify, "paddle"), "paddle", "cpu")
    try:
        execution = session.describe().execution
    finally:
        session.close()
    assert (execution.precision, dict(execution.operators)) == ("fp32", {"fp32": 27})
    assert execution.threads >= 1
    assert "FP32's bound" in execution.notes[1]


def test_another_size_is_refused_with_what_was_expected(made: Artifact, pool: Pool, classify: ModelSpec) -> None:
    session = pool.open(made, request(classify, "paddle"), "paddle", "cpu")
    try:
        with pytest.raises(FeedError, match=r"shape \[1, 3, 288, 256\]: expected \[1, 3, 256, 256\]"):
            session.run({"images": np.zeros((1, 3, 288, 256), np.float32)})
    finally:
        session.close()


def test_shapes_that_vary_are_refused(classify: ModelSpec) -> None:
    with pytest.raises(NotSupported, match="dynamic: X2Paddle writes the sizes"):
        request(classify, "paddle", dynamic=True)


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_other_precisions_are_refused_with_because(classify: ModelSpec, name: str) -> None:
    with pytest.raises(NotSupported, match=f"no precision {name}: .*(X2Paddle|PaddleSlim)"):
        request(classify, "paddle", precision=name)


def test_inputs_keep_their_places_where_there_are_more_than_ten(pool: Pool, models: dict[str, ModelSpec]) -> None:
    """X2Paddle sorts x0, x1, x10, x2 ... as text."""
    spec = request(models["many"], "paddle")
    artifact = pool.export(spec)
    session = pool.open(artifact, spec, "paddle", "cpu")
    try:
        assert [i.name for i in session.inputs] == ["images", *(f"a{n}" for n in range(12))]
        for number in range(12):
            feeds = {i.name: np.zeros([int(n) for n in i.shape], np.float32) for i in session.inputs}
            feeds[f"a{number}"][:] = 0.5
            assert session.run(feeds)["output0"].tolist() == [2.0**number]
    finally:
        session.close()


def test_an_input_that_nothing_is_computed_from_is_told(pool: Pool, models: dict[str, ModelSpec]) -> None:
    """X2Paddle leaves it out without a word."""
    with pytest.raises(ExportError, match="leaves out input a0 of model 'idle'"):
        pool.export(request(models["idle"], "paddle"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mish", r"it has no aten::mish"),
        ("grouped", r"\(InvalidArgument\) .*input channels"),
        ("averaged", r"The pool_stride's length must be 2\. Received: \[\]"),
    ],
)
def test_what_cannot_be_converted_is_told_in_its_words(
    pool: Pool, models: dict[str, ModelSpec], name: str, words: str
) -> None:
    """Of an operator that it lacks X2Paddle raises after printing it; what Paddle refuses it prints, and exits with
    code 0."""
    with pytest.raises(ExportError, match=words) as caught:
        pool.export(request(models[name], "paddle"))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_nothing_is_sent_or_downloaded(pool: Pool, classify: ModelSpec, tmp_path: Path) -> None:
    """X2Paddle reports each conversion to its makers unless told not to: in a process whose sockets fail and tell."""
    parent = pool.export(ExportSpec(classify, "torchscript", imgsz=classify.imgsz))
    words = [x2paddle_run.__file__, str(parent.path), str(tmp_path / "made"), '[[[1, 3, 256, 256], "float32"]]']
    code = f"""
import runpy, sys, threading
asked = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        asked.append(event)
        raise OSError("no network")
sys.addaudithook(hook)
sys.argv = {words!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(5)
    print("code", error.code, "asked", asked)
"""
    python = toolchain.resolve("paddle").python
    done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert "code 0 asked []" in done.stdout, done.stderr[-2000:]
    assert (tmp_path / "made/inference_model/model.json").is_file()


# ---- injuries -------------------------------------------------------------------------------------------------------


def _a_parameter_changed(path: Path, workshop: Workshop) -> None:
    """One weight of the first convolution."""
    start, stop = parts(path)["conv2d_0.w_0"]
    data = bytearray((path / PARAMETERS).read_bytes())
    values = np.frombuffer(data, "<f4", (stop - start) // 4, start)
    struct.pack_into("<f", data, start, float(values[0]) + float(np.abs(values).max()))
    (path / PARAMETERS).write_bytes(data)


def _two_parameters_swapped(path: Path, workshop: Workshop) -> None:
    """Of one shape, so that the file's structure is whole."""
    where, program = parts(path), paddle_program.read(path)
    shapes = [(tensor.shape, name) for name, tensor in program.parameters.items() if len(tensor.shape) == 4]
    first, second = next((a, b) for s, a in shapes for r, b in shapes if s == r and a < b)
    data = bytearray((path / PARAMETERS).read_bytes())
    (a, b), (c, d) = where[first], where[second]
    data[a:b], data[c:d] = data[c:d], data[a:b]
    (path / PARAMETERS).write_bytes(data)


def _names_lost(path: Path, workshop: Workshop) -> None:
    values = yaml.safe_load((path / SIDE_CAR).read_text(encoding="utf-8"))
    del values["names"]
    (path / SIDE_CAR).write_text(yaml.safe_dump(values), encoding="utf-8")


def _input_renamed(path: Path, workshop: Workshop) -> None:
    paddle_program.rename(path / PROGRAM, {"images": "x0"}, {"output0": "output0"})


def _weights_in_16_bits(path: Path, workshop: Workshop) -> None:
    """The last matrix product's, with a conversion before it, as an exporter of mixed precision would."""
    where, program = parts(path), paddle_program.read(path)
    name = next(n for n, tensor in program.parameters.items() if tensor.shape == (6, 1280))
    start, stop = where[name]
    data = (path / PARAMETERS).read_bytes()
    half = np.frombuffer(data[start:stop], "<f4").astype("<f2").tobytes()
    head = data.rindex(b"\x08\x05", 0, start)  # its type: FP32 is 5, FP16 is 4
    (path / PARAMETERS).write_bytes(data[:head] + b"\x08\x04" + data[head + 2 : start] + half + data[stop:])

    def narrow(whole: Any) -> None:
        listed = ops(whole)
        number = next(n for n, op in enumerate(listed) if op["#"] == "p" and op["A"][3] == name)
        value, cast = listed[number]["O"]["%"], 1_000_000
        kind = listed[number]["O"]["TT"]
        wide = json.loads(json.dumps(kind))
        kind["D"][0]["#"] = "0.t_f16"
        for op in listed:
            for taken in op.get("I", ()):
                taken["%"] = cast if taken["%"] == value else taken["%"]
        made = {"%": cast, "TT": wide}
        dtype = {"AT": {"#": "1.a_dtype", "D": "float32"}, "N": "dtype"}
        first = next(n for n, op in enumerate(listed) if op["#"] == "1.data")
        listed.insert(first, {"#": "1.cast", "A": [dtype], "I": [{"%": value}], "O": [made], "OA": []})

    change(path, narrow)


@pytest.mark.parametrize(
    ("damage", "claim", "words"),
    [
        (_a_parameter_changed, outputs.test_outputs_match_reference, "output0"),
        (_two_parameters_swapped, outputs.test_outputs_match_reference, "output0"),
        (_names_lost, metadata.test_class_names_survive_the_round_trip, "class names differ"),
        (_input_renamed, shapes.test_input_signature_is_the_requested, r"inputs are \['x0'\]"),
        (_weights_in_16_bits, precision.test_achieved_precision_is_the_requested, "1 operators are not"),
    ],
)
def test_an_injury_is_caught(workshop: Workshop, damage: Callable[[Path, Any], None], claim: Claim, words: str) -> None:
    good, because = workshop.judge(CELL, claim)
    assert good is Verdict.PASS, because
    bad, because = workshop.judge(CELL, claim, damage)
    print(because)
    assert bad is Verdict.FAIL, because
    assert re.search(words, because), because


def test_outputs_of_one_shape_that_changed_places_are_caught(workshop: Workshop) -> None:
    def swap(path: Path, workshop: Workshop) -> None:
        paddle_program.rename(path / PROGRAM, {"images": "images"}, {"left": "right", "right": "left"})

    good, because = workshop.judge("twins paddle fp32", outputs.test_outputs_match_reference)
    assert good is Verdict.PASS, because
    bad, because = workshop.judge("twins paddle fp32", outputs.test_outputs_match_reference, swap)
    assert bad is Verdict.FAIL, because


# ---- the reader -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["1.save_combine", "1.tensorrt_engine", "1.py_func", "3.my_own"])
def test_operators_that_reach_out_of_the_file_are_refused(
    copy: Path, pool: Pool, classify: ModelSpec, kind: str
) -> None:
    """Paddle would overwrite any file, or run a plan, that such an operator names."""

    def insert(whole: Any) -> None:
        path = {"AT": {"#": "0.a_str", "D": str(copy / "written")}, "N": "file_path"}
        ops(whole).append({"#": kind, "A": [path], "I": [], "O": [], "OA": []})

    change(copy, insert)
    spec = request(classify, "paddle")
    brought = foreign(copy, "paddle", spec.to_dict(), trust=False, is_code=False)
    with pytest.raises(ArtifactError, match=f"operator '{kind}' is refused"):
        pool.open(brought, spec, "paddle", "cpu")
    assert not (copy / "written").exists()


def test_a_model_as_x2paddle_leaves_it_is_judged_by_the_order_of_its_tensors(
    copy: Path, pool: Pool, classify: ModelSpec
) -> None:
    paddle_program.rename(copy / PROGRAM, {"images": "x0"}, {"output0": "fetch_name_0"})
    (copy / "inference_model").mkdir()
    for name in (PROGRAM, PARAMETERS):
        (copy / name).replace(copy / "inference_model" / name)
    spec = request(classify, "paddle")
    session = pool.open(foreign(copy, "paddle", spec.to_dict(), False, False), spec, "paddle", "cpu")
    try:
        assert session.run({"images": np.zeros((1, 3, 256, 256), np.float32)})["output0"].shape == (1, 6)
        described = session.describe()
    finally:
        session.close()
    assert "x0 is images, fetch_name_0 is output0" in described.execution.notes[-1]
    assert described.metadata is not None


def test_a_program_of_paddle_2_is_told(copy: Path) -> None:
    (copy / PROGRAM).rename(copy / "model.pdmodel")
    with pytest.raises(ArtifactError, match=r"0 \.json files .*\.pdmodel is a program of Paddle 2"):
        paddle_program.read(copy)


def test_parameters_of_another_program_are_told(copy: Path) -> None:
    """Of one whose first parameter has another size: the file's length alone would not tell which."""
    names: list[str] = []

    def resize(whole: Any) -> None:
        node = ops(whole)[0]
        node["O"]["TT"]["D"][1][0] = 7
        names.append(node["A"][3])

    change(copy, resize)
    with pytest.raises(ArtifactError, match=r"and '.*' is float32 \[7") as caught:
        paddle_program.read(copy)
    assert names[0] in str(caught.value)


@pytest.fixture(scope="module")
def whole(made: Artifact) -> dict[str, bytes]:
    return {name: (made.path / name).read_bytes() for name in (PROGRAM, PARAMETERS)}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(
    whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut off, or with bytes of the structure changed: never another exception, never without an end."""
    folder = tmp_path_factory.getbasetemp() / "damaged_paddle_model"
    folder.mkdir(exist_ok=True)
    chosen = data.draw(st.sampled_from([PROGRAM, PARAMETERS]))
    damaged = bytearray(whole[chosen])
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    for position in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 4)), max_size=4)):
        word = (
            st.binary(min_size=1, max_size=4) if chosen == PARAMETERS else st.sampled_from([b"-1", b"{}", b"[]", b"7"])
        )
        new = data.draw(word)
        damaged[position : position + len(new)] = new
    for name, content in whole.items():
        (folder / name).write_bytes(damaged if name == chosen else content)
    try:
        paddle_program.read_precision(folder)
    except ArtifactError as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)


def test_the_manifest_describes_the_files(workshop: Workshop) -> None:
    assert workshop.judge(CELL, export.test_files_match_the_manifest)[0] is Verdict.PASS
    bad, because = workshop.judge(
        CELL, export.test_files_match_the_manifest, _a_parameter_changed, rewrites_manifest=False
    )
    assert bad is Verdict.FAIL, because

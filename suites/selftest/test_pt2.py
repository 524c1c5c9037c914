"""Programs of torch.export and libraries of AOTInductor: names and sizes in the file, told apart, bound to a CPU."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from exporters.artifact import Artifact, foreign
from exporters.errors import ArtifactError, ExportError, FeedError, ToolchainMissing
from exporters.models.spec import InputSpec, ModelSpec, OutputSpec
from exporters.pool import Pool
from exporters.runtimes import instruction_set
from exporters.runtimes.aotinductor import CHECKS
from exporters.spec import ExportSpec, request
from suites.support.availability import cells

pytestmark = pytest.mark.formats


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as made:
        yield made


@pytest.fixture(scope="module")
def library(pool: Pool, small_models: dict[str, ModelSpec]) -> Artifact:
    """A library of the model `twins`."""
    try:
        return pool.export(request(small_models["twins"], "aotinductor"))
    except ToolchainMissing as error:
        pytest.skip(str(error))


def opened(pool: Pool, path: Path, spec: ExportSpec) -> ArtifactError:
    """How a brought file is refused."""
    runtime = "aoti" if spec.format == "aotinductor" else "eager"
    brought = foreign(path, spec.format, spec.to_dict(), trust=True, is_code=True)
    with pytest.raises(ArtifactError) as caught:
        pool.open(brought, spec, runtime, "cpu")
    return caught.value


def changed(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy whose records went through `change`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def saying(**told: str | None) -> Callable[[str, bytes], bytes]:
    """Other metadata in a package (None takes a field out), and bytes that nothing can load for its library."""

    def change(name: str, data: bytes) -> bytes:
        if name.endswith("_metadata.json"):
            values = {**json.loads(data), **told}
            return json.dumps({k: v for k, v in values.items() if v is not None}).encode()
        return b"nothing that could be loaded" if name.endswith(".so") else data

    return change


def test_a_program_holds_names_and_takes_every_size_from_one(pool: Pool, small_models: dict[str, ModelSpec]) -> None:
    spec = request(small_models["blobs"], "pt2", dynamic=True)
    session = pool.open(pool.export(spec), spec, "eager", "cpu")
    assert [(i.name, i.shape) for i in session.inputs] == [("images", ("batch", 3, "height", "width"))]
    assert [o.name for o in session.outputs] == [o.name for o in spec.model.outputs]
    for shape in ((1, 3, 8, 8), (3, 3, 8, 24), (1, 3, 200, 16)):
        found = session.run({"images": np.zeros(shape, np.float32)})
        assert found["output0"].shape == (shape[0], 7, shape[2] * shape[3] // 64)
    with pytest.raises(FeedError, match="multiple of the stride 8"):
        session.run({"images": np.zeros((1, 3, 12, 8), np.float32)})


def test_outputs_have_the_names_of_the_model(pool: Pool, small_models: dict[str, ModelSpec]) -> None:
    spec = request(small_models["twins"], "pt2", precision="fp16")
    with zipfile.ZipFile(pool.export(spec).path) as file:
        graph = json.loads(file.read("twins/models/model.json"))["graph_module"]["graph"]
    assert [o["as_tensor"]["name"] for o in graph["outputs"]] == ["left", "right"]
    assert "stack_trace" not in json.dumps(graph)  # which would hold paths of this machine


def test_a_model_that_asks_for_values_is_refused_in_one_line(pool: Pool, tmp_path: Path) -> None:
    code = "import torch\n\n\nclass Asks(torch.nn.Module):\n def forward(self, x):\n  return x if x.sum() > 0 else -x\n"
    (tmp_path / "asking.py").write_text(code)
    model = ModelSpec(
        "asking", "asking:Asks", search=(tmp_path,), inputs=(InputSpec("x", (2, 3)),), outputs=(OutputSpec("y"),)
    )
    with pytest.raises(
        ExportError, match=r"torch\.export cannot make a graph of model 'asking'.*depends on no tensor's values"
    ):
        pool.export(request(model, "pt2"))


def test_programs_and_libraries_are_told_apart_by_what_is_in_them(
    pool: Pool, small_models: dict[str, ModelSpec], library: Artifact
) -> None:
    program = pool.export(request(small_models["twins"], "pt2"))
    twins = small_models["twins"]
    assert "say --format aotinductor" in str(opened(pool, library.path, request(twins, "pt2")))
    assert "say --format pt2" in str(opened(pool, program.path, request(twins, "aotinductor")))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"AOTI_MACHINE": "aarch65"}, "it is for aarch65, and this machine is"),
        ({"AOTI_CPU_ISA": "AVX512 AVX1024_VNNI"}, "avx1024vnni"),
        ({"AOTI_MACHINE": None, "instruction_set": None}, "does not say for which CPU it was compiled"),
        ({"instruction_set": "avx1024f"}, "it uses avx1024f, and this CPU has no such instructions"),
        ({"AOTI_DEVICE_KEY": "cuda"}, "is compiled for the device 'cuda'"),
        ({}, "its library cannot be loaded"),  # what the others are refused before
    ],
)
def test_a_library_for_another_cpu_is_refused_before_it_is_loaded(
    pool: Pool,
    small_models: dict[str, ModelSpec],
    library: Artifact,
    tmp_path: Path,
    told: dict[str, str | None],
    said: str,
) -> None:
    if not instruction_set.of_this_cpu() and "AOTI_MACHINE" not in told:
        pytest.skip("this system does not tell its CPU's flags")
    path = changed(library.path, tmp_path / library.path.name, saying(**told))
    assert said in str(opened(pool, path, request(small_models["twins"], "aotinductor")))


def test_a_library_refuses_other_sizes_though_its_metadata_say_none(
    small_models: dict[str, ModelSpec], library: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another exporter's package says nothing of its inputs: the library's own checks are switched on, whatever the
    environment says."""

    def quiet(name: str, data: bytes) -> bytes:
        return saying(inputs=None)(name, data) if name.endswith("_metadata.json") else data

    path = changed(library.path, tmp_path / library.path.name, quiet)
    monkeypatch.setenv(CHECKS, "0")
    with Pool() as pool:
        error = opened(pool, path, request(small_models["twins"], "aotinductor", imgsz=64))
    assert "does not run on images float32 [" in str(error) and "expected" in str(error), error


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ('[["images", [1, 3, 8, 8], "float33"]]', "type 'float33'"),
        ('[["images", [1, 3, -8, 8], "float32"]]', "which cannot be"),
        ("[" * 5000, "list of inputs cannot be read"),
    ],
    ids=["type", "size", "nested"],
)
def test_inputs_that_cannot_be_are_refused(
    pool: Pool, small_models: dict[str, ModelSpec], library: Artifact, tmp_path: Path, inputs: str, said: str
) -> None:
    def change(name: str, data: bytes) -> bytes:
        return saying(inputs=inputs)(name, data) if name.endswith("_metadata.json") else data

    path = changed(library.path, tmp_path / library.path.name, change)
    assert said in str(opened(pool, path, request(small_models["twins"], "aotinductor")))


def test_a_library_that_was_cut_off_is_one_line(
    pool: Pool, small_models: dict[str, ModelSpec], library: Artifact, tmp_path: Path
) -> None:
    """What loads such a one dies of SIGBUS."""

    def cut(name: str, data: bytes) -> bytes:
        return data[: len(data) // 2] if name.endswith(".so") else data

    path = changed(library.path, tmp_path / library.path.name, cut)
    assert "was cut off: its library" in str(opened(pool, path, request(small_models["twins"], "aotinductor")))


@pytest.mark.parametrize(
    ("record", "instead", "said"),
    [
        ("data/weights/weight_0", b"", "tensor 'left.weight' needs 432 bytes, and 'data/weights/weight_0' has 0"),
        ("data/weights/weight_3", bytes(8), "tensor 'right.bias' needs 16 bytes"),
        ("data/weights/model_weights_config.json", b'{"config": {"a": 3}}', "is no list of tensors"),
        ("archive_version", b"many", "cannot be loaded by torch.export"),
    ],
)
def test_what_is_wrong_with_a_program_is_told(
    pool: Pool, small_models: dict[str, ModelSpec], tmp_path: Path, record: str, instead: bytes, said: str
) -> None:
    """PyTorch takes an empty record for any tensor; it logs what is wrong, and raises something else."""
    program = pool.export(request(small_models["twins"], "pt2"))

    def other(name: str, data: bytes) -> bytes:
        return instead if name.endswith(record) else data

    path = changed(program.path, tmp_path / program.path.name, other)
    error = str(opened(pool, path, request(small_models["twins"], "pt2")))
    assert said in error and "check the warnings above" not in error, error


def test_no_compiler_is_a_missing_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    instruction_set.compiled_for.cache_clear()
    with pytest.raises(ToolchainMissing, match="'no-such-compiler' is not on the PATH; install it"):
        instruction_set.compiled_for()
    assert {c.state for c in cells() if c.format == "aotinductor" and c.precision == "fp32"} == {"missing"}


def test_what_a_library_was_compiled_for_is_in_its_package_and_its_key(library: Artifact) -> None:
    with zipfile.ZipFile(library.path) as file:
        name = next(n for n in file.namelist() if n.endswith("wrapper_metadata.json"))
        told = json.loads(file.read(name))
    instruction_set.compiled_for.cache_clear()
    flags, version = instruction_set.compiled_for()
    assert told["instruction_set"] == flags
    assert told["AOTI_CPU_ISA"]
    assert any(version in note for note in library.notes)

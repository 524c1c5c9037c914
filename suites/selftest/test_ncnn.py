"""What is special to ncnn: sizes that it does not enforce itself, pnnx's side files, modules that stay in FP32."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from exporters.artifact import Artifact, foreign
from exporters.errors import ArtifactError, ExportError, FeedError, NotSupported, ToolchainMissing
from exporters.models.spec import InputSpec, ModelSpec, OutputSpec
from exporters.pool import Pool
from exporters.spec import ExportSpec, request
from exporters.toolchain import resolve

pytestmark = pytest.mark.formats

MODULE = """
import torch
from torch import nn


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.linear, self.embed = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4)), nn.Embedding(10, 4)

    def forward(self, images, extra, ids):
        maps = self.head(self.bn(self.stem(images)).relu()).view(-1, 4, 1024)
        return maps, self.linear(extra) + self.embed(ids).mean(1)


class Shared(nn.Module):  # one constant for tensors of three axes and four, as a head with key points has
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)

    def forward(self, images):
        strides = torch.cat((torch.full((1, 1, 512), 2.0), torch.full((1, 1, 512), 3.0)), 2)
        points = (self.second(images).view(-1, 4, 2, 1024) * 2 + 0.5) * strides
        return torch.cat((self.first(images).view(-1, 4, 1024) * strides, points.view(-1, 8, 1024)), 1)


class Largest(nn.Module):
    def forward(self, images):
        return images.argmax(1)
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    try:
        resolve("ncnn")
    except ToolchainMissing as error:
        pytest.skip(str(error))
    made = Pool()
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Three inputs of two types, two outputs, and a head that stays in FP32."""
    folder = tmp_path_factory.mktemp("ncnn")
    (folder / "ncnn_models.py").write_text(MODULE)
    return ModelSpec(
        "kept",
        "ncnn_models:Kept",
        search=(folder,),
        imgsz=(32, 32),
        inputs=(
            InputSpec("images", ("batch", 3, "height", "width")),
            InputSpec("extra", ("batch", 5)),
            InputSpec("ids", ("batch", 3), "int64", high=10),
        ),
        outputs=(OutputSpec("maps", ((0, "batch"),)), OutputSpec("vector", ((0, "batch"),))),
        fp32=(("head", "a test"), ("stem", "a test")),
    )


def copy(artifact: Artifact, folder: Path, spec: ExportSpec) -> Artifact:
    """The same files as somebody's who made them elsewhere."""
    path = folder / artifact.path.name
    shutil.copytree(artifact.path, path)
    return foreign(path, "ncnn", spec.to_dict(), trust=False, is_code=False)


def feeds(batch: int, size: int = 32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "images": random.random((batch, 3, size, size), np.float32),
        "extra": random.random((batch, 5), np.float32),
        "ids": random.integers(0, 10, (batch, 3)),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_several_inputs_run_in_a_batch(pool: Pool, model: ModelSpec, batch: int) -> None:
    spec = request(model, "ncnn", batch=batch)
    given = feeds(batch)
    with closing(pool.open(pool.export(spec), spec, "ncnn", "cpu")) as session:
        found = {k: np.array(v) for k, v in session.run(given).items()}
    reference = request(model, "pytorch", batch=batch)
    with closing(pool.open(pool.export(reference), reference, "eager", "cpu")) as session:
        expected = {k: np.array(v) for k, v in session.run(given).items()}
    for name, want in expected.items():
        np.testing.assert_allclose(found[name], want, atol=1e-5, rtol=0, err_msg=name)


def test_a_constant_meets_tensors_of_several_ranks(pool: Pool, model: ModelSpec) -> None:
    """pnnx leaves it as it is for one of them, and ncnn makes 1024 times as many values, or wrong ones, of it."""
    shared = ModelSpec("shared", "ncnn_models:Shared", search=model.search, imgsz=(32, 32))
    given = {"images": feeds(1)["images"]}
    spec, reference = request(shared, "ncnn"), request(shared, "pytorch")
    with closing(pool.open(pool.export(spec), spec, "ncnn", "cpu")) as session:
        found = np.array(session.run(given)["output0"])
    with closing(pool.open(pool.export(reference), reference, "eager", "cpu")) as session:
        np.testing.assert_allclose(found, session.run(given)["output0"], atol=1e-5, rtol=0)


def test_nothing_but_three_files_stays(pool: Pool, model: ModelSpec) -> None:
    made = pool.export(request(model, "ncnn"))
    assert {f.path for f in made.files} == {
        f"kept_ncnn_model/{name}" for name in ("model.ncnn.param", "model.ncnn.bin", "metadata.yaml")
    }


def test_modules_that_stay_in_fp32_do(pool: Pool, model: ModelSpec) -> None:
    """Also one that pnnx joined with its normalization."""
    achieved = pool.export(request(model, "ncnn", half=True)).achieved
    assert (achieved.precision, achieved.exceptions) == ("fp16", ("head", "stem"))


def test_another_size_is_refused(pool: Pool, model: ModelSpec) -> None:
    spec = request(model, "ncnn")
    with (
        closing(pool.open(pool.export(spec), spec, "ncnn", "cpu")) as session,
        pytest.raises(FeedError, match="expected"),
    ):
        session.run(feeds(1, 64))


@pytest.mark.parametrize("says_size", [True, False])
def test_metadata_of_another_size_are_noticed(pool: Pool, model: ModelSpec, tmp_path: Path, says_size: bool) -> None:
    """By the size in the .param file or, where another exporter left it out, by what the layers make of it."""
    spec = request(model, "ncnn")
    brought = copy(pool.export(spec), tmp_path, spec)
    side_car, param = brought.path / "metadata.yaml", brought.path / "model.ncnn.param"
    side_car.write_text(side_car.read_text().replace("- 32", "- 64"))
    if says_size:
        with closing(pool.open(brought, spec, "ncnn", "cpu")) as session:
            told = session.describe()
        assert "says imgsz [64, 64], and model.ncnn.param is made for [32, 32]" in told.metadata_error
        return
    lines = param.read_text().splitlines()
    param.write_text("\n".join(f"{' '.join(x.split()[:5])}" if x.startswith("Input") else x for x in lines) + "\n")
    with pytest.raises(ArtifactError, match="made for another size than images"):
        pool.open(brought, spec, "ncnn", "cpu")


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("model.ncnn.param", "2=3 1=32 0=32", "2=3 1=32 0=-32"),
        ("model.ncnn.param", "2=3 1=32 0=32", "2=3 1=2000000000 0=2000000000"),
        ("metadata.yaml", "batch: 1", "batch: -9"),
        ("metadata.yaml", "batch: 1", "batch: 99999999"),
    ],
    ids=["negative", "too large", "negative batch", "too large a batch"],
)
def test_sizes_that_cannot_be_take_no_memory(
    pool: Pool, model: ModelSpec, tmp_path: Path, file: str, before: str, after: str
) -> None:
    spec = request(model, "ncnn")
    brought = copy(pool.export(spec), tmp_path, spec)
    path = brought.path / file
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(ArtifactError, match="input images"):
        pool.open(brought, spec, "ncnn", "cpu")


def test_a_size_in_the_file_that_its_layers_contradict_is_noticed(pool: Pool, model: ModelSpec, tmp_path: Path) -> None:
    spec = request(model, "ncnn")
    brought = copy(pool.export(spec), tmp_path, spec)
    param = brought.path / "model.ncnn.param"
    param.write_text(param.read_text().replace("2=3 1=32 0=32", "2=3 1=64 0=64"))
    with pytest.raises(ArtifactError, match="made for another size than images"):
        pool.open(brought, spec, "ncnn", "cpu")


def test_a_file_without_an_input_is_refused(pool: Pool, model: ModelSpec, tmp_path: Path) -> None:
    spec = request(model, "ncnn")
    brought = copy(pool.export(spec), tmp_path, spec)
    param = brought.path / "model.ncnn.param"
    # A layer that gives what it holds, and holds nothing.
    param.write_text(re.sub(r"^Input( .*? 0 1 \S+).*$", r"MemoryData\1", param.read_text(), flags=re.MULTILINE))
    with pytest.raises(ArtifactError, match="has no input"):
        pool.open(brought, spec, "ncnn", "cpu")


@pytest.mark.parametrize("cut", [-8, 8])
def test_weights_of_another_length_are_noticed(pool: Pool, model: ModelSpec, tmp_path: Path, cut: int) -> None:
    """ncnn itself says nothing where bytes are left over."""
    spec = request(model, "ncnn")
    brought = copy(pool.export(spec), tmp_path, spec)
    weights = brought.path / "model.ncnn.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[:cut] if cut < 0 else data + bytes(cut))
    with pytest.raises(ArtifactError, match="it ends at byte" if cut < 0 else "take"):
        pool.open(brought, spec, "ncnn", "cpu")


def test_an_operator_that_ncnn_lacks_is_named(pool: Pool, model: ModelSpec) -> None:
    """pnnx writes it into the file all the same, and exits with 0."""
    largest = ModelSpec("largest", "ncnn_models:Largest", search=model.search, imgsz=(32, 32))
    with pytest.raises(ExportError, match=r"ncnn has no layer torch\.argmax"):
        pool.export(request(largest, "ncnn"))


@pytest.mark.parametrize(("options", "because"), [({"dynamic": True}, "numbers"), ({"int8": True}, "quantization")])
def test_what_cannot_be_says_why(model: ModelSpec, options: dict[str, bool], because: str) -> None:
    with pytest.raises(NotSupported, match=because):
        request(model, "ncnn", **options)

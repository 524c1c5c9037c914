"""What is special to SavedModels and frozen graphs: channels last, what a graph may not call, whole files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporters import formats
from exporters.artifact import foreign
from exporters.errors import ArtifactError, NotSupported, UnsafeFile
from exporters.toolchain import resolve
from suites.conformance.test_export import test_artifact_loads_from_its_files_alone as loads
from suites.conformance.test_metadata import test_metadata_describes_the_request as describes_request
from suites.conformance.test_outputs import test_outputs_match_reference as outputs_match
from suites.conformance.test_precision import test_achieved_precision_is_the_requested as achieved
from suites.conformance.test_precision import test_executed_precision_is_the_requested as executed
from suites.conformance.test_shapes import test_input_signature_is_the_requested as signature
from suites.conformance.test_shapes import test_output_shapes_match_reference as shapes_match
from suites.support.cases import what_is_missing
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

pytestmark = pytest.mark.formats

# Changes a GraphDef or a SavedModel's: (kind of change, file).
CHANGE = """
import sys
import numpy as np
from tensorflow.core.framework import graph_pb2, types_pb2
from tensorflow.core.protobuf import saved_model_pb2
change, path = sys.argv[1:]
data = open(path, "rb").read()
whole = graph_pb2.GraphDef() if path.endswith("saved_model.pb") is False else saved_model_pb2.SavedModel()
whole.ParseFromString(data)
graph = whole if isinstance(whole, graph_pb2.GraphDef) else whole.meta_graphs[0].graph_def
every = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
if change == "weight":
    kernels = [n for n in every if n.op == "Const" and len(n.attr["value"].tensor.tensor_shape.dim) == 4]
    kernel = max(kernels, key=lambda n: len(n.attr["value"].tensor.tensor_content))
    tensor = kernel.attr["value"].tensor
    values = np.frombuffer(tensor.tensor_content, np.float32).copy()
    values[: len(values) // 2] *= -1
    tensor.tensor_content = values.tobytes()
elif change == "half":
    node = next(n for n in every if n.op == "Conv2D")
    node.attr["T"].type = types_pb2.DT_HALF
else:
    node = graph.node.add() if isinstance(whole, graph_pb2.GraphDef) else graph.library.function[0].node_def.add()
    node.name, node.op = "surplus", change
open(path, "wb").write(whole.SerializeToString())
"""


@pytest.fixture(autouse=True)
def toolchain() -> None:
    missing = what_is_missing(formats.get("saved_model"), "cpu")
    if missing:
        pytest.skip(missing)


def _graph(path: Path) -> Path:
    return path / "saved_model.pb" if path.is_dir() else path


def _change(path: Path, change: str) -> None:
    words = [str(resolve("tensorflow").python), "-c", CHANGE, change, str(_graph(path))]
    subprocess.run(words, check=True, capture_output=True)


FORMATS = ("saved_model", "pb")


@pytest.mark.parametrize("format_id", FORMATS)
@pytest.mark.parametrize("model", ["twins", "mixed", "blobs"])
def test_small_models_have_the_values_of_pytorch(workshop: Workshop, model: str, format_id: str) -> None:
    cell = f"{model} {format_id} fp32"
    for claim in (signature, shapes_match, outputs_match, achieved, executed):
        verdict, because = workshop.judge(cell, claim)
        assert verdict is Verdict.PASS, f"{claim.__name__}: {because}"


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_layout_that_is_not_the_files_is_noticed(workshop: Workshop, format_id: str) -> None:
    def damage(path: Path, workshop: Workshop) -> None:
        side_car = (path if path.is_dir() else path.parent) / "metadata.yaml"
        text = side_car.read_text(encoding="utf-8")
        assert "layout: NHWC" in text
        side_car.write_text(text.replace("layout: NHWC", "layout: NCHW"), encoding="utf-8")

    cell = f"classify {format_id} fp32"
    verdict, because = workshop.judge(cell, signature, damage)
    assert verdict is Verdict.FAIL and "axis 1 is 256, expected 3" in because, because


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_layout_that_was_lost_is_noticed(workshop: Workshop, format_id: str) -> None:
    """Values cannot tell: where the metadata do not say it, the shapes of the inputs do."""

    def damage(path: Path, workshop: Workshop) -> None:
        side_car = (path if path.is_dir() else path.parent) / "metadata.yaml"
        side_car.write_text(side_car.read_text(encoding="utf-8").replace("layout: NHWC\n", ""), encoding="utf-8")

    verdict, because = workshop.judge(f"twins {format_id} fp32", describes_request, damage)
    assert (verdict, because) == (Verdict.FAIL, "metadata layout is missing")


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_changed_weight_is_noticed(workshop: Workshop, format_id: str) -> None:
    cell = f"classify {format_id} fp32"
    assert workshop.judge(cell, outputs_match)[0] is Verdict.PASS
    verdict, because = workshop.judge(cell, outputs_match, lambda path, _: _change(path, "weight"))
    assert verdict is Verdict.FAIL and "output0" in because, because


@pytest.mark.parametrize("format_id", FORMATS)
def test_an_operator_in_16_bits_is_told(workshop: Workshop, format_id: str) -> None:
    """Alone among others in FP32, as a careless rewrite leaves it, it does not load."""
    verdict, because = workshop.judge(f"twins {format_id} fp32", achieved, lambda path, _: _change(path, "half"))
    assert verdict is Verdict.ERROR and "expected half" in because, because


@pytest.mark.parametrize("operator", ["ReadFile", "WriteFile", "PyFunc", "EagerPyFunc"])
@pytest.mark.parametrize("format_id", FORMATS)
def test_what_reaches_outside_of_the_model_is_refused(workshop: Workshop, format_id: str, operator: str) -> None:
    """Wherever it stands in the file, before TensorFlow has it."""
    verdict, because = workshop.judge(f"twins {format_id} fp32", loads, lambda path, _: _change(path, operator))
    assert verdict is Verdict.FAIL and f"calls {operator} (node 'surplus')" in because, because


@pytest.mark.parametrize("format_id", FORMATS)
def test_code_is_loaded_with_trust_alone(workshop: Workshop, format_id: str) -> None:
    case = workshop.case(f"twins {format_id} fp32")
    with pytest.raises(UnsafeFile, match="add --trust"):
        foreign(
            workshop.good(f"twins {format_id} fp32").path, format_id, case.spec.to_dict(), trust=False, is_code=True
        )


def test_variables_hold_no_weights(workshop: Workshop) -> None:
    """Those of another model change nothing: all weights are constants of the graph."""

    def damage(path: Path, workshop: Workshop) -> None:
        other = workshop.good("mixed saved_model fp32").path
        shutil.rmtree(path / "variables")
        shutil.copytree(other / "variables", path / "variables")

    verdict, because = workshop.judge("twins saved_model fp32", outputs_match, damage)
    assert verdict is Verdict.PASS, because


def test_a_folder_that_holds_no_graph_is_one_line(workshop: Workshop, tmp_path: Path) -> None:
    spec = workshop.case("twins saved_model fp32").spec
    folder = tmp_path / "empty_saved_model"
    folder.mkdir()
    brought = foreign(folder, "saved_model", spec.to_dict(), trust=True, is_code=True)
    with pytest.raises(ArtifactError, match=r"saved_model\.pb' cannot be read"):
        workshop.run.pool.open(brought, spec, "tf", "cpu")


@pytest.mark.parametrize("format_id", FORMATS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_name_the_format_that_has_them(workshop: Workshop, format_id: str, precision: str) -> None:
    with pytest.raises(NotSupported, match="tflite"):
        workshop.case(f"twins {format_id} {precision}")


@pytest.mark.parametrize("format_id", FORMATS)
def test_the_folder_holds_nothing_else(workshop: Workshop, format_id: str) -> None:
    """No .tflite, no working folder, no calibration file."""
    artifact = workshop.good(f"twins {format_id} fp32")
    whole = {f.relative_to(artifact.root).parts[-1] for f in artifact.root.rglob("*") if f.is_file()}
    variables = {"variables.index", "variables.data-00000-of-00001"} if format_id == "saved_model" else set[str]()
    assert whole == {"manifest.json", "metadata.yaml", _graph(artifact.path).name, *variables}


def test_the_metadata_name_the_layout(workshop: Workshop) -> None:
    assert workshop.judge("twins saved_model fp32", describes_request)[0] is Verdict.PASS
    text = (workshop.good("twins saved_model fp32").path / "metadata.yaml").read_text(encoding="utf-8")
    assert "layout: NHWC" in text


def test_keras_gives_the_values_of_pytorch(workshop: Workshop) -> None:
    """What is judged is the model that Keras loads; without its part of the folder there is none."""
    cell = "mixed saved_model fp32 keras"
    for claim in (signature, shapes_match, outputs_match):
        verdict, because = workshop.judge(cell, claim)
        assert verdict is Verdict.PASS, f"{claim.__name__}: {because}"
    metadata = "keras_metadata.pb"
    verdict, because = workshop.judge(cell, loads, lambda path, _: (path / metadata).unlink())
    assert verdict is Verdict.FAIL and f"it has no {metadata}" in because, because

    def emptied(path: Path, _: Workshop) -> None:
        (path / metadata).write_bytes(b"nothing")

    verdict, because = workshop.judge(cell, loads, emptied)
    assert verdict is Verdict.FAIL and "cannot be loaded by Keras" in because, because

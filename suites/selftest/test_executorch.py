"""What is special to ExecuTorch: who runs what, what a file's header and weights say, sizes that are planned for."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from exporters import formats
from exporters.artifact import foreign
from exporters.errors import ArtifactError, BadRequest, FeedError
from exporters.metadata import SIDE_CAR, Metadata
from exporters.runtimes.pte import Pte
from exporters.toolchain import resolve
from suites.conformance import test_dynamic as dynamic
from suites.conformance import test_outputs as outputs
from suites.conformance import test_precision as precision
from suites.conformance.test_metadata import test_class_names_survive_the_round_trip as names_survive
from suites.support.bench import Bench
from suites.support.cases import what_is_missing
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Claim, Judge, Workshop

pytestmark = pytest.mark.formats

# A program of another exporter, with the constants that ours have.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
folder, target = sys.argv[1:]
sys.path.append(folder)
import small_models
torch.manual_seed(0)
class Wide(small_models.Mixed):  # convolutions in FP16, products in FP32
    def forward(self, images):
        x = self.up(self.stem(images.half()).relu())
        query, key = self.query(x).float().flatten(2), self.key(x).float().flatten(2)
        share = (query @ key.transpose(1, 2)).softmax(2)
        return self.last((share @ x.float().flatten(2)).view_as(x).half()).float()
program = torch.export.export(MODEL, (torch.zeros(1, 3, 32, 32),))
names = {"input_names": json.dumps(["images"]), "output_names": json.dumps(OUTPUTS)}
made = to_edge_transform_and_lower(program, partitioner=DELEGATES, constant_methods=names).to_executorch()
Path(target).write_bytes(made.buffer)
"""


@pytest.fixture
def toolchain() -> None:
    """Skips where the toolchain is not here."""
    missing = what_is_missing(formats.get("executorch"), "cpu")
    if missing:
        pytest.skip(missing)


def _lowered(workshop: Workshop, path: Path, model: str, outputs: list[str], delegates: str) -> None:
    python = resolve("executorch").python
    folder = workshop.models["twins"].search[0]
    program = PROGRAM.replace("MODEL", model).replace("OUTPUTS", repr(outputs)).replace("DELEGATES", delegates)
    subprocess.run([str(python), "-c", program, str(folder), str(path)], check=True, capture_output=True)


def _without_delegate(path: Path, workshop: Workshop) -> None:
    """As an exporter does that lowers a program and gives XNNPACK nothing."""
    _lowered(workshop, path, "small_models.twins().eval()", ["left", "right"], "[]")


def _with_wide_products(path: Path, workshop: Workshop) -> None:
    """As an exporter does that converts the modules, and not what is computed between them."""
    _lowered(workshop, path, "Wide().half().eval()", ["output0"], "[XnnpackPartitioner()]")


def test_convolutions_that_xnnpack_does_not_run_are_noticed(workshop: Workshop, toolchain: None) -> None:
    """Their outputs are right, and they take 170 times as long."""
    claim = precision.test_every_node_runs_on_the_requested_provider
    assert workshop.judge("twins executorch fp32", claim) == (Verdict.PASS, "")
    verdict, because = workshop.judge("twins executorch fp32", claim, _without_delegate)
    assert verdict is Verdict.FAIL
    assert "2 nodes run elsewhere" in because
    assert "aten::convolution.out" in because
    right, because = workshop.judge("twins executorch fp32", outputs.test_outputs_match_reference, _without_delegate)
    assert right is Verdict.PASS, because


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_every_kind_of_product_is_told_by_file_and_runtime(workshop: Workshop, toolchain: None, kind: str) -> None:
    """Convolutions, transposed ones, and products of two computed tensors."""
    for claim in (
        precision.test_achieved_precision_is_the_requested,
        precision.test_executed_precision_is_the_requested,
        precision.test_every_node_runs_on_the_requested_provider,
        outputs.test_outputs_match_reference,
    ):
        verdict, because = workshop.judge(f"mixed executorch {kind}", claim)
        # A sum of 4,096 products that is taken in FP16, one after the other, stands still where what is added is less
        # than half a step: such a file is wrong where the CPU has instructions for it, and right elsewhere.
        sums = kind == "fp16" and workshop.case(f"mixed executorch {kind}").runtime.fp16_terms
        if sums and claim is outputs.test_outputs_match_reference:
            assert verdict is Verdict.FAIL, f"{claim.__name__}: {verdict} {because}"
            continue
        # With the 20 dB that 8 bits are allowed, noise in the first of this model's few layers would not be seen.
        blind = kind == "int8" and claim is outputs.test_outputs_match_reference
        assert verdict is (Verdict.INSENSITIVE if blind else Verdict.PASS), f"{claim.__name__}: {because}"


def test_products_in_another_precision_are_noticed(workshop: Workshop, toolchain: None) -> None:
    """They have no weight whose type would tell."""
    claim = precision.test_achieved_precision_is_the_requested
    verdict, because = workshop.judge("mixed executorch fp16", claim, _with_wide_products)
    assert verdict is Verdict.FAIL and "fp32" in because, because


def test_a_folder_of_another_exporter_is_read(
    workshop: Workshop, judge: Judge, toolchain: None, tmp_path: Path
) -> None:
    """A program without our constants, and metadata.yaml beside it."""
    case, folder = workshop.case("twins executorch fp32"), tmp_path / "twins_executorch_model"
    folder.mkdir()
    program = folder / "model.pte"
    _lowered(workshop, program, "small_models.twins().eval()", ["left", "right"], "[XnnpackPartitioner()]")
    (folder / SIDE_CAR).write_text(Metadata.of(case.spec).as_yaml(), encoding="utf-8")

    def said(claim: Claim) -> tuple[Verdict, str]:
        brought = foreign(folder, "executorch", case.spec.to_dict(), trust=False, is_code=False)
        with closing(Bench(workshop.run, case, brought)) as bench:
            return judge(claim, bench)

    for claim in (names_survive, outputs.test_outputs_match_reference):
        assert said(claim) == (Verdict.PASS, "")
    (folder / SIDE_CAR).unlink()
    verdict, because = said(names_survive)
    assert verdict is Verdict.FAIL and "holds no metadata" in because, because
    program.unlink()
    verdict, because = said(outputs.test_outputs_match_reference)
    assert verdict is Verdict.ERROR and "holds 0 .pte files, expected one" in because, because


def test_sizes_vary_up_to_what_is_planned_for(workshop: Workshop, toolchain: None) -> None:
    """Twice the image size, four images; what is larger is refused before the runtime sees it."""
    name = "blobs executorch fp32 dynamic"
    verdict, because = workshop.judge(name, dynamic.test_random_shapes_match_reference)
    assert verdict is Verdict.PASS, because
    with closing(workshop.bench(name)) as bench:
        session = bench.session()
        assert session.run({"images": np.zeros((4, 3, 320, 320), np.float32)})["output0"].shape == (4, 7, 1600)
        with pytest.raises(FeedError, match=r"expected at most \[4, 3, 320, 320\]"):
            session.run({"images": np.zeros((5, 3, 160, 160), np.float32)})


def test_a_module_to_keep_that_is_none_is_refused(workshop: Workshop, toolchain: None) -> None:
    """It names the modules as PyTorch does."""
    spec = workshop.case("mixed executorch int8").spec.but(keep=("steam",))
    with pytest.raises(BadRequest, match="keep 'steam': model 'mixed' has no operator"):
        workshop.run.pool.export(spec)


def _bad(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    yield "empty", b"", "is empty"
    yield "of another kind", b"PK\x03\x04" + bytes(100), "is no ExecuTorch program: its bytes 4 to 8 are"
    yield "of another version", good[:4] + b"ET11" + good[8:], "expected b'ET12'"
    yield "with half a header", good[:20], "is cut off: it has 20 bytes"
    yield "short of a byte", good[:-1], f"its header says {len(good)}"
    yield "with another weight", good[:-1] + bytes([good[-1] ^ 1]), "have other bytes"
    yield "with a root beyond its end", b"\xff\xff\xff\x7f" + good[4:], "is damaged"


def test_files_are_refused_before_the_runtime_reads_them(workshop: Workshop, toolchain: None, tmp_path: Path) -> None:
    """Each in a line that says what is wrong: the runtime reads beyond the end of some."""
    case = workshop.case("twins executorch fp32")
    good = workshop.good("twins executorch fp32")
    for number, (kind, data, said) in enumerate(_bad(good.path.read_bytes())):
        path = tmp_path / f"{number}.pte"
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match="export it again") as caught:
            is_code = formats.get("executorch").is_code
            brought = foreign(path, "executorch", case.spec.to_dict(), trust=False, is_code=is_code)
            workshop.run.pool.open(brought, case.spec, case.runtime.id, "cpu")
        assert said in str(caught.value), kind


def test_a_header_is_read_without_the_toolchain(tmp_path: Path) -> None:
    """What is no program at all needs no reader."""
    path = tmp_path / "none.pte"
    path.write_bytes(b"no program")
    with pytest.raises(ArtifactError, match="is no ExecuTorch program"):
        Pte(path)

"""What is special to OpenVINO: what its Model API reads of a file, beside metadata.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from suites.conformance.test_metadata import test_class_names_survive_the_round_trip as names_survive
from suites.conformance.test_shapes import test_output_shapes_match_reference as shapes_match
from suites.support.cases import missing_toolchain
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

pytestmark = pytest.mark.formats


@pytest.fixture
def toolchain() -> None:
    missing = missing_toolchain("openvino")
    if missing:
        pytest.skip(missing)


def test_names_of_tensors_are_those_in_the_file(workshop: Workshop, toolchain: None) -> None:
    """A file that has lost them is not given the request's."""

    def damage(path: Path, workshop: Workshop) -> None:
        xml = next(path.glob("*.xml"))
        text = xml.read_text(encoding="utf-8")
        changed = re.sub(r' (?:output_)?names="(?:left|right)"', "", text)
        assert changed != text
        xml.write_text(changed, encoding="utf-8")

    cell = "twins openvino fp32"
    assert workshop.judge(cell, shapes_match) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, shapes_match, damage)
    assert verdict is Verdict.FAIL and "unnamed0" in because, because


def test_a_graph_that_cannot_be_read_is_one_line(workshop: Workshop, toolchain: None) -> None:
    def damage(path: Path, workshop: Workshop) -> None:
        xml = next(path.glob("*.xml"))
        xml.unlink()
        xml.mkdir()

    verdict, because = workshop.judge("twins openvino fp32", shapes_match, damage)
    assert verdict is Verdict.ERROR and "cannot be read (Is a directory); export it again" in because, because


@pytest.mark.parametrize(
    ("pattern", "instead", "word"),
    [
        (r"<model_info>.*</model_info>", "", "has lost its labels"),
        (r'(<labels value=")\w+', r"\1another", "its labels are not the names in metadata.yaml"),
    ],
    ids=["model_info lost", "a label renamed"],
)
def test_labels_in_rt_info_are_the_class_names(
    workshop: Workshop, toolchain: None, pattern: str, instead: str, word: str
) -> None:
    def damage(path: Path, workshop: Workshop) -> None:
        xml = next(path.glob("*.xml"))
        text = xml.read_text(encoding="utf-8")
        changed = re.sub(pattern, instead, text, flags=re.DOTALL)
        assert changed != text
        xml.write_text(changed, encoding="utf-8")

    cell = "classify openvino fp32"
    assert workshop.judge(cell, names_survive) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, names_survive, damage)
    assert verdict is Verdict.FAIL and word in because, because

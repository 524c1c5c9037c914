"""Metadata survives the round trip through the file."""

from __future__ import annotations

from exporters import formats
from exporters.errors import NotSupported, shown
from exporters.metadata import Metadata
from suites.support.bench import Bench


def _metadata(case: Bench) -> Metadata:
    if not formats.get(case.spec.format).keeps_metadata:
        raise NotSupported(f"format {case.spec.format} holds no metadata")
    described = case.facts()
    assert described.metadata is not None, described.metadata_error or "the artifact holds no metadata"
    return described.metadata


def test_class_names_survive_the_round_trip(case: Bench) -> None:
    """Every index and every character of every name."""
    names = _metadata(case).names
    want = dict(case.model.names)
    if names == want:
        return
    different = next(i for i in sorted({*names, *want}) if names.get(i) != want.get(i))
    raise AssertionError(
        f"class names differ at index {different}: {shown(names.get(different))}, expected {want.get(different)!r} "
        f"({len(names)} names, expected {len(want)})"
    )


def test_metadata_describes_the_request(case: Bench) -> None:
    """Stride, task, batch, image size, key points, options, and what else the file says are what was asked for."""
    found = _metadata(case)
    want = {"stride": case.model.stride, "task": case.model.task, "batch": case.spec.batch, "imgsz": case.spec.imgsz}
    want |= {"kpt_shape": case.model.kpt_shape} if case.model.kpt_shape else {}
    for key, value in want.items():
        got = getattr(found, key)
        assert got == value, f"metadata {key} is {shown(got)}, expected {value!r}"
    entry = formats.get(case.spec.format)
    assert found.layout or not entry.says_layout or case.brought is not None, "metadata layout is missing"
    wrong = entry.contradiction(case.artifact().path, case.spec)
    assert not wrong, wrong
    # Artifacts of older exporters lack args, and those of others have some of them only.
    asked = Metadata.of(case.spec).args
    told = {key: value for key, value in found.args.items() if key in asked}
    missing = sorted(set(asked) - set(told)) if case.brought is None else []
    assert not missing, f"metadata args lack {', '.join(missing)}"
    # Which operator set and simplifier a brought file was made with is not part of what it is checked for.
    for key in (k for k in told if case.brought is None or k not in ("opset", "simplify")):
        assert told[key] == asked[key], f"metadata args say {key} = {shown(told[key])}, expected {asked[key]!r}"


def test_metadata_names_the_owner(case: Bench) -> None:
    """Author and license are those of the model's owner, never ours nor another exporter's by default."""
    found = _metadata(case)
    if case.brought is not None:
        raise NotSupported("whose name a brought artifact should carry is not known")
    for key in ("author", "license"):
        want = case.model.owner.get(key, "")
        assert getattr(found, key) == want, f"metadata {key} is {getattr(found, key)!r}, expected {want!r}"
    assert found.date, "metadata has no date"
    assert found.version, "metadata has no version"

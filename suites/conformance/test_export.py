"""The artifact exists, whole, and is what its manifest says."""

from __future__ import annotations

from exporters import formats
from exporters.artifact import digest
from exporters.errors import ArtifactError, NotSupported
from exporters.pool import Pool
from suites.support.bench import Bench


def test_export_makes_the_declared_file(case: Bench) -> None:
    """The file or folder has the format's suffix, and something is in it."""
    artifact = case.artifact()
    if case.brought is not None:  # a name says nothing of what is in it
        raise NotSupported("a brought artifact was exported by somebody else")
    suffix = formats.get(case.spec.format).suffix
    assert artifact.path.name.endswith(suffix), f"made {artifact.path.name}, expected a name ending in {suffix}"
    size = sum(
        f.stat().st_size
        for f in ([artifact.path] if artifact.path.is_file() else artifact.path.rglob("*"))
        if f.is_file()
    )
    assert size > 0, f"{artifact.path} is empty"


def test_files_match_the_manifest(case: Bench) -> None:
    """Sizes and digests of all files are those that the export recorded."""
    artifact = case.artifact()
    if not artifact.has_manifest:
        raise NotSupported("a brought artifact has no manifest")
    try:
        artifact.verify()
    except ArtifactError as error:
        raise AssertionError(error.what) from error


def test_artifact_loads_from_its_files_alone(case: Bench) -> None:
    """Its runtime opens it, in a process of its own that did not make it."""
    case.artifact()
    try:
        session = case.session()
    except ArtifactError as error:
        raise AssertionError(error.what) from error
    assert session.inputs, "the loaded artifact has no inputs"
    assert session.outputs, "the loaded artifact has no outputs"


def test_export_leaves_the_weights_unchanged(case: Bench) -> None:
    """The user's checkpoint has the bytes that the cache key was computed from."""
    weights = case.model.weights
    case.artifact()
    if case.brought is not None:
        raise NotSupported("a brought artifact was exported by somebody else")
    if weights is None:
        return
    assert digest(weights) == _digest_before(case.run.pool, weights), f"{weights} changed while it was exported"


def _digest_before(pool: Pool, weights: object) -> str:
    """The digest when the run first saw the file."""
    return pool.weights.get(str(weights), "")

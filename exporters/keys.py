"""The cache key: everything that an artifact depends on. The date is not in it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any, cast

from exporters.artifact import digest
from exporters.errors import BadRequest, CheckpointError
from exporters.models.spec import ModelSpec
from exporters.spec import ExportSpec, is_factory

PACKAGE = Path(__file__).parent


def export_key(
    spec: ExportSpec, parents: Sequence[str], packages: Mapping[str, str], further: Mapping[str, str], state: str
) -> str:
    """Digest of weights, factory source, exporters/ source, request, calibration set, parents and toolchain.

    `further` is what else the format says that it depends on, as the GPU. `state` is the digest of what a user's
    factories made, of the model and of calibration feeds, which they may have read from files that only they know.
    """
    described = spec.to_dict()
    described["model"]["weights"] = spec.model.weights.name if spec.model.weights else None
    if not spec.verbose:  # one that is asks for a log that another lacks
        described.pop("verbose")
    described["model"].pop("evaluate")  # the artifact is the same, whatever it is judged on
    described["model"].pop("search")  # digests of what is found there are below
    parts = {
        "weights": weights_digest(spec.model),
        "factory": factory_digest(spec.model),
        "exporters": sources_digest(),
        "spec": described,
        "calibration": _calibration_digest(spec) if spec.data else None,
        "parents": list(parents),
        "packages": dict(packages),
        "further": dict(further),
        "state": state,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_digest(model: ModelSpec) -> str | None:
    """Digest of the model's weights file; None where the factory makes the weights.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if model.weights is None:
        return None
    try:
        return digest(model.weights)
    except OSError as error:
        raise CheckpointError(
            f"weights '{model.weights}' cannot be read ({error.strerror})", "give a weights file"
        ) from None


def _calibration_digest(spec: ExportSpec) -> str:
    if is_factory(spec.data):
        return factory_digest(ModelSpec("calibration", spec.data, search=spec.model.search))
    from exporters import calibration  # with numpy, which an FP32 export does not need here

    return calibration.digest_of(spec)


@cache
def sources_digest() -> str:
    """Digest of exporters/ itself: another version of the exporter makes another artifact."""
    return _digest_files(sorted(PACKAGE.rglob("*.py")))


def factory_digest(model: ModelSpec) -> str:
    """Digest of the code that builds the model: an installed package's version, or its own sources.

    Those are its top package, and every module beside it that they import (found without running them, so that what is
    imported by a computed name is not among them); of installed packages that they import, the versions.
    """
    module = model.factory.partition(":")[0]
    top = module.partition(".")[0]
    if top == "exporters":
        return ""
    source = find_source(module, model.search)
    if source is None:
        raise BadRequest(
            f"model '{model.name}': module '{module}' is not found", "give an importable package.module:factory"
        )
    if "site-packages" in source.parts:
        with suppress(KeyError, metadata.PackageNotFoundError):
            return f"{top} {metadata.version(_distributions()[top][0])}"
    own = set(source.rglob("*.py")) if source.is_dir() else {source}
    files, packages = _imported(module, [source.parent, *model.search])
    return _digest_files(sorted(own | files), packages)


def _imported(module: str, folders: Sequence[Path]) -> tuple[set[Path], list[str]]:
    """Files in these folders that a module imports, directly or by others, and installed packages with versions."""
    finder = ModuleFinder([str(f) for f in folders])
    # What cannot be imported or compiled fails when the worker calls the factory, with a better line.
    with suppress(ImportError, SyntaxError, ValueError):
        finder.import_hook(module)
    found = cast("Iterable[Any]", finder.modules.values())
    others = {name.partition(".")[0] for name in cast("Iterable[str]", finder.badmodules)}
    known = _distributions()
    versions = sorted(f"{d} {metadata.version(d)}" for name in others for d in set(known.get(name, ())))
    return {Path(m.__file__) for m in found if m.__file__ and m.__file__.endswith(".py")}, versions


@cache
def _distributions() -> Mapping[str, Sequence[str]]:
    """Top-level package -> distributions that brought it."""
    return metadata.packages_distributions()


def find_source(module: str, search: Iterable[Path]) -> Path | None:
    """The file of a top-level module, or the folder of a top-level package; nothing is imported."""
    top = module.partition(".")[0]
    for folder in search:
        for candidate in (folder / top, folder / f"{top}.py"):
            if (candidate / "__init__.py").is_file() or candidate.is_file():
                return candidate
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if found is None:
        return None
    if found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations)))
    return Path(found.origin) if found.origin and found.has_location else None  # not built in, not frozen


def _digest_files(paths: Sequence[Path], further: Sequence[str] = ()) -> str:
    total = hashlib.sha256("\n".join(further).encode())
    for path in paths:
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest()

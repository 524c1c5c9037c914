"""An engine file taken apart for trtexec and Triton, which refuse the header, and put together again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from exporters.artifact import digest
from exporters.errors import ArtifactError, BadRequest
from exporters.tensorrt.header import Engine, check_header, check_magic, engine_bytes, read_engine

# TensorRT's names of types -> those of a Triton model configuration (its model_configuration.md, "Datatypes").
TRITON = {
    "FLOAT": "TYPE_FP32",
    "HALF": "TYPE_FP16",
    "BF16": "TYPE_BF16",
    "INT8": "TYPE_INT8",
    "UINT8": "TYPE_UINT8",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "BOOL": "TYPE_BOOL",
}
SUFFIX = ".plan"


def strip(path: Path, target: Path) -> tuple[Path, Path]:
    """Writes the plan alone to `target`, and `target`.json with the header and the plan's digest: the manifest.

    Returns:
        Paths of the plan and of the manifest.

    Raises:
        ArtifactError: see `read_engine`; the file is a plain plan already.
        BadRequest: a file cannot be written.
    """
    engine = _with_header(path)
    plan = engine.plan()
    manifest = target.with_name(f"{target.name}.json")
    values = {"sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan), "header": engine.header}
    _write(target, plan)
    _write(manifest, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
    return target, manifest


def wrap(plan: Path, manifest: Path, target: Path) -> Path:
    """Writes the header of a manifest and its plan as one engine file: what `strip` undid.

    Raises:
        ArtifactError: the manifest cannot be read, the plan is not the one that it describes, or is none.
        BadRequest: the file cannot be written.
    """
    try:
        values: Any = json.loads(manifest.read_text(encoding="utf-8"))
        header, told = values["header"], str(values["sha256"])
        here = digest(plan)
    except OSError as error:
        raise ArtifactError(
            f"'{error.filename}' cannot be read ({error.strerror})", "name a plan with its manifest"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"'{manifest}' is no manifest of a plan ({type(error).__name__}: {error})", "name the one that strip wrote"
        ) from None
    check_header(header, str(manifest))
    if here != told:
        raise ArtifactError(
            f"'{plan}' is not the plan that '{manifest}' describes (SHA-256 {here[:12]}, expected {told[:12]})",
            "name the manifest that was written with it",
        )
    data = plan.read_bytes()
    check_magic(plan, data[:4])
    _write(target, engine_bytes(cast("dict[str, Any]", header), data))
    return target


def triton(path: Path, repository: Path, name: str) -> Path:
    """A model of Triton's repository: NAME/config.pbtxt and NAME/1/model.plan, with the manifest beside the plan.

    Returns:
        The configuration's path.

    Raises:
        ArtifactError: the header does not say which inputs and outputs the plan has (somebody else's engine).
        BadRequest: the folder cannot be written.
    """
    engine = _with_header(path)
    text = configuration(engine, name)
    folder = repository / name
    try:
        (folder / "1").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    strip(path, folder / "1" / f"model{SUFFIX}")
    _write(folder / "config.pbtxt", text.encode())
    return folder / "config.pbtxt"


def configuration(engine: Engine, name: str) -> str:
    """The text of config.pbtxt.

    Where the batch varies in every tensor, Triton batches up to the largest (`max_batch_size`) and shapes are told
    without it; where it is fixed, `max_batch_size` is 0 and shapes are told whole.
    """
    facts = engine.facts
    inputs, outputs = (cast("Sequence[Mapping[str, Any]]", facts.get(key, ())) for key in ("inputs", "outputs"))
    if not inputs or not outputs:
        raise ArtifactError(
            f"'{engine.path}' does not say which inputs and outputs its plan has", "export it with exportgate"
        )
    if str(facts.get("made_by", "")).startswith("TensorRT-RTX"):
        raise ArtifactError(
            f"'{engine.path}' was made by {facts['made_by']}, whose plans Triton's TensorRT backend does not load",
            "export it with TensorRT on a GPU",
        )
    batched = all(t["shape"] and t["shape"][0] == -1 for t in (*inputs, *outputs))
    largest = int((engine.header or {}).get("batch", 1)) if batched else 0
    lines = [f"name: {json.dumps(name)}", 'platform: "tensorrt_plan"', f"max_batch_size: {largest}"]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        entries: list[str] = []
        for tensor in tensors:
            dims = ", ".join(str(d) for d in tensor["shape"][1 if batched else 0 :])
            dtype = TRITON.get(str(tensor["dtype"]))
            if dtype is None:
                raise ArtifactError(
                    f"'{engine.path}': Triton has no type for {tensor['name']} ({tensor['dtype']})",
                    "serve it otherwise",
                )
            entries.append(f"  {{ name: {json.dumps(tensor['name'])} data_type: {dtype} dims: [ {dims} ] }}")
        lines += [f"{kind} [", ",\n".join(entries), "]"]
    return "\n".join(lines) + "\n"


def described(path: Path) -> list[str]:
    """Lines for people: what the file holds, without loading the plan."""
    engine = read_engine(path)
    plan = engine.plan()
    lines = [f"{path}: plan of {len(plan)} bytes, SHA-256 {hashlib.sha256(plan).hexdigest()}"]
    if engine.header is None:
        return [*lines, "no header: a plain plan"]
    lines += [f"{key}: {_printable(value)}" for key, value in engine.header.items() if key != "plan"]
    for key, value in engine.facts.items():
        if key in ("inputs", "outputs"):
            lines += [f"{key[:-1]} {_printable(t['name'])}: {_printable(t['dtype'])} {t['shape']}" for t in value]
        elif key == "network":
            lines += [f"network: {len(value)} convolutions and matrix products"] if value else []
        else:
            lines += [f"{key}: {_printable(value)}"] if value else []
    return lines


def _printable(value: Any) -> str:
    """A stranger's text, which may hold what a terminal obeys."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _with_header(path: Path) -> Engine:
    engine = read_engine(path)
    if engine.header is None:
        raise ArtifactError(f"'{path}' has no header: it is a plain plan already", "name an .engine file")
    return engine


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):  # what is no folder holds no file either
            temporary.unlink()


def _unwritable(path: Path, error: OSError) -> BadRequest:
    return BadRequest(f"'{path}' cannot be written ({error.strerror})", "name another place with --output")

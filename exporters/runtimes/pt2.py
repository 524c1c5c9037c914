"""A program of torch.export: its precision as the file says, and a session that runs its operators one by one."""
# pyright: reportUnknownMemberType=false
# (torch.export leaves types open)

from __future__ import annotations

import logging
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from exporters.artifact import Achieved, TensorInfo, main_precision
from exporters.errors import ArtifactError, FeedError, first_line
from exporters.metadata import Metadata, read_json
from exporters.runtimes.pt2_archive import AGAIN, PROGRAM, Pt2Archive
from exporters.runtimes.torch_module import TorchSession
from exporters.session import Array, Feeds
from exporters.spec import ExportSpec

CONFIG = "config.txt"  # the name that TorchScript's metadata have
# ATen's operators whose arithmetic decides a precision, as a program calls them.
HEAVY = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "convolution", "_convolution", "scaled_dot_product_attention"}
    | {f"conv{n}d" for n in (1, 2, 3)}
    | {f"conv_transpose{n}d" for n in (1, 2, 3)}
)
# Numbers of types that are no integers of sizes, as torch/_export/serde/schema.py has them.
TYPES = {1: "int8", 2: "int8", 6: "fp16", 7: "fp32", 8: "fp64", 13: "bf16"}
SIZES = {3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 13: 2}  # bytes of a value, of types that have more than one
FOLDERS = ("data/weights", "data/constants")
# What torch.export.load raises of a zip that is intact and holds something else than a program.
UNLOADABLE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, SyntaxError, ImportError),
    *(OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, RecursionError),
)


def signature(program: Any) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Inputs and outputs of an exported program; an axis that varies is named by its symbol."""
    told = program.graph_signature
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}

    def infos(names: tuple[str, ...]) -> Iterator[TensorInfo]:
        for name in names:
            value = nodes[name]
            shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
            yield TensorInfo(name, shape, str(value.dtype).removeprefix("torch."))

    return tuple(infos(told.user_inputs)), tuple(infos(told.user_outputs))


def _check_stored(archive: Pt2Archive) -> None:
    """Raises ArtifactError where a tensor's record is missing or too short: PyTorch takes an empty one for any."""
    for folder in FOLDERS:
        listed = _list_of(folder)
        told: dict[str, Any] = archive.read_json(listed) if listed in archive.names else {"config": {}}
        try:
            entries = cast("Mapping[str, dict[str, Any]]", told["config"])
            plain = {name: e for name, e in entries.items() if not e.get("use_pickle") and e.get("tensor_meta")}
            needed = [(n, f"{folder}/{e['path_name']}", _bytes(e["tensor_meta"])) for n, e in plain.items()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"'{listed}' is no list of tensors ({type(error).__name__}: {first_line(error)})"
            raise ArtifactError(f"'{archive.path}': {what}", AGAIN) from None
        for name, record, least in needed:
            if archive.size(record) < least:
                what = f"tensor '{name}' needs {least} bytes, and '{record}' has {archive.size(record)}"
                raise ArtifactError(f"'{archive.path}': {what}", AGAIN)


def _list_of(folder: str) -> str:
    """The record that lists a folder's tensors."""
    return f"{folder}/model_{folder.rpartition('/')[2]}_config.json"


def _bytes(meta: Mapping[str, Any]) -> int:
    """Bytes that a tensor's record has at least."""
    sizes, strides = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
    reach = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1 if all(sizes) else 0
    return (reach + int(meta["storage_offset"]["as_int"]) * bool(reach)) * SIZES.get(int(meta["dtype"]), 1)


class _Heard(logging.Handler):
    """Keeps the exception that torch.export logs, and raises another one in the place of."""

    def __init__(self) -> None:
        super().__init__()
        self.cause: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.cause = (record.exc_info[1] if record.exc_info else None) or self.cause

    def __enter__(self) -> None:
        logging.getLogger("torch.export").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("torch.export").removeHandler(self)


class ProgramSession(TorchSession):
    """A loaded program, run by PyTorch eagerly. Names and shapes are those in the file."""

    runtime = "eager"

    def __init__(self, path: Path, spec: ExportSpec, device: str) -> None:
        self.archive = Pt2Archive.open(path, "pt2")
        _check_stored(self.archive)
        heard = _Heard()
        try:
            with warnings.catch_warnings(), heard:
                warnings.simplefilter("ignore")
                program: Any = torch.export.load(str(path))
                if any(str(t.device) != device for t in program.state_dict.values()) or device != "cpu":
                    from torch.export.passes import move_to_device_pass

                    program = move_to_device_pass(program, device)
                inputs, outputs = signature(program)
                self.call = program.module()
        except UNLOADABLE as error:
            told = first_line(heard.cause or error)
            raise ArtifactError(f"'{path}' cannot be loaded by torch.export ({told})", AGAIN) from None
        axes = {i.name: i.shape for i in spec.model.inputs}
        self.inputs = tuple(
            TensorInfo(i.name, tuple(_axis(d, n, axes.get(i.name, ())) for n, d in enumerate(i.shape)), i.dtype)
            for i in inputs
        )
        try:
            self.begin(spec, device, [o.name for o in outputs])
        except (AssertionError, RuntimeError, LookupError, TypeError) as error:
            wanted = ", ".join(f"{i.name} {i.dtype} {list(i.shape)}" for i in self.inputs)
            taken = {i.name: i.dtype for i in spec.model.inputs}
            same = all(taken.get(i.name, i.dtype) == i.dtype for i in self.inputs)
            fix = "ask for the batch and image size that it was exported for" if same else AGAIN
            raise ArtifactError(f"'{path}' does not run on {wanted} ({first_line(error)})", fix) from None
        self.outputs = tuple(
            TensorInfo(o.name, tuple(_axis(d, n, ()) for n, d in enumerate(o.shape)), o.dtype) for o in outputs
        )

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        try:
            return super()._run(feeds)
        except (AssertionError, RuntimeError) as error:
            line = first_line(error)
            if not line.startswith(("Guard failed", "Expected input")):
                raise
            got = ", ".join(f"{k} {list(v.shape)}" for k, v in feeds.items())
            raise FeedError(
                f"the program refuses {got}: expected what it was exported for ({line})", "feed such a shape"
            ) from None

    def metadata(self) -> Metadata:
        if f"extra/{CONFIG}" not in self.archive.names:
            raise ArtifactError(f"'{self.archive.path}' holds no metadata (extra/{CONFIG})", AGAIN)
        return read_json(self.archive.read(f"extra/{CONFIG}").decode(errors="replace"), str(self.archive.path))


def _axis(size: int | str, number: int, axes: tuple[int | str, ...]) -> int | str:
    """A size, or the name of an axis that varies."""
    if isinstance(size, int):
        return size
    known = axes[number] if number < len(axes) else None
    return known if isinstance(known, str) else f"axis{number}"


def read_precision(path: Path) -> Achieved:
    """Each convolution and matrix product by the types of its tensors, from the program's JSON: nothing is loaded.

    What a program says of its parameters and what is stored of them are two things: those are asked of the weights'
    own list. An operator whose tensors have several types is counted as such.
    """
    archive = Pt2Archive.open(path, "pt2")
    try:
        return _precision(archive)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ArtifactError(f"'{path}': '{PROGRAM}' is no program of torch.export ({why})", AGAIN) from None


def _precision(archive: Pt2Archive) -> Achieved:
    module = archive.read_json(PROGRAM)["graph_module"]
    graph = module["graph"]
    kinds = {name: _kind(meta) for name, meta in cast("Mapping[str, Any]", graph["tensor_values"]).items()}
    kinds |= _stored(archive, module["signature"]["input_specs"])
    counts: Counter[str] = Counter()
    operators: dict[str, str] = {}
    for node in graph["nodes"]:
        word = str(node["target"]).removeprefix("torch.ops.aten.").partition(".")[0]
        if str(node["target"]).startswith("torch.ops.aten.") and word in HEAVY:
            tensors = [i["arg"]["as_tensor"]["name"] for i in node["inputs"] if "as_tensor" in i["arg"]]
            kind = " and ".join(sorted({kinds[t] for t in tensors if t in kinds}))
            # "L__self__model.0.conv,model.0.conv,torch.nn.modules.conv.Conv2d", the innermost module last
            where = str(node["metadata"].get("nn_module_stack", "")).rpartition(";")[2].split(",")
            operators[f"{where[1] if len(where) > 1 else ''}/{node['outputs'][0]['as_tensor']['name']}"] = kind
            counts[f"operators {kind}"] += 1
    if not operators:
        counts.update(f"values {k}" for k in kinds.values() if k)
    main = main_precision(Counter(operators.values() if operators else kinds.values()))
    return Achieved(main, dict(counts), tuple(sorted(n for n, k in operators.items() if k != main)))


def _kind(meta: Mapping[str, Any]) -> str:
    number = int(meta["dtype"])
    return TYPES.get(number, f"type {number}")


def _stored(archive: Pt2Archive, specs: list[dict[str, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """(name in the graph, type in the file) of parameters, buffers and constants."""
    found: dict[str, Any] = {}
    for folder in FOLDERS:
        name = _list_of(folder)
        found |= archive.read_json(name)["config"] if name in archive.names else {}
    for entry in specs:
        for kind, told in entry.items():
            meta = found.get(told.get(f"{kind}_name", ""), {}).get("tensor_meta")
            if meta:
                yield told["arg"]["name"], _kind(meta)

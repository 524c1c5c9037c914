"""The options, one and the same for pytest and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters import formats, toolchain
from exporters.errors import BadRequest
from exporters.spec import ExportSpec, user_path
from suites.support.cases import Case, Selection, parse_budget
from suites.support.config import Project

if TYPE_CHECKING:  # the command line reads the tables below without waiting for pytest
    import pytest

# (option, keyword arguments): those that become fields of a request carry their field's name as dest.
REQUEST: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--imgsz", {"metavar": "N[,N]", "help": "image size in pixels: one number, or height,width"}),
    ("--batch", {"metavar": "N", "help": "batch size"}),
    ("--dynamic", {"action": "store_true", "default": None, "help": "batch, height and width may vary"}),
    ("--device", {"metavar": "D", "help": "cpu (default), cuda, or a GPU's number"}),
    (
        "--no-simplify",
        {"action": "store_false", "default": None, "dest": "simplify", "help": "leave the ONNX graph as it was traced"},
    ),
    ("--opset", {"metavar": "N", "help": "ONNX operator set, 17 to 20"}),
    ("--optimize", {"action": "store_true", "default": None, "help": "TorchScript for mobile CPUs"}),
    (
        "--data",
        {"metavar": "SET", "help": "calibration set for INT8: data set YAML, folder of images, or module:factory"},
    ),
    ("--split", {"metavar": "NAME", "help": "split of the data set (default val)"}),
    ("--fraction", {"metavar": "F", "help": "share of the data set, above 0 to 1"}),
    (
        "--calibrator",
        {"metavar": "NAME", "help": "INT8: how ranges are taken: max (default), entropy or percentile"},
    ),
    (
        "--keep",
        {"metavar": "LIST", "help": "INT8: modules that stay in floating point, as in model.0.conv,model.22.cv3"},
    ),
    ("--nms", {"action": "store_true", "default": None, "help": "suppress a detector's anchors in the graph"}),
    ("--conf", {"metavar": "F", "help": "with --nms: score from which detections count (default 0.25)"}),
    ("--iou", {"metavar": "F", "help": "with --nms: overlap above which one is suppressed (default 0.7)"}),
    ("--max-det", {"metavar": "N", "help": "with --nms: detections of a picture (default 300)"}),
    (
        "--agnostic-nms",
        {
            "action": "store_true",
            "default": None,
            "help": "with --nms: detections of other classes are suppressed, too",
        },
    ),
    (
        "--palettize",
        {"action": "store_true", "default": None, "help": "Core ML INT8: weights as indices of tables of 256 values"},
    ),
    (
        "--quantization",
        {
            "metavar": "WHAT",
            "help": "TFLite INT8: dynamic (weights, default), integer, or full_integer (inputs, outputs)",
        },
    ),
    ("--keras", {"action": "store_true", "default": None, "help": "SavedModel: one that Keras 2 loads as a model"}),
    ("--workspace", {"metavar": "GIB", "help": "TensorRT: memory for the builder's tactics in GiB (default 4)"}),
    (
        "--profiles",
        {"metavar": "LIST", "help": "TensorRT: min:opt:max of a dynamic engine, each batch x height x width"},
    ),
    ("--builder-level", {"metavar": "N", "help": "TensorRT: builder optimization level, 0 to 5 (default 3)"}),
    ("--timing-cache", {"metavar": "FILE", "help": "TensorRT: timing cache to begin with, or off"}),
    (
        "--hardware-compatibility",
        {"metavar": "LEVEL", "help": "TensorRT: none (default), ampere_plus or same_compute_capability"},
    ),
    (
        "--version-compatible",
        {"action": "store_true", "default": None, "help": "TensorRT: an engine that later versions run, too"},
    ),
    ("--refit", {"action": "store_true", "default": None, "help": "TensorRT: an engine whose weights can be replaced"}),
    ("--dla", {"metavar": "CORE", "help": "TensorRT: number of a DLA core"}),
    (
        "--trt-quant-algo",
        {"metavar": "NAME", "help": "TensorRT 8.6 to 10: calibrator of implicit INT8, as ENTROPY_CALIBRATION_2"},
    ),
    ("--calibration-cache", {"metavar": "FILE", "help": "TensorRT 8.6 to 10: scales that another export left"}),
    ("--compute-capability", {"metavar": "LIST", "help": "TensorRT-RTX: GPUs to build for, as in 8.6,8.9,12.0"}),
    (
        "--toolchain-log",  # the contract's verbose; pytest has an option of that name
        {
            "action": "store_true",
            "default": None,
            "help": "keep the toolchain's own full log beside the artifact",
        },
    ),
)


def dest(name: str, settings: Mapping[str, Any]) -> str:
    """Under which name an option's value is found after parsing."""
    return str(settings.get("dest", name[2:].replace("-", "_")))


# Field of a request -> where its option's value is found. They differ in one: pytest has a --verbose of its own.
REQUEST_FIELDS: Mapping[str, str] = {
    {"toolchain_log": "verbose"}.get(dest(n, s), dest(n, s)): dest(n, s) for n, s in REQUEST
}
MATRIX: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--format", {"metavar": "LIST", "help": "formats, comma-separated: onnx,torchscript"}),
    ("--precision", {"metavar": "LIST", "help": "precisions, comma-separated: fp32,fp16,int8"}),
    ("--half", {"action": "store_true", "help": "the same as --precision fp16"}),
    ("--int8", {"action": "store_true", "help": "the same as --precision int8"}),
    ("--task", {"metavar": "TASK", "help": "the model's task, where its file does not say"}),
    (
        "--project",
        {"metavar": "DIR", "help": "folder with an exportgate.toml (default: this folder's, else exportgate's own)"},
    ),
)
RUN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--report", {"metavar": "DIR", "help": "where the run record and the reports go (default reports/runs/<run>)"}),
    ("--release", {"action": "store_true", "help": "every must-pass claim needs PASS or a valid waiver"}),
    (
        "--json",
        {"action": "store_true", "help": "print the report as JSON (exportgate: and all else to standard error)"},
    ),
    (
        "--evaluate",
        {
            "metavar": "SET",
            "help": "data that accuracy is judged on: data set YAML with labels, folder of images, or module:factory",
        },
    ),
    (
        "--int8-budget",
        {
            "metavar": "SHARE",
            "help": "INT8: leave as few modules in FP16 as this share of the FP32 metric needs, as in 0.99",
        },
    ),
    ("--claim", {"metavar": "TEST", "help": "judge this claim alone"}),
    ("--replicates", {"metavar": "N", "help": "processes of each latency measurement (default [latency] processes)"}),
    ("--exports", {"metavar": "N", "help": "make N artifacts at a time before the first claim (default: one a GPU)"}),
    ("--in-process", {"action": "store_true", "help": "export and run in this process, for a debugger"}),
    ("--tracebacks", {"action": "store_true", "help": "show tracebacks of failed claims"}),
)


# Of `exportgate compare`.
UPGRADE: tuple[str, dict[str, Any]] = (
    "--toolchain",
    {
        "nargs": 2,
        "metavar": ("OLD", "NEW"),
        "help": "folders of two environments: NEW's exports are judged, and held against OLD's, measured in turns",
    },
)


def environments_of(config: pytest.Config, cases: Sequence[Case]) -> tuple[Path | None, Path | None]:
    """The environments of an upgrade, old and new; None where none is judged.

    Raises:
        BadRequest: it is a release, a file was brought, or both are one.
        ToolchainMissing: one is no environment, or lacks a package that a case needs.
    """
    if not (given := config.getoption("toolchain")):
        return None, None
    old, new = (Path(p).expanduser().absolute() for p in given)
    other = next((o for o in ("release", "artifact", "in_process") if config.getoption(o)), None)
    if other:
        raise BadRequest(f"--toolchain with --{other.replace('_', '-')}", "leave one of them out")
    # Links to a folder are followed, and not those inside: interpreters of two environments are links to one.
    if old.resolve() == new.resolve():
        raise BadRequest(
            f"--toolchain names '{old}' twice" + (f", the second time as '{new}'" if old != new else ""),
            "name the environment before and the one after",
        )
    for folder in (old, new):
        for name in sorted({formats.get(c.spec.format).chain(c.spec.device) for c in cases} - {"pytorch"}):
            toolchain.resolve_in(name, folder)
    return old, new


def request_words(spec: ExportSpec) -> list[str]:
    """The options of a request as a user types them, but for format, precision and device."""
    words: list[str] = []
    for field, (name, _) in zip(REQUEST_FIELDS, REQUEST, strict=True):
        value = getattr(spec, field)
        if field == "imgsz":
            words += [name, ",".join(map(str, value))] if spec.model.has_images else []
        elif field == "device" or field not in spec.changed():
            continue
        elif isinstance(value, bool):
            words += [name]
        elif field == "keep":
            words += [name, ",".join(value)]
        elif field == "profiles":
            words += [name, ",".join(":".join("x".join(map(str, s)) for s in p) for p in value)]
        else:
            words += [name, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def add_options(parser: pytest.Parser) -> None:
    """Adds the options to pytest's own."""
    group = parser.getgroup("exportgate", "exportgate: what is judged")
    group.addoption(
        "--model",
        metavar="MODEL",
        help="a checkpoint, or a model of exportgate.toml; without it the project's matrix is judged",
    )
    group.addoption(
        "--artifact",
        metavar="PATH",
        help="judge this file or folder, which somebody else's exporter made (with --model)",
    )
    group.addoption(
        "--trust", action="store_true", help="load a brought artifact although loading it runs code that is in it"
    )
    for name, arguments in (*MATRIX, *REQUEST, *RUN, UPGRADE):
        group.addoption(name, **arguments)


def with_replicates(project: Project, text: str) -> Project:
    """The project with another number of processes for each latency measurement.

    Raises:
        BadRequest: no whole number from 1.
    """
    processes = count_of("replicates", text)
    return replace(project, latency={k: replace(v, processes=processes) for k, v in project.latency.items()})


def count_of(option: str, text: str) -> int:
    """A number of processes.

    Raises:
        BadRequest: no whole number from 1.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise BadRequest(f"{option} '{text}' is no number of processes", "give a whole number from 1")
    return int(text)


def refuse_empty(values: Mapping[str, Any]) -> None:
    """An empty text is a shell variable that was not set: to take the default then would judge something else.

    Raises:
        BadRequest: names the first one.
    """
    empty = next((k for k, v in values.items() if v == ""), None)
    if empty is not None:
        raise BadRequest(f"{empty} is given and empty", "give a value, or leave it out")


def names_in(option: str, text: str) -> tuple[str, ...]:
    """The names in a comma-separated list.

    Raises:
        BadRequest: there is none.
    """
    names = tuple(w.strip() for w in text.split(",") if w.strip())
    if not names:
        raise BadRequest(f"--{option} '{text}' has no name in it", "give one or more, comma-separated")
    return names


def selection_of(config: pytest.Config, project: Project) -> Selection:
    """What the options ask for.

    Raises:
        BadRequest: options that exclude each other.
    """

    refuse_empty(
        {
            k: config.getoption(k)
            for k in ("model", "artifact", "report", "project", "task", "evaluate", *REQUEST_FIELDS.values())
        }
    )

    def words(name: str) -> tuple[str, ...]:
        text = config.getoption(name)
        return names_in(name, text) if text is not None else ()

    precisions = (
        words("precision")
        + (("fp16",) if config.getoption("half") else ())
        + (("int8",) if config.getoption("int8") else ())
    )
    if (config.getoption("half") or config.getoption("int8")) and len(set(precisions)) > 1:
        raise BadRequest(
            "two precisions are asked for: " + ", ".join(dict.fromkeys(precisions)),
            "ask for them with --precision fp16,int8 alone",
        )
    options = {k: config.getoption(v) for k, v in REQUEST_FIELDS.items() if config.getoption(v) is not None}
    selection = Selection(
        config.getoption("model") or "",
        words("format"),
        precisions,
        options,
        config.getoption("task") or "",
        config.getoption("evaluate") or "",
        parse_budget(config.getoption("int8_budget"), "int8-budget"),
    )
    path = brought_path(config)
    if path is not None:
        if not selection.model:
            raise BadRequest(f"artifact '{path}' is to be judged without a model to compare with", "add --model")
        return _for_artifact(selection, path)
    return selection


def brought_path(config: pytest.Config) -> Path | None:
    """The artifact that `--artifact` names."""
    text = config.getoption("artifact")
    return user_path(text).resolve() if text else None


def _for_artifact(selection: Selection, path: Path) -> Selection:
    """The format from the file's suffix where none was named; exactly one case can be judged."""
    chosen = selection.formats
    if not chosen:
        fitting = [f for f in formats.registry().values() if path.name.lower().endswith(f.suffix)]
        longest = max((len(f.suffix) for f in fitting), default=0)  # x_aotinductor.pt2 ends in .pt2, too
        chosen = tuple(f.id for f in fitting if len(f.suffix) == longest)
        if not chosen:
            folder = path.parent.name.lower()
            whole = next((f for f in formats.registry().values() if folder.endswith(f.suffix)), None)
            fix = f"name its folder {path.parent}, which is {whole.title}" if whole else "name its format with --format"
            raise BadRequest(f"artifact '{path}' has a suffix that no format has", fix)
    if len(chosen) > 1 or len(selection.precisions) > 1:
        raise BadRequest(
            f"artifact '{path}' is one artifact, and several formats or precisions are asked for", "name one of each"
        )
    if not path.exists():
        raise BadRequest(f"artifact '{path}' does not exist", "give the path of a file or folder that an exporter made")
    return replace(selection, formats=chosen)

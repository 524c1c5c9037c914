"""Cases: model x ExportSpec x runtime x device. A case's id keys tests, baselines, waivers and reports."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from exporters import formats, toolchain
from exporters.cuda.nvml import gpu_facts
from exporters.errors import BadRequest, NotSupported, ToolchainMissing
from exporters.formats import Runtime
from exporters.models.catalog import from_checkpoint, from_table, locate, parse_evaluate
from exporters.models.spec import ModelSpec, named_pictures
from exporters.spec import (
    CALIBRATED,
    EIGHT_BITS,
    ExportSpec,
    Precision,
    is_factory,
    parse_device,
    parse_share,
    request,
    user_path,
)
from suites.support.config import Project

MAIN = ("pytorch", "torchscript", "onnx", "engine")  # formats of the main job; others have a job of their own


@dataclass(frozen=True)
class Case:
    """One cell of the matrix. `because` says why it is not supported, `missing` which package or file is not here.

    `no_values` is why its outputs are not compared with PyTorch's (random weights, say), or "". `budget` is the share
    of the FP32 metric that INT8 has to keep, for which the modules that stay in floating point are searched.
    """

    spec: ExportSpec
    runtime: Runtime
    because: str = ""
    missing: str = ""
    no_values: str = ""
    budget: float = 0.0

    @property
    def id(self) -> str:
        """`yolov8n-onnx-fp16-ort-cpu`, and every option that is not the default appended in order (`.b8.dyn`)."""
        spec = self.spec
        parts = [spec.model.name, spec.format, spec.precision.value, self.runtime.id, self.runtime.device]
        options = _options(spec) + ([f"budget{self.budget:g}"] if self.budget else [])
        return "-".join(parts) + "".join("." + o for o in options)

    def sibling(self, precision: Precision) -> str:
        """Id of the case that differs from this one in its precision alone (and what calibrates it)."""
        plain = {f: getattr(ExportSpec, f) for f in EIGHT_BITS}
        return replace(self, spec=self.spec.but(precision=precision, **plain), budget=0.0).id

    @property
    def marks(self) -> tuple[str, ...]:
        told = {
            "cuda": self.runtime.device == "cuda",
            "trt": "trt" in self.runtime.id.split("-"),
            "formats": self.spec.format not in MAIN,
        }
        return tuple(mark for mark, holds in told.items() if holds)

    @property
    def device(self) -> str:
        return self.spec.device if self.runtime.device == "cuda" else "cpu"

    def command(
        self,
        claim: str,
        model: str,
        artifact: Path | None = None,
        project: Path | None = None,
        evaluate: str = "",
        environments: Sequence[Path] = (),
    ) -> str:
        """The command that judges one claim of this case alone; `model` is a name of the project's, or a checkpoint.

        Of an artifact that was brought, in a project that was named, on data and with environments that were, it says
        so.
        """
        from suites.options import request_words  # which imports this module

        spec = self.spec
        start = ["check", _quoted(str(artifact)), "--model"] if artifact is not None else ["qualify"]
        start = ["compare", "--toolchain", *(_quoted(str(e)) for e in environments)] if environments else start
        words = ["exportgate", *start, _quoted(model), "--format", spec.format, "--precision", spec.precision.value]
        words += ["--trust"] if artifact is not None and formats.get(spec.format).is_code else []
        words += ["--project", _quoted(str(project))] if project is not None else []
        words += ["--evaluate", _quoted(evaluate)] if evaluate else []
        words += ["--int8-budget", f"{self.budget:g}"] if self.budget else []
        words += [_quoted(w) for w in request_words(spec)]
        words += ["--device", self.device] if self.device != "cpu" else []
        return " ".join(words) + f" --claim {claim}"


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _options(spec: ExportSpec) -> list[str]:
    """Options that differ from the defaults, as short words."""
    words: list[str] = []
    if spec.imgsz != spec.model.imgsz and spec.model.has_images:
        words.append(f"{spec.imgsz[0]}x{spec.imgsz[1]}")
    words += [f"b{spec.batch}"] if spec.batch != 1 else []
    words += ["dyn"] if spec.dynamic else []
    words += ["opt"] if spec.optimize else []
    words += ["raw"] if not spec.simplify else []
    words += [f"op{spec.opset}"] if "opset" in spec.changed() else []
    words += (
        [f"cal-{spec.data.rpartition(':')[2] if is_factory(spec.data) else Path(spec.data).stem}"] if spec.data else []
    )
    words += [spec.split] if spec.split != "val" else []
    words += [f"f{spec.fraction:g}"] if spec.fraction != 1.0 else []
    words += [spec.calibrator] if "calibrator" in spec.changed() else []
    words += [f"keep{len(spec.keep)}-{zlib.crc32(','.join(spec.keep).encode()):08x}"] if spec.keep else []
    words += ["nms"] if spec.nms else []
    words += [f"conf{spec.conf:g}"] if "conf" in spec.changed() else []
    words += [f"iou{spec.iou:g}"] if "iou" in spec.changed() else []
    words += [f"max{spec.max_det}"] if "max_det" in spec.changed() else []
    words += ["agnostic"] if spec.agnostic_nms else []
    words += ["pal"] if spec.palettize else []
    words += [spec.quantization.replace("_", "")] if "quantization" in spec.changed() else []
    words += ["keras"] if spec.keras else []
    words += [f"ws{spec.workspace:g}"] if "workspace" in spec.changed() else []
    words += ["-".join("x".join(map(str, shape)) for shape in profile) for profile in spec.profiles]
    words += [f"level{spec.builder_level}"] if "builder_level" in spec.changed() else []
    words += ["cold" if spec.timing_cache == "off" else "timed"] if spec.timing_cache else []
    words += [spec.hardware_compatibility] if "hardware_compatibility" in spec.changed() else []
    words += ["vc"] if spec.version_compatible else []
    words += ["refit"] if spec.refit else []
    words += [f"dla{spec.dla}"] if spec.dla is not None else []
    algorithm = spec.trt_quant_algo.removesuffix("_CALIBRATION").lower()
    words += ["implicit" if algorithm == "entropy_calibration_2" else f"implicit-{algorithm}"] if algorithm else []
    words += ["scales"] if spec.calibration_cache else []
    words += [f"sm{spec.compute_capability.replace(',', '-')}"] if spec.compute_capability else []
    return words


@dataclass(frozen=True)
class Selection:
    """What the options of a run ask for; empty means the project's matrix."""

    model: str = ""
    formats: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    options: Mapping[str, Any] = ()  # type: ignore[assignment]  # of exporters.spec.request, from the command line
    task: str = ""
    evaluate: str = ""
    int8_budget: float = 0.0


def matrix(project: Project, selection: Selection) -> list[Case]:
    """The cases of a run, in order. No cell is filtered out silently: what cannot be done is a case with `because`.

    Raises:
        BadRequest: a name, file or value that cannot be used; two cases with one id; nothing that can be asked for.
    """
    chosen_formats = [formats.canonical(f) for f in selection.formats]
    chosen_precisions = [Precision.parse(p) for p in selection.precisions]
    cases = (
        _asked(project, selection, chosen_formats, chosen_precisions)
        if selection.model
        else _own(project, selection, chosen_formats, chosen_precisions)
    )
    if project.tolerances and (not selection.model or set(project.models) == {selection.model}):
        own = cases if selection == Selection() else _own(project, Selection(), [], [])
        # Without a matrix of its own any precision may be asked for another time.
        _check_precisions(project, [*own, *cases] if own else [])
    unused = next((k for k in EIGHT_BITS if k in dict(selection.options)), None)
    if unused and not any(c.spec.precision in CALIBRATED for c in cases):
        raise BadRequest(
            f"option '{unused}' is given and no case is INT8 or FP8", "leave it out, or add --precision int8"
        )
    if selection.int8_budget and not any(c.budget for c in cases):
        raise BadRequest(
            f"int8-budget {selection.int8_budget:g} is given and no case is INT8",
            "leave it out, or add --precision int8",
        )
    seen: dict[str, Case] = {}
    for case in cases:
        if case.id in seen:
            raise BadRequest(f"two cases have the id {case.id}", "remove one of them from the matrix")
        seen[case.id] = case
    return list(seen.values())


def find_model(project: Project, selection: Selection) -> ModelSpec:
    """The model that `--model` names: one of the project's, or a checkpoint's path."""
    model = _evaluated(_named(project, selection), selection)
    return model if model.search else replace(model, search=(project.folder,))


def _evaluated(model: ModelSpec, selection: Selection) -> ModelSpec:
    """The model with the data that `--evaluate` names."""
    if not selection.evaluate:
        return model
    return replace(model, evaluate=parse_evaluate(selection.evaluate, Path.cwd(), "evaluate"))


def _named(project: Project, selection: Selection) -> ModelSpec:
    if selection.model in project.models:
        return from_table(selection.model, project.models[selection.model], project.folder)
    if selection.model.startswith("package:"):
        return from_checkpoint(locate(selection.model, project.folder), task=selection.task)
    path = user_path(selection.model)
    if not path.exists() and project.models and "/" not in selection.model and not path.suffix:
        raise BadRequest(
            f"model '{selection.model}' is neither a file nor one of the project's",
            "models: " + ", ".join(project.models),
        )
    return from_checkpoint(path, task=selection.task)


def _asked(
    project: Project, selection: Selection, chosen: Sequence[str], precisions: Sequence[Precision]
) -> list[Case]:
    """format x precision of one model, with the same options for all."""
    model = find_model(project, selection)
    if set(project.models) <= {selection.model}:  # else a group may be another model's
        _check_groups(project, [model])
    chosen = chosen or [f for f in project.matrix.get("formats", sorted(formats.registry()))]
    wanted = precisions or [Precision.FP32]
    if not any(p in formats.get(f).precisions for f in chosen for p in wanted):
        raise BadRequest(
            f"precision {', '.join(wanted)} is not one of {', '.join(chosen)}",
            "; ".join(f"{f} has {', '.join(formats.get(f).precisions)}" for f in chosen),
        )
    cells = [(f, p) for f in dict.fromkeys(chosen) for p in dict.fromkeys(wanted)]
    cases = [case for f, p in cells for case in _cases(model, f, p, selection.options, len(chosen) > 1)]
    cases = [_budgeted(case, selection.int8_budget) for case in cases]
    if cases and all(case.because for case in cases):
        raise BadRequest(cases[0].because, "ask for another combination; 'exportgate formats' lists them")
    return cases


OF_THE_ROW = ("format", "precision", "model", "no_values", "int8_budget")  # keys that are no options of a request


def parse_budget(value: Any, name: str) -> float:
    """A share of the metric, in (0, 1]; 0 where none is given."""
    share = parse_share(0.0 if value is None else value, name)
    if value is not None and not share:
        raise BadRequest(f"{name} '{value}' asks for nothing", "leave it out, or give the share to be kept, 0.99 say")
    return share


def _budgeted(case: Case, budget: float) -> Case:
    """The case with the budget, which INT8 alone has.

    Raises:
        BadRequest: the request says what the search is to find, or the model has no pictures to search on.
    """
    if not budget or case.spec.precision is not Precision.INT8:
        return case
    chosen = next((k for k in ("calibrator", "keep", "trt_quant_algo") if k in case.spec.changed()), None)
    if chosen is not None:
        raise BadRequest(
            f"int8-budget {budget:g} with {chosen}: the search chooses calibrator and modules itself",
            "leave one of them out",
        )
    if "calibrator" not in formats.get(case.spec.format).options:
        raise BadRequest(
            f"int8-budget {budget:g} with format {case.spec.format}: the search tries calibrators, and it has none",
            "leave it out, or search in onnx or engine",
        )
    if not named_pictures(case.spec.model):
        raise BadRequest(
            f"int8-budget {budget:g}: model '{case.spec.model.name}' has no pictures to judge it on",
            "name them with --evaluate, or with evaluate in its table",
        )
    return replace(case, budget=budget)


def _cases(
    model: ModelSpec, format_id: str, precision: Precision, options: Mapping[str, Any], several: bool
) -> Iterable[Case]:
    """A cell's cases, one for each runtime on the device that is asked for."""
    entry = formats.get(format_id)
    given = dict(options)
    if precision not in CALIBRATED:
        given = {k: v for k, v in given.items() if k not in EIGHT_BITS}
    device = parse_device(given.get("device", "cpu"))
    kind = device.split(":")[0]
    if several:  # an option that one of several formats does not take is meant for the others
        given = {k: v for k, v in given.items() if k in entry.options | {"imgsz"}}
    because = ""
    try:
        spec = request(model, format_id, precision=precision.value, **given)
    except NotSupported as error:
        because = error.what
        plain = {k: v for k, v in given.items() if k in ("imgsz", "device")}
        spec = request(model, format_id, **plain).but(precision=precision, **_parsed(given))
    runtimes = [r for r in entry.runtimes if r.device == kind]
    if not runtimes:
        return [Case(spec, Runtime("none", kind, ()), because or f"{entry.title} has no runtime on {kind}")]
    missing = missing_gpu(device)
    lacks = what_is_missing(entry, kind) if missing else ""  # where there is a GPU, the export says so
    missing = "; ".join(m for m in (missing, lacks) if m)
    return [Case(spec, r, because, missing) for r in runtimes]


def missing_gpu(device: str) -> str:
    """Why this device cannot be used here, or ""."""
    if device == "cpu" or gpu_facts(device):
        return ""
    number = device.partition(":")[2]
    return f"there is no NVIDIA GPU {number} here, or no driver for it (nvidia-smi shows what there is)"


def what_is_missing(entry: formats.Format, device: str, runtime: Runtime | None = None) -> str:
    """What a format's toolchain lacks here, or the runtime (default: its first on this device), or ""."""
    try:
        toolchain.resolve(entry.chain(device))
        entry.needs()
        runtime = runtime or next((r for r in entry.runtimes if r.device == device.partition(":")[0]), None)
        if runtime is not None:
            runtime.needs()
    except ToolchainMissing as error:
        return str(error)
    return ""


def _parsed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The switches of a request that was not supported, so that its case's id still says them."""
    return {k: given[k] for k in ("dynamic", "optimize", "simplify") if given.get(k) is not None}


def _own(project: Project, selection: Selection, chosen: Sequence[str], precisions: Sequence[Precision]) -> list[Case]:
    """The project's matrix: [matrix] formats x precisions, and every [[matrix.also]]; options narrow or change it."""
    table = project.matrix
    names: list[str] = table.get("models", list(project.models))
    also = [r for entry in table.get("also", []) for r in _spread(entry)]
    stray = next((r["model"] for r in also if "model" in r and r["model"] not in names), None)
    if stray is not None:
        raise BadRequest(
            f"exportgate.toml [[matrix.also]]: model '{stray}' is not one of the matrix",
            "models: " + (", ".join(names) or "none"),
        )
    cases: list[Case] = []
    models: list[ModelSpec] = []
    for name in names:
        if name not in project.models:
            raise BadRequest(
                f"exportgate.toml [matrix]: model '{name}' has no [models.{name}]", "add the table, or correct the name"
            )
        missing = ""
        try:
            model = _evaluated(from_table(name, project.models[name], project.folder), selection)
        except ToolchainMissing as error:
            missing = str(error)
            model = ModelSpec(name, "exporters.models.yolov8:build", imgsz=(640, 640), stride=32)
        models.append(model)
        rows: list[dict[str, Any]] = [
            {"format": f, "precision": p, **table.get("options", {})}
            for f in table.get("formats", [])
            for p in table.get("precisions", ["fp32"])
        ]
        rows += [r for r in also if r.get("model", name) == name]
        for row in rows:
            options = {k: v for k, v in row.items() if k not in OF_THE_ROW} | dict(selection.options)
            format_id, precision = (
                formats.canonical(str(row.get("format", ""))),
                Precision.parse(row.get("precision", "fp32")),
            )
            if (chosen and format_id not in chosen) or (precisions and precision not in precisions):
                continue
            made = _cases(model, format_id, precision, options, bool(selection.options))
            no_values = str(row.get("no_values", ""))
            budget = selection.int8_budget or parse_budget(row.get("int8_budget"), "exportgate.toml int8_budget")
            cases += [_budgeted(replace(c, missing=missing or c.missing, no_values=no_values), budget) for c in made]
    _check_groups(project, models)
    return list({c.id: c for c in cases}.values()) if selection.options else cases


def _spread(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of a row that gives lists: precision = ["fp32", "fp16"], batch = [1, 8]."""
    keys = [k for k in ("model", "format", "precision", "batch") if isinstance(row.get(k), list)]
    return [{**row, **dict(zip(keys, values, strict=True))} for values in product(*(row[k] for k in keys))]


def _check_groups(project: Project, models: Sequence[ModelSpec]) -> None:
    """A tolerance for a group that no output of these models has would never be used."""
    groups = {n for m in models for o in m.outputs for g in o.groups for n in (g.name, g.kind)}
    for tolerance in project.tolerances if groups else ():
        if tolerance["group"] not in groups:
            raise BadRequest(
                f"exportgate.toml [[tolerances]]: no output has the channel group '{tolerance['group']}'",
                "groups: " + ", ".join(sorted(groups)),
            )


def _check_precisions(project: Project, cases: Sequence[Case]) -> None:
    """A tolerance for a precision that no artifact of these cases has, those that it is made from included, is idle."""
    specs, found = [c.spec for c in cases if not c.because], set[str]()
    while specs:
        found |= {s.precision.value for s in specs}
        specs = [p for s in specs for p in formats.get(s.format).parents(s)]
    for tolerance in project.tolerances if found else ():
        if tolerance["precision"] not in found:
            raise BadRequest(
                f"exportgate.toml [[tolerances]]: no case of the matrix is in {tolerance['precision']}",
                "precisions: " + ", ".join(sorted(found)),
            )

"""The command line. What judges starts pytest with the same options; nothing here imports torch."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporters.errors import BadRequest, ExportgateError, NotSupported
from exporters.version import __version__
from suites.interrupt import EXIT, TOLD, end_at_once, end_in_order

PACKAGE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns pytest's exit codes.

    0 good, 1 a verdict failed, 2 interrupted, 4 bad request, 5 nothing judged.
    """
    end_at_once()
    from suites.options import refuse_empty

    words = list(sys.argv[1:] if arguments is None else arguments)
    words, further = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = _parser().parse_args(words)
    try:
        command: Callable[[argparse.Namespace, list[str]], int] = options.command
        refuse_empty(vars(options))
        if command not in (_qualify, _check, _compare):  # with these pytest begins, and imports more: see the plugin
            end_in_order()
            if further:
                raise BadRequest(
                    f"'-- {' '.join(further)}' is for pytest, which this command does not run", "leave it out"
                )
        return command(options, further)
    except ExportgateError as error:
        print(f"exportgate: error: {error}", file=sys.stderr)
        return 4 if isinstance(error, (BadRequest, NotSupported)) else 1
    except KeyboardInterrupt:
        print(TOLD, file=sys.stderr)
        return EXIT
    except BrokenPipeError:
        return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line and exit 4, as every bad request."""
        self.exit(4, f"exportgate: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    from suites.cli_baseline import add_baseline
    from suites.cli_files import add_cache, add_engine, add_signature
    from suites.options import MATRIX, REQUEST, RUN, UPGRADE

    parser = _Parser(
        prog="exportgate",
        description="Does the exported model still do what the PyTorch model does, and is it as fast as it was?",
    )
    parser.add_argument("--version", action="version", version=f"exportgate {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace, list[str]], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=command)
        return made

    qualify = add(
        "qualify", _qualify, "Export, compare, measure and report a model; without MODEL the project's matrix."
    )
    qualify.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint, or a model of exportgate.toml")
    for name, settings in (*MATRIX, *REQUEST, *RUN):
        qualify.add_argument(*_names(name), **settings)

    check = add("check", _check, "Judge an artifact that somebody else's exporter made.")
    check.add_argument("artifact", metavar="ARTIFACT")
    check.add_argument("--model", required=True, metavar="MODEL", help="the checkpoint that it was made from")
    check.add_argument("--trust", action="store_true", help="load it although loading it runs code that is in it")
    for name, settings in (*MATRIX, *REQUEST, *RUN):
        check.add_argument(*_names(name), **settings)

    compare = add("compare", _compare, "Judge an upgrade of a toolchain: NEW's exports, measured in turns with OLD's.")
    compare.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint, or a model of exportgate.toml")
    compare.add_argument(UPGRADE[0], required=True, **UPGRADE[1])
    for name, settings in (*MATRIX, *REQUEST, *RUN):
        compare.add_argument(*_names(name), **settings)

    export = add(
        "export", _export, "Export a model; the files go beside it or into --output, under the names that users know."
    )
    export.add_argument("model", metavar="MODEL")
    export.add_argument("--output", metavar="DIR", help="folder for the files (default: beside the checkpoint)")
    export.add_argument("--overwrite", action="store_true", help="replace files that exportgate did not make")
    for name, settings in (*MATRIX, *REQUEST):
        export.add_argument(*_names(name), **settings)

    shown = add("formats", _formats, "What this machine can do, cell by cell.")
    shown.add_argument("--json", action="store_true", help="as JSON")

    add_baseline(commands)
    report = add(
        "report",
        _report,
        "Write the reports of run records again, or merge several into one. Exits as their verdict says: 0 QUALIFIED, "
        "1 NOT QUALIFIED, 2 INTERRUPTED, 5 NOTHING JUDGED.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    report.add_argument(
        "--output",
        metavar="DIR",
        help="where to (default: the run's own folder, of --compare and --history the last run's; needed to merge)",
    )
    over = report.add_mutually_exclusive_group()
    over.add_argument(
        "--compare", action="store_true", help="of two runs what got worse, better, appeared and vanished"
    )
    over.add_argument("--history", action="store_true", help="of many runs how latency, error, metric and size went")

    add_signature(commands)
    add_engine(commands)
    add_cache(commands)
    chain = add("toolchain", _toolchain, "List the toolchains, or make one's environment.")
    parts = chain.add_subparsers(dest="action", metavar="ACTION", required=True)
    parts.add_parser("list", help="which are here, and where")
    sync = parts.add_parser("sync", help="make (or repair) an environment with uv")
    sync.add_argument("name", metavar="NAME")
    return parser


def _names(name: str) -> tuple[str, ...]:
    """An option's names: users of the Ultralytics exporter know one as --verbose, which is another one of pytest's."""
    return (name, "--verbose") if name == "--toolchain-log" else (name,)


def _qualify(options: argparse.Namespace, further: list[str]) -> int:
    return _pytest(options, ["--model", options.model] if options.model else [], further)


def _compare(options: argparse.Namespace, further: list[str]) -> int:
    words = ["--toolchain", *options.toolchain] + (["--model", options.model] if options.model else [])
    return _pytest(options, words, further)


def _check(options: argparse.Namespace, further: list[str]) -> int:
    words = ["--artifact", options.artifact, "--model", options.model] + (["--trust"] if options.trust else [])
    return _pytest(options, words, further)


# Options of pytest's cache, which a run from the command line has not.
CACHED = ("--lf", "--last-failed", "--ff", "--failed-first", "--nf", "--new-first", "--sw", "--stepwise")


def _pytest(options: argparse.Namespace, words: list[str], further: list[str]) -> int:
    """Starts pytest on the claims, with the options given; a user's own pytest settings stay out of it."""
    import tempfile

    import pytest

    from exporters.toolchain import cache_root
    from suites.options import MATRIX, REQUEST, RUN, dest

    cached = next((word for word in further if word in CACHED), None)
    if cached:
        raise BadRequest(
            f"'-- {cached}' goes by an earlier run, and exportgate judges every claim anew", "leave it out"
        )
    for name, settings in (*MATRIX, *REQUEST, *RUN):
        value = getattr(options, dest(name, settings))
        if settings.get("action", "").startswith("store_"):
            words += [name] if value == (settings["action"] == "store_true") else []
        elif value is not None:
            words += [f"{name}={value}"]
    claims = [str(p) for p in (PACKAGE / "conformance", PACKAGE / "accuracy", PACKAGE / "performance") if p.is_dir()]
    # A user's folder gets the report and nothing else: not the folders .hypothesis and .benchmarks.
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(cache_root() / "hypothesis"))
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["EXPORTGATE_COMMAND"] = json.dumps(["exportgate", *sys.argv[1:]])
    fixed = [
        "-p",
        "suites.plugin",
        "-p",
        "suites.progress",
        "-o",
        "console_output_style=classic",
        "-c",
        os.devnull,
        f"--rootdir={PACKAGE.parent}",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-q",
        "--benchmark-columns=min,median,max,rounds",
        "--benchmark-quiet",
        f"--benchmark-storage=file://{tempfile.gettempdir()}",
        "--no-header",
        "-rN",
    ]
    if options.json:  # the report alone is standard output; what pytest tells goes to standard error
        os.environ["EXPORTGATE_JSON"] = str(os.dup(1))
        os.dup2(2, 1)
    return int(pytest.main([*fixed, *words, *further, *claims]))


def _export(options: argparse.Namespace, further: list[str]) -> int:
    from exporters import formats
    from exporters.cuda.nvml import gpu_facts
    from exporters.pool import Pool
    from exporters.spec import parse_device
    from exporters.tensorrt import timing
    from suites.options import names_in
    from suites.support.cases import Selection, find_model
    from suites.support.config import find_project

    if not options.format:
        raise BadRequest("export was given no format", "add --format, for example --format onnx")
    project = find_project(options.project, Path.cwd())
    names = [formats.canonical(f) for f in names_in("format", options.format)]
    with Pool(project.limits) as pool, _progress(pool):
        if options.device not in (None, "cpu"):
            gpu = gpu_facts(parse_device(options.device))
            timing.seed(project.baselines, str(gpu.get("name", "")), pool.progress)
        # Started before the checkpoint is read: importing torch is the longest part of a cold export.
        for name in names:
            pool.start_early(name)
        model = find_model(project, Selection(options.model, task=options.task or ""))
        for name in names:
            start = time.perf_counter()
            path = _export_one(pool, model, name, options, name == names[-1])
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            size = sum(p.stat().st_size for p in files) / 2**20
            print(f"{name}: {path} ({size:.1f} MiB, {time.perf_counter() - start:.1f} s)")
            words = ["exportgate", "check", str(path), "--model", options.model, "--format", name]
            words += ["--trust"] if formats.get(name).is_code else []
            print("  check it: " + shlex.join([*words, *_given(options)]))
    return 0


def _given(options: argparse.Namespace) -> list[str]:
    """The options of a request as they were given, but for the format."""
    from suites.options import MATRIX, REQUEST, dest

    words: list[str] = []
    for name, settings in (*MATRIX, *REQUEST):
        value = getattr(options, dest(name, settings))
        if name == "--format" or (value in (None, False) and settings.get("action") != "store_false"):
            continue
        if settings.get("action", "").startswith("store_"):
            words += [name] if value == (settings["action"] == "store_true") else []
        else:
            words += [name, str(value)]
    return words


def _export_one(pool: Any, model: Any, name: str, options: argparse.Namespace, last: bool) -> Path:
    """Exports to one format and puts its file where users look for it."""
    from exporters import formats
    from exporters.formats.engine import BUILDER_LOG
    from exporters.placement import place
    from exporters.spec import request
    from suites.options import REQUEST_FIELDS

    values = {k: getattr(options, v) for k, v in REQUEST_FIELDS.items()}
    if "," in (options.precision or ""):
        raise BadRequest(
            f"export was given the precisions '{options.precision}'",
            "ask for one at a time: their files have the same name",
        )
    spec = request(model, name, precision=options.precision, half=options.half, int8=options.int8, **values)
    folder = Path(options.output) if options.output else (model.weights.parent if model.weights else Path.cwd())
    kind = spec.device.split(":")[0]
    if not any(r.device == kind for r in formats.get(name).runtimes):
        raise NotSupported(f"{formats.get(name).title} has no runtime on {kind}", "leave --device out")
    made = pool.export(spec)
    if last:
        pool.leave()
    path = place(made, folder, options.overwrite)
    log = made.root / BUILDER_LOG
    if log.is_file():
        print(f"  the builder's log: {log}")
    return path


@contextmanager
def _progress(pool: Any) -> Iterator[None]:
    """What the pool waits for: a spinner on a terminal, nothing more than results in a log."""
    if not sys.stderr.isatty():
        pool.progress = lambda line: print(line, file=sys.stderr, flush=True)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        pool.progress = status.update
        yield


def _formats(options: argparse.Namespace, further: list[str]) -> int:
    from exporters import formats
    from suites.support.availability import cells

    rows = cells()
    if options.json:
        print(json.dumps([r.to_dict() for r in rows], indent=1))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "format", "precision", "runtime", "device", "here", title=f"exportgate {__version__}: what this machine can do"
    )
    for row in rows:
        table.add_row(
            row.format,
            row.precision,
            row.runtime,
            row.device,
            escape(row.state + (f": {row.because}" if row.because else "")),  # exportgate[onnx] is no markup
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(
        f"{len(formats.registry())} formats; options of each: "
        + "; ".join(f"{f.id}: {', '.join(sorted(f.options))}" for f in formats.registry().values())
    )
    return 0


def _report(options: argparse.Namespace, further: list[str]) -> int:
    import reports
    from reports.kept import read_all
    from reports.record import EXITS

    runs = [Path(r) for r in options.runs]
    if options.compare:
        if len(runs) != 2:
            raise BadRequest(f"--compare takes two runs, and {len(runs)} given", "give the one before, then the other")
        out = Path(options.output) if options.output else (runs[1] if runs[1].is_dir() else runs[1].parent)
        found = reports.write_comparison(runs[0], runs[1], out)
        print(out / "comparison.html", out / "comparison.md", found.headline, sep="\n")
        return 1 if found.is_worse else 0
    if options.history:
        out = Path(options.output) if options.output else (runs[-1] if runs[-1].is_dir() else runs[-1].parent)
        told = reports.write_history(runs, out)
        print(out / "history.html", out / "history.md", told.headline, sep="\n")
        return 0
    if len(runs) > 1 and not options.output:
        raise BadRequest(f"{len(runs)} runs are one report, and no --output given", "name a folder of its own")
    out = Path(options.output) if options.output else (runs[0] if runs[0].is_dir() else runs[0].parent)
    for path in reports.write(runs, out).values():
        print(path)
    summary = reports.merge(read_all(runs))
    print(summary.headline)
    return EXITS[summary.verdict]


def _toolchain(options: argparse.Namespace, further: list[str]) -> int:
    from exporters import toolchain
    from exporters.client import environment_note
    from exporters.errors import ToolchainMissing

    if options.action == "sync":
        toolchain.known(options.name)
        print(f"making toolchain {options.name} with uv ...", file=sys.stderr, flush=True)
        print(toolchain.sync(options.name, lambda line: print(line, file=sys.stderr, flush=True)))
        return 0
    width = shutil.get_terminal_size((120, 20)).columns
    for name in toolchain.TOOLCHAINS:
        try:
            found = toolchain.resolve(name)
            line = f"{name}: {found.python} ({environment_note(found.packages)})"
        except ToolchainMissing as error:
            line = f"{name}: missing; {error}"
        print(line if not sys.stdout.isatty() else line[:width])
    return 0


if __name__ == "__main__":
    sys.exit(main())

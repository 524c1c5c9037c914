"""The pytest plugin: options, collection of the matrix, verdicts, the run record. conftest.py registers it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from exporters import formats
from exporters.artifact import Artifact, foreign
from exporters.cuda.nvml import gpu_facts
from exporters.errors import BadRequest, ExportgateError, NotSupported
from exporters.pool import Pool
from exporters.spec import ExportSpec
from exporters.tensorrt import timing
from exporters.toolchain import cache_root
from suites.interrupt import end_in_order, go_on
from suites.options import (
    add_options,
    brought_path,
    count_of,
    environments_of,
    selection_of,
    with_replicates,
)
from suites.support import record as records
from suites.support.ahead import export_ahead, exports_at_once
from suites.support.bench import Bench, Run
from suites.support.cases import Case, matrix
from suites.support.config import Project, Waiver, find_project
from suites.support.machine import DiskPeak
from suites.support.release import check_complete, check_release, check_waivers, must_pass_of
from suites.support.verdict import Judged, Verdict, one_line, verdict_of

MARKERS = {
    "trt": "runs on TensorRT",
    "cuda": "needs an NVIDIA GPU",
    "formats": "a format with a toolchain or a job of its own: tox -e formats",
    "values": "compares outputs with PyTorch's",
    "accuracy": "judges a task metric on data",
    "latency": "measures time",
    "slow": "takes minutes",
}
STATE = pytest.StashKey["State"]()
PROPERTY = "exportgate"


class State:
    """What the plugin knows during a run."""

    def __init__(self, config: pytest.Config) -> None:
        self.project: Project = find_project(
            config.getoption("project"), Path(config.invocation_params.dir), own=not config.getoption("model")
        )
        self.release: bool = bool(config.getoption("release"))
        replicates = config.getoption("replicates")
        if replicates is not None:
            self.project = with_replicates(self.project, replicates)
        exports = config.getoption("exports")
        self.exports: int | None = None if exports is None else count_of("exports", exports)
        self.selection = selection_of(config, self.project)
        # Made now, so that a mistake in the request is one line and exit 4 before anything is collected.
        self.cases: list[Case] = matrix(self.project, self.selection)
        self.brought = _brought(config, self.cases)
        self.environments = environments_of(config, self.cases)
        self.identity = records.run_id()
        given = config.getoption("report")
        self.folder = (
            Path(given).expanduser().resolve()
            if given
            else Path(config.invocation_params.dir) / "reports" / "runs" / self.identity
        )
        self.lines: list[str] = []  # the last ones that the run prints
        self.run: Run | None = None
        self.record: records.Record | None = None
        self.verdicts: Counter[Verdict] = Counter()
        self.missing = Counter[str]()  # why claims were not judged, for a run that judged none
        self.selftest = Counter[str]()
        self.started = time.monotonic()
        self.disk: DiskPeak | None = None
        self.claims: set[tuple[str, str]] = set()
        self.afterwards = 0  # claims of latency that the processes of pytest-xdist have set aside
        self.told: dict[tuple[str, str], str] = {}  # (case, because) -> the claim that said it first


def _brought(config: pytest.Config, cases: list[Case]) -> Artifact | None:
    """The artifact that somebody else made, whose one case is judged."""
    path = brought_path(config)
    if path is None:
        return None
    spec = cases[0].spec
    is_code = formats.get(spec.format).is_code
    return foreign(path, spec.format, spec.to_dict(), bool(config.getoption("trust")), is_code)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from suites import hooks

    pluginmanager.add_hookspecs(hooks)


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    # A latency claim that ends before its measurement has told why in its verdict.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    if config.getoption("help", False) or config.getoption("version", 0):
        return
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        config.option.benchmark_disable = True  # pytest-benchmark does it itself, with a warning in every run
    try:
        state = config.stash[STATE] = State(config)
        if state.release:
            check_release(config, state.project, state.cases)
    except ExportgateError as error:
        raise _refused(error) from None


def _refused(error: ExportgateError) -> pytest.UsageError:
    """What ends the run by one line: the command line's, where that started it, or else pytest's."""
    if "EXPORTGATE_COMMAND" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
        return pytest.UsageError(str(error))
    print(f"exportgate: error: {error}", file=sys.stderr)
    return pytest.UsageError()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`--model` judges a model; the suite's own tests are not collected then."""
    asks = config.getoption("model") or config.getoption("artifact") or config.getoption("release")
    return True if asks and collection_path.name == "selftest" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    state = metafunc.config.stash[STATE]
    params = [pytest.param(c, id=c.id, marks=[getattr(pytest.mark, m) for m in c.marks]) for c in state.cases]
    metafunc.parametrize("case", params, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)  # what was left out by a marker is not set aside
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    state = config.stash[STATE]
    wanted = config.getoption("claim")
    if wanted:
        names = {getattr(i, "originalname", i.name) for i in items}
        if wanted not in names:
            known = ", ".join(sorted(n for n in names if n.startswith("test_")))
            raise _refused(BadRequest(f"claim '{wanted}' is not known", f"claims: {known}"))
        dropped = [i for i in items if getattr(i, "originalname", "") != wanted]
        items[:] = [i for i in items if getattr(i, "originalname", "") == wanted]
        config.hook.pytest_deselected(items=dropped)
    try:
        check_waivers(
            state.project, state.cases if any(_case_of(i) for i in items) else None, items, _case_of, state.release
        )
    except ExportgateError as error:
        raise _refused(error) from None
    state.claims = {(case.id, _claim_of(item)) for item in items if (case := _case_of(item))}
    if hasattr(config, "workerinput"):  # one of pytest-xdist's: nobody else may work while latency is measured
        there = len(items)
        items[:] = [i for i in items if not (_case_of(i) and i.get_closest_marker("latency"))]
        config.workeroutput[PROPERTY] = there - len(items)  # pyright: ignore[reportAttributeAccessIssue]
    for item in items:
        waiver = _waiver_of(state.project, item)
        if waiver:
            item.add_marker(pytest.mark.xfail(reason=f"waived until {waiver.expires}: {waiver.reason}", strict=True))


def _case_of(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get("case") if callspec else None
    return found if isinstance(found, Case) else None


def _claim_of(item: pytest.Item) -> str:
    return str(getattr(item, "originalname", item.name))


def _waiver_of(project: Project, item: pytest.Item) -> Waiver | None:
    case = _case_of(item)
    return next((w for w in project.waivers if case and w.case == case.id and w.claim == _claim_of(item)), None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """An interruption goes on as one of its own: where it came, a frame may have no line, which pytest cannot print."""
    try:
        return (yield)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A row of the matrix may say that values are not compared with PyTorch's, and why."""
    case = _case_of(item)
    if case is not None and case.no_values and item.get_closest_marker("values") is not None:
        raise NotSupported(f"the values of this case are not judged: {case.no_values}")


@pytest.fixture(scope="session")
def exportgate_run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The run's workers, ended with the session."""
    config = request.config
    state = config.stash[STATE]

    def damage(artifact: Artifact, spec: ExportSpec) -> Artifact | None:
        return config.hook.pytest_exportgate_export_end(artifact=artifact, spec=spec)

    def start(line: str) -> None:
        config.hook.pytest_exportgate_export_start(description=line)

    old, new = state.environments
    pool = Pool(state.project.limits, in_process=bool(config.getoption("in_process")), progress=start, environment=new)
    run = state.run = Run(
        state.project, pool, damage, Pool(state.project.limits, progress=start, environment=old) if old else None
    )
    judged = list({c.id: c for item in request.session.items if (c := _case_of(item))}.values())
    for device in sorted({c.spec.device for c in judged} - {"cpu"}):
        timing.seed(state.project.baselines, str(gpu_facts(device).get("name", "")), start)
    count = exports_at_once(state.exports, judged)
    try:
        if count > 1 and len(judged) > 1 and state.brought is None and not pool.in_process and old is None:
            run.failed = export_ahead(pool, judged, count)
        yield run
    finally:
        run.close()


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest, exportgate_run: Run) -> Iterator[Bench]:
    """The bench of one case; its sessions are closed before the next case."""
    bench = Bench(exportgate_run, request.param, request.config.stash[STATE].brought)
    yield bench
    bench.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of others' wrappers, which would warn of what passes them
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns an exception into a verdict, and what the claim observed into a property of its report."""
    report = yield
    go_on()  # a claim that was interrupted may end in anything, a library's AssertionError or nothing at all
    case = _case_of(item)
    error = call.excinfo.value if call.excinfo else None
    if case is None or (call.when != "call" and error is None):
        return report
    if call.when == "teardown" and error is None:
        return report
    waiver = _waiver_of(item.config.stash[STATE].project, item)
    verdict = verdict_of(error)
    because = one_line(error) if error is not None else ""
    if isinstance(error, pytest.skip.Exception):
        verdict, because = Verdict.ERROR, f"a claim skipped itself without a verdict: {error}"
    if waiver and verdict is Verdict.FAIL:
        verdict = Verdict.WAIVED
    elif waiver and verdict is Verdict.PASS:
        verdict, because = Verdict.FAIL, "waived, and it passes: remove the waiver"
    if verdict is not Verdict.WAIVED and hasattr(report, "wasxfail"):
        del report.wasxfail  # of a waived claim that was not judged: pytest would count it as a failure that it expects
    if verdict.is_neutral:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"{verdict}: {because}")
    elif verdict.is_failure:
        report.outcome = "failed"
        if isinstance(error, (ExportgateError, Judged, AssertionError)) and not item.config.getoption("tracebacks"):
            report.longrepr = _failure_lines(item, case, verdict, because)
    bench = getattr(item, "funcargs", {}).get("case")
    evidence: dict[str, Any] = {}
    event: dict[str, Any] | None = None
    if isinstance(bench, Bench):
        evidence, bench.evidence = bench.evidence, {}
        if not bench.announced:
            bench.announced = True
            event = _case_event(bench)
    if waiver:
        evidence["waiver"] = {
            "reason": waiver.reason,
            "issue": waiver.issue,
            "owner": waiver.owner,
            "expires": waiver.expires.isoformat(),
        }
    data = {
        "case": case.id,
        "claim": _claim_of(item),
        "verdict": verdict.value,
        "because": because,
        "seconds": round(call.duration, 3),
        "reproduce": _reproduce(item, case),
        **evidence,
    }
    report.user_properties.append((PROPERTY, {"claim": data, "case": event}))
    return report


def _failure_lines(item: pytest.Item, case: Case, verdict: Verdict, because: str) -> str:
    """What failed, why, and the command; one line where an earlier claim of the case failed in the same words."""
    told = item.config.stash[STATE].told
    claim = _claim_of(item)
    first = told.setdefault((case.id, because), claim)
    if first != claim:
        return f"{verdict} {case.id} :: {claim}: the same as {first}"
    return f"{verdict} {case.id} :: {claim}\n  {because}\n  reproduce: {_reproduce(item, case)}"


def _reproduce(item: pytest.Item, case: Case) -> str:
    """The command that judges this claim again."""
    state = item.config.stash[STATE]
    return case.command(
        _claim_of(item),
        # As the user said it: a name of the project's brings its table along, and the id is the same again.
        state.selection.model or case.spec.model.name,
        state.brought.path if state.brought else None,
        state.project.folder if item.config.getoption("project") else None,
        state.selection.evaluate,
        [e for e in state.environments if e is not None],
    )


def _case_event(bench: Bench) -> dict[str, Any]:
    """The case's line of the record; where its artifact could not be made the line says so by having no hops."""
    try:
        bench.artifact()
        return records.case_event(bench)
    except Exception as error:  # noqa: BLE001 (the claim that asked first has reported it; here only the line matters)
        bench.made = None
        return records.case_event(bench) | {"artifact": None, "spec": {"error": one_line(error)}}


def _open_record(state: State) -> None:
    """Begins the run record, unless it has begun.

    Raises:
        BadRequest: its folder cannot be written, or holds a run already.
    """
    if state.record is None:
        must_pass = must_pass_of(state.project, state.claims) if state.release else []
        project = state.project.folder / "exportgate.toml"
        head = records.run_head(state.identity, _command(), project, state.release, must_pass)
        end_in_order()  # from now on there is something to end
        state.record, state.disk = records.Record(state.folder, head), DiskPeak(cache_root())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Before any work: a folder that cannot be written costs none, and a run that is killed early has a record."""
    state = _active.get("state")
    if state is None or not state.claims:
        end_in_order()
    elif not session.config.option.collectonly:
        try:
            if state.release:
                check_complete(state.cases, {(c.id, _claim_of(i)) for i in session.items if (c := _case_of(i))})
            _open_record(state)
        except ExportgateError as error:
            raise _refused(error) from None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes the record; under xdist this runs in the controller for every worker's report."""
    state = _active.get("state")
    if state is None:
        return
    data = dict(report.user_properties).get(PROPERTY)
    if not isinstance(data, dict):
        if report.when == "call" or (report.outcome == "failed"):
            state.selftest[report.outcome] += 1
        return
    if report.when == "teardown" and report.outcome == "passed":
        return
    try:
        _open_record(state)
        assert state.record is not None
        if data["case"]:
            state.record.write("case", **data["case"])
        state.record.write("claim", **data["claim"])
    except ExportgateError as error:  # a disk that is full by now
        state.record = None  # an end after a line that is cut would be one line with it
        pytest.exit(f"exportgate: error: {error}", pytest.ExitCode.USAGE_ERROR)
    state.verdicts[Verdict(data["claim"]["verdict"])] += 1
    if data["claim"]["verdict"] in (Verdict.SKIPPED, Verdict.NOT_SUPPORTED):
        state.missing[data["claim"]["because"]] += 1


_active: dict[str, State] = {}  # pytest_runtest_logreport is not given the config


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and STATE in session.config.stash:
        _active["state"] = session.config.stash[STATE]


def _command() -> list[str]:
    """The command line as the user typed it."""
    given = os.environ.get("EXPORTGATE_COMMAND")
    return json.loads(given) if given else [Path(sys.argv[0]).name, *sys.argv[1:]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """Before any work of pytest-xdist's processes, as `pytest_collection_finish` in a run that has none."""
    state = _active.get("state")
    if state is None or not any(f"[{case.id}]" in name for case in state.cases for name in ids):
        end_in_order()
    else:
        try:
            _open_record(state)
        except ExportgateError as error:
            raise _refused(error) from None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of pytest-xdist has ended: how much latency it set aside."""
    state = _active.get("state")
    if state is not None:
        state.afterwards = max(state.afterwards, getattr(node, "workeroutput", {}).get(PROPERTY, 0))


# Files that options name are of the run itself: where pytest's option finds the name -> the option.
FILES = {"xmlpath": "--junitxml", "log_file": "--log-file", "htmlpath": "--html", "report_log": "--report-log"}


def _latency_alone(state: State, session: pytest.Session) -> None:
    """Latency, judged by a run of its own in the conditions of this one; its lines become part of this record."""
    given, expression = session.config.invocation_params, session.config.getoption("markexpr")
    folder = state.folder / "latency"
    _open_record(state)
    only = f"({expression}) and latency" if expression else "latency"
    words = [*given.args, "-n", "0", "--report", str(folder), "-m", only]  # of an option given twice the last counts
    for name, option in FILES.items():
        if session.config.getoption(name, None):
            words += [option, str(folder / name)]
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", *words],
        cwd=given.dir,
        env={k: v for k, v in os.environ.items() if k != "EXPORTGATE_JSON"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=os.name != "nt",  # Ctrl-C reaches it through us, once
    )
    try:
        said, _ = child.communicate()
        ended = child.returncode
    except KeyboardInterrupt:
        said, ended = "", pytest.ExitCode.INTERRUPTED
        _end(child)
    with suppress(FileNotFoundError):
        for line in (folder / "record.jsonl").read_bytes().split(b"\n")[:-1]:  # a line without an end is half a line
            event = json.loads(line)
            kind = event.pop("event")
            if kind in ("case", "claim") and state.record is not None:
                state.record.write(kind, **event)
            if kind == "claim":
                state.verdicts[Verdict(event["verdict"])] += 1
    shutil.rmtree(folder, ignore_errors=True)
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = ended
        print(said)
    elif session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def _end(child: subprocess.Popen[str]) -> None:
    """Lets a run of pytest end its workers and close its record, but not for long."""
    child.terminate()
    try:
        child.communicate(timeout=30)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.kill()
        child.communicate()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    state = _active.get("state")
    if state is None or state is not session.config.stash.get(STATE, None):
        return
    if state.afterwards and exitstatus not in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
        _latency_alone(state, session)
        exitstatus = session.exitstatus
    judged = sum(n for v, n in state.verdicts.items() if not v.is_neutral)
    passed = state.selftest["passed"]
    if int(exitstatus) == pytest.ExitCode.OK and not judged and not passed and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    if not state.cases:
        state.lines = [
            f"nothing was judged: {state.project.folder / 'exportgate.toml'} has no models with formats; "
            "see README, 'A project of your own', or give a MODEL"
        ]
    reasons = [] if judged else [f"skipped {n} claims: {why}" for why, n in state.missing.most_common(5)]
    if state.record is not None:
        # A must-pass claim that lacks PASS or WAIVED fails the release, though pytest calls it skipped.
        failed = any(v.is_failure for v in state.verdicts) or (state.release and bool(_summary(state).unmet))
        if failed and int(session.exitstatus) == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        seconds, disk = round(time.monotonic() - state.started, 1), state.disk.end() if state.disk else None
        try:
            state.record.write(
                "end",
                exit=int(session.exitstatus),
                seconds=seconds,
                selftest={"passed": passed, "failed": state.selftest["failed"]},
                disk=disk,
            )
            state.lines = [*reasons, *_report(state, bool(session.config.getoption("json")), seconds, disk)]
        except ExportgateError as error:
            state.lines = [*reasons, f"exportgate: error: {error}"]
            if int(session.exitstatus) == pytest.ExitCode.OK:  # nobody can sign what was not written
                session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _report(state: State, as_json: bool, seconds: float, disk: int | None) -> list[str]:
    """Writes the report and gives the lines that a log reader understands: what it cost, where it is, the headline."""
    import reports
    from reports import wording

    made = reports.write([state.folder], state.folder)
    text = made["json"].read_text(encoding="utf-8") if as_json else ""
    if as_json and "EXPORTGATE_JSON" in os.environ:  # the command line's standard output: see suites.cli
        with os.fdopen(os.dup(int(os.environ["EXPORTGATE_JSON"])), "w", encoding="utf-8") as output:
            output.write(text + "\n")
        text = ""
    cost = f"took {wording.duration(seconds)} and {wording.size(disk)} of disk at most"
    return [*([text] if text else []), cost, f"report: {made['html']}", _summary(state).headline]


def _summary(state: State) -> Any:
    import reports

    return reports.merge([reports.read_record(state.folder)])


def pytest_unconfigure(config: pytest.Config) -> None:
    """The report's lines, behind all that pytest says: the headline is a log's last."""
    state = config.stash.get(STATE, None)
    if state is None or state is not _active.get("state"):
        return
    _active.clear()
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    for line in state.lines if reporter else ():
        reporter.write_line(line, bold=line is state.lines[-1])

"""Faults from outside: killed runs, two runs at once, full and read-only disks, odd folders, clocks that jump.

Every fault is real: processes are killed, file systems are mounted, the clock is moved by libfaketime.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from exporters import cache
from exporters.artifact import read_manifest
from exporters.errors import BadRequest
from exporters.models.spec import ModelSpec
from exporters.pool import Pool
from exporters.spec import request
from suites.selftest.conftest import SMALL
from suites.support.machine import DiskPeak

ROOT = Path(__file__).resolve().parents[2]
PROJECT = """
[models.twins]
factory = "small_models:twins"
imgsz = 32
outputs = [{ name = "left" }, { name = "right" }]
[matrix]
formats = ["pytorch", "onnx"]
[latency]
processes = 2
seconds = 0.3
"""
Event = dict[str, Any]


class House:
    """A user's project, with a cache and a folder for temporary files of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self.temporary = folder, folder / "cache", folder / "tmp"
        self.temporary.mkdir(parents=True)
        (folder / "small_models.py").write_text(SMALL, encoding="utf-8")
        (folder / "exportgate.toml").write_text(PROJECT, encoding="utf-8")

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        """The command line in a process of its own."""
        return self.process(sys.executable, "-m", "suites.cli", *words, **variables)

    def process(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        """A process in this house."""
        own = {"EXPORTGATE_CACHE": str(self.cache), "TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env={k: v for k, v in {**os.environ, **own, **variables}.items() if v != GONE},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A test run in a shell's background inherits that Ctrl-C is ignored; the user's command does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no thread runs here)
        )

    def run(self, *words: str, **variables: str) -> tuple[int, str]:
        """Exit code, and all that was said."""
        process = self.start(*words, **variables)
        text, _ = process.communicate(timeout=240)
        assert "Traceback" not in text and "INTERNALERROR" not in text, text[-3000:]
        return process.returncode, text

    def events(self, report: str) -> list[Event]:
        """What a record holds so far; a line that is being written is left out."""
        path = self.folder / report / "record.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def artifacts(self) -> dict[str, str]:
        """Finished artifacts by folder, each whole, with the digests of their files."""
        found: dict[str, str] = {}
        for folder in (self.cache / "artifacts").glob("*"):
            artifact = read_manifest(folder)
            artifact.verify()
            found[folder.name] = " ".join(f.sha256 for f in artifact.files)
        return found


GONE = "this variable is not set"


def qualify(report: str, *further: str) -> tuple[str, ...]:
    """The command without latency claims, which take the most time."""
    return ("qualify", "--report", report, *further, "--", "-m", "not latency")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "project")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> House:
    """A house whose artifacts are all in its cache, by a run that nothing disturbed."""
    made = House(tmp_path_factory.mktemp("finished") / "project")
    code, text = made.run(*qualify("undisturbed"))
    assert code == 0, text
    return made


def one_error(text: str, *words: str) -> None:
    """Something went wrong, it is told once, and what, where and the fix are in that line."""
    lines = [line for line in text.splitlines() if any(w in line for w in ("cannot be", "cannot write", "error:"))]
    assert len(lines) == 1, text
    assert all(word in lines[0] for word in words), lines[0]


def verdicts(events: list[Event]) -> dict[tuple[str, str], str]:
    return {(e["case"], e["claim"]): e["verdict"] for e in events if e["event"] == "claim"}


# ---- killed --------------------------------------------------------------------------------------------------------


def kill_when(process: subprocess.Popen[str], moment: Callable[[], bool]) -> list[int]:
    """SIGKILL, which nothing can catch, to the command alone; the processes that it had started."""
    deadline = time.monotonic() + 120
    while not moment():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.002)
    children = [c.pid for c in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    return children


def test_a_killed_run_loses_what_it_was_doing_and_nothing_else(house: House, finished: House) -> None:
    """kill -9 during an export, between, during a claim and while the report is written; then the same command."""

    def during_an_export() -> bool:
        return any(p.is_file() for p in (house.cache / "tmp").glob("*/**/*"))

    def lines(report: str, count: int) -> Callable[[], bool]:
        return lambda: len(house.events(report)) >= count

    moments = {
        "export": during_an_export,
        "between": lines("between", 7),
        "claim": lines("claim", 36),
        "report": lambda: any(e["event"] == "end" for e in house.events("report")),
    }
    whole: dict[str, str] = {}
    for name, moment in moments.items():
        children = kill_when(house.start(*qualify(name)), moment)
        deadline = time.monotonic() + 15
        while left := [c for c in children if psutil.pid_exists(c)]:
            assert time.monotonic() < deadline, f"{name}: workers {left} go on"
            time.sleep(0.1)
        found = house.artifacts()
        assert whole.items() <= found.items(), "an artifact was made again"
        whole = found
        with (house.folder / name / "record.jsonl").open("ab") as file:
            file.write(b"" if name == "report" else b'{"event": "claim", "case": "tw')  # what a cut line looks like
        code, text = house.run("report", name)
        assert code == (0 if name == "report" else 2), text  # as its verdict says
        report = json.loads((house.folder / name / "report.json").read_text(encoding="utf-8"))
        assert report["verdict"] == ("QUALIFIED" if name == "report" else "INTERRUPTED"), text
    assert len(whole) == 2
    code, text = house.run(*qualify("last"))
    assert code == 0 and "QUALIFIED: 0 of" in text, text
    assert house.artifacts() == whole
    events = house.events("last")
    assert verdicts(events) == verdicts(finished.events("undisturbed"))
    assert all(hop["cached"] for e in events if e["event"] == "case" for hop in e["hops"])
    assert not list((house.cache / "tmp").iterdir())
    left = [p for p in house.temporary.rglob("*") if p.is_file()]
    assert all(p.suffix == ".log" and p.stat().st_size for p in left), left


# ---- interrupted ---------------------------------------------------------------------------------------------------

# A module that is imported when Ctrl-C comes, and makes something else of it, as hypothesis does.
IMPORTED = """
import pathlib, time
pathlib.Path("importing").touch()
try:
    time.sleep(60)
except BaseException:
    raise ImportError("half of it is there") from None
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("shlex.py", ("-m", "suites", "report", "out")),  # which the command line imports first of all
        ("psutil.py", ("-m", "suites.cli", "qualify", "--format", "onnx", "--report", "out")),
        ("late.py", ("-m", "suites.cli", "qualify", "--format", "onnx", "--report", "out", "--", "-p", "late")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_who_interrupts_an_import_gets_one_line(
    house: House, module: str, words: tuple[str, ...], by: signal.Signals
) -> None:
    (house.folder / "first").mkdir()
    (house.folder / "first" / module).write_text(IMPORTED, encoding="utf-8")
    path = os.pathsep.join([str(house.folder / "first"), str(ROOT)])
    process = house.process(sys.executable, *words, PYTHONPATH=path)
    deadline = time.monotonic() + 60
    while not (house.folder / "importing").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(by)
    text, _ = process.communicate(timeout=30)
    assert (process.returncode, text) == (2, "exportgate: interrupted; nothing half-made was left\n")
    assert not (house.folder / "out").exists()


def test_an_interrupted_run_ends_with_its_headline(house: House) -> None:
    process = house.start(*qualify("out", "--format", "pytorch"))
    while len(house.events("out")) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in text, text
    assert text.splitlines()[-1].startswith("INTERRUPTED: "), text
    assert text.splitlines()[-2].startswith("report: "), text


# Ctrl-C comes while a claim is judged, and somebody's `finally` makes something else of it, as hypothesis's engine does
# where it has not begun yet.
LOST = """
import os, pytest, signal
from contextlib import suppress

@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    finally:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIG{0})
            signal.sigtimedwait([], 1)
        {1}
"""


@pytest.mark.parametrize("by", ["INT", "TERM"])
@pytest.mark.parametrize(
    "made",
    [
        "with suppress(KeyboardInterrupt): come()\n        raise AssertionError('half of it is there')",
        "with suppress(KeyboardInterrupt): come()",
        "Finalized()",
    ],
    ids=["another exception", "suppressed", "in a finalizer"],
)
def test_an_interruption_is_not_lost_on_its_way(house: House, by: str, made: str) -> None:
    """Or the claim that it came to fails, or even passes, and the run goes on."""
    (house.folder / "lost.py").write_text(LOST.format(by, made), encoding="utf-8")
    path = os.pathsep.join([str(house.folder), str(ROOT)])
    code, text = house.run("qualify", "--report", "out", "--format", "pytorch", "--", "-p", "lost", PYTHONPATH=path)
    assert code == 2 and text.splitlines()[-1].startswith("INTERRUPTED: 0 of 0 claims failed"), text
    assert "Warning" not in text, text
    assert not verdicts(house.events("out"))


# ---- two at once ---------------------------------------------------------------------------------------------------

WATCH = '''
"""Notes when a process of its own for a measurement is opened and when it is ended, by a clock of the whole machine."""
import os, time
from exporters.pool import Pool
opened, retired = Pool.open, Pool.retire

def note(what):
    with __import__("builtins").open(os.environ["WATCHED"], "a") as file:
        file.write(f"{time.monotonic()} {what} {os.getpid()}\\n")

def open(pool, artifact, spec, runtime_id, device, replicate=0):
    if replicate:
        note("begin")
    return opened(pool, artifact, spec, runtime_id, device, replicate)

def retire(pool, *given):
    retired(pool, *given)
    note("end")

Pool.open, Pool.retire = open, retire
'''


def test_two_runs_at_once_make_whole_artifacts_and_measure_in_turn(house: House) -> None:
    """On one empty cache, so that both export the same; latency is among the claims."""
    (house.folder / "watch.py").write_text(WATCH, encoding="utf-8")
    watched = house.folder / "watched"
    variables = {"WATCHED": str(watched), "PYTHONPATH": os.pathsep.join([str(ROOT), str(house.folder)])}
    runs = [
        house.start("qualify", "--format", "onnx", "--report", r, "--", "-p", "watch", **variables) for r in ("a", "b")
    ]
    said = [process.communicate(timeout=300)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], said
    assert all("QUALIFIED: 0 of" in text for text in said), said
    assert verdicts(house.events("a")) == verdicts(house.events("b"))
    assert len(house.artifacts()) == 2
    assert not list((house.cache / "tmp").iterdir())
    notes = sorted(line.split() for line in watched.read_text(encoding="utf-8").splitlines())
    assert len(notes) == 8 and len({n[2] for n in notes}) == 2, notes
    for (_, first, one), (_, second, other) in zip(notes[::2], notes[1::2], strict=True):
        assert (first, second, one) == ("begin", "end", other), f"two runs measured at once: {notes}"


def test_of_two_runs_at_once_with_one_report_folder_one_is_refused(house: House) -> None:
    words = qualify("same", "--format", "pytorch", "--claim", "test_outputs_are_finite")
    runs = [house.start(*words) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in runs]
    codes = [process.returncode for process in runs]
    assert sorted(codes) == [0, 4], said
    one_error(said[codes.index(4)], "--report", "same", "holds a run already")
    assert len(verdicts(house.events("same"))) == 1
    assert "QUALIFIED: 0 of 1 claim failed" in house.run("report", "same")[1]


MEASURES = """
import sys, time
from exporters.pool import Pool
with Pool(progress=lambda line: print(line, flush=True)) as pool, pool.measuring("cpu") as notes:
    print("measures", *notes, flush=True)
    time.sleep(float(sys.argv[1]))
"""


def test_who_waits_for_a_measurement_is_told_and_a_killed_one_lets_go(house: House) -> None:
    def start(seconds: float) -> subprocess.Popen[str]:
        return house.process(sys.executable, "-c", MEASURES, str(seconds))

    first = start(60)
    assert first.stdout and first.stdout.readline() == "measures\n"
    second = start(0)
    assert second.stdout and second.stdout.readline() == "waiting for the measurement of another run\n"
    first.kill()
    assert second.stdout.readline().startswith("measures waited ")
    assert second.wait(30) == 0
    first.communicate()
    second.communicate()


MAKES = """
from exporters import cache
for _ in range(200):
    with cache.temporary_folder() as folder:
        (folder / "part").touch()
        assert (folder / "part").exists()
"""


def test_no_process_clears_away_what_another_has_just_begun(house: House) -> None:
    made = [house.process(sys.executable, "-c", MAKES) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in made]
    assert not any(said), said
    assert not list((house.cache / "tmp").iterdir())


# ---- disks ---------------------------------------------------------------------------------------------------------


class Disk:
    """A file system in memory, of a size that can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self, *words: str) -> None:
        done = subprocess.run(["mount", *words, str(self.folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this needs leave to mount a file system (root on Linux): {done.stderr.strip()}")

    def size(self, kib: int) -> None:
        self.mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs")

    def resize(self, kib: int) -> None:
        self.mount("-o", f"remount,size={kib}k")

    def forbid(self) -> None:
        self.mount("-o", "remount,ro")

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    try:
        if sys.platform != "linux":
            pytest.skip("file systems of a size are mounted on Linux alone")
        yield made
    finally:
        made.unmount()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Warm workers."""
    with Pool() as made:
        yield made


@pytest.mark.parametrize("format_id", ["pytorch", "torchscript", "onnx"])
def test_a_cache_that_is_full_is_one_line_and_keeps_nothing_in_halves(
    pool: Pool, small_models: dict[str, ModelSpec], disk: Disk, monkeypatch: pytest.MonkeyPatch, format_id: str
) -> None:
    """Full before, in and behind the file that an export writes (Python, C++ and Rust do); then there is room."""
    monkeypatch.setenv("EXPORTGATE_CACHE", str(disk.folder / "cache"))
    spec = request(small_models["twins"], format_id)
    ends: list[bool] = []
    for kib in (4, 8, 64):
        disk.size(kib)
        try:
            pool.export(spec)
            ends.append(True)
        except BadRequest as error:
            ends.append(False)
            assert "cache" in str(error) and "No space left" in str(error) and "EXPORTGATE_CACHE" in str(error), error
            assert not list(disk.folder.glob("cache/artifacts/*")), "a half artifact is in the cache"
            assert not list(disk.folder.glob("cache/tmp/*"))
        disk.resize(4096)
        pool.export(spec).verify()
        disk.unmount()
    assert ends[0] is False and ends[-1] is True, ends


def test_the_most_that_a_run_took_of_its_disk_is_told(disk: Disk) -> None:
    """Also of what is gone by its end, as files are that an export needs for a while."""
    disk.size(4096)
    peak, path = DiskPeak(disk.folder / "cache"), disk.folder / "passing"
    path.write_bytes(bytes(1 << 20))
    give_up = time.monotonic() + 30
    while peak.most == peak.before and time.monotonic() < give_up:
        time.sleep(0.1)
    path.unlink()
    assert peak.end() == 1 << 20


def test_a_cache_that_is_full_fails_the_run(house: House, disk: Disk) -> None:
    disk.size(4)
    code, text = house.run("qualify", "--claim", "test_files_match_the_manifest", EXPORTGATE_CACHE=str(disk.folder))
    assert code == 1 and "NOT QUALIFIED: 2 of 2" in text, text
    lines = [line for line in text.splitlines() if "No space left on device" in line]
    assert len(lines) == 2 and all(str(disk.folder) in n and "EXPORTGATE_CACHE" in n for n in lines), text
    assert not list(disk.folder.glob("artifacts/*"))


@pytest.mark.parametrize(("kib", "exit_code", "verdict"), [(4, 4, "INTERRUPTED"), (32, 1, "QUALIFIED")])
def test_a_report_folder_that_is_full_loses_no_more_than_the_line_being_written(
    finished: House, disk: Disk, kib: int, exit_code: int, verdict: str
) -> None:
    """In the middle of the record, and behind it; with room the report is made of what was judged."""
    disk.size(kib)
    code, text = finished.run(*qualify(str(disk.folder / "run"), "--format", "onnx"))
    assert code == exit_code, text
    one_error(text, "No space left on device", str(disk.folder), "make room")
    code, text = finished.run("report", str(disk.folder / "run"))
    assert code == 4, text
    one_error(text, "No space left on device", str(disk.folder), "make room")
    assert [p.name for p in (disk.folder / "run").iterdir()] == ["record.jsonl"]
    disk.resize(4096)
    code, text = finished.run("report", str(disk.folder / "run"))
    assert code == (0 if verdict == "QUALIFIED" else 2) and f"\n{verdict}" in text, text


def test_a_folder_for_temporary_files_that_is_full_is_told_once(finished: House, disk: Disk) -> None:
    disk.size(16)
    code, text = finished.run(
        *("qualify", "--format", "onnx", "--report", str(disk.folder.parent / "report"), "--", "-k", "outputs"),
        TMPDIR=str(disk.folder),
    )
    assert code == 1 and "NOT QUALIFIED" in text, text
    one_error(text, "arrays cannot be written", "No space left on device", str(disk.folder), "TMPDIR")
    assert not list(disk.folder.rglob("*.npy"))


def test_folders_that_may_only_be_read(
    finished: House,
    disk: Disk,
    pool: Pool,
    small_models: dict[str, ModelSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache that holds what is asked for will do; what it lacks cannot be made, and a report cannot be written."""
    disk.size(8192)
    shutil.copytree(finished.cache, disk.folder / "cache")
    disk.forbid()
    own, report = {"EXPORTGATE_CACHE": str(disk.folder / "cache")}, str(disk.folder.parent / "report")
    code, text = finished.run("qualify", "--format", "onnx", "--report", report, "--", "-k", "p50 or outputs", **own)
    assert code == 0 and "\nQUALIFIED" in text, text
    events = finished.events(report)
    notes = next(n for e in events if e.get("measurement") for n in e["measurement"]["notes"] if "lock" in n)
    assert notes == "another run may have measured meanwhile: no lock in the cache (Read-only file system)"
    with monkeypatch.context() as patch, pytest.raises(BadRequest, match=r"cannot be written .Read-only file system"):
        patch.setenv("EXPORTGATE_CACHE", own["EXPORTGATE_CACHE"])
        pool.export(request(small_models["twins"], "onnx"))
    code, text = finished.run("qualify", "--report", str(disk.folder / "run"))
    assert code == 4, text
    one_error(text, "Read-only file system", str(disk.folder), "--report")


# ---- folders and environments --------------------------------------------------------------------------------------


def test_odd_names_and_missing_folders_do_no_harm(finished: House, tmp_path: Path) -> None:
    """Blanks, quotes and letters of other scripts; neither HOME nor a TMPDIR that is there."""
    odd = tmp_path / "two words" / "it's ünï ☃ 模型"
    shutil.copytree(finished.cache, odd / "cache")
    own = {"EXPORTGATE_CACHE": str(odd / "cache"), "TMPDIR": "/proc/nowhere", "HOME": GONE}
    code, text = finished.run(*qualify(str(odd / "report"), "--format", "onnx"), **own)
    assert code == 0 and "\nQUALIFIED" in text, text
    events = finished.events(str(odd / "report"))
    assert all(hop["cached"] for e in events if e["event"] == "case" for hop in e["hops"])


def test_a_name_that_is_too_long_is_one_line(finished: House, tmp_path: Path) -> None:
    name = "x" * 300
    for words, own, fix in (
        (("qualify", "--report", name), {}, "--report"),
        (("export", "twins", "--format", "onnx", "--output", name), {}, "--output"),
        (("cache", "show"), {"EXPORTGATE_CACHE": str(tmp_path / name)}, "EXPORTGATE_CACHE"),
    ):
        code, text = finished.run(*words, **own)
        assert code == 4, text
        one_error(text, "File name too long", fix)


def test_a_home_that_is_not_there_is_one_line(
    pool: Pool, small_models: dict[str, ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for name in ("EXPORTGATE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadRequest, match=r"the cache /proc/nowhere/.cache/exportgate cannot be .*EXPORTGATE_CACHE"):
        pool.export(request(small_models["twins"], "onnx"))


# ---- clocks --------------------------------------------------------------------------------------------------------

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


def moved(file: Path) -> dict[str, str]:
    """Variables by which the clock on the wall says what a file says; a monotonic clock stays what it is."""
    if FAKETIME is None:
        pytest.skip("libfaketime is not installed (apt-get install faketime)")
    return {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def test_a_clock_that_jumps_changes_no_verdict_and_no_duration(finished: House, tmp_path: Path) -> None:
    """A day on, two back, and on again, while claims are judged and latency is measured."""
    clock, report = tmp_path / "clock", str(tmp_path / "report")
    clock.write_text("+0", encoding="utf-8")
    begin = time.monotonic()
    process = finished.start("qualify", "--format", "onnx", "--report", report, **moved(clock))
    for lines, jump in ((4, "+1d"), (12, "-1d"), (29, "+1d")):
        while process.poll() is None and len(finished.events(report)) < lines:
            time.sleep(0.01)
        clock.write_text(jump, encoding="utf-8")
    text, _ = process.communicate(timeout=240)
    longest = time.monotonic() - begin
    assert process.returncode == 0, text
    events = finished.events(report)
    assert len({e["time"][:10] for e in events}) > 1, "the clock did not jump"
    found = verdicts(events)
    calm = {k: v for k, v in verdicts(finished.events("undisturbed")).items() if k in found}
    assert calm and {k: v for k, v in found.items() if k in calm} == calm
    assert all(0 <= e["seconds"] <= longest for e in events if "seconds" in e)
    measured = [m for e in events if e.get("measurement") for p in e["measurement"]["processes"] for m in p]
    assert measured and all(0 < m < 1e3 * longest for m in measured)


HOLDS = """
import time
from exporters import cache
with cache.temporary_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_clock_that_jumps_removes_nothing_that_is_in_use(
    pool: Pool, small_models: dict[str, ModelSpec], house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A month ahead everything is old: not what a run uses, nor what it makes."""
    clock = tmp_path / "clock"
    clock.write_text("+40d", encoding="utf-8")
    later = moved(clock)
    monkeypatch.setenv("EXPORTGATE_CACHE", str(house.cache))
    with Pool() as user:
        user.workers = pool.workers  # warm
        artifact = user.export(request(small_models["twins"], "torchscript"))
        holder = house.process(sys.executable, "-c", HOLDS)
        assert holder.stdout
        made = Path(holder.stdout.readline().strip())
        assert made.is_dir()
        assert "0 entries removed" in house.run("cache", "prune", "--older-than", "30", **later)[1]
        again = house.process(sys.executable, "-c", HOLDS.replace("time.sleep(60)", ""), **later)
        said, _ = again.communicate(timeout=30)
        assert again.returncode == 0, said
        artifact.verify()
        assert made.is_dir(), "what another run made was taken for what a killed one left"
        holder.kill()
        holder.communicate()
        with cache.temporary_folder():
            assert not made.exists(), "what a killed run left is still there"
        user.workers = {}
    text = house.run("cache", "prune", "--older-than", "30", **later)[1]
    assert f"removed artifacts/{artifact.root.name}" in text, text


def test_durations_come_from_clocks_that_cannot_jump() -> None:
    """The date is for people and for the age of files; nothing else asks for it."""
    allowed = {"exporters/cache.py": {"_age", "prune"}}
    found: list[str] = []
    for path in sorted(p for part in ("exporters", "reports", "suites") for p in (ROOT / part).rglob("*.py")):
        if "selftest" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            calls = [ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)]
            name = path.relative_to(ROOT).as_posix()
            if {"time.time", "time.time_ns"} & set(calls) and function.name not in allowed.get(name, ()):
                found.append(f"{name}: {function.name}")
            for one in (n for n in ast.walk(function) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub)):
                if any("datetime.now" in ast.unparse(side) for side in (one.left, one.right)):
                    found.append(f"{name}: {function.name}")
    assert not found, f"a duration by a clock that jumps: {found}"

"""`exportgate compare --toolchain OLD NEW`: environments that differ in nothing, and one whose runtime is slower."""

from __future__ import annotations

import sysconfig
import venv
from pathlib import Path

import pytest

import reports
from suites.selftest.conftest import command_line
from suites.selftest.sabotage_runs import MODULE, PROJECT
from suites.selftest.test_drift import RUNTIME

SLOWER = """        def run(self, *args, **kwargs):
            time.sleep(0.003)
            return super().run(*args, **kwargs)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project, and three environments with the packages of this one: old, same, slower; link is old."""
    place = tmp_path_factory.mktemp("upgrade")
    (place / "small_model.py").write_text(MODULE, encoding="utf-8")
    strict = PROJECT.replace("delta = 9.0", "delta = 1.0").replace("processes = 2", "processes = 3")
    (place / "exportgate.toml").write_text(strict, encoding="utf-8")
    here = sysconfig.get_path("purelib")
    for name in ("old", "same", "slower"):
        venv.create(place / name, symlinks=True)
        packages = next((place / name).glob("lib/python*/site-packages"))
        (packages / "those_of_the_tests.pth").write_text(here, encoding="utf-8")
        if name == "slower":
            # Not as sitecustomize: Debian's Python has one of its own, which comes first.
            (packages / "slower_runtime.py").write_text(RUNTIME.format(body=SLOWER), encoding="utf-8")
            (packages / "slower_runtime.pth").write_text("import slower_runtime", encoding="utf-8")
    (place / "link").symlink_to("old")
    return place


def _compare(folder: Path, *words: str) -> tuple[int, str]:
    done = command_line(folder, "compare", *words)
    return done.returncode, done.stdout + done.stderr


def test_an_upgrade_that_changes_nothing_qualifies(folder: Path) -> None:
    code, out = _compare(folder, "--toolchain", "old", "same", "--report", "out")
    assert code == 0 and "\nQUALIFIED" in out, out[-2000:]
    run = reports.read_record(folder / "out")
    found = {c.claim: c for c in run.claims}
    latency = found["test_p50_within_baseline"]
    assert latency.verdict == "PASS" and latency.baseline is not None and latency.gate is not None
    # In turns: as many of each side.
    assert len(latency.baseline.processes) == len(latency.measurement.processes) >= 3  # type: ignore[union-attr]
    assert latency.baseline.path == str(folder / "old") and "onnxruntime" in latency.baseline.reason
    assert found["test_size_load_and_memory_within_baseline"].verdict == "PASS"
    assert f"exportgate compare --toolchain {folder / 'old'} {folder / 'same'}" in latency.reproduce


def test_an_upgrade_whose_runtime_is_slower_fails(folder: Path) -> None:
    code, out = _compare(
        folder, "--toolchain", "old", "slower", "--claim", "test_p50_within_baseline", "--report", "late"
    )
    assert code == 1 and "slower than the baseline" in out, out[-2000:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("old", "old"), "old' twice; name"),
        (("old", "link"), "old' twice, the second time as"),
        (("old", "same/../old"), "twice"),
        (("old", "nowhere"), "is no environment"),
        (("old", "same", "--release"), "--toolchain with --release"),
    ],
)
def test_bad_requests_are_one_line(folder: Path, words: tuple[str, ...], said: str) -> None:
    code, out = _compare(folder, "--toolchain", *words)
    assert code == 4 and said in out and "Traceback" not in out, out[-1000:]


def test_an_environment_that_lacks_a_package_is_refused(folder: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    code, out = _compare(folder, "--toolchain", "old", str(tmp_path / "empty"))
    assert code == 4 and "lacks onnx" in out, out[-1000:]

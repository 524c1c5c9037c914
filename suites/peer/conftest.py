"""When the comparison is collected, its one option, and its figures, printed where a run ends."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from suites.peer.bench import Bench
from suites.peer.figures import Figures

HERE = Path(__file__).resolve().parent
LEAST = 7
FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("exportgate peer").addoption(
        "--repeats", type=_count, default=LEAST, metavar="N", help=f"pairs of measurements (default {LEAST})"
    )


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of pairs: give a whole number from 1")
    return count


def pytest_configure(config: pytest.Config) -> None:
    """Named by the user, the comparison runs or says why not: a skipped comparison must not look like a won one."""
    config.stash[FIGURES] = Figures()
    if not _is_named(config):
        return
    missing = _missing()
    if missing:
        raise pytest.UsageError(
            f"suites/peer needs package {missing[0]}, which is not installed here: run `tox -e peer`"
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Left out of a run that did not name it, where the peer is not installed or a model is being judged."""
    if HERE not in (collection_path.resolve(), *collection_path.resolve().parents) or _is_named(config):
        return None
    judging = any(config.getoption(o, None) for o in ("model", "artifact", "release"))
    return True if _missing() or judging else None


def _missing() -> list[str]:
    return [name for name in ("ultralytics", "railway_obstacle_detector") if importlib.util.find_spec(name) is None]


def _is_named(config: pytest.Config) -> bool:
    """Whether an argument of the command line, and not a setting, is this folder or something in it."""
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        return False
    named = [(config.invocation_params.dir / str(a).partition("::")[0]).resolve() for a in config.args]
    return any(HERE in (path, *path.parents) for path in named)


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    """Where tests put what they measured before they judge it."""
    return request.config.stash[FIGURES]


@pytest.fixture(scope="session")
def repeats(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("repeats", LEAST) or LEAST)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The bench, and its cache as that of this process."""
    with pytest.MonkeyPatch.context() as patch:
        made = Bench(tmp_path_factory.mktemp("peer"))
        patch.setenv("EXPORTGATE_CACHE", made.environment["EXPORTGATE_CACHE"])
        yield made


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Generator[None, None, None]:
    """The last lines but pytest's own count: a note for people, then one line a figure."""
    yield
    figures = config.stash[FIGURES]
    for line in (*figures.notes, *(f.line() for f in figures.found)):
        terminalreporter.write_line(line)

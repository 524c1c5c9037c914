"""Progress of `exportgate qualify`: a line a case as it ends; on a terminal also what is being done now."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from suites.plugin import PROPERTY


class Progress:
    """Takes the place of pytest's dots for claims."""

    def __init__(self, reporter: Any) -> None:
        self.reporter = reporter
        self.case, self.since, self.counts = "", time.monotonic(), Counter[str]()
        self.status: Any = None
        if reporter.isatty:
            from rich.console import Console

            # pytest captures the standard streams while a test runs; its reporter writes to a copy made before.
            self.status = Console(file=reporter._tw._file, force_terminal=True).status("starting")

    def doing(self, text: str) -> None:
        if self.status is not None:
            self.status.start()  # not before: it hides the cursor, and until the first claim Ctrl-C ends the process
            self.status.update(text)

    def pytest_exportgate_export_start(self, description: str) -> None:
        self.doing(description)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        claim, _, case = nodeid.rpartition("::")[2].removesuffix("]").partition("[")
        if case != self.case:
            self.flush()
            self.case = case
        self.doing(f"{case}: {claim.removeprefix('test_').replace('_', ' ')}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        data = dict(report.user_properties).get(PROPERTY)
        return (
            (report.outcome if report.when == "call" or report.outcome != "passed" else "", "", "")
            if isinstance(data, dict)
            else None
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = dict(report.user_properties).get(PROPERTY)
        if not isinstance(data, dict) or report.when == "teardown":
            return
        self.counts[data["claim"]["verdict"]] += 1

    def flush(self) -> None:
        """The line of the case that ended."""
        if self.counts:
            words = ", ".join(f"{n} {v}" for v, n in self.counts.most_common())
            self.reporter.write_line(f"{self.case}: {words} ({time.monotonic() - self.since:.1f} s)")
            self.reporter.flush()  # a log's reader sees it now and not when a buffer is full
        self.counts.clear()
        self.since = time.monotonic()

    def pytest_sessionfinish(self) -> None:
        if self.status is not None:
            self.status.stop()
        self.flush()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not config.option.collectonly:
        config.pluginmanager.register(Progress(reporter), "exportgate-progress")

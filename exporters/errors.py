"""One exception per thing that goes wrong. Each prints as one line: what, where, the offending value, the fix."""

from __future__ import annotations

import reprlib
from typing import Any

MOST_SHOWN = 100  # characters of a value in a message


def first_line(error: BaseException) -> str:
    """The first line of an exception's own words, at most 300 characters; its type's name where it has none."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(value: Any) -> str:
    """A value for a message, at most 100 characters of it, however deep or long it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxother, short.maxstring = 3, MOST_SHOWN, MOST_SHOWN
    text = short.repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 4]} ..."


class ExportgateError(Exception):
    """Base of every error that exportgate raises on purpose; `str(error)` is one line for a person.

    Args:
        what: what is wrong, with the place and the offending value.
        fix: what to do about it; printed after the what, set off by a semicolon.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = " ".join(what.split())
        self.fix = " ".join(fix.split())

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}" if self.fix else self.what


class BadRequest(ExportgateError):
    """Raised when an option, a file or a configuration that the user gave cannot be used as it stands."""


class CheckpointError(BadRequest):
    """Raised when a weights file is missing, damaged, of another kind, or holds an architecture that is not known."""


class UnsafeFile(BadRequest):
    """Raised when a file names something that would run code, or is code, not in our cache and not trusted."""


class NotSupported(ExportgateError):
    """Raised when a format cannot do what is asked, by its nature; becomes the verdict NOT_SUPPORTED (with because)."""


class ToolchainMissing(ExportgateError):
    """Raised when the environment or machine that a format needs is not there; becomes the verdict SKIPPED."""


class ExportError(ExportgateError):
    """Raised when a toolchain could not make the artifact; the message carries the toolchain's own words."""


class ParentFailed(ExportError):
    """Raised when the artifact that another one is made from could not be made."""


class ArtifactError(ExportgateError):
    """Raised when an artifact is damaged, incomplete, or is not what its manifest says."""


class FeedError(ExportgateError):
    """Raised when feeds do not fit a session: a name, shape or dtype that differs; says expected and got."""


class FallbackError(ExportgateError):
    """Raised when a runtime gave another execution provider or device than the one asked for."""


class WorkerCrash(ExportgateError):
    """Raised when a worker died: a signal, an exit code, or its memory limit."""


class WorkerTimeout(ExportgateError):
    """Raised when a worker's call took longer than its limit; the worker was killed."""


class MeasurementError(ExportgateError):
    """Raised when samples cannot answer what is asked: too few for a percentile, a throttled window, wrong outputs."""

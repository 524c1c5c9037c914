"""Verdicts: the word that a claim about a case ends with, and how exceptions become one."""

from __future__ import annotations

from enum import StrEnum

from exporters.errors import FallbackError, NotSupported, ToolchainMissing, WorkerCrash, WorkerTimeout


class Verdict(StrEnum):
    """Every word is counted in the headline; absence never looks like success."""

    PASS = "PASS"  # noqa: S105 (no password)
    FAIL = "FAIL"
    WAIVED = "WAIVED"
    NOT_SUPPORTED = "NOT_SUPPORTED"
    SKIPPED = "SKIPPED"
    ERROR = "ERROR"
    TIMEOUT = "TIMEOUT"
    CRASH = "CRASH"
    NO_BASELINE = "NO_BASELINE"
    NOT_COMPARABLE = "NOT_COMPARABLE"
    INCONCLUSIVE = "INCONCLUSIVE"
    INSENSITIVE = "INSENSITIVE"

    @property
    def is_neutral(self) -> bool:
        """Neither success nor failure: pytest shows it as skipped, with its word."""
        return self in (Verdict.NOT_SUPPORTED, Verdict.SKIPPED, Verdict.NO_BASELINE, Verdict.NOT_COMPARABLE)

    @property
    def is_failure(self) -> bool:
        """Fails the run."""
        return not self.is_neutral and self not in (Verdict.PASS, Verdict.WAIVED)


class Judged(Exception):
    """Raised by a claim that ends with another verdict than PASS or FAIL, with the reason in one line."""

    def __init__(self, verdict: Verdict, because: str) -> None:
        super().__init__(because)
        self.verdict = verdict


def verdict_of(error: BaseException | None) -> Verdict:
    """The verdict that an exception of a claim stands for; None is a PASS."""
    if error is None:
        return Verdict.PASS
    if isinstance(error, Judged):
        return error.verdict
    table: tuple[tuple[type[BaseException], Verdict], ...] = (
        (AssertionError, Verdict.FAIL),
        (FallbackError, Verdict.FAIL),  # another provider or device executes: the artifact does not do what was asked
        (NotSupported, Verdict.NOT_SUPPORTED),
        (ToolchainMissing, Verdict.SKIPPED),
        (WorkerTimeout, Verdict.TIMEOUT),
        (WorkerCrash, Verdict.CRASH),
    )
    return next((verdict for kind, verdict in table if isinstance(error, kind)), Verdict.ERROR)


def one_line(error: BaseException) -> str:
    """An exception as one line for the record, without what pytest's rewritten assert tells of its operands."""
    text = " ".join(str(error).partition("\nassert ")[0].split()) or type(error).__name__
    return (
        text
        if isinstance(error, (AssertionError, Judged)) or type(error).__module__.startswith("exporters")
        else f"{type(error).__name__}: {text}"
    )

"""Ctrl-C, and SIGTERM, by which a CI server cancels a job: either ends a command with one line and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

TOLD = "exportgate: interrupted; nothing half-made was left"
EXIT = 2  # pytest's for a run that was interrupted


class _AtOnce:
    """A handler that ends the process."""

    def __init__(self) -> None:
        self.errors = os.dup(2)  # while pytest collects, what is written to 2 goes into a file of its own

    def __call__(self, number: int, frame: object) -> None:
        os.write(self.errors, f"{TOLD}\n".encode())
        os._exit(EXIT)


def end_at_once() -> None:
    """Until `end_in_order`: nothing has begun, and a module that is being imported may make anything of an exception.

    What the parent process lets be ignored stays ignored.
    """
    if _is_main() and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _AtOnce())
    if _is_main() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _AtOnce())


class _InOrder:
    """A handler that raises, and remembers that it did: a library's `finally` may make another exception of it."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: object) -> None:
        self.came = True
        raise KeyboardInterrupt(signal.Signals(number).name)


_in_order = _InOrder()


def end_in_order() -> None:
    """From here on as a KeyboardInterrupt: workers are ended, the record is closed."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        now = signal.getsignal(number)
        if _is_main() and (now == usual or isinstance(now, _AtOnce)):
            signal.signal(number, _in_order)
            sys.unraisablehook = _quiet(sys.unraisablehook)


def _quiet(told: Any) -> Any:
    """The hook without our interruption, where it came to a finalizer, which cannot raise: `go_on` does."""

    def unless_interrupted(unraisable: Any) -> None:
        if not (_in_order.came and issubclass(unraisable.exc_type, KeyboardInterrupt)):
            told(unraisable)

    return unless_interrupted


def go_on() -> None:
    """Raises what the user asked for once more, where it got lost on its way here.

    Raises:
        KeyboardInterrupt: the run was interrupted since `end_in_order`.
    """
    if _in_order.came:
        raise KeyboardInterrupt


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()

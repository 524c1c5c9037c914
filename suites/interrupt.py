"""Ctrl-C, and SIGTERM, by which a CI server cancels a job: either ends a command with one line and exit code 2."""

from __future__ import annotations

import os
import signal
import threading

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


def end_in_order() -> None:
    """From here on as a KeyboardInterrupt: workers are ended, the record is closed."""
    if _is_main() and isinstance(signal.getsignal(signal.SIGINT), _AtOnce):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    now = signal.getsignal(signal.SIGTERM)
    if _is_main() and (now == signal.SIG_DFL or isinstance(now, _AtOnce)):
        signal.signal(signal.SIGTERM, _raise)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise(number: int, frame: object) -> None:
    raise KeyboardInterrupt("SIGTERM")

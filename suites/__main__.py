"""The command `exportgate`, and `python -m suites`: takes care of Ctrl-C before the long imports."""

from __future__ import annotations

import sys

from suites.interrupt import end_at_once


def main() -> int:
    """Runs one command: see `suites.cli.main`."""
    end_at_once()
    from suites.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())

"""What the suite's own tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained() -> Path:
    """The real trained checkpoint; it is installed by tox and never part of the repository."""
    found = importlib.util.find_spec("railway_obstacle_detector")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package smartrail-obstacle-detector, which holds the trained checkpoint, is not installed")
    return Path(next(iter(found.submodule_search_locations))) / "best.pt"

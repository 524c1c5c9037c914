"""Hooks that a user's conftest.py may implement, where the peer has callbacks on_export_start and on_export_end."""

from __future__ import annotations

import pytest

from exporters.artifact import Artifact
from exporters.spec import ExportSpec


def pytest_exportgate_export_start(description: str) -> None:
    """Called before an artifact is made (not when it comes from the cache)."""


@pytest.hookspec(firstresult=True)
def pytest_exportgate_export_end(artifact: Artifact, spec: ExportSpec) -> Artifact | None:
    """Called with each case's artifact before it is judged; may return another one to be judged in its place."""

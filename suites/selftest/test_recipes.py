"""The workflows in suites/recipes: their exportgate commands are ones that exist (`tox -e lint` checks the rest)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import suites
from suites.cli import _parser

RECIPES = sorted((Path(suites.__file__).parent / "recipes").glob("*.yml"))


def commands(value: Any) -> Iterator[list[str]]:
    """The exportgate commands of a workflow, as words."""
    if isinstance(value, dict):
        for part in value.values():
            yield from commands(part)
    elif isinstance(value, list):
        for part in value:
            yield from commands(part)
    elif isinstance(value, str):
        for line in value.splitlines():
            words = shlex.split(line) if "exportgate " in line else []
            if words and words[0].rpartition("/")[2] == "exportgate":
                yield [w for w in words[1:] if not w.startswith("$")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_its_commands_are_ours(path: Path) -> None:
    found = list(commands(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert [words[0] for words in found] == ["qualify", "qualify", "report"]
    for words in found:
        _parser().parse_args(words[: words.index("--")] if "--" in words else words)


def test_the_merged_report_is_kept_whatever_its_verdict() -> None:
    """`report` exits 1 where the verdict failed, and somebody has to read why."""
    github, gitlab = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in RECIPES)
    steps = github["jobs"]["together"]["steps"]
    made = next(i for i, step in enumerate(steps) if "exportgate report" in step.get("run", ""))
    assert [step.get("if") for step in steps[made + 1 :]] == ["always()"]
    assert gitlab["together"]["artifacts"]["when"] == "always"


def test_there_is_one_for_each_server() -> None:
    assert [path.stem for path in RECIPES] == ["github", "gitlab"]

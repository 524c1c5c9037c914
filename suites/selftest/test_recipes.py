"""The workflows in suites/recipes: their exportgate commands are ones that exist (`tox -e lint` checks the rest)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import suites
from suites.cli import _parser

RECIPES = sorted((Path(suites.__file__).parent / "recipes").glob("*.yml"))
WHAT = re.compile(r"""WHAT: (?:"(.*)"|\$\{\{ startsWith\(github\.ref, 'refs/tags/'\) && '(.*)' \|\| '(.*)' \}\})""")


def commands(value: Any, what: str) -> Iterator[list[str]]:
    """The exportgate commands of a workflow, as words, where $WHAT stands for `what`."""
    if isinstance(value, dict):
        for part in value.values():
            yield from commands(part, what)
    elif isinstance(value, list):
        for part in value:
            yield from commands(part, what)
    elif isinstance(value, str):
        for line in value.splitlines():
            words = shlex.split(line.replace("$WHAT", what)) if "exportgate " in line else []
            if words and words[0].rpartition("/")[2] == "exportgate":
                yield words[1:]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_its_commands_are_ours(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    given = {w for found in WHAT.finditer(text) for w in found.groups() if w}
    assert given == {"-- -m trt", "--release"}
    for what in given:
        found = list(commands(yaml.safe_load(text), what))
        assert [words[0] for words in found] == ["qualify", "qualify", "report"]
        for words in found:
            end = words.index("--") if "--" in words else len(words)
            asked = _parser().parse_args(words[:end])
            # A release refuses what leaves cases or claims out.
            assert not getattr(asked, "release", False) or words[end:] == []
        assert sum("--release" in words for words in found) == (what == "--release")


def test_the_merged_report_is_kept_whatever_its_verdict() -> None:
    """`report` exits 1 where the verdict failed, and somebody has to read why."""
    github, gitlab = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in RECIPES)
    steps = github["jobs"]["together"]["steps"]
    made = next(i for i, step in enumerate(steps) if "exportgate report" in step.get("run", ""))
    assert [step.get("if") for step in steps[made + 1 :]] == ["always()"]
    assert gitlab["together"]["artifacts"]["when"] == "always"


def test_there_is_one_for_each_server() -> None:
    assert [path.stem for path in RECIPES] == ["github", "gitlab"]

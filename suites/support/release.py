"""Release rules: waivers that hold, the must-pass list, and no option that deselects or repeats tests."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from exporters.errors import BadRequest
from suites.support.cases import Case, Selection, matrix
from suites.support.config import Project

SUITES = Path(__file__).resolve().parent.parent


def check_waivers(
    project: Project,
    cases: Sequence[Case] | None,
    items: Sequence[pytest.Item],
    case_of: Callable[[pytest.Item], Case | None],
    release: bool,
) -> None:
    """A waiver that is expired, or names a case or claim that does not exist, is an error.

    A run that is asked for some cases does not see the others' waivers; one of a case that the project's matrix does
    not have either may be of another such run, and a release has none.

    Raises:
        BadRequest: names the waiver and why.
    """
    today = datetime.now(UTC).date()
    ids = {c.id for c in cases} if cases is not None else None
    claims = {str(getattr(i, "originalname", i.name)) for i in items if case_of(i)}
    for waiver in project.waivers:
        where = f"waiver of {waiver.case}::{waiver.claim}"
        if waiver.expires < today:
            raise BadRequest(
                f"{where} expired on {waiver.expires}",
                f"ask {waiver.owner}, see {waiver.issue}; extend it or remove it",
            )
        if ids is not None and waiver.case not in ids:
            whole = {c.id for c in matrix(project, Selection())}
            if waiver.case not in whole and (release or whole <= ids):
                raise BadRequest(f"{where}: no case has this id", "correct it, or remove the waiver")
        if waiver.case in (ids or ()) and claims and waiver.claim not in claims and len(claims) > 1:
            raise BadRequest(f"{where}: no claim has this name", "claims: " + ", ".join(sorted(claims)))


def must_pass_of(project: Project, claims: set[tuple[str, str]]) -> list[str]:
    """Entries of the record's must-pass list: `case::claim`, or `case::*` for a whole case; without a list, all cases.

    A claim that is named needs PASS or WAIVED. Of a whole case those claims are let by that its format cannot have by
    its nature (NOT_SUPPORTED), if any other one passed.
    """
    whole = [entry for entry in project.must_pass if "::" not in entry]
    if not project.must_pass:
        whole = sorted({case for case, _ in claims})
    return [*(entry for entry in project.must_pass if "::" in entry), *(f"{case}::*" for case in whole)]


def check_release(config: pytest.Config, project: Project, cases: Sequence[Case]) -> None:
    """A release run accepts nothing that deselects or repeats tests.

    Cases are left out only where the project's must-pass list says which have to be there.

    Raises:
        BadRequest: names the option, or how many cases are left out.
    """
    refused = (
        ("-k", "keyword"),
        ("-m", "markexpr"),
        ("-x or --maxfail", "maxfail"),
        ("--lf", "lf"),
        ("--ff", "failedfirst"),
        ("--deselect", "deselect"),
        ("--reruns", "reruns"),
        ("--claim", "claim"),
        ("--ignore", "ignore"),
        ("--ignore-glob", "ignore_glob"),
        ("--sw", "stepwise"),
        ("-n", "numprocesses"),
        ("--collect-only", "collectonly"),
    )
    for name, option in refused:
        if getattr(config.option, option, None):
            raise BadRequest(f"a release run was given {name}, which leaves tests out or repeats them", "leave it out")
    if os.environ.get("PYTEST_ADDOPTS"):
        raise BadRequest(f"a release run was given PYTEST_ADDOPTS ({os.environ['PYTEST_ADDOPTS']})", "unset it")
    if any("::" in str(a) for a in config.args):
        raise BadRequest("a release run was given single tests", "name no test")
    _check_cases(project, cases)


def _check_cases(project: Project, cases: Sequence[Case]) -> None:
    whole = [] if project.must_pass else [c.id for c in matrix(project, Selection())]
    left = [name for name in whole if name not in {c.id for c in cases}]
    if left:
        raise BadRequest(
            f"a release run leaves out {len(left)} of the project's {len(whole)} cases, the first is {left[0]}",
            "ask for no model, format or precision, or list what a release needs: must_pass in exportgate.toml",
        )


CLAIMS = ("conformance", "accuracy", "performance")  # folders of the claims


def check_complete(cases: Sequence[Case], judged: set[tuple[str, str]]) -> None:
    """Whatever it was that left them out: a release run judges every claim of every case.

    Raises:
        BadRequest: names what is missing.
    """
    names = [
        name for folder in CLAIMS for path in sorted((SUITES / folder).glob("test_*.py")) for name in _claims(path)
    ]
    absent = [(case.id, name) for case in cases for name in names if (case.id, name) not in judged]
    if absent:
        case, name = absent[0]
        raise BadRequest(
            f"a release run leaves out {len(absent)} claims of {len(cases) * len(names)}, the first is {case}::{name}",
            "name no files, and leave out whatever deselects tests",
        )


def _claims(path: Path) -> list[str]:
    """Names of the claims in a file, which is read and not imported."""
    found = ast.parse(path.read_text(encoding="utf-8")).body
    return [
        node.name
        for node in found
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and any(a.arg == "case" for a in node.args.args)
    ]

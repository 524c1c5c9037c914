"""A report that is signed: who says what of which files, by the user's SSH key, and checked again later.

`statement.json` in a run's folder holds the verdict, the waivers in force, and the SHA-256 of the record, of the
reports and of every file that was judged; `statement.json.sig` is what `ssh-keygen -Y sign` made of it (OpenSSH's
PROTOCOL.sshsig).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from exporters.artifact import digest
from exporters.errors import BadRequest, ToolchainMissing
from reports.record import Run, Summary

STATEMENT = "statement.json"
NAMESPACE = "exportgate"  # a signature for another purpose does not count
SCHEMA = 1


@dataclass(frozen=True)
class Check:
    """What one look at a signed report found: a line for people, and whether it holds."""

    line: str
    holds: bool


def signed_by(folder: Path) -> str:
    """Who signed the report in a folder and when, for the report itself; "" where nobody did."""
    if not (folder / f"{STATEMENT}.sig").is_file():
        return ""
    told = _statement(folder)
    return f"{told['who']}, {told['when']}"


def statement(summary: Summary, who: str, when: str, folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What is signed.

    Args:
        files: the record and the reports, in `folder`.

    Raises:
        BadRequest: an artifact is no longer what was judged.
    """
    return {
        "schema": SCHEMA,
        "who": who,
        "when": when,
        "verdict": summary.verdict,
        "headline": summary.headline,
        "runs": [run.start.run for run in summary.runs],
        "waivers": [
            {"case": row.case.case, "claim": claim.claim, **asdict(claim.waiver)}
            for row in summary.rows
            for claim in row.claims.values()
            if claim.waiver
        ],
        "files": {path.name: digest(path) for path in files},
        "artifacts": [artifact for run in summary.runs for artifact in _artifacts(run)],
    }


def _artifacts(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for case in run.cases:
        if not case.hops or not case.artifact:
            continue
        files = {file.path: file.sha256 for file in case.hops[-1].files}
        root = Path(case.artifact)
        for name, sha256 in files.items():
            if (root / name).is_file() and digest(root / name) != sha256:
                raise BadRequest(
                    f"'{root / name}' of case {case.case} is no longer the file that was judged", "judge it again"
                )
        found.append({"case": case.case, "folder": str(root), "files": files})
    return found


def sign(folder: Path, values: Mapping[str, Any], key: Path) -> Path:
    """Writes the statement and its signature; returns the signature's path. ssh-keygen asks for the key's passphrase.

    Raises:
        ToolchainMissing: there is no ssh-keygen.
        BadRequest: the key is none, or the folder cannot be written.
    """
    path = folder / STATEMENT
    signature = folder / f"{STATEMENT}.sig"
    try:
        signature.unlink(missing_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"'{path}' cannot be written ({error.strerror})", "name a run of yours") from None
    done = _ssh_keygen(["-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(path)])
    if done.returncode or not signature.is_file():
        path.unlink()
        raise BadRequest(
            f"ssh-keygen signed nothing with key '{key}' ({_said(done)})", "name your private key with --key"
        )
    return signature


def verify(folder: Path, signers: Path | None, brought: Sequence[Path] = ()) -> list[Check]:
    """Whether a signature holds, and everything that it speaks of is still what it was.

    Args:
        signers: OpenSSH's file of allowed signers; without one a signature shows only that nothing was changed since.
        brought: files that are to be among those that were judged, wherever they lie now.

    Raises:
        BadRequest: there is no statement or no signature, or they cannot be read.
    """
    path, signature = folder / STATEMENT, folder / f"{STATEMENT}.sig"
    if not signature.is_file():
        raise BadRequest(f"the report in '{folder}' is not signed", "sign it: exportgate sign RUN --key KEY")
    told = _statement(folder)
    checks = [_signature(path, signature, str(told["who"]), signers)]
    for name, sha256 in cast("dict[str, str]", told["files"]).items():
        checks.append(_same(folder / name, sha256, f"{name} of the report"))
    digests = set[str]()
    for artifact in cast("list[dict[str, Any]]", told["artifacts"]):
        for name, sha256 in cast("dict[str, str]", artifact["files"]).items():
            digests.add(sha256)
            place = Path(artifact["folder"]) / name
            if place.is_file():
                checks.append(_same(place, sha256, f"{name} of case {artifact['case']}"))
            elif not brought:
                checks.append(Check(f"{name} of case {artifact['case']} is not there any more ({place})", False))
    for file in brought:
        is_judged = file.is_file() and digest(file) in digests
        checks.append(Check(f"'{file}' is {'' if is_judged else 'none '}of the files that were judged", is_judged))
    return checks


def _signature(path: Path, signature: Path, who: str, signers: Path | None) -> Check:
    words = ["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(signature)]
    if signers is not None:
        words = ["-Y", "verify", "-f", str(signers), "-I", who, "-n", NAMESPACE, "-s", str(signature)]
    done = _ssh_keygen(words, path.read_bytes())
    if done.returncode:
        return Check(f"the signature does not hold for {who} ({_said(done)})", False)
    vouched = "" if signers else "; name the allowed signers with --signers to know whose key it is"
    return Check(f"{_said(done)}, {who}{vouched}", True)


def _same(path: Path, sha256: str, what: str) -> Check:
    if not path.is_file():
        return Check(f"{what} is not there any more", False)
    here = digest(path)
    holds = here == sha256
    return Check(what + ("" if holds else f" was changed: SHA-256 {here[:12]}, signed {sha256[:12]}"), holds)


def _statement(folder: Path) -> dict[str, Any]:
    path = folder / STATEMENT
    try:
        told: Any = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"who": str, "when": str, "verdict": str, "files": dict, "artifacts": list}
        wrong = next((k for k, kind in kinds.items() if not isinstance(told[k], kind)), None)
        if (
            wrong
            or told["schema"] != SCHEMA
            or any(not {"case", "folder", "files"} <= set(a) for a in told["artifacts"])
        ):
            raise ValueError(f"wrong '{wrong or 'schema'}'")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadRequest(
            f"'{path}' is no statement of exportgate ({type(error).__name__}: {error})", "sign it again"
        ) from None
    return cast("dict[str, Any]", told)


def now() -> str:
    """The time of a signature: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _ssh_keygen(words: Sequence[str], given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise ToolchainMissing("there is no ssh-keygen here, which signs and verifies", "install OpenSSH 8.0 or newer")
    # Without standard input of its own it asks for a passphrase on the terminal.
    return subprocess.run([program, *words], input=given, capture_output=True, check=False)


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stdout + b"\n" + done.stderr).decode(errors="replace").split("\n")
    return next((line.strip() for line in lines if line.strip()), f"exit {done.returncode}")

"""A report that is signed: who says what of which files, by the user's SSH key, and checked again later.

`statement.json` in a run's folder holds the verdict, the waivers in force, and the SHA-256 of the record, of the
reports and of every file that was judged; `statement.json.sig` is what `ssh-keygen -Y sign` made of it (OpenSSH's
PROTOCOL.sshsig).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from exporters.artifact import digest
from exporters.errors import BadRequest, ToolchainMissing
from reports.decode import FieldError, build
from reports.events import Waiver
from reports.kept import is_record
from reports.record import Run, Signed, Summary, Word

STATEMENT = "statement.json"
NAMESPACE = "exportgate"  # a signature for another purpose does not count
SCHEMA = 1


@dataclass(frozen=True)
class Waived(Waiver):
    """A waiver in force, and what it is of."""

    case: str
    claim: str


@dataclass(frozen=True)
class Judged:
    """The files of a case's artifact by their names in `folder`, with SHA-256.

    `folder` is "" where none of them was there when it was signed: another machine made and judged them.
    """

    case: str
    folder: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Statement:
    """What is signed; `files` are the record and the reports, by their names beside it, with SHA-256."""

    schema: int
    who: str
    when: str
    verdict: Word
    headline: str
    runs: tuple[str, ...]
    waivers: tuple[Waived, ...]
    files: Mapping[str, str]
    artifacts: tuple[Judged, ...]


@dataclass(frozen=True)
class Check:
    """What one look at a signed report found: a line for people, and whether it holds."""

    line: str
    holds: bool


@dataclass(frozen=True)
class Verified:
    """What was found of a signed report; `told` is None where the signature does not hold, and nothing is told."""

    told: Statement | None
    checks: tuple[Check, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """What was signed, for people: who, when, the headline, each waiver in force, and what was judged elsewhere."""
        if self.told is None:
            return ()
        waived = (
            f"waived until {x.expires}: {x.case} {x.claim}: {x.reason} ({x.owner}, {x.issue})"
            for x in self.told.waivers
        )
        every = sum(len(x.files) for x in self.told.artifacts)
        elsewhere = sum(len(x.files) for x in self.told.artifacts if not x.folder)
        bring = (
            f"{elsewhere} of {every} files that were judged were not there when it was signed: --artifact checks one"
        )
        signed = f"signed by {self.told.who}, {self.told.when}: {self.told.headline}"
        return (signed, *waived, *([bring] if elsewhere else []))


def signed_by(folder: Path, records: Mapping[str, Path], verdict: Word) -> Signed:
    """Who signed the report in a folder and when, for the report itself.

    Args:
        records: what is reported, by the names beside the report.
        verdict: what the report says of them, which another exportgate may have said otherwise.

    Raises:
        ToolchainMissing: there is no ssh-keygen, which checks the signature.
    """
    if not (folder / f"{STATEMENT}.sig").is_file():
        return Signed()
    try:
        text, told = _read(folder)
    except BadRequest:
        return Signed(wrong="has no statement that can be read")
    signed = {name: sha256 for name, sha256 in told.files.items() if is_record(name)}
    if signed != {name: digest(path) for name, path in records.items()}:
        return Signed(wrong=f"is not of {'this record' if len(records) == 1 else 'these records'}")
    if not _signature(folder, text, told.who, None).holds:
        return Signed(wrong="does not hold")
    if told.verdict != verdict:
        return Signed(wrong=f"is of another verdict: {told.verdict}")
    return Signed(f"{told.who}, {told.when}")


def statement(summary: Summary, who: str, when: str, files: Sequence[Path]) -> Statement:
    """What is signed.

    Args:
        files: the record and the reports.

    Raises:
        BadRequest: an artifact is no longer what was judged.
    """
    return Statement(
        schema=SCHEMA,
        who=who,
        when=when,
        verdict=summary.verdict,
        headline=summary.headline,
        runs=tuple(run.start.run for run in summary.runs),
        waivers=tuple(
            Waived(**asdict(claim.waiver), case=row.case.case, claim=claim.claim)
            for row in summary.rows
            for claim in row.claims.values()
            if claim.waiver
        ),
        files={path.name: digest(path) for path in files},
        artifacts=tuple(judged for run in summary.runs for judged in _artifacts(run)),
    )


def _artifacts(run: Run) -> Iterator[Judged]:
    for case in run.cases:
        if not case.hops or not case.artifact:
            continue
        files = {file.path: file.sha256 for file in case.hops[-1].files}
        root = Path(case.artifact)
        here = [name for name in files if (root / name).is_file()]
        for name in here:
            if digest(root / name) != files[name]:
                raise BadRequest(
                    f"'{root / name}' of case {case.case} is no longer the file that was judged", "judge it again"
                )
        yield Judged(case.case, str(root) if here else "", files)


def sign(folder: Path, told: Statement, key: Path) -> Path:
    """Writes the statement and its signature; returns the signature's path. ssh-keygen asks for the key's passphrase.

    Raises:
        ToolchainMissing: there is no ssh-keygen.
        BadRequest: the key is none, or the folder cannot be written.
    """
    path = folder / STATEMENT
    signature = folder / f"{STATEMENT}.sig"
    try:
        signature.unlink(missing_ok=True)
        path.write_text(json.dumps(asdict(told), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"'{path}' cannot be written ({error.strerror})", "name a run of yours") from None
    done = _ssh_keygen(["-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(path)])
    if done.returncode or not signature.is_file():
        path.unlink()
        raise BadRequest(
            f"ssh-keygen signed nothing with key '{key}' ({_said(done)})", "name your private key with --key"
        )
    return signature


def verify(folder: Path, signers: Path | None, brought: Sequence[Path] = ()) -> Verified:
    """Whether a signature holds, its verdict is QUALIFIED, and everything that it speaks of is still what it was.

    Where the signature itself does not hold, nothing that it speaks of is looked at.

    Args:
        signers: OpenSSH's file of allowed signers; without one a signature shows only that nothing was changed since.
        brought: files that are to be among those that were judged, wherever they lie now.

    Raises:
        BadRequest: there is no statement or no signature, or they cannot be read.
    """
    if not (folder / f"{STATEMENT}.sig").is_file():
        raise BadRequest(f"the report in '{folder}' is not signed", "sign it: exportgate sign RUN --key KEY")
    text, told = _read(folder)
    signature = _signature(folder, text, told.who, signers)
    if not signature.holds:
        return Verified(None, (signature,))
    checks = [signature, Check(f"the verdict that was signed is {told.verdict}", told.verdict == "QUALIFIED")]
    checks += [_same(folder / name, sha256, f"{name} of the report") for name, sha256 in told.files.items()]
    for judged in (x for x in told.artifacts if x.folder):
        for name, sha256 in judged.files.items():
            place = Path(judged.folder) / name
            if not brought or _is_file(place):
                checks.append(_same(place, sha256, f"{name} of case {judged.case}"))
    digests = {sha256 for judged in told.artifacts for sha256 in judged.files.values()}
    for file in brought:
        is_judged = _is_file(file) and digest(file) in digests
        checks.append(Check(f"'{file}' is {'' if is_judged else 'none '}of the files that were judged", is_judged))
    return Verified(told, tuple(checks))


def _signature(folder: Path, text: bytes, who: str, signers: Path | None) -> Check:
    signature = str(folder / f"{STATEMENT}.sig")
    words = ["-Y", "check-novalidate", "-n", NAMESPACE, "-s", signature]
    if signers is not None:
        words = ["-Y", "verify", "-f", str(signers), "-I", who, "-n", NAMESPACE, "-s", signature]
    done = _ssh_keygen(words, text)
    if done.returncode:
        return Check(f"the signature does not hold for {who} ({_said(done)})", False)
    vouched = "" if signers else "; name the allowed signers with --signers to know whose key it is"
    return Check(f"{_said(done)}, {who}{vouched}", True)


def _same(path: Path, sha256: str, what: str) -> Check:
    if not _is_file(path):
        return Check(f"{what} is not there any more ({path})", False)
    try:
        here = digest(path)
    except OSError as error:
        return Check(f"{what} cannot be read ({error.strerror})", False)
    holds = here == sha256
    return Check(what + ("" if holds else f" was changed: SHA-256 {here[:12]}, signed {sha256[:12]}"), holds)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _read(folder: Path) -> tuple[bytes, Statement]:
    """The statement as it was signed, and what it says: text from anybody until its signature is checked.

    Raises:
        BadRequest: it is none.
    """
    path = folder / STATEMENT
    try:
        text = path.read_bytes()
        told = build(Statement, json.loads(text), "statement")
        if told.schema != SCHEMA:
            raise FieldError(f"statement.schema is {told.schema}, this exportgate reads {SCHEMA}")
    except (OSError, ValueError, RecursionError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise BadRequest(f"'{path}' is no statement of exportgate ({said})", "sign it again") from None
    return text, told


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

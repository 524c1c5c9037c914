"""Commands on files that are there already: reports signed and verified, engines taken apart, the cache pruned."""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exporters.errors import ArtifactError, BadRequest, ExportgateError


def add_engine(commands: Any) -> None:
    """`exportgate engine strip|wrap|show`."""
    text = "TensorRT engine files: take the metadata header off for trtexec and Triton, put it back, show it."
    engine = commands.add_parser("engine", help=text, description=text)
    engine.set_defaults(command=_engine)
    actions = engine.add_subparsers(dest="action", metavar="ACTION", required=True)
    strip = actions.add_parser("strip", help="write the plain plan and its manifest")
    strip.add_argument("file", metavar="ENGINE")
    strip.add_argument("--output", metavar="PLAN", help="the plan's file (default: beside the engine, as .plan)")
    strip.add_argument("--triton", metavar="REPOSITORY", help="a model repository of Triton: writes config.pbtxt too")
    strip.add_argument("--name", help="the model's name in the repository (default: the file's)")
    wrap = actions.add_parser("wrap", help="put the header of a manifest before its plan")
    wrap.add_argument("file", metavar="PLAN")
    wrap.add_argument("--manifest", metavar="JSON", help="default: the plan's name and .json")
    wrap.add_argument("--output", metavar="ENGINE", help="default: beside the plan, as .engine")
    show = actions.add_parser("show", help="what the header says; the plan is not loaded")
    show.add_argument("file", metavar="ENGINE")
    for part in (strip, wrap):
        part.add_argument("--overwrite", action="store_true", help="replace files that are there")


def add_signature(commands: Any) -> None:
    """`exportgate sign` and `exportgate verify`."""
    text = "Sign a run's report with your SSH key: who, when, the verdict, and the digests of every file it speaks of."
    sign = commands.add_parser("sign", help=text, description=text)
    sign.set_defaults(command=_sign)
    sign.add_argument("run", metavar="RUN", help="folder of the run, or of a merged report")
    sign.add_argument("--key", required=True, metavar="FILE", help="your private key, as for ssh-keygen -Y sign")
    sign.add_argument("--who", metavar="NAME", help="as allowed signers name you (default: user@host)")
    text = (
        "Check a signed report later: the signature, that its verdict is QUALIFIED, and that nothing of what it speaks "
        "of was changed since. Says who signed what, and exits 1 unless all of it holds."
    )
    verify = commands.add_parser("verify", help=text, description=text)
    verify.set_defaults(command=_verify)
    verify.add_argument("run", metavar="RUN", help="folder of the run, or of a merged report")
    verify.add_argument("--signers", metavar="FILE", help="OpenSSH's file of allowed signers: whose key counts")
    verify.add_argument(
        "--artifact",
        action="append",
        default=[],
        metavar="FILE",
        help="has to be among the files that were judged (repeatable)",
    )


def add_cache(commands: Any) -> None:
    """`exportgate cache show|prune`."""
    from exporters.cache import KINDS

    text = "What exportgate keeps between runs: artifacts, timing caches, calibrations, feeds, toolchains."
    cache = commands.add_parser("cache", help=text, description=text)
    cache.set_defaults(command=_cache)
    actions = cache.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("show", help="kinds with their sizes, and each timing cache")
    prune = actions.add_parser("prune", help="remove what was not used for some days")
    prune.add_argument("--older-than", required=True, metavar="DAYS", help="days since the last use; 0 for everything")
    kept = [k for k in KINDS if k != "toolchains"]
    prune.add_argument(
        "--kind", action="append", default=[], metavar="KIND", help=f"{', '.join(KINDS)} (default: all but toolchains)"
    )
    prune.set_defaults(kinds=kept)


def _sign(options: argparse.Namespace, further: list[str]) -> int:
    import getpass
    import socket

    import reports
    from reports import signature
    from reports.kept import read_all, records_in
    from reports.record import Signed

    folder, key = Path(options.run), Path(options.key).expanduser()
    if not folder.is_dir():
        raise BadRequest(f"'{folder}' is no folder", "name the folder of a run")
    if not key.is_file():
        raise BadRequest(f"key '{key}' is no file", "name your private key, as ~/.ssh/id_ed25519")
    who, when = options.who or f"{getpass.getuser()}@{socket.gethostname()}", signature.now()
    if not who.isprintable():
        raise BadRequest(f"--who {who!r} has characters that do not print", "give the name that allowed signers use")
    summary = reports.merge(read_all([folder]))
    made = reports.write([folder], folder, Signed(f"{who}, {when}"))
    try:
        told = signature.statement(summary, who, when, [*records_in(folder), *made.values()])
        print(signature.sign(folder, told, key))
    except ExportgateError:
        reports.write([folder], folder)  # which say what holds: that nobody did, or an earlier signature
        raise
    print(f"signed by {who}: {summary.headline}")
    return 0


def _verify(options: argparse.Namespace, further: list[str]) -> int:
    from reports import signature

    signers = Path(options.signers).expanduser() if options.signers else None
    if signers is not None and not signers.is_file():
        raise BadRequest(f"signers '{signers}' is no file", "name one in the form of ssh-keygen's ALLOWED SIGNERS")
    found = signature.verify(Path(options.run), signers, [Path(a) for a in options.artifact])
    # One line each, whatever names a statement of a stranger has.
    for line in found.lines:
        print(*line.split())
    for check in found.checks:
        print("ok  " if check.holds else "FAIL", *check.line.split())
    wrong = sum(not check.holds for check in found.checks)
    print(f"{'NOT VERIFIED' if wrong else 'VERIFIED'}: {wrong} of {len(found.checks)} checks failed")
    return 1 if wrong else 0


def _engine(options: argparse.Namespace, further: list[str]) -> int:
    from exporters.tensorrt import plans

    source = Path(options.file).expanduser()
    if not source.is_file():
        raise BadRequest(f"'{options.file}' is no file", "name an engine, or for wrap a plan")
    try:
        if options.action == "show":
            print("\n".join(plans.described(source)))
            return 0
        if options.action == "wrap":
            manifest = Path(options.manifest) if options.manifest else source.with_name(f"{source.name}.json")
            target = Path(options.output) if options.output else source.with_suffix(".engine")
            if target.resolve() in (source.resolve(), manifest.resolve()):
                raise BadRequest(f"--output '{target}' is what is wrapped", "name another place")
            _check_free((target,), options.overwrite)
            print(plans.wrap(source, manifest, target))
            return 0
        if options.triton:
            if options.output:
                raise BadRequest(f"--output {options.output} with --triton: a repository has its own names", "drop one")
            name = options.name or source.stem
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise BadRequest(f"name '{name}' is no name of a model", "use letters, digits, _, - and .")
            folder = Path(options.triton) / name
            written = (folder / "config.pbtxt", folder / "1" / "model.plan", folder / "1" / "model.plan.json")
            _check_free(written, options.overwrite)
            print(plans.triton(source, Path(options.triton), name))
            return 0
        if options.name:
            raise BadRequest(f"--name {options.name} without --triton: a plan has no name of its own", "add --triton")
        target = Path(options.output) if options.output else source.with_suffix(plans.SUFFIX)
        if not options.output and target == source:
            raise BadRequest(f"'{source}' is a plain plan already", "give the engine file, or --output")
        if target.resolve() == source.resolve():
            raise BadRequest(f"--output '{target}' is the engine itself", "name another place")
        _check_free((target, target.with_name(f"{target.name}.json")), options.overwrite)
        for path in plans.strip(source, target):
            print(path)
    except ArtifactError as error:  # here the file is what the user gave
        raise BadRequest(error.what, error.fix) from None
    return 0


def _check_free(targets: tuple[Path, ...], overwrite: bool) -> None:
    there = next((t for t in targets if t.exists()), None)
    if there is not None and not overwrite:
        raise BadRequest(f"'{there}' exists", "add --overwrite, or name another place")


def _cache(options: argparse.Namespace, further: list[str]) -> int:
    from exporters import cache
    from exporters.toolchain import cache_root

    if options.action == "prune":
        unknown = next((k for k in options.kind if k not in cache.KINDS), None)
        if unknown is not None:
            raise BadRequest(f"the cache has no kind '{unknown}'", "kinds: " + ", ".join(cache.KINDS))
        try:
            days = float(options.older_than)
        except ValueError:
            days = -1.0
        if not 0 <= days < float("inf"):
            raise BadRequest(f"older-than '{options.older_than}' is no number of days", "give 0 or more")
        gone = cache.prune(days, options.kind or options.kinds)
        for entry in gone:
            print(f"removed {entry.kind}/{entry.path.name} ({_size(entry.bytes)})")
        print(f"{len(gone)} entries removed, {_size(sum(e.bytes for e in gone))}")
        return 0
    found = cache.entries()
    print(cache_root())
    for kind, what in cache.KINDS.items():
        here = [e for e in found if e.kind == kind]
        print(f"{kind}: {len(here)} ({_size(sum(e.bytes for e in here))}) {what}")
    for entry in (e for e in found if e.kind == "timing"):
        used = datetime.fromtimestamp(entry.used, UTC).date().isoformat()
        print(f"timing/{entry.path.name}: {_size(entry.bytes)}, last used {used}")
    return 0


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"

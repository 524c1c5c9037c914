"""exportgate.toml: one file in a user's repository says which models, matrix, tolerances and waivers are judged."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from exporters.client import Limits
from exporters.errors import BadRequest
from exporters.spec import Precision, near
from suites.accuracy.budget import DEFAULTS, Budget

FILE = "exportgate.toml"
KEYS = {"models", "matrix", "tolerances", "accuracy", "latency", "limits", "waivers", "must_pass", "baselines"}


@dataclass(frozen=True)
class Waiver:
    """A known failure that somebody answers for until a day."""

    case: str
    claim: str
    reason: str
    issue: str
    owner: str
    expires: date


@dataclass(frozen=True)
class Latency:
    """The latency gate: `delta` is the slow-down that is let pass; FAIL only where the interval lies above it."""

    delta: float = 0.02
    processes: int = 10
    seconds: float = 1.0
    must_detect: float | None = None


@dataclass(frozen=True)
class Project:
    """A parsed exportgate.toml; `folder` is where it lies, and relative paths in it start there."""

    folder: Path
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    matrix: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tolerances: Sequence[Mapping[str, Any]] = ()
    accuracy: Mapping[Precision, Budget] = field(default_factory=lambda: DEFAULTS)
    latency: Mapping[str, Latency] = field(default_factory=lambda: {"cpu": Latency(), "cuda": Latency()})
    limits: Limits = field(default_factory=Limits)
    waivers: tuple[Waiver, ...] = ()
    must_pass: tuple[str, ...] = ()
    baselines: Path = Path("baselines")

    def latency_on(self, device: str) -> Latency:
        """The latency gate of a device ("cpu", "cuda:0")."""
        return self.latency[device.partition(":")[0]]


def find_project(given: str | None, start: Path, own: bool = False) -> Project:
    """The project of `--project DIR`, else of `start`; else one without models, or exportgate's `own` matrix.

    A user's checkpoint has no part in our own matrix, its gate and its baselines.

    Raises:
        BadRequest: the folder has no exportgate.toml, or it cannot be read.
    """
    if given is not None:
        folder = Path(given).expanduser()
        if not (folder / FILE).is_file():
            raise BadRequest(
                f"project '{given}' has no {FILE}",
                f"write one, or name the folder that has it ({folder.resolve()} was looked at)",
            )
        return read_project(folder / FILE)
    if os.path.lexists(start / FILE):  # a broken link too: not to be passed over for another project
        return read_project(start / FILE)
    # In a checkout our own file lies at the top; in a wheel it is packed beside the suites.
    package = Path(__file__).resolve().parent.parent
    ours = next((p for p in (package.parent / FILE, package / FILE) if p.is_file()), None)
    if ours is None or not own:
        return Project(start, baselines=start / "baselines")
    return read_project(ours)


def read_project(path: Path) -> Project:
    """Parses and checks a file; every mistake is one line that names the key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadRequest(f"{path} cannot be read ({error.strerror})", "repair it, or remove it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not TOML ({error})", "correct that line") from None
    _only(data, KEYS, str(path))
    folder = path.parent.resolve()
    return Project(
        folder=folder,
        models={
            str(k): _table(v, f"{path} [models.{k}]")
            for k, v in _table(data.get("models", {}), f"{path} models").items()
        },
        matrix=_matrix(_table(data.get("matrix", {}), f"{path} [matrix]"), f"{path} [matrix]"),
        tolerances=tuple(_tolerance(t, f"{path} [[tolerances]]") for t in _list(data, "tolerances", str(path), dict)),
        accuracy=_accuracy(_table(data.get("accuracy", {}), f"{path} [accuracy]"), f"{path} [accuracy]"),
        latency=_latency(_table(data.get("latency", {}), f"{path} [latency]"), f"{path} [latency]"),
        limits=_limits(_table(data.get("limits", {}), f"{path} [limits]"), f"{path} [limits]"),
        waivers=_waivers(_list(data, "waivers", str(path), dict), f"{path} [[waivers]]"),
        must_pass=_must_pass(_list(data, "must_pass", str(path), str), str(path)),
        baselines=folder / _text(data, "baselines", str(path), "baselines"),
    )


def _only(table: Mapping[str, Any], keys: set[str], where: str) -> None:
    unknown = next((k for k in table if k not in keys), None)
    if unknown is not None:
        raise BadRequest(
            f"{where}: key '{unknown}' is not known{near(unknown, sorted(keys))}", "keys: " + ", ".join(sorted(keys))
        )


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRequest(f"{where} is {type(value).__name__}, expected a table", "see README, 'A project of your own'")
    return value


def _list(table: Mapping[str, Any], key: str, where: str, kind: type) -> list[Any]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
        raise BadRequest(f"{where}: {key} = {value!r}", f"give a list of {'tables' if kind is dict else 'texts'}")
    return value


def _text(table: Mapping[str, Any], key: str, where: str, default: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{where}: {key} = {value!r}", "give a text")
    return value


def _number(table: Mapping[str, Any], key: str, where: str, default: float, low: float) -> float:
    value = table.get(key, default)
    # TOML has nan and inf: a limit that is either lets everything pass.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        raise BadRequest(f"{where}: {key} = {value!r}", f"give a number of at least {low:g}")
    return float(value)


def _matrix(table: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    _only(table, {"models", "formats", "precisions", "options", "also"}, where)
    for key in ("models", "formats", "precisions"):
        _list(table, key, where, str)
    _table(table.get("options", {}), f"{where} options")
    _list(table, "also", where, dict)
    return table


def _latency(table: Mapping[str, Any], where: str) -> Mapping[str, Latency]:
    """The gate of each kind of device: [latency] holds for a GPU, too, but for what [latency.cuda] says."""
    keys = {"delta", "processes", "seconds", "must_detect"}
    _only(table, keys | {"cuda"}, where)
    plain = {k: v for k, v in table.items() if k != "cuda"}
    cuda = _table(table.get("cuda", {}), f"{where} cuda")
    _only(cuda, keys, f"{where} cuda")
    return {"cpu": _gate(plain, where), "cuda": _gate({**plain, **cuda}, f"{where} cuda")}


def _gate(table: Mapping[str, Any], where: str) -> Latency:
    must = _number(table, "must_detect", where, 0.0, 0.0) or None
    processes = _number(table, "processes", where, 5, 1)
    if processes != int(processes):
        raise BadRequest(f"{where}: processes = {processes:g}", "give a whole number")
    return Latency(
        _number(table, "delta", where, 0.02, 0.0),
        int(processes),
        _number(table, "seconds", where, 1.0, 0.05),
        must,
    )


def _accuracy(table: Mapping[str, Any], where: str) -> Mapping[Precision, Budget]:
    """The budget of each precision: a difference of the metric, or where the default is a share, a share."""
    _only(table, {p.value for p in DEFAULTS}, where)
    made = dict(DEFAULTS)
    for key in table:
        precision = Precision.parse(key)
        allowed = _number(table, key, where, 0.0, 0.0)
        if allowed > 1:
            raise BadRequest(f"{where}: {key} = {allowed:g}", "metrics lie in 0 to 1: give a number up to 1")
        made[precision] = Budget(allowed, DEFAULTS[precision].is_share)
    return made


def _limits(table: Mapping[str, Any], where: str) -> Limits:
    names = {"export", "open", "run", "measure", "memory"}
    _only(table, names, where)
    return Limits(**{k: _number(table, k, where, 1.0, 0.1) for k in table})


def _tolerance(value: Any, where: str) -> Mapping[str, Any]:
    table = _table(value, where)
    _only(table, {"precision", "group", "measure", "allowed", "reason", "relative"}, where)
    missing = next((k for k in ("precision", "group", "measure", "allowed", "reason") if k not in table), None)
    for key in ("precision", "group", "measure", "reason"):
        _text(table, key, where, "-")
    if not isinstance(table.get("relative", False), bool):
        raise BadRequest(f"{where}: relative = {table['relative']!r}", "give true or false")
    measures = {"max_abs", "mean_abs", "p99_abs", "max_rel", "mean_rel", "cosine", "snr_db"}
    if missing or not str(table["reason"]).strip():
        raise BadRequest(
            f"{where}: a tolerance has no {missing or 'reason'}",
            "give precision, group, measure, allowed and a reason from the arithmetic",
        )
    if table["measure"] not in measures:
        raise BadRequest(
            f"{where}: measure '{table['measure']}' is not known", "measures: " + ", ".join(sorted(measures))
        )
    if _number(table, "allowed", where, 0.0, 0.0) > 1 and table["measure"] == "cosine":
        raise BadRequest(f"{where}: a cosine of {table['allowed']} is above 1", "give a number up to 1")
    return {**table, "precision": Precision.parse(table["precision"]).value}


def _waiver(value: Any, where: str) -> Waiver:
    from reports.html import link  # templates, where a project waives something

    table = _table(value, where)
    fields = ("case", "claim", "reason", "issue", "owner", "expires")
    _only(table, set(fields), where)
    missing = next((k for k in fields if not str(table.get(k, "")).strip()), None)
    if missing:
        raise BadRequest(
            f"{where}: the waiver of {table.get('case', '?')} has no {missing}", "a waiver has " + ", ".join(fields)
        )
    case, claim, reason, issue, owner = (_text(table, k, where, "") for k in fields[:-1])
    if not link(issue):
        raise BadRequest(
            f"{where}: the waiver of {case} has issue = '{issue}', which is no web address",
            "write it as https://example.com/issues/12",
        )
    return Waiver(case, claim, reason, issue, owner, _date(table["expires"], where))


def _waivers(rows: Sequence[Any], where: str) -> tuple[Waiver, ...]:
    made = tuple(_waiver(row, where) for row in rows)
    for number, one in enumerate(made):
        if any((one.case, one.claim) == (w.case, w.claim) for w in made[:number]):
            raise BadRequest(f"{where}: {one.case}::{one.claim} is waived twice", "leave one of them")
    return made


def _date(value: Any, where: str) -> date:
    """A day: TOML's own (no time of day, which is a date to Python), or a text that is one from end to end."""
    if type(value) is date:
        return value
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError):
        raise BadRequest(f"{where}: expires = '{value}' is not a date", "write it as 2027-01-31") from None


def _must_pass(entries: Sequence[str], where: str) -> tuple[str, ...]:
    for entry in entries:
        parts = entry.split("::")
        if len(parts) > 2 or not all(p and p == p.strip() for p in parts):
            raise BadRequest(f"{where}: must_pass has '{entry}'", "give a case, or case::claim")
    return tuple(entries)

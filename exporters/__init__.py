"""exportgate's exporters: make artifacts, load them, time them. In Python: `export(spec)`, `load(artifact)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporters.artifact import Artifact
    from exporters.pool import Pool, RemoteSession
    from exporters.spec import ExportSpec

__all__ = ["export", "load"]


def export(spec: ExportSpec) -> Artifact:
    """The artifact of a request, from the cache or made now in a worker. See `exporters.spec.request` for requests.

    Raises:
        ExportgateError: see `exporters.pool.Pool.export`.
    """
    pool = _pool()
    pool.forget()
    return pool.export(spec)


def load(artifact: Artifact, runtime: str = "", device: str = "cpu") -> RemoteSession:
    """A session of an artifact that `export` made, in a worker; `run(feeds)` gives outputs by name as arrays.

    `runtime` is one of the format's; the first one for this kind of device by default.
    """
    from exporters import formats
    from exporters.spec import ExportSpec

    spec = ExportSpec.from_dict(artifact.spec)
    kind = device.partition(":")[0]
    first = next((r.id for r in formats.get(spec.format).runtimes if r.device == kind), "")
    return _pool().open(artifact, spec, runtime or first, device)


def _pool() -> Pool:
    """The workers of this process, ended with it."""
    import atexit

    from exporters import pool

    with pool.sharing:
        if pool.shared is None:
            pool.shared = pool.Pool()
            atexit.register(pool.shared.close)
        return pool.shared

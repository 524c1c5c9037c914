"""A page in headless Chromium as a child: it posts answers to a server on this machine, which responds with frames."""

from __future__ import annotations

import mimetypes
import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from exporters.tfjs.child import Child, Place, new_folder
from exporters.tfjs.places import JS, chromium

FLAGS = (
    "--headless",
    "--disable-gpu",  # what runs is WebAssembly
    "--disable-dev-shm-usage",  # 64 MB in a container
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-extensions",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
    # It calls nobody: no name has an address but that of this machine, and little tries.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--disable-domain-reliability",
    "--disable-client-side-phishing-detection",
    "--disable-breakpad",
    "--metrics-recording-only",
    "--no-pings",
)
# With a pipe for commands, of which there are none, Chromium reads descriptor 3, and ends when nobody can write there
# any more: when this process is gone, even killed.
PIPE = "--remote-debugging-pipe"
LAUNCH = (
    "import os, sys; a, b = map(int, sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Chromium(Child):
    """TensorFlow.js on a page in headless Chromium, with a model that `call({"op": "load"})` opens.

    Args:
        modules: folder node_modules.
        model: the folder with model.json.
        names: of the files in it that the page may read.
    """

    title = "Chromium"

    def __init__(self, modules: Path, model: Path, names: Sequence[str]) -> None:
        self.frames: queue.Queue[Sequence[bytes | memoryview] | None] = queue.Queue()
        answers: queue.Queue[bytes | str] = queue.Queue()
        server = _Server(_files(modules, model, names), self.frames, answers)
        folder = new_folder()
        words = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", server.address]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            words.insert(1, "--no-sandbox")  # it has none for root
        given, kept = _lifeline()
        if given:
            words = [sys.executable, "-I", "-c", LAUNCH, *map(str, given), words[0], PIPE, *words[1:]]

        def before() -> None:
            server.stop()
            _close(kept)

        try:
            quiet = subprocess.DEVNULL
            place = Place(words, before, folder, stdin=quiet, stdout=quiet, pass_fds=given)
        finally:
            _close(given)
        super().__init__(place, answers)

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        self.frames.put(parts)


def _lifeline() -> tuple[Sequence[int], Sequence[int]]:
    """Descriptors for Chromium's commands and answers, and the ends of them that stay here; none on Windows."""
    if os.name == "nt":
        return (), ()
    import fcntl

    (reads, commands), (answers, writes) = os.pipe(), os.pipe()
    given = [fcntl.fcntl(n, fcntl.F_DUPFD, 10) for n in (reads, writes)]  # above 3 and 4, which are overwritten
    _close([reads, writes])
    return given, (commands, answers)


def _close(numbers: Sequence[int]) -> None:
    for number in numbers:
        with suppress(OSError):
            os.close(number)


def _files(modules: Path, model: Path, names: Sequence[str]) -> Mapping[str, Path]:
    """What the page may read, by its path there."""
    libraries = {"tf-core": "tfjs-core", "tf-converter": "tfjs-converter", "tf-backend-wasm": "tfjs-backend-wasm"}
    found = {f"{name}.min.js": modules / "@tensorflow" / p / "dist" / f"{name}.min.js" for name, p in libraries.items()}
    binaries = (modules / "@tensorflow/tfjs-backend-wasm/dist").glob("*.wasm")
    return {
        **found,
        **{f"wasm/{path.name}": path for path in binaries},
        **{name: JS / name for name in ("index.html", "inference.js", "detections.js", "page.js")},
        **{f"model/{name}": model / name for name in names},
    }


class _Server(ThreadingHTTPServer):
    """Serves one page on this machine, under a path that nobody else knows."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        files: Mapping[str, Path],
        frames: queue.Queue[Sequence[bytes | memoryview] | None],
        answers: queue.Queue[bytes | str],
    ) -> None:
        self.files, self.frames, self.answers = files, frames, answers
        self.secret = secrets.token_urlsafe(16)
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.secret}/index.html"

    def stop(self) -> None:
        self.frames.put(None)
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke: what becomes of the page is told elsewhere."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self._name()
        if name == "alive":
            self._watch()
        elif name in self.server.files:
            try:
                data = self.server.files[name].read_bytes()
            except OSError:
                return self.send_error(404)
            self._head(200, mimetypes.guess_type(name)[0] or "application/octet-stream", len(data))
            self.wfile.write(data)
        else:
            self.send_error(404)
        return None

    def do_POST(self) -> None:
        if self._name() != "exchange":
            return self.send_error(404)
        self.server.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
        frame = self.server.frames.get()
        if frame is None:
            return self.send_error(410)
        self._head(200, "application/octet-stream", sum(len(part) for part in frame))
        for part in frame:
            self.wfile.write(part)
        return None

    def _watch(self) -> None:
        """A response without an end: the page closes the connection when it goes, or crashes."""
        self.close_connection = True
        self._head(200, "text/event-stream", None)
        with suppress(OSError):
            while self.connection.recv(1024):
                pass
        self.server.answers.put("its page is gone")

    def _name(self) -> str:
        """The path behind the secret; "" where that is wrong."""
        _, secret, name = ("/" + unquote(self.path).lstrip("/")).partition(f"/{self.server.secret}/")
        return name if secret else ""

    def _head(self, code: int, kind: str, length: int | None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        # Pages that are isolated from others may share memory between threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        """Not to the log of the worker."""

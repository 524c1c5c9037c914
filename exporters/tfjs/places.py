"""Where Node.js, Chromium and the npm packages are. `exportgate toolchain sync tensorflow` brings the packages."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from exporters.errors import ToolchainMissing
from exporters.toolchain import cache_root

JS = Path(__file__).parent / "js"
PACKAGES = ("tfjs-core", "tfjs-converter", "tfjs-backend-wasm")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def node_modules() -> Path:
    """The npm packages: of the environment of this interpreter, or of the one that `sync` made.

    Raises:
        ToolchainMissing: one of them is in neither.
    """
    places = [folder / "node_modules" for folder in (Path(sys.prefix), cache_root() / "toolchains" / "tensorflow")]
    for place in places:
        if all((place / "@tensorflow" / name / "package.json").is_file() for name in PACKAGES):
            return place
    absent = next(n for n in PACKAGES if not (places[-1] / "@tensorflow" / n / "package.json").is_file())
    raise ToolchainMissing(
        f"toolchain tensorflow: npm package @tensorflow/{absent} is not installed",
        "run 'exportgate toolchain sync tensorflow' where npm is on the PATH",
    )


def node() -> str:
    """Node.js.

    Raises:
        ToolchainMissing: it is not on the PATH.
    """
    found = shutil.which("node")
    if not found:
        raise ToolchainMissing("Node.js is not on the PATH", "apt-get install nodejs npm, or nodejs.org")
    return found


def chromium() -> str:
    """Chromium, or Chrome.

    Raises:
        ToolchainMissing: none is on the PATH.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        raise ToolchainMissing(
            f"there is no Chromium on the PATH ({', '.join(BROWSERS)})", "apt-get install chromium, or install Chrome"
        )
    return found


def needs_node() -> None:
    """Raises ToolchainMissing where the runtime `node` lacks something."""
    node()
    node_modules()


def needs_chromium() -> None:
    """Raises ToolchainMissing where the runtime `chromium` lacks something."""
    chromium()
    node_modules()

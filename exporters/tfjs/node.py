"""Node.js as a child: frames through its standard input and output, each behind its length."""

from __future__ import annotations

import queue
import struct
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from exporters.tfjs.child import Child, Place
from exporters.tfjs.places import JS, node


class Node(Child):
    """TensorFlow.js in Node.js, with a model that `call({"op": "load"})` opens. It ends when its input does."""

    title = "Node.js"

    def __init__(self, modules: Path, model: Path) -> None:
        words = [node(), str(JS / "node.js"), str(modules.resolve()), str(model.resolve())]
        place = Place(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        answers: queue.Queue[bytes | str] = queue.Queue()
        assert place.process.stdout
        threading.Thread(target=_listen, args=(place.process.stdout, answers), daemon=True).start()
        super().__init__(place, answers)

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        pipe = self.place.process.stdin
        assert pipe
        with suppress(OSError, ValueError):  # it is gone, which is seen when its answer is waited for
            pipe.write(struct.pack("<I", sum(len(p) for p in parts)))
            for part in parts:
                pipe.write(part)
            pipe.flush()


def _listen(pipe: IO[bytes], answers: queue.Queue[bytes | str]) -> None:
    """Moves frames from the pipe to the queue until it ends."""
    with suppress(OSError, ValueError, struct.error):
        while True:
            (length,) = struct.unpack("<I", pipe.read(4))
            frame = pipe.read(length)
            if len(frame) < length:
                return
            answers.put(frame)

"""Refusals inside the checkpoint reader: what is wrong and the fix, before the file's name is known."""

from __future__ import annotations

from exporters.errors import CheckpointError, UnsafeFile

AGAIN = "copy or download the file again"
RESAVE = "save model.state_dict() with a current torch.save, or as .safetensors"
STATE_ONLY = "have its owner save model.state_dict() alone, as .safetensors or with torch.save"


class RefusalError(Exception):
    """Raised inside the reader, which adds the file's name: what is wrong, the fix, and whether code would run."""

    def __init__(self, what: str, fix: str, *, unsafe: bool = False) -> None:
        super().__init__(what)
        self.what, self.fix, self.unsafe = what, fix, unsafe

    def of(self, file: str) -> CheckpointError | UnsafeFile:
        """This refusal as the error that people see."""
        return (UnsafeFile if self.unsafe else CheckpointError)(f"{file} {self.what}", self.fix)


def shown(text: str) -> str:
    """A string of the file in printable ASCII and at most 100 characters, for one line of a message."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= 100 else f"{plain[:97]}..."

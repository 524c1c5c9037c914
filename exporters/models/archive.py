"""The zip file of torch.save, checked before anything is read from it, and what a file is that is no such archive."""

from __future__ import annotations

import codecs
import re
import stat
import struct
import zipfile
from collections import Counter
from typing import BinaryIO

import numpy as np

from exporters.models.refusal import AGAIN, RESAVE, RefusalError, shown
from exporters.models.stand_ins import Storage
from exporters.models.tensors import NUMPY
from exporters.models.unpickle import MAX_PICKLE

_MAX_ENTRIES = 2**17
_CHECK = "it is an exported model, not weights: check it with `exportgate check FILE --model WEIGHTS`"


class Archive:
    """A zip file of torch.save, checked before anything is read from it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
            what = f"is damaged: a zip archive of {size} bytes whose table of contents is missing or broken"
            raise RefusalError(f"{what} ({shown(str(error))})", AGAIN) from error
        entries = self._zip.infolist()
        if len(entries) > _MAX_ENTRIES:
            raise RefusalError(f"has {len(entries)} entries, the limit is {_MAX_ENTRIES}", RESAVE)
        for entry in entries:
            _check_entry(entry)
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            twice = Counter(entry.filename for entry in entries).most_common(1)[0][0]
            raise RefusalError(f"has two entries named {shown(twice)}", RESAVE)
        # Overlapping entries, a kind of zip bomb, add up to more than the file.
        if sum(entry.file_size for entry in entries) > size:
            raise RefusalError(f"has entries of more than its own {size} bytes", RESAVE)
        self._prefix = self._root()
        order = self._entries.get(f"{self._prefix}/byteorder")
        if order is not None and self._bytes(order) != b"little":
            raise RefusalError("was saved in big-endian byte order", RESAVE)

    def _root(self) -> str:
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any("/code/" in name or name.endswith("/constants.pkl") for name in self._entries):
            raise RefusalError("is a TorchScript archive, whose weights cannot be taken apart from its code", _CHECK)
        if any(name.endswith("archive_format") for name in self._entries):
            raise RefusalError("is a torch.export archive (.pt2)", _CHECK)
        if len(pickles) != 1:
            listed = ", ".join(shown(name) for name in list(self._entries)[:3]) or "nothing"
            what = f"is a zip with {len(pickles) or 'no'} data.pkl (it holds {listed}), not an archive of torch.save"
            raise RefusalError(what, "give a .pt checkpoint or a .safetensors file")
        return pickles[0].removesuffix("/data.pkl")

    def _bytes(self, entry: zipfile.ZipInfo) -> bytes:
        try:
            return self._zip.read(entry)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
            raise RefusalError(f"is damaged: {shown(str(error)) or 'an entry cannot be read'}", AGAIN) from error

    def pickle(self) -> bytes:
        """The pickle; refused unread when it is larger than any checkpoint's."""
        entry = self._entries[f"{self._prefix}/data.pkl"]
        if entry.file_size > MAX_PICKLE:
            limit = f"{entry.file_size / 2**20:.0f} MiB, the limit is {MAX_PICKLE // 2**20}"
            raise RefusalError(f"has a data.pkl of {limit}", RESAVE)
        return self._bytes(entry)

    def storage(self, storage: Storage) -> bytes:
        """The bytes of a storage, exactly as many as its dtype and size say."""
        name = f"{self._prefix}/data/{storage.key}"
        entry = self._entries.get(name)
        if entry is None:
            raise RefusalError(f"is damaged: the entry {shown(name)} is missing", AGAIN)
        itemsize = np.dtype(NUMPY.get(storage.dtype, "u1")).itemsize
        if entry.file_size != storage.size * itemsize:
            expected = f"{storage.size} elements of {storage.dtype}"
            raise RefusalError(f"is damaged: {shown(name)} has {entry.file_size} bytes, not {expected}", AGAIN)
        return self._bytes(entry)


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        what = f"has a compressed entry, {shown(name)}, which torch.save never writes and which may unpack to any size"
        raise RefusalError(what, "unpack it and zip it again without compression (zip -0), or save it again")
    if entry.flag_bits & 1:
        raise RefusalError(f"has an encrypted entry, {shown(name)}", "unpack it, or save it again")
    odd = "\0" in name or "\\" in name or name[1:3] == ":/"
    if odd or not {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/")):
        raise RefusalError(f"has an entry with an unsafe path, {shown(name)}", RESAVE)
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise RefusalError(f"has a symbolic link in it, {shown(name)}", RESAVE)


def other_kind(head: bytes) -> tuple[str, str]:
    """What a file is that is neither a zip nor safetensors, by its first 4 KiB, and what to do about it."""
    if not head.strip(b"\0"):
        return ("is empty" if not head else "holds only zeros"), AGAIN
    # The magic number with which torch.save began its files until 1.6, as a pickled integer.
    if head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."):
        return "is in torch.save's old format, from before torch 1.6", "load and save it again with a current torch"
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "is a bare pickle, not an archive of torch.save", RESAVE
    if head.startswith((b"ftrt", b"ptrt")) or head[4:6] == b'{"':
        return "is a TensorRT engine", _CHECK
    # ModelProto: ir_version, then producer, version, domain, graph or opset_import.
    if re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", head):
        return "is an ONNX model", _CHECK
    if head[4:8] == b"TFL3":
        return "is a TFLite model", _CHECK
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file (Keras weights?)", "give a PyTorch checkpoint"
    if head.startswith(b"\x1f\x8b"):
        return "is compressed with gzip", "unpack it first"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip("\ufeff \t\r\n")
    except UnicodeDecodeError:
        return "is neither an archive of torch.save nor safetensors", "give a .pt checkpoint or a .safetensors file"
    if text.startswith("version https://git-lfs"):
        return "is a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"
    if text[:64].lower().startswith(("<!doctype html", "<html", "<head", "<?xml")):
        return "is a web page, not weights", "download the file itself, not the page that links to it"
    if all(character.isprintable() or character.isspace() for character in text):
        return f"is a text file (it begins {shown(text[:24])!r})", "give a .pt checkpoint or a .safetensors file"
    return "is neither an archive of torch.save nor safetensors", "give a .pt checkpoint or a .safetensors file"

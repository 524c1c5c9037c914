"""The safe checkpoint reader: what it reads equals what PyTorch reads, and a hostile file is refused in one line."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exporters.errors import BadRequest, CheckpointError, ExportgateError, UnsafeFile
from exporters.models.checkpoint import Checkpoint, read_checkpoint
from exporters.models.unpickle import MAX_PICKLE
from suites.selftest.conftest import is_long

ROOT = Path(__file__).parents[2]

# A pickle by hand, in protocol 2. What torch.save writes for a state dict {"w": 4 floats}:
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x04tQ%s\x89ccollections\nOrderedDict\n)RtR"
)
PLAIN = b"K\x00K\x04\x85K\x01\x85"  # offset 0, shape (4,), stride (1,)
VALUES = np.arange(4, dtype="<f4").tobytes()


def text(value: str) -> bytes:
    """The opcodes that push a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def item(key: bytes, value: bytes) -> bytes:
    """The opcodes of a dict with one item."""
    return b"}" + key + value + b"s"


def archive(
    path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None, *, order: bytes = b"little"
) -> Path:
    """A zip as torch.save lays it out."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("best/data.pkl", pickled)
        file.writestr("best/byteorder", order)
        for key, data in ({"0": VALUES} if storages is None else storages).items():
            file.writestr(f"best/data/{key}", data)
    return path


def valid(tensor: bytes = TENSOR % PLAIN) -> bytes:
    """The pickle of a state dict with the tensor `w`."""
    return b"\x80\x02" + item(text("w"), tensor) + b"."


def refusal(path: Path, kind: type[ExportgateError], *says: str) -> str:
    """Reads the file, asserts that it is refused in one line with a fix, and gives the line."""
    with pytest.raises(ExportgateError) as caught:
        read_checkpoint(path)
    line = str(caught.value)
    assert type(caught.value) is kind, line
    assert path.name in line and caught.value.fix and "\n" not in line and len(line) < 500
    for words in says:
        assert words in line
    return line


# What it reads ------------------------------------------------------------------------------------------------------


def state_of_all_dtypes() -> dict[str, Any]:
    import torch

    base = torch.arange(24).reshape(2, 3, 4)
    names = ["float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]
    names += ["uint16", "uint32", "uint64"]
    state = {name: base.to(getattr(torch, name)) for name in names}
    return state | {
        "transposed": base.float().transpose(0, 2),
        "strided": base.float()[:, ::2, 1:],
        "expanded": torch.ones(3, 1).expand(3, 2),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(base.half()),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("under", ["", "model", "state_dict"])
def test_a_state_dict_reads_as_pytorch_has_it(tmp_path: Path, under: str, protocol: int) -> None:
    import torch

    state = OrderedDict(state_of_all_dtypes())
    torch.save({under: state, "epoch": 3} if under else state, tmp_path / "a.pt", pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / "a.pt")
    assert list(read.state) == list(state)
    for name, tensor in state.items():
        expected = tensor.detach().numpy()
        assert read.state[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(read.state[name], expected, err_msg=name)
        assert read.state[name].flags.c_contiguous and read.state[name].flags.writeable
    assert (read.layers, read.family, read.names, read.task) == ((), "", None, None)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bfloat16_becomes_the_same_numbers_in_float32(tmp_path: Path, suffix: str) -> None:
    import torch
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    tensor = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    path = tmp_path / f"a{suffix}"
    torch.save({"w": tensor}, path) if suffix == ".pt" else save_file({"w": tensor}, path)
    read = read_checkpoint(path).state["w"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, tensor.float().numpy())


def test_names_that_share_a_tensor_share_an_array(tmp_path: Path) -> None:
    import torch

    whole = torch.arange(8.0)
    torch.save({"a": whole, "b": whole, "tail": whole[4:]}, tmp_path / "a.pt")
    state = read_checkpoint(tmp_path / "a.pt").state
    assert state["a"] is state["b"]
    assert state["tail"].tolist() == [4, 5, 6, 7]


def test_reading_imports_neither_torch_nor_the_package() -> None:
    code = "import sys, exporters.models.checkpoint; sys.exit(bool({'torch', 'ultralytics'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def package(monkeypatch: pytest.MonkeyPatch, flat: bool = False) -> types.SimpleNamespace:
    """Empty classes under the names that the peer's checkpoints use, so that torch.save can write such a checkpoint."""
    import torch

    places = {"DetectionModel": "tasks", "PoseModel": "tasks", "Conv": "modules.conv", "Detect": "modules.head"}
    made = types.SimpleNamespace()
    for name, place in places.items():
        module = "ultralytics.nn." + ("modules" if flat and place != "tasks" else place)

        def forward(self: Any, x: Any) -> Any:
            return x

        forward.__module__, forward.__qualname__ = module, f"{name}.forward"
        kind = type(name, (torch.nn.Module,), {"__module__": module, "forward": forward})
        setattr(made, name, kind)
    loss = type("v8DetectionLoss", (), {"__module__": "ultralytics.utils.loss"})
    space = type("IterableSimpleNamespace", (types.SimpleNamespace,), {"__module__": "ultralytics.utils"})
    made.loss, made.space = loss, space
    for kind in vars(made).values():
        parts = kind.__module__.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
        setattr(sys.modules[kind.__module__], kind.__name__, kind)
    return made


def detector(peer: types.SimpleNamespace, family: str = "DetectionModel") -> Any:
    import torch

    model, conv, head = getattr(peer, family)(), peer.Conv(), peer.Detect()
    conv.conv, conv.bn = torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4)
    head.cv2 = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.SiLU())])
    head.register_buffer("kept", torch.ones(2))
    head.register_buffer("left_out", torch.ones(2), persistent=False)
    head.stride = torch.tensor([8.0, 16.0, 32.0])
    # Heads of 8.0.x and fused models keep methods as attributes; unpickled, they are calls of getattr.
    head.detect, model.forward = peer.Detect.forward, model.forward
    model.model = torch.nn.Sequential(conv, head)
    model.names, model.stride, model.yaml = {0: "cat", 1: "dog"}, head.stride, {"nc": 2, "scale": "n"}
    model.args, model.criterion = peer.space(task="detect"), peer.loss()
    model.criterion.device = torch.device("cpu")
    return model.half()


def test_what_a_module_computes_with_besides_its_tensors_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model = detector(package(monkeypatch))
    model.model[0].act = torch.nn.Identity()
    torch.save(model, tmp_path / "a.pt")
    modules = read_checkpoint(tmp_path / "a.pt").modules
    assert modules["model.0.act"] == {"class": "Identity"}
    assert modules["model.1.cv2.0.1"] == {"class": "SiLU"}
    assert modules["model.0.bn"] == {"class": "BatchNorm2d", "eps": 1e-5}
    assert (modules["model.0.conv"]["kernel_size"], modules["model.0.conv"]["stride"]) == ((3, 3), (1, 1))


@pytest.mark.parametrize("flat", [False, True], ids=["modules", "before-8.0.50"])
@pytest.mark.parametrize("whole", [False, True], ids=["in-a-dict", "module-alone"])
def test_a_pickled_module_reads_as_its_state_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool, flat: bool
) -> None:
    import torch

    model = detector(package(monkeypatch, flat))
    torch.save(model if whole else {"model": model, "ema": None}, tmp_path / "a.pt")
    read, expected = read_checkpoint(tmp_path / "a.pt"), model.state_dict()
    assert list(read.state) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read.state[name], tensor.numpy(), err_msg=name)
    assert "model.1.kept" in read.state and "model.1.left_out" not in read.state
    assert (read.family, read.layers) == ("DetectionModel", ("Conv", "Detect"))


def test_what_a_checkpoint_says_about_its_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = detector(package(monkeypatch), "PoseModel")
    model.kpt_shape = [17, 3]
    top = {"author": "A. Uthor", "license": "CC0", "version": "8.2.0", "date": "2024-07-01", "git": {"root": None}}
    torch.save({"model": model, "train_args": {"imgsz": [384, 640]}, **top}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.sha256 == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
    assert (read.names, read.stride, read.imgsz, read.scale) == ({0: "cat", 1: "dog"}, 32, (384, 640), "n")
    # The class says pose; the arguments beside it say detect.
    assert (read.task, read.kpt_shape) == ("pose", (17, 3))
    assert (read.author, read.license, read.version) == ("A. Uthor", "CC0", "8.2.0")
    assert read.info == {"date": "2024-07-01"}


def test_the_moving_average_is_preferred_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    peer = package(monkeypatch)
    model, average = detector(peer), detector(peer)
    torch.save({"model": model, "ema": average}, tmp_path / "a.pt")
    expected = average.state_dict()["model.0.conv.weight"].numpy()
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "a.pt").state["model.0.conv.weight"], expected)


def test_the_real_checkpoint_reads_as_pytorch_and_its_package_read_it() -> None:
    spec = importlib.util.find_spec("railway_obstacle_detector")
    if spec is None or spec.origin is None:
        pytest.skip("smartrail-obstacle-detector is not installed (pip install --no-deps)")
    read = read_checkpoint(Path(spec.origin).with_name("best.pt"))
    content = hashlib.sha256()
    for name, values in read.state.items():
        content.update(f"{name} {values.dtype} {values.shape} ".encode() + values.tobytes())
    # Of the state_dict that torch.load gave with Ultralytics 8.4.190 and torch 2.13, in an environment that has both.
    assert content.hexdigest() == "495361f13e4358a83528b8583a6b96897cd88daa75e13fc862c11257bcd06d57"
    assert len(read.state) == 355
    assert (read.family, read.layers[-1], len(read.layers)) == ("DetectionModel", "Detect", 23)
    assert read.names == dict(enumerate(["Animal", "Car", "Person", "Rock", "Trash", "Tree"]))
    assert (read.task, read.stride, read.imgsz, read.scale, read.version) == ("detect", 32, 640, None, "8.4.7")


# Hostile pickles ----------------------------------------------------------------------------------------------------

RUN = text("touch canary") + b"\x85R"  # a call with the tuple ("touch canary",)
CALLS = {
    "reduce os.system": (b"cos\nsystem\n" + RUN, "os.system"),
    "reduce posix.system": (b"cposix\nsystem\n" + RUN, "posix.system"),
    "reduce builtins.eval": (b"cbuiltins\neval\n" + text("open('canary', 'w')") + b"\x85R", "builtins.eval"),
    "reduce __builtin__.eval": (b"c__builtin__\neval\n" + text("open('canary', 'w')") + b"\x85R", "__builtin__.eval"),
    "reduce builtins.exec": (b"cbuiltins\nexec\n" + text("open('canary', 'w')") + b"\x85R", "builtins.exec"),
    "reduce builtins.__import__": (b"cbuiltins\n__import__\n" + text("os") + b"\x85R", "builtins.__import__"),
    "reduce subprocess.Popen": (b"csubprocess\nPopen\n" + RUN, "subprocess.Popen"),
    "reduce a storage from bytes": (b"ctorch.storage\n_load_from_bytes\n" + RUN, "torch.storage._load_from_bytes"),
    "reduce torch.hub.load": (b"ctorch.hub\nload\n" + RUN, "torch.hub.load"),
    "reduce the peer's downloads": (b"cultralytics.utils.downloads\nsafe_download\n" + RUN, "safe_download"),
    "getattr of os": (b"cbuiltins\ngetattr\ncos\nsystem\n" + text("__call__") + b"\x86R", "os.system"),
    "getattr of a layer": (
        b"c__builtin__\ngetattr\nctorch.nn.modules.conv\nConv2d\n" + text("__init__") + b"\x86R",
        "builtins.getattr",
    ),
    "getattr of a dotted method": (
        b"c__builtin__\ngetattr\nctorch.nn.modules.conv\nConv2d\n" + text("forward.__globals__") + b"\x86R",
        "builtins.getattr",
    ),
    "getattr of a text": (b"c__builtin__\ngetattr\n" + text("x") + text("forward") + b"\x86R", "builtins.getattr"),
    "newobj": (b"csubprocess\nPopen\n" + text("touch canary") + b"\x85\x81", "subprocess.Popen"),
    "newobj_ex": (b"ctorch.nn.modules.conv\nConv2d\n)}\x92", "NEWOBJ_EX"),
    "inst": (b"(" + text("touch canary") + b"ios\nsystem\n", "INST"),
    "obj": (b"(ctorch.nn.modules.conv\nConv2d\n" + text("touch canary") + b"o", "OBJ"),
    "ext1": (b"\x82\x01", "EXT1"),
    "ext2": (b"\x83\x01\x00", "EXT2"),
    "ext4": (b"\x84\x01\x00\x00\x00", "EXT4"),
    "a persistent id in text": (b"Pcanary\n", "PERSID"),
    "a dotted stack_global": (
        text("torch.nn.modules.module") + text("Module.__init__.__globals__") + b"\x93",
        "torch.nn.modules.module.Module.__init__.__globals__",
    ),
    "a dotted stack_global of the peer": (
        text("ultralytics.nn.tasks") + text("DetectionModel.__init__.__globals__") + b"\x93",
        "ultralytics.nn.tasks.DetectionModel.__init__.__globals__",
    ),
    "a stack_global": (text("posix") + text("system") + b"\x93" + RUN, "posix.system"),
    "a name with a terminal's escapes": (b"cos\x1b[2J\nsystem\n", r"os\x1b[2J.system"),
    "build with __setstate__": (
        b"ctorch.nn.modules.conv\nConv2d\n)\x81" + item(text("__setstate__"), b"cos\nsystem\n") + b"b" + b"}b",
        "os.system",
    ),
    "a copied code object": (b"ctypes\nCodeType\n)R", "types.CodeType"),
    "numpy's scalar by another path": (b"cnumpy.testing._private.utils\nrunstring\n" + RUN, "runstring"),
    "a whole module of another package": (
        b"ctorchvision.models.resnet\nResNet\n)\x81",
        "torchvision.models.resnet.ResNet",
    ),
}


@pytest.mark.parametrize(("opcodes", "named"), CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("place", ["at the top", "beside weights"])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opcodes: bytes, named: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = b"\x80\x02" + (
        opcodes if place == "at the top" else b"}(" + text("w") + TENSOR % PLAIN + text("x") + opcodes
    )
    path = archive(tmp_path / "best.pt", pickled + (b"." if place == "at the top" else b"u."))
    line = refusal(path, UnsafeFile, named, "do not load this file")
    assert line.isprintable()
    assert not Path("canary").exists()


def test_the_canary_would_have_been_made_by_an_ordinary_unpickler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + CALLS["reduce posix.system"][0] + b".")
    assert Path("canary").exists()


def test_a_state_named_like_a_method_is_only_stored(tmp_path: Path) -> None:
    state = b"}(" + b"".join(text(key) + text("x") for key in ("__setstate__", "__class__", "__dict__", "attrs")) + b"u"
    opcodes = b"ctorch.nn.modules.conv\nConv2d\n)\x81" + state + b"b" + state + b"b"
    refusal(archive(tmp_path / "best.pt", b"\x80\x02" + opcodes + b"."), CheckpointError, "holds no weights", "Conv2d")


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
BROKEN = {
    "nested persistent ids": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + STORAGE + text("cpu") + b"K\x04tQ.",
    "a persistent id of a class": b"(" + text("storage") + b"ctorch.nn.modules.conv\nConv2d\n00K\x04tQ.",
    "a persistent id that is a text": text("storage") + b"Q.",
    "a negative storage": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + b"J\xff\xff\xff\xfftQ.",
    "a call of a dtype": b"ctorch\nfloat16\n)R.",
    "a call of a storage": b"ctorch\nFloatStorage\n)R.",
    "a call of a text": text("x") + b")R.",
    "a call without a tuple": b"ccollections\nOrderedDict\n}R.",
    "an instance of a function": b"ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
    "a state for a name": b"ctorch.nn.modules.conv\nConv2d\n}b.",
    "a state for a function": b"ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "items for a name": b"ctorch.nn.modules.conv\nConv2d\n" + text("x") + b"Ns.",
    "an append to a dict": b"}Na.",
    "items without a value": b"}(" + text("x") + b"u.",
    "a tuple as a key": b"}))\x86Ns.",
    "a list as a key": b"}]Ns.",
    "a huge integer as a key": b"}\x8a\x14" + b"\x7f" * 20 + b"Ns.",
    "tuples that take for ever to hash": b"}N" + b"q\x00h\x00\x86" * 200 + b"Ns.",
    "a set of tuples": b"c__builtin__\nset\n])a\x85R.",
    "no stack": b"R.",
    "no mark": b"t.",
    "no memo": b"h\x07.",
    "no end": b"}",
    "nothing": b"",
    "a text that is too long": b"X\xff\xff\xff\x7fabc.",
    "a text that is no UTF-8": b"X\x01\x00\x00\x00\xff.",
    "an unfinished name": b"ctorch",
    "an unknown opcode": b"\xff.",
    "an opcode of protocol 0": b"I42\n.",
    "a protocol to come": b"\x80\x09N.",
    "a frame past the end": b"\x95" + b"\xff" * 8 + b".",
}


@pytest.mark.parametrize("opcodes", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_pickle_is_called_damaged(tmp_path: Path, opcodes: bytes) -> None:
    refusal(archive(tmp_path / "best.pt", opcodes), CheckpointError, "damaged", "download the file again")


HARMLESS = {
    "a huge memo index": b"Nr\xff\xff\xff\xff.",
    "lists nested without end": b"]" * 500_000 + b"a" * 499_999 + b".",
    "tuples nested without end": b")" + b"\x85" * 500_000 + b".",
    "a list in itself": b"]q\x00h\x00a.",
    "a module without tensors": b"ctorch.nn.modules.conv\nConv2d\n)\x81" + item(text("_modules"), b"}") + b"b.",
    "a pickle of too many objects": b"}" * 2_000_000 + b".",
    "a pickle too large": b"N" * (MAX_PICKLE + 1),
}


@pytest.mark.parametrize("opcodes", HARMLESS.values(), ids=HARMLESS.keys())
def test_a_pickle_made_to_exhaust_the_reader_is_refused_at_once(tmp_path: Path, opcodes: bytes) -> None:
    refusal(archive(tmp_path / "best.pt", b"\x80\x02" + opcodes), CheckpointError)


def test_a_module_inside_itself_is_refused(tmp_path: Path) -> None:
    opcodes = b"ctorch.nn.modules.conv\nConv2d\n)\x81q\x00" + item(text("_modules"), item(text("a"), b"h\x00")) + b"b."
    refusal(archive(tmp_path / "best.pt", opcodes), CheckpointError, "modules")


def test_a_module_shared_exponentially_often_is_refused(tmp_path: Path) -> None:
    opcodes = b"ctorch.nn.modules.conv\nConv2d\n)\x81" + item(text("_modules"), b"}") + b"b"
    for _ in range(60):
        both = b"}(" + text("a") + b"h\x00" + text("b") + b"h\x00u"
        opcodes += b"q\x00ctorch.nn.modules.conv\nConv2d\n)\x81" + item(text("_modules"), both) + b"b"
    refusal(archive(tmp_path / "best.pt", opcodes + b"."), CheckpointError, "modules")


# Tensors that reach beyond their storage ----------------------------------------------------------------------------

BAD_VIEWS = {
    "one element too many": b"K\x00K\x05\x85K\x01\x85",
    "an offset past the end": b"K\x04K\x01\x85K\x01\x85",
    "a negative offset": b"J\xff\xff\xff\xffK\x01\x85K\x01\x85",
    "a negative stride": b"K\x03K\x04\x85J\xff\xff\xff\xff\x85",
    "a negative extent": b"K\x00J\xff\xff\xff\xff\x85K\x01\x85",
    "a stride past the end": b"K\x00K\x02\x85K\x04\x85",
    "an overflowing stride": b"K\x00K\x02\x85\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x40\x85",
    "an overflowing extent": b"K\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85K\x00\x85",
    "an empty tensor of a huge shape": b"K\x00K\x00\x8a\x07\x00\x00\x00\x00\x00\x00\x01\x86K\x01K\x01\x86",
    "extents without strides": b"K\x00K\x04\x85)",
    "too many dimensions": b"K\x00(" + b"K\x01" * 33 + b"t(" + b"K\x01" * 33 + b"t",
    "a shape in floats": b"K\x00G" + struct.pack(">d", 4.0) + b"\x85K\x01\x85",
    "a shape in bools": b"K\x00\x88\x85K\x01\x85",
    "a shape that is a list": b"K\x00]K\x01\x85",
}


@pytest.mark.parametrize("view", BAD_VIEWS.values(), ids=BAD_VIEWS.keys())
def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path, view: bytes) -> None:
    refusal(archive(tmp_path / "best.pt", valid(TENSOR % view)), CheckpointError, "damaged")


@pytest.mark.parametrize(
    ("storages", "says"),
    [({"0": VALUES[:-1]}, "15 bytes"), ({"0": VALUES + b"\0"}, "17 bytes"), ({"1": VALUES}, "best/data/0 is missing")],
    ids=["short", "long", "missing"],
)
def test_a_storage_of_another_size_than_its_tensors_say_is_refused(
    tmp_path: Path, storages: dict[str, bytes], says: str
) -> None:
    refusal(archive(tmp_path / "best.pt", valid(), storages), CheckpointError, "damaged", says)


def test_an_expanded_view_cannot_claim_more_memory_than_the_file_has(tmp_path: Path) -> None:
    view = b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85"
    refusal(archive(tmp_path / "best.pt", valid(TENSOR % view)), CheckpointError, str(4 * (2**31 - 1)), "overlap")


def test_a_dtype_that_numpy_has_not_is_refused_by_name(tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "best.pt")
    refusal(tmp_path / "best.pt", CheckpointError, "float8_e4m3fn", "FP16 or FP32")


# Archives -----------------------------------------------------------------------------------------------------------


def entries(path: Path, *names: str, kind: int = zipfile.ZIP_STORED, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in ("best/data.pkl", *names):
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = kind, mode << 16
            file.writestr(info, valid())
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("best/data/0", "best/data/0"), "two entries named best/data/0"),
        (("/etc/passwd",), "unsafe path, /etc/passwd"),
        (("best/../../x",), "unsafe path, best/../../x"),
        (("best/./x",), "unsafe path"),
        (("C:/x",), "unsafe path, C:/x"),
        (("best\\x",), "unsafe path"),
        (("other/data.pkl",), "2 data.pkl"),
    ],
)
def test_an_archive_with_odd_names_is_refused(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    refusal(entries(tmp_path / "best.pt", *names), CheckpointError, says)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = entries(tmp_path / "best.pt", kind=zipfile.ZIP_DEFLATED)
    refusal(path, CheckpointError, "compressed entry, best/data.pkl", "zip -0")


def test_a_symbolic_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    refusal(entries(tmp_path / "best.pt", mode=stat.S_IFLNK | 0o777), CheckpointError, "symbolic link")


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    content = bytearray(entries(tmp_path / "best.pt").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "best.pt").write_bytes(content)
    refusal(tmp_path / "best.pt", CheckpointError, "encrypted")


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "best.pt", valid(), {str(i): b"" for i in range(9)} | {"x": bytes(4000)})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        x = file.getinfo("best/data/x")
    # Every directory entry that says it has no bytes now says it is the large one.
    sizes, fat = struct.pack("<III", 0, 0, 0), struct.pack("<III", x.CRC, x.compress_size, x.file_size)
    start = content.index(b"PK\x01\x02")
    path.write_bytes(content[:start] + content[start:].replace(sizes, fat))
    refusal(path, CheckpointError)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path: Path) -> None:
    path = archive(tmp_path / "best.pt", valid())
    path.write_bytes(path.read_bytes().replace(VALUES, VALUES[:-1] + b"\x01"))
    refusal(path, CheckpointError, "damaged", "CRC")


@pytest.mark.parametrize("kept", [5, 50, 0.5, -1, -22, -100])
def test_a_truncated_archive_is_called_damaged(tmp_path: Path, kept: float) -> None:
    content = archive(tmp_path / "best.pt", valid()).read_bytes()
    (tmp_path / "best.pt").write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    refusal(tmp_path / "best.pt", CheckpointError, "damaged", "download the file again")


def test_big_endian_weights_are_refused(tmp_path: Path) -> None:
    refusal(archive(tmp_path / "best.pt", valid(), order=b"big"), CheckpointError, "big-endian")


# Files of another kind ----------------------------------------------------------------------------------------------

ENGINE = json.dumps({"description": "Ultralytics YOLOv8n", "batch": 1}).encode()
KINDS = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(100), "only zeros"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
    "text": (b"yolov8n.pt weights go here\n", "text file (it begins 'yolov8n.pt weights go he')"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "pickle": (pickle.dumps({"w": 1}), "bare pickle"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.4.1:\x80\x01", "ONNX model"),
    "engine": (struct.pack("<i", len(ENGINE)) + ENGINE + b"ftrt\x00\x00", "TensorRT engine"),
    "plan": (b"ftrt\x00\x00\x00\x00\x01\x00", "TensorRT engine"),
    "tflite": (b"\x1c\x00\x00\x00TFL3\x14\x00", "TFLite"),
    "keras": (b"\x89HDF\r\n\x1a\n\x00\x00", "HDF5"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "gzip"),
    "picture": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "neither an archive of torch.save nor safetensors"),
    "one byte": (b"\x80", "neither an archive of torch.save nor safetensors"),
    "noise": (random.Random(0).randbytes(5000), "neither an archive of torch.save nor safetensors"),
}


@pytest.mark.parametrize(("content", "says"), KINDS.values(), ids=KINDS.keys())
def test_a_file_of_another_kind_is_told_by_its_content(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "best.pt").write_bytes(content)
    refusal(tmp_path / "best.pt", CheckpointError, says)


def test_torchs_old_format_is_refused_with_the_way_to_save_again(tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.zeros(1)}, tmp_path / "best.pt", _use_new_zipfile_serialization=False)
    refusal(tmp_path / "best.pt", CheckpointError, "before torch 1.6", "save it again with a current torch")


def test_a_torchscript_archive_is_refused_with_the_command_that_checks_it(tmp_path: Path) -> None:
    path = entries(tmp_path / "best.pt", "best/constants.pkl", "best/code/__torch__.py")
    refusal(path, CheckpointError, "TorchScript", "exportgate check")


@pytest.mark.parametrize(
    ("names", "says"),
    [(("word/document.xml",), "no data.pkl (it holds word/document.xml)"), ((), "no data.pkl (it holds nothing)"),
     (("best/archive_format",), "torch.export")],
    ids=["docx", "no-entries", "pt2"],
)  # fmt: skip
def test_a_zip_of_another_kind_is_refused(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    path = tmp_path / "best.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    if not names:
        path.write_bytes(b"PK\x03\x04" + path.read_bytes())
    refusal(path, CheckpointError, says if names else "is")


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "best.pt", CheckpointError, "does not exist")
    (tmp_path / "folder.pt").mkdir()
    refusal(tmp_path / "folder.pt", CheckpointError, "is a directory")
    refusal(tmp_path / "folder.pt" / "..." / "best.pt", CheckpointError, "does not exist")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "best.pt")
    refusal(tmp_path / "best.pt", CheckpointError, "no regular file")


@pytest.mark.parametrize(
    ("module", "name", "says"),
    [
        ("ultralytics.nn.modules.block", "C3k2", "YOLO11"),
        ("ultralytics.nn.modules.block", "C2PSA", "YOLO11"),
        ("ultralytics.nn.modules.head", "Segment26", "YOLO26"),
        ("ultralytics.nn.modules.block", "A2C2f", "YOLO12"),
        ("ultralytics.nn.modules.block", "SCDown", "YOLOv10"),
        ("ultralytics.nn.modules.head", "v10Detect", "YOLOv10"),
        ("ultralytics.nn.modules.block", "RepNCSPELAN4", "YOLOv9"),
        ("ultralytics.nn.modules.block", "C3", "YOLOv5"),
        ("ultralytics.nn.modules.block", "C3Ghost", "Ghost"),
        ("ultralytics.nn.modules.head", "RTDETRDecoder", "RT-DETR"),
        ("ultralytics.nn.modules.block", "HGStem", "RT-DETR"),
        ("ultralytics.nn.tasks", "WorldModel", "YOLO-World"),
        ("ultralytics.nn.modules.block", "C2fAttn", "YOLO-World"),
        ("ultralytics.nn.tasks", "YOLOESegModel", "YOLOE"),
        ("models.yolo", "DetectionModel", "YOLOv5 or YOLOv7"),
        ("ultralytics.nn.modules.block", "MyOwnBlock", "layer that exportgate does not know: MyOwnBlock"),
        ("torch.nn.modules.rnn", "LSTM", "layer that exportgate does not know: LSTM (of torch.nn.modules.rnn)"),
    ],
)
def test_a_model_of_another_family_is_refused_by_name(tmp_path: Path, module: str, name: str, says: str) -> None:
    opcodes = f"c{module}\n{name}\n".encode() + b")\x81}b."
    refusal(archive(tmp_path / "best.pt", opcodes), CheckpointError, says, name, "importable factory")


@pytest.mark.parametrize(
    "opcodes",
    [b"}.", b"N.", item(text("epoch"), b"K\x03") + b".", item(text("model"), b"}") + b".", TENSOR % PLAIN + b"."],
)
def test_a_checkpoint_without_weights_is_refused(tmp_path: Path, opcodes: bytes) -> None:
    refusal(archive(tmp_path / "best.pt", opcodes), CheckpointError, "holds no weights", "model.state_dict()")


# Safetensors and metadata -------------------------------------------------------------------------------------------


def safetensors(path: Path, **metadata: str) -> Path:
    from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

    save_file({"b": np.ones(2, np.float16), "a": np.arange(6).reshape(2, 3)}, path, metadata)
    return path


def test_safetensors_are_read_with_their_metadata(tmp_path: Path) -> None:
    path = safetensors(
        tmp_path / "a.pt", names="{0: 'cat', 1: 'dog'}", stride="32", task="pose", imgsz="[640, 480]",
        kpt_shape="(17, 3)", license="CC0", scale="s", description="ours", format="pt",
    )  # fmt: skip
    read = read_checkpoint(path)
    assert {name: (str(values.dtype), values.tolist()) for name, values in read.state.items()} == {
        "a": ("int64", [[0, 1, 2], [3, 4, 5]]),
        "b": ("float16", [1, 1]),
    }
    assert (read.names, read.stride, read.task, read.scale) == ({0: "cat", 1: "dog"}, 32, "pose", "s")
    assert (read.imgsz, read.kpt_shape, read.license) == ((640, 480), (17, 3), "CC0")
    assert read.info == {"description": "ours"}


@pytest.mark.parametrize("kept", [9, 20, 0.5, -1])
def test_truncated_safetensors_are_refused(tmp_path: Path, kept: float) -> None:
    content = safetensors(tmp_path / "a.safetensors", names="['a']").read_bytes()
    size = int(kept * len(content)) if kept == 0.5 else int(kept)
    (tmp_path / "a.safetensors").write_bytes(content[:size])
    refusal(tmp_path / "a.safetensors", CheckpointError, "truncated", "download the file again")


@pytest.mark.parametrize("names", ['["a", "b"]', "['a', 'b']", '{"0": "a", "1": "b"}', "{1: 'b', 0: 'a'}"])
def test_class_names_are_read_from_a_list_or_a_mapping(tmp_path: Path, names: str) -> None:
    read = read_checkpoint(safetensors(tmp_path / "a.safetensors", names=names)).names
    assert read is not None and list(read.items()) == [(0, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("names", "kind", "says"),
    [
        ("{0: 'a', 2: 'c'}", BadRequest, "2 class names up to index 2 but none for 1"),
        ("{1: 'a'}", BadRequest, "none for 0"),
        ("{-1: 'a'}", BadRequest, "none for 0"),
        ("{'a': 'b'}", BadRequest, "'a'"),
        ("{0: ['a']}", BadRequest, "['a']"),
        ("{}", BadRequest, "name no class"),
        ("7", BadRequest, "name no class"),
        ("__import__('os').system('touch canary')", CheckpointError, "neither JSON nor a Python literal"),
        ("(" * 5000, CheckpointError, "neither JSON nor a Python literal"),
        ("-" * 5000 + "1", CheckpointError, "neither JSON nor a Python literal"),
    ],
)
def test_class_names_with_gaps_or_of_another_form_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, kind: type[ExportgateError], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(safetensors(tmp_path / "a.safetensors", names=names), kind, says)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("stride", "0"), ("stride", "[8, 16.5]"), ("stride", "NaN"), ("imgsz", "[1, 2, 3]"), ("imgsz", "true"),
     ("kpt_shape", "17"), ("kpt_shape", '{"a": 1}'), ("imgsz", "-640"), ("stride", "[]")],
)  # fmt: skip
def test_metadata_that_cannot_be_is_refused_with_its_value(tmp_path: Path, key: str, value: str) -> None:
    refusal(safetensors(tmp_path / "a.safetensors", **{key: value}), CheckpointError, f"has {key} ", "correct it")


# Anything at all ----------------------------------------------------------------------------------------------------


def small_checkpoints() -> dict[str, bytes]:
    """A pickle and its storages in a zip, and safetensors, as bytes to be damaged."""
    from safetensors.numpy import save

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("best/data.pkl", valid())
        file.writestr("best/data/0", VALUES)
    parameters = text("_parameters") + item(text("w"), TENSOR % PLAIN)
    module = b"ctorch.nn.modules.linear\nLinear\n)\x81}(" + parameters + text("_modules") + b"}ub"
    return {
        "archive": buffer.getvalue(),
        "pickle": b"\x80\x02" + item(text("model"), module) + b".",
        "safetensors": save({"w": np.ones(3, np.float32)}, {"names": "{0: 'a'}", "stride": "32"}),
    }


SMALL = small_checkpoints()
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=0, max_size=3)), max_size=4)


@pytest.mark.parametrize("kind", SMALL)
def test_the_small_checkpoints_are_read_when_nobody_damages_them(tmp_path: Path, kind: str) -> None:
    assert "w" in read_checkpoint(damaged(tmp_path, kind, SMALL[kind])).state


def damaged(folder: Path, kind: str, content: bytes) -> Path:
    path = folder / "small.pt"
    # A damaged pickle goes into a sound archive: otherwise the checksum would refuse it first.
    if kind == "pickle":
        return archive(path, content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", SMALL)
@example(edits=[(0.0, b"\x08")], cut=0.01)  # as an ONNX model begins, and no second byte
@given(edits=EDITS, cut=st.one_of(st.none(), st.floats(0, 1)))
@settings(
    max_examples=5000 if is_long() else 300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_checkpoint_is_read_or_refused_and_never_crashes(
    tmp_path: Path, kind: str, edits: list[tuple[float, bytes]], cut: float | None
) -> None:
    content = SMALL[kind]
    for place, replacement in edits:
        at = math.floor(place * len(content))
        content = content[:at] + replacement + content[at + len(replacement) :]
    if cut is not None:
        content = content[: int(cut * len(content))]
    try:
        assert isinstance(read_checkpoint(damaged(tmp_path, kind, content)), Checkpoint)
    except ExportgateError as error:
        assert "\n" not in str(error) and error.fix

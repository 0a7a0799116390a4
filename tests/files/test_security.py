"""What a file can and cannot do: every way in which one names something, and every limit (docs/security.md)."""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import json
import logging
import math
import operator
import os
import pathlib
import re
import socket
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import run_surgeon, write_pickle
from torch import nn
from torch.nn import functional

import surgeon
from surgeon.analysis import example as examples
from surgeon.errors import ModelError, StoreError, SurgeonError
from surgeon.files import functions
from surgeon.files import load as source
from surgeon.files.names import Trust
from surgeon.nn import Rewritten
from surgeon.recipes import recipe as recipes

CODE = """
import dataclasses, enum, functools, os, pathlib
from typing import NamedTuple
from torch import nn

class Kind(enum.Enum):
    A = 1
class Name(str, enum.Enum):
    B = "b"
class Bits(enum.Flag):
    ONE = 1
    TWO = 2
class Guessing(enum.Enum):
    A = 1
    @classmethod
    def _missing_(cls, value): pathlib.Path(value).touch()
@dataclasses.dataclass(frozen=True)
class Frozen:
    width: int = 8
@dataclasses.dataclass(frozen=True, slots=True)
class Slim:
    width: int = 8
@dataclasses.dataclass(slots=True)
class Slots:
    width: int = 8
class Pair(NamedTuple):
    a: int
    b: object
class Plain:
    def __init__(self): self.a = [1]
    def __eq__(self, other): return vars(self) == vars(other)
    __hash__ = None
class Filled:
    def __setstate__(self, state): pathlib.Path(state["path"]).touch()
class Deleted:
    def __del__(self): pathlib.Path(self.path).touch()
class Hashed:
    def __hash__(self): pathlib.Path(self.path).touch(); return 1
class Made:
    def __new__(cls, *args): return object.__new__(cls)
class Asking:
    def __getattr__(self, name): raise AttributeError(name)
class Text(str): pass
class Net(nn.Sequential): pass
def act(x): return x
def touch(path): pathlib.Path(path).touch()
def outer():
    def inner(): pass
    return inner
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in a folder with a module `theirs`."""
    (tmp_path / "theirs.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("theirs", None)


@pytest.fixture
def theirs(here: Path) -> Any:
    return __import__("theirs")


def net(**attributes: object) -> nn.Sequential:
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    vars(made).update(attributes)
    return made


def refusal(name: str | Path, **options: Any) -> str:
    with pytest.raises(SurgeonError) as caught:
        source.load(str(name), **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


THEIRS = Trust(allow=("theirs",))

# Values of packages that the user has admitted ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.Kind.A,
        lambda m: m.Name.B,
        lambda m: m.Bits.ONE | m.Bits.TWO,
        lambda m: {m.Kind.A: [m.Name.B]},
        lambda m: m.Frozen(3),
        lambda m: m.Slim(3),
        lambda m: m.Slots(3),
        lambda m: m.Pair(1, m.Pair(2, [3])),
        lambda m: m.Plain(),
        lambda m: m.act,
        lambda m: frozenset([m.Kind.A]),
    ],
)
def test_values_of_an_admitted_package_come_along(make: Callable[[Any], object], theirs: Any) -> None:
    value = make(theirs)
    torch.save(net(value=value), "m.pt")
    assert source.load("m.pt", trust=THEIRS).model.value == value
    assert "theirs" in refusal("m.pt")


@pytest.mark.parametrize(
    "value",
    [
        Path("a/b"),
        pathlib.PurePosixPath("/a"),
        functools.partial(nn.BatchNorm2d, eps=1e-3),
        functools.partial(torch.nn.functional.relu, inplace=True),
        types.SimpleNamespace(lr=0.1),
        collections.Counter({1: 2}),
        bytearray(b"ab"),
        b"\xff",
        1j,
        torch.Size([1, 2]),
        torch.device("cpu"),
        torch.float16,
        torch.relu,
        torch.sigmoid,
        torch.special.expit,
        functional.softplus,
        functional.threshold,
        functools.partial(functional.leaky_relu, negative_slope=0.1),
        functools.partial(torch.clamp, min=0),
        nn.init.zeros_,
        math.sqrt,
        operator.add,
        max,
        [bool, dict, float, int, list, str, tuple, range],
        range(1, 9, 2),
        slice(1, None),
        datetime.timedelta(days=1),
        {datetime.date(2024, 2, 29): datetime.time(12)},
        datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone(datetime.timedelta(hours=1), "here")),
        decimal.Decimal("0.1"),
        {1, 2},
        2**70,
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),
)
def test_plain_values_come_along(value: Any, here: Path) -> None:
    torch.save(net(value=value), "m.pt")
    found = source.load("m.pt").model.value
    if isinstance(value, functools.partial):
        assert (found.func, found.args, found.keywords) == (value.func, value.args, value.keywords)
    else:
        assert found == value


def test_every_listed_function_is_there_and_comes_back(here: Path) -> None:
    listed = [getattr(torch, name) for name in sorted(functions.OF_TORCH)]
    for name in sorted(functions.NAMES):
        where, _, attribute = name.rpartition(".")
        listed.append(getattr(sys.modules[where], attribute))
    torch.save(net(value=listed), "m.pt")
    assert all(a is b or a == b for a, b in zip(source.load("m.pt").model.value, listed, strict=True))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: CallOf(getattr, torch._C._VariableFunctionsClass, "from_file"), "calls builtins.getattr"),
        (lambda p: CallOf(getattr, torch._C._VariableFunctionsClass, "__init_subclass__"), "calls builtins.getattr"),
        (lambda p: CallOf(getattr, nn.ReLU, "forward"), "calls builtins.getattr with torch.nn.modules.activation.ReLU"),
        (lambda p: CallOf(CallOf(getattr, torch._C._VariableFunctionsClass, "relu"), 1), "calls what it has made"),
        (lambda p: getattr, "stores builtins.getattr"),
        (lambda p: functools.partial(getattr, 1), "stores builtins.getattr"),
        (lambda p: CallOf(math.sqrt, 4), "calls math.sqrt"),
        (lambda p: CallOf(list, "ab"), "calls builtins.list"),
        (lambda p: CallOf(int, "9"), "calls builtins.int"),
        (lambda p: CallOf(nn.init.zeros_, torch.ones(1)), "calls torch.nn.init.zeros_"),
        (lambda p: CallOf(decimal.Decimal, "1" * 1000), "calls decimal.Decimal with arguments"),
        (lambda p: CallOf(datetime.datetime, 2024, 1, 1), "calls datetime.datetime with arguments"),
        (lambda p: CallOf(datetime.datetime, b"0123456789"), "cannot be unpickled"),
        (lambda p: Blank(datetime.timedelta), "calls datetime.timedelta"),
        (lambda p: Blank(dict), "calls builtins.dict"),
        (lambda p: torch.hub.load, "torch.hub.load"),
        (lambda p: os.system, "system"),
        (lambda p: math.factorial, "math.factorial"),
    ],
)
def test_listed_functions_reach_nothing_else(make: Callable[[Path], object], why: str, here: Path) -> None:
    torch.save(net(value=make(here)), "m.pt")
    assert why in refusal("m.pt")


def test_getattr_of_a_file_looks_up_listed_functions_only() -> None:
    assert functions.function_of_torch(object, "relu") is torch.relu
    with pytest.raises(AttributeError, match="no function that a file may hold"):
        functions.function_of_torch(object, "from_file")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about quantised and sparse tensors
def test_tensors_of_all_kinds_come_along(here: Path) -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.weight.note = "kept"  # type: ignore[attr-defined]
    conv.extra = torch.arange(6.0)[::2]  # type: ignore[assignment]
    conv.wide = torch.ones(1).expand(4, 5)  # type: ignore[assignment]
    conv.sparse = torch.eye(3).to_sparse()  # type: ignore[assignment]
    conv.small = torch.ones(3, dtype=torch.uint16)  # type: ignore[assignment]
    conv.none = torch.empty(0, 3)  # type: ignore[assignment]
    conv.meta = torch.empty(3, device="meta")  # type: ignore[assignment]
    conv.quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)  # type: ignore[assignment]
    torch.save(conv, "m.pt")
    found = source.load("m.pt").model
    assert found.weight.note == "kept"
    for name in ("extra", "wide", "small", "none"):
        assert torch.equal(getattr(found, name), getattr(conv, name))
    assert torch.equal(found.sparse.to_dense(), torch.eye(3))
    assert found.meta.is_meta
    assert found.quantised.is_quantized


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda m, p: CallOf(m.Guessing, str(p)), "an Enum with a _missing_ of its own"),
        (lambda m, p: _blank(m.Filled, path=str(p)), "run code when they are made, in __setstate__"),
        (lambda m, p: _blank(m.Deleted, path=str(p)), "run code when they are deleted"),
        (lambda m, p: {_blank(m.Hashed, path=str(p)): 1}, "whose own __hash__ would run"),
        (lambda m, p: {(1, _blank(m.Hashed, path=str(p))): 1}, "whose own __hash__ would run"),
        (lambda m, p: CallOf(frozenset, [_blank(m.Hashed, path=str(p))]), "whose own __hash__ would run"),
        (lambda m, p: m.Made(), "run code when they are made, in __new__"),
        (lambda m, p: m.Asking(), "in __getattr__"),
        (lambda m, p: m.Text("a"), "a kind of str"),
        (lambda m, p: CallOf(m.touch, str(p)), "calls theirs.touch"),
        (lambda m, p: CallOf(m.Plain), "calls theirs.Plain"),
        (lambda m, p: CallOf(m.Kind, m.Kind.A), "calls theirs.Kind with more than a value"),
        (lambda m, p: CallOf(functools.partial, m.touch, str(p)), "calls functools.partial"),
        (lambda m, p: CallOf(functools.partial, functools.partial), "calls functools.partial"),
    ],
)
def test_nothing_of_an_admitted_package_runs(make: Callable[[Any, Path], object], why: str, theirs: Any) -> None:
    marker = Path("marker").absolute()
    model = net(value=make(theirs, marker))
    torch.save(model, "m.pt")
    for made in model.value if isinstance(model.value, dict | CallOf) else [model.value]:
        for one in made if isinstance(made, tuple) else [made]:
            if hasattr(one, "path"):
                one.path = os.devnull
    marker.unlink(missing_ok=True)
    assert why in refusal("m.pt", trust=THEIRS)
    assert not marker.exists()


class CallOf:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call

    def __iter__(self) -> Iterator[Any]:
        return iter(self.call[1])

    def __call__(self) -> None:
        """Be something that another call may pickle as its function."""


class Blank:
    """Pickles as a blank object of a class, which no constructor has filled."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    @property
    def __class__(self) -> Any:  # which pickle asks for
        return self.kind

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (self.kind,)  # type: ignore[attr-defined]


def _blank(kind: Any, **state: object) -> Any:
    made = object.__new__(kind)
    vars(made).update(state)
    return made


# NumPy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        np.float64(2),
        np.int8(3),
        np.bool_(True),
        np.complex64(1j),
        np.ones((2, 3), np.float32),
        np.zeros(0),
        np.array(1),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),
)
def test_numpy_numbers_are_data(value: Any, here: Path) -> None:
    torch.save({"state_dict": net().state_dict(), "best": value}, "w.pt")
    state, _ = source.read_tensors(Path("w.pt"))
    assert state.keys() == net().state_dict().keys()


def test_weights_may_be_numpy_arrays(here: Path) -> None:
    weights = {key: tensor.numpy() for key, tensor in net().state_dict().items()}
    torch.save(weights, "w.pt")
    assert all(np.array_equal(t.numpy(), weights[key]) for key, t in source.read_tensors(Path("w.pt"))[0].items())


@pytest.mark.parametrize(
    "value",
    [np.array([{}], object), np.zeros(2, [("a", "f4")]), np.array(["a"]), np.datetime64("2020-01-01"), np.random],
    ids=["objects", "fields", "text", "date", "generator"],
)
def test_other_things_of_numpy_are_not(value: Any, here: Path) -> None:
    torch.save({"best": value if value is not np.random else np.random.default_rng()}, "w.pt")
    assert "w.pt" in refusal("w.pt")


# Calls and sizes ------------------------------------------------------------------------------------------------------

CONV = b"ctorch.nn.modules.conv\nConv2d\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"
VIEW = b"ctorch._utils\n_rebuild_tensor_v2\n("


def _view(count: int, offset: bytes, size: bytes, stride: bytes) -> bytes:
    """Make a tensor of a storage of 4 numbers that claims to have `count`."""
    storage = STORAGE.replace(b"%c", bytes([count]))
    return VIEW + storage + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def write_storage(program: bytes) -> Path:
    write_pickle(Path("m.pt"), program)
    with zipfile.ZipFile("m.pt", "a") as archive:
        archive.writestr("m/data/0", bytes(16))
    return Path("m.pt")


LARGE = b"\x8a\x06\x00\x00\x00\x00\x00\x01"  # 2 ** 40


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (_view(4, b"K\x00", b"K\x04\x85", b"K\x01\x85"), "holds a Tensor"),
        (_view(5, b"K\x00", b"K\x04\x85", b"K\x01\x85"), "names a storage that it does not hold"),
        (_view(4, b"K\x00", b"K\x05\x85", b"K\x01\x85"), "calls torch._utils._rebuild_tensor_v2"),
        (_view(4, b"K\x01", b"K\x04\x85", b"K\x01\x85"), "calls torch._utils._rebuild_tensor_v2"),
        (_view(4, b"K\x00", b"K\x02\x85", b"K\x04\x85"), "calls torch._utils._rebuild_tensor_v2"),
        (_view(4, b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"), "calls torch._utils._rebuild_tensor_v2"),
        (_view(4, b"K\x00", LARGE + b"\x85", b"K\x00\x85"), "calls torch._utils._rebuild_tensor_v2"),
        (b"c__builtin__\nbytearray\n" + LARGE + b"\x85R", "calls builtins.bytearray"),
        (b"ctorch\nFloatTensor\n" + LARGE + b"\x85R", "calls torch.FloatTensor"),
        (b"ctorch\nTensor\n" + LARGE + b"\x85\x81", "calls torch.Tensor"),
        (b"ctorch.storage\nUntypedStorage\n" + LARGE + b"\x85R", "calls torch.storage.UntypedStorage"),
        (b"ctorch._utils\n_rebuild_nested_tensor\n)R", "calls torch._utils._rebuild_nested_tensor"),
        (b"ctorch._utils\n_rebuild_wrapper_subclass\n)R", "calls torch._utils._rebuild_wrapper_subclass"),
        (b"ctorch.nn.parameter\nParameter\n)\x81", "calls torch.nn.parameter.Parameter"),
        (b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsctorch.nn.functional\nrelu\nsb", "hides a method"),
        (CONV + b"K\x01\x85\x81", "calls torch.nn.modules.conv.Conv2d with arguments"),
        (CONV + b")\x81)\x81", "calls what it has made"),
        (b"]K\x01\x85R", "calls what it has made"),
        (b"]}b", "sets the state of what has none"),
        (b"]" * 1000 + b"a" * 999, "nests values in more than 200 levels"),
        (b"]" + b"".join(b"q\x01]h\x01ah\x01a" for _ in range(60)), "unfold to more than memory holds"),
        (b"h\x07", "cannot be unpickled"),
        (b"(K\x01\x85\x86t", "cannot be unpickled"),
        (b"K\x01a", "cannot be unpickled"),
        (b"csurgeon.nn\n__getattr__\n", "since no file has a use for it"),
        (b"csurgeon.app.cli\nmain\n", "not a class that this version of surgeon knows"),
        (b"csurgeon.blocks.base\nBlock\n", "not a class that this version of surgeon knows"),
        (b"c__builtin__\neval\n", "builtins.eval (outside the admitted packages)"),
        (b"ctorchvision.datasets.utils\ndownload_url\n", "not an nn.Module class"),
        (b"ctorch.optim.swa_utils\nAveragedModel\n", "is wrapped in AveragedModel"),
    ],
)
def test_pickles_written_by_hand(program: bytes, why: str, here: Path) -> None:
    message = refusal(write_storage(program))
    assert why in message
    assert "--allow surgeon" not in message


def test_a_legacy_file_claims_no_more_than_it_holds(here: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, "m.pt", _use_new_zipfile_serialization=False)
    assert source.read_tensors(Path("m.pt"))[0]["a"].tolist() == [0, 1, 2, 3]
    raw = Path("m.pt").read_bytes()
    assert raw.count(b"K\x04N") == 1
    Path("m.pt").write_bytes(raw.replace(b"K\x04N", b"J\xff\xff\xff\x7fN"))
    assert "names a storage that it does not hold" in refusal("m.pt")
    Path("m.pt").write_bytes(raw[:-3])
    assert "m.pt" in refusal("m.pt")


# Archives -------------------------------------------------------------------------------------------------------------


def _saved(model: object | None = None) -> bytearray:
    torch.save(net() if model is None else model, "m.pt")
    return bytearray(Path("m.pt").read_bytes())


def test_every_byte_of_an_archive_counts(here: Path) -> None:
    """A flipped bit is noticed, wherever it is, unless it is in the padding, which holds nothing."""
    whole = _saved({"a": torch.arange(64.0), "b": torch.ones(3)})
    before = source.read_tensors(Path("m.pt"))[0]
    for place in range(0, len(whole), 7):
        raw = bytearray(whole)
        raw[place] ^= 1 << place % 8
        Path("bad.pt").write_bytes(raw)
        try:
            found = source.read_tensors(Path("bad.pt"))[0]
        except ModelError:
            continue
        assert all(torch.equal(found[key], before[key]) for key in before | found), place


def test_an_archive_cut_anywhere_is_refused(here: Path) -> None:
    whole = _saved({"a": torch.arange(64.0)})
    for end in range(0, len(whole), 13):
        Path("bad.pt").write_bytes(whole[:end])
        assert "bad.pt" in refusal("bad.pt")


def _packed(raw: bytes, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            change(new, entry, old.read(entry))
    return made.getvalue()


def _compressed(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
    new.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)


def _elsewhere(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
    new.writestr(entry.filename.replace("m/data/", "n/data/"), data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda raw: raw + b"more", "damaged|follows the archive"),
        (lambda raw: raw + raw, "something comes before"),
        (lambda raw: b"PK\x03\x04" + raw, "something comes before"),
        (lambda raw: _packed(raw, _compressed), "is compressed"),
        (lambda raw: _packed(raw, _elsewhere), "not all entries are in one folder"),
        (lambda raw: _packed(raw, lambda n, e, d: [n.writestr(e.filename, d) for _ in "ab"]), "names are given twice"),
        (lambda raw: raw.replace(b"m/version", b"m/\xff\xffrsion"), "damaged"),
        (lambda raw: raw.replace(b"m/version", b"m/revsion", 1), "contradicts the table of contents"),
    ],
)
def test_archives_that_torch_did_not_write(damage: Callable[[bytes], bytes], why: str, here: Path) -> None:
    Path("bad.pt").write_bytes(damage(bytes(_saved())))
    message = refusal("bad.pt")
    assert any(part in message for part in why.split("|")), message


def test_plain_zips_of_torchs_records_are_read(here: Path) -> None:
    Path("m.pt").write_bytes(_packed(bytes(_saved()), lambda new, entry, data: new.writestr(entry.filename, data)))
    assert isinstance(source.load("m.pt").model, nn.Sequential)


# What is no file ------------------------------------------------------------------------------------------------------


def test_pipes_devices_and_folders_are_not_opened(here: Path) -> None:
    os.mkfifo("pipe.pt")
    assert "pipe.pt is a pipe, and a model is read from a file" in refusal("pipe.pt")
    assert "a device" in refusal("/dev/zero")
    place = socket.socket(socket.AF_UNIX)
    place.bind("socket.pt")
    assert "a socket" in refusal("socket.pt")
    place.close()
    _saved()
    Path("link.pt").symlink_to("m.pt")
    assert isinstance(source.load("link.pt").model, nn.Sequential)
    Path("loop.pt").symlink_to("loop.pt")
    assert "loop.pt" in refusal("loop.pt")
    assert "cannot be read" in refusal("a\0.pt")


def test_folders_and_shards_are_told_what_they_are(here: Path) -> None:
    folder = Path("net")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors.torch.save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert refusal("net").endswith(
        "net is a Hugging Face folder. Name the file of weights in it, and its network with --arch: "
        "net/model.safetensors"
    )
    safetensors.torch.save_file({"a": torch.ones(1)}, "model-00001-of-00002.safetensors")
    assert "is part 1 of 2 of a checkpoint. Load all parts" in refusal("model-00001-of-00002.safetensors")
    Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert "lists which file holds which weights" in refusal("model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "is a folder whose weights lie in 1 files" in refusal("net")


# Half a module --------------------------------------------------------------------------------------------------------


def _without(where: str) -> Callable[[nn.Module], None]:
    def remove(model: nn.Module) -> None:
        *path, name = where.split("/")
        held: Any = vars(model)
        for part in path:
            held = vars(held)[part] if isinstance(held, nn.Module) else held[part]
        held = vars(held) if isinstance(held, nn.Module) else held
        del held[name]

    return remove


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_without("_parameters"), "its network is a Sequential without _parameters"),
        (_without("_buffers"), "without _buffers"),
        (_without("_modules"), "without _modules"),
        (_without("training"), "does not say whether it is in training"),
        (_without("_forward_hooks"), "without _forward_hooks"),
        (_without("_modules/0/_parameters/weight"), "0 is a Conv2d without weight"),
        (_without("_modules/0/stride"), "0 is a Conv2d without stride"),
        (_without("_modules/1/eps"), "1 is a BatchNorm2d without eps"),
        (_without("_modules/1/_buffers/running_mean"), "1 is a BatchNorm2d without running_mean"),
        (_without("_modules/3/_modules/square_conv"), "3 is a ACBlock that cannot be run"),
        (_without("_modules/3/spec"), "a spec that is not a ConvSpec"),
        (lambda m: vars(m).update(_modules=[]), "without _modules"),
        (lambda m: vars(m).update(training="no"), "does not say whether"),
        (lambda m: m._parameters.update(a=3), "_parameters hold a int under 'a'"),
        (lambda m: m._modules.update(a=m), "holds itself"),
        (lambda m: m._modules.update({"a": _deep()}), "in more than"),
    ],
)
def test_half_a_module_is_refused(damage: Callable[[Any], None], why: str, here: Path) -> None:
    model = net()
    model.append(_acblock())
    damage(model)
    torch.save(model, "m.pt")
    assert why in refusal("m.pt")


def _acblock() -> nn.Module:
    return surgeon.convert(nn.Sequential(nn.Conv2d(4, 4, 3)), "acnet", (1, 4, 8, 8))[0]


def _deep() -> nn.Module:
    model: nn.Module = nn.ReLU()
    for _ in range(120):
        model = nn.Sequential(model)
    return model


# Graphs ---------------------------------------------------------------------------------------------------------------


def test_a_graph_that_unfolds_is_refused(here: Path) -> None:
    shared: list[Any] = [1]
    for _ in range(40):
        shared = [shared, shared]
    evil = Rewritten.__new__(Rewritten)
    nn.Module.__init__(evil)
    steps = [["s", "get_attr", "held", [], {"dict": []}]]
    program = {"format": 2, "inputs": [["x"]], "steps": steps, "output": {"node": "x"}}
    vars(evil).update(held=shared, origin="x", program=program)
    torch.save(nn.Sequential(evil), "m.pt")
    assert "unfold to more than memory holds" in refusal("m.pt")


# Manifests and histories ----------------------------------------------------------------------------------------------


def _written(path: str = "m.safetensors") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    model = surgeon.convert(surgeon.load("torchvision:resnet18"), "acnet", (1, 3, 32, 32))
    surgeon.save(model, path, arch="torchvision:resnet18")
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118


def test_a_checksum_covers_tensors_and_manifest(here: Path) -> None:
    tensors, header = _written()
    assert surgeon.load("m.safetensors")
    changed = tensors | {"conv1.weight": tensors["conv1.weight"] + 1}
    safetensors.torch.save_file(changed, "bad.safetensors", metadata=header)
    with pytest.raises(ModelError, match="its tensors or its manifest are not those"):
        surgeon.load("bad.safetensors")
    manifest = header["surgeon"].replace('"seed": 0', '"seed": 1')
    safetensors.torch.save_file(tensors, "bad.safetensors", metadata=header | {"surgeon": manifest + " "})
    with pytest.raises(ModelError, match="its tensors or its manifest are not those"):
        surgeon.load("bad.safetensors")
    del header["surgeon.sha256"]  # a file of an earlier version, or one that was changed on purpose
    safetensors.torch.save_file(changed, "old.safetensors", metadata=header)
    assert surgeon.load("old.safetensors").conv1.weight.equal(changed["conv1.weight"])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ({"name": "os:system", "args": {"command": "touch marker"}}, "which is code that would run"),
        ({"name": "theirs:touch", "args": {"path": "marker"}}, "which is code that would run"),
        ({"name": "torchvision:resnet18", "args": {"num_classes": 10**9}}, "takes a 'num_classes' that no network has"),
        ({"name": "torchvision:resnet18", "args": {"num_classes": 10**6}}, "much larger than the weights in it"),
        ({"name": "timm:resnet18", "args": {"block_args": [[[[[[1]]]]]]}}, "takes a 'block_args' that no network has"),
        ({"name": "/dev/zero", "args": {}}, "a device"),
        ({"name": 3, "args": {}}, "is not a history"),
    ],
)
def test_a_manifest_names_no_code_and_nothing_huge(architecture: object, why: str, here: Path) -> None:
    manifest = json.dumps({"format": 2, "architecture": architecture, "history": []})
    safetensors.torch.save_file({"a": torch.ones(1)}, "m.safetensors", metadata={"surgeon": manifest})
    with pytest.raises(SurgeonError, match=why) as caught:
        surgeon.load("m.safetensors", allow=["theirs"])
    assert caught.value.exit_code == 2
    assert not Path("marker").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "", "3", "{}", "[]", '{"history": 3}'], ids=len)
def test_a_manifest_that_is_none(text: str, here: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, "m.safetensors", metadata={"surgeon": text})
    with pytest.raises(StoreError, match="the manifest in the file is not a history"):
        surgeon.load("m.safetensors")


def test_a_history_chooses_no_expensive_run(
    here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = surgeon.convert(net(), "acnet", (1, 3, 16, 16))
    model.surgeon_provenance["history"][0]["plan"]["input"] = [[1, 3, 9000, 9000]]  # type: ignore[index, union-attr]
    torch.save(model, "m.pt")
    loaded = surgeon.load("m.pt")
    caplog.set_level("INFO", "surgeon")
    assert surgeon.survey(loaded).network.inputs.shapes == ((1, 3, 224, 224),)  # type: ignore[union-attr]
    assert "an input of 243,000,000 numbers, which is not run unless you ask for it: --input '1,3,9000,9000'" in (
        caplog.text
    )
    model.surgeon_provenance["history"] *= 100  # type: ignore[operator]
    with pytest.raises(StoreError, match="is not a history"):
        surgeon.history(model)


def test_a_network_chooses_no_expensive_run(here: Path) -> None:
    model = net(pretrained_cfg={"input_size": (3, 9000, 9000)})
    found = surgeon.survey(model).network.inputs
    assert found is not None
    assert found.shapes == ((1, 3, 224, 224),)


def test_an_attribute_of_the_users_is_not_a_file(here: Path) -> None:
    with pytest.raises(StoreError, match="the attribute surgeon_provenance of the model is not a history"):
        surgeon.survey(net(surgeon_provenance="mine"))


@pytest.mark.parametrize("length", [2**60, 2**40, 8, 0])
def test_headers_of_safetensors_that_lie(length: int, here: Path) -> None:
    Path("m.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a":{"dtype":"F32"')
    assert "m.safetensors is damaged or cut short" in refusal("m.safetensors")


def test_tensors_of_safetensors_that_lie(here: Path) -> None:
    for shape, ends in (([2**40], [0, 4]), ([1], [0, 2**40]), ([-1], [0, 4]), ([1], [4, 0])):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": ends}}).encode()
        Path("m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        assert "m.safetensors is damaged or cut short" in refusal("m.safetensors")


# What convert writes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "what"),
    [
        ({"f": lambda x: x}, "f cannot be written to a file: it is a lambda"),
        ({"f": [1, {"a": lambda x: x}]}, "f cannot be written to a file: it is a lambda"),
        ({"f": sys.stdout}, "f cannot be written to a file: it is a"),
    ],
)
def test_what_cannot_be_written_is_named(attributes: dict[str, object], what: str, here: Path) -> None:
    from surgeon.files.written import check_writable

    check_writable(net())
    with pytest.raises(StoreError, match=what):
        check_writable(net(**attributes))
    model = net()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(StoreError, match="a hook of 0 cannot be written to a file: it is a lambda"):
        check_writable(model)
    with pytest.raises(StoreError, match="cannot be written"):
        surgeon.save(net(**attributes), "m.pt")
    assert not Path("m.pt").exists()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (re.compile("a"), r"value .* not read again: it is a Pattern; its pickle calls re._compile"),
        (logging.getLogger("x"), "value .*: it is a Logger; its pickle calls logging.getLogger"),
        ([{"a": collections.deque([1])}], r"value .*: it is a list; .*collections.deque"),
        (collections.defaultdict(list), "value .*: it is a defaultdict"),
        (torch.Generator(), "value .*: it is a Generator"),
        (torch.Tensor.relu, "value .*: it is TensorBase.relu"),
        (nn.ReLU().forward, "value .*: it is ReLU.forward"),
        (torch.hub.load, "value .*: it is load; .*torch.hub.load"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),
)
def test_what_could_not_be_read_again_is_named_before_the_work(value: object, why: str, here: Path) -> None:
    from surgeon.files.written import check_writable

    check_writable(net(value=torch.ones(3), half=torch.ones(3).half(), act=torch.relu))
    with pytest.raises(StoreError, match=f"^0.{why}"):
        check_writable(nn.Sequential(net(value=value)))
    torch.save(nn.Sequential(net(value=value)), "m.pt")
    refusal("m.pt")


def test_convert_refuses_such_a_network_before_it_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("logs.py").write_text(
        "import logging, torch\nfrom torch import nn\nclass Net(nn.Sequential):\n"
        "    def __init__(self, log=True):\n        super().__init__(nn.Conv2d(3, 4, 3))\n"
        "        self.log = logging.getLogger('x') if log else torch.relu\n"
    )
    convert = ["convert", "logs.py:Net", "--recipe", "acnet", "--input", "1,3,8,8", "-o", "n.pt"]
    assert run_surgeon(*convert) == 2
    assert "log could be written to a file, but not read again: it is a Logger" in capsys.readouterr().err
    assert not Path("n.pt").exists()
    assert run_surgeon(*convert, "--arch-arg", "log=false") == 0
    assert "cannot open" not in capsys.readouterr().err
    assert source.load("n.pt", trust=Trust(allow=("logs",))).model.log is torch.relu
    sys.modules.pop("logs")


def test_a_user_class_that_runs_code_is_named_before_the_work(theirs: Any) -> None:
    from surgeon.files.written import check_writable

    check_writable(net(value=theirs.Plain(), kind=theirs.Kind.A))
    with pytest.raises(StoreError, match=r"value could be .* theirs.Filled .* in __setstate__"):
        check_writable(net(value=theirs.Filled()))


def test_what_is_needed_to_open_a_file_is_all_named(theirs: Any) -> None:
    from surgeon.files.save import to_open_again
    from surgeon.files.written import packages, unreadable

    model = net(kind=theirs.Kind.A, at=Path("a"), norm=functools.partial(nn.BatchNorm2d))
    assert packages(model) == {"theirs"}
    assert to_open_again(model, Path("m.pt"), None) == "to open m.pt again, give --allow theirs"
    surgeon.save(model, "m.pt")
    assert unreadable(Path("m.pt"), THEIRS) is None
    assert "theirs.Kind" in str(unreadable(Path("m.pt"), Trust()))
    assert dataclasses.is_dataclass(theirs.Frozen)
    assert issubclass(theirs.Kind, enum.Enum)


def test_inputs_and_recipes_are_read_as_carefully_as_models(here: Path) -> None:
    write_storage(_view(5, b"K\x00", b"K\x05\x85", b"K\x01\x85"))
    with pytest.raises(SurgeonError, match="names a storage that it does not hold"):
        examples.read("m.pt", net())
    torch.save(torch.ones(1, 3, 8, 8), "x.pt")
    assert examples.read("x.pt", net()).shapes == ((1, 3, 8, 8),)
    with pytest.raises(SurgeonError, match="is not a regular file"):
        recipes.load("/dev/zero")

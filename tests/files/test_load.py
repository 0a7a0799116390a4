"""What a user names becomes a module, and no file gets to run anything on the way."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from helpers import write_pickle
from torch import fx, nn
from torch.nn import functional as F

import surgeon
from surgeon.conv.spec import ConvSpec, Pads
from surgeon.errors import ModelError
from surgeon.files import architectures, names, weights
from surgeon.files import load as source
from surgeon.files.architectures import Architecture
from surgeon.files.pickles import Trust
from surgeon.files.save import to_open_again

CODE = """
import torch
from pathlib import Path
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, marker=None):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        if marker:
            Path(marker).touch()

    def forward(self, x):
        return self.conv(x)

def marked(path):
    Path(path).touch()

def broken(): raise ValueError("first line\\nno such width")
def answer(): return 42
def compiled(): return torch.compile(Net(), backend="eager")
def leaves(): raise SystemExit(2)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in a folder with a package `mypkg` and a script `mynet.py`, which nothing else knows."""
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "__init__.py").touch()
    (tmp_path / "mypkg" / "nets.py").write_text(CODE)
    (tmp_path / "mynet.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mypkg", "mynet")]:
        del sys.modules[name]


@pytest.fixture
def marker(here: Path) -> Path:
    return here / "marker"


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def same(a: nn.Module, b: nn.Module, *, size: int = 64) -> bool:
    x = torch.rand(1, 3, size, size)
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    equal = all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    outputs = [torch.utils._pytree.tree_leaves(model.eval()(x)) for model in (a, b)]
    return equal and all(torch.equal(p, q) for p, q in zip(*outputs, strict=True))


def refusal(name: str | Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        source.load(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Whole modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:resnet18",
        "torchvision:inception_v3",
        "torchvision:swin_t",
        "torchvision:deeplabv3_mobilenet_v3_large",
        "torchvision:ssdlite320_mobilenet_v3_large",
        "timm:repvgg_a0",
        "timm:levit_128s",
        "timm:nfnet_l0",
    ],
)
def test_whole_models_load_as_they_were(name: str, here: Path) -> None:
    model = source.build(Architecture(name), seed=1)
    torch.save(model, here / "m.pt")
    loaded = source.load("m.pt")
    assert type(loaded.model) is type(model)
    assert (loaded.architecture, loaded.origin, loaded.metadata, loaded.notices) == (None, "m.pt", {}, ())
    assert same(loaded.model, model, size=224)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relu", F.relu),
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("spec", ConvSpec(3, 8, (3, 3), padding=(1, 1))),
        ("pads", Pads(1, 1, 0, -1)),
        ("options", argparse.Namespace(lr=0.1)),
        ("kind", nn.BatchNorm2d),
    ],
)
def test_harmless_attributes_come_along(name: str, value: object, here: Path) -> None:
    model = net()
    setattr(model, name, value)
    torch.save(model, here / "m.pt")
    assert getattr(source.load("m.pt").model, name) == value


@pytest.mark.parametrize("name", sorted(names.HARMLESS))
def test_harmless_names_all_exist_and_are_admitted(name: str, here: Path) -> None:
    module, _, attribute = name.rpartition(".")
    message = refusal(write_pickle(here / "name.pt", f"c{module}\n{attribute}\n".encode()))
    assert f"{name} (" not in message  # it is no model, but nothing is said against the name


def test_a_package_of_ones_own_is_admitted_by_name(here: Path) -> None:
    torch.save(source.load("mypkg.nets:Net").model, here / "m.pt")
    del sys.modules["mypkg.nets"], sys.modules["mypkg"]
    message = refusal("m.pt")
    assert "mypkg.nets.Net (outside the admitted packages)" in message
    assert message.endswith("--allow mypkg")
    assert "mypkg" not in sys.modules
    assert "outside" in refusal("m.pt", trust=Trust(allow=("my", "mypkg.net")))
    assert type(source.load("m.pt", trust=Trust(allow=("mypkg",))).model).__name__ == "Net"


def test_a_class_from_a_script_is_named_with_arch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source.load("mynet.py:Net").model
    monkeypatch.setattr(type(model), "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Net", type(model), raising=False)
    torch.save(model, here / "m.pt")
    assert (
        "__main__.Net (defined in a script). Save its state_dict, and say where the class is: --arch file.py:Net"
        in (refusal("m.pt", trust=Trust(allow=("__main__",))))
    )


# Files that would run something ---------------------------------------------------------------------------------------


def evil_function(marker: Path) -> object:
    return Calls(os.system, f"touch {marker}")


def evil_builtin(marker: Path) -> object:
    return {"state_dict": net().state_dict(), "epoch": Calls(exec, f"open({str(marker)!r}, 'w').close()")}


def evil_attribute(marker: Path) -> object:
    model = net()
    model.note = Calls(os.system, f"touch {marker}")  # type: ignore[assignment]
    return model


def evil_forward(marker: Path) -> object:
    model = nn.Identity()
    model.forward = os.system  # type: ignore[method-assign, assignment]
    return model


def evil_graph(marker: Path) -> object:
    code = f"open({str(marker)!r}, 'w').close()\ndef forward(self, x): return x\n"
    return Calls(fx.graph_module.reduce_graph_module, {"_code": code, "_graphmodule_cls_name": "G"}, "")


@pytest.mark.parametrize(
    ("make", "culprit", "runs"),
    [
        (evil_function, f"{os.system.__module__}.system", True),
        (evil_builtin, "builtins.exec", True),
        (evil_attribute, f"{os.system.__module__}.system", True),
        (evil_forward, f"{os.system.__module__}.system", False),
        (evil_graph, "torch.fx.graph_module.reduce_graph_module", True),
    ],
)
def test_files_that_run_code_are_refused(
    make: Callable[[Path], object], culprit: str, runs: bool, marker: Path
) -> None:
    torch.save(make(marker), "evil.pt")
    message = refusal("evil.pt", trust=Trust(allow=("posix", "os", "builtins", "torch")))
    assert culprit in message
    assert not marker.exists()
    if runs:  # the same file, when told to
        try:
            loaded = source.load("evil.pt", trust=Trust(unsafe_pickle=True))
            assert "any code in it has run" in loaded.notices[0]
        except ModelError:
            pass  # what it made is no model
        assert marker.exists()


def test_an_honest_file_runs_only_when_told_to(marker: Path) -> None:
    torch.save(fx.symbolic_trace(net()), "graph.pt")
    assert "a program that runs when it is opened" in refusal("graph.pt", trust=Trust(allow=("torch",)))
    loaded = source.load("graph.pt", trust=Trust(unsafe_pickle=True))
    assert isinstance(loaded.model, fx.GraphModule)
    assert loaded.notices == ("unpickled graph.pt without checks (--unsafe-pickle): any code in it has run",)


def test_a_constructor_is_not_run(marker: Path) -> None:
    """The unpickler of torch calls any class that it may name, with the file's arguments; surgeon does not."""
    kind = type(source.load("mypkg.nets:Net").model)
    torch.save(Calls(kind, 4, str(marker)), "evil.pt")
    assert "evil.pt calls mypkg.nets.Net" in refusal("evil.pt", trust=Trust(allow=("mypkg",)))
    assert not marker.exists()
    with torch.serialization.safe_globals([kind]):
        torch.load("evil.pt", weights_only=True)
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "culprit"),
    [
        (Calls(nn.Linear, 3, 4), "calls torch.nn.modules.linear.Linear"),
        (Calls(F.relu, 3), "calls torch.nn.functional.relu"),
        (Calls(torch._tensor._rebuild_from_type_v2, nn.Identity, nn.Identity, (), {}), "with torch.nn.modules"),
        (Calls(torch._tensor._rebuild_from_type_v2, nn.Identity(), nn.Identity, (), {}), "with torch.nn.modules"),
        (Calls(torch._utils._rebuild_parameter_with_state, 0, 0, 0, {"x": [{"y": nn.Identity}]}), "with torch.nn"),
    ],
)
def test_what_a_file_may_name_it_may_not_call(value: object, culprit: str, here: Path) -> None:
    torch.save(value, "evil.pt")
    assert culprit in refusal("evil.pt")


@pytest.mark.parametrize(
    ("kind", "name"), [(nn.Identity, "forward"), (nn.Identity, "__setstate__"), (nn.LSTM, "_init_flat_weights")]
)
def test_a_file_hides_no_method(kind: type[nn.Module], name: str, here: Path) -> None:
    model = kind() if kind is nn.Identity else kind(1, 1)
    model.__dict__[name] = F.relu
    torch.save(model, "evil.pt")
    assert f"evil.pt hides {kind.__name__}.{name} behind an attribute" in refusal("evil.pt")


IDENTITY = b"ctorch.nn.modules.linear\nIdentity\n"


@pytest.mark.parametrize(
    ("program", "culprit"),
    [
        (IDENTITY + b")\x81}b}b", "sets the state of an object twice"),
        (b"cargparse\nNamespace\n)\x81}b}b", "sets the state of an object twice"),
        (IDENTITY + b")\x81]b", "sets the state of a Identity from something other than a dict"),
        (IDENTITY + b")\x81}h\x00", "cannot be unpickled"),  # takes what it never put there
        (  # the name of a method, put together by a function that torch allows
            IDENTITY + b")\x81}c_codecs\nencode\nX\x0c\x00\x00\x00__frgfgngr__X\x05\x00\x00\x00rot13\x86RNsb",
            "calls _codecs.encode",
        ),
        (b"ccollections\nOrderedDict\n](" + IDENTITY + b"K\x01\x86e\x85R", "with torch.nn.modules.linear.Identity"),
        (b"ctimm.task.distillation\nDistillationTeacher\nX\x08\x00\x00\x00resnet18\x85R", "calls timm.task"),
    ],
)
def test_handwritten_pickles(program: bytes, culprit: str, here: Path) -> None:
    assert culprit in refusal(write_pickle(here / "evil.pt", program))


@pytest.mark.parametrize(
    ("module", "name", "why"),
    [
        ("torch.nn.modules.module", "os.system", "outside|no module"),
        ("torch.nn.modules.module", "torch", "not an nn.Module class"),
        ("torch.nn.functional", "importlib.import_module", "no module torch.nn.functional.importlib"),
        ("torch.nn.modules.module", "OrderedDict", "not an nn.Module class"),
        ("torch.nn.parameter", "UninitializedParameter", "not an nn.Module class"),
        ("torch.nn.modules.module.Module", "__init__", "outside the admitted packages"),
        ("surgeon.__main__", "Net", "outside the admitted packages"),
        ("torchvision.models.feature_extraction", "DualGraphModule", "a program that runs"),
        ("torchvision.models.quantization.mobilenetv2", "QuantStub", "really torch.ao.quantization.stubs.QuantStub"),
        ("torch.jit._script", "RecursiveScriptModule", "a program that runs"),
        ("torch.nn.modules.conv", "Conv7d", "not in the version installed here"),
        ("torchvision.nowhere", "Net", "there is no module torchvision.nowhere here"),
        ("timmy.nets", "Net", "outside the admitted packages"),
        ("functools", "reduce", "outside the admitted packages"),
    ],
)
def test_names_are_judged_by_what_they_stand_for(module: str, name: str, why: str, here: Path) -> None:
    message = refusal(write_pickle(here / "evil.pt", f"c{module}\n{name}\n".encode()))
    assert f"{module}.{name} (" in message
    assert any(part in message for part in why.split("|"))


def test_nothing_is_imported_for_a_file_that_is_refused(here: Path) -> None:
    (here / "mypkg" / "late.py").write_text("raise AssertionError")
    program = b"(cmypkg.late\nNet\ncposix\nsystem\nt"
    assert "posix.system" in refusal(write_pickle(here / "evil.pt", program), trust=Trust(allow=("mypkg",)))
    assert "mypkg" not in sys.modules


def test_a_library_is_not_taken_from_the_current_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "timm").mkdir()
    (here / "timm" / "__init__.py").write_text("raise AssertionError('ran')")
    torch.save(timm.create_model("resnet10t"), "m.pt")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)  # not installed
    assert "there is no module" in refusal("m.pt")


# Weights --------------------------------------------------------------------------------------------------------------


def save_state(state: dict[str, torch.Tensor], name: str) -> None:
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(state, name)
    else:
        torch.save(state, name, _use_new_zipfile_serialization=not name.startswith("legacy"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin", "legacy.pth"])
def test_weights_go_into_the_named_architecture(name: str, here: Path) -> None:
    model = source.build(Architecture("mynet.py:Net", {"width": 5}), seed=3)
    save_state(model.state_dict(), name)
    assert "holds weights only. Name their network: --arch" in refusal(name)
    loaded = source.load(name, arch="mynet.py:Net", arch_args=["width=5"])
    assert loaded.architecture == Architecture("mynet.py:Net", {"width": 5})
    assert same(loaded.model, model)
    torch.save(model, "whole.pt")
    assert same(source.load(name, arch="whole.pt", trust=Trust(allow=("mynet",))).model, model)
    state, notices = source.read_tensors(Path(name))
    assert (state.keys(), notices) == (model.state_dict().keys(), [])


def test_a_class_may_not_hide_where_a_forward_would_call_it(here: Path) -> None:
    """A blank module of torchvision's whose `conv` is a class of timm's that fetches what it is told to."""
    inner = torchvision.models.detection.rpn.RPNHead(4, 3)
    del inner.conv
    inner.__dict__["conv"] = timm.task.distillation.DistillationTeacher
    torch.save(inner, "evil.pt")
    assert "stores the class timm.task.distillation.DistillationTeacher," in refusal("evil.pt")
    inner.__dict__["conv"] = nn.BatchNorm2d  # the kind of its norms, as honest models have it
    torch.save(inner, "honest.pt")
    assert source.load("honest.pt").model.conv is nn.BatchNorm2d


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_numbers_of_another_kind_are_not_cast(dtype: torch.dtype, here: Path) -> None:
    state = source.load("mynet.py:Net").model.state_dict()
    save_state({**state, "conv.weight": state["conv.weight"].to(dtype)}, "w.safetensors")
    assert "conv.weight in w.safetensors holds" in refusal("w.safetensors", arch="mynet.py:Net")


def test_a_file_that_holds_a_network_needs_no_architecture(here: Path) -> None:
    model = surgeon.convert(source.load("torchvision:resnet18").model, "acnet", (1, 3, 32, 32))
    torch.save(model, "net.acnet.pt")
    loaded = source.load("net.acnet.pt", arch="torchvision:resnet18")
    assert same(loaded.model, model)
    assert loaded.notices == ("net.acnet.pt holds a whole network, which is used as it is; --arch is ignored",)


def test_naming_the_file_of_a_class_admits_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("away").mkdir()
    Path("away/others.py").write_text("from torch import nn\nclass Net(nn.Sequential): pass\n")
    model = source.load("away/others.py:Net").model
    model.append(torch.nn.Conv2d(3, 3, 3))
    torch.save(model, "net.pt")
    assert "give --arch away/others.py:Net" in str(to_open_again(model, Path("net.pt"), None))
    monkeypatch.delitem(sys.modules, "others")  # another process
    assert "others.Net" in refusal("net.pt")
    assert isinstance(source.load("net.pt", arch="away/others.py:Net").model[0], torch.nn.Conv2d)
    monkeypatch.delitem(sys.modules, "others")


def test_every_tensor_keeps_its_own_dtype(here: Path) -> None:
    state = source.load("mynet.py:Net").model.state_dict()
    first, *others = state
    state = {first: state[first].bfloat16()} | {key: state[key] for key in others}
    save_state(state, "w.safetensors")
    loaded = source.load("w.safetensors", arch="mynet.py:Net").model.state_dict()
    assert {key: tensor.dtype for key, tensor in loaded.items()} == {key: t.dtype for key, t in state.items()}


def test_safetensors_are_known_by_their_content(here: Path) -> None:
    save_state(net().state_dict(), "w.safetensors")
    Path("w.safetensors").rename("w.pt")
    assert source.read_tensors(Path("w.pt"))[0].keys() == net().state_dict().keys()


@pytest.mark.parametrize(
    ("wrap", "notice"),
    [
        (lambda s: {"state_dict": s, "epoch": 3, "args": argparse.Namespace(lr=1)}, "under 'state_dict'"),
        (lambda s: {"model_state_dict": s, "optimizer": {}}, "under 'model_state_dict'"),
        (lambda s: {"model": s}, "under 'model'"),
        (lambda s: {"net": s}, "under 'net'"),
        (lambda s: {"model": None, "ema": s}, "under 'ema'"),
        (lambda s: {"state_dict_ema": {}, "model_ema": s}, "under 'model_ema'"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "stripped the prefix 'module.' from 2 keys"),
        (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, "stripped the prefix '_orig_mod.' from 2 keys"),
    ],
)
def test_wrappers_and_prefixes(wrap: Callable[[Any], object], notice: str, here: Path) -> None:
    model = source.load("mynet.py:Net").model
    torch.save(wrap(model.state_dict()), "w.pt")
    loaded = source.load("w.pt", arch="mynet.py:Net")
    assert any(notice in line for line in loaded.notices)
    assert same(loaded.model, model)


def test_a_prefix_that_some_keys_lack_stays(here: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, "w.pt")
    assert list(source.read_tensors(Path("w.pt"))[0]) == ["module.a", "b"]


def test_the_trained_weights_come_before_their_average(here: Path) -> None:
    torch.save({"ema": nn.Conv2d(1, 1, 1), "model": nn.Conv2d(2, 2, 2)}, "w.pt")
    loaded = source.load("w.pt")
    assert isinstance(loaded.model, nn.Conv2d)
    assert loaded.model.in_channels == 2
    assert [notice.partition(", ")[0] for notice in loaded.notices] == [
        "took what w.pt holds under 'model'",
        "w.pt also holds an average of the weights",
    ]


def test_weights_of_another_network_are_named(here: Path) -> None:
    torch.save({"conv.weight": torch.ones(4, 3, 3, 3), "convs.bias": torch.ones(4)}, "w.pt")
    assert "1 missing (conv.bias); 1 unexpected (convs.bias)" in refusal("w.pt", arch="mynet.py:Net")
    torch.save({"conv.weight": torch.ones(9, 3, 5, 5), "conv.bias": torch.ones(9)}, "w.pt")
    message = refusal("w.pt", arch="mynet.py:Net")
    assert "2 of another shape (conv.weight is (9, 3, 5, 5), not (4, 3, 3, 3), " in message
    assert "num_classes" not in message


def test_another_classifier_is_told_apart(here: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), "w.pt")
    assert refusal("w.pt", arch="torchvision:resnet18").endswith("--arch-arg num_classes=10")
    assert source.load("w.pt", arch="torchvision:resnet18", arch_args=["num_classes=10"])


def test_half_precision_stays_half(here: Path) -> None:
    save_state(source.load("mynet.py:Net").model.half().state_dict(), "w.safetensors")
    model = source.load("w.safetensors", arch="mynet.py:Net").model
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_unaligned_safetensors_are_copied(here: Path) -> None:
    model = source.load("mynet.py:Net").model
    save_state({"a": torch.ones(1, dtype=torch.uint8), **model.state_dict()}, "w.safetensors")
    state, _ = source.read_tensors(Path("w.safetensors"))
    del state["a"]
    weights.load_weights(model, state, "w")
    assert all(p.data_ptr() % 16 == 0 for p in model.parameters())


def test_tied_tensors_are_stored_once(here: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model.append(model[0])
    weights.load_weights(model, {"0.weight": torch.ones(3, 3, 1, 1), "0.bias": torch.ones(3)}, "w")
    assert (model[2].weight == 1).all()  # type: ignore[union-attr]


def test_a_manifest_is_handed_to_who_can_read_it(here: Path) -> None:
    model = net()
    safetensors.torch.save_file(model.state_dict(), "w.safetensors", metadata={"surgeon": '{"a": 1}'})
    assert source.metadata(Path("w.safetensors")) == {"surgeon": '{"a": 1}'}
    loaded = source.load("w.safetensors", rebuild=lambda text, *_: net() if json.loads(text)["a"] else nn.Identity())
    assert loaded.metadata["surgeon"] == '{"a": 1}'
    assert same(loaded.model, model)
    assert "weights only" in refusal("w.safetensors")


def test_a_file_cannot_name_code_to_build(marker: Path) -> None:
    for name in ("os:system", "mypkg.nets:marked", "mynet.py:marked"):
        with pytest.raises(ModelError, match="code that would run"):
            source.build_named_in_file(Architecture(name, {"path": str(marker)}), trust=Trust(allow=("mypkg",)))
    assert not marker.exists()
    args = {"num_classes": 7, "weights": "DEFAULT"}  # would be fetched
    assert source.build_named_in_file(Architecture("torchvision:resnet18", args)).fc.out_features == 7


# Factories ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t", "mypkg.nets:Net", "mynet.py:Net"])
def test_factories_are_called_with_arguments_and_a_seed(name: str, here: Path) -> None:
    key = "width" if "Net" in name else "num_classes"
    before = torch.get_rng_state()
    a, b, c = (source.load(name, arch_args=[f"{key}=7"], seed=seed).model for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    first = [next(model.parameters()) for model in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert 7 in {len(p) for p in a.parameters()}


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "fcn_resnet50"])
def test_torchvision_neither_warns_nor_downloads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert isinstance(source.load(f"torchvision:{name}").model, nn.Module)


def test_a_class_in_a_file_can_be_pickled(here: Path) -> None:
    model = source.load("mynet.py:Net").model
    assert type(model) is type(source.load("mynet.py:Net").model)
    torch.save(model, "m.pt")
    assert same(source.load("m.pt", trust=Trust(allow=("mynet",))).model, model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet51", "torchvision has no model 'resnet51'. Closest: resnet50"),
        ("timm:repvgg_a00", "timm has no model 'repvgg_a00'. Closest: repvgg_a0"),
        ("mypkg.nots:Net", "there is no module 'mypkg.nots' here. Name it as `python -m` would, or as file.py:Net."),
        ("mypkg.nets:Nest", "mypkg.nets has no 'Nest'. It has Net"),
        ("mypkg.nets:nn", "mypkg.nets:nn is a module. Name a class or a function."),
        ("mypkg.nets:broken", "mypkg.nets:broken failed with ValueError: no such width. Give it what it needs"),
        ("mypkg.nets:leaves", "mypkg.nets:leaves failed with SystemExit: 2"),
        ("mypkg.nets:answer", "mypkg.nets:answer returned a int, not an nn.Module"),
        ("mypkg.bad:Net", "importing mypkg.bad failed with ZeroDivisionError: division by zero"),
        ("mypkg.lacks:Net", "importing mypkg.lacks failed with ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("mynot.py:Net", "there is no file mynot.py. Did you mean mynet.py?"),
        ("json.py:Net", "'json' is the name of another module in use. Rename json.py."),
    ],
)
def test_factories_that_do_not_work(name: str, message: str, here: Path) -> None:
    (here / "mypkg" / "bad.py").write_text("1 / 0")
    (here / "mypkg" / "lacks.py").write_text("import nowhere_at_all")
    (here / "json.py").write_text(CODE)
    assert message in refusal(name)


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal("timm:resnet18") == "timm is not installed. pip install timm"


def test_wrong_arguments(here: Path) -> None:
    assert "failed with TypeError" in refusal("mypkg.nets:Net", arch_args=["wide=3"])
    for text in ("width", "=3", "wi dth=3", "layers=[1,"):
        assert f"--arch-arg {text} cannot be read" in refusal("mypkg.nets:Net", arch_args=[text])
    assert "is a network already" in refusal("mypkg.nets:Net", arch="timm:resnet18")
    assert "--arch-arg needs --arch" in refusal("m.pt", arch_args=["a=1"])
    torch.save(net(), "m.pt")
    assert "takes no arguments" in refusal("m.pt", arch="m.pt", arch_args=["a=1"])


def test_arguments_are_read_as_values() -> None:
    texts = ["a=1", "b=1e-3", "c=[1, 2]", "d=true", "e=None", "f=relu", "g=(1, 2)", "h='012'", "i=no", "j=x=y"]
    expected = {"a": 1, "b": 1e-3, "c": [1, 2], "d": True, "e": None, "f": "relu", "g": (1, 2), "h": "012", "i": "no"}
    assert architectures.parse(texts) == {**expected, "j": "x=y"}


def test_wrappers_are_taken_off(here: Path) -> None:
    torch.save(nn.DataParallel(net()), "m.pt")
    loaded = source.load("m.pt")
    assert (type(loaded.model), loaded.notices) == (nn.Sequential, ("unwrapped DataParallel",))
    loaded = source.load("mypkg.nets:compiled")
    assert (type(loaded.model).__name__, loaded.notices) == ("Net", ("unwrapped OptimizedModule",))


# Files of other kinds -------------------------------------------------------------------------------------------------


def write_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Conv2d(3, 4, 3)).save(str(path))


def write_export(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 5, 5),))
        torch.export.save(exported, path.with_suffix(".pt2"))
    path.with_suffix(".pt2").replace(path)


def write_cut(path: Path) -> None:
    torch.save(net(), path)
    path.write_bytes(path.read_bytes()[:-300])


def write_cut_tensors(path: Path) -> None:
    safetensors.torch.save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3])


def write_garbled(path: Path) -> None:
    torch.save(net(), path)
    path.write_bytes(path.read_bytes().replace(b"in_channels", b"\xff\xff_channels", 1))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("m.pt", write_torchscript, "m.pt is a TorchScript program: it holds no modules"),
        ("m.pt2", write_export, "m.pt2 is a torch.export program: it holds no modules"),
        ("m.pt", write_export, "m.pt is a torch.export program"),
        ("m.onnx", lambda p: p.write_bytes(b"\x08\x07"), "m.onnx is an ONNX graph"),
        ("m.pt", lambda p: p.touch(), "m.pt is empty"),
        ("m.safetensors", lambda p: p.touch(), "m.safetensors is empty"),
        ("m.pt", write_cut, "m.pt is damaged or cut short: File is not a zip file. Copy or download it again."),
        ("m.pt", write_garbled, "m.pt is damaged: the checksum of 'm/data.pkl' is wrong. Copy or download it again"),
        ("m.safetensors", write_cut_tensors, "m.safetensors is damaged or cut short"),
        ("m.pt", lambda p: p.write_text("Not Found"), "m.pt is not a model file that surgeon knows"),
        ("m.h5", lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "m.h5 is not a model file that surgeon knows"),
        ("m.pt", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "Run `git lfs pull`."),
        ("m.npz", lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "m.npz is a zip that torch.save did not write"),
        ("m.pt", lambda p: p.mkdir(), "m.pt is a folder without a model file. Name a file ending in"),
        ("m.pt", lambda p: torch.save([1, 2], p), "m.pt holds a list. Save an nn.Module, or its state_dict."),
        ("m.pt", lambda p: torch.save({"epoch": 1}, p), "m.pt holds neither a model nor weights, but epoch"),
        ("m.pt", lambda p: torch.save({}, p), "but nothing"),
        ("m.pt", lambda p: torch.save(net(), p, pickle_protocol=4), "m.pt cannot be unpickled: Unsupported operand"),
        (
            "m.pt",
            lambda p: torch.save(net(), p, _use_new_zipfile_serialization=False),
            "m.pt was saved by torch < 1.6, or in its format, and holds more than tensors (torch.nn.modules",
        ),
    ],
)
def test_other_files_are_told_apart(name: str, write: Callable[[Path], object], message: str, here: Path) -> None:
    write(here / name)
    assert message in refusal(name)


def test_a_missing_file(here: Path) -> None:
    torch.save(net(), "model.pt")
    assert refusal("modle.pt") == "there is no file modle.pt. Did you mean model.pt?"
    assert "torchvision:resnet50" in refusal("resnet50")
    assert "there is no file nowhere/m.pt" in refusal("nowhere/m.pt")


def test_a_file_that_may_not_be_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    Path("m.pt").touch()
    monkeypatch.setattr(Path, "open", forbid)
    assert refusal("m.pt") == "m.pt cannot be read: Permission denied. Name a file that you may read."


def test_a_detector_that_has_run_loads(tmp_path: Path) -> None:
    pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1"], output_size=2, sampling_ratio=1)
    maps = {"0": torch.rand(1, 3, 8, 8), "1": torch.rand(1, 3, 4, 4)}
    pooler(maps, [torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [(16, 16)])  # now it holds how sizes are mapped to levels
    torch.save(nn.Sequential(pooler), tmp_path / "net.pt")
    assert type(source.load(str(tmp_path / "net.pt")).model[0]) is torchvision.ops.MultiScaleRoIAlign

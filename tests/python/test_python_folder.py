"""`fuse --python`: what is written runs without surgeon, computes the same, and reads like Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from helpers import narrow, run_surgeon, shake_
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter

import surgeon
from surgeon.errors import CaptureError, StoreError, VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import duplicate
from surgeon.python import write
from surgeon.python.source import source
from surgeon.python.write import write_python

ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("surgeon", "timm", "torchvision"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree
import model
x = load_file(sys.argv[2])["x"]
net = model.load().double()
with torch.no_grad():
    out = _pytree.tree_leaves(net(x))
save_file({str(i): t.contiguous().clone() for i, t in enumerate(out)}, sys.argv[3])
"""


def written(tmp_path: Path, model: nn.Module, size: int = 32, *, channels: int = 3) -> str:
    """Write a network, run it in a process of its own, compare in float64, and give its text."""
    model = model.eval()
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    write_python(model, Inputs((x,)), tmp_path / "out", origin="a test")
    from safetensors.torch import load_file, save_file

    save_file({"x": x.double()}, tmp_path / "x.safetensors")
    paths = [str(tmp_path / "out"), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    done = subprocess.run([sys.executable, "-c", ALONE, *paths], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(surgeon.fuse(model, x).double()(x.double()))
    found = load_file(tmp_path / "y.safetensors")
    assert len(found) == len(expected)
    for i, one in enumerate(expected):
        assert (found[str(i)] - one).norm() <= 1e-12 * one.norm()
    return (tmp_path / "out" / "model.py").read_text(encoding="utf-8")


def is_tidy(folder: Path) -> bool:
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    if not Path(ruff).exists():
        pytest.skip("ruff is not installed")
    checks = [["check", "--isolated"], ["format", "--isolated", "--check"]]
    return all(not subprocess.run([ruff, *one, str(folder / "model.py")], check=False).returncode for one in checks)


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return shake_(narrow(torchvision.models.resnet18(num_classes=8)), gently=True).eval()


def test_a_resnet_has_one_class_for_each_kind_of_block_and_its_own_keys(tmp_path: Path) -> None:
    model = surgeon.fuse(surgeon.convert(resnet18(), "acnet"))
    text = written(tmp_path, model)
    assert [line for line in text.splitlines() if line.startswith("class ")] == [
        "class BasicBlock(nn.Module):",
        "class BasicBlockWithDownsample(nn.Module):",
        "class ResNet(nn.Module):",
    ]
    assert "self.layer2 = nn.Sequential(BasicBlockWithDownsample(16, 32), BasicBlock(32))" in text
    assert "        out += x\n        return self.relu(out)\n" in text
    assert is_tidy(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {*file.keys()} == {*model.state_dict()}
        said = json.loads(file.metadata()["surgeon.python"])
    assert said["verified"]["verdict"] == "equivalent"
    assert [step["operation"] for step in said["history"]] == ["convert", "fuse"]
    again = source(duplicate(model), Inputs((torch.randn(1, 3, 64, 64),)), "again")
    assert again.text.split("import torch")[1] == text.split("import torch")[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: surgeon.fuse(surgeon.convert(resnet18(), "hetconv-p4")),
        lambda: surgeon.fuse(surgeon.convert(resnet18(), "octave", (1, 3, 64, 64))),
        lambda: shake_(torchvision.models.mobilenet_v3_small(num_classes=3)),
        lambda: surgeon.fuse(shake_(timm.create_model("test_efficientnet", num_classes=3)), norms=True),
        lambda: IntermediateLayerGetter(resnet18(), {"layer1": "low", "layer4": "high"}),
    ],
    ids=["hetconv", "octave", "mobilenet", "timm", "backbone"],
)
def test_networks_leave_surgeon(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    text = written(tmp_path, make(), 64)
    assert "surgeon" not in text.split('"""')[2]
    assert "timm" not in text.split('"""')[2]
    assert is_tidy(tmp_path / "out")


def test_a_hetconv_is_two_convs(tmp_path: Path) -> None:
    text = written(tmp_path, surgeon.fuse(surgeon.convert(resnet18(), "hetconv-p4")))
    assert "class SumOfConvs(nn.Module):" in text
    assert "self.conv1 = SumOfConvs(channels, channels)" in text


def test_a_network_that_is_a_list_of_layers_gets_a_class_of_its_own(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1)))
    fused = surgeon.fuse(surgeon.convert(layers, "hetconv-p4", (1, 8, 16, 16)))
    text = written(tmp_path, fused, channels=8)
    assert "class Sequential(nn.Module):" in text
    assert is_tidy(tmp_path / "out")


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Hostile(nn.Module):
    """Names that are no Python, tensors of every kind, and outputs in every structure."""

    def __init__(self) -> None:
        super().__init__()
        for name in ('x"); import os', "lambda", "__private", "é", "0", "torch", "a b\n"):
            self.add_module(name, nn.Conv2d(3, 3, 1))
        self.register_parameter('w"; raise SystemExit', nn.Parameter(torch.randn(3, 1, 1)))
        self.register_buffer("hidden", torch.randn(3, 1, 1), persistent=False)
        self.register_buffer("count", torch.tensor([1, 2, 3]))
        self.tied = nn.Conv2d(3, 3, 1)
        self.tied.weight = self.torch.weight  # type: ignore[union-attr]
        self.unused = nn.Linear(3, 3)
        self.pool = nn.ModuleDict({"a-b": nn.AvgPool2d(2)})

    def forward(self, x: Tensor, scale: float = float("inf")) -> dict[str, object]:
        for name, child in self.named_children():
            if isinstance(child, nn.Conv2d) and name != "tied":
                x = child(x)
        y = self.tied(x) * getattr(self, 'w"; raise SystemExit') + self.hidden * self.count[0]  # type: ignore[index]
        z = F.dropout(y.clamp(max=scale), 0.5, self.training)[:, ..., None]
        fixed = torch.arange(3.0, dtype=x.dtype)[:, None, None] * x
        parts = OrderedDict([("a'\"\n", z), ("b", [x, (y, fixed)])])
        return {"parts": parts, "pair": Pair(self.pool["a-b"](x), x[:, :2].flatten(1))}


def test_names_and_values_are_written_as_what_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = written(tmp_path, Hostile(), 8)
    assert "self.add_module('x\"); import os', nn.Conv2d(3, 3, 1))" in text
    assert 'self.add_module("lambda", nn.Conv2d(3, 3, 1))' in text
    assert 'tensors["tied.weight"] = tensors["torch.weight"]' in text
    assert "class Pair(NamedTuple):" in text
    assert "unused" not in text
    assert is_tidy(tmp_path / "out")


@pytest.mark.parametrize("name", ['x"); import os', "nn", "load", "class", "Tensor", "1st"])
def test_names_of_classes_and_origins_cannot_become_code(tmp_path: Path, name: str) -> None:
    kind = type(name, (nn.Module,), {"forward": lambda self, x: self.conv(x).relu()})
    model = kind()
    model.conv = nn.Conv2d(3, 3, 1)
    origin = f'{name}"""\nimport os\nos._exit(3)\n"""'
    write_python(model.eval(), Inputs((torch.randn(1, 3, 4, 4),)), tmp_path / "out", origin=origin)
    text = (tmp_path / "out" / "model.py").read_text(encoding="utf-8")
    assert "import os" not in [line.strip() for line in text.splitlines()]
    assert is_tidy(tmp_path / "out")


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class BySize(ByValue):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + 1 if x.shape[-1] > 20 else x


class Foreign(ByValue):
    def forward(self, x: Tensor) -> Tensor:
        return torchvision.ops.roi_pool(self.conv(x), [torch.zeros(1, 4)], 2)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (ByValue(), "inner \\(ByValue\\) cannot be written as Python.*as the numbers in a tensor are"),
        (BySize(), "the network does different things for inputs of 2×3×16×16 and 3×3×48×48"),
        (Foreign(), "inner \\(Foreign\\) cannot be written as Python"),
    ],
)
def test_what_cannot_be_written_is_said_and_nothing_is_left(tmp_path: Path, inner: nn.Module, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        write_python(Outer(inner).eval(), Inputs((torch.rand(2, 3, 16, 16),)), tmp_path / "out", origin="a test")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("where", ["process", "verifier"])
def test_a_wrong_text_is_found_and_nothing_is_left(tmp_path: Path, monkeypatch, where: str) -> None:  # type: ignore[no-untyped-def]
    def wrong(*args: object) -> object:
        made = source(*args)  # type: ignore[arg-type]
        return replace(made, text=made.text.replace(".relu()", ".sigmoid()"))

    if where == "verifier":
        monkeypatch.setattr(write, "source", wrong)
    else:
        program = write.PROGRAM.replace("torch.save(made", "made['float64'][0] += 1e-9; torch.save(made")
        monkeypatch.setattr(write, "PROGRAM", program)
    model = Outer(nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(VerifyError, match="the Python that was written"):
        write_python(model, Inputs((torch.randn(1, 3, 4, 4),)), tmp_path / "out", origin="a test")
    assert not [*tmp_path.iterdir()]


def test_the_command_writes_a_folder_and_overwrites_nothing(tmp_path: Path, capfd, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    surgeon.save(surgeon.convert(Outer(nn.Conv2d(3, 3, 3)), "acnet", (1, 3, 8, 8)), "net.pt")
    allow = ["--allow", Outer.__module__]
    assert run_surgeon("fuse", "net.pt", "--python", "deployed", "--bf16", *allow) == 0
    said = capfd.readouterr().out
    assert "verified: Outer in deployed/model.py, which needs no surgeon, is equivalent" in said
    assert "cast to bfloat16: relative L2" in said
    with safe_open("deployed/model.safetensors", "pt") as file:
        assert file.get_tensor("inner.weight").dtype == torch.bfloat16
    before = Path("deployed/model.py").stat().st_mtime_ns
    assert run_surgeon("fuse", "net.pt", "--python", "deployed", *allow) == 2
    assert "deployed/model.py exists" in capfd.readouterr().err
    assert Path("deployed/model.py").stat().st_mtime_ns == before
    assert run_surgeon("fuse", "net.pt", "--python", "deployed", "--force", *allow) == 0
    assert run_surgeon("fuse", "net.pt", "--python", "net.pt", *allow) == 2
    assert run_surgeon("fuse", "net.pt", "--python", "no/such", *allow) == 2
    assert run_surgeon("fuse", "net.pt", "--python", "a", "-o", "b.pt", *allow) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} == {"net.pt", "deployed"}


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(StoreError, match="is not a folder"):
        write.claim_folder(tmp_path / "out", force=True)

"""Outputs in a file, and another model judged by them: right pairs pass, and faults of a millionth are found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_surgeon, shake_
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import surgeon
from surgeon.errors import CaptureError, SurgeonError, VerifyError
from surgeon.proof import reference
from surgeon.proof.nested import built, flattened
from surgeon.proof.reference import SKETCH, sketch

HETCONV = {"surgeon": 1, "rules": [{"swap": "hetconv", "with": {"p": 2}, "match": {"in_channels": 6}}]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def _net() -> Net:
    torch.manual_seed(0)
    return shake_(Net().eval(), gently=True)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    surgeon.save_outputs(_net(), tmp_path / "ref.safetensors", (2, 3, 9, 9), sites=True)
    return tmp_path / "ref.safetensors"


def _scaled_(model: nn.Module, path: str, by: float) -> nn.Module:
    with torch.no_grad():
        model.get_submodule(path).weight.mul_(by)
    return model


@pytest.mark.parametrize(
    "made",
    [
        lambda net: net,
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: surgeon.convert(net, "acnet"),
        lambda net: surgeon.fuse(surgeon.convert(net, "acnet")),
        lambda net: _forgotten(surgeon.fuse(surgeon.convert(net, "acnet"))),
        lambda net: surgeon.fuse(net, norms=True),
    ],
)
def test_a_right_model_is_equivalent(made: Callable[[nn.Module], nn.Module], kept: Path) -> None:
    report = surgeon.compare_outputs(made(_net()), kept)
    assert report, str(report)
    assert report.first_to_diverge is None
    assert {"storage", "rounding"} <= {check.name for check in report.checks}


def _forgotten(model: nn.Module) -> nn.Module:
    del model.surgeon_provenance
    return model


@pytest.mark.parametrize("path", ["conv1", "bn1", "conv2", "head"])
def test_a_weight_that_is_a_millionth_off_is_found(path: str, kept: Path) -> None:
    wrong = _net()
    with torch.no_grad():
        wrong.get_submodule(path).weight.view(-1)[0] *= 1 + 1e-6
    report = surgeon.compare_outputs(wrong, kept)
    assert report.verdict == "different"
    assert any(f"{path}.weight" in check.says for check in report.checks if not check.passed)


def test_a_weight_that_is_a_millionth_off_in_a_fused_model_is_found(kept: Path) -> None:
    wrong = _scaled_(surgeon.fuse(surgeon.convert(_net(), "acnet")), "conv2", 1 + 1e-6)
    report = surgeon.compare_outputs(wrong, kept)
    assert [check.name for check in report.checks if not check.passed] == ["stored tensors"]


def test_a_fault_in_code_of_a_millionth_is_found_and_its_place_named(kept: Path) -> None:
    class Off(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 1e-6)

    wrong = Off().eval()
    wrong.load_state_dict(_net().state_dict())
    report = surgeon.compare_outputs(wrong, kept)
    assert not report
    assert [check.name for check in report.checks if not check.passed] == ["storage"]


@pytest.mark.parametrize("made", [lambda net: net, lambda net: _forgotten(surgeon.fuse(net, norms=True))])
def test_the_first_module_that_differs_is_named_also_where_its_norm_was_folded(
    made: Callable[[nn.Module], nn.Module], kept: Path
) -> None:
    report = surgeon.compare_outputs(_scaled_(made(_net()), "conv2", 1.01), kept)
    assert report.verdict == "different"
    assert report.first_to_diverge == "conv2"
    assert sum(site.diverges for site in report.sites) == 1


def test_a_conv_that_a_block_was_folded_to_is_compared_with_the_block(tmp_path: Path) -> None:
    net = surgeon.convert(_net(), "acnet", (1, 3, 9, 9))
    surgeon.save_outputs(net, tmp_path / "ref.safetensors", (2, 3, 9, 9), sites=True)
    fused = surgeon.fuse(net)
    assert surgeon.compare_outputs(fused, tmp_path / "ref.safetensors").first_to_diverge is None
    report = surgeon.compare_outputs(_scaled_(fused, "conv1", 1.01), tmp_path / "ref.safetensors")
    assert (report.verdict, report.first_to_diverge) == ("different", "conv1")
    again = surgeon.fuse(net, keep_norms=True)  # here the norm is beside the conv, which gives something else
    report = surgeon.compare_outputs(_scaled_(again, "head", 1.01), tmp_path / "ref.safetensors")
    assert (report.verdict, report.first_to_diverge) == ("different", "head")


def test_what_is_approximate_by_design_is_not_called_equivalent(kept: Path) -> None:
    report = surgeon.compare_outputs(surgeon.convert(_net(), HETCONV, (1, 3, 9, 9)), kept)
    assert report.verdict == "approximate"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_judged_as_verify_judges_them(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "ref.safetensors"
    net = _net().to(dtype)
    surgeon.save_outputs(net, file, (2, 3, 9, 9))
    assert surgeon.compare_outputs(copy.deepcopy(net), file)
    assert not surgeon.compare_outputs(_scaled_(copy.deepcopy(net), "conv1", 1.05), file)
    with pytest.raises(VerifyError, match=f"A is stored in {str(dtype)[6:]} and B in float32"):
        surgeon.compare_outputs(_net(), file)


class _OnlyOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return self.conv(x)


def test_a_model_that_runs_in_no_float64_is_judged_in_its_own_dtype(tmp_path: Path) -> None:
    file = tmp_path / "ref.safetensors"
    surgeon.save_outputs(_OnlyOwn(), file, (2, 3, 9, 9))
    assert surgeon.compare_outputs(_OnlyOwn(), file)
    assert not surgeon.compare_outputs(_scaled_(_OnlyOwn(), "conv", 1.01), file)


@dataclass
class Two:
    scores: Tensor
    more: dict[str, Any]


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Two:
        out = self.conv(x)
        return Two(out, {"best": out.argmax(1), "pair": (out.mean(), 3, "text", None if mask is None else mask.sum())})


def test_nested_calls_and_outputs_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "ref.safetensors"
    given = {"x": torch.rand(2, 3, 9, 9), "mask": torch.ones(3, dtype=torch.bool)}
    surgeon.save_outputs(_Nested(), file, [given, torch.rand(1, 3, 7, 7)])
    report = surgeon.compare_outputs(_Nested(), file)
    assert report, str(report)
    assert len(report.distances) == 2
    assert not surgeon.compare_outputs(_scaled_(_Nested(), "conv", 1.001), file)
    with pytest.raises(VerifyError, match="a set cannot be kept"):
        flattened({"a": {1}}, [])


def test_a_structure_that_is_none_is_refused() -> None:
    for wrong in (
        ["tensor", 1],
        ["tensor", True],
        ["tensor", -1],
        ["set", []],
        ["dict", [["a"]]],
        {},
        None,
        ["value", []],
    ):
        with pytest.raises(SurgeonError, match="is not one"):
            built(wrong, [torch.zeros(1)])
    deep: list[Any] = ["value", 1]
    for _ in range(100):
        deep = ["list", [deep]]
    with pytest.raises(SurgeonError, match="is not one"):
        built(deep, [])


def test_a_program_in_a_file_is_compared_with_the_outputs(kept: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    surgeon.export(_net(), tmp_path / "net.onnx", (2, 3, 9, 9))
    assert surgeon.compare_outputs(surgeon.load(tmp_path / "net.onnx"), kept)
    surgeon.export(_scaled_(_net(), "conv2", 1.001), tmp_path / "wrong.onnx", (2, 3, 9, 9))
    assert not surgeon.compare_outputs(surgeon.load(tmp_path / "wrong.onnx"), kept)


def test_another_structure_of_outputs_is_refused(kept: Path) -> None:
    wrong = _net()
    wrong.head = nn.Linear(6, 8)
    with pytest.raises(VerifyError, match="output 0 is"):
        surgeon.compare_outputs(wrong, kept)
    with pytest.raises(VerifyError, match="does not run"):
        surgeon.compare_outputs(nn.Conv2d(5, 6, 3), kept)


def test_drawn_inputs_are_drawn_again_and_others_kept(kept: Path, tmp_path: Path) -> None:
    assert not any(key.startswith("input.") for key in reference.read(kept).tensors)
    other = tmp_path / "other.safetensors"
    surgeon.save_outputs(_net(), other, torch.rand(2, 3, 9, 9))
    held = reference.read(other)
    assert held.tensors["input.0.0.0"].shape == (2, 3, 9, 9)
    surgeon.save_outputs(_net(), other, (2, 3, 9, 9), store_inputs=True, force=True)
    assert "input.0.0.0" in reference.read(other).tensors
    assert surgeon.compare_outputs(_net(), other)


def test_it_is_said_where_torch_draws_other_numbers(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *sizes, **how: plain(*sizes, **how) * (1 + 1e-6))
    with pytest.raises(SurgeonError, match=r"draws other numbers here.*--store-inputs there"):
        surgeon.compare_outputs(_net(), kept)


def test_versions_that_differ_are_said(kept: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        manifest["versions"]["torch"] = "2.10.0"

    report = surgeon.compare_outputs(_net(), _changed(kept, older))
    assert any("torch 2.10.0 there and" in one for one in report.remarks)


def _changed(path: Path, change: Callable[[dict[str, Any]], object], drop: str = "") -> Path:
    """Write the file again with another manifest, as somebody could, without the checksum."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != drop}  # noqa: SIM118
        header = file.metadata()
    manifest = json.loads(header["surgeon.outputs"])
    change(manifest)
    out = path.with_name("changed.safetensors")
    save_file(tensors, out, metadata={"surgeon.outputs": json.dumps(manifest)})
    return out


def _set(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update(values)


def _of_input(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["inputs"][0].update(values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set(format=2), "later surgeon"),
        (_set(format="1"), "the manifest in"),
        (_set(more=1), "the manifest in"),
        (_set(inputs=[]), "the manifest in"),
        (_set(dtype="int8"), "the manifest in"),
        (_set(seed=-1), "the manifest in"),
        (_set(tensors={"a": "x"}), "the manifest in"),
        (_set(history={"format": 2, "history": 5}), "the manifest in"),
        (_of_input(record=[[2**40, 3, 9, 9]]), "is too large"),
        (_of_input(record=[[-1]]), "the manifest in"),
        (_of_input(record="2,3,9,9,;;="), "cannot be drawn"),
        (_of_input(record=None), "is not one"),
        (_of_input(hashes=[]), "no draws"),
        (_of_input(out=["tensor", 9]), "is not one"),
        (_of_input(noise=[{"l2": float("nan"), "flips": 0}]), "the manifest in"),
        (_of_input(sites=[{"path": "x", "kind": "y", "tensors": {}, "numbers": 5, "noise": 0.0}]), "is missing"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_sentence(change: Any, said: str, kept: Path) -> None:
    file = _changed(kept, change)
    with pytest.raises(SurgeonError, match=said) as caught:
        surgeon.compare_outputs(_net(), file)
    assert "\n" not in str(caught.value)


def test_a_file_without_its_outputs_is_refused(kept: Path) -> None:
    with pytest.raises(SurgeonError, match="are missing"):
        surgeon.compare_outputs(_net(), _changed(kept, lambda _: None, drop="own.0.0.0"))


def test_a_file_of_which_one_byte_was_changed_is_refused(kept: Path) -> None:
    content = bytearray(kept.read_bytes())
    content[-20] ^= 1
    kept.write_bytes(content)
    with pytest.raises(SurgeonError, match="is damaged, or was changed"):
        surgeon.compare_outputs(_net(), kept)


def test_a_limit_that_is_infinite_lets_nothing_pass(kept: Path) -> None:
    file = _changed(kept, _of_input(noise=[{"l2": float("inf"), "flips": 0}]))
    wrong = _scaled_(_forgotten(surgeon.fuse(_net(), norms=True)), "conv2", 2.0)
    assert not surgeon.compare_outputs(wrong, file)


def test_sketches_keep_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (10, SKETCH, 5000, 200_000):
        x = torch.randn(size, generator=generator).double()
        y = x + 1e-3 * torch.randn(size, generator=generator).double()
        true, found = (x - y).norm() / x.norm(), (sketch(x) - sketch(y)).norm() / sketch(x).norm()
        assert float(found / true) == pytest.approx(1, abs=0.1 if size > SKETCH else 1e-12)
        assert len(sketch(x)) <= SKETCH
    assert abs(float(reference._signs(100_000, torch.device("cpu")).mean())) < 0.02


def test_the_command_writes_and_compares(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    surgeon.save(_net(), "net.pt", arch=None)
    torch.save(nn.Conv2d(3, 6, 3), "other.pt")
    assert (
        run_surgeon("verify", "net.pt", "--save-outputs", "ref.safetensors", "--sites", "-i", "1,3,9,9", *_ALLOW) == 0
    )
    assert "surgeon verify B --against ref.safetensors" in capsys.readouterr().out
    assert run_surgeon("verify", "net.pt", "--against", "ref.safetensors", "--json", *_ALLOW) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "equivalent"
    assert run_surgeon("verify", "other.pt", "--against", "ref.safetensors") == 2
    before = sorted(tmp_path.iterdir())
    for options, words in (
        (("net.pt",), "give a second model B"),
        (("net.pt", "net.pt", "--against", "ref.safetensors"), "one of the three"),
        (("net.pt", "--against", "ref.safetensors", "-i", "1,3,9,9"), "--input does not go with --against"),
        (("net.pt", "net.pt", "--sites"), "--sites does not go with a second model"),
        (("net.pt", "--save-outputs", "x.safetensors", "--junit", "x.xml"), "--junit does not go with"),
        (("net.pt", "--save-outputs", "x.pt"), "End it in .safetensors"),
        (("net.pt", "--save-outputs", "ref.safetensors"), "ref.safetensors exists"),
        (("net.pt", "--against", "none.safetensors"), "there is no file of outputs"),
        (("net.pt", "--against", "net.pt"), "net.pt is no file of outputs, which end in .safetensors. Make one"),
    ):
        capsys.readouterr()
        assert run_surgeon("verify", *options, *_ALLOW) == 2, options
        assert words in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.iterdir()) == before


_ALLOW = ("--allow", "test_outputs")


def test_a_model_whose_input_is_not_known_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no input is known"):
        surgeon.save_outputs(nn.Bilinear(3, 4, 5), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())

"""What verify makes of files that hold programs: right ones are equivalent, and planted faults come out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_nets import SHAPE, Convs, Detector, UNet, made
from helpers import run_surgeon
from onnx import numpy_helper
from torch import nn

import surgeon
from surgeon.errors import VerifyError
from surgeon.files import onnx_in_double

_Fault = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return made(Convs, "acnet")


@pytest.fixture(scope="module")
def whole(source: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "net.onnx"
    surgeon.export(source, path, SHAPE)
    return path


def changed(name: str, change: Callable[[Any], Any]) -> _Fault:
    """Change the numbers that a file stores under a name."""

    def fault(model: onnx.ModelProto) -> None:
        one = next(one for one in model.graph.initializer if one.name == name)
        one.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(one).copy()), name))

    return fault


def _one_weight(by: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[0, 0, 0, 0] *= 1 + by
        return array

    return change


def _swapped(array: Any) -> Any:
    array[[0, 1]] = array[[1, 0]]
    return array


def setting(kind: str, name: str, value: Any) -> _Fault:
    """Change a setting of the first step of a kind."""

    def fault(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == kind)
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return fault


def without(kind: str) -> _Fault:
    """Let a step of a kind do nothing."""

    def fault(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == kind)
        node.op_type = "Identity"
        del node.attribute[:]

    return fault


FAULTS = {
    "one weight, by 1 %": changed("a.weight", _one_weight(0.01)),
    "one weight, by a hundred thousandth": changed("b.weight", _one_weight(1e-5)),
    "a bias is dropped": changed("head.bias", lambda array: array * 0),
    "two channels change places": changed("a.bias", _swapped),
    "a NaN": changed("head.bias", lambda array: array * float("nan")),
    "every weight, by a millionth": changed("head.weight", lambda array: array * (1 + 1e-6)),
    "another padding": setting("MaxPool", "pads", [0, 0, 2, 2]),
    "no activation": without("Relu"),
}


def verified(a: nn.Module, path: Path, **more: Any) -> surgeon.Report:
    return surgeon.verify(a, surgeon.load(path), more.get("example", SHAPE))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_file_is_found(name: str, source: nn.Module, whole: Path, tmp_path: Path) -> None:
    model = onnx.load(whole)
    FAULTS[name](model)
    onnx.save(model, tmp_path / "wrong.onnx")
    report = verified(source, tmp_path / "wrong.onnx")
    assert report.verdict == "different", report
    assert "storage" in {check.name for check in report.checks if not check.passed}
    assert surgeon.verify(surgeon.load(tmp_path / "wrong.onnx"), source, SHAPE).verdict == "different"
    assert surgeon.verify(surgeon.load(whole), surgeon.load(tmp_path / "wrong.onnx")).verdict == "different"


def test_a_right_file_is_equivalent_in_either_order(source: nn.Module, whole: Path) -> None:
    program = surgeon.load(whole)
    for a, b in itertools.permutations([source, program], 2):
        assert surgeon.verify(a, b, SHAPE).equivalent
    assert surgeon.verify(program, surgeon.load(whole)).equivalent


def test_no_example_is_needed_for_a_file_that_says_what_it_takes(source: nn.Module, whole: Path) -> None:
    assert surgeon.verify(source, surgeon.load(whole)).distances[0].input == "1×3×32×32"


def test_what_the_history_in_a_file_says_is_done_again(whole: Path) -> None:
    torch.manual_seed(0)
    origin = made(Convs)  # the numbers that `source` was made of
    report = verified(origin, whole)
    assert report.equivalent, report
    assert "mathematics" in {check.name for check in report.checks}
    assert "the history in the file" in report.remarks[0]


def test_an_approximate_conversion_stays_approximate_as_a_file(tmp_path: Path) -> None:
    surgeon.save(made(UNet), tmp_path / "net.pt")
    surgeon.export(made(UNet, "octave"), tmp_path / "octave.onnx", SHAPE)
    allowed = ("--allow", "export_nets", "-i", "1,3,32,32")
    assert run_surgeon("verify", tmp_path / "net.pt", tmp_path / "octave.onnx", *allowed) == 3


def exported_by_torch(net: nn.Module, path: Path) -> Path:
    """Export as a user would: torch folds norms into convs, in float32, and puts the weights beside the file."""
    torch.onnx.export(net, (torch.randn(SHAPE),), path, dynamo=True, verbose=False)
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_torchs_own_exporter_is_equivalent_and_faults_in_it_are_found(tmp_path: Path) -> None:
    net = made(Convs)
    path = exported_by_torch(net, tmp_path / "torch.onnx")
    assert (tmp_path / "torch.onnx.data").is_file()
    report = verified(net, path)
    assert report.equivalent, report
    assert not any("2×3×40×48" in check.says for check in report.checks)  # a size that the file does not take
    model = onnx.load(path)
    weight = next(one.name for one in model.graph.initializer if len(one.dims) == 4)
    changed(weight, _one_weight(0.01))(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    assert verified(net, tmp_path / "wrong.onnx").verdict == "different"


def test_outputs_of_another_kind_or_number_cannot_be_compared(whole: Path, tmp_path: Path) -> None:
    surgeon.export(made(Detector), tmp_path / "two.onnx", SHAPE)
    with pytest.raises(VerifyError, match="different structures"):
        verified(made(Convs), tmp_path / "two.onnx")
    with pytest.raises(VerifyError, match=r"output 0 is 1×3×16×16 .* against 1×6×16×16"):
        verified(_narrower(), whole)


def _narrower() -> nn.Module:
    net = made(Convs)
    net.head = nn.Conv2d(16, 3, 1)  # type: ignore[assignment]
    return net


def test_outputs_that_stay_where_they_are_show_nothing(tmp_path: Path) -> None:
    class Dead(Convs):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image) * 0 + 1

    surgeon.save(made(Convs), tmp_path / "net.pt")
    with pytest.raises(VerifyError, match="no output of A moves with the input"):
        surgeon.export(made(Dead), tmp_path / "dead.onnx", SHAPE)
    assert not (tmp_path / "dead.onnx").exists()


def test_what_onnx_cannot_compute_in_float64_is_compared_as_it_is_stored(
    source: nn.Module, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, model: onnx.ModelProto) -> None:
        raise NotImplementedError("an operator of onnxruntime's own")

    monkeypatch.setattr(onnx_in_double.InDouble, "__init__", fails)
    report = verified(source, whole)
    assert report.equivalent, report
    assert "B does not run in float64" in report.remarks[0]
    assert report.distances[0].float64 is None
    model = onnx.load(whole)
    FAULTS["one weight, by 1 %"](model)
    onnx.save(model, tmp_path / "wrong.onnx")
    assert verified(source, tmp_path / "wrong.onnx").verdict == "different"


def test_a_network_that_computes_in_float32_within_float64_is_not_condemned(tmp_path: Path) -> None:
    class Narrowing(Convs):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image.float().type_as(image))  # which torch leaves out of what it exports

    net = made(Narrowing)
    surgeon.export(net, tmp_path / "net.onnx", SHAPE)
    report = verified(net, tmp_path / "net.onnx")
    assert report.equivalent, report
    assert any(check.measured > 1e-9 for check in report.checks if check.name == "storage")


def test_a_file_of_a_large_fixed_size_is_not_given_a_smaller_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, 4)).eval()
    surgeon.export(net, tmp_path / "net.onnx", (1, 3, 160, 168))
    report = surgeon.verify(net, surgeon.load(tmp_path / "net.onnx"), (1, 3, 160, 168))
    assert report
    assert any("1×3×160×168 (drawn, not negative)" in check.says for check in report.checks)

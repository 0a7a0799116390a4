"""Modules are matched by what they hold where names differ, or as the user says."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from helpers import run_surgeon, shake_
from torch import Tensor, nn

import surgeon
from surgeon.errors import VerifyError
from surgeon.proof import matching
from surgeon.proof.report import Report

SHAPE = (2, 3, 64, 64)
SMALL = (2, 3, 16, 16)


def _from_two_libraries(theirs: str, timms: str) -> tuple[nn.Module, nn.Module]:
    """A network of torchvision's, and timm's with the same weights; both register their tensors in the same order."""
    torch.manual_seed(0)
    a = shake_(getattr(torchvision.models, theirs)(num_classes=10), 1, gently=True).eval()
    b = timm.create_model(timms, num_classes=10).eval()
    ours, others = a.state_dict(), b.state_dict()
    assert [one.shape for one in ours.values()] == [one.shape for one in others.values()]
    b.load_state_dict(dict(zip(others, ours.values(), strict=True)))
    return a, b


def test_the_same_network_of_two_libraries_is_equivalent_module_by_module() -> None:
    a, b = _from_two_libraries("mobilenet_v2", "mobilenetv2_100")
    report = surgeon.verify(a, b, SHAPE)
    assert report.equivalent, report
    assert "modules with other names in B were matched: 104 by their tensors" in report.remarks
    assert len(report.sites) == 52  # every conv
    assert not any("counterpart" in one for one in report.remarks)


def test_a_fault_is_named_where_names_differ() -> None:
    a, b = _from_two_libraries("mobilenet_v2", "mobilenetv2_100")
    with torch.no_grad():
        b.get_submodule("blocks.1.1.conv_dw").weight.mul_(1.01)  # type: ignore[union-attr,operator]
    report = surgeon.verify(a, b, SHAPE)
    assert report.verdict == "different"
    assert report.first_to_diverge == "features.3.conv.1.0"
    assert [(one.path, one.kind) for one in report.guesses] == [("features.3.conv.1.0", "scale")]
    assert "features.3.conv.1.0 of A is blocks.1.1.conv_dw in B" in report.remarks
    assert any("103 by their tensors, 1 by their place" in one for one in report.remarks)


def test_a_resnet_of_two_libraries_is_equivalent_and_a_fault_in_it_is_named() -> None:
    a, b = _from_two_libraries("resnet18", "resnet18")
    assert surgeon.verify(a, b, SHAPE).equivalent
    with torch.no_grad():
        b.get_submodule("layer2.0.downsample.0").weight.mul_(1.01)  # type: ignore[operator,union-attr]
    report = surgeon.verify(a, b, SHAPE)
    assert [(one.path, one.kind) for one in report.guesses] == [("layer2.0.downsample.0", "scale")]


# ---- small networks ------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Modules in a row, which are no Sequential: those of two Sequentials are paired in order anyway."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def _part(first: str, second: str) -> Chain:
    return Chain(**{first: nn.Conv2d(4, 4, 3, padding=1), "act": nn.ReLU(), second: nn.Conv2d(4, 4, 3)})


def _named(names: tuple[str, str], inner: tuple[str, str] = ("c1", "c2")) -> Chain:
    torch.manual_seed(0)
    return Chain(**{"stem": nn.Conv2d(3, 4, 3), names[0]: _part(*inner), names[1]: _part(*inner)}).eval()


def _pair() -> tuple[Chain, Chain]:
    return _named(("one", "two")), _named(("first", "last"))


def test_names_that_are_given_pair_whole_subtrees() -> None:
    a, b = _pair()
    for module in b.get_submodule("first").modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)  # so that tensors do not tell which is which
    report = surgeon.verify(a, b, SMALL, names={"one": "first", "two": "last"})
    assert [site.path for site in report.sites if site.diverges] == ["one.c1", "one.c2"]
    assert "modules with other names in B were matched: 2 as given" in report.remarks


def test_names_that_are_given_count_more_than_names_and_tensors() -> None:
    a, b = _pair()
    found, how = matching.matched(a, b, [("one", "last"), ("two", "first")])
    assert {path: found.there[path] for path in found.paths if path.endswith("c1")} == {
        "one.c1": "last.c1",
        "two.c1": "first.c1",
    }
    assert how.by_tensors == {}
    assert not surgeon.verify(a, b, SMALL, names={"one": "last", "two": "first"})


def test_without_names_it_is_tensors_that_tell() -> None:
    a, b = _named(("one", "two")), _named(("first", "last"), ("x", "y"))
    found, how = matching.matched(a, b)
    assert how.by_tensors == {"one.c1": "first.x", "one.c2": "first.y", "two.c1": "last.x", "two.c2": "last.y"}
    assert found.paths[0] == "stem"
    assert how.alone == []
    assert surgeon.verify(a, b, SMALL).equivalent


def test_a_changed_module_is_matched_by_its_place_only_between_sure_ones() -> None:
    a, b = _named(("one", "two")), _named(("first", "last"), ("x", "y"))
    nn.init.normal_(b.get_submodule("first.y").weight)  # type: ignore[arg-type]
    assert matching.matched(a, b)[1].by_place == {"one.c2": "first.y"}
    for path in ("first.x", "last.x", "last.y"):
        nn.init.normal_(b.get_submodule(path).weight)  # type: ignore[arg-type]
    how = matching.matched(a, b)[1]
    assert how.by_place == {}
    assert how.alone == ["one.c1", "one.c2", "two.c1", "two.c2"]


def test_a_module_of_another_geometry_is_not_matched() -> None:
    a, b = _named(("one", "two")), _named(("first", "last"), ("x", "y"))
    b.get_submodule("first").y = nn.Conv2d(4, 4, 3, padding=1)
    b.get_submodule("last").x = nn.Conv2d(4, 4, 3)
    how = matching.matched(a, b)[1]
    assert "one.c2" not in how.by_place | how.by_tensors
    assert how.alone == ["one.c2", "two.c1"]


def test_equal_modules_are_matched_in_order() -> None:
    a = Chain(**{name: nn.BatchNorm2d(4) for name in ("n1", "n2", "n3")})
    b = Chain(**{name: nn.BatchNorm2d(4) for name in ("m1", "m2", "m3")})
    assert matching.matched(a, b)[1].by_tensors == {"n1": "m1", "n2": "m2", "n3": "m3"}


def test_a_right_fold_of_others_is_matched_with_nothing() -> None:
    torch.manual_seed(0)
    a = shake_(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()), 1, gently=True).eval()
    b = torch.ao.quantization.fuse_modules(copy.deepcopy(a), [["0", "1"]])
    report = surgeon.verify(a, b, SMALL)
    assert report.equivalent, report
    assert not any("matched" in one for one in report.remarks)


# ---- what the user says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "problem", "todo"),
    [
        ({"ome": "first"}, "A has no module ome", "Did you mean one?"),
        ({"one": "frist"}, "B has no module frist", "Did you mean first?"),
        ({"one": "first", "two": "first"}, "first of B is given twice", "Give every module one counterpart"),
    ],
)
def test_names_that_do_not_exist_are_refused(names: dict[str, str], problem: str, todo: str) -> None:
    with pytest.raises(VerifyError) as caught:
        surgeon.verify(*_pair(), SMALL, names=names)
    assert problem in str(caught.value)
    assert todo in str(caught.value)


@pytest.mark.parametrize("text", ["one", "one=", "=first", "one=first=last"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(VerifyError, match="is not a pair of names"):
        matching.pairs_in([text])


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(VerifyError, match="names one of A twice"):
        matching.pairs_in(["one=first", "one=last"])


def test_names_are_not_needed_where_a_history_says_them() -> None:
    torch.manual_seed(0)
    a = surgeon.convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "acnet", SMALL)
    b = surgeon.fuse(a, SMALL)
    with pytest.raises(VerifyError, match="A has no module stem"):
        surgeon.verify(a, b, SMALL, names={"stem": "0"})
    report: Report = surgeon.verify(a, b, SMALL, names={"0": "0"})
    assert report.equivalent
    assert any("not needed" in one for one in report.remarks)


def test_the_command_takes_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _pair()
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    given = ("verify", tmp_path / "a.pt", tmp_path / "b.pt", "--input=2,3,16,16", "--unsafe-pickle")
    assert run_surgeon(*given, "--map", "one=first", "--map", "two=last", "--json") == 0
    remarks = json.loads(capsys.readouterr().out)["remarks"]
    assert "modules with other names in B were matched: 2 as given" in remarks
    assert run_surgeon(*given, "--map", "one-first") == 2
    assert "--map one-first is not a pair of names" in capsys.readouterr().err

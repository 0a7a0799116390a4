"""verify finds the smallest set of modules that explains a difference, by putting right ones into B."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon, shake_
from torch import nn
from torchvision.models import resnet18

import surgeon
from surgeon.proof.bisect import Swap, Trial, smallest

SMALL = (2, 3, 16, 16)


class _Pretended(Trial):
    """A trial whose difference vanishes if certain modules are put right, and which runs nothing."""

    def __init__(self, wrong: set[str]) -> None:
        super().__init__(nn.Module(), lambda model: None, lambda out: True)
        self.wrong = wrong

    def vanishes(self, swaps: object) -> bool:
        self.count += 1
        return self.wrong <= {one.site for one in swaps}  # type: ignore[attr-defined]


def _swaps(count: int) -> list[Swap]:
    return [Swap(str(i), {}) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_set_is_found_as_it_is(count: int) -> None:
    for size in (1, 2, 3):
        for wrong in itertools.combinations(map(str, range(count)), min(size, count)):
            found = smallest(_swaps(count), _Pretended(set(wrong)))
            assert found is not None
            assert [one.site for one in found] == sorted(set(wrong), key=int)


def test_it_takes_few_runs() -> None:
    for wrong in ({"5"}, {"5", "190"}, {"0", "199"}):
        trial = _Pretended(wrong)
        assert smallest(_swaps(200), trial) is not None
        assert trial.count <= 2 * len(wrong) + 2 + len(wrong) * math.ceil(math.log2(200))


def test_what_no_set_explains_and_what_too_many_do_is_none() -> None:
    assert smallest(_swaps(5), _Pretended({"elsewhere"})) is None
    assert smallest(_swaps(20), _Pretended(set(map(str, range(12))))) is None


def test_two_faults_in_a_resnet_are_found() -> None:
    torch.manual_seed(0)
    net = shake_(resnet18(num_classes=10), 1, gently=True).eval()
    a = surgeon.convert(net, "acnet", (1, 3, 32, 32))
    b = surgeon.fuse(a, (1, 3, 32, 32))
    wrong = ["layer1.1.conv2", "layer3.0.downsample.0"]
    with torch.no_grad():
        b.get_submodule(wrong[0]).weight.mul_(1.01)  # type: ignore[operator,union-attr]
        b.get_submodule(wrong[1]).weight[3, 5] -= 1  # type: ignore[operator,index]
    report = surgeon.verify(a, b, (1, 3, 32, 32), bisect=True)
    assert report.bisected is not None
    assert report.bisected.sites == tuple(wrong)
    assert report.bisected.is_seen
    assert report.bisected.runs < 30
    assert [(one.path, one.kind) for one in report.guesses] == [(wrong[0], "scale"), (wrong[1], "one tap")]


def _small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*layers).eval()


def test_two_faults_are_found_without_a_history() -> None:
    a = surgeon.convert(_small(), "acnet", SMALL)
    b = surgeon.fuse(a, SMALL)
    vars(b).pop("surgeon_provenance")
    with torch.no_grad():
        b[0].weight[2] *= -1  # type: ignore[operator,index,union-attr]
        b[4].bias.zero_()  # type: ignore[operator,union-attr]
    report = surgeon.verify(a, b, SMALL, bisect=True)
    assert report.bisected is not None
    assert report.bisected.sites == ("0", "4")
    assert [(one.path, one.kind) for one in report.guesses] == [("0", "sign"), ("4", "bias lost")]


def test_a_fault_that_rounding_would_hide_at_the_output_is_found() -> None:
    a = surgeon.convert(_small(), "acnet", SMALL)
    b = surgeon.fuse(a, SMALL)
    with torch.no_grad():
        b[2].weight[0, 0, 1, 1] *= 1 + 1e-6  # type: ignore[operator,index,union-attr]
    found = surgeon.verify(a, b, SMALL, bisect=True)
    assert found.distances[0].own < 1e-6
    assert found.bisected is not None
    assert found.bisected.sites == ("2",)


def test_code_between_the_modules_is_no_module() -> None:
    a = _small()
    b = copy.deepcopy(a)
    b.register_forward_hook(lambda module, args, out: out + 1)
    found = surgeon.verify(a, b, SMALL, bisect=True).bisected
    assert found is not None
    assert found.sites == ()
    assert "code between" in found.says


def test_equal_networks_are_not_bisected_and_nobody_is_who_did_not_ask() -> None:
    a = _small()
    assert surgeon.verify(a, copy.deepcopy(a), SMALL, bisect=True).bisected is None
    b = copy.deepcopy(a)
    b[2].bias = None
    assert surgeon.verify(a, b, SMALL).bisected is None


def test_the_models_are_left_as_they_were() -> None:
    a = _small()
    b = copy.deepcopy(a)
    b[2] = nn.Sequential(b[2], nn.Tanh())
    modules, before = list(b.modules()), copy.deepcopy(b.state_dict())
    assert surgeon.verify(a, b, SMALL, bisect=True).bisected.sites == ("2",)  # type: ignore[union-attr]
    assert list(b.modules()) == modules
    assert all(torch.equal(one, before[key]) for key, one in b.state_dict().items())


def test_progress_says_beforehand_what_it_takes() -> None:
    a = _small()
    b = copy.deepcopy(a)
    with torch.no_grad():
        for i in (0, 2, 4):
            b[i].weight.mul_(1.1)  # type: ignore[operator,union-attr]
    told: list[tuple[str, float]] = []
    surgeon.verify(a, b, SMALL, bisect=True, progress=lambda what, share: told.append((what, share)))
    assert any(what == "bisecting 3 modules, 6 runs or more" for what, _ in told)
    shares = [share for _, share in told]
    assert shares == sorted(shares)


def test_the_command_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = _small()
    b = copy.deepcopy(a)
    b[2].bias = None
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    given = (tmp_path / "a.pt", tmp_path / "b.pt", "--input=2,3,16,16", "--bisect")
    assert run_surgeon("verify", *given) == 1
    shown = capsys.readouterr().out
    assert "bisected: with this module put right, B computes what is expected: 2" in shown
    assert "probably, at 2 (bias lost)" in shown
    assert run_surgeon("verify", *given, "--json") == 1
    assert json.loads(capsys.readouterr().out)["bisected"]["sites"] == ["2"]

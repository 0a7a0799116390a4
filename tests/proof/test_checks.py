"""The checks of verify: each has a file, and a fault that no other check would see."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import shake_
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

import surgeon
from surgeon.analysis import example as examples
from surgeon.proof import checks
from surgeon.proof.evidence import Replay
from surgeon.proof.verify import verify

SHAPE = (1, 3, 12, 12)
NAMES = [question.name for question in checks.questions()]
Maker = Callable[[bool], surgeon.Report]


class _Net(nn.Module):
    """A conv, a norm, and what makes `gain` units of a unit in the last place."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) * self.gain).sin() if self.gain > 1 else self.body(x)


class _RoughInFloat32(_Net):
    """Right in float64, and as coarse as float16 in float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if y.dtype == torch.float64 else y.half().float()


def _fused(fault: Callable[[nn.Module], None]) -> surgeon.Report:
    """Compare a converted network with its fold, in which there is a fault."""
    converted = surgeon.convert(shake_(_Net(), 0, gently=True), "acnet", SHAPE)
    fused = surgeon.fuse(converted)
    fault(fused)
    return surgeon.verify(converted, fused, SHAPE)


def _replayed(gain: float, layer: int, by: float, dtype: torch.dtype) -> surgeon.Report:
    """Compare a network with what a replay makes of it that multiplies the weights of a layer."""
    net = shake_(_Net(gain), 0, gently=True).to(dtype)
    wrong = copy.deepcopy(net).double()
    with torch.no_grad():
        wrong.body[layer].weight *= by
    b = copy.deepcopy(net)
    b.load_state_dict(wrong.state_dict())
    return verify(net, b, [examples.make(SHAPE)], replay=Replay(wrong, wrong))


def _mathematics(is_faulty: bool) -> surgeon.Report:
    return _replayed(1.0, 1, 1 + 1e-9 * is_faulty, torch.float32)  # the norm is no block


def _operators(is_faulty: bool) -> surgeon.Report:
    """Fold a block wrongly in the taps of a channel that is always zero, so that no input shows it."""
    net = shake_(_Net(), 0, gently=True)
    with torch.no_grad():
        net.body[1].bias[5] = -1e6
    converted = surgeon.convert(net, "acnet", SHAPE)
    wrong = surgeon.fuse(copy.deepcopy(converted).double())
    with torch.no_grad():
        wrong.body[3].weight[:, 5] *= 1 + 0.01 * is_faulty
    b = copy.deepcopy(wrong).float()
    return verify(converted, b, [examples.make(SHAPE)], replay=Replay(wrong, wrong), proving=True)


def _blocks(is_faulty: bool) -> surgeon.Report:
    return _replayed(1e18, 0, 1 + 1e-9 * is_faulty, torch.float64)


class _WithoutModules(nn.Module):
    """The same network, of whose layers only the tensors are left."""

    def __init__(self, net: _Net) -> None:
        super().__init__()
        (self.w1, self.b1), (self.w2, self.b2) = ((net.body[i].weight, net.body[i].bias) for i in (0, 3))
        self.norm = {name: tensor for name, tensor in net.body[1].state_dict().items() if tensor.dim()}

    def forward(self, x: Tensor) -> Tensor:
        held = {name: tensor.to(x.dtype) for name, tensor in self.norm.items()}
        means = (held["running_mean"], held["running_var"])
        y = functional.batch_norm(functional.conv2d(x, self.w1, self.b1), *means, held["weight"], held["bias"])
        return functional.conv2d(y.relu(), self.w2, self.b2)


def _storage(is_faulty: bool) -> surgeon.Report:
    net = shake_(_Net(), 0, gently=True).double()
    other = _WithoutModules(copy.deepcopy(net))
    with torch.no_grad():
        other.w1 *= 1 + 1e-9 * is_faulty
    return surgeon.verify(net, other, SHAPE)


def _same_tensors(is_faulty: bool) -> surgeon.Report:
    net = shake_(_Net(), 0, gently=True)
    net.body[3].unused = nn.Parameter(torch.ones(4))
    other = copy.deepcopy(net)
    if is_faulty:
        other.body[3].unused = nn.Parameter(torch.ones(4, dtype=torch.float16))
    return surgeon.verify(net, other, SHAPE)


def _sites(is_faulty: bool) -> surgeon.Report:
    """Fold a conv wrongly, in a channel that the next conv does not look at."""
    net = shake_(_Net(), 0, gently=True).eval()
    with torch.no_grad():
        net.body[3].weight[:, 5] = 0
    other = copy.deepcopy(net)
    other.body[0], other.body[1] = fuse_conv_bn_eval(other.body[0], other.body[1]), nn.Identity()
    with torch.no_grad():
        other.body[0].weight[5] *= -1 if is_faulty else 1
    return surgeon.verify(net, other, SHAPE)


class _Louder(_Net):
    """One thousandth louder between its modules, which the rounding of half types hides at the output."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body[2](self.body[1](self.body[0](x)))
        return self.body[3](y * 1.001)


def _wiring(is_faulty: bool) -> surgeon.Report:
    net = shake_(_Net(), 0, gently=True).bfloat16()
    other = copy.deepcopy(net)
    other.__class__ = _Louder if is_faulty else _Net
    return surgeon.verify(net, other, SHAPE)


class _OfOneSize(_Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != SHAPE[2:]:
            raise ValueError("another size")
        return super().forward(x)


def _other_inputs(is_faulty: bool) -> surgeon.Report:
    net = shake_(_Net(), 0, gently=True)
    other = copy.deepcopy(net)
    other.__class__ = _OfOneSize if is_faulty else _Net
    return surgeon.verify(net, other, SHAPE)


def _structure(is_faulty: bool) -> surgeon.Report:
    def fault(fused: nn.Module) -> None:
        fused.body[2] = nn.Hardtanh(0, 1e9) if is_faulty else nn.ReLU()

    return _fused(fault)


def _rounding(is_faulty: bool) -> surgeon.Report:
    net = shake_(_Net(), 0, gently=True)
    other = copy.deepcopy(net)
    other.__class__ = _RoughInFloat32 if is_faulty else _Net
    return surgeon.verify(net, other, SHAPE)


def _finite(is_faulty: bool) -> surgeon.Report:
    net = shake_(_Net(), 0, gently=True).double()
    with torch.no_grad():
        net.body[1].running_var[0] = float("nan") if is_faulty else 1.0
    return surgeon.verify(net, copy.deepcopy(net), SHAPE)


def _stored_tensors(is_faulty: bool) -> surgeon.Report:
    def fault(fused: nn.Module) -> None:
        with torch.no_grad():
            fused.body[0].weight[0, 0, 1, 1] *= 1 + 2**-21 * is_faulty

    return _fused(fault)


class _Ageing(nn.ReLU):
    """Counts its calls, which is no setting, and looks at the count."""

    age = 0

    def forward(self, x: Tensor) -> Tensor:
        self.age += 1
        return super().forward(x) * (1 + 1e-9 * (self.age > 100))


def _modules(is_faulty: bool) -> surgeon.Report:
    net = shake_(_Net(), 0, gently=True)
    net.body[2] = _Ageing()
    net.body[2].age = 1
    converted = surgeon.convert(net, "acnet", SHAPE)
    fused = surgeon.fuse(converted)
    fused.body[2].age = 1000 * is_faulty
    return surgeon.verify(converted, fused, SHAPE)


class _LouderInTraining(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-6 * self.training)


class _Drifting(nn.BatchNorm2d):
    """Notes a mean that is a millionth off."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            self.running_mean.mul_(1 + 1e-6)
        return y


class _Steeper(nn.ReLU):
    """A gradient that is a millionth off."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 1e-6 * (y - y.detach())


def _other_class(layer: int, kind: type[nn.Module], **how: object) -> surgeon.Report:
    """Compare a network with one in which the class of a layer is another."""
    net = shake_(_Net(), 0, gently=True)
    other = copy.deepcopy(net)
    other.body[layer].__class__ = kind
    return surgeon.verify(net, other, (4, *SHAPE[1:]), **how)


def _training(is_faulty: bool) -> surgeon.Report:
    return _other_class(2, _LouderInTraining if is_faulty else nn.ReLU, mode="train")


def _statistics(is_faulty: bool) -> surgeon.Report:
    return _other_class(1, _Drifting if is_faulty else nn.BatchNorm2d, mode="train")


def _gradients(is_faulty: bool) -> surgeon.Report:
    return _other_class(2, _Steeper if is_faulty else nn.ReLU, gradients=True)


def _train_settings(is_faulty: bool) -> surgeon.Report:
    """Give a norm that the batch at hand does not reach another momentum."""
    net = shake_(_Net(), 0, gently=True)
    net.body[3].unused = nn.BatchNorm2d(4)
    other = copy.deepcopy(net)
    other.body[3].unused.momentum += 1e-6 * is_faulty
    return surgeon.verify(net, other, SHAPE, mode="train")


FAULTS: dict[str, Maker] = {
    "mathematics": _mathematics,
    "operators": _operators,
    "blocks": _blocks,
    "storage": _storage,
    "same tensors": _same_tensors,
    "sites": _sites,
    "wiring": _wiring,
    "rounding": _rounding,
    "finite": _finite,
    "other inputs": _other_inputs,
    "stored tensors": _stored_tensors,
    "structure": _structure,
    "modules": _modules,
    "training": _training,
    "statistics": _statistics,
    "gradients": _gradients,
    "train settings": _train_settings,
}


def test_every_check_has_a_fault_that_only_it_sees() -> None:
    assert list(FAULTS) == NAMES  # also their order in a report


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_one_check_sees_passes_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = FAULTS[name](True)
    assert {check.name for check in report.checks if not check.passed} == {name}
    assert report.verdict == "different"
    left = tuple(question for question in checks.questions() if question.name != name)
    monkeypatch.setattr(checks, "questions", lambda: left)
    assert FAULTS[name](True).verdict == "equivalent"


@pytest.mark.parametrize("name", FAULTS)
def test_without_the_fault_it_passes_and_is_listed(name: str) -> None:
    report = FAULTS[name](False)
    assert report.equivalent, report
    assert all(isinstance(check, surgeon.Check) for check in report.checks)
    if name not in ("blocks", "finite", "other inputs"):  # these are told only where they are needed
        assert name in [check.name for check in report.checks]


def test_every_report_lists_its_checks_in_the_order_of_the_questions() -> None:
    for make in FAULTS.values():
        found = [check.name for check in make(True).checks]
        assert found == sorted(found, key=NAMES.index)


def test_every_question_has_a_file_of_its_name_and_a_place_of_its_own() -> None:
    files = {path.stem for path in Path(checks.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert files == {name.replace(" ", "_") for name in NAMES}
    for question in checks.questions():
        assert type(question).__module__ == f"{checks.__name__}.{question.name.replace(' ', '_')}"
        assert type(question).__doc__
    assert len({question.place for question in checks.questions()}) == len(NAMES)


def test_of_an_approximate_model_only_what_is_stored_and_how_it_is_built_is_asked() -> None:
    assert [one.name for one in checks.questions() if one.is_for_approximate] == [
        *("stored tensors", "structure", "modules", "training", "statistics", "gradients")
    ]


_ANOTHER = '''
from surgeon.proof.checks.base import Question


class Number(Question):
    """B has at least two modules."""

    name = "number"
    place = 35

    def ask(self, evidence):
        found = max(len(run.gaps) for run in evidence.runs)
        yield self.answer(-found, -2, f"{found} modules, at least 2")
'''


@pytest.fixture
def another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file in the folder of the checks."""
    (tmp_path / "number.py").write_text(_ANOTHER)
    monkeypatch.setattr(checks, "__path__", [*checks.__path__, str(tmp_path)])
    checks.questions.cache_clear()
    yield
    checks.questions.cache_clear()
    sys.modules.pop(f"{checks.__name__}.number", None)


def test_to_add_a_check_is_to_add_a_file(another: None) -> None:
    report = _rounding(False)
    assert report.equivalent, report
    assert [check.name for check in report.checks] == [
        *("storage", "storage", "storage", "same tensors", "sites", "wiring", "number", "rounding")
    ]
    assert "number: 4 modules, at least 2" in str(report)
    few = nn.Sequential(nn.Conv2d(3, 4, 3))
    report = surgeon.verify(few, copy.deepcopy(few), SHAPE)
    assert (report.verdict, [check.name for check in report.checks if not check.passed]) == ("different", ["number"])

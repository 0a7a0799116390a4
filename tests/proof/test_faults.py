"""verify says in words what went wrong: planted faults of every kind, and others nearby that must not be called so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import shake_
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.errors import VerifyError
from surgeon.proof import faults
from surgeon.proof.report import Guess, Report

SHAPE = (2, 3, 16, 16)
Spoil = Callable[["Net"], object]


class Net(nn.Module):
    """A bit of everything that can go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.strip = nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
        self.drop = nn.Dropout(0.5)
        self.one = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.two = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.down = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.pool = nn.AvgPool2d(2, padding=1)
        self.clip = nn.LeakyReLU(0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.strip(self.act(self.norm(self.stem(x)))))
        x = self.clip(self.pool(self.down(self.two(self.one(x)))))
        return self.head(x.mean((2, 3)))


def _net() -> Net:
    torch.manual_seed(0)
    return shake_(Net(), 1, gently=True).eval()


def _report(spoil: Spoil) -> Report:
    a = _net()
    b = copy.deepcopy(a)
    with torch.no_grad():
        spoil(b)
    return surgeon.verify(a, b.eval(), SHAPE)


def _guess(spoil: Spoil) -> Guess | None:
    report = _report(spoil)
    assert report.verdict == "different"
    return next(iter(report.guesses), None)


def _put(path: str, module: nn.Module) -> Spoil:
    return lambda net: net.set_submodule(path, module)


def _set(path: str, **settings: object) -> Spoil:
    return lambda net: vars(net.get_submodule(path)).update(settings)


def _weight(path: str, change: Callable[[Tensor], object], name: str = "weight") -> Spoil:
    def spoil(net: Net) -> None:
        tensor = net.get_parameter(f"{path}.{name}") if name in ("weight", "bias") else net.get_buffer(f"{path}.{name}")
        made = change(tensor.data.clone())
        tensor.data.copy_(made)  # type: ignore[arg-type]

    return spoil


def _with(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    tensor[place] = value
    return tensor


def _lying(net: Net) -> None:
    """A strip of one row in the place of one column."""
    conv = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
    conv.weight.data = net.strip.weight.data.mT.clone()
    conv.bias = net.strip.bias
    net.strip = conv


def _batch_statistics(net: Net) -> None:
    net.norm.track_running_stats = False
    net.norm.running_mean = net.norm.running_var = None


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class Turned(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).mT


def _larger(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return out * 1.1


FAULTS: list[tuple[str, str, Spoil]] = [
    ("bias lost", "stem", _weight("stem", torch.zeros_like, "bias")),
    ("bias lost", "strip", lambda net: setattr(net.strip, "bias", None)),
    ("bias lost", "norm", _weight("norm", torch.zeros_like, "bias")),
    ("a few numbers of a bias", "stem", _weight("stem", lambda b: _with(b, (3,), 9.0), "bias")),
    ("padding mode", "one", _set("one", padding_mode="zeros")),
    ("padding amount", "one", _set("one", padding=(0, 0), _reversed_padding_repeated_twice=[0, 0, 0, 0])),
    ("stride", "down", _set("down", stride=(2, 2))),
    ("dilation", "two", _set("two", dilation=(1, 1))),
    ("eps", "norm", _set("norm", eps=1e-2)),
    ("statistics", "norm", _weight("norm", lambda m: m + 0.3, "running_mean")),
    ("statistics", "norm", _weight("norm", lambda v: _with(v, (2,), 3.0), "running_var")),
    ("mean lost", "norm", _weight("norm", torch.zeros_like, "running_mean")),
    ("sign", "norm", _weight("norm", lambda m: -m, "running_mean")),
    ("scale missing", "norm", _weight("norm", torch.ones_like)),
    ("train mode", "norm", _batch_statistics),
    ("channels permuted", "one", _weight("one", lambda w: w.roll(1, 1))),
    ("channels permuted", "two", _weight("two", lambda w: w[[1, 0, *range(2, 8)]])),
    ("strip transposed", "strip", _lying),
    ("kernel transposed", "one", _weight("one", lambda w: w.mT)),
    ("kernel mirrored", "strip", _weight("strip", lambda w: w.flip(2))),
    ("kernel shifted", "one", _weight("one", lambda w: w.roll(1, 2))),
    ("activation changed", "act", _put("act", nn.ReLU6())),
    ("activation changed", "clip", _set("clip", negative_slope=0.2)),
    ("activation missing", "act", _put("act", nn.Identity())),
    ("activation added", "one", lambda net: net.set_submodule("one", nn.Sequential(net.one, nn.ReLU()))),
    ("pooling changed", "pool", _put("pool", nn.MaxPool2d(2, padding=1))),
    ("pooling changed", "pool", _set("pool", count_include_pad=False)),
    ("scale", "one", _weight("one", lambda w: w * 1.01)),
    ("sign", "one", _weight("one", lambda w: -w)),
    ("one tap", "one", _weight("one", lambda w: _with(w, (2, 3, 1, 1), 0.5))),
    ("a few taps", "one", _weight("one", lambda w: _with(_with(w, (2, 3, 1, 1), 0.5), (4, 0, 0, 2), 0.5))),
    ("rounded", "one", _weight("one", lambda w: w.bfloat16().float())),
    ("rounded", "one", _weight("one", lambda w: (w * 100).round() / 100)),
    ("weights of another layer", "down", lambda net: net.down.weight.data.copy_(net.one.weight.data)),
    ("not finite", "one", _weight("one", lambda w: _with(w, (0, 0, 0, 0), float("nan")))),
    ("random", "drop", _put("drop", Noisy())),
    ("axes exchanged", "act", _put("act", Turned())),
    ("a hook", "one", lambda net: net.one.register_forward_hook(_larger)),
]


@pytest.mark.parametrize(("kind", "path", "spoil"), FAULTS, ids=[f"{kind} at {path}" for kind, path, _ in FAULTS])
def test_a_fault_is_named_with_its_place(kind: str, path: str, spoil: Spoil) -> None:
    found = _guess(spoil)
    assert found is not None
    assert (found.kind, found.path) == (kind, path), found.says
    assert found.says
    assert found.residual < 1e-6


NEAR: list[tuple[str, Spoil]] = [
    ("bias lost", _weight("stem", lambda b: b / 2, "bias")),
    ("padding mode", _set("one", padding=(0, 0), _reversed_padding_repeated_twice=[0, 0, 0, 0])),
    ("eps", _weight("norm", lambda v: v + 0.5, "running_var")),
    ("mean lost", _weight("norm", lambda m: m / 2, "running_mean")),
    ("channels permuted", _weight("one", lambda w: w[[1, 1, *range(2, 8)]])),
    ("strip transposed", _weight("strip", lambda w: w.flip(2))),
    ("kernel transposed", _weight("one", lambda w: torch.cat([w[:4].mT, w[4:]]))),
    ("kernel mirrored", _weight("one", lambda w: w.flip(2) * 1.01)),
    ("sign", _weight("one", lambda w: -1.01 * w)),
    ("scale", _weight("one", lambda w: w + 0.01 * w.mT)),
    ("one tap", _weight("one", lambda w: _with(_with(w, (2, 3, 1, 1), 0.5), (4, 0, 0, 2), 0.5))),
    ("rounded", _weight("one", lambda w: w + 1e-3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(2)))),
    ("weights of another layer", lambda net: net.down.weight.data.copy_(net.one.weight.data * 1.001)),
    ("activation missing", _put("act", nn.LeakyReLU(0.5))),
    ("train mode", _weight("norm", lambda m: m + 0.1, "running_mean")),
]


@pytest.mark.parametrize(("kind", "spoil"), NEAR, ids=[kind for kind, _ in NEAR])
def test_a_fault_nearby_is_not_called_so(kind: str, spoil: Spoil) -> None:
    found = _guess(spoil)
    assert found is None or found.kind != kind, found.says


def test_other_weights_have_no_explanation() -> None:
    assert _guess(_weight("one", lambda w: torch.randn(w.shape, generator=torch.Generator().manual_seed(3)))) is None


def test_without_its_hypothesis_a_fault_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil = _weight("one", lambda w: w.mT)
    rest = tuple(one for one in faults.hypotheses() if type(one).__name__ != "Turned")
    assert len(rest) == len(faults.hypotheses()) - 1
    monkeypatch.setattr(faults, "hypotheses", lambda: rest)
    found = _guess(spoil)
    assert found is None or found.kind != "kernel transposed"


def test_groups_are_named_where_results_cannot_be_compared() -> None:
    report = _report(_put("one", nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False, groups=2)))
    assert report.guesses[0].kind == "groups"


def test_what_stops_b_is_named_in_the_error() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    a = Sum()
    b = copy.deepcopy(a)
    b.two.padding = (0, 0)
    with pytest.raises(VerifyError, match=r"two .*padding \(0, 0\) where padding \(1, 1\) is expected") as caught:
        surgeon.verify(a, b, (1, 3, 8, 8))
    assert caught.value.facts["guess"].kind == "padding amount"


# ---- folds ----------------------------------------------------------------------------------------------------------


def _folded(factor: Callable[[nn.BatchNorm2d], Tensor], shift: Callable[[nn.BatchNorm2d, Tensor], Tensor]) -> Report:
    """Fold a conv and norm by arithmetic of the test's own, and compare without a history."""
    torch.manual_seed(0)
    a = shake_(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()), 1, gently=True).eval()
    conv, norm = a[0], a[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    made = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        scale = factor(norm)
        made.weight.copy_(conv.weight * scale[:, None, None, None])
        made.bias.copy_(shift(norm, scale))  # type: ignore[union-attr]
    return surgeon.verify(a, nn.Sequential(made, nn.Identity(), nn.ReLU()).eval(), SHAPE)


def _gamma_by_sigma(norm: nn.BatchNorm2d, eps: float | None = None) -> Tensor:
    assert norm.running_var is not None
    return norm.weight / torch.sqrt(norm.running_var + (norm.eps if eps is None else eps))


def _usual(norm: nn.BatchNorm2d, scale: Tensor) -> Tensor:
    assert norm.running_mean is not None
    return norm.bias - norm.running_mean * scale


def test_a_right_fold_is_not_explained() -> None:
    report = _folded(_gamma_by_sigma, _usual)
    assert report.equivalent
    assert report.guesses == ()


@pytest.mark.parametrize(
    ("kind", "factor", "shift"),
    [
        ("scale missing", lambda n: n.weight, _usual),
        ("eps", lambda n: _gamma_by_sigma(n, 1e-2), _usual),
        ("sign", _gamma_by_sigma, lambda n, s: n.bias + n.running_mean * s),
        ("mean lost", _gamma_by_sigma, lambda n, s: n.bias),
        ("bias lost", _gamma_by_sigma, lambda n, s: -n.running_mean * s),
        (
            "folded twice",
            lambda n: _gamma_by_sigma(n) ** 2,
            lambda n, s: n.bias + (_usual(n, s**0.5) - n.running_mean) * s.abs() ** 0.5,
        ),
        ("norm missing", torch.ones_like, None),
        ("statistics", lambda n: n.weight / (1 + n.eps) ** 0.5, lambda n, s: n.bias),
    ],
)
def test_a_wrong_fold_is_named(kind: str, factor: Callable[..., Tensor], shift: Callable[..., Tensor] | None) -> None:
    if kind == "norm missing":
        report = _folded(lambda n: torch.ones_like(n.weight), lambda n, s: torch.zeros_like(s))
    else:
        assert shift is not None
        report = _folded(factor, shift)
    assert [one.kind for one in report.guesses] == [kind]


def _block_folded(change: Callable[[nn.Conv2d, nn.Module], None], *, is_known: bool) -> Report:
    """Convert a conv to an ACBlock, fuse it, and change the folded kernel."""
    torch.manual_seed(0)
    a = surgeon.convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), "acnet", SHAPE)
    shake_(a, 1, gently=True).eval()
    b = surgeon.fuse(a, SHAPE)
    with torch.no_grad():
        change(b[0], a[0])  # type: ignore[arg-type]
    if not is_known:
        vars(b).pop("surgeon_provenance", None)
    return surgeon.verify(a, b, SHAPE)


def _strip(block: nn.Module, name: str) -> Tensor:
    conv, norm = block.get_submodule(f"{name}_conv"), block.get_submodule(f"{name}_bn")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return conv.weight * _gamma_by_sigma(norm)[:, None, None, None]


def _transposed(conv: nn.Conv2d, block: nn.Module) -> None:
    strip = _strip(block, "hor")
    conv.weight[:, :, 1:2, :] -= strip
    conv.weight[:, :, :, 1:2] += strip.mT


def _lower(conv: nn.Conv2d, block: nn.Module) -> None:
    strip = _strip(block, "hor")
    conv.weight[:, :, 1:2, :] -= strip
    conv.weight[:, :, 2:3, :] += strip


@pytest.mark.parametrize("is_known", [True, False], ids=["history", "no history"])
@pytest.mark.parametrize(("kind", "change"), [("strip transposed", _transposed), ("strip shifted", _lower)])
def test_a_strip_in_the_wrong_place_is_named(
    kind: str, change: Callable[[nn.Conv2d, nn.Module], None], is_known: bool
) -> None:
    report = _block_folded(change, is_known=is_known)
    assert [one.kind for one in report.guesses] == [kind], report
    assert "hor_bn" in report.guesses[0].says


def test_a_report_shows_what_was_guessed_in_its_table_and_its_data() -> None:
    report = _report(_weight("one", lambda w: w.mT))
    assert "probably, at one (kernel transposed)" in str(report)
    assert report.to_dict()["guesses"][0]["kind"] == "kernel transposed"

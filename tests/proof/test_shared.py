"""What verify does not hold twice, does not run, and does not draw again."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.models.call import Inputs
from surgeon.proof import explained, recorder
from surgeon.proof.distance import Apart, relative_l2
from surgeon.proof.held import Held
from surgeon.proof.recorder import draws_nothing
from surgeon.proof.shared import Doubles
from surgeon.proof.ulps import Jitter, ulp

SHAPE = (1, 3, 12, 12)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Flatten()).eval()


def test_equal_parameters_of_two_models_lie_in_one_memory() -> None:
    one, other = nn.Linear(600, 600), nn.Linear(600, 600)
    other.load_state_dict(one.state_dict())
    doubles = Doubles()
    made = [doubles.cast_of(model)(model.weight.detach()) for model in (one, other)]
    assert made[0].dtype == torch.float64
    assert made[0] is made[1]
    with torch.no_grad():
        other.weight[0, 0] += 1e-6
    assert doubles.cast_of(other)(other.weight.detach()) is not made[0]
    buffer = torch.zeros(600, 600)
    assert doubles.cast_of(one)(buffer) is not doubles.cast_of(one)(buffer)  # a run may write into it


def _passes(a: nn.Module, b: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Verify, and list which model was run in float64, and on which shape."""
    found: list[tuple[nn.Module, tuple[int, ...]]] = []
    call = Held.call

    def noting(self: Held, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> object:
        found.append((model, tuple(inputs.shapes[0])))
        return call(self, model, inputs, dtype)

    monkeypatch.setattr(Held, "call", noting)
    assert surgeon.verify(a, b, SHAPE).equivalent
    return found


def test_the_replay_is_run_as_a_whole_on_drawn_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    a = surgeon.convert(_net(), "acnet", SHAPE)
    b = surgeon.fuse(a)
    replays: list[nn.Module] = []
    init = Held.__init__

    def keeping(self: Held, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        replays.append(self.replay)  # type: ignore[arg-type]
        assert self.twin is None  # B is built as the replay for certain

    monkeypatch.setattr(Held, "__init__", keeping)
    shapes = [shape for model, shape in _passes(a, b, monkeypatch) if model is replays[0]]
    assert shapes
    assert SHAPE not in shapes


def test_a_replay_that_is_not_clearly_a_is_run_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a = surgeon.convert(_net(), "acnet", SHAPE)
    b = surgeon.fuse(a)
    monkeypatch.setattr(explained, "site_by_site", lambda *_: 2e-11)
    replays = [shape for model, shape in _passes(a, b, monkeypatch) if type(model[0]) is nn.Conv2d]
    assert replays.count(SHAPE) >= 3  # B in float64 and in its own dtype, and the replay


def test_a_wrong_fold_of_the_replay_is_found_site_by_site(monkeypatch: pytest.MonkeyPatch) -> None:
    a = surgeon.convert(_net(), "acnet", SHAPE)
    fold = surgeon.ACBlock.fold

    def wrong(self: surgeon.ACBlock) -> nn.Conv2d:
        made = fold(self)
        with torch.no_grad():
            made.weight[0, 0, 0, 0] += 1e-6
        return made

    monkeypatch.setattr(surgeon.ACBlock, "fold", wrong)
    apart: list[float | None] = []
    measure = explained.site_by_site
    monkeypatch.setattr(explained, "site_by_site", lambda *given: apart.append(measure(*given)) or apart[-1])
    found = surgeon.verify(a, surgeon.fuse(a), SHAPE)
    assert "mathematics" in [check.name for check in found.checks if not check.passed]
    assert apart[0] is not None
    assert apart[0] > 1e-8


def test_one_draw_that_explains_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = _net(), _net()
    with torch.no_grad():
        b[0].weight.copy_(torch.nextafter(b[0].weight, torch.where(torch.rand_like(b[0].weight) < 0.5, 9.0, -9.0)))
    drawn: list[int] = []

    class Counting(Jitter):
        def __init__(self, seed: int, **how: object) -> None:
            super().__init__(seed, **how)  # type: ignore[arg-type]
            drawn.append(seed)

    monkeypatch.setattr(explained, "Jitter", Counting)
    assert surgeon.verify(a, b, SHAPE).equivalent
    assert len(drawn) <= 3  # at most one for each input, and none after the one that explains


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_units_are_read_from_the_bits(dtype: torch.dtype) -> None:
    powers = 10.0 ** torch.linspace(-60, 60, 500, dtype=torch.float64)
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-310, 3.0], dtype=torch.float64)
    numbers = torch.cat([powers, -powers, odd]).to(dtype)
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(numbers.double().abs().clamp_min(info.tiny))
    expected = torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)
    assert torch.equal(ulp(numbers), expected)
    turned = torch.randn(4, 5).to(dtype).t()
    assert torch.equal(ulp(turned), ulp(turned.contiguous()))


@pytest.mark.parametrize("size", [1e-200, 1e-130, 1.0, 1e130, 1e200])
def test_distances_are_the_same_at_every_size(size: float) -> None:
    a = torch.randn(50, dtype=torch.float64)
    b = a * (1 + 1e-3)
    assert relative_l2(b * size, a * size) == pytest.approx(1e-3, rel=1e-9)
    assert relative_l2(a * size, a * size) == 0
    a[0] = b[1] = math.nan
    assert relative_l2(b, a) == math.inf
    assert Apart.between(b, a).flips == 2


class _Noisy(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.randn(())


def test_only_torchs_own_modules_without_hooks_give_the_same_again() -> None:
    conv, hooked = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    hooked.register_forward_hook(lambda module, args, out: out * torch.rand(()))
    assert draws_nothing(conv)
    assert not any(map(draws_nothing, [hooked, _Noisy(3, 4, 1), nn.Dropout()]))


def test_wiring_computes_no_module_whose_result_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[nn.Module] = []
    still = recorder._not_computing
    monkeypatch.setattr(recorder, "_not_computing", lambda module: replaced.append(module) or still(module))
    net = _net()
    assert surgeon.verify(net, copy.deepcopy(net), SHAPE).equivalent
    assert {type(module) for module in replaced} == {nn.Conv2d, nn.BatchNorm2d}
    assert all("forward" not in vars(module) for module in replaced)

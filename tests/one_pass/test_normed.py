"""A normed map with what follows it: the kernels against torch's own steps, in float64, with all gradients."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from surgeon.one_pass import normed
from surgeon.one_pass.normed import Norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THEN = ["", "relu", "relu6", "silu", "hardswish"]
FORMATS = [torch.channels_last, torch.contiguous_format]
LIMITS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}

every_activation = pytest.mark.parametrize("then", THEN)
with_and_without = pytest.mark.parametrize("has_beside", [True, False])


class Case(NamedTuple):
    z: Tensor
    beside: Tensor | None
    norm: Norm
    dy: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.z, self.beside, self.norm.scale, self.norm.shift) if t is not None]

    @property
    def running(self) -> list[Tensor]:
        return [t for t in (self.norm.mean, self.norm.var) if t is not None]

    def again(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, as tensors of their own."""

        def there(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        z, dy, *own = (there(t) for t in (self.z, self.dy, *self.norm[:4]))
        assert z is not None
        assert dy is not None
        return Case(z, there(self.beside), Norm(*own, self.norm.momentum, self.norm.eps), dy)


def given(
    shape: tuple[int, ...] = (3, 5, 4, 6),
    dtype: torch.dtype = torch.float64,
    *,
    has_beside: bool = True,
    memory_format: torch.memory_format = torch.channels_last,
    momentum: float = 1 / 7,
    eps: float = 1e-5,
) -> Case:
    torch.manual_seed(0)
    rest = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(size: float) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64) * size + torch.randn(1, shape[1], 1, 1, dtype=torch.float64)
        return drawn.to(DEVICE, dtype).contiguous(memory_format=memory_format)

    def of_channels() -> Tensor:
        return torch.rand(shape[1], dtype=torch.float64).to(DEVICE, rest) + 0.2

    norm = Norm(
        of_channels().requires_grad_(), of_channels().requires_grad_(), *(of_channels(), of_channels()), momentum, eps
    )
    beside = draw(1).requires_grad_() if has_beside else None
    return Case(draw(2).requires_grad_(), beside, norm, draw(1))


def trained(case: Case, then: str, *, is_plain: bool) -> list[Tensor]:
    """Result, gradients and running statistics."""
    y = (normed.plainly if is_plain else normed.run)(case.z, case.norm, case.beside, then)
    return [y.detach(), *torch.autograd.grad(y, case.leaves, case.dy), *case.running]


def check(case: Case, then: str) -> None:
    expected = trained(case.again(torch.float64), then, is_plain=True)
    found = trained(case, then, is_plain=False)
    leaves, running = case.leaves, case.running
    dtypes = [case.z.dtype, *(t.dtype for t in (*leaves, *running))]
    for mine, theirs, dtype in zip(found, expected, dtypes, strict=True):
        assert mine.dtype == dtype
        assert mine.isfinite().all()
        size = max(theirs.norm().item(), case.dy.double().norm().item() * (mine.dim() == 1))
        assert (mine.double() - theirs).norm().item() <= LIMITS[case.z.dtype] * size
    assert found[1].stride() == case.z.stride()


@every_activation
@with_and_without
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_kernels_give_what_torchs_own_steps_give_in_float64(
    then: str, has_beside: bool, memory_format: torch.memory_format, kernels: list[str]
) -> None:
    check(given(has_beside=has_beside, memory_format=memory_format), then)
    assert kernels == ["forward", "backward"]


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 67, 3, 1), (12, 2, 9, 11), (2, 1, 1, 5), (5, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_shape_will_do(shape: tuple[int, ...], dtype: torch.dtype, kernels: list[str]) -> None:
    check(given(shape, dtype), "relu")
    assert kernels == ["forward", "backward"]


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smaller_dtypes_round_once(then: str, dtype: torch.dtype, kernels: list[str]) -> None:
    check(given(dtype=dtype), then)
    assert kernels == ["forward", "backward"]


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_running_statistics_follow_as_torchs_do(momentum: float, eps: float, kernels: list[str]) -> None:
    check(given(momentum=momentum, eps=eps), "relu")
    assert kernels == ["forward", "backward"]


@every_activation
@with_and_without
def test_gradients_are_those_of_small_differences_and_have_gradients_themselves(
    then: str, has_beside: bool, kernels: list[str]
) -> None:
    case = given((2, 2, 2, 3), has_beside=has_beside)

    def called(*leaves: Tensor) -> Tensor:
        z, scale, shift, *beside = leaves
        own = case.norm._replace(scale=scale, shift=shift, mean=None, var=None)
        return normed.run(z, own, beside[0] if beside else None, then)

    norm = case.norm
    assert norm.scale is not None
    assert norm.shift is not None
    leaves = [case.z, norm.scale, norm.shift, *([] if case.beside is None else [case.beside])]
    assert torch.autograd.gradcheck(called, leaves, atol=1e-6)
    assert torch.autograd.gradgradcheck(called, leaves, atol=1e-6)
    assert {"forward", "backward"} == set(kernels)


@pytest.mark.parametrize("missing", ["affine", "statistics", "gradients of the map"])
def test_what_a_norm_lacks_is_left_out(missing: str, kernels: list[str]) -> None:
    case = given()
    if missing == "affine":
        case = case._replace(norm=case.norm._replace(scale=None, shift=None))
    elif missing == "statistics":
        case = case._replace(norm=case.norm._replace(mean=None, var=None))
    else:
        case.z.requires_grad_(False)
        y = normed.run(case.z, case.norm, case.beside, "silu")
        expected = normed.plainly(case.z, case.norm, case.beside, "silu")
        asked = case.leaves[1:]
        pairs = zip(*(torch.autograd.grad(one, asked, case.dy) for one in (y, expected)), strict=True)
        assert all((mine - theirs).norm() <= 1e-12 * theirs.norm() for mine, theirs in pairs)
        return
    check(case, "relu")
    assert kernels == ["forward", "backward"]


def test_a_map_beside_may_lie_in_another_way(kernels: list[str]) -> None:
    case = given()
    wide = torch.randn(3, 9, 4, 6, dtype=torch.float64, device=DEVICE).requires_grad_()
    y = normed.run(case.z, case.norm, wide[:, 2:7], "relu")
    expected = normed.plainly(case.z, case.norm, wide[:, 2:7], "relu")
    assert kernels == ["forward"]
    assert (y - expected).norm() <= 1e-12 * expected.norm()
    mine, theirs = (torch.autograd.grad(one, wide, case.dy)[0] for one in (y, expected))
    assert (mine - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("why", ["another dtype", "another shape", "no layout"])
def test_what_the_kernels_cannot_do_is_done_step_by_step(why: str, kernels: list[str]) -> None:
    case = given()
    assert case.beside is not None
    if why == "another dtype":
        case = case._replace(beside=case.beside.float())
    elif why == "another shape":
        case = case._replace(beside=case.beside[:, :, :1, :1])
    else:
        case = case._replace(z=torch.randn(3, 10, 4, 6, dtype=torch.float64, device=DEVICE)[:, ::2].requires_grad_())
    found = trained(case, "relu", is_plain=False)
    assert not kernels
    again = case._replace(norm=given().norm)
    assert all(torch.equal(*pair) for pair in zip(found[:1], trained(again, "relu", is_plain=True)[:1], strict=True))


def test_a_single_number_in_a_channel_has_no_statistics(kernels: list[str]) -> None:
    case = given((1, 5, 1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        normed.run(case.z, case.norm, None, "relu")


def test_nan_stays_where_torch_leaves_it(kernels: list[str]) -> None:
    case = given()
    with torch.no_grad():
        case.z[0, 1, 2, 3] = torch.nan
    expected = trained(case.again(torch.float64), "relu", is_plain=True)
    found = trained(case, "relu", is_plain=False)
    assert kernels == ["forward", "backward"]
    assert all(torch.equal(mine.isnan(), theirs.isnan()) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("fault", ["mask", "shift of a mean", "running"])
def test_a_fault_in_a_kernel_is_found(fault: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from surgeon.one_pass import normed_sum_triton

    own = normed_sum_triton.forward, normed_sum_triton.backward

    def forward(*args: object) -> tuple[Tensor, Tensor]:
        y, known = own[0](*args)  # type: ignore[arg-type]
        if fault == "running":
            args[2][1].mul_(1 + 1e-9)  # type: ignore[index]
        if fault == "shift of a mean":
            known[0] += 1e-9
        return y, known

    def backward(*args: object) -> tuple[list[Tensor], Tensor]:
        then = "" if fault == "mask" else args[5]
        return own[1](*args[:5], then, args[6])  # type: ignore[arg-type]

    monkeypatch.setattr(normed_sum_triton, "forward", forward)
    monkeypatch.setattr(normed_sum_triton, "backward", backward)
    with pytest.raises(AssertionError):
        check(given(), "relu")

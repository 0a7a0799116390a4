"""The pooling whose gradient is written in one pass, and the cast that is made once, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from surgeon.blocks.octave import OctaveConv, OctaveConvOptions
from surgeon.conv.streams import Pool, has_whole_windows, pool


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_its_gradient_is_that_of_an_average_pooling(memory: torch.memory_format) -> None:
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64).to(memory_format=memory).requires_grad_()
    weights = torch.randn(2, 3, 3, 2, dtype=torch.float64).to(memory_format=memory)
    (expected,) = torch.autograd.grad((F.avg_pool2d(x, 2) * weights).sum(), x)
    (found,) = torch.autograd.grad((Pool.apply(x) * weights).sum(), x)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=memory)
    assert torch.autograd.gradcheck(Pool.apply, (x,))
    assert torch.autograd.gradgradcheck(Pool.apply, (x,))


def test_windows_at_a_border_are_left_to_torch() -> None:
    assert not has_whole_windows(torch.zeros(1, 1, 3, 4))
    assert not has_whole_windows(torch.zeros(1, 2, 2))
    assert has_whole_windows(torch.zeros(1, 1, 2, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_is_used_and_gives_the_same() -> None:
    x = torch.randn(2, 8, 6, 4, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    made = pool(x)
    assert type(made.grad_fn).__name__ == "PoolBackward"
    (found,) = torch.autograd.grad(made.square().sum(), x)
    (expected,) = torch.autograd.grad(F.avg_pool2d(x, 2).square().sum(), x)
    assert torch.allclose(found, expected)


class Casts(TorchDispatchMode):
    """Counts casts to bfloat16 of tensors of four dimensions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **kwargs or {})
        is_cast = function is torch.ops.aten._to_copy.default and args[0].dim() == 4
        self.count += is_cast and made.dtype == torch.bfloat16
        return made


@pytest.mark.parametrize("groups", [1, 4])
def test_under_autocast_a_kernel_is_cast_once(groups: int) -> None:
    conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
    options = OctaveConvOptions()
    block = OctaveConv.from_conv(conv, options, norm=None, generator=torch.Generator())
    x: Tensor = torch.randn(2, 8, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        made = block(x)
    assert casts.count == 1
    assert ((made.float() - block(x.float())).norm() / made.float().norm()).item() < 0.02

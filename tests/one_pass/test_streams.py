"""What lies between two octave convs, in one pass: the kernel and the plain form against the equations, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.one_pass import streams, where

ACTS = {
    "": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "silu": lambda x: x / (1 + (-x).exp()),
    "hardswish": lambda x: x * ((x + 3).clamp(0, 6) / 6),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the kernel run, on the CPU by Triton's interpreter, and count how often it does."""
    pytest.importorskip("triton")
    from surgeon.one_pass import streams_triton

    calls: list[int] = []
    own = streams_triton.finish

    def counted(*args: object) -> object:
        calls.append(1)
        return own(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(streams_triton, "finish", counted)
    monkeypatch.setattr(where, "on_cpu", True)
    return calls


def by_the_equations(made, both, bias, beside, then, *, has_extra):  # type: ignore[no-untyped-def]
    """Pixel by pixel index, without the functions of `conv.streams`."""
    _n, c, h, w = made.shape
    high, low = made.double(), both.double()
    if has_extra:
        rows, columns = torch.arange(h, device=made.device) // 2, torch.arange(w, device=made.device) // 2
        high = high + low[:, :c][:, :, rows][:, :, :, columns]
        low = low[:, c:]
    if bias is not None:
        high, low = high + bias.double()[:c].view(1, -1, 1, 1), low + bias.double()[c:].view(1, -1, 1, 1)
    if beside is not None:
        high, low = high + beside[0].double(), low + beside[1].double()[:, beside[1].shape[1] - low.shape[1] :]
    high, low = ACTS[then](high), ACTS[then](low)
    padded = F.pad(high, (0, w % 2, 0, h % 2), value=torch.nan)
    quads = torch.stack([padded[..., i::2, j::2] for i, j in itertools.product((0, 1), (0, 1))])
    return high, torch.cat([quads.nanmean(0), low], 1)


def given(
    n: int, c: int, low: int, h: int, w: int, dtype: torch.dtype, *, has_extra: bool, has_bias: bool, stack: int | None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)
        return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made

    half = (-(-h // 2), -(-w // 2))
    beside = None if stack is None else (draw(n, c, h, w), draw(n, stack + low, *half))
    bias = draw(c + low) if has_bias else None
    return draw(n, c, h, w), draw(n, low + (c if has_extra else 0), *half), bias, beside


CASES = [
    (2, 8, 8, 6, 8, True, True, 8, "relu"),
    (1, 3, 5, 5, 7, True, False, 0, "silu"),
    (3, 130, 7, 3, 2, True, True, None, "hardswish"),
    (1, 16, 48, 1, 1, True, True, 16, "relu6"),
    (2, 24, 8, 7, 4, False, True, 3, ""),
    (1, 33, 129, 9, 9, False, False, None, "relu"),
]


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_forms_give_what_the_equations_say(
    case: tuple[int, int, int, int, int, bool, bool, int | None, str],
    dtype: torch.dtype,
    is_plain: bool,
    kernel: list[int],
) -> None:
    n, c, low, h, w, has_extra, has_bias, stack, then = case
    inputs = given(n, c, low, h, w, dtype, has_extra=has_extra, has_bias=has_bias, stack=stack)
    expected = by_the_equations(*inputs, then, has_extra=has_extra)
    with torch.no_grad():
        made = (streams.plainly if is_plain else streams.finish)(*inputs, then, has_extra=has_extra)
    assert len(kernel) == (not is_plain)
    limit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 8 * torch.finfo(dtype).eps)
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        assert ((one.double() - other).norm() / other.norm()).item() <= limit


def test_the_kernel_keeps_nan_and_infinity_where_they_are(kernel: list[int]) -> None:
    made, both, bias, beside = given(1, 4, 4, 4, 4, torch.float32, has_extra=True, has_bias=True, stack=4)
    made[0, 1, 2, 3], both[0, 6, 1, 0] = torch.nan, torch.inf
    expected = by_the_equations(made, both, bias, beside, "relu", has_extra=True)
    with torch.no_grad():
        high, stack = streams.finish(made, both, bias, beside, "relu", has_extra=True)
    assert kernel
    assert torch.equal(high.isnan(), expected[0].isnan())
    assert torch.equal(stack[:, 4:].isinf(), expected[1][:, 4:].isinf())
    assert stack[0, 1, 1, 1].isnan()


@pytest.mark.parametrize("why", ["a gradient", "another layout", "other dtypes"])
def test_what_the_kernel_cannot_do_is_done_in_plain_torch(why: str, kernel: list[int]) -> None:
    made, both, bias, beside = given(1, 4, 4, 6, 6, torch.float32, has_extra=True, has_bias=True, stack=4)
    expected = by_the_equations(made, both, bias, beside, "relu", has_extra=True)
    if why == "a gradient":
        made.requires_grad_()
    elif why == "another layout":
        made = made.contiguous()
    else:
        both = both.double()
    high, stack = streams.finish(made, both, bias, beside, "relu", has_extra=True)
    assert not kernel
    assert torch.allclose(high.double(), expected[0], atol=1e-5)
    assert torch.allclose(stack.double(), expected[1], atol=1e-5)


def test_the_operator_says_its_shapes_without_running(kernel: list[int]) -> None:
    made, both, bias, _ = given(2, 8, 4, 5, 7, torch.float32, has_extra=True, has_bias=True, stack=None)
    with torch.no_grad():
        torch.library.opcheck(
            streams.finish_op,
            (made, both, bias, None, None, "relu", True),
            test_utils=("test_schema", "test_faketensor"),
        )
    assert kernel

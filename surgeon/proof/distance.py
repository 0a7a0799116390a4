"""How far two things are apart: tensors, and outputs of any structure.

relative L2 = ‖b − a‖ / ‖a‖        over all elements, in float64
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.errors import VerifyError
from surgeon.models.copies import shadow
from surgeon.models.memory import is_large

_PLAIN_SIZE = (1e-120, 1e120)  # of norms whose numbers are all finite, and of which no square overflows
EXACT = 1e-10  # relative L2 in float64; correct folds measure ≤ 3e-14, known wrong ones ≥ 5e-6


def relative_l2(b: Tensor, a: Tensor) -> float:
    """‖b − a‖ / ‖a‖ in float64; 0 for two zeros, infinite where only one of them is not finite.

    >>> relative_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    a, b = real(a).double(), real(b).double()
    size, apart = float(a.norm()), float((b - a).norm())
    if _PLAIN_SIZE[0] < size < _PLAIN_SIZE[1] and _PLAIN_SIZE[0] < apart < _PLAIN_SIZE[1]:  # most of all pairs
        return apart / size
    if apart == 0 and size < _PLAIN_SIZE[1] and torch.equal(b, a):
        return 0.0
    odd = ~(a.isfinite() & b.isfinite())
    if odd.any():
        if not torch.equal(a[odd].nan_to_num(nan=0.5), b[odd].nan_to_num(nan=0.5)):
            return math.inf
        a, b = a[~odd], b[~odd]
    largest = max((t.abs().max().item() for t in (a, b) if t.numel()), default=0.0)
    # The square of 1e200 overflows; scaling by a power of two changes no digit.
    scale = 2.0 ** min(-math.frexp(largest)[1], 1000)
    apart, size = ((b - a) * scale).norm().item(), (a * scale).norm().item()
    return apart / size if size else (math.inf if apart else 0.0)


def are_finite(*given: Tensor) -> bool:
    """Whether all numbers are finite; a sum that is finite has no others in it, and most are."""
    return all(math.isfinite(float(one.sum())) or bool(one.isfinite().all()) for one in given)


def dense(tensor: Tensor) -> Tensor:
    """Give the numbers of a tensor without gradients and one by one, however they are stored.

    Sparse layouts and quantised numbers are written out; a conjugate or a negation that torch has put off is computed.
    """
    tensor = tensor.detach()
    if tensor.is_quantized:
        return tensor.dequantize()
    whole = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return whole.resolve_conj().resolve_neg()


def real(tensor: Tensor) -> Tensor:
    """Give the numbers of a tensor, complex ones as pairs.

    >>> real(torch.tensor([1 + 2j]).conj())
    tensor([[ 1., -2.]])
    """
    tensor = dense(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def apart(out: Tensor, expected: Tensor) -> float:
    """Relative L2, infinite where the shapes differ."""
    return relative_l2(out, expected) if out.shape == expected.shape else math.inf


def worst(out_b: Any, out_a: Any, *, any_dtype: bool = False) -> float:
    """Give the relative L2 of the output that is furthest apart.

    Raises:
        VerifyError: the outputs differ in structure, shape or (unless `any_dtype`) dtype.
    """
    return max(relative_l2(b, a) for b, a in matched(out_b, out_a, any_dtype=any_dtype))


@dataclass(frozen=True, slots=True)
class Apart:
    """How far one output is from another: numbers by relative L2, and those that can only be equal or not by counting.

    `l2`: over the numbers that are finite in both, infinite where one of two is zero. `flips`: how many of the `count`
    numbers differ although there is no distance between them: labels, masks, and NaN or Inf that only one side has.
    """

    l2: float
    flips: int
    count: int
    is_whole: bool = False  # whole numbers, which rounding flips where two of A's numbers nearly tie

    @classmethod
    def between(cls, b: Tensor, a: Tensor) -> Self:
        """Compare two tensors of one shape.

        >>> Apart.between(torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3]))
        Apart(l2=0.0, flips=1, count=3, is_whole=True)
        >>> Apart.between(torch.tensor([3.0, 4.5, math.nan]), torch.tensor([3.0, 4.0, 1.0]))
        Apart(l2=0.1, flips=1, count=3, is_whole=False)
        """
        a, b = real(a), real(b)
        if not (a.is_floating_point() or b.is_floating_point()):
            return cls(0.0, int((a != b).sum()), a.numel(), is_whole=True)
        a, b = a.double(), b.double()
        if are_finite(a, b):
            return cls(relative_l2(b, a), 0, a.numel())
        finite = a.isfinite() & b.isfinite()
        flips = ~finite & (a != b) & ~(a.isnan() & b.isnan())
        return cls(relative_l2(b[finite], a[finite]), int(flips.sum()), a.numel())

    def furthest(self, other: Apart) -> Apart:
        """Take the larger of both measures."""
        return Apart(max(self.l2, other.l2), max(self.flips, other.flips), self.count, self.is_whole)

    def flips_allowed(self, margin: float) -> float:
        """How many numbers may flip in B where this many flip in A when its weights are rounded, or moved that far.

        m · k + 4 · √(m · k + 1) for k flips, which are counted, and so vary by chance as √k does. A number may not
        become NaN or Inf where none does in A.
        """
        expected = margin * self.flips
        return expected + 4 * math.sqrt(expected + 1) if self.flips or self.is_whole else 0.0


def pooled(outs_b: Sequence[Any], outs_a: Sequence[Any]) -> list[Apart]:
    """Compare every output over several runs together; the dtypes may differ."""
    runs = [matched(b, a, any_dtype=True) for b, a in zip(outs_b, outs_a, strict=True)]
    leaves = [zip(*leaf, strict=True) for leaf in zip(*runs, strict=True)]
    return [Apart.between(_joined(b), _joined(a)) for b, a in leaves]


def matched(out_b: Any, out_a: Any, *, any_dtype: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Match outputs leaf by leaf; nothing is left over and nothing is broadcast."""
    leaves_a, tree_a = pytree.tree_flatten(_opened(out_a))
    leaves_b, tree_b = pytree.tree_flatten(_opened(out_b))
    if tree_a != tree_b:
        raise VerifyError(
            f"the outputs have different structures: {tree_a} against {tree_b}",
            todo="Compare models with the same outputs.",
        )
    found = []
    for i, (one, other) in enumerate(zip(map(_number, leaves_a), map(_number, leaves_b), strict=True)):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            _compare_plain(i, one, other)
            continue
        if one.shape != other.shape or (one.dtype != other.dtype and not any_dtype):
            raise VerifyError(
                f"output {i} is {_kind(one)} against {_kind(other)}",
                todo="Compare models with the same heads, stored in the same dtype.",
            )
        if one.numel():
            found.append((other, one))
    if not found:
        raise VerifyError("the models return no numbers to compare", todo="Pass an input that makes them return some.")
    return found


def is_matched(out_b: Any, out_a: Any) -> bool:
    """Whether two outputs have the same structure and shapes, and numbers to compare; the dtypes may differ."""
    try:
        return bool(matched(out_b, out_a, any_dtype=True))
    except VerifyError:
        return False


def furthest(outputs: Sequence[tuple[float, float]]) -> Iterator[tuple[int, float, float]]:
    """Choose among (found, limit) the output that is furthest beyond its own limit, or nearest to it.

    >>> list(furthest([(1.0, 2.0), (3.0, 4.0)]))
    [(1, 3.0, 4.0)]
    >>> list(furthest([]))
    []
    """
    if outputs:
        i = max(range(len(outputs)), key=lambda i: excess(*outputs[i]))
        yield i, *outputs[i]


def excess(found: float, limit: float) -> float:
    """How many times its limit a distance is; infinite for a limit that is not finite, because it excludes nothing.

    >>> excess(3.0, 4.0), excess(0.0, 0.0), excess(math.inf, math.inf)
    (0.75, 0.0, inf)
    """
    if not (math.isfinite(found) and math.isfinite(limit)):
        return math.inf
    return found / limit if limit else (math.inf if found else 0.0)


def has_numbers(out: Any) -> bool:
    """Whether there is anything in an output to compare; a detector that finds nothing returns empty tensors."""
    return any(t.numel() for t in tensors(out))


def tensors(out: Any) -> list[Tensor]:
    """Give all tensors in an output."""
    return [leaf for leaf in map(_number, pytree.tree_leaves(_opened(out))) if isinstance(leaf, Tensor)]


def _opened(out: Any) -> Any:
    """Turn dataclasses, which are leaves to torch, into dicts."""

    def is_record(value: Any) -> bool:
        return dataclasses.is_dataclass(value) and not isinstance(value, type)

    def open_(leaf: Any) -> Any:
        if not is_record(leaf):
            return leaf
        return {f.name: _opened(getattr(leaf, f.name)) for f in dataclasses.fields(leaf)}

    return pytree.tree_map(open_, out, is_leaf=is_record)


def _number(leaf: Any) -> Any:
    """Turn a float into a tensor, since beside tensors it is an output like them, and write out other layouts."""
    if isinstance(leaf, Tensor):
        return leaf if leaf.layout is torch.strided and not leaf.is_quantized else dense(leaf)
    return torch.tensor(leaf, dtype=torch.float64) if isinstance(leaf, float) else leaf


def _compare_plain(i: int, one: Any, other: Any) -> None:
    for leaf in (one, other):
        if not isinstance(leaf, str | int | bool | None | Tensor):
            raise VerifyError(
                f"output {i} is a {type(leaf).__name__}, which surgeon cannot look into",
                todo="Return tensors, alone or in dicts, lists, tuples or dataclasses.",
            )
    if isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
        raise VerifyError(f"output {i} is {one!r} against {other!r}", todo="Only tensors and floats may differ.")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def dtype_name(dtype: torch.dtype) -> str:
    """Write a dtype without the prefix `torch.`.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def as_double(tensor: Tensor) -> Tensor:
    """Cast floating point numbers to float64; the others stay what they are."""
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def widened(model: nn.Module) -> nn.Module:
    """Copy a model so that it computes in float64, with its large parameters as they are stored.

    Those are cast while their module is called, one by one; of a model of a gigabyte, two fewer are held. Where a
    large parameter is read by other modules than its own, dtypes are mixed, and torch may refuse that.
    """
    large = {parameter.data_ptr() for parameter in model.parameters() if is_large(parameter)}
    made = shadow(model, lambda tensor: tensor if tensor.data_ptr() in large else as_double(tensor))
    for module in made.modules():
        if any(is_large(parameter) for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen_)
            module.register_forward_hook(_narrow_, always_call=True)
    return made


def _widen_(module: nn.Module, args: Any) -> None:
    vars(module).setdefault("_narrow", []).append(dict(module._parameters))
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(as_double(parameter.detach()), requires_grad=False)


def _narrow_(module: nn.Module, args: Any, out: Any) -> None:
    module._parameters.update(vars(module)["_narrow"].pop())


def _kind(tensor: Tensor) -> str:
    return f"{'×'.join(map(str, tensor.shape)) or 'a scalar'} {dtype_name(tensor.dtype)}"


def rounded_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Give the cast of floating point tensors to a dtype; others are copied."""
    return lambda t: t.to(dtype) if t.is_floating_point() else t.clone()


def largest(draws: Sequence[Sequence[Apart]]) -> list[Apart]:
    """Take the largest of several draws, output by output."""
    first, *others = draws
    found = list(first)
    for draw in others:
        found = [one.furthest(other) for one, other in zip(found, draw, strict=True)]
    return found

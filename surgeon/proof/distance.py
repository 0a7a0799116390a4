"""How far two things are apart: tensors, outputs of any structure, stored tensors and what they should be.

relative L2 = ‖b − a‖ / ‖a‖        over all elements, in float64
ulp         = the distance from a number to the next one that its dtype can hold
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.errors import VerifyError
from surgeon.models.copies import shadow
from surgeon.models.memory import is_large


def relative_l2(b: Tensor, a: Tensor) -> float:
    """‖b − a‖ / ‖a‖ in float64; 0 for two zeros, infinite where only one of them is not finite.

    >>> relative_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    a, b = a.double(), b.double()
    odd = ~(a.isfinite() & b.isfinite())
    if odd.any():
        if not torch.equal(a[odd].nan_to_num(nan=0.5), b[odd].nan_to_num(nan=0.5)):
            return math.inf
        a, b = a[~odd], b[~odd]
    largest = max((t.abs().max().item() for t in (a, b) if t.numel()), default=0.0)
    # Squares of 1e200 are no numbers; a power of two changes no digit.
    scale = 2.0 ** min(-math.frexp(largest)[1], 1000)
    apart, size = ((b - a) * scale).norm().item(), (a * scale).norm().item()
    return apart / size if size else (math.inf if apart else 0.0)


def apart(out: Tensor, expected: Tensor) -> float:
    """Relative L2, infinite where the shapes differ."""
    return relative_l2(out, expected) if out.shape == expected.shape else math.inf


def worst(out_b: Any, out_a: Any, *, any_dtype: bool = False) -> float:
    """Relative L2 of the output that is furthest apart.

    Raises:
        VerifyError: the outputs have other structures, shapes or (unless `any_dtype`) dtypes.
    """
    return max(relative_l2(b, a) for b, a in pairs(out_b, out_a, any_dtype=any_dtype))


def pooled(outs_b: Sequence[Any], outs_a: Sequence[Any]) -> list[float]:
    """Relative L2 of every output over several runs together; any dtypes."""
    runs = [pairs(b, a, any_dtype=True) for b, a in zip(outs_b, outs_a, strict=True)]
    leaves = [zip(*leaf, strict=True) for leaf in zip(*runs, strict=True)]
    return [relative_l2(_joined(b), _joined(a)) for b, a in leaves]


def pairs(out_b: Any, out_a: Any, *, any_dtype: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Match outputs leaf by leaf; nothing is left over and nothing is broadcast."""
    leaves_a, tree_a = pytree.tree_flatten(_opened(out_a))
    leaves_b, tree_b = pytree.tree_flatten(_opened(out_b))
    if tree_a != tree_b:
        raise VerifyError(
            f"the outputs have other structures: {tree_a} against {tree_b}",
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
        raise VerifyError(
            "the models return no numbers", todo="Nothing can be compared; give an input for which they do."
        )
    return found


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
    """A float beside the tensors is an output like them."""
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


def ulp(tensor: Tensor) -> Tensor:
    """The unit in the last place of every element in the tensor's own dtype, as float64.

    >>> ulp(torch.tensor([1.0, 3.0])) * 2**23
    tensor([1., 2.], dtype=torch.float64)
    """
    info = torch.finfo(tensor.dtype)
    _, exponent = torch.frexp(tensor.double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)


def worst_ulps(stored: nn.Module, exact: nn.Module) -> float:
    """How far a module's tensors are from its float64 twin's, rounded once, in units in the last place."""
    return max(stored_ulps(stored, exact).values(), default=0.0)


def stored_ulps(b: nn.Module, replay: nn.Module) -> dict[str, float]:
    """Give for every tensor that B stores how many units in the last place it is from the replay, rounded once."""
    ours, theirs = b.state_dict(), replay.state_dict()
    shared = [key for key in theirs if key in ours]
    apart = {key: _ulps(ours[key], theirs[key]) for key in shared}
    return apart | dict.fromkeys(ours.keys() ^ theirs.keys(), math.inf)


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


class Jitter:
    """Moves every number by half a unit in its last place, up or down; the result is float64.

    A float64 number has no halves, so it is moved by a whole one; so is every number where it keeps its dtype.
    """

    def __init__(self, seed: int, *, keeps_dtype: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.keeps_dtype = keeps_dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        coin = torch.randint(0, 2, tensor.shape, generator=self.generator).to(tensor.device) - 0.5
        is_whole = self.keeps_dtype or tensor.dtype == torch.float64
        moved = tensor.double() + coin * ulp(tensor) * (2 if is_whole else 1)
        return moved.to(tensor.dtype) if self.keeps_dtype else moved


def _ulps(stored: Tensor, exact: Tensor) -> float:
    if not (isinstance(stored, Tensor) and isinstance(exact, Tensor)):  # a module's own extra state
        return 0.0 if repr(stored) == repr(exact) else math.inf
    if stored.shape != exact.shape:
        return math.inf
    if not stored.is_floating_point():
        return 0.0 if torch.equal(stored, exact) else math.inf
    rounded = exact.to(stored.dtype)
    if torch.equal(stored, rounded):
        return 0.0
    same = (stored == rounded) | (stored.isnan() & rounded.isnan())
    if same.all():
        return 0.0
    stored, rounded = stored[~same], rounded[~same]
    # float64's own rounding in the arithmetic is no fault: taps that cancel are as exact as the largest one
    unit = ulp(rounded).clamp_min(2.0**-51 * exact.nan_to_num().abs().max().item())
    largest = ((stored.double() - rounded.double()).abs() / unit).max().item()
    return math.inf if math.isnan(largest) else largest


def _kind(tensor: Tensor) -> str:
    return f"{'×'.join(map(str, tensor.shape)) or 'a scalar'} {str(tensor.dtype).removeprefix('torch.')}"

"""A branch of a block that is missing in its fold, was added twice, or lies in the wrong place or direction.

c_i = fold(block) − fold(block without branch i)        what branch i adds to the kernel and the bias
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgeon.models.copies import duplicate
from surgeon.proof.faults.base import Hypothesis, close
from surgeon.proof.faults.case import Case
from surgeon.proof.faults.folds import folded
from surgeon.proof.report import Guess

_WORDS = {-1: "missing", 1: "added twice", -2: "added with the wrong sign"}
Added = tuple[Tensor, Tensor]  # to the kernel, to the bias


class Branches(Hypothesis):
    """What is off in B's conv is a whole number of times what branches add, or one of them moved or transposed."""

    place = 95

    def guess(self, case: Case) -> Iterator[Guess]:
        if len(case.origins) != 1 or "weight" not in case.off or not isinstance(case.expected, nn.Conv2d):
            return
        added = _branches(case.origins[0])
        if len(added) > 1:
            yield from _counted(case, added)
            yield from _moved(case, added)


def _counted(case: Case, added: dict[str, Added]) -> Iterator[Guess]:
    wanted, held = case.off["weight"]
    matrix = torch.stack([kernel.flatten() for kernel, _ in added.values()], 1)
    times = torch.linalg.lstsq(matrix, (held.double() - wanted).flatten()[:, None]).solution.flatten().round()
    if not times.any() or not bool(times.isfinite().all()):
        return
    factors = dict(zip(added, times.int().tolist(), strict=True))
    kernel = sum((factors[name] * one for name, (one, _) in added.items()), case.wanted["weight"])
    bias = sum((factors[name] * one for name, (_, one) in added.items()), case.wanted.get("bias", torch.zeros(1)))
    residual = case.explained({"weight": kernel, "bias": bias} if "bias" in case.held else {"weight": kernel})
    if residual is not None:
        said = [f"{name} is {_WORDS.get(by, f'added {by + 1} times')}" for name, by in factors.items() if by]
        kind = "branch missing" if all(by == -1 for by in factors.values() if by) else "branch added twice"
        yield case.guess(kind, f"in the folded kernel {', '.join(said)}: so it is B's {close(residual)}", residual)


def _moved(case: Case, added: dict[str, Added]) -> Iterator[Guess]:
    for name, (kernel, _) in added.items():
        moves = {f"{way} by one": kernel.roll(by, axis) for way, by, axis in _WAYS}
        tried = {("strip shifted", f"moved {words}"): moved for words, moved in moves.items()}
        if kernel.shape[2] == kernel.shape[3]:
            tried["strip transposed", "transposed"] = kernel.mT
        for (kind, words), moved in tried.items():
            if torch.equal(moved, kernel):
                continue
            predicted = {"weight": case.wanted["weight"] - kernel + moved}
            if (residual := case.explained(predicted)) is not None:
                says = f"with {name} {words}, the expected kernel is B's {close(residual)}"
                yield case.guess(kind, says, residual)


_WAYS = (("down", 1, 2), ("up", -1, 2), ("right", 1, 3), ("left", -1, 3))


def _branches(block: nn.Module) -> dict[str, Added]:
    """Give what each norm's branch adds to the kernel and bias that a block is folded into."""
    whole = folded(duplicate(block))
    if whole is None:
        return {}
    found = {}
    names = [name for name, one in block.named_modules() if _scales(one)]
    names = names or [name for name, one in block.named_modules() if name and isinstance(one, nn.Conv2d)]
    for name in names:
        less = duplicate(block)
        branch = less.get_submodule(name)
        with torch.no_grad():
            for tensor in (branch.weight, branch.bias):
                if isinstance(tensor, Tensor):
                    tensor.zero_()
        rest = folded(less)
        if rest is None or rest.weight.shape != whole.weight.shape:
            return {}
        kernel, bias = (whole.weight - rest.weight).detach(), _bias(whole) - _bias(rest)
        if kernel.any():
            found[name] = kernel, bias
    return found


def _scales(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_var", None), Tensor) and isinstance(module.weight, Tensor)


def _bias(conv: nn.Conv2d) -> Tensor:
    return torch.zeros(conv.out_channels, dtype=conv.weight.dtype) if conv.bias is None else conv.bias.detach()

"""Faults in numbers: what goes wrong when weights are folded, copied, cast or read."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgeon.nn import ACBlock


class NotHereError(Exception):
    """The network has nothing that this fault could hit."""


@dataclass(frozen=True)
class Subject:
    """A pair of models of which `b` is to be spoilt, and where random choices come from."""

    a: nn.Module
    b: nn.Module
    dice: random.Random

    def pick(self, *kinds: type[nn.Module], where: Callable[[nn.Module], bool] = lambda module: True) -> str:
        """Choose one module of B."""
        found = [path for path, module in self.b.named_modules() if isinstance(module, kinds) and where(module)]
        if not found:
            raise NotHereError
        return self.dice.choice(found)

    def conv(self, where: Callable[[nn.Conv2d], bool] = lambda conv: True) -> tuple[str, nn.Conv2d]:
        path = self.pick(nn.Conv2d, where=where)  # type: ignore[arg-type]
        return path, self.b.get_submodule(path)  # type: ignore[return-value]

    def put(self, path: str, module: nn.Module) -> str:
        self.b.set_submodule(path, module.train(self.b.training))
        return path


@dataclass(frozen=True)
class Fault:
    """A way to spoil B; `put` gives the path of the module that is wrong, or None where it is the whole network.

    `is_right`: B still computes what A does, so it must not be condemned.
    """

    name: str
    put: Callable[[Subject], str | None]
    is_right: bool = False


FAULTS: dict[str, Fault] = {}
Put = Callable[[Subject], str | None]


def fault(name: str, *, is_right: bool = False) -> Callable[[Put], Put]:
    def keep(put: Put) -> Put:
        FAULTS[name] = Fault(name, put, is_right)
        return put

    return keep


def biased(conv: nn.Conv2d) -> bool:
    return conv.bias is not None


def wide(conv: nn.Conv2d) -> bool:
    return conv.kernel_size[0] > 1


def on_weight(
    name: str, change: Callable[[Tensor, random.Random], Tensor], where: Callable[[nn.Conv2d], bool] = lambda conv: True
) -> None:
    """Name a fault that changes the kernel of one conv."""

    def put(subject: Subject) -> str:
        path, conv = subject.conv(where)
        conv.weight.data.copy_(change(conv.weight.data.clone(), subject.dice))
        return path

    fault(name)(put)


def _scale_tap(factor: float) -> Callable[[Tensor, random.Random], Tensor]:
    def change(weight: Tensor, dice: random.Random) -> Tensor:
        flat = weight.flatten()
        largest = flat.abs().double().topk(min(8, len(flat))).indices
        flat[int(largest[dice.randrange(len(largest))])] *= factor
        return flat.reshape(weight.shape)

    return change


def _swap(dimension: int) -> Callable[[Tensor, random.Random], Tensor]:
    def change(weight: Tensor, dice: random.Random) -> Tensor:
        order = list(range(weight.shape[dimension]))
        i, j = dice.sample(order, 2)
        order[i], order[j] = j, i
        return weight.index_select(dimension, torch.tensor(order))

    return change


def _negate(weight: Tensor, dice: random.Random) -> Tensor:
    weight[dice.randrange(len(weight))] *= -1
    return weight


def _shuffled_inputs(weight: Tensor, dice: random.Random) -> Tensor:
    return weight.roll(1, 1)


def _one_tap(value: float) -> Callable[[Tensor, random.Random], Tensor]:
    def change(weight: Tensor, dice: random.Random) -> Tensor:
        weight.flatten()[dice.randrange(weight.numel())] = value
        return weight

    return change


on_weight("one tap off by 1e-6", _scale_tap(1 + 1e-6))
on_weight("one tap off by 1e-3", _scale_tap(1 + 1e-3))
on_weight("one tap off by 10 %", _scale_tap(1.1))
on_weight("one tap zero", _scale_tap(0))
on_weight("two output channels swapped", _swap(0), lambda conv: conv.out_channels > 1)
on_weight("two input channels swapped", _swap(1), lambda conv: conv.weight.shape[1] > 1)
on_weight("input channels rolled", _shuffled_inputs, lambda conv: conv.weight.shape[1] > 1)
on_weight("a filter negated", _negate)
on_weight("kernels rotated", lambda w, dice: w.flip(2, 3), wide)
on_weight("kernels mirrored", lambda w, dice: w.flip(3), wide)
on_weight("kernels transposed", lambda w, dice: w.mT, lambda c: wide(c) and c.kernel_size[0] == c.kernel_size[1])
on_weight("kernels one row lower", lambda w, dice: w.roll(1, 2), wide)
on_weight("weights of a conv scaled by 1.001", lambda w, dice: w * 1.001)
on_weight("weights through bfloat16", lambda w, dice: w.bfloat16().to(w.dtype))
on_weight("weights through float8", lambda w, dice: w.float().to(torch.float8_e4m3fn).to(w.dtype))
on_weight("a weight is NaN", _one_tap(float("nan")))
on_weight("a weight is infinite", _one_tap(float("inf")))
on_weight("groups in another order", lambda w, dice: w.roll(len(w) // 2, 0), lambda conv: conv.groups > 1)


def up(tensor: Tensor) -> Tensor:
    """Move every number to the next larger one of its dtype."""
    return torch.nextafter(tensor, torch.full_like(tensor, float("inf")))


@fault("all weights one unit up")
def _(subject: Subject) -> str | None:
    for parameter in subject.b.parameters():
        parameter.data.copy_(up(parameter.data))
    return None


@fault("all weights scaled by 1.001")
def _(subject: Subject) -> str | None:
    for module in subject.b.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= 1.001
    return None


@fault("bias dropped")
def _(subject: Subject) -> str:
    path, conv = subject.conv(biased)
    conv.bias = None
    return path


@fault("bias zero")
def _(subject: Subject) -> str:
    path, conv = subject.conv(biased)
    conv.bias.data.zero_()  # type: ignore[union-attr]
    return path


@fault("bias of one channel doubled")
def _(subject: Subject) -> str:
    path, conv = subject.conv(biased)
    conv.bias.data[subject.dice.randrange(conv.out_channels)] *= 2  # type: ignore[union-attr]
    return path


@fault("a bias is infinite")
def _(subject: Subject) -> str:
    path, conv = subject.conv(biased)
    conv.bias.data[subject.dice.randrange(conv.out_channels)] = float("inf")  # type: ignore[union-attr]
    return path


@fault("a row of the head off by 1 %")
def _(subject: Subject) -> str:
    path = subject.pick(nn.Linear)
    subject.b.get_submodule(path).weight.data[0] *= 1.01  # type: ignore[operator,union-attr,index]
    return path


# ---- folds that are wrong -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """What is done wrong in the fold of one ACBlock, or to the numbers of one norm."""

    eps: float | None = None
    without_sigma: bool = False
    mean_sign: int = 1
    without_beta: bool = False
    row: int = 0  # the strip of one row lies so far below
    strips: int = 1  # how often the strips are added


def folded(block: ACBlock, mistake: Mistake) -> tuple[Tensor, Tensor]:
    """Fold a block in float64 by arithmetic of our own, with a mistake."""
    kernel, bias = torch.zeros_like(block.square_conv.weight, dtype=torch.float64), 0
    k_h, k_w = kernel.shape[2:]
    row, column = (k_h // 2, k_w // 2) if block.placement == "skeleton" else (k_h - 1, k_w - 1)
    parts = (("square", slice(None), slice(None), 1), ("ver", slice(None), slice(column, column + 1), mistake.strips))
    lower = (row + mistake.row) % k_h
    for branch, rows, columns, times in (*parts, ("hor", slice(lower, lower + 1), slice(None), mistake.strips)):
        conv, norm = getattr(block, f"{branch}_conv"), getattr(block, f"{branch}_bn")
        eps = norm.eps if mistake.eps is None else mistake.eps
        sigma = 1 if mistake.without_sigma else (norm.running_var.double() + eps).sqrt()
        factor = norm.weight.double() / sigma
        kernel[:, :, rows, columns] += times * factor[:, None, None, None] * conv.weight.double()
        beta = 0 if mistake.without_beta else norm.bias.double()
        bias = bias + times * (beta - mistake.mean_sign * norm.running_mean.double() * factor)
    return kernel.detach(), bias.detach()  # type: ignore[attr-defined]


def wrong_fold(name: str, mistake: Mistake, *, is_of_strips: bool = False) -> None:
    def put(subject: Subject) -> str:
        blocks = {path: block for path, block in subject.a.named_modules() if isinstance(block, ACBlock)}
        plain = {path for path, conv in subject.b.named_modules() if isinstance(conv, nn.Conv2d)}
        if places := sorted(blocks.keys() & plain):
            path = subject.dice.choice(places)
            conv = subject.b.get_submodule(path)
            kernel, bias = folded(blocks[path], mistake)
            conv.weight.data.copy_(kernel)  # type: ignore[operator,union-attr]
            conv.bias.data.copy_(bias)  # type: ignore[operator,union-attr]
            return path
        if is_of_strips:
            raise NotHereError
        path = subject.pick(nn.BatchNorm2d)
        _spoil_(subject.b.get_submodule(path), mistake)  # type: ignore[arg-type]
        return path

    fault(name)(put)


def _spoil_(norm: nn.BatchNorm2d, mistake: Mistake) -> None:
    """Make the same mistake at a norm that was not folded."""
    norm.running_mean.mul_(mistake.mean_sign)  # type: ignore[union-attr]
    if mistake.eps is not None:
        norm.eps = mistake.eps
    if mistake.without_sigma:
        norm.weight.data *= (norm.running_var + norm.eps).sqrt()
    if mistake.without_beta:
        norm.bias.data.zero_()


wrong_fold("eps forgotten", Mistake(eps=0.0))
wrong_fold("eps of another norm", Mistake(eps=1e-3))
wrong_fold("gamma without sigma", Mistake(without_sigma=True))
wrong_fold("mean with the wrong sign", Mistake(mean_sign=-1))
wrong_fold("mean forgotten", Mistake(mean_sign=0))
wrong_fold("beta forgotten", Mistake(without_beta=True))
wrong_fold("a strip one row lower", Mistake(row=1), is_of_strips=True)
wrong_fold("strips added twice", Mistake(strips=2), is_of_strips=True)
wrong_fold("strips forgotten", Mistake(strips=0), is_of_strips=True)


@fault("mean of a norm that stays")
def _(subject: Subject) -> str:
    path = subject.pick(nn.BatchNorm2d)
    norm = subject.b.get_submodule(path)
    norm.running_mean[0] += 0.1 * (norm.running_var[0] + norm.eps).sqrt()  # type: ignore[operator,union-attr,index]
    return path


@fault("variance of a norm that stays")
def _(subject: Subject) -> str:
    path = subject.pick(nn.BatchNorm2d)
    subject.b.get_submodule(path).running_var[0] *= 1.1  # type: ignore[operator,union-attr,index]
    return path

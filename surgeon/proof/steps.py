"""One step of a model: a call in train or eval mode, and the gradients of one scalar of its outputs.

    s = Σ_outputs ⟨y, w⟩ / √numbers,   w normal and seeded: every number of every output counts, with its own weight

It is made on a copy, so neither the statistics nor the gradients of a user's model are touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, shadow, where
from surgeon.models.sandbox import quietly
from surgeon.proof.calls import HISTORY
from surgeon.proof.distance import tensors
from surgeon.proof.random_steps import Drawn, seeded

_IN_TRAINING = "Give an input that both models take in train mode, with --input, or compare them in eval mode alone."
_WITHOUT = "Compare the models without --gradients."


@dataclass(frozen=True, slots=True)
class How:
    """How models are compared in a step: the mode, whether gradients are, and the seed of all that is random."""

    is_training: bool = False
    gradients: bool = False
    seed: int = 0

    @property
    def mode(self) -> Literal["train", "eval"]:
        return "train" if self.is_training else "eval"

    @property
    def is_wanted(self) -> bool:
        """Whether there is more to compare than what eval mode shows without gradients."""
        return self.is_training or self.gradients


@dataclass(frozen=True, slots=True)
class Step:
    """What a step gives: outputs, all buffers before and after it, and gradients, by every name of a tensor.

    A gradient is None where the outputs do not depend on a parameter. `frozen` are the names of parameters that need
    none, and `refused` says why there are no gradients of inputs.
    """

    out: Any
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    drawn: Drawn = field(default_factory=Drawn)
    refused: str = ""


def set_mode_(
    model: nn.Module, how: How, like: nn.Module | None = None, names: Mapping[str, str] | None = None
) -> None:
    """Set the mode of a copy: modules that were in eval mode while their model trains stay so.

    A model that is in eval mode as a whole follows `like`, if that trains; `names` are those of its modules in `like`.
    """
    if not how.is_training:
        in_mode(model, False)
    elif not model.training:
        in_mode(model, True)
        if like is not None and like.training:
            follow_(model, like, names)


def follow_(model: nn.Module, like: nn.Module, names: Mapping[str, str] | None = None) -> None:
    """Give every module the mode that the module of the same name has in `like`, and its parameters what they need."""
    modes = {path: module.training for path, module in like.named_modules(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        module.training = modes.get((names or {}).get(path, path), module.training)


def copied(model: nn.Module, cast: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a model in its modes; what its user does to the gradient of a parameter is done to that of the copy, too.

    Tensors of the copy are contiguous: in another order in memory the same seed would draw another dropout.
    """
    known = vars(model).get(HISTORY)
    made = shadow(model, lambda tensor: _in_order(cast(tensor)), shares=() if known is None else [known])
    twins = dict(made.named_parameters())
    for name, parameter in model.named_parameters():
        for hook in (parameter._backward_hooks or {}).values():
            twins[name].register_hook(hook)  # type: ignore[no-untyped-call]
    return made


def take(
    model: nn.Module, inputs: Inputs, dtype: torch.dtype, how: How, *, names: Mapping[str, str] | None = None
) -> Step:
    """Make one step of a copy of a model that is in its mode; `names` are those that decide what random modules draw.

    Raises:
        VerifyError: the model does not run, or its gradients cannot be computed.
    """
    try:
        return _step(model, inputs, dtype, how, names or {}, of_inputs=how.gradients)
    except VerifyError as error:
        if not how.gradients:
            raise
        try:
            found = _step(model, inputs, dtype, how, names or {}, of_inputs=False)
        except VerifyError:
            raise error from None
        why = f"a model does not run on inputs that need gradients ({error.facts['said']})"
        return Step(*(found.out, found.before, found.after, found.gradients, found.frozen, found.drawn), refused=why)


def _step(
    model: nn.Module, inputs: Inputs, dtype: torch.dtype, how: How, names: Mapping[str, str], *, of_inputs: bool
) -> Step:
    made = copied(model, torch.clone)
    before = {name: buffer.clone() for name, buffer in made.named_buffers(remove_duplicate=False)}
    leaves: list[Tensor] = []

    def fed(tensor: Tensor) -> Tensor:
        tensor = _in_order(tensor)
        if not (of_inputs and (tensor.is_floating_point() or tensor.is_complex())):
            return tensor
        leaves.append(tensor.requires_grad_())
        return tensor.clone()  # a forward may write on what it is given, and may not on a leaf

    with quietly(how.seed), torch.set_grad_enabled(how.is_wanted):
        given = inputs.cast_for(made, dtype).map(fed)
        try:
            with seeded(made, how.seed, names) as drawn:
                out = given.call(made)
        except Exception as error:
            raise VerifyError(
                f"a model does not run in {how.mode} mode on an input of {inputs} in {dtype}: {where(error)}",
                todo=_IN_TRAINING if how.is_training else _WITHOUT,
                said=where(error),
            ) from error
        if how.gradients:
            _backward(out, how.seed)
    gradients = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    parameters = dict(made.named_parameters(remove_duplicate=False))
    gradients |= {name: parameter.grad for name, parameter in parameters.items() if parameter.requires_grad}
    return Step(
        out=pytree.tree_map_only(Tensor, torch.Tensor.detach, out),
        before=before,
        after={name: buffer.detach() for name, buffer in made.named_buffers(remove_duplicate=False)},
        gradients=gradients if how.gradients else {},
        frozen=frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad),
        drawn=drawn,
    )


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.layout is torch.strided else tensor


def _backward(out: Any, seed: int) -> None:
    """Compute the gradients of the scalar with respect to all leaves."""
    terms = list(_terms([t for t in tensors(out) if t.requires_grad and t.numel()], seed))
    if not terms:
        return
    try:
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise VerifyError(
            f"the gradients of a model cannot be computed: {where(error)}", todo=_WITHOUT, said=where(error)
        ) from error


def _terms(outputs: Iterable[Tensor], seed: int) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(seed + 5)
    for one in outputs:
        numbers = torch.view_as_real(one) if one.is_complex() else one
        weights = torch.randn(numbers.shape, generator=generator, dtype=torch.float64).to(numbers)
        kept = numbers.isfinite()
        yield (torch.where(kept, numbers, 0) * weights).sum().double() / math.sqrt(numbers.numel())

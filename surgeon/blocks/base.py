"""The contract of a block: what a replacement for an `nn.Conv2d` has to be.

A new block is one file with one subclass of `Block`, `Foldable` or `Deployable`, in this folder or in a distribution of
its own that names it as an entry point of the group `surgeon.blocks`. Recipes, plans and the command line find it by
themselves (`discover`); CONTRIBUTING.md goes through the contract.
"""

from __future__ import annotations

import abc
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from typing_extensions import TypeVar

from surgeon._torch_compat import BatchNorm
from surgeon.blocks.anatomy import BranchKernel
from surgeon.conv.spec import ConvSpec
from surgeon.errors import CaptureError
from surgeon.nn import Stored


class BlockOptions(BaseModel):
    """What a recipe may say under `with:`; every block subclasses this."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Role = dict[str, int | str]
_ROLE = "surgeon.role"  # in the metadata of a state dict
_ORDER = "order"  # in a role
PLAIN = "plain"  # the form in which a block is deployed if nothing is said
Opts = TypeVar("Opts", bound=BlockOptions, default=Any)  # the options of a block


@dataclass(frozen=True, slots=True)
class Trial:
    """A conv and options that the contract test tries a block on; the size is that of its input."""

    spec: ConvSpec
    options: BlockOptions
    size: tuple[int, int] = (9, 8)
    with_norm: bool = False  # the conv comes with the norm that follows it


@dataclass(frozen=True, slots=True)
class Wanted(Generic[Opts]):
    """The block and options that a recipe gives to one conv."""

    block: type[Block[Opts]]
    options: Opts


@dataclass(slots=True)
class Together(Generic[Opts]):
    """What a planner says of the convs that it was given: the options of each, or why it stays as it is."""

    options: dict[str, Opts] = field(default_factory=dict)
    skips: dict[str, str] = field(default_factory=dict)


class Operator(Stored, nn.Module):
    """One step of a graph: tracing does not look into it."""

    spec: ConvSpec  # of the conv that it replaces
    permuted_as: str = ""  # a hash of how the channels of its network were permuted; empty where they were not

    def __prepare_scriptable__(self) -> nn.Module:
        """Answer torch.jit.script, which asks this first; a block of another distribution may well be for it."""
        if type(self).__module__ == "surgeon.nn":
            raise unscriptable(self)
        return self

    def role(self) -> Role:
        """Say what its tensors mean beyond their names and shapes, where they have the same ones in another role.

        A state dict holds it beside the tensors, in the metadata that torch keeps of every module, and a block in
        another role refuses it. Weights without it, such as those of the network that was converted, are loaded.
        The fields are part of the format of files: what they are called, and what they mean, stays.
        """
        return {}

    def branch_kernels(self) -> Sequence[BranchKernel]:
        """Give the kernels that its kernel is the sum of, as it is in eval mode; none where it has no such branches."""
        return ()

    def _role(self) -> Role:
        return self.role() | ({_ORDER: self.permuted_as} if self.permuted_as else {})

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (role := self._role()) and hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[_ROLE] = role

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        noted, own = local_metadata.get(_ROLE), self._role()
        stored = noted or {}
        if self.permuted_as and noted != {} and _ORDER not in stored:
            error_msgs.append(
                f"{prefix[:-1] or 'the block'}: channels of this network were permuted, and these weights do not say "
                "that theirs are. Those of the network that was converted: load surgeon.reordered(state, model). Those "
                "of this one, which a file without metadata gave: surgeon.reordered(state, model, is_done=True)"
            )
            return
        if apart := [name for name in own if name in stored and stored[name] != own[name]]:
            theirs, ours = (", ".join(f"{name} {one[name]}" for name in apart) for one in (stored, own))
            error_msgs.append(
                f"{prefix[:-1] or 'the block'}: these weights are for {theirs}, and here it is {ours}; convert the "
                "network with the plan that theirs was converted with (surgeon.history(model)[0].plan, or plan.yaml)"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state.get("spec"), ConvSpec):
            raise ValueError(f"{type(self).__name__} has a spec that is not a ConvSpec")
        if not isinstance(state.get("permuted_as", ""), str):
            raise ValueError(f"{type(self).__name__} has a permuted_as that is not a word")
        super().__setstate__(state)


def without_roles(state: dict[str, Any]) -> dict[str, Any]:
    """Give a state dict that blocks of any role load; what modules of other classes note beside theirs is kept."""
    made, noted = OrderedDict(state), getattr(state, "_metadata", {})
    without = {path: notes | ({_ROLE: {}} if _ROLE in notes else {}) for path, notes in noted.items()}
    vars(made)["_metadata"] = without
    return made


def with_orders(state: Mapping[str, Any], orders: Mapping[str, str]) -> OrderedDict[str, Any]:
    """Give a state dict that says how the channels of blocks were permuted, by path; '' says that they were not."""
    made, noted = OrderedDict(state), {path: dict(notes) for path, notes in getattr(state, "_metadata", {}).items()}
    for path, order in orders.items():
        notes = noted.setdefault(path, {})
        role = {name: said for name, said in notes.get(_ROLE, {}).items() if name != _ORDER}
        notes[_ROLE] = role | ({_ORDER: order} if order else {})
    vars(made)["_metadata"] = noted
    return made


def ordered_as(state: Mapping[str, Any]) -> set[str]:
    """Say how the channels of the blocks that a state dict belongs to were permuted, as far as it says so."""
    notes = getattr(state, "_metadata", {}).values()
    return {str(note[_ROLE][_ORDER]) for note in notes if _ORDER in note.get(_ROLE, {})}


class Block(Operator, abc.ABC, Generic[Opts]):
    """A module that stands where an `nn.Conv2d` stood: it takes the same input and gives the same output shape.

    Most blocks are planned conv by conv. A block whose convs depend on each other gives `planner`, the name of a
    function `planner(survey, wanted)`, as `package.module:function`. It is called once for a network, with the `Wanted`
    of every conv that a recipe gives to blocks of this planner, by path, and returns a `Together`. It is named, not
    imported, because a planner looks at a whole network, which blocks know nothing about.
    """

    name: ClassVar[str]  # as recipes write it
    title: ClassVar[str]  # one line for `surgeon blocks`
    paper: ClassVar[str]
    Options: ClassVar[type[BlockOptions]]
    planner: ClassVar[str | None] = None
    gives_norm_back: ClassVar[bool] = False  # it folds into a conv and a norm as well: `Foldable.fold_keeping_norm`
    is_cheaper: ClassVar[bool] = False  # whether it is meant to save multiply-adds
    pads_its_input: ClassVar[bool] = False  # True: it pads as `ConvSpec.pads_input` says, so such convs are not refused

    @classmethod
    @abc.abstractmethod
    def refusal(cls, spec: ConvSpec, size: tuple[int, int] | None, options: Opts) -> str | None:
        """Say why this block cannot replace such a conv, or None if it can. `size` is the input's, where known."""

    @classmethod
    @abc.abstractmethod
    def keeps_function(cls, options: Opts) -> bool:
        """Whether the block, in eval mode, computes what the conv it replaces computed."""

    @classmethod
    def keeps_training(cls, options: Opts, *, with_norm: bool) -> bool:
        """Whether the block computes in train mode, too, what the conv computed, and the norm if it takes that over."""
        return False

    @classmethod
    def takes_norm(cls, options: Opts) -> bool:
        """Whether the block wants to take over the batch norm that follows the conv."""
        return False

    @classmethod
    def leaves_norm(cls, options: Opts) -> bool:
        """Whether it folds to a conv like the one it replaces, with a bias only where that has one.

        A norm that follows stays where it is, so the folded network has the keys of the original.
        """
        return False

    @classmethod
    def note(cls, options: Opts, norm_obstacle: str | None) -> str | None:
        """Say what the plan should add about a swap; `norm_obstacle` is why no norm is taken over, if none is."""
        return None

    @classmethod
    def settings(cls, options: Opts) -> Sequence[Opts]:
        """List the options among which a budget may choose: these, and the same with more or less of the block."""
        return (options,)

    @classmethod
    def remedy(cls, reason: str) -> str | None:
        """Say what would let more convs become this block, where `reason` keeps most of them as they are."""
        return None

    @classmethod
    def ideal_share(cls, spec: ConvSpec, options: Opts) -> float | None:
        """The share of the conv's multiply-adds that the paper counts, where that is not what is executed."""
        return None

    @classmethod
    def kept_energy(cls, weight: torch.Tensor, options: Opts) -> dict[str, float] | None:
        """What share of a trained kernel's energy each way of thinning it out keeps; None for blocks without one."""
        return None

    @classmethod
    def kept_in_words(cls, kept: Mapping[str, float], options: Opts) -> str:
        """Say in a table what `kept_energy` found."""
        return "energy kept: " + ", ".join(f"{way} {share:.0%}" for way, share in kept.items())

    @classmethod
    @abc.abstractmethod
    def from_conv(cls, conv: nn.Conv2d, options: Opts, *, norm: nn.Module | None, generator: torch.Generator) -> Self:
        """Build the block from a conv that is not refused, with its dtype, device, memory format and training flag.

        The conv's tensors may be shared, never changed. `norm` is the norm to take over, where there is one: of any
        class, but in eval mode it computes the batch norm of its tensors, which `kernels.Norm.of` reads. What is
        random is drawn from `generator`, on the CPU and in float64, so that a model gets the same numbers in any dtype
        (`base.uniform` and its like do that, and draw nothing for a conv on the meta device).
        """

    @classmethod
    @abc.abstractmethod
    def trials(cls) -> Iterator[Trial]:
        """Convs and options that the contract test tries."""

    # The class and attributes, without tensors, of the conv that it replaces, where that is not torch's own Conv2d.
    origin: nn.Conv2d | None = None

    # The attributes of a conv can be read from the block in its place, too; torch.jit.script need not compile them.
    __jit_unused_properties__ = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    )
    in_channels = property(lambda self: self.spec.c_in)
    out_channels = property(lambda self: self.spec.c_out)
    kernel_size = property(lambda self: self.spec.kernel)
    stride = property(lambda self: self.spec.stride)
    padding = property(lambda self: self.spec.padding)
    dilation = property(lambda self: self.spec.dilation)
    groups = property(lambda self: self.spec.groups)
    padding_mode = property(lambda self: self.spec.padding_mode)

    def draw_anew_(self, generator: torch.Generator) -> None:
        """Draw its numbers as if it had never been trained: kernels as `nn.Conv2d` draws them, norms as new ones.

        Kernels that one module holds are those of the same filters: all of them are drawn for what a filter sees.
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.reset_parameters()
                    continue
                own = [one for one in module.parameters(recurse=False) if one.dim() > 1]
                fan_in = sum(one[0].numel() for one in own)
                for one in own:
                    one.copy_(uniform(tuple(one.shape), fan_in, generator, like=one))

    def with_norm(self, norm: nn.Module) -> Self | None:
        """Return a block that computes what this one and the norm behind it do in eval mode, if it can be one."""
        return None


class Foldable(Block[Opts]):
    """A block that one plain conv can replace, once it is trained."""

    folds_for_free: ClassVar[bool] = True  # False: the plain conv costs more than the block

    @abc.abstractmethod
    def fold(self) -> nn.Conv2d:
        """Return the conv that computes in eval mode what this block does; the block is left as it was.

        The arithmetic is done in float64 and cast once to the block's dtype.
        """

    def fold_keeping_norm(self) -> tuple[nn.Conv2d, nn.Module] | None:
        """Return a conv without bias and a norm that compute in eval mode, one after the other, what this block does.

        A block that takes over norms gives them back here: of the class that was taken over, with tensors of its own,
        and such that training can go on with it. The block is left as it was. None: it has no norm to give back.
        """
        return None

    def unfoldable(self) -> str | None:
        """Say why the block as it is now, after whatever was done to it, cannot be folded."""
        return None

    def fuse(self) -> nn.Conv2d:
        """Fold, under the name that `timm.utils.reparameterize_model` calls."""
        return self.fold()


class Deployable(Block[Opts]):
    """A block that can be deployed in a form of several plain convs: a single one cannot replace it, or costs more.

    A history records by which rules a model was folded, so that what an earlier version left alone stays as it is.
    """

    deployed_since: ClassVar[int] = 1  # the first rules of folding that deploy it
    deployed_so_since: ClassVar[int] = 1  # the first that deploy it, and what is around it, as today's do

    @abc.abstractmethod
    def deploy(self) -> nn.Module:
        """Return that form, of the block as it is in eval mode; the block is left as it was."""

    def forms(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Name every form in which it can be deployed, all of which compute the same, and what makes each of them.

        `plain` is `deploy()`; `fuse --tune` measures them, and keeps the fastest. The names stand in histories: what
        one means stays as it is.
        """
        return {PLAIN: self.deploy}

    def form_on(self, device: str) -> str:
        """Name the form in which it is deployed on a kind of device, such as `cuda`, where nothing is measured."""
        return PLAIN

    def is_tried_on(self, form: str, device: str) -> bool:
        """Whether `fuse --tune` measures a form on a kind of device; not where it is another form in disguise."""
        return True

    def undeployable(self) -> str | None:
        """Say why this block has no such form; it is then left as it is."""
        return None


def unscriptable(block: nn.Module, why: str = "") -> CaptureError:
    """Say that torch.jit.script cannot compile a block, and what can be done instead."""
    kind = type(block).__name__
    return CaptureError(
        f"torch.jit.script cannot compile {'an' if kind[0] in 'AEIOU' else 'a'} {kind}{why}",
        todo="Use torch.jit.trace(model, example) or torch.export.",
    )


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator, *, like: torch.Tensor) -> torch.Tensor:
    """Draw a kernel as `nn.Conv2d` draws its own: uniform on ±1/√fan_in."""
    return uniform(shape, math.prod(shape[1:]), generator, like=like)


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator, *, like: torch.Tensor) -> torch.Tensor:
    """Draw uniformly on ±1/√fan_in, in float64 and on the device of `like`."""
    return _drawn(torch.rand, shape, generator, like).mul_(2).sub_(1).div_(math.sqrt(fan_in)).to(like.device)


def normal(shape: tuple[int, ...], generator: torch.Generator, *, like: torch.Tensor) -> torch.Tensor:
    """Draw normal numbers of mean 0 and deviation 1, in float64 and on the device of `like`."""
    return _drawn(torch.randn, shape, generator, like).to(like.device)


def _drawn(
    law: Callable[..., torch.Tensor], shape: tuple[int, ...], generator: torch.Generator, like: torch.Tensor
) -> torch.Tensor:
    """Draw on the CPU, so that numbers are the same for every device; for a meta tensor none are drawn."""
    if like.is_meta:
        return torch.empty(shape, dtype=torch.float64, device="meta")
    return law(shape, generator=generator, dtype=torch.float64, device="cpu")

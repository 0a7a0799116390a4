"""Norms as networks write them: what of a module normalises, and what is left of it when a block takes that over.

    module(x) = rest(norm(x)),   norm(x) = γ/σ·(x − μ) + β,   rest = the children that run behind it, channel by channel

A class is known by the full name of the class that defines its forward, so no package is imported, and a class with a
forward of its own is never taken for another. A subclass that inherits its forward is what it inherits.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from surgeon._torch_compat import BatchNorm, NormBase
from surgeon.nn import Stored, become_

TENSORS = ("weight", "bias", "running_mean", "running_var")
_BEHIND = ("drop", "act")  # what timm's norms run behind the norm, in this order
_CALLS = ("__call__", "_call_impl", "__getattr__", "__getattribute__")  # with one of its own a class may do anything


class HasRest(Stored, nn.Module):
    """A module that runs children behind something else; `then` names them, in order."""

    if TYPE_CHECKING:
        then: tuple[str, ...]
    else:
        then = ()

    def behind(self, x: Tensor) -> Tensor:
        for name in self.then:
            x = self._modules[name](x)  # type: ignore[misc] # looked up among modules, since a file may name anything
        return x

    def left(self) -> nn.Module:
        """What is left of it once what comes before those children is folded into a conv."""
        return _in_a_row(self, self.then)

    def __setstate__(self, state: Any) -> None:
        then, held = state.get("then", ()), state.get("_modules")
        if not isinstance(then, tuple) or not isinstance(held, dict) or not all(held.get(name) for name in then):
            raise ValueError(f"{type(self).__name__} lacks the modules that it runs")
        super().__setstate__(state)


class NormRest(HasRest):
    """What is left of a norm that a block has taken over: its children, under their names, and its attributes.

    `origin` is the full name of the class that it had, and `base` that of the class in the table whose forward it had.
    """

    __module__ = "surgeon.nn"

    if TYPE_CHECKING:  # torch.jit.script looks at the annotations of a class, and does not understand these
        origin: str
        base: str

    def forward(self, input: Tensor) -> Tensor:
        for module in self.children():  # as in `then`: it has no others
            input = module(input)
        return input

    def extra_repr(self) -> str:
        return f"of {self.origin}"

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state.get("origin"), str) or str(state.get("base")) not in TABLE:
            raise ValueError("NormRest does not say what it is the rest of")
        if tuple(state.get("_modules", ())) != state.get("then"):
            raise ValueError("NormRest holds other modules than it runs")
        super().__setstate__(state)


class FrozenNorm(Stored, nn.Module):
    """A batch norm whose statistics, scale and shift are buffers, in train mode too: (n, c, h, w) → the same."""

    __module__ = "surgeon.nn"

    if TYPE_CHECKING:
        eps: float
        weight: Tensor
        bias: Tensor
        running_mean: Tensor
        running_var: Tensor

    def forward(self, input: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return input * scale + shift

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(c, 1, 1) each, in the order of torchvision's arithmetic, so that the bits are the same."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale[:, None, None], (self.bias - self.running_mean * scale)[:, None, None]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


@dataclass(frozen=True, slots=True)
class Written:
    """How a class writes its norm: the class of what normalises (None: its own), and the children that run behind.

    `inside` are children that the norm itself runs, in training.
    """

    core: type[nn.Module] | None = None
    behind: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


_TORCHS = (BatchNorm, nn.SyncBatchNorm)
_OWN = Written()
_WITH_REST = {
    "norm_act.BatchNormAct2d": Written(nn.BatchNorm2d, _BEHIND),
    "norm_act.SyncBatchNormAct": Written(nn.SyncBatchNorm, _BEHIND),
    "norm_act.FrozenBatchNormAct2d": Written(FrozenNorm, _BEHIND),
    "split_batchnorm.SplitBatchNorm2d": Written(None, _BEHIND, inside=("aux_bn",)),
}
_TIMMS = ("timm.layers", "timm.models.layers")  # where they lie today, and where they lay before timm 0.9
TABLE: dict[str, Written] = {f"{home}.{name}": written for home in _TIMMS for name, written in _WITH_REST.items()} | {
    "torchvision.ops.misc.FrozenBatchNorm2d": _OWN,
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": _OWN,
    "surgeon.nn.FrozenNorm": _OWN,
    **{f"surgeon.nn.{name}": _OWN for name in ("PairNorm", "PairSyncNorm", "PairFrozenNorm")},
}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module holds what a batch norm does: it is a subclass of torch's, or has the same as buffers."""
    return isinstance(module, BatchNorm) or is_frozen(module)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is a batch norm of which nothing is trained: a class of somebody's, with buffers alone."""
    held = module._buffers
    if isinstance(module, NormBase) or not all(isinstance(held.get(name), Tensor) for name in TENSORS):
        return False
    return not (module._parameters or module._modules) or _written(type(module)) is not None


def is_known(module: nn.Module) -> bool:
    """Whether the class of a norm says all: what it computes is the batch norm of its tensors, and then its rest."""
    written = _written(type(module))
    if written is None:
        return False
    others = {name for name, child in module._modules.items() if child is not None}
    others -= {*rest_of(module), *written.inside}
    return not others and all(name in module._parameters or name in module._buffers for name in TENSORS)


def rest_of(module: nn.Module) -> tuple[str, ...]:
    """Name the children of a norm that run behind it, in order."""
    if isinstance(module, HasRest):
        return module.then
    written = _written(type(module)) or _OWN
    return tuple(name for name in written.behind if module._modules.get(name) is not None)


def leaves_rest(module: nn.Module) -> bool:
    """Whether more is left of a norm than an Identity once a block has taken it over."""
    return bool(module.then if isinstance(module, HasRest) else (_written(type(module)) or _OWN).behind)


def core_of(norm: nn.Module) -> nn.Module:
    """Give what normalises: the norm itself, or a module of its tensors alone where its class does more.

    The tensors are shared, not copied.
    """
    if not leaves_rest(norm):
        return norm
    return _without(norm, core_class_of(norm), rest_of(norm))


def core_class_of(norm: nn.Module) -> type[nn.Module]:
    """The class of what normalises in a norm whose class is known."""
    return (_written(type(norm)) or _OWN).core or type(norm)


def leave_rest_(norm: nn.Module) -> Callable[[], None]:
    """Take what normalises out of a norm, and leave the rest; it stays the object it is. Returns what undoes this."""
    rest, kind = rest_of(norm), type(norm)
    left: dict[str, Any] = {
        "_parameters": dict.fromkeys(norm._parameters),
        "_buffers": dict.fromkeys(norm._buffers),
        "_modules": {name: norm._modules[name] for name in rest},
        "_non_persistent_buffers_set": set(),
    }
    return become_(norm, NormRest, origin=_name(kind), base=_name(_definer(kind)), then=rest, **left)


def plain_rest(norm: nn.Module) -> nn.Module:
    """Give a module that does what is left of a norm once it is folded into a conv, with the same keys.

    It is torch's own, unless it takes two streams.
    """
    if not leaves_rest(norm):
        return nn.Identity()
    return norm.left() if isinstance(norm, HasRest) else _in_a_row(norm, rest_of(norm))


def restore(rest: NormRest, norm: nn.Module) -> nn.Module:
    """Put what normalises back into what was left of it: a module of the class that it had, with the tensors of `norm`.

    Neither argument is changed; tensors and children are shared. A class is imported if it is in the table. Another
    one, which inherits its forward from there, is used where it has been imported already; else the one in the table.

    Raises:
        ImportError: the class is not there.
    """
    written, ours = TABLE[rest.base], vars(norm)
    attributes = {name: value for name, value in vars(rest).items() if name not in ("origin", "base", "then")}
    made: nn.Module = nn.Module.__new__(kind := _class_of(rest))
    vars(made).update(attributes | {name: ours[name] for name in ("eps", "momentum") if name in ours})
    vars(made).update(_parameters=dict(norm._parameters), _buffers=dict(norm._buffers))
    vars(made).update(_modules=norm._modules | rest._modules, training=norm.training)
    vars(made)["_non_persistent_buffers_set"] = set(norm._non_persistent_buffers_set)
    if isinstance(made, HasRest):
        made.then = rest.then
    if written.core is FrozenNorm and not is_frozen(norm):
        raise TypeError(f"a {kind.__name__} holds buffers, and this norm is a {type(norm).__name__}")
    return made


def _in_a_row(module: nn.Module, names: tuple[str, ...]) -> nn.Sequential:
    row = nn.Sequential(OrderedDict((name, module.get_submodule(name)) for name in names))
    row.training = module.training  # and every child keeps its own mode
    return row


def _class_of(rest: NormRest) -> type[nn.Module]:
    if rest.origin not in TABLE:
        home, _, name = rest.origin.rpartition(".")
        found = getattr(sys.modules.get(home), name, None)
        if isinstance(found, type) and issubclass(found, nn.Module) and _written(found) is TABLE[rest.base]:
            return found
    home, _, name = rest.base.rpartition(".")
    known: type[nn.Module] = getattr(importlib.import_module(home), name)
    return known


def _without(norm: nn.Module, kind: type[nn.Module], rest: tuple[str, ...]) -> nn.Module:
    """Make a module of another class of the tensors of a norm, without some of its children."""
    made: nn.Module = nn.Module.__new__(kind)
    vars(made).update(
        {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(norm).items()}
    )
    made._modules = {name: child for name, child in norm._modules.items() if name not in rest}
    made._non_persistent_buffers_set = set(norm._non_persistent_buffers_set)
    if isinstance(made, HasRest):
        made.then = ()
    return made


def _written(kind: type[nn.Module]) -> Written | None:
    """How a class writes its norm; None where it does something by itself that is not in the table."""
    definers = [one for one in kind.__mro__ if "forward" in vars(one) and one is not nn.Module]
    if not definers or not all(one in _TORCHS or _name(one) in TABLE for one in definers):
        return None
    if any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _CALLS):
        return None
    if any(isinstance(getattr(kind, name, None), property) for name in (*TENSORS, "eps", "momentum", "training")):
        return None
    return TABLE.get(_name(definers[0]), _OWN)


def _definer(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a class has its forward from."""
    return next(one for one in kind.__mro__ if "forward" in vars(one))


def _name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

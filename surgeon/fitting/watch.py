"""What goes in and out of modules in one run of a network, which ends as soon as all has been seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.models.call import Inputs
from surgeon.models.sandbox import quietly

Told = Callable[[Any, Sequence[Any], Any], None]


class _EnoughError(BaseException):
    """Ends a run once all has been seen; not an Exception, which the user's code might catch."""


def watched(
    model: nn.Module, modules: Sequence[tuple[Any, nn.Module]], inputs: Inputs, tell: Told, last: int | None = None
) -> None:
    """Run a model in eval mode and tell, for each call of a module, its key, its arguments and its output.

    With `last`, the run ends after so many calls.
    """
    count = 0

    def hook(key: Any) -> Callable[..., None]:
        def note(_: nn.Module, args: Sequence[Any], out: Any) -> None:
            nonlocal count
            tell(key, args, out)
            count += 1
            if count == last:
                raise _EnoughError

        return note

    hooks = [module.register_forward_hook(hook(key)) for key, module in modules]
    try:
        with quietly(0):
            inputs.cast_for(model).call(model)
    except _EnoughError:
        pass
    finally:
        for one in hooks:
            one.remove()


def copied(value: Any) -> Any:
    """Copy all tensors in a value: what a network computes later may be written on them."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)

"""Whether the modules in a file have all that modules need: a file can hold one with half of its state."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from surgeon._torch_compat import ConvNd, NormBase
from surgeon.blocks import Operator
from surgeon.errors import ModelError
from surgeon.models import devices
from surgeon.models.copies import shadow, to_meta

_REGISTERS: dict[str, tuple[type, ...]] = {
    "_parameters": (Tensor, type(None)),
    "_buffers": (Tensor, type(None)),
    "_modules": (nn.Module, type(None)),
}
_HOOKS = (
    *("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_OF_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_OF_NORM = ("eps", "momentum", "affine", "track_running_stats", "num_features")
_DEEPEST = 100  # modules within each other


def check(model: nn.Module, origin: str) -> None:
    """Make sure that every module has its registers, convs their kernels and norms their statistics.

    Raises:
        ModelError: what is missing, and where.
    """
    for path, module in _walk(model, origin):
        if why := _of_module(module) or _of_kind(module):
            raise _refused(origin, f"{path or 'its network'} is a {type(module).__name__} {why}")
    for path, module in model.named_modules():
        if isinstance(module, Operator) and (why := _of_operator(module)):
            raise _refused(origin, f"{path or 'its network'} is a {type(module).__name__} {why}")


def _walk(model: nn.Module, origin: str) -> Iterator[tuple[str, nn.Module]]:
    """Give every module once, before those below it, so that their registers have been looked at."""
    seen, waiting = {id(model)}, [("", model, 0)]
    while waiting:
        path, module, depth = waiting.pop()
        yield path, module
        if depth > _DEEPEST:
            raise _refused(origin, f"{path.partition('.')[0]} holds modules in more than {_DEEPEST} levels")
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append((f"{path}.{name}" if path else name, child, depth + 1))
    if cycle := _cycle(model):
        raise _refused(origin, f"a {type(cycle).__name__} holds itself")


def _cycle(model: nn.Module) -> nn.Module | None:
    """Find a module that is below itself."""
    done: set[int] = set()
    trail = [(model, iter(model._modules.values()))]
    is_open = {id(model)}
    while trail:
        module, children = trail[-1]
        child = next((one for one in children if one is not None and id(one) not in done), None)
        if child is None:
            trail.pop()
            is_open.discard(id(module))
            done.add(id(module))
        elif id(child) in is_open:
            return child
        else:
            is_open.add(id(child))
            trail.append((child, iter(child._modules.values())))
    return None


def _of_module(module: nn.Module) -> str | None:
    """Say what is wrong with what every module has."""
    state = vars(module)
    for register, kinds in _REGISTERS.items():
        held = state.get(register)
        if not isinstance(held, dict):
            return f"without {register}"
        for name, value in held.items():
            if not isinstance(name, str) or not isinstance(value, kinds):
                return f"whose {register} hold a {type(value).__name__} under {name!r}"
    if not isinstance(state.get("training"), bool):
        return "that does not say whether it is in training"
    if not isinstance(state.get("_non_persistent_buffers_set"), set):
        return "without _non_persistent_buffers_set"
    return next((f"without {name}" for name in _HOOKS if not isinstance(state.get(name), Mapping)), None)


def _of_kind(module: nn.Module) -> str | None:
    """Say what a conv or a norm of torch lacks of what surgeon reads from it."""
    if isinstance(module, ConvNd):
        missing = [name for name in _OF_CONV if not hasattr(module, name)]
        missing += [f"a {name} of whole numbers" for name in _OF_CONV[:-1] if not _is_whole(getattr(module, name, 1))]
        if not isinstance(getattr(module, "padding_mode", ""), str):
            missing.append("a padding_mode that is text")
        if not isinstance(getattr(module, "weight", None), Tensor) or not hasattr(module, "bias"):
            missing.append("weight and bias")
    elif isinstance(module, NormBase):
        missing = [name for name in _OF_NORM if not hasattr(module, name)]
        missing += [f"a number as its {name}" for name in ("eps", "num_features") if not _is_number(module, name)]
        missing += [name for name in ("weight", "bias", "running_mean", "running_var") if not hasattr(module, name)]
    else:
        return None
    if missing:
        return f"without {missing[0]}"
    try:
        module.extra_repr()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever it holds in place of numbers
        return f"that cannot be described: {error}"
    return None


def _is_whole(value: object) -> bool:
    """Whether something is a whole number or a tuple of one for each axis, or a padding by name."""
    if isinstance(value, tuple | list) and 1 <= len(value) <= 3:
        return all(type(one) is int for one in value)
    return type(value) is int or value in ("same", "valid")


def _is_number(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, 0), int | float)


def _of_operator(block: Operator) -> str | None:
    """Say why a block does not compute what its spec says; it is run once, without numbers."""
    declared = [inspect.get_annotations(one) for one in type(block).__mro__ if issubclass(one, Operator)]
    names = [name for names in declared for name, kind in names.items() if not str(kind).startswith("ClassVar")]
    if missing := [name for name in names if not hasattr(block, name)]:
        return f"without {missing[0]}"
    if not type(block).__module__.startswith("surgeon."):
        return None  # another distribution's block answers for itself
    spec = block.spec
    try:
        of_kernel = [dilation * (kernel - 1) for kernel, dilation in zip(spec.kernel, spec.dilation, strict=True)]
        sides = [side + 2 * sum(spec.pads) + 16 for side in of_kernel]
        with torch.no_grad():
            made = shadow(block, to_meta)(
                torch.empty(1, spec.c_in, *sides, dtype=devices.dtype_of(block), device="meta")
            )
    except Exception as error:  # whatever its parts are in place of what they should be
        return f"that cannot be run: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None if made.shape[1] == spec.c_out else f"that makes {made.shape[1]} channels in place of {spec.c_out}"


def _refused(origin: str, why: str) -> ModelError:
    return ModelError(
        f"{origin} holds half a network: {why}", todo="Save it anew, or save its state_dict and use --arch."
    )

"""The private names of torch that surgeon uses: each with what it is for, and what is done where it is missing.

No other file of surgeon names one (tests/test_public.py). What a module keeps its parts in (`_parameters`, `_buffers`,
`_modules`, and the dicts of its hooks) is not listed: every pickled model holds these names, so torch has to keep them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import fx, nn

# Arguments and results of any nesting, taken apart into leaves and put together again. There is nothing public like it,
# and torch.fx itself is built on it: where it is missing, surgeon cannot be imported.
from torch.utils import _pytree as pytree

# Sees every operation that a run comes down to, for counting what it costs. There is nothing public like it, and
# torch's own FlopCounterMode is one: where it is missing, surgeon cannot be imported.
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "ASSERTIONS",
    "ASSERT_IS_NONE",
    "BatchNorm",
    "ConvNd",
    "NormBase",
    "OpOverload",
    "TorchDispatchMode",
    "add_conv_",
    "has_dispatch_modes",
    "has_hooks_on_all_modules",
    "has_recompile_limit",
    "is_transformed",
    "makes_new_tensors",
    "own_parts_of_a_conv",
    "packet_of",
    "pickle_program",
    "pytree",
    "reads_weights_only",
    "saved_tensor_hooks",
    "sizes",
]

# The common classes of torch's batch norms; of these and the instance norms; and of its convs. Their public subclasses
# have them for bases, whatever they are called.
if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
else:
    BatchNorm, NormBase = nn.BatchNorm2d.__mro__[1:3]
    ConvNd = nn.Conv2d.__mro__[1]

# What the steps of an exported graph call. It is the class of any operator.
if TYPE_CHECKING:
    from torch._ops import OpOverload
else:
    OpOverload = type(torch.ops.aten.add.Tensor)

# What tracing puts into a graph to guard the arguments that it was given. Where one is missing, no graph holds it.
ASSERT_IS_NONE: Callable[..., Any] | None = getattr(getattr(fx, "_symbolic_trace", None), "_assert_is_none", None)
ASSERTIONS: tuple[Callable[..., Any], ...] = tuple(
    one for one in (getattr(torch, "_assert", None), ASSERT_IS_NONE) if one is not None
)


def saved_tensor_hooks() -> Any:
    """The hooks on tensors that are saved for the backward pass: they show a checkpoint, which nothing public does.

    Where torch does not tell, checkpoints in a forward are not noticed.
    """
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(True)
    except (AttributeError, TypeError):
        return None


def own_parts_of_a_conv(kind: type[nn.Conv2d]) -> list[str]:
    """List the methods that decide what a conv computes and stores, and that a subclass replaces.

    Where torch has no method of such a name, no subclass can replace it.
    """
    names = ("forward", "__call__", "_conv_forward", "_call_impl", "_load_from_state_dict", "_save_to_state_dict")
    return [name for name in names if getattr(kind, name, None) is not getattr(nn.Conv2d, name, None)]


def makes_new_tensors(operator: Any) -> bool:
    """Whether an operator returns new tensors, neither changed in place nor views of others.

    Only its schema tells. An operator without one is not torch's, and counts as returning new tensors.
    """
    schema = getattr(operator, "_schema", None)
    return schema is None or all(returned.alias_info is None for returned in schema.returns)


def add_conv_(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    padding: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> bool:
    """Add what a conv gives to `y`, while it is computed, and say whether that was possible.

    oneDNN does that on the CPU, in float32 and channels_last; torch has no public function for it. Where somebody
    watches or replaces operators (a counter of costs, torch.func, a trace), they are to see the conv that they know.
    """
    given = [t for t in (y, x, weight, bias) if t is not None]
    operator = getattr(getattr(torch.ops.mkldnn, "_convolution_pointwise_", None), "binary", None)
    if operator is None or has_dispatch_modes():
        return False
    if not (torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    plain = (torch.Tensor, nn.Parameter)
    if any(type(t) not in plain or t.dtype != torch.float32 or t.device.type != "cpu" for t in given):
        return False
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y)):
        return False
    operator(
        *(y, x, weight, bias, list(padding), list(stride), list(dilation), groups, "add", 1.0, None, [], ""),
    )
    return True


def has_dispatch_modes() -> bool:
    """Whether somebody watches or replaces operators, or a transform is at work; also where torch does not tell."""
    modes = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", None)
    functorch = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return modes is None or functorch is None or bool(modes()) or functorch() is not None


def packet_of(operator: Any) -> Any:
    """Give the operator that an overload belongs to, under which the formulas of its cost are listed.

    An overload that belongs to none costs nothing, as in torch's own counter.
    """
    return getattr(operator, "_overloadpacket", None)


def has_hooks_on_all_modules() -> bool:
    """Whether a hook is attached to the calls of all modules there are; also where torch does not let that be seen."""
    asked = getattr(torch.nn.modules.module, "_has_any_global_hook", None)
    return asked is None or bool(asked())


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode autograd is at work; also where torch does not tell."""
    asked = getattr(torch._C, "_are_functorch_transforms_active", None)
    level: int = getattr(torch.autograd.forward_ad, "_current_level", 0)
    return asked is None or level >= 0 or bool(asked())


def has_recompile_limit(limit: int) -> contextlib.AbstractContextManager[None]:
    """Let torch.compile compile one forward up to `limit` times; where it has no such limit, nothing is done."""
    config = getattr(getattr(torch, "_dynamo", None), "config", None)
    if config is None or not hasattr(config, "recompile_limit"):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[None] = config.patch(recompile_limit=limit)
    return patched


def pickle_program(file: IO[bytes]) -> bytes:
    """Read the pickle in a file of torch.save as torch.load will read it: another reader may find another one.

    Where torch does not let its reader be used, such a file cannot be examined, and must not be opened.
    """
    reader = getattr(torch._C, "PyTorchFileReader", None)
    if reader is None:
        raise NotImplementedError("this version of torch does not let a file be examined before it is opened")
    program: bytes = reader(file).get_record("data.pkl")
    return program


def sizes(x: torch.Tensor) -> tuple[int, ...]:
    """Give the sizes of a tensor as numbers, also while torch.jit.trace runs, to which they are tensors.

    Where torch does not let a trace be paused, they are tensors then, and the trace warns that it takes them as fixed.
    """
    pause = getattr(torch._C, "_set_tracing_state", None)
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if torch.compiler.is_compiling() or not is_traced or pause is None:
        return x.shape
    state = torch._C._get_tracing_state()
    pause(None)
    try:
        return tuple(x.shape)
    finally:
        pause(state)


def reads_weights_only() -> bool:
    """Whether torch's weights-only reader is at work further up the stack; also where torch does not let that be seen.

    Such a reader makes what it was told to, and nothing that a file merely names.
    """
    reader = getattr(torch, "_weights_only_unpickler", None)
    if reader is None:
        return True
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals is not vars(reader):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None

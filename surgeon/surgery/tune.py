"""Which form of each block is fastest, on a device and with an input that are at hand.

A block can be deployed in several forms that compute the same (`Deployable.forms`). Which one is fastest depends on the
device, on sizes, on the batch, on the memory format and on the dtype, so it is measured: the network with all blocks in
their plain forms is run once, and what each block is called with is noted; then the forms of a block take turns, beside
a conv like the one that the block stands for. Another form than the plain one is kept only if it is faster by more than
noise, in these rounds and in new ones; and all of them only if the whole network is not slower.

Blocks that are alike, and are called alike, are measured once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.analysis.example import PASS_ONE
from surgeon.blocks import Deployable, contract
from surgeon.blocks.base import PLAIN
from surgeon.conv.spec import is_channels_last
from surgeon.errors import CaptureError
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, shadow, where
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import quietly
from surgeon.surgery import clocks, turns
from surgeon.surgery.clocks import Call, Clock
from surgeon.surgery.give_back import Paths
from surgeon.surgery.precision import cast_
from surgeon.surgery.tuned import NOISE, Tuned, TunedBlock
from surgeon.surgery.turns import Runner

_ROUNDS = 9
_AT_LEAST = 0.01  # seconds that one measurement of a form takes
_ELSEWHERE = "Give another --input, or tune on another --device."
_ORIGINAL = ""  # no form has that name


@dataclass(frozen=True, slots=True)
class Tuning:
    """Where forms are measured: on a device (None: where the network lies), and in which memory format."""

    device: torch.device | None = None
    channels_last: bool = False
    clock_of: Callable[[torch.device], Clock] = clocks.of
    rounds: int = _ROUNDS


def tuning_on(device: str | torch.device | None) -> Tuning:
    """Measure on this device, or where the network lies.

    Raises:
        ModelError: there is no such device here.
    """
    return Tuning(devices.named(device) if isinstance(device, str) else device)


@dataclass(frozen=True, slots=True)
class _Given:
    """What a block is called with: a tensor like it can be made again."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_channels_last: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Given:
        return cls(tuple(tensor.shape), tensor.dtype, is_channels_last(tensor))

    def make(self, place: torch.device) -> Tensor:
        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype, device=place)
        made = torch.randn(self.shape, device=place).to(self.dtype)
        return made.contiguous(memory_format=torch.channels_last) if self.is_channels_last else made


def tune(
    folded: Callable[[Mapping[str, str]], nn.Module],
    blocks: Mapping[Paths, Deployable[Any]],
    inputs: Inputs | None,
    dtype: torch.dtype | None,
    tuning: Tuning,
    progress: Progress = silent,
) -> Tuned:
    """Choose a form for each block; `folded` makes the deployed network with the forms that it is given, by name.

    `dtype` is what the network is cast to in the end.

    Raises:
        CaptureError: no input is known, or the deployed network does not run there.
    """
    if inputs is None:
        raise CaptureError("no input is known to tune the network with", todo=PASS_ONE)
    progress("running the deployed network", 0)
    plain = _placed(folded({}), tuning)
    place = devices.of(plain) or devices.CPU
    clock, given = tuning.clock_of(place), _fitting(inputs, plain, tuning)
    calls = _observed(plain, [paths[0] for paths in blocks], given)
    made: dict[str, TunedBlock] = {}
    chosen: list[TunedBlock] = []
    step = parts(progress, 0.1, 0.8)
    for i, (paths, block) in enumerate(blocks.items()):
        step(f"timing the forms of {paths[0]}", i / len(blocks))
        if (called := calls.get(paths[0])) is not None:
            key = f"{block!r} {called} {_kind(plain.get_submodule(paths[0]))}"
            if key not in made:
                made[key] = _measured(paths[0], block, called, dtype, tuning, clock)
            chosen.append(replace(made[key], path=paths[0]))
    facts = (str(clock.name), torch.get_num_threads(), given.text, tuning.channels_last)
    tuned = Tuned(tuple(chosen), *facts, str(devices.dtype_of(plain)).removeprefix("torch."))
    if not tuned.forms:
        return tuned
    progress("timing the whole network", 0.8)
    other = _placed(folded(tuned.forms), tuning)
    low, ratio, _ = _in_turns([_pass(one, given) for one in (plain, other)], clock, tuning)
    return Tuned(tuned.blocks, *facts, tuned.dtype, ratio, is_undone=low > 1)


@dataclass(frozen=True, slots=True)
class _Called:
    leaves: list[Any]  # with a _Given for every tensor
    structure: Any

    def make(self, place: torch.device) -> Inputs:
        leaves = [leaf.make(place) if isinstance(leaf, _Given) else leaf for leaf in self.leaves]
        return Inputs(*pytree.tree_unflatten(leaves, self.structure))


def _observed(model: nn.Module, paths: Sequence[str], inputs: Inputs) -> dict[str, _Called]:
    """Run a network once, and note what the modules at these paths are first called with."""
    found: dict[str, _Called] = {}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        given = [_Given.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found.setdefault(path, _Called(given, structure))

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(functools.partial(note, path), with_kwargs=True)
        for path in paths
    ]
    try:
        with quietly(0):
            inputs.call(model)
    except Exception as error:
        raise CaptureError(
            f"the deployed network does not run on {devices.of(model)}: {where(error)}",
            todo=_ELSEWHERE,
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _measured(
    path: str, block: Deployable[Any], called: _Called, dtype: torch.dtype | None, tuning: Tuning, clock: Clock
) -> TunedBlock:
    """Time all forms of a block, and a conv like the one that it stands for, and choose."""
    tried = {n: make for n, make in contract.forms(block).items() if block.is_tried_on(n, clock.place.type)}
    forms = {name: _ready(make(), dtype, tuning) for name, make in tried.items()}
    calls = {name: _pass(form, called.make(clock.place)) for name, form in forms.items()}
    if (original := _original(block, forms[PLAIN], called.make(clock.place))) is not None:
        calls[_ORIGINAL] = original
    try:
        runners = {name: Runner.settled(call, clock, at_least=_AT_LEAST) for name, call in calls.items()}
        kept = _fastest(runners, tuning.rounds)
    except Exception as error:  # memory that is missing, or a kernel that the device does not have
        raise CaptureError(f"{path} does not run alone on {clock.name}: {where(error)}", todo=_ELSEWHERE) from error
    seconds = {name: turns.quartiles(one.seconds)[1] for name, one in runners.items()}
    _, ratio, _ = turns.ratio(runners[kept], runners[PLAIN])
    made = TunedBlock(path, block.name, kept, seconds, ratio)
    if original is None:
        return made
    low, to_original, _ = turns.ratio(runners[kept], runners[_ORIGINAL])
    form = forms[kept]
    is_original = type(form) is nn.Conv2d and tuple(form.weight.shape) == block.spec.weight_shape
    return replace(
        made,
        original=seconds.pop(_ORIGINAL),
        to_original=to_original,
        is_slower=low > 1 and to_original > 1 + NOISE and not is_original,
        is_original=is_original,
    )


def _fastest(runners: Mapping[str, Runner], rounds: int) -> str:
    """Let all take turns, and give the form that is faster than the plain one: it has to win in new rounds as well."""
    plain = runners[PLAIN]
    turns.take_(list(runners.values()), rounds)
    best = min((name for name in runners if name != _ORIGINAL), key=lambda name: turns.ratio(runners[name], plain)[1])
    if best == PLAIN or not _wins(runners[best], plain):
        return PLAIN
    for one in runners.values():
        one.seconds.clear()
    turns.take_(list(runners.values()), rounds)
    return best if _wins(runners[best], plain) else PLAIN


def _wins(one: Runner, plain: Runner) -> bool:
    """Whether a form is faster than the plain one by more than noise."""
    _, ratio, high = turns.ratio(one, plain)
    return high < 1 and ratio < 1 - NOISE


def _original(block: Deployable[Any], plain: nn.Module, given: Inputs) -> Call | None:
    """Give the call of a conv such as the one that a block stands for, where its input can be told from the block's."""
    like, tensors = next(plain.parameters(), None), given.tensors
    if like is None or not tensors or tensors[0].dim() != 4:
        return None
    whole = tensors[0]
    if whole.shape[1] != block.spec.c_in:  # two streams: the high one has the size of the map
        as_seen = replace(_Given.of(whole), shape=(whole.shape[0], block.spec.c_in, *whole.shape[2:]))
        whole = as_seen.make(whole.device)
    conv = in_mode(block.spec.build(like=like), False)
    for tensor in conv.parameters():
        nn.init.normal_(tensor, std=0.01)
    return _pass(conv, Inputs((whole,)))


def _in_turns(calls: Sequence[Call], clock: Clock, tuning: Tuning) -> tuple[float, float, float]:
    """Time two calls, and give the quartiles of the ratio of the second to the first."""
    first, second = (Runner.settled(call, clock) for call in calls)
    turns.take_([first, second], tuning.rounds)
    return turns.ratio(second, first)


def _kind(module: nn.Module) -> str:
    """Say what decides how long a module takes: its parts, and the dtypes, shapes and formats of its tensors."""
    return f"{module!r} {[(name, _Given.of(tensor)) for name, tensor in module.state_dict().items()]}"


def _placed(model: nn.Module, tuning: Tuning) -> nn.Module:
    """Copy a network to where forms are measured, in eval mode; tensors that lie there as they should are shared."""

    def there(tensor: Tensor) -> Tensor:
        tensor = tensor if tuning.device is None else tensor.to(tuning.device)
        return _in_format(tensor) if tuning.channels_last else tensor

    return in_mode(shadow(model, there), False)


def _in_format(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _ready(form: nn.Module, dtype: torch.dtype | None, tuning: Tuning) -> nn.Module:
    if dtype is not None:
        cast_(form, dtype)
    return _placed(form, tuning)


def _fitting(inputs: Inputs, model: nn.Module, tuning: Tuning) -> Inputs:
    given = inputs.cast_for(model)
    return given.map(_in_format) if tuning.channels_last else given


def _pass(model: nn.Module, given: Inputs) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return given.call(model)

    return call

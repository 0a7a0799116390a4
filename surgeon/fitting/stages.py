"""The feature maps at which a converted network is compared with its original while it is trained.

A stage is the last feature map before the resolution changes that both networks make in the same call of the same
module. Where the converted network has two streams there,

    loss = (‖h − x_high‖² + 4·‖l − pool(x_low)‖²) / (‖x_high‖² + 4·‖pool(x_low)‖²)

which counts every pixel of the low stream as the four that it stands for; elsewhere ‖y − x‖² / ‖x‖².
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgeon.blocks.pairs import OfPairs
from surgeon.blocks.two_streams import TwoStreams
from surgeon.conv import streams
from surgeon.conv.streams import Ranges
from surgeon.models.call import Inputs
from surgeon.proof.distance import tensors

_FEW = 2  # images with which stages are looked for, since every feature map is kept

Call = tuple[str, int]  # a module's path, and which of its calls


@dataclass(frozen=True, slots=True)
class Stage:
    """One feature map: whose result it is in the original, and which calls give it in the converted network.

    There are two of those where streams run through a module that takes one map at a time, the high one first.
    """

    before: Call
    after: tuple[Call, ...]
    low: Ranges  # the channels that are low there, if any

    @property
    def path(self) -> str:
        return self.before[0]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One call of a module, and the map or maps that it gave."""

    call: Call
    maps: tuple[Tensor, ...]

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.maps[0].shape[2:])


def find(converted: nn.Module, original: nn.Module, inputs: Inputs) -> list[Stage]:
    """Look for the stages of two networks, which run a few images; both are in eval mode."""
    few = inputs.batched(min(_FEW, inputs.batch))
    seen_a, out_a, _ = _run(original, few)
    seen_b, _, lows = _run(converted, few)
    later = defaultdict(list)
    for one in seen_b:
        later[one.call[0]].append(one)
    given = {id(t) for t in tensors(out_a)}
    inner = [seen for seen in seen_a if id(seen.maps[0]) not in given]
    stages = ((seen.size, _matched(seen, later[seen.call[0]], lows)) for seen in inner)
    known = [(size, stage) for size, stage in stages if stage is not None]
    following = [size for size, _ in known[1:]]
    return [stage for (size, stage), after in zip(known, [*following, None], strict=False) if size != after]


class Watch:
    """What some calls of modules gave in a run. Copies are kept, since what comes next may write into a result."""

    def __init__(self, wants: Callable[[Call], bool], *, copies: bool = True) -> None:
        self.wants, self.copies = wants, copies
        self.found: dict[Call, tuple[Tensor, ...]] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def clear(self) -> None:
        """Forget a run, before the next one."""
        self.found.clear()
        self.counts.clear()

    def keep(self, path: str, out: Any) -> None:
        call, self.counts[path] = (path, self.counts[path]), self.counts[path] + 1
        if self.wants(call) and (maps := _maps(out)):
            self.found[call] = tuple(one.clone() for one in maps) if self.copies else maps


def watch(model: nn.Module, calls: Iterable[Call]) -> contextlib.AbstractContextManager[Watch]:
    """Watch some calls of a model's modules until the context ends."""
    wanted = set(calls)
    return _watching(model, {path for path, _ in wanted}, Watch(lambda call: call in wanted))


def loss(stage: Stage, before: Watch, after: Watch) -> Tensor:
    """Say how far the converted network's map is from the original's, relative to its size."""
    target = before.found[stage.before][0]
    given = [map_ for call in stage.after for map_ in after.found[call]]
    if not stage.low:
        return _square(given[0] - target) / _floor(_square(target))
    high, rest = streams.part(target, stage.low)
    assert rest is not None
    low = streams.pool(rest)
    apart = _square(given[0] - high) + 4 * _square(given[1] - low)
    return apart / _floor(_square(high) + 4 * _square(low))


def _square(x: Tensor) -> Tensor:
    return x.square().sum()


def _floor(size: Tensor) -> Tensor:
    """Keep a map that is nothing but zeros from dividing by zero."""
    return size.clamp_min(1e-12)


def _matched(seen: _Seen, there: list[_Seen], lows: dict[int, Ranges]) -> Stage | None:
    """Take the next call of the converted network's module that gives such a map, or the next two with its streams."""
    if len(seen.maps) != 1:
        return None
    wanted = seen.maps[0]
    while there:
        one = there.pop(0)
        if len(one.maps) == 1 and one.maps[0].shape == wanted.shape:
            return Stage(seen.call, (one.call,), ())
        both = [one] if len(one.maps) == 2 else [one, *there[:1]]
        maps = [map_ for single in both for map_ in single.maps]
        if len(maps) == 2 and (low := lows.get(id(maps[1]))) and _shapes_of(wanted, low) == [m.shape for m in maps]:
            del there[: len(both) - 1]
            return Stage(seen.call, tuple(single.call for single in both), low)
    return None


def _shapes_of(x: Tensor, low: Ranges) -> list[Any]:
    """Give the shapes of the two streams of a map."""
    if streams.count(low) >= x.shape[1] or low[-1][1] > x.shape[1]:
        return []
    return [part.shape for part in streams.split(x, low)]


def _run(model: nn.Module, inputs: Inputs) -> tuple[list[_Seen], Any, dict[int, Ranges]]:
    """Run a network and keep all feature maps in the order in which they were made; say which of them are low."""
    lows: dict[int, Ranges] = {}
    kept: list[Any] = []  # so that no two tensors have one id

    def note(pair: Any, low: Ranges) -> None:
        if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) and low:
            lows[id(pair[1])] = low
            kept.append(pair)

    def noted(module: nn.Module, args: Any, out: Any) -> None:
        given = args[0] if args else None
        if isinstance(module, TwoStreams):
            note(given, module.low_in)
            note(out, module.low_out)
        elif isinstance(module, OfPairs):
            note(given, module.low)
            note(out, module.low)

    handles = [m.register_forward_hook(noted) for m in model.modules() if isinstance(m, TwoStreams | OfPairs)]
    try:
        paths = {path for path, _ in model.named_modules() if path}
        with _watching(model, paths, Watch(lambda call: True, copies=False)) as seen:
            out = inputs.cast_for(model).call(model)
    finally:
        for handle in handles:
            handle.remove()
    return [_Seen(call, maps) for call, maps in seen.found.items()], out, lows


def _maps(out: Any) -> tuple[Tensor, ...]:
    """Give the feature map (n, c, h, w) that a module returns, or both streams of one; nothing for other results."""
    parts: Sequence[Any] = out if isinstance(out, tuple) else (out,)
    are_maps = all(isinstance(one, Tensor) and one.dim() == 4 and one.is_floating_point() for one in parts)
    return tuple(parts) if are_maps and 0 < len(parts) <= 2 else ()


@contextlib.contextmanager
def _watching(model: nn.Module, paths: set[str], seen: Watch) -> Iterator[Watch]:
    names: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        if path in paths:
            names.setdefault(module, path)
    with contextlib.ExitStack() as stack:
        for module, path in names.items():
            hook = module.register_forward_hook(lambda _, args, out, path=path: seen.keep(path, out))
            stack.callback(hook.remove)
        yield seen

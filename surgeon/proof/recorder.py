"""What goes in and out of the modules of A in a run, and what B makes of it: alone, in its own run, or step by step.

Modules are compared in stretches: one module, and whatever of its neighbours one of the two models has merged into it.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.errors import VerifyError
from surgeon.models.sandbox import quietly
from surgeon.proof import kept
from surgeon.proof.distance import apart, as_double
from surgeon.proof.pairing import Pairing


@dataclass(slots=True)
class Recording:
    """What was recorded of one call of a module in A: its arguments, and its result."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def read(self) -> Recording:
        """Give it with what lies in a file in memory."""
        return Recording(*kept.read((self.args, self.kwargs, self.out)))


@dataclass(slots=True)
class Stretch:
    """Modules that are compared as one, called one after the other: a conv, and the norm that B has folded into it.

    `path` names it. `steps` are all of them, by A's names; each model runs those that it has, and calls.
    """

    path: str
    steps: list[str]
    in_a: list[str]
    in_b: list[str]
    is_idle: bool = False  # B has nothing but an Identity there, and does not call it


class Recorder:
    """Records A's modules in a run, and runs B's on what they were given."""

    def __init__(self, a: nn.Module, b: nn.Module, pairing: Pairing) -> None:
        self.pairing, self.a, self.b = pairing, a, b
        self.names_a = {path for path, _ in a.named_modules()}
        self.names_b = {path for path, _ in b.named_modules(remove_duplicate=False)}
        self.trail = _Trail()
        self.recordings: dict[str, list[Recording]] = {}
        self.stretches: dict[str, Stretch] = {}
        self.propagated: dict[str, list[float]] = defaultdict(list)
        self.stopped_in: str | None = None  # the stretch of B that raised
        self.first_other: str | None = None  # the first stretch of B whose result has another shape than A's

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the arguments and results of A's modules while it runs."""
        paths = [path for path in (*self.pairing.paths, *self.pairing.moved) if path in self.names_a]
        trail, copies = _Trail(), kept.Copies()
        self.trail = trail

        def keep(path: str, given: tuple[Any, Any], out: Any) -> None:
            self.recordings.setdefault(path, []).append(Recording(*given, copies.of(out)))

        with _watched(self.a, paths, trail, keep, copies.of):
            yield
        self._divide(trail)

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Measure how far B's stretches are from A's while it runs."""
        steps = {step: stretch.path for stretch in self.stretches.values() for step in stretch.in_b}
        ends = {stretch.in_b[-1]: stretch.path for stretch in self.stretches.values()}
        only_b = self.pairing.only_b
        trail = _Trail()

        def compare(path: str, given: tuple[Any, Any], out: Any) -> None:
            name = steps.get(path)
            if name is None:
                return
            expected, done = self._ends(self.stretches[name]), self.propagated[name]
            if path != self.stretches[name].in_b[0] and done:
                done.pop()  # of the step before, which was not the last one
            if len(done) >= len(expected):
                done.append(math.inf)
                return
            end = kept.read(expected[len(done)])
            if _shapes(out) != _shapes(end):
                self.first_other = self.first_other or name
            done.append(far_apart(out, end))

        try:
            with _watched(self.b, [*steps, *only_b], trail, compare):
                yield
        except VerifyError:
            self.stopped_in = steps.get(trail.open[-1]) if trail.open else None
            raise
        for stretch in self.stretches.values():  # a graph need not call what does nothing
            idle = [step for step in stretch.in_b if step not in trail.order and self._does_nothing(step)]
            stretch.in_b = [step for step in stretch.in_b if step not in idle] or stretch.in_b
            stretch.is_idle = set(stretch.in_b) <= set(idle)
        for path in only_b:
            if (owner := ends.get(trail.source(path) or "")) is not None:
                stretch = self.stretches[owner]
                stretch.steps.append(path)
                stretch.in_b.append(path)
                self.propagated.pop(owner, None)

    @property
    def merged(self) -> frozenset[str]:
        """All modules of stretches of more than one."""
        return frozenset(step for one in self.stretches.values() if len(one.steps) > 1 for step in one.steps)

    def propagated_to(self, stretch: Stretch) -> float:
        """How far apart a stretch's results were in the two runs; infinite if they cannot be compared."""
        found = self.propagated.get(stretch.path, [])
        return max(found) if found and len(found) == len(self._ends(stretch)) else math.inf

    def calls(self, stretch: Stretch) -> list[Recording]:
        """List what goes into a stretch, and what A makes of it at its end."""
        starts = self.recordings[stretch.in_a[0]]
        ends = self._ends(stretch)
        return [Recording(one.args, one.kwargs, out).read() for one, out in zip(starts, ends, strict=True)]

    @contextlib.contextmanager
    def forcing(self, found: dict[str, float]) -> Iterator[None]:
        """While B runs, give A's result for every stretch, and note in `found` how far what reached it is from A's."""
        outer = [one for one in self.outer() if not one.is_idle]
        first, last = {one.in_b[0]: one for one in outer}, {one.in_b[-1]: one for one in outer}
        calls: dict[str, int] = defaultdict(int)

        def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded, i = self.recordings[first[path].in_a[0]], calls[first[path].path]
            known = kept.read((recorded[i].args, recorded[i].kwargs)) if i < len(recorded) else None
            far = math.inf if known is None else far_apart((args, kwargs), known)
            found[first[path].path] = max(found.get(first[path].path, 0.0), far)

        def after(path: str, out: Any) -> Any:
            ends, i = self._ends(last[path]), calls[last[path].path]
            calls[last[path].path] += 1
            return in_form_of(out, _clones(kept.read(ends[i]))) if i < len(ends) else out

        alone = [self.b.get_submodule(path) for path in first if path in last]
        with contextlib.ExitStack() as stack:
            for module in [module for module in alone if draws_nothing(module)]:
                stack.enter_context(_not_computing(module))
            for path in first:
                module = self.b.get_submodule(path)
                hook = lambda _, args, kwargs, path=path: before(path, args, kwargs)  # noqa: E731
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for path in last:
                module = self.b.get_submodule(path)
                stack.callback(module.register_forward_hook(lambda _, args, out, path=path: after(path, out)).remove)
            yield
        for one in outer:
            if calls[one.path] != len(self.recordings[one.in_a[0]]):
                found[one.path] = math.inf

    def outer(self) -> list[Stretch]:
        """List the stretches that lie in no other."""
        return [one for one in self.stretches.values() if one.path not in self.pairing.inner]

    def _does_nothing(self, path: str) -> bool:
        return type(self.b.get_submodule(path)) is nn.Identity

    def blocks_apart(self, a: nn.Module, b: nn.Module) -> float:
        """Give the worst relative L2 between the stretches of two float64 models, each on what A's was given."""
        found = 0.0
        for stretch in self.stretches.values():
            for one in self.calls(stretch):
                args, kwargs = pytree.tree_map_only(Tensor, as_double, (one.args, one.kwargs))
                doubled = Recording(args, kwargs, one.out)
                outs = [run(modules_of(*side), doubled) for side in ((b, stretch.in_b), (a, stretch.in_a))]
                found = max(found, far_apart(*outs))
        return found

    def _ends(self, stretch: Stretch) -> list[Any]:
        return [one.out for one in self.recordings.get(stretch.in_a[-1], [])]

    def _divide(self, trail: _Trail) -> None:
        """Make the stretches, in the order of their first calls; what has moved belongs to the neighbour before it."""
        moved, owner, heads = set(self.pairing.moved), dict[str, str](), set[str]()
        for path in trail.order:
            source = trail.source(path)
            if path not in moved:
                is_head = source in heads and len(self.recordings[source or ""]) == len(self.recordings[path])
                steps = [source, path] if is_head else [path]
                heads -= {source} if is_head else set()
                self._add(path, [step for step in steps if step is not None])
                owner[path] = path
            elif source in owner and self._goes_on(self.stretches[owner[source]], path):
                owner[path] = owner[source]
                self._add(owner[path], [*self.stretches[owner[path]].steps, path])
            else:
                heads.add(path)
        for path in heads:
            if self._there(path):
                self._add(path, [path])

    def _goes_on(self, stretch: Stretch, path: str) -> bool:
        """Whether A's module at `path` makes its result of nothing but the end of a stretch."""
        starts, ends = self.recordings[path], self._ends(stretch)
        if len(starts) != len(ends):
            return False
        given = (Recording((_alone(kept.read(end)),), {}, None) for end in ends)
        outs = (run([self.a.get_submodule(path)], one) for one in given)
        return all(not far_apart(out, one.read().out) for out, one in zip(outs, starts, strict=True))

    def _add(self, name: str, steps: list[str]) -> None:
        self.stretches[name] = self.stretch(name, steps)

    def stretch(self, name: str, steps: Sequence[str]) -> Stretch:
        """Make a stretch of modules, by A's names."""
        there = [place for step in steps if (place := self._there(step))]
        return Stretch(name, list(steps), [step for step in steps if step in self.names_a], there)

    def _there(self, path: str) -> str | None:
        place = self.pairing.there.get(path)
        return place if place in self.names_b else None

    def longer(self, stretch: Stretch) -> Stretch | None:
        """Give a stretch that goes on to the only one that is given its result; None if there are none or several."""
        after = [
            one
            for one in self.stretches.values()
            if one is not stretch and one.in_a and self.trail.source(one.in_a[0]) == stretch.in_a[-1]
        ]
        counts = [len(self.recordings[one.in_a[0]]) for one in (*after, stretch)]
        is_alone = len(after) == 1 and counts[0] == counts[1]
        return self.stretch(stretch.path, [*stretch.steps, *after[0].steps]) if is_alone else None

    def merge(self, stretch: Stretch) -> None:
        """Let a stretch take the place of those that it is made of."""
        for path in [path for path, one in self.stretches.items() if set(one.steps) <= set(stretch.steps)]:
            del self.stretches[path]
        self.stretches[stretch.path] = stretch


def modules_of(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    return [model.get_submodule(path) for path in paths]


def run(modules: Sequence[nn.Module], one: Recording) -> Any:
    """Run modules one after the other on recorded arguments; give None if they do not take them."""
    args, kwargs = _clones((one.args, one.kwargs))
    try:
        with quietly():
            out = modules[0](*args, **kwargs)
            for module in modules[1:]:
                out = module(_alone(out))
    except Exception:  # two streams of other channels, say: what does not run on the same input is not the same
        return None
    return out


_DRAW_NOTHING = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})


def draws_nothing(module: nn.Module) -> bool:
    """Whether a module, in eval mode, always gives the same and leaves nothing behind: it is one of torch's own."""
    is_own = type(module) not in _DRAW_NOTHING or "forward" in vars(module)
    return not (is_own or module._forward_hooks or module._forward_pre_hooks)


@contextlib.contextmanager
def _not_computing(module: nn.Module) -> Iterator[None]:
    """Let a module give back what it is given, because a hook puts a recorded result in its place."""
    vars(module)["forward"] = lambda input: input
    try:
        yield
    finally:
        del vars(module)["forward"]


class _Trail:
    """Which module's result each module was given, unchanged, and in which order modules were called."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.open: list[str] = []  # those that run now, the innermost last
        self.sources: dict[str, set[str | None]] = defaultdict(set)
        self.made: dict[int, tuple[str, int, weakref.ref[Tensor]]] = {}  # id → whose result it is, its version, itself

    def enter(self, path: str, given: Any) -> None:
        self.open.append(path)
        self.sources[path].add(self._maker(_first(given)))

    def leave(self, path: str, out: Any) -> None:
        self.open.pop()
        if path not in self.order:
            self.order.append(path)
        first = _first(out)
        if first is not None and self._maker(first) is None:  # an Identity gives what it was given
            self.made[id(first)] = (path, first._version, weakref.ref(first))

    def _maker(self, tensor: Tensor | None) -> str | None:
        """Name the module whose result a tensor is, if nothing has changed it since."""
        path, version, itself = self.made.get(id(tensor), ("", 0, None))
        is_it = tensor is not None and itself is not None and itself() is tensor and tensor._version == version
        return path if is_it else None

    def source(self, path: str) -> str | None:
        """Name the module whose result `path` was given in every call; None if it was not always the same one."""
        found = self.sources.get(path, set())
        return next(iter(found)) if len(found) == 1 else None


@contextlib.contextmanager
def _watched(
    model: nn.Module,
    paths: Iterable[str],
    trail: _Trail,
    note: Callable[[str, tuple[Any, Any], Any], None],
    copied: Callable[[Any], Any] | None = None,
) -> Iterator[None]:
    """Follow modules in a run; `note` gets its result, and what each was given, `copied` since it may overwrite it."""
    given: list[tuple[Any, Any]] = []

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trail.enter(path, (args, kwargs))
        given.append(((), {}) if copied is None else copied((args, kwargs)))

    def after(path: str, out: Any) -> None:
        note(path, given.pop(), out)
        trail.leave(path, out)

    with contextlib.ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            enter = lambda _, args, kwargs, path=path: before(path, args, kwargs)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(lambda _, args, out, path=path: after(path, out)).remove)
        yield


def _first(values: Any) -> Tensor | None:
    """Give the first tensor in arguments or results; for a pair that is the high stream."""
    return next((leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)), None)


def far_apart(out: Any, expected: Any) -> float:
    """Give the relative L2 of a result; for a pair, that of the stream which is further apart."""
    ours, theirs = leaves(out), leaves(expected)
    if len(ours) != len(theirs):
        return math.inf
    found = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, Tensor) or isinstance(one, Tensor):
            both = isinstance(one, Tensor) and isinstance(other, Tensor)
            found = max(found, apart(one, other) if both else math.inf)
    return found


def leaves(values: Any) -> list[Any]:
    """List what is in a result; a low stream that is not there is nothing."""
    return [leaf for leaf in pytree.tree_leaves(values) if leaf is not None]


def in_form_of(out: Any, given: Any) -> Any:
    """Give a stream that comes alone in the form that `out` has: as a tensor, or in a pair."""
    alone = _alone(given)
    is_pair = isinstance(alone, Tensor) and isinstance(out, tuple) and len(out) == 2 and out[1] is None
    return (alone, None) if is_pair else alone if isinstance(out, Tensor) else given


def _alone(out: Any) -> Any:
    """Give a stream that comes alone, in a pair without a low one, as the tensor that it is."""
    is_alone = isinstance(out, tuple) and len(out) == 2 and out[1] is None
    return out[0] if is_alone else out


def _shapes(values: Any) -> list[Any]:
    return [leaf.shape for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _clones(values: Any) -> Any:
    """Copy all tensors, since an in-place ReLU may come next."""
    return pytree.tree_map_only(Tensor, Tensor.clone, values)

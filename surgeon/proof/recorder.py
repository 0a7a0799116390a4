"""Where two models diverge: record what goes in and out of every site in a run of A, and how far B is from that."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgeon._torch_compat import NormBase, pytree
from surgeon.analysis.run import is_conv
from surgeon.blocks import Operator
from surgeon.models.sandbox import quietly
from surgeon.proof.distance import apart, as_double


@dataclass(slots=True)
class Recording:
    """What was recorded of one call of a site in A: its arguments, and its finished result."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


@dataclass(frozen=True, slots=True)
class Gap:
    """Relative L2 of a site's result, the worst of its calls.

    `isolated`: B's site on A's input; `propagated`: each on its own; `jitter`: A's site on A's input, its numbers moved
    by half a unit in the last place (0 where nothing was jittered).
    """

    isolated: float
    propagated: float
    jitter: float


class Recorder:
    """Records A's sites in a run and compares B's with them.

    A site is read where its result is finished: that is behind the norm if one of the two models has the norm inside
    its block and an Identity in the norm's place.
    """

    def __init__(self, a: nn.Module, b: nn.Module, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        others = dict(b.named_modules())
        norms = ((path, module, others[path]) for path, module in a.named_modules() if path in others)
        self.moved = [path for path, one, other in norms if _norm_moved(one, other)]
        self.recordings: dict[str, list[Recording]] = {}
        self.ends: dict[str, str] = {}  # site → where its result is finished, if not there
        self.propagated: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the arguments and results of A's sites while the model runs."""
        made: dict[
            int, tuple[str, Recording, object]
        ] = {}  # id of an output → its site, what was recorded, and itself, kept alive

        def keep(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if path not in self.moved:
                one = Recording(_clones(args), _clones(kwargs), _clones(out))
                self.recordings.setdefault(path, []).append(one)
                made[id(_first(out))] = (path, one, out)
            elif known := made.get(id(_first((args, kwargs)))):
                site, one, _ = known
                self.ends[site], one.out = path, _clones(out)

        with _hooks(model, [*self.paths, *self.moved], keep):
            yield

    @contextlib.contextmanager
    def comparing(self, model: nn.Module) -> Iterator[None]:
        """Measure how far B's sites are from A's while the model runs."""
        site_at = {self.ends.get(path, path): path for path in self.recordings}

        def compare(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            site = site_at[path]
            recorded, done = self.recordings[site], self.propagated[site]
            done.append(_apart(out, recorded[len(done)].out) if len(done) < len(recorded) else math.inf)

        with _hooks(model, list(site_at), compare):
            yield

    def gaps(self, b: nn.Module, jittered: nn.Module | None) -> dict[str, Gap]:
        """Give what was measured at every site, in order of execution."""
        return {
            path: Gap(
                max(self._isolated(b, path, one) for one in recorded),
                max(self.propagated[path]) if len(self.propagated[path]) == len(recorded) else math.inf,
                max((self._isolated(jittered, path, one) for one in recorded if jittered is not None), default=0.0),
            )
            for path, recorded in self.recordings.items()
        }

    def blocks_apart(self, a: nn.Module, b: nn.Module) -> float:
        """Give the worst relative L2 between the sites of two float64 models, each on what A's site was given."""
        found = 0.0
        for path, recorded in self.recordings.items():
            for one in recorded:
                args, kwargs = pytree.tree_map_only(Tensor, as_double, (one.args, one.kwargs))
                doubled = Recording(args, kwargs, one.out)
                found = max(found, _apart(self._run(b, path, doubled), self._run(a, path, doubled)))
        return found

    def _isolated(self, model: nn.Module, path: str, one: Recording) -> float:
        try:
            out = self._run(model, path, one)
        except (
            Exception
        ):  # two streams of other channels, say: what cannot take the same input does not compute the same
            return math.inf
        return _apart(out, one.out)

    def _run(self, model: nn.Module, path: str, one: Recording) -> Any:
        """Run a site on the arguments of A's site, up to where its result is finished."""
        args, kwargs = _clones((one.args, one.kwargs))
        with quietly():
            out = model.get_submodule(path)(*args, **kwargs)
            return model.get_submodule(self.ends[path])(out) if path in self.ends else out


def is_site(module: nn.Module) -> bool:
    """Whether a module is a conv, a block, or what a block is deployed as."""
    return is_conv(module) or isinstance(module, Operator)


def _first(values: Any) -> Any:
    """Give the first tensor in arguments or results; for a pair that is the high stream."""
    return next((leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)), None)


def _apart(out: Any, expected: Any) -> float:
    """Give the relative L2 of a result; for a pair, that of the stream which is further apart."""
    ours, theirs = pytree.tree_leaves(out), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        return math.inf
    both = zip(ours, theirs, strict=True)
    return max((apart(one, other) for one, other in both if isinstance(other, Tensor)), default=0.0)


def _clones(values: Any) -> Any:
    """Copy all tensors, since an in-place ReLU may come next."""
    return pytree.tree_map_only(Tensor, Tensor.clone, values)


@contextlib.contextmanager
def _hooks(model: nn.Module, paths: Iterable[str], note: Callable[..., None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            handle = module.register_forward_hook(
                lambda _, args, kwargs, out, path=path: note(path, args, kwargs, out), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


def _norm_moved(one: nn.Module, other: nn.Module) -> bool:
    kinds = {type(one), type(other)}
    return nn.Identity in kinds and any(isinstance(module, NormBase) for module in (one, other))

"""The smallest set of modules of B that has to be put right for its outputs to become the expected ones.

Right modules (the replay's or, where no replay proves B, A's) are put into a copy of B, in order. If all of them make
the difference vanish, halving finds the first module up to which they have to be put in. It is needed; it stays in, and
the same is done for those before it, until those that were found are enough:

    k = min { k : B with modules 1…k and all found ones put right computes what is expected },  found ← found ∪ {k}

so that n modules of which m are wrong take about m · log₂ n runs. At the end every one that was found is left out once.
Numbers of B that are right to rounding are made exactly those that are expected before, so that no rounding is left in
which a small fault could hide; if only these explain the difference, as much is allowed as rounding does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.blocks import Operator
from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import kind_of
from surgeon.models.copies import names as names_of
from surgeon.models.progress import Progress, silent
from surgeon.octave.absorb import undone
from surgeon.proof import alike
from surgeon.proof.calls import evaluating
from surgeon.proof.distance import EXACT, is_matched, pooled
from surgeon.proof.explained import Explained
from surgeon.proof.pairing import is_below
from surgeon.proof.probes import positive, probes
from surgeon.proof.recorder import Recording, Stretch, in_form_of, run
from surgeon.proof.report import Bisected
from surgeon.proof.ulps import off

MOST = 8  # modules that are looked for; a set that is larger explains nothing to anybody


class _Row(nn.Module):
    """Modules of A that are called one after the other, as those of a stretch are, in the place of modules of B.

    A stream that comes alone is given as B gives it: as a tensor, or in a pair.
    """

    def __init__(self, modules: Sequence[nn.Module], there: Sequence[nn.Module]) -> None:
        super().__init__()
        self.row = nn.ModuleList(modules)
        vars(self)["there"] = list(there) if any(isinstance(one, Operator) for one in (*modules, *there)) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = Recording(args, kwargs, None)
        made, there = run(list(self.row), given), vars(self)["there"]
        return made if there is None else in_form_of(run(there, given), made)


@dataclass(frozen=True, slots=True)
class Swap:
    """One thing that can be put right: modules of B by name, and what takes the place of each."""

    site: str
    puts: dict[str, nn.Module]


@dataclass
class Trial:
    """A copy of B into which right modules are put and taken out again, and what is expected of it."""

    model: nn.Module
    runs: Callable[[nn.Module], Any]
    is_right: Callable[[Any], bool]
    count: int = 0
    tell: Callable[[int], None] = lambda count: None
    known: dict[frozenset[str], bool] = field(default_factory=dict)

    def vanishes(self, swaps: Sequence[Swap]) -> bool:
        """Whether the difference is gone once these are put right; a model that does not run has one."""
        key = frozenset(one.site for one in swaps)
        if key not in self.known:
            self.count += 1
            self.tell(self.count)
            before = {path: self.model.get_submodule(path) for one in swaps for path in one.puts}
            try:
                for one in swaps:
                    for path, module in one.puts.items():
                        self.model.set_submodule(path, module)
                self.known[key] = self.is_right(self.runs(self.model))
            except VerifyError:
                self.known[key] = False
            finally:
                for path, module in before.items():
                    self.model.set_submodule(path, module)
        return self.known[key]


def smallest(swaps: Sequence[Swap], trial: Trial, known: Sequence[Swap] = ()) -> list[Swap] | None:
    """Find a smallest set that makes the difference vanish; None if all of them do not, or more than `MOST` must be.

    Smallest means that none of them can be left out. Those that are `known` to be wrong belong to it.
    """
    if not trial.vanishes(swaps):
        return None
    found, every = list(known), list(swaps)
    swaps = [one for one in swaps if one not in found]
    while not trial.vanishes(found):
        if len(found) == MOST:
            return None
        low, high = 0, len(swaps)  # the first `low` are not enough, the first `high` are
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if trial.vanishes([*swaps[:middle], *found]) else (middle, high)
        found.append(swaps[high - 1])
        swaps = swaps[: high - 1]
    for one in [one for one in found if one not in known] if len(found) > 1 else []:
        rest = [other for other in found if other is not one]
        found = rest if trial.vanishes(rest) else found
    return sorted(found, key=every.index)


def bisect(
    models: Explained, given: Sequence[Inputs], diverging: Sequence[str], progress: Progress = silent
) -> Bisected:
    """Find the smallest set of modules that explains why B's outputs are not the expected ones.

    `diverging` are the modules that verify has found to be other than they should be.
    """
    with torch.no_grad():
        plans = _of_replay(models) if models.replay is not None else _of_a(models, given[0], diverging)
        drawn = [*probes(given[0], models.seed), *positive(given[0], models.seed)]
        runs, is_seen = 0, False
        for model, reference, swaps, is_exact in plans:
            found: list[Swap] = []
            for inputs in (*given, *drawn):  # a module may be dead for one of them
                trial = _trial(models, model, reference, inputs, is_exact=is_exact)
                if trial is None or trial.vanishes(found):
                    runs += 2
                    continue
                is_seen = True
                trial.tell = _telling(progress, len(swaps))
                more = smallest(swaps, trial, found)
                runs += trial.count + 1
                if more is None:
                    found = []
                    break
                found = more
            if found:
                return _found(found, runs)
    says = "no set of modules that both have explains it: the difference lies in the code between them"
    if not is_seen:
        says = "the outputs do not differ on any input that was tried, so there is nothing to bisect"
    return Bisected((), runs, says, is_seen=is_seen)


def _found(found: Sequence[Swap], runs: int) -> Bisected:
    sites = tuple(one.site for one in found)
    words = "this module" if len(sites) == 1 else f"these {len(sites)} modules, and not without one of them,"
    return Bisected(sites, runs, f"with {words} put right, B computes what is expected: {', '.join(sites)}")


def _telling(progress: Progress, count: int) -> Callable[[int], None]:
    """Say beforehand what it will take, and then how far it is; each module that is found takes log₂ n runs."""
    expected = 4 + math.ceil(math.log2(max(2, count)))
    what = f"bisecting {count} modules, {expected} runs or more"

    def tell(done: int) -> None:
        progress(what, min(0.99, done / (done + max(1, expected - done))))

    return tell


Plan = tuple[nn.Module, nn.Module, list[Swap], bool]


def _of_replay(models: Explained) -> list[Plan]:
    """Put modules of the replay, rounded as B is stored, into a copy of B."""
    assert models.replay is not None
    right, wrong = evaluating(undone(models.replay)), evaluating(models.b)
    _settle_(right, wrong, undone(models.own_b))
    unlike = alike.unlike(right, wrong, with_tensors=True)
    theirs = dict(wrong.named_modules(remove_duplicate=False))
    modules = dict(right.named_modules(remove_duplicate=False))
    paths = [path for path in (unlike if unlike is not None else modules) if path and path in theirs]
    if unlike is None:
        paths = [path for path in paths if not any(True for _ in modules[path].children())]
    names = names_of(wrong)
    swaps = [_one_for_one(path, names[theirs[path]], modules[path]) for path in paths]
    return [(wrong, right, swaps, True)]


def _one_for_one(site: str, names: Sequence[str], module: nn.Module) -> Swap:
    puts: dict[str, nn.Module] = dict.fromkeys(names, module)
    return Swap(site, puts)


def _settle_(right: nn.Module, wrong: nn.Module, own: nn.Module) -> None:
    """Round what is expected as B is stored, and give B exactly that where it is right to rounding."""
    ours, theirs = (dict(_tensors(one)) for one in (right, wrong))
    for name, held in _tensors(own):
        wanted, mine = ours.get(name), theirs.get(name)
        if wanted is None or mine is None or wanted.shape != held.shape or not wanted.is_floating_point():
            continue
        is_wrong = off(held, wanted, {held.dtype}, is_once_rounded=True).is_wrong
        wanted.copy_(wanted.to(held.dtype).to(wanted.dtype))
        if not is_wrong:
            mine.copy_(wanted)


def _of_a(models: Explained, inputs: Inputs, diverging: Sequence[str]) -> list[Plan]:
    """Put stretches of A into a copy of B: first those that diverge, with all others in it, then the others."""
    recorder = models.recorder()
    right, wrong = evaluating(recorder.a), evaluating(recorder.b)
    recorder.a, recorder.b = right, wrong
    try:
        with recorder.recording():
            models.call(right, inputs, models.exact)
        with recorder.comparing():
            models.call(wrong, inputs, models.exact)
    except VerifyError:
        return []
    units = _units(list(recorder.stretches.values()), recorder.pairing.wholes, diverging)
    unlike = [one for one in units if not models.is_alike(recorder, one)]
    names = names_of(wrong)
    faulty = [one for one in unlike if _is_named(one, diverging) or _is_other_code(one, right, wrong)]
    swaps = {id(one): _swap(one, right, wrong, names, diverging) for one in unlike}
    rest = [swaps[id(one)] for one in unlike if one not in faulty]
    settled = evaluating(wrong)
    for one in rest:
        for path, module in one.puts.items():
            settled.set_submodule(path, module)
    exact = (settled, right, [swaps[id(one)] for one in faulty], True)
    return [exact, (wrong, right, [swaps[id(one)] for one in unlike], False)]


def _units(stretches: Sequence[Stretch], wholes: Sequence[str], diverging: Sequence[str]) -> list[Stretch]:
    """Take of stretches in one another the whole, unless one in it is said to diverge."""
    whole = {one for one in wholes if not any(is_below(path, [one]) and path != one for path in diverging)}
    apart = [one for one in stretches if one.in_a and one.in_b and not one.is_idle]
    inner = [one for one in apart if one.path not in wholes or one.path in whole]
    return [one for one in inner if not any(one.path != top and is_below(one.path, [top]) for top in whole)]


def _is_named(stretch: Stretch, diverging: Sequence[str]) -> bool:
    return any(path in (stretch.path, *stretch.steps) for path in diverging)


def _is_other_code(stretch: Stretch, right: nn.Module, wrong: nn.Module) -> bool:
    """Whether a stretch is of other classes, without a tensor that these could come from being folded."""
    sides = [
        [one.get_submodule(path) for path in paths] for one, paths in ((right, stretch.in_a), (wrong, stretch.in_b))
    ]
    has_tensors = any(True for side in sides for module in side for _ in module.state_dict().values())
    return not has_tensors and [kind_of(one) for one in sides[0]] != [kind_of(one) for one in sides[1]]


def _swap(
    stretch: Stretch,
    right: nn.Module,
    wrong: nn.Module,
    names: dict[nn.Module, tuple[str, ...]],
    diverging: Sequence[str],
) -> Swap:
    first, *others = [names[wrong.get_submodule(path)] for path in stretch.in_b]
    modules = [right.get_submodule(path) for path in stretch.in_a]
    row = _Row(modules, [wrong.get_submodule(path) for path in stretch.in_b])
    puts: dict[str, nn.Module] = dict.fromkeys(first, row)
    for paths in others:
        puts |= dict.fromkeys(paths, nn.Identity())
    site = next((path for path in diverging if path in stretch.steps), stretch.path)
    return Swap(site, puts)


def _trial(
    models: Explained, model: nn.Module, reference: nn.Module, inputs: Inputs, *, is_exact: bool
) -> Trial | None:
    """Make the trial for one input; None if the reference does not take it."""
    try:
        truth = models.call(reference, inputs, models.exact)
    except VerifyError:
        return None
    if not is_matched(truth, truth):
        return None
    limits = [max(EXACT, models.arithmetic)] * len(pooled([truth], [truth]))
    if not is_exact:
        try:
            found = models.storage([models.call(model, inputs, models.exact)], [truth], [inputs])
        except VerifyError:
            found = []
        limits = [models.margin * noise.l2 + models.arithmetic for _, noise in found] or limits

    def is_right(out: Any) -> bool:
        if not is_matched(out, truth):
            return False
        pairs = zip(pooled([out], [truth]), limits, strict=True)
        return all(one.l2 <= limit and not one.flips for one, limit in pairs)

    return Trial(model, lambda one: models.call(one, inputs, models.exact), is_right)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]

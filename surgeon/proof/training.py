"""What two models do in train mode, and what their gradients are, compared tensor by tensor (`counterparts`).

A model that surgeon has made is compared with the replay that has its tensors, in which every tensor has a counterpart;
and the replay with A, where a tensor that went into a block is found by its lineage. Any other pair is compared name by
name. All is done in float64, if A runs there.

The limit is 1e-10. It is larger only where a number is not known that well: where one unit in the last place of float64
moves that of A further, and where weights of B were rounded in another way than A's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from surgeon.errors import VerifyError
from surgeon.files.exports.compiled import Compiled
from surgeon.models.call import Inputs
from surgeon.models.devices import dtype_of
from surgeon.proof import counterparts, in_common
from surgeon.proof.counterparts import Counterparts, Kind
from surgeon.proof.distance import EXACT, as_double, excess
from surgeon.proof.evidence import Evidence, Replay, Stepped
from surgeon.proof.held import Held
from surgeon.proof.report import TensorDistance
from surgeon.proof.steps import How, Step, copied, follow_, set_mode_, take
from surgeon.proof.ulps import Jitter

_SHAKES = 4  # times that numbers are moved
_MARGIN = 16.0  # times what one unit in the last place of float64 does
_HOPELESS = 30.0  # times a limit that two draws have set: no further one makes up for it
_SETTINGS = ("momentum", "eps", "p", "affine", "track_running_stats", "drop_prob", "drop_rate")  # of norms and dropout
_UNITS = 4  # by which numbers of one role may differ in two models
_NO_ROUNDING = 1e6  # times a limit: where nobody has promised less, what is further apart is not moved to be explained
_IMAGES = 3  # in a batch that surgeon makes larger: two numbers, normalised, are always −1 and 1

Distances = dict[tuple[Kind, str], float]


@dataclass(frozen=True, slots=True)
class Made:
    """How B was made of A, if that is known; `approximate`: it was not meant to compute what A does."""

    replay: Replay | None
    approximate: bool


@dataclass(frozen=True, slots=True)
class Side:
    """A model in its mode, the dtype in which models are compared, and the names by which its random modules draw."""

    model: nn.Module
    how: How
    dtype: torch.dtype
    names: Mapping[str, str] = field(default_factory=dict)

    def step(self, inputs: Inputs, who: str) -> Step:
        """Make a step.

        Raises:
            VerifyError: the model, which the sentence calls `who`, does not run, or has no gradients.
        """
        try:
            return take(self.model, inputs, self.dtype, self.how, names=self.names)
        except VerifyError as error:
            problem = error.problem.replace("a model", who)
            raise VerifyError(problem, todo=error.todo, **error.facts) from error

    def moved(self, jitter: Callable[[Tensor], Tensor]) -> Side:
        return replace(self, model=copied(self.model, jitter))


class Training:
    """The models in a mode, and what is compared there."""

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        replay: Replay | None,
        how: How,
        models: Held,
        there: Mapping[str, str],
    ) -> None:
        self.how, self.replay, self.own, self.there = how, replay, (a, b), there
        self.exact, self.margin = models.exact, models.margin
        self.cast = as_double if self.exact == torch.float64 else torch.clone
        one, two = copied(a, self.cast), copied(b, self.cast)
        set_mode_(one, how)
        names = {other: name for name, other in self.there.items()}
        set_mode_(two, how, one, names)
        self.a, self.b = Side(one, how, self.exact), Side(two, how, self.exact, names)

    def compare(self, inputs: Sequence[Inputs], *, approximate: bool) -> tuple[Stepped, ...]:
        """Compare on every input; the replay with A only if it is meant to compute the same.

        Raises:
            VerifyError: a model does not run, or its gradients cannot be computed.
        """
        given = [_batch(one, self.how) for one in inputs]
        if self.replay is None:
            names = counterparts.find(self.a.model, self.b.model, self._name_in_b, self._is_near)
            return tuple(self._directly(one, names) for one in given)
        twin = self._twin(self.replay)
        return tuple(self._by_replay(one, self.replay, twin, approximate=approximate) for one in given)

    def _directly(self, inputs: Inputs, names: Counterparts) -> Stepped:
        a, b = self.a.step(inputs, "A"), self.b.step(inputs, "B")
        found = self._judged(inputs, (self.a, a), (self.b, b), names)
        return Stepped(str(inputs), self.how.mode, tuple(found), remarks=(*names.remarks(self.how), *_said(a, b)))

    def _by_replay(self, inputs: Inputs, replay: Replay, twin: Side | None, *, approximate: bool) -> Stepped:
        found: list[TensorDistance] = []
        remarks: list[str] = []
        if twin is not None:
            names = counterparts.find(twin.model, self.b.model, str, lambda x, y: True)
            expected, given = twin.step(inputs, "the replay"), self.b.step(inputs, "B")
            found += self._judged(inputs, (twin, expected), (self.b, given), names)
            remarks += _said(expected, given)
        if approximate or self.exact != torch.float64:  # the replay is what it is in float64
            return Stepped(str(inputs), self.how.mode, tuple(found), remarks=tuple(remarks))
        made = Side(copied(replay.exact, self.cast), self.how, self.exact)
        set_mode_(made.model, self.how)
        names = counterparts.find(self.a.model, made.model, lambda name: replay.came_from.get(name, name), torch.equal)
        truth, again = self.a.step(inputs, "A"), made.step(inputs, "the replay")
        is_promised = replay.keeps_training or not self.how.is_training
        most = math.inf if is_promised else _NO_ROUNDING
        mathematics = list(self._judged(inputs, (self.a, truth), (made, again), names, most))
        said = tuple(dict.fromkeys((*remarks, *names.remarks(self.how), *_said(truth, again))))
        wrong = [one for one in mathematics if not one.passed]
        if wrong and not is_promised:
            worst = max(wrong, key=lambda one: (one.kind == "output", excess(one.found, one.limit)))
            return Stepped(str(inputs), self.how.mode, tuple(found), worst, remarks=tuple(remarks))
        return Stepped(str(inputs), self.how.mode, (*found, *mathematics), remarks=said)

    def _twin(self, replay: Replay) -> Side | None:
        """Give the replay's modules with B's tensors, in B's modes; None where they do not fit, which is a fault."""
        made = in_common.with_tensors_of(self.own[1], replay.exact)
        if made is None:
            return None
        twin = copied(made, self.cast)
        follow_(twin, self.b.model)
        return Side(twin, self.how, self.exact)

    def _judged(
        self,
        inputs: Inputs,
        first: tuple[Side, Step],
        second: tuple[Side, Step],
        names: Counterparts,
        most: float = math.inf,
    ) -> Iterator[TensorDistance]:
        """Compare two steps, and find the limit of every tensor; `most` times 1e-10 cannot be rounding."""
        (x, step_x), (_, step_y) = first, second
        is_training = self.how.is_training
        found = counterparts.distances(names, step_x, step_y, is_training=is_training)
        limits = dict.fromkeys(found, self._least)
        if 1 < _worst(found, limits) <= most:
            limits = self._explained(inputs, first, second, names, found)
        against = "A" if x is self.a else "the replay"
        for (kind, name), far in found.items():
            yield TensorDistance(kind, name, against, far, limits[kind, name])  # type: ignore[arg-type]

    @property
    def _least(self) -> float:
        return max(EXACT, 64 * torch.finfo(self.exact).eps)

    def _explained(
        self, inputs: Inputs, first: tuple[Side, Step], second: tuple[Side, Step], names: Counterparts, found: Distances
    ) -> Distances:
        """Allow what rounding does: in float64, and where no replay proves B, of the weights."""
        noise: Distances = dict.fromkeys(found, 0.0)
        limits = dict.fromkeys(found, self._least)
        keeps = self.exact != torch.float64
        own = names.of_one(0)
        for i in range(_SHAKES):
            step = first[0].moved(Jitter(self.how.seed + i, keeps_dtype=keeps)).step(inputs, "A")
            _enlarge_(noise, counterparts.distances(own, first[1], step, is_training=self.how.is_training))
            limits = {key: self._least + _MARGIN * noise[key] for key in found}
            if (worst := _worst(found, limits)) <= 1 or (i and worst > _HOPELESS):
                break
        if worst <= 1 or self.replay is not None:
            return limits
        return self._by_storage(inputs, first, second, names, found, limits)

    def _by_storage(
        self,
        inputs: Inputs,
        first: tuple[Side, Step],
        second: tuple[Side, Step],
        names: Counterparts,
        found: Distances,
        limits: Distances,
    ) -> Distances:
        """Allow what rounding the weights does that are not the same in both models."""
        units = in_common.units(*self.own)
        if not units:
            return limits
        still, noise = in_common.still(*self.own), dict.fromkeys(found, 0.0)
        sides = [(self.own[0], *first, names.of_one(0)), (self.own[1], *second, names.of_one(1))]
        allowed = limits
        for i in range(_SHAKES + 1):
            model, side, step, own = sides[i == 1]
            jitter = Jitter(self.how.seed + i, units=units, keeps_dtype=self.exact != torch.float64, still=still)
            moved = copied(model, jitter)
            follow_(moved, side.model)
            shaken = replace(side, model=moved).step(inputs, "a model")
            _enlarge_(noise, counterparts.distances(own, step, shaken, is_training=self.how.is_training))
            allowed = {key: limits[key] + 2 * self.margin * noise[key] for key in found}
            if (worst := _worst(found, allowed)) <= 1 or (i and worst > _HOPELESS):
                break
        return allowed

    def _is_near(self, one: Tensor, other: Tensor) -> bool:
        """Whether two parameters hold the same numbers, up to what rounding them in another way may have done."""
        if one.is_complex() or not one.is_floating_point() or not one.numel():
            return torch.equal(one, other)
        most = _UNITS * torch.finfo(dtype_of(self.own[0])).eps * one.detach().abs().max()
        return bool((one - other).detach().abs().max() <= most)

    def _name_in_b(self, name: str) -> str:
        """Give B's name of a tensor of A: its module may have another one there."""
        path, _, last = name.rpartition(".")
        return ".".join(part for part in (self.there.get(path, path), last) if part)


def check(a: nn.Module, b: nn.Module, how: How) -> None:
    """Raise VerifyError if steps are asked for, and a model cannot make any."""
    if how.is_wanted and (isinstance(a, Compiled) or isinstance(b, Compiled)):
        raise VerifyError(
            "a file that holds a program has neither a train mode nor gradients",
            todo="Compare it without --mode train and --gradients, or compare the networks that it was made from.",
        )


def with_steps(
    evidence: Evidence, models: Held, a: nn.Module, b: nn.Module, inputs: Sequence[Inputs], made: Made, how: How
) -> Evidence:
    """Add to what was measured in eval mode what steps of both models show.

    Raises:
        VerifyError: a model does not run, or its gradients cannot be computed.
    """
    there = {} if made.replay is not None else _modules_there(models)
    training = Training(a, b, made.replay, how, models, there)
    steps = training.compare(inputs, approximate=made.approximate)
    known = settings(a, b, there) if how.is_training and made.replay is None else None
    return replace(evidence, steps=steps, settings=known)


def of_steps(evidence: Evidence) -> Iterator[str]:
    """Give what a report says about steps besides its checks."""
    yield from dict.fromkeys(said for step in evidence.steps for said in step.remarks)
    if found := next((step.departs for step in evidence.steps if step.departs is not None), None):
        yield (
            "what was made of A keeps the function in eval mode only, and B is that: "
            f"in train mode {found.words} is {found.found:.1e} from A's"
        )


def settings(a: nn.Module, b: nn.Module, there: Mapping[str, str]) -> dict[str, str]:
    """Say what a norm or a dropout of B has that A's of the same name and class has not: eval mode may not show it."""
    found, others = {}, dict(b.named_modules(remove_duplicate=False))
    for path, module in a.named_modules():
        other = others.get(there.get(path, path))
        if type(other) is not type(module) or isinstance(module, nn.Conv2d):
            continue
        for name in _SETTINGS:
            mine, theirs = vars(module).get(name), vars(other).get(name)
            if isinstance(mine, int | float | None) and mine != theirs:
                found[path] = f"{path or 'the model'} has {name} = {theirs!r}, not {mine!r}"
    return found


def _modules_there(models: Held) -> dict[str, str]:
    """Give B's names of A's modules; a wrapper around either is looked through."""
    sides = ((models.own_a, models.core_a), (models.own_b, models.core_b))
    at_a, at_b = (next(path for path, one in model.named_modules() if one is core) for model, core in sides)
    known = models.pairing.there
    return {_join(at_a, path): _join(at_b, known.get(path, path)) for path, _ in models.core_a.named_modules()}


def _join(one: str, other: str) -> str:
    return ".".join(part for part in (one, other) if part)


def _said(a: Step, b: Step) -> Iterator[str]:
    """Say what could not be compared in two steps, or not under the same conditions."""
    yield from a.drawn.unlike(b.drawn)
    if refused := a.refused or b.refused:
        yield f"gradients of inputs were not compared: {refused}"
    if a.gradients and all(one is None for one in a.gradients.values()):
        yield "no output of A depends on anything that needs a gradient, so gradients show nothing"


def _batch(inputs: Inputs, how: How) -> Inputs:
    """Enlarge a batch of one for train mode, where norms need several numbers: the user's own, and others like it."""
    if not how.is_training or inputs.batch != 1 or not inputs.has_tensors:
        return inputs
    larger = inputs.batched(_IMAGES)
    drawn = larger.alike(1, how.seed)
    if not drawn or not all(isinstance(one, Tensor) for one in (*inputs.args, *inputs.kwargs.values())):
        return larger  # it holds more than images, such as boxes, which mean something
    own = iter(larger.tensors)

    def with_own(tensor: Tensor) -> Tensor:
        first = next(own)
        return torch.cat([first[:1], tensor[1:]]) if first.dim() and len(first) == _IMAGES else first

    return drawn[0].map(with_own)


def _worst(found: Distances, limits: Distances) -> float:
    return max((excess(far, limits[key]) for key, far in found.items()), default=0.0)


def _enlarge_(noise: Distances, other: Distances) -> None:
    for key in noise:
        noise[key] = max(noise[key], other.get(key, 0.0))

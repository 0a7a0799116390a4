"""One model's outputs kept, and another model judged by them: `verify` where the two are never in one process.

The file holds what the questions `storage`, `same tensors`, `rounding` and `finite` need to know of A. The others need
A itself: what was done to B cannot be done again without A, nor can B's modules be given what A's were given.

    storage     err(B) ≤ m · err(moved) + 1e-10: another machine does arithmetic in another order. What moves are the
                tensors of B that are not A's, bit by bit; and those of A, as measured there, if B is built otherwise
    rounding    as in one process: how far A is from itself in float64 follows from its outputs in both dtypes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import VerifyError
from surgeon.files.exports.compiled import Compiled
from surgeon.models.call import Inputs
from surgeon.models.copies import kind_of, shadow
from surgeon.models.devices import dtype_of
from surgeon.proof import watched
from surgeon.proof.calls import evaluating
from surgeon.proof.checks import checks
from surgeon.proof.distance import EXACT, Apart, dtype_name, largest, matched, pooled, tensors
from surgeon.proof.evidence import Evidence, Measured
from surgeon.proof.explained import InOwn
from surgeon.proof.figures import figures
from surgeon.proof.isolated import FEW_UNITS
from surgeon.proof.nested import plain
from surgeon.proof.reference import FORMAT, Given, Manifest, Noise, Reference, drawn_again, hash_of, keep
from surgeon.proof.report import Check, Report, SiteDistance
from surgeon.proof.runs import Models, NotInFloat64Error
from surgeon.proof.ulps import Jitter, Off

_SHAKES = 4  # times that weights are moved


class One(Models):
    """One model in both places: it is run and moved as `verify` runs and moves two."""

    def __init__(self, model: nn.Module, seed: int, exact: torch.dtype) -> None:
        super().__init__(model, model, None, seed, exact)

    def draws(self, inputs: Inputs) -> list[Inputs]:
        """Give the input and as many more as its outputs need to be judged."""
        return [inputs, *(self._more(inputs, inputs, self._truth(inputs)) or [])]

    def outs(self, draws: Sequence[Inputs], *, own: bool = False) -> list[Any]:
        """Run the model on all of them, in float64 or in its own dtype."""
        model, dtype = (self.own_a, self.dtype) if own else (self.a, self.exact)
        return [plain(self.call(model, one, dtype)) for one in draws]

    def moved(self, units: float, still: Mapping[int, Tensor]) -> Iterator[nn.Module]:
        """Move the weights again and again."""
        for i in range(_SHAKES):
            yield evaluating(
                self.own_a, Jitter(self.seed + i, units=units, keeps_dtype=not self.is_double, still=still)
            )

    def shaken(
        self, draws: Sequence[Inputs], truths: Sequence[Any], units: float, still: Mapping[int, Tensor]
    ) -> list[Apart]:
        """Measure how far that moves each output."""
        runs = ([plain(self.call(model, one, self.exact)) for one in draws] for model in self.moved(units, still))
        return largest([pooled(outs, truths) for outs in runs])

    def flat(self, inputs: Inputs, truth: Any, own: Any) -> tuple[int, ...]:
        return self._flat(inputs, truth, own)


def saved(
    model: nn.Module, inputs: Sequence[Inputs], *, seed: int, sites: bool, store_inputs: bool, said: Mapping[str, Any]
) -> Reference:
    """Run a model on every input, and keep what another one is judged by; `said` are more fields of the manifest.

    Raises:
        VerifyError: it does not run, or gives what cannot be kept.
    """
    one = One(model, seed, torch.float64)
    try:
        one.draws(inputs[0])
    except NotInFloat64Error:
        one = One(model, seed, one.dtype)
    held: dict[str, Tensor] = {}
    given = [_kept(held, i, one, each, sites=sites, store_inputs=store_inputs) for i, each in enumerate(inputs)]
    facts = {"dtype": dtype_name(one.dtype), "exact": dtype_name(one.exact), "seed": seed, "kinds": _kinds(model)}
    hashes = {key: hash_of(value) for key, value in _stored(model).items()}
    manifest = {"format": FORMAT, **facts, **said, "tensors": hashes, "inputs": [one.model_dump() for one in given]}
    return Reference(Manifest.model_validate(manifest), held)


def _kept(held: dict[str, Tensor], i: int, one: One, inputs: Inputs, *, sites: bool, store_inputs: bool) -> Given:
    """Keep one input and what comes of it."""
    draws = one.draws(inputs)
    truths, own = one.outs(draws), one.outs(draws, own=True)
    matched(own[0], truths[0], any_dtype=True)
    hashes = [[hash_of(tensor) for tensor in draw.tensors] for draw in draws]
    record = None if store_inputs else drawn_again(inputs, hashes, one.seed)
    call, out = None, None
    for d, draw in enumerate(draws):
        out = keep(held, f"own.{i}.{d}", own[d])
        if one.exact != one.dtype:
            keep(held, f"exact.{i}.{d}", truths[d])
        if record is None:
            call = keep(held, f"input.{i}.{d}", (tuple(draw.args), dict(draw.kwargs)))
    noise = one.shaken(draws, truths, FEW_UNITS, {})
    found = []
    if sites:
        moved = list(one.moved(FEW_UNITS, {}))
        found = watched.kept(held, i, one.a, moved, lambda model: one.call(model, inputs, one.exact))
    return Given(
        label=str(inputs),
        record=record,
        call=call,
        hashes=hashes,
        out=out or [],
        noise=[Noise(l2=each.l2, flips=each.flips) for each in noise],
        flat=list(one.flat(inputs, truths[0], own[0])),
        sites=found,
    )


@dataclass(frozen=True, slots=True)
class Known:
    """What the histories of A and B say: whether B is only near to A by design, and whether it is A as it was."""

    approximate: bool = False
    made: str = ""  # the last operation of those that were done to A to make B of it
    changed: bool = False  # B's tensors are not those that it has made


def against(reference: Reference, model: nn.Module, known: Known) -> Report:
    """Judge a model by the outputs of another one.

    Raises:
        VerifyError: the outputs differ in structure, shape or dtype, or the model does not run.
    """
    own = dtype_name(dtype_of(model))
    if not known.approximate and own != reference.manifest.dtype and not isinstance(model, Compiled):
        todo = "Save both in the same dtype to compare them."
        raise VerifyError(f"A is stored in {reference.manifest.dtype} and B in {own}", todo=todo)
    if isinstance(model, Compiled):
        model = shadow(model).answering_like(reference.outputs(0, "own")[0])
    one, remarks = One(model, reference.manifest.seed, reference.exact), []
    try:
        one.draws(reference.draws(0)[0])
    except NotInFloat64Error as error:
        one = One(model, reference.manifest.seed, reference.dtype)
        remarks.append(f"{error}, so outputs were compared in {reference.manifest.dtype}".replace("A does", "B does"))
    runs = [_measured(reference, i, one) for i in range(len(reference.manifest.inputs))]
    same = None if known.made or isinstance(model, Compiled) else _same(reference, model)
    arithmetic = max(one.arithmetic, EXACT)
    evidence = Evidence(tuple(runs), None, same, None, one.dtype, one.exact, one.margin, arithmetic)
    found = [*checks(evidence, approximate=known.approximate), *_made(known)]
    passed = all(check.passed for check in found)
    sites = _sites(reference, one, is_wrong=not passed)
    if any(run.odd for run in runs):
        remarks.append("NaN or Inf in the outputs of B")
    return Report(
        verdict="different" if not passed else "approximate" if known.approximate else "equivalent",
        dtype=reference.manifest.dtype,
        checks=tuple(found),
        distances=tuple(run.distance for run in runs if run.distance is not None),
        sites=tuple(sites),
        remarks=tuple(remarks),
    )


def _made(known: Known) -> Iterator[Check]:
    """Say whether B's tensors are those that its history says surgeon has made of A's, by their hash."""
    if known.made:
        says = f"all tensors are, by their hash, those that {known.made} made of A's"
        if known.changed:
            says = f"tensors were changed after {known.made} had made them of A's: their hash is another one"
        yield Check("stored tensors", float(known.changed), 0.0, not known.changed, says)


def _measured(reference: Reference, i: int, one: One) -> Measured:
    """Run B on an input and those of its kind, and compare what comes of it with what came of A."""
    given, draws = reference.manifest.inputs[i], reference.draws(i)
    is_double = one.exact == reference.exact
    truths, own_a = reference.outputs(i, "exact" if is_double else "own"), reference.outputs(i, "own")
    outs, own_b = one.outs(draws), one.outs(draws, own=True)
    pairs = matched(own_b[0], own_a[0])
    matched(outs[0], truths[0])
    is_rounded = one.dtype != one.exact
    rounding = one.rounding(InOwn(own_a, own_b, (own_b[0], own_a[0])), outs, truths, draws) if is_rounded else []
    return Measured(
        label=given.label,
        distance=figures(given.label, (outs[0], truths[0]) if is_double else None, (own_b[0], own_a[0])),
        storage=_storage(reference, given, one, draws, (outs, truths)),
        rounding=rounding,
        draws=len(draws),
        flat=tuple(given.flat),
        outputs=sum(a.is_floating_point() for _, a in pairs),
        odd=sum(not t.isfinite().all() for t in tensors(own_b[0]) if t.is_floating_point()),
        blank=sum(not t.isfinite().any() for t in tensors(truths[0]) if t.is_floating_point() and t.numel()),
    )


def _storage(
    reference: Reference, given: Given, one: One, draws: Sequence[Inputs], outs: tuple[list[Any], list[Any]]
) -> list[tuple[Apart, Apart]]:
    """Measure how far B's outputs are from A's, and what moving those tensors does that are not A's."""
    found = pooled(*outs)
    still = {key: hash_of(value) == reference.manifest.tensors.get(key) for key, value in _stored(one.own_a).items()}
    is_a = all(still.values()) and still.keys() == reference.manifest.tensors.keys()
    noise = [Apart(0.0, 0, each.count, each.is_whole) for each in found]
    is_near = all(each.l2 <= max(one.arithmetic, EXACT) and not each.flips for each in found)
    if not is_near and not (is_a and _kinds(one.own_a) == reference.manifest.kinds):
        is_built_alike = still.keys() == reference.manifest.tensors.keys()
        units = 1.0 if is_built_alike and _kinds(one.own_a) == reference.manifest.kinds else FEW_UNITS
        fixed = {
            tensor.data_ptr(): torch.ones_like(tensor, dtype=torch.bool)
            for key, tensor in _stored(one.own_a).items()
            if still[key]
        }
        noise = one.shaken(draws, outs[0], units, fixed)
        if not is_built_alike:
            noise = [each.furthest(theirs) for each, theirs in zip(noise, _theirs(given, found), strict=True)]
    return list(zip(found, noise, strict=True))


def _theirs(given: Given, found: Sequence[Apart]) -> Iterator[Apart]:
    """Give what moving A's weights by a few units did to A, as it was measured there."""
    for k, one in enumerate(found):
        there = given.noise[k] if k < len(given.noise) else Noise(l2=0.0, flips=0)
        yield Apart(there.l2, there.flips, one.count, one.is_whole)


def _same(reference: Reference, model: nn.Module) -> dict[str, Off] | None:
    """Compare stored tensors by their hashes, where B has the names that A has and nothing was done to it."""
    ours, theirs = _stored(model), reference.manifest.tensors
    if ours.keys() != theirs.keys() or _kinds(model) != reference.manifest.kinds:
        return None
    counted = [key for key in ours if not key.endswith("num_batches_tracked")]
    return {key: Off(0.0 if hash_of(ours[key]) == theirs[key] else torch.inf) for key in counted}


def _sites(reference: Reference, one: One, *, is_wrong: bool) -> list[SiteDistance]:
    """Compare the modules whose outputs were kept; where B is wrong, the first one that has moved diverges."""
    kept = [i for i, given in enumerate(reference.manifest.inputs) if given.sites]
    if not kept or one.exact != reference.exact:
        return []
    i = kept[0]
    first, sites = reference.draws(i)[0], reference.manifest.inputs[i].sites
    outs = [reference.tensors[f"site.{i}.{j}"] for j in range(len(sites))]
    run = partial(one.call, one.a, first, one.exact)
    return watched.compared(sites, outs, one.a, run, one.margin, is_wrong=is_wrong)


def _kinds(model: nn.Module) -> list[str]:
    return [kind_of(module).__qualname__ for module in model.modules()]


def _stored(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, Compiled):
        return model.stored
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}

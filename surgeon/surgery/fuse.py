"""Fold all blocks of a network, and measure how far that moves its output."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from surgeon.analysis.network import Network
from surgeon.analysis.run import Run
from surgeon.analysis.self_folding import SelfFolding
from surgeon.errors import PassError, PlanError, VerifyError
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import shadow
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.proof import calls
from surgeon.proof.distance import worst
from surgeon.surgery import give_back
from surgeon.surgery.branches import fold_further_
from surgeon.surgery.fold import fold_blocks_, forms_on, rules_for, to_deploy
from surgeon.surgery.further import Done, Further
from surgeon.surgery.give_back import Paths, Return
from surgeon.surgery.history import Operation, content_hash, history, planned_inputs, record_, versions
from surgeon.surgery.one_by_one import place_, rehearse
from surgeon.surgery.precision import Noise, cast_, checked_half, noise, raise_
from surgeon.surgery.selfcheck import check_finite, is_far, is_near, outputs_of
from surgeon.surgery.tune import Tuning, tune
from surgeon.surgery.tuned import Tuned

BLOCKS_ONLY = Further()
_NOT_BOTH = "Keep the norms, or tune: take one of the two options away."


@dataclass(frozen=True, slots=True)
class Folded:
    """What fuse did: the blocks that were folded, how far that moved the output, and which norms are back."""

    blocks: tuple[str, ...]
    distance: float | None
    norms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # sentences about modules that fold themselves
    warning: str | None = None  # keys that do not fit back, though that was asked for
    further: Done = field(default_factory=Done)  # what was folded besides blocks
    noise: Noise | None = None  # what a smaller dtype costs, where one was asked for and an input is known
    tuned: Tuned | None = None  # what was measured of the forms of blocks, where that was asked for

    def say(self, log: logging.Logger) -> None:
        """Log what the user has to know."""
        for note in self.notes:
            log.info(note)
        if self.warning is not None:
            log.warning(self.warning)


@ordinary()
def fold_all_(
    network: Network,
    *,
    dense: bool = False,
    keep_norms: bool = False,
    further: Further = BLOCKS_ONLY,
    dtype: torch.dtype | None = None,
    tuning: Tuning | None = None,
    progress: Progress = silent,
) -> Folded:
    """Fold, record it in the model's history, and say what was folded and how far the output moved.

    With `keep_norms` every block becomes the conv and the norm that it was made of. Blocks inside modules that fold
    themselves do so always. `further` says what is folded besides blocks. With `dtype`, float16 or bfloat16, all is
    done in float64, and the network is cast last. With `tuning`, each block is deployed in its fastest form.

    Raises:
        PlanError: it overflows, or does not run, when its blocks are folded, or a norm cannot go back to where it was.
        PassError: it moved the output by more than rounding can. The model is as it was.
    """
    if further and keep_norms:
        raise PlanError("norms are to be kept, and to be folded", todo="Take one of the two options away.")
    if tuning is not None and keep_norms:
        raise PlanError("blocks that become a conv and a norm have no forms to tune", todo=_NOT_BOTH)
    model, inputs = network.model, network.inputs
    progress("running the network as it was", 0)
    half = None if dtype is None else checked_half(dtype)
    parent, restore = content_hash(model), _snapshot(model)
    with _or_as_it_was(restore):
        if dtype is not None:
            raise_(model)
        before = outputs_of(model, inputs)
    planned = planned_inputs(history(model))  # verify will look at the network with these, too
    returns = give_back.returns(network, history(model), everywhere=keep_norms, dense=dense)
    notes = () if further.branches else _notes(network, returns)
    progress("folding, and running the network as it is then", 0.5)
    rules, tuned = 1 if keep_norms else rules_for(network, dense=dense), None
    forms = {} if keep_norms else forms_on(network, devices.of(model))
    is_plain = not (further or keep_norms or returns or half or forms or tuning)
    if is_plain and (tried := _rehearsed(network, before, dense=dense)) is not None:
        distance, blocks, rests = tried
        del restore, network, tried  # which hold the blocks
        folded, more, lost = place_(model, blocks, rests), Done(), None
    else:
        original = shadow(model)
        is_planned = inputs is not None and planned is not None and inputs.text == planned.text
        looked = network if is_planned else Network(model, called_with=planned)
        run = network.run if further and inputs is not None else Run()
        how: dict[str, Any] = {"dense": dense, "returns": returns, "deploys": not keep_norms}
        with _or_as_it_was(restore):
            if tuning is not None:
                tuned = _tuned(looked, how, further, dtype, inputs, tuning, parts(progress, 0.5, 0.85))
                forms = tuned.forms
            step = parts(progress, 0.5 if tuning is None else 0.85, 0.9)
            folded, more = _fold_(looked, {**how, "forms": forms}, further, run, step)
            distance = None if before is None or inputs is None else _distance(model, original, inputs, before)
            lost = None if dtype is None else _cast(model, original, inputs, dtype)
    if folded or more or dtype is not None:
        measured: dict[str, Any] = {"folded": len(folded)} | ({} if distance is None else {"whole": distance})
        measured |= {} if lost is None else lost.to_dict()
        measured |= {} if tuned is None else {"tuned": tuned.record}
        said: dict[str, Any] = {"dense": dense, "keep_norms": keep_norms, "rules": rules, "dtype": half}
        said |= {"returned": () if keep_norms else tuple(paths[0] for paths in returns)}
        said |= {"branches": further.branches, "norms": further.norms}
        said |= {"within": tuple(more.modules), "before": tuple(more.norms), "measured": measured}
        said |= {"forms": tuple(forms.items())}
        record_(model, Operation("fuse", parent, content_hash(model), None, versions(), **said))
    norms = tuple(one.norm[0] for one in returns.values() if one.norm)
    warning = give_back.unfit(model, returns) if keep_norms else None
    return Folded(folded, distance, norms, notes, warning, more, lost, tuned)


@contextlib.contextmanager
def _or_as_it_was(restore: Callable[[], None]) -> Iterator[None]:
    """Put a network back if what is done to it fails."""
    try:
        yield
    except BaseException:
        restore()
        raise


def _rehearsed(
    network: Network, before: Any, *, dense: bool
) -> tuple[float | None, tuple[Paths, ...], tuple[Paths, ...]] | None:
    """Try to fold a large network without holding its blocks and their convs together.

    Returns how far its output will move, and the names of what is to be placed; None if it has to be done at once.
    """
    if (tried := rehearse(network, dense=dense)) is None:
        return None
    distance = None
    if before is not None and network.inputs is not None:
        try:
            after = calls.outputs(tried.copy, network.inputs)
        except VerifyError:  # it reads a conv that it does not call, say
            return None
        if not is_near(network.model, before, after):
            return None
        check_finite(network.model, before, after, "folding")
        distance = worst(after, before)
    network.forget_()
    return distance, tried.blocks, tried.rests


def _fold_(
    looked: Network, how: Mapping[str, Any], further: Further, run: Run, progress: Progress
) -> tuple[tuple[str, ...], Done]:
    """Fold blocks, and what else is asked for; what is folded further stays in float64 until the end."""
    dtypes: dict[nn.Module, torch.dtype] | None = {} if further else None
    folded = fold_blocks_(looked, **how, dtypes=dtypes)
    again = Network(looked.model, called_with=looked.called_with)
    return folded, fold_further_(again, further, run=run, dtypes=dtypes, progress=progress)


def _tuned(
    looked: Network,
    how: Mapping[str, Any],
    further: Further,
    dtype: torch.dtype | None,
    inputs: Inputs | None,
    tuning: Tuning,
    progress: Progress,
) -> Tuned:
    """Choose the forms of blocks on copies of the network, folded as it will be."""

    def folded(forms: Mapping[str, str]) -> nn.Module:
        copied = Network(shadow(looked.model), called_with=looked.called_with)
        _fold_(copied, {**how, "forms": forms}, further, copied.run if further else Run(), silent)
        if dtype is not None:
            cast_(copied.model, dtype)
        return copied.model

    blocks = to_deploy(Network(shadow(looked.model), called_with=looked.called_with), dense=how["dense"])
    return tune(folded, blocks, inputs, dtype, tuning, progress)


def _cast(model: nn.Module, original: nn.Module, inputs: Inputs | None, dtype: torch.dtype) -> Noise | None:
    """Cast a network last of all, and measure what that costs."""
    cast_(model, dtype)
    return noise(model, original, inputs, dtype)


def _notes(network: Network, returns: Mapping[Paths, Return]) -> tuple[str, ...]:
    """Say which modules fold themselves, what to call next, and which of them would read a block wrongly."""
    called = give_back.to_call_next(network, [paths for paths, one in returns.items() if one.norm])
    misread = give_back.misread(network, returns)
    return (
        *(_next(one, more) for one, more in called.items()),
        *(f"{path} is in the way: {one}, and would read this block wrongly" for path, one in misread.items()),
    )


def _next(one: SelfFolding, more: int) -> str:
    others, call = (f", as {more} more do", f"{one.how}, and the same of the others,") if more else ("", one.how)
    call = one.how if one.folds_all else call
    return f"{one}{others}, so blocks in it became a conv and a norm again; call {call} next"


def _distance(model: nn.Module, original: nn.Module, inputs: Inputs, before: Any) -> float:
    """Measure how far folding has moved the output, and refuse what rounding does not explain."""
    after = _outputs_now(model, inputs)
    check_finite(model, before, after, "folding")
    distance = worst(after, before)
    if is_far(model, original, inputs, before, after):
        raise PassError("fuse", f"the network is {distance:.1e} from what it was before its blocks were folded")
    return distance


def _outputs_now(model: nn.Module, inputs: Inputs) -> Any:
    """Run a network that ran before its blocks were folded."""
    try:
        return calls.outputs(model, inputs)
    except VerifyError as error:
        raise PlanError(
            f"with its blocks folded, {error.problem}",
            todo="Change the code that reads what plain convs in place of a block do not have; --dense (in Python, "
            "dense=True) makes one conv of each HetConv, which has all that a conv has.",
        ) from error


def _registers(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)[name]) for name in ("_modules", "_parameters", "_buffers")}


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember which modules a model holds, and what they are; returns a function that puts them back.

    Folding changes no tensor, so none is copied.
    """
    held = [(module, type(module), dict(vars(module)), _registers(module)) for module in model.modules()]

    def restore() -> None:
        for module, kind, state, registers in held:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            for name, known in registers.items():
                vars(module)[name].clear()
                vars(module)[name].update(known)
            if isinstance(module, fx.GraphModule):  # its class holds the code of its graph
                module.recompile()

    return restore

"""Repeat what a history records: on a copy, to prove a model, or on a network built anew, to open its file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from surgeon.analysis import fingerprint as fingerprints
from surgeon.analysis import sites
from surgeon.analysis.network import Network
from surgeon.analysis.self_folding import SelfFoldings
from surgeon.blocks import Foldable
from surgeon.errors import StoreError
from surgeon.files.architectures import Architecture
from surgeon.files.load import build, build_named_in_file
from surgeon.files.pickles import Trust
from surgeon.models.call import Inputs
from surgeon.models.copies import duplicate, kind_of, shadow
from surgeon.proof.distance import as_double
from surgeon.proof.evidence import Replay
from surgeon.surgery import give_back, lineage
from surgeon.surgery import manifest as manifests
from surgeon.surgery.bake import bake_
from surgeon.surgery.branches import fold_further_
from surgeon.surgery.check import check
from surgeon.surgery.fold import fold_blocks_
from surgeon.surgery.further import Further, Recorded
from surgeon.surgery.history import Operation, content_hash, history, planned_inputs, set_history_
from surgeon.surgery.operate import operate_
from surgeon.surgery.permute import permute_
from surgeon.surgery.plan import Plan
from surgeon.surgery.precision import cast_
from surgeon.surgery.selfcheck import check_permuted


def redo_(
    model: nn.Module, steps: Sequence[Operation], before: Sequence[Operation] = (), *, like: nn.Module | None = None
) -> nn.Module:
    """Carry out recorded operations again on `model` itself, and return it; its history lacks those in `before`.

    `like` is the model in its own dtype, if this one is in float64 to prove another: tensors are baked as they were
    there, and nothing is cast to a smaller dtype.
    """
    done = [*history(model), *before]
    for step in steps:
        if step.operation == "fit":  # which changes numbers alone, and cannot be done again without the images
            done.append(step)
            continue
        if step.plan is None:
            network = Network(model, called_with=planned_inputs(done))
            returns = give_back.recorded(network, done, step)
            deploys = not step.keep_norms
            further = Further(branches=step.branches, norms=step.norms, costlier=step.dense)
            dtypes: dict[nn.Module, torch.dtype] | None = {} if further else None
            how: dict[str, Any] = {"dense": step.dense, "deploys": deploys, "rules": step.rules}
            how["forms"] = dict(step.forms)
            fold_blocks_(network, **how, returns=returns, dtypes=dtypes)
            folded = Network(model, called_with=network.called_with)
            fold_further_(folded, further, recorded=Recorded(step.before, step.within), dtypes=dtypes)
            if step.dtype is not None and like is None:
                cast_(model, getattr(torch, step.dtype))
        else:
            plan = Plan.model_validate(step.plan)
            given = fingerprints.fingerprint(model) if plan.baked else None
            bake_(model, plan.baked, like)
            network = Network(model, called_with=plan.inputs)
            check(plan, sites.survey(network), given, is_recorded=True)  # it may have come with a file
            permute_(model, plan.permuted)
            operate_(model, plan, network)
        done.append(step)
    return model


def redo_rounding_(model: nn.Module, steps: Sequence[Operation]) -> nn.Module:
    """Do the same in float64, but round every tensor to its dtype between two operations, as a file does."""
    for i, step in enumerate(steps[:-1]):
        exact = redo_(shadow(model, as_double), [step], steps[:i], like=model)
        redo_(model, [step], steps[:i]).load_state_dict(exact.state_dict())
    return redo_(shadow(model, as_double), steps[-1:], steps[:-1], like=model)


def rebuild(manifest: str, given: Architecture | None, stored: int = 0, *, trust: Trust, seed: int) -> nn.Module:
    """Make the network that a safetensors file belongs to: build its architecture and repeat its history.

    `stored` is how many bytes of weights the file holds.

    Raises:
        StoreError: the manifest is not surgeon's, or it names no architecture (pass one with --arch), or it names
            another one than the one given.
    """
    named, steps = manifests.read(manifest)
    if given is None and named is None:
        raise StoreError(
            "the file holds weights, but does not say which network they belong to",
            todo="Name the network that it was made from: --arch model.pt.",
        )
    if given is not None:
        model = build(given, trust=trust, seed=seed)
    elif named is not None:  # the file chose the name, so only networks of a library are allowed
        model = build_named_in_file(named, stored, trust=trust, seed=seed)
    known = len(history(model))
    for i, step in enumerate(steps[known:]):
        if step.plan is not None and not fingerprints.fits(step.plan["model"], model):
            raise StoreError(
                "the file was not made from that network", todo="Name with --arch the network that it was made from."
            )
        redo_(model, [step], steps[known : known + i])
    set_history_(model, steps)
    return model


def steps_between(a: nn.Module, b: nn.Module) -> tuple[Operation, ...]:
    """Find how `b` was made from `a`, if every step is known and nothing was trained in between."""
    steps = history(b)
    return steps_since(steps, history(a), content_hash(a) if steps else "")


def steps_since(steps: Sequence[Operation], known: Sequence[Operation], start: str) -> tuple[Operation, ...]:
    """Find which of B's steps were done to A, of which the history and the hash of its tensors are known."""
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, known, strict=False)))
    if len(known) > shared:  # A went another way than B
        return ()
    for i, step in enumerate(steps[shared:], shared):  # an octave model has the tensors that it was made from
        chain = tuple(steps[i:])
        if step.parent == start and all(one.result == two.parent for one, two in itertools.pairwise(chain)):
            return chain
    return ()


def lapse(a: nn.Module, b: nn.Module) -> str | None:
    """Say why the history that B carries tells nothing about A; None if it carries none, or the one that A has."""
    steps = history(b)
    if not steps or steps == history(a):
        return None
    return (
        "B's history does not begin at A, and decides nothing: B was made from another model, or a tensor of A, "
        "if only a counter, has changed since"
    )


def folded_since(replayed: nn.Module, b: nn.Module) -> str | None:
    """Say that B was folded by its own methods, or its blocks by others, after surgeon had made it; None if it was not.

    Then its history says less than all, and a replay of it is another network.
    """
    ours, theirs = (dict(one.named_modules(remove_duplicate=False)) for one in (b, replayed))
    shared = ours.keys() & theirs.keys()
    changed = [
        *(ours.keys() ^ theirs.keys()),
        *(path for path in shared if kind_of(ours[path]) is not kind_of(theirs[path])),
    ]
    blocks = tuple(path for path, module in theirs.items() if isinstance(module, Foldable))
    foldings, where = SelfFoldings(replayed), []
    for path in sorted(changed):
        block = next((one for one in blocks if f"{path}.".startswith(f"{one}.")), None)
        if (found := block or foldings.around([path])) is None:
            return None
        where.append(f"{found}, which is a block" if isinstance(found, str) else f"{found.path} ({found.kind})")
    if not where:
        return None
    return f"B was folded by other code after surgeon had made it, at {where[0]}; it is compared without its history"


def done_again(a: nn.Module, steps: Sequence[Operation]) -> Replay:
    """Repeat the steps on a copy."""
    exact = redo_(shadow(a, as_double), steps, like=a)
    cast = [getattr(torch, step.dtype) for step in steps if step.dtype is not None]
    rounded = exact if len(steps) == 1 else redo_rounding_(duplicate(a), steps)
    names, keeps = lineage.came_from(exact, steps), lineage.keeps_training(steps)
    return Replay(exact, rounded, cast[-1] if cast else None, names, keeps_training=keeps)


def as_baked(a: nn.Module, steps: Sequence[Operation]) -> tuple[nn.Module, tuple[str, ...]]:
    """Give A with the tensors that the steps bake, and the names of these convs.

    They are computed in the dtype that A has, as they were when they were baked; in float64 they would be others.
    """
    names = tuple(name for step in steps if step.plan is not None for name in Plan.model_validate(step.plan).baked)
    if not names:
        return a, ()
    bare = shadow(a)
    bake_(bare, names)
    return bare, names


def can_be_done(steps: Sequence[Operation]) -> bool:
    """Whether operations can be repeated: fitting needs the images that it was done on."""
    return bool(steps) and all(step.operation != "fit" for step in steps)


def in_order_of(a: nn.Module, steps: Sequence[Operation], inputs: Inputs | None) -> nn.Module:
    """Give A with its channels permuted as the first step permutes them: A itself where it permutes none.

    Raises:
        CaptureError: that is not what A computes.
    """
    plan = Plan.model_validate(steps[0].plan) if steps and steps[0].plan is not None else None
    if plan is None or not plan.permuted:
        return a
    check_permuted(a, plan.permuted, inputs)
    made = shadow(a, torch.clone)
    permute_(made, plan.permuted)
    return made


def is_approximate(step: Operation) -> bool:
    if step.operation == "fit":
        return True
    return step.plan is not None and not Plan.model_validate(step.plan).keeps_function

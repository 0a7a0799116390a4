"""Two models → report: do they compute the same, how far are they apart, and where do they diverge.

It answers three questions, in eval mode, on copies; each has a limit of its own, and none excuses another:

1. Is the mathematics right? If it is known how B was made from A, the same is done to A in float64. The result (the
   replay, which the caller hands in) must agree with A (checks `mathematics` and `blocks`), and every module of B must
   be built as the replay built it (`structure`).
2. Is what is stored that result? Every tensor stored in B must be the replay's, rounded once (`stored tensors`), and B
   must compute what the replay computes with B's tensors (`modules`).
3. Does B's arithmetic behave? In their own dtype, B may be m times as far from itself in float64 as A is (`rounding`).

For any other pair of models 1 and 2 become: in float64, as stored, the difference must be explained by how weights are
stored, at the outputs (`storage`) and at every module that both have (`same tensors`, `sites`), and the code between
the modules must do the same (`wiring`).

If the caller asks for a proof, the replay is also compared with A without running inputs (`operators`): the operators
of all that was folded are recovered, and the graphs around them are the same.

In train mode the same is asked of one step of both, if the caller wants that: of its outputs (`training`), of the
statistics behind it (`statistics`, `train settings`), and in either mode of its gradients (`gradients`).

Each check is a file in the folder `checks`, which states its equation. Relative L2 is ‖b − a‖ / ‖a‖ over all elements
of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.models.devices import dtype_of
from surgeon.models.progress import Progress
from surgeon.proof.bisect import bisect
from surgeon.proof.checks import checks
from surgeon.proof.distance import dtype_name
from surgeon.proof.divergence import site_table
from surgeon.proof.evidence import Evidence, Measured, Replay
from surgeon.proof.guess import guesses
from surgeon.proof.matching import check_names
from surgeon.proof.proving import of_proof, with_proof
from surgeon.proof.report import Report
from surgeon.proof.runs import Models, NotInFloat64Error
from surgeon.proof.steps import How
from surgeon.proof.structure import changed_by_running, differences
from surgeon.proof.training import Made, of_steps, with_steps
from surgeon.proof.ulps import stored_off


def verify(
    a: nn.Module,
    b: nn.Module,
    inputs: Sequence[Inputs],
    *,
    replay: Replay | None = None,
    approximate: bool = False,
    seed: int = 0,
    named: Sequence[tuple[str, str]] = (),
    bisecting: Progress | None = None,
    how: How | None = None,
    proving: bool = False,
) -> Report:
    """Compare B with A on each of the inputs; neither is changed, whatever mode it is in.

    `approximate` says that B was not meant to compute what A does; then only its stored tensors are judged.
    `named` are modules of A and of B that belong together though their names differ, which only counts
    without a replay. With `bisecting`, which is told how far that is, the smallest set of modules that explains a
    difference is looked for. `how` asks for a step in train mode, or for gradients, besides. `proving` asks for a proof
    that needs no inputs.

    Raises:
        VerifyError: the outputs differ in structure, shape or dtype, or a model does not run.
    """
    models, runs, remarks = _measured(a, b, inputs, replay, seed, named)
    evidence = _evidence(models, runs, b, replay, a)
    if proving and not approximate:
        evidence = with_proof(evidence, models, inputs[0])
    how = How() if how is None else how
    if how.is_wanted:
        evidence = with_steps(evidence, models, a, b, inputs, Made(replay, approximate), how)
    found = checks(evidence, approximate=approximate)
    passed = all(check.passed for check in found)
    rows = site_table(evidence, models.kinds, models.sites)
    diverging = [row.path for row in rows if row.diverges]
    approximate = approximate or any(one.departs for one in evidence.steps)
    said = [*remarks, *_remarks(evidence), *_alone(models, runs), *_matched(models, diverging, named)]
    said += [*of_steps(evidence), *(of_proof(evidence, passed=passed) if proving else ())]
    return Report(
        verdict="different" if not passed else "approximate" if approximate else "equivalent",
        dtype=dtype_name(models.dtype),
        checks=tuple(found),
        distances=tuple(run.distance for run in runs if run.distance is not None),
        sites=rows,
        remarks=tuple(said),
        guesses=() if passed else guesses(models, inputs[0], diverging),
        bisected=None if passed or bisecting is None else bisect(models, inputs, diverging, bisecting),
        mode=how.mode,
        tensors=tuple(one for step in evidence.steps for one in step.tensors),
        for_every_input=passed and not approximate and evidence.is_for_every_input,
    )


def _measured(
    a: nn.Module,
    b: nn.Module,
    inputs: Sequence[Inputs],
    replay: Replay | None,
    seed: int,
    named: Sequence[tuple[str, str]],
) -> tuple[Models, tuple[Measured, ...], list[str]]:
    """Run the models in float64, or in their own dtype where they do not run in it; what is to be said of that."""
    check_names(a, b, named)
    models = Models(a, b, replay, seed, torch.float64, named)
    own = dtype_name(models.dtype)
    if (other := dtype_of(b)) != models.dtype:  # that of A, unless it is known that B was cast
        raise VerifyError(
            f"A is stored in {own} and B in {dtype_name(other)}", todo="Save both in the same dtype to compare them."
        )
    try:
        return models, models.run(inputs), []
    except NotInFloat64Error as error:
        models = Models(a, b, replay, seed, models.dtype, named)
        return models, models.run(inputs), [f"{error}, so outputs were compared in {own}"]
    except VerifyError as error:
        raise _told(error, models, inputs[0]) from error


def _told(error: VerifyError, models: Models, inputs: Inputs) -> VerifyError:
    """Say what is probably wrong at the module from which on results have another shape."""
    site = error.facts.get("site")
    found = guesses(models, inputs, [site]) if site is not None else ()
    if not found:
        return error
    return VerifyError(f"{error.problem}. Probably {found[0].says}", todo=error.todo, **error.facts, guess=found[0])


def _alone(models: Models, runs: Sequence[Measured]) -> Iterator[str]:
    """Say which modules of B were compared with none of A."""
    if models.replay is None and any(run.gaps for run in runs) and (alone := models.without_counterpart(runs)):
        named = ", ".join(alone[:3]) + ", …" * (len(alone) > 3)
        words = ("module", "has", "its") if len(alone) == 1 else ("modules", "have", "their")
        what = f"{len(alone)} {words[0]} of B with weights {words[1]} no counterpart in A: {named}"
        yield f"{what}; only outputs show {words[2]} faults"


def _matched(models: Models, diverging: Sequence[str], named: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Say how modules of other names were matched, and which one of B is the first that diverges."""
    if named and models.replay is not None:
        yield "names that belong together were given, and not needed: B's history says which do"
    yield from models.matched.says()
    there = models.pairing.there
    if diverging and (name := there.get(diverging[0], diverging[0])) != diverging[0]:
        yield f"{diverging[0]} of A is {name} in B"


def _evidence(
    models: Models, runs: tuple[Measured, ...], b: nn.Module, replay: Replay | None, a: nn.Module
) -> Evidence:
    """Put together what the runs have measured and what is compared without running."""
    stored = same = built = None
    if replay is None:
        same = {} if models.is_compiled else models.same_tensors(runs)
    else:
        stored = stored_off(b, replay.rounded, models.own_a if models.was_cast else a)
        expected = models.twin or models.replay or replay.exact
        changing = changed_by_running(replay.exact, expected) | changed_by_running(b, models.b)
        built = differences(expected, models.b, changing)
    return Evidence(
        *(runs, stored, same, built, models.dtype, models.exact),
        margin=models.margin,
        arithmetic=models.arithmetic,
        is_compiled=models.is_compiled,
    )


def _remarks(evidence: Evidence) -> Iterator[str]:
    given = [run for run in evidence.runs if not run.is_probe]
    if any(run.odd for run in given):
        yield "NaN or Inf in the outputs of B"  # where A has none, that is a check that fails
    if any(run.distance is None for run in given):
        yield "the shapes of the outputs depend on rounding, so B's were compared with those of the replay alone"
    if flat := sorted({i for run in given for i in run.flat}):
        which = f"output {flat[0]}" if given[0].outputs > 1 else "the output"
        yield f"{which} of A does not move when the input does, so it shows nothing; its modules decide"
    if evidence.is_compiled:
        yield "a file that holds a program has no modules, so the outputs were compared"
    elif evidence.same is not None and not any(run.gaps for run in evidence.runs):
        yield "A and B have no module of the same name, so their outputs alone were compared"

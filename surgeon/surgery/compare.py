"""Two models → Report: what was done to make B of A is done again, and B compared with that.

Either may be a file that holds a program. What its history says is done to A, and the file compared with the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from surgeon.analysis import example as examples
from surgeon.analysis.example import Example
from surgeon.errors import CaptureError, VerifyError
from surgeon.files.exports.base import SAID, Program
from surgeon.files.exports.compiled import Compiled
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import duplicate, shadow
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.models.wrappers import checked
from surgeon.proof import calls, training
from surgeon.proof import verify as equivalence
from surgeon.proof.report import Report
from surgeon.proof.steps import How
from surgeon.surgery import history as histories
from surgeon.surgery import replay
from surgeon.surgery.look import inputs_for

_UNPROVED = "nothing was proved for every input: what a file computes cannot be followed step by step"


def verify(
    a: nn.Module,
    b: nn.Module,
    example: Example | Sequence[Example] | None = None,
    *,
    seed: int = 0,
    names: Mapping[str, str] | None = None,
    bisect: bool = False,
    mode: Literal["eval", "train"] = "eval",
    gradients: bool = False,
    prove: bool = False,
    progress: Progress = silent,
) -> Report:
    """Say whether `b` computes what `a` does, how far apart they are, and where they diverge.

    `example` is one input or a list of them, each as `examples.make` takes it: a shape, a tensor, a tuple of arguments,
    a dict of named ones. If b's history says that it was made from a, the same is done to a in float64, and b must
    be the result, rounded once.

    `names` are modules of `a` and of `b` that belong together though their names differ, with all that lies in them;
    those with the same tensors are found without. With `bisect`, the smallest set of modules is looked for
    that, put right, makes the difference vanish.

    With `prove`, what was folded is also compared without running inputs: for every input, of every size.

    With `mode="train"` one step in train mode is compared as well, with the same batch and the same random numbers:
    its outputs, and the running statistics behind it. With `gradients` those of one scalar of the outputs are compared,
    for inputs and for every parameter that both models have. Both are asked of copies: neither model is changed.

    >>> from surgeon import convert
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> verify(model, convert(model, "acnet"), (1, 3, 8, 8)).verdict
    'equivalent'

    Raises:
        VerifyError: the outputs differ in structure, shape or dtype.
    """
    with ordinary():
        first, second = (parts(progress, 0, 0.7), parts(progress, 0.7, 1)) if bisect else (progress, None)
        more: dict[str, Any] = {"named": tuple((names or {}).items()), "bisecting": second, "proving": prove}
        return compare(a, b, example, seed, first, How(mode == "train", gradients, seed), **more)


def compare(
    a: nn.Module, b: nn.Module, example: Any, seed: int, progress: Progress, how: How | None = None, **more: Any
) -> Report:
    """Compare two models on one example or a list of them; what a history says is done again to A first.

    `how` asks for a step in train mode or for gradients, and `more` are further arguments of `proof.verify`.
    """
    checked(a), checked(b)
    how = How(seed=seed) if how is None else how
    training.check(a, b, how)
    if isinstance(b, Compiled) and not isinstance(a, Compiled) and (made := _made_again(a, b)) is not None:
        return _in_two_steps(a, made, b, example, seed, progress, **more)
    a, b = _in_one_place(a, b)
    progress("looking for an input", 0)
    steps = replay.steps_between(a, b)
    known = _known(a, b, example, seed, is_made=bool(steps))
    a, b = _alike(a, b, known[0], seed)
    progress("repeating the operations in float64", 0.1)
    again = replay.done_again(a, steps) if replay.can_be_done(steps) else None
    progress("comparing", 0.4)
    is_approximate = any(map(replay.is_approximate, steps))
    reference, taken = replay.as_baked(a, steps)
    try:
        reference = replay.in_order_of(reference, steps, known[0])
    except CaptureError as error:
        found = equivalence.verify(a, b, known, seed=seed, how=how, **more)
        return replace(found, remarks=(*found.remarks, f"B's history permutes channels, but {error.problem}"))
    if again is not None and (since := replay.folded_since(again.exact, b)) is not None:
        found = equivalence.verify(a, b, known, seed=seed, how=how, **more)
        return replace(found, remarks=(*found.remarks, since))
    found = equivalence.verify(
        reference, b, known, replay=again, approximate=is_approximate, seed=seed, how=how, **more
    )
    if steps and not found and histories.content_hash(b) != steps[-1].result:
        changed = f"B's tensors were changed after {steps[-1].operation} had made it"
        found = replace(found, remarks=(*found.remarks, changed))
    if taken:
        found = replace(found, remarks=(*found.remarks, f"A is compared with baked tensors in {', '.join(taken)}"))
    if not steps and (lapse := replay.lapse(a, b)) is not None:
        found = replace(found, remarks=(*found.remarks, lapse))
    return found


def _in_one_place(a: nn.Module, b: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Give both on the device of A; on the CPU if one is a program in a file, which runs there."""
    if isinstance(a, Compiled) or isinstance(b, Compiled):
        a, b = devices.on(a, devices.CPU), devices.on(b, devices.CPU)
    elif (place := devices.of(a)) is not None and place.type != "meta":
        b = devices.on(b, place)
    if empty := [name for name, model in (("A", a), ("B", b)) if any(p.is_meta for p in model.parameters())]:
        raise VerifyError(
            f"{' and '.join(empty)}: parameters are on the meta device, and hold no numbers",
            todo="Load its weights first.",
        )
    return a, b


def _known(a: nn.Module, b: nn.Module, example: Any, seed: int, *, is_made: bool) -> list[Inputs]:
    """Give the inputs to compare on: one example or a list of them, or what is known where there is none.

    If B was made from A (`is_made`), its history says which input it was made with.
    """
    is_list = isinstance(example, list) and not all(isinstance(side, int) for side in example)
    given: Any = example if is_list else [example]
    if isinstance(a, Compiled) or isinstance(b, Compiled):
        inputs = [_for_file(a, b, one, seed) for one in given]
    else:
        inputs = [inputs_for(b if one is None and is_made else a, one, seed=seed) for one in given]
    known = [one for one in inputs if one is not None]
    if not known:
        raise CaptureError("no input is known that the model accepts", todo=examples.PASS_ONE)
    return known


def _made_again(a: nn.Module, b: Compiled) -> nn.Module | None:
    """Make of A what the history in a file says that the file was exported from; None if it says nothing about A."""
    named = nn.Module()
    try:
        data = json.loads(b.program.said.get(f"{SAID}history", "null"))
    except (ValueError, RecursionError) as error:
        raise histories.foreign("the history in the metadata of the file") from error
    if data is None:
        return None
    histories.set_history_(named, histories.steps_in(data, "the history in the metadata of the file"))
    steps = replay.steps_between(a, named)
    if not replay.can_be_done(steps):
        return None
    made = replay.redo_(duplicate(a), steps)
    made.load_state_dict(replay.done_again(a, steps).rounded.state_dict())  # rounded once, to the dtypes that it has
    histories.set_history_(made, histories.history(named))
    return made


def _in_two_steps(
    a: nn.Module,
    made: nn.Module,
    b: Compiled,
    example: Any,
    seed: int,
    progress: Progress,
    *,
    proving: bool = False,
    **more: Any,
) -> Report:
    """Compare A with what its history makes of it, and the file with that; only the former has modules to look at."""
    first = compare(a, made, example, seed, parts(progress, 0, 0.5), **more)
    second = compare(_without_history(made), b, example, seed, parts(progress, 0.5, 1))
    verdict = second.verdict if first.verdict == "equivalent" else first.verdict
    said = "what the history in the file says was done to A again; the second half of the checks is about the file"
    return replace(
        first,
        verdict="different" if second.verdict == "different" else verdict,
        checks=(*first.checks, *second.checks),
        distances=second.distances if first.verdict == "equivalent" else first.distances,
        remarks=(said, *first.remarks, *second.remarks, *([_UNPROVED] if proving else [])),
    )


def _without_history(model: nn.Module) -> nn.Module:
    own = shadow(model)
    histories.set_history_(own, ())
    return own


def _for_file(a: nn.Module, b: nn.Module, example: Any, seed: int) -> Inputs | None:
    """Give the example, or an input that a file says it was made with or takes, or one that the other model accepts."""
    if example is not None:
        return examples.make(example, seed=seed)
    files = [model.program for model in (a, b) if isinstance(model, Compiled)]
    code = next((model for model in (a, b) if not isinstance(model, Compiled)), a)
    return examples.look(
        code, [_recorded(one.said.get(f"{SAID}input")) for one in files] + list(map(_declared, files)), seed=seed
    ).inputs


def _recorded(text: str | None) -> Any:
    """Read the input that a file says it was made with: shapes or text, which are checked when they are used."""
    try:
        found = json.loads(text or "null")
        return found if isinstance(found, str) else [tuple(map(int, shape)) for shape in found or ()] or None
    except (ValueError, TypeError, RecursionError):
        return None


def _declared(program: Program) -> list[tuple[int, ...]] | None:
    """Give the shapes that a file says it takes, with a batch of 1; None where it leaves more open than the batch."""
    shapes = []
    for port in program.inputs:
        if port.sides is None or port.dtype is None or not port.dtype.is_floating_point:
            return None
        if any(not isinstance(side, int) for side in port.sides[1:]):
            return None
        shapes.append(tuple(side if isinstance(side, int) else 1 for side in port.sides))
    return shapes or None


def _alike(a: nn.Module, b: nn.Module, inputs: Inputs, seed: int) -> tuple[nn.Module, nn.Module]:
    """Let a file answer in the structure of the other model's result; two files answer in lists of tensors."""
    if isinstance(a, Compiled) is isinstance(b, Compiled):
        return a, b
    out = calls.outputs(b if isinstance(a, Compiled) else a, inputs, seed=seed)
    made = [shadow(one).answering_like(out) if isinstance(one, Compiled) else one for one in (a, b)]
    return made[0], made[1]

"""What probably went wrong, in words: for the places where two models diverge, the fault that explains the difference.

What is expected at a place is the replay's module or, where no replay proves B, A's. It is compared with B's, tensor by
tensor and on what it is given in a run, by the hypotheses in the folder `faults`. Where none of them explains the whole
difference to within rounding, nothing is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import kind_of
from surgeon.octave.absorb import undone
from surgeon.proof import alike
from surgeon.proof.explained import Explained
from surgeon.proof.faults import guess
from surgeon.proof.faults.case import OF_A_FOLD, Case, as_one, tensors_of
from surgeon.proof.faults.folds import folded
from surgeon.proof.isolated import FEW_UNITS
from surgeon.proof.recorder import Recorder, Recording, Stretch
from surgeon.proof.report import Guess

MOST = 4  # places at which a fault is guessed: those after them mostly inherit it


def guesses(models: Explained, inputs: Inputs, diverging: Sequence[str]) -> tuple[Guess, ...]:
    """Guess the faults at the first places that diverge; at the whole network where no place does."""
    if models.is_compiled:
        return ()
    paths = _with_holders(models, diverging)[:MOST] or _unlike(models)[:MOST] or [""]
    with torch.no_grad():
        try:
            made = list(
                _of_replay(models, inputs, paths) if models.replay is not None else _of_a(models, inputs, paths)
            )
        except VerifyError:
            return ()
        found = [guess(case) for case in made]
    return tuple(one for one in found if one is not None)


def _with_holders(models: Explained, diverging: Sequence[str]) -> list[str]:
    """Name the module that holds a tensor, where a report names a tensor that should not be there."""
    known = {path for model in (models.core_a, models.b, models.core_b) for path, _ in model.named_modules()}
    return list(dict.fromkeys(path if path in known else path.rpartition(".")[0] for path in diverging))


def _unlike(models: Explained) -> list[str]:
    """Name modules without tensors that are of another class in B, where no place diverges on the inputs at hand."""
    ours, theirs = _modules(models.core_a), _modules(models.core_b)
    pairs = [(path, ours[path], theirs.get(models.pairing.there.get(path, path))) for path in models.pairing.paths]
    return [
        path
        for path, one, other in pairs
        if other is not None and kind_of(one) is not kind_of(other) and not tensors_of(one) and not tensors_of(other)
    ]


def _of_replay(models: Explained, inputs: Inputs, paths: Sequence[str]) -> Iterator[Case]:
    """Compare B's modules with the replay's, under the same names."""
    assert models.replay is not None
    reference = undone(models.replay)
    ours, theirs, before = (_modules(one) for one in (reference, models.b, models.double_a))
    own = _modules(undone(models.own_b))
    known = [_deepest(path, ours[path], theirs[path]) for path in paths if path in ours and path in theirs]
    known = [path for path in dict.fromkeys(known) if path in own]
    calls = _recorded(models, reference, known, inputs)
    for path in known:
        first = before.get(path)
        origins = [] if first is None or kind_of(first) is kind_of(ours[path]) else [first]
        origins = origins or _folded_into(ours[path], first, before)
        yield Case(
            *(path, ours[path], theirs[path], own[path], origins),
            *(_alike(ours, ours[path]), calls.get(path, []), models.dtype),
        )


def _deepest(path: str, expected: nn.Module, found: nn.Module) -> str:
    """Name the one module inside that is built otherwise, if there is one."""
    inside = alike.unlike(expected, found, with_tensors=False) if path else None
    return f"{path}.{inside[0]}" if inside is not None and len(inside) == 1 and inside[0] else path


def _folded_into(expected: nn.Module, conv: nn.Module | None, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Find the norm that a conv has taken in: the one with which it makes the conv that is expected."""
    if not (isinstance(expected, nn.Conv2d) and isinstance(conv, nn.Conv2d)):
        return []
    if expected.weight.shape != conv.weight.shape or torch.equal(expected.weight, conv.weight):
        return []
    for norm in modules.values():
        var = getattr(norm, "running_var", None)
        if isinstance(var, Tensor) and len(var) == conv.out_channels and isinstance(getattr(norm, "eps", None), float):
            made = as_one([conv, norm], folded)
            if made is not None and torch.allclose(made.weight.double(), expected.weight.double(), rtol=1e-6, atol=0):
                return [conv, norm]
    return []


def _of_a(models: Explained, inputs: Inputs, paths: Sequence[str]) -> Iterator[Case]:
    """Compare stretches of B with A's, on what A's are given."""
    recorder = models.recorder()
    with recorder.recording():
        out = models.call(models.a, inputs, models.exact)
    with contextlib.suppress(VerifyError), recorder.comparing():  # that B does not run may be what is asked about
        models.call(models.b, inputs, models.exact)
    for path in paths:
        stretch = next((one for one in recorder.stretches.values() if path in (one.path, *one.steps)), None)
        if path and (stretch is None or not stretch.in_a or not stretch.in_b):
            continue
        if stretch is None:
            calls = [Recording(inputs.cast_for(models.a, models.exact).args, dict(inputs.kwargs), out)]
            yield Case("", recorder.a, recorder.b, models.core_b, [], {}, calls, models.dtype)
        else:
            yield _of_stretch(models, recorder, stretch, path)


def _of_stretch(models: Explained, recorder: Recorder, stretch: Stretch, path: str) -> Case:
    ours = [recorder.a.get_submodule(one) for one in stretch.in_a]
    theirs = [recorder.b.get_submodule(one) for one in stretch.in_b]
    own = [models.core_b.get_submodule(one) for one in stretch.in_b]
    calls = recorder.calls(stretch)
    idle = [[type(one) is nn.Identity for one in side] for side in (ours, theirs)]
    is_alone = idle[0] == idle[1] or _differs_only_in(stretch, path, ours, theirs)
    if is_alone and path in stretch.in_a and len(ours) > 1:  # the step that is named
        i = stretch.in_a.index(path)
        ours, theirs, own, calls = (
            ours[i : i + 1],
            theirs[i : i + 1],
            own[i : i + 1],
            [one.read() for one in recorder.recordings[path]],
        )
    origins: Sequence[nn.Module] = []
    expected, units = _row(ours), 1.0
    if [kind_of(one) for one in ours] != [kind_of(one) for one in theirs] and isinstance(theirs[0], nn.Conv2d):
        conv = as_one(ours, folded)
        theirs, own = ([one for one in side if type(one) is not nn.Identity] for side in (theirs, own))
        if conv is not None and len(theirs) == 1:
            expected, origins, units = conv, ours, FEW_UNITS if models.dtype == torch.float64 else OF_A_FOLD
    others = _alike(_modules(recorder.a), expected)
    return Case(path, expected, _row(theirs), _row(own), origins, others, calls, models.dtype, units)


def _differs_only_in(stretch: Stretch, path: str, ours: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> bool:
    """Whether all other steps of a stretch are of the same classes in both."""
    kinds = zip(stretch.in_a, map(kind_of, ours), map(kind_of, theirs), strict=False)
    return len(ours) == len(theirs) and all(one is other for step, one, other in kinds if step != path)


def _recorded(models: Explained, model: nn.Module, paths: Sequence[str], inputs: Inputs) -> dict[str, list[Recording]]:
    """Record what modules are given in a run, and what they give."""
    found: dict[str, list[Recording]] = {}
    hooks = []
    for path in paths:
        module = model.get_submodule(path)

        def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            given, named = _copied((args, kwargs))
            found.setdefault(path, []).append(Recording(given, named, None))

        def after(_: nn.Module, args: Any, out: Any, path: str = path) -> None:
            found[path][-1].out = _copied(out)

        hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        models.call(model, inputs, models.exact)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _copied(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, values)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _row(modules: Sequence[nn.Module]) -> nn.Module:
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _alike(modules: Mapping[str, nn.Module], expected: nn.Module) -> dict[str, nn.Module]:
    """Give the other modules of one class."""
    return {path: one for path, one in modules.items() if type(one) is type(expected) and one is not expected}

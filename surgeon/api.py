"""The library: survey, plan, convert, fuse and verify models that are in memory.

model     = torchvision.models.resnet50(weights="DEFAULT")
plan      = surgeon.plan(model, "acnet", example=(1, 3, 224, 224))
converted = surgeon.convert(model, plan)
deployed  = surgeon.fuse(converted)
report    = surgeon.verify(converted, deployed, example=(1, 3, 224, 224))
assert report.equivalent, report
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn

from surgeon._torch_compat import OpOverload
from surgeon.analysis import example as examples
from surgeon.analysis import program as graph
from surgeon.analysis import sites
from surgeon.analysis.example import Example
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Survey
from surgeon.errors import CaptureError, ModelError, PassError, PlanError, VerifyError
from surgeon.files import load as source
from surgeon.files.architectures import Architecture
from surgeon.files.pickles import Trust
from surgeon.files.save import save as save_file
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.models.copies import duplicate, shadow
from surgeon.models.memory import give_back_after
from surgeon.models.sandbox import ordinary
from surgeon.proof import verify as equivalence
from surgeon.proof.distance import Jitter, as_double, has_numbers, widened, worst, worst_ulps
from surgeon.proof.verify import EXACT, Replay, Report
from surgeon.recipes import recipe as recipes
from surgeon.recipes.recipe import Recipe
from surgeon.surgery import check as checks
from surgeon.surgery import history as histories
from surgeon.surgery import replay
from surgeon.surgery.fold import fold_blocks_
from surgeon.surgery.foresee import foresee
from surgeon.surgery.make import make
from surgeon.surgery.manifest import manifest
from surgeon.surgery.operate import Swap, build, keep_seams, place_, prepare, stream_
from surgeon.surgery.plan import Plan

# Relative L2 that no rounding explains once every block is proved; a norm that is applied twice or never is above it.
_GROSS = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.9, torch.bfloat16: 0.9}
# These hold on to the parameters, or to the code, of the model inside, so that it must be edited before it is wrapped.
_WRAPPERS = {"DistributedDataParallel": "module", "FullyShardedDataParallel": "module", "OptimizedModule": "_orig_mod"}
_UNSEEN = "the network uses a conv in a way that its graph does not show"
_LEAVE = "Leave out the convs that are read in other ways than by calling them: `surgeon plan -o plan.yaml`, edit it."
_log = logging.getLogger("surgeon")
Model = TypeVar("Model", bound=nn.Module)
RecipeLike = str | PathLike[str] | Mapping[str, Any] | Recipe


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What convert measured of its own work, as relative L2 in eval mode.

    `worst`: of the blocks that keep the function, made in float64, against what they replace; `approximate` do not keep
    it, by design. `whole`: the whole network before and after, in its own dtype; None where no input is known.
    `streams`: with octave streams going from conv to conv, against every conv splitting and joining, in float64 (in its
    own dtype where it does not run there).
    """

    sites: int
    worst: float | None
    worst_path: str | None
    approximate: int
    whole: float | None = None
    streams: float | None = None


def survey(model: nn.Module, example: Example | None = None) -> Survey:
    """List every conv of a model: names, geometry, shapes, calls, and what follows.

    >>> [site.path for site in survey(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).sites]
    ['0']
    """
    with ordinary():
        return sites.survey(network_for(model, example))


def plan(
    model: nn.Module,
    recipe: RecipeLike,
    example: Example | None = None,
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
) -> Plan:
    """Decide for every conv what a recipe makes of it; the model is not touched.

    `recipe` is the name of a bundled one, a path, a dict or a `Recipe`; `overrides` are as `--set` takes them.

    >>> [entry.swap for entry in plan(nn.Sequential(nn.Conv2d(3, 8, 3)), "acnet").convs]
    ['acblock']

    Raises:
        RecipeError: every fault of the recipe. PlanError: a rule claims nothing.
    """
    with ordinary():
        return decide(_recipe(recipe, overrides), survey(model, example), seed=seed)


def decide(recipe: Recipe, surveyed: Survey, *, seed: int) -> Plan:
    """Make a plan, and say in it what comes of it."""
    return foresee(make(recipe, surveyed, seed=seed), surveyed)


def convert(
    model: Model,
    how: Plan | RecipeLike,
    example: Example | None = None,
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
) -> Model:
    """Return a copy of `model` with its convs swapped as a plan or recipe says.

    >>> type(convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "acnet")[0]).__name__
    'ACBlock'
    """
    with ordinary():
        return convert_(duplicate(_checked(model)), how, example, overrides=overrides, seed=seed)


def convert_(
    model: Model,
    how: Plan | RecipeLike,
    example: Example | None = None,
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
) -> Model:
    """Swap the convs of `model` itself, and return it; where something is wrong it stays as it was."""
    with ordinary():
        surveyed = sites.survey(network_for(model, example, plan=how if isinstance(how, Plan) else None, seed=seed))
        if isinstance(how, Plan):
            checks.check(how, surveyed)
        decided = how if isinstance(how, Plan) else decide(_recipe(how, overrides), surveyed, seed=seed)
        carry_out_(decided, surveyed.network)
    return model


@ordinary()
def carry_out_(checked: Plan, network: Network) -> SelfCheck:
    """Operate on a network that was looked at, measure what was done, and note it in the model's history.

    Raises:
        PlanError: there is nothing to swap. PassError: a block that keeps the function does not.
        CaptureError: the network does more with its convs than could be seen. The model is as it was.
    """
    if not checked.swaps:
        reasons = list(dict.fromkeys(entry.skip for entry in checked.convs if entry.skip))
        raise PlanError(
            f"nothing is swapped: {'; '.join(reasons[:3]) or 'the model has no convs'}",
            todo="`surgeon plan` gives the reason for every conv.",
        )
    model, inputs = network.model, network.inputs
    parent = histories.content_hash(model)
    swaps = prepare(model, checked)
    check = _check_sites(swaps, checked.seed)
    has_numbers = not any(parameter.is_meta for parameter in model.parameters())
    with _calls_of([one.conv for one in swaps]) as called:
        before = _outputs(model, inputs) if has_numbers else None
    undo = place_(model, swaps, network)
    split = shadow(model) if has_numbers and inputs is not None and checked.has_streams else None
    outcome = stream_(model, checked, network)
    try:
        if split is not None and inputs is not None and outcome.rewritten:
            check = replace(check, streams=_check_streams(model, split, checked, network, inputs))
        if before is not None and inputs is not None:
            with _calls_of([one.block for one in swaps]) as called_now:
                after = _run_again(model, inputs)
            lost = [swaps[i].entry.path for i in sorted(called - called_now)]
            whole = _check_whole(model, inputs, before, after, lost, approximate=bool(check.approximate))
            check = replace(check, whole=whole)
    except BaseException:
        outcome.undo_()
        undo()
        raise
    step = histories.Step("convert", parent, histories.content_hash(model), checked.to_dict(), histories.versions())
    histories.record_(model, step)
    return check


@contextlib.contextmanager
def _calls_of(modules: Sequence[nn.Module]) -> Iterator[set[int]]:
    """Note which of the modules are called meanwhile, in the model or in a copy of it."""
    called: set[int] = set()
    hooks = [module.register_forward_hook(lambda *_, i=i: called.add(i)) for i, module in enumerate(modules)]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _check_sites(swaps: Sequence[Swap], seed: int) -> SelfCheck:
    """Make every block again in float64; measure it against what it replaces, and the stored block against it."""
    check = SelfCheck(len(swaps), None, None, sum(not one.entry.keeps_function for one in swaps))
    for one in swaps:
        if one.conv.weight.is_meta:  # no numbers, nothing to measure
            continue
        path, conv = one.entry.path, shadow(one.conv, as_double)
        norm = None if one.norm is None else shadow(one.norm, as_double)
        twin = build(one.entry, conv, norm, seed)
        if not (ulps := worst_ulps(one.block, twin)) <= 1:
            raise PassError("convert", f"{path} is stored {ulps:.3g} units in the last place from its float64 twin")
        if one.entry.keeps_function:
            apart = equivalence.local_distance(twin, conv, norm)
            if not apart <= EXACT:
                raise PassError("convert", f"{path} is {apart:.1e} from the conv it replaces, in float64")
            if check.worst is None or apart > check.worst:
                check = replace(check, worst=apart, worst_path=path)
        give_back_after(one.conv.weight)
    return check


class _Way(NamedTuple):
    """A way to run a network: as what copy of it, in which dtype, and how far apart two of them may be then."""

    copied: Callable[[nn.Module], nn.Module]
    dtype: torch.dtype
    most: float

    def run(self, model: nn.Module, inputs: Inputs, *, seed: int = 0) -> Any:
        return equivalence.outputs(self.copied(model), inputs, seed=seed, dtype=self.dtype)


def _ways(model: nn.Module) -> tuple[_Way, ...]:
    """In float64, all of it where dtypes get mixed otherwise; in its own dtype where it does not run in float64."""
    return (
        _Way(widened, torch.float64, EXACT),
        _Way(lambda net: shadow(net, as_double), torch.float64, EXACT),
        _Way(shadow, equivalence.dtype_of(model), _gross(model)),
    )


def _check_streams(model: nn.Module, split: nn.Module, plan: Plan, network: Network, inputs: Inputs) -> float | None:
    """Compare streams that go from conv to conv with convs that split and join each for itself, in float64."""
    stream_(split, plan, network, only_low_pass=True)
    for way in (ways := _ways(model)):
        try:
            expected = way.run(split, inputs)
            break
        except VerifyError:
            if way is ways[-1]:
                raise
    apart = worst(way.run(model, inputs), expected)
    if not apart <= way.most:
        if worst(way.run(split, inputs, seed=1), expected):
            return None  # it draws numbers in eval mode, and other ones for two streams
        if (path := _misread(split, plan, network, way, inputs, apart)) is not None:
            raise CaptureError(
                f"the graph of {path or 'the model'} is not what it computes: its forward acts on what its inputs are",
                todo=keep_seams(plan),
            )
        raise PassError("seams", f"without seams the network is {apart:.1e} from itself with them")
    return apart


def _misread(model: nn.Module, plan: Plan, network: Network, way: _Way, inputs: Inputs, apart: float) -> str | None:
    """Find an island whose graph, put in its place unchanged, is what sets the outputs `apart`."""
    expected = way.run(model, inputs)
    for island in network.islands_after_swaps(model):
        if island.path in plan.rewritten:
            as_graph = shadow(model)
            graph.rewrite_(as_graph.get_submodule(island.path), island.graph)
            if worst(way.run(as_graph, inputs), expected) > apart / 10:
                return island.path
    return None


def _run_again(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return equivalence.outputs(model, inputs)
    except VerifyError as error:
        raise CaptureError(f"{_UNSEEN}: {error.problem}", todo=_LEAVE) from error


def _check_whole(
    model: nn.Module, inputs: Inputs, before: Any, after: Any, lost: Sequence[str], *, approximate: bool
) -> float:
    """Compare the outputs. Every block has been proved, so one that is far off, or `lost`, is used in a way unseen."""
    if lost:
        what = f"{lost[0]} has been swapped, and what stands there is not called"
        raise CaptureError(f"{_UNSEEN}: {what}", todo=_LEAVE)
    try:
        apart = worst(after, before)
    except VerifyError as error:
        raise CaptureError(f"{_UNSEEN}: {error.problem}", todo=_LEAVE) from error
    if not approximate and not apart <= _gross(model) and not apart <= 2 * _moved_by_rounding(model, inputs):
        raise CaptureError(f"{_UNSEEN}: after the swaps it is {apart:.1e} from what it was", todo=_LEAVE)
    return apart


def fuse(model: Model, *, dense: bool = False) -> Model:
    """Return a copy of `model` in which every foldable block is one plain conv again.

    Blocks that cost less than the conv they fold to (HetConv) stay, unless `dense` asks for them too.

    >>> type(fuse(convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "acnet"))[0]).__name__
    'Conv2d'

    Raises:
        PlanError: a block that cannot be folded as it is now; nothing is done.
    """
    with ordinary():
        return fuse_(duplicate(_checked(model)), dense=dense)


def fuse_(model: Model, *, dense: bool = False) -> Model:
    """Fold the blocks of `model` itself, and return it."""
    fold_all_(Network(_checked(model)), dense=dense)
    return model


@ordinary()
def fold_all_(network: Network, *, dense: bool = False) -> tuple[tuple[str, ...], float | None]:
    """Fold, note it in the model's history, and return the names of what was folded, and how far it moved the output.

    Raises:
        PassError: it moved the output by more than rounding can; the model is spoilt then.
    """
    model, inputs = network.model, network.inputs
    parent, before = histories.content_hash(model), _outputs(model, inputs)
    planned = histories.planned_inputs(histories.history(model))  # what verify will look at the network with, too
    is_planned = inputs is not None and planned is not None and inputs.text == planned.text
    folded = fold_blocks_(network if is_planned else Network(model, called_with=planned), dense=dense)
    if folded:
        made = histories.content_hash(model)
        histories.record_(model, histories.Step("fuse", parent, made, None, histories.versions(), dense))
    if before is None or inputs is None:
        return folded, None
    distance = worst(equivalence.outputs(model, inputs), before)
    if not distance <= _gross(model) and not distance <= 2 * _moved_by_rounding(model, inputs):
        raise PassError("fuse", f"the network is {distance:.1e} from what it was before its blocks were folded")
    return folded, distance


def _outputs(model: nn.Module, inputs: Inputs | None) -> Any:
    """Run the model where an input is known; None where there is none, or no number comes out."""
    if inputs is None:
        return None
    out = equivalence.outputs(model, inputs)
    return out if has_numbers(out) else None


def _gross(model: nn.Module) -> float:
    return _GROSS.get(equivalence.dtype_of(model), math.inf)


def _moved_by_rounding(model: nn.Module, inputs: Inputs) -> float:
    """How far one unit in the last place of every weight takes a network; in a few it is anywhere then."""
    moved = shadow(model, Jitter(0, keeps_dtype=True))
    try:
        return worst(equivalence.outputs(moved, inputs), equivalence.outputs(model, inputs))
    except VerifyError:  # the shapes of its outputs depend on rounding
        return math.inf


def _checked(model: Model) -> Model:
    """Make sure, before anything is done with it, that a model is one, and that it can be edited."""
    if isinstance(model, nn.Module):
        if (device := devices.of(model)) is not None and device.type in devices.NO_FLOAT64:
            raise ModelError(
                f"the model lies on {device}, which has no float64, and surgeon proves in float64",
                todo="Give it on the CPU, model.cpu(), and move what comes out.",
            )
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ModelError(
                    f"{name or 'the model'} is TorchScript, which has no modules that could be swapped, and no copy "
                    "that trains",
                    todo="Give the model that it was made of.",
                )
            if isinstance(module, fx.GraphModule) and any(isinstance(n.target, OpOverload) for n in module.graph.nodes):
                raise ModelError(
                    f"{name or 'the model'} is an exported graph, whose convs are no modules",
                    todo="Give the network that was exported.",
                )
            if (inner := _WRAPPERS.get(type(module).__name__)) and type(module).__module__.startswith("torch."):
                path = ".".join(part for part in ("model", name, inner) if part)
                raise ModelError(
                    f"{name or 'the model'} is wrapped in {type(module).__name__}, which keeps to the model as it was",
                    todo=f"Give {path}, and wrap what comes out.",
                )
        return model
    todo = f"surgeon.load({model!r}) opens a file." if isinstance(model, str | PathLike) else "Give an nn.Module."
    raise ModelError(f"a {type(model).__name__} is no model", todo=todo)


def verify(a: nn.Module, b: nn.Module, example: Example | Sequence[Example] | None = None, *, seed: int = 0) -> Report:
    """Say whether `b` computes what `a` does, how far apart they are, and where they part.

    `example` is one input or a list of them, each as `examples.make` takes it: a shape, a tensor, a tuple of arguments,
    a dict of named ones. Where b's history says that it was made from a, the same is done to a in float64, and b must
    be that, rounded once.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> verify(model, convert(model, "acnet"), (1, 3, 8, 8)).verdict
    'equivalent'

    Raises:
        VerifyError: outputs of other structure, shape or dtype.
    """
    with ordinary():
        return _verify(a, b, example, seed)


def _verify(a: nn.Module, b: nn.Module, example: Any, seed: int) -> Report:
    _checked(a), _checked(b)
    if (place := devices.of(a)) is not None and place.type != "meta":
        b = devices.on(b, place)
    is_list = isinstance(example, list) and not all(isinstance(side, int) for side in example)
    given: Any = example if is_list else [example]
    inputs = [inputs_for(b if one is None and histories.history(b) else a, one, seed=seed) for one in given]
    known = [one for one in inputs if one is not None]
    if not known:
        raise CaptureError("no input is known that the model accepts", todo="Give one: --input 1,3,224,224.")
    steps = _steps_between(a, b)
    found = equivalence.verify(
        a,
        b,
        known,
        replay=_replay(a, steps) if steps else None,
        approximate=any(map(_is_approximate, steps)),
        seed=seed,
    )
    if steps and not found and histories.content_hash(b) != steps[-1].result:
        changed = f"B's tensors were changed after the {steps[-1].operation} that made it"
        found = replace(found, remarks=(*found.remarks, changed))
    return found


def load(
    name: str | PathLike[str],
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    unsafe_pickle: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Load a model file without running what is in it, or build a network that is named.

    `arch` is the network that a file of weights belongs to; `allow` names packages whose modules a pickle may hold.

    >>> type(load("torchvision:resnet18")).__name__
    'ResNet'

    Raises:
        ModelError, StoreError: it cannot be read; the message says what to do.
    """
    trust = Trust(allow=tuple(allow), unsafe_pickle=unsafe_pickle)
    again = functools.partial(replay.rebuild, trust=trust, seed=seed)
    with ordinary():
        loaded = source.load(fspath(name), arch=arch, arch_args=arch_args or {}, trust=trust, seed=seed, rebuild=again)
    for notice in loaded.notices:
        _log.info(notice)
    return loaded.model


def save(model: nn.Module, path: str | PathLike[str], *, arch: str | None = None, force: bool = False) -> None:
    """Write a model atomically: `.pt` as a module, `.safetensors` as weights with a manifest that names `arch`.

    Raises:
        StoreError: the file exists and `force` is not given, or it cannot be written.
    """
    architecture = Architecture(arch) if arch else None
    with ordinary():
        save_file(model, Path(path), manifest=manifest(model, architecture), force=force)


def inputs_for(model: nn.Module, example: Example | None, *, plan: Plan | None = None, seed: int = 0) -> Inputs | None:
    """Take the example that was given, or that of the plan, or of the model's history, or one that it accepts."""
    return network_for(model, example, plan=plan, seed=seed).inputs


def network_for(model: nn.Module, example: Example | None, *, plan: Plan | None = None, seed: int = 0) -> Network:
    """Look at a model with the example that was given, or with the first that does of those that are known."""
    _checked(model)
    if example is not None:
        return Network(model, examples.make(example, seed=seed))
    records = [plan.input] if plan is not None else []
    records += [step.plan.get("input") for step in reversed(histories.history(model)) if step.plan]
    return examples.look(model, records, seed=seed)


def _recipe(recipe: RecipeLike, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        settings = (*recipe.overrides, *overrides)
        return recipes.parse(recipe.text, f"{recipe.name}.yaml", settings) if overrides else recipe
    if isinstance(recipe, Mapping):
        return recipes.from_dict(dict(recipe), overrides)
    return recipes.load(recipe, overrides)


def _steps_between(a: nn.Module, b: nn.Module) -> tuple[histories.Step, ...]:
    """Find how `b` was made from `a`, if every step is known and nothing was trained in between."""
    steps, known = histories.history(b), histories.history(a)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, known, strict=False)))
    start = histories.content_hash(a) if steps else ""
    for i, step in enumerate(steps[shared:], shared):  # an octave model has the tensors that it was made from
        chain = steps[i:]
        if step.parent == start and all(one.result == two.parent for one, two in itertools.pairwise(chain)):
            return chain
    return ()


def _replay(a: nn.Module, steps: Sequence[histories.Step]) -> Replay:
    """Do the same to a copy again."""
    exact = replay.redo_(shadow(a, as_double), steps)
    return Replay(exact, exact if len(steps) == 1 else replay.redo_rounding_(duplicate(a), steps))


def _is_approximate(step: histories.Step) -> bool:
    return step.plan is not None and not Plan.model_validate(step.plan).keeps_function

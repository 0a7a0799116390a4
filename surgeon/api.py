"""The library: survey, plan, convert, fuse and verify models that are in memory.

model     = torchvision.models.resnet50(weights="DEFAULT")
plan      = surgeon.plan(model, "acnet", example=(1, 3, 224, 224))
converted = surgeon.convert(model, plan)
deployed  = surgeon.fuse(converted)
report    = surgeon.verify(converted, deployed, example=(1, 3, 224, 224))
assert report.equivalent, report
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.analysis import sites
from surgeon.analysis.example import Example
from surgeon.analysis.sites import Survey
from surgeon.blocks import Block
from surgeon.errors import Fault, ModelError, RecipeError
from surgeon.files import exports
from surgeon.files import load as source
from surgeon.files.architectures import Architecture
from surgeon.files.pickles import Trust
from surgeon.files.save import save as save_file
from surgeon.fitting import low
from surgeon.fitting.data import Data
from surgeon.fitting.in_memory import choose, fit_, images_for
from surgeon.models.copies import Model, duplicate
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.models.wrappers import checked, not_a_model
from surgeon.recipes import recipe as recipes
from surgeon.recipes.recipe import Recipe
from surgeon.surgery import gains, give_back, replay
from surgeon.surgery import history as histories
from surgeon.surgery.advice import Advice, advise
from surgeon.surgery.decide import carry_out, plan_for
from surgeon.surgery.further import Further
from surgeon.surgery.fuse import fold_all_
from surgeon.surgery.history import Operation
from surgeon.surgery.look import network_for
from surgeon.surgery.make import on_a_guess
from surgeon.surgery.manifest import manifest
from surgeon.surgery.plan import Plan
from surgeon.surgery.tune import tuning_on

_log = logging.getLogger("surgeon")
RecipeLike = str | PathLike[str] | Mapping[str, Any] | Recipe


def survey(model: nn.Module, example: Example | None = None, *, progress: Progress = silent) -> Survey:
    """List every conv of a model: names, geometry, shapes, calls, and what reads it.

    `progress`, here and below, is called with what is being done and the share of the work that is done.

    >>> [site.path for site in survey(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).sites]
    ['0']
    """
    with ordinary():
        progress("looking for an input", 0)
        network = network_for(model, example)
        progress("looking at the convs", 0.5)
        return sites.survey(network)


def plan(
    model: nn.Module,
    recipe: RecipeLike,
    example: Example | None = None,
    *,
    overrides: Sequence[str] = (),
    bake: bool = False,
    time: bool = False,
    data: Any = None,
    budget: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Plan:
    """Decide for every conv what a recipe makes of it; the model is not touched.

    `recipe` is the name of a bundled one, a path, a dict or a `Recipe`; `overrides` are as `--set` takes them. With
    `bake`, tensors that weight norm, spectral norm or pruning compute are made permanent where convs are swapped. With
    `time` it is carried out on a copy, and the plan says how long both networks take once they are fused.

    With `data`, images without labels as `fit` takes them, the plan says of every conv what it would lose, fitted to
    them. A `budget` then chooses which convs are swapped, and with which options: "macs=0.6" for the share of the
    network's multiply-adds, "error=0.05" for the relative error of its outputs.

    >>> [entry.swap for entry in plan(nn.Sequential(nn.Conv2d(3, 8, 3)), "acnet").convs]
    ['acblock']

    Raises:
        RecipeError: the recipe is wrong; all its errors are reported at once. PlanError: a rule claims no conv.
    """
    with ordinary():
        progress("looking for an input", 0)
        if data is not None or budget is not None:
            wanted, step = _recipe(recipe, overrides), parts(progress, 0.2, 1)
            return choose(model, wanted, example, data, budget, bake=bake, seed=seed, progress=step).plan
        network = network_for(model, example)
        progress("planning", 0.3 if time else 0.6)
        decided, surveyed = plan_for(network, _recipe(recipe, overrides), bake=bake, seed=seed)
        return gains.timed(decided, surveyed, parts(progress, 0.5, 1)) if time else decided


def recipes_for(
    model: nn.Module, example: Example | None = None, *, seed: int = 0, progress: Progress = silent
) -> Advice:
    """Say for each bundled recipe what it would do to a model, and which to take for what; the model is not touched.

    >>> recipes_for(nn.Sequential(nn.Conv2d(3, 8, 3)), (1, 3, 8, 8)).free.recipe
    'acnet-online'
    """
    with ordinary():
        surveyed = survey(model, example, progress=parts(progress, 0, 0.3))
        return advised(surveyed, seed=seed, progress=parts(progress, 0.3, 1))


def advised(surveyed: Survey, *, seed: int, progress: Progress = silent) -> Advice:
    """Plan every bundled recipe; that the costs rest on a guessed input is logged."""
    bundled = [recipes.load(name) for name in recipes.bundled()]
    advice = advise(surveyed, bundled, seed=seed, progress=progress)
    if surveyed.inputs is not None and surveyed.inputs.is_guess:
        _log.warning(on_a_guess(surveyed.inputs, *bundled))
    return advice


def convert(
    model: Model,
    how: Plan | RecipeLike,
    example: Example | None = None,
    *,
    overrides: Sequence[str] = (),
    bake: bool = False,
    data: Any = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Model:
    """Return a copy of `model` with its convs swapped as a plan or recipe says.

    With `data`, images without labels, blocks that approximate their convs are fitted to what these gave (`fit` has
    more options). `history` of the result says what was done to it and what was measured.

    >>> type(convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "acnet")[0]).__name__
    'ACBlock'
    """
    with ordinary():
        own = duplicate(checked(model))
        if data is None:
            return convert_(own, how, example, overrides=overrides, bake=bake, seed=seed, progress=progress)
        read = images_for(data, model, example, seed=seed)
        if example is None and not isinstance(how, Plan):
            example = next(iter(read)).inputs.batched(1)
        _convert_(own, how, example, overrides, bake, seed, parts(progress, 0, 0.3), read)
        return fit_(own, model, read, example=example, seed=seed, progress=parts(progress, 0.3, 1))


def convert_(
    model: Model,
    how: Plan | RecipeLike,
    example: Example | None = None,
    *,
    overrides: Sequence[str] = (),
    bake: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Model:
    """Swap the convs of `model` itself, and return it; if something goes wrong, it stays as it was.

    An optimizer that was made before does not know the parameters that are new; `new_parameters` gives them.
    """
    with ordinary():
        _convert_(model, how, example, overrides, bake, seed, progress)
    return model


def _convert_(
    model: nn.Module,
    how: Plan | RecipeLike,
    example: Example | None,
    overrides: Sequence[str],
    bake: bool,
    seed: int,
    progress: Progress,
    data: Data | None = None,
) -> None:
    """Swap the convs of a model; with images, these say which channels lose least where a recipe asks for that."""
    progress("looking at the network", 0)
    network = network_for(model, example, plan=how if isinstance(how, Plan) else None, seed=seed)
    progress("planning", 0.2)
    wanted = how if isinstance(how, Plan) else _recipe(how, overrides)
    scores = None if isinstance(wanted, Plan) else low.scores(wanted, network, data)
    carry_out(wanted, network, bake=bake, seed=seed, scores=scores, progress=parts(progress, 0.3, 1))


def new_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Give the trainable parameters of a model's blocks that an optimizer, made before `convert_`, does not train.

    After `fuse_` these are the parameters of the convs and norms that blocks have become again.

    Add them with `optimizer.add_param_group({"params": surgeon.new_parameters(model, optimizer)})`, with a learning
    rate of their own if they need one. What a block has taken over from its conv is trained as before; parameters that
    are no longer in the model get no gradient, so the optimizer leaves them alone.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> len(new_parameters(convert_(model, "acnet"), optimizer))
    6
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    back = give_back.given_back(model, histories.history(model))
    held = {id(one): one for module in (*blocks, *back) for one in module.parameters() if one.requires_grad}
    return [parameter for key, parameter in held.items() if key not in known]


def fuse(
    model: Model,
    example: Example | None = None,
    *,
    dense: bool = False,
    keep_norms: bool = False,
    branches: bool = False,
    norms: bool = False,
    dtype: torch.dtype | None = None,
    tune: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Model:
    """Return a copy of `model` in which every block is one plain conv again, or a few of them.

    Blocks that cost less than one conv (HetConv) become a few, unless `dense` asks for one. `history` of the result
    says how far folding moved the output for the example.

    With `keep_norms` every block that took over a norm becomes a conv without that norm and the norm, each under its
    own name and of its own class: the weights load into the class that the model had before it was converted, and
    training can go on. Blocks inside modules that fold themselves (RepVGG, MobileOne) do so without being asked.

    With `branches` whatever is linear between a map and a later sum becomes one conv, too: the branches of RepVGG,
    MobileOne or DBB, by whatever class. With `norms` every norm is folded into the conv or linear layer that it belongs
    to. Each is proved in float64; what would take more multiply-adds as one conv stays, unless `dense` is given.

    With `dtype`, torch.float16 or torch.bfloat16, all of this is done in float64, and the result is cast once. With
    `tune`, the exact forms of each block are timed at the example, on `device` if it is named; the fastest is kept.

    >>> type(fuse(convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "acnet"))[0]).__name__
    'Conv2d'
    >>> make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> make().load_state_dict(fuse(convert(make(), "acnet"), keep_norms=True).state_dict())
    <All keys matched successfully>

    Raises:
        PlanError: a block that cannot be folded as it is now, or a norm that cannot be given back; nothing is done.
    """
    with ordinary():
        own = duplicate(checked(model))
        how: dict[str, Any] = {"dense": dense, "keep_norms": keep_norms, "branches": branches, "norms": norms}
        how |= {"dtype": dtype, "tune": tune, "device": device}
        return fuse_(own, example, **how, seed=seed, progress=progress)


def fuse_(
    model: Model,
    example: Example | None = None,
    *,
    dense: bool = False,
    keep_norms: bool = False,
    branches: bool = False,
    norms: bool = False,
    dtype: torch.dtype | None = None,
    tune: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Model:
    """Fold the blocks of `model` itself, and return it."""
    with ordinary():
        progress("looking for an input", 0)
        network = network_for(model, example, seed=seed)
        further = Further(branches=branches, norms=norms, costlier=dense)
        how: dict[str, Any] = {"dense": dense, "keep_norms": keep_norms, "further": further, "dtype": dtype}
        how["tuning"] = tuning_on(device) if tune else None
        done = fold_all_(network, **how, progress=parts(progress, 0.2, 1))
    done.say(_log)
    return model


def load(
    name: str | PathLike[str],
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    allow: Sequence[str] = (),
    unsafe_pickle: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Load a model file without running what is in it, or build a network that is named.

    `arch` is the network that a file of weights belongs to, and `weights` a key or prefix that chooses among several in
    the file; `allow` names packages whose modules a pickle may hold. An `.onnx` file, or with `unsafe_pickle` a `.pt2`,
    which runs what is in it, is opened as a module that runs its program, for `verify` to compare.

    >>> type(load("torchvision:resnet18")).__name__
    'ResNet'

    Raises:
        ModelError, StoreError: it cannot be read; the message says what to do.
    """
    if not isinstance(name, str | PathLike):
        raise ModelError(
            f"{type(name).__name__} is given as the name of a file or network", todo="Give a path or text."
        )
    trust = Trust(allow=tuple(allow), unsafe_pickle=unsafe_pickle)
    if exports.is_export(fspath(name)):
        program, notices = exports.open_(Path(name), trust)
        for notice in notices:
            _log.warning(notice)
        return program
    again = functools.partial(replay.rebuild, trust=trust, seed=seed)
    with ordinary():
        loaded = source.load(
            fspath(name), arch=arch, arch_args=arch_args or {}, key=weights, trust=trust, seed=seed, rebuild=again
        )
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


def history(model: nn.Module) -> tuple[Operation, ...]:
    """Say what surgeon has done to a model, oldest first: with which plan and versions, and what was measured.

    >>> [step.operation for step in history(convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "acnet"))]
    ['convert']
    """
    if not isinstance(model, nn.Module):
        raise not_a_model(model)
    return histories.history(model)


def _recipe(recipe: RecipeLike, overrides: Sequence[str]) -> Recipe:
    if not isinstance(recipe, str | PathLike | Mapping | Recipe):
        what = f"{type(recipe).__name__} is given as a recipe, which is a name, a path, a dict or a Recipe"
        is_plan = isinstance(recipe, Plan)
        raise RecipeError([Fault("", "", what)], todo="`convert` carries out a plan." if is_plan else "")
    if isinstance(recipe, Recipe):
        settings = (*recipe.overrides, *overrides)
        return recipes.parse(recipe.text, f"{recipe.name}.yaml", settings) if overrides else recipe
    if isinstance(recipe, Mapping):
        return recipes.from_dict(dict(recipe), overrides)
    return recipes.load(recipe, overrides)

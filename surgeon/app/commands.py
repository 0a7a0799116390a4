"""One short function per command: the table of contents of the whole program.

Files in, files out; what happens in between is `surgery`. Nothing here prints: `say` takes notices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from surgeon import api as surgery
from surgeon.analysis import example as examples
from surgeon.analysis import sites
from surgeon.analysis.sites import Survey
from surgeon.api import SelfCheck
from surgeon.app import bench as benching
from surgeon.app.bench import Progress, Timing
from surgeon.blocks import Foldable
from surgeon.errors import CaptureError
from surgeon.files import load as source
from surgeon.files.load import Loaded, Trust
from surgeon.models import devices
from surgeon.models.call import Inputs
from surgeon.proof.verify import Report
from surgeon.recipes import recipe as recipes
from surgeon.surgery import plan as plans
from surgeon.surgery import store
from surgeon.surgery.plan import Plan

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Given:
    """What the person says about a model, the same for every command."""

    arch: str | None = None
    arch_args: tuple[str, ...] = ()
    trust: Trust = field(default_factory=Trust)
    inputs: tuple[str, ...] = ()  # examples, as `--input` takes them
    seed: int = 0
    device: torch.device = devices.CPU  # where models are run


@dataclass(frozen=True, slots=True)
class Converted:
    """What convert did: the plan, what it measured, and where the model is."""

    plan: Plan
    check: SelfCheck
    path: Path


@dataclass(frozen=True, slots=True)
class Fused:
    """What fuse did: the blocks that were folded, the parameters before and after, and where the model is."""

    folded: tuple[str, ...]
    params: tuple[int, int]
    distance: float | None
    path: Path


@dataclass(frozen=True, slots=True)
class Trials:
    """How `bench` runs models: every batch size with every number of threads, each that many rounds."""

    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()
    rounds: int = 15
    channels_last: bool = False
    compiled: bool = False
    train: bool = False


def survey(name: str, given: Given, say: Say) -> Survey:
    model = _load(name, given, say).model
    return sites.survey(model, _inputs(model, given, say))


def plan(name: str, recipe: str, given: Given, say: Say, *, overrides: Sequence[str] = ()) -> Plan:
    wanted = recipes.load(recipe, overrides)
    model = _load(name, given, say).model
    return surgery.decide(wanted, sites.survey(model, _inputs(model, given, say)), seed=given.seed)


def convert(
    name: str,
    how: str | Plan,
    given: Given,
    say: Say,
    *,
    overrides: Sequence[str] = (),
    output: Path | None,
    force: bool,
) -> Converted:
    """Convert by a recipe's name or path, or by a plan that was read from a file."""
    wanted = how if isinstance(how, Plan) else recipes.load(how, overrides)
    label = wanted.recipe.name if isinstance(wanted, Plan) else wanted.name
    path = store.claim(output or _beside(name, label), force=force, origin=name)
    loaded = _load(name, given, say)
    model = loaded.model
    inputs = _inputs(model, given, say, plan=wanted if isinstance(wanted, Plan) else None)
    surveyed = sites.survey(model, inputs)
    if isinstance(wanted, Plan):
        plans.check(wanted, surveyed)
    decided = wanted if isinstance(wanted, Plan) else surgery.decide(wanted, surveyed, seed=given.seed)
    check = surgery.carry_out_(model, decided, inputs)
    _save(loaded, path, say, force=force)
    return Converted(decided, check, path)


def fuse(
    name: str, given: Given, say: Say, *, dense: bool = False, output: Path | None = None, force: bool = False
) -> Fused:
    path = store.claim(output or _beside(name, "fused"), force=force, origin=name)
    loaded = _load(name, given, say)
    model, params = loaded.model, _count(loaded.model)
    folded, distance = surgery.fold_all_(model, _inputs(model, given, say), dense=dense)
    cheaper = sorted({m.name for m in model.modules() if isinstance(m, Foldable)})
    if cheaper:
        say(f"{', '.join(cheaper)} stays, for it costs less than the conv it folds to; --dense folds it all the same")
    elif not folded:
        say("there is no block in it that can be folded; it is written as it is")
    _save(loaded, path, say, force=force)
    return Fused(folded, (params, _count(model)), distance, path)


def verify(name_a: str, name_b: str, given: Given, say: Say) -> Report:
    a, b = (_load(name, given, say).model for name in (name_a, name_b))
    inputs = [examples.read(text, a, seed=given.seed, say=say) for text in given.inputs]
    return surgery.verify(a, b, inputs or None, seed=given.seed)


def bench(names: Sequence[str], given: Given, say: Say, how: Trials, progress: Progress) -> tuple[Timing, ...]:
    """Time models against each other on inputs of the first one's kind."""
    loaded = [_load(name, given, say, to_time=True).model for name in names]
    models = list(zip(_labels(names), loaded, strict=True))
    inputs = _inputs(models[0][1], given, say)
    if inputs is None:
        raise CaptureError("no input is known to run them on", todo="Give one: --input 1,3,224,224.")
    settings = benching.settings_for(
        how.batches, how.threads, channels_last=how.channels_last, compiled=how.compiled, train=how.train
    )
    return benching.run(models, inputs, settings, rounds=how.rounds, progress=progress)


def write_plan(decided: Plan, path: Path, *, force: bool) -> None:
    """Write a plan file: JSON if its name ends so, else YAML."""
    store.claim(path, force=force, suffixes=(".yaml", ".yml", ".json"))
    text = decided.dump(as_json=path.suffix == ".json")
    store.write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def _load(name: str, given: Given, say: Say, *, to_time: bool = False) -> Loaded:
    """Load a model, and move it to where it is to be run; what is only timed needs no float64 there."""
    rebuild = functools.partial(store.rebuild, trust=given.trust, seed=given.seed)
    loaded = source.load(
        name, arch=given.arch, arch_args=given.arch_args, trust=given.trust, seed=given.seed, rebuild=rebuild
    )
    for notice in loaded.notices:
        say(notice)
    if given.device.type in devices.NO_FLOAT64 and not to_time:
        say(f"{given.device} has no float64, in which surgeon proves what it does; {name} is run on the CPU")
        return loaded
    return replace(loaded, model=devices.moved(loaded.model, given.device))


def _save(loaded: Loaded, path: Path, say: Say, *, force: bool) -> None:
    architecture = store.architecture_of(loaded)
    store.save(loaded.model, path, architecture=architecture, force=force)
    if needed := store.to_open_again(loaded.model, path, architecture):
        say(needed)


def _inputs(model: nn.Module, given: Given, say: Say, *, plan: Plan | None = None) -> Inputs | None:
    """Make the input that was given, or the one of a plan, or find one."""
    example = examples.read(given.inputs[0], model, seed=given.seed, say=say) if given.inputs else None
    inputs = surgery.inputs_for(model, example, plan=plan, seed=given.seed)
    if inputs is None and plan is not None and plan.inputs is not None:
        say(f"noise of the shapes in the plan ({plan.inputs}) does not do, so nothing is run; give --input again")
    elif inputs is None:
        say("no input is known that the model accepts, so shapes and costs are left out; --input 1,3,224,224 gives one")
    elif inputs.is_guess:
        say(f"no --input was given; {inputs} works and is used")
    return inputs


def _labels(names: Sequence[str]) -> list[str]:
    """Shorten files to their own names, unless two are called alike."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _beside(name: str, label: str) -> Path:
    """Name the result after its origin: model.pt → model.acnet.pt, torchvision:resnet18 → resnet18.acnet.pt."""
    path = Path(name)
    if path.suffix in store.SUFFIXES:
        return path.with_name(f"{path.stem}.{label}{path.suffix}")
    if path.exists():
        return path.with_name(f"{path.stem}.{label}.pt")
    return Path(f"{name.rpartition(':')[2]}.{label}.pt")

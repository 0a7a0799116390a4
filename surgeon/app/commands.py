"""One short function per command: the table of contents of the whole program.

Files in, files out; what happens in between is `surgery`. Nothing here prints: `say` takes notices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from surgeon import api as surgery
from surgeon.analysis import example as examples
from surgeon.analysis import sites
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Survey
from surgeon.api import SelfCheck
from surgeon.app import bench as benching
from surgeon.app.bench import Progress, Timing
from surgeon.blocks import Foldable
from surgeon.errors import CaptureError
from surgeon.files import formats
from surgeon.files import load as source
from surgeon.files.atomic import claim, write_atomically
from surgeon.files.load import Loaded
from surgeon.files.pickles import Trust
from surgeon.files.save import save, to_open_again
from surgeon.proof.verify import Report
from surgeon.recipes import recipe as recipes
from surgeon.surgery import manifest as manifests
from surgeon.surgery import plan as plans
from surgeon.surgery.plan import Plan
from surgeon.surgery.replay import rebuild

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Given:
    """What the person says about a model, the same for every command."""

    arch: str | None = None
    arch_args: tuple[str, ...] = ()
    trust: Trust = field(default_factory=Trust)
    inputs: tuple[str, ...] = ()  # examples, as `--input` takes them
    seed: int = 0


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
    return sites.survey(_network(_load(name, given, say).model, given, say))


def plan(name: str, recipe: str, given: Given, say: Say, *, overrides: Sequence[str] = ()) -> Plan:
    wanted = recipes.load(recipe, overrides)
    network = _network(_load(name, given, say).model, given, say)
    return surgery.decide(wanted, sites.survey(network), seed=given.seed)


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
    path = claim(output or _beside(name, label), force=force, suffixes=formats.suffixes(), origin=name)
    loaded = _load(name, given, say)
    surveyed = sites.survey(_network(loaded.model, given, say, plan=wanted if isinstance(wanted, Plan) else None))
    if isinstance(wanted, Plan):
        plans.check(wanted, surveyed)
    decided = wanted if isinstance(wanted, Plan) else surgery.decide(wanted, surveyed, seed=given.seed)
    check = surgery.carry_out_(decided, surveyed.network)
    _save(loaded, path, say, force=force)
    return Converted(decided, check, path)


def fuse(
    name: str, given: Given, say: Say, *, dense: bool = False, output: Path | None = None, force: bool = False
) -> Fused:
    path = claim(output or _beside(name, "fused"), force=force, suffixes=formats.suffixes(), origin=name)
    loaded = _load(name, given, say)
    model, params = loaded.model, _count(loaded.model)
    folded, distance = surgery.fold_all_(_network(model, given, say), dense=dense)
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
    models = [(label, _load(name, given, say).model) for label, name in zip(_labels(names), names, strict=True)]
    inputs = _network(models[0][1], given, say).inputs
    if inputs is None:
        raise CaptureError("no input is known to run them on", todo="Give one: --input 1,3,224,224.")
    settings = benching.settings_for(
        how.batches, how.threads, channels_last=how.channels_last, compiled=how.compiled, train=how.train
    )
    return benching.run(models, inputs, settings, rounds=how.rounds, progress=progress)


def write_plan(decided: Plan, path: Path, *, force: bool) -> None:
    """Write a plan file: JSON if its name ends so, else YAML."""
    claim(path, force=force, suffixes=(".yaml", ".yml", ".json"))
    text = decided.dump(as_json=path.suffix == ".json")
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def _load(name: str, given: Given, say: Say) -> Loaded:
    again = functools.partial(rebuild, trust=given.trust, seed=given.seed)
    loaded = source.load(
        name, arch=given.arch, arch_args=given.arch_args, trust=given.trust, seed=given.seed, rebuild=again
    )
    for notice in loaded.notices:
        say(notice)
    return loaded


def _save(loaded: Loaded, path: Path, say: Say, *, force: bool) -> None:
    architecture = manifests.architecture_of(loaded)
    save(loaded.model, path, manifest=manifests.manifest(loaded.model, architecture), force=force)
    if needed := to_open_again(loaded.model, path, architecture):
        say(needed)


def _network(model: nn.Module, given: Given, say: Say, *, plan: Plan | None = None) -> Network:
    """Look at a model with the input that was given, or the one of a plan, or one that is found."""
    example = examples.read(given.inputs[0], model, seed=given.seed, say=say) if given.inputs else None
    network = surgery.network_for(model, example, plan=plan, seed=given.seed)
    inputs = network.inputs
    if inputs is None and plan is not None and plan.inputs is not None:
        say(f"noise of the shapes in the plan ({plan.inputs}) does not do, so nothing is run; give --input again")
    elif inputs is None:
        say("no input is known that the model accepts, so shapes and costs are left out; --input 1,3,224,224 gives one")
    elif inputs.is_guess:
        say(f"no --input was given; {inputs} works and is used")
    return network


def _labels(names: Sequence[str]) -> list[str]:
    """Shorten files to their own names, unless two are called alike."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _beside(name: str, label: str) -> Path:
    """Name the result after its origin: model.pt → model.acnet.pt, torchvision:resnet18 → resnet18.acnet.pt."""
    path = Path(name)
    if path.suffix in formats.suffixes():
        return path.with_name(f"{path.stem}.{label}{path.suffix}")
    if path.exists():
        return path.with_name(f"{path.stem}.{label}.pt")
    return Path(f"{name.rpartition(':')[2]}.{label}.pt")

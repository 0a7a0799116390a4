"""One short function per command: the table of contents of the whole program.

Each command reads files and writes files; `surgery` does the work in between. Nothing here prints: notices are logged,
and `progress` is told how far the work is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon import api as surgery
from surgeon.analysis import example as examples
from surgeon.analysis import sites
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Survey
from surgeon.app.given import Given
from surgeon.app.images import Images
from surgeon.app.left import nothing_to_fold, what_stays
from surgeon.app.made import Converted, Fused
from surgeon.app.outputs import claim_model, claim_python, read_to_fit
from surgeon.blocks import Block
from surgeon.display import tradeoff
from surgeon.errors import CaptureError
from surgeon.files import exports, formats
from surgeon.files import load as source
from surgeon.files.atomic import write_atomically
from surgeon.files.load import Loaded
from surgeon.files.pickles import Trust
from surgeon.files.save import save, to_open_again
from surgeon.files.written import check_writable, packages, unreadable
from surgeon.fitting import budget as budgets
from surgeon.fitting import fitted as fits
from surgeon.fitting import low
from surgeon.fitting.data import Data
from surgeon.fitting.fitted import Fitted, Settings
from surgeon.fitting.processes import joined
from surgeon.models import devices
from surgeon.models.copies import duplicate
from surgeon.models.progress import Progress, parts, silent
from surgeon.python.write import write_python
from surgeon.recipes import recipe as recipes
from surgeon.surgery import bench as benching
from surgeon.surgery import export, gains
from surgeon.surgery import manifest as manifests
from surgeon.surgery.advice import Advice
from surgeon.surgery.bake import all_baked
from surgeon.surgery.bench import Timing
from surgeon.surgery.decide import carry_out, check_bakes, plan_for
from surgeon.surgery.export import Form, is_exported
from surgeon.surgery.further import Further
from surgeon.surgery.fuse import BLOCKS_ONLY, fold_all_
from surgeon.surgery.look import network_for
from surgeon.surgery.plan import Plan
from surgeon.surgery.replay import rebuild
from surgeon.surgery.trials import Trials
from surgeon.surgery.tune import Tuning

_log = logging.getLogger("surgeon")
Look = Callable[[nn.Module], object]  # what is handed the model at the end of a command, such as the maker of a page


def unseen(model: nn.Module) -> None:
    """Do nothing with a model."""


def survey(name: str, given: Given, progress: Progress = silent) -> Survey:
    """Load a model and look at its convs."""
    network = _load_and_look(name, given, parts(progress, 0, 0.5))
    progress("looking at the convs", 0.5)
    return sites.survey(network)


def plan(
    name: str,
    recipe: str,
    given: Given,
    progress: Progress = silent,
    *,
    overrides: Sequence[str] = (),
    bake: bool = False,
    time: bool = False,
    images: Images | None = None,
    budget: str | None = None,
    picture: Path | None = None,
    look: Look = unseen,
) -> Plan:
    """Decide what a recipe makes of a model, and with `time` how long both take; with images, what each conv loses."""
    wanted, limit = recipes.load(recipe, overrides), None if budget is None else budgets.parse(budget)
    if images is not None:
        progress(f"loading {name}", 0)
        model = _load(name, given).model
        progress("reading the images", 0.1)
        data, step = _images(images, model, given), parts(progress, 0.2, 1)
        network = _network(model, given, to_plan=True, data=data)
        chosen = budgets.choose(network, wanted, data, budget=limit, bake=bake, seed=given.seed, progress=step)
        if picture is not None:
            drawn = tradeoff.svg(chosen)
            write_atomically(picture, lambda part: part.write_text(drawn, encoding="utf-8"), force=True)
        look(model)
        return chosen.plan
    network = _load_and_look(name, given, parts(progress, 0, 0.3), to_plan=True)
    progress("looking at the convs and planning", 0.3)
    decided, surveyed = plan_for(network, wanted, bake=bake, seed=given.seed)
    look(network.model)
    return gains.timed(decided, surveyed, parts(progress, 0.6, 1)) if time else decided


def recipes_for(name: str, given: Given, progress: Progress = silent) -> Advice:
    """Load a model, and say what each bundled recipe would do to it."""
    network = _load_and_look(name, given, parts(progress, 0, 0.2), to_plan=True)
    progress("looking at the convs", 0.2)
    return surgery.advised(sites.survey(network), seed=given.seed, progress=parts(progress, 0.3, 1))


def convert(
    name: str,
    how: str | Plan,
    given: Given,
    progress: Progress = silent,
    *,
    overrides: Sequence[str] = (),
    bake: bool = False,
    output: Path | None,
    force: bool,
    time: bool = False,
    images: Images | None = None,
    fitting: Settings | None = None,
    look: Look = unseen,
) -> Converted | None:
    """Convert with a recipe (its name or path), or with a plan that was read from a file; and fit to images.

    Of several processes the first one writes, and the others give None.
    """
    wanted = how if isinstance(how, Plan) else recipes.load(how, overrides)
    if isinstance(wanted, Plan):
        check_bakes(wanted, bake=bake)
    label = wanted.recipe.name if isinstance(wanted, Plan) else wanted.name
    path = claim_model(output, name, label, given, how, *read_to_fit(images, fitting), force=force)
    progress(f"loading {name}", 0)
    loaded = _load(name, given)
    if formats.of_suffix(path).holds_modules:
        bakes = bool(wanted.baked) if isinstance(wanted, Plan) else bake
        check_writable(all_baked(loaded.model) if bakes else loaded.model, given.trust)
    progress("looking for an input", 0.1)
    planned = wanted if isinstance(wanted, Plan) else None
    data = None if images is None else _images(images, loaded.model, given, planned)
    network = _network(loaded.model, given, plan=planned, to_plan=planned is None, data=data)
    progress("looking at the convs and planning", 0.2)
    inputs = gains.can_be_timed(loaded.model, network.inputs) if time else None
    original = duplicate(loaded.model) if time or data is not None else loaded.model
    ends = (0.9 if inputs is None and data is None else 0.5, 0.5 if inputs is None else 0.6)  # of converting, timing
    scores = None if isinstance(wanted, Plan) else low.scores(wanted, network, data)
    step = parts(progress, 0.3, ends[0])
    decided, check = carry_out(wanted, network, bake=bake, seed=given.seed, scores=scores, progress=step)
    if inputs is not None:
        decided = gains.compared(decided, original, loaded.model, inputs, parts(progress, *ends))
    fitted = None
    if data is not None:
        step = parts(progress, ends[1], 0.9)
        with joined(given.device) as processes:
            fitted = fits.carry_out_(
                loaded.model, original, data, fitting or Settings(), processes=processes, progress=step
            )
            if not processes.is_first:
                return None
    progress(f"writing {path}", 0.9)
    _save(loaded, path, given.trust, force=force)
    look(loaded.model)
    return Converted(decided, check, path, fitted)


def fit(
    name: str,
    reference: str,
    images: Images,
    given: Given,
    progress: Progress = silent,
    *,
    settings: Settings | None = None,
    output: Path | None = None,
    force: bool = False,
) -> tuple[Fitted, Path] | None:
    """Fit a converted model to the one that it was made from, and write it; of several processes the first does."""
    path = claim_model(output, name, "fit", given, reference, *read_to_fit(images, settings), force=force)
    progress(f"loading {name}", 0)
    loaded = _load(name, given)
    original = _load(reference, given).model
    progress("reading the images", 0.05)
    data, step = _images(images, original, given), parts(progress, 0.1, 0.95)
    with joined(given.device) as processes:
        done = fits.carry_out_(loaded.model, original, data, settings or Settings(), processes=processes, progress=step)
        if not processes.is_first:
            return None
    progress(f"writing {path}", 0.95)
    _save(loaded, path, given.trust, force=force)
    return done, path


def fuse(
    name: str,
    given: Given,
    progress: Progress = silent,
    *,
    dense: bool = False,
    keep_norms: bool = False,
    further: Further = BLOCKS_ONLY,
    form: Form | None = None,
    dtype: torch.dtype | None = None,
    tuning: Tuning | None = None,
    output: Path | None = None,
    python: Path | None = None,
    force: bool = False,
    look: Look = unseen,
) -> Fused:
    """Fold the blocks of a model, and what is linear besides as far as `further` says, and write it or export it.

    With `python`, a folder, it is written as Python of plain torch instead.
    """
    if python is None:
        path = claim_model(output, name, "fused", given, force=force, exported=True)
    else:
        path = claim_python(python, name, given, force=force)
    is_export = is_exported(path, form)
    progress(f"loading {name}", 0)
    loaded = _load(name, given)
    model, params = loaded.model, _count(loaded.model)
    if python is None and not is_export and formats.of_suffix(path).holds_modules:
        check_writable(model, given.trust)
    progress("looking for an input", 0.3)
    network = _network(model, given)
    step = parts(progress, 0.4, 0.5 if is_export or python is not None else 0.9)
    how: dict[str, Any] = {"dense": dense, "keep_norms": keep_norms, "further": further, "dtype": dtype}
    done = fold_all_(network, **how, tuning=tuning, progress=step)
    if done.warning is not None:
        _log.warning(done.warning)
    if stays := what_stays(model, keep_norms=keep_norms):
        _log.info(stays)
    elif not done.blocks and not done.further and dtype is None:
        _log.info(nothing_to_fold(further))
    written, made, step = None, None, parts(progress, 0.5, 1)
    if python is not None:
        written = write_python(model, network.inputs, python, origin=name, force=force, seed=given.seed, progress=step)
    elif is_export:
        made = export.write(model, path, network.inputs, form, force=force, seed=given.seed, progress=step)
    else:
        progress(f"writing {path}", 0.9)
        _save(loaded, path, given.trust, force=force)
    look(model)
    folded = tuple(block for block in done.blocks if not isinstance(model.get_submodule(block), Block))
    more = done.further
    return Fused(
        *(folded, (params, _count(model)), done.distance, path, done.norms, done.notes),
        *(tuple(more.folded.values()), tuple(more.norms), more.refused, made),
        python=None if written is None else written.name,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        noise=done.noise,
        tuned=done.tuned,
    )


def bench(names: Sequence[str], given: Given, trials: Trials, progress: Progress = silent) -> tuple[Timing, ...]:
    """Time models against each other on inputs of the first one's kind."""
    benching.check(trials.settings, given.device)
    models = []
    for i, (label, name) in enumerate(zip(labels(names), names, strict=True)):
        progress(f"loading {name}", 0.1 * i / len(names))
        models.append((label, _load(name, given, to_time=True).model))
    inputs = _network(models[0][1], given).inputs
    if inputs is None:
        raise CaptureError("no input is known to run the models on", todo="Pass one: --input 1,3,224,224.")
    return benching.run(models, inputs, trials.settings, rounds=trials.rounds, progress=parts(progress, 0.1, 1))


def _load_and_look(name: str, given: Given, progress: Progress, *, to_plan: bool = False) -> Network:
    """Load a model that stays as it is, and look at it."""
    progress(f"loading {name}", 0)
    model = _load(name, given).model
    progress("looking for an input", 0.6)
    return _network(model, given, to_plan=to_plan)


def _load(name: str, given: Given, *, to_time: bool = False) -> Loaded:
    """Load a model, and move it to the device where it will run; a model that is only timed needs no float64 there."""
    again = functools.partial(rebuild, trust=given.trust, seed=given.seed)
    loaded = source.load(
        name,
        arch=given.arch,
        arch_args=given.arch_args,
        key=given.weights,
        trust=given.trust,
        seed=given.seed,
        rebuild=again,
    )
    for notice in loaded.notices:
        _log.info(notice)
    if given.device.type in devices.NO_FLOAT64 and not to_time:
        _log.warning(f"{given.device} has no float64, which surgeon needs for its proofs; {name} is run on the CPU")
        return loaded
    return replace(loaded, model=devices.moved(loaded.model, given.device))


def opened(name: str, given: Given) -> nn.Module:
    """Load a model, or open a file that holds a program."""
    if not exports.is_export(name):
        return _load(name, given).model
    program, notices = exports.open_(Path(name), given.trust)
    for notice in notices:
        _log.warning(notice)
    return program


def _save(loaded: Loaded, path: Path, trust: Trust, *, force: bool) -> None:
    architecture = manifests.architecture_of(loaded)
    save(loaded.model, path, manifest=manifests.manifest(loaded.model, architecture), force=force)
    own = packages(loaded.model) if formats.of_suffix(path).holds_modules else ()
    if why := unreadable(path, Trust((*trust.allow, *own))):
        _log.warning(f"{path} was written, but surgeon cannot open it again: {why}")
    elif needed := to_open_again(loaded.model, path, architecture):
        _log.info(needed)


def _images(images: Images, model: nn.Module, given: Given, plan: Plan | None = None) -> Data:
    """Read the images for a model; what the user or a plan says that it takes is known, and nothing is guessed."""
    example = examples.read(given.inputs[0], model, seed=given.seed) if given.inputs else None
    if example is None and plan is not None and plan.inputs is not None:
        example = plan.inputs.drawn(given.seed)
    return images.read(model, example, seed=given.seed, trust=given.trust)


def _network(
    model: nn.Module, given: Given, *, plan: Plan | None = None, to_plan: bool = False, data: Data | None = None
) -> Network:
    """Look at a model with the input that was given, or the one of a plan, or one that is found.

    Where there are images, the first of them is one. That an input was found is said here, but not where a plan is made
    of it: that says so itself.
    """
    example = examples.read(given.inputs[0], model, seed=given.seed) if given.inputs else None
    if example is None and plan is None and data is not None:
        example = next(iter(data)).inputs.batched(1)
    network = network_for(model, example, plan=plan, seed=given.seed)
    inputs = network.inputs
    if inputs is None and plan is not None and plan.inputs is not None:
        rejected = f"random input of the shapes in the plan ({plan.inputs}) is rejected by the model"
        _log.warning(f"{rejected}, so nothing is run; pass --input again")
    elif inputs is None:
        unknown = "no input is known that the model accepts, so shapes and costs are left out"
        _log.warning(f"{unknown}; pass one, for example --input 1,3,224,224")
    elif inputs.is_guess and not to_plan:
        _log.info(f"no --input was given; surgeon uses {inputs}, which the model accepts")
    return network


def labels(names: Sequence[str]) -> list[str]:
    """Shorten files to their own names, unless two have the same name."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

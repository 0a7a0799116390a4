"""What acnet, hetconv and octave would bring to a network of the zoo: plans alone, at the size that it is made for.

The network is built without numbers where that is possible, so this takes seconds. Which convs stand in front of a
batch norm is not asked of surgeon: a run shows which tensors a norm is handed.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
import yaml
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_record import NO_CONV, Brings, Case, Record
from zoo_start import example_for, torchvision_kind

import surgeon
from surgeon.recipes.recipe import from_dict, load
from surgeon.surgery.decide import decide
from surgeon.surgery.plan import Entry

DETECTOR = {"min_size": 320, "max_size": 320}  # pixels, so that there are maps of some size to save at


def plan_only(case: Case, into: str | None = None) -> Record:
    """Give the record of a network that is only planned."""
    record = Record(case.name, case.family, into=into)
    if case.name.startswith("torchvision:quantized_"):
        record.left_out = "its kernels are packed int8 numbers; the float network of the same name is here"
    else:
        record.brings = record.attempt("brings", brings_of, case)
        if record.brings is None and not record.errors and not record.left_out:
            record.left_out = NO_CONV
    record.step = ""
    record.write()
    return record


def brings_of(case: Case) -> Brings | None:
    """Plan the three recipes; None for a network without a Conv2d."""
    try:
        return _brings(case, _bare(case), "meta")
    except Exception:  # it looks at numbers: give it some
        return _brings(case, surgeon.load(case.name, arch_args=_arguments(case)), "cpu")


def _arguments(case: Case) -> dict[str, Any]:
    return case.arguments | DETECTOR if "min_size" in case.arguments else case.arguments


def _bare(case: Case) -> nn.Module:
    """Build a network without numbers."""
    library, _, name = case.name.partition(":")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name)
        known = inspect.signature(torchvision.models.get_model_builder(name)).parameters
        weights = {key: None for key in ("weights", "weights_backbone") if key in known}
        return torchvision.models.get_model(name, **weights, **_arguments(case))


def _brings(case: Case, model: nn.Module, device: str) -> Brings | None:
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return None
    model.eval()
    example = pytree.tree_map(lambda value: value.to(device), _example(case, model))
    fronts, has_batch_norms = in_front_of_norms(model, example)
    surveyed = surgeon.survey(model, example)
    found = Brings(str(surveyed.inputs), surveyed.cost.macs, has_batch_norms=has_batch_norms)
    found.dense = sum(s.spec is not None and s.spec.kernel == (3, 3) and s.spec.groups == 1 for s in surveyed.sites)
    if (acnet := _planned("acnet", surveyed)) is not None:
        swaps = [entry for entry in acnet.swaps if fronts & {*entry.paths}]
        found.fronts, found.taken = len(swaps), sum(bool(entry.takes_norm) for entry in swaps)
        found.left = dict(Counter(entry.note or "" for entry in swaps if not entry.takes_norm))
    if (hetconv := _planned("hetconv-p4", surveyed)) is not None:
        found.hetconv = _share(hetconv)
    octave = _planned("octave", surveyed)
    if octave is not None and any("folds itself" in (entry.skip or "") for entry in octave.convs):
        found.folded_first = True
        surveyed = surgeon.survey(timm.utils.reparameterize_model(model), example)
        octave = _planned("octave", surveyed)
    if octave is not None:
        found.octave, found.octaves = _share(octave), len(octave.swaps)
        found.idle = [entry.path for entry in octave.swaps if _is_idle(entry, octave, surveyed)]
        reasons = (re.sub(r"\d+×\d+", "…", entry.skip) for entry in octave.convs if entry.skip)  # of maps of any size
        found.stays = dict(Counter(reasons))
    return found


def _example(case: Case, model: nn.Module) -> tuple[Any, ...]:
    """Make an input of the size that the network is made for."""
    channels, _, side = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    if torchvision_kind(case) == "detection":
        side = 320
    elif "inception_v3" in case.name:
        side = 299
    return example_for(case, channels, side, torch.float32)


def in_front_of_norms(model: nn.Module, example: Sequence[Any]) -> tuple[set[str], bool]:
    """Run a network, and find the convs whose output a batch norm of any class is handed; and whether any is called."""
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no other tensor gets the id of one that is gone
    found: set[str] = set()
    called: list[nn.Module] = []

    def remember(name: str) -> Any:
        def after(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                kept.append(out)
                made[id(out)] = name

        return after

    def before(module: nn.Module, args: Any) -> None:
        called.append(module)
        if args and id(args[0]) in made:
            found.add(made[id(args[0])])

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(remember(name)))
        elif isinstance(getattr(module, "running_var", None), Tensor) and "Instance" not in type(module).__name__:
            hooks.append(module.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found, bool(called)


def _planned(recipe: str, surveyed: surgeon.Survey) -> surgeon.Plan | None:
    """Plan; None where a recipe claims no conv."""
    try:
        return decide(load(recipe), surveyed, seed=0)
    except surgeon.errors.PlanError as error:
        if "claims no conv" not in error.problem:
            raise
        return None


def _share(plan: surgeon.Plan) -> float | None:
    macs = plan.gained.macs
    return round(macs.after / macs.before, 4) if macs and macs.before else None


def _is_idle(entry: Entry, octave: surgeon.Plan, surveyed: surgeon.Survey) -> bool:
    """Whether an octave conv has no low channels on either side, or a plan that leaves it alone costs no more.

    A conv that itself saves nothing may be why another one has two streams.
    """
    if not entry.options.get("alpha_in") and not entry.options.get("alpha_out"):
        return True
    if entry.macs is None or entry.macs.after < entry.macs.before:
        return False
    wanted = yaml.safe_load(load("octave").text)
    alone = {"leave": "to see what it is swapped for", "match": {"name": list(entry.paths)}}
    without = decide(from_dict(wanted | {"rules": [alone, *wanted["rules"]]}), surveyed, seed=0)
    return all(
        getattr(without.total, cost).after <= getattr(octave.total, cost).after for cost in ("macs", "activations")
    )

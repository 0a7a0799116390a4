"""One network of the zoo through surgeon, step by step, and the record of the results.

Weights are random; norms, layer scales and everything else that starts constant is given random numbers; all runs in
float64 and eval mode. How far a network is from what it was is measured here in plain torch, not by surgeon:

    relative L2 = ‖after − before‖ / ‖before‖        of the output that is furthest apart
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_brings import brings_of
from zoo_record import NO_CONV, Case, Found, Record
from zoo_start import build, calibrate_, distance, example_for, nudged, outputs, shake_, torchvision_kind

import surgeon
from surgeon.analysis.network import Network
from surgeon.models.copies import duplicate
from surgeon.recipes.recipe import load
from surgeon.surgery.convert import carry_out_
from surgeon.surgery.decide import decide

# Relative L2: a wrong result is above the first; networks of ordinary depth and scale stay below the second.
LIMIT = {"float64": 1e-10, "float32": 1e-4}
USUAL = {"float64": 1e-12, "float32": 1e-5}
# In a network of more convs or parameters octave is not verified but by its own check and by what it is deployed as.
FEW, LARGE = 40, 100_000_000
SMALL_MAPS = ("rules[1].with.min_size=2",)  # for octave: the inputs here are small, and so are the maps
# At 32 pixels the last maps of most networks are one pixel, where only the centre tap of a kernel is seen.
SIDES = (64, 32, 96, 128, 160, 192)


@dataclass
class Study:
    """A network that runs: its input, its output, and the record."""

    case: Case
    record: Record
    model: nn.Module
    example: tuple[Any, ...]
    before: list[Tensor]

    def attempt(self, step: str, work: Callable[..., Found], *given: Any) -> Found | None:
        return self.record.attempt(step, work, *given)


class Converted(NamedTuple):
    """A network that was converted, and the plan."""

    plan: surgeon.Plan
    model: nn.Module


def examine(case: Case, into: str | None = None) -> Record:
    """Take one network along the whole path."""
    record = Record(case.name, case.family, into=into)
    if case.name.startswith("torchvision:quantized_"):
        record.left_out = "its kernels are packed int8 numbers; the float network of the same name is here"
    elif (model := record.attempt("build", build, case)) is not None:
        record.parameters = sum(parameter.numel() for parameter in model.parameters())
        if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
            record.left_out = NO_CONV
        elif (study := record.attempt("run", begin, case, model, record)) is not None:
            operate(study)
    record.step = ""
    record.write()
    return record


def operate(study: Study) -> None:
    if (surveyed := study.attempt("survey", survey, study)) is not None:
        take_over(study, surveyed)
        if not study.case.is_brief:
            approximate("hetconv", "hetconv-p4", study, surveyed)
        deploy_octave(study, surveyed)
    study.record.brings = study.attempt("brings", brings_of, study.case)


def begin(case: Case, model: nn.Module, record: Record) -> Study:
    """Find the smallest input that the network accepts, in float64 if it can, and make its numbers ordinary ones."""
    channels, _, native = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    refusals: dict[str, None] = {}
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        for side in dict.fromkeys((*(side for side in SIDES if side < native), native)):
            try:
                example = example_for(case, channels, side, dtype)
                before = outputs(calibrate_(model, example), example)
            except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
                refusals[f"{(str(error).splitlines() or [type(error).__name__])[0][:150]} ({side}, {dtype})"] = None
                continue
            if before and all(tensor.isfinite().all() for tensor in before):
                other = example_for(case, channels, side, dtype, seed=1)
                record.input = [list(one.shape) for one in pytree.tree_leaves(example)]
                record.dtype = str(dtype).removeprefix("torch.")
                record.moved_by_input = distance(outputs(model, other), before)
                return Study(case, record, model, example, before)
            refusals[f"the output is empty or not finite ({side}, {dtype})"] = None
    raise ValueError(f"no input is accepted: {'; '.join(refusals)}")


def survey(study: Study) -> surgeon.Survey:
    """Note the convs, the islands, and what could not be traced."""
    found = surgeon.survey(study.model, study.example)
    record = study.record
    record.sites, record.islands = len(found.sites), len(found.network.islands)
    record.opaque = {part.path or "the model": part.reason for part in found.opaque}
    record.dense = sum(is_dense(site) for site in found.sites)
    return found


def is_dense(site: Any) -> bool:
    return site.spec is not None and site.spec.kernel == (3, 3) and site.spec.groups == 1


def take_over(study: Study, surveyed: surgeon.Survey) -> None:
    """Convert with acnet, save and reload, fuse, and verify both."""
    record, model, example = study.record, study.model, study.example
    if (plan := study.attempt("plan", planned, "acnet", study, surveyed)) is None:
        return
    count_swaps(plan, surveyed, record)
    if not plan.swaps or (converted := study.attempt("convert", converted_by, plan, study)) is None:
        return
    touched = {path for entry in plan.swaps for path in (*entry.paths, *entry.takes_norm)}
    study.attempt("compare", compare, "convert", converted, model, study.before, study)
    study.attempt("keep", check_kept, model, converted, touched, record)
    if not study.case.is_brief:
        study.attempt("reload", reload, converted, study)
        study.attempt("verify", verdict, "convert", model, converted, study)
    before = outputs(calibrate_(shake_(converted), example), example)  # as after training: the strips take part
    if (fused := study.attempt("fuse", surgeon.fuse, converted)) is None:
        return
    study.attempt("compare fused", compare, "fuse", fused, converted, before, study)
    study.attempt("keep fused", check_kept, converted, fused, touched, record)
    if not study.case.is_brief:
        study.attempt("verify fused", verdict, "fuse", converted, fused, study)


def converted_by(plan: surgeon.Plan, study: Study) -> nn.Module:
    return carried_out(plan, study) if study.case.is_brief else surgeon.convert(study.model, plan, study.example)


def planned(recipe: str, study: Study, surveyed: surgeon.Survey, overrides: Sequence[str] = ()) -> surgeon.Plan | None:
    """Plan; a recipe that claims no conv here is not an error."""
    try:
        return decide(load(recipe, overrides), surveyed, seed=0)
    except surgeon.errors.PlanError as error:
        if "claims no conv" not in error.problem:
            raise
        study.record.notes.append(f"{study.record.step}: no conv is claimed")
        return None


def count_swaps(plan: surgeon.Plan, surveyed: surgeon.Survey, record: Record) -> None:
    dense = {site.path for site in surveyed.sites if is_dense(site)}
    record.swapped = len(plan.swaps)
    record.skipped = dict(Counter(entry.skip for entry in plan.convs if entry.skip))
    record.dense_swapped = sum(entry.path in dense for entry in plan.swaps)
    record.dense_skipped = dict(Counter(entry.skip for entry in plan.convs if entry.skip and entry.path in dense))


def compare(step: str, after: nn.Module, model: nn.Module, before: Sequence[Tensor], study: Study) -> None:
    """Measure how far a network is from the one it was made from; where that is unusual, how far rounding takes it.

    A detector sorts what it finds: if two scores differ only by rounding, their order means nothing.
    """
    record = study.record
    record.apart[step] = found = distance(outputs(after, study.example), before)
    if found <= USUAL[record.dtype]:
        return
    moved = max(distance(outputs(nudged(model, seed), study.example), before) for seed in range(4))
    record.moved_by_rounding = max(moved, record.moved_by_rounding or 0.0)
    if not found <= max(LIMIT[record.dtype], 2 * moved):
        record.wrong.append(f"{step}: relative L2 {found:.1e}")


def check_kept(before: nn.Module, after: nn.Module, touched: set[str], record: Record) -> None:
    """Make sure that classes, and the keys and numbers of all that was not touched, are what they were."""

    def is_untouched(name: str) -> bool:
        parts = name.split(".")
        return not any(".".join(parts[:i]) in touched for i in range(1, len(parts) + 1))

    old, new = ({n: type(m) for n, m in net.named_modules() if is_untouched(n)} for net in (before, after))
    wrong = [f"the class of {name or 'the model'} is not what it was" for name in old if new.get(name) is not old[name]]
    old, new = ({k: t for k, t in net.state_dict().items() if is_untouched(k)} for net in (before, after))
    wrong += [f"the key {key} was lost or is new" for key in new.keys() ^ old.keys()]
    wrong += [f"{key} has changed" for key in new.keys() & old.keys() if not same(new[key], old[key])]
    record.wrong += [f"{record.step}: {fault}" for fault in wrong[:5]]


def reload(model: nn.Module, study: Study) -> None:
    """Save and load again, as a module; where safe loading refuses its classes, as weights and a named network."""
    case, record = study.case, study.record
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt"
        surgeon.save(model, path)
        try:
            again = surgeon.load(path)
        except surgeon.errors.ModelError as error:
            record.notes.append(f"reload: as weights, for {error.problem.replace(folder, '')[:200]}")
            path.unlink()
            path = path.with_suffix(".safetensors")
            surgeon.save(model, path, arch=case.name)
            again = surgeon.load(path, arch=case.name, arch_args=case.arguments)
    old, new = model.state_dict(), again.state_dict()
    if type(again) is not type(model) or new.keys() != old.keys() or not all(same(new[key], old[key]) for key in old):
        record.wrong.append("reload: the class, or a stored tensor, is another one")
    elif not all(map(torch.equal, outputs(again.eval(), study.example), outputs(model, study.example))):
        record.wrong.append("reload: the output is another one")


def verdict(step: str, a: nn.Module, b: nn.Module, study: Study) -> None:
    report = surgeon.verify(a, b, study.example)
    study.record.verdicts[step] = report.verdict
    if report.verdict == "different":
        failed = "; ".join(check.says for check in report.checks if not check.passed)
        study.record.wrong.append(f"verify of {step}: {failed}")


def approximate(
    step: str, recipe: str, study: Study, surveyed: surgeon.Survey, overrides: Sequence[str] = ()
) -> Converted | None:
    """Convert with a recipe that changes the function: it must run, and give the same shapes."""
    plan = study.attempt(f"{step} plan", planned, recipe, study, surveyed, overrides)
    if plan is None or not plan.swaps:
        return None
    converted = study.attempt(f"{step} convert", carried_out, plan, study)
    if converted is None:
        return None
    study.attempt(f"{step} run", check_shapes, step, converted, study)
    return Converted(plan, converted)


def carried_out(plan: surgeon.Plan, study: Study) -> nn.Module:
    """Do what surgeon.convert does, without looking at every conv once more."""
    model = duplicate(study.model)
    carry_out_(plan, Network(model, surgeon.Inputs(study.example)))
    return model


def deploy_octave(study: Study, surveyed: surgeon.Survey) -> None:
    """Convert with octave, where islands become graphs; the deployed form must compute the same."""
    record = study.record
    if (made := approximate("octave", "octave", study, surveyed, SMALL_MAPS)) is None:
        return
    record.octaves, record.rewritten = len(made.plan.swaps), len(made.plan.rewritten)
    record.seams = dict(Counter(f"{seam.kind}: {seam.reason}" for seam in made.plan.seams))
    old, new = ({key: shape_of(t) for key, t in net.state_dict().items()} for net in (study.model, made.model))
    if old != new:
        record.wrong.append(f"octave: {len(old.items() ^ new.items())} keys or shapes are not what they were")
    if (record.sites or 0) <= FEW and (record.parameters or 0) <= LARGE:
        study.attempt("octave verify", verdict, "octave", study.model, made.model, study)
    before = outputs(made.model, study.example)
    if (fused := study.attempt("octave fuse", surgeon.fuse, made.model)) is not None:
        study.attempt("octave compare", compare, "octave fused", fused, made.model, before, study)


def shape_of(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def check_shapes(step: str, converted: nn.Module, study: Study) -> None:
    out = outputs(converted, study.example)
    study.record.apart[step] = distance(out, study.before)
    if torchvision_kind(study.case) != "detection" and [t.shape for t in out] != [t.shape for t in study.before]:
        study.record.wrong.append(f"{step}: the output has another shape")  # of a detector: another number of objects
    if not all(tensor.isfinite().all() for tensor in out):
        study.record.wrong.append(f"{step}: the output is not finite")


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return repr(one) == repr(other)
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())

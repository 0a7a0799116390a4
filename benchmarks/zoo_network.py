"""One network of the zoo through surgeon, step by step, and the record of the results.

Weights are random; norms, layer scales and everything else that starts constant is given random numbers; all runs in
float64 and eval mode. How far a network is from what it was is measured here in plain torch, not by surgeon:

    relative L2 = ‖after − before‖ / ‖before‖        of the output that is furthest apart
"""

from __future__ import annotations

import copy
import json
import math
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import surgeon
from surgeon.analysis.network import Network
from surgeon.models.copies import duplicate
from surgeon.recipes.recipe import load
from surgeon.surgery.convert import carry_out_
from surgeon.surgery.decide import decide

# Relative L2: a wrong result is above the first; networks of ordinary depth and scale stay below the second.
LIMIT = {"float64": 1e-10, "float32": 1e-4}
USUAL = {"float64": 1e-12, "float32": 1e-5}
NO_CONV = "it has no Conv2d"
NO_MEMORY = ("can't allocate memory", "MemoryError", "std::bad_alloc")
# In a network of more convs or parameters octave is not verified but by its own check and by what it is deployed as.
FEW, LARGE = 40, 100_000_000
SMALL_MAPS = ("rules[1].with.min_size=2",)  # for octave: the inputs here are small, and so are the maps
# At 32 pixels the last maps of most networks are one pixel, where only the centre tap of a kernel is seen.
SIDES = (64, 32, 96, 128, 160, 192)
# Detectors: small images instead of 800 pixels, and what they find is not thrown away because random scores are low.
SMALL = {"min_size": 128, "max_size": 160}
ARGUMENTS = {
    "faster_rcnn": {**SMALL, "box_score_thresh": 0.0},
    "mask_rcnn": {**SMALL, "box_score_thresh": 0.0, "box_detections_per_img": 10},
    "keypoint_rcnn": {**SMALL, "box_score_thresh": 0.0, "box_detections_per_img": 10},
    "retinanet": {**SMALL, "score_thresh": 0.0},
    "fcos": {**SMALL, "score_thresh": 0.0},
    "ssd": {"score_thresh": 0.0},
    "ssdlite": {"score_thresh": 0.0},
}
Found = TypeVar("Found")


class Case(NamedTuple):
    """An architecture: `name` as surgeon takes it, `family` the module that defines it."""

    name: str
    family: str
    parameters: int = 0  # by which a sweep is ordered; 0 where nobody has counted
    is_brief: bool = False  # a smaller network of this family has gone the whole way

    @property
    def arguments(self) -> dict[str, Any]:
        return ARGUMENTS.get(self.family, {}) if self.name.startswith("torchvision:") else {}


@dataclass
class Record:
    """What was found out about one network; it is written after every step, so that a crash loses nothing."""

    name: str
    family: str
    left_out: str | None = None  # why it cannot be examined here
    parameters: int | None = None
    dtype: str = ""
    input: list[list[int]] = field(default_factory=list)
    moved_by_input: float | None = None  # relative L2 between its outputs for two inputs: 0 would show nothing
    sites: int | None = None
    swapped: int | None = None
    skipped: dict[str, int] = field(default_factory=dict)  # by reason
    dense: int | None = None  # 3×3 convs with groups=1, Conv2d and its subclasses
    dense_swapped: int | None = None
    dense_skipped: dict[str, int] = field(default_factory=dict)
    islands: int | None = None
    octaves: int | None = None  # convs that the octave recipe swaps
    rewritten: int | None = None  # islands whose graph it rewrites
    seams: dict[str, int] = field(default_factory=dict)  # that it leaves, by reason
    opaque: dict[str, str] = field(default_factory=dict)  # path → why it could not be traced
    apart: dict[str, float] = field(default_factory=dict)  # relative L2 to the original, by step
    moved_by_rounding: float | None = None  # by one unit in the last place of every weight, where `apart` is unusual
    verdicts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    megabytes: int | None = None
    step: str = ""  # what is going on
    into: str | None = None

    @property
    def status(self) -> str:
        if self.left_out:
            return "left out"
        return "failed" if self.errors else "wrong" if self.wrong else "right"

    def attempt(self, step: str, work: Callable[..., Found], *given: Any) -> Found | None:
        """Do one step; time it, and note the error if there is one."""
        self.step, start = step, time.perf_counter()
        self.write()
        try:
            return work(*given)
        except Exception as error:
            self.note_error(error)
            return None
        finally:
            self.seconds[step] = round(time.perf_counter() - start, 2)
            self.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            self.write()

    def note_error(self, error: Exception) -> None:
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        self.note(said[:400], f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}")

    def note(self, error: str, place: str) -> None:
        if any(sign in error + place for sign in NO_MEMORY):
            self.left_out = f"{self.step} does not fit into the memory that it may use"
        else:
            self.errors.append({"step": self.step or "start", "error": error, "place": place})

    def write(self) -> None:
        if self.into is not None:
            Path(self.into).write_text(json.dumps(asdict(self)), encoding="utf-8")


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


def build(case: Case) -> nn.Module:
    """Make the network as surgeon would, with numbers that hide no mistake."""
    return shake_(surgeon.load(case.name, arch_args=case.arguments).eval())


def shake_(model: nn.Module) -> nn.Module:
    """Give small random changes to every parameter and statistic whose numbers are all the same.

    A fresh norm, a layer scale of 1e-6, a head of zeros, and a strip of an ACBlock before training let every mistake
    through.
    """
    generator = torch.Generator().manual_seed(0)
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if name.rpartition(".")[0] in norms]
    for name, tensor in (*model.named_parameters(), *buffers):
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            low, high = (0.5, 2.0) if name.endswith("running_var") else (0.3, 1.0)
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low
            if sum(side > 1 for side in tensor.shape) > 1 or name.endswith(("bias", "running_mean", "beta")):
                noise = (noise - (low + high) / 2) * 0.3
            tensor.data.copy_(noise)
    return model


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


def calibrate_(model: nn.Module, example: Sequence[Any]) -> nn.Module:
    """Set the statistics of every batch norm near those of what goes through it.

    With other statistics the signal dies out in a deep network, and a comparison shows nothing.
    """
    generator = torch.Generator().manual_seed(1)

    def set_(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().double()
        means = x.transpose(0, 1).flatten(1).mean(1) / 3  # all of it, and only differences would be left
        size = x.square().mean() + 0.003
        noise = torch.rand(2, len(means), generator=generator, dtype=torch.float64)
        norm.running_mean.copy_(means + (noise[0] - 0.5) * 0.2 * size.sqrt())
        norm.running_var.copy_(size * 4.0 ** (noise[1] - 0.5))  # 0.5 to 2 times

    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    hooks = [norm.register_forward_pre_hook(set_) for norm in norms]
    try:
        outputs(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def example_for(case: Case, channels: int, side: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """Make what is handed to the network: an image, a pair of them, a clip, or a list of images for a detector."""
    generator = torch.Generator().manual_seed(seed)
    kind = torchvision_kind(case)
    shape = (1, channels, *([16] if kind == "video" else []), side, side)
    count = 2 if kind == "optical_flow" else 1
    images = [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    return ([image[0] for image in images],) if kind == "detection" else tuple(images)


def torchvision_kind(case: Case) -> str:
    """Say to which part of torchvision.models a network belongs: '' for classification and for timm."""
    library, _, name = case.name.partition(":")
    if library != "torchvision":
        return ""
    return (torchvision.models.get_model_builder(name).__module__.split(".")[2:-1] or [""])[0]


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


def outputs(model: nn.Module, example: Sequence[Any]) -> list[Tensor]:
    """Run a network; return all floating point tensors in its output that hold numbers."""
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(*pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, example))
    out = vars(out) if hasattr(out, "__dataclass_fields__") else out
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def distance(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Relative L2 of the output that is furthest apart; infinite where shapes differ."""
    if [t.shape for t in after] != [t.shape for t in before]:
        return math.inf
    pairs = zip(after, before, strict=True)
    return max(((b - a).norm() / a.norm().clamp_min(1e-300)).item() for b, a in pairs)


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return repr(one) == repr(other)
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def nudged(model: nn.Module, seed: int) -> nn.Module:
    """Copy a network, with every weight moved by one unit in the last place."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.mul_(1 + torch.finfo(parameter.dtype).eps * torch.sign(torch.randn_like(parameter)))
    return model

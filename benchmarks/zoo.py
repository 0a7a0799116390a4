"""Every convolutional network of torchvision and timm through surgeon: does any crash, does any come out wrong?

Each network is built with random weights, its norms and other constant parameters shaken, in float64 and eval mode, and
goes through the whole path in a process of its own: survey, plan, convert (acnet), fuse, verify, save and reload, then
hetconv and octave. How far a network is from what it was is measured here, in plain torch, not by surgeon:

    relative L2 = ‖after − before‖ / ‖before‖        of the output that is furthest apart

What is finished is appended to a file, one JSON object a line; a sweep that is started again goes on from there.

    python benchmarks/zoo.py --jobs 2                       # torchvision, and the smallest of every family of timm
    python benchmarks/zoo.py --only 'timm:*repvgg*' --again
    python benchmarks/zoo.py --write-docs                   # and docs/zoo.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import surgeon

ROOT = Path(__file__).parents[1]
LIMIT, USUAL = 1e-10, 1e-12  # a wrong result is above the first; nets of ordinary depth stay below the second
NO_CONV = "it has no Conv2d"
NO_MEMORY = ("can't allocate memory", "MemoryError", "std::bad_alloc")
OCTAVE = {
    "surgeon": 1,
    "title": "octave",
    "rules": [{"swap": "octave", "match": {"in_channels": {"min": 5}}, "with": {"alpha": 0.5}}],
}
# At 32 pixels the last maps of most networks are one pixel, where only the centre tap of a kernel is seen.
SIDES = (64, 32, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
# Detectors: small images instead of 800 pixels, and what they find is not thrown away because random scores are low.
SMALL = {"min_size": 64, "max_size": 96}
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
        if any(sign in f"{type(error).__name__} {error}" for sign in NO_MEMORY):
            self.left_out = f"{self.step} does not fit into the memory that it may use"
            return
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}"
        self.errors.append({"step": self.step, "error": said[:400], "place": place})

    def write(self) -> None:
        if self.into is not None:
            Path(self.into).write_text(json.dumps(asdict(self)), encoding="utf-8")


# What there is


def cases(*, every: bool, chosen: dict[str, str]) -> list[Case]:
    """List the architectures; of timm the smallest one of each family unless `every` is asked for.

    `chosen` remembers the smallest ones.
    """
    found = []
    for name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__
        found.append(Case(f"torchvision:{name}", module.removeprefix("torchvision.models.").split(".")[-1]))
    for family in timm.list_modules():
        names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        if not every and names:
            key = f"{family} of timm {timm.__version__}"
            chosen[key] = chosen.get(key) or min(names, key=size_of)
            names = [chosen[key]]
        found += [Case(f"timm:{name}", family) for name in names]
    return found


def size_of(name: str) -> int:
    """Count the parameters of a network of timm, without making any numbers where that goes."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception:
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


# One network


def examine(case: Case, into: str | None = None) -> Record:
    """Take one network the whole way."""
    record = Record(case.name, case.family, into=into)
    if case.name.startswith("torchvision:quantized_"):
        record.left_out = "its kernels are packed int8 numbers; the float network of the same name is here"
        return record
    torch.manual_seed(0)
    model = record.attempt("build", build, case)
    if model is None:
        return record
    record.parameters = sum(parameter.numel() for parameter in model.parameters())
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        record.left_out = NO_CONV
        return record
    example = record.attempt("run", example_for, case, model, record)
    if example is not None:
        record.attempt("survey", survey, model, example, record)
        take_over(case, model, example, record)
        approximate("hetconv", "hetconv-p4", model, example, record)
        approximate("octave", OCTAVE, model, example, record)
    record.step = ""
    record.write()
    return record


def build(case: Case) -> nn.Module:
    """Make the network as surgeon would, with numbers that hide no mistake."""
    return shake_(surgeon.load(case.name, arch_args=case.arguments).eval()).double()


def shake_(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic whose numbers are all the same others, gently.

    A fresh norm, a layer scale of 1e-6, a head of zeros, and a strip of an ACBlock before training let every fault
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


def example_for(case: Case, model: nn.Module, record: Record) -> Any:
    """Find the smallest input that the network accepts, and with which its output is finite and says something."""
    native = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    refusals: list[str] = []
    for side in dict.fromkeys((*SIDES, native[-1])):
        example = noise_of(case, native[0], side, 0)
        try:
            out = outputs(model, example)
            other = outputs(model, noise_of(case, native[0], side, 1))
        except Exception as error:
            refusals.append(f"{side}: {(str(error).splitlines() or [''])[0][:120]}")
            continue
        if not out or not all(tensor.isfinite().all() for tensor in out):
            refusals.append(f"{side}: the output is empty or not finite")
            continue
        record.input, record.dtype = [list(one.shape) for one in example], "float64"
        record.moved_by_input = distance(other, out)
        return example
    raise ValueError(f"no input is accepted: {'; '.join(dict.fromkeys(refusals))}")


def noise_of(case: Case, channels: int, side: int, seed: int) -> tuple[Tensor, ...]:
    """Make what is handed to the network: images, a pair of them, or a clip.

    Detectors want a list of images; a batch is one, too.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = torchvision_kind(case)
    shape = (1, channels, *([16] if kind == "video" else []), side, side)
    count = 2 if kind == "optical_flow" else 1
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(count))


def torchvision_kind(case: Case) -> str:
    """Say to which part of torchvision.models a network belongs: '' for classification and for timm."""
    library, _, name = case.name.partition(":")
    if library != "torchvision":
        return ""
    return (torchvision.models.get_model_builder(name).__module__.split(".")[2:-1] or [""])[0]


def survey(model: nn.Module, example: Any, record: Record) -> None:
    """Note the convs, the islands, and what could not be traced."""
    found = surgeon.survey(model, example)
    record.sites, record.islands = len(found.sites), len(found.capture.islands)
    record.opaque = {part.path or "the model": part.reason for part in found.capture.opaque}
    record.dense = sum(is_dense(site) for site in found.sites)


def is_dense(site: Any) -> bool:
    return site.spec is not None and site.spec.kernel == (3, 3) and site.spec.groups == 1


def take_over(case: Case, model: nn.Module, example: Any, record: Record) -> None:
    """Convert with acnet, fuse, verify both, save and reload."""
    plan = record.attempt("plan", planned, model, "acnet", example, record)
    if plan is None:
        return
    before = outputs(model, example)
    count_swaps(plan, surgeon.survey(model, example), record)
    if (converted := record.attempt("convert", surgeon.convert, model, plan, example)) is None:
        return
    record.attempt("compare", compare, "convert", converted, before, example, record)
    touched = {path for entry in plan.swaps for path in (*entry.paths, *entry.takes_norm)}
    record.attempt("kept", check_kept, model, converted, touched, record)
    record.attempt("reload", reload, case, converted, example, record)
    record.attempt("verify", verdict, "convert", model, converted, example, record)
    before_fusing = outputs(shake_(converted), example)  # as after training: the strips take part
    if (fused := record.attempt("fuse", surgeon.fuse, converted)) is None:
        return
    record.attempt("compare fused", compare, "fuse", fused, before_fusing, example, record)
    record.attempt("kept fused", check_kept, converted, fused, touched, record)
    record.attempt("verify fused", verdict, "fuse", converted, fused, example, record)
    if max(record.apart.values(), default=0) > USUAL:
        record.moved_by_rounding = distance(outputs(nudged_(model), example), before)


def planned(model: nn.Module, recipe: Any, example: Any, record: Record) -> Any:
    """Plan; a recipe that claims no conv here is no fault."""
    try:
        plan = surgeon.plan(model, recipe, example)
    except surgeon.errors.PlanError as error:
        if "matches no" not in error.problem and "claims no" not in error.problem:
            raise
        record.notes.append(f"{record.step}: no conv is claimed")
        return None
    if not plan.swaps:
        record.notes.append(f"{record.step}: every conv that is claimed is skipped")
        record.skipped = record.skipped or dict(Counter(entry.skip for entry in plan.convs))
    return plan if plan.swaps else None


def count_swaps(plan: Any, surveyed: Any, record: Record) -> None:
    dense = {site.path for site in surveyed.sites if is_dense(site)}
    record.swapped = len(plan.swaps)
    record.skipped = dict(Counter(entry.skip for entry in plan.convs if entry.skip))
    record.dense_swapped = sum(entry.path in dense for entry in plan.swaps)
    record.dense_skipped = dict(Counter(entry.skip for entry in plan.convs if entry.skip and entry.path in dense))


def compare(step: str, after: nn.Module, before: Sequence[Tensor], example: Any, record: Record) -> None:
    record.apart[step] = found = distance(outputs(after, example), before)
    if not found <= LIMIT:
        record.wrong.append(f"{step}: relative L2 {found:.1e}")


def check_kept(model: nn.Module, after: nn.Module, touched: set[str], record: Record) -> None:
    """Make sure that classes, and the keys and numbers of all that was not touched, are what they were."""

    def is_touched(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in touched for i in range(1, len(parts) + 1))

    ours, theirs = ({n: type(m) for n, m in net.named_modules()} for net in (after, model))
    wrong = [
        f"{n or 'the model'} is no {c.__name__} any more"
        for n, c in theirs.items()
        if not is_touched(n) and ours.get(n) is not c
    ]
    new, old = ({k: v for k, v in net.state_dict().items() if not is_touched(k)} for net in (after, model))
    wrong += [f"the key {key} was lost or is new" for key in new.keys() ^ old.keys()]
    wrong += [f"{key} has changed" for key in new.keys() & old.keys() if not same(new[key], old[key])]
    record.wrong += [f"{record.step}: {fault}" for fault in wrong[:5]]


def reload(case: Case, model: nn.Module, example: Any, record: Record) -> None:
    """Save and load again, as a module; where safe loading refuses its classes, as weights and a named network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt"
        surgeon.save(model, path)
        try:
            again = surgeon.load(path)
        except surgeon.errors.ModelError as error:
            record.notes.append(f"reload: as weights, for {str(error).splitlines()[0].replace(folder, '')[:200]}")
            path.unlink()
            path = path.with_suffix(".safetensors")
            surgeon.save(model, path, arch=case.name)
            again = surgeon.load(path, arch=case.name, arch_args=case.arguments)
        new, old = again.state_dict(), model.state_dict()
        is_same = new.keys() == old.keys() and all(same(new[key], old[key]) for key in old)
        if type(again) is not type(model) or not is_same:
            record.wrong.append("reload: the class, or a stored tensor, is another one")
        elif not all(map(torch.equal, outputs(again, example), outputs(model, example))):
            record.wrong.append("reload: the output is another one")


def verdict(step: str, a: nn.Module, b: nn.Module, example: Any, record: Record) -> None:
    report = surgeon.verify(a, b, example)
    record.verdicts[step] = report.verdict
    if report.verdict == "different":
        record.wrong.append(f"{step}: {'; '.join(check.says for check in report.checks if not check.passed)}")


def approximate(step: str, recipe: Any, model: nn.Module, example: Any, record: Record) -> None:
    """Convert with a recipe that changes the function: it must run, give the same shapes, and be called approximate."""
    if (plan := record.attempt(step, planned, model, recipe, example, record)) is None:
        return
    if (converted := record.attempt(f"{step} convert", surgeon.convert, model, plan, example)) is None:
        return
    record.attempt(f"{step} run", check_shapes, step, converted, model, example, record)
    record.attempt(f"{step} verify", verdict, step, model, converted, example, record)


def check_shapes(step: str, converted: nn.Module, model: nn.Module, example: Any, record: Record) -> None:
    new, old = outputs(converted, example), outputs(model, example)
    if [t.shape for t in new] != [t.shape for t in old]:
        record.wrong.append(f"{step}: the output has another shape")
    if not all(tensor.isfinite().all() for tensor in new):
        record.wrong.append(f"{step}: the output is not finite")
    record.apart[step] = distance(new, old)


def outputs(model: nn.Module, example: Sequence[Any]) -> list[Tensor]:
    """Run a network; all floating point tensors that it returns and that hold numbers."""
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(*example)
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


def nudged_(model: nn.Module) -> nn.Module:
    """Move every weight of the network itself by one unit in the last place."""
    for parameter in model.parameters():
        parameter.data.mul_(1 + 2.0**-52 * torch.sign(torch.randn_like(parameter)))
    return model


# All networks


@dataclass
class Worker:
    """A process that examines one network, and what it has written so far."""

    case: Case
    process: subprocess.Popen[bytes]
    into: Path
    start: float

    @classmethod
    def begin(cls, case: Case, folder: Path, memory: float) -> Worker:
        into = folder / f"{re.sub(r'[^a-z0-9]+', '-', case.name)}.json"
        command = [sys.executable, __file__, "--one", *case, "--into", str(into), "--memory", str(memory)]
        with into.with_suffix(".log").open("wb") as log:
            settings = {"stdout": log, "stderr": log, "env": {"OMP_NUM_THREADS": "1", **os.environ}}
            return cls(case, subprocess.Popen(command, **settings), into, time.monotonic())

    def finished(self, timeout: float) -> Record | None:
        """Give the record once the process has ended, however it did, or has taken too long."""
        code = self.process.poll()
        is_late = code is None and time.monotonic() - self.start > timeout
        if code is None and not is_late:
            return None
        if is_late:
            self.process.kill()
            self.process.wait()
        record = Record(**json.loads(self.into.read_text())) if self.into.exists() else Record(*self.case)
        if is_late or code:
            how = f"not done after {timeout:.0f} s" if is_late else f"the process ended with {code}"
            last = self.into.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
            record.errors.append({"step": record.step or "start", "error": how, "place": "".join(last)[:200]})
        record.into = None
        return record


def sweep(todo: Sequence[Case], options: argparse.Namespace) -> None:
    """Examine the networks, `--jobs` at a time, and append what was found about each to the file."""
    waiting, running, failures = list(reversed(todo)), [], 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=len(todo))
        while waiting or running:
            while waiting and len(running) < options.jobs:
                running.append(Worker.begin(waiting.pop(), Path(folder), options.memory))
            time.sleep(0.2)
            for worker in tuple(running):
                if (record := worker.finished(options.timeout)) is None:
                    continue
                running.remove(worker)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asdict(record), "versions": versions()}) + "\n")
                progress.advance(task)
                if record.status in ("failed", "wrong"):
                    failures += 1
                    progress.print(f"{record.name}: {'; '.join(complaints(record))}", markup=False)
            names = ", ".join(worker.case.name for worker in running)
            progress.update(task, description=f"{failures} failed   {names}")


def complaints(record: Record) -> list[str]:
    errors = [f"{one['step']}: {one['error']} ({one['place']})" for one in record.errors]
    return [*errors, *record.wrong]


def versions() -> dict[str, str]:
    named = {"surgeon": surgeon, "torch": torch, "torchvision": torchvision, "timm": timm}
    return {name: str(one.__version__) for name, one in named.items()} | {"python": platform.python_version()}


def recorded(out: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of the file; the last one may have been cut short when a sweep was stopped."""
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


# What was found

HEADS = ("network", "convs", "swapped", "dense 3×3", "convert", "fuse", "islands", "s", "MB", "result")


def show(records: Sequence[Record], console: Console) -> None:
    table = Table(*HEADS)
    table.columns[0].no_wrap = True
    for row in rows(records):
        table.add_row(*row)
    console.print(table)
    console.print(", ".join(f"{count} {status}" for status, count in Counter(r.status for r in records).items()))


def rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Give a line for each network that was examined."""
    for record in records:
        if record.left_out:
            continue
        dense = f"{record.dense_swapped} of {record.dense}" if record.dense and record.swapped is not None else ""
        apart = [f"{record.apart[step]:.0e}" if step in record.apart else "" for step in ("convert", "fuse")]
        islands = "whole" if is_whole(record) else str(record.islands or "")
        spent = (f"{sum(record.seconds.values()):.0f}", str(record.megabytes or ""))
        count = ("" if one is None else str(one) for one in (record.sites, record.swapped))
        yield (record.name, *count, dense, *apart, islands, *spent, record.status)


def page(records: Sequence[Record], versions: dict[str, str]) -> str:
    """Write docs/zoo.md."""
    done = [record for record in records if not record.left_out]
    lines = [
        "# The zoo",
        "",
        "Written by `python benchmarks/zoo.py --write-docs`. What is done to a network, and how it is measured, is said at",
        "the top of that file. `convert` and `fuse` are relative L2 in float64, after fusing with strips as after training.",
        "",
        f"With {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        *totals(records, done),
        "",
        *markdown(HEADS, rows(records)),
    ]
    for title, heads, body in sections(records, done):
        lines += ["", f"## {title}", "", *(markdown(heads, body) if body else ["None."])]
    return "\n".join(lines) + "\n"


def totals(records: Sequence[Record], done: Sequence[Record]) -> list[str]:
    dense = [record for record in done if record.dense]
    swapped, total = (sum(getattr(record, key) or 0 for record in dense) for key in ("dense_swapped", "dense"))
    furthest = max((number for record in done for number in taken(record)), default=0.0)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(Counter(r.status for r in records).items()))
    return [
        f"- {len(records)} architectures: {counts}.",
        f"- Dense 3×3 convs, in {len(dense)} networks: `acnet` swaps {swapped} of {total} ({swapped / (total or 1):.1%}).",
        f"- Relative L2 after converting or fusing: at most {furthest:.1e}.",
        f"- Traced as a whole: {sum(is_whole(record) for record in done)} of {len(done)} networks.",
    ]


def sections(records: Sequence[Record], done: Sequence[Record]) -> list[tuple[str, tuple[str, ...], list[Any]]]:
    """Give what the page lists below its table: title, heads of columns, rows."""
    counted = ("convs", "networks", "reason")
    failed = [(record.name, "; ".join(complaints(record))) for record in done if complaints(record)]
    unusual = [record for record in done if max(taken(record), default=0) > USUAL]
    far = [(record.name, f"{max(taken(record)):.0e}", f"{record.moved_by_rounding or 0:.0e}") for record in unusual]
    low = [record for record in done if record.dense and (record.dense_swapped or 0) < 0.95 * record.dense]
    few = [(r.name, f"{r.dense_swapped or 0} of {r.dense}", "; ".join(r.dense_skipped)) for r in low]
    return [
        ("Failed or wrong", ("network", "what"), failed),
        (f"Further than {USUAL:.0e}", ("network", "relative L2", "one unit in the last place of every weight"), far),
        ("Fewer than 95 % of the dense 3×3 convs swapped", ("network", "swapped", "reasons"), few),
        ("Why convs stay under `acnet`", counted, reasons(done, "skipped")),
        ("Why dense 3×3 convs stay under `acnet`", counted, reasons(done, "dense_skipped")),
        ("Why networks are not one island", ("networks", "reason"), untraced(done)),
        ("Left out", ("network", "reason"), [(record.name, record.left_out) for record in records if record.left_out]),
    ]


def is_whole(record: Record) -> bool:
    return bool(record.islands) and not record.opaque


def taken(record: Record) -> list[float]:
    return [record.apart[step] for step in ("convert", "fuse") if step in record.apart]


def reasons(records: Sequence[Record], kind: str) -> list[tuple[str, ...]]:
    """Count the reasons over all networks, without the names of modules in them."""
    convs: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for record in records:
        found: Counter[str] = Counter()
        for reason, count in getattr(record, kind).items():
            found[without_names(reason)] += count
        convs.update(found)
        networks.update(found.keys())
    return [(str(count), str(networks[reason]), reason) for reason, count in convs.most_common()]


def untraced(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Count the reasons why the outermost opaque part of a network could not be traced."""
    firsts = Counter(without_names(next(iter(record.opaque.values()))) for record in records if record.opaque)
    return [(str(count), reason) for reason, count in firsts.most_common()]


def without_names(reason: str) -> str:
    """Leave out paths of modules, and places in files.

    >>> without_names("its weights are also those of head.0.conv1")
    'its weights are also those of …'
    """
    reason = re.sub(r" \(\w+\.py:\d+\)", "", reason)
    return re.sub(r"\b\w+(\.\w+)+\b", "…", reason)


def markdown(heads: Sequence[str], body: Any) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *body)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(heads), *cells[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", help="names of any architectures: 'timm:repvgg*', 'resnet18'")
    parser.add_argument("--library", choices=("torchvision", "timm"))
    parser.add_argument("--all", action="store_true", help="all of timm, not the smallest of each family")
    parser.add_argument("--list", action="store_true", help="only say which networks that would be")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one network may take")
    parser.add_argument("--memory", type=float, default=8, help="GiB that one network may take")
    parser.add_argument("--again", action="store_true", help="examine what was finished before, too")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "zoo.jsonl")
    parser.add_argument("--write-docs", action="store_true", help="write docs/zoo.md from all that is finished")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FAMILY"), help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        examine_here(Case(*options.one), options.into, options.memory)
    else:
        run(options)


def examine_here(case: Case, into: str, memory: float) -> None:
    """Be the process of one network, which may take so much memory and no more."""
    torch.set_num_threads(1)
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    examine(case, into).write()


def run(options: argparse.Namespace) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = list(recorded(options.out))
    chosen = {line["chosen"]: line["name"] for line in known if "chosen" in line}
    remembered = set(chosen)
    wanted = [
        case for case in cases(every=options.all or bool(options.only), chosen=chosen) if is_wanted(case, options)
    ]
    if options.list:
        print("\n".join(f"{case.name:50} {case.family}" for case in wanted))
        return
    with options.out.open("a", encoding="utf-8") as file:
        lines = ({"chosen": key, "name": name} for key, name in chosen.items() if key not in remembered)
        file.writelines(json.dumps(line) + "\n" for line in lines)
    done = {line["name"] for line in known if "family" in line} if not options.again else set()
    sweep([case for case in wanted if case.name not in done], options)
    found = {line.pop("name"): line for line in recorded(options.out) if "family" in line}
    latest = [Record(name, **{k: v for k, v in line.items() if k != "versions"}) for name, line in found.items()]
    names = {case.name for case in wanted}
    records = [record for record in latest if record.name in names]
    show(records, Console())
    if options.write_docs:
        (ROOT / "docs" / "zoo.md").write_text(page(sorted(latest, key=lambda r: r.name), versions()), encoding="utf-8")
    sys.exit(any(record.status in ("failed", "wrong") for record in records))


def is_wanted(case: Case, options: argparse.Namespace) -> bool:
    library, _, name = case.name.partition(":")
    if options.library not in (None, library):
        return False
    return not options.only or any(fnmatch.fnmatch(one, options.only) for one in (case.name, name))


if __name__ == "__main__":
    main()

"""What is left of a trained network's accuracy when it is converted, and what fitting and distilling bring back.

Four networks trained on Fashion-MNIST; HetConv and octaves; fitted to 1,024 training images without labels, judged on
the 10,000 test images. One table treats every site alike, and has training with labels beside it, for as long; the
other lets a budget of multiply-adds choose, and has the best uniform way of the same cost beside it. Every row is kept
in fit.json as soon as it is measured; docs/fit.md and its pictures are made of them.

    python benchmarks/fit.py                                   # all that is not in fit.json yet
    python benchmarks/fit.py --only deep --tables budget uniform --device cuda --seconds 500
    python benchmarks/fit.py --merge fit.json                  # of another machine
    python benchmarks/fit.py --write-docs-only

Several of these may run at once on different networks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fit_networks
import fit_page
import fit_record
import torch
from fit_control import trained
from fit_networks import FASHION, KINDS, Case
from fit_ways import BUDGETS, VALUES, every_site, recipe, share, uniform
from networks import machine
from torch import nn

import surgeon
from surgeon.errors import SurgeonError
from surgeon.models.copies import duplicate
from surgeon.surgery.plan import Plan

TABLES = ("sites", "budget", "uniform")
STEPS = {"sites": 200, "budget": 300, "uniform": 300}


class Task(NamedTuple):
    """A row: its table, its network and block, and its P, α or share of the multiply-adds."""

    table: str
    kind: str
    block: str
    value: float

    @property
    def key(self) -> str:
        return "/".join(map(str, self))


class Fitted(NamedTuple):
    """A converted network, and what its row says of it once it is fitted."""

    projected: nn.Module
    found: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """How rows are measured."""

    case: Case
    steps: int | None = None  # of distillation, instead of the table's own number

    def row(self, task: Task) -> dict[str, Any]:
        """Measure one row."""
        start = time.perf_counter()
        try:
            found = getattr(self, f"_{task.table}")(task)
        except SurgeonError as error:
            found = {"refused": str(error)}
        return found | {"took": round(time.perf_counter() - start, 1), "where": where(self.case.device)}

    def _sites(self, task: Task) -> dict[str, Any]:
        case, plan = self.case, every_site(task.block, task.value, self.case)
        projected = surgeon.convert(case.model, plan, case.example)
        fitted = self._fitted(projected, plan)
        found = fitted.found
        found["stages"]["project"] = case.worth(projected).to_dict()
        found["stages"]["norms"] = case.worth(case.renorm_(duplicate(projected))).to_dict()
        self._distil_(fitted, STEPS["sites"])
        found["stages"]["labels"] = trained(projected, case, found["stages"]["distil"]["seconds"])
        return found

    def _budget(self, task: Task) -> dict[str, Any]:
        case = self.case
        wanted = recipe(task.block, VALUES[task.block][1], case, small=True)
        budget = f"macs={task.value}"
        plan, seconds = self._timed(
            lambda: surgeon.plan(case.model, wanted, case.example, data=case.calibration, budget=budget)
        )
        fitted = self._fitted(surgeon.convert(case.model, plan, case.example), plan)
        self._distil_(fitted, STEPS["budget"])
        return fitted.found | {"plan_seconds": seconds, "chosen": chosen(plan)}

    def _uniform(self, task: Task) -> dict[str, Any]:
        """Fit all uniform ways, and distil the one that is most accurate then."""
        case = self.case
        budget = fit_record.read()["rows"].get(Task("budget", *task[1:]).key, {})
        cost = budget.get("macs", task.value)
        ways = []
        for words, plan in uniform(task.block, case, cost):
            fitted = self._fitted(surgeon.convert(case.model, plan, case.example), plan)
            fitted.found["words"] = words
            ways.append(fitted)
        if ways:
            self._distil_(max(ways, key=lambda way: way.found["stages"]["fit"]["accuracy"]), STEPS["uniform"])
        return {"ways": [way.found for way in ways], "cost": cost}

    def _fitted(self, projected: nn.Module, plan: Plan) -> Fitted:
        case = self.case
        model, seconds = self._timed(lambda: surgeon.fit(projected, case.model, case.calibration))
        stages = {"fit": case.worth(model).to_dict() | {"seconds": seconds}}
        counts = {"convs": len(plan.swaps), "of": len(plan.convs), "macs": round(share(plan), 4)}
        return Fitted(projected, counts | {"stages": stages})

    def _distil_(self, fitted: Fitted, steps: int) -> None:
        """Fit once more, distil at once, and add what that brings and how long both took."""
        case = self.case
        model, seconds = self._timed(
            lambda: surgeon.fit(fitted.projected, case.model, case.calibration, distil=self.steps or steps)
        )
        fitted.found["stages"]["distil"] = case.worth(model).to_dict() | {"seconds": seconds}

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        result = work()
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()
        return result, round(time.perf_counter() - start, 2)


def chosen(plan: Plan) -> dict[str, int]:
    """Count what a budget chose, by P or α."""
    found: dict[str, int] = {}
    for entry in plan.swaps:
        options = entry.block_options
        words = f"P = {options.p}" if hasattr(options, "p") else " → ".join(f"{one:.3g}" for one in options.alphas)
        found[words] = found.get(words, 0) + 1
    return found


def where(device: torch.device) -> dict[str, Any]:
    """Name the machine, its device and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    threads = None if device.type == "cuda" else torch.get_num_threads()
    return {"device": name, "threads": threads, "torch": torch.__version__, "surgeon": surgeon.__version__}


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Give the rows in their order."""
    for table in options.tables:
        for kind in options.only:
            for block in options.blocks:
                if table == "sites" and kind != "deep":
                    yield from (Task(table, kind, block, value) for value in VALUES[block])
                elif table != "sites":
                    yield from (Task(table, kind, block, value) for value in BUDGETS)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.merge:
        fit_record.add_all(json.loads(options.merge.read_text(encoding="utf-8")))
    elif not options.write_docs_only:
        measure(options)
    fit_page.write(fit_record.read())


def measure(options: argparse.Namespace) -> None:
    """Measure the rows that are missing, as long as there is time."""
    end = time.monotonic() + (float("inf") if options.seconds is None else options.seconds)
    cases = {name: Case(KINDS[name], torch.device(options.device), options.data, options.weights) for name in KINDS}
    for task in tasks(options):
        if time.monotonic() >= end:
            print("the time is up", flush=True)
            return
        known = fit_record.read()
        case = cases[task.kind]
        if task.kind not in known["networks"]:
            fit_record.add("networks", task.kind, original(case))
        if task.key not in known["rows"] or options.again:
            found = Run(case).row(task)
            fit_record.add("rows", task.key, found)
            print(f"{task.key}: {found.get('refused') or fit_page.in_short(found)}, {found['took']} s", flush=True)


def original(case: Case) -> dict[str, Any]:
    """Describe a network before it is converted."""
    macs = surgeon.plan(case.model, recipe("hetconv", 2, case), case.example).total.macs
    assert macs is not None
    params = sum(parameter.numel() for parameter in case.model.parameters())
    accuracy = case.worth(case.model).accuracy
    pixels = case.network.pixels
    return {"words": case.kind.words, "pixels": pixels, "macs": macs.before, "params": params, "accuracy": accuracy}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS], metavar="NETWORK", help=", ".join(KINDS))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--blocks", nargs="+", choices=VALUES, default=[*VALUES])
    parser.add_argument("--again", action="store_true", help="measure what is in fit.json once more")
    parser.add_argument("--seconds", type=float, help="start no row after so many seconds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--weights", type=Path, default=fit_networks.WEIGHTS, help="folder of the trained networks")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="measure nothing, add what another machine measured")
    parser.add_argument("--write-docs-only", action="store_true", help="measure nothing, write docs/fit.md")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

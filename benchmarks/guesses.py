"""Does `verify` say in words what is wrong, and does `bisect` find where? The single faults of the mutation study.

Each fault is put into a network as `mutations.py` does it. What verify guesses first is compared with the kinds that
describe that fault, and the smallest set of modules that bisecting finds with where the fault was put. Faults that need
not be found are left out, and so are pairs that verify refuses to compare without naming a module.

    python benchmarks/guesses.py --slice 16 --jobs 2        # one case in 16; a run that is started again continues
    python benchmarks/guesses.py --finished --write-docs    # and docs/verify.md
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mutations
import torch
from jobs import Batch, Line, carry_out, recorded, seed_of, write_between
from mutation_faults import FAULTS, NotHereError, Subject
from mutation_nets import example
from rich.console import Console

import surgeon

ROOT = Path(__file__).parents[1]
_NUMBERS = {
    **dict.fromkeys(("one tap off by 1e-6", "one tap off by 1e-3", "one tap off by 10 %", "one tap zero"), "one tap"),
    "two output channels swapped": "channels permuted",
    "two input channels swapped": "channels permuted",
    "input channels rolled": "channels permuted",
    "groups in another order": "channels permuted",
    "the low path of an octave conv swaps two channels": "channels permuted",
    "a filter negated": "sign",
    "kernels rotated": "kernel mirrored",
    "kernels mirrored": "kernel mirrored",
    "kernels transposed": "kernel transposed",
    "kernels one row lower": "kernel shifted",
    "weights of a conv scaled by 1.001": "scale",
    "all weights scaled by 1.001": "scale",
    "a row of the head off by 1 %": "scale",
    "weights through bfloat16": "rounded",
    "weights through float8": "rounded",
    "all weights one unit up": "rounded",
    "a weight is NaN": "not finite",
    "a weight is infinite": "not finite",
    "a bias is infinite": "not finite",
    "one output is NaN": "not finite",
    "bias dropped": "bias lost",
    "bias zero": "bias lost",
    "bias of one channel doubled": "a few numbers of a bias",
}
_FOLDS = {
    "eps forgotten": "eps",
    "eps of another norm": "eps",
    "gamma without sigma": "scale missing",
    "mean with the wrong sign": "sign",
    "mean forgotten": "mean lost",
    "beta forgotten": "bias lost",
    "a strip one row lower": "strip shifted",
    "strips added twice": "branch added twice",
    "strips forgotten": "branch missing",
    "mean of a norm that stays": "statistics",
    "variance of a norm that stays": "statistics",
}
_LAYERS = {
    "padding mode lost": "padding mode",
    "padding mode circular": "padding mode",
    "padding forgotten": "padding amount",
    "padding on the wrong sides": "padding amount",
    "dilation lost": "dilation",
    "stride lost": "stride",
    "a stride moved to the next conv": "stride",
    "a conv flips the batch": "images reversed",
    "ReLU6 for ReLU": "activation changed",
    "a clip at 100 for ReLU": "activation changed",
    "ReLU for ReLU6": "activation changed",
    "leaky ReLU for ReLU": "activation changed",
    "another slope of leaky ReLU": "activation changed",
    "SiLU for hard-swish": "activation changed",
    "sigmoid for hard-sigmoid": "activation changed",
    "log-softmax for softmax": "activation changed",
    "max for average pooling": "pooling changed",
    "average for max pooling": "pooling changed",
    "count_include_pad": "pooling changed",
    "ceil_mode": "pooling changed",
    "ceil_mode of max pooling": "pooling changed",
    "a global maximum for the mean": "pooling changed",
    "a pooling of fixed size for a global one": "pooling changed",
    "another interpolation": "interpolation changed",
    "a norm of the batch's own statistics": "train mode",
    "an extra ReLU": "activation added",
    "a dropout that stays active": "random",
    "random noise at a layer": "random",
    "height and width exchanged": "axes exchanged",
    "a layer skipped": "activation missing",
    "a conv skipped": "conv missing",
    "a hook scales a layer's output": "a hook",
    "a hook scales a layer's input": "a hook",
    "an octave conv's output one pixel off": "a hook",
    "an extra parameter": "extra tensor",
    "an extra buffer": "extra tensor",
    "an unused parameter in another dtype": "extra tensor",
}
_OUTPUTS = dict.fromkeys(
    (
        *("labels off by one", "one label in a hundred wrong", "outputs in another dtype", "the batch flipped"),
        *("an output too many", "the second output lost", "outputs in another order", "outputs under other names"),
        "outputs scaled by 1.001",
    ),
    "a hook",
)
KINDS = _NUMBERS | _FOLDS | _LAYERS | _OUTPUTS  # fault of the study → the kind that describes it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slice", type=int, default=16, metavar="N", help="one case in N, the same ones every time")
    parser.add_argument("--kinds", nargs="+", default=["*"], help="names of faults")
    parser.add_argument("--only", nargs="+", default=["*"], help="whole keys")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "guesses.jsonl")
    parser.add_argument("--finished", action="store_true", help="try nothing, only show what is finished")
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/verify.md")
    options = parser.parse_args()
    if not options.finished:
        torch.set_num_threads(1)
        mutations.warm_up()
        wanted = [
            Batch(keys, examine)
            for batch in mutations.batches(options)
            if (keys := tuple(key for key in batch.keys if key.startswith("fault|")))
        ]
        carry_out(wanted, options.out, jobs=options.jobs, timeout=options.timeout)
    text = table([line for line in recorded(options.out) if "key" in line])
    Console().print(text, markup=False)
    if options.write_docs:
        write_between(ROOT / "docs" / "verify.md", "guesses", text)


def examine(group: Sequence[str]) -> Iterator[Line]:
    for key in group:
        start = time.monotonic()
        warnings.simplefilter("ignore")
        line: Line = {"key": key}
        try:
            line |= case(key)
        except NotHereError:
            line["not_here"] = True
        yield line | {"seconds": round(time.monotonic() - start, 2)}


def spoilt(key: str) -> tuple[Any, Any, str | None, bool]:
    """Make a pair and put the fault into B; say where, and whether it is to be found."""
    _, subject, dtype, history, name, seed = key.split("|")
    right_a, right_b, oracle = mutations.pair(subject, dtype, history == "copy", seed)
    if FAULTS[name].is_right:
        raise NotHereError
    a, b = copy.deepcopy(right_a), copy.deepcopy(right_b)
    number = seed_of(key)
    torch.manual_seed(number)
    site = FAULTS[name].put(Subject(a, b, random.Random(number)))
    b.eval()
    moved = oracle.moved(b)
    mutations.doctor_(a, b, history)
    return a, b, site, moved.is_due(has_lineage=history in mutations.WITH_LINEAGE)


def case(key: str) -> Line:
    """Ask for one fault what went wrong, and where."""
    a, b, site, is_due = spoilt(key)
    if not is_due:
        return {"is_due": False}
    seed = seed_of(key) % 2**31
    try:
        report = surgeon.verify(a, b, example(), seed=seed, bisect=site is not None)
        guess, bisected = next(iter(report.guesses), None), report.bisected
    except surgeon.errors.SurgeonError as error:
        guess, bisected = error.facts.get("guess"), None
        if guess is None:
            return {"is_due": True, "is_refused": True, "says": str(error)}
    kind = None if guess is None else guess.kind
    line: Line = {"is_due": True, "site": site, "kind": kind, "says": guess and guess.says}
    line |= {"path": guess and guess.path, "is_right": kind == KINDS[key.split("|")[-2]]}
    if bisected is not None:
        line |= {"sites": bisected.sites, "runs": bisected.runs}
        line["is_smallest"] = bool(bisected.sites) and all(are_near(one, site) for one in bisected.sites)
        line["is_seen"] = bisected.is_seen
    return line


def are_near(path: str, site: str | None) -> bool:
    """Whether a module is the one, or lies around or in it."""
    return site is not None and (f"{path}.".startswith(f"{site}.") or f"{site}.".startswith(f"{path}."))


def table(lines: Sequence[Line]) -> str:
    """Write what stands in docs/verify.md."""
    latest = {line["key"]: line for line in lines}.values()
    due = [line for line in latest if line.get("is_due")]
    asked = [line for line in due if "kind" in line]
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in asked:
        groups[line["key"].split("|")[-2]].append(line)
    right = sum(line["is_right"] for line in asked)
    silent = sum(line["kind"] is None for line in asked)
    text = [
        f"- {len(asked)} faults; the kind was guessed right for {right} ({right / max(1, len(asked)):.1%}), "
        f"for {silent} nothing was guessed, and for {len(asked) - right - silent} something else.",
        f"- {sum('is_refused' in line for line in due)} more were refused by a sentence that names no module.",
    ]
    seen = [line for line in asked if line.get("is_seen")]
    if seen:
        found = sum(line["is_smallest"] for line in seen)
        runs = sorted(line["runs"] for line in seen)[len(seen) // 2]
        text.append(
            f"- Bisected: {len(seen)} that move an output; the set was the one module for {found} "
            f"({found / len(seen):.1%}), in {runs} runs (median)."
        )
    text += ["", "| fault | asked | right | kind | otherwise |", "| --- | --- | --- | --- | --- |"]
    for name, group in sorted(groups.items()):
        others = sorted({line["kind"] or "nothing" for line in group if not line["is_right"]})
        row = (name, len(group), sum(line["is_right"] for line in group), KINDS[name], ", ".join(others) or "–")
        text.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())

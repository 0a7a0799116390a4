"""Does `surgeon.verify` find what is wrong, name where, and leave alone what is right?

Many kinds of fault are put into many networks, in four dtypes, with a true history, a forged one and none; and right
folds (surgeon's, torch's, timm's) are verified under plain and extreme statistics. What a fault changes is measured by
`mutation_oracle.py`, independently of surgeon: one that changes nothing need not be found. Every case has a key, which
also is the seed of all its random choices. Results go to a file, a JSON object a line; a run that is started again
continues from there.

    python benchmarks/mutations.py --jobs 16                # all; --list says how many, --slice 50 takes one in fifty
    python benchmarks/mutations.py --kinds '*swapped*' --out /tmp/some.jsonl
    python benchmarks/mutations.py --one 'fault|resnet|float32|lineage|bias dropped|0'
    python benchmarks/mutations.py --finished --write-docs  # and docs/verify.md
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import json
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mutation_structure  # noqa: F401  its faults put themselves into FAULTS
import torch
from jobs import Batch, Line, carry_out, recorded, seed_of, write_between
from mutation_faults import FAULTS, NotHereError, Subject
from mutation_folds import FOREIGN, OWN, Maker, is_finite, without_history
from mutation_nets import NETS, SIDE, STATISTICS, example
from mutation_oracle import Oracle
from mutation_page import show, table
from torch import nn

import surgeon
from surgeon.surgery.history import content_hash

ROOT = Path(__file__).parents[1]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HISTORIES = ("lineage", "claimed", "elsewhere", "none", "copy")
WITH_LINEAGE = ("lineage", "claimed")
SUBJECTS = {
    **{net: (net, "acblock") for net in NETS},
    "resnet octave": ("resnet", "octave"),
    "unet octave": ("unet", "octave"),
    "vgg octave": ("vgg", "octave local"),
    "vgg hetconv": ("vgg", "hetconv"),
}
SIDES = (16, 48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", metavar="PATTERN", default=["*"], help="names of faults and folds")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="whole keys: '*|float16|*'")
    parser.add_argument("--seeds", type=int, default=1, help="seeds for each fault; right folds take twice as many")
    parser.add_argument("--slice", type=int, default=1, metavar="N", help="one case in N, the same ones every time")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one case may take")
    parser.add_argument("--list", action="store_true", help="only say how many cases there are")
    parser.add_argument("--one", metavar="KEY", help="do one case, with its report, and record nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "mutations.jsonl")
    parser.add_argument("--finished", action="store_true", help="try nothing, only show what is finished")
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/verify.md")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    if options.one:
        print(json.dumps(next(examine([options.one], report=True)), indent=2))
        return
    wanted = batches(options)
    count = sum(len(batch.keys) for batch in wanted)
    if options.list:
        print(
            f"{count} cases in {len(wanted)} batches; {len(FAULTS)} kinds of fault, {len(OWN) + len(FOREIGN)} of fold"
        )
        return
    if not options.finished:
        torch.set_num_threads(1)
        warm_up()
        seconds = carry_out(wanted, options.out, jobs=options.jobs, timeout=options.timeout)
        print(f"{count} cases; {seconds / 3600:.2f} core hours for those that were new", file=sys.stderr)
    lines = [line for line in recorded(options.out) if "key" in line]
    show(lines)
    if options.write_docs:
        write_between(ROOT / "docs" / "verify.md", "mutations", table(lines))


def warm_up() -> None:
    """Import and initialise in this process what every copy of it needs."""
    list(examine(["fold|pair|float32|plain|16|fuse acblock|0"]))


def keys(seeds: int) -> Iterator[tuple[str, list[str]]]:
    """Give the keys of all cases, in groups that share their right pair."""
    for seed in range(seeds):
        for subject in SUBJECTS:
            for dtype in DTYPES:
                for history in HISTORIES:
                    begin = f"fault|{subject}|{dtype}|{history}"
                    yield begin, [f"{begin}|{name}|{seed}" for name in FAULTS]
    for seed in range(2 * seeds):
        for net in (*NETS, "theirs"):
            for dtype in DTYPES:
                for statistics in STATISTICS:
                    begin = f"fold|{net}|{dtype}|{statistics}"
                    names = FOREIGN if net == "theirs" else OWN
                    yield begin, [f"{begin}|{side}|{name}|{seed}" for side in SIDES for name in names]


def batches(options: argparse.Namespace) -> list[Batch]:
    found = []
    for _begin, group in keys(options.seeds):
        wanted = [
            key
            for key in group
            if any(fnmatch.fnmatch(key.split("|")[-2], kind) for kind in options.kinds)
            and any(fnmatch.fnmatch(key, one) for one in options.only)
            and seed_of(key) % options.slice == 0
        ]
        if wanted:
            found.append(Batch(tuple(wanted), examine))
    return found


def examine(group: Sequence[str], report: bool = False) -> Iterator[Line]:
    """Do some cases, one after another."""
    for key in group:
        start = time.monotonic()
        warnings.simplefilter("ignore")
        line: Line = {"key": key}
        try:
            line |= fault_case(key, report) if key.startswith("fault|") else fold_case(key, report)
        except NotHereError:
            line["not_here"] = True
        yield line | {"seconds": round(time.monotonic() - start, 2)}


def verdict(a: nn.Module, b: nn.Module, shape: tuple[int, ...], seed: int, report: bool) -> dict[str, Any]:
    """Ask surgeon; a refusal is an answer, any other exception is a crash."""
    try:
        found = surgeon.verify(a, b, shape, seed=seed)
    except surgeon.errors.SurgeonError as error:
        return {"verdict": "refused", "first": error.facts.get("site"), "says": [str(error)], "diverging": []}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        return {"verdict": "crash", "first": None, "says": [said], "diverging": []}
    if report:
        print(found)
    failed = [check.says for check in found.checks if not check.passed]
    return {
        "verdict": found.verdict,
        "first": found.first_to_diverge,
        "says": [*failed, *found.remarks],
        "diverging": [site.path for site in found.sites if site.diverges],
    }


# ---- faults ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def pair(subject: str, dtype: str, is_copy: bool, seed: str) -> tuple[nn.Module, nn.Module, Oracle]:
    """Make A, a right B and the oracle that knows them."""
    net, block = SUBJECTS[subject]
    kind, _, local = block.partition(" ")
    number = seed_of(f"{subject}|{dtype}|{seed}")
    maker = Maker(net, DTYPES[dtype], "plain", SIDE, number)
    if is_copy:
        a = maker.plain() if kind == "acblock" else without_history(maker.converted(kind, local=bool(local)))
        b = copy.deepcopy(a)
    else:
        a = maker.converted(kind, local=bool(local))
        b = surgeon.fuse(a, example(), dense=True)
    return a, b, Oracle(b, SIDE, number)


def fault_case(key: str, report: bool) -> Line:
    _, subject, dtype, history, name, seed = key.split("|")
    right_a, right_b, oracle = pair(subject, dtype, history == "copy", seed)
    kind = FAULTS[name]
    a, b = copy.deepcopy(right_a), copy.deepcopy(right_b)
    number = seed_of(key)
    torch.manual_seed(number)
    site = kind.put(Subject(a, b, random.Random(number)))
    b.eval()
    moved = oracle.moved(b)
    doctor_(a, b, history)
    found = verdict(a, b, example(), number % 2**31, report)
    is_due = not kind.is_right and moved.is_due(has_lineage=history in WITH_LINEAGE)
    return {
        **found,
        "site": site,
        "is_right": kind.is_right,
        "is_due": is_due,
        "is_missed": is_due and found["verdict"] in ("equivalent", "approximate"),
        "is_named": is_named(site, found),
        "is_condemned": kind.is_right and found["verdict"] not in ("equivalent", "crash"),
        "moved": {
            name: value if not isinstance(value, float) else float(f"{value:.3g}")
            for name, value in asdict(moved).items()
        },
    }


def doctor_(a: nn.Module, b: nn.Module, history: str) -> None:
    """Give B the history that the case asks for."""
    if history in ("none", "copy"):
        without_history(a), without_history(b)
        return
    steps = vars(b)["surgeon_provenance"]["history"]
    if history == "claimed":  # it says that these very tensors were made from A
        steps[-1] |= {"parent": content_hash(a), "result": content_hash(b)}
    elif history == "elsewhere":
        steps[-1]["parent"] = "0" * 64


def is_named(site: str | None, found: dict[str, Any]) -> bool | None:
    """Whether the report says where the fault is: at that module, or at one around or in it."""
    if site is None:
        return None
    for path in (found["first"], *found["diverging"]):
        if path is not None and (f"{path}.".startswith(f"{site}.") or f"{site}.".startswith(f"{path}.")):
            return True
    return any(re.search(rf"(?<![\w.]){re.escape(site)}(?![\w]|\.\w)", text) for text in found["says"])


# ---- right folds ----------------------------------------------------------------------------------------------------


def fold_case(key: str, report: bool) -> Line:
    _, net, dtype, statistics, side, name, _ = key.split("|")
    number = seed_of(key)
    maker = Maker(net, DTYPES[dtype], statistics, int(side), number)
    try:
        a, b = {**OWN, **FOREIGN}[name](maker)
    except surgeon.errors.SurgeonError as error:
        return {"verdict": "not made", "says": [str(error)]}
    if not is_finite(a, b):
        return {"verdict": "not finite"}
    channels = 1 if name.startswith("demo") else 3
    shape = example(int(side), 1 + number % 2, channels)
    found = verdict(a, b, shape, number % 2**31, report)
    is_right = found["verdict"] == "equivalent" or explained(a, b, int(side), number, channels)
    return {**found, "is_right": is_right, "is_condemned": is_right and found["verdict"] == "different"}


def explained(a: nn.Module, b: nn.Module, side: int, seed: int, channels: int) -> bool:
    """Whether the oracle, too, holds a fold for right: it moves the outputs no more than some units of storage do."""
    by_a, by_b = Oracle(a, side, seed, channels), Oracle(b, side, seed, channels)
    distance = by_a.moved(b)
    noise = max(by_a.noise.output, by_b.noise.output, torch.finfo(by_a.dtype).eps)
    return distance.output <= 64 * noise


if __name__ == "__main__":
    main()

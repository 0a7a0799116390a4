"""Files that are damaged, or made to do harm: does surgeon refuse them in one sentence, and do nothing else?

Files of every format are damaged in their bytes and in their structure; others try to run, read or write something by
every road that a pickle, a stored graph, a manifest, a plan or a recipe offers. Each is opened by a command in a
process of its own, which is watched. And commands are ended while they write. Every case has a key, which also is the
seed of its random choices. Results go to a file, a JSON object a line; a run that is started again continues from
there.

    python benchmarks/hostile.py --jobs 16                  # all; --list says how many, --slice 50 takes one in fifty
    python benchmarks/hostile.py --only 'pickle|*'
    python benchmarks/hostile.py --one 'damage|net.pt|cut short|survey|0'
    python benchmarks/hostile.py --finished --write-docs    # and docs/security.md
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hostile_kill
import torch
from hostile_damage import BYTES
from hostile_files import ALLOW, FILES, RECIPE, SHAPE, Good, digest, make
from hostile_graphs import DRAWN, of_state
from hostile_page import show, table
from hostile_payloads import PAYLOADS
from hostile_pickles import FORMS, SPOTS, pickled, places
from hostile_run import Outcome, fresh, run
from hostile_texts import TAGS, kinds
from jobs import Batch, Line, carry_out, recorded, seed_of, write_between

ROOT = Path(__file__).parents[1]
TIMES = {"pt": 4, "text": 12, "safetensors": 10}  # how often each damage is done to each file, for each command
SAYS_SO = re.compile(r"\b(hash|changed|differs?|damaged?|no longer|not fit|not what)\b", re.IGNORECASE)
READS = ("survey", "convert", "fuse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="keys: 'damage|*.safetensors|*'")
    parser.add_argument("--slice", type=int, default=1, metavar="N", help="one case in N, the same ones every time")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--list", action="store_true", help="only say how many cases there are")
    parser.add_argument("--one", metavar="KEY", help="do one case, show what it says, and record nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "hostile.jsonl")
    parser.add_argument("--finished", action="store_true", help="try nothing, only show what is finished")
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/security.md")
    run_all(parser.parse_args())


def run_all(options: argparse.Namespace) -> None:
    wanted = batches(options.only, options.slice)
    count = sum(len(batch.keys) for batch in wanted)
    if options.list:
        print(f"{count} cases in {len(wanted)} batches")
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        if options.one:
            print(json.dumps(next(examine([options.one], said=True)), indent=2))
            return
        if not options.finished:
            seconds = carry_out(wanted, options.out, jobs=options.jobs, timeout=90)
            print(f"{count} cases; {seconds / 3600:.2f} core hours for those that were new", file=sys.stderr)
    lines = [line for line in recorded(options.out) if "key" in line]
    show(lines)
    if options.write_docs:
        write_between(ROOT / "docs" / "security.md", "hostile", table(lines))


# ---- which cases there are ------------------------------------------------------------------------------------------


def groups() -> Iterator[list[str]]:
    """Give the keys of all cases, in groups."""
    for name, good in FILES.items():
        form = "text" if name.endswith((".yaml", ".json")) else name.rpartition(".")[2]
        for kind in kinds(name):
            numbers = range(TIMES[form])
            yield [f"damage|{name}|{kind}|{command[0]}|{n}" for command in good.opens for n in numbers]
    for payload in PAYLOADS:
        roads = [*itertools.product(SPOTS, FORMS), ("alone", "bare")]
        yield [f"pickle|{payload}|{spot}, {form}|{READS[i % 3]}|0" for i, (spot, form) in enumerate(roads)]
    for kind, begin in itertools.product(DRAWN, range(0, 300, 20)):
        yield [f"drawn|{kind}|any|{READS[n % 3]}|{n}" for n in range(begin, begin + 20)]
    for kind in SPECIAL:
        yield [f"special|{kind}|{name}|{command[0]}|0" for name in GIVEN for command in FILES[name].opens]
    for i in range(len(TAGS)):
        yield [f"tag|recipe.yaml|{i}|plan|{line}" for line in range(len(RECIPE.splitlines()))]
    for form, word in itertools.product(hostile_kill.WRITES, hostile_kill.SIGNALS):
        yield [f"kill|{form}|{word}{', an old one is there' * (n % 2)}|write|{n}" for n in range(50)]


def batches(only: Sequence[str], slice_: int) -> list[Batch]:
    found = []
    for group in groups():
        wanted = [key for key in group if any(fnmatch.fnmatch(key, one) for one in only) and seed_of(key) % slice_ == 0]
        if wanted:
            found.append(Batch(tuple(wanted), examine))
    return found


# ---- one case -------------------------------------------------------------------------------------------------------


class State:
    """What all cases share, and copies of this process inherit."""

    good: Path
    digests: dict[str, str]


def prepare(folder: Path) -> None:
    """Write the good files, and do each command once, so that everything is imported."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    State.good = folder / "good"
    State.good.mkdir()
    make(State.good)
    hostile_kill.make_large(State.good / "large.pt")
    State.digests = {}
    for name, good in FILES.items():
        if not name.endswith((".yaml", ".json")):
            State.digests[name] = digest(State.good / name, State.good / good.arch if good.arch else None)
    for name in ("net.pt", "plan.yaml", "recipe.yaml"):
        for command in FILES[name].opens:
            warm = run(filled(command, State.good / name), fresh(folder / "warm"), State.good)
            if warm.code not in (0, 1) or warm.faults:
                raise SystemExit(f"a good file does not open: {warm}")


def filled(command: Sequence[str], file: Path) -> list[str]:
    return [argument.replace("GOOD", str(State.good)) if argument != "X" else str(file) for argument in command]


def examine(group: Sequence[str], said: bool = False) -> Iterator[Line]:
    """Do some cases, one after another, in a folder of their own."""
    with tempfile.TemporaryDirectory() as name:
        for key in group:
            start = time.monotonic()
            dice = random.Random(seed_of(key))
            kind, *rest = key.split("|")
            try:
                line = CASES[kind](rest, dice, Path(name).resolve() / "case")
            except NotMadeError as error:
                line = {"not_made": str(error)}
            text = line.pop("said", "")
            if said:
                print(text, file=sys.stderr)
            yield {"key": key, **line, "seconds": round(time.monotonic() - start, 2)}


class NotMadeError(Exception):
    """The file cannot be made, so there is nothing to open."""


def outcome_line(outcome: Outcome) -> Line:
    last = (outcome.said.strip().splitlines() or [""])[-1]
    return {"code": outcome.code, "faults": outcome.faults, "last": last[:200], "said": outcome.said}


def damage_case(rest: Sequence[str], dice: random.Random, folder: Path) -> Line:
    name, kind, command, _ = rest
    good = FILES[name]
    data = (State.good / name).read_bytes()

    def other() -> bytes:
        return (State.good / dice.choice(list(FILES))).read_bytes()

    file = fresh(folder) / "in" / f"x{Path(name).suffix}"
    bad = kinds(name)[kind](data, dice, other)
    if bad == data:
        raise NotMadeError("nothing is changed")
    file.write_bytes(bad)
    (opens,) = (one for one in good.opens if one[0] == command)
    arch = State.good / good.arch if good.arch else None
    check = functools.partial(digest, file, arch) if name in State.digests else None
    outcome = run(filled(opens, file), folder, State.good, check)
    line = outcome_line(outcome)
    if outcome.code == 0 and name in State.digests and outcome.digest != State.digests[name]:
        line["is_changed"] = True
        if is_silent(good, kind, outcome):
            line["faults"] = [*line["faults"], "opened without a word, with other numbers or another network"]
    return line


def is_silent(good: Good, kind: str, outcome: Outcome) -> bool:
    """Whether damage that could be known was neither refused nor said: bytes differ from their checksum or hash."""
    if good.has_checksum:
        return kind in BYTES or kind == "sizes in the directory changed"
    return good.has_hash and not SAYS_SO.search(outcome.said)


def pickle_case(rest: Sequence[str], dice: random.Random, folder: Path) -> Line:
    payload, where, command, _ = rest
    spot, form = where.split(", ")
    at = places(folder)
    try:
        data = pickled(PAYLOADS[payload](at, dice), spot, form)
    except Exception as error:
        raise NotMadeError(f"{type(error).__name__}: {error}") from error
    return open_model(data, command, folder)


def drawn_case(rest: Sequence[str], dice: random.Random, folder: Path) -> Line:
    kind, _, command, _ = rest
    try:
        data = of_state(kind, places(folder), dice)
    except Exception as error:
        raise NotMadeError(f"{type(error).__name__}: {error}") from error
    return open_model(data, command, folder)


def open_model(data: bytes, command: str, folder: Path) -> Line:
    file = fresh(folder) / "in" / "x.pt"
    file.write_bytes(data)
    (opens,) = (one for one in FILES["net.pt"].opens if one[0] == command)
    return outcome_line(run(filled(opens, file), folder, State.good))


SPECIAL: dict[str, Callable[[Path, Path], object]] = {
    "a pipe": lambda file, folder: os.mkfifo(file),
    "an endless device": lambda file, folder: file.symlink_to("/dev/zero"),
    "an empty device": lambda file, folder: file.symlink_to("/dev/null"),
    "a folder": lambda file, folder: file.mkdir(),
    "a link to nothing": lambda file, folder: file.symlink_to("nowhere"),
    "a link to itself": lambda file, folder: file.symlink_to(file.name),
    "a link to a text": lambda file, folder: file.symlink_to(places(folder).secret),
    "an empty file": lambda file, folder: file.touch(),
    "a file without rights": lambda file, folder: file.touch(0),
    "a large empty file": lambda file, folder: file.touch() or os.truncate(file, 1 << 40),
}
GIVEN = ("net.pt", "state.pt", "weights.safetensors", "recipe.yaml", "plan.yaml", "plan.json")


def special_case(rest: Sequence[str], dice: random.Random, folder: Path) -> Line:
    kind, name, command, _ = rest
    file = fresh(folder) / "in" / f"x{Path(name).suffix}"
    SPECIAL[kind](file, folder)
    (opens,) = (one for one in FILES[name].opens if one[0] == command)
    line = outcome_line(run(filled(opens, file), folder, State.good, seconds=10))
    if kind == "a link to a text":
        line["faults"] = [fault for fault in line["faults"] if fault != "opened another file"]  # it was told to
    return line


def tag_case(rest: Sequence[str], dice: random.Random, folder: Path) -> Line:
    _, tag, _, number = rest
    lines = RECIPE.splitlines()
    head, colon, _ = lines[int(number)].partition(":")
    lines[int(number)] = f"{head}{colon} {TAGS[int(tag)].replace('MARKER', places(folder).marker)}"
    file = fresh(folder) / "in" / "x.yaml"
    file.write_text("\n".join(lines), encoding="utf-8")
    return outcome_line(run(["plan", str(State.good / "net.pt"), "-r", str(file), SHAPE, ALLOW], folder, State.good))


def kill_case(rest: Sequence[str], dice: random.Random, folder: Path) -> Line:
    form, word, _, _ = rest
    signal_, _, old = word.partition(", ")
    return dict(hostile_kill.case(form, signal_, bool(old), dice, State.good, folder))


CASES: dict[str, Callable[[Sequence[str], random.Random, Path], Line]] = {
    "damage": damage_case,
    "pickle": pickle_case,
    "drawn": drawn_case,
    "special": special_case,
    "tag": tag_case,
    "kill": kill_case,
}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""A slice of the damaged and hostile files, and the instrument itself: it sees what runs, is touched, and hangs."""

from __future__ import annotations

import io
import os
import random
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import hostile
import hostile_damage
import hostile_kill
import hostile_page
import hostile_texts
import pytest
import torch
from hostile_files import FILES
from hostile_graphs import DRAWN, programs, whole
from hostile_payloads import PAYLOADS
from hostile_pickles import MARK, SPOTS, Call, pickled, places
from hostile_run import fresh, run


@pytest.fixture(scope="module", autouse=True)
def _good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    hostile.prepare(tmp_path_factory.mktemp("hostile"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fresh(tmp_path / "case")


def _line(key: str) -> dict[str, object]:
    return next(hostile.examine([key]))


def test_there_are_enough_files_of_every_format_and_enough_moments() -> None:
    keys = [key for group in hostile.groups() for key in group]
    assert len(keys) == len(set(keys))
    assert sum(not key.startswith("kill|") for key in keys) >= 10_000
    assert sum(key.startswith("kill|") for key in keys) >= 200
    assert {name.rpartition(".")[2] for name in FILES} == {"pt", "safetensors", "yaml", "json"}


def _slice() -> list[str]:
    """One key of each kind of damage, and of some payloads in some spots, the same ones every time."""
    dice = random.Random(11)
    found = [dice.choice(group) for group in hostile.groups() if group[0].startswith("damage|")]
    spots = [f"pickle|{payload}|{dice.choice(list(SPOTS))}, zip|survey|0" for payload in PAYLOADS]
    drawn = [f"drawn|{kind}|any|{dice.choice(hostile.READS)}|{n}" for kind in DRAWN for n in range(3)]
    return [*dice.sample(found, 45), *dice.sample(spots, 25), *drawn]


@pytest.mark.parametrize("key", _slice())
def test_a_bad_file_is_refused_or_opened_and_nothing_else_happens(key: str) -> None:
    line = _line(key)
    if "not_made" not in line:
        assert line["faults"] == [], line


UNSAFE = {
    "os.system(TOUCH)": "it wrote the marker",
    "builtins.eval(CODE)": "compiled what the file says",
    "_io.open(MARKER, w)": "opened a file outside to write",
    "importlib.import_module(hostile_payload)": "it wrote the marker",
    "socket.create_connection(('127.0.0.1', 9))": "socket.",
    "torch.load(SECRET)": "opened another file",
    "os.remove(CANARY)": "it changed another file",
    "time.sleep(3600)": "not done after 2 s",
    "os._exit(0)": "the process ended with 0",
}


@pytest.mark.parametrize(("payload", "fault"), UNSAFE.items())
def test_whatever_a_file_does_is_seen_if_it_may_run(payload: str, fault: str, folder: Path) -> None:
    file = folder / "in" / "x.pt"
    file.write_bytes(pickled(PAYLOADS[payload](places(folder), random.Random(0)), "alone", "zip"))
    outcome = run(["survey", str(file), "--unsafe-pickle"], folder, hostile.State.good, seconds=2)
    assert any(fault in one for one in outcome.faults), outcome


def test_what_is_done_beside_python_is_seen(folder: Path) -> None:
    at = places(folder)
    file = folder / "in" / "x.pt"
    evil = Call("torch:UntypedStorage.from_file", at.canary, True, 9)
    filled = Call("torch:UntypedStorage.fill_", evil, 7)  # no event of Python tells of it
    file.write_bytes(pickled(filled, "alone", "protocol 4"))
    outcome = run(["survey", str(file), "--unsafe-pickle"], folder, hostile.State.good)
    assert "it changed another file" in outcome.faults, outcome


def test_a_shown_secret_a_traceback_and_control_characters_are_seen(folder: Path) -> None:
    from hostile_run import _traces

    at = places(folder)
    Path(at.canary).write_text("untouched")
    assert _traces(at, "fine\n") == []
    assert _traces(at, f"{MARK}-secret") == ["it showed another file"]
    assert _traces(at, "Traceback (most recent call last)\nX") == ["traceback: X"]
    assert _traces(at, "\x1b[31mred") == ["control characters on the terminal"]


def test_files_that_are_not_damaged_open(folder: Path) -> None:
    for name in ("net.pt", "state.pt", "format1/octave-streams.pt", "format2-checksums/manifest.safetensors"):
        good = FILES[name]
        arch = hostile.State.good / good.arch if good.arch else None
        outcome = run(
            hostile.filled(good.opens[0], hostile.State.good / name),
            fresh(folder),
            hostile.State.good,
            lambda name=name, arch=arch: hostile.digest(hostile.State.good / name, arch),
        )
        assert (outcome.code, outcome.faults, outcome.digest) == (0, [], hostile.State.digests[name])


def test_an_island_opens_before_its_graph_is_spoilt(folder: Path) -> None:
    for model, code in ((whole("octave"), 0), (programs(places(folder), random.Random(4)), 2)):
        out = io.BytesIO()
        torch.save(model, out)
        line = hostile.open_model(out.getvalue(), "survey", folder)
        assert (line["code"], line["faults"]) == (code, [])


def test_an_archive_that_is_written_again_has_right_checksums() -> None:
    data = (hostile.State.good / "net.pt").read_bytes()
    same = hostile_damage.rezipped(data, lambda entries: entries)
    with zipfile.ZipFile(io.BytesIO(same)) as archive:
        assert archive.testzip() is None
    flipped = hostile_damage.BYTES["many bits flipped"](data, random.Random(0), lambda: b"")
    assert len(flipped) == len(data)
    assert flipped != data


def test_damage_is_the_same_whenever_it_is_done() -> None:
    for name, good in FILES.items():
        data = (hostile.State.good / name).read_bytes()
        for kind, damage in hostile_texts.kinds(good.name).items():
            once, again = (damage(data, random.Random(kind), lambda: b"other" * 99) for _ in range(2))
            assert once == again, (name, kind)


@pytest.mark.parametrize("word", ["KILL", "TERM"])
@pytest.mark.parametrize("form", ["pt", "plan"])
def test_a_command_that_is_ended_leaves_a_whole_file_or_none(form: str, word: str, folder: Path) -> None:
    found = hostile_kill.case(form, word, word == "KILL", random.Random(2), hostile.State.good, folder)
    assert [fault for fault in found["faults"] if "neither whole" in fault] == [], found


def test_half_a_file_is_seen(folder: Path) -> None:
    good = hostile.State.good
    whole_file = (good / "net.pt").read_bytes()
    (folder / "in" / "out.pt").write_bytes(whole_file[:-100])
    assert str(hostile_kill.state_of("pt", folder, good)).startswith("damaged")
    (folder / "in" / "out.pt").write_bytes(whole_file)
    assert len(str(hostile_kill.state_of("pt", folder, good))) == 64


@pytest.mark.parametrize("kind", ["a folder", "a link to itself", "a link to a text", "an empty file"])
def test_what_is_no_ordinary_file_is_refused(kind: str) -> None:
    for name in ("net.pt", "plan.yaml"):
        line = _line(f"special|{kind}|{name}|{FILES[name].opens[0][0]}|0")
        assert (line["code"], line["faults"]) == (2, []), line


def test_the_table_counts_each_sort_of_fault() -> None:
    lines = [
        {"key": "damage|net.pt|cut short|survey|0", "code": 2, "faults": []},
        {"key": "damage|net.pt|cut short|survey|1", "code": 70, "faults": ["exit 70", "traceback: x"]},
        {"key": "damage|net.pt|cut short|fuse|2", "code": 0, "faults": ["opened without a word, with other numbers"]},
        {"key": "pickle|os.system(TOUCH)|alone, zip|survey|0", "code": 0, "faults": ["it wrote the marker"]},
        {"key": "pickle|os.system(TOUCH)|alone, zip|survey|1", "died": "not done after 90 s"},
        {"key": "pickle|os.system(TOUCH)|alone, zip|survey|2", "not_made": "x"},
        {"key": "kill|pt|TERM|write|0", "faults": [], "was_running": True, "code": -int(signal.SIGTERM)},
    ]
    text = hostile_page.table(lines)
    assert "| .pt, damaged | 3 | 1 | 1 | 0 | 1 | 0 | 1 | 0 |" in text
    assert "| pickles that call something | 2 | 0 | 1 | 1 | 0 | 1 | 0 | 0 |" in text
    assert "5 damaged or hostile files, and 1 commands ended while they worked, 1 of them" in text
    assert os.getpid()

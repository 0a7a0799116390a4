"""A file is whole or absent: full disks, two writers, signals, permissions, names that cannot be."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon
from torch import nn

import surgeon
from surgeon.errors import StoreError
from surgeon.files import atomic

SUFFIXES = (".pt", ".pth", ".safetensors")
ROOM = 20_000  # bytes that a file may have on the full disk


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(_net(), "net.pt")
    return tmp_path


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Let the system refuse to make any file larger than ROOM, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_room_for_a_model_is_one_line_and_nothing_is_left(
    home: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with no_room():
        assert run_surgeon("convert", "net.pt", "-r", "acnet", "-i", "1,3,8,8", "-o", f"x{suffix}") == 2
    said = capsys.readouterr().err
    assert f"cannot write x{suffix}: File too large. Nothing was written. Make room" in said
    assert "Traceback" not in said
    assert _names(home) == {"net.pt"}
    with no_room(), pytest.raises(StoreError, match="File too large"):
        surgeon.save(_net(), f"x{suffix}")
    assert _names(home) == {"net.pt"}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_no_room_for_a_plan_is_one_line_too(home: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential()
    for i in range(6):
        net.add_module(f"{'name' * 1000}{i}", nn.Conv2d(3, 3, 3, padding=1))
    torch.save(net, "many.pt")
    with no_room():
        assert run_surgeon("plan", "many.pt", "-r", "acnet", "-i", "1,3,8,8", "-o", f"p{suffix}") == 2
    assert f"cannot write p{suffix}: File too large" in capsys.readouterr().err
    assert _names(home) == {"net.pt", "many.pt"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_new_file_has_the_permissions_that_the_umask_gives(tmp_path: Path, suffix: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        surgeon.save(_net(), tmp_path / f"x{suffix}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / f"x{suffix}").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_force_keeps_the_permissions_of_the_old_file_and_a_link_to_it(tmp_path: Path, suffix: str) -> None:
    real, link = tmp_path / "deep" / f"real{suffix}", tmp_path / f"link{suffix}"
    real.parent.mkdir()
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    with pytest.raises(StoreError, match="exists"):
        surgeon.save(_net(), link)
    surgeon.save(_net(), link, force=True)
    assert link.is_symlink()
    assert real.read_bytes() != b"old"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert _names(tmp_path) == {"deep", link.name}
    assert _names(real.parent) == {real.name}


def test_a_link_that_leads_nowhere_is_a_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x.pt").symlink_to(tmp_path / "y.pt")
    with pytest.raises(StoreError, match=r"x\.pt exists"):
        surgeon.save(_net(), tmp_path / "x.pt")
    surgeon.save(_net(), tmp_path / "x.pt", force=True)
    assert (tmp_path / "y.pt").is_file()


def _no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_writers_of_one_name_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        _no_links(monkeypatch)
    place, gate, said = tmp_path / "x.json", threading.Barrier(8), []

    def write(text: str) -> None:
        def fill(part: Path) -> None:
            part.write_text(text)
            gate.wait()  # all have seen by now that the name is free

        try:
            atomic.write_atomically(atomic.claim(place, force=False, suffixes=(".json",)), fill, force=False)
        except StoreError as error:
            said.append(str(error))

    threads = [threading.Thread(target=write, args=(str(i) * 100,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 7
    assert all("exists by now: another program has written it" in one for one in said)
    assert len(set(place.read_text())) == 1
    assert _names(tmp_path) == {"x.json"}


def test_where_there_are_no_links_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_links(monkeypatch)

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError(errno.EIO, "broken")

    with pytest.raises(StoreError, match=r"cannot write .*x\.json: broken"):
        atomic.write_atomically(tmp_path / "x.json", fail, force=False)
    assert _names(tmp_path) == set()
    atomic.write_atomically(tmp_path / "x.json", lambda part: part.write_text("whole"), force=False)
    assert (tmp_path / "x.json").read_text() == "whole"


@pytest.mark.parametrize("force", [True, False])
def test_nothing_is_seen_at_the_name_before_the_file_is_whole(tmp_path: Path, force: bool) -> None:
    place = tmp_path / "x.json"
    if force:
        place.write_text("old")
    before = place.read_text() if force else None

    def fill(part: Path) -> None:
        part.write_text("half")
        assert (place.read_text() if place.exists() else None) == before
        part.write_text("whole")

    atomic.write_atomically(place, fill, force=force)
    assert place.read_text() == "whole"


WRITER = """
import sys, time
from pathlib import Path
from surgeon.app.stopping import Stopped, stoppable
from surgeon.files.atomic import write_atomically

def slowly(part):
    with part.open("w") as file:
        for i in range(40):
            file.write("x" * 1000)
            file.flush()
            if i == 3:
                print("writing", flush=True)
            time.sleep(0.01)

try:
    with stoppable():
        write_atomically(Path("x.json"), slowly, force="force" in sys.argv)
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name)
def test_a_signal_while_writing_leaves_the_file_whole_or_as_it_was(
    tmp_path: Path, number: signal.Signals, force: bool
) -> None:
    old, place = "old" if force else None, tmp_path / "x.json"
    for delay in (0, 0.2, 0.38, 0.41):
        place.unlink(missing_ok=True)
        if old is not None:
            place.write_text(old)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, *["force"] * force], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        time.sleep(delay)
        writer.send_signal(number)
        writer.communicate()
        found = place.read_text() if place.exists() else None
        assert found in (old, "x" * 40_000)
        left = _names(tmp_path) - {"x.json"}
        assert not left or number == signal.SIGKILL
        assert all(name.startswith(".surgeon-") and name.endswith(".part") for name in left)
        for name in left:
            shutil.rmtree(tmp_path / name)
        assert writer.returncode in (-number, 128 + number, 0)  # it may have finished before


def test_what_a_killed_process_has_left_is_removed_by_a_later_write(tmp_path: Path) -> None:
    old, young, busy = (tmp_path / f".surgeon-{name}.part" for name in ("old", "young", "busy"))
    for room in (old, young, busy):
        room.mkdir()
        (room / "file").write_text("half")
    for room in (old, busy):
        os.utime(room, (time.time() - 120,) * 2)
    with atomic._locked(busy, wait=True):
        atomic.write_atomically(tmp_path / "x.json", lambda part: part.write_text("whole"), force=False)
    assert _names(tmp_path) == {"x.json", young.name, busy.name}


def test_a_name_as_long_as_the_system_takes_is_written_and_a_longer_one_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "n" * 252 + ".pt"
    surgeon.save(_net(), home / long)
    assert (home / long).is_file()
    for command in (("convert", "net.pt", "-r", "acnet"), ("fuse", "net.pt"), ("plan", "net.pt", "-r", "acnet")):
        suffix = ".yaml" if command[0] == "plan" else ".pt"
        assert run_surgeon(*command, "-i", "1,3,8,8", "-o", "n" * 253 + suffix) == 2
        assert "File name too long. Give a shorter name with -o." in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".yaml"])
def test_a_name_that_is_not_utf_8_is_written_and_shown_escaped(
    home: Path, suffix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("surgeon"), "propagate", False)  # pytest cannot report such a name
    name = os.fsdecode(b"n\xff" + suffix.encode())
    command = ("plan", "net.pt") if suffix == ".yaml" else ("convert", "net.pt")
    assert run_surgeon(*command, "-r", "acnet", "-i", "1,3,8,8", "-o", name) == 0
    assert (home / name).is_file()
    printed = capsys.readouterr()
    assert f"written: n\\udcff{suffix}" in printed.out + printed.err


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "taken by a directory": (lambda path: path.mkdir(), "is a directory"),
    "a pipe": (lambda path: os.mkfifo(path), "is not a regular file"),
    "a loop of links": (lambda path: path.symlink_to(path), "Too many levels of symbolic links|exists"),
    "the model itself": (lambda path: os.link("net.pt", path), "is among the files that this is made from"),
    "a link to the model": (lambda path: path.symlink_to("net.pt"), "is among the files that this is made from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_outputs_that_are_refused_even_with_force(home: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, says = REFUSED[case]
    make(home / "x.pt")
    content = (home / "net.pt").read_bytes()
    if case == "a loop of links":
        with pytest.raises(StoreError, match=says):
            surgeon.save(_net(), "x.pt")
        return
    assert run_surgeon("convert", "net.pt", "-r", "acnet", "-i", "1,3,8,8", "-o", "x.pt", "--force") == 2
    assert says in capsys.readouterr().err
    assert (home / "net.pt").read_bytes() == content
    assert _names(home) == {"net.pt", "x.pt"}


@pytest.mark.parametrize("option", ["--arch", "--input"])
def test_no_file_that_is_read_may_be_the_output(home: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.zeros(1, 3, 8, 8), "x.pt")
    content = Path("x.pt").read_bytes()
    assert run_surgeon("convert", "net.pt", "-r", "acnet", option, "x.pt", "-o", "x.pt", "-f") == 2
    assert "x.pt is among the files that this is made from" in capsys.readouterr().err
    Path("r.yaml").write_text("{surgeon: 1, title: T, rules: [{swap: acblock}]}")
    assert run_surgeon("plan", "net.pt", "-r", "r.yaml", "-i", "1,3,8,8", "-o", "r.yaml", "-f") == 2
    assert Path("r.yaml").read_text().startswith("{surgeon: 1")
    assert Path("x.pt").read_bytes() == content


def test_a_folder_that_may_not_be_written_to_is_said_before_any_work(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("surgeon.surgery.make.make", None)  # nothing is planned
    assert run_surgeon("convert", "net.pt", "-r", "acnet", "-o", "no/x.pt") == 2
    assert "there is no folder no. Make it first" in capsys.readouterr().err
    assert run_surgeon("plan", "net.pt", "-r", "acnet", "-o", "net.pt/x.yaml") == 2
    assert "there is no folder net.pt" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run_surgeon("convert", "net.pt", "-r", "acnet", "-o", "x.pt") == 2
    assert "files may not be made in the folder ." in capsys.readouterr().err


def test_a_model_that_is_not_there_is_said_before_its_output(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_surgeon("convert", "no/net.pt", "-r", "acnet") == 2
    assert "there is no file no/net.pt" in capsys.readouterr().err
    assert run_surgeon("convert", ".", "-r", "acnet") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_name_that_holds_half_a_character_is_a_reason_not_to_write_tensors(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("half\udc80", nn.Conv2d(3, 3, 3))
    with pytest.raises(StoreError, match=r"holds half a character.*write a \.pt file"):
        surgeon.save(net, tmp_path / "x.safetensors")
    converted = surgeon.convert(net, "acnet", (1, 3, 8, 8))
    surgeon.save(converted, tmp_path / "x.pt")
    assert type(surgeon.load(tmp_path / "x.pt")[0]).__name__ == "ACBlock"

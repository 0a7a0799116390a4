"""Whole files or none: names are checked before any work is done, and a file takes its place when it is complete.

A file is written in a folder of its own beside its place, `.surgeon-….part`, so that nothing that a library leaves
there on its way is seen as a result. Once it is whole and on the disk, it takes its place in one step: as a hard link,
which fails where there is a file of that name by now, or by a rename that replaces the old file (`force`). So a reader
sees the old file, the new one, or none; and of two processes that write one name without `force`, one is refused.

A process that ends by an error, or by a signal that it can handle, removes its folder. One that is killed at once
cannot; its folder is removed by the next write beside it that finds it a minute old and locked by nobody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from surgeon.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows, where a rename never replaces a file
    fcntl = None  # type: ignore[assignment]

_BEGIN, _END = ".surgeon-", ".part"
_STALE = 60  # seconds after which an unlocked folder was left by a process that was killed
_open: set[Path] = set()  # the folders in which this process is writing


def claim(path: Path, *, force: bool, suffixes: Sequence[str], origins: Sequence[str | os.PathLike[str]] = ()) -> Path:
    """Make sure, before any work is done, that a file may be written; `origins` are the files that are read for it.

    Raises:
        StoreError: it exists and `force` was not given, or it is one of its origins; its folder does not exist or may
            not be written to; its name is too long, or its suffix is none of `suffixes`.
    """
    is_there = _is_there(path)
    if any(_is_same(path, origin) for origin in origins):
        raise StoreError(f"{path} is among the files that this is made from", todo="Give another name.")
    if path.is_dir():
        raise StoreError(f"{path} is a directory", todo="Name a file: -o model.acnet.pt.")
    if path.suffix not in suffixes:
        raise StoreError(f"cannot tell from {path.name!r} what to write", todo=f"End it in {_either(suffixes)}.")
    if is_there and not force:
        raise StoreError(f"{path} exists", todo="Give another name, or --force to overwrite it.")
    place = _place(path, force=force)
    if place.exists() and not place.is_file():
        raise StoreError(f"{path} is not a regular file", todo="Give another name.")
    if not place.parent.is_dir():
        raise StoreError(f"there is no folder {place.parent}", todo="Make it first, or name another one.")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise StoreError(f"files may not be made in the folder {place.parent}", todo="Name another one.")
    return path


def write_atomically(path: Path, write: Callable[[Path], object], *, force: bool) -> None:
    """Let `write` fill a file beside `path`, which then takes its place.

    It has the permissions that the umask gives to a new file, or those of the file that it replaces. With `force`, a
    symbolic link stays, and the file that it leads to is replaced.

    Raises:
        StoreError: there is a file of that name by now (and `force` was not given), or it cannot be written.
    """
    place = _place(path, force=force)
    try:
        _remove_stale(place.parent)
        with _room_beside(place) as room:
            part = room / "file"
            part.touch()
            mode = stat.S_IMODE((place if force and place.exists() else part).stat().st_mode) & 0o777
            write(part)
            _to_disk(part, mode)
            _publish(part, place, force=force)
        _sync(place.parent)
    except FileExistsError as error:
        raise StoreError(
            f"{path} exists by now: another program has written it", todo="Give another name, or --force."
        ) from error
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
        if isinstance(interrupt := error.__context__, KeyboardInterrupt):  # and when it is interrupted
            raise interrupt from error
        raise StoreError(f"cannot write {path}: {_reason(error)}", todo=_todo(error)) from error


def remove_parts() -> None:
    """Remove what this process is writing; for whoever ends it by force."""
    for room in list(_open):
        _remove(room)


def _either(suffixes: Sequence[str]) -> str:
    """List endings as a choice: .a, .b or .c."""
    return " or ".join(part for part in (", ".join(suffixes[:-1]), suffixes[-1]) if part)


def _is_there(path: Path) -> bool:
    """Whether anything has this name, be it a link that leads nowhere."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # too long, a loop of links, a zero byte
        raise StoreError(f"cannot write {path}: {_reason(error)}", todo=_todo(error)) from error
    return True


def _is_same(path: Path, origin: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(path, origin)
    except (OSError, ValueError):  # one is not there, or is no file, such as torchvision:resnet18
        return os.path.abspath(path) == os.path.abspath(origin)


def _place(path: Path, *, force: bool) -> Path:
    """Say which file is written: with `force` the one that a symbolic link leads to."""
    return Path(os.path.realpath(path)) if force else path


@contextlib.contextmanager
def _room_beside(place: Path) -> Iterator[Path]:
    """Make a folder to write in, which is locked while it is in use, and remove it."""
    room = place.with_name(f"{_BEGIN}{secrets.token_hex(6)}{_END}")
    _open.add(room)  # first, since a signal may come at any moment
    try:
        room.mkdir()
        with _locked(room, wait=True):
            yield room
    finally:
        _remove(room)


def _remove(room: Path) -> None:
    shutil.rmtree(room, ignore_errors=True)
    _open.discard(room)


def _remove_stale(folder: Path) -> None:
    """Remove what processes have left that were killed while they wrote beside this."""
    for room in folder.glob(f"{_BEGIN}*{_END}"):
        with contextlib.suppress(OSError):
            if room not in _open and time.time() - room.stat().st_mtime > _STALE:
                with _locked(room, wait=False) as is_locked:
                    if is_locked:
                        _remove(room)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a folder, which ends with the process; says whether it is held.

    There are systems without such locks, and folders on other machines that have none.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        is_locked = False
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_locked = True
        yield is_locked
    finally:
        os.close(handle)


def _to_disk(part: Path, mode: int) -> None:
    """Give a file its permissions, and wait until the disk has it."""
    if stat.S_IMODE(part.stat().st_mode) != mode:
        with contextlib.suppress(OSError):  # a file system without permissions
            part.chmod(mode)
    with part.open("rb+") as file:
        os.fsync(file.fileno())


def _publish(part: Path, place: Path, *, force: bool) -> None:
    """Let a whole file take its place; without `force` only where nothing has that name.

    Raises:
        FileExistsError: something has it.
    """
    if force:
        part.replace(place)
        return
    try:
        os.link(part, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as exFAT
        with _locked(Path(os.path.realpath(place.parent)), wait=True):
            if os.path.lexists(place):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
            part.rename(place)


def _sync(folder: Path) -> None:
    """Let the disk have the name as well; not every system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: BaseException) -> str:
    error = _of_system(error)
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _of_system(error: BaseException) -> BaseException:
    """Find the error of the system that an error of torch came from, since only that says why."""
    at: BaseException | None = error
    while at is not None and not isinstance(at, OSError):
        at = at.__cause__ or at.__context__
    return at or error


def _todo(error: BaseException) -> str:
    """Say what to do next; nothing was written."""
    number = getattr(_of_system(error), "errno", None)
    if number == errno.ENAMETOOLONG:
        return "Give a shorter name with -o."
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Nothing was written. Make room, or name another folder with -o."
    return "Nothing was written. Name another file with -o."

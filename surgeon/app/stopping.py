"""Signals that end a command: they become an exception, so that what is half-written is removed on the way out.

By default SIGTERM and SIGHUP end a process at once, and what it was writing stays. A second signal does so here too,
for code of a user that does not let go; only what is half-written is removed first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from surgeon.files.atomic import remove_parts

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # those that this system has


class Stopped(BaseException):
    """A signal asks the command to end; no `except Exception` of a user's code may stop it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # as shells say it


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` where a signal comes inside the block, and put back what handled it before.

    A signal that is ignored, as by nohup, stays ignored. Only the main thread can do this.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            remove_parts()
            os._exit(128 + number)
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {one: signal.getsignal(one) for one in numbers if signal.getsignal(one) not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except BaseException as error:
        if came and not isinstance(error, Stopped):  # what was interrupted has made another error of it
            raise Stopped(came[0]) from error
        raise
    else:
        if came:  # or has caught it
            raise Stopped(came[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        remove_parts()

"""Progress of long work: a function is told what is being done, and which share of all the work is done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]  # the share runs from 0 to 1, and never back


def silent(what: str, share: float) -> None:
    """Report nothing; the default of functions that take a `Progress`."""


def parts(progress: Progress, start: float, stop: float) -> Progress:
    """Make a progress for one part of the work, whose 0 is `start` of the whole and whose 1 is `stop`.

    >>> second_half = parts(lambda what, share: print(f"{what}: {share:.0%}"), 0.5, 1.0)
    >>> second_half("folding", 0.5)
    folding: 75%
    """

    def tell(what: str, share: float) -> None:
        progress(what, start + (stop - start) * share)

    return tell

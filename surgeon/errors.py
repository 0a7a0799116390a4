"""The exceptions that surgeon raises on purpose.

    SurgeonError                    caught once, in cli.py: message and next step, no traceback
    ├── RecipeError     exit 2      every error of a recipe or plan file at once, each with file:line:column
    ├── ModelError      exit 2      no such model, wrong weights, refused classes
    ├── CaptureError    exit 2      what tracing or a trial run met, and where
    ├── BlockError      exit 2      a block of another distribution that cannot be used
    ├── PlanError       exit 2      a rule that claims nothing; a plan that does not fit this model
    ├── StoreError      exit 2      file exists, disk full, wrong format
    ├── VerifyError     exit 2      outputs that cannot be compared
    ├── DataError       exit 2      images or labels that a network cannot be fitted to
    ├── FitError        exit 2      networks that cannot be fitted or trained with the images at hand
    ├── FigureError     exit 2      networks of which there is nothing to draw, or nothing to draw it with
    └── PassError       exit 70     a bug in surgeon: names the pass and keeps the traceback

A refused conv is not an exception: the plan lists it as a skip, with the reason.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_JOINERS = "\u200c\u200d"  # invisible, but part of how some languages are written


def printable(text: str, *, keep: str = "") -> str:
    r"""Write the characters of a text that steer a terminal, or hide how it reads, as Python escapes them.

    Names and reasons come from files and users, and a terminal obeys what is in them. `keep` lists what may stay.

    >>> printable("conv\x1b[2J\n") == r"conv\x1b[2J\n"
    True
    """
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or not _steers(letter) else _escaped(letter) for letter in text)


def _steers(letter: str) -> bool:
    """Whether a character is a control, a format (such as one that turns the direction), half of one, or none."""
    is_none = ord(letter) & 0xFFFE == 0xFFFE or "\ufdd0" <= letter <= "\ufdef"  # XML cannot hold the first two
    return is_none or (unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in _JOINERS)


def _escaped(letter: str) -> str:
    number = ord(letter)
    wide = f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
    return _SHORT.get(letter) or (f"\\x{number:02x}" if number < 0x100 else wide)


class SurgeonError(Exception):
    """What went wrong (`problem`), what to do next (`todo`), and the facts behind it (`facts`).

    `details` stand below the problem, each on a line of its own. Printed, no text in it can steer a terminal.
    """

    exit_code = 2

    def __init__(self, problem: str, *, todo: str, details: Sequence[str] = (), **facts: Any) -> None:
        if details:
            lines = [f"{problem}:", *(f"  {one}" for one in details)]
            super().__init__("\n".join(map(printable, [*lines[:-1], f"{lines[-1]}. {todo}"])))
        else:
            super().__init__(printable(f"{problem}. {todo}"))
        self.problem = problem
        self.todo = todo
        self.facts = facts


@dataclass(frozen=True, slots=True)
class Fault:
    """One error in a file: where it is, which value it concerns, and what is wrong."""

    where: str  # file:line:column, or the option that brought the value in
    path: str  # rules[2].with.alpha
    what: str  # 1.5 is not in [0, 1]

    def __str__(self) -> str:
        return printable(": ".join(part for part in (self.where, self.path, self.what) if part))


class RecipeError(SurgeonError):
    """A recipe or plan file that cannot be used; `faults` lists every error in it, in file order."""

    def __init__(self, faults: Sequence[Fault], *, todo: str = "") -> None:
        self.faults = tuple(faults)
        todo = todo or "`surgeon recipes acnet` prints one that works."
        count = [f"{len(self.faults)} errors"] * (len(self.faults) > 1)
        super().__init__("\n".join([*map(str, self.faults), *count]), todo=todo)
        self.args = (f"{self.problem}. {printable(todo)}",)  # each error is on a line of its own


class ModelError(SurgeonError):
    """A model that cannot be read or built."""


class CaptureError(SurgeonError):
    """A model that cannot be followed or run as asked."""


class BlockError(SurgeonError):
    """A block of another distribution that cannot be used."""


class PlanError(SurgeonError):
    """A plan that cannot be made, or does not fit this model."""


class StoreError(SurgeonError):
    """A file that cannot be written or read back."""


class VerifyError(SurgeonError):
    """Two models whose outputs cannot be compared."""


class DataError(SurgeonError):
    """Images or labels that cannot be read, or that a network cannot be fitted to."""


class FitError(SurgeonError):
    """A network that cannot be fitted to its original, or trained against it, with the images at hand."""


class FigureError(SurgeonError):
    """Something that cannot be drawn: the network does not have it, or what draws it is not installed."""


class PassError(SurgeonError):
    """A bug in surgeon: a pass broke its contract. The original exception is chained, so the traceback is kept."""

    exit_code = 70

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(
            f"surgeon's own pass '{name}' failed: {problem}",
            todo="This is a bug in surgeon, not in your model; please report it with the traceback above.",
        )

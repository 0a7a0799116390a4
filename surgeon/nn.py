"""Every class that a file may name, at an address that stays.

A pickle names classes by the module that they lie in. The classes below say that they lie here (`__module__ =
"surgeon.nn"`), wherever their code is, so that code can move and files still open. `MOVED` has every other name that
was ever written to a file. docs/formats.md says what is stable, and how a format changes.

A class is imported only when its name is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

HOMES = {
    "ACBlock": "surgeon.blocks.acblock",
    "BasicBlock": "surgeon.app.demo.net",
    "ConvSpec": "surgeon.conv.spec",
    "DiverseBranch": "surgeon.blocks.dbb",
    "FrozenNorm": "surgeon.blocks.norms",
    "FusedOctave": "surgeon.blocks.fused_octave",
    "HetConv": "surgeon.blocks.hetconv",
    "HetInOnePass": "surgeon.blocks.het_in_one_pass",
    "NormRest": "surgeon.blocks.norms",
    "OctaveConv": "surgeon.blocks.octave",
    "OnlineACBlock": "surgeon.blocks.acblock",
    "OnlineDiverseBranch": "surgeon.blocks.dbb",
    "OnlineRepVGG": "surgeon.blocks.repvgg",
    "Pads": "surgeon.conv.spec",
    "PaddedConv2d": "surgeon.conv.padding",
    "PairFrozenNorm": "surgeon.blocks.pairs",
    "PairNorm": "surgeon.blocks.pairs",
    "PairRest": "surgeon.blocks.pairs",
    "PairSyncNorm": "surgeon.blocks.pairs",
    "RepVGG": "surgeon.blocks.repvgg",
    "Rewritten": "surgeon.analysis.rewritten",
    "SmallResNet": "surgeon.app.demo.net",
    "StackedOctave": "surgeon.blocks.stacked_octave",
}
MOVED = {
    "surgeon.blocks.acblock.ACBlock": "surgeon.nn.ACBlock",
    "surgeon.blocks.hetconv.HetConv": "surgeon.nn.HetConv",
    "surgeon.blocks.octave.FusedOctave": "surgeon.nn.FusedOctave",
    "surgeon.blocks.octave.OctaveConv": "surgeon.nn.OctaveConv",
    "surgeon.demo.net.BasicBlock": "surgeon.nn.BasicBlock",
    "surgeon.demo.net.SmallResNet": "surgeon.nn.SmallResNet",
    "surgeon.graph.Rewritten": "surgeon.nn.Rewritten",
    "surgeon.pairs.PairNorm": "surgeon.nn.PairNorm",
    "surgeon.spec.ConvSpec": "surgeon.nn.ConvSpec",
    "surgeon.spec.Pads": "surgeon.nn.Pads",
}

__all__ = sorted(HOMES)


FORMAT_KEY = "surgeon.format"  # in the state of an instance; no attribute can have that name


class Stored:
    """A class whose instances go into files: their state is a dict with the number of its format.

    What can be made from the other attributes (`DERIVED`) is not stored; `derive_` makes it, also when a state is read.

    Raises:
        ValueError: when the state was written by a later version.
    """

    FORMAT: ClassVar[int] = 2  # 1 had no number
    DERIVED: ClassVar[frozenset[str]] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        stored = {name: value for name, value in vars(self).items() if name not in self.DERIVED}
        return {FORMAT_KEY: self.FORMAT} | stored

    def __setstate__(self, state: Any) -> None:
        state = dict(state)
        state = self.upgraded(state, known_format(type(self), state))
        for name in self.DERIVED:
            state.pop(name, None)
        super().__setstate__(state)  # type: ignore[misc]
        self.derive_()

    @classmethod
    def upgraded(cls, state: dict[str, Any], format: int) -> dict[str, Any]:
        """Turn a state that was written in an earlier format into one of today's."""
        return state

    def derive_(self) -> None:
        """Set the attributes that are made from the others."""

    def recall_(self, find: Callable[[str], object]) -> None:
        """Take what the state only names; `find` gives what a name stands for, if the reader of the file admits it."""

    @classmethod
    def kept_class(cls) -> type[Any] | None:
        """Give the class that the state only names, where an object has it."""
        return None

    @classmethod
    def stored_as(cls) -> type[Any]:
        """Give the class that files name; others may be made of it in memory."""
        return cls


def become_(instance: Any, kind: type[Any], **attributes: Any) -> Callable[[], None]:
    """Give an object another class and more attributes, without copying it. Returns a function that undoes this."""
    before, state = type(instance), dict(vars(instance))

    def undo() -> None:
        object.__setattr__(instance, "__class__", before)
        vars(instance).clear()
        vars(instance).update(state)

    object.__setattr__(instance, "__class__", kind)  # whatever a class does with attributes that are set
    vars(instance).update(attributes)
    return undo


class LaterFormatError(ValueError):
    """What a later version of surgeon has written."""


def known_format(cls: type[Any], state: dict[str, Any]) -> int:
    """Take the number of its format out of a state, and refuse what a later version has written."""
    format = state.pop(FORMAT_KEY, 1)
    if type(format) is not int or format < 1:
        raise ValueError(f"{cls.__name__} has format {format!r} in the file")
    if format > cls.FORMAT:
        raise LaterFormatError(
            f"it holds a {cls.__name__} of format {format}, and this surgeon reads up to {cls.FORMAT}"
        )
    return format


def current_name(name: str) -> str:
    """Give the name under which a class is found today; names that were never ours stay what they are.

    >>> current_name("surgeon.graph.Rewritten"), current_name("torch.nn.modules.conv.Conv2d")
    ('surgeon.nn.Rewritten', 'torch.nn.modules.conv.Conv2d')
    """
    return MOVED.get(name, name)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'surgeon.nn' has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""Files that try to run, read or write something, by every road that a pickle or a stored graph offers.

Each payload is harmless in itself: at most it writes a marker, or one word into a file made for that (the canary).
"""

from __future__ import annotations

import collections
import io
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from hostile_files import net
from torch import nn

MARK = "surgeon-hostile-marker"


@dataclass(frozen=True)
class Places:
    """Files that a payload would touch: `marker` must not come to be, `canary` not change, `secret` not be shown."""

    marker: str
    canary: str
    secret: str


class Named:
    """Stands for a name, which need not exist here: it is pickled as `module.name`."""

    def __init__(self, name: str) -> None:
        self.module, _, self.name = name.rpartition(":") if ":" in name else name.rpartition(".")

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"

    def __call__(self) -> None:
        raise AssertionError("it is pickled, never called")


class Call:
    """Is pickled as a call of a named function, with the state that is given to the result."""

    def __init__(self, name: str, *args: Any, state: Any = None) -> None:
        self.call, self.args, self.state = Named(name), args, state

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.call, self.args) if self.state is None else (self.call, self.args, self.state)


class Crafty(pickle._Pickler):
    """Writes `Named` as the name that it stands for."""

    dispatch: ClassVar[Any] = dict(pickle._Pickler.dispatch)

    def _save_named(self, named: Named) -> None:
        self.write(pickle.GLOBAL + f"{named.module}\n{named.name}\n".encode())
        self.memoize(named)

    dispatch[Named] = _save_named


def _dump(value: Any, file: Any, protocol: int = 2) -> None:
    Crafty(file, protocol).dump(value)


crafty: Any = types.SimpleNamespace(Pickler=Crafty, dump=_dump, __name__="crafty")


def places(folder: Path) -> Places:
    return Places(str(folder / "marker"), str(folder / "canary"), str(folder / "secret"))


# ---- where it is put ------------------------------------------------------------------------------------------------


def _module(evil: Any) -> nn.Module:
    model = net()
    vars(model)["evil"] = evil
    return model


def _hidden(name: str) -> Callable[[Any], nn.Module]:
    def put(evil: Any) -> nn.Module:
        model = net()
        vars(model[0])[name] = evil
        return model

    return put


def _hook(kind: str) -> Callable[[Any], nn.Module]:
    def put(evil: Any) -> nn.Module:
        model = net()
        vars(model[2])[kind] = collections.OrderedDict([(0, evil)])
        return model

    return put


def _child(evil: Any) -> nn.Module:
    model = net()
    model._modules["7"] = evil
    return model


def _history(evil: Any) -> nn.Module:
    model = net()
    vars(model)["surgeon_provenance"] = {"format": 2, "history": [evil]}
    return model


SPOTS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda evil: evil,
    "attribute of a module": _module,
    "forward of a conv": _hidden("forward"),
    "padding of a conv": _hidden("padding"),
    "a hook": _hook("_forward_hooks"),
    "a hook of the state dict": _hook("_state_dict_hooks"),
    "a child": _child,
    "history": _history,
    "value of a state dict": lambda evil: net().state_dict() | {"evil": evil},
    "beside a state dict": lambda evil: {"state_dict": net().state_dict(), "args": [evil]},
    "key of a dict": lambda evil: {(1, "x"): [evil], "model": net()},
}
FORMS = ("zip", "protocol 4", "legacy")


def pickled(evil: Any, spot: str, form: str) -> bytes:
    """Write a file with a payload in it."""
    value = SPOTS[spot](evil)
    out = io.BytesIO()
    if form == "bare":
        _dump(value, out)
    else:
        protocol = 4 if form == "protocol 4" else 2  # from 4 on, a name may have dots
        is_zip = form != "legacy"
        torch.save(value, out, pickle_module=crafty, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return out.getvalue()

"""The signature of a forward, as data and as a function that has it.

A graph knows its inputs in order. What they are called, which of them can be left out, and which can be given by name
only, is in the signature of the forward that the graph was traced from: `inspect`, torch.export and exporters of ONNX
read it from there. So it is kept beside the graph, as plain data, and a forward that has it is made again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from types import FunctionType
from typing import Any

_KINDS = {
    "positional": Parameter.POSITIONAL_ONLY,
    "either": Parameter.POSITIONAL_OR_KEYWORD,
    "keyword": Parameter.KEYWORD_ONLY,
}
_NAMES: dict[Any, str] = {kind: name for name, kind in _KINDS.items()}

Written = list[list[Any]]  # for each parameter its name, its kind, and its default if it has one


def of_forward(kind: type, count: int) -> Signature | None:
    """Give the signature of the forward of a class, without self; None if it takes other than `count` single inputs."""
    try:
        signature = inspect.signature(vars_of(kind, "forward"))
    except (TypeError, ValueError):  # it is no function of Python
        return None
    _, *parameters = signature.parameters.values()
    if len(parameters) != count or any(one.kind not in _NAMES for one in parameters):
        return None
    return signature.replace(parameters=parameters)


def vars_of(kind: type, name: str) -> Any:
    """Look up what a class or its bases define under a name, without binding it."""
    return next((vars(one)[name] for one in kind.__mro__ if name in vars(one)), None)


def write(signature: Signature, encoded: Callable[[Any], Any]) -> Written:
    """Write a signature as plain data; `encoded` writes a default."""
    return [
        [one.name, _NAMES[one.kind], *([] if one.default is one.empty else [encoded(one.default)])]
        for one in signature.parameters.values()
    ]


def read(written: Any, word: Callable[[Any], str], decoded: Callable[[Any], Any]) -> Signature:
    """Make the signature that `write` wrote; `word` checks names.

    Raises:
        ValueError: it is none.
    """
    parameters = []
    for one in written:
        if not isinstance(one, list) or len(one) not in (2, 3) or one[1] not in _KINDS:
            raise ValueError(f"the graph in the file has {one!r} in place of an input")
        default = decoded(one[2]) if len(one) == 3 else Parameter.empty
        parameters.append(Parameter(word(one[0]), _KINDS[one[1]], default=default))
    return Signature(parameters)


def forward(signature: Signature, like: Any = None) -> FunctionType:
    """Make a forward of this signature that hands its inputs, in order, to `self._run`.

    Annotations and documentation, and what names in annotations stand for, are taken from a function that it is `like`.
    """
    parameters = list(signature.parameters.values())
    names = ", ".join(("self._run(self", *(one.name for one in parameters)))
    space: dict[str, Any] = {}
    exec(compile(f"def forward({_listed(parameters)}): return {names})", "<surgeon forward>", "exec"), space)
    known = getattr(inspect.unwrap(like), "__globals__", {}) if callable(like) else {}
    made = FunctionType(space["forward"].__code__, known, "forward")
    given = [one for one in parameters if one.default is not one.empty]
    made.__defaults__ = tuple(one.default for one in given if one.kind is not one.KEYWORD_ONLY) or None
    made.__kwdefaults__ = {one.name: one.default for one in given if one.kind is one.KEYWORD_ONLY}
    made.__doc__ = getattr(like, "__doc__", None)
    made.__annotations__ = {one.name: one.annotation for one in parameters if one.annotation is not one.empty}
    if signature.return_annotation is not signature.empty:
        made.__annotations__["return"] = signature.return_annotation
    return made


def _listed(parameters: Sequence[Parameter]) -> str:
    """Write parameters as Python does, with a blank default where there is one."""
    words = ["self"]
    for i, one in enumerate(parameters):
        after_positional = i and parameters[i - 1].kind is one.POSITIONAL_ONLY
        if one.kind is not one.POSITIONAL_ONLY and after_positional:
            words.append("/")
        if one.kind is one.KEYWORD_ONLY and (not i or parameters[i - 1].kind is not one.KEYWORD_ONLY):
            words.append("*")
        words.append(one.name if one.default is one.empty else f"{one.name}=None")
    if parameters and parameters[-1].kind is Parameter.POSITIONAL_ONLY:
        words.append("/")
    return ", ".join(words)

"""Python expressions as lines, broken as ruff and black break them.

    short = f(a, b)
    medium = f(
        a, b
    )
    long = f(
        a,
        b,
    )

A bracket that does not fit on its line is opened; if its items do not fit on one line then, each gets one of its own,
and a comma behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 88
_INDENT = 4


@dataclass(frozen=True, slots=True)
class Bracket:
    """What begins with `head`, which ends in an opening bracket, and the items in it, each behind a label."""

    head: str
    items: tuple[tuple[str, Code], ...]
    close: str

    def __str__(self) -> str:
        inside = ", ".join(f"{label}{item}" for label, item in self.items)
        comma = "," if self.head == "(" and len(self.items) == 1 else ""
        return f"{self.head}{inside}{comma}{self.close}"


Code = str | Bracket


def call(function: str, args: Sequence[Code] = (), named: Sequence[tuple[str, Code]] = ()) -> Bracket:
    """Write a call.

    >>> str(call("nn.Conv2d", ["3", "8", "3"], [("padding", "1")]))
    'nn.Conv2d(3, 8, 3, padding=1)'
    """
    return Bracket(f"{function}(", (*(("", arg) for arg in args), *((f"{name}=", arg) for name, arg in named)), ")")


def lines(begin: str, code: Code, end: str = "", *, indent: int) -> list[str]:
    r"""Write `begin code end` on as few lines as fit, each with its indentation.

    >>> print("\n".join(lines("x = ", call("f", ["a" * 50, "b" * 50]), indent=0)))
    x = f(
        aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa,
        bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb,
    )
    """
    whole = f"{' ' * indent}{begin}{code}{end}"
    if len(whole) <= WIDTH:
        return [whole]
    if isinstance(code, str):
        if not begin.endswith((" = ", "return ")) or " " not in code:
            return [whole]
        return [f"{' ' * indent}{begin}(", f"{' ' * (indent + _INDENT)}{code}", f"{' ' * indent}){end}"]
    inner = indent + _INDENT
    inside = ", ".join(f"{label}{item}" for label, item in code.items)
    is_tuple = code.head == "(" and len(code.items) == 1
    if inner + len(inside) <= WIDTH and not is_tuple:
        body = [f"{' ' * inner}{inside}"]
    else:
        is_alone = len(code.items) == 1 and not is_tuple and isinstance(code.items[0][1], Bracket)
        body = []
        for label, item in code.items:
            body += lines(label, item, "" if is_alone and not label else ",", indent=inner)
    return [f"{' ' * indent}{begin}{code.head}", *body, f"{' ' * indent}{code.close}{end}"]

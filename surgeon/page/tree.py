"""The modules of a network as a tree, with what becomes of the convs in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from surgeon.page.data import Part
from surgeon.page.rows import Row


@dataclass(slots=True)
class Branch:
    """One module that has others in it, or a conv with its row; `rest` are its modules without convs."""

    name: str
    path: str
    kind: str = ""
    row: Row | None = None
    children: dict[str, Branch] = field(default_factory=dict)
    rest: list[tuple[str, str]] = field(default_factory=list)  # name and class

    @property
    def rows(self) -> Iterator[Row]:
        """All convs in it."""
        if self.row is not None:
            yield self.row
        for child in self.children.values():
            yield from child.rows

    @property
    def changed(self) -> int:
        return sum(one.becomes is not None for one in self.rows)

    @property
    def count(self) -> int:
        return sum(1 for _ in self.rows)


def tree(parts: Sequence[Part], rows: Sequence[Row]) -> Branch:
    """Put convs at their places among the modules; what a model's modules do not show, such as F.conv2d, is added."""
    root = Branch("", "", next((one.kind for one in parts if not one.path), ""))
    for row in rows:
        place = _at(root, row.path)
        place.row = row
    for part in parts:
        if not part.path:
            continue
        known = _find(root, part.path)
        if known is not None:
            known.kind = part.kind
        elif _is_outermost(root, part, parts):
            parent, _, name = part.path.rpartition(".")
            above = _find(root, parent)
            if above is not None and above.row is None:
                above.rest.append((name, part.kind))
    return root


def _at(root: Branch, path: str) -> Branch:
    place = root
    so_far = []
    for name in path.split("."):
        so_far.append(name)
        place = place.children.setdefault(name, Branch(name, ".".join(so_far)))
    return place


def _find(root: Branch, path: str) -> Branch | None:
    place = root
    for name in path.split(".") if path else ():
        if name not in place.children:
            return None
        place = place.children[name]
    return place


def _is_outermost(root: Branch, part: Part, parts: Sequence[Part]) -> bool:
    """Whether the module above it is shown: modules inside one that has no conv are left out."""
    return _find(root, part.path.rpartition(".")[0]) is not None

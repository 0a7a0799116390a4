"""Which steps of a graph change in place what other steps read.

A graph names values, not memory. `y += z` is traced as a sum like any other, since tracing has no `+=`: only the user's
code tells (`places`). As long as nobody reads the old value later, that makes no difference. Where somebody does, the
names in the graph do not say what is read.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn

from surgeon.analysis import places
from surgeon.blocks import norms

_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
_VIEWS = (
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "narrow", "expand"),
    *("chunk", "split", "unbind", "detach", "contiguous", "expand_as", "view_as", "reshape_as", "movedim", "select"),
)
_FUNCTIONS = (operator.getitem, torch.chunk, torch.split, torch.flatten, torch.transpose, torch.permute, torch.reshape)
_IDENTITIES = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
Modules = Mapping[str, nn.Module]


def base_of(node: fx.Node, modules: Modules) -> fx.Node:
    """Give the step whose memory a step's result may lie in."""
    while (before := _seen_through(node, modules)) is not None:
        node = before
    return node


def written_by(node: fx.Node, modules: Modules) -> fx.Node | None:
    """Give the step whose result another one changes in place, if it does."""
    first = _first(node)
    if node.op == "call_module":
        module = modules[str(node.target)]
        if norms.is_batch_norm(module):  # what an activation inside it changes is its own result
            return None
        return first if any(getattr(one, "inplace", False) is True for one in module.modules()) else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_in_place = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    is_in_place |= node.op == "call_function" and (name in _OPERATORS or (name.endswith("_") and name[0] != "_"))
    return first if is_in_place or node.kwargs.get("inplace") is True or places.is_in_place(node) else None


def lost_in_place(graph: fx.Graph, modules: Modules) -> str | None:
    """Say which `+=` a graph does not show, where it makes a difference: to its caller, or to a later step."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in order:
        if not places.is_in_place(node) or (target := written_by(node, modules)) is None:
            continue
        base = base_of(target, modules)
        if base.op in ("placeholder", "get_attr"):
            return f"{places.said(node)} changes in place what it was given"
        if later := reads_later(node, base, order, modules):
            return f"{places.said(node)} changes in place what {places.said(later)} reads"
    return None


def reads_later(node: fx.Node, base: fx.Node, order: Mapping[fx.Node, int], modules: Modules) -> fx.Node | None:
    """Find a step that reads some memory after it was changed, but not from the step that changed it."""
    known = (one for one, at in order.items() if at < order[node] and base_of(one, modules) is base)
    readers = (user for one in known for user in one.users if user is not node)
    return next((user for user in readers if order[user] > order[node]), None)


def _seen_through(node: fx.Node, modules: Modules) -> fx.Node | None:
    """Give what a step shows another view of, or has changed in place."""
    if node.op == "call_module" and type(modules[str(node.target)]) in _IDENTITIES:
        return _first(node)
    if (node.op == "call_method" and node.target in _VIEWS) or node.target in _FUNCTIONS:
        return _first(node)
    return written_by(node, modules)


def _first(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None

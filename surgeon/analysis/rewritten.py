"""The only file that edits the graphs of modules: an island whose graph has been rewritten is a `Rewritten`.

The island's module stays the object it is, with its submodules, parameters, names and attributes. Its class becomes one
that is made here: it inherits `Rewritten`, whose forward is the new graph, and the class that it had, from which
everything else comes: methods, properties, `isinstance`, the signature of forward. There is one such class for each
class of the user's.

In a file there is no such class: a `Rewritten` is stored as plain data (`program`), the name of its class as text. A
name in a text is not looked up because a file says so: the reader gives the class back (`recall_`) if it admits it, and
otherwise the module computes the same, without the methods. A graph that torch.fx has made is a class of its own, which
no file may hold: a GraphModule keeps its class, and gets the new graph.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable
from inspect import Signature
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import torch
from torch import fx, nn

from surgeon._torch_compat import ConvNd, NormBase, reads_weights_only
from surgeon.analysis import joined, signatures
from surgeon.analysis import program as data
from surgeon.analysis.in_place import lost_in_place
from surgeon.analysis.places import said
from surgeon.analysis.program import REMEMBERS, SURROUNDINGS, Data
from surgeon.blocks.base import Operator
from surgeon.errors import CaptureError
from surgeon.models.sandbox import is_unpickling
from surgeon.nn import Stored, become_

_OWN = ("program", "origin", "_run")  # what a Rewritten keeps its graph in
# How an object says what it is copied and stored as: a Rewritten does that in its own way.
_OF_COPYING = (
    *("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"),
    *("__getnewargs__", "__getnewargs_ex__", "__getattribute__"),
)
_MARK = "surgeon.rewritten"  # in the meta of a GraphModule
_NO_PROGRAM: Data = {"inputs": []}
_CLASSES: dict[tuple[type[nn.Module], str], type[Rewritten]] = {}


class Rewritten(Stored, nn.Module):
    """A module whose forward is a graph that is kept as data.

    `origin` names the class that it had. Objects are of subclasses, which `_class_of` makes: of the class that it had,
    where that is known, and with the signature of its forward in any case.
    """

    __module__ = "surgeon.nn"
    DERIVED = frozenset({"_run"})

    _theirs: ClassVar[type[nn.Module] | None] = None

    program: Data
    origin: str
    _run: Callable[..., Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep what a class does with its subclasses, such as to list them, from the classes that are made here."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self, *args, **kwargs)

    @property
    def graph(self) -> fx.Graph:
        """The graph, rebuilt from its data."""
        return data.decode(self.program)

    def extra_repr(self) -> str:
        return f"was {self.origin}, {len(self.program['steps'])} steps"

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        made: Rewritten
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        return made

    def __copy__(self) -> Rewritten:
        made: Rewritten = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Be stored as a `Rewritten` without a class: a file holds its state, and calls nothing but `Rewritten()`."""
        return Rewritten, (), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        raise CaptureError(
            f"the graph of a {self.origin.rpartition('.')[2]} that surgeon has rewritten cannot be compiled by "
            "torch.jit.script",
            todo="Use torch.jit.trace(model, example) or torch.export.",
        )

    @classmethod
    def kept_class(cls) -> type[Any] | None:
        return cls._theirs

    @classmethod
    def stored_as(cls) -> type[Any]:
        return Rewritten

    @classmethod
    def upgraded(cls, state: Data, format: int) -> Data:
        if not isinstance(state.get("origin"), str):
            raise ValueError("the file does not say which class a rewritten module had")
        return state | {"program": data.upgraded(state["program"])}

    def derive_(self) -> None:
        """Make the graph's Python, once every step in it has been checked."""
        data.check(self, self.program)
        self.__dict__["_run"] = joined.runner(self.program)
        become_(self, _class_of(type(self)._theirs, self.program))
        if not (type(self)._theirs or is_unpickling() or reads_weights_only()):
            self.recall_(_imported)

    def recall_(self, find: Callable[[str], object]) -> None:
        """Take back the class that it had, if `find` gives it; the graph stays the forward."""
        theirs = None if type(self)._theirs else find(self.origin)
        if not isinstance(theirs, type) or f"{theirs.__module__}.{theirs.__qualname__}" != self.origin:
            return
        if not issubclass(theirs, nn.Module) or issubclass(theirs, _NO_ISLANDS) or unkept(theirs) is not None:
            return
        if any(inspect.isroutine(signatures.vars_of(theirs, name)) for name in vars(self)):
            return  # an attribute hides a method, which no honest file does
        undo = become_(self, _class_of(theirs, self.program))
        try:
            data.check(self, self.program)
        except ValueError:  # the class has an attribute where the graph expects what is registered
            undo()


_NO_ISLANDS = (Operator, Stored, ConvNd, NormBase, fx.GraphModule, torch.jit.ScriptModule)
_NAMES = frozenset(
    name for kind in (Rewritten, Stored) for name in vars(kind) if not name.startswith("__") and name != "forward"
) - {"extra_repr"}


def _missing(self: Rewritten, name: str) -> Any:
    """Look an attribute up as every module does, and say what became of the methods of a class that is not known."""
    try:
        return nn.Module.__getattr__(self, name)
    except AttributeError as error:
        was = vars(self).get("origin", "a module")
        raise AttributeError(
            f"'{name}' is not there: this was a {was}, whose graph was rewritten, and its file has been opened "
            f"without its class. {_way_to_its_class(was)}"
        ) from error


def _way_to_its_class(origin: str) -> str:
    """Say how a file is opened so that the methods of a class are there."""
    module, _, name = origin.rpartition(".")
    if module == "__main__" or "<locals>" in origin or not module:
        return f"Its methods come back if {name} is in a module that can be imported, before the network is converted."
    return f'Open it with surgeon.load(…, allow=("{module}",)), or --allow {module}, if it needs its methods.'


def rewrite_(module: nn.Module, graph: fx.Graph) -> Callable[[], None]:
    """Give a module another graph; returns a function that undoes this.

    The graph is that of an island, changed. `obstacle` and `unwritable` must have found nothing.
    """
    graph.lint()
    if isinstance(module, fx.GraphModule):
        return _replace_graph_(module, graph)
    theirs: type[nn.Module] | None
    if isinstance(module, Rewritten):
        theirs, origin = type(module)._theirs, module.origin
        program = data.encode(graph, data.signature_of(module.program))
    else:
        theirs, origin = type(module), f"{type(module).__module__}.{type(module).__qualname__}"
        count = sum(node.op == "placeholder" for node in graph.nodes)
        program = data.encode(graph, signatures.of_forward(theirs, count))
    return become_(module, _class_of(theirs, program), program=program, origin=origin, _run=joined.runner(program))


def graph_of(module: nn.Module) -> fx.Graph | None:
    """Give a copy of the graph that `rewrite_` has given to a module; None if it has given it none."""
    if isinstance(module, Rewritten):
        return module.graph
    return copy.deepcopy(module.graph) if isinstance(module, fx.GraphModule) and _MARK in module.meta else None


def obstacle(module: nn.Module, graph: fx.Graph, custom_call: Callable[[nn.Module, str], str | None]) -> str | None:
    """Say why the graph of an island cannot be rewritten, beyond what its steps are."""
    is_theirs = not isinstance(module, Rewritten | fx.GraphModule)
    if taken := _taken(module) if is_theirs else []:
        return f"its attribute {taken[0]} has a name that a rewritten graph uses for itself"
    if is_theirs and (why := unkept(type(module))):
        return why
    if lost := lost_in_place(graph, dict(module.named_modules(remove_duplicate=False))):
        return f"{lost}, and a rewritten graph would not"
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    inlined = [(path, part) for path, part in module.named_modules() if not _is_below(path, called)]
    for path, part in inlined:
        if custom := custom_call(part, path or "it"):
            return f"{custom}, which a rewritten graph would skip"
    for node in graph.nodes:
        if REMEMBERS in node.meta:
            return f"its forward sets '{node.meta[REMEMBERS]}', which a rewritten graph would leave as it is"
        if SURROUNDINGS in node.meta:
            return f"{said(node)} runs in {node.meta[SURROUNDINGS]}, which a rewritten graph would not enter"
    return None


def unwritable(module: nn.Module, graph: fx.Graph) -> str | None:
    """Say which step of a graph cannot be kept; a GraphModule keeps any, for no file can hold it anyway."""
    return None if isinstance(module, fx.GraphModule) else data.unwritable(module, graph)


def _taken(module: nn.Module) -> list[str]:
    """Name what a module holds that would be hidden by an attribute of the class `Rewritten`, or hide one."""
    held = (module._modules, module._parameters, module._buffers)
    return [name for name in (*_OWN, "graph") if name in vars(module)] or [
        name for one in held for name in one if name in _NAMES or name in _OWN
    ]


def unkept(theirs: type[nn.Module]) -> str | None:
    """Say what a class has that it could not have any longer if its forward were a graph."""
    named = theirs.__name__
    own = {name for kind in theirs.__mro__ if kind not in nn.Module.__mro__ for name in vars(kind)}
    if copying := [name for name in _OF_COPYING if name in own]:
        return f"{named} has its own {copying[0]}, which copies and files of a rewritten graph would not use"
    if any(vars(kind).get("__slots__") for kind in theirs.__mro__ if kind not in nn.Module.__mro__):
        return f"{named} keeps attributes in __slots__, which copies and files of a rewritten graph would not hold"
    if taken := sorted(own & _NAMES):
        return f"{named} has its own {taken[0]}, a name that a rewritten graph uses for itself"
    try:
        _class_of(theirs, _NO_PROGRAM)
    except Exception as error:  # whatever its metaclass says
        return f"{named} does not let a class be made of it: {(str(error).splitlines() or [''])[0]}"
    return None


def _class_of(theirs: type[nn.Module] | None, program: Data) -> type[Rewritten]:
    """Give the class of a module that was of class `theirs`, whose forward has the signature of theirs.

    Modules of one class have one class again. `theirs` is None where it is not known.
    """
    signature = data.signature_of(program)
    if theirs is None:
        return _made((Rewritten,), signatures.forward(signature), __getattr__=_missing)
    key = theirs, str(_inputs(signature))
    if key not in _CLASSES:
        known = signatures.of_forward(theirs, len(signature.parameters))
        if known is not None and _inputs(known) == _inputs(signature):
            signature = known  # it has annotations, too
        forward = signatures.forward(signature, signatures.vars_of(theirs, "forward"))
        space = {"_theirs": theirs, "__init__": _built(theirs), "__doc__": theirs.__doc__}
        made = _CLASSES.setdefault(key, _made((Rewritten, theirs), forward, **space))
        ForkingPickler.register(made, _reduced_for_a_process)
    return _CLASSES[key]


def _made(bases: tuple[type, ...], forward: Callable[..., Any], **space: Any) -> type[Rewritten]:
    space |= {"__module__": "surgeon.nn", "__qualname__": "Rewritten", "forward": forward}
    made: Any = types.new_class("Rewritten", bases, exec_body=lambda body: body.update(space))
    return made  # type: ignore[no-any-return]


def _inputs(signature: Signature) -> list[tuple[Any, ...]]:
    """Say what a signature takes, whatever it says of types."""
    return [(one.name, one.kind, repr(one.default)) for one in signature.parameters.values()]


def _built(theirs: type[nn.Module]) -> Callable[..., None]:
    """Let `type(self)(…)`, in a method of a class, build an object of that class: it has no graph."""

    @functools.wraps(theirs.__init__)
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "__class__", theirs)
        theirs.__init__(self, *args, **kwargs)

    return build


def _reduced_for_a_process(module: Rewritten) -> tuple[Any, ...]:
    """Go to another process of the same program as every module does: with the class, which is imported there."""
    return _blank, (type(module)._theirs,), module.__getstate__()


def _blank(theirs: type[nn.Module]) -> Rewritten:
    """Make an object without a state; what is the signature of its forward is known with the state."""
    kind = _class_of(theirs, _NO_PROGRAM)
    made: Rewritten = kind.__new__(kind)
    return made


def _imported(origin: str) -> object:
    """Find a class in the modules that this process has imported by itself; nothing is imported and nothing is run."""
    parts = origin.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if (module := sys.modules.get(".".join(parts[:count]))) is not None:
            found: Any = module
            for part in parts[count:]:
                found = vars(found).get(part) if isinstance(found, type | types.ModuleType) else None
            return found
    return None


def _replace_graph_(module: fx.GraphModule, graph: fx.Graph) -> Callable[[], None]:
    before, meta = module.graph, dict(module.meta)
    module.graph = graph
    module.meta = {**meta, _MARK: True}

    def undo() -> None:
        module.graph, module.meta = before, meta

    return undo


def _is_below(path: str, called: set[str]) -> bool:
    """Whether a module is a step of the graph, or inside one."""
    parts = path.split(".")
    return any(".".join(parts[:i]) in called for i in range(1, len(parts) + 1))

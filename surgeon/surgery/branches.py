"""Linear sub-graphs → plain convs: the branches that RepVGG, MobileOne, DBB and their like train with, and norms.

Modules are looked at from the inside out, each by its own graph, so that what changes lies as deep as it can:

- where a conv and the norms, pools and identities around it are modules in a row, the conv becomes the folded one and
  the others become Identities: the user's own Python stays;
- where a container of torch's, or a module whose class folds itself, is linear as a whole, the conv takes its place;
- otherwise the graph of the module is rewritten, and its class, attributes and other keys stay (`analysis.rewritten`).

Every sub-graph is compared with its conv in float64, on maps whose borders are all there, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from surgeon._torch_compat import ConvNd
from surgeon.analysis import linear, rewritten
from surgeon.analysis.islands import Island
from surgeon.analysis.linear import VIEWS, Refused, SubGraph
from surgeon.analysis.linear_steps import Steps
from surgeon.analysis.network import Network
from surgeon.analysis.obstacles import custom_call
from surgeon.analysis.readers import Facts
from surgeon.analysis.run import Run
from surgeon.analysis.self_folding import SelfFoldings
from surgeon.analysis.trace import may_convolve, trace, trace_in_eval_mode
from surgeon.blocks import Operator, norms
from surgeon.conv import numbers
from surgeon.errors import PlanError
from surgeon.models.copies import names, shadow
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import quietly
from surgeon.surgery.as_one import Layer, built, is_proved, needed
from surgeon.surgery.fold import fold_norms_
from surgeon.surgery.further import Done, FoldedBranches, Further, Recorded

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def fold_further_(
    network: Network,
    how: Further,
    *,
    recorded: Recorded | None = None,
    run: Run | None = None,
    dtypes: dict[nn.Module, torch.dtype] | None = None,
    progress: Progress = silent,
) -> Done:
    """Fold norms into the convs before them, and the linear sub-graphs of a network; what is `recorded`, or all.

    `run` is what a run of the network has shown before: modules whose own forward is not what is run are left alone.
    `dtypes` are those that convs in float64 are to have, which blocks were folded to before.

    Raises:
        PassError: a sub-graph is not what its conv is. What was folded before it stays folded.
    """
    model, done = network.model, Done(dtypes={} if dtypes is None else dtypes)
    if not how:
        return done
    run = run or Run()
    whole = _Whole(network, run, is_recorded=recorded is not None)
    paths = [path for path, one in model.named_modules() if _may_hold(one) and path not in run.taken_apart]
    paths = sorted(paths, key=lambda path: (-path.count(".") if path else 1, path))
    for i, path in enumerate(paths):
        progress(f"folding what is linear in {path or 'the model'}", i / len(paths))
        if recorded is not None and path not in recorded.modules:
            continue
        if (module := _at(model, path)) is not None and module not in whole.apart:
            _Folder(whole, path, module, how).fold_(done)
    done.round_(model)
    if how.norms:
        again = Network(model, called_with=network.called_with)
        done.norms += fold_norms_(again, None if recorded is None else recorded.norms, may_fold=whole.may_fold)
    return done


def _may_hold(module: nn.Module) -> bool:
    if isinstance(module, Operator | ConvNd | nn.ModuleList | nn.ModuleDict) or norms.is_batch_norm(module):
        return False
    has_linear = any(isinstance(one, nn.Linear) for one in module.modules())
    return any(True for _ in module.children()) and (has_linear or may_convolve(module))


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # it was folded into another one
        return None


class _Whole:
    """What is known of the whole network before anything is folded."""

    def __init__(self, network: Network, run: Run, *, is_recorded: bool) -> None:
        self.model, self.inputs = network.model, network.called_with
        self.foldings = SelfFoldings(self.model)
        read = Facts(network).read_directly | self._still_there(run.read_directly)
        self.aside = network.kept_aside
        flat = [path for path, calls in run.calls.items() if {len(call.shape_in) for call in calls} == {2}]
        self.flat, self.is_recorded = self._still_there(flat), is_recorded
        self.needed = {*self.aside, *read}  # modules that are read other than by being called
        self.inside = {one for module in self._still_there(run.taken_apart) for one in module.modules()}
        self.apart = {one for island in network.islands for one in _taken_apart(self.model, island)}

    def _still_there(self, paths: Iterable[str]) -> set[nn.Module]:
        """Give the modules of these names; those inside blocks that were folded since the run are gone."""
        return {module for path in paths if (module := _at(self.model, path)) is not None}

    def is_flat(self, norm: nn.Module) -> bool:
        """Whether a norm was given vectors (n, c) alone, as a run has shown, or had when it was recorded."""
        return self.is_recorded or norm in self.flat

    def may_fold(self, conv: nn.Module) -> bool:
        """Whether a conv is nothing but called, by the forward of every module that holds it."""
        return conv not in self.needed and conv not in self.inside

    def keeps(self, module: nn.Module) -> bool:
        """Whether a module is also kept where nothing can take its place."""
        return module in self.aside


def _taken_apart(model: nn.Module, island: Island) -> set[nn.Module]:
    """Find the modules whose submodules a graph calls, while their own forward is not what runs."""
    root = model.get_submodule(island.path)
    modules, entered, held = dict(root.named_modules(remove_duplicate=False)), {root}, set[nn.Module]()
    for node in island.graph.nodes:
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        entered |= {modules[path] for path in stack if path in modules}
        if node.op == "call_module":
            parts = str(node.target).split(".")
            held |= {modules[".".join(parts[:length])] for length in range(1, len(parts))}
    return held - entered


class _Folder:
    """One module whose graph is looked at."""

    def __init__(self, whole: _Whole, path: str, module: nn.Module, how: Further) -> None:
        self.model, self.whole, self.path, self.module, self.how = whole.model, whole, path, module, how
        inputs = whole.inputs if not path else None
        with quietly():  # a copy is traced: what its code keeps in lists and dicts is not for the network itself
            found = trace(shadow(module), inputs)
            if isinstance(found, str):
                found = trace_in_eval_mode(shadow(module), inputs)
        self.graph = found if isinstance(found, fx.Graph) else fx.Graph()
        self.steps = Steps(module, self.graph, whole.is_flat)

    @cached_property
    def names(self) -> dict[nn.Module, tuple[str, ...]]:
        return names(self.model)

    def fold_(self, done: Done) -> None:
        """Fold what can be folded here."""
        with torch.no_grad():
            found = linear.find(self.steps, self.graph, self._is_wanted, costlier=self.how.costlier)
            refused = [one for one in found if isinstance(one, Refused)]
            done.refused |= {self._where(one): one.why for one in refused}
            rewrites = []
            for one in found:
                if isinstance(one, SubGraph) and (conv := self._conv(one, done)) is not None:
                    if self._is_row(one):
                        self._in_a_row_(one, conv, done)
                    elif self._is_whole(one):
                        self._whole_(one, conv, done)
                        return
                    else:
                        rewrites.append((one, conv))
            if rewrites:
                self._rewrite_(rewrites, done)

    def _where(self, found: SubGraph | Refused) -> str:
        return f"{self.path}: {found.sink.name}".removeprefix(": ")

    def _is_wanted(self, found: SubGraph) -> bool:
        """Whether a sub-graph is of the kind that is asked for, and nothing else needs what it consists of."""
        wanted = self.how.branches if found.has_branches else self._is_wanted_norm(found)
        return wanted and all(self._is_free(module, found) for module in self._modules(found))

    def _is_wanted_norm(self, found: SubGraph) -> bool:
        if not any(found.steps[node].kind == "norm" for node in found.nodes):
            return False
        return self.how.norms or self.whole.foldings.around(self._paths_of(found)) is not None

    def _is_free(self, module: nn.Module, found: SubGraph) -> bool:
        calls = [node for node in self.graph.nodes if self.steps.module(node) is module]
        own = tuple(f"{path}." if path else "" for path in self.names[self.module])
        is_elsewhere = any(not path.startswith(own) for path in self.names[module])
        return not is_elsewhere and module not in self.whole.needed and set(calls) <= set(found.nodes)

    def _modules(self, found: SubGraph) -> list[nn.Module]:
        called = (self.steps.module(node) for node in found.nodes)
        return list(dict.fromkeys(module for module in called if module is not None))

    def _paths_of(self, found: SubGraph) -> list[str]:
        return [path for module in self._modules(found) for path in self.names[module]]

    def _conv(self, found: SubGraph, done: Done) -> Layer | None:
        """Make the conv, proved against the sub-graph; None, with the reason noted, where its numbers do not fit."""
        first = self._widest(found)
        like = next(self.module.parameters()) if first is None else first.weight
        where = self._where(found)
        held = [(name, t) for one in self._modules(found) for name, t in one.state_dict().items()]
        why = numbers.fault((name, t) for name, t in held if isinstance(t, Tensor))
        if any(name.endswith("running_var") and bool((t < 0).any()) for name, t in held):
            why = why or "a running variance is negative"
        if not numbers.is_finite(found.affine.kernel) or not numbers.is_finite(found.affine.bias):
            why = why or "the folded numbers are not finite"
        if why is not None:
            done.refused[where] = why
            return None
        dtype = next((known for one in self._modules(found) if (known := done.dtypes.get(one))), like.dtype)
        conv = built(found, self._bias(found), like.detach().double())
        try:
            for name, tensor in conv.named_parameters():
                numbers.cast(tensor.detach(), dtype, name)
        except PlanError as error:
            done.refused[where] = error.problem
            return None
        if not is_proved(self.steps, found, self.path or "the model"):
            done.refused[where] = "it does not run by itself on any map that was tried"
            return None
        done.dtypes[conv] = dtype
        conv.requires_grad_(like.requires_grad)
        return conv.train(self.module.training if first is None else first.training)

    def _bias(self, found: SubGraph) -> Tensor | None:
        """The bias; None where nothing in the sub-graph adds one."""
        adds = any(found.steps[node].kind in ("norm", "scale") for node in found.nodes)
        has_bias = adds or any(getattr(self.steps.module(node), "bias", 0) is not None for node in found.convs)
        return found.affine.bias if has_bias else None

    def _widest(self, found: SubGraph) -> Layer | None:
        """The conv of a sub-graph that has the largest kernel, which the folded one replaces."""
        convs = [module for module in map(self.steps.module, found.convs) if isinstance(module, nn.Conv2d | nn.Linear)]
        return max(convs, key=lambda conv: (conv.weight.shape[2:], conv.weight.numel()), default=None)

    def _is_row(self, found: SubGraph) -> bool:
        """Whether it is modules in a row, each called once and read by the next alone."""
        modules = [self.steps.module(node) for node in found.nodes]
        return None not in modules and len(set(modules)) == len(modules) and len(found.convs) >= 1

    def _is_whole(self, found: SubGraph) -> bool:
        """Whether it is all that a module does whose class says no more: torch's own, or one that folds itself so."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        last = next(reversed(self.graph.nodes))
        is_all = inputs == [found.source] and last.args == (found.sink,) and not found.leaves and bool(self.path)
        around = self.whole.foldings.around([self.path])
        is_plain = type(self.module).__module__.startswith("torch.nn.")
        if not is_all or not (is_plain or (around is not None and around.path == self.path)):
            return False
        return custom_call(self.module, "it") is None and not self.whole.keeps(self.module)

    def _in_a_row_(self, found: SubGraph, conv: Layer, done: Done) -> None:
        widest = self._widest(found)
        assert widest is not None
        self._note(done, found, self.names[widest][0])
        for node in found.nodes:
            module = self.steps.module(node)
            assert module is not None
            made: nn.Module = conv if module is widest else nn.Identity()
            if found.leaves and node is found.sink:
                made = norms.plain_rest(module)
            self._put_(module, made.train(module.training) if made is not conv else made)

    def _whole_(self, found: SubGraph, conv: Layer, done: Done) -> None:
        self._note(done, found, self.path)
        for path in self.names[self.module]:
            self.model.set_submodule(path, conv)

    def _put_(self, module: nn.Module, made: nn.Module) -> None:
        for path in self.names[module]:
            self.model.set_submodule(path, made)

    def _rewrite_(self, found: list[tuple[SubGraph, Layer]], done: Done) -> None:
        """Rewrite the graph of the module, with one step in place of each sub-graph."""
        if why := rewritten.obstacle(self.module, self.graph, custom_call):
            done.refused |= {self._where(one): why for one, _ in found}
            return
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, copied))
        last = next(reversed(graph.nodes))
        last.meta |= next(reversed(self.graph.nodes)).meta
        places = [self._place(one) for one, _ in found]
        for (one, _), place in zip(found, places, strict=True):
            sink, source = copied[one.sink], copied[one.source]
            with graph.inserting_before(sink):
                step = graph.call_module(place, (source,))
            if one.leaves:
                sink.args = (step,)
            else:
                sink.replace_all_uses_with(step)
        _erase_unused_(graph, {copied[node] for one, _ in found for node in needed(one)})
        before = {place: _there(self.module, place) for place in places}
        for (_, conv), place in zip(found, places, strict=True):
            _set(self.module, place, conv)
        why = rewritten.unwritable(self.module, graph)
        for place, known in before.items():
            _set(self.module, place, known)
        if why is not None:
            done.refused |= {self._where(one): why for one, _ in found}
            return
        for (one, conv), place in zip(found, places, strict=True):
            rest = self.steps.module(one.sink) if one.leaves else None
            for path in list(self._emptied(one, graph, place)):
                _take_out_(self.module, path)
            _set(self.module, place, conv)
            if rest is not None:
                self._put_(rest, norms.plain_rest(rest).train(rest.training))
            self._note(done, one, f"{self.path}.{place}".removeprefix("."))
        rewritten.rewrite_(self.module, graph)

    def _place(self, found: SubGraph) -> str:
        """Where the folded conv goes: the name of the widest conv, or of what holds nothing else than the sub-graph."""
        widest = self._widest(found)
        if widest is None:
            taken = {*self.module._modules, *vars(self.module), *self.module._parameters, *self.module._buffers}
            return next(name for i in range(len(taken) + 1) if (name := f"folded_conv{i or ''}") not in taken)
        own = next(str(node.target) for node in found.convs if self.steps.module(node) is widest)
        return self._highest(own, {str(node.target) for node in found.nodes if node.op == "call_module"})

    def _highest(self, path: str, consumed: Collection[str]) -> str:
        """Climb from a module as long as all that its parent holds is consumed."""
        while "." in path:
            parent = path.rpartition(".")[0]
            holder = self.module.get_submodule(parent)
            inner = [f"{parent}.{name}" for name, one in holder.named_modules() if name and not [*one.children()]]
            if list(holder.parameters(recurse=False)) or not all(_is_under(one, consumed) for one in inner):
                break
            path = parent
        return path

    def _emptied(self, found: SubGraph, graph: fx.Graph, place: str) -> Iterator[str]:
        """Name the modules and parameters of a sub-graph that nothing in the graph reads any longer."""
        nodes = [node for node in needed(found) if node.op in ("call_module", "get_attr")]
        targets = {str(node.target) for node in nodes}
        read = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")} - {place}
        called = {str(node.target) for node in nodes if node.op == "call_module"}
        seen = set[str]()
        for target in sorted(targets):
            path = self._highest(target, called) if target in called else target
            if path in seen or place.startswith(f"{path}.") or any(f"{one}.".startswith(f"{path}.") for one in read):
                continue
            seen.add(path)
            yield path

    def _note(self, done: Done, found: SubGraph, path: str) -> None:
        kinds = [found.steps[node].kind for node in found.nodes if found.steps[node].kind not in VIEWS]
        convs, behind = kinds.count("conv"), kinds.count("norm")
        made = FoldedBranches(path, self.path, convs, behind, len(kinds) - convs - behind)
        called = [f"{self.path}.{node.target}".removeprefix(".") for node in found.convs if node.op == "call_module"]
        done.add_(made, called)


def _erase_unused_(graph: fx.Graph, nodes: Collection[fx.Node]) -> None:
    """Erase those steps of a sub-graph that nothing reads any longer, the last ones first."""
    for node in reversed([one for one in graph.nodes if one in nodes]):
        if not node.users:
            graph.erase_node(node)


def _is_under(path: str, consumed: Collection[str]) -> bool:
    return any(f"{path}.".startswith(f"{one}.") for one in consumed)


def _there(module: nn.Module, path: str) -> nn.Module | None:
    holder, _, name = path.rpartition(".")
    return module.get_submodule(holder)._modules.get(name)


def _set(module: nn.Module, path: str, made: nn.Module | None) -> None:
    """Put a module at a path, or take away what is there."""
    holder, _, name = path.rpartition(".")
    register = module.get_submodule(holder)._modules
    if made is None:
        register.pop(name, None)
    else:
        register[name] = made


def _take_out_(module: nn.Module, path: str) -> None:
    """Take a module, parameter or buffer out; an attribute is None then, and a list does not have it any longer."""
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    registers: tuple[Mapping[str, object], ...] = (holder._modules, holder._parameters, holder._buffers)
    for register in registers:
        if name in register:
            if isinstance(holder, _LISTS):
                del register[name]  # type: ignore[attr-defined] # it is a dict
            else:
                register[name] = None  # type: ignore[index]

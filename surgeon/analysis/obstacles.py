"""What stands in the way: why a conv cannot be swapped, and why a block cannot take over the norm behind it.

Every reason is a sentence that ends up in the plan.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from surgeon._torch_compat import own_parts_of_a_conv
from surgeon.analysis import own_norms
from surgeon.analysis.network import Network
from surgeon.analysis.readers import Facts, Graph, is_quantised, reader_name, readers_of
from surgeon.blocks import Block, norms

NO_NORM = "no norm follows"
COMPUTING_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
_NORMS_OF: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.ConvTranspose2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    nn.Conv1d: (nn.BatchNorm1d, nn.SyncBatchNorm),
    nn.ConvTranspose1d: (nn.BatchNorm1d, nn.SyncBatchNorm),
    nn.Conv3d: (nn.BatchNorm3d, nn.SyncBatchNorm),
    nn.ConvTranspose3d: (nn.BatchNorm3d, nn.SyncBatchNorm),
}
BAKE = "--bake (from Python, bake=True) makes its tensors permanent"


def norms_behind(network: Network) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Give all names of every conv or block that has a norm of its own behind it, and all names of that norm."""
    facts = Facts(network)
    found = []
    for module in [*facts.convs(), *(m for m in facts.names if isinstance(m, Block))]:
        norm, _ = norm_behind(facts, module)
        if norm is not None and not (isinstance(module, nn.Conv2d) and obstacle(facts, module)):
            found.append((facts.names[module], facts.names[norm]))
    return found


def norms_behind_others(network: Network) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Give the same for transposed convs and for those of one or three dimensions."""
    facts = Facts(network)
    found = []
    for conv in facts.names:
        kinds = _NORMS_OF.get(type(conv), ())
        if not kinds or computes_its_tensors(conv) or custom_call(conv, "it") or conv in facts.kept_aside:
            continue
        is_shared = any(facts.owners[id(one)] != {conv} for one in conv.parameters()) or conv in facts.read_directly
        norm, _ = norm_behind(facts, conv)
        if isinstance(norm, kinds) and not is_shared:
            found.append((facts.names[conv], facts.names[norm]))
    return found


def obstacle(facts: Facts, module: nn.Module) -> str | None:
    """Say why a conv cannot be swapped by any block."""
    if is_quantised(module):
        return "its weight is quantised; swap convs before a network is quantised"
    if not isinstance(module, nn.Conv2d):
        return f"{type(module).__name__}: only Conv2d is swapped"
    if computed := computes_its_tensors(module):
        return computed
    if custom := custom_call(module, "it"):
        return f"{custom}, which a block would not have"
    if isinstance(found := facts.computes(module), str):
        named = type(module).__qualname__
        kind = f"{type(module).__module__}.{named}" if named == nn.Conv2d.__qualname__ else named
        own = " with a forward of its own" if own_parts_of_a_conv(type(module)) else ""
        return f"{kind} is a subclass of Conv2d{own}: {found}"
    if facts.names[module][0] == "":
        return "it is the whole model, and no module holds it; give nn.Sequential(model)"
    for parameter in module.parameters():
        if others := facts.owners[id(parameter)] - {module}:
            return f"it shares its weights with {facts.names[others.pop()][0]}"
    if module in facts.read_directly:
        return "the network also reads its weight directly"
    if module in facts.kept_aside:
        return f"it is also kept in {facts.kept_aside[module]}, where a swap would not reach it"
    if module not in facts.graph_of and module in facts.traced:
        return "it is never called"
    if not module.weight.numel():
        return "it has no channels"
    if module.weight.is_complex():
        return "its weight is complex"
    if any(len(call.shape_in) == 3 for call in facts.runs.get(facts.names[module][0], [])):
        return "it is called with a single feature map, without a batch dimension"
    return None


def computes_its_tensors(conv: nn.Module) -> str | None:
    """Say what computes a weight or a bias: a parametrization, or a hook, as pruning and older weight norms have."""
    if parametrize.is_parametrized(conv):
        return f"a parametrization computes its weight; {BAKE}"
    for hook in conv._forward_pre_hooks.values():
        if isinstance(hook, COMPUTING_HOOKS):
            return f"a hook ({type(hook).__name__}) computes its tensors; {BAKE}"
    return None


def norm_behind(facts: Facts, conv: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Find the norm that belongs to this conv alone, or say why there is none."""
    graph = facts.graph_of.get(conv)
    if graph is None:
        return None, "it is never called" if conv in facts.traced else "what follows it could not be traced"
    nodes = graph.calls[conv]
    if len(nodes) != 1:
        return None, f"it is called {len(nodes)} times"
    users = readers_of(nodes[0])
    readers = [reader_name(graph, user) for user in users]
    norm = graph.modules[str(users[0].target)] if users and users[0].op == "call_module" else None
    if len(users) != 1:
        return None, f"its output is read by {' and '.join(readers)}" if users else "nothing reads its output"
    if norm is None or not _is_norm(norm):
        inside = own_norms.norm_of(users[0], graph.modules)
        return None, NO_NORM if inside is None else _no_batch_norm(
            ".".join(filter(None, (graph.names[0], inside[0]))), inside[1]
        )
    return _judge_norm(facts, graph, conv, norm)


def _judge_norm(facts: Facts, graph: Graph, conv: nn.Module, norm: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Check everything that must hold before a block takes over a norm."""
    name = facts.names[norm][0]
    prefixes = tuple(f"{path}." if path else "" for path in graph.names)
    outside = [path for path in (*facts.names[conv], *facts.names[norm]) if not path.startswith(prefixes)]
    if not norms.is_batch_norm(norm):
        return None, _no_batch_norm(name, type(norm))
    if (count := len(graph.calls[norm])) != 1:
        return None, f"{name} is called {count} times"
    if norm.running_mean is None or norm.running_var is None:
        return None, f"{name} keeps no running statistics"
    if outside:
        return None, f"it is also reached as {outside[0]}"
    if custom := custom_call(norm, name):
        return None, custom
    core = {*norms.core_of(norm).modules()} | {norm}
    if any(not facts.owners[id(p)] <= core for p in norms.core_of(norm).parameters()):
        return None, f"{name} shares its parameters"
    if any(not facts.owners[id(buffer)] <= core for buffer in norms.core_of(norm).buffers()):
        return None, f"{name} shares its statistics"
    if norm in facts.read_directly:
        return None, f"the network also reads the parameters of {name} directly"
    if norm in facts.kept_aside:
        return None, f"{name} is also kept in {facts.kept_aside[norm]}"
    if why := own_norms.refusal(norm, has_bias=getattr(conv, "bias", None) is not None):
        return None, f"{name} is a {type(norm).__name__}, {why}"
    return norm, None


def _no_batch_norm(name: str, kind: type[nn.Module]) -> str:
    return f"{name} is a {kind.__name__}, {own_norms.in_words(kind)}; only a batch norm can be taken over"


def _is_norm(module: nn.Module) -> bool:
    return norms.is_batch_norm(module) or own_norms.is_norm_class(type(module))


def custom_call(module: nn.Module, name: str) -> str | None:
    """Say what a module called `name` does, when it is called, beyond what its class does."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        return f"hooks are attached to {name}"
    return f"{name} has a forward of its own" if "forward" in vars(module) else None

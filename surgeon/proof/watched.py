"""What modules give in one run, kept for a run of another model that is made elsewhere.

Only the place where a fault begins is told by it, and nothing is decided: modules that surgeon or others have folded
give something else in between, although the whole computes the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from surgeon.blocks.base import Foldable
from surgeon.models.copies import kind_of
from surgeon.proof.distance import EXACT, relative_l2
from surgeon.proof.reference import Site, sketch
from surgeon.proof.report import SiteDistance

Run = Callable[[nn.Module], Any]


@contextlib.contextmanager
def _watching(model: nn.Module, paths: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Note, in order of execution, what these modules give; those that are called twice are left out."""
    seen: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def note(path: str, out: Any) -> None:
        calls[path] = calls.get(path, 0) + 1
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
            seen[path] = sketch(out).cpu()

    hooks = [
        module.register_forward_hook(lambda _, __, out, path=path: note(path, out))
        for path, module in model.named_modules()
        if path in paths
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for path, count in calls.items():
            if count > 1:
                seen.pop(path, None)


def kept(held: dict[str, Tensor], i: int, model: nn.Module, moved: Sequence[nn.Module], run: Run) -> list[Site]:
    """Run a model, and copies with moved weights; keep what blocks and modules with own tensors give for input `i`."""
    paths = [path for path, module in model.named_modules() if path and (_own(module) or isinstance(module, Foldable))]
    rows = []
    for one in (model, *moved):
        with _watching(one, paths) as seen:
            run(one)
        rows.append(seen)
    first, *others = rows
    found: list[Site] = []
    for path, out in first.items():
        module = model.get_submodule(path)
        noise = max((relative_l2(other[path], out) for other in others if path in other), default=0.0)
        held[f"site.{i}.{len(found)}"] = out
        found.append(Site(path=path, kind=_kind(module), tensors=_own(module), numbers=len(out), noise=noise))
    return found


def compared(
    sites: Sequence[Site],
    kept: Sequence[Tensor],
    model: nn.Module,
    run: Callable[[], Any],
    margin: float,
    *,
    is_wrong: bool,
) -> list[SiteDistance]:
    """Compare what the modules of another model give; if it is wrong, the first one that has moved diverges.

    Judged are modules of the same class with tensors of the same names and shapes, blocks of branches beside the conv
    that they were folded to, if B has no norm of its own behind it, and those that are an Identity where a norm was:
    the one before has taken it in, is called diverging in its place, and is not judged by itself.
    """
    with _watching(model, {site.path for site in sites}) as seen:
        run()
    modules = dict(model.named_modules())
    known = [(site, modules[site.path], out) for site, out in zip(sites, kept, strict=True) if site.path in modules]
    paths = {site.path for site in sites}
    norms_are_folded = not any(path and path not in paths and _own(module) for path, module in modules.items())
    takes_in = [j > 0 and isinstance(module, nn.Identity) for j, (_, module, _) in enumerate(known)]
    rows: list[SiteDistance] = []
    for j, (site, module, out) in enumerate(known):
        here = seen.get(site.path)
        far = None if here is None or len(here) != len(out) else relative_l2(here, out)
        is_same = _kind(module) == site.kind and _own(module) == site.tensors
        is_same |= norms_are_folded and not site.tensors and type(module) is nn.Conv2d
        is_judged = takes_in[j] or (is_same and not any(takes_in[j + 1 : j + 2]))
        moved = is_wrong and is_judged and far is not None and not far <= margin * site.noise + EXACT
        if moved and takes_in[j]:
            rows[-1] = replace(rows[-1], propagated=far, diverges=True)
        rows.append(SiteDistance(site.path, site.kind, _kind(module), None, far, None, moved and not takes_in[j]))
        is_wrong = is_wrong and not moved
    return rows


def _kind(module: nn.Module) -> str:
    return kind_of(module).__name__


def _own(module: nn.Module) -> dict[str, list[int]]:
    """Give the shapes of a module's own tensors."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: list(tensor.shape) for name, tensor in own}

"""Calls of a block's own code. An error in one is reported with the package that brings the block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.blocks.anatomy import BranchKernel
from surgeon.blocks.base import PLAIN, Block, Deployable, Foldable, Operator
from surgeon.blocks.fittable import Arrangement, Fittable, View
from surgeon.conv.least_squares import Problem
from surgeon.conv.spec import ConvSpec
from surgeon.errors import BlockError, PassError, SurgeonError


def broken(kind: type[Block], what: str) -> SurgeonError:
    """Make the error for a block that does not keep its contract: a bug in surgeon, or in whoever brings the block."""
    home = kind.__module__.partition(".")[0]
    if home == "surgeon":
        return PassError(kind.name, what)
    return BlockError(
        f"the block {kind.name!r} of {home} is not what it claims to be: {what}",
        todo="Report it to the authors of that block, and choose another one.",
    )


def refusal(kind: type[Block], spec: ConvSpec, size: tuple[int, int] | None, options: Any) -> str | None:
    """Ask a block why it cannot replace a conv; not every block pads its input as some convs do."""
    if spec.pads_input is not None and not kind.pads_its_input:
        return f"it pads its input by a rule of its own ({spec}), which the block {kind.name} does not do"
    with _calling(kind, "refusal"):
        why: Any = kind.refusal(spec, size, options)
    if why is not None and not isinstance(why, str):
        raise broken(kind, f"its refusal returned {why!r} instead of a sentence or None")
    return why


def from_conv(kind: type[Block], conv: nn.Conv2d, options: Any, **how: Any) -> Block:
    """Let a block be built from a conv."""
    with _calling(kind, "from_conv"):
        made: Any = kind.from_conv(conv, options, **how)
    if not isinstance(made, kind):
        raise broken(kind, f"its from_conv returned a {type(made).__name__} instead of a {kind.__name__}")
    return made


def fold(block: Foldable) -> nn.Conv2d:
    """Let a block fold itself into a conv, and make sure that it is one of the same channels and stride."""
    with _calling(type(block), "fold"):
        made: Any = block.fold()
    if not isinstance(made, nn.Conv2d):
        raise broken(type(block), f"its fold returned a {type(made).__name__} instead of a Conv2d")
    _check_geometry(block, made, "fold")
    return made


def fold_keeping_norm(block: Foldable) -> tuple[nn.Conv2d, nn.Module] | None:
    """Let a block fold itself into a conv without bias and a norm; None if it cannot."""
    with _calling(type(block), "fold_keeping_norm"):
        made: Any = block.fold_keeping_norm()
    if made is None:
        return None
    if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(one, nn.Module) for one in made):
        raise broken(type(block), "its fold_keeping_norm returned no conv and norm")
    conv, norm = made
    if not isinstance(conv, nn.Conv2d) or conv.bias is not None:
        raise broken(type(block), f"its fold_keeping_norm returned {conv!r} instead of a Conv2d without bias")
    _check_geometry(block, conv, "fold_keeping_norm")
    return conv, norm


def forms(block: Deployable) -> Mapping[str, Callable[[], nn.Module]]:
    """Ask a block for the forms in which it can be deployed; what makes one is guarded as well."""
    kind = type(block)
    with _calling(kind, "forms"):
        found: Any = block.forms()
    if not isinstance(found, Mapping) or PLAIN not in found or not all(isinstance(name, str) for name in found):
        raise broken(kind, f"its forms returned {found!r:.80} instead of a dict with the form {PLAIN!r}")

    def guarded(name: str, make: Callable[[], Any]) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            with _calling(kind, f"form {name}"):
                form = make()
            if not isinstance(form, nn.Module):
                raise broken(kind, f"its form {name} is a {type(form).__name__} instead of a module")
            return form

        return made

    return {name: guarded(name, make) for name, make in found.items()}


def views(block: Fittable, args: Sequence[Any]) -> Sequence[View]:
    """Ask a block what its filters see in one call; every filter of its conv is in one view."""
    with _calling(type(block), "views"):
        made: Any = block.views(*args)
    if not isinstance(made, Sequence) or not all(isinstance(one, View) for one in made):
        raise broken(type(block), f"its views returned {made!r:.80} instead of a list of views")
    filters = sorted(i for view in made for start, stop in view.filters for i in range(start, stop))
    if filters != list(range(block.spec.c_out)):
        raise broken(type(block), f"its views have the filters {filters!s:.80} of {block.spec.c_out}")
    return made


def arrangements(
    block: Fittable, view: View, problem: Problem, kernel: Tensor, weight: Tensor, most: int | None
) -> Sequence[Arrangement]:
    """Ask a block which choices of taps a view has, for the first `most` of them."""
    with _calling(type(block), "arrangements"):
        return list(islice(block.arrangements(view, problem, kernel, weight), most))


def branch_kernels(block: Operator) -> Sequence[BranchKernel]:
    """Ask a block for the kernels that its kernel is the sum of; all of them have its shape."""
    if not isinstance(block, Block):
        return block.branch_kernels()
    kind = type(block)
    with _calling(kind, "branch_kernels"):
        made: Any = block.branch_kernels()
    if not isinstance(made, Sequence) or not all(isinstance(one, BranchKernel) for one in made):
        raise broken(kind, f"its branch_kernels returned {made!r:.80} instead of a list of BranchKernel")
    for one in made:
        if tuple(one.kernel.shape) != block.spec.weight_shape:
            raise broken(kind, f"its branch {one.name} has the shape {tuple(one.kernel.shape)}")
    return made


def draw_anew_(block: Block, generator: torch.Generator) -> None:
    """Let a block draw its numbers as if it had never been trained."""
    with _calling(type(block), "draw_anew_"):
        block.draw_anew_(generator)


def take_kernel_(block: Fittable, kernel: Tensor, bias: Tensor | None) -> None:
    """Let a block take over fitted taps."""
    with _calling(type(block), "take_kernel_"):
        block.take_kernel_(kernel, bias)


def _check_geometry(block: Foldable, made: nn.Conv2d, what: str) -> None:
    found, wanted = ConvSpec.of(made), block.spec
    if (found.c_in, found.c_out, found.stride) != (wanted.c_in, wanted.c_out, wanted.stride):
        raise broken(type(block), f"its {what} returned a conv {found}, in place of {wanted}")


@contextlib.contextmanager
def _calling(kind: type[Block], what: str) -> Iterator[None]:
    try:
        yield
    except SurgeonError:
        raise
    except Exception as error:
        if kind.__module__.startswith("surgeon."):
            raise
        said = (str(error).splitlines() or [""])[0].rstrip(".")
        raise broken(kind, f"its {what} raised {type(error).__name__}: {said}") from error

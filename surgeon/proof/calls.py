"""One call of a model: on a copy, in eval mode, with its own random state, in the dtype that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.analysis.run import how_to_call
from surgeon.conv.spec import ConvSpec
from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import in_mode, shadow, where
from surgeon.models.devices import dtype_of
from surgeon.models.sandbox import one_thread, quietly
from surgeon.proof.distance import apart

HISTORY = "surgeon_provenance"  # the attribute in which a model says what was done to it


def outputs(model: nn.Module, inputs: Inputs, *, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
    """Run a copy of the model in eval mode, on inputs in its own dtype if no other is given."""
    return call(evaluating(model), inputs, dtype or dtype_of(model), seed)


def local_distance(block: nn.Module, conv: nn.Conv2d, norm: nn.Module | None) -> float:
    """Run a block, and the conv and norm that it replaces, on the same small random maps, in float64 eval mode."""
    spec = ConvSpec.of(conv)
    top_left, bottom_right = spec.pads[::2], spec.pads[1::2]
    geometry = zip(spec.dilation, spec.kernel, spec.stride, top_left, bottom_right, strict=True)
    sides = [d * (k - 1) + s + 1 + max(before, after) for d, k, s, before, after in geometry]
    is_own = type(conv) is not nn.Conv2d  # what it pads may depend on the size
    sizes = [[side + more for side in sides] for more in range(max(spec.stride) if is_own else 1)]
    before, generator = conv if norm is None else nn.Sequential(conv, norm), torch.Generator().manual_seed(0)
    maps = [torch.randn(2, spec.c_in, *size, generator=generator, dtype=torch.float64) for size in sizes]
    with quietly(), one_thread():
        outs = [[in_mode(module, False)(x.to(conv.weight.device)) for module in (block, before)] for x in maps]
    found = [apart(*pair) for pair in outs]
    return math.nan if any(map(math.isnan, found)) else max(found)


def evaluating(model: nn.Module, cast: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Copy a model, and put the copy into eval mode; its history is long, and nothing here changes it."""
    known = vars(model).get(HISTORY)
    return in_mode(shadow(model, cast, shares=() if known is None else [known]), False)


def call(model: nn.Module, inputs: Inputs, dtype: torch.dtype, seed: int) -> Any:
    """Call a model.

    Raises:
        VerifyError: it does not run; the message says what it said, and where.
    """
    with quietly(seed):
        try:
            return inputs.cast_for(model, dtype).call(model)
        except Exception as error:
            raise VerifyError(
                f"a model does not run on an input of {inputs} in {dtype}: {where(error)}",
                todo=how_to_call(model, inputs),
            ) from error

"""Which images of a batch are judged in float64, and whether what was judged there speaks for the others.

    ‖B(x)ᵢ − A(x)ᵢ‖ / ‖A(x)ᵢ‖ ≤ 3 · the largest over the judged images, for every other image i and every output

Both sides are in the models' own dtype, and run on the whole batch. Images that are judged in float64 cost several
times as much as those that are only run. If one of the others is further apart, or a label of it is another one, or
anything is not finite, the whole batch is judged. So it is where a batch is no row of images: an output has another
first axis, or a part of the batch alone gives other shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from surgeon._torch_compat import pytree
from surgeon.models.call import Inputs
from surgeon.proof.distance import Apart, matched, tensors

_APART = 3.0  # times; what rounding does to two images of one batch differs less


def first_of(inputs: Inputs) -> Inputs | None:
    """Cut out the first image; None if there is no other one."""
    if inputs.batch < 2 or not any(t.is_floating_point() and t.numel() for t in inputs.tensors):
        return None
    return inputs.part(0, 1)


def further(inputs: Inputs, out: Any, enough: int) -> list[Inputs] | None:
    """Cut out further images, beside the first with this result, until every output has so many numbers.

    None if more than half of the batch is needed.
    """
    fewest = min((t.numel() for t in tensors(out) if t.numel()), default=0)
    if not fewest:
        return None
    count = -(-enough // fewest)
    if count > inputs.batch // 2:
        return None
    return [inputs.part(1, count)] if count > 1 else []


def rows(out: Any, part: Any, start: int, stop: int, batch: int) -> Any:
    """Cut images out of the result of a whole batch; None if it is not a row of results like those of a part."""
    ours, theirs = pytree.tree_flatten(out), pytree.tree_flatten(part)
    if ours[1] != theirs[1]:
        return None
    for whole, one in zip(ours[0], theirs[0], strict=True):
        if not (isinstance(whole, Tensor) and isinstance(one, Tensor)):
            return None
        if whole.layout is not torch.strided or whole.is_quantized or whole.dim() == 0 or one.dim() == 0:
            return None
        if len(whole) != batch or len(one) != stop - start or whole.shape[1:] != one.shape[1:]:
            return None
    return pytree.tree_unflatten([whole[start:stop] for whole in ours[0]], ours[1])


def speaks_for(out_b: Any, out_a: Any, judged: int) -> bool:
    """Whether the images that were not judged are as near as those that were, in the models' own dtype."""
    for b, a in matched(out_b, out_a, any_dtype=True):
        few = 4 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        if not all(bool(t.isfinite().all()) for t in (a, b)):
            return False
        near = max([few, *(one.l2 for one in _images(b[:judged], a[:judged]))])
        for one in _images(b[judged:], a[judged:]):
            if one.flips or not one.l2 <= _APART * near:
                return False
    return True


def _images(b: Tensor, a: Tensor) -> Iterator[Apart]:
    for one, other in zip(b, a, strict=True):
        yield Apart.between(one, other)

"""Numbers that do not fit into the dtype they are stored in, and numbers that are none.

A fold multiplies weights by γ/σ. In float16, which ends at 65504, the product can be beyond what is stored; cast in
silence it would be infinite.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from surgeon.errors import PlanError

WIDER = {
    torch.float16: "Convert the network to bfloat16 or float32 first: model.bfloat16() or model.float().",
    torch.bfloat16: "Convert the network to float64 first: model.double().",
    torch.float32: "Convert the network to float64 first: model.double().",
}
MEND = "Mend these numbers, or go back to a network without them: its training has diverged, or it was damaged."


def cast(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Cast once to a dtype.

    Raises:
        PlanError: a finite number would become infinite.
    """
    made = tensor.to(dtype)
    if not is_finite(made) and is_finite(tensor):
        raise beyond(f"its {what}", dtype)
    return made


def beyond(what: str, dtype: torch.dtype) -> PlanError:
    """Make the error for numbers that a dtype does not hold."""
    name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return PlanError(
        f"{what} would be beyond {most:.6g}, the largest number of {name}",
        todo=WIDER.get(dtype, "Make the weights of its norm smaller."),
    )


def fault(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Say which of the named tensors holds NaN or infinite numbers."""
    for name, tensor in tensors:
        if tensor is not None and not is_finite(tensor):
            return f"its {name} holds {'NaN' if tensor.isnan().any() else 'infinite numbers'}"
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; those without numbers, or of another kind, count as such."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.element_size() < 2:
        return True
    try:
        numbers = tensor.detach()
        # A sum is finite only where all numbers are, and takes a third of the time.
        return bool(torch.isfinite(numbers.sum())) or bool(torch.isfinite(numbers).all())
    except RuntimeError:  # a fake tensor, which has a device and no numbers
        return True

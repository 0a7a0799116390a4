"""A network in a smaller dtype: folded in float64, cast last.

Casting rounds every weight once. How much of that is unavoidable is measured with the network as it was before it was
folded, A, cast to the same dtype:

    noise = ‖B(x) − A₆₄(x)‖ / ‖A₆₄(x)‖,   rounding = ‖A₁₆(x) − A₆₄(x)‖ / ‖A₆₄(x)‖,   ratio = noise / rounding

B is the folded network in the dtype, A₁₆ is A in it, and A₆₄ is A in float64; all get the same x. A ratio of 1 says
that the folded network is as near as the network itself would be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgeon.conv import numbers
from surgeon.errors import PlanError, VerifyError
from surgeon.models.call import Inputs
from surgeon.models.copies import shadow
from surgeon.proof import calls
from surgeon.proof.distance import tensors, worst

Half = Literal["float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Noise:
    """What a smaller dtype costs: relative L2 from the network in float64, folded and cast, and only cast."""

    noise: float
    rounding: float

    @property
    def ratio(self) -> float | None:
        """How much further the folded network is; None where casting alone changes nothing."""
        return self.noise / self.rounding if self.rounding else None

    def to_dict(self) -> dict[str, float | None]:
        return {**asdict(self), "ratio": self.ratio}


def checked_half(dtype: torch.dtype) -> Half:
    """Give the name of a dtype that a network can be cast to.

    >>> checked_half(torch.bfloat16)
    'bfloat16'

    Raises:
        PlanError: it is another one.
    """
    names: dict[torch.dtype, Half] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
    if dtype not in names:
        raise PlanError(f"{dtype} is asked for", todo="Take torch.float16 or torch.bfloat16, or leave the dtype out.")
    return names[dtype]


def raise_(model: nn.Module) -> None:
    """Put every floating point tensor of a model into float64; the tensors that it had are not changed."""
    _recast_(model, lambda tensor, _: tensor.double())


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every floating point tensor of a model once.

    Raises:
        PlanError: a number is beyond what the dtype holds; the module is named. The model may be half cast then.
    """

    def cast(tensor: Tensor, path: str) -> Tensor:
        holder, _, name = path.rpartition(".")
        try:
            return numbers.cast(tensor, dtype, name)
        except PlanError as error:
            todo = numbers.WIDER[dtype] if dtype != torch.float16 else "Take bfloat16, which holds larger ones: --bf16."
            raise PlanError(f"{holder or 'the model'} cannot be cast: {error.problem}", todo=todo) from error

    _recast_(model, cast)


def _recast_(model: nn.Module, change: Callable[[Tensor, str], Tensor]) -> None:
    """Give every module other floating point tensors; those that were one tensor are one again."""
    made: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in both:
            for name, tensor in held.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if id(tensor) not in made:
                    new, is_trained = change(tensor.detach(), f"{path}.{name}".lstrip(".")), tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(new, is_trained) if isinstance(tensor, nn.Parameter) else new
                held[name] = made[id(tensor)]


def noise(model: nn.Module, original: nn.Module, inputs: Inputs | None, dtype: torch.dtype) -> Noise | None:
    """Measure what the dtype costs `model`, which is in it, beside its `original` in float64; None if that cannot run.

    Raises:
        PlanError: the network overflows in the dtype, and the original does not in float64.
    """
    if inputs is None:
        return None
    rounded = inputs.cast(dtype)
    try:
        exact = calls.outputs(original, rounded, dtype=torch.float64)
        cast = shadow(original, lambda t: t.to(dtype) if t.is_floating_point() else t.clone())
        only_cast = calls.outputs(cast, rounded)
        folded = calls.outputs(model, rounded)
        far, unavoidable = (worst(_widened(out), _widened(exact)) for out in (folded, only_cast))
    except VerifyError:
        return None
    if _is_finite(exact) and _is_finite(only_cast) and not _is_finite(folded):
        raise PlanError(
            f"in {str(dtype).removeprefix('torch.')} the folded network gives NaN or infinite numbers",
            todo="Take bfloat16, which holds larger ones: --bf16." if dtype == torch.float16 else "Keep its own dtype.",
        )
    return Noise(far, unavoidable)


def _widened(out: Any) -> Any:
    return [t.double() if t.is_floating_point() else t for t in tensors(out)]


def _is_finite(out: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors(out) if t.is_floating_point())

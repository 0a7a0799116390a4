"""Float64 copies of several models that hold most of their numbers alike: a parameter that is equal is held once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from surgeon.models.memory import is_large
from surgeon.proof.distance import as_double
from surgeon.proof.ulps import is_same_bits


class Doubles:
    """Casts models to float64, and gives two large parameters of the same numbers the same memory.

    A model that runs does not write into its parameters, as every copy that shares them with the user's takes for
    granted. Buffers are cast one by one.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[tuple[int, ...], float], list[Tensor]] = defaultdict(list)

    def add(self, model: nn.Module) -> None:
        """Take note of what a model in float64 holds."""
        for parameter in model.parameters():
            if parameter.dtype == torch.float64 and is_large(parameter) and not parameter.is_meta:
                self._shared(parameter.detach())

    def cast_of(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Give the function that casts the tensors of a model."""
        shared = {(one.data_ptr(), one.shape, one.stride()) for one in model.parameters() if _is_plain(one)}

        def cast(tensor: Tensor) -> Tensor:
            made = as_double(tensor)
            is_shared = (tensor.data_ptr(), tensor.shape, tensor.stride()) in shared and is_large(tensor)
            return self._shared(made) if is_shared else made

        return cast

    def _shared(self, tensor: Tensor) -> Tensor:
        """Give the tensor that holds the same numbers in the same order, or the given one, which is the first."""
        alike = self.known[(*tensor.shape, *tensor.stride()), float(tensor.sum())]
        for one in alike:
            if one.device == tensor.device and is_same_bits(one, tensor):
                return one
        alike.append(tensor)
        return tensor


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.layout is torch.strided and tensor.is_floating_point()

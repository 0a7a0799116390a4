"""Tensors that lie in the same memory: what is written into one is read from the other, and so it is in a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Extent = tuple[int, int]  # the first byte, and the one after the last


def copied_together(tensors: Iterable[Tensor], cast: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Cast the memory of tensors that overlap as a whole; gives the views of it in their place, by the tensors' ids.

    Tensors that overlap nothing are not in the result.

    >>> whole = torch.zeros(4)
    >>> made = copied_together([whole, whole[2:], torch.zeros(4)], torch.clone)
    >>> _ = made[id(whole)].fill_(1)
    >>> len(made), [view.sum().item() for view in made.values()]
    (2, [4.0, 2.0])
    """
    made: dict[int, Tensor] = {}
    for group in _overlapping({id(tensor): tensor for tensor in tensors}.values()):
        start, end = min(_extent(one)[0] for one in group), max(_extent(one)[1] for one in group)
        first = next(one for one in group if _extent(one)[0] == start)
        size, at = first.element_size(), first.storage_offset()
        memory = cast(first.detach().as_strided(((end - start) // size,), (1,), at))
        if memory.is_inference():  # the user made it in inference mode, and it could not be trained
            memory = memory.clone()
        for one in group:
            offset = memory.storage_offset() + (_extent(one)[0] - start) // size
            made[id(one)] = memory.as_strided(one.shape, one.stride(), offset)
    return made


def _overlapping(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group the tensors that share bytes, if they share them as numbers of one dtype."""
    groups: list[list[Tensor]] = []
    end = 0
    for tensor in sorted(filter(_has_memory, tensors), key=lambda one: (str(one.device), _extent(one))):
        first, last = _extent(tensor)
        if groups and groups[-1][0].device == tensor.device and first < end:
            groups[-1].append(tensor)
            end = max(end, last)
        else:
            groups.append([tensor])
            end = last
    return [group for group in groups if len(group) > 1 and len({one.dtype for one in group}) == 1]


def _has_memory(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    return is_plain and not tensor.is_meta and tensor.numel() > 0 and not tensor.is_conj() and not tensor.is_neg()


def _extent(tensor: Tensor) -> Extent:
    numbers = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + numbers * tensor.element_size()

"""What was recorded of a run: copies of tensors, of which those beyond a limit lie in a temporary file.

The maps of all modules of a network take many times the memory that running it takes, since a run frees each as soon as
it has been read. Each is needed again one or two times, so a file is enough. It has no name, and goes with the process.
"""

from __future__ import annotations

import tempfile
import weakref
from typing import IO, Any

import torch
from torch import Tensor, nn

from surgeon._torch_compat import pytree

IN_MEMORY = 64 * 2**20  # bytes of a recording that stay in memory
_SMALL = 2**16  # bytes of a tensor that always does


class Copies:
    """Copies of tensors as they are now; one that nothing has changed since is not copied again."""

    def __init__(self) -> None:
        self._left = IN_MEMORY
        self._known: dict[int, tuple[int, weakref.ref[Tensor], Tensor | InFile]] = {}  # by id: version, itself, copy
        self._file: _File | None = None

    def of(self, values: Any) -> Any:
        """Give the same values with a copy for each tensor, to be read with `read`."""
        return pytree.tree_map_only(Tensor, self._copy, values)

    def _copy(self, tensor: Tensor) -> Tensor | InFile:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
            return tensor.clone()
        version, itself, made = self._known.get(id(tensor), (-1, None, tensor))
        is_known = itself is not None and itself() is tensor and version == tensor._version
        if not (is_known and torch.equal(read(made), tensor)):  # `.data` can be changed without a new version
            made = self._kept(tensor.clone())
            self._known[id(tensor)] = (tensor._version, weakref.ref(tensor), made)
        return made

    def _kept(self, copy: Tensor) -> Tensor | InFile:
        """Keep a copy that belongs to nobody else, in memory or in the file."""
        size = copy.numel() * copy.element_size()
        if size < _SMALL or copy.device.type != "cpu" or size <= self._left or copy.is_conj() or copy.is_neg():
            self._left -= size
            return copy
        try:
            if self._file is None:
                self._file = _File()
            return InFile(copy, self._file)
        except OSError:  # no room there
            return copy


class _File:
    """A temporary file, closed when nothing that lies in it is read any more."""

    def __init__(self) -> None:
        file = tempfile.TemporaryFile(prefix="surgeon-")  # noqa: SIM115
        weakref.finalize(self, file.close)
        self.bytes: IO[bytes] = file


class InFile:
    """A tensor whose numbers lie in a file."""

    def __init__(self, tensor: Tensor, file: _File) -> None:
        tensor = tensor.detach()
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)  # that of its numbers in memory
        self._shape, self._dtype, self._file = tensor.permute(order).shape, tensor.dtype, file
        self._back = [order.index(i) for i in range(tensor.dim())]
        self._start = file.bytes.seek(0, 2)
        file.bytes.write(_bytes(tensor.permute(order).contiguous()))

    def read(self) -> Tensor:
        """Read it, with its numbers in the order in which they were in memory."""
        found = torch.empty(self._shape, dtype=self._dtype)
        self._file.bytes.seek(self._start)
        whole = _bytes(found)
        done = self._file.bytes.readinto(whole)  # type: ignore[attr-defined]
        if done != len(whole):
            raise OSError("the temporary file of the recording was cut off")
        return found.permute(self._back)


def read(values: Any) -> Any:
    """Give values that may lie in a file as tensors."""
    return pytree.tree_map_only(InFile, InFile.read, values)


def _bytes(tensor: Tensor) -> memoryview:
    """The numbers of a contiguous tensor, where they lie."""
    numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)

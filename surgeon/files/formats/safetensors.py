"""Files of tensors and nothing else, whose header can hold surgeon's manifest: https://github.com/huggingface/safetensors.

The first eight bytes are the length of the header, which is JSON.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from surgeon.errors import StoreError
from surgeon.files.faults import damaged
from surgeon.files.formats.base import MANIFEST, Format
from surgeon.files.pickles import Trust


class Safetensors(Format):
    """The tensors of a model, each of them once, and how their network is built."""

    name = ".safetensors files"
    suffixes = (".safetensors",)

    def knows(self, path: Path, head: bytes) -> bool:
        return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size

    def claims(self, path: Path) -> bool:
        return path.suffix in self.suffixes

    def read(self, path: Path, trust: Trust) -> Any:
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise damaged(path, error) from error

    def write(self, model: nn.Module, path: Path, manifest: str) -> None:
        tensors = _untied(model.state_dict())
        try:
            save_file(tensors, path, metadata={"format": "pt", MANIFEST: manifest})
        except SafetensorError as error:
            raise _not_written(error) from error
        except UnicodeEncodeError as error:
            raise StoreError(
                f"the name of a tensor holds half a character: {error.object!r}",
                todo="Rename its module, or write a .pt file.",
            ) from error

    def header(self, path: Path) -> Mapping[str, str]:
        try:
            with safe_open(path, framework="pt") as file:
                return dict(file.metadata() or {})
        except SafetensorError as error:
            raise damaged(path, error) from error


def _not_written(error: SafetensorError) -> OSError:
    """Say as the system does why a file could not be written; the library has it as text only."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor once, with memory of its own; the network itself knows its other names."""
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    tensors = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise StoreError(f"{key} is not a tensor, and safetensors holds only tensors", todo="Write a .pt file.")
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and first.setdefault(place, key) != key:
            continue
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensors[key] = tensor.detach().contiguous() if whole else tensor.detach().clone().contiguous()
    return tensors

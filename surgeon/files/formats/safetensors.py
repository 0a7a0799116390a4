"""Files of tensors and nothing else, whose header can hold surgeon's manifest: https://github.com/huggingface/safetensors.

The first eight bytes are the length of the header, which is JSON.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from surgeon.errors import ModelError, StoreError
from surgeon.files.faults import damaged
from surgeon.files.formats.base import MANIFEST, Format
from surgeon.files.pickles import Trust

_HASH = "surgeon.sha256"  # where the header keeps what the tensors and the rest of the header hash to


class Safetensors(Format):
    """The tensors of a model, each of them once, and how their network is built."""

    name = ".safetensors files"
    suffixes = (".safetensors",)

    def knows(self, path: Path, head: bytes) -> bool:
        return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size

    def claims(self, path: Path) -> bool:
        return path.suffix in self.suffixes

    def read(self, path: Path, trust: Trust) -> Any:
        return read_tensors(path)[0]

    def write(self, model: nn.Module, path: Path, manifest: str) -> None:
        try:
            write_tensors(_untied(model.state_dict()), {MANIFEST: manifest}, path)
        except UnicodeEncodeError as error:
            raise StoreError(
                f"the name of a tensor holds half a character: {error.object!r}",
                todo="Rename its module, or write a .pt file.",
            ) from error

    def header(self, path: Path) -> Mapping[str, str]:
        with _opened(path) as file:
            return dict(file.metadata() or {})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and the header of a file.

    Raises:
        ModelError: it is damaged: it cannot be read, or is not what its checksum was made of.
    """
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        header = dict(file.metadata() or {})
    if (written := header.get(_HASH)) and written != _hashed(tensors, header):
        raise ModelError(
            f"{path} is damaged, or was changed after surgeon wrote it: its tensors or its manifest are not those "
            "that its checksum was made of",
            todo=f"Copy it again; who changed it on purpose has to leave out '{_HASH}' in its metadata.",
        )
    return tensors, header


def write_tensors(tensors: dict[str, Tensor], said: Mapping[str, str], path: Path) -> None:
    """Write tensors with memory of their own, what the header says of them, and a checksum of both."""
    header = {"format": "pt", **said}
    try:
        save_file(tensors, path, metadata=header | {_HASH: _hashed(tensors, header)})
    except SafetensorError as error:
        raise _not_written(error) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file; whatever is wrong with its header or its tensors is a ModelError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise damaged(path, error) from error


def _hashed(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Hash names, dtypes, shapes and bytes of all tensors, and what the header says besides."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous()
        digest.update(f"{key!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if size := tensor.numel() * tensor.element_size():
            digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
    said = sorted((key, value) for key, value in header.items() if key != _HASH)
    digest.update(json.dumps(said).encode())
    return digest.hexdigest()


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

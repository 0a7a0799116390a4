"""Files of `torch.save`: a zip archive around a pickle, or the pickles in a row that torch < 1.6 wrote.

What the pickle may do is checked in `pickles`, the archive around it in `archives`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.errors import StoreError
from surgeon.files import archives, pickles
from surgeon.files.formats.base import Format
from surgeon.files.pickles import Trust

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch < 1.6 wrote first


class Pt(Format):
    """A model as it is, pickled; its history is an attribute of it."""

    name = "what torch.save writes"
    suffixes = (".pt", ".pth")
    holds_modules = True

    def knows(self, path: Path, head: bytes) -> bool:
        return head.startswith((_ZIP, _LEGACY))

    def read(self, path: Path, trust: Trust) -> Any:
        with path.open("rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
        if not is_zip:
            return pickles.read_legacy(path, trust)
        return pickles.read(path, trust, archives.records(path))

    def write(self, model: nn.Module, path: Path, manifest: str) -> None:
        try:
            with path.open("wb") as file:  # with a path alone, torch hides why it could not write
                torch.save(model, file)
        except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
            raise StoreError(
                f"the model cannot be written to {path.name}: {(str(error).splitlines() or [''])[0].rstrip('.')}",
                todo="Take what Python cannot pickle, such as a lambda, off the model; or write a .safetensors file.",
            ) from error

    def runs_unchecked(self, trust: Trust) -> bool:
        return trust.unsafe_pickle

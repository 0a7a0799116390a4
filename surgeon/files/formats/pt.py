"""Files of `torch.save`: a zip archive around a pickle, or the pickles in a row that torch < 1.6 wrote.

What the pickle may do is checked in `pickles`. A zip that holds a compiled program is refused.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.errors import ModelError
from surgeon.files import pickles
from surgeon.files.faults import compiled, damaged
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
        _check_zip(path)
        return pickles.read(path, trust)

    def write(self, model: nn.Module, path: Path, manifest: str) -> None:
        with path.open("wb") as file:  # with a path alone, torch hides why it could not write
            torch.save(model, file)

    def runs_unchecked(self, trust: Trust) -> bool:
        return trust.unsafe_pickle


def _check_zip(path: Path) -> None:
    """Refuse an archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise damaged(path, error) from error
    if "constants.pkl" in names:
        raise compiled(path, "a TorchScript program")
    if names & {"archive_format", "serialized_exported_program.json"}:
        raise compiled(path, "a torch.export program")
    if "data.pkl" not in names:
        raise ModelError(f"{path} is a zip that torch.save did not write", todo="Name the model file itself.")

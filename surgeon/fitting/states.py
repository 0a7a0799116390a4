"""Work that was interrupted goes on from a file: tensors, and in the metadata what they are, as JSON.

`identity` is a hash of all that the work depends on, so that no other work goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgeon.errors import StoreError
from surgeon.files.atomic import write_atomically

_START_ANEW = "Remove it to begin again, or name another file."


def identity_of(*parts: object) -> str:
    """Hash what work depends on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode(errors="backslashreplace")).hexdigest()


def write(path: Path, identity: str, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a state, in place of what was written before."""
    held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    about = {"surgeon": json.dumps({"identity": identity, **told})}
    write_atomically(path, lambda part: save_file(held, part, about), force=True)


def read(path: Path, identity: str, keys: Sequence[str], what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a state: what these keys tell, and the tensors.

    Raises:
        StoreError: it is damaged, or of other work.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file:
            told = json.loads((file.metadata() or {})["surgeon"])
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no dict
        found, found_identity = {key: told[key] for key in keys}, told["identity"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a state of {what}, or is damaged", todo=_START_ANEW) from error
    if found_identity != identity:
        raise StoreError(f"{path} is of a {what} with other networks, data or options", todo=_START_ANEW)
    return found, held

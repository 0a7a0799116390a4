"""What a file of tensors says about its network: how it is built, and the history of what was done to it.

It is JSON in the header of the file: {"format": 2, "architecture": {"name": …, "args": {…}} or null, "history": […]}.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from surgeon.files.architectures import Architecture
from surgeon.files.formats.base import MANIFEST
from surgeon.files.load import Loaded
from surgeon.surgery import history as histories
from surgeon.surgery.history import Operation

_HERE = "the manifest in the file"
_ARCHITECTURE = TypeAdapter(Architecture | None)


def manifest(model: nn.Module, architecture: Architecture | None) -> str:
    """Write the manifest of a model that is to be saved."""
    named = None if architecture is None else asdict(architecture)
    if not isinstance(stored := histories.as_data(model), dict):
        raise histories.foreign("the attribute surgeon_provenance of the model")
    return json.dumps({"architecture": named, **stored})


def read(text: str) -> tuple[Architecture | None, tuple[Operation, ...]]:
    """Read a manifest, which came with a file: how its network is built, and what was done to it.

    Raises:
        StoreError: it is not a manifest, or a later version has written it.
    """
    try:
        data: Any = json.loads(text)
        steps = histories.steps_in(data, _HERE)
        return _ARCHITECTURE.validate_python(data["architecture"]), steps
    except (ValidationError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise histories.foreign(_HERE) from error


def architecture_of(loaded: Loaded) -> Architecture | None:
    """Say how a loaded network is built, if the user named that now or when its file was written."""
    if loaded.architecture is not None or MANIFEST not in loaded.metadata:
        return loaded.architecture
    return read(loaded.metadata[MANIFEST])[0]

"""The contract of a file format: how a file of it is told from others, read and written.

A new format is one file in this folder with one subclass of `Format`; loading, saving and the command line find it by
themselves.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from surgeon.files.pickles import Trust

MANIFEST = "surgeon"  # where the header of a file keeps surgeon's own manifest


class Format(abc.ABC):
    """One kind of file that holds a model, or the tensors of one."""

    name: ClassVar[str]  # for messages
    suffixes: ClassVar[tuple[str, ...]]  # of the files that surgeon writes in this format
    holds_modules: ClassVar[bool] = False  # otherwise tensors only, and their network has to be named

    @abc.abstractmethod
    def knows(self, path: Path, head: bytes) -> bool:
        """Whether a file is of this format, by its first 64 bytes."""

    def claims(self, path: Path) -> bool:
        """Whether to try a file whose first bytes no format knows, so that the error says what is damaged."""
        return False

    @abc.abstractmethod
    def read(self, path: Path, trust: Trust) -> Any:
        """Read what the file holds: a module, tensors by name, or a checkpoint around one of the two.

        Raises:
            ModelError: it is damaged, or holds what may not be loaded.
        """

    @abc.abstractmethod
    def write(self, model: nn.Module, path: Path, manifest: str) -> None:
        """Write a model; `manifest` says how its network is built, for a format that does not hold modules.

        Raises:
            StoreError: the model holds something that the format cannot hold.
            OSError: the system does not let it be written, for example because the disk is full.
        """

    def header(self, path: Path) -> Mapping[str, str]:
        """Read what the file says about itself besides its content."""
        return {}

    def runs_unchecked(self, trust: Trust) -> bool:
        """Whether reading a file with such trust may run what it holds."""
        return False

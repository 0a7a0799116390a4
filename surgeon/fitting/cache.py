"""What depends on the images and the original only, kept in a folder for the next fit: tensors, by a hash of all that
they depend on.

    KEY.safetensors     the file that was not used for the longest time goes when the folder is larger than it may be

A file that is damaged, or cannot be written, is as if there were none.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from surgeon.errors import StoreError
from surgeon.fitting import states
from surgeon.fitting.processes import ALONE, Processes

_log = logging.getLogger("surgeon")
_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder of tensors that may have so many bytes; without a folder, nothing is kept."""

    folder: Path | None = None
    most: int = 2**31

    def kept(
        self, key: str, make: Callable[[], Mapping[str, Tensor]], processes: Processes = ALONE
    ) -> Mapping[str, Tensor]:
        """Give what is kept under a key (of `states.identity_of`), or make it and keep it.

        All processes call this, and only the first one uses the folder.
        """
        if self.folder is None:
            return make()
        found = processes.told(self._read(key) if processes.is_first else None)
        if found is not None:
            return found
        made = make()
        if processes.is_first:
            self._write(key, made)
        return made

    def _read(self, key: str) -> dict[str, Tensor] | None:
        assert self.folder is not None
        path = self.folder / f"{key}{_SUFFIX}"
        try:
            _, held = states.read(path, key, (), "cache")
        except StoreError:  # none, or a damaged one
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return held

    def _write(self, key: str, made: Mapping[str, Tensor]) -> None:
        assert self.folder is not None
        if sum(one.numel() * one.element_size() for one in made.values()) > self.most:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            states.write(self.folder / f"{key}{_SUFFIX}", key, {}, made)
            self._shrink()
        except (OSError, StoreError) as error:
            _log.warning("nothing is kept in the cache %s: %s", self.folder, error)

    def _shrink(self) -> None:
        """Remove files, that which was not used for the longest time first, until the rest is small enough."""
        assert self.folder is not None
        files = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process has removed it
                about = path.stat()
                files.append((about.st_mtime_ns, about.st_size, path))
        size = sum(one for _, one, _ in files)
        for _, one, path in sorted(files):
            if size <= self.most:
                return
            path.unlink(missing_ok=True)
            size -= one

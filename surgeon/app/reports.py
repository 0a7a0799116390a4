"""The files that `verify` writes besides what it prints: JUnit XML and Markdown."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgeon.app.terminal import write
from surgeon.display.junit import junit
from surgeon.display.markdown import markdown
from surgeon.files.atomic import claim, write_atomically
from surgeon.proof.report import Report

STDOUT = "-"
_log = logging.getLogger("surgeon")


@dataclass(frozen=True, slots=True)
class Reports:
    """Where the user wants a report to go besides the screen."""

    junit: Path | None = None
    markdown: str | None = None  # `-` is standard output, in place of the table
    force: bool = False
    begun: float = field(default_factory=time.perf_counter)

    @property
    def is_on_screen(self) -> bool:
        """Whether the Markdown takes the place of the table."""
        return self.markdown == STDOUT

    def claim(self, origins: Sequence[str | Path]) -> None:
        """Make sure, before any work is done, that they can be written; `origins` are the files that are read."""
        if self.junit is not None:
            claim(self.junit, force=self.force, suffixes=(".xml",), origins=origins)
        if self.markdown is not None and not self.is_on_screen:
            claim(Path(self.markdown), force=self.force, suffixes=(".md", ".markdown"), origins=origins)

    def write(self, report: Report, a: str, b: str) -> None:
        """Write them about two models with these names."""
        if self.junit is not None:
            seconds = time.perf_counter() - self.begun
            self._write(self.junit, junit(report, a, b, seconds))
        if self.markdown is not None:
            text = markdown(report, a, b)
            write(text) if self.is_on_screen else self._write(Path(self.markdown), text)

    def _write(self, path: Path, text: str) -> None:
        whole = text.encode("utf-8", "backslashreplace")
        write_atomically(path, lambda part: part.write_bytes(whole), force=self.force)
        _log.info(f"written: {path}")

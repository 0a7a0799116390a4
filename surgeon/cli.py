"""The first home of the command line, which console scripts of earlier installs call: `surgeon.cli:main`."""

from surgeon.app.cli import main

__all__ = ["main"]

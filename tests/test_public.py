"""What `import surgeon` offers, and the order of the files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import surgeon

PACKAGE = Path(surgeon.__file__).parent
ORDER = Path(PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", surgeon.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(surgeon, name)
    assert name == "__version__" or value.__doc__


def test_dir_is_all_that_is_public() -> None:
    assert dir(surgeon) == sorted(surgeon.__all__)


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'octave'"):
        _ = surgeon.octave


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    import surgeon.cli
    import surgeon.report  # imports everything

    assert all(callable(getattr(surgeon, name)) for name in ("plan", "verify", "survey", "convert", "fuse"))


def _floors() -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", ORDER[ORDER.index("| file |") :], re.MULTILINE)
    return [name.rstrip("/") for row in rows for name in re.findall(r"`([a-z_/]+)`", row)]


def _imports(path: Path) -> set[str]:
    """The surgeon modules that a file imports, but for what only a type checker reads."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "surgeon":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_file_imports_only_from_files_above_it(path: Path) -> None:
    floors = _floors()
    if path.stem.startswith("_"):
        return
    below = floors[floors.index(path.stem) :]
    assert not _imports(path) & set(below)

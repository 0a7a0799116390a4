"""Error messages about files that several readers need."""

from __future__ import annotations

import ast
import difflib
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from surgeon.errors import ModelError

_MODEL_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
_JOIN = "Load all parts into the network where it runs, save its state_dict as one file, and use that with --arch."


def missing(path: Path) -> ModelError:
    """Say that there is no such file, and which one may be meant."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        names = []
    if near := difflib.get_close_matches(path.name, names, cutoff=0.75):  # at 0.6 any two .pt files are alike
        return ModelError(f"there is no file {path}", todo=f"Did you mean {path.parent / near[0]}?")
    return ModelError(
        f"there is no file {path}", todo="A network of a library is named like this: torchvision:resnet50"
    )


def folder(path: Path) -> ModelError:
    """Say that a name is a folder's, and which file in it may be meant."""
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    weights = [name for name in files if name.endswith(_MODEL_FILES)]
    if any(name.endswith(".index.json") for name in files):
        return ModelError(f"{path} is a folder whose weights lie in {len(weights)} files", todo=_JOIN)
    what = "a Hugging Face folder" if "config.json" in files else "a folder"
    if weights:
        likely = next((name for name in weights if name in ("model.safetensors", "pytorch_model.bin")), weights[0])
        arch = ", and its network with --arch" if "config.json" in files else ""
        return ModelError(f"{path} is {what}", todo=f"Name the file of weights in it{arch}: {path / likely}")
    return ModelError(
        f"{path} is {what} without a model file", todo=f"Name a file ending in {', '.join(_MODEL_FILES)}."
    )


def no_file(path: Path, mode: int) -> ModelError:
    """Say that a name is that of something without an end, or that can be read only once."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return ModelError(
        f"{path} is {kinds.get(stat.S_IFMT(mode), 'not a file')}, and a model is read from a file",
        todo="Write it to a file first, and name that.",
    )


def part_of(path: Path, head: bytes) -> ModelError | None:
    """Say that a file is one part of a checkpoint, or the table of contents of one; None if it is neither."""
    if path.name.endswith(".index.json") and head.lstrip().startswith(b"{"):
        return ModelError(f"{path} lists which file holds which weights, and holds none itself", todo=_JOIN)
    if (found := _SHARD.search(path.name)) and int(found[2]) > 1:
        return ModelError(f"{path} is part {int(found[1])} of {int(found[2])} of a checkpoint", todo=_JOIN)
    return None


def damaged(path: Path, error: Exception) -> ModelError:
    """Say that a file cannot be read to its end."""
    why = str(error).removeprefix("Error while deserializing header: ").rstrip(".")
    return ModelError(f"{path} is damaged or cut short: {why}", todo="Copy or download it again.")


def source_code(path: Path) -> ModelError:
    """Say that a file is Python, and how the network in it is named."""
    try:
        found = [one.name for one in ast.parse(path.read_bytes()).body if isinstance(one, ast.ClassDef)]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        found = []
    named = [f"{path}:{name}" for name in found] or [f"{path}:Net"]
    return ModelError(
        f"{path} is Python code, which may hold several networks",
        todo=f"Name the class, or a function that returns the network: {' or '.join(named[:3])}",
    )


def compiled(path: Path, what: str) -> ModelError:
    """Say that a file holds a compiled program, not modules."""
    return ModelError(f"{path} is {what}: it holds no modules", todo="Name the nn.Module that it was made from.")


def few(words: Iterable[str]) -> str:
    """Name the first three, and say how many more there are.

    >>> few("abcde")
    'a, b, c, … 2 more'
    """
    words = list(words)
    return ", ".join(words[:3]) + (f", … {len(words) - 3} more" if len(words) > 3 else "")

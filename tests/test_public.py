"""What `import surgeon` offers, and the directions in which packages and files import."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import surgeon
import surgeon.blocks
import surgeon.nn

PACKAGE = Path(surgeon.__file__).parent
# A package imports only from packages before it. docs/architecture.md says what each is for.
PACKAGES = (
    *("errors", "_version", "_torch_compat", "display", "nn", "conv", "one_pass", "blocks", "models", "files"),
    *("analysis", "recipes", "octave", "channels", "proof", "surgery", "figures", "python", "fitting"),
    *("page", "api", "app", "cli", "__main__", "__init__"),
)
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", surgeon.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(surgeon, name)
    assert name == "__version__" or (value.__doc__ and not _is_signature(value.__doc__, name))


def _is_signature(said: str, name: str) -> bool:
    """Whether a docstring is what a dataclass has by itself."""
    return said.startswith(f"{name}(")


def test_a_dataclass_without_a_docstring_is_found() -> None:
    @dataclasses.dataclass
    class Nameless:
        x: int

    assert _is_signature(str(Nameless.__doc__), "Nameless")


@pytest.mark.parametrize("name", surgeon.nn.__all__)
def test_what_files_may_name_lies_at_one_address_and_its_examples_are_right(name: str) -> None:
    value = getattr(surgeon.nn, name)
    assert value.__module__ == "surgeon.nn"  # so doctest does not find it where its code is
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    home = vars(importlib.import_module(surgeon.nn.HOMES[name]))
    for test in doctest.DocTestFinder().find(value, name, globs=dict(home)):
        runner.run(test)
    assert not runner.failures


def test_every_old_address_leads_to_a_new_one() -> None:
    never_elsewhere = {
        "FrozenNorm",
        "NormRest",
        "PaddedConv2d",
        "PairFrozenNorm",
        "PairRest",
        "PairSyncNorm",
        "DiverseBranch",
        "HetInOnePass",
        "OnlineACBlock",
        "OnlineDiverseBranch",
        "OnlineRepVGG",
        "RepVGG",
        "StackedOctave",
    }  # since their first file
    assert {name.rpartition(".")[2] for name in surgeon.nn.MOVED.values()} | never_elsewhere == set(surgeon.nn.__all__)


def test_dir_is_all_that_is_public() -> None:
    assert dir(surgeon) == sorted(surgeon.__all__)


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'octave_'"):
        _ = surgeon.octave_


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    for path in FILES:
        if path.stem != "__main__":
            __import__(_dotted(path))
    assert all(callable(getattr(surgeon, name)) for name in ("plan", "verify", "survey", "convert", "fuse"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: _dotted(path))
def test_private_names_of_torch_are_named_in_one_file(path: Path) -> None:
    found = list(_private_names(path.read_text(encoding="utf-8")))
    assert found if path.name == "_torch_compat.py" else not found, found


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch._C.x",
        "import torch._dynamo",
        "import torch.fx._symbolic_trace as trace",
        "from torch.nn.modules.conv import _ConvNd",
        "from torch._ops import OpOverload",
        "from torch import nn\nnn.Conv2d._conv_forward",
        "from torch import fx as graphs\nx = graphs._symbolic_trace.Tracer()",
        "def f():\n    import torch as t\n    t._assert(1)",
    ],
)
def test_a_private_name_of_torch_is_found_however_it_is_reached(line: str) -> None:
    assert list(_private_names(line))
    assert not list(_private_names("import torch\ntorch.__version__, torch.nn.Conv2d.forward, model._modules"))


def _private_names(code: str) -> Iterator[str]:
    """The dotted names below torch, as they are imported or read, of which a part begins with an underscore."""
    tree = ast.parse(code)
    reached: dict[str, str] = {}  # the names of a file → what of torch they are
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torchs = [one for one in node.names if one.name.partition(".")[0] == "torch"]
            reached |= {one.asname or "torch": one.name if one.asname else "torch" for one in torchs}
            yield from filter(_is_private, (one.name for one in torchs))
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "torch":
            names = {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
            reached |= names
            yield from filter(_is_private, names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in reached and _is_private(f"{reached[head]}.{rest}"):
                yield f"{reached[head]}.{rest}"


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[str]:
    """The modules of surgeon that a file imports, but for what only a type checker reads."""
    known = {_dotted(file) for file in FILES}

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "surgeon":
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield full if full in known else str(child.module)
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names if alias.name.split(".")[0] == "surgeon")
            yield from walk(child)

    return walk(ast.parse(path.read_text(encoding="utf-8")))


def _package(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", FILES, ids=_dotted)
def test_a_file_imports_only_from_packages_above_its_own(path: Path) -> None:
    own = _package(_dotted(path))
    for name in _imports(path):
        assert PACKAGES.index(_package(name)) <= PACKAGES.index(own) or name == "surgeon._version", name


@pytest.mark.parametrize("package", [name for name in PACKAGES if (PACKAGE / name).is_dir()])
def test_inside_a_package_files_form_a_line(package: str) -> None:
    graph = {
        _dotted(path): {name for name in _imports(path) if _package(name) == package and name != _dotted(path)}
        for path in (PACKAGE / package).rglob("*.py")
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_a_file_that_imports_the_other_way_is_found(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from surgeon.app import cli\n")
    assert [_package(name) for name in _imports(file)] == ["app"]


# The files of each block; no other file may name its classes.
BLOCKS = {
    "ACBlock": {"surgeon.blocks.acblock"},
    "DiverseBranch": {"surgeon.blocks.dbb"},
    "HetConv": {"surgeon.blocks.hetconv"},
    "RepVGG": {"surgeon.blocks.repvgg"},
    "OctaveConv": {f"surgeon.blocks.{name}" for name in ("octave", "octave_step", "fused_octave", "stacked_octave")},
    "FusedOctave": {"surgeon.blocks.octave", "surgeon.blocks.fused_octave"},
    "StackedOctave": {"surgeon.blocks.octave", "surgeon.blocks.stacked_octave"},
}


def _named(text: str) -> set[str]:
    """The names in a file, also those of its imports and attributes."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {node.name.rpartition(".")[2], node.asname or node.name}
    return found


def _blocks_in(text: str) -> set[str]:
    return {block for block in BLOCKS for name in _named(text) if name in (block, f"{block}Options")}


@pytest.mark.parametrize("path", FILES, ids=_dotted)
def test_no_file_but_its_own_names_a_block(path: Path) -> None:
    if _dotted(path) in ("surgeon", "surgeon.nn"):
        return
    named = _blocks_in(path.read_text(encoding="utf-8"))
    assert not {block for block in named if _dotted(path) not in BLOCKS[block]}


def test_every_block_of_surgeon_is_among_those_that_no_file_names() -> None:
    ours = {block.__name__ for block in surgeon.blocks.registry().values() if block.__module__ == "surgeon.nn"}
    assert ours == set(BLOCKS) - {"FusedOctave", "StackedOctave"}


@pytest.mark.parametrize(
    "line",
    [
        "from surgeon.blocks.octave import OctaveConvOptions",
        "from surgeon.blocks.octave import OctaveConv as Conv",
        "isinstance(m, surgeon.nn.OctaveConv)",
        "def f(block: OctaveConv) -> None: ...",
    ],
)
def test_a_file_that_names_a_block_is_found(line: str) -> None:
    assert _blocks_in(line) == {"OctaveConv"}
    assert _blocks_in("# OctaveConv\n'OctaveConv'\nOctaveConvLike") == set()


def test_importing_leaves_the_random_state_where_it_was() -> None:
    code = (
        "import random, surgeon\n"
        "before = random.getstate()\n"
        "for name in surgeon.__all__: getattr(surgeon, name)\n"
        "assert random.getstate() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_no_two_files_of_tests_have_one_name() -> None:
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))  # pytest would not collect the second one

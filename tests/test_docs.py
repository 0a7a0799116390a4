"""The documentation says what the program does: its commands are run, its examples executed, its links followed."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import make_docs
import pytest
import test_public

import surgeon
from surgeon.fitting import stored
from surgeon.recipes import recipe
from surgeon.recipes.match import Match

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


_DISTANCE = re.compile(r"(?<![\w.])\d\.\de[-+]\d\d(?!\d)")  # 2.6e-08, a relative L2 or an absolute one
_SQNR = re.compile(r"(?<= )\d+\.\d(?= +\d\.\d{9} )")  # in dB, before a cosine
_ROUNDING = 1e-14  # in float64; a distance below it may as well be zero


def _differences(printed: str, said: str) -> list[tuple[str, str]]:
    """The lines in which two outputs differ by more than machines do: in their spaces, and how large distances are."""
    lines = zip_longest(printed.splitlines(), said.splitlines(), fillvalue="(nothing)")
    return [(one, other) for one, other in lines if not _same(one, other)]


def _same(one: str, other: str) -> bool:
    if _words(one) != _words(other):
        return False
    distances = zip(*(map(float, _DISTANCE.findall(line)) for line in (one, other)), strict=True)
    ratios = zip(*(map(float, _SQNR.findall(line)) for line in (one, other)), strict=True)
    return all(_near(a, b) for a, b in distances) and all(abs(a - b) < 20 for a, b in ratios)


def _words(line: str) -> list[str]:
    return _SQNR.sub("#", _DISTANCE.sub("#", line)).split()


def _near(a: float, b: float) -> bool:
    low, high = sorted((a, b))
    return high < _ROUNDING or high < 10 * low


def test_the_commands_of_the_readme_print_what_it_says() -> None:
    assert _differences(make_docs.with_outputs(README), README) == []


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("4 of 20 convs swapped", "5 of 20 convs swapped"),
        ("17.2 M → 11.7 M parameters", "17.2 M → 11.6 M parameters"),
        ("MACs 1.81 G → 2.08 G (×1.15)", "MACs 1.81 G → 2.08 G (×1.16)"),
        ("low share 0.5 → 0.5", "low share 0.5 → 0.25"),
        ("at most 1e-10", "at most 1e-09"),
        ("1×3×224×224  2.3e-08", "1×3×224×224  2.3e-06"),
        ("relative L2 0.0e+00, at most", "relative L2 2.1e-08, at most"),
        ("134.6  1.000000000", "99.6  1.000000000"),
        ("1.000000000  100.0%", "1.000000000  99.0%"),
        ("106 stored tensors", "107 stored tensors"),
        ("written: model.acnet.pt", "written: model.pt"),
        ("equivalent: B computes what A computes\n", "\n"),
    ],
)
def test_an_output_that_says_something_else_is_found(said: str, wrong: str) -> None:
    assert said in README
    assert len(_differences(README.replace(said, wrong, 1), README)) == 1


def test_a_line_too_many_is_found() -> None:
    assert _differences("one\ntwo\n", "one\n") == [("two", "(nothing)")]


def test_what_differs_between_machines_is_no_difference() -> None:
    here = "1×3×224×224  2.6e-08  3.4e-07  1.2e-06  1.6e-04    129.4  1.000000000  100.0%"
    there = "1×3×224×224  3.1e-08  1.4e-07  9.2e-07  4.6e-04   131.0  1.000000000  100.0%"
    assert _differences(here, there) == []
    assert _differences("relative L2 6.7e-16, at most 1e-10", "relative L2 0.0e+00, at most 1e-10") == []


def test_a_command_that_fails_is_not_written_into_the_readme() -> None:
    with pytest.raises(RuntimeError, match=r"exits with 2:\nsurgeon: .*nothing\.pt"):
        make_docs.with_outputs("```console\n$ surgeon survey nothing.pt\n```")


def test_the_readme_shows_commands() -> None:
    assert len(re.findall(r"^\$ surgeon (convert|fuse|verify|plan)", README, re.MULTILINE)) >= 4


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):  # the later ones go on from the first
        exec(compile(code, "README.md", "exec"), names)
    assert names["report"]
    assert type(names["again"]) is type(names["model"])
    told = surgeon.history(names["fitted"])[-1].measured["network"]
    assert told["fitted"]["relative_l2"] < told["converted"]["relative_l2"]


def test_the_sources_of_images_in_the_readme_are_those_that_there_are() -> None:
    table = README[README.index("| `--data` | the images |") : README.index("`--images 512` takes so many")]
    assert set(re.findall(r"`x(\.\w+)`", table)) == set(stored.SUFFIXES)


def test_the_recipe_of_the_readme_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert [rule.swap for rule in recipe.parse(text, "README.yaml").rules] == [None, "acblock"]


def test_the_fault_in_the_readme_is_what_a_wrong_recipe_gets() -> None:
    (line,) = re.findall(r"^    (acnet.yaml:7:11: .*)$", README, re.MULTILINE)
    text = "surgeon: 1\ntitle: T\n\n\n\nrules:\n  - swap: acblok\n"
    with pytest.raises(surgeon.errors.RecipeError) as caught:
        recipe.parse(text, "acnet.yaml")
    assert str(caught.value.faults[0]) == line


def test_every_match_key_is_in_the_readme() -> None:
    keys = {field.alias or name for name, field in Match.model_fields.items()}
    table = README[README.index("| `match` key") : README.index("Numbers may be single")]
    assert keys == set(
        re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:] if "|" in row))
    )


def test_every_bundled_recipe_is_in_the_readme() -> None:
    assert all(f"`{name}`" in README for name in recipe.bundled())


def test_the_reference_of_commands_is_fresh() -> None:
    assert make_docs.REFERENCE.read_text(encoding="utf-8") == make_docs.reference(), "run `make docs`"


def test_the_published_schema_is_the_one_that_the_program_prints() -> None:
    assert make_docs.SCHEMA.read_text(encoding="utf-8") == make_docs.schema(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def _on_the_map(text: str) -> list[str]:
    """The files that the list in docs/architecture.md names, in its order; a folder ends in a slash."""
    named, package = [], ""
    for indent, name in re.findall(r"^( *)- (?:\*\*)?`([\w/]+(?:/|\.py))`(?:\*\*)?: \S", text, re.MULTILINE):
        package = package if indent else name
        named.append(package + name if indent else name)
    return named


def _module(name: str) -> str:
    parts = name.removesuffix("/").removesuffix(".py").split("/")
    return ".".join(["surgeon", *parts] if parts != ["__init__"] else ["surgeon"])


def test_every_file_stands_on_the_map_and_nothing_else_does() -> None:
    named = [_module(name) for name in _on_the_map(MAP)]
    assert set(named) ^ {test_public._dotted(path) for path in test_public.FILES} == set()
    assert len(named) == len(set(named))


def test_a_file_on_the_map_imports_only_from_files_above_it() -> None:
    place = {_module(name): i for i, name in enumerate(_on_the_map(MAP))}
    for path in test_public.FILES:
        if path.name != "__init__.py":  # a folder is named above its files, and may offer what they have
            own = test_public._dotted(path)
            below = {name for name in set(test_public._imports(path)) - {"surgeon"} if place[name] > place[own]}
            assert not below, f"{own} stands above what it imports"


def test_the_packages_on_the_map_and_in_its_picture_stand_in_their_order() -> None:
    packages = [name.partition("/")[0].removesuffix(".py") for name in _on_the_map(MAP)]
    assert tuple(dict.fromkeys(packages)) == test_public.PACKAGES
    picture = MAP[MAP.index("subgraph order") : MAP.index("subgraph way")]
    chain = [name for line in re.findall(r"^ +(\w+ --> .*)$", picture, re.MULTILINE) for name in line.split(" --> ")]
    assert list(dict.fromkeys(chain)) == [name for name in test_public.PACKAGES if not name.startswith("_")]


@pytest.mark.parametrize(
    ("line", "name"),
    [("  - `fold.py`: ", "surgery/fold.py"), ("  - `rules/`: ", "octave/rules/"), ("- **`nn.py`**: ", "nn.py")],
)
def test_a_file_that_is_not_on_the_map_is_found(line: str, name: str) -> None:
    fewer = MAP.replace(line, "", 1)
    assert set(_on_the_map(MAP)) - set(_on_the_map(fewer)) == {name}

"""The documentation says what the program does: its commands are run, its examples executed, its links followed."""

from __future__ import annotations

import re
from pathlib import Path

import make_docs
import pytest

import surgeon
from surgeon.recipes import recipe
from surgeon.recipes.match import Match

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _without_numbers(text: str) -> list[str]:
    """What a command prints, but for what differs from one machine to the next: small distances and column widths."""
    text = re.sub(r"-?\d+(\.\d+)?(e[-+]\d+)?", "#", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_commands_of_the_readme_print_what_it_says() -> None:
    assert _without_numbers(make_docs.with_outputs(README)) == _without_numbers(README)


def test_the_readme_shows_commands() -> None:
    assert len(re.findall(r"^\$ surgeon (convert|fuse|verify|plan)", README, re.MULTILINE)) >= 4


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["report"]
    assert type(names["again"]) is type(names["model"])


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

"""YAML → frozen Recipe: rules that say which convs become which block, or are left alone and why.

    surgeon: 1                                  # format
    title: ACNet, keeping what the model has learnt
    cites: arXiv:1908.03930
    rules:                                      # the first rule that claims a conv wins
      - leave: the stem sees raw pixels
        match: {name: conv1}
        optional: true                          # may claim nothing
      - swap: acblock
        match: {kernel: [3, 5], groups: 1}      # every key must hold; of a list, one entry
        with: {init: takeover}                  # the options of the block

Everything is checked here, against the options of the blocks too, and all errors of a recipe are reported at once.
"""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from pathlib import Path, PurePath
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from surgeon.blocks import BlockOptions, registry
from surgeon.errors import Fault, RecipeError
from surgeon.recipes import forms, marks
from surgeon.recipes.forms import Form, did_you_mean, plain_words
from surgeon.recipes.marks import quoted
from surgeon.recipes.match import Match, Text, as_mapping, not_empty

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of a recipe: the convs that `match` claims become a block (`swap`), or stay as they are (`leave`)."""

    index: int
    where: str  # acnet.yaml:8:5; empty for a recipe that came as a dict
    match: Match
    swap: str | None  # the name of a block
    options: BlockOptions | None  # of that block
    leave: str | None  # the reason
    optional: bool  # may claim nothing

    def __str__(self) -> str:
        return f"rules[{self.index}]" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that has been checked; the first of its rules that claims a conv wins."""

    name: str  # acnet
    title: str
    cites: str | None
    rules: tuple[Rule, ...]
    text: str  # as it was written
    overrides: tuple[str, ...] = ()  # what --set changed in it


def load(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a bundled recipe by its name where there is no such file.

    Args:
        source: `my.yaml`, `acnet` or `acnet.yaml`.
        overrides: settings such as `rules[1].with.alpha=0.25`.

    Raises:
        RecipeError: no such recipe, or every error in it.
    """
    source, recipes = os.fspath(source), bundled()
    name = source.removesuffix(".yaml")
    found = recipes.get(name)
    if os.path.exists(source) and (found is None or os.path.isfile(source)):
        found = Path(source)
    if found is None:
        what = f"no recipe {quoted(source)}: it is neither a file nor bundled{did_you_mean(name, recipes)}"
        raise RecipeError([Fault("", "", what)], todo=f"Bundled: {', '.join(recipes)}.")
    return parse(text_of(found), found.name, overrides)


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from its text; `name` (acnet.yaml) stands in positions.

    >>> parse("{surgeon: 1, title: T, rules: [{swap: acblock}]}", "t.yaml").rules[0].where
    't.yaml:1:32'

    Raises:
        RecipeError: every error in the text and in the overrides.
    """
    marked = marks.read(text, name)
    for setting in overrides:
        marks.override_(marked, setting)
    form = forms.validate(RecipeForm, marked)
    rules = (
        Rule(index=i, where=marked.values["rules", i].where, **dict(rule_form))
        for i, rule_form in enumerate(form.rules)
    )
    return Recipe(
        name=PurePath(name).stem,
        title=form.title,
        cites=form.cites,
        rules=tuple(rules),
        text=text,
        overrides=tuple(overrides),
    )


def from_dict(data: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from plain data, which needs neither a format nor a title; its text is that data as YAML.

    >>> from_dict({"rules": [{"swap": "acblock"}]}).title
    'given from Python'

    Raises:
        RecipeError: every error, by its path alone.
    """
    try:
        text = marks.dump({"surgeon": FORMAT, "title": "given from Python", **data} if isinstance(data, dict) else data)
    except (yaml.YAMLError, RecursionError) as error:
        what = f"a recipe is made of dicts, lists, text, numbers and booleans ({error})"
        raise RecipeError([Fault("", "", what)]) from error
    return replace(parse(text, "", overrides), name="recipe")


def bundled() -> dict[str, Traversable]:
    """Find the recipes that come with surgeon, by name: inside the package, or beside it in a checkout."""
    folder = importlib.resources.files("surgeon.recipes") / "bundled"
    if not folder.is_dir():
        folder = Path(__file__).parents[2] / "recipes"
    files = {PurePath(file.name).stem: file for file in folder.iterdir() if file.name.endswith(".yaml")}
    return dict(sorted(files.items()))


_MOST = 2**26  # bytes of a recipe or plan; a device has no end


def text_of(file: Traversable) -> str:
    """Read a file of UTF-8 text; a pipe, which may never end, is not opened."""
    if isinstance(file, Path) and file.exists() and not (file.is_file() or file.is_dir()):
        raise RecipeError([Fault(str(file), "", "is not a regular file; write it to one, and name that")])
    try:
        with file.open("rb") as opened:
            raw = opened.read(_MOST + 1)
        if len(raw) > _MOST:
            raise RecipeError([Fault(file.name, "", f"larger than {_MOST >> 20} MB, which no recipe or plan is")])
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].split(b"\n")
        where = f"{file.name}:{len(before)}:{len(before[-1]) + 1}"
        raise RecipeError([Fault(where, "", "not UTF-8 text")]) from error
    except OSError as error:
        raise RecipeError([Fault(file.name or str(file), "", f"cannot be read: {error.strerror}")]) from error


def _known_block(name: str) -> str:
    if name not in registry():
        names = ", ".join(registry())
        raise ValueError(f"no block called {quoted(name)}; there are {names}{did_you_mean(name, registry())}")
    return name


def _known_format(number: int) -> int:
    if number != FORMAT:
        raise ValueError(f"format {number} is unknown; this surgeon reads format {FORMAT}")
    return number


class RuleForm(Form):
    """A rule as it is written: either swap or leave."""

    match: Annotated[Match, BeforeValidator(as_mapping)] = Field(default_factory=Match)
    swap: Annotated[Text, AfterValidator(_known_block)] | None = None
    leave: Annotated[Text, Field(description="why these convs stay as they are")] | None = None
    options: Annotated[BlockOptions | None, WithJsonSchema({"type": "object"})] = Field(
        default=None, alias="with", validate_default=True
    )
    optional: StrictBool = False

    @field_validator("leave")
    @classmethod
    def _either_or(cls, leave: str | None, info: ValidationInfo) -> str | None:
        if leave is not None and info.data.get("swap") is not None:
            raise ValueError("a rule has either swap or leave, not both")
        return leave

    @field_validator("options", mode="plain")
    @classmethod
    def _of_the_block(cls, value: object, info: ValidationInfo) -> BlockOptions | None:
        """Validate `with` as the options of the block, as strictly as JSON: no text for a number, lists for tuples."""
        swap = info.data.get("swap")
        if swap is not None:
            block = registry()[swap]
            with plain_words(block.Options):
                return block.Options.model_validate_json(json.dumps(as_mapping(value)), strict=True)
        if value is not None and info.data.get("leave") is not None:
            raise ValueError("`with` belongs to swap; a conv that is left has no options")
        return None

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.swap is None and self.leave is None:
            raise ValueError("a rule needs swap (a block) or leave (a reason)")
        return self


class RecipeForm(Form):
    """A recipe as it is written."""

    surgeon: Annotated[StrictInt, AfterValidator(_known_format), WithJsonSchema({"const": FORMAT})]
    title: Text
    cites: Text | None = None
    rules: Annotated[tuple[RuleForm, ...], AfterValidator(not_empty)]

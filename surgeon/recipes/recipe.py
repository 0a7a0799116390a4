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

Everything is checked here, against the options of the blocks too, and all faults are reported at once.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.resources.abc import Traversable
from pathlib import Path, PurePath
from typing import Annotated, Any, Protocol, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    StrictInt,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, models_json_schema
from pydantic_core import CoreSchema

from surgeon.blocks import BlockOptions, registry
from surgeon.conv.spec import ConvSpec, Pair
from surgeon.errors import Fault, RecipeError
from surgeon.models.sandbox import warnings_of_this_thread
from surgeon.recipes import marks as yamlmarks
from surgeon.recipes.marks import Form, did_you_mean, plain_words, shown

FORMAT = 1
T = TypeVar("T")
Seen = TypeVar("Seen", contravariant=True)


@dataclass(frozen=True, slots=True)
class Subject:
    """What rules look at in a conv: all its names, its geometry, its input's height and width, who reads its output."""

    paths: tuple[str, ...]
    spec: ConvSpec
    size: Pair | None
    followed_by: tuple[str, ...]


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
        RecipeError: no such recipe, or every fault of it.
    """
    source, recipes = os.fspath(source), bundled()
    name = source.removesuffix(".yaml")
    found = recipes.get(name)
    if os.path.exists(source) and (found is None or os.path.isfile(source)):
        found = Path(source)
    if found is None:
        what = f"no recipe {shown(source)}: it is neither a file nor bundled{did_you_mean(name, recipes)}"
        raise RecipeError([Fault("", "", what)], todo=f"Bundled: {', '.join(recipes)}.")
    return parse(text_of(found), found.name, overrides)


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from its text; `name` (acnet.yaml) stands in positions.

    >>> parse("{surgeon: 1, title: T, rules: [{swap: acblock}]}", "t.yaml").rules[0].where
    't.yaml:1:32'

    Raises:
        RecipeError: every fault of the text and of the overrides.
    """
    marked = yamlmarks.read(text, name)
    for setting in overrides:
        yamlmarks.override_(marked, setting)
    form = yamlmarks.validate(RecipeForm, marked)
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
    """Read a recipe from plain data; its text is that data as YAML.

    Raises:
        RecipeError: every fault, by its path alone.
    """
    try:
        text = yamlmarks.dump(data)
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


def schema() -> dict[str, Any]:
    """Make the JSON Schema of the format, for editors."""
    blocks = {name: block.Options for name, block in registry().items()}
    models: list[type[BaseModel]] = [RecipeForm, *blocks.values()]
    refs, made = models_json_schema([(model, "validation") for model in models], title="A surgeon recipe")
    for key in made["$defs"]["Match"]["properties"].values():
        key.pop("default", None)  # that the key is absent, which no value says
    rule = made["$defs"]["RuleForm"]
    rule["properties"]["swap"] = {"enum": list(blocks), "description": "the block to put in place of the conv"}
    rule["oneOf"] = [{"required": ["swap"]}, {"required": ["leave"], "properties": {"with": False}}]
    rule["allOf"] = [
        {
            "if": {"properties": {"swap": {"const": name}}, "required": ["swap"]},
            "then": {"properties": {"with": refs[options, "validation"]}},
        }
        for name, options in blocks.items()
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, **refs[RecipeForm, "validation"]}


def name_matches(glob: str, path: str) -> bool:
    """Whether a glob takes a whole dotted name: `*`, `?` and `[ab]` within a segment, `**` for any number of segments.

    >>> name_matches("layer1.*.conv?", "layer1.0.conv1"), name_matches("layer1.*", "layer1.0.conv1")
    (True, False)
    >>> name_matches("layer1.**", "layer1.0.conv1"), name_matches("layer1.**", "layer10.0.conv1")
    (True, False)
    >>> name_matches("**.conv1", "conv1")
    True
    """
    return _segments_match(glob.split("."), path.split("."))


def _segments_match(globs: list[str], names: list[str]) -> bool:
    if not globs:
        return not names
    head, *rest = globs
    if head == "**":
        return any(_segments_match(rest, names[i:]) for i in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], head) and _segments_match(rest, names[1:])


class Condition(Protocol[Seen]):
    """One entry of a `match` key."""

    def admits(self, value: Seen, /) -> bool: ...


class Span(Form):
    """Whole numbers from `min` to `max`, both included: {min: 3, max: 5}, or 3 for itself alone."""

    min: Annotated[StrictInt, Field(gt=0)] = 1
    max: Annotated[StrictInt, Field(gt=0)] = sys.maxsize

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        return value if isinstance(value, dict) else {"min": value, "max": value}

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("a range needs min, max or both")
        if self.min > self.max:
            raise ValueError(f"nothing lies between min {self.min} and max {self.max}")
        return self

    def admits(self, number: int) -> bool:
        return self.min <= number <= self.max


class Box(Form):
    """Pairs (height, width) with each side in its span: 1x7, or any span for both sides."""

    height: Span
    width: Span

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return {"height": value, "width": value}
        if not (sides := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value)):
            raise ValueError(f"{shown(value)} is not like 3, 1x7 or {{min: 3, max: 7}}")
        return {"height": int(sides[1]), "width": int(sides[2])}

    def admits(self, pair: Pair) -> bool:
        return self.height.admits(pair[0]) and self.width.admits(pair[1])


class Groups(Form):
    """A number of groups, or depthwise: as many as input channels."""

    depthwise: bool = False
    span: Span = Span(min=1)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if isinstance(value, str) and value != "depthwise":
            raise ValueError(f"{shown(value)} is neither a number nor depthwise{did_you_mean(value, ['depthwise'])}")
        return {"depthwise": True} if value == "depthwise" else {"span": value}

    def admits(self, spec: ConvSpec) -> bool:
        return spec.is_depthwise if self.depthwise else self.span.admits(spec.groups)


def _glob(text: str) -> str:
    if any("**" in segment and segment != "**" for segment in text.split(".")):
        raise ValueError(f"{shown(text)}: ** stands for whole segments, as in layer1.**.conv1; within one write *")
    return text


def _regex(text: str) -> str:
    try:
        with warnings_of_this_thread("error"):  # raised where Python may read the pattern otherwise one day
            re.compile(text)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        raise ValueError(f"{shown(text)} is no regular expression: {error}") from error
    return text


def _known_block(name: str) -> str:
    if name not in registry():
        names = ", ".join(registry())
        raise ValueError(f"no block called {shown(name)}; there are {names}{did_you_mean(name, registry())}")
    return name


def _known_format(number: int) -> int:
    if number != FORMAT:
        raise ValueError(f"format {number} is unknown; this surgeon reads format {FORMAT}")
    return number


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _not_empty(items: tuple[T, ...]) -> tuple[T, ...]:
    if not items:
        raise ValueError("the list is empty")
    return items


def _as_mapping(value: object) -> object:
    return {} if value is None else value


class _ItemOrList:
    """Tells the JSON Schema that one item may stand for a list of one."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        array = handler(schema)
        return {"anyOf": [array["items"], array | {"minItems": 1}]}


Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]
OneOrMore = Annotated[tuple[T, ...], BeforeValidator(_as_list), AfterValidator(_not_empty), _ItemOrList()]
_COUNT = {"type": "integer", "minimum": 1}
_RANGE = {"type": "object", "properties": {"min": _COUNT, "max": _COUNT}, "minProperties": 1}
_NUMBER = [_COUNT, _RANGE | {"additionalProperties": False}]
Numbers = OneOrMore[Annotated[Span, WithJsonSchema({"anyOf": _NUMBER})]]
Pairs = OneOrMore[
    Annotated[Box, WithJsonSchema({"anyOf": [*_NUMBER, {"type": "string", "pattern": "^[0-9]+x[0-9]+$"}]})]
]
GroupCounts = OneOrMore[Annotated[Groups, WithJsonSchema({"anyOf": [*_NUMBER, {"const": "depthwise"}]})]]


class Match(Form):
    """What a conv must be for a rule to claim it: every key given must hold, and of a list one entry."""

    names: OneOrMore[Annotated[Text, AfterValidator(_glob)]] = Field(default=(), alias="name")
    regex: Annotated[Text, AfterValidator(_regex)] = ""
    kernel: Pairs = ()
    stride: Pairs = ()
    dilation: Pairs = ()
    groups: GroupCounts = ()
    in_channels: Numbers = ()
    out_channels: Numbers = ()
    size: Pairs = ()
    followed_by: OneOrMore[Text] = ()
    unless: Annotated[Match | None, BeforeValidator(_as_mapping)] = Field(default=None, alias="not")

    @property
    def needs_size(self) -> bool:
        """Whether only a conv whose input's size is known can be judged."""
        return bool(self.size) or (self.unless is not None and self.unless.needs_size)

    def claims(self, subject: Subject) -> bool:
        """Whether all of it holds for a conv; its size must be known if `needs_size`."""
        spec = subject.spec
        assert not self.size or subject.size is not None, "ask needs_size first"
        return (
            (not self.names or any(name_matches(glob, path) for glob in self.names for path in subject.paths))
            and (not self.regex or any(re.fullmatch(self.regex, path) for path in subject.paths))
            and _holds(self.kernel, spec.kernel)
            and _holds(self.stride, spec.stride)
            and _holds(self.dilation, spec.dilation)
            and _holds(self.groups, spec)
            and _holds(self.in_channels, spec.c_in)
            and _holds(self.out_channels, spec.c_out)
            and (subject.size is None or _holds(self.size, subject.size))
            and (not self.followed_by or not set(self.followed_by).isdisjoint(subject.followed_by))
            and not (self.unless is not None and self.unless.claims(subject))
        )


def _holds(conditions: Sequence[Condition[T]], value: T) -> bool:
    """Whether a value is admitted by one of the conditions; without any, everything is."""
    return not conditions or any(condition.admits(value) for condition in conditions)


class RuleForm(Form):
    """A rule as it is written: either swap or leave."""

    match: Annotated[Match, BeforeValidator(_as_mapping)] = Field(default_factory=Match)
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
                return block.Options.model_validate_json(json.dumps(_as_mapping(value)), strict=True)
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
    rules: Annotated[tuple[RuleForm, ...], AfterValidator(_not_empty)]


def text_of(file: Traversable) -> str:
    """Read a file of UTF-8 text."""
    try:
        raw = file.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].split(b"\n")
        where = f"{file.name}:{len(before)}:{len(before[-1]) + 1}"
        raise RecipeError([Fault(where, "", "not UTF-8 text")]) from error
    except OSError as error:
        raise RecipeError([Fault(file.name or str(file), "", f"cannot be read: {error.strerror}")]) from error

"""What a rule asks of a conv: `Match` and its conditions, as they stand under the key `match` of a recipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Protocol, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    StrictInt,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from surgeon.conv.spec import ConvSpec, Pair
from surgeon.models.sandbox import warnings_of_this_thread
from surgeon.recipes.forms import Form, did_you_mean
from surgeon.recipes.marks import quoted

T = TypeVar("T")
Seen = TypeVar("Seen", contravariant=True)


@dataclass(frozen=True, slots=True)
class Subject:
    """What rules look at in a conv: all its names, its geometry, its input's height and width, who reads its output."""

    paths: tuple[str, ...]
    spec: ConvSpec
    size: Pair | None
    followed_by: tuple[str, ...]


def name_matches(glob: str, path: str) -> bool:
    """Whether a glob fits a whole dotted name: `*`, `?` and `[ab]` within a segment, `**` for any number of segments.

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
            raise ValueError(f"{quoted(value)} is not like 3, 1x7 or {{min: 3, max: 7}}")
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
            raise ValueError(f"{quoted(value)} is neither a number nor depthwise{did_you_mean(value, ['depthwise'])}")
        return {"depthwise": True} if value == "depthwise" else {"span": value}

    def admits(self, spec: ConvSpec) -> bool:
        return spec.is_depthwise if self.depthwise else self.span.admits(spec.groups)


def _glob(text: str) -> str:
    if any("**" in segment and segment != "**" for segment in text.split(".")):
        raise ValueError(
            f"{quoted(text)}: ** stands for whole segments, as in layer1.**.conv1; within a segment write *"
        )
    return text


def _regex(text: str) -> str:
    try:
        with warnings_of_this_thread("error"):  # raised where Python may read the pattern otherwise one day
            re.compile(text)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        raise ValueError(f"{quoted(text)} is not a regular expression: {error}") from error
    return text


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def not_empty(items: tuple[T, ...]) -> tuple[T, ...]:
    if not items:
        raise ValueError("the list is empty")
    return items


def as_mapping(value: object) -> object:
    return {} if value is None else value


class _ItemOrList:
    """Tells the JSON Schema that one item may stand for a list of one."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        array = handler(schema)
        return {"anyOf": [array["items"], array | {"minItems": 1}]}


Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]
OneOrMore = Annotated[tuple[T, ...], BeforeValidator(_as_list), AfterValidator(not_empty), _ItemOrList()]
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
    unless: Annotated[Match | None, BeforeValidator(as_mapping)] = Field(default=None, alias="not")

    @property
    def needs_size(self) -> bool:
        """Whether the input size of a conv has to be known."""
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

"""Plain data → pydantic models, and what is wrong with it in plain words, at its place in the file.

What is wrong is said where the model is known (`Form`, `plain_words`); where it stands is looked up where the file is
known (`validate`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from surgeon.errors import Fault, RecipeError
from surgeon.recipes.marks import Marked, Path, Place, in_file_order, path_text, quoted

_NOWHERE: Path = ()
Model = TypeVar("Model", bound=BaseModel)


class Form(BaseModel):
    """A mapping in a file: frozen, without unknown keys, and with its errors in plain words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _in_plain_words(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        with plain_words(cls):
            return handler(data)


@contextmanager
def plain_words(model: type[BaseModel]) -> Iterator[None]:
    """Say what pydantic finds while it validates `model` to a user who has never heard of pydantic."""
    try:
        yield
    except ValidationError as error:
        lines = []
        for details in error.errors(include_url=False):
            kind, what = _in_words(details, model.model_fields)
            said = PydanticCustomError(kind, "{what}", {"what": what})
            lines.append(InitErrorDetails(type=said, loc=details["loc"], input=details["input"]))
        raise ValidationError.from_exception_data(model.__name__, lines) from None


def validate(model: type[Model], marked: Marked, *, todo: str = "") -> Model:
    """Make a model of what was read.

    Raises:
        RecipeError: every error, of the YAML and of what it says, in file order.
    """
    try:
        made = model.model_validate(marked.data)
    except ValidationError as error:
        raise RecipeError(faults_of(error, marked), todo=todo) from error
    if marked.faults:
        raise RecipeError(in_file_order(marked.faults), todo=todo)
    return made


def faults_of(error: ValidationError, marked: Marked) -> list[Fault]:
    """Give a place to every error that pydantic found, and add those of the YAML itself; in file order."""
    found: dict[tuple[Place, str], list[str]] = {}
    for details in error.errors(include_url=False):
        kind, what = _in_words(details, {})
        path, missing = _NOWHERE, details["loc"]
        for i, part in enumerate(details["loc"], start=1):
            if (*path, part) in marked.values:  # the others name the members of unions, which no file has
                path, missing = (*path, part), details["loc"][i:]
        place = (marked.keys if kind == "unknown_key" else marked.values)[path]
        full = (*path, *missing) if kind == "missing" else path
        found.setdefault((place, path_text(full)), []).append(what)
    faults = list(marked.faults)
    for (place, shown_path), whats in found.items():  # several remarks on one value are one error
        faults.append((place, Fault(place.where, shown_path, " and ".join(dict.fromkeys(whats)))))
    return in_file_order(faults)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Suggest the nearest of the known words, if one is near.

    >>> did_you_mean("acblok", ["acblock", "octave"])
    " (did you mean 'acblock'?)"
    """
    near = nearest(str(word), known)
    return f" (did you mean '{near}'?)" if near is not None else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the known word that is nearest to another, however its letters are cased; None if none is near.

    >>> nearest("P", ["p", "layout"]), nearest("q", ["p", "layout"])
    ('p', None)
    """
    plain = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(word.casefold(), plain, n=1)
    return plain[near[0]] if near else None


_BOUNDS = {
    "greater_than": "{value} is not above {gt:g}",
    "greater_than_equal": "{value} is below {ge:g}",
    "less_than": "{value} is not below {lt:g}",
    "less_than_equal": "{value} is above {le:g}",
}
_WORDS = _BOUNDS | {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "{value} is not a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "{value} is not a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "{value} is neither true nor false"),
    **dict.fromkeys(("tuple_type", "list_type"), "{value} is not a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "{value} is not a mapping"),
    "string_type": "{value} is not text",
    "too_long": "a list of {actual_length} is longer than {max_length}",
    "string_pattern_mismatch": "{value} is not one of {choices}",
    "string_too_short": "{value} is empty",
    "value_error": "{error}",
    "missing": "missing",
}


def _in_words(details: ErrorDetails, fields: Mapping[str, FieldInfo]) -> tuple[str, str]:
    """Say what is wrong, and what kind of error it is: `missing`, `unknown_key` or `fault`."""
    kind, loc, context, value = details["type"], details["loc"], details.get("ctx", {}), quoted(details["input"])
    if kind in ("unknown_key", "fault"):  # said already, by a form inside this one
        return kind, details["msg"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return "unknown_key", f"unknown key {quoted(loc[-1])}" + (_keys_near(loc[0], fields) if len(loc) == 1 else "")
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        return "fault", f"{value} is not one of {', '.join(words)}{did_you_mean(details['input'], words)}"
    if kind in _BOUNDS and len(loc) == 1 and (interval := _interval(loc[0], fields)):
        return "fault", f"{value} is not in {interval}"
    if kind == "string_pattern_mismatch":  # all patterns here are lists of words
        choices = str(context["pattern"]).strip("^()$").split("|")
        context = context | {"choices": f"{', '.join(choices)}{did_you_mean(details['input'], choices)}"}
    words_of_kind = _WORDS.get(kind, "{value} does not fit: {msg}")
    return "missing" if kind == "missing" else "fault", words_of_kind.format(value=value, msg=details["msg"], **context)


def _keys_near(key: str | int, fields: Mapping[str, FieldInfo]) -> str:
    """List the known keys, and the one that may have been meant, by its own name or by the field's."""
    aliases = {name: info.alias or name for name, info in fields.items()}
    names = aliases | {alias: alias for alias in aliases.values()}
    near = nearest(str(key), names)
    hint = f" (did you mean '{names[near]}'?)" if near is not None else ""
    return f"; there are {', '.join(sorted(aliases.values()))}{hint}" if fields else ""


def _interval(key: str | int, fields: Mapping[str, FieldInfo]) -> str | None:
    """Write the bounds of a number as [low, high], if it has both."""
    rules = next((info.metadata for name, info in fields.items() if key == (info.alias or name)), [])
    low = [f"[{rule.ge}" if isinstance(rule, Ge) else f"({rule.gt}" for rule in rules if isinstance(rule, Ge | Gt)]
    high = [f"{rule.le}]" if isinstance(rule, Le) else f"{rule.lt})" for rule in rules if isinstance(rule, Le | Lt)]
    return f"{low[0]}, {high[0]}" if low and high else None

"""Faults in plain words, of any form."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pydantic
import pytest
from pydantic import BaseModel, Field

from surgeon.errors import RecipeError
from surgeon.recipes import forms, marks


class Dial(forms.Form):
    alpha: float = Field(0.5, ge=0, le=1)
    beta: float = Field(0.5, gt=0, lt=1)
    parts: int | Literal["all"] = 1
    low: int = Field(5, ge=2)
    sub: Dial | None = None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("alpha: 1.5", ["1:8: alpha: 1.5 is not in [0, 1]"]),
        ("sub: {alpha: -1}", ["1:14: sub.alpha: -1 is not in [0, 1]"]),
        ("beta: 0", ["1:7: beta: 0 is not in (0, 1)"]),
        ("low: 1", ["1:6: low: 1 is below 2"]),
        ("parts: al", ["1:8: parts: 'al' is not a whole number and 'al' is not one of all (did you mean 'all'?)"]),
        ("sub: {sub: {bta: 1}}", ["1:13: sub.sub.bta: unknown key 'bta'; there are alpha, beta, low, parts, sub "]),
    ],
)
def test_any_form_gets_faults_in_plain_words(text: str, found: list[str]):
    with pytest.raises(RecipeError, match="Look there") as caught:
        forms.validate(Dial, marks.read(text, "a.yaml"), todo="Look there.")
    for fault, start in zip(caught.value.faults, found, strict=True):
        assert str(fault).startswith(f"a.yaml:{start}")


def test_a_model_that_is_no_form_gets_them_too():
    class Plain(BaseModel, extra="forbid"):
        size: int

    with pytest.raises(RecipeError) as caught:
        forms.validate(Plain, marks.read("size: a\nsze: 1\n", "a.yaml"))
    assert list(map(str, caught.value.faults)) == [
        "a.yaml:1:7: size: 'a' is not a whole number",
        "a.yaml:2:1: sze: unknown key 'sze'",
    ]


def test_a_dataclass_in_a_form_gets_them_too():
    @dataclasses.dataclass
    class Size:
        side: int

    with pytest.raises(RecipeError) as caught:
        forms.validate(
            pydantic.create_model("Sizes", __base__=forms.Form, size=(Size, ...), other=(Size, ...)),
            marks.read("size: 3\nother: {side: 1, sdie: 2}\n", "a.yaml"),
        )
    assert list(map(str, caught.value.faults)) == [
        "a.yaml:1:7: size: 3 is not a mapping",
        "a.yaml:2:18: other.sdie: unknown key 'sdie'",
    ]

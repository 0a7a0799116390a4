"""Odd values in a plan are found when it is read, each at its place and in words that say what is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from torch import nn

import surgeon
from surgeon.errors import PlanError, RecipeError
from surgeon.surgery import plan as plans

CONV = {
    "c_in": [
        (True, "true is not a whole number"),
        ("8", "'8' is not a whole number"),
        (8.0, "8.0 is not a whole number"),
        (-1, "-1 is below 0"),
    ],
    "kernel": [
        ([3, 3, 3], "a list of 3 is longer than 2"),
        (3, "3 is not a list"),
        ([0, 3], "0 is below 1"),
        ([True, 3], "true is not a whole number"),
        ([3], "kernel[1]: missing"),
    ],
    "stride": [([-1, 1], "-1 is below 1")],
    "padding": [("sam", "'sam' is not one of same, valid (did you mean 'same'?)"), ([-1, 1], "-1 is below 0")],
    "groups": [(True, "true is not a whole number"), (0, "0 is below 1")],
    "bias": [(1, "1 is neither true nor false"), ("yes!", "'yes!' is neither true nor false")],
    "padding_mode": [("zeroes", "'zeroes' is not one of zeros, reflect, replicate, circular (did you mean 'zeros'?)")],
}
ENTRY = {
    "calls": [(True, "true is not a whole number"), (-1, "-1 is below 0")],
    "size": [([1, 2, 3], "a list of 3 is longer than 2"), ([True, 2], "true is not a whole number")],
    "params": [({"before": True, "after": 2}, "true is not a whole number")],
}
WHOLE = {
    "surgeon-plan": [
        (True, "true is not one of 1 or 2"),
        (2.0, "2.0 is not one of 1 or 2"),
        ("2", "'2' is not one of 1 or 2"),
        (3, "format 3 was written by a later version of surgeon"),
    ],
    "seed": [(True, "true is not a whole number"), ("1", "'1' is not a whole number")],
    "input": [([[True, 3, 8, 8]], "true is not a whole number"), ([[1, 3, -8, 8]], "-8 is below 0")],
}
PLACES = {"conv": CONV, "entry": ENTRY, "plan": WHOLE}
CASES = [
    (place, key, value, said)
    for place, keys in PLACES.items()
    for key, values in keys.items()
    for value, said in values
]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))


def planned() -> dict[str, Any]:
    return surgeon.plan(network(), "acnet", (1, 3, 8, 8)).to_dict()


@pytest.mark.parametrize(("place", "key", "value", "said"), CASES)
def test_it_is_found_when_the_plan_is_read(place: str, key: str, value: object, said: str) -> None:
    plan = copy.deepcopy(planned())
    {"conv": plan["convs"][1]["conv"], "entry": plan["convs"][1], "plan": plan}[place][key] = value
    with pytest.raises(RecipeError) as found:
        plans.parse(yaml.safe_dump(plan), "plan.yaml")
    assert said in str(found.value)
    assert "plan.yaml:" in str(found.value)
    assert not any(word in str(found.value) for word in ("validation", "Input should", "Tuple", "pydantic"))


def test_what_is_written_is_read_and_carried_out() -> None:
    plan = plans.parse(yaml.safe_dump(planned()), "plan.yaml")
    assert type(surgeon.convert(network(), plan)[0]).__name__ == "ACBlock"


def test_options_are_refused_in_plain_words() -> None:
    plan = planned()
    plan["convs"][1]["with"] = {"init": "takover"}
    with pytest.raises(PlanError, match=r"with.init: 'takover' is not one of takeover, split, scratch \(did you mean"):
        surgeon.convert(network(), plans.parse(yaml.safe_dump(plan), "plan.yaml"))

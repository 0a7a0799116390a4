"""YAML as it is read: scalars of YAML 1.2, and what is written is read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yamls import unhurried

from surgeon.recipes import marks


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2001-01-01", "2001-01-01"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("012", 12),
        ("-3", -3),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("'012'", "012"),
        ("1x7", "1x7"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, means: object):
    value = marks.read(f"a: {written}", "a.yaml").data["a"]
    assert value == means
    assert type(value) is type(means)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("no1e-3_:."),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1-", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@unhurried
@given(plain)
def test_what_is_dumped_is_read_back_as_it_was(value: object):
    assert marks.read(marks.dump({"a": value}), "").data == {"a": value}

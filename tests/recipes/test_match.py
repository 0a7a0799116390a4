"""What a match means, and what it may not say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yamls import SPEC, faults, rules, unhurried

from surgeon.conv.spec import ConvSpec
from surgeon.recipes import recipe
from surgeon.recipes.match import Match, Subject, name_matches


def match_fault(match: str) -> str:
    """Read one rule with this match; give its only fault, without the place."""
    [fault] = faults(rules(f"  - swap: acblock\n    match: {{{match}}}\n"))
    return fault.partition(": ")[2].removeprefix("rules[0].match.")


def matching(match: str) -> Match:
    return recipe.parse(rules(f"  - swap: acblock\n    match: {{{match}}}\n"), "a.yaml").rules[0].match


def claims(match: str, spec: ConvSpec = SPEC, **facts: object) -> bool:
    subject = {"paths": ("layer1.0.conv1",), "size": (56, 56), "followed_by": ("BatchNorm2d",)} | facts
    return matching(match).claims(Subject(spec=spec, **subject))


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        ("", True),
        ("kernel: 3", True),
        ("kernel: 5", False),
        ("kernel: [5, 3]", True),
        ("kernel: {min: 3}", True),
        ("kernel: {max: 2}", False),
        ("kernel: {min: 2, max: 4}", True),
        ("kernel: [1x1, {min: 5}]", False),
        ("kernel: 3, stride: 1", False),
        ("kernel: 3, stride: 2, dilation: 1", True),
        ("in_channels: 8, out_channels: {min: 16}", True),
        ("in_channels: [4, 16]", False),
        ("groups: 1", True),
        ("groups: depthwise", False),
        ("size: 56", True),
        ("size: {max: 28}", False),
        ("followed_by: BatchNorm2d", True),
        ("followed_by: [ReLU, BatchNorm2d]", True),
        ("followed_by: BatchNorm", False),
        ("name: layer1.*.conv1", True),
        ("name: [conv1, layer1.**]", True),
        ("name: conv1", False),
        ("regex: 'layer[0-9].*'", True),
        ("regex: layer1", False),
        ("not: {kernel: 3}", False),
        ("not: {kernel: 3, stride: 1}", True),
        ("kernel: 3, not: {name: conv1}", True),
        ("not: {not: {kernel: 3}}", True),
        ("not: {}", False),
    ],
)
def test_a_match_claims(match: str, holds: bool):
    assert claims(match) is holds


@pytest.mark.parametrize("match", ["", "    match: {}\n", "    match:\n"])
def test_an_empty_match_claims_every_conv(match: str):
    [rule] = recipe.parse(rules("  - swap: acblock\n" + match), "a.yaml").rules
    assert rule.match.claims(Subject(("any",), SPEC, None, ()))


def test_a_pair_is_height_by_width():
    strip = SPEC.change(kernel=(1, 7))
    assert claims("kernel: 1x7", strip)
    assert not claims("kernel: 7x1", strip)
    assert not claims("kernel: {min: 3}", strip)
    assert not claims("kernel: {max: 5}", strip)
    assert claims("kernel: {min: 1, max: 7}", strip)
    assert claims("size: 56x28", size=(56, 28))
    assert not claims("size: 56", size=(56, 28))


def test_depthwise_is_one_group_for_each_channel():
    assert claims("groups: depthwise", SPEC.change(groups=8))
    assert not claims("groups: depthwise", SPEC.change(groups=4))
    assert claims("groups: [depthwise, 4]", SPEC.change(groups=4))
    assert claims("groups: {min: 2}", SPEC.change(groups=4))


def test_any_of_several_names_will_do():
    names = ("stem.conv", "shared.conv")
    assert claims("name: shared.*", paths=names)
    assert claims("regex: 'shared[.]conv'", paths=names)
    assert not claims("not: {name: shared.*}", paths=names)


def test_a_match_knows_whether_it_needs_sizes():
    assert matching("size: 7").needs_size
    assert matching("not: {size: 7}").needs_size
    assert not matching("kernel: 7").needs_size
    assert claims("kernel: 3", size=None)
    with pytest.raises(AssertionError):
        claims("size: 7", size=None)


@pytest.mark.parametrize(
    ("glob", "path", "holds"),
    [
        ("layer1", "layer1", True),
        ("layer1", "layer10", False),
        ("layer1", "layer1.0", False),
        ("layer1.*", "layer1.0", True),
        ("layer1.*", "layer10.0", False),
        ("layer1.*", "layer1.0.conv1", False),
        ("*", "conv1", True),
        ("*", "layer1.conv1", False),
        ("layer*.0", "layer12.0", True),
        ("layer*.0", "layer1.x.0", False),
        ("layer1.**", "layer1.0.conv1", True),
        ("layer1.**", "layer10.0.conv1", False),
        ("**", "a.b.c", True),
        ("**.conv1", "conv1", True),
        ("**.conv1", "a.b.conv1", True),
        ("**.conv1", "a.b.myconv1", False),
        ("a.**.z", "a.z", True),
        ("a.**.z", "a.b.c.z", True),
        ("conv?", "conv1", True),
        ("conv?", "conv", False),
        ("a?b", "a.b", False),
        ("layer[12].0", "layer2.0", True),
        ("layer[!12].0", "layer2.0", False),
        ("a[!x]b", "a.b", False),
        ("Conv1", "conv1", False),
        ("a.b", "axb", False),
    ],
)
def test_globs(glob: str, path: str, holds: bool):
    assert name_matches(glob, path) is holds


paths = st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join)


@unhurried
@given(paths, paths)
def test_a_name_without_wildcards_takes_only_itself(glob: str, path: str):
    assert name_matches(glob, path) is (glob == path)


@unhurried
@given(paths, paths)
def test_a_star_is_one_segment_and_two_are_any_number(prefix: str, path: str):
    rest = path.removeprefix(prefix + ".") if path.startswith(prefix + ".") else None
    assert name_matches(f"{prefix}.*", path) is (rest is not None and "." not in rest)
    assert name_matches(f"{prefix}.**", path) is (rest is not None or path == prefix)
    assert name_matches(f"**.{path}", f"{prefix}.{path}")


@pytest.mark.parametrize(
    ("match", "fault"),
    [
        ("kernel: 1.5", "kernel: 1.5 is not a whole number"),
        ("kernel: true", "kernel: true is not a whole number"),
        ("kernel: '3'", "kernel: '3' is not like 3, 1x7 or {min: 3, max: 7}"),
        ("kernel: 0x3", "kernel: 0 is not above 0"),
        ("kernel: [3, [5]]", "kernel[1]: a list is not a whole number"),
        ("kernel: null", "kernel: null is not a whole number"),
        ("kernel: []", "kernel: the list is empty"),
        ("kernel: {}", "kernel: a range needs min, max or both"),
        ("kernel: {min: 5, max: 3}", "kernel: nothing lies between min 5 and max 3"),
        ("kernel: {min: 0}", "kernel.min: 0 is not above 0"),
        ("in_channels: {max: 1.5}", "in_channels.max: 1.5 is not a whole number"),
        ("in_channels: 1x7", "in_channels: '1x7' is not a whole number"),
        ("groups: null", "groups: null is not a whole number"),
        ("name: ''", "name: '' is empty"),
        ("name: [a, 3]", "name[1]: 3 is not text"),
        ("name: null", "name: null is not text"),
        ("regex: null", "regex: null is not text"),
        ("regex: '[[a]'", "regex: '[[a]' is not a regular expression: Possible nested set at position 1"),
        ("regex: 'a{99999999999}'", "regex: 'a{99999999999}' is not a regular expression: the repetition number is"),
        ("followed_by: 3", "followed_by: 3 is not text"),
        ("name: 'layer**'", "name: 'layer**': ** stands for whole segments, as in layer1.**.conv1; within one"),
        ("not: {not: {stride: -1}}", "not.not.stride: -1 is not above 0"),
    ],
)
def test_faults_of_a_match(match: str, fault: str):
    assert match_fault(match).startswith(fault)

"""What a recipe may say, what it means, and where its errors are."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yamls import HEAD, SPEC, faults, rules, unhurried

from surgeon.blocks import registry
from surgeon.blocks.acblock import ACBlockOptions
from surgeon.errors import RecipeError
from surgeon.recipes import recipe
from surgeon.recipes.match import Subject
from surgeon.recipes.recipe import Recipe

# What is read


def test_a_recipe_is_read_whole():
    text = dedent("""\
        # a comment
        surgeon: 1
        title: ACNet, keeping what the model has learnt
        cites: arXiv:1908.03930
        rules:
          - leave: the stem sees raw pixels
            match: {name: "conv1"}
            optional: true
          - swap: acblock
            match: {kernel: [3, 5], groups: 1}
            with: {init: split}
        """)
    read = recipe.parse(text, "acnet.yaml")
    stem, block = read.rules
    assert (read.name, read.title, read.cites) == (
        "acnet",
        "ACNet, keeping what the model has learnt",
        "arXiv:1908.03930",
    )
    assert read.text == text
    assert (stem.leave, stem.swap, stem.options, stem.optional) == ("the stem sees raw pixels", None, None, True)
    assert (block.leave, block.swap, block.optional) == (None, "acblock", False)
    assert block.options == ACBlockOptions(init="split")
    assert (stem.where, block.where) == ("acnet.yaml:6:5", "acnet.yaml:9:5")
    assert str(block) == "rules[1] (acnet.yaml:9:5)"


def test_options_are_the_blocks_own_where_nothing_is_said():
    for said in ("", "    with: {}\n", "    with:\n"):
        assert recipe.parse(rules("  - swap: acblock\n" + said), "a.yaml").rules[0].options == ACBlockOptions()


def test_a_recipe_cannot_be_changed():
    read = recipe.load("acnet")
    with pytest.raises(AttributeError):
        read.title = "other"
    with pytest.raises(ValueError):
        read.rules[0].match.regex = "other"
    assert hash(read) == hash(recipe.load("acnet"))


def test_anchors_may_be_used():
    text = rules("  - swap: acblock\n    match: &m {kernel: 3}\n  - leave: why\n    match: {not: *m}\n")
    assert recipe.parse(text, "a.yaml").rules[1].match.unless == recipe.parse(text, "a.yaml").rules[0].match


# All errors at once, and where they are


def test_every_fault_is_reported_with_its_place_in_file_order():
    text = dedent("""\
        surgeon: 1
        ttle: ACNet
        rules:
          - swap: acblok
            optoins: {}
          - swap: acblock
            match: {kernal: 3, groups: depthwize, stride: [1, 0], regex: "(", size: {mn: 3}}
            with: {init: takeovr, placement: 3, gamma: 1.5, gama: 2}
            optional: yes
          - leave: because
            with: {init: split}
          - leave: both
            swap: acblock
          - match: {kernel: 3}
          - swap: acblock
            with: {gamma: -1}
          - 7
        """)
    assert faults(text) == [
        "a.yaml:1:1: title: missing",
        "a.yaml:2:1: ttle: unknown key 'ttle'; there are cites, rules, surgeon, title (did you mean 'title'?)",
        f"a.yaml:4:11: rules[0].swap: no block called 'acblok'; there are {', '.join(registry())} "
        "(did you mean 'acblock'?)",
        "a.yaml:5:5: rules[0].optoins: unknown key 'optoins'; there are leave, match, optional, swap, with "
        "(did you mean 'with'?)",
        "a.yaml:7:13: rules[1].match.kernal: unknown key 'kernal'; there are dilation, followed_by, groups, "
        "in_channels, kernel, name, not, out_channels, regex, size, stride (did you mean 'kernel'?)",
        "a.yaml:7:32: rules[1].match.groups: 'depthwize' is neither a number nor depthwise (did you mean 'depthwise'?)",
        "a.yaml:7:55: rules[1].match.stride[1]: 0 is not above 0",
        "a.yaml:7:66: rules[1].match.regex: '(' is not a regular expression: missing ), unterminated subpattern at "
        "position 0",
        "a.yaml:7:78: rules[1].match.size.mn: unknown key 'mn'; there are max, min (did you mean 'min'?)",
        "a.yaml:8:18: rules[1].with.init: 'takeovr' is not one of takeover, split, scratch (did you mean 'takeover'?)",
        "a.yaml:8:38: rules[1].with.placement: 3 is not one of skeleton, border",
        "a.yaml:8:53: rules[1].with.gama: unknown key 'gama'; there are form, gamma, init, placement (did you mean "
        "'gamma'?)",
        "a.yaml:9:15: rules[1].optional: 'yes' is neither true nor false",
        "a.yaml:11:11: rules[2].with: `with` belongs to swap; a conv that is left has no options",
        "a.yaml:12:12: rules[3].leave: a rule has either swap or leave, not both",
        "a.yaml:14:5: rules[4]: a rule needs swap (a block) or leave (a reason)",
        "a.yaml:16:19: rules[5].with.gamma: -1 is not above 0",
        "a.yaml:17:5: rules[6]: 7 is not a mapping",
    ]


def test_the_message_counts_the_faults_and_ends_with_a_next_step():
    with pytest.raises(RecipeError, match=r"(?s)a.yaml:2:1.*\n2 errors\. `surgeon recipes acnet`"):
        recipe.parse("surgeon: 1\nfoo: 2\nrules: [leave: x]", "a.yaml")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "a.yaml:1:1: nothing is written here"),
        ("# only a comment\n", "a.yaml:1:1: nothing is written here"),
        ("- a\n", "a.yaml:1:1: a mapping (key: value) is needed, not a list"),
        ("\n\n  7", "a.yaml:3:3: a mapping (key: value) is needed, not 7"),
        ("a: [1\nb: 2", "a.yaml:2:2: not YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n  b: 2", "a.yaml:2:4: not YAML: mapping values are not allowed here"),
        ("a: *b", "a.yaml:1:4: not YAML: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2", "a.yaml:2:1: a second document starts here; only one is read"),
        ("a: &a [*a]", "a.yaml:1:4: an alias that contains itself"),
        ("a: b\nc: d\0", "a.yaml:2:5: the character U+0000 is not allowed in YAML"),
        ('a: "\\UFFFFFFFF"', "a.yaml:1:7: not YAML: a number out of bounds"),
        ("[" * 500, "a.yaml:1:1: nested deeper than 50 levels"),
        ("a: " + "[" * 60 + "]" * 60, "a.yaml:1:54: nested deeper than 50 levels"),
    ],
)
def test_a_text_that_is_no_mapping_is_one_fault(text: str, fault: str):
    assert faults(text) == [fault]


def test_aliases_may_not_multiply():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    [fault] = faults("\n".join(lines))
    assert "aliases that unfold to more than 10,000 values" in fault


def test_what_yaml_allows_and_would_surprise_is_refused_together_with_everything_else():
    text = dedent("""\
        surgeon: 1
        title: a
        title: b
        base: &base {swap: acblock}
        rules:
          - <<: *base
            leave: !!python/object/apply:os.system [echo]
            match: {kernel: 3, kernel: 5}
            ? [complex]
            : 3
          - leave: !!str 12
        """)
    assert faults(text) == [
        "a.yaml:3:1: title: this key is given twice",
        "a.yaml:4:1: base: unknown key 'base'; there are cites, rules, surgeon, title",
        "a.yaml:6:5: rules[0]: merge keys (<<) are not read; write the keys out",
        "a.yaml:7:12: rules[0].leave: the tag '!!python/object/apply:os.system' is refused: "
        "only plain values are allowed",
        "a.yaml:7:12: rules[0].leave: a list is not text",
        "a.yaml:8:24: rules[0].match.kernel: this key is given twice",
        "a.yaml:9:7: rules[0]: a key is a word, not a list or a mapping",
        "a.yaml:11:12: rules[1].leave: the tag '!!str' is refused: only plain values are allowed",
    ]


def test_a_duplicate_key_alone_is_enough():
    assert faults(rules("  - swap: acblock\n    swap: acblock\n")) == [
        "a.yaml:5:5: rules[0].swap: this key is given twice"
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("title: T\nrules: [leave: x]", "a.yaml:1:1: surgeon: missing"),
        ("surgeon: 2\ntitle: T\nrules: [leave: x]", "a.yaml:1:10: surgeon: format 2 is unknown; "),
        ("surgeon: true\ntitle: T\nrules: [leave: x]", "a.yaml:1:10: surgeon: true is not a whole number"),
        ("surgeon: 1\ntitle:\nrules: [leave: x]", "a.yaml:2:7: title: null is not text"),
        ("surgeon: 1\ntitle: ' '\nrules: [leave: x]", "a.yaml:2:8: title: ' ' is empty"),
        ("surgeon: 1\ntitle: T\nrules: []", "a.yaml:3:8: rules: the list is empty"),
        ("surgeon: 1\ntitle: T\nrules: {}", "a.yaml:3:8: rules: a mapping is not a list"),
        ("surgeon: 1\ntitle: T", "a.yaml:1:1: rules: missing"),
        (rules("  - {swap: acblock, with: [1]}"), "a.yaml:4:27: rules[0].with: a list is not a mapping"),
        (rules("  - {swap: acblock, match: 3}"), "a.yaml:4:28: rules[0].match: 3 is not a mapping"),
        (rules("  - {swap: 3}"), "a.yaml:4:12: rules[0].swap: 3 is not text"),
        (
            rules("  - {swap: acblock, with: {init: scratch, gamma: '1'}}"),
            "a.yaml:4:50: rules[0].with.gamma: '1' is not a number",
        ),
        (
            rules("  - {swap: acblock, with: {gamma: 1}}"),
            "a.yaml:4:27: rules[0].with: gamma is for init: scratch",
        ),
        (rules('  - {leave: "\\ud800"}'), "a.yaml:4:13: rules[0].leave: '\\ud800' holds half a character"),
        (rules("  - {leave: x, 1: 2}"), "a.yaml:4:16: rules[0].1: unknown key '1'; there are"),
    ],
)
def test_single_faults(text: str, fault: str):
    [only] = faults(text)
    assert only.startswith(fault)


@unhurried
@given(st.text() | st.text(alphabet="[]{}:,-&*!|>'\"%@#?<~ \nabx01.\\U", max_size=40))
def test_no_text_raises_anything_but_a_recipe_error(text: str):
    for candidate in (text, HEAD + text, rules(f"  - swap: acblock\n    match: {text}\n")):
        try:
            recipe.parse(candidate, "a.yaml")
        except RecipeError as error:
            str(error).encode()  # can be printed


# Overrides

RECIPE = rules("  - leave: the stem\n    optional: true\n  - swap: acblock\n    with: {init: split}\n")


def overridden(*overrides: str) -> Recipe:
    return recipe.parse(RECIPE, "a.yaml", overrides)


def test_overrides_change_values():
    read = overridden("rules[1].with.init=scratch", "rules[1].with.gamma=0.25", "title=no", "rules[0].optional = false")
    assert read.rules[1].options == ACBlockOptions(init="scratch", gamma=0.25)
    assert read.title == "no"
    assert read.rules[0].optional is False
    assert read.text == RECIPE
    assert read.overrides[2] == "title=no"


def test_overrides_make_mappings_where_they_are_missing():
    read = overridden("rules[1].match.not.kernel=[1, 1x7]", "rules[0].match={name: conv1, size: {min: 3}}")
    assert not read.rules[1].match.claims(Subject(("a",), SPEC.change(kernel=(1, 7)), None, ()))
    assert read.rules[0].match.names == ("conv1",)


def test_an_override_sees_what_earlier_ones_have_set():
    read = overridden("rules[1].match.kernel=[3, 5]", "rules[1].match.kernel[1]=7")
    assert [box.height.min for box in read.rules[1].match.kernel] == [3, 7]


def test_an_override_replaces_the_faults_of_what_it_replaces():
    broken = RECIPE.replace("{init: split}", "{int: split}")
    assert recipe.parse(broken, "a.yaml", ["rules[1].with={init: split}"]).rules[1].options == ACBlockOptions(
        init="split"
    )


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("rules[1].with.init=splt", "--set rules[1].with.init: rules[1].with.init: 'splt' is not one of takeover,"),
        ("rules[1].with.inti=split", "--set rules[1].with.inti: rules[1].with.inti: unknown key 'inti'; there are"),
        ("rules[1].wiht.init=split", "--set rules[1].wiht.init: rules[1].wiht: unknown key 'wiht'; there are"),
        ("rules[1].with={a: 1, a: 2}", "--set rules[1].with: rules[1].with.a: this key is given twice"),
        ("rules[2].with.init=split", "--set rules[2].with.init: rules has 2 entries, counted from 0"),
        ("rules[-1].with.init=split", "--set rules[-1].with.init: an override is written rules[0].with.key=value"),
        ("rules[1].with.init", "--set rules[1].with.init: an override is written rules[0].with.key=value"),
        ("=3", "--set : an override is written rules[0].with.key=value"),
        ("rules.1.optional=true", "--set rules.1.optional: rules is a list and has no 1"),
        ("title[0]=a", "--set title[0]: title is 'T' and has no [0]"),
        ("rules[1].match.kernel[0]=3", "--set rules[1].match.kernel[0]: rules[1].match.kernel is null and has no [0]"),
        ("title=[", "--set title: not YAML: expected the node content, but found '<stream end>'"),
        ("title=", "--set title: title: null is not text"),
        ("title=a\n---\nb", "--set title: a second document starts here; only one is read"),
    ],
)
def test_faults_of_overrides_name_the_option(override: str, fault: str):
    assert faults(RECIPE, override)[0].startswith(fault)


def test_faults_of_overrides_come_after_those_of_the_file():
    broken = RECIPE.replace("split", "splt")
    assert [fault.split(": ")[0] for fault in faults(broken, "rules[9].swap=a", "title=3")] == [
        "a.yaml:7:18",
        "--set rules[9].swap",
        "--set title",
    ]


@unhurried
@given(st.text() | st.text(alphabet="rules[]01.=with{}: ", max_size=30))
def test_no_override_raises_anything_but_a_recipe_error(override: str):
    try:
        overridden(override)
    except RecipeError as error:
        str(error).encode(errors="surrogatepass")


# Where recipes come from


@pytest.mark.parametrize("name", ["acnet", "acnet-border", "acnet-scratch"])
def test_bundled_recipes_load_by_name_and_by_file_name(name: str):
    read = recipe.load(name)
    assert read == recipe.load(f"{name}.yaml")
    assert read.name == name
    assert read.cites == "arXiv:1908.03930"
    assert read.rules[0].match.claims(Subject(("a",), SPEC, None, ()))
    assert read.rules[0].where.startswith(f"{name}.yaml:")


def test_every_bundled_recipe_loads_and_says_what_it_is():
    recipes = recipe.bundled()
    assert list(recipes) == sorted(recipes)
    for name, file in recipes.items():
        assert recipe.load(name).title
        assert file.read_text(encoding="utf-8").startswith("# ")


def test_the_three_acnets_differ_in_what_their_names_say():
    options = {name: recipe.load(name).rules[0].options for name in ("acnet", "acnet-border", "acnet-scratch")}
    assert options["acnet"] == ACBlockOptions(init="takeover", placement="skeleton")
    assert options["acnet-border"] == ACBlockOptions(init="takeover", placement="border")
    assert options["acnet-scratch"] == ACBlockOptions(init="scratch", gamma=1 / 3)


def test_a_file_comes_before_a_bundled_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("acnet.yaml").write_text("\ufeff" + rules("  - leave: mine\n"), encoding="utf-8")
    Path("acnet").mkdir()
    assert recipe.load("acnet.yaml").rules[0].leave == "mine"
    assert recipe.load(tmp_path / "acnet.yaml", ["rules[0].leave=other"]).rules[0].leave == "other"
    assert recipe.load("acnet").rules[0].swap == "acblock"


def test_an_unknown_recipe_is_met_with_the_known_ones():
    with pytest.raises(
        RecipeError, match=r"no recipe 'acnt.yaml': .*\(did you mean 'acnet'\?\)\. Bundled: acnet, acnet-ba"
    ):
        recipe.load("acnt.yaml")


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"surgeon: 1\ntitle: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"^latin\.yaml:2:11: not UTF-8 text\. "):
        recipe.load(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        recipe.load(tmp_path)
    with pytest.raises(RecipeError, match="no recipe"):
        recipe.load(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="no recipe"):
        recipe.load("x" * 5000)


def test_a_dict_is_a_recipe_too():
    data = {"surgeon": 1, "title": "no", "rules": [{"swap": "acblock", "match": {"name": ["012", "1e3"]}}]}
    read = recipe.from_dict(data)
    assert read.rules[0].match.names == ("012", "1e3")
    assert str(read.rules[0]) == "rules[0]"
    assert recipe.parse(read.text, "a.yaml").rules[0].match == read.rules[0].match


def test_a_dict_needs_neither_a_format_nor_a_title_but_a_file_does():
    rules = [{"swap": "acblock"}]
    read = recipe.from_dict({"rules": rules})
    assert recipe.parse(read.text, "a.yaml").title == read.title == "given from Python"
    assert recipe.from_dict({"title": "mine", "rules": rules}).title == "mine"
    assert recipe.from_dict({"rules": rules}, ["rules[0].with.init=split"]).overrides
    for wrong in ({"surgeon": 2, "rules": rules}, {"title": "", "rules": rules}, {}):
        with pytest.raises(RecipeError):
            recipe.from_dict(wrong)
    with pytest.raises(RecipeError) as caught:
        recipe.parse("rules: [{swap: acblock}]", "a.yaml")
    assert [fault.path for fault in caught.value.faults] == ["surgeon", "title"]


def test_faults_of_a_dict_have_a_path_and_no_place():
    bad = {"surgeon": 1, "title": "t", "rules": [{"swap": "acblok", "match": {"kernel": (3, 0)}}]}
    with pytest.raises(RecipeError) as caught:
        recipe.from_dict(bad)
    assert [(f.where, f.path) for f in caught.value.faults] == [("", "rules[0].swap"), ("", "rules[0].match.kernel[1]")]


def test_a_dict_of_objects_is_refused():
    loop: dict[str, object] = {}
    loop["rules"] = loop
    for data in ({"surgeon": object()}, loop, [1]):
        with pytest.raises(RecipeError):
            recipe.from_dict(data)

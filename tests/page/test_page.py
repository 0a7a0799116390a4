"""The page: what stands in it, that it is whole and safe, and that it says nothing that was not measured."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import Read
from torch import nn

import surgeon
from surgeon.display import words
from surgeon.errors import ModelError, PlanError, StoreError
from surgeon.page.base import Section
from surgeon.page.data import Looked, PageData
from surgeon.page.markup import element
from surgeon.page.render import render
from surgeon.page.rows import rows, totals
from surgeon.page.sections import sections

SHAPE = (1, 3, 16, 16)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(OrderedDict(stem=nn.Sequential(*stem), head=nn.Conv2d(8, 4, 1)))


def streams_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 8), (8, 16), (16, 16), (16, 8)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def page(*models: nn.Module, **how: Any) -> surgeon.Page:
    return surgeon.report(*models, example=SHAPE, date="1 May 2026", **how)


@pytest.fixture(scope="module")
def planned() -> surgeon.Page:
    return page(net(), recipe="acnet")


@pytest.fixture(scope="module")
def octave() -> surgeon.Page:
    return page(surgeon.convert(streams_net(), "octave", (1, 3, 32, 32)))


def anchors(made: surgeon.Page) -> list[str]:
    return [one["id"] for one in Read(made.html).all("section")]


def test_markup_is_whole_and_has_landmarks_headings_and_ids_in_order(octave: surgeon.Page) -> None:
    read = Read(octave.html)
    assert [len(read.all(tag)) for tag in ("html", "header", "main", "footer", "h1", "nav")] == [1] * 6
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [one["href"] for one in read.all("a")]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert read.all("html")[0]["lang"] == "en"


def test_every_drawing_says_what_it_is_or_stands_beside_its_numbers(octave: surgeon.Page) -> None:
    read = Read(octave.html)
    for drawn in read.all("svg"):
        assert "within" in drawn or drawn.get("role") == "img" or drawn.get("aria-hidden") == "true"
    count = sum(drawn.get("role") == "img" for drawn in read.all("svg"))
    assert count == len(read.all("desc")) >= 4
    captions = read.all("caption")
    assert len(captions) >= 2  # of the streams and of the costs


def test_nothing_is_loaded_and_only_its_own_script_and_style_may_run(octave: surgeon.Page) -> None:
    text, read = octave.html, Read(octave.html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"(?m)^\s*//.*$", "", text))
    assert not [one for _, one in read.elements if {"src", "style", "onclick", "srcset"} & one.keys()]
    policy = next(one["content"] for one in read.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_names_of_a_model_file_are_text_and_never_markup() -> None:
    evil = "<img onerror=alert(1)>"
    made = net()
    made.add_module(evil, nn.Conv2d(4, 4, 3, padding=1))
    made.add_module('"><script>x', nn.Sequential(nn.ReLU()))
    shown = page(made, recipe="acnet", title=f"{evil}\u202e").html
    read = Read(shown)
    assert not read.all("img")
    assert len(read.all("script")) == 1
    assert evil in read.text
    assert "\u202e" not in shown  # which would turn the direction of what follows
    assert any(one.get("data-path") == evil for one in read.with_class("conv"))


def test_markup_escapes_text_and_attributes() -> None:
    assert element("a", "<b>", ["&", element("i")], href='"x"') == '<a href="&#34;x&#34;">&lt;b&gt;&amp;<i></i></a>'


def test_the_same_data_gives_the_same_text(planned: surgeon.Page) -> None:
    assert page(net(), recipe="acnet").html == planned.html


def test_the_numbers_are_those_of_the_plan(planned: surgeon.Page) -> None:
    plan, read = surgeon.plan(net(), "acnet", SHAPE), Read(planned.html)
    assert planned.data.plan == plan
    total = plan.total.macs
    assert total is not None
    assert f"{words.amount(total.before)} → {words.amount(total.after)}" in read.text
    assert "1 of 2" in read.text
    assert "nothing is changed yet" in read.text
    found = {row.path: row for row in rows(planned.data)}
    assert [found[one.path].state for one in plan.convs] == ["planned", "stays"]
    for entry in plan.convs:
        for name in ("params", "macs", "activations"):
            change, cost = getattr(entry, name), found[entry.path].costs[name]  # type: ignore[index]
            assert (cost.before, cost.after) == (change.before, change.after)
    assert plan.convs[1].skip is not None
    assert plan.convs[1].skip in read.text


def test_every_conv_stands_once_in_the_tree_under_its_name(planned: surgeon.Page) -> None:
    convs = [one for one in Read(planned.html).all("li") if "data-path" in one]
    assert [(one["data-path"], one["data-state"]) for one in convs] == [("stem.0", "planned"), ("head", "stays")]


def test_a_converted_and_a_fused_model_show_what_became_of_them() -> None:
    converted = surgeon.convert(net(), "acnet", SHAPE)
    fused = surgeon.fuse(converted, SHAPE)
    one, other = page(converted), page(converted, fused)
    assert [row.state for row in rows(one.data)] == ["swapped", "stays"]
    assert [row.state for row in rows(other.data)] == ["folded", "stays"]
    folded = rows(other.data)[0].costs["macs"]
    assert folded.before == folded.after  # an ACBlock costs nothing once it is folded
    assert rows(one.data)[0].costs["macs"].after > folded.after
    assert other.data.report
    assert "equivalent" in Read(other.html).text
    assert len(other.data.history) == 2


def test_another_input_than_the_plans_does_not_look_like_a_cost_of_folding() -> None:
    fused = surgeon.fuse(surgeon.convert(net(), "acnet", SHAPE), SHAPE)
    made = surgeon.report(fused, example=(2, *SHAPE[1:]), date="1 May 2026")
    costs = rows(made.data)[0].costs
    assert (costs["macs"].before, costs["macs"].after) == (55296, 55296)
    assert costs["params"].after == 3 * 8 * 9 + 8
    assert totals(made.data)["macs"].ratio == 1
    assert "activations" not in costs.keys() | totals(made.data).keys()  # nobody has counted them


def test_a_rewritten_network_is_called_by_the_class_that_it_had(octave: surgeon.Page) -> None:
    assert octave.data.title == "Sequential"


def test_a_plain_model_is_shown_without_a_plan_and_costs_once() -> None:
    read = Read(page(net()).html)
    assert "it can be swapped" in read.text.lower()
    assert "→" not in re.sub(r"\d→\d", "", read.text)


def test_sections_are_left_out_where_there_is_nothing(planned: surgeon.Page, octave: surgeon.Page) -> None:
    assert "streams" not in anchors(planned)
    assert "streams" in anchors(octave)
    assert anchors(surgeon.report(nn.Sequential(nn.Linear(4, 2)), example=(1, 4), date="today"))[:1] == ["summary"]
    bare = render(PageData(title="nothing", models=(Looked("nothing"),)))
    assert [one["id"] for one in Read(bare).all("section")] == ["summary"]
    assert Read(render(PageData(title="nothing at all"))).all("section") == []


def test_every_section_has_a_place_and_an_anchor_of_its_own() -> None:
    found = sections()
    assert all(isinstance(one, Section) and one.__doc__ for one in found)
    assert len({one.anchor for one in found}) == len({one.place for one in found}) == len(found)


def test_the_page_of_a_resnet50_with_octaves_is_small_and_whole() -> None:
    models = pytest.importorskip("torchvision.models")
    made = surgeon.report(models.resnet50(), example=(1, 3, 64, 64), recipe="octave", date="1 May 2026")
    assert len(made.html.encode()) < 2_000_000
    read = Read(made.html)
    assert len([one for one in read.all("li") if "data-path" in one]) == 53
    assert made.data.plan is not None
    drawn = {path for flow in made.data.flows for step in flow.steps for path in step.paths if step.kind == "octave"}
    assert drawn == {one.path for one in made.data.plan.swaps}
    assert anchors(made)[:4] == ["summary", "network", "streams", "costs"]


def test_a_page_is_saved_whole_and_replaces_nothing_unasked(planned: surgeon.Page, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    planned.save(file)
    assert file.read_text(encoding="utf-8") == planned.html
    with pytest.raises(StoreError, match="exists"):
        planned.save(file)
    planned.save(file, force=True)
    with pytest.raises(StoreError, match=r"End it in \.html"):
        planned.save(tmp_path / "report.pdf")


def test_a_notebook_shows_the_page_in_a_frame(planned: surgeon.Page) -> None:
    shown = planned._repr_html_()
    assert Read(shown).all("iframe")[0]["srcdoc"] == planned.html


def test_what_cannot_be_shown_is_refused_in_one_sentence() -> None:
    with pytest.raises(ModelError, match="is not a model"):
        surgeon.report("model.pt")  # type: ignore[arg-type]
    with pytest.raises(PlanError):
        page(streams_net(), plan=surgeon.plan(net(), "acnet", SHAPE))


def test_timings_reach_the_page() -> None:
    from surgeon.surgery.trials import Trials

    made = surgeon.page.make.page_of([("net", net())], SHAPE, bench=Trials(rounds=3), date="1 May 2026")
    assert [one.model for one in made.data.timings][:1] == ["net"]

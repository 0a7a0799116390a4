"""The picture of a trade-off: well-formed, with every network in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from surgeon.display.tradeoff import svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*points: tuple[str, float, float, str]) -> ElementTree.Element:
    named = [SimpleNamespace(kind=kind, macs=macs, error=error, words=words) for kind, macs, error, words in points]
    chosen: Any = SimpleNamespace(points=named)
    return ElementTree.fromstring(svg(chosen))


def test_every_network_is_a_dot_that_says_what_it_is() -> None:
    page = drawn(
        ("predicted", 0.7, 0.2, ""),
        ("predicted", 1.0, 0.0, ""),
        ("alone", 0.9, 0.1, "a <conv> & \ufffe\x1b more, p: 2"),
        ("uniform", 0.7, 0.18, ""),
        ("chosen", 0.7, 0.12, ""),
    )
    titled = {
        dot.findtext(f"{SVG}title"): dot for dot in page.iter(f"{SVG}circle") if dot.find(f"{SVG}title") is not None
    }
    assert list(titled) == [
        r"a <conv> & \ufffe\x1b more, p: 2: ×0.900, error 0.1",
        "one setting for all sites that save most, measured: ×0.700, error 0.18",
        "the plan, measured: ×0.700, error 0.12",
    ]
    alone, uniform, plan = titled.values()
    assert float(alone.attrib["cx"]) > float(plan.attrib["cx"]) == float(uniform.attrib["cx"])
    assert float(alone.attrib["cy"]) > float(plan.attrib["cy"]) > float(uniform.attrib["cy"])
    assert page.find(f"{SVG}polyline") is not None


@pytest.mark.parametrize("error", [0.0, 3e-5, 40.0, float("inf")])
def test_errors_of_every_size_stay_on_the_page(error: float) -> None:
    page = drawn(("chosen", 0.31, error, ""))
    width, height = map(float, page.attrib["viewBox"].split()[2:])
    for dot in page.iter(f"{SVG}circle"):
        assert 0 <= float(dot.attrib["cx"]) <= width
        assert 0 <= float(dot.attrib["cy"]) <= height


def test_a_plan_without_networks_is_an_empty_page() -> None:
    assert not list(drawn().iter(f"{SVG}circle"))

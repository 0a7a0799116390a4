"""Pages in a headless Chromium: every control is used, nothing is loaded, nothing overflows, axe finds nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

import surgeon
from surgeon.app.demo import data
from surgeon.app.demo.run import _trained_net, train_
from surgeon.page.make import page_of
from surgeon.surgery.trials import Trials

_HOW = "pip install conv-surgeon[browser]"
playwright = pytest.importorskip("playwright.sync_api", reason=f"Playwright is missing: {_HOW}")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=f"axe is missing: {_HOW}")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

WIDTHS = (400, 1000, 1600)
PAGES = ("demo", "octave", "failing")
# What reaches beyond the window, and is in nothing that scrolls or hides by itself.
OVERFLOWING = """() => {
  const beyond = [];
  for (const one of document.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect();
    if (!box.width || !box.height || (box.right <= innerWidth + 1 && box.left >= -1)) continue;
    let within = one.parentElement;
    while (within && !/auto|scroll|hidden|clip/.test(getComputedStyle(within).overflowX)) within = within.parentElement;
    if (within || one.closest(".skip, .hidden-text")) continue;
    beyond.push(`${one.tagName}.${one.getAttribute("class")}: ${one.textContent.slice(0, 40)}`);
  }
  return beyond;
}"""


class Opened:
    """A page in the browser, with what it has said and asked for since it was opened."""

    def __init__(self, tab: Any, path: Path) -> None:
        self.tab = tab
        self.said: list[str] = []
        self.asked: list[str] = []
        tab.on("console", lambda message: self.said.append(message.text))
        tab.on("pageerror", lambda error: self.said.append(str(error)))
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.goto(path.as_uri())

    def overflowing(self) -> list[str]:
        found: list[str] = self.tab.evaluate(OVERFLOWING)
        wide = self.tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        return [*found, *[f"the page is {wide} px too wide"] * (wide > 0)]

    def serious(self, *rules: str) -> list[str]:
        """What axe finds serious or critical, with the element that it is about; `rules`: by these alone."""
        options: dict[str, Any] = {"resultTypes": ["violations"]}
        found = axe.Axe().run(self.tab, options=options | ({"runOnly": list(rules)} if rules else {})).response
        grave = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
        return [f"{one['id']}: {node['html'][:160]}" for one in grave for node in one["nodes"][:3]]

    def open_all(self) -> None:
        self.tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a trained and fused demo network, of a ResNet-50 with octaves, and of a verify that fails."""
    home = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    trained = surgeon.convert(_trained_net(), "acnet", (1, 1, 28, 28))
    train_(trained, data.images(), seconds=0.5)
    fused = surgeon.fuse(trained.eval())
    pair, few = [("net.pt", trained), ("fused.pt", fused)], Trials(rounds=3)
    made = {"demo": page_of(pair, (2, 1, 28, 28), bench=few, date="a day")}
    octave = surgeon.convert(resnet50(weights=None).eval(), "octave", (1, 3, 64, 64))
    made["octave"] = surgeon.report(octave, example=(1, 3, 64, 64), date="a day")
    with torch.no_grad():
        next(one for one in fused.modules() if isinstance(one, nn.Conv2d)).weight[0, 0, 0, 0] += 1e-3
    made["failing"] = surgeon.report(trained, fused, (2, 1, 28, 28), date="a day")
    for name, page in made.items():
        page.save(home / f"{name}.html")
    return {name: home / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=as_root)
        yield found
        found.close()


def _open(browser: Any, path: Path, width: int = 1000, theme: str = "light") -> Opened:
    return Opened(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme), path)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_overflows_and_nothing_is_loaded(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    page = _open(browser, pages[name], width)
    assert page.overflowing() == []
    page.open_all()
    assert page.overflowing() == []
    assert page.asked == [pages[name].as_uri()]
    assert page.said == []
    page.tab.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(browser: Any, pages: dict[str, Path], name: str, theme: str) -> None:
    page = _open(browser, pages[name], theme=theme)
    page.open_all()
    assert page.serious(*["color-contrast"] * (theme == "dark")) == []
    page.tab.close()


def test_faults_are_seen(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    """A page with a wide drawing, a picture from elsewhere and a script: the tests above would fail for each."""
    planted = "<svg width='2500' height='9'><rect width='2500' height='9'/></svg><img src='http://127.0.0.1:9/a.png'>"
    text = pages["failing"].read_text("utf-8").replace("</main>", f"{planted}<script>alert(1)</script></main>")
    (tmp_path / "planted.html").write_text(text, encoding="utf-8")
    page = _open(browser, tmp_path / "planted.html")
    assert any("svg" in one for one in page.overflowing())
    assert any(one.startswith("image-alt") for one in page.serious())
    assert sum("Content Security Policy" in one for one in page.said) >= 2  # the picture and the script
    page.tab.close()


@pytest.mark.parametrize("width", [400, 1000])
def test_the_tree_is_filtered_by_name_and_by_state(browser: Any, pages: dict[str, Path], width: int) -> None:
    page = _open(browser, pages["octave"], width)
    tab = page.tab
    convs = tab.locator("#tree li.conv:not([hidden])")
    names = [name for name, one in resnet50(weights=None).named_modules() if isinstance(one, nn.Conv2d)]
    assert convs.count() == len(names)
    for text, fits in (("layer1.*", "layer1."), ("downsample", "downsample"), ("LAYER2.0", "layer2.0")):
        tab.fill("#tree-name", text)
        assert convs.count() == sum(fits in name for name in names)
        assert f"{convs.count()} of {len(names)} convs" in tab.inner_text("#tree-said")
    assert convs.first.is_visible()  # what holds it was opened
    tab.fill("#tree-name", "no such conv")
    assert convs.count() == 0
    tab.fill("#tree-name", "")
    for button in tab.locator("#tree-controls button[data-state]").all():
        state = button.get_attribute("data-state")
        own = tab.locator(f"#tree li.conv[data-state={state}]:not([hidden])")
        before = own.count()
        button.click()
        assert (before > 0, own.count(), button.get_attribute("aria-pressed")) == (True, 0, "false")
        button.click()
        assert (own.count(), button.get_attribute("aria-pressed")) == (before, "true")
    assert page.said == []
    tab.close()


def test_the_tree_opens_and_closes(browser: Any, pages: dict[str, Path]) -> None:
    page = _open(browser, pages["octave"])
    conv = page.tab.locator("#tree li.conv[data-path='layer4.2.conv3']")
    page.tab.click("#tree-close")
    assert not conv.is_visible()
    page.tab.click("#tree-open")
    assert conv.is_visible()
    conv.hover()
    assert "layer4.2.conv3" in page.tab.inner_text("#tree-peek")
    page.tab.close()


def test_details_open_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    page = _open(browser, pages["demo"])
    for summary in page.tab.locator("summary:visible").all()[-12:]:
        summary.focus()
        was_open = summary.evaluate("(one) => one.parentElement.open")
        page.tab.keyboard.press("Enter")
        assert summary.evaluate("(one) => one.parentElement.open") is not was_open
        outline = summary.evaluate("(one) => getComputedStyle(one).outlineStyle")
        assert outline != "none"  # where the keyboard is can be seen
    conv = page.tab.locator("#tree li.conv summary").first
    conv.focus()
    page.tab.keyboard.press("Space")
    assert page.tab.locator("#tree li.conv .why").first.is_visible()
    page.tab.close()


def test_the_skip_link_comes_first_and_leads_to_the_content(browser: Any, pages: dict[str, Path]) -> None:
    page = _open(browser, pages["demo"])
    page.tab.keyboard.press("Tab")
    assert page.tab.evaluate("document.activeElement.className") == "skip"
    assert page.tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.tab.keyboard.press("Enter")
    assert page.tab.evaluate("document.activeElement.id") == "content"
    page.tab.close()


@pytest.mark.parametrize("preferred", ["light", "dark"])
def test_the_theme_is_the_users_and_can_be_switched(browser: Any, pages: dict[str, Path], preferred: str) -> None:
    page = _open(browser, pages["demo"], theme=preferred)
    paper = "getComputedStyle(document.body).backgroundColor"
    is_dark = f"Math.max(...{paper}.match(/\\d+/g).slice(0, 3).map(Number)) < 80"
    assert page.tab.evaluate(is_dark) is (preferred == "dark")
    page.tab.click("#theme")
    assert page.tab.evaluate(is_dark) is (preferred == "light")
    assert page.tab.get_attribute("#theme", "aria-pressed") == str(preferred == "light").lower()
    page.tab.click("#theme")
    assert page.tab.evaluate(is_dark) is (preferred == "dark")
    assert page.tab.evaluate("localStorage.length + document.cookie.length") == 0
    page.tab.close()


def test_costs_are_shown_one_kind_at_a_time(browser: Any, pages: dict[str, Path]) -> None:
    page = _open(browser, pages["demo"])
    buttons = page.tab.locator("#costs-controls button").all()
    assert len(buttons) == 3
    for button in buttons:
        button.click()
        shown = [one.get_attribute("data-costs") for one in page.tab.locator("figure[data-costs]:visible").all()]
        assert shown == [button.get_attribute("data-costs")]
    page.tab.close()


@pytest.mark.parametrize("name", PAGES)
def test_every_control_is_one_that_these_tests_use(browser: Any, pages: dict[str, Path], name: str) -> None:
    used = "#theme, #tree-name, #tree-open, #tree-close, #tree-controls [data-state], #costs-controls button"
    page = _open(browser, pages[name])
    left = f"[...document.querySelectorAll('button, input, select, textarea')].filter((one) => !one.matches('{used}'))"
    assert page.tab.evaluate(f"{left}.map((one) => one.outerHTML)") == []
    page.tab.close()


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_something_in_the_page(browser: Any, pages: dict[str, Path], name: str) -> None:
    page = _open(browser, pages[name])
    links = page.tab.evaluate("[...document.querySelectorAll('a')].map((one) => one.getAttribute('href'))")
    assert [one for one in links if not one.startswith("#") or page.tab.locator(one).count() != 1] == []
    page.tab.close()


def test_what_is_closed_is_printed_open_and_in_light_colours(browser: Any, pages: dict[str, Path]) -> None:
    page = _open(browser, pages["failing"], theme="dark")
    cell = page.tab.locator("#verify table td").first
    assert not cell.is_visible()
    page.tab.emulate_media(media="print")
    assert cell.evaluate("(one) => one.checkVisibility({ contentVisibilityAuto: true })")
    assert not page.tab.locator("#theme").is_visible()
    page.tab.emulate_media(media="print", color_scheme="light")
    page.tab.close()


def test_a_failing_verify_names_the_site_and_marks_it(browser: Any, pages: dict[str, Path]) -> None:
    page = _open(browser, pages["failing"])
    assert "does not compute what A computes" in page.tab.inner_text("#verify .verdict")
    assert page.tab.inner_text("#verify .first strong").startswith("conv1")
    marks = page.tab.locator("#verify svg.ch rect.fill-bad")
    assert marks.count() >= 2  # of the check, and of the site
    assert "conv1" in page.tab.locator("#verify title", has_text="diverges").first.text_content()
    page.tab.close()

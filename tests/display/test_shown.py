"""Plans, surveys and reports show themselves: printed they are the tables of the command line, in notebooks HTML."""

from __future__ import annotations

import html
import logging
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon
from rich.table import Table
from rich.text import Text
from torch import nn

import surgeon
from surgeon.app.demo.net import SmallResNet
from surgeon.display.shown import WIDE, Shown, as_html

SHAPE = (1, 1, 28, 28)


def _made() -> dict[str, Shown]:
    torch.manual_seed(0)
    net = SmallResNet().eval()
    plan = surgeon.plan(net, "acnet", SHAPE)
    converted = surgeon.convert(net, plan)
    broken = surgeon.fuse(converted)
    with torch.no_grad():
        broken.conv1.weight += 1
    return {
        "survey": surgeon.survey(net, SHAPE),
        "plan": plan,
        "report": surgeon.verify(converted, surgeon.fuse(converted), SHAPE),
        "different": surgeon.verify(converted, broken, SHAPE),
    }


@pytest.fixture(scope="module")
def made() -> dict[str, Shown]:
    return _made()


class _Page(HTMLParser):
    """Collects the text of a page, its elements and the colours in it, and fails on what is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.colours: set[str] = set()
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.add(tag)
        self.colours |= set(re.findall(r"(?<![-\w])color: (#\w+)", str(dict(attrs).get("style"))))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", ["survey", "plan", "report", "different"])
def test_a_notebook_gets_the_printed_table_as_one_element(made: dict[str, Shown], name: str) -> None:
    page = _Page(made[name]._repr_html_())
    assert page.seen <= {"pre", "span"}
    assert [line.rstrip() for line in page.text.strip("\n").splitlines()] == str(made[name]).splitlines()


def test_a_notebook_gets_the_colours_of_the_verdict(made: dict[str, Shown]) -> None:
    green, red = (_Page(made[name]._repr_html_()).colours for name in ("report", "different"))
    assert green
    assert red - green


def test_what_is_printed_is_what_the_command_prints(
    made: dict[str, Shown], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(SmallResNet().eval(), "net.pt")
    for name, arguments in {"survey": ("survey",), "plan": ("plan", "-r", "acnet")}.items():
        capsys.readouterr()
        assert run_surgeon(arguments[0], "net.pt", *arguments[1:], "-i", "1,1,28,28") == 0
        assert str(made[name]).splitlines() == [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_report_begins_with_its_verdict(made: dict[str, Shown]) -> None:
    assert str(made["report"]).startswith("equivalent")
    lines = str(made["different"]).splitlines()
    assert lines[0].startswith("different")
    assert any("conv1" in line for line in lines[1:])


def test_a_narrow_terminal_gets_a_narrow_table(made: dict[str, Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    for columns in ("60", "90"):
        monkeypatch.setenv("COLUMNS", columns)
        widths.append(max(map(len, str(made["plan"]).splitlines())))
    assert widths[0] <= 60 < widths[1] <= 90
    assert max(map(len, _Page(made["plan"]._repr_html_()).text.splitlines())) > 90  # a notebook scrolls


def test_names_cannot_bring_elements_into_a_notebook() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>x</b>[red]", nn.Conv2d(3, 4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule("<b>x</b>[red]")(x)

    page = surgeon.survey(Net(), (1, 3, 8, 8))._repr_html_()
    assert "<b>" not in page
    assert html.escape("<b>x</b>[red]") in page


def test_a_page_is_as_wide_as_its_table_and_at_most_so_wide() -> None:
    table = Table(box=None, pad_edge=False)
    table.add_row("word " * 100)
    assert max(map(len, _Page(as_html(table)).text.splitlines())) == WIDE
    assert _Page(as_html(Text("short"))).text.strip() == "short"


def test_a_thing_without_a_view_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="__rich__"):
        type("Blank", (Shown,), {})()


def test_notices_of_the_library_are_logged_and_not_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": SmallResNet().state_dict()}, tmp_path / "net.pt")
    (tmp_path / "net.py").write_text("from surgeon.app.demo.net import SmallResNet\n")
    with caplog.at_level(logging.INFO, logger="surgeon"):
        surgeon.load(tmp_path / "net.pt", arch=f"{tmp_path / 'net.py'}:SmallResNet")
    assert [(one.name, one.levelname) for one in caplog.records] == [("surgeon", "INFO")]
    assert "under 'state_dict'" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_warnings_are_not_printed_either_where_logging_is_not_set_up() -> None:
    code = "import logging, surgeon; logging.getLogger('surgeon').warning('look'); print('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")

"""Tables on terminals of every width: no name is broken, nothing is cut off, and no column is empty."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import RenderableType
from torch import nn

import surgeon
from surgeon.display import shown, words
from surgeon.display.sheet import Line, Listing

WIDTHS = (20, 40, 60, 80, 100, 120, 160, 180)
LONG = "an_extraordinarily_long_name" * 10


def _lines(view: RenderableType, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    return shown.as_text(view).splitlines()


def _net(name: str = "x") -> nn.Module:
    net = nn.Sequential()
    for i in range(3):
        net.add_module(f"{name}{i}", nn.Conv2d(3, 3, 3, padding=1))
        net.add_module(f"{name}{i}_norm", nn.BatchNorm2d(3))
    return net


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["x", "features_of_the_second_stage", LONG, "two words", "日本語の名前"])
def test_names_are_unbroken_at_every_width(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = _net(name)
    plan = surgeon.plan(net, {"rules": [{"swap": "acblock", "match": {"name": f"{name}[01]"}}]}, (1, 3, 8, 8))
    for view in (plan, surgeon.survey(net, (1, 3, 8, 8))):
        lines = _lines(view.__rich__(), width, monkeypatch)
        for i in range(3):
            assert any(f"{name}{i}" in line for line in lines)
        spare = max(cell_len(name) + len("2_norm") + len("  norm: "), width)
        assert all(cell_len(line) <= spare for line in lines)  # only a name may be longer than the line


@pytest.mark.parametrize("width", WIDTHS)
def test_every_cell_is_there_at_every_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = words.table("conv", "geometry", "becomes", "MACs", "read by", "remark")
    table.add_row("layer1.0.conv1", "64→64, 3x3, padding=1", "acblock", "9.44 M", "BatchNorm2d", "takes over bn1")
    table.add_row("layer1.0.conv2", "64→64, 3x3", "octave", "12", "relu", "low share 0.5 → 0.25; its input is odd")
    text = " ".join(" ".join(_lines(table, width, monkeypatch)).split())
    for cell in ("layer1.0.conv1", "acblock", "9.44 M", "BatchNorm2d", "takes over bn1", "its input is odd", "octave"):
        assert cell in text, (cell, text)
    assert text.index("layer1.0.conv1") < text.index("takes over bn1") < text.index("layer1.0.conv2")


def test_a_column_without_anything_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    table = words.table("conv", "geometry", "MACs", "remark")
    table.add_row("one", "3x3", "", "")
    assert _lines(table, 80, monkeypatch) == ["conv  geometry", "one   3x3"]


def test_a_remark_stands_beside_its_row_where_it_fits_and_else_below(monkeypatch: pytest.MonkeyPatch) -> None:
    table = words.table("conv", "MACs", "remark")
    table.add_row("one", "1.00 k", "short")
    table.add_row("two", "1.00 k", "a sentence that is rather long")
    assert _lines(table, 24, monkeypatch) == [
        "conv    MACs  remark",
        "one   1.00 k  short",
        "two   1.00 k",
        "  a sentence that is",
        "  rather long",
    ]


def test_what_does_not_fit_goes_below_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    table = words.table("conv", "geometry", "parameters", "MACs", "remark")
    table.add_row("layer1", "64→64, 3x3", "36.9 k", "9.44 M", "norm: bn")
    assert _lines(table, 30, monkeypatch) == [
        "conv    parameters    MACs",
        "layer1      36.9 k  9.44 M",
        "  64→64, 3x3; norm: bn",
    ]
    assert _lines(table, 14, monkeypatch) == [
        "layer1",
        "  64→64, 3x3;",
        "  parameters",
        "  36.9 k;",
        "  MACs 9.44 M;",
        "  norm: bn",
    ]


def test_prose_takes_several_lines_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    table = words.table("option", "meaning")
    table.add_row("p", "one in p channels of a filter keeps its kernel")
    assert _lines(table, 40, monkeypatch) == [
        "option  meaning",
        "p       one in p channels of a filter",
        "        keeps its kernel",
    ]


def test_a_list_names_all_or_says_how_many_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lines(Listing("2 convs stay: no", ["one", "two"]), 80, monkeypatch) == ["2 convs stay: no", "  one, two"]
    assert _lines(Listing("3 stay", ["one", "two", "three"], 1), 80, monkeypatch) == ["3 stay", "  one, 2 more"]


def test_further_lines_of_a_sentence_are_indented(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lines(Line("one two three"), 9, monkeypatch) == ["one two", "  three"]
    assert _lines(Line("one two three", mark=" ok  "), 14, monkeypatch) == [" ok  one two", "     three"]


def test_skips_are_grouped_by_reason_and_nothing_is_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
    rules = [{"leave": "they are [/mine]", "match": {"name": ["0", "2"]}}, {"swap": "hetconv"}]
    plan = surgeon.plan(net, {"rules": rules}, (1, 8, 8, 8))
    lines = _lines(plan.__rich__(), 100, monkeypatch)
    place = lines.index("2 convs stay: they are [/mine]")
    assert lines[place + 1] == "  0, 2"
    note = plan.convs[1].note or ""
    assert " ".join(" ".join(lines).split()).count(note) == 1


def test_a_survey_says_once_what_holds_for_several_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).abs()

    net = nn.Sequential(Mine(3, 3, 3), Mine(3, 3, 3), nn.Conv2d(3, 3, 3))
    lines = _lines(surgeon.survey(net, (1, 3, 9, 9)).__rich__(), 180, monkeypatch)
    (place,) = [i for i, line in enumerate(lines) if "is a subclass of Conv2d" in line]
    assert lines[place].startswith("2 convs: ")
    assert lines[place + 1] == "  0, 1"


def test_other_names_of_a_conv_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(conv, conv)
    for view in (surgeon.survey(net, (1, 3, 8, 8)), surgeon.plan(net, "acnet", (1, 3, 8, 8))):
        assert "also named 1" in " ".join(_lines(view.__rich__(), 180, monkeypatch))


@pytest.mark.parametrize("path", sorted(Path(shown.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_only_the_sheet_makes_texts_since_it_makes_them_safe(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not made & {"Text", "Table"} or path.name == "sheet.py"


def test_a_large_network_is_shown_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    table = words.table("conv", "geometry", "MACs", "remark")
    for i in range(3000):
        table.add_row(f"layer{i}", "64→64, 3x3, padding=1", "9.44 M", "takes over bn1")
    start = time.monotonic()
    assert len(_lines(table, 40, monkeypatch)) == 6001
    assert time.monotonic() - start < 20  # seconds; with a walk over all rows for each row it is minutes

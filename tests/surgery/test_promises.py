"""Plans say where their blocks were measured to be slower, from rows that were measured."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import promises as benchmark
import pytest
import torch
from helpers import run_surgeon
from pydantic import ValidationError
from torch import nn

import surgeon
from surgeon.blocks import registry
from surgeon.surgery import plan as plans
from surgeon.surgery import promises

SHAPE = (1, 8, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


def test_every_row_is_of_a_block_that_is_meant_to_save_and_stands_once() -> None:
    rows = promises.table()
    assert {row.block for row in rows} <= {name for name, block in registry().items() if block.is_cheaper}
    assert all(row.speed > 0 and row.batch > 0 and row.device in ("cpu", "cuda") for row in rows)
    assert len({row.place for row in rows}) == len(rows)
    assert promises.written(rows) == promises.TABLE.read_text(encoding="utf-8")


def test_a_plan_says_where_its_blocks_were_slower_in_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    plan = surgeon.plan(net(), "hetconv-p4", SHAPE)
    (rows,) = plan.broken_promises.values()
    assert all(row.block == "hetconv" and row.speed < promises.HOLDS for row in rows)
    from surgeon.display.gains import promise_lines

    (line,) = promise_lines(plan)
    assert f"its speed was {rows[0].speed:.2f} × at batch {rows[0].batch}" in line
    assert rows[0].name in line
    assert not surgeon.plan(net(), "acnet", SHAPE).broken_promises  # it adds nothing to what is deployed


def test_what_is_fast_where_it_was_measured_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = tuple(replace(row, speed=0.98) for row in promises.table())
    monkeypatch.setattr(promises, "table", lambda: fast)
    assert not surgeon.plan(net(), "hetconv-p4", SHAPE).broken_promises


def test_plans_are_written_as_before_and_convert_has_it_in_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "net.pt")
    assert run_surgeon("plan", "net.pt", "-r", "hetconv-p4", "--input=1,8,8,8", "-o", "plan.yaml") == 0
    assert "hetconv: not faster everywhere: on" in " ".join(capsys.readouterr().out.split())
    assert "H200" not in Path("plan.yaml").read_text()
    assert plans.read("plan.yaml").broken_promises
    assert run_surgeon("convert", "net.pt", "--plan", "plan.yaml", "--json") == 0
    said = json.loads(capsys.readouterr().out)["slower_where_measured"]["hetconv"]
    assert said[0]["speed"] < 1


def test_new_rows_take_the_place_of_those_that_were_measured_alike() -> None:
    rows = promises.table()
    new = [replace(rows[0], speed=1.5, torch="9.9"), replace(rows[0], batch=999)]
    made = promises.updated(rows, new)
    assert made == [new[0], *rows[1:], new[1]]


def test_a_row_that_says_more_than_rows_do_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{**json.loads(promises.TABLE.read_text())[0], "guess": True}]))
    with pytest.raises(ValidationError):
        promises.table(path)


def test_rows_are_measured_by_the_benchmark() -> None:
    given = argparse.Namespace(
        network="torchvision:resnet18", size=32, batch=[2], rounds=3, half=False, compiled=False, train=True
    )
    rows = list(benchmark.measured(given, "hetconv-p4", torch.device("cpu")))
    assert [(row.block, row.options, row.way, row.train) for row in rows] == [
        ("hetconv", "p: 4", "eager", False),
        ("hetconv", "p: 4", "eager", True),
    ]
    assert all(row.network == "torchvision:resnet18 at 32" and row.speed > 0 for row in rows)

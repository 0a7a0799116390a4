"""docs/networks.md: what stands between its markers is made of networks.json, and every recipe has its line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import networks
import networks_page
import pytest

from surgeon.recipes import recipe as recipes

PAGE = networks_page.PAGE.read_text(encoding="utf-8")


def test_the_page_shows_what_was_measured() -> None:
    assert networks_page.with_results(PAGE, networks.read()) == PAGE, "run benchmarks/networks.py --write-docs-only"


def test_every_bundled_recipe_is_said_when_to_use_and_when_not() -> None:
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in PAGE.splitlines() if line.startswith("| `")}
    for name in recipes.bundled():
        assert all(cell.strip() for cell in rows[f"`{name}`"]), name


def test_a_network_without_a_measurement_is_not_on_the_page() -> None:
    known = {net.name for net in networks.NETWORKS}
    assert len(known) == 10
    assert {*networks.read()} <= known


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no lines"):
        networks_page.with_results("# A page", {})


def _result() -> dict[str, Any]:
    row = {"swapped": 3, "exact": 2, "keeps_function": True, "params": 1.0, "macs": 1.0, "training_macs": 1.6}
    timed = {"time": 0.5, "quartiles": [0.45, 0.55], "reliable": False}
    less = row | {"keeps_function": False, "macs": 0.61}
    return {
        "input": "1×3×8×8", "arguments": {"a": 1}, "convs": 4, "params": 1000, "macs": 2_000_000_000, "ms": 12.34,
        "rounds": 7, "threads": 2, "machine": "a machine", "versions": {"torch": "2", "surgeon": "1"},
        "recipes": {"acnet": row, "octave": less | timed, "hetconv-p4": row | {"swapped": 0, "why": "its groups"}},
    }  # fmt: skip


def test_a_network_is_a_row_of_the_overview_and_a_table() -> None:
    text = networks_page.with_results(f"{networks_page.BEGIN}\n{networks_page.END}", {"lib:net": _result()})
    assert "| net | 2.00 G | 12 | ×1.00 | swaps nothing | ×0.61, time ×0.50 ? |" in text
    assert "| `acnet` | 3 of 4 | kept; 1 in eval mode only | ×1.00 | ×1.00 | ×1.60 |  |  |" in text
    assert "| `octave` | 3 of 4 | approximated | ×1.00 | ×0.61 | ×1.60 | ×0.50 ? | 0.45 … 0.55 |" in text
    assert "Nothing is swapped by `hetconv-p4`: its groups." in text
    assert "12.3 ms as it is, with its norms folded; 2 threads of a machine, one image, median of 7 rounds" in text
    untimed = copy.deepcopy(_result()) | {"ms": None}
    assert "Not timed." in "\n".join(networks_page.section("lib:net", untimed))


def test_a_network_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = networks.measured(networks.Net("timm:test_resnet", "1,3,64,64"), rounds=2)
    timed = {name for name, row in found["recipes"].items() if "time" in row}
    saving = {name for name, row in found["recipes"].items() if row["macs"] is not None and row["macs"] < 1}
    assert saving
    assert timed == saving | {found["free"]}
    assert set(found["recipes"]) == set(recipes.bundled())
    json.dumps(found)
    assert found["ms"] > 0

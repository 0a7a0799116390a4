"""A graph as data: names that do not depend on where code lies, and older formats that are read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon.analysis import program
from surgeon.analysis.rewritten import Rewritten

GOLDEN = Path(__file__).parents[1] / "golden" / "format1"
# Every function of our own that format 1 names. Where its code lies may change; what it is called in files may not.
NAMED_IN_FORMAT_1 = ("add_into", "crop_to", "interleave", "join", "lift_to", "low_pass", "pool", "split", "take")


def _rewritten() -> Rewritten:
    model = surgeon.load(GOLDEN / "octave-fused.pt", allow=("golden_nets",))
    return next(module for module in model.modules() if isinstance(module, Rewritten))


def _opened_with(module: Rewritten, data: Any) -> Rewritten:
    """Open it again as if its file had that graph."""
    made, state = Rewritten.__new__(Rewritten), module.__getstate__()
    made.__setstate__({**state, "program": data})
    return made


def _in_format_1(data: dict[str, Any]) -> dict[str, Any]:
    old = copy.deepcopy(data)
    for step in old["steps"]:
        step[2] = f"surgeon.{step[2]}" if step[2].startswith("streams.") else step[2]
    return old | {"format": 1}


def test_no_name_says_where_our_code_lies() -> None:
    assert not [name for name in program.FUNCTIONS if name.startswith("surgeon.") or "_trace" in name]


@pytest.mark.parametrize("name", NAMED_IN_FORMAT_1)
def test_every_name_of_format_1_is_read(name: str) -> None:
    module = _rewritten()
    step = ["one", "call_function", f"surgeon.streams.{name}", [], {"dict": []}]
    data = {"format": 1, "inputs": [["x"]], "steps": [step], "output": {"node": "one"}}
    read = _opened_with(module, data)
    [node] = [node for node in read.graph.nodes if node.op == "call_function"]
    assert node.target is program.FUNCTIONS[f"streams.{name}"]


def test_a_graph_of_format_1_is_one_of_today_once_it_is_open() -> None:
    module = _rewritten()
    assert module.program["format"] == 2
    assert any(step[2].startswith("streams.") for step in module.program["steps"])
    old = _in_format_1(module.program)
    assert any(step[2].startswith("surgeon.streams.") for step in old["steps"])
    assert _opened_with(module, old).program == module.program


@pytest.mark.parametrize("number", [3, 0, None, "2"])
def test_other_formats_are_refused(number: object) -> None:
    module = _rewritten()
    with pytest.raises(ValueError, match="has format"):
        _opened_with(module, module.program | {"format": number})


@pytest.mark.parametrize("name", ["surgeon.streams.split", "os.system", "streams.others", "builtins.getattr"])
@pytest.mark.parametrize("number", [1, 2])
def test_no_other_name_is_read(name: str, number: int) -> None:
    if (name, number) == ("surgeon.streams.split", 1):
        return
    step = ["one", "call_function", name, [], {}]
    with pytest.raises(ValueError, match="which surgeon does not write"):
        _opened_with(_rewritten(), {"format": number, "inputs": [], "steps": [step], "output": None})


def test_what_is_written_is_of_format_2(tmp_path: Path) -> None:
    model = surgeon.load(GOLDEN / "octave-streams.pt", allow=("golden_nets",))
    surgeon.save(model, tmp_path / "again.pt")
    again = surgeon.load(tmp_path / "again.pt", allow=("golden_nets",))
    one, other = ([m.program for m in net.modules() if isinstance(m, Rewritten)] for net in (model, again))
    assert one == other
    assert all(data["format"] == 2 for data in other)
    with torch.no_grad():
        x = torch.randn(1, 3, 16, 16)
        assert torch.equal(model.eval()(x), again.eval()(x))


def test_a_network_may_have_attributes_that_are_called_like_ours() -> None:
    module = _rewritten()
    module.format, module.DERIVED = "NCHW", {"mine"}
    again = copy.deepcopy(module)
    assert (again.format, again.DERIVED) == ("NCHW", {"mine"})
    assert isinstance(again, nn.Module)


def test_what_a_file_says_is_made_from_the_graph_is_not_there_to_be_read() -> None:
    module = _rewritten()
    step = ["one", "get_attr", "_run", [], {"dict": []}]
    data = {"format": 2, "inputs": [["x"]], "steps": [step], "output": {"node": "one"}}
    made = Rewritten.__new__(Rewritten)
    with pytest.raises(ValueError, match="reads '_run', which is not registered"):
        made.__setstate__({**module.__getstate__(), "program": data, "_run": torch.zeros(3)})

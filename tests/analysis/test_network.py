"""A network is looked at once: how often its own forward is called in a conversion, and what is kept of a look."""

from __future__ import annotations

import pytest
import torch
from helpers import shake_
from torch import Tensor, nn

import surgeon
from surgeon.analysis.network import Network
from surgeon.models.call import Inputs

SHAPE = (1, 3, 16, 16)


class Counted(nn.Module):
    """Two convs with their norms; every call of its forward, by a tracer too, is counted."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.bn2(self.second(self.bn1(self.first(x)).relu()))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return shake_(Counted().eval(), 1)


def _calls_in(function) -> int:
    Counted.calls = 0
    function()
    return Counted.calls


@pytest.mark.parametrize("example", [SHAPE, None], ids=["an example", "an example that is found"])
def test_a_conversion_traces_a_network_in_both_modes_looks_at_one_run_and_measures_two(net: nn.Module, example) -> None:
    assert _calls_in(lambda: surgeon.convert(net, "acnet", example)) == 2 + 1 + 2


def test_a_plan_needs_no_more_than_tracing_and_one_run(net: nn.Module) -> None:
    assert _calls_in(lambda: surgeon.plan(net, "acnet", SHAPE)) == 2 + 1


def test_folding_looks_at_the_recorded_input_and_measures_two_runs(net: nn.Module) -> None:
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert _calls_in(lambda: surgeon.fuse(converted)) == 1 + 2


def test_streams_are_planned_and_carried_out_on_the_graphs_that_were_traced_first(net: nn.Module) -> None:
    recipe = {"surgeon": 1, "title": "T", "rules": [{"swap": "octave", "with": {"min_size": 1, "alpha_in": 0}}]}
    recipe["rules"][0]["match"] = {"name": "first"}
    recipe["rules"].append({"swap": "octave", "with": {"min_size": 1, "alpha_out": 0}, "match": {"name": "second"}})
    calls = _calls_in(lambda: surgeon.convert(net, recipe, SHAPE))
    # Traced twice, looked at once, run as it was, and conv by conv in float64; what is rewritten has its own forward.
    assert calls == 2 + 1 + 1 + 1


def test_a_network_keeps_what_it_has_found(net: nn.Module) -> None:
    network = Network(net, Inputs((torch.zeros(SHAPE),)))
    assert _calls_in(lambda: (network.run, network.islands, network.cost)) == 3
    assert _calls_in(lambda: (network.run, network.islands, network.cost, network.names)) == 0
    assert network.cost.macs == 16 * 16 * 9 * (3 * 8 + 8 * 8)


def test_after_swaps_the_graphs_still_name_what_is_called(net: nn.Module) -> None:
    network = Network(net, Inputs((torch.zeros(SHAPE),)))
    before = [str(node.target) for node in network.islands[0].graph.nodes if node.op == "call_module"]
    converted = surgeon.convert(net, "acnet", SHAPE)
    [island] = network.islands_after_swaps(converted)
    assert [str(node.target) for node in island.graph.nodes if node.op == "call_module"] == before
    assert all(converted.get_submodule(target) is not net.get_submodule(target) for target in before)


def test_without_an_input_nothing_is_run(net: nn.Module) -> None:
    network = Network(net)
    assert _calls_in(lambda: (network.islands, network.cost)) == 2
    assert network.cost.macs is None

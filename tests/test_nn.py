"""What files keep of our classes: an address, a dict with a format, and nothing that can be made from the rest."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
import surgeon.nn
from surgeon.blocks import Block, registry
from surgeon.blocks.acblock import ACBlock
from surgeon.blocks.dbb import DiverseBranch
from surgeon.blocks.hetconv import HetConv
from surgeon.blocks.octave import OctaveConv
from surgeon.blocks.repvgg import RepVGG
from surgeon.conv.spec import ConvSpec
from surgeon.nn import FORMAT_KEY

GOLDEN = Path(__file__).parent / "golden" / "format1"
CONV = ConvSpec(4, 8, (3, 5), padding=(0, 1), dilation=(2, 1), padding_mode="reflect")  # its strips need shifts


def _conv(spec: ConvSpec) -> nn.Conv2d:
    conv = spec.build(like=torch.empty(0))
    assert conv.bias is not None
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    return conv


def _block(kind: type[Block], options: dict[str, object]) -> Block:
    chosen = kind.Options.model_validate(options)
    return kind.from_conv(_conv(SPECS[kind]), chosen, norm=None, generator=torch.Generator().manual_seed(0)).eval()


BLOCKS = {
    "acblock": (ACBlock, {"init": "split", "placement": "border"}),
    "hetconv": (HetConv, {"p": 2, "layout": "best"}),
    "octave": (OctaveConv, {}),
    "repvgg": (RepVGG, {"init": "split"}),
    "dbb": (DiverseBranch, {"init": "split"}),
    "acblock online": (ACBlock, {"form": "online", "init": "split", "placement": "border"}),
    "repvgg online": (RepVGG, {"form": "online", "init": "split"}),
    "dbb online": (DiverseBranch, {"form": "online", "init": "split"}),
}
SPECS = {
    ACBlock: CONV,
    HetConv: CONV,
    OctaveConv: CONV.change(padding=(2, 2)),
    RepVGG: CONV,
    DiverseBranch: ConvSpec(4, 8, (3, 5), padding=(0, 1)),  # its 1×1 conv needs a shift
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def test_every_block_of_our_own_has_an_address_that_stays() -> None:
    ours = [kind for kind in registry().values() if inspect.getmodule(kind.forward).__name__.startswith("surgeon.")]
    assert {kind.__module__ for kind in ours} == {"surgeon.nn"}
    assert {kind.__qualname__ for kind in ours} <= set(surgeon.nn.__all__)


@every_block
def test_a_state_has_a_number_and_nothing_that_is_made_from_the_rest(name: str) -> None:
    block = _block(*BLOCKS[name])
    state = block.__getstate__()
    assert state[FORMAT_KEY] == 2
    assert not state.keys() & block.DERIVED
    assert vars(block).keys() >= block.DERIVED
    assert b"Pads" not in pickle.dumps(block)


@every_block
def test_it_computes_the_same_once_it_is_read(name: str) -> None:
    block = _block(*BLOCKS[name])
    again = pickle.loads(pickle.dumps(block))
    for key in block.DERIVED:
        assert getattr(again, key) == getattr(block, key)
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        assert torch.equal(again(x), block(x))


@every_block
def test_what_a_file_says_about_what_can_be_made_is_not_believed(name: str) -> None:
    """Format 1 stored it, so that a file could shift the strips of a block elsewhere than its spec says."""
    block = _block(*BLOCKS[name])
    state = {key: value for key, value in block.__getstate__().items() if key != FORMAT_KEY}
    again = type(block).__new__(type(block))
    again.__setstate__(state | dict.fromkeys(block.DERIVED, "nonsense"))
    assert all(getattr(again, key) == getattr(block, key) for key in block.DERIVED)


@pytest.mark.parametrize("number", [3, 0, True, "2", None])
@pytest.mark.parametrize("thing", ["spec", *BLOCKS])
def test_a_state_of_a_later_format_is_refused(thing: str, number: object) -> None:
    value: Any = CONV if thing == "spec" else _block(*BLOCKS[thing])
    with pytest.raises(ValueError, match="format"):
        type(value).__new__(type(value)).__setstate__(value.__getstate__() | {FORMAT_KEY: number})


def test_a_file_of_a_later_format_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = _block(*BLOCKS["hetconv"])
    monkeypatch.setattr(HetConv, "FORMAT", 3)
    surgeon.save(block, tmp_path / "later.pt")
    assert surgeon.load(tmp_path / "later.pt")
    monkeypatch.undo()
    with pytest.raises(
        surgeon.errors.ModelError, match="later version of surgeon: it holds a HetConv of format 3"
    ) as caught:
        surgeon.load(tmp_path / "later.pt")
    assert "\n" not in str(caught.value)


def test_a_spec_is_read_by_name_and_from_the_list_that_it_was() -> None:
    made = ConvSpec.__new__(ConvSpec)
    made.__setstate__({"c_in": 3, "c_out": 8, "kernel": (3, 3)})
    assert made == ConvSpec(3, 8, (3, 3))
    old = ConvSpec.__new__(ConvSpec)
    old.__setstate__([3, 8, (3, 3), (1, 1), "same", (1, 1), 1, False, "zeros"])
    assert old == ConvSpec(3, 8, (3, 3), padding="same", bias=False)


@pytest.mark.parametrize("name", ["acblock-split-border", "hetconv-interleaved"])
def test_blocks_of_format_1_are_of_today_once_they_are_read(name: str) -> None:
    model = surgeon.load(GOLDEN / f"{name}.pt", allow=("golden_nets",))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert blocks
    for block in blocks:
        again = copy.deepcopy(block)
        assert vars(again).keys() == vars(block).keys()
        assert vars(block).keys() >= block.DERIVED


def test_a_block_without_a_spec_is_refused() -> None:
    with pytest.raises(ValueError, match="OctaveConv has a spec that is not a ConvSpec"):
        surgeon.OctaveConv.__new__(surgeon.OctaveConv).__setstate__({"spec": 3})


def test_a_rewritten_module_that_does_not_say_what_it_was_is_refused() -> None:
    made = surgeon.nn.Rewritten.__new__(surgeon.nn.Rewritten)
    with pytest.raises(ValueError, match="does not say which class"):
        made.__setstate__({"program": {"format": 2, "inputs": [], "steps": [], "output": None}})


def test_models_without_numbers_are_folded_unmeasured_and_not_compared() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    converted = surgeon.convert(net, "acnet", (1, 3, 8, 8)).to("meta")
    fused = surgeon.fuse(converted)
    assert "whole" not in surgeon.history(fused)[-1].measured
    with pytest.raises(surgeon.errors.VerifyError, match="A and B: parameters are on the meta device"):
        surgeon.verify(converted, fused, (1, 3, 8, 8))

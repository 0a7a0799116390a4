"""Networks with blocks go where the user's went: torch.jit.trace, torch.export, torch.compile, torch.jit.script."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon

SHAPE = (2, 3, 32, 32)
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated")  # torch.jit, as a whole


class Net(nn.Module):
    """Strides, a concatenation whose low channels lie in two places, a norm, and inputs that have names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(16), nn.Conv2d(32, 16, 3, padding=1, stride=2)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        y = self.b(self.a(image))
        made: Tensor = self.head(self.c(torch.cat([y, self.norm(y).relu()], 1)).relu()) * scale
        return made


@pytest.fixture(scope="module", params=["converted", "fused"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = surgeon.convert(Net().eval(), "octave", SHAPE, overrides=["rules[1].with.min_size=2"])
    assert isinstance(made, surgeon.nn.Rewritten)
    return made if request.param == "converted" else surgeon.fuse(made)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is deprecated", category=Warning)  # torch.jit itself
        yield


@pytest.mark.parametrize("with_gradients", [True, False])
def test_it_is_traced_and_takes_other_sizes(net: nn.Module, with_gradients: bool) -> None:
    with no_warnings(), torch.set_grad_enabled(with_gradients):
        traced: Any = torch.jit.trace(net, torch.randn(SHAPE))  # type: ignore[no-untyped-call]
    for shape in (SHAPE, (1, 3, 20, 27)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.allclose(traced(x), net(x), atol=1e-6)


@pytest.mark.parametrize("strict", [True, False])
def test_it_is_exported_with_dynamic_shapes_by_name(net: nn.Module, strict: bool) -> None:
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(net, (torch.randn(SHAPE),), dynamic_shapes={"image": sizes}, strict=strict)
    assert [spec.arg.name for spec in exported.graph_signature.input_specs][-1] == "image"
    x = torch.randn(5, 3, 48, 40)
    with torch.no_grad():
        assert torch.allclose(exported.module()(x), net(x), atol=1e-6)


def test_it_is_compiled_in_one_graph(net: nn.Module) -> None:
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x = torch.randn(SHAPE)
    assert torch.allclose(compiled(x), net(x), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(compiled(x), net(x), atol=1e-6)


def test_what_torchscript_cannot_compile_says_so_in_a_sentence(net: nn.Module) -> None:
    with pytest.raises(surgeon.errors.CaptureError, match=r"the graph of a Net .*jit\.script.*Use torch\.jit\.trace"):
        torch.jit.script(net)


def plain(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    convs = nn.Conv2d(8, 8, 3, padding=1, **options), nn.Conv2d(8, 8, 3, padding=1, **options)
    return nn.Sequential(convs[0], nn.BatchNorm2d(8), nn.ReLU(), convs[1]).eval()


@pytest.mark.parametrize("options", [{}, {"padding_mode": "reflect"}, {"groups": 2}, {"stride": 2}])
def test_an_acblock_is_compiled_by_torchscript(options: dict[str, Any]) -> None:
    net = surgeon.convert(plain(**options), "acnet", (1, 8, 12, 12))
    x = torch.randn(1, 8, 12, 12)
    for one in (net, surgeon.fuse(net)):
        with torch.no_grad():
            assert torch.allclose(torch.jit.script(one)(x), one(x), atol=1e-6)
    assert net[0].in_channels == 8


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("acnet-border", [], "cannot compile an ACBlock whose strips see a shifted input, unless it is fused first"),
        ("hetconv-p4", [], "cannot compile a HetConv"),
        ("octave", ["rules[1].with.seams=keep", "rules[1].with.min_size=2"], "cannot compile an OctaveConv"),
    ],
)
def test_other_blocks_say_that_they_are_traced(recipe: str, overrides: list[str], said: str) -> None:
    net = surgeon.convert(plain(), recipe, (1, 8, 12, 12), overrides=overrides)
    with pytest.raises(surgeon.errors.CaptureError, match=rf"{said}.*Use torch\.jit\.trace") as caught:
        torch.jit.script(net)
    assert "\n" not in str(caught.value)

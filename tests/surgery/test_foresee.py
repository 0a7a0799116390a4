"""What a network with octave convs needs of the islands that become graphs, in eval mode, in training and around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon
from torch import Tensor, nn

import surgeon
from surgeon.analysis.rewritten import Rewritten
from surgeon.octave.rules.elementwise import Elementwise
from surgeon.octave.stream_graph import StreamGraph, StreamNodes

SHAPE = (2, 3, 32, 32)


class Back(nn.Module):
    """What becomes a graph, unless its class is needed."""

    depth = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.width = 16

    def forward(self, x: Tensor) -> Tensor:
        return self.helped(self.c(self.b(self.a(x)).relu()))

    def helped(self, x: Tensor) -> Tensor:
        return x.relu()

    def penalty(self) -> Tensor:
        return self.b.weight.square().mean()

    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.a(x)).relu())
        return y

    def again(self, x: Tensor) -> Tensor:
        y: Tensor = self(x) * 2
        return y

    @property
    def share(self) -> float:
        return 0.5


class Net(nn.Module):
    """A network that no tracing follows, around one that becomes a graph."""

    def __init__(self, extra: Callable[[Net, Tensor], Tensor], back: nn.Module | None = None) -> None:
        super().__init__()
        self.back, self.head, self.extra = back or Back(), nn.Conv2d(16, 4, 1), extra

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.back(x))
        if self.training:
            y = y + self.more(y)
        return y if y.sum() > -1e30 else -y

    def more(self, y: Tensor) -> Tensor:
        return y * 0


class Calls(Net):
    def more(self, y: Tensor) -> Tensor:
        return self.back.penalty()


class CallsByAnotherName(Net):
    def more(self, y: Tensor) -> Tensor:
        back = self.back
        return back.penalty() + back.width


class CallsWhatItLooksUp(Net):
    def more(self, y: Tensor) -> Tensor:
        return getattr(self.back, "penalty")()  # noqa: B009


class ReadsAProperty(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * self.back.share


class ReadsOfTheClass(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * self.back.depth


class AsksForTheClass(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * isinstance(self.back, Back)


class AsksForTheClassInALoop(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * sum(type(child) is Back for child in (self.back, self.head))


class Iterates(Net):
    def more(self, y: Tensor) -> Tensor:
        for layer in self.back:
            y = y + layer.weight.mean()
        return y


class TakesOne(Net):
    def more(self, y: Tensor) -> Tensor:
        return self.back[0].weight.mean() + len(self.back)


class ReadsAnAttribute(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * self.back.width


class CallsASubmodule(Net):
    def more(self, y: Tensor) -> Tensor:
        return self.back.c(self.back.b(self.back.a(torch.randn(SHAPE, device=y.device)))).mean()


class CallsAMethodThatConvolves(Net):
    def more(self, y: Tensor) -> Tensor:
        return self.back.features(torch.randn(SHAPE, device=y.device)).mean()


class LooksAtTheName(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * (self.back.__class__.__name__ == "Back")


class AppendsToAList(Net):
    """A list has an `append`, as the sequence has that is called."""

    def forward(self, x: Tensor) -> Tensor:
        made = []
        made.append(self.back(x))
        return super().forward(x) + made[0].mean()


class HasItsOwn(Net):
    """Its own method has the name of one of the other class."""

    def more(self, y: Tensor) -> Tensor:
        return self.penalty()

    def penalty(self) -> Tensor:
        return self.back.b.weight.mean()


def sequence() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))


def net_of(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind(torch.clone, sequence() if kind in (Iterates, TakesOne, AppendsToAList) else None).eval()


KEPT = (Net, Calls, CallsByAnotherName, CallsWhatItLooksUp, ReadsAProperty, ReadsOfTheClass, AsksForTheClass)
KEPT += (Iterates, TakesOne, ReadsAnAttribute, CallsASubmodule, CallsAMethodThatConvolves, AppendsToAList, HasItsOwn)


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_rewritten_module_keeps_stands_in_nobodys_way(kind: type[Net]) -> None:
    net = net_of(kind)
    plan = surgeon.plan(net, "octave", SHAPE)
    converted = surgeon.convert(net, plan)
    assert isinstance(converted.back, Rewritten)
    assert isinstance(converted.back, type(net.back))
    converted.train()(torch.randn(SHAPE)).mean().backward()
    assert surgeon.history(converted)[-1].plan == plan.to_dict()
    assert surgeon.verify(converted, surgeon.fuse(converted), SHAPE).equivalent


@pytest.mark.parametrize("kind", [AsksForTheClassInALoop, LooksAtTheName])
def test_a_module_whose_exact_class_is_asked_for_stays_what_it_is(kind: type[Net]) -> None:
    net = net_of(kind)
    plan = surgeon.plan(net, "octave", SHAPE)
    assert [(seam.island, seam.kind) for seam in plan.seams] == [("back", "local")]
    assert f"{kind.__name__}.more asks whether the class of it is Back itself" in plan.seams[0].reason
    assert type(surgeon.convert(net, plan).back) is Back


def test_a_hook_that_asks_for_the_exact_class_keeps_it() -> None:
    net = net_of(Net)
    net.back.a.register_forward_hook(lambda module, args, out: out * (type(net.back) is Back))
    plan = surgeon.plan(net, "octave", SHAPE)
    assert "a hook of back.a asks whether the class of it is Back itself" in plan.seams[0].reason


def test_a_method_that_convolves_by_itself_computes_what_the_forward_does() -> None:
    """Its convs and norms split and join for themselves, and so in eval mode every number is the same."""
    torch.manual_seed(0)
    converted = surgeon.convert(Back().eval(), "octave", SHAPE)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        whole = converted(x)
        assert torch.allclose(converted.features(x).relu(), whole, atol=1e-6)
        assert torch.equal(converted.again(x), 2 * whole)
        fused = surgeon.fuse(converted)
        assert torch.allclose(fused.features(x).relu(), whole, atol=1e-5)


def test_an_island_whose_graph_does_not_train_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rule is wrong in train mode only, its island is left as it is, and the others become graphs."""

    class Two(Net):
        def __init__(self) -> None:
            super().__init__(torch.clone)
            self.front = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
            self.back.a = nn.Conv2d(8, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.front(x))

    right = Elementwise.rewrite
    torch.manual_seed(0)
    assert surgeon.plan(Two().eval(), "octave", SHAPE).rewritten == ("back", "front")
    monkeypatch.setattr(Elementwise, "rewrite", lambda *given: _spoilt(right(*given), given[2]))
    plan = surgeon.plan(Two().eval(), "octave", SHAPE)
    assert plan.rewritten == ("front",)
    assert plan.seams[0].island == "back"
    assert "as a graph it does not run: RuntimeError: one of the variables needed for gradient" in plan.seams[0].reason


def _spoilt(made: StreamNodes, graph: StreamGraph) -> StreamNodes:
    """A sigmoid whose result is changed in place: autograd needs it as it was."""
    sigmoid = graph.call(torch.sigmoid, made.high)
    changed = graph.call(torch.relu_, sigmoid)
    return StreamNodes(graph.call(torch.add, changed, sigmoid), made.low)


def test_the_command_says_why_and_what_it_writes_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{Path(__file__)}:asks"
    assert run_surgeon("convert", name, "-r", "octave", "-i", "2,3,32,32", "-o", tmp_path / "net.pt") == 0
    assert "AsksForTheClassInALoop.more asks whether" in " ".join(capsys.readouterr().out.split())


def asks() -> nn.Module:
    return net_of(AsksForTheClassInALoop)

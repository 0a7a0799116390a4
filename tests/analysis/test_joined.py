"""Norms of two streams and what follows them are one step in training, where nobody can tell."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import narrow_torchvision, relative, shake_
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn import functional as F

import surgeon
from surgeon.analysis import joined, program, rewritten
from surgeon.blocks import pairs
from surgeon.blocks.base import Operator
from surgeon.blocks.pairs import PairNorm
from surgeon.one_pass import normed, where

SHAPE = (2, 8, 8, 10)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, str]]]:
    """Let one pass be used on the CPU as on CUDA, and note each: whether something is added, and the activation."""
    pytest.importorskip("triton")
    made: list[tuple[bool, str]] = []
    own = normed.run

    def noted(z: Tensor, norm: normed.Norm, beside: Tensor | None, then: str) -> Tensor:
        made.append((beside is not None, then))
        return own(z, norm, beside, then)

    monkeypatch.setattr(normed, "run", noted)
    monkeypatch.setattr(where, "on_cpu", True)
    return made


class Block(nn.Module):
    """What residual networks do, in the way that `ends` says."""

    def __init__(
        self, ends: Callable[[Tensor, Tensor], Tensor], norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.norm, self.other, self.side = norm(8), norm(8), norm(8)
        self.ends = ends

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.other(self.second(F.relu(self.norm(x))))
        return self.last(self.ends(y, self.side(self.third(x))))


def in_place(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return F.relu(y, inplace=True)


def into_the_other(y: Tensor, x: Tensor) -> Tensor:
    z = x * 2
    x += y
    return F.relu(x) + z


ENDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[tuple[bool, str]]]] = {
    "sum and relu": (lambda y, x: F.relu(y + x), [(True, "relu")]),
    "the other way round": (lambda y, x: torch.add(x, y).relu_(), [(True, "relu")]),
    "in place": (in_place, [(True, "relu")]),
    "into the other": (into_the_other, [(True, "relu")]),
    "a sum alone": (lambda y, x: y + x, [(True, "")]),
    "a sum with itself": (lambda y, x: F.silu(y + y) * x, []),
    "another step between": (lambda y, x: F.hardswish(y.abs() * x), []),
    "an activation alone": (lambda y, x: F.hardswish(y) * x, [(False, "hardswish")]),
    "an activation that is not known": (lambda y, x: F.gelu(y) * x, []),
    "what is added comes from it": (lambda y, x: F.relu6(y + y.sigmoid()) * x, []),
    "a weighted sum": (lambda y, x: torch.add(y, x, alpha=2), []),
}


RECIPE = {
    "surgeon": 1,
    "title": "octaves",
    "rules": [{"swap": "octave", "match": {"kernel": 3}, "with": {"min_size": 1}}],
}


def octave(net: nn.Module, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, "on_cpu", False)
        model = surgeon.convert(shake_(net).double(), RECIPE, shape)
    assert any(isinstance(module, PairNorm) for module in model.modules())
    return model.train()


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, all gradients, and the buffers afterwards, of a network that is left as it is."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert x.grad is not None
    return [y.detach(), x.grad, *grads, *(b.double() for b in model.buffers())]


def alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    assert len(found) == len(expected)
    return all(relative(*pair) <= 1e-12 for pair in zip(found, expected, strict=True))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plainly(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(where, "on_cpu", False)
        return step(model, x)


@pytest.mark.parametrize("ends", ENDS)
def test_a_step_of_training_is_the_same(
    ends: str, passes: list[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, wanted = ENDS[ends]
    model, x = octave(Block(how)), noise(*SHAPE)
    expected = plainly(model, x, monkeypatch)
    assert not passes
    assert alike(step(model, x), expected)
    assert sorted(passes) == sorted(2 * [(False, "relu"), *wanted])  # each stream alone


def test_elsewhere_not_a_bit_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = octave(Block(in_place)), noise(*SHAPE)
    found = step(model, x)
    own = program.compiled(model.program)
    vars(model)["_run"] = own
    assert all(torch.equal(*pair) for pair in zip(found, step(model, x), strict=True))


@pytest.mark.parametrize("settings", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_norms_of_every_setting_are_the_same(
    settings: dict[str, Any], passes: list[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = octave(Block(in_place, lambda c: nn.BatchNorm2d(c, eps=1e-3, **settings))), noise(*SHAPE)
    expected = plainly(model, x, monkeypatch)
    assert alike(step(model, x), expected)
    assert len(passes) == 4


def graph_of(*, target: Any = operator.add, turned: bool = False, between: str = "") -> tuple[fx.Graph, nn.ModuleDict]:
    """A norm of two streams, a step or none, a sum of each stream, the first one into what is added."""
    norm = nn.BatchNorm2d(8)
    pairs.make_pair_norm_(norm, ((4, 8),))
    graph = fx.Graph()
    h, c, x = (graph.placeholder(name) for name in ("h", "c", "x"))
    made = graph.call_module("norm", ((h, c),))
    parts = [graph.call_function(operator.getitem, (made, i)) for i in (0, 1)]
    if between == "the norm":
        graph.call_module("norm", ((h, c),))
    elif between:
        graph.call_method(between, (h,))
    sums = [graph.call_function(target, (x, part) if turned else (part, x)) for part in parts]
    graph.output(tuple(sums))
    return graph, nn.ModuleDict({"norm": norm})


def test_what_would_be_seen_is_left_step_by_step() -> None:
    def count(**how: Any) -> int:
        graph, modules = graph_of(**how)
        return joined.join_(graph, dict(modules.named_modules()))

    assert count() == count(turned=True) == count(target=operator.iadd) == 1
    assert count(target=operator.iadd, turned=True) == 0  # others see the map into which the sum is written
    assert count(between="neg_") == count(between="the norm") == 0


@pytest.mark.parametrize("low", [((4, 6),), ((1, 2), (4, 6))], ids=str)
def test_what_the_class_of_a_norm_runs_behind_it_is_in_its_pass(
    low: tuple[tuple[int, int], ...], passes: list[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = shake_(BatchNormAct2d(6, act_layer="silu")).double().train()
    pairs.make_pair_norm_(norm, low)
    given = [noise(2, 6 - sum(b - a for a, b in low), 6, 4), noise(2, sum(b - a for a, b in low), 3, 2)]

    def run() -> list[Tensor]:
        own, leaves = copy.deepcopy(norm), [x.clone().requires_grad_() for x in given]
        high, small = own(tuple(leaves))
        (high.square().sum() + small.pow(3).sum()).backward()
        return [high, small, *(t.grad for t in (*leaves, *own.parameters())), *(b.double() for b in own.buffers())]

    with monkeypatch.context() as patch:
        patch.setattr(where, "on_cpu", False)
        expected = run()
    assert not passes
    assert alike(run(), expected)
    assert passes == [(False, "silu")] * 2


class WithModule(Block):
    def __init__(self) -> None:
        super().__init__(in_place)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        return self.last(self.act(self.other(self.second(x)) + self.side(self.third(x))))


def hook_the_norms(model: nn.Module, seen: list[str]) -> None:
    for norm in (model.norm, model.other):
        norm.register_forward_hook(lambda *_: seen.append("called"))


def hook_the_activation(model: nn.Module, seen: list[str]) -> None:
    model.act.register_forward_pre_hook(lambda *_: seen.append("called"))


def replace_the_activation(model: nn.Module, seen: list[str]) -> None:
    model.act.forward = lambda x: (seen.append("called"), F.relu(x))[1]


def replace_the_module(model: nn.Module, seen: list[str]) -> None:
    model.act = nn.GELU()
    hook_the_activation(model, seen)


def evaluate_the_norms(model: nn.Module, seen: list[str]) -> None:
    for norm in (model.norm, model.other):
        norm.eval()
    hook_the_activation(model, seen)


CHANGES = [hook_the_norms, hook_the_activation, replace_the_activation, replace_the_module, evaluate_the_norms]


@pytest.mark.parametrize("change", CHANGES)
def test_who_watches_or_changes_a_module_gets_every_call(
    change: Callable[[nn.Module, list[str]], None], passes: list[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = octave(WithModule()), noise(*SHAPE)
    model(x).sum().backward()  # so the steps are joined already
    assert passes
    passes.clear()
    seen: list[str] = []
    change(model, seen)
    expected = plainly(model, x, monkeypatch)
    count = len(seen)
    assert alike(step(model, x), expected)
    assert count
    assert len(seen) == 2 * count
    assert not passes


def test_evaluation_and_training_without_gradients_are_as_before(passes: list[tuple[bool, str]]) -> None:
    model, x = octave(WithModule()), noise(*SHAPE)
    model.eval()(x).sum().backward()
    with torch.no_grad():
        model.train()(x)
    assert not passes


def test_a_resnet_trains_in_one_pass_behind_each_conv(
    passes: list[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = narrow_torchvision("resnet18", num_classes=5)
    torch.manual_seed(0)
    options = ["rules[1].with.min_size=4"]
    model = surgeon.convert(shake_(net).double(), "octave", (1, 3, 32, 32), overrides=options).train()
    passes.clear()
    x = noise(2, 3, 32, 32)
    expected = plainly(model, x, monkeypatch)
    assert alike(step(model, x), expected)
    assert {(False, "relu"), (True, "relu")} == set(passes)
    norms = sum(isinstance(module, PairNorm) for module in model.modules())
    assert len(passes) == 2 * norms


def test_files_and_copies_hold_the_graph_that_they_held(passes: list[tuple[bool, str]], tmp_path: Path) -> None:
    model, x = octave(WithModule()), noise(*SHAPE)
    before = rewritten.graph_of(model)
    step(model, x)
    model(x).sum().backward()
    assert passes
    assert str(rewritten.graph_of(model)) == str(before)
    surgeon.save(model.eval(), tmp_path / "net.pt")
    opened = surgeon.load(tmp_path / "net.pt", allow=(__name__,))
    assert str(rewritten.graph_of(opened)) == str(before)
    report = surgeon.verify(model, surgeon.fuse(model), SHAPE)
    assert report.equivalent


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, path: str) -> bool:
        return isinstance(m, Operator | PairNorm) or super().is_leaf_module(m, path)


def test_tracing_sees_the_steps(passes: list[tuple[bool, str]]) -> None:
    model = octave(WithModule())
    graph = rewritten.graph_of(model)
    assert graph is not None
    assert [node.target for node in Tracer().trace(model).nodes] == [node.target for node in graph.nodes]


def test_compiled_in_bfloat16_for_any_batch_without_a_break() -> None:
    model = octave(WithModule()).float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x = torch.randn(batch, *SHAPE[1:])
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
            expected = copy.deepcopy(model)(x)
        assert relative(y.float(), expected.float()) <= 0.05
        y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fault", ["no activation", "nothing beside"])
def test_a_step_that_leaves_something_out_is_found(
    fault: str, passes: list[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(norm: nn.Module, input: pairs.Pair, beside: pairs.Beside, then: Sequence[nn.Module | str]) -> pairs.Pair:
        return pairs.finish(norm, input, *((beside, ("", "")) if fault == "no activation" else ((None, None), then)))

    model, x = octave(WithModule()), noise(*SHAPE)
    expected = plainly(model, x, monkeypatch)
    monkeypatch.setattr(joined, "finish", finish)
    assert relative(step(model, x)[0], expected[0]) > 1e-3

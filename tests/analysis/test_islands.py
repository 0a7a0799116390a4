"""Which parts of a network tracing understands, what is said of the others, and that looking leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable

import pytest
import tiny
import torch
import torchvision
from tiny import SHAPE, ConvNorm, conv3
from torch import Tensor, nn

import surgeon
from surgeon.analysis.islands import Opaque, capture
from surgeon.analysis.run import Call, observe
from surgeon.errors import CaptureError
from surgeon.models.call import Inputs

INPUT = torch.zeros(SHAPE)
MAP = Call(SHAPE, SHAPE)


def islands(model: nn.Module) -> list[str]:
    return [island.path for island in capture(model).islands]


def called(model: nn.Module) -> list[str]:
    """The modules that the graph of a network calls; it must be one island."""
    [island] = capture(model).islands
    return [node.target for node in island.graph.nodes if node.op == "call_module"]


# Islands


@pytest.mark.parametrize(
    "build",
    [
        ConvNorm,
        tiny.Own,
        tiny.FollowsStages,
        tiny.DropsOut,
        tiny.HasAnIdleArgument,
        tiny.MaySkipTheNorm,  # the whole model: its defaults are what it is called with
        tiny.TwoNames,
        tiny.TwoParents,
        conv3,
        torchvision.models.resnet18,
        pytest.param(tiny.TrainReturnsNothing),
        pytest.param(tiny.HoldsAConstant),
    ],
)
def test_a_network_that_can_be_followed_is_one_island(build: Callable[[], nn.Module]):
    found = capture(build())
    assert ([island.path for island in found.islands], found.opaque) == ([""] if build is not conv3 else [], [])


def test_the_mode_that_a_network_is_in_does_not_matter():
    assert islands(tiny.ActsOnItsMode().train()) == islands(tiny.ActsOnItsMode().eval()) == ["first", "second"]


def test_a_module_that_acts_on_its_mode_is_left_alone_and_the_step_is_named():
    found = capture(tiny.ActsOnItsMode())
    assert [island.path for island in found.islands] == ["first", "second"]
    [opaque] = found.opaque
    assert opaque.path == ""
    assert "train and eval" in opaque.reason
    assert opaque.reason.endswith("first at 'second.conv'")


def test_a_module_that_acts_on_values_is_left_alone_and_the_line_is_named():
    found = capture(tiny.ActsOnValues())
    assert [island.path for island in found.islands] == ["first", "second"]
    [opaque] = found.opaque
    lines, start = inspect.getsourcelines(tiny.ActsOnValues)
    line = start + next(i for i, text in enumerate(lines) if "the culprit" in text)
    assert f"(tracing.py:{line})" in opaque.reason
    assert "\n" not in opaque.reason


class Tail(nn.Module):
    """Four convs that two streams could go through, and something that no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        convs = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)]
        self.convs, self.skipped = nn.Sequential(nn.Conv2d(3, 16, 1), *convs), nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("count", torch.zeros(()))
        self.steps = 0

    def features(self, x: Tensor, *, skips: bool = False) -> Tensor:
        y = self.convs(x)
        return y if skips else y + self.skipped(y)


class DropsByPython(Tail):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x, skips=self.training and random.random() < 0.1)


class DropsByTorch(Tail):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x, skips=self.training and torch.rand(1).item() < 0.1)


class CountsInABuffer(Tail):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.features(x)


class CountsInAnAttribute(Tail):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.features(x) / self.steps


@pytest.mark.parametrize("build", [DropsByPython, DropsByTorch])
def test_a_forward_that_draws_is_not_taken_for_what_it_drew(build: Callable[[], nn.Module]):
    found = capture(build())
    assert [(one.path, "draws random numbers by itself" in one.reason) for one in found.opaque] == [("", True)]
    assert [island.path for island in found.islands] == ["convs"]


@pytest.mark.parametrize(("build", "name"), [(CountsInABuffer, "count"), (CountsInAnAttribute, "steps")])
def test_a_forward_that_remembers_stays_as_it_is(build: Callable[[], nn.Module], name: str):
    net = build()
    plan = surgeon.plan(net, "octave", (1, 3, 64, 64))
    assert f"its forward sets '{name}', which a rewritten graph would leave as it is" in {
        one.reason for one in plan.seams
    }
    converted = surgeon.convert(net, plan).train()
    for _ in range(3):
        converted(torch.randn(2, 3, 64, 64))
    assert getattr(converted, name) == getattr(net, name) + 3


def test_containers_are_not_tried_and_what_they_hold_is():
    found = capture(tiny.ActsOnValuesWithStages())
    assert [island.path for island in found.islands] == ["stages.0", "stages.1", "heads.a", "heads.b"]
    assert [opaque.path for opaque in found.opaque] == [""]


def test_what_holds_no_conv_is_not_looked_at():
    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("somebody called me")

    assert capture(nn.ModuleList([Head(), ConvNorm()])).opaque == []
    assert (islands(Head()), capture(Head()).opaque) == ([], [])


def test_an_optional_argument_that_decides_makes_a_child_opaque():
    found = capture(tiny.MaySkipTheNormInside())
    assert found.islands == []
    assert [opaque.path for opaque in found.opaque] == ["", "inner"]
    assert "optional" in found.opaque[1].reason


def test_an_optional_argument_that_decides_nothing_does_not():
    assert islands(tiny.HasAnIdleArgumentInside()) == ["inner"]


def test_a_module_under_two_names_is_looked_at_once():
    net = tiny.ActsOnValues()
    net.second = net.first
    assert islands(net) == ["first"]


def test_convs_norms_and_blocks_are_leaves_of_whatever_class():
    net = nn.Sequential(tiny.OwnConv(4, 4, 3), tiny.OwnNorm(4), nn.Sequential(conv3()))
    assert called(net) == ["0", "1", "2.0"]
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert called(converted) == ["0", "1", "2.0"]
    assert type(converted[2][0]).__name__ == "ACBlock"


def test_a_converted_network_has_the_islands_that_it_had():
    net = tiny.ActsOnValuesWithStages()
    assert islands(surgeon.convert(net, "acnet", SHAPE)) == islands(net)


# Calls


def convs_called(net: nn.Module) -> dict[str, list[Call]]:
    """What a run notes of convs; it notes norms too."""
    kinds = {name: type(module) for name, module in net.named_modules()}
    return {name: calls for name, calls in observe(net, [INPUT]).calls.items() if kinds[name] is not nn.BatchNorm2d}


def test_every_call_is_noted_with_its_shapes_in_order():
    calls = convs_called(tiny.CalledAtTwoSizes())
    small = (2, 4, 5, 4)
    assert calls == {"conv": [MAP, Call(small, small)]}
    stages = convs_called(tiny.FollowsStages())
    assert list(stages) == ["stages.0.conv", "stages.1.conv", "heads.a.conv", "heads.b.1"]
    strided = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2))
    assert observe(strided, [INPUT]).calls == {"0": [Call(SHAPE, (2, 6, 4, 3))]}


def test_a_closure_as_forward_cannot_be_copied() -> None:
    net = ConvNorm()
    net.forward = lambda x: ConvNorm.forward(net, x)
    with pytest.raises(CaptureError, match="the model has a function as its forward"):
        surgeon.convert(net, "acnet", SHAPE)


def test_blocks_are_noted_as_one_call():
    converted = surgeon.convert(ConvNorm(), "acnet", SHAPE)
    assert observe(converted, [INPUT]).calls["conv"] == [MAP]


def test_two_names_are_noted_under_the_first():
    assert convs_called(tiny.TwoNamesBothCalled()) == {"conv": [MAP, MAP]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_input_is_cast_to_what_the_network_is_stored_in(dtype: torch.dtype):
    assert convs_called(ConvNorm().to(dtype)) == {"conv": [MAP]}
    assert convs_called(tiny.NeedsValues().to(dtype)) == {"conv": [MAP, MAP]}


def test_a_network_that_needs_no_values_is_not_computed():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    huge = (64, 4, 20000, 20000)  # 400 GB
    assert observe(nn.Sequential(conv, conv), [torch.empty(huge, device="meta")]).calls == {"0": [Call(huge, huge)] * 2}


def test_a_network_that_needs_values_is_run_for_real():
    assert observe(tiny.NeedsValues(), [INPUT]).calls == {"conv": [MAP, MAP]}
    assert observe(tiny.NeedsValues(), [torch.full(SHAPE, 1e30)]).calls["conv"] != []
    with pytest.raises(CaptureError):
        observe(tiny.NeedsValues(), [INPUT], meta_only=True)


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (2, 4), (2, 4, 1, 1)])
def test_an_input_that_a_network_does_not_take_is_refused_in_one_line(shape: tuple[int, ...]):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten())
    with pytest.raises(CaptureError) as caught:
        observe(net, [torch.zeros(shape)])
    said = str(caught.value)
    assert "\n" not in said
    assert "×".join(map(str, shape)) in said
    assert "--input" in caught.value.todo
    assert caught.value.__cause__ is not None


def test_where_a_network_fails_is_said():
    class Fails(ConvNorm):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such thing\nand more")

    line = inspect.getsourcelines(Fails)[1] + 2
    with pytest.raises(CaptureError, match=rf"KeyError: .*\(test_islands\.py:{line}\)"):
        observe(Fails(), [INPUT])


# What cannot be copied


class Stubborn(ConvNorm):
    def __init__(self) -> None:
        super().__init__()
        self.stream = (part for part in "abc")


@pytest.mark.parametrize(
    "look",
    [
        capture,
        lambda net: observe(net, [INPUT]),
        lambda net: surgeon.plan(net, "acnet", SHAPE),
        pytest.param(lambda net: surgeon.convert(net, "acnet", SHAPE)),
    ],
    ids=["capture", "observe", "plan", "convert"],
)
def test_a_network_that_python_cannot_copy_is_refused(look: Callable[[nn.Module], object]):
    with pytest.raises(CaptureError, match=r"cannot be copied: TypeError: .*generator"):
        look(Stubborn())


# Traces

LOOKS: dict[str, Callable[[nn.Module], object]] = {
    "capture": capture,
    "observe": lambda net: observe(net, [INPUT]),
    "survey": lambda net: surgeon.survey(net, SHAPE),
    "guess": surgeon.survey,
    "plan": lambda net: surgeon.plan(net, "acnet", SHAPE),
    "convert": lambda net: surgeon.convert(net, "acnet", SHAPE),
    "verify": lambda net: surgeon.verify(net, copy.deepcopy(net), SHAPE),
}
looking = pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)


def everything(net: nn.Module) -> dict[str, object]:
    """All that a module knows of itself, in a form that can be compared."""
    found: dict[str, object] = {}
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                found[f"{path}:{name}"] = repr(value)
        for name, tensor in (*module.named_parameters(path, False), *module.named_buffers(path, False)):
            found[name] = (id(tensor), tensor._version, tensor.tolist(), tensor.requires_grad, tensor.grad)
    return found


@looking
def test_looking_leaves_no_trace(look: Callable[[nn.Module], object], capsys: pytest.CaptureFixture[str]):
    net = nn.Sequential(tiny.LeavesTraces(), tiny.ActsOnValues(), tiny.NeedsValues())
    net[0].conv.eval()  # flags of its own, not the root's
    before, generator, seed = everything(net), torch.get_rng_state(), random.getstate()
    look(net)
    assert everything(net) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == seed
    printed = capsys.readouterr()
    assert printed.out == ""
    assert set(printed.err.splitlines()) == {"forward was here"}


def test_running_it_would_have_left_traces(capsys: pytest.CaptureFixture[str]):
    """The test above looks at what changes."""
    net = tiny.LeavesTraces()
    before, generator = everything(net), torch.get_rng_state()
    with pytest.warns(UserWarning, match="forward was here"):
        net(INPUT)
    after = everything(net)
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {":calls", ":log", ":last", "seen", "bn:training", "idle.running_mean"}
    assert not torch.equal(torch.get_rng_state(), generator)
    assert capsys.readouterr().out == "forward was here\n"


@looking
def test_python_s_own_random_numbers_are_put_back_too(look: Callable[[nn.Module], object]):
    state = random.getstate()
    look(tiny.DrawsInPython())
    assert random.getstate() == state


class Caches(ConvNorm):
    """Keeps what it computed, as feature extractors do; Python cannot copy that."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize(
    "act", [lambda net: surgeon.convert(net, "acnet", SHAPE), surgeon.fuse], ids=["convert", "fuse"]
)
def test_a_network_that_keeps_what_it_computed_is_converted_or_refused(act: Callable[[nn.Module], nn.Module]):
    net = Caches()
    net(INPUT)
    with contextlib.suppress(CaptureError):
        act(net)


def test_what_is_not_called_as_a_whole_is_no_island() -> None:
    for build, path in ((tiny.TakesItsStagesOneByOne, "stages"), (tiny.CallsAnotherMethod, "part")):
        net = build().eval()
        assert [island.path for island in capture(net).islands] == [path]  # nothing tells
        found = capture(net, Inputs((INPUT,)))
        assert path not in [island.path for island in found.islands]
        assert Opaque(path, "the network calls its submodules, not the module itself") in found.opaque
        plan = surgeon.plan(net, "acnet", SHAPE)
        assert plan.swaps[0].takes_norm == ()


def test_a_part_that_is_called_by_its_forward_is_an_island_and_so_is_one_that_is_not_called() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.shared = ConvNorm(), ConvNorm(), nn.Sequential(conv3(), nn.ReLU())
            self.again = nn.Sequential(self.shared[0], nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            return self.one.forward(self.again(self.shared(x))) if x.sum() < 1e9 else self.other(x)

    found = capture(Chooses().eval(), Inputs((INPUT,)))
    assert [island.path for island in found.islands] == ["one", "other", "shared", "again"]

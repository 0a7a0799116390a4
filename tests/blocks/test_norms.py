"""Norms as networks write them: taken over exactly where they are batch norms, and left where they are not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import relative, shake_
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.ops.misc import FrozenBatchNorm2d

import surgeon
from surgeon.analysis.network import Network
from surgeon.blocks import norms
from surgeon.blocks.acblock import ACBlock
from surgeon.surgery.fold import fold_norms_
from surgeon.surgery.operate import place_, prepare

SHAPE = (1, 3, 12, 12)
EXACT = 1e-12


class Renamed(nn.BatchNorm2d):
    """Inherits everything."""


class RenamedAct(BatchNormAct2d):
    """Inherits everything, the activation too."""


class Ghost(nn.BatchNorm2d):
    """Normalises each half of a batch by itself, in train mode."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return torch.cat([super(Ghost, self).forward(half) for half in input.chunk(2)])


class FrozenByHand(nn.Module):
    """What DETR and many after it write: buffers, and an eps that only the forward knows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        w, b, mean, var = (getattr(self, name).reshape(1, -1, 1, 1) for name in self._buffers)
        scale = w * (var + self.eps_of_the_author).rsqrt()
        return x * scale + (b - mean * scale)

    eps_of_the_author = 1e-5


class OtherEps(FrozenByHand):
    """Holds the same tensors and computes something else."""

    eps_of_the_author = 1e-3


class UsesItsStatistics(nn.BatchNorm2d):
    """Subtracts the batch's mean and nothing of the running one, in train mode only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if not self.training else input - self.running_mean[:, None, None] * 0.5


class Raises(nn.BatchNorm2d):
    """Cannot be run by itself."""

    def forward(self, input: Tensor, extra: Tensor | None = None) -> Tensor:
        if extra is None:
            raise RuntimeError("it needs more than a map")
        return super().forward(input)


def with_prelu(channels: int) -> nn.Module:
    return BatchNormAct2d(channels, act_layer=nn.PReLU, drop_layer=nn.Dropout)


def split_act(channels: int) -> nn.Module:
    norm = SplitBatchNorm2d(channels, num_splits=2)
    norm.act = nn.SiLU()  # as timm's convert_splitbn_model gives it one
    return norm


# What a norm becomes inside a block, and what is left of it.
TAKEN: dict[str, tuple[Callable[[int], nn.Module], type, type]] = {
    "timm's, with ReLU": (BatchNormAct2d, nn.BatchNorm2d, norms.NormRest),
    "timm's, with PReLU and dropout": (with_prelu, nn.BatchNorm2d, norms.NormRest),
    "a subclass of timm's": (RenamedAct, nn.BatchNorm2d, norms.NormRest),
    "timm's frozen one": (FrozenBatchNormAct2d, norms.FrozenNorm, norms.NormRest),
    "timm's split one": (split_act, SplitBatchNorm2d, norms.NormRest),
    "torchvision's frozen one": (FrozenBatchNorm2d, FrozenBatchNorm2d, nn.Identity),
    "a frozen one by hand": (FrozenByHand, FrozenByHand, nn.Identity),
    "a subclass that inherits its forward": (Renamed, Renamed, nn.Identity),
    "a ghost norm": (Ghost, Ghost, nn.Identity),
}
every_kind = pytest.mark.parametrize("kind", TAKEN)


def network(make: Callable[[int], nn.Module]) -> nn.Module:
    """Two convs, with and without bias, each with such a norm behind it, in float64."""
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1, bias=False)
    net = nn.Sequential(convs[0], make(6), convs[1], make(6), nn.Conv2d(6, 2, 1)).double()
    return shake_(net).eval()


def x(batch: int = 4) -> Tensor:
    return torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(model: nn.Module) -> Tensor:
    torch.manual_seed(5)  # where there is dropout
    out: Tensor = model(x())
    return out


def new_name(name: str) -> str:
    """Where a parameter of such a network is found in the converted one."""
    index, _, rest = name.partition(".")
    if index == "4" or rest.startswith("act"):
        return name
    return f"{index}.square_conv.{rest}" if index in "02" else f"{int(index) - 1}.square_bn.{rest}"


@every_kind
def test_a_norm_of_any_class_is_taken_over_exactly_in_both_modes(kind: str) -> None:
    make, core, left = TAKEN[kind]
    net = network(make)
    plan = surgeon.plan(net, "acnet", SHAPE)
    assert [(entry.takes_norm, entry.note) for entry in plan.swaps] == [(("1",), None), (("3",), None)]
    converted = surgeon.convert(net, plan)
    block = converted[0]
    assert isinstance(block, ACBlock)
    assert (type(block.square_bn), type(converted[1])) == (core, left)
    assert {type(norm) for norm in (block.ver_bn, block.hor_bn)} == {nn.BatchNorm2d}
    assert relative(converted(x()), net(x())) <= EXACT

    net, converted = copy.deepcopy(net).train(), copy.deepcopy(converted).train()
    outs = [run(net), run(converted)]
    assert relative(outs[1], outs[0]) <= EXACT
    for out in outs:
        out.square().sum().backward()
    for name, parameter in net.named_parameters():
        if name != "0.bias":  # which has gone into the running mean
            assert relative(converted.get_parameter(new_name(name)).grad, parameter.grad) <= 1e-10, name
    for i in (0, 2):  # what a step of training leaves in the statistics
        bias = net[i].bias if net[i].bias is not None else 0
        assert relative(converted[i].square_bn.running_mean + bias, net[i + 1].running_mean) <= EXACT
        assert relative(converted[i].square_bn.running_var, net[i + 1].running_var) <= EXACT


@every_kind
def test_folded_it_needs_no_surgeon_and_verify_can_tell(kind: str) -> None:
    net = network(TAKEN[kind][0])
    converted = surgeon.convert(net, "acnet", SHAPE)
    fused = surgeon.fuse(converted)
    assert {type(module).__module__.partition(".")[0] for module in fused.modules()} <= {"torch"}
    assert relative(fused(x()), net(x())) <= EXACT
    assert surgeon.verify(net, converted, SHAPE).equivalent
    assert surgeon.verify(net, fused, SHAPE).equivalent
    for model in (converted, fused):
        del model.surgeon_provenance
        assert surgeon.verify(net, model, SHAPE).equivalent
        assert surgeon.verify(model, net, SHAPE).equivalent
    with torch.no_grad():
        fused[2].weight[0, 0, 1, 1] += 1e-5
    assert not surgeon.verify(net, fused, SHAPE).equivalent


def test_the_rest_keeps_its_keys_and_weights_go_back() -> None:
    net = network(with_prelu)
    converted = surgeon.convert(net, "acnet", SHAPE)
    keys = {key for key in converted.state_dict() if not key.startswith(("0.", "2.", "4."))}
    assert keys == {"1.act.weight", "3.act.weight"}
    assert keys < surgeon.fuse(converted).state_dict().keys() & net.state_dict().keys()
    held = {f"0.square_bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert held < converted.state_dict().keys()
    assert converted[1].weight is None


def test_frozen_statistics_stay_buffers_and_are_not_trained() -> None:
    converted = surgeon.convert(network(FrozenBatchNormAct2d), "acnet", SHAPE).train()
    square = converted[0].square_bn
    assert not [*square.parameters()]
    before = copy.deepcopy(square.state_dict())
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    run(converted).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in square.state_dict().items())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in converted[0].ver_bn.parameters())


@every_kind
def test_with_kept_norms_the_weights_load_into_the_users_own_network(kind: str) -> None:
    make = TAKEN[kind][0]
    net = network(make)
    kept = surgeon.fuse(surgeon.convert(net, "acnet", SHAPE), keep_norms=True)
    assert [type(module) for module in kept] == [type(module) for module in net]
    own = network(make)
    own.load_state_dict(kept.state_dict(), strict=True)
    assert relative(own(x()), net(x())) <= EXACT
    assert surgeon.verify(net, kept, SHAPE).equivalent


@every_kind
def test_for_timing_a_norm_of_any_class_is_folded_into_a_plain_conv(kind: str) -> None:
    net = network(TAKEN[kind][0])
    folded = copy.deepcopy(net)
    assert fold_norms_(Network(folded)) == ("1", "3")
    assert {type(module).__module__.partition(".")[0] for module in folded.modules()} <= {"torch"}
    assert relative(folded(x()), net(x())) <= EXACT


@pytest.mark.parametrize("init", ["split", "scratch"])
@every_kind
def test_other_starts_go_with_every_kind(init: str, kind: str) -> None:
    net = network(TAKEN[kind][0])
    converted = surgeon.convert(net, "acnet", SHAPE, overrides=[f"rules[0].with.init={init}"])
    assert (relative(converted(x()), net(x())) <= EXACT) == (init == "split")
    fused = surgeon.fuse(converted)
    assert relative(fused(x()), converted(x())) <= EXACT


@every_kind
def test_undoing_gives_back_the_norms_as_they_were(kind: str) -> None:
    net = network(TAKEN[kind][0])
    before, names, state = run(net), [type(m) for m in net.modules()], pickle.dumps(net.state_dict())
    seen, plan = Network(net), surgeon.plan(net, "acnet", SHAPE)
    undo = place_(net, prepare(net, plan), seen)
    assert isinstance(net[0], ACBlock)
    undo()
    assert [type(module) for module in net.modules()] == names
    assert pickle.dumps(net.state_dict()) == state
    assert torch.equal(run(net), before)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["timm's, with PReLU and dropout", "timm's frozen one", "torchvision's frozen one"])
def test_files_hold_them(kind: str, suffix: str, tmp_path: Path) -> None:
    net = network(TAKEN[kind][0])
    converted = surgeon.convert(net, "acnet", SHAPE)
    for name, model in {"converted": converted, "fused": surgeon.fuse(converted)}.items():
        path = tmp_path / f"{name}{suffix}"
        surgeon.save(model, path)
        if suffix == ".safetensors":
            surgeon.save(net, tmp_path / "net.pt", force=True)
        loaded = surgeon.load(path, **({"arch": str(tmp_path / "net.pt")} if suffix == ".safetensors" else {}))
        assert torch.equal(run(loaded), run(model))
        assert surgeon.verify(net, loaded, SHAPE).equivalent


def test_a_rest_without_what_it_runs_is_not_read() -> None:
    rest = surgeon.convert(network(BatchNormAct2d), "acnet", SHAPE)[1]
    for change in ({"then": ("drop", "other")}, {"then": "act"}, {"base": "os.system"}, {"origin": None}):
        state = rest.__getstate__() | change
        with pytest.raises(ValueError, match="NormRest"):
            norms.NormRest.__new__(norms.NormRest).__setstate__(state)


# Restoring the class that a norm had.


@pytest.mark.parametrize("kind", [kind for kind, (_, _, left) in TAKEN.items() if left is norms.NormRest])
def test_a_rest_and_a_norm_make_the_module_that_there_was(kind: str) -> None:
    net = network(TAKEN[kind][0])
    converted = surgeon.convert(net, "acnet", SHAPE)
    rest, norm = converted[3], converted[2].square_bn  # no bias has moved into this one
    restored = norms.restore(rest, norm)
    assert type(restored) is type(net[3])
    assert restored.state_dict().keys() == net[3].state_dict().keys()
    assert all(torch.equal(one, net[3].state_dict()[name]) for name, one in restored.state_dict().items())
    assert vars(restored).keys() == vars(net[3]).keys()
    assert list(restored._modules) == list(net[3]._modules) or "split" in kind
    y = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    assert torch.equal(restored(y), net[3](y))
    torch.manual_seed(0)
    expected = copy.deepcopy(net[3]).train()(y)
    torch.manual_seed(0)
    assert torch.equal(copy.deepcopy(restored).train()(y), expected)
    assert type(rest) is norms.NormRest


def test_nothing_is_imported_that_is_not_in_the_table() -> None:
    converted = surgeon.convert(network(BatchNormAct2d), "acnet", SHAPE)
    converted[1].origin = "antigravity.Norm"
    assert type(norms.restore(converted[1], converted[0].square_bn)) is BatchNormAct2d
    converted[1].origin = "torch.nn.Linear"  # it is there, and no norm of that kind
    assert type(norms.restore(converted[1], converted[0].square_bn)) is BatchNormAct2d


def test_a_frozen_class_is_not_given_a_norm_that_is_trained() -> None:
    converted = surgeon.convert(network(FrozenBatchNormAct2d), "acnet", SHAPE)
    with pytest.raises(TypeError, match="holds buffers"):
        norms.restore(converted[1], converted[0].ver_bn)


def test_a_synchronised_norm_with_an_activation_becomes_a_synchronised_norm() -> None:
    norm = SyncBatchNormAct(6)
    norm.drop, norm.act = nn.Identity(), nn.ReLU()
    converted = surgeon.convert(network(lambda _: copy.deepcopy(norm)), "acnet", SHAPE)
    assert {type(converted[0].get_submodule(name)) for name in ("square_bn", "ver_bn")} == {nn.SyncBatchNorm}
    assert type(norms.restore(converted[1], converted[0].square_bn)) is SyncBatchNormAct


# What is no batch norm, or nobody can tell.


class Gained(nn.BatchNorm2d):
    """A batch norm for as long as its gain has not been trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.gain


class OfPositiveScale(nn.BatchNorm2d):
    """A batch norm for as long as no γ is negative."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        held = (self.running_mean, self.running_var, self.weight.abs(), self.bias)
        return nn.functional.batch_norm(input, *held, self.training, self.momentum or 0.0, self.eps)


def parametrised(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    return parametrize.register_parametrization(norm, "weight", nn.Softplus())


def with_a_child(channels: int) -> nn.Module:
    norm = Renamed(channels)
    norm.gate = nn.Sigmoid()  # that nobody runs; but who knows what reads it
    return norm


@pytest.mark.parametrize(
    ("make", "index", "said"),
    [
        (OtherEps, 1, "1 is a OtherEps, whose own forward is not the batch norm of its statistics"),
        (UsesItsStatistics, 1, "1 is a UsesItsStatistics, whose own forward in train mode depends on the bias"),
        (Gained, 1, "1 is a Gained, whose own forward is not the batch norm of its statistics"),
        (OfPositiveScale, 1, "1 is a OfPositiveScale, whose own forward is not the batch norm of its statistics"),
        (Raises, 1, "1 is a Raises, whose own forward cannot be tried by itself: it needs more than a map"),
        (lambda c: nn.GroupNorm(2, c), 1, "1 is a GroupNorm, which mixes channels; only a batch norm can be taken"),
        (lambda c: nn.InstanceNorm2d(c), 1, "1 is a InstanceNorm2d, which takes its statistics from each image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_taken_over_says_why(make: Callable[[int], nn.Module], index: int, said: str) -> None:
    torch.manual_seed(0)
    net = shake_(nn.Sequential(nn.Conv2d(3, 6, 3), make(6), nn.Conv2d(6, 2, 1)).double()).eval()
    if make is Raises:
        plan = surgeon.plan(net[:1].append(make(6)), "acnet")
        assert said in str(plan.convs[0].note)
        return
    entry = surgeon.plan(net, "acnet", SHAPE).convs[0]
    assert not entry.takes_norm
    assert said in str(entry.note)
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert type(converted[1]) is type(net[1])
    assert relative(converted(x()), net(x())) <= EXACT


def test_only_a_conv_with_a_bias_asks_what_a_bias_does() -> None:
    net = network(UsesItsStatistics)
    assert [entry.takes_norm for entry in surgeon.plan(net, "acnet", SHAPE).swaps] == [(), ("3",)]


def test_a_norm_whose_weight_is_computed_is_not_taken_by_its_looks() -> None:
    for make in (parametrised, with_a_child):
        norm = make(6)
        assert not norms.is_known(norm)


def test_a_forward_of_ones_own_cannot_be_tried_without_numbers() -> None:
    net = network(Ghost).to("meta")
    said = str(surgeon.plan(net, "acnet").convs[0].note)
    assert "1 is a Ghost, which has a forward of its own and no numbers to try it with" in said


def test_trying_a_norm_leaves_it_and_the_random_state_alone() -> None:
    net = network(Ghost)
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    surgeon.plan(net, "acnet", SHAPE)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_older_names_of_timms_norms_are_known() -> None:
    kind = type("BatchNormAct2d", (nn.BatchNorm2d,), {"forward": BatchNormAct2d.forward})
    kind.__module__, norm = "timm.models.layers.norm_act", kind(6)
    norm.act = nn.ReLU()  # older ones have no drop
    assert norms.rest_of(norm) == ("act",)
    assert norms.is_known(norm)


def test_shared_activations_and_norms() -> None:
    net = network(BatchNormAct2d)
    net[3].act = net[1].act
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert converted[3].act is converted[1].act
    assert relative(converted(x()), net(x())) <= EXACT
    net[3].weight = net[1].weight
    assert [entry.takes_norm for entry in surgeon.plan(net, "acnet", SHAPE).swaps] == [(), ()]


@pytest.mark.parametrize("kind", ["timm's, with ReLU", "timm's frozen one"])
@pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch:FutureWarning")
def test_converted_networks_of_them_are_scripted_traced_and_exported(kind: str) -> None:
    net = network(TAKEN[kind][0])
    rule = {"swap": "octave", "with": {"min_size": 1}}
    streams = surgeon.convert(net, {"surgeon": 1, "title": "T", "rules": [rule]}, SHAPE)
    with torch.no_grad():
        for model in (surgeon.convert(net, "acnet", SHAPE), streams, surgeon.fuse(streams)):
            expected = model(x())
            assert torch.equal(torch.jit.trace(model, x())(x()), expected)
            assert relative(torch.export.export(model, (x(),)).module()(x()), expected) <= EXACT
        converted = surgeon.convert(net, "acnet", SHAPE)
        y = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        for module in (converted[0].square_bn, converted[1]):
            assert torch.equal(torch.jit.script(module)(y.clone()), module(y.clone()))

"""`fuse` with `keep_norms`: the weights go back into the class that the user has, and training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import relative, run_surgeon, shake_
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn

import surgeon
from surgeon.app.demo.net import SmallResNet
from surgeon.errors import PlanError, SurgeonError
from surgeon.surgery import history as histories

INPUT = (2, 3, 12, 12)


def conv_norm(c_in: int, c_out: int, *, bias: bool = False, norm: nn.Module | None = None) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias), norm or nn.BatchNorm2d(c_out), nn.ReLU()]


def plain() -> nn.Module:
    return nn.Sequential(*conv_norm(3, 8), *conv_norm(8, 8), nn.Conv2d(8, 4, 1))


def made(build: Callable[[], nn.Module] = plain, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return shake_(build(), seed, gently=True).eval()


def trained(net: nn.Module, recipe: str = "acnet") -> nn.Module:
    """Convert, and let every norm and strip matter, as after training."""
    return shake_(surgeon.convert(net, recipe, INPUT), 7, gently=True)


def tensors_equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = copy.deepcopy(model).eval().to(x.dtype)(x)
    return y


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("recipe", ["acnet", "acnet-scratch"])
def test_the_weights_load_into_the_class_that_they_came_from(recipe: str, dtype: torch.dtype, most: float) -> None:
    net = made().to(dtype)
    converted = trained(net, recipe)
    fused = surgeon.fuse(converted, keep_norms=True)
    assert [type(one) for one in fused] == [type(one) for one in net]
    own = made(seed=1).to(dtype)
    own.load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(INPUT, dtype=dtype)
    exact = run(copy.deepcopy(converted).double(), x.double())
    assert relative(run(own, x), exact) < most
    folded = run(surgeon.fuse(converted), x)
    assert relative(run(own, x), exact) < 2 * max(relative(folded, exact), 1e-16)  # no less exact than without norms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_training_conv_and_norm_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    net = made().to(dtype)
    net[1].num_batches_tracked += 5
    assert tensors_equal(surgeon.fuse(surgeon.convert(net, "acnet", INPUT), keep_norms=True), net)


def test_a_channel_whose_weight_is_zero_comes_back_too() -> None:
    net = made()
    with torch.no_grad():
        net[1].weight[:3] = torch.tensor([0.0, 1e-30, -1e-12])
    assert tensors_equal(surgeon.fuse(surgeon.convert(net, "acnet", INPUT), keep_norms=True), net)


def test_a_square_branch_that_has_died_is_replaced_by_the_strips() -> None:
    converted = trained(made().double())
    block = converted[0]
    with torch.no_grad():
        block.square_bn.weight[:3] = torch.tensor([0.0, 1e-30, -1e-12])
        block.ver_bn.running_var[3] = 1e9
        block.hor_bn.weight[4] = 50
    fused, x = surgeon.fuse(converted, INPUT, keep_norms=True), torch.randn(INPUT, dtype=torch.float64)
    assert relative(run(fused, x), run(converted, x)) < 1e-12
    weight = fused[0].weight.abs().amax(dim=(1, 2, 3))
    assert weight[:3].max() < 100 * weight[5:].max()  # nothing was divided by next to nothing
    assert fused[1].running_var.max() < 2**15


@pytest.mark.parametrize("recipe", ["acnet", "acnet-scratch"])
def test_in_train_mode_the_norm_starts_near(recipe: str) -> None:
    """The mean is the right one; of the variance only correlations between branches are unknown."""
    torch.manual_seed(0)
    converted = surgeon.convert(made(), recipe, INPUT)
    for module in converted.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1)
    converted.train()
    with torch.no_grad():
        for _ in range(200):
            converted(torch.randn(8, 3, 12, 12))
    fused = surgeon.fuse(converted, keep_norms=True)
    x, seen = torch.randn(64, 3, 12, 12), {}
    fused[0].register_forward_hook(lambda *it: seen.update(y=it[2]))
    run(fused, x)
    y = fused[0](x).detach()
    mean, var = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3))
    deviation = var.sqrt()
    assert ((mean - fused[1].running_mean).abs() / deviation).max() < 0.1
    assert ((var / fused[1].running_var).log().abs()).median() < 0.7


class Named(nn.BatchNorm2d):
    """A norm of the user's, which adds nothing."""


NORMS: dict[str, Callable[[], nn.Module]] = {
    "options": lambda: nn.BatchNorm2d(8, eps=1e-3, momentum=None),
    "without weights": lambda: nn.BatchNorm2d(8, affine=False),
    "synchronised": lambda: nn.SyncBatchNorm(8, momentum=0.3),
    "a class of the user's": lambda: Named(8),
    "with an activation": lambda: BatchNormAct2d(8, act_layer=nn.PReLU),
    "frozen": lambda: torchvision.ops.FrozenBatchNorm2d(8),
    "frozen, with an activation": lambda: FrozenBatchNormAct2d(8),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_any_norm_is_given_back(norm: Callable[[], nn.Module], bias: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*conv_norm(3, 8, bias=bias, norm=norm()), nn.Conv2d(8, 4, 1))

    net = made(build).double()
    converted = trained(net)
    assert type(converted[1]) is not type(net[1])
    fused = surgeon.fuse(converted, keep_norms=True)
    assert [type(one) for one in fused.modules()] == [type(one) for one in net.modules()]
    assert repr(fused) == repr(net)
    made(build, seed=1).double().load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(INPUT, dtype=torch.float64)
    assert relative(run(fused, x), run(converted, x)) < 1e-13


@pytest.mark.parametrize("norm", ["options", "synchronised", "a class of the user's", "with an activation"])
def test_after_a_random_start_too(norm: str) -> None:
    net = made(lambda: nn.Sequential(*conv_norm(3, 8, norm=NORMS[norm]()), nn.Conv2d(8, 4, 1)))
    fused = surgeon.fuse(trained(net, "acnet-scratch"), keep_norms=True)
    assert repr(fused) == repr(net)
    net.load_state_dict(fused.state_dict(), strict=True)


def test_what_is_trained_and_the_modes_stay() -> None:
    net = made().train()
    net[0].weight.requires_grad_(False)
    net[1].eval().requires_grad_(False)
    fused = surgeon.fuse(surgeon.convert(net, "acnet", INPUT), keep_norms=True)
    for path in ("0", "1", "3", "4"):
        ours, theirs = fused.get_submodule(path), net.get_submodule(path)
        assert ours.training is theirs.training
        assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]


def test_training_goes_on_and_the_converted_model_is_untouched() -> None:
    converted = trained(made())
    before = copy.deepcopy(converted.state_dict())
    fused = surgeon.fuse(converted, keep_norms=True).train()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(torch.randn(INPUT)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in converted.state_dict().items())
    assert all(p.grad is not None for p in fused.parameters())


def test_in_place_an_optimizer_learns_of_what_came_back() -> None:
    converted = trained(made())
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    surgeon.fuse_(converted, keep_norms=True)
    new = surgeon.new_parameters(converted, optimizer)
    assert {id(p) for p in new} == {
        id(p) for path in ("0", "1", "3", "4") for p in converted.get_submodule(path).parameters()
    }


def test_a_network_on_the_meta_device_keeps_its_norms() -> None:
    with torch.device("meta"):
        net = plain().eval()
    fused = surgeon.fuse(surgeon.convert(net, "acnet"), keep_norms=True)
    assert list(fused.state_dict()) == list(net.state_dict())


def test_what_stands_in_the_norms_place_is_left_alone() -> None:
    converted = trained(made())
    converted[1] = nn.Dropout(0.5)
    with pytest.raises(PlanError, match="0 cannot give back the norm that it took over: 1 is a Dropout now"):
        surgeon.fuse_(converted, keep_norms=True)
    assert isinstance(converted[0], surgeon.ACBlock)
    surgeon.fuse(converted)  # without keeping norms nothing is in the way


def test_without_a_history_nobody_knows_where_norms_go() -> None:
    converted = trained(made())
    del converted.surgeon_provenance
    with pytest.raises(PlanError, match="the model has no history that says what this block was made of"):
        surgeon.fuse(converted, keep_norms=True)


class Forked(nn.Module):
    """A conv whose output two norms read: no block can take over a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.one(y) + self.two(y)
        return out


def test_a_bias_that_was_not_there_before_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = made(Forked)
    converted = surgeon.convert(net, "acnet", INPUT)
    assert tensors_equal(surgeon.fuse(converted, keep_norms=True), net)  # nothing was trained: there is no bias
    assert not caplog.text
    fused = surgeon.fuse(shake_(converted, 3, gently=True), keep_norms=True)
    assert fused.conv.bias is not None
    assert "conv has a key that the network did not have before it was converted" in caplog.text


def test_a_norm_that_had_no_weights_and_starts_at_random_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = made(lambda: nn.Sequential(*conv_norm(3, 8, norm=nn.BatchNorm2d(8, affine=False)), nn.Conv2d(8, 4, 1)))
    surgeon.fuse(surgeon.convert(net, "acnet-scratch", INPUT), keep_norms=True)
    assert "1 has a key that the network did not have before" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_recorded_repeated_and_verified(dtype: torch.dtype, tmp_path: Path) -> None:
    net = made().to(dtype)
    converted = surgeon.convert(net, "acnet", INPUT)
    assert surgeon.verify(net, surgeon.fuse(converted, keep_norms=True)).equivalent
    shake_(converted, 7, gently=True)
    fused = surgeon.fuse(converted, keep_norms=True)
    assert surgeon.history(fused)[-1].keep_norms
    assert "keep_norms=True" in repr(surgeon.history(fused)[-1])
    report = surgeon.verify(converted, fused)
    assert report.equivalent, report
    surgeon.save(fused, tmp_path / "net.pt")
    assert surgeon.verify(converted, surgeon.load(tmp_path / "net.pt")).equivalent
    with torch.no_grad():
        fused[1].running_mean[2] += 0.01
    assert not surgeon.verify(converted, fused).equivalent


def test_weights_with_a_manifest_come_back(tmp_path: Path) -> None:
    name = "surgeon.app.demo.net:SmallResNet"
    converted = shake_(surgeon.convert(made(SmallResNet), "acnet", (1, 1, 28, 28)), 7, gently=True)
    fused = surgeon.fuse(converted, keep_norms=True)
    surgeon.save(fused, tmp_path / "net.safetensors", arch=name)
    assert tensors_equal(surgeon.load(tmp_path / "net.safetensors", arch=name), fused)
    SmallResNet().load_state_dict(fused.state_dict(), strict=True)


def test_a_history_without_kept_norms_is_written_as_before() -> None:
    stored = histories.as_data(surgeon.fuse(trained(made())))["history"][-1]
    assert not {"keep_norms", "returned"} & {*stored}


def test_a_history_from_elsewhere_that_names_other_blocks_is_refused() -> None:
    converted = trained(made())
    fused = surgeon.fuse(converted)
    fused.surgeon_provenance["history"][-1]["returned"] = ("9.conv",)
    with pytest.raises(SurgeonError, match=r"gives back the norm of 9\.conv, which no plan in it swaps"):
        surgeon.verify(converted, fused)


def test_with_dense_every_block_that_costs_less_has_the_keys_of_its_conv() -> None:
    net = made(lambda: nn.Sequential(*conv_norm(4, 8), *conv_norm(8, 8)))
    converted = shake_(surgeon.convert(net, "hetconv-p4", (2, 4, 12, 12)), 3, gently=True)
    assert not tensors_equal(surgeon.fuse(converted, keep_norms=True, dense=True), net)  # it was projected
    fused = surgeon.fuse(converted, keep_norms=True, dense=True)
    made(lambda: nn.Sequential(*conv_norm(4, 8), *conv_norm(8, 8)), 1).load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    assert relative(run(fused, x), run(converted, x)) < 1e-6
    assert surgeon.verify(converted, fused).equivalent
    assert [type(one) for one in surgeon.fuse(converted, keep_norms=True)] == [type(one) for one in converted]


def test_two_streams_keep_the_keys_that_they_have() -> None:
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), *conv_norm(8, 8), *conv_norm(8, 8), nn.Conv2d(8, 4, 1)))
    converted = surgeon.convert(net, "octave", (1, 3, 64, 64))
    fused = surgeon.fuse(converted, keep_norms=True)
    assert tensors_equal(fused, net)
    assert isinstance(surgeon.history(fused)[-1].plan, dict)  # nothing was folded, and nothing is recorded


def test_beside_two_streams_blocks_give_norms_back_and_the_replay_agrees() -> None:
    layers = [nn.Conv2d(3, 8, 1), *conv_norm(8, 8), *conv_norm(8, 8), *conv_norm(8, 8), nn.Conv2d(8, 4, 3)]
    net = made(lambda: nn.Sequential(*layers))
    rules = [{"swap": "acblock", "match": {"name": "10"}}, {"swap": "octave", "match": {"kernel": [1, 3]}}]
    converted = shake_(surgeon.convert(net, {"rules": rules}, (1, 3, 64, 64)), 3, gently=True)
    fused = surgeon.fuse(converted, keep_norms=True)
    assert [type(one) for one in fused.children()][:-1] == [type(one) for one in converted.children()][:-1]
    assert type(fused.get_submodule("10")) is nn.Conv2d
    assert surgeon.verify(converted, fused).equivalent


def test_the_command_line_keeps_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted = trained(made())
    surgeon.save(converted, tmp_path / "net.acnet.pt")
    assert run_surgeon("fuse", tmp_path / "net.acnet.pt", "--keep-norms") == 0
    assert "given back: 2 norms, each behind the conv that it belongs to" in capsys.readouterr().out
    fused = surgeon.load(tmp_path / "net.acnet.fused.pt")
    made(seed=1).load_state_dict(fused.state_dict(), strict=True)
    assert run_surgeon("verify", tmp_path / "net.acnet.pt", tmp_path / "net.acnet.fused.pt") == 0

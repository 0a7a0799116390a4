"""Networks that fold themselves, before and after surgeon: what comes out is right, or it is said why not."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import timm.utils
import torch
from helpers import relative, run_surgeon, shake_
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn
from torchvision.models.quantization.googlenet import QuantizableBasicConv2d

import surgeon
from surgeon.analysis.self_folding import SelfFoldings
from surgeon.errors import PlanError
from surgeon.surgery import give_back

SHAPE = (2, 3, 16, 16)


class RepUnit(nn.Module):
    """A 3×3 and a 1×1 branch with a norm each, that become one conv, as in RepVGG."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out))
        self.point = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.reparam_conv: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return torch.relu(self.reparam_conv(x))
        return torch.relu(self.dense(x) + self.point(x))

    @torch.no_grad()
    def reparameterize(self) -> None:
        if self.reparam_conv is None:
            (kernel, bias), (point, shift) = self._folded(*self.dense), self._folded(*self.point)
            conv = self.dense[0]
            self.reparam_conv = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).to(kernel)
            self.reparam_conv.weight.copy_(kernel + nn.functional.pad(point, [1, 1, 1, 1]))
            self.reparam_conv.bias.copy_(bias + shift)
            del self.dense, self.point

    @staticmethod
    def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class Unit(nn.Module):
    """A conv, a norm and an activation, whose norm the whole network folds, as in ultralytics."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = (
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out

    def forward_fuse(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.conv(x))
        return out


def fuse_conv_and_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=True).to(
        conv.weight
    )
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    fused.weight.copy_(conv.weight * scale[:, None, None, None])
    fused.bias.copy_(bn.bias + ((conv.bias if conv.bias is not None else 0) - bn.running_mean) * scale)
    return fused


class Detector(nn.Module):
    """Folds the norms of its units by itself, as the models of ultralytics do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Unit(3, 8), Unit(8, 8), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    @torch.no_grad()
    def fuse(self) -> Detector:
        for m in self.model.modules():
            if isinstance(m, Unit) and hasattr(m, "bn"):
                m.conv = fuse_conv_and_bn(m.conv, m.bn)
                delattr(m, "bn")
                m.forward = m.forward_fuse
        return self


def reppy() -> nn.Module:
    return nn.Sequential(RepUnit(3, 8), RepUnit(8, 8), nn.Conv2d(8, 4, 1))


def of_timm(kind: str) -> nn.Module:
    block = ByoBlockCfg(type=kind, d=1, c=8, s=1, br=1.0)
    return ByobNet(ByoModelCfg(blocks=(block, block), stem_type=kind, stem_chs=8), num_classes=3)


def fold_reppy(model: nn.Module) -> nn.Module:
    for unit in model.children():
        if isinstance(unit, RepUnit):
            unit.reparameterize()
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "repvgg of ours": (reppy, fold_reppy),
    "ultralytics": (Detector, lambda model: model.fuse()),
    "mobileone": (lambda: of_timm("one"), timm.utils.reparameterize_model),
    "repvgg": (lambda: of_timm("rep"), timm.utils.reparameterize_model),
}
every_network = pytest.mark.parametrize(("build", "fold"), NETWORKS.values(), ids=NETWORKS)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return shake_(build(), 1, gently=True).eval()


def run(model: nn.Module) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        out: Tensor = copy.deepcopy(model).double().eval()(x)
    return out


@every_network
@pytest.mark.parametrize("recipe", ["acnet", "acnet-scratch", "acnet-online"])
def test_its_own_folding_is_right_after_ours(
    build: Callable[[], nn.Module], fold: Callable[[nn.Module], nn.Module], recipe: str
) -> None:
    net = made(build)
    converted = shake_(surgeon.convert(net, recipe, SHAPE), 2, gently=True)
    assert any(isinstance(m, surgeon.ACBlock) for m in converted.modules())
    fused = surgeon.fuse(converted)
    assert surgeon.history(fused)[-1].returned
    assert relative(run(fused), run(converted)) < 1e-6
    assert surgeon.verify(converted, fused).equivalent
    folded = fold(copy.deepcopy(fused))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert relative(run(folded), run(converted)) < 1e-5
    build().load_state_dict(fused.state_dict(), strict=True)


@every_network
@pytest.mark.parametrize("recipe", ["acnet", "acnet-online"])
def test_its_own_folding_before_ours_is_told(
    build: Callable[[], nn.Module], fold: Callable[[nn.Module], nn.Module], recipe: str
) -> None:
    """A converted network has no conv and norm yet: its own folding raises, and computes nothing wrong."""
    converted = surgeon.convert(made(build), recipe, SHAPE)
    with pytest.raises((AttributeError, AssertionError)):
        fold(copy.deepcopy(converted))


@every_network
def test_verify_is_right_about_what_folded_itself(
    build: Callable[[], nn.Module], fold: Callable[[nn.Module], nn.Module]
) -> None:
    net = made(build)
    converted = surgeon.convert(net, "acnet", SHAPE)
    folded = fold(surgeon.fuse(converted))
    for reference in (net, converted):
        report = surgeon.verify(reference, folded)
        assert report.equivalent, report
        assert any("folded by other code after surgeon had made it" in said for said in report.remarks)
    conv = next(m for m in folded.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    with torch.no_grad():
        conv.weight[0, 0, 1, 1] += 1e-3
    assert not surgeon.verify(net, folded).equivalent


@every_network
def test_a_folded_network_is_free(build: Callable[[], nn.Module], fold: Callable[[nn.Module], nn.Module]) -> None:
    folded = fold(made(build))
    assert SelfFoldings(folded).around(["model.0.conv"]) is None
    converted = surgeon.convert(folded, "hetconv-p4", (1, 3, 64, 64), overrides=["rules[0].with.p=2"])
    assert any(isinstance(m, surgeon.HetConv) for m in converted.modules())


@every_network
@pytest.mark.parametrize("recipe", ["hetconv-p4", "octave"])
def test_blocks_without_a_kernel_of_the_convs_shape_are_left_out(
    build: Callable[[], nn.Module], fold: Callable[[nn.Module], nn.Module], recipe: str
) -> None:
    plan = surgeon.plan(made(build), recipe, (1, 3, 64, 64))
    foldings = SelfFoldings(made(build))
    assert not [entry.path for entry in plan.swaps if foldings.around(entry.paths)]
    reasons = [entry.skip for entry in plan.convs if entry.skip and "folds itself" in entry.skip]
    assert all("fold it first: " in reason for reason in reasons)


def test_the_reason_names_what_to_call() -> None:
    plan = surgeon.plan(made(reppy), "octave", (1, 3, 64, 64))
    assert plan.convs[2].skip == (
        "1 (RepUnit) folds itself (reparameterize), and its folding reads the kernel of this conv, which `octave` does "
        "not keep; fold it first: model.1.reparameterize()"
    )


def test_a_plan_by_hand_cannot_bring_such_a_block_in(tmp_path: Path) -> None:
    plan = surgeon.plan(made(reppy), "octave", (1, 3, 64, 64)).to_dict()
    text = surgeon.plan(
        made(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))), "hetconv-p4", (1, 8, 64, 64)
    ).to_dict()
    entry = next(one for one in plan["convs"] if one["path"] == "1.dense.0")
    entry.pop("skip")
    entry |= {key: text["convs"][0][key] for key in ("swap", "with")}
    with pytest.raises(PlanError) as caught:
        surgeon.convert(made(reppy), surgeon.Plan.model_validate(plan))
    assert "folds itself (reparameterize)" in str(caught.value)


class Shared(RepUnit):
    """Two norms read the dense conv, so no block can take over one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.reparam_conv is not None else super().forward(x) + self.dense[0](x)


def test_a_block_that_takes_over_no_norm_stays_out_where_its_bias_would_be_lost() -> None:
    net = made(lambda: nn.Sequential(Shared(3, 8), nn.Conv2d(8, 8, 3)))
    online = surgeon.plan(net, "acnet-online", SHAPE)
    assert [entry.path for entry in online.swaps] == ["0.dense.0", "1"], "its norms stay, and nothing is lost"
    plan = surgeon.plan(net, "acnet", SHAPE)
    assert [entry.path for entry in plan.swaps] == ["1"]
    assert plan.convs[0].skip is not None
    assert "leaves out what the norms in the block add" in plan.convs[0].skip


def test_what_an_older_release_has_swapped_opens_and_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    net = made(Detector)
    with monkeypatch.context() as older:
        older.setattr(give_back, "refusal", lambda *_, **__: None)
        converted = surgeon.convert(net, "hetconv-p4", SHAPE, overrides=["rules[0].with.p=2"])
    assert surgeon.verify(net, converted).verdict == "approximate"
    with caplog.at_level(logging.INFO, "surgeon"):
        surgeon.fuse(converted)
    assert (
        "model.1.conv is in the way: the model (Detector) folds itself (fuse), and would read this block wrongly"
        in (caplog.text)
    )


def test_blocks_that_timm_folds_are_verified() -> None:
    """timm calls `fuse` of every block, and nothing of that is recorded."""
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    folded = timm.utils.reparameterize_model(surgeon.convert(net, "acnet", SHAPE))
    assert not any(isinstance(m, surgeon.ACBlock) for m in folded.modules())
    assert surgeon.verify(net, folded).equivalent
    with torch.no_grad():
        folded[0].weight *= 1.001
    assert not surgeon.verify(net, folded).equivalent


def test_torchvisions_quantisable_modules_fuse_after_fuse() -> None:
    net = made(lambda: nn.Sequential(QuantizableBasicConv2d(3, 8, kernel_size=3), nn.Conv2d(8, 4, 1)))
    assert SelfFoldings(net).around(["0.conv"]) is not None
    fused = surgeon.fuse(surgeon.convert(net, "acnet", SHAPE))
    assert list(fused.state_dict()) == list(net.state_dict())
    fused[0].fuse_model(is_qat=False)
    assert relative(run(fused), run(net)) < 1e-5


class Adds(nn.Module):
    """Its `fuse` adds feature maps, and folds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.bn(self.conv(x)), 1)

    def fuse(self, x: Tensor, y: float) -> Tensor:
        return x + y


class Walks(nn.Module):
    """Its `fuse` only calls what other modules have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), RepUnit(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out

    def fuse(self) -> None:
        for module in self.modules():
            if hasattr(module, "reparameterize"):
                module.reparameterize()


def test_methods_of_the_same_name_that_fold_nothing_do_not_count() -> None:
    assert SelfFoldings(Adds()).around(["conv"]) is None
    walks = SelfFoldings(Walks())
    assert walks.around(["first.0"]) is None
    assert walks.around(["second.dense.0"]) is not None
    assert SelfFoldings(timm.create_model("ghostnet_100")).around(["conv_stem"]) is None


def test_the_command_line_says_what_to_call_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    surgeon.save(surgeon.convert(made(lambda: of_timm("one")), "acnet", SHAPE), tmp_path / "net.pt")
    assert run_surgeon("fuse", tmp_path / "net.pt") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "stem (MobileOneBlock) folds itself (reparameterize), as 2 more do, so blocks in it became" in said
    assert "call timm.utils.reparameterize_model(model) next" in said
    assert run_surgeon("verify", tmp_path / "net.pt", tmp_path / "net.fused.pt", "-i", "1,3,16,16") == 0

"""Folds that are right: surgeon's own, torch's and timm's, of networks with plain and with extreme statistics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import timm
import torch
from mutation_faults import NotHereError
from mutation_nets import build, dtype_of, example, extreme_, settle_, train_
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.repvit import RepVit
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import surgeon
from surgeon.app.demo.data import weights
from surgeon.nn import SmallResNet

Pair = tuple[nn.Module, nn.Module]
Fold = Callable[["Maker"], Pair]

OWN: dict[str, Fold] = {}  # of the networks in mutation_nets
FOREIGN: dict[str, Fold] = {}  # of networks that they bring


def recipe(block: str, options: dict[str, object], **match: object) -> dict[str, object]:
    rules = [{"swap": block, "with": options, "match": match or {"name": "**"}}]
    return {"surgeon": 1, "title": "a fold that is right", "rules": rules}


RECIPES = {
    "acblock": recipe("acblock", {"init": "takeover"}),
    "border": recipe("acblock", {"init": "takeover", "placement": "border"}),
    "split": recipe("acblock", {"init": "split"}),
    "scratch": recipe("acblock", {"init": "scratch"}),
    "hetconv": recipe("hetconv", {"p": 2, "layout": "interleaved"}, kernel=3, groups=1, in_channels=[8, 16]),
    "octave": recipe("octave", {"alpha": 0.5, "min_size": 1}, kernel=3, groups=1),
}


class Maker:
    """One network with its numbers, still to be folded."""

    def __init__(self, net: str, dtype: torch.dtype, statistics: str, side: int, seed: int) -> None:
        self.net, self.dtype, self.statistics, self.side = net, dtype, statistics, side
        self.generator = torch.Generator().manual_seed(seed)

    def plain(self) -> nn.Module:
        """Give the network, as trained, in its dtype."""
        return self.trained(build(self.net, self.generator, self.side))

    def trained(self, net: nn.Module) -> nn.Module:
        settle_(net.float(), self.generator, self.side)
        if self.statistics == "trained":
            train_(net, self.generator, min(self.side, 24))
        return extreme_(net.to(self.dtype), self.statistics, self.generator).eval()

    def converted(self, kind: str, *, local: bool = False) -> nn.Module:
        """Give the network with blocks in it that have been trained."""
        how = copy.deepcopy(RECIPES[kind])
        if local:
            how["rules"][0]["with"]["seams"] = "keep"  # type: ignore[index]
        try:
            net = surgeon.convert(build(self.net, self.generator, self.side), how, example(self.side))
        except surgeon.errors.PlanError as error:
            raise NotHereError from error
        return self.trained(net)


def own(name: str) -> Callable[[Fold], Fold]:
    return lambda fold: OWN.setdefault(name, fold)


def foreign(name: str) -> Callable[[Fold], Fold]:
    return lambda fold: FOREIGN.setdefault(name, fold)


def _fused(kind: str, **options: bool) -> Fold:
    def fold(maker: Maker) -> Pair:
        a = maker.converted(kind, local=options.get("local", False))
        return a, surgeon.fuse(a, example(maker.side), dense=options.get("dense", False))

    return fold


def _converts(kind: str) -> Fold:
    def fold(maker: Maker) -> Pair:
        a = maker.plain()
        try:
            return a, surgeon.convert(a, RECIPES[kind], example(maker.side))
        except surgeon.errors.PlanError as error:
            raise NotHereError from error

    return fold


for _kind in ("acblock", "border", "split", "scratch"):
    own(f"fuse {_kind}")(_fused(_kind))
own("fuse hetconv to dense")(_fused("hetconv", dense=True))
own("fuse octave")(_fused("octave"))
own("fuse octave, each conv by itself")(_fused("octave", local=True))
own("convert to acblock, takeover")(_converts("acblock"))
own("convert to acblock, split")(_converts("split"))


@own("fuse acblock, history lost")
def _(maker: Maker) -> Pair:
    a, b = _fused("acblock")(maker)
    return without_history(a), without_history(b)


def without_history(model: nn.Module) -> nn.Module:
    vars(model).pop("surgeon_provenance", None)
    return model


@own("a copy")
def _(maker: Maker) -> Pair:
    a = maker.plain()
    return a, copy.deepcopy(a)


@own("a copy in channels-last")
def _(maker: Maker) -> Pair:
    a = maker.plain()
    return a, copy.deepcopy(a).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def by_torch(net: nn.Module) -> nn.Module:
    """Fold every norm that follows its conv in a sequence."""
    found = 0
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential):
            for name, after in zip(list(module._modules), list(module._modules)[1:], strict=False):
                conv, norm = module._modules[name], module._modules[after]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module._modules[name] = fuse_conv_bn_eval(conv, norm)
                    module._modules[after] = nn.Identity()
                    found += 1
    if not found:
        raise NotHereError
    return net


def by_fx(net: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuse(net)


def by_timm(net: nn.Module) -> nn.Module:
    return timm.utils.reparameterize_model(net)


def _by(
    fold: Callable[[nn.Module], nn.Module], dtype: torch.dtype, build_: Callable[[], nn.Module] | None = None
) -> Fold:
    """Fold in one dtype, and store in another one."""

    def made(maker: Maker) -> Pair:
        if torch.finfo(dtype).eps > torch.finfo(maker.dtype).eps:
            raise NotHereError  # float64 weights that were folded in float32 are not right
        a = maker.plain() if build_ is None else maker.trained(_seeded(build_, maker))
        b = fold(copy.deepcopy(a).to(dtype)).to(maker.dtype)
        return a, b.eval()

    return made


def _seeded(build_: Callable[[], nn.Module], maker: Maker) -> nn.Module:
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=maker.generator)))
    return build_()


def byob(kind: str) -> nn.Module:
    """Make a small network of timm's re-parameterised blocks."""
    blocks = tuple(ByoBlockCfg(type=kind, d=1, c=c, s=2, gs=0, br=1) for c in (8, 16))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type=kind, stem_chs=8, num_features=0), num_classes=10)


def repvit() -> nn.Module:
    return RepVit(embed_dim=(8, 16), depth=(1, 1), num_classes=10, mlp_ratio=2, kernel_size=3)


THEIRS: dict[str, Callable[[], nn.Module]] = {
    "timm mobileone": lambda: byob("one"),
    "timm repvgg": lambda: byob("rep"),
    "timm repvit": repvit,
}
for _word, _dtype in (("float32", torch.float32), ("float64", torch.float64)):
    own(f"torch fuse_conv_bn_eval in {_word}")(_by(by_torch, _dtype))
    own(f"torch.fx fuse in {_word}")(_by(by_fx, _dtype))
    for _name, _build in THEIRS.items():
        foreign(f"{_name} in {_word}")(_by(by_timm, _dtype, _build))


def _demo(kind: str, **options: bool) -> Fold:
    """Take the network that the demo ships with, whose weights come from a long training."""

    def fold(maker: Maker) -> Pair:
        net = SmallResNet()
        net.load_state_dict(weights())
        a = net.eval() if not kind else surgeon.convert(net.eval(), RECIPES[kind], (1, 1, 28, 28))
        if maker.statistics == "trained":
            train_(a, maker.generator, 28, channels=1)
        a = extreme_(a.to(maker.dtype), maker.statistics, maker.generator)
        if not kind:
            if maker.dtype == torch.float64:
                raise NotHereError
            return a, by_hand(copy.deepcopy(a).float()).to(maker.dtype)
        return a, surgeon.fuse(a, (1, 1, 28, 28), **options)

    return fold


def by_hand(net: nn.Module) -> nn.Module:
    """Fold conv1 and bn1, conv2 and bn2 of every module that has such, as people do by hand."""
    for module in net.modules():
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            parts = module._modules
            if isinstance(parts.get(conv), nn.Conv2d) and isinstance(parts.get(norm), nn.BatchNorm2d):
                parts[conv] = fuse_conv_bn_eval(parts[conv], parts[norm])  # type: ignore[type-var]
                parts[norm] = nn.Identity()
    return net


for _kind in ("acblock", "border", "split", "octave"):
    foreign(f"demo's network, fuse {_kind}")(_demo(_kind))
foreign("demo's network, fuse hetconv to dense")(_demo("hetconv", dense=True))
foreign("demo's network, fuse_conv_bn_eval in float32")(_demo(""))


def is_finite(a: nn.Module, b: nn.Module) -> bool:
    """Whether every number of both is finite, as stored."""
    tensors = [*a.state_dict().values(), *b.state_dict().values()]
    assert dtype_of(a) == dtype_of(b)
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())

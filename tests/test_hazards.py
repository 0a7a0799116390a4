"""Every hazard that a real network can hold, with every block: swapped rightly, or left with a reason.

This is the overview; `test_sites.py` has what is known of each conv, and `test_capture.py` what tracing meets. What
comes out is compared with a model in which every swapped conv is replaced by what the block's paper says, by hand.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import tiny
import torch
import torchvision
from helpers import relative, shake_
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, LayerNorm2d, ScaledStdConv2d, StdConv2d
from tiny import SHAPE, ConvNorm, conv3
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.quantization import default_qat_qconfig
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

import surgeon
from surgeon.blocks import Block
from surgeon.errors import CaptureError, ModelError, PlanError, SurgeonError

BLOCKS = {"acblock": "{}", "hetconv": "{p: 2}", "octave": "{alpha_in: 0.5, alpha_out: 0.5, seams: keep}"}
EVAL_ONLY = "same function in eval mode only"
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Hazard:
    """A network, the conv of it that is meant, and what must become of that conv, whatever the block."""

    name: str
    build: Callable[[], nn.Module]
    path: str = "conv"
    stays: str = ""  # words of the reason; empty where every block takes its place
    no_streams: str = ""  # words of the reason why it does not become an OctaveConv, where other blocks take its place
    beside: int = 0  # how many other convs are swapped
    trains: str = ""  # words of the error where the network, as it is, cannot train here
    acblock_trains: str = ""  # words of the error where it can, and cannot any more with ACBlocks
    inputs: Shape | tuple[Shape, ...] = SHAPE


def followed_by(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: ConvNorm(bn=norm())


def with_conv(conv: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: ConvNorm(conv=conv())


def changed(how: Callable[[nn.Conv2d], object]) -> Callable[[], nn.Module]:
    """Let somebody else do something to the conv."""

    def build() -> nn.Module:
        net = ConvNorm()
        how(net.conv)
        return net

    return build


def frozen() -> nn.Module:
    net = ConvNorm()
    net.bn.requires_grad_(False).eval()
    return net


def lazy_that_ran() -> nn.Module:
    net = ConvNorm(conv=nn.LazyConv2d(4, 3, padding=1))
    net(torch.zeros(SHAPE))
    return net


def old_spectral_norm(conv: nn.Conv2d) -> None:
    nn.utils.spectral_norm(conv)
    conv(torch.zeros(SHAPE))


def beside_another(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make the whole model part of one."""
    return lambda: nn.Sequential(build(), nn.BatchNorm2d(4))


HAZARDS = [
    # Names
    Hazard("an ordinary pair", ConvNorm),
    Hazard("two names in one parent", tiny.TwoNames),
    Hazard("two names in one parent, both called", tiny.TwoNamesBothCalled),
    Hazard("one module under two parents", tiny.TwoParents, "left.conv"),
    Hazard("one pair under two parents", tiny.TwoParentsOnePair, "left.conv"),
    Hazard("called from outside the module that holds it", tiny.ReachedFromOutsideTheIsland, "inner.conv"),
    # Calls and readers
    Hazard("called twice, with one norm", tiny.CalledTwiceNormAfterEach),
    Hazard("called twice, with two norms", tiny.CalledTwiceTwoNorms),
    Hazard("called twice, with the norm on one path", tiny.CalledTwiceNormOnOnePath),
    Hazard("called at two sizes", tiny.CalledAtTwoSizes),
    Hazard("called by keyword", tiny.CalledByKeyword),
    Hazard("never called", tiny.NeverCalled, "spare", "it is never called", beside=1),
    Hazard("read by two convs", tiny.ReadByTwoConvs, beside=2),
    Hazard("read by the norm and by an addition", tiny.ReadTwice),
    Hazard("its norm is read before the activation too", tiny.NormReadTwice),
    Hazard("kept in a plain list too", tiny.HeldInAList, stays="also kept in layers"),
    Hazard("kept in a partial too", tiny.HeldInAPartial, stays="also kept in layer"),
    Hazard("kept by a method of its own", tiny.HeldByItsMethod, stays="reads its weight directly"),
    Hazard("a name with a space", tiny.OddName, "the first.conv", beside=1),
    Hazard("in a Sequential that is taken apart", tiny.TakesItsStagesOneByOne, "stages.0", beside=1),
    Hazard("in a part of which another method is called", tiny.CallsAnotherMethod, "part.first.conv", beside=1),
    # Tensors
    Hazard("tied parameters", tiny.TiedWeights, "one", "it shares its weights with two"),
    Hazard("the network reads self.conv.weight", tiny.ReadsTheWeight, stays="reads its weight directly"),
    Hazard("the same, where tracing cannot follow", tiny.ReadsTheWeightUntraced, stays="reads its weight directly"),
    Hazard("only its weight is used", tiny.WeightReadOnly, "spare", "reads its weight directly", beside=1),
    Hazard("a functional conv, computed weight", tiny.ComputesAWeight, "conv2d", "is computed", beside=1),
    # Functional convs with Parameters (tiny.AffineByHand, tiny.WeightsInAParameterList) have a test of their own below.
    # Norms
    Hazard("a frozen norm", frozen),
    Hazard("a norm without weight and bias", followed_by(lambda: nn.BatchNorm2d(4, affine=False))),
    Hazard("a norm without running statistics", followed_by(lambda: nn.BatchNorm2d(4, track_running_stats=False))),
    Hazard("SyncBatchNorm", followed_by(lambda: nn.SyncBatchNorm(4))),
    Hazard("FrozenBatchNorm2d", followed_by(lambda: FrozenBatchNorm2d(4))),
    Hazard("GroupNorm", followed_by(lambda: nn.GroupNorm(2, 4))),
    Hazard("InstanceNorm", followed_by(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True))),
    Hazard("torchvision's LayerNorm2d", followed_by(lambda: torchvision.models.convnext.LayerNorm2d(4))),
    Hazard("timm's LayerNorm2d", followed_by(lambda: LayerNorm2d(4))),
    Hazard("timm's norm with its activation", followed_by(lambda: BatchNormAct2d(4))),
    Hazard("a norm of its own kind", followed_by(lambda: tiny.OwnNorm(4))),
    # What was done to the conv
    Hazard("weight_norm", with_conv(lambda: parametrizations.weight_norm(conv3())), stays="--bake"),
    Hazard("spectral_norm", with_conv(lambda: parametrizations.spectral_norm(conv3())), stays="--bake"),
    Hazard("weight_norm, the old one", changed(nn.utils.weight_norm), stays="a hook (WeightNorm)"),
    Hazard("spectral_norm, the old one", changed(old_spectral_norm), stays="a hook (SpectralNorm)"),
    Hazard("pruned taps", changed(lambda c: prune.l1_unstructured(c, "weight", 0.5)), stays="--bake"),
    Hazard("pruned filters", changed(lambda c: prune.ln_structured(c, "weight", 0.5, 2, 0)), stays="--bake"),
    Hazard("a pruned bias", changed(lambda c: prune.l1_unstructured(c, "bias", 0.5)), stays="--bake"),
    Hazard("a forward hook", changed(lambda c: c.register_forward_hook(lambda *_: None)), stays="hooks are attached"),
    Hazard("a pre-hook", changed(lambda c: c.register_forward_pre_hook(lambda *_: None)), stays="hooks are attached"),
    # Kinds
    Hazard("weight-standardised", with_conv(lambda: StdConv2d(4, 4, 3, padding=1)), stays="StdConv2d is a subclass"),
    Hazard("weight-standardised and scaled", with_conv(lambda: ScaledStdConv2d(4, 4, 3, padding=1)),
           stays="ScaledStdConv2d is a subclass of Conv2d with a forward of its own"),
    Hazard("a Conv2d of another name", with_conv(lambda: tiny.NamedConv(4, 4, 3, padding=1))),
    Hazard("padded to the same size", with_conv(lambda: Conv2dSame(4, 4, 3, stride=2))),
    Hazard("padded to the same size, stride 1", with_conv(lambda: Conv2dSame(4, 4, 3))),
    Hazard("padded by a module of its own", with_conv(lambda: tiny.PadsFirst(4, 4, 3, sides=1))),
    Hazard("the user's own kind", with_conv(lambda: tiny.OwnConv(4, 4, 3)),
           stays="OwnConv is a subclass of Conv2d with a forward of its own"),
    Hazard("trained to be quantised", with_conv(lambda: qat.Conv2d(4, 4, 3, padding=1, qconfig=default_qat_qconfig)),
           stays="qat.modules.conv.Conv2d is a subclass of Conv2d with a forward of its own", trains="dtype"),
    Hazard("it scales its weight", with_conv(lambda: tiny.ScalesItsWeight(4, 4, 3)), stays="computes its kernel"),
    Hazard("quantised", tiny.Quantised, "small", "its weight is quantised", beside=1),
    Hazard("lazy, and has run", lazy_that_ran),
    Hazard("ConvTranspose2d", with_conv(lambda: nn.ConvTranspose2d(4, 4, 3)), stays="ConvTranspose2d: only Conv2d"),
    Hazard("Conv1d", lambda: nn.Sequential(nn.Conv1d(4, 4, 3)), "0", "Conv1d: only Conv2d", inputs=(2, 4, 9)),
    Hazard("Conv3d", lambda: nn.Sequential(nn.Conv3d(4, 4, 3)), "0", "Conv3d: only Conv2d", inputs=(2, 4, 5, 5, 5)),
    # Containers
    Hazard("in a ModuleList", tiny.FollowsStages, "stages.0.conv", beside=3),
    Hazard("in a ModuleDict", tiny.FollowsStages, "heads.b.1", beside=3),
    Hazard("in nested containers", tiny.NestedContainers, "stages.0.body.0", beside=1),
    # Arguments and results; lists and dicts of tensors are below
    Hazard("several inputs", tiny.TakesTwo, inputs=(SHAPE, SHAPE)),
    Hazard("*args", tiny.TakesArguments, inputs=(SHAPE, SHAPE)),
    Hazard("**kwargs", tiny.TakesKeywords),
    Hazard("a keyword-only input", tiny.TakesAKeywordOnly),
    Hazard("an optional input", tiny.MaySkipTheNorm),
    Hazard("an optional input that an inner module is given", tiny.MaySkipTheNormInside, "inner.conv"),
    Hazard("returns a dict", tiny.ReturnsADict),
    Hazard("returns a tuple", tiny.ReturnsATuple),
    Hazard("returns a dataclass", tiny.ReturnsADataclass),
    Hazard("returns lists of different length", tiny.ReturnsListsOfDifferentLength),
    # Control flow, randomness, state
    Hazard("acts on a tensor", tiny.ActsOnValues, "first.conv", beside=1),
    Hazard("acts on a shape", tiny.ActsOnShapes),
    Hazard("acts on self.training", tiny.ActsOnItsMode, "second.conv", beside=1),
    Hazard("acts on an attribute", lambda: tiny.ActsOnAnAttribute(normed=True)),
    Hazard("acts on an attribute, which leads past the norm", lambda: tiny.ActsOnAnAttribute(normed=False)),
    Hazard("torchvision's stochastic depth", lambda: tiny.DropsPaths(StochasticDepth(0.5, "row"))),
    Hazard("timm's stochastic depth", lambda: tiny.DropsPaths(DropPath(0.5))),
    Hazard("functional dropout", tiny.DropsOut),
    Hazard("buffers changed in forward", tiny.CountsItsCalls),
    Hazard("checkpointed, reentrant", lambda: tiny.Checkpointed(use_reentrant=True), "block.conv"),
    Hazard("checkpointed, not reentrant", lambda: tiny.Checkpointed(use_reentrant=False), "block.conv"),
    # What a graph does not show
    Hazard("without gradients", tiny.FreezesItsFirstPair, "first.conv", beside=1),
    Hazard("with gradients, whatever the mode", tiny.TakesGradientsInEvalMode, "first.conv", beside=1),
    Hazard("out of autocast", tiny.LeavesAutocast, "first.conv", beside=1),
    Hazard("a Function with a backward", tiny.ReversesGradients, "first.conv", beside=1),
    Hazard("checkpointed around two pairs", tiny.CheckpointedPairs, "first.conv", beside=1),
    Hazard("asks whether its input is a tensor", tiny.AsksForATensor, "first.conv", beside=1),
    Hazard("asks torch whether its input is a tensor", tiny.AsksTorchForATensor, "first.conv", beside=1),
    # Maps
    Hazard("without a batch", tiny.WithoutABatch, stays="without a batch dimension"),
    # Whole models
    Hazard("in DataParallel", lambda: nn.DataParallel(ConvNorm()), "module.conv"),
    Hazard("one bare conv", conv3, "", "it is the whole model"),
    Hazard("one bare conv in a container", lambda: nn.Sequential(conv3()), "0"),
    Hazard("on maps of 1×1", tiny.OnOnePixel, no_streams="save nothing"),
    Hazard("on maps of 1×1, a batch of one", tiny.OnOnePixel, inputs=(1, 4, 9, 8), trains="more than 1 value",
           no_streams="save nothing"),
    Hazard("on maps of 1×1, a batch of one, no norm", tiny.OnOnePixelWithoutNorm, inputs=(1, 4, 9, 8),
           no_streams="save nothing",
           acblock_trains="more than 1 value"),  # an ACBlock norms its branches, which needs two values to train
    Hazard("a batch of one", ConvNorm, inputs=(1, 4, 9, 8)),
]  # fmt: skip

every_block = pytest.mark.parametrize("block", BLOCKS)
EXPECTED_WARNINGS = (
    "ignore:.*weight_norm.*is deprecated:FutureWarning",
    "ignore:.*quantized tensor creation functions:UserWarning",
    "ignore:User provided device_type of 'cuda', but CUDA is not available:UserWarning",
    "ignore:None of the inputs have requires_grad=True:UserWarning",  # of a reentrant checkpoint that is not trained
)


@every_block
@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.name)
@pytest.mark.filterwarnings(*EXPECTED_WARNINGS)
def test_a_conv_is_swapped_rightly_or_stays_with_a_reason(hazard: Hazard, block: str):
    net, recipe = network(hazard.build), swap_3x3(block)
    plan = surgeon.plan(net, recipe, hazard.inputs)
    entry = next(entry for entry in plan.convs if entry.path == hazard.path)
    stays = hazard.stays or (hazard.no_streams if block == "octave" else "")
    assert stays in (entry.skip or "")
    assert (entry.swap is None) == bool(stays)
    assert len(plan.swaps) == hazard.beside + (not stays)
    if not plan.swaps:
        with pytest.raises(PlanError, match="nothing is swapped: "):
            surgeon.convert(net, recipe, hazard.inputs)
        return

    converted = surgeon.convert(net, plan)
    assert type(converted) is type(net)
    for one in plan.swaps:
        made = converted.get_submodule(one.path)
        assert isinstance(made, Block)
        assert made.name == block
        assert all(converted.get_submodule(path) is made for path in one.aliases)
    expected = by_hand(network(hazard.build), converted)
    assert_alike(converted, expected, hazard.inputs)
    if block == "acblock":
        assert_alike(converted, net, hazard.inputs)
        fused = surgeon.fuse(converted)
        assert not any(isinstance(module, Block) for module in fused.modules())
        assert_alike(fused, net, hazard.inputs)
    keeps_training = block == "acblock" and all(one.note is None for one in plan.swaps)
    train(hazard, block, network(hazard.build), converted, same=keeps_training)


def network(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build it in eval mode, with norms that do something; the same one whenever it is built."""
    torch.manual_seed(0)
    net = build().to(dtype)
    shake_(net)
    return net.eval()


def swap_3x3(block: str) -> surgeon.Recipe:
    rule = f"{{swap: {block}, match: {{kernel: 3}}, with: {BLOCKS[block]}, optional: true}}"
    return surgeon.recipes.recipe.parse(f"{{surgeon: 1, title: T, rules: [{rule}]}}", "swap.yaml")


def maps(inputs: Shape | tuple[Shape, ...]) -> list[Tensor]:
    """Noise of these shapes."""
    generator = torch.Generator().manual_seed(1)
    shapes = inputs if isinstance(inputs[0], tuple) else (inputs,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def tensors(out: object) -> Iterator[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        yield from tensors(list(out.values()))
    elif isinstance(out, list | tuple):
        for part in out:
            yield from tensors(part)
    elif dataclasses.is_dataclass(out):
        yield from tensors(list(vars(out).values()))


def assert_alike(one: nn.Module, other: nn.Module, inputs: Shape | tuple[Shape, ...]) -> None:
    """Compare copies, so that what a run does to a network does not count."""
    with torch.no_grad():
        ours, theirs = (list(tensors(copy.deepcopy(net)(*maps(inputs)))) for net in (one, other))
    assert len(ours) == len(theirs) > 0
    for mine, truth in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        assert relative(mine, truth) <= 1e-12


def train(hazard: Hazard, block: str, net: nn.Module, converted: nn.Module, *, same: bool) -> None:
    """One step in train mode: it gives finite gradients, and the `same` as the network where the plan says no less."""
    if hazard.trains:
        with pytest.raises(Exception, match=hazard.trains):
            net.train()(*maps(hazard.inputs))
        return
    if hazard.acblock_trains and block == "acblock":
        net.train()(*maps(hazard.inputs))
        with pytest.raises(Exception, match=hazard.acblock_trains):
            converted.train()(*maps(hazard.inputs))
        return
    ours, theirs = (list(tensors(one_step(model, hazard.inputs))) for model in (net, converted))
    assert [tuple(t.shape) for t in ours] == [tuple(t.shape) for t in theirs]
    assert all(t.isfinite().all() for t in theirs)
    assert not same or all(relative(b, a) <= 1e-12 for a, b in zip(ours, theirs, strict=True))
    learnt = [p.grad for p in converted.parameters() if p.grad is not None]
    assert learnt
    assert all(grad.isfinite().all() for grad in learnt)


def one_step(model: nn.Module, inputs: Shape | tuple[Shape, ...]) -> object:
    model.train()
    torch.manual_seed(2)  # what is dropped
    out = model(*(x.requires_grad_() for x in maps(inputs)))
    sum(t.sum() for t in tensors(out) if t.requires_grad).backward()
    return out


def learning(model: nn.Module, inputs: Shape | tuple[Shape, ...]) -> set[str]:
    """Name the parameters that a step of training reaches."""
    model.zero_grad(set_to_none=True)
    one_step(model, inputs)
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


# What the papers say, by hand


class ThinnedOut(nn.Module):
    """HetConv of p = 2 in blocks: half of the filters see half of the channels with whole kernels, others as 1×1."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = copy.deepcopy(conv)
        c_out, c_in, _, _ = conv.weight.shape
        with torch.no_grad():
            for filters, others in ((slice(0, c_out // 2), slice(c_in // 2, None)),
                                    (slice(c_out // 2, None), slice(0, c_in // 2))):  # fmt: skip
                centre = self.conv.weight[filters, others, 1, 1].clone()
                self.conv.weight[filters, others] = 0
                self.conv.weight[filters, others, 1, 1] = centre

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


class TwoStreams(nn.Module):
    """OctaveConv on plain tensors, its four kernels convolved one by one; at stride 2 the maps are pooled first."""

    def __init__(self, conv: nn.Conv2d, alpha_in: float, alpha_out: float) -> None:
        super().__init__()
        self.conv = conv
        self.into, self.out = (
            c - int(a * c) for a, c in ((alpha_in, conv.in_channels), (alpha_out, conv.out_channels))
        )

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        high, fine = input[:, : self.into], self.halved(input[:, self.into :])
        low, lift = fine, self.doubled
        if self.conv.stride == (2, 2):  # what goes from low to high has that resolution already
            high, low, lift = self.halved(high), self.halved(low), lambda x, size: x
        size = high.shape[-2:]

        def seen(x: Tensor, rows: slice, columns: slice) -> Tensor:
            return F.conv2d(x, weight[rows, columns], None, padding=self.conv.kernel_size[0] // 2)

        highs, lows, from_high, from_low = (
            slice(0, self.out), slice(self.out, None), slice(0, self.into), slice(self.into, None),
        )  # fmt: skip
        above = seen(high, highs, from_high) + lift(seen(fine, highs, from_low), size)
        below = seen(self.halved(high), lows, from_high) + seen(low, lows, from_low)
        out = torch.cat([above, self.doubled(below, size)], 1)
        return out if bias is None else out + bias[:, None, None]

    @staticmethod
    def halved(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)

    @staticmethod
    def doubled(x: Tensor, size: torch.Size) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : size[0], : size[1]]


def by_hand(net: nn.Module, converted: nn.Module) -> nn.Module:
    """Put into the original what the papers say, where the converted network has a block."""
    made = {}
    for path, module in converted.named_modules(remove_duplicate=False):
        if not isinstance(module, Block) or module.name == "acblock":
            continue
        conv = net.get_submodule(path)
        if module not in made and module.name == "hetconv":
            made[module] = ThinnedOut(conv)
        elif module not in made:
            made[module] = TwoStreams(conv, 0.5, 0.5)  # as BLOCKS says
        net.set_submodule(path, made[module])
    return net


def test_what_is_written_by_hand_is_not_the_conv():
    """The comparisons above could fail: thinned out and in two streams, the network computes something else."""
    for block in ("hetconv", "octave"):
        net = network(ConvNorm)
        other = by_hand(network(ConvNorm), surgeon.convert(net, swap_3x3(block), SHAPE))
        assert relative(other(*maps(SHAPE)), net(*maps(SHAPE))) > 0.1


# Models that are refused as a whole


@every_block
def test_a_lazy_conv_that_has_not_run_is_refused(block: str):
    with pytest.raises(CaptureError, match=r"0\.weight has no shape yet\. Run the model once"):
        surgeon.convert(nn.Sequential(nn.LazyConv2d(4, 3)), swap_3x3(block), SHAPE)


@every_block
def test_a_model_without_convs_has_nothing_to_swap(block: str):
    with pytest.raises(PlanError, match="nothing is swapped: the model has no convs"):
        surgeon.convert(nn.Linear(4, 4), swap_3x3(block), (2, 4))


ACTS = {
    "survey": lambda net: surgeon.survey(net, SHAPE),
    "plan": lambda net: surgeon.plan(net, "acnet", SHAPE),
    "convert": lambda net: surgeon.convert(net, "acnet", SHAPE),
    "convert_": lambda net: surgeon.convert_(net, "acnet", SHAPE),
    "fuse": surgeon.fuse,
    "fuse_": surgeon.fuse_,
    "verify": lambda net: surgeon.verify(net, net, SHAPE),
}
every_act = pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)


@every_act
def test_a_compiled_model_is_to_be_given_as_it_was(act: Callable[[nn.Module], object]):
    net = torch.compile(ConvNorm(), backend="eager")
    with pytest.raises(ModelError, match=r"wrapped in OptimizedModule.*Give model\._orig_mod"):
        act(net)
    with pytest.raises(ModelError, match=r"0 is wrapped in OptimizedModule.*Give model\.0\._orig_mod"):
        act(nn.Sequential(net))
    if act is not ACTS["fuse"]:
        act(net._orig_mod)


def test_a_model_that_is_compiled_in_place_is_converted():
    net = network(ConvNorm)
    net.compile(backend="eager")
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert isinstance(converted.conv, Block)
    assert_alike(converted, net, SHAPE)


@every_act
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
def test_torchscript_is_refused(act: Callable[[nn.Module], object]):
    with pytest.raises(ModelError, match="the model is TorchScript, which has no modules that could be swapped"):
        act(scripted())
    with pytest.raises(ModelError, match="first is TorchScript"):
        act(tiny.ScriptedChild())


@every_act
def test_an_exported_graph_is_refused(act: Callable[[nn.Module], object]):
    exported = torch.export.export(network(ConvNorm), tuple(maps(SHAPE))).module()
    with pytest.raises(ModelError, match=r"the model is an exported graph.*Give the network that was exported"):
        act(exported)


@every_act
def test_a_model_of_which_python_makes_another_one_is_refused(act: Callable[[nn.Module], object]):
    """A copy of a feature extractor is one in train mode."""
    extractor = create_feature_extractor(network(tiny.TwoPairs), ["first"])
    if act is not ACTS["fuse_"]:  # which copies nothing
        with pytest.raises(CaptureError, match=r"copy\.deepcopy gives it another class"):
            act(extractor)


@every_act
def test_a_function_that_would_call_the_original_is_refused(act: Callable[[nn.Module], object]):
    if act is not ACTS["fuse_"]:
        with pytest.raises(CaptureError, match="the model has a function as its layer, which would run the original"):
            act(tiny.HeldInAClosure())


def scripted() -> nn.Module:
    net = nn.Sequential(conv3(), nn.BatchNorm2d(4)).eval()
    return torch.jit.trace(net, torch.zeros(SHAPE))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.usefixtures("process_group")
def test_a_distributed_model_is_to_be_given_as_it_was():
    net = DistributedDataParallel(network(ConvNorm))
    for act in ACTS.values():
        with pytest.raises(ModelError, match=r"wrapped in DistributedDataParallel.*Give model\.module, and wrap"):
            act(net)
    for block in BLOCKS:
        converted = surgeon.convert(net.module, swap_3x3(block), SHAPE)
        out = DistributedDataParallel(converted.train())(*maps(SHAPE))
        out.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.conv.parameters())


# Dtypes and devices


@every_block
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(block: str, dtype: torch.dtype):
    net = network(ConvNorm, dtype)
    converted = surgeon.convert(net, swap_3x3(block), SHAPE)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    expected = by_hand(network(ConvNorm, dtype), converted).double()(*maps(SHAPE))
    assert relative(converted(*(x.to(dtype) for x in maps(SHAPE))), expected) <= 8 * torch.finfo(dtype).eps


@every_block
def test_meta_models_are_converted_and_have_no_numbers(block: str):
    net = ConvNorm().to("meta").eval()
    converted = surgeon.convert(net, swap_3x3(block), SHAPE)
    assert isinstance(converted.conv, Block)
    assert {t.device.type for t in (*converted.parameters(), *converted.buffers())} == {"meta"}
    assert converted(torch.empty(SHAPE, device="meta")).shape == SHAPE
    if block == "acblock":
        assert type(surgeon.fuse(converted).conv) is nn.Conv2d


# What the table has no room for


@every_block
@pytest.mark.parametrize(
    ("build", "paths"), [(tiny.AffineByHand, ["conv2d"]), (tiny.WeightsInAParameterList, ["conv2d", "conv2d_1"])]
)
def test_a_functional_conv_with_a_parameter_becomes_a_module(
    build: Callable[[], nn.Module], paths: list[str], block: str
):
    net = network(build)
    converted = surgeon.convert(net, swap_3x3(block), SHAPE)
    assert all(isinstance(converted.get_submodule(path), Block) for path in ("conv", *paths))
    if block == "acblock":
        assert_alike(converted, net, SHAPE)
        assert_alike(surgeon.fuse(converted), net, SHAPE)
        return
    by_module = network(build)  # the same with convs where the functions are
    lifted = [nn.Conv2d(4, 4, 3, padding=1, bias=False).double() for _ in paths]
    for conv, weight in zip(lifted, _functional_weights(by_module), strict=True):
        conv.weight.data = weight.detach().clone()
    whole = nn.Sequential(*lifted, by_module.conv, *([by_module.bn, nn.ReLU()] if hasattr(by_module, "bn") else []))
    expected = by_hand(whole, surgeon.convert(whole, swap_3x3(block), SHAPE))
    assert_alike(converted, expected, SHAPE)


def _functional_weights(net: nn.Module) -> list[Tensor]:
    return list(net.weights) if isinstance(net, tiny.WeightsInAParameterList) else [net.weight]


@every_block
@pytest.mark.parametrize("build", [tiny.TakesAList, tiny.TakesADict])
def test_inputs_that_are_lists_or_dicts_of_tensors(build: Callable[[], nn.Module], block: str):
    net = network(build)
    image, scale = maps((SHAPE, SHAPE))
    given = {"image": image, "scale": scale} if build is tiny.TakesADict else [image, scale]
    converted = surgeon.convert(net, swap_3x3(block), surgeon.Inputs((given,)))
    expected = by_hand(network(build), converted)
    assert relative(converted(given), expected(given)) <= 1e-12


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.name)
@pytest.mark.filterwarnings(*EXPECTED_WARNINGS)
def test_with_streams_that_go_from_conv_to_conv_nothing_else_changes(hazard: Hazard):
    """Roles are planned and seams removed; the same roles, conv by conv, give the same numbers."""
    rule = "{swap: octave, match: {kernel: 3}, with: {min_size: 1}, optional: true}"
    recipe = surgeon.recipes.recipe.parse(f"{{surgeon: 1, title: T, rules: [{rule}]}}", "octave.yaml")
    net = network(hazard.build)
    plan = surgeon.plan(net, recipe, hazard.inputs)
    assert all(entry.swap or entry.skip for entry in plan.convs)
    if not plan.swaps:
        return
    converted = surgeon.convert(net, plan)
    kept = [
        entry.model_copy(update={"options": entry.options | {"seams": "keep"}}) if entry.swap else entry
        for entry in plan.convs
    ]
    conv_by_conv = plan.model_copy(update={"convs": tuple(kept), "low_passed": (), "rewritten": (), "seams": ()})
    if not plan.low_passed:
        assert_alike(converted, surgeon.convert(net, conv_by_conv), hazard.inputs)
    assert_alike(surgeon.fuse(converted), converted, hazard.inputs)
    if not hazard.trains:
        assert learning(converted, hazard.inputs) == learning(net, hazard.inputs)


@every_block
def test_complex_convs_stay(block: str):
    net = tiny.Complex().eval()
    net.other.double()
    plan = surgeon.plan(net, swap_3x3(block), surgeon.Inputs(tuple(maps(SHAPE))))
    assert {entry.path: entry.skip for entry in plan.convs} == {"conv": "its weight is complex", "other": None}


@every_block
def test_a_conv_that_is_called_from_where_nobody_looks_is_refused(block: str):
    with pytest.raises(
        CaptureError, match=r"conv has been swapped, but the block in its place is not called.*surgeon plan"
    ):
        surgeon.convert(network(tiny.HeldWhereNobodyLooks), swap_3x3(block), SHAPE)


STREAMS = "{surgeon: 1, title: T, rules: [{swap: octave, match: {kernel: 3}, with: {min_size: 1}}]}"


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (tiny.FreezesItsFirstPair, "runs in a gradient mode of its own"),
        (tiny.TakesGradientsInEvalMode, "runs in a gradient mode of its own"),
        (tiny.ReversesGradients, "runs in a gradient mode of its own"),
        (tiny.EntersAutocast, "runs in an autocast"),
        (tiny.LeavesAutocast, "runs in an autocast"),
        (tiny.CheckpointedPairs, "runs in a checkpoint"),
        (tiny.OddName, "'the first.conv' holds more than letters"),
    ],
)
@pytest.mark.filterwarnings(*EXPECTED_WARNINGS)
def test_what_a_graph_would_lose_keeps_it_from_being_rewritten(build: Callable[[], nn.Module], why: str):
    plan = surgeon.plan(network(build, torch.float32), surgeon.recipes.recipe.parse(STREAMS, "streams.yaml"), SHAPE)
    assert len(plan.swaps) == 2
    assert plan.rewritten == ()
    assert any(why in seam.reason for seam in plan.seams)


def test_a_graph_with_nothing_to_lose_is_rewritten():
    plan = surgeon.plan(network(tiny.TwoPairs), surgeon.recipes.recipe.parse(STREAMS, "streams.yaml"), SHAPE)
    assert plan.rewritten == ("",)


def test_a_network_whose_graph_does_not_run_gets_no_streams():
    net, recipe = network(tiny.FallsBack), surgeon.recipes.recipe.parse(STREAMS, "streams.yaml")
    plan = surgeon.plan(net, recipe, SHAPE)
    assert [seam.kind for seam in plan.seams] == ["local"]
    assert "as a graph it does not run: " in plan.seams[0].reason
    converted = surgeon.convert(net, plan)
    assert type(converted) is type(net)
    assert sum(isinstance(module, Block) for module in converted.modules()) == 2


def test_a_network_whose_graph_is_another_one_gets_no_streams():
    net, recipe = network(tiny.AsksForAnAttribute), surgeon.recipes.recipe.parse(STREAMS, "streams.yaml")
    with pytest.raises(CaptureError, match=r"the graph of the model is not what it computes.*seams: keep"):
        surgeon.convert(net, recipe, SHAPE)
    kept = surgeon.convert(net, recipe, SHAPE, overrides=["rules[0].with.seams=keep"])
    assert sum(isinstance(module, Block) for module in kept.modules()) == 2


@every_block
@pytest.mark.parametrize("build", [tiny.AsksForATensor, tiny.AsksTorchForATensor])
def test_of_what_an_input_is_tracing_knows_what_is_given(build: Callable[[], nn.Module], block: str):
    """Given a dict, these networks skip a norm; given a tensor, or nothing, they do not."""
    net, image = network(build), maps(SHAPE)[0]
    for example in ({"image": image}, image):
        converted = surgeon.convert(net, swap_3x3(block), surgeon.Inputs((example,)))
        expected = by_hand(network(build), converted)
        with torch.no_grad():
            assert relative(converted(example), expected(example)) <= 1e-12
    norms = [entry.takes_norm for entry in surgeon.plan(net, swap_3x3("acblock")).convs]
    assert norms == [("first.bn",), ("second.bn",)]


def test_every_network_that_is_refused_says_what_to_do():
    """No error of these is without a next step."""
    for build in (conv3, lambda: nn.Linear(4, 4), lambda: nn.Sequential(nn.LazyConv2d(4, 3))):
        with pytest.raises(SurgeonError) as caught:
            surgeon.convert(build(), swap_3x3("acblock"), None)
        assert caught.value.todo

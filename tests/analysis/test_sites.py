"""What is known of a conv's surroundings, and that converting either is right there or says why it was not done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tiny
import torch
from helpers import relative, shake_
from tiny import SHAPE, ConvNorm, conv3
from torch import nn
from torch.nn.utils import parametrizations, prune

import surgeon
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Site
from surgeon.blocks.acblock import ACBlock
from surgeon.errors import CaptureError, PlanError
from surgeon.surgery.operate import operate_


@dataclass(frozen=True)
class Case:
    """A network, one conv of it, and what must be known of that conv."""

    name: str
    build: Callable[[], nn.Module]
    path: str = "conv"
    paths: tuple[str, ...] = ("conv",)
    calls: int | None = 1
    readers: tuple[str, ...] = ("BatchNorm2d",)
    stays: str = ""  # what the obstacle has to name; empty where the conv is swapped
    norm: tuple[str, ...] = ()  # all names of the norm that is taken over
    norm_stays: str = ""  # what the obstacle has to name, where none is


def network(case: Case) -> nn.Module:
    """Build it in float64, in eval mode, with norms that do something."""
    torch.manual_seed(0)
    net = case.build().double()
    shake_(net)
    return net.eval()


def site_of(net: nn.Module, path: str, shape: tuple[int, ...] = SHAPE) -> Site:
    return next(site for site in surgeon.survey(net, shape).sites if site.path == path)


def x(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def followed_by(norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: ConvNorm(bn=norm)


def with_conv(conv: nn.Module) -> Callable[[], nn.Module]:
    return lambda: ConvNorm(conv=conv)


def hooked(module: str, kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = ConvNorm()
        getattr(net.get_submodule(module), kind)(lambda *_: None)
        return net

    return build


def own_forward(module: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = ConvNorm()
        changed = net.get_submodule(module)
        changed.forward = lambda x: type(changed).forward(changed, x) * 2
        return net

    return build


def reparametrised(how: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: ConvNorm(conv=how(conv3()))


TAKEN = {"norm": ("bn",)}
TWICE = {"calls": 2, "readers": ("BatchNorm2d", "BatchNorm2d"), "norm_stays": "called 2 times"}

SWAPPED = [
    Case("an ordinary pair", ConvNorm, **TAKEN),
    Case("two names in one parent", tiny.TwoNames, paths=("conv", "again"), **TAKEN),
    Case("two names of the norm", tiny.TwoNamesForTheNorm, norm=("bn", "again")),
    Case("two names, both called", tiny.TwoNamesBothCalled, paths=("conv", "again"), calls=2,
         readers=("Conv2d", "BatchNorm2d"), norm_stays="called 2 times"),
    Case("two parents, each with its norm", tiny.TwoParents, "left.conv", ("left.conv", "right.conv"), **TWICE),
    Case("a pair with two parents", tiny.TwoParentsOnePair, "left.conv", ("left.conv", "right.0.conv"),
         norm=("left.bn", "right.0.bn")),
    Case("called twice, the norm after each", tiny.CalledTwiceNormAfterEach, **TWICE),
    Case("called twice, the norm after one", tiny.CalledTwiceNormOnOnePath, calls=2, readers=("BatchNorm2d", "add"),
         norm_stays="called 2 times"),
    Case("called at two sizes", tiny.CalledAtTwoSizes, calls=2, readers=("getitem", "output"),
         norm_stays="called 2 times"),
    Case("read by the norm and by an addition", tiny.ReadTwice, readers=("BatchNorm2d", "add"), norm_stays="add"),
    Case("the norm is read twice", tiny.NormReadTwice, **TAKEN),
    Case("the norm is read by nobody", tiny.NormReadByNobody, **TAKEN),
    Case("the norm is called twice", tiny.NormCalledTwice, norm_stays="bn is called 2 times"),
    Case("a functional norm", tiny.FunctionalNorm, readers=("batch_norm",), norm_stays="no norm follows"),
    Case("a GroupNorm", followed_by(nn.GroupNorm(2, 4)), readers=("GroupNorm",), norm_stays="GroupNorm"),
    Case("a LayerNorm", followed_by(nn.LayerNorm(SHAPE[1:])), readers=("LayerNorm",), norm_stays="LayerNorm"),
    Case("an InstanceNorm", followed_by(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
         readers=("InstanceNorm2d",), norm_stays="InstanceNorm2d"),
    Case("a BatchNorm of its own kind", followed_by(tiny.OwnNorm(4)), readers=("OwnNorm",), norm_stays="OwnNorm"),
    Case("no norm", followed_by(nn.Identity()), readers=("Identity",), norm_stays="no norm follows"),
    Case("a norm without statistics", followed_by(nn.BatchNorm2d(4, track_running_stats=False)),
         norm_stays="bn keeps no running statistics"),
    Case("a norm without weight and bias", followed_by(nn.BatchNorm2d(4, affine=False, eps=0.1)), **TAKEN),
    Case("a norm with its own eps and momentum", followed_by(nn.BatchNorm2d(4, eps=0.3, momentum=None)), **TAKEN),
    Case("a SyncBatchNorm", followed_by(nn.SyncBatchNorm(4)), readers=("SyncBatchNorm",), **TAKEN),
    Case("two norms share a weight", tiny.TiedNorms, "one.conv", ("one.conv",), norm_stays="one.bn"),
    Case("the network reads the norm's weight", tiny.ReadsTheNormsWeight, norm_stays="bn"),
    *(
        Case(f"a {kind} on the norm", hooked("bn", kind), norm_stays="hooks are attached to bn")
        for kind in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    ),
    Case("a norm with a forward of its own", own_forward("bn"), norm_stays="bn has a forward of its own"),
    Case("the norm is kept in a list too", tiny.NormKeptInAList, norm_stays="bn is also kept in norms"),
    Case("no bias", with_conv(conv3(bias=False)), **TAKEN),
    Case("geometry", with_conv(nn.Conv2d(4, 4, 5, (1, 2), (2, 1), (2, 1), 2, padding_mode="reflect")), **TAKEN),
    Case("a functional convolution beside it", tiny.AffineByHand, readers=("output",), norm_stays="no norm follows"),
]  # fmt: skip

KEPT = [
    *(
        Case(f"a {kind} on the conv", hooked("conv", kind), stays="hooks", norm=("bn",))
        for kind in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    ),
    Case("a forward of its own", own_forward("conv"), stays="it has a forward of its own", norm=("bn",)),
    Case("kept in a list too", tiny.KeptInAList, stays="also kept in layers", norm=("bn",)),
    Case("never called", tiny.NeverCalled, "spare", ("spare",), None, (), "it is never called", norm_stays="never"),
    Case("only its weight is read", tiny.WeightReadOnly, "spare", ("spare",), None, (), "reads its weight",
         norm_stays="never"),
    Case("tied weights", tiny.TiedWeights, "one", ("one",), readers=("Conv2d",), stays="two",
         norm_stays="no norm follows"),
    Case("the network reads its weight", tiny.ReadsTheWeight, stays="weight", **TAKEN),
    Case("a Conv2d of its own kind", with_conv(tiny.OwnConv(4, 4, 3)), stays="with a forward of its own", **TAKEN),
    Case("weight_norm", reparametrised(parametrizations.weight_norm), stays="parametriz", **TAKEN),
    Case("spectral_norm", reparametrised(parametrizations.spectral_norm), stays="parametriz", **TAKEN),
    Case("a transposed conv", with_conv(nn.ConvTranspose2d(4, 4, 3)), stays="ConvTranspose2d", **TAKEN),
    Case("a bare Conv2d", conv3, "", ("",), None, (), stays="whole model", norm_stays=" "),
]  # fmt: skip


@pytest.mark.parametrize("case", SWAPPED + KEPT, ids=lambda case: case.name)
def test_a_site_knows_its_surroundings(case: Case):
    site = site_of(network(case), case.path)
    assert site.paths == case.paths
    assert site.calls == (1 if case.path == "" else case.calls)
    assert site.readers == case.readers
    assert site.norm == case.norm
    assert (site.obstacle is None) == (not case.stays)
    assert case.stays in (site.obstacle or "")
    assert (site.norm_obstacle is None) == bool(case.norm)
    assert case.norm_stays in (site.norm_obstacle or "")


@pytest.mark.parametrize("case", [case for case in SWAPPED + KEPT if case.path], ids=lambda case: case.name)
def test_calls_and_readers_are_known_without_an_input(case: Case):
    site = next(site for site in surgeon.analysis.sites.survey(Network(network(case))).sites if site.path == case.path)
    assert (site.calls, site.readers, site.runs, site.size) == (case.calls, case.readers, (), None)


@pytest.mark.parametrize("case", SWAPPED, ids=lambda case: case.name)
def test_a_swap_keeps_the_function_and_reaches_every_name(case: Case):
    net = network(case)
    plan = surgeon.plan(net, "acnet", SHAPE)
    entry = next(entry for entry in plan.convs if entry.path == case.path)
    assert (entry.swap, entry.takes_norm) == ("acblock", case.norm)
    assert case.norm_stays in (entry.note or "")

    converted = surgeon.convert(net, plan)
    block = converted.get_submodule(case.path)
    assert isinstance(block, ACBlock)
    assert all(converted.get_submodule(path) is block for path in case.paths)
    assert all(type(converted.get_submodule(path)) is nn.Identity for path in case.norm)
    fused = surgeon.fuse(converted)
    assert all(type(fused.get_submodule(path)) is nn.Conv2d for path in case.paths)
    with torch.no_grad():
        truth = net(x())
        assert relative(converted(x()), truth) <= 1e-12
        assert relative(fused(x()), truth) <= 1e-12


TRAINABLE = [case for case in SWAPPED if case.norm and "SyncBatchNorm" not in case.readers]  # that trains on GPUs only


def test_a_weight_that_is_read_where_tracing_cannot_follow_is_seen_in_a_run():
    net = tiny.WeightReadUnseen()
    assert site_of(net, "spare").obstacle == "the network also reads its weight directly"
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert isinstance(converted.conv, ACBlock)
    assert type(converted.spare) is nn.Conv2d


@pytest.mark.parametrize("case", TRAINABLE, ids=lambda case: case.name)
def test_a_norm_that_is_taken_over_keeps_the_function_in_training_too(case: Case):
    net = network(case).train()
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert relative(converted(x()), net(x())) <= 1e-12
    assert relative(converted.eval()(x()), net.eval()(x())) <= 1e-12, "the statistics went on being gathered alike"


@pytest.mark.parametrize(
    "case",
    [case for case in SWAPPED if type(case.build()) in (
        tiny.TwoParents, tiny.CalledTwiceNormOnOnePath, tiny.ReadTwice, tiny.NormCalledTwice, tiny.ReadsTheNormsWeight,
    )],
    ids=lambda case: case.name,
)  # fmt: skip
def test_taking_a_norm_over_in_spite_of_an_obstacle_would_show(case: Case):
    """The other tests compare the right thing: obstacles are there for a reason."""
    net = network(case)
    norm = case.path.replace("conv", "bn")
    plan = surgeon.plan(net, "acnet", SHAPE)
    entries = [e.model_copy(update={"takes_norm": (norm,)}) if e.path == case.path else e for e in plan.convs]
    broken = copy.deepcopy(net)
    operate_(broken, plan.model_copy(update={"convs": tuple(entries)}), Network(broken))
    if type(net) is tiny.ReadsTheNormsWeight:
        with pytest.raises(AttributeError, match="weight"):
            broken(x())
    else:
        assert relative(broken(x()), net(x())) > 1e-3


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_a_conv_with_an_obstacle_stays_and_the_plan_says_why(case: Case):
    net = network(case)
    plan = surgeon.plan(net, acblocks(optional=True), SHAPE)
    entry = next(entry for entry in plan.convs if entry.path == case.path)
    assert entry.swap is None
    assert case.stays in str(entry.skip)
    plan = plan.model_copy(update={"convs": (entry,)})
    with pytest.raises(PlanError, match=f"nothing is swapped: .*{case.stays}"):
        surgeon.convert(net, plan)


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_the_convs_beside_one_with_an_obstacle_are_swapped(case: Case):
    net = nn.Sequential(network(case), nn.Sequential(conv3(), nn.BatchNorm2d(4))).double().eval()
    shake_(net)
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert isinstance(converted[1][0], ACBlock)
    if not case.path:  # no longer the whole model
        assert isinstance(converted[0], ACBlock)
    else:
        assert type(converted[0].get_submodule(case.path)) is type(net[0].get_submodule(case.path))
    with torch.no_grad():
        assert relative(converted(x()), net(x())) <= 1e-12


def acblocks(*, optional: bool = False) -> surgeon.Recipe:
    rule = f"{{swap: acblock, match: {{kernel: 3}}, optional: {str(optional).lower()}}}"
    return surgeon.recipes.recipe.parse(f"{{surgeon: 1, title: T, rules: [{rule}]}}", "acblocks.yaml")


@pytest.mark.parametrize(
    ("conv", "shape"), [(nn.Conv1d(4, 4, 3), (2, 4, 9)), (nn.Conv3d(4, 4, 3), (2, 4, 5, 5, 5))], ids=["1d", "3d"]
)
def test_convs_of_other_dimensions_are_sites_that_no_rule_can_claim(conv: nn.Module, shape: tuple[int, ...]):
    net = nn.Sequential(conv)
    site = site_of(net, "0", shape)
    assert (site.kind, site.spec, site.calls) == (type(conv).__name__, None, 1)
    assert site.kind in str(site.obstacle)
    with pytest.raises(PlanError, match=r"rules\[0\].*claims no conv"):
        surgeon.plan(net, "acnet", shape)
    [entry] = surgeon.plan(net, acblocks(optional=True), shape).convs
    assert entry.skip == site.obstacle


def test_a_model_without_convs_has_no_sites():
    net = nn.Linear(4, 4)
    assert surgeon.survey(net, (2, 4)).sites == ()
    with pytest.raises(PlanError, match="claims no conv"):
        surgeon.plan(net, "acnet", (2, 4))
    with pytest.raises(PlanError, match="the model has no convs"):
        surgeon.convert(net, acblocks(optional=True), (2, 4))


def test_a_functional_convolution_is_a_site_with_a_name_of_its_own():
    assert [site.path for site in surgeon.survey(tiny.AffineByHand(), SHAPE).sites] == ["conv", "conv2d"]


def test_blocks_are_no_sites_and_what_is_left_can_still_be_swapped():
    net = network(Case("", lambda: nn.Sequential(ConvNorm(), ConvNorm())))
    first_only = "{surgeon: 1, title: T, rules: [{swap: acblock, match: {name: 0.conv}}]}"
    once = surgeon.convert(net, surgeon.recipes.recipe.parse(first_only, "first.yaml"), SHAPE)
    found = surgeon.survey(once, SHAPE)
    assert [site.path for site in found.sites] == ["1.conv"]
    assert found.blocks == {"acblock": 1}
    twice = surgeon.convert(once, "acnet", SHAPE)
    assert isinstance(twice[0].conv, ACBlock)
    assert isinstance(twice[1].conv, ACBlock)
    with torch.no_grad():
        assert relative(twice(x()), net(x())) <= 1e-12
        assert relative(surgeon.fuse(twice)(x()), net(x())) <= 1e-12


@pytest.mark.parametrize("build", [tiny.ActsOnItsMode, tiny.ActsOnValues, tiny.ActsOnValuesWithStages])
def test_norms_inside_the_islands_of_a_network_that_cannot_be_traced_are_taken_over(build: Callable[[], nn.Module]):
    net = network(Case("", build))
    converted = surgeon.convert(net, "acnet", SHAPE)
    pairs = [path for path, module in net.named_modules() if isinstance(module, ConvNorm)]
    assert len(pairs) > 1
    assert all(type(converted.get_submodule(f"{path}.bn")) is nn.Identity for path in pairs)
    with torch.no_grad():
        assert relative(converted(x()), net(x())) <= 1e-12


def test_a_norm_that_another_way_through_the_module_does_not_use_is_not_taken_over():
    net = network(Case("", tiny.MaySkipTheNormInside))
    site = site_of(net, "inner.conv")
    assert (site.calls, site.norm) == (2, ())
    converted = surgeon.convert(net, "acnet", SHAPE)
    with torch.no_grad():
        assert relative(converted(x()), net(x())) <= 1e-12


# What looks at the conv's insides without tracing noticing


def pruned() -> nn.Module:
    net = ConvNorm()
    prune.random_unstructured(net.conv, "weight", 0.5)
    return net


def old_weight_norm() -> nn.Module:
    net = ConvNorm()
    nn.utils.weight_norm(net.conv)
    return net


def old_spectral_norm() -> nn.Module:
    net = ConvNorm()
    nn.utils.spectral_norm(net.conv)
    net(torch.zeros(SHAPE))
    return net


@pytest.mark.parametrize("build", [pruned, old_weight_norm, old_spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_conv_whose_weight_is_computed_by_a_hook_stays_and_the_plan_says_why(build: Callable[[], nn.Module]):
    net = nn.Sequential(build(), ConvNorm()).double().eval()
    hooked, _ = surgeon.plan(net, "acnet", SHAPE).convs
    assert "hook" in str(hooked.skip)
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert isinstance(converted[1].conv, ACBlock)
    with torch.no_grad():
        assert relative(converted(x()), net(x())) <= 1e-12


@pytest.mark.parametrize("shape", [None, SHAPE])
def test_a_lazy_conv_must_have_run_and_stays_as_lazy_as_it_is(shape: tuple[int, ...] | None):
    net = nn.Sequential(nn.LazyConv2d(4, 3), conv3())
    with pytest.raises(CaptureError, match="has no shape yet"):
        surgeon.plan(net, "acnet", shape)
    assert nn.parameter.is_lazy(net[0].weight)


def test_a_lazy_conv_that_has_run_is_an_ordinary_one():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).double()
    net(x())
    shake_(net)
    converted = surgeon.convert(net.eval(), "acnet", SHAPE)
    assert isinstance(converted[0], ACBlock)
    assert relative(converted(x()), net(x())) <= 1e-12


@pytest.mark.parametrize(
    "build",
    [
        tiny.TrainReturnsNothing,
        pytest.param(tiny.CalledByKeyword),
        pytest.param(tiny.ReachedFromOutsideTheIsland),
        pytest.param(tiny.HeldInAList),
        pytest.param(tiny.ReadsTheWeightUntraced),
        pytest.param(tiny.ReadsTheGeometry),
        pytest.param(tiny.KeepsState),
    ],
)
def test_conversion_is_right_or_refused(build: Callable[[], nn.Module]):
    net = network(Case("", lambda: nn.Sequential(build(), ConvNorm())))
    with torch.no_grad():
        truth = net(x())
        try:
            converted = surgeon.convert(net, "acnet", SHAPE)
        except surgeon.errors.SurgeonError:
            return
        assert relative(converted(x()), truth) <= 1e-12


def test_a_conv_that_is_never_called_is_said_to_be_so():
    assert "called" in str(site_of(tiny.NeverCalled(), "spare").norm_obstacle)


def test_two_sites_that_share_a_bias_both_stay():
    net = nn.Sequential(conv3(), conv3())
    net[1].bias = net[0].bias
    plan = surgeon.plan(net, acblocks(), SHAPE)
    assert [("weights" in str(e.skip), e.swap) for e in plan.convs] == [(True, None)] * 2


def test_the_plan_of_a_network_does_not_depend_on_the_input_being_known():
    net = network(Case("", tiny.TwoParents))
    without = surgeon.surgery.make.make(
        surgeon.recipes.recipe.load("acnet"), surgeon.analysis.sites.survey(Network(net))
    )
    known = surgeon.plan(net, "acnet", SHAPE)
    assert without.input is None
    assert known.input == (SHAPE,)
    for one, other in zip(without.convs, known.convs, strict=True):
        for fact in ("path", "swap", "takes_norm", "calls"):
            assert getattr(one, fact) == getattr(other, fact)

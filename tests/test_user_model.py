"""The model is still the user's: its class, methods, keys and tools work as they did, converted and fused."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tiny
import torch
from helpers import narrow_torchvision, relative, shake_
from tiny import SHAPE, ConvNorm, conv3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import surgeon
from surgeon.analysis.network import Network
from surgeon.blocks.acblock import ACBlock

IMAGE = (2, 3, 64, 64)
PARTS = ("square_conv", "square_bn", "ver_conv", "ver_bn", "hor_conv", "hor_bn")


def own(dtype: torch.dtype = torch.float64) -> tiny.Own:
    torch.manual_seed(0)
    return shake_(tiny.Own()).to(dtype).eval()


def resnet(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return shake_(narrow_torchvision("resnet18", num_classes=5), gently=True).to(dtype).eval()


def noise(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def converted_to(init: str, net: nn.Module, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """With `split` every strip takes part in the function from the start."""
    return surgeon.convert(net, "acnet", shape, overrides=[f"rules[0].with.init={init}"])


def trained(net: nn.Module) -> nn.Module:
    """Convert, and shake all norms as training would, so that all branches count; then the function is another one."""
    return shake_(surgeon.convert(net, "acnet", SHAPE), gently=True)


def blocks(net: nn.Module) -> dict[str, ACBlock]:
    return {path: module for path, module in net.named_modules() if isinstance(module, ACBlock)}


def contents(net: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in net.state_dict().items()}


def assert_same_contents(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def flags(net: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in net.named_modules(remove_duplicate=False)}


both = pytest.mark.parametrize(("build", "shape"), [(own, SHAPE), (resnet, IMAGE)], ids=["own", "resnet18"])


# Class, methods, keys


@both
def test_class_methods_and_attributes_are_the_user_s(build: Callable[[], nn.Module], shape: tuple[int, ...]):
    net = build()
    converted = surgeon.convert(net, "acnet", shape)
    for made in (converted, surgeon.fuse(converted)):
        assert type(made) is type(net)
        assert [type(m) for _, m in made.named_children()] == [type(m) for _, m in net.named_children()]
        own_attributes = {k for k in vars(net) if not k.startswith("_")}
        assert {k: getattr(made, k) for k in own_attributes} == {k: getattr(net, k) for k in own_attributes}
        assert relative(made(noise(shape)), net(noise(shape))) <= 1e-12


def test_methods_and_switches_go_on_working():
    net = own()
    converted = surgeon.convert(net, "acnet", SHAPE)
    for made in (converted, surgeon.fuse(converted)):
        assert made.family == "own"
        assert made.best(noise()) == net.best(noise())
        assert relative(made.features(noise()), net.features(noise())) <= 1e-12
        made.pooled = False
        assert relative(made(noise()), net.features(noise())) <= 1e-12


@both
def test_keys_of_what_was_not_touched_are_the_same_and_hold_the_same(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
):
    net = build()
    plan = surgeon.plan(net, "acnet", shape)
    converted = surgeon.convert(net, plan)
    fused = surgeon.fuse(converted)
    touched = tuple(f"{path}." for entry in plan.swaps for path in (*entry.paths, *entry.takes_norm))
    before = contents(net)
    rest = {key: tensor for key, tensor in before.items() if not key.startswith(touched)}
    assert 0 < len(rest) < len(before)
    for made in (converted, fused):
        after = contents(made)
        assert_same_contents({key: tensor for key, tensor in after.items() if not key.startswith(touched)}, rest)
    for entry in plan.swaps:
        inside = {key.removeprefix(f"{entry.path}.") for key in converted.state_dict() if key.startswith(entry.path)}
        assert {key.partition(".")[0] for key in inside} == set(PARTS)
        assert {key for key in fused.state_dict() if key.startswith(f"{entry.path}.")} == {
            f"{entry.path}.weight",
            f"{entry.path}.bias",
        }


def test_a_model_that_is_one_conv_in_a_container_keeps_its_container():
    net = nn.ModuleDict({"only": nn.Sequential(conv3())})
    decided = surgeon.surgery.make.make(
        surgeon.recipes.recipe.load("acnet"), surgeon.analysis.sites.survey(Network(net))
    )
    assert type(surgeon.convert(net, decided)) is nn.ModuleDict


# The model that was given


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@both
def test_convert_and_fuse_leave_what_they_are_given_untouched(
    build: Callable[[], nn.Module], shape: tuple[int, ...], mode: bool
):
    net = build().train(mode)
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).train(not mode)
    before, modes, modules = contents(net), flags(net), dict(net.named_modules())
    converted = surgeon.convert(net, "acnet", shape)
    assert_same_contents(contents(net), before)
    assert flags(net) == modes
    assert dict(net.named_modules()) == modules
    shared = {id(t) for t in (*net.parameters(), *net.buffers())}
    assert not shared & {id(t) for t in (*converted.parameters(), *converted.buffers())}

    before, modes, modules = contents(converted), flags(converted), dict(converted.named_modules())
    fused = surgeon.fuse(converted)
    assert_same_contents(contents(converted), before)
    assert flags(converted) == modes
    assert dict(converted.named_modules()) == modules
    addresses = {t.data_ptr() for t in converted.state_dict().values() if t.numel()}
    assert not addresses & {t.data_ptr() for t in fused.state_dict().values() if t.numel()}


def test_convert_in_place_edits_what_it_is_given():
    net = own()
    truth, weight, norm = net(noise()), net.stem.conv.weight, net.stem.bn
    assert surgeon.convert_(net, "acnet", SHAPE) is net
    assert relative(net(noise()), truth) <= 1e-12
    block = net.stem.conv
    assert block.square_conv.weight is weight
    assert block.square_bn.weight is norm.weight
    assert block.square_bn.bias is norm.bias
    assert surgeon.fuse_(net) is net
    assert blocks(net) == {}
    assert relative(net(noise()), truth) <= 1e-12


def test_an_optimizer_that_was_made_before_goes_on_training_what_was_there():
    net = own(torch.float32).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    surgeon.convert_(net, "acnet", SHAPE)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for block in blocks(net).values():
        assert {id(p) for p in (block.square_conv.weight, block.square_bn.weight, block.square_bn.bias)} <= known
    before = contents(net)
    net(noise(dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.stem.conv.square_conv.weight, before["stem.conv.square_conv.weight"])
    optimizer.add_param_group({"params": [p for p in net.parameters() if id(p) not in known]})
    optimizer.step()
    assert not torch.equal(net.stem.conv.ver_bn.weight, before["stem.conv.ver_bn.weight"])


# Training


@both
def test_every_parameter_of_the_blocks_learns(build: Callable[[], nn.Module], shape: tuple[int, ...]):
    net = surgeon.convert(build(), "acnet", shape).train()
    before = contents(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(2):  # strips start at gamma 0, which is what moves first
        optimizer.zero_grad()
        F.cross_entropy(net(noise(shape)), torch.tensor([0, 1])).backward()
        optimizer.step()
        strips = [block.ver_conv.weight for block in blocks(net).values()]
        assert all(bool(strip.grad.any()) == (step > 0) for strip in strips)
    after = net.state_dict()
    names = [f"{path}.{name}" for path, block in blocks(net).items() for name, _ in block.named_parameters()]
    assert len(names) == 9 * len(blocks(net))
    assert [name for name in names if torch.equal(after[name], before[name])] == []
    fused = surgeon.fuse(net)
    assert relative(fused.eval()(noise(shape)), net.eval()(noise(shape))) <= 1e-12


def test_with_split_every_parameter_learns_from_the_first_step():
    net = converted_to("split", own()).train()
    net(noise()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for block in blocks(net).values() for p in block.parameters())


def test_training_goes_where_the_plain_model_s_training_goes_as_long_as_the_strips_are_kept_still():
    """Taking over a norm changes nothing: with frozen strips, SGD takes the very same steps."""
    plain = own().train()
    net = surgeon.convert(plain, "acnet", SHAPE)
    for block in blocks(net).values():
        for part in PARTS[2:]:
            getattr(block, part).requires_grad_(False)
    net.drop.p = plain.drop.p = 0.0
    for model in (plain, net):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(noise()), torch.tensor([0, 1])).backward()
            optimizer.step()
    assert relative(net.eval()(noise()), plain.eval()(noise())) <= 1e-12
    assert relative(net(noise()), own()(noise())) > 1e-3


def test_mixed_precision_works_and_is_as_close_as_the_original_is():
    net = own(torch.float32)
    converted = surgeon.convert(net, "acnet", SHAPE)
    exact = own()(noise())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, out, fused = (m(noise(dtype=torch.float32)) for m in (net, converted, surgeon.fuse(converted)))
    assert out.dtype == fused.dtype == plain.dtype == torch.bfloat16
    rounding = relative(plain, exact)
    assert 1e-4 < rounding < 0.1
    assert relative(out, exact) <= 3 * rounding
    assert relative(fused, exact) <= 3 * rounding

    converted.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        converted(noise(dtype=torch.float32)).float().square().sum().backward()
    for block in blocks(converted).values():
        for name, p in block.named_parameters():
            assert p.grad.dtype == torch.float32
            assert bool(p.grad.any()) == (name not in ("ver_conv.weight", "hor_conv.weight")), "their gamma is 0"


def test_frozen_parts_stay_frozen():
    net = own()
    net.stem.requires_grad_(False)
    net.body[0].conv.requires_grad_(False)
    net.body[1].bn.requires_grad_(False)
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert not any(p.requires_grad for p in converted.stem.parameters())
    assert all(p.requires_grad for p in converted.head.parameters())
    half = converted.body[0].conv
    assert {name for name, p in half.named_parameters() if p.requires_grad} == {"square_bn.weight", "square_bn.bias"}
    other = converted.body[1].conv
    assert {name for name, p in other.named_parameters() if not p.requires_grad} == {
        "square_bn.weight",
        "square_bn.bias",
    }
    fused = surgeon.fuse(converted)
    assert [fused.stem.conv.weight.requires_grad, fused.stem.conv.bias.requires_grad] == [False, False]
    assert [fused.body[1].conv.weight.requires_grad, fused.body[1].conv.bias.requires_grad] == [True, True]


def test_a_norm_that_is_in_eval_mode_in_a_model_that_trains_stays_so():
    net = own().train()
    net.stem.bn.eval()
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert converted.training
    stem, body = converted.stem.conv, converted.body[0].conv
    assert [getattr(stem, part).training for part in PARTS] == [True, False] * 3
    assert [getattr(body, part).training for part in PARTS] == [True] * 6
    before = contents(stem)
    torch.manual_seed(0)
    out = converted(noise())
    torch.manual_seed(0)
    assert relative(out, net(noise())) <= 1e-12
    assert_same_contents(contents(stem), before)


def test_fuse_leaves_every_module_in_the_mode_it_was_in():
    net = surgeon.convert(own(), "acnet", SHAPE).train()
    net.body.eval()
    net.body[0].conv.ver_bn.train()
    modes = flags(net)
    fused = surgeon.fuse(net)
    assert flags(net) == modes
    assert all(training == modes[path] for path, training in flags(fused).items())
    assert {module.training for module in fused.modules()} == {True, False}


def test_fusing_again_changes_nothing():
    fused = surgeon.fuse(trained(own()))
    again = surgeon.fuse(fused)
    assert_same_contents(contents(again), contents(fused))
    assert surgeon.surgery.history.history(again) == surgeon.surgery.history.history(fused)
    assert [step.operation for step in surgeon.surgery.history.history(again)] == ["convert", "fuse"]


def test_fusing_a_model_that_surgeon_never_saw_changes_nothing():
    net = own()
    fused = surgeon.fuse(net)
    assert_same_contents(contents(fused), contents(net))
    assert surgeon.surgery.history.history(fused) == ()


def test_fusing_uses_all_branches():
    """The tests above would notice a branch that is left out: each has its share in the function."""
    net = trained(own())
    truth = net(noise())
    assert relative(surgeon.fuse(net)(noise()), truth) <= 1e-12
    for part in PARTS[1::2]:
        spoilt = copy.deepcopy(net)
        nn.init.zeros_(getattr(spoilt.stem.conv, part).weight)
        assert relative(surgeon.fuse(spoilt)(noise()), truth) > 1e-3


# Dtypes and layouts


@pytest.mark.parametrize("init", ["takeover", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_converted_and_fused(dtype: torch.dtype, init: str):
    """Close to what the stored numbers mean in float64, and no further than the plain model's own rounding allows."""
    net = own(dtype)
    converted = converted_to(init, net)
    fused = surgeon.fuse(converted)
    exact = copy.deepcopy(net).double()(noise(dtype=dtype).double())
    assert {t.dtype for m in (converted, fused) for t in m.state_dict().values() if t.is_floating_point()} == {dtype}
    rounding = relative(net(noise(dtype=dtype)), exact)
    for made in (converted, fused):
        assert relative(made(noise(dtype=dtype)), exact) <= 4 * rounding
    if init == "takeover":
        assert torch.equal(converted.stem.conv.square_conv.weight, net.stem.conv.weight)


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last_carries_through(when: str):
    net = own().to(memory_format=torch.channels_last) if when == "before" else own()
    converted = surgeon.convert(net, "acnet", SHAPE)
    if when == "after":
        converted = converted.to(memory_format=torch.channels_last)
    image = noise().to(memory_format=torch.channels_last)
    for made in (converted, surgeon.fuse(converted)):
        features = made.features(image)
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert not features.is_contiguous()
        assert relative(features, own().features(noise())) <= 1e-12
    for conv in (m for m in surgeon.fuse(converted).modules() if isinstance(m, nn.Conv2d)):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)


# Copies and tools


@pytest.mark.parametrize(
    "carry",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_whole(carry: Callable[[nn.Module], nn.Module]):
    net = trained(own())
    for made in (net, surgeon.fuse(net)):
        other = carry(made)
        assert type(other) is tiny.Own
        assert_same_contents(contents(other), contents(made))
        assert surgeon.surgery.history.history(other) == surgeon.surgery.history.history(made) != ()
        assert torch.equal(other(noise()), made(noise()))
        assert relative(surgeon.fuse(other)(noise()), made(noise())) <= 1e-12


def test_a_checkpoint_is_loaded_into_a_model_that_was_converted_alike(tmp_path: Path):
    net = trained(own())
    torch.save(net.state_dict(), tmp_path / "checkpoint.pt")
    other = surgeon.convert(tiny.Own().double().eval(), "acnet", SHAPE)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    assert torch.equal(other(noise()), net(noise()))


BACKENDS = ["aot_eager", "inductor"] if shutil.which("c++") else ["aot_eager"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_models_compute_the_same_in_one_graph(backend: str):
    net = trained(own())
    torch._dynamo.reset()
    with torch.no_grad():
        for made in (net, surgeon.fuse(net)):
            assert relative(torch.compile(made, backend=backend, fullgraph=True)(noise()), net(noise())) <= 1e-12


def test_a_compiled_model_trains_as_it_does_uncompiled():
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = trained(own()).train()
        net.drop.p = 0.0
        (torch.compile(net, backend="aot_eager") if compiled else net)(noise()).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert relative(one, other) <= 1e-9


def test_norms_that_are_made_synchronous_fold_as_before():
    net = trained(own())
    synchronous = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert {type(getattr(b, part)) for b in blocks(synchronous).values() for part in PARTS[1::2]} == {nn.SyncBatchNorm}
    fused = surgeon.fuse(synchronous)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in fused.modules())
    assert relative(fused(noise()), net(noise())) <= 1e-12


def test_a_synchronous_norm_that_is_taken_over_hands_its_process_group_to_the_strips():
    net = nn.Sequential(conv3(), nn.SyncBatchNorm(4, process_group="some of us"))
    block = surgeon.convert(net, "acnet", SHAPE)[0]
    assert [getattr(block, part).process_group for part in PARTS[1::2]] == ["some of us"] * 3


def steps(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Three steps of SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def batch() -> tuple[Tensor, Tensor]:
    return noise((8, *SHAPE[1:])), torch.arange(8) % 5


def train_in_parallel(rank: int, ranks: int, folder: str) -> None:
    """One process of several: train on its share of the batch, with frozen norms and with norms that gather."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    images, labels = batch()
    try:
        for mode in ("eval", "train"):
            net = trained(own()).train(mode == "train")
            net.drop.p = 0.0
            steps(DistributedDataParallel(net), images[rank::ranks], labels[rank::ranks])
            torch.save(net.state_dict(), f"{folder}/{mode}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_training_keeps_ranks_equal_and_goes_where_one_process_goes(tmp_path: Path):
    torch.multiprocessing.spawn(train_in_parallel, (2, str(tmp_path)), nprocs=2)
    learnt = {file.stem: torch.load(file) for file in tmp_path.glob("*.pt")}
    alone = trained(own())
    start = contents(alone)
    steps(alone, *batch())
    gathered = ("running_mean", "running_var")
    for mode in ("eval", "train"):
        one, other = learnt[f"{mode}-0"], learnt[f"{mode}-1"]
        parameters = [key for key in one if not key.endswith(gathered)]
        assert_same_contents({k: one[k] for k in parameters}, {k: other[k] for k in parameters})
        assert not torch.equal(one["stem.conv.hor_conv.weight"], start["stem.conv.hor_conv.weight"])
    for key, tensor in alone.state_dict().items():  # with frozen norms the mean over ranks is the mean over the batch
        assert relative(learnt["eval-0"][key], tensor) <= 1e-10


# Loose ends of networks


def test_a_second_reference_to_a_block_is_the_same_block_when_fused():
    net = nn.ModuleDict({"a": ConvNorm()})
    net["b"] = net["a"]
    made = surgeon.surgery.make.make(surgeon.recipes.recipe.load("acnet"), surgeon.analysis.sites.survey(Network(net)))
    fused = surgeon.fuse(surgeon.convert(net, made))
    assert fused["a"] is fused["b"]
    assert type(fused["a"].conv) is nn.Conv2d


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_what_holds_a_conv_go_on_working(hook: str):
    net, seen = own(), []
    getattr(net.stem, hook)(lambda module, *rest: seen.append(type(module)))
    converted = surgeon.convert(net, "acnet", SHAPE)
    fused = surgeon.fuse(converted)
    seen.clear()
    converted(noise())
    fused(noise())
    assert seen == [ConvNorm, ConvNorm]


def test_weights_are_found_by_whoever_walks_over_the_model():
    """Weight decay groups, initialisers and the like see plain torch modules."""
    converted = surgeon.convert(own(), "acnet", SHAPE)

    def kinds(modules: Iterable[nn.Module]) -> set[type[nn.Module]]:
        return {type(m) for m in modules if any(True for _ in m.parameters(recurse=False))}

    assert kinds(converted.modules()) == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}

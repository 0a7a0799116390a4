"""An ACBlock in training computes in one step of autograd what its parts give one by one, and no more than they do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import relative, shake_
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils import checkpoint

import surgeon
from surgeon.blocks import in_one_step
from surgeon.blocks.acblock import ACBlock, ACBlockOptions
from surgeon.one_pass import branches, where

EXACT = 1e-13
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (5, 3), "padding": (1, 0), "dilation": (1, 2), "groups": 2},
    {"kernel_size": 3, "padding": "same", "dilation": (2, 1)},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": (3, 5), "padding": (3, 4)},
]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
every_placement = pytest.mark.parametrize("placement", ["skeleton", "border"])
every_format = pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])


def block_of(
    placement: str = "skeleton", dtype: torch.dtype = torch.float64, *, affine: bool = True, **geometry: Any
) -> ACBlock:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, bias=False, **(geometry or GEOMETRIES[0]))
    options = ACBlockOptions.model_validate({"init": "scratch", "placement": placement})
    norm = nn.BatchNorm2d(6, affine=affine)
    block = ACBlock.from_conv(conv, options, norm=norm, generator=torch.Generator().manual_seed(1))
    if not affine:
        block.square_bn = nn.BatchNorm2d(6, affine=False)
    return shake_(block, seed=2).to(dtype).train()


def input_of(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (7, 8)) -> Tensor:
    return torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def norms_of(block: ACBlock) -> list[nn.BatchNorm2d]:
    return [block.square_bn, block.ver_bn, block.hor_bn]  # type: ignore[list-item]


def one_by_one(block: ACBlock, x: Tensor) -> Tensor:
    """Call the parts of a block whose strips do not see a shifted map."""
    y: Tensor = block.square_bn(block.square_conv(x))
    return y + block.ver_bn(block.ver_conv(x)) + block.hor_bn(block.hor_conv(x))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how often a block is computed in one step."""
    seen: list[int] = []
    own = branches.run
    monkeypatch.setattr(branches, "run", lambda *args: (seen.append(1), own(*args))[1])
    return seen


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Run something with blocks that go step by step."""

    def run(call: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(in_one_step, "fits", lambda parts: False)
            return call()

    return run


def trained(block: ACBlock, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers after one step of a copy."""
    block, x = copy.deepcopy(block), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = block(x)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype))
    grads = [p.grad for p in block.parameters()]
    return [y.detach(), *(g for g in (x.grad, *grads) if g is not None), *block.buffers()]


def check_same(found: list[Tensor], expected: list[Tensor], limit: float = EXACT) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if other.dtype == torch.int64:
            assert torch.equal(one, other)
        else:
            assert relative(one, other) <= limit


# --- the same numbers ------------------------------------------------------------------------------------------------


@every_geometry
@every_placement
@every_format
def test_output_gradients_and_statistics_are_those_of_the_parts(
    geometry: dict[str, Any], placement: str, memory_format: torch.memory_format, steps: list[int], plainly: Any
) -> None:
    block = block_of(placement, **geometry).to(memory_format=memory_format)
    x = input_of().contiguous(memory_format=memory_format)
    expected = plainly(lambda: trained(block, x))
    assert not steps
    check_same(trained(block, x), expected)
    assert steps


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_running_statistics_follow_as_torch_lets_them(momentum: float | None, steps: list[int], plainly: Any) -> None:
    block = block_of()
    for norm in norms_of(block):
        norm.momentum = momentum
    other = copy.deepcopy(block)
    for seed in range(3):
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        plainly(lambda x=x: other(x))
        block(x)
    assert len(steps) == 3
    check_same([*block.buffers()], [*other.buffers()])


def test_a_norm_without_scale_and_shift_gets_no_gradient_of_them(steps: list[int], plainly: Any) -> None:
    block = block_of(affine=False)
    check_same(trained(block, input_of()), plainly(lambda: trained(block, input_of())))
    assert steps


@pytest.mark.parametrize("frozen", ["square_conv.weight", "ver_bn.weight", "hor_bn.bias", "hor_conv", "square", ""])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_right(frozen: str, steps: list[int], plainly: Any) -> None:
    block = block_of()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    if frozen == "":  # everything but one scale
        block.hor_bn.weight.requires_grad_(True)  # type: ignore[union-attr]
    check_same(trained(block, input_of()), plainly(lambda: trained(block, input_of())))
    assert steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_as_near_to_float64_as_the_parts_are(
    dtype: torch.dtype, steps: list[int], plainly: Any
) -> None:
    block, x = block_of(dtype=dtype), input_of(dtype)
    exact = plainly(lambda: trained(copy.deepcopy(block).double(), x.double()))
    found, theirs = trained(block, x), plainly(lambda: trained(block, x))
    assert steps
    for one, other, right in zip(found, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        assert relative(one.double(), right) <= 2 * relative(other.double(), right) + torch.finfo(dtype).eps


def test_under_autocast_convs_are_computed_in_its_dtype(steps: list[int], plainly: Any) -> None:
    block, x = block_of(dtype=torch.float32), input_of(torch.float32)

    def cast() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return trained(block, x)  # the backward pass too, which must not cast once more

    found, theirs = cast(), plainly(cast)
    exact = plainly(lambda: trained(copy.deepcopy(block).double(), x.double()))
    assert steps
    assert found[0].dtype == torch.bfloat16
    for one, other, right in zip(found, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        assert relative(one.double(), right) <= 2 * relative(other.double(), right) + torch.finfo(torch.bfloat16).eps


def test_on_a_gpu_the_block_runs_the_kernels(monkeypatch: pytest.MonkeyPatch, steps: list[int], plainly: Any) -> None:
    pytest.importorskip("triton")
    from surgeon.one_pass import normed_sum_triton

    calls: list[int] = []
    own = normed_sum_triton.backward
    monkeypatch.setattr(normed_sum_triton, "backward", lambda *args: (calls.append(1), own(*args))[1])
    monkeypatch.setattr(where, "on_cpu", True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = block_of(dtype=torch.float32).to(device, memory_format=torch.channels_last)
    x = input_of(torch.float32).to(device).contiguous(memory_format=torch.channels_last)
    exact = plainly(lambda: trained(copy.deepcopy(block).double(), x.double()))
    found = trained(block, x)
    assert calls
    assert steps
    for one, right in zip(found, exact, strict=True):
        assert relative(one.double(), right) <= 5e-6


def test_every_gradient_is_the_slope() -> None:
    block = block_of(kernel_size=3, padding=1)
    names = [name for name, _ in block.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        made = torch.func.functional_call(copy.deepcopy(block), dict(zip(names, parameters, strict=True)), (x,))
        assert isinstance(made, Tensor)
        return made

    inputs = [input_of(size=(3, 2))[:2].requires_grad_(), *(p.detach().requires_grad_() for p in block.parameters())]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_gradients_of_gradients_are_those_of_the_parts(steps: list[int]) -> None:
    block, x = block_of(), input_of().requires_grad_()
    found = []
    for call in (block, lambda x: one_by_one(block, x)):
        (slope,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *block.parameters()], allow_unused=True))
    assert len(steps) == 1
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other.norm() < 1e-9 or relative(one, other) <= 1e-11


# --- what is kept ----------------------------------------------------------------------------------------------------


def bytes_kept(block: ACBlock, x: Tensor) -> int:
    """Count what a forward pass keeps for the backward pass besides what there was before it."""
    own = {t.untyped_storage().data_ptr() for t in (x, *block.parameters(), *block.buffers())}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_maps_that_are_not_kept_are_made_once_more(
    kept: int, monkeypatch: pytest.MonkeyPatch, steps: list[int], plainly: Any
) -> None:
    monkeypatch.setattr(branches, "KEPT", {"cpu": kept})
    block, x = block_of(), input_of(size=(32, 32))
    one_map = 3 * 6 * 32 * 32 * 8
    assert plainly(lambda: bytes_kept(block, x)) >= 3 * one_map
    assert kept <= bytes_kept(block, x) / one_map <= kept + 0.1
    check_same(trained(block, x), plainly(lambda: trained(block, x)))
    assert len(steps) == 2


def test_on_a_gpu_less_is_kept_than_by_the_parts() -> None:
    assert branches.KEPT["cuda"] < 3
    if torch.cuda.is_available():
        block, x = block_of(dtype=torch.float32).cuda(), input_of(torch.float32, size=(32, 32)).cuda()
        assert bytes_kept(block, x) <= 2.1 * 3 * 6 * 32 * 32 * 4


# --- who wants to see the parts --------------------------------------------------------------------------------------


def _hooked(block: ACBlock) -> None:
    block.ver_bn.register_forward_hook(lambda module, args, out: out * 2)


def _hooked_before(block: ACBlock) -> None:
    block.hor_conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _hooked_behind(block: ACBlock) -> None:
    block.square_conv.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))


def _patched(block: ACBlock) -> None:
    own = block.ver_conv.forward
    block.ver_conv.forward = lambda input: 2 * own(input)


def _parametrized(block: ACBlock) -> None:
    nn.utils.parametrizations.weight_norm(block.ver_conv)


def _pruned(block: ACBlock) -> None:
    prune.random_unstructured(block.square_conv, "weight", 0.5)


def _replaced(block: ACBlock) -> None:
    block.square_bn = nn.Sequential(block.square_bn, nn.Hardtanh())


def _of_another_class(block: ACBlock) -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    block.hor_bn = Own(6, dtype=torch.float64)


def _frozen(block: ACBlock) -> None:
    block.ver_bn.eval()


def _biased(block: ACBlock) -> None:
    block.ver_conv.bias = nn.Parameter(torch.ones(6, dtype=torch.float64))


def _untracked(block: ACBlock) -> None:
    block.hor_bn = nn.BatchNorm2d(6, track_running_stats=False, dtype=torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        *(_hooked, _hooked_before, _hooked_behind, _patched, _parametrized, _pruned, _replaced, _of_another_class),
        *(_frozen, _biased, _untracked),
    ],
)
def test_parts_that_are_not_ordinary_are_called_one_by_one(change: Callable[[ACBlock], None], steps: list[int]) -> None:
    block, x = block_of(), input_of().requires_grad_()
    change(block)
    y, expected = block(x), one_by_one(block, x)
    assert not steps
    assert relative(y.detach(), expected.detach()) <= EXACT
    (found,), (wanted,) = torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x)
    assert relative(found, wanted) <= EXACT


def test_a_hook_on_all_modules_sees_the_parts(steps: list[int]) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        block = block_of()
        block(input_of())
    finally:
        handle.remove()
    assert block.ver_bn in seen
    assert not steps


def test_a_synchronised_norm_is_called_as_it_is(steps: list[int]) -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(block_of()).eval()
    block.train()
    assert not in_one_step.fits([in_one_step.Part(input_of(), block.square_conv, block.square_bn)])


def test_without_gradients_or_in_eval_mode_nothing_is_kept(steps: list[int]) -> None:
    block, x = block_of(), input_of()
    with torch.no_grad():
        block(x)
    with torch.inference_mode():
        block(x)
    copy.deepcopy(block).eval()(x)
    copy.deepcopy(block).requires_grad_(False)(x)
    assert not steps


def test_torch_compile_sees_one_graph(steps: list[int]) -> None:
    block, x = block_of(), input_of().requires_grad_()
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), one_by_one(block, x)
    assert not steps
    assert relative(y.detach(), expected.detach()) <= EXACT
    (found,), (wanted,) = torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x)
    assert relative(found, wanted) <= EXACT


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_scripts_traces_and_graphs_hold_the_parts(steps: list[int]) -> None:
    block, x = block_of(), input_of()
    with torch.no_grad():
        expected = one_by_one(copy.deepcopy(block), x)
    for made in (
        torch.jit.script(copy.deepcopy(block)),
        torch.jit.trace(copy.deepcopy(block), x, check_trace=False),
        torch.fx.symbolic_trace(copy.deepcopy(block)),
    ):
        assert relative(made(x).detach(), expected) <= EXACT
    assert not steps


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch scripts its own
def test_transforms_of_functions_go_through(steps: list[int]) -> None:
    block, x = block_of(), input_of()
    buffers = {name: t.clone() for name, t in block.named_buffers()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        made = torch.func.functional_call(block, {**parameters, **buffers}, (x,))
        assert isinstance(made, Tensor)
        return made.sin().sum()

    found = torch.func.grad(loss)({name: p.detach() for name, p in block.named_parameters()}, buffers)
    assert not steps
    one_by_one(block, x).sin().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad) <= EXACT
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(block(dual)).tangent is not None
    assert not steps


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_checkpoints_give_the_same_gradients(is_reentrant: bool, steps: list[int]) -> None:
    block, x = block_of(), input_of().requires_grad_()
    checkpoint.checkpoint(block, x, use_reentrant=is_reentrant).sin().sum().backward()
    assert steps
    (expected,) = torch.autograd.grad(one_by_one(block, x).sin().sum(), x)
    assert x.grad is not None
    assert relative(x.grad, expected) <= EXACT


def test_one_number_in_a_channel_is_refused_as_torch_refuses_it() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block_of()(input_of(size=(1, 1))[:1])
    assert block_of()(input_of()[:0]).shape == (0, 6, 7, 8)


# --- from conversion to proof ----------------------------------------------------------------------------------------


def test_a_network_is_converted_trained_fused_and_proven(steps: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()
    )
    net.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))
    example = (2, 3, 12, 12)
    model = surgeon.convert(net, "acnet", example).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, labels = torch.randn(8, 3, 12, 12), torch.arange(8) % 2
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(steps) >= 16
    assert losses[-1] < losses[0]
    fused = surgeon.fuse(model.eval(), example)
    assert not any(isinstance(module, ACBlock) for module in fused.modules())
    assert surgeon.verify(model, fused, example).equivalent

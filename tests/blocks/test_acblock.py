"""ACBlock against the paper's equations, written out with F.conv2d and F.batch_norm."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import dataclass

import pytest
import torch
from helpers import relative, shake_
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.blocks.acblock import ACBlock, ACBlockOptions
from surgeon.conv.spec import ConvSpec

EXACT = 1e-12
INITS = ("takeover", "split", "scratch")
PLACEMENTS = ("skeleton", "border")

every_init = pytest.mark.parametrize("init", INITS)
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def conv_of(kernel: int | tuple[int, int] = 3, *, c_in: int = 4, c_out: int = 6, **options: object) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(c_in, c_out, kernel, dtype=torch.float64, **options)  # type: ignore[arg-type]


def norm_of(channels: int = 6, **options: object) -> nn.BatchNorm2d:
    return shake_(nn.BatchNorm2d(channels, dtype=torch.float64, **options), seed=1)  # type: ignore[arg-type]


def acblock(
    conv: nn.Conv2d,
    norm: nn.Module | None = None,
    *,
    init: str = "takeover",
    placement: str = "skeleton",
    gamma: float | None = None,
) -> ACBlock:
    options = ACBlockOptions.model_validate({"init": init, "placement": placement, "gamma": gamma})
    return ACBlock.from_conv(conv, options, norm=norm, generator=generator(7))  # type: ignore[arg-type]


def norms_of(block: ACBlock) -> list[nn.BatchNorm2d]:
    return [block.square_bn, block.ver_bn, block.hor_bn]  # type: ignore[list-item]


class Uncopyable:
    """Stands for a process group, which cannot be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("a connection to other processes has no copy")


def by_the_paper(block: ACBlock, conv: nn.Conv2d, x: Tensor, placement: str, *, training: bool = False) -> Tensor:
    """Sum the three branches; each strip is laid by hand into a kernel as large as the conv's."""
    kh, kw = conv.kernel_size
    row, column = (kh // 2, kw // 2) if placement == "skeleton" else (kh - 1, kw - 1)
    dh, dw = conv.dilation
    ph, pw = (dh * (kh - 1) // 2, dw * (kw - 1) // 2) if conv.padding == "same" else conv.padding
    x = F.pad(x, (pw, pw, ph, ph), mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    vertical, horizontal = torch.zeros_like(conv.weight), torch.zeros_like(conv.weight)
    vertical[:, :, :, column] = block.ver_conv.weight[:, :, :, 0]
    horizontal[:, :, row, :] = block.hor_conv.weight[:, :, 0, :]
    y = torch.zeros(())
    for kernel, bias, norm in (
        (block.square_conv.weight, block.square_conv.bias, block.square_bn),
        (vertical, block.ver_conv.bias, block.ver_bn),
        (horizontal, block.hor_conv.bias, block.hor_bn),
    ):
        z = F.conv2d(x, kernel, bias, conv.stride, 0, conv.dilation, conv.groups)
        mean, var = (None, None) if training else (norm.running_mean, norm.running_var)
        y = y + F.batch_norm(z, mean, var, norm.weight, norm.bias, training=training, eps=norm.eps)
    return y


# --- every geometry ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int] | str
    padding_mode: str
    groups: int
    per_group: tuple[int, int]
    bias: bool
    norm: str  # none, affine, plain
    placement: str
    init: str
    spare: tuple[int, int]  # rows and columns more than the geometry needs
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """The smallest map that the conv accepts, and something."""
        sides = []
        for k, d, p, spare in zip(
            self.kernel,
            self.dilation,
            (None, None) if isinstance(self.padding, str) else self.padding,
            self.spare,
            strict=True,
        ):
            pad = d * (k - 1) // 2 if p is None else p
            mode_needs = {"reflect": pad + 1, "circular": max(pad, 1)}.get(self.padding_mode, 1)
            sides.append(max(d * (k - 1) + 1 - 2 * pad, mode_needs) + spare)
        return (sides[0], sides[1])

    def conv(self) -> nn.Conv2d:
        c_in, c_out = (channels * self.groups for channels in self.per_group)
        return conv_of(
            self.kernel,
            c_in=c_in,
            c_out=c_out,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.padding_mode,
        )


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    padding = draw(st.one_of(st.just("same"), pairs(0, 6), pairs(0, 6), pairs(0, 6)))
    return Case(
        kernel=draw(st.tuples(st.sampled_from([3, 5, 7]), st.sampled_from([3, 5, 7]))),
        stride=(1, 1) if padding == "same" else draw(pairs(1, 3)),
        dilation=draw(pairs(1, 3)),
        padding=padding,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        groups=draw(st.integers(1, 3)),
        per_group=draw(pairs(1, 3)),
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["none", "affine", "plain"])),
        placement=draw(st.sampled_from(PLACEMENTS)),
        init=draw(st.sampled_from(INITS)),
        spare=draw(pairs(0, 4)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=800, deadline=None, derandomize=True)
@given(cases())
def test_in_every_geometry_block_fold_and_paper_agree(case: Case) -> None:
    conv = case.conv().eval()
    norm = None if case.norm == "none" else norm_of(conv.out_channels, affine=case.norm == "affine").eval()
    x = randn(2, conv.in_channels, *case.size, seed=case.seed)
    before = conv(x) if norm is None else norm(conv(x))
    assert ACBlock.refusal(ConvSpec.of(conv), case.size, ACBlockOptions()) is None

    block = acblock(conv, norm, init=case.init, placement=case.placement)
    y = block(x)
    assert y.shape == before.shape
    assert relative(y, by_the_paper(block, conv, x, case.placement)) <= EXACT
    if case.init != "scratch":
        assert relative(y, before) <= EXACT

    y = shake_(block, seed=case.seed)(x)
    assert relative(y, by_the_paper(block, conv, x, case.placement)) <= EXACT
    assert relative(block.fold()(x), y) <= EXACT


@pytest.mark.parametrize("kernel", list(itertools.product(range(1, 8), repeat=2)), ids=str)
def test_exactly_even_and_one_wide_kernels_are_refused_with_a_sentence(kernel: tuple[int, int]) -> None:
    refusal = ACBlock.refusal(ConvSpec(4, 6, kernel), None, ACBlockOptions())
    if 1 in kernel or any(k % 2 == 0 for k in kernel):
        assert isinstance(refusal, str)
        assert f"{kernel[0]}x{kernel[1]} kernel" in refusal or f"kernel {kernel[0]}x{kernel[1]}" in refusal
        assert len(refusal.split()) >= 4
    else:
        assert refusal is None


def test_one_tap_that_is_a_millionth_off_is_caught_wherever_it_is() -> None:
    conv = conv_of((5, 3), padding=(1, 2), groups=2)
    block, x = shake_(acblock(conv, norm_of())).eval(), randn(2, 4, 9, 8)
    y, folded = by_the_paper(block, conv, x, "skeleton"), block.fold()
    for i in range(folded.weight.numel()):
        wrong = copy.deepcopy(folded)
        with torch.no_grad():
            wrong.weight.view(-1)[i] += 1e-6
        assert relative(wrong(x), y) > 1e3 * EXACT


@every_placement
@with_and_without_bias
def test_in_train_mode_too_each_branch_is_normed_by_itself(placement: str, bias: bool) -> None:
    conv = conv_of((3, 5), stride=(2, 1), padding=(0, 3), bias=bias)
    block, x = shake_(acblock(conv, norm_of(), init="split", placement=placement)).train(), randn(3, 4, 9, 8)
    assert relative(block(x), by_the_paper(block, conv, x, placement, training=True)) <= EXACT


@every_placement
def test_the_fold_is_equation_by_equation_that_of_the_paper(placement: str) -> None:
    block = shake_(acblock(conv_of((5, 3), groups=2), norm_of(), init="scratch", placement=placement))
    row, column = (2, 1) if placement == "skeleton" else (4, 2)
    kernel, bias = torch.zeros(6, 2, 5, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        for out in range(6):
            scale = [n.weight[out] / (n.running_var[out] + n.eps).sqrt() for n in norms_of(block)]
            bias[out] = sum(n.bias[out] - n.running_mean[out] * s for n, s in zip(norms_of(block), scale, strict=True))
            for c, r, k in itertools.product(range(2), range(5), range(3)):
                kernel[out, c, r, k] = scale[0] * block.square_conv.weight[out, c, r, k]
                if k == column:
                    kernel[out, c, r, k] += scale[1] * block.ver_conv.weight[out, c, r, 0]
                if r == row:
                    kernel[out, c, r, k] += scale[2] * block.hor_conv.weight[out, c, 0, k]
    folded = block.fold()
    assert relative(folded.weight, kernel) <= 1e-15
    assert relative(folded.bias, bias) <= 1e-15


def test_border_strips_lie_on_the_last_row_and_the_last_column() -> None:
    block = shake_(acblock(conv_of(3), norm_of(), init="scratch", placement="border"))
    with torch.no_grad():
        block.square_conv.weight.zero_()
    taps = (block.fold().weight != 0).all(1).all(0)
    assert taps.tolist() == [[False, False, True], [False, False, True], [True, True, True]]


# --- how it starts ----------------------------------------------------------------------------------------------------


@every_placement
@with_and_without_bias
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_takeover_trains_as_the_original_does(placement: str, bias: bool, padding_mode: str) -> None:
    conv, norm = conv_of(padding=1, bias=bias, padding_mode=padding_mode), norm_of()
    twin_conv, twin_norm = copy.deepcopy(conv), copy.deepcopy(norm)
    block, x, direction = acblock(conv, norm, placement=placement), randn(3, 4, 9, 8), randn(3, 6, 9, 8, seed=1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = block(ours), twin_norm(twin_conv(theirs))
    assert relative(y, expected) <= EXACT
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    assert relative(ours.grad, theirs.grad) <= 1e-9
    for mine, original in (
        (conv.weight, twin_conv.weight),
        (norm.weight, twin_norm.weight),
        (norm.bias, twin_norm.bias),
    ):
        assert any(mine is p for p in block.parameters())
        assert relative(mine.grad, original.grad) <= 1e-9
    offset = 0 if twin_conv.bias is None else twin_conv.bias
    assert relative(block.square_bn.running_mean + offset, twin_norm.running_mean) <= EXACT
    assert relative(block.square_bn.running_var, twin_norm.running_var) <= EXACT
    assert relative(block.eval()(x), twin_norm.eval()(twin_conv(x))) <= EXACT  # after a step of the statistics, too


def test_takeover_starts_the_strips_at_random_behind_a_gamma_of_zero() -> None:
    block = acblock(conv_of(), norm_of())
    assert all(conv.weight.count_nonzero() == conv.weight.numel() for conv in (block.ver_conv, block.hor_conv))
    assert all(norm.weight.count_nonzero() == 0 for norm in (block.ver_bn, block.hor_bn))
    (block.train()(randn(3, 4, 9, 8)) * randn(3, 6, 7, 6, seed=1)).sum().backward()
    assert all(norm.weight.grad.count_nonzero() == 6 for norm in (block.ver_bn, block.hor_bn))  # and they leave it


@pytest.mark.parametrize("init", ["takeover", "split"])
def test_the_bias_of_the_conv_goes_into_the_running_mean(init: str) -> None:
    conv, norm = conv_of(bias=True), norm_of()
    block = acblock(conv, norm, init=init)
    assert block.square_conv.bias is None
    assert relative(block.square_bn.running_mean, norm.running_mean - conv.bias) <= EXACT


@pytest.mark.parametrize("init", ["takeover", "split"])
@with_and_without_bias
def test_without_a_norm_the_bias_is_that_of_the_square_norm(init: str, bias: bool) -> None:
    conv = conv_of(bias=bias)
    block, x = acblock(conv, init=init).eval(), randn(2, 4, 9, 8)
    assert (block.square_bn.bias is conv.bias) == bias
    assert relative(block(x), conv(x)) <= EXACT


@pytest.mark.parametrize("padding", [1, (0, 2)])
@every_placement
@pytest.mark.parametrize("has_norm", [True, False])
def test_split_gives_every_parameter_a_gradient_at_the_first_step(
    padding: int | tuple[int, int], placement: str, has_norm: bool
) -> None:
    block = acblock(conv_of(padding=padding), norm_of() if has_norm else None, init="split", placement=placement)
    y = block.train()(randn(3, 4, 9, 8))
    (y * torch.randn_like(y)).sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad.abs().min() < 1e-9] == []


def test_split_draws_strips_as_large_as_the_taps_of_the_conv() -> None:
    conv = conv_of(c_in=32, c_out=32)
    block = acblock(conv, init="split")
    size = conv.weight.detach().square().mean().sqrt()
    for strip in (block.ver_conv, block.hor_conv):
        assert float(strip.weight.detach().square().mean().sqrt()) == pytest.approx(float(size), rel=0.1)


@pytest.mark.parametrize(("gamma", "expected"), [(None, 1), (1 / 3, 1 / 3), (2, 2)])
@pytest.mark.parametrize("has_norm", [True, False])
def test_scratch_is_the_random_start_of_the_paper(gamma: float | None, expected: float, has_norm: bool) -> None:
    conv = conv_of(c_in=32, c_out=32)
    block = acblock(conv, norm_of(32) if has_norm else None, init="scratch", gamma=gamma)
    for norm in norms_of(block):
        assert (norm.weight == expected).all()
        assert (norm.bias == 0).all()
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()
    for branch in (block.square_conv, block.ver_conv, block.hor_conv):  # uniform, as nn.Conv2d starts its own
        bound = branch.weight[0].numel() ** -0.5
        assert 0.99 * bound < branch.weight.abs().max() <= bound
        assert float(branch.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert all(p is not q for p in block.parameters() for q in conv.parameters())


@every_init
def test_another_seed_gives_other_strips(init: str) -> None:
    options = ACBlockOptions.model_validate({"init": init})
    one, two = (ACBlock.from_conv(conv_of(), options, norm=None, generator=generator(seed)) for seed in (0, 1))
    assert not torch.equal(one.ver_conv.weight, two.ver_conv.weight)
    assert not torch.equal(one.hor_conv.weight, two.hor_conv.weight)


@every_init
def test_strips_are_drawn_in_float64(init: str) -> None:
    weight = acblock(conv_of(), init=init).ver_conv.weight
    assert not torch.equal(weight, weight.float().double())


@every_init
def test_strips_follow_a_frozen_conv_and_the_norm_keeps_its_own_flags(init: str) -> None:
    conv, norm = conv_of().requires_grad_(False), norm_of().eval()
    block = acblock(conv.train(), norm, init=init)
    trained = {name for name, p in block.named_parameters() if p.requires_grad}
    assert trained == (set() if init == "scratch" else {"square_bn.weight", "square_bn.bias"})
    assert [n.training for n in norms_of(block)] == [False, False, False]
    assert block.training
    assert block.square_conv.training


# --- norms of all kinds -----------------------------------------------------------------------------------------------


@every_init
@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"bias": False}, {"eps": 0.3}, {"momentum": None}, {"momentum": 0.01, "eps": 1e-3}],
    ids=str,
)
def test_any_norm_is_taken_over_and_folded(init: str, options: dict[str, object]) -> None:
    others = {name: value for name, value in options.items() if name != "bias"}  # torch 2.11 knows no bias=False
    conv, norm, x = conv_of(padding=1).eval(), norm_of(**others).eval(), randn(2, 4, 9, 8)
    if "bias" in options:
        norm.bias = None
    block = acblock(conv, norm, init=init)
    assert {(n.eps, n.momentum) for n in norms_of(block)} == {(norm.eps, norm.momentum)}
    if init != "scratch":
        assert relative(block(x), norm(conv(x))) <= EXACT
        assert block.square_bn.affine == norm.affine
    block.train()(randn(4, 4, 9, 8, seed=1))  # statistics move, whatever the momentum
    shake_(block.eval(), seed=2)
    assert relative(block(x), by_the_paper(block, conv, x, "skeleton")) <= EXACT
    assert relative(block.fold()(x), block(x)) <= EXACT


def test_each_norm_folds_with_its_own_eps() -> None:
    conv, x = conv_of(), randn(2, 4, 9, 8)
    block = shake_(acblock(conv, norm_of())).eval()
    for norm, eps in zip(norms_of(block), (0.1, 0.5, 2.0), strict=True):
        norm.eps = eps
    assert relative(block.fold()(x), by_the_paper(block, conv, x, "skeleton")) <= EXACT


@every_init
def test_a_synchronised_norm_can_be_taken_over_and_folded(init: str) -> None:
    conv, norm, x = conv_of().eval(), nn.SyncBatchNorm(6, dtype=torch.float64), randn(2, 4, 9, 8)
    shake_(norm).eval()
    block = acblock(conv, norm, init=init)
    assert {type(n) for n in norms_of(block)} == {nn.SyncBatchNorm}
    shake_(block, seed=2)
    assert relative(block.fold()(x), by_the_paper(block, conv, x, "skeleton")) <= EXACT


@every_init
def test_all_branches_synchronise_within_the_group_of_the_norm(init: str) -> None:
    norm = nn.SyncBatchNorm(6, dtype=torch.float64)
    norm.process_group = group = Uncopyable()
    assert all(n.process_group is group for n in norms_of(acblock(conv_of(), norm, init=init)))


def test_a_block_whose_norms_were_synchronised_later_still_folds() -> None:
    conv, x = conv_of(), randn(2, 4, 9, 8)
    block = nn.SyncBatchNorm.convert_sync_batchnorm(shake_(acblock(conv, norm_of())).eval())
    assert {type(n) for n in norms_of(block)} == {nn.SyncBatchNorm}
    assert relative(block.fold()(x), by_the_paper(block, conv, x, "skeleton")) <= EXACT
    assert relative(block.fold()(x), block(x)) <= EXACT


def test_branches_that_were_given_a_bias_fold_right() -> None:
    conv, x = conv_of(padding=2, dilation=2), randn(2, 4, 9, 8)
    block = shake_(acblock(conv, norm_of(), init="split")).eval()
    for i, branch in enumerate((block.square_conv, block.ver_conv, block.hor_conv)):
        branch.bias = nn.Parameter(randn(6, seed=i))
    assert relative(block(x), by_the_paper(block, conv, x, "skeleton")) <= EXACT
    assert relative(block.fold()(x), block(x)) <= EXACT


# --- what others rely on ----------------------------------------------------------------------------------------------


def test_a_published_state_dict_loads_and_folds() -> None:
    shapes = {"square_conv.weight": (6, 4, 3, 3), "ver_conv.weight": (6, 4, 3, 1), "hor_conv.weight": (6, 4, 1, 3)}
    published = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for i, branch in enumerate(("square_bn", "ver_bn", "hor_bn")):
        published |= {f"{branch}.{key}": randn(6, seed=10 + 3 * i) for key in ("weight", "bias", "running_mean")}
        published[f"{branch}.running_var"] = randn(6, seed=20 + i).abs() + 0.2
        published[f"{branch}.num_batches_tracked"] = torch.tensor(5)
    conv, x = conv_of(padding=1, bias=False), randn(2, 4, 9, 8)
    block = acblock(conv, init="scratch").eval()
    block.load_state_dict(published)
    assert relative(block.fold()(x), by_the_paper(block, conv, x, "skeleton")) <= EXACT


def test_parameter_counts_of_64_to_64() -> None:
    conv = conv_of(c_in=64, c_out=64, bias=False)
    block = acblock(conv, init="scratch")
    assert sum(p.numel() for p in conv.parameters()) == 36_864
    assert sum(p.numel() for p in block.parameters()) == 61_824  # 9·64² + 2·3·64² + 3·2·64
    assert sum(p.numel() for p in block.fold().parameters()) == 36_928  # the 64 biases of the norms


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pickled_block_trains_and_folds(memory_format: torch.memory_format) -> None:
    block = shake_(acblock(conv_of((5, 3)).to(memory_format=memory_format), norm_of(), placement="border"))
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    loaded, x = torch.load(file, weights_only=False), randn(2, 4, 9, 8)
    loaded.train()(x).sum().backward()
    assert relative(loaded.eval().fold()(x), loaded(x)) <= EXACT
    assert not torch.equal(loaded.square_bn.running_mean, block.square_bn.running_mean)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"gama": 1}, "gama"),
        ({"init": "take over"}, "init"),
        ({"placement": "middle"}, "placement"),
        ({"init": "scratch", "gamma": 0}, "gamma"),
        ({"init": "scratch", "gamma": -1}, "gamma"),
        ({"init": "scratch", "gamma": float("nan")}, "gamma"),
        ({"init": "scratch", "gamma": float("inf")}, "gamma"),
        ({"init": "takeover", "gamma": 1}, "gamma"),
        ({"init": "split", "gamma": 1}, "gamma"),
        ({"gamma": 1}, "gamma"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, object], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        ACBlockOptions.model_validate(options)


def test_options_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ACBlockOptions().init = "split"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("init", "norm_obstacle", "said"),
    [
        ("takeover", None, None),
        ("takeover", "no norm follows", "same function in eval mode only: no norm follows"),
        ("split", None, "eval mode only"),
        ("scratch", None, "lost"),
        ("scratch", "no norm follows", "lost"),
    ],
)
def test_the_plan_is_told_what_a_start_does_not_keep(init: str, norm_obstacle: str | None, said: str | None) -> None:
    options = ACBlockOptions.model_validate({"init": init})
    note = ACBlock.note(options, norm_obstacle)
    assert note is None if said is None else said in str(note)
    assert ACBlock.keeps_function(options) == (init != "scratch")

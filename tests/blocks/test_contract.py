"""The contract that every block keeps, on every trial that it gives of itself.

A block that is added to `surgeon/blocks` is tested here without a word being added.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import timm.utils
import torch
from helpers import relative, shake_
from torch import Tensor, nn

from surgeon.blocks import Block, Deployable, Foldable, Trial, contract, registry
from surgeon.blocks.base import PLAIN

EXACT = 1e-12
GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

CASES = [(block, trial) for block in registry().values() for trial in block.trials()]


def name_of(case: object) -> str:
    if isinstance(case, type):
        return case.name
    assert isinstance(case, Trial)
    chosen = [f"{key}={value}" for key, value in case.options.model_dump(exclude_defaults=True).items()]
    words = [str(case.spec).replace("→", "-"), *chosen, *(["norm"] if case.with_norm else [])]  # pytest wants ASCII
    return " ".join(words).replace(", ", " ")


every_trial = pytest.mark.parametrize(("kind", "trial"), CASES, ids=name_of)
every_foldable = pytest.mark.parametrize(
    ("kind", "trial"), [case for case in CASES if issubclass(case[0], Foldable)], ids=name_of
)

Original = tuple[nn.Conv2d, nn.BatchNorm2d | None]


def original(trial: Trial, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Original:
    """Make the conv of a trial, and its shaken norm if it has one."""
    spec = trial.spec
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(
            spec.c_in,
            spec.c_out,
            spec.kernel,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            groups=spec.groups,
            bias=spec.bias,
            padding_mode=spec.padding_mode,
            dtype=dtype,
        )
    norm = shake_(nn.BatchNorm2d(spec.c_out, dtype=dtype), seed=1) if trial.with_norm else None
    return conv.to(device), None if norm is None else norm.to(device)


def replaced(kind: type[Block], trial: Trial, made: Original, seed: int = 0) -> Block:
    conv, norm = made
    return kind.from_conv(conv, trial.options, norm=norm, generator=torch.Generator().manual_seed(seed))


def input_of(trial: Trial, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    shape = (2, trial.spec.c_in, *trial.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device, dtype)


def run(made: Original, x: Tensor) -> Tensor:
    conv, norm = made
    return conv(x) if norm is None else norm(conv(x))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def is_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def floats(module: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in module.state_dict().values() if tensor.is_floating_point())


def modules_of(made: Original) -> nn.ModuleList:
    return nn.ModuleList(module for module in made if module is not None)


def test_there_are_blocks_with_examples() -> None:
    assert {kind for kind, _ in CASES} == set(registry().values())
    assert "acblock" in registry()


@every_trial
def test_an_example_is_one_that_the_block_accepts(kind: type[Block], trial: Trial) -> None:
    assert isinstance(trial.options, kind.Options)
    assert kind.refusal(trial.spec, trial.size, trial.options) is None
    assert kind.refusal(trial.spec, None, trial.options) is None


@every_trial
@pytest.mark.parametrize("training", [True, False])
def test_it_gives_the_shape_of_the_conv_and_finite_gradients(kind: type[Block], trial: Trial, training: bool) -> None:
    made, x = original(trial), input_of(trial)
    block = replaced(kind, trial, made).train(training)
    y = block(x)
    assert y.shape == run(made, x).shape
    assert y.isfinite().all()
    (y * torch.randn_like(y)).sum().backward()
    trained = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()] == []


@every_trial
def test_what_is_read_off_the_conv_can_be_read_off_the_block(kind: type[Block], trial: Trial) -> None:
    conv, norm = original(trial)
    block, x = replaced(kind, trial, (conv, norm)).eval(), input_of(trial)
    assert {name: getattr(block, name) for name in GEOMETRY} == {name: getattr(conv, name) for name in GEOMETRY}
    assert torch.equal(block(input=x), block(x))  # as conv(input=x)


@every_trial
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_device_carry_over(kind: type[Block], trial: Trial, dtype: torch.dtype, device: str) -> None:
    made = original(trial, dtype, device)
    block = replaced(kind, trial, made)
    assert {(tensor.dtype, tensor.device.type) for tensor in floats(block)} == {(dtype, device)}
    for training in (True, False):
        y = block.train(training)(input_of(trial, dtype, device))
        assert (y.dtype, y.device.type) == (dtype, device)
        assert y.shape == run(made, input_of(trial, dtype, device)).shape
    if isinstance(block, Foldable):
        folded = block.fold()
        assert {(tensor.dtype, tensor.device.type) for tensor in floats(folded)} == {(dtype, device)}


@every_trial
def test_memory_format_carries_over(kind: type[Block], trial: Trial) -> None:
    conv, norm = original(trial)
    block = replaced(kind, trial, (conv.to(memory_format=torch.channels_last), norm))
    weights = [p for p in block.parameters() if p.dim() == 4]
    if isinstance(block, Foldable):
        weights.append(block.fold().weight)
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    plain = replaced(kind, trial, original(trial))
    assert all(weight.is_contiguous() for weight in plain.parameters())
    x = input_of(trial)
    assert relative(block.eval()(x.to(memory_format=torch.channels_last)), plain.eval()(x)) <= EXACT


@every_trial
@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_carries_over(kind: type[Block], trial: Trial, training: bool) -> None:
    made = original(trial)
    modules_of(made).train(training)
    block = replaced(kind, trial, made)
    assert {module.training for module in block.modules()} == {training}
    if isinstance(block, Foldable):
        assert block.fold().training == training


@every_trial
@pytest.mark.parametrize("trained", [True, False])
def test_requires_grad_carries_over(kind: type[Block], trial: Trial, trained: bool) -> None:
    made = original(trial)
    modules_of(made).requires_grad_(trained)
    block = replaced(kind, trial, made)
    assert {p.requires_grad for p in block.parameters()} == {trained}
    if isinstance(block, Foldable):
        assert {p.requires_grad for p in block.fold().parameters()} == {trained}


@every_trial
def test_what_is_handed_in_is_not_changed(kind: type[Block], trial: Trial) -> None:
    made = original(trial)
    given = modules_of(made)
    before, flags = state(given), [(m.training, [p.requires_grad for p in m.parameters()]) for m in given]
    y = run(made, input_of(trial)).detach()
    given.load_state_dict(before)  # the run above has moved the norm's statistics
    replaced(kind, trial, made)
    assert is_same(state(given), before)
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in given] == flags
    assert torch.equal(run(made, input_of(trial)), y)


@every_trial
def test_running_the_block_leaves_the_norm_that_was_handed_in(kind: type[Block], trial: Trial) -> None:
    made = original(trial)
    before = state(modules_of(made))
    replaced(kind, trial, made).train()(input_of(trial))
    assert is_same(state(modules_of(made)), before)


@every_trial
def test_the_function_is_kept_or_it_is_not_as_the_block_says(kind: type[Block], trial: Trial) -> None:
    made, x = original(trial), input_of(trial)
    modules_of(made).eval()
    apart = relative(replaced(kind, trial, made)(x), run(made, x))
    if kind.keeps_function(trial.options):
        assert apart <= EXACT
    else:
        assert apart > 1e-3


@every_trial
def test_it_is_kept_in_train_mode_or_not_as_the_block_says(kind: type[Block], trial: Trial) -> None:
    """With the norm behind it, which normalises anew; of a conv alone, what the block computes."""
    made, x = original(trial), input_of(trial)
    expected = run(copy.deepcopy(made), x)
    apart = relative(replaced(kind, trial, made).train()(x), expected)
    if kind.keeps_training(trial.options, with_norm=trial.with_norm and kind.takes_norm(trial.options)):
        assert apart <= EXACT
    else:
        assert apart > 1e-6


@every_trial
def test_random_numbers_come_from_the_generator_alone(kind: type[Block], trial: Trial) -> None:
    torch.manual_seed(1)
    one = replaced(kind, trial, original(trial))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = replaced(kind, trial, original(trial))
    assert torch.equal(torch.get_rng_state(), before)
    assert is_same(state(one), state(two))


@every_trial
def test_float32_gets_the_numbers_of_float64_rounded_once(kind: type[Block], trial: Trial) -> None:
    made = original(trial, torch.float32)
    wide = copy.deepcopy(modules_of(made)).double()
    narrow_block = replaced(kind, trial, made)
    wide_block = replaced(kind, trial, (wide[0], wide[1] if trial.with_norm else None))
    assert is_same(state(narrow_block), state(wide_block.float()))


@every_trial
def test_copies_pickles_and_state_dicts_are_the_same_block(kind: type[Block], trial: Trial) -> None:
    block, x = shake_(replaced(kind, trial, original(trial))).eval(), input_of(trial)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    other = shake_(replaced(kind, trial, original(trial), seed=5), seed=5).eval()
    other.load_state_dict(copy.deepcopy(block.state_dict()))
    for twin in (copy.deepcopy(block), torch.load(file, weights_only=False), other):
        assert type(twin) is type(block)
        assert repr(twin) == repr(block)
        assert is_same(state(twin), state(block))
        assert torch.equal(twin(x), block(x))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not is_same(state(twin), state(block))  # nothing is shared


def foldable(kind: type[Block], trial: Trial, **how: torch.dtype) -> Foldable:
    """Make a block, every norm of it shaken after it was built: what training would leave behind."""
    block = shake_(replaced(kind, trial, original(trial, **how)), seed=3).eval()
    assert isinstance(block, Foldable)
    return block


@pytest.mark.parametrize(("kind", "trial"), [case for case in CASES if issubclass(case[0], Deployable)], ids=name_of)
def test_every_form_in_which_it_can_be_deployed_computes_the_same(kind: type[Block], trial: Trial) -> None:
    block, x = shake_(replaced(kind, trial, original(trial)), seed=3).eval(), input_of(trial)
    assert isinstance(block, Deployable)
    if block.undeployable() is not None:
        return
    forms = block.forms()
    assert PLAIN in forms
    before, expected = state(block), block(x)
    for name, make in forms.items():
        form = make()
        assert not form.training
        assert relative(form(x), expected) <= EXACT, name
        with torch.no_grad():
            next(form.parameters()).add_(1e-6)
        assert relative(form(x), expected) > 1e2 * EXACT, name
    assert is_same(state(block), before)  # none of them shares a tensor with it


@every_foldable
def test_it_folds_to_one_conv_and_a_wrong_tap_would_show(kind: type[Block], trial: Trial) -> None:
    block, x = foldable(kind, trial), input_of(trial)
    folded = block.fold()
    assert relative(folded(x), block(x)) <= EXACT
    with torch.no_grad():
        folded.weight[-1, -1, 0, 0] += 1e-6
    assert relative(folded(x), block(x)) > 1e3 * EXACT


@every_foldable
def test_the_folded_conv_has_the_geometry_of_the_original(kind: type[Block], trial: Trial) -> None:
    conv, _ = original(trial)
    folded = foldable(kind, trial).fold()
    assert type(folded) is nn.Conv2d
    assert folded.weight.shape == conv.weight.shape
    assert folded.bias is not None or conv.bias is None  # a norm that is folded in leaves a bias
    assert {name: getattr(folded, name) for name in GEOMETRY} == {name: getattr(conv, name) for name in GEOMETRY}
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in folded.parameters())


@every_foldable
def test_folding_leaves_the_block_as_it_was(kind: type[Block], trial: Trial) -> None:
    block = foldable(kind, trial)
    before, shown = state(block), repr(block)
    folded = block.fold()
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()  # it shares nothing with the block either
    assert is_same(state(block), before)
    assert repr(block) == shown
    assert all(p.grad is None and p.requires_grad for p in block.parameters())


@every_foldable
def test_folding_while_training_gives_the_conv_of_eval_mode(kind: type[Block], trial: Trial) -> None:
    block = foldable(kind, trial)
    expected = state(block.fold())
    assert is_same(state(block.train().fold()), expected)
    assert {module.training for module in block.modules()} == {True}


@every_foldable
def test_a_float32_fold_is_the_float64_fold_rounded_once(kind: type[Block], trial: Trial) -> None:
    block = foldable(kind, trial, dtype=torch.float32)
    assert is_same(state(block.fold()), state(copy.deepcopy(block).double().fold().float()))


@every_foldable
def test_timm_folds_it_too(kind: type[Block], trial: Trial) -> None:
    model = nn.Sequential(nn.Sequential(foldable(kind, trial)), nn.ReLU()).eval()
    deployed = timm.utils.reparameterize_model(model)
    assert type(deployed[0][0]) is nn.Conv2d
    x = input_of(trial)
    assert relative(deployed(x), model(x)) <= EXACT
    assert isinstance(model[0][0], kind)


@every_foldable
def test_a_block_that_gives_a_norm_back_computes_the_same(kind: type[Block], trial: Trial) -> None:
    """In float64, with all norms shaken; a tap or a mean that is a millionth off would be seen."""
    block, x = shake_(replaced(kind, trial, original(trial)), seed=3).eval(), input_of(trial)
    assert isinstance(block, Foldable)
    before, made = state(block), block.fold_keeping_norm()
    assert (made is not None) is type(block).gives_norm_back
    if made is None:
        return
    conv, norm = made
    assert conv.bias is None
    assert relative(norm(conv(x)), block(x)) < EXACT
    assert is_same(before, state(block))
    assert not {id(one) for one in norm.parameters()} & {id(one) for one in block.parameters()}
    conv.weight.data.view(-1)[0] += 1e-6
    assert relative(norm(conv(x)), block(x)) > EXACT


@every_trial
def test_its_branches_add_up_to_the_kernel_that_it_computes_with(kind: type[Block], trial: Trial) -> None:
    block = shake_(replaced(kind, trial, original(trial)))
    branches = contract.branch_kernels(block)
    if isinstance(block, Foldable) and branches:
        assert relative(sum(one.kernel for one in branches), block.fold().weight) < EXACT
    elif branches:
        assert torch.equal(sum(one.kernel for one in branches), block.weight)
    assert len({one.name for one in branches}) == len(branches)
    for one in branches:
        assert (one.kernel.dtype, one.kernel.requires_grad) == (torch.float64, False)


@every_trial
def test_drawn_anew_it_has_other_numbers_of_the_usual_size_and_new_norms(kind: type[Block], trial: Trial) -> None:
    block = shake_(replaced(kind, trial, original(trial)))
    shapes, kept = {name: t.shape for name, t in block.state_dict().items()}, state(block)
    contract.draw_anew_(block, torch.Generator().manual_seed(7))
    once = state(block)
    assert {name: t.shape for name, t in block.state_dict().items()} == shapes
    drawn = [name for name, own in block.named_parameters() if own.dim() > 1 and own.any() and name != "scale"]
    assert drawn
    assert not any(torch.equal(kept[name], once[name]) for name in drawn)  # scales start at fixed numbers
    assert all(once[name].abs().max() <= 3 for name in drawn)
    for name, tensor in once.items():
        if name.endswith("running_mean"):
            assert not tensor.any()
        if name.endswith("running_var"):
            assert (tensor == 1).all()
    contract.draw_anew_(block, torch.Generator().manual_seed(7))
    assert is_same(state(block), once)

"""verify, fault by fault: what may not pass and what may not be condemned, where the outputs alone would not tell."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import shake_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import surgeon

SHAPE = (2, 3, 12, 12)
HALVES = (torch.bfloat16, torch.float16)


def _unit(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


def _net(*tail: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return shake_(nn.Sequential(*_unit(3, 8), *_unit(8, 8), *tail), seed, gently=True).eval()


def _pooled() -> nn.Sequential:
    return _net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _folded(net: nn.Sequential, at: int) -> nn.Sequential:
    """Fold one norm as torch does it, in the network's dtype."""
    made = copy.deepcopy(net)
    made[at], made[at + 1] = fuse_conv_bn_eval(made[at], made[at + 1]), nn.Identity()
    return made


class _LogAndHead(nn.Module):
    """log(3y / 3 − y), which is NaN or −Inf as rounding has it, beside an ordinary head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.c(x)
        return torch.log((y * 3) / 3 - y), self.d(y)


def test_an_output_without_a_limit_excuses_no_other() -> None:
    a = _LogAndHead().eval()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.d.weight *= 2
        b.c.weight.copy_(torch.nextafter(b.c.weight, torch.full_like(b.c.weight, 9.0)))
    assert surgeon.verify(a, b, SHAPE).verdict == "different"


class TestPairsOfOtherHands:
    """There is no history, or it does not begin at A."""

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("at", [0, 3])
    def test_a_half_type_does_not_hide_a_filter(self, dtype: torch.dtype, at: int) -> None:
        net = _pooled()
        a, right = copy.deepcopy(net).to(dtype), _folded(net, at).to(dtype)
        assert surgeon.verify(a, right, SHAPE).equivalent
        for fault in (_negate, _exchange):
            for start in (a, right):
                b = copy.deepcopy(start)
                fault(b[at].weight.data)
                report = surgeon.verify(a, b, SHAPE)
                assert (report.verdict, report.first_to_diverge) == ("different", str(at))

    def test_a_history_that_begins_elsewhere_decides_nothing(self) -> None:
        """It was planned at 1×1 pixels, where all taps but the centre see nothing."""
        a = _net()
        b = surgeon.fuse(surgeon.convert(a, "acnet", (1, 3, 1, 1)))
        assert surgeon.verify(a, b, SHAPE).equivalent
        with torch.no_grad():
            for conv in (b[0], b[3]):
                centre = conv.weight[:, :, 1, 1].clone()
                conv.weight.normal_()
                conv.weight[:, :, 1, 1] = centre
        a[1].num_batches_tracked += 1
        report = surgeon.verify(a, b)
        assert report.verdict == "different"
        assert len(report.remarks) == 1
        assert "does not begin at A, and decides nothing" in report.remarks[0]

    def test_a_counter_makes_the_history_lapse_and_no_difference(self) -> None:
        a = _net()
        b = surgeon.convert(a, "acnet", SHAPE)
        a[1].num_batches_tracked += 1
        report = surgeon.verify(a, b, SHAPE)
        assert report.equivalent, report
        assert "does not begin at A" in report.remarks[0]

    def test_a_saturated_output_leaves_the_verdict_to_the_modules(self) -> None:
        a = _net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.Softmax(1))
        with torch.no_grad():
            a[8].weight *= 1e4
        b = copy.deepcopy(a)
        assert surgeon.verify(a, b, SHAPE).equivalent
        with torch.no_grad():
            b[0].weight[2] *= 1.3
        report = surgeon.verify(a, b, SHAPE)
        assert (report.verdict, report.first_to_diverge) == ("different", "0")
        assert "does not move when the input does" in report.remarks[0]

    def test_a_dead_output_of_a_model_without_common_names_shows_nothing(self) -> None:
        class Constant(nn.Module):
            def __init__(self, bias: Tensor, smaller: int) -> None:
                super().__init__()
                self.bias, self.smaller = nn.Parameter(bias.clone()), smaller

            def forward(self, x: Tensor) -> Tensor:
                sides = [side - self.smaller for side in x.shape[2:]]
                return self.bias[:, None, None].expand(len(x), len(self.bias), *sides)

        a = _net(nn.Conv2d(8, 4, 1))
        nn.init.zeros_(a[6].weight)
        smaller = SHAPE[2] - a(torch.zeros(SHAPE)).shape[2]
        b = Constant(a[6].bias.detach(), smaller)
        report = surgeon.verify(a, b, SHAPE)
        assert report.verdict == "different"
        assert "nothing was compared" in str(report)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
    def test_all_weights_one_unit_larger_is_no_rounding(self, dtype: torch.dtype) -> None:
        a = _pooled().to(dtype)
        b = copy.deepcopy(a)
        with torch.no_grad():
            for parameter in b.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, float("inf"))))
        report = surgeon.verify(a, b, SHAPE)
        assert report.verdict == "different"
        assert report.first_to_diverge == "0"

    def test_rounding_weights_once_more_is_a_cast(self) -> None:
        a = _pooled().bfloat16()
        b = copy.deepcopy(a)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in b.parameters():  # some are one unit up, others one down, most stay
                steps = torch.randint(-3, 4, parameter.shape, generator=generator).clamp(-1, 1).float() * float("inf")
                moved = torch.nextafter(parameter, steps.nan_to_num(0).to(parameter.dtype))
                parameter.copy_(torch.where(steps.isnan(), parameter, moved))
        assert surgeon.verify(a, b, SHAPE).equivalent

    @pytest.mark.parametrize(
        "wrong", [nn.Hardtanh(0, 100), nn.LeakyReLU(1e-3), nn.ReLU6(), nn.GELU()], ids=lambda module: str(module)
    )
    def test_a_module_of_another_class_is_tried_on_larger_numbers(self, wrong: nn.Module) -> None:
        a = _net()
        b = copy.deepcopy(a)
        b[2] = wrong
        report = surgeon.verify(a, b, SHAPE)
        assert (report.verdict, report.first_to_diverge) == ("different", "2")

    @pytest.mark.parametrize(
        "condition",
        [
            lambda x, y: y if x.min() < 0 else y * 2,
            lambda x, y: y.clamp(-3.0, 3.0),
            lambda x, y: y if len(x) < 2 or x.shape[2] == 12 else -y,
        ],
        ids=["numbers that are not negative", "large outputs", "two images of another size"],
    )
    def test_what_code_does_on_other_inputs_is_tried(self, condition: Callable[[Tensor, Tensor], Tensor]) -> None:
        class Conditional(_Residual):
            def forward(self, x: Tensor) -> Tensor:
                return condition(x, super().forward(x))

        a = _residual()
        b = copy.deepcopy(a)
        b.__class__ = Conditional
        assert surgeon.verify(a, b, (1, 3, 12, 12)).verdict == "different"

    def test_weights_without_a_counterpart_are_said(self) -> None:
        class Renamed(nn.Module):
            def __init__(self, net: _Residual) -> None:
                super().__init__()
                self.stem, self.b1, self.c2, self.b2, self.fc = net.c1, net.b1, net.c2, net.b2, net.fc
                self.stem.padding = "same"  # so that its geometry is that of no conv of A

            def forward(self, x: Tensor) -> Tensor:
                y = self.b1(self.stem(x)).relu()
                return self.fc((self.b2(self.c2(y)) + y).relu().mean((2, 3)))

        report = surgeon.verify(_residual(), Renamed(_residual()), SHAPE)
        assert report.equivalent, report
        assert report.remarks == (
            "1 module of B with weights has no counterpart in A: stem; only outputs show its faults",
        )

    def test_a_conv_that_turns_the_batch_round_is_found_with_one_image(self) -> None:
        class Turned(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.flip(0))

        a = _net()
        b = copy.deepcopy(a)
        b[3].__class__ = Turned
        report = surgeon.verify(a, b, (1, 3, 12, 12))
        assert (report.verdict, report.first_to_diverge) == ("different", "3")

    def test_a_module_that_is_left_out_is_named_although_its_neighbour_stands_for_it(self) -> None:
        a = _net()
        b = _folded(a, 0)
        b[2] = nn.Identity()
        report = surgeon.verify(a, b, SHAPE)
        assert (report.verdict, report.first_to_diverge) == ("different", "2")

    def test_folds_that_leave_no_identity_are_compared_behind_the_norm(self) -> None:
        from torch.fx.experimental.optimization import fuse

        a = _pooled()
        b = fuse(copy.deepcopy(a))
        assert surgeon.verify(a, b, SHAPE).equivalent
        assert surgeon.verify(b, a, SHAPE).equivalent
        with torch.no_grad():
            getattr(b, "3").bias[1] += 1e-3
        for pair in ((a, b), (b, a)):
            report = surgeon.verify(*pair, SHAPE)
            assert (report.verdict, report.first_to_diverge) == ("different", "3")


class _Branches(nn.Module):
    """3×3 and 1×1 conv, each with a norm, summed; `deployed` is one conv in their place, as RepVGG's is."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.dense, self.point = nn.Sequential(*_unit(c_in, c_out)[:2]), nn.Conv2d(c_in, c_out, 1)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "deployed"):
            return self.act(self.deployed(x))
        return self.act(self.dense(x) + self.point(x))

    def fold(self) -> None:
        folded = fuse_conv_bn_eval(self.dense[0], self.dense[1])
        with torch.no_grad():
            folded.weight += F.pad(self.point.weight, (1, 1, 1, 1))
            folded.bias += self.point.bias
        self.deployed = folded
        del self.dense, self.point


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branches_that_somebody_has_folded_in_float32_are_right(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    net = shake_(nn.Sequential(_Branches(3, 8), _Branches(8, 8), nn.Conv2d(8, 4, 1)), seed, gently=True).eval()
    folded = copy.deepcopy(net)
    folded[0].fold(), folded[1].fold()
    a, b = net.to(dtype), folded.to(dtype)
    assert surgeon.verify(a, b, SHAPE).equivalent
    with torch.no_grad():
        b[1].deployed.weight[3] *= -1
    report = surgeon.verify(a, b, SHAPE)
    assert (report.verdict, report.first_to_diverge) == ("different", "1")


class TestRightFolds:
    """None is condemned, however small, large or tied the numbers are."""

    @pytest.mark.parametrize("size", [12, 48])
    @pytest.mark.parametrize("seed", range(4))
    def test_the_rounding_of_stored_weights_is_not_averaged_away(self, size: int, seed: int) -> None:
        """A global mean averages arithmetic noise away, and not what is the same at every pixel."""
        net = _pooled()
        with torch.no_grad():
            for norm in (net[1], net[4]):
                norm.weight.fill_(3.0)
                norm.bias.fill_(1.0)
        converted = shake_(surgeon.convert(net, "acnet", SHAPE), seed, gently=True)
        assert surgeon.verify(converted, surgeon.fuse(converted), (1, 3, size, size), seed=seed).equivalent

    @pytest.mark.parametrize("seed", range(6))
    def test_labels_that_nearly_tie_may_flip(self, seed: int) -> None:
        class Segment(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(seed)
                self.body, self.head = nn.Sequential(*_unit(3, 16), *_unit(16, 16)), nn.Conv2d(16, 21, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.body(x)).argmax(1)

        recipe = {"surgeon": 1, "title": "t", "rules": [{"swap": "acblock", "with": {"init": "split"}}]}
        recipe["rules"][0]["match"] = {"kernel": 3}  # type: ignore[index]
        net = shake_(Segment(), seed, gently=True).bfloat16()
        converted = surgeon.convert(net, recipe, SHAPE)
        fused = surgeon.fuse(converted)
        assert surgeon.verify(converted, fused, (1, 3, 16, 16)).equivalent
        del fused.surgeon_provenance
        assert surgeon.verify(converted, fused, (1, 3, 16, 16)).equivalent
        with torch.no_grad():
            fused.head.weight.copy_(fused.head.weight.roll(1, 0))
        assert surgeon.verify(converted, fused, (1, 3, 16, 16)).verdict == "different"

    @pytest.mark.parametrize("gamma", [1e-40, 1e-20, 0.0, 1e4])
    @pytest.mark.parametrize("variance", [1e-12, 1.0, 1e6])
    def test_extreme_norms_fold_right(self, gamma: float, variance: float) -> None:
        net = _net(nn.Conv2d(8, 4, 1))
        with torch.no_grad():
            net[4].weight.mul_(gamma)
            net[4].running_var.mul_(variance)
        assert surgeon.verify(net, _folded(net, 3), SHAPE).equivalent
        converted = surgeon.convert(net, "acnet", SHAPE)
        assert surgeon.verify(converted, surgeon.fuse(converted), SHAPE).equivalent


class TestStructure:
    """The replay is at hand, and what it built is compared name by name."""

    @pytest.mark.parametrize(
        ("fault", "path"),
        [
            (lambda net: net.__setitem__(6, nn.AvgPool2d(12)), "6"),
            (lambda net: net.__setitem__(2, nn.Hardtanh(0, 100)), "2"),
            (lambda net: net[6].register_forward_hook(lambda *_: None), "6"),
            (lambda net: setattr(net[3], "padding_mode", "reflect"), "3"),
            (lambda net: setattr(net[2], "forward", F.relu), "2"),
            (lambda net: net.add_module("more", nn.ReLU()), "more"),
        ],
        ids=["fixed size", "clips at 100", "hook", "padding mode", "forward", "one more"],
    )
    def test_what_no_input_shows_is_found_and_named(self, fault: Callable[[nn.Module], object], path: str) -> None:
        net = _pooled()
        b = surgeon.fuse(surgeon.convert(net, "acnet", SHAPE))
        assert surgeon.verify(net, b, SHAPE).equivalent
        fault(b)
        report = surgeon.verify(net, b, SHAPE)
        assert (report.verdict, report.first_to_diverge) == ("different", path)

    def test_a_module_may_be_called_more_often_than_in_a(self) -> None:
        class Repeats(nn.Module):
            def __init__(self, times: int) -> None:
                super().__init__()
                self.conv, self.relu, self.times = nn.Conv2d(3, 4, 3), nn.ReLU(), times

            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x)
                for _ in range(self.times):
                    x = self.relu(x)
                return x

        a, b = Repeats(1), Repeats(4)
        b.load_state_dict(a.state_dict())
        report = surgeon.verify(a, b, SHAPE)
        assert report.distances[0].float64 == 0

    def test_what_a_run_changes_is_no_structure(self) -> None:
        class Remembers(nn.ReLU):
            calls, last = 0, None

            def forward(self, x: Tensor) -> Tensor:
                self.calls, self.last = self.calls + 1, x
                return super().forward(x)

        net = _pooled()
        net[2] = Remembers()
        b = surgeon.fuse(surgeon.convert(net, "acnet", SHAPE))
        with torch.no_grad():
            b(torch.randn(5, 3, 9, 9))
        assert surgeon.verify(net, b, SHAPE).equivalent

    def test_the_dtype_of_every_tensor_counts(self) -> None:
        net = _pooled()
        net[8].register_parameter("unused", nn.Parameter(torch.ones(3)))
        b = surgeon.convert(net, "acnet", SHAPE)
        assert surgeon.verify(net, b, SHAPE).equivalent
        b[8].unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        report = surgeon.verify(net, b, SHAPE)
        assert (report.verdict, report.first_to_diverge) == ("different", "8")

    def test_extra_state_that_is_no_tensor_is_compared(self) -> None:
        class Noted(nn.Sequential):
            note = 1

            def get_extra_state(self) -> dict[str, int]:
                return {"note": self.note}

            def set_extra_state(self, state: dict[str, int]) -> None:
                self.note = state["note"]

        net = Noted(*_net()).eval()
        b = surgeon.fuse(surgeon.convert(net, "acnet", SHAPE))
        assert surgeon.verify(net, b, SHAPE).equivalent
        b.note = 2
        report = surgeon.verify(net, b, SHAPE)
        assert "stored tensors" in [check.name for check in report.checks if not check.passed]

    def test_all_tensors_one_unit_larger_are_not_rounded_once(self) -> None:
        net = _pooled()
        b = surgeon.fuse(surgeon.convert(net, "acnet", SHAPE))
        with torch.no_grad():
            for parameter in b.parameters():
                parameter.copy_(torch.nextafter(parameter, parameter * 2))
        report = surgeon.verify(net, b, SHAPE)
        assert report.verdict == "different"
        assert "one unit in the last place off throughout" in str(report)


def _negate(weight: Tensor) -> None:
    weight[5] *= -1


def _exchange(weight: Tensor) -> None:
    weight[[3, 7]] = weight[[7, 3]].clone()


class _Residual(nn.Module):
    """Convs, norms and a functional sum; what pairs of other hands are made of below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b1(self.c1(x)).relu()
        return self.fc((self.b2(self.c2(y)) + y).relu().mean((2, 3)))


class _Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 16, 1), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(2).transpose(1, 2))


class _OwnLinear(nn.Linear):
    pass


def _residual() -> _Residual:
    return shake_(_Residual(), 0, gently=True).eval()


class TestFaultsThatHalfTypesHide:
    @pytest.mark.parametrize(
        "fault",
        [
            lambda net: setattr(net.b1, "eps", 1e-3),
            lambda net: net.b1.register_forward_hook(lambda module, args, out: out * 1.004),
            lambda net: setattr(net.c1, "padding_mode", "replicate"),
        ],
        ids=["eps", "hook", "padding mode"],
    )
    def test_the_same_tensors_compute_the_same(self, fault: Callable[[nn.Module], object]) -> None:
        a = _residual().bfloat16()
        b = copy.deepcopy(a)
        assert surgeon.verify(a, b, SHAPE).equivalent
        fault(b)
        report = surgeon.verify(a, b, SHAPE)
        assert report.verdict == "different"
        assert report.first_to_diverge in ("b1", "c1")

    def test_a_wrapper_is_looked_through(self) -> None:
        a = _residual().bfloat16()
        b = _Wrapped(copy.deepcopy(a))
        for pair in ((a, b), (b, a)):
            assert surgeon.verify(*pair, SHAPE).equivalent
        with torch.no_grad():
            b.module.c2.weight[3] *= -1
        for pair in ((a, b), (b, a)):
            report = surgeon.verify(*pair, SHAPE)
            assert (report.verdict, report.first_to_diverge) == ("different", "c2")

    def test_channels_may_lie_on_the_last_axis(self) -> None:
        a = _Tokens().bfloat16().eval()
        b = copy.deepcopy(a)
        b.fc.__class__ = _OwnLinear
        assert surgeon.verify(a, b, SHAPE).equivalent
        with torch.no_grad():
            b.fc.bias[5] *= -1
        report = surgeon.verify(a, b, SHAPE)
        assert (report.verdict, report.first_to_diverge) == ("different", "fc")

    def test_a_tensor_of_another_class_is_another_tensor(self) -> None:
        class Louder(Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                out = super().__torch_function__(function, types, args, kwargs or {})
                return out * 1.5 if function is F.conv2d else out

        net = _residual()
        for b in (copy.deepcopy(net), surgeon.fuse(surgeon.convert(net, "acnet", SHAPE))):
            assert surgeon.verify(net, b, SHAPE).equivalent
            b.c1.weight = nn.Parameter(b.c1.weight.detach().as_subclass(Louder), requires_grad=False)
            report = surgeon.verify(net, b, SHAPE)
            assert (report.verdict, report.first_to_diverge) == ("different", "c1")


class TestFoldsByHand:
    """They compute what A does, and some of their modules do not."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_sequential_whose_numbers_shift(self, dtype: torch.dtype) -> None:
        net = _pooled()
        b = nn.Sequential(
            fuse_conv_bn_eval(net[0], net[1]),
            nn.ReLU(),
            fuse_conv_bn_eval(net[3], net[4]),
            *map(copy.deepcopy, net[5:]),
        ).eval()
        a, b = copy.deepcopy(net).to(dtype), b.to(dtype)
        for pair in ((a, b), (b, a)):
            assert surgeon.verify(*pair, SHAPE).equivalent
        with torch.no_grad():
            b[2].weight[3] *= -1
        report = surgeon.verify(a, b, SHAPE)
        assert (report.verdict, report.first_to_diverge) == ("different", "3")

    def test_a_conv_that_only_one_of_them_shares(self) -> None:
        class Shares(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.stem, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
                self.c2 = self.c

            def forward(self, x: Tensor) -> Tensor:
                return self.c2(self.c(self.stem(x)).relu())

        a = Shares().eval()
        b = copy.deepcopy(a)
        b.c2 = copy.deepcopy(b.c)
        for pair in ((a, b), (b, a)):
            assert surgeon.verify(*pair, SHAPE).equivalent
        with torch.no_grad():
            b.c2.weight[3] *= -1
        for pair in ((a, b), (b, a)):
            assert surgeon.verify(*pair, SHAPE).verdict == "different"

    @staticmethod
    def _bias_into_norm(net: _Residual) -> None:
        net.b2.running_mean -= net.c2.bias
        net.c2.bias = None

    @staticmethod
    def _norm_as_scale(net: _Residual) -> None:
        scale = net.b1.weight * (net.b1.running_var + net.b1.eps).rsqrt()
        shift = net.b1.bias - net.b1.running_mean * scale
        net.b1.weight.copy_(scale), net.b1.bias.copy_(shift)
        net.b1.running_mean.zero_(), net.b1.running_var.fill_(1.0 - net.b1.eps)

    @staticmethod
    def _permuted(net: nn.Module) -> None:
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        for tensor in (net[0].weight, net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var):
            tensor.copy_(tensor[order].clone())
        net[3].weight.copy_(net[3].weight[:, order].clone())

    @staticmethod
    def _equalised(net: nn.Module) -> None:
        scale = 2.0 ** torch.arange(-4.0, 4.0)
        net[1].weight.mul_(scale), net[1].bias.mul_(scale)
        net[3].weight.div_(scale[:, None, None])

    @pytest.mark.parametrize(
        ("make", "change"),
        [
            (_residual, _bias_into_norm),
            (_residual, _norm_as_scale),
            (_pooled, _permuted),
            (_pooled, _equalised),
        ],
        ids=["bias into the norm", "norm as a scale", "channels permuted", "scales moved"],
    )
    def test_modules_that_make_good_for_each_other(
        self, make: Callable[[], nn.Module], change: Callable[[nn.Module], None]
    ) -> None:
        a = make()
        b = copy.deepcopy(a)
        with torch.no_grad():
            change(b)
        assert surgeon.verify(a, b, SHAPE).equivalent
        with torch.no_grad():
            next(b.parameters())[2] *= 1.01
        assert surgeon.verify(a, b, SHAPE).verdict == "different"

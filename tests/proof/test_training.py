"""verify in train mode, and of gradients: what may not pass, what may not be condemned, and what is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_surgeon, shake_
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.errors import VerifyError
from surgeon.models.call import Inputs
from surgeon.proof import random_steps
from surgeon.proof.steps import How, take

SHAPE = (4, 3, 12, 12)
TRAIN: dict[str, Any] = {"mode": "train", "gradients": True}
NAMES = ("training", "statistics", "gradients", "train settings")


class _Net(nn.Module):
    """Two convs with norms, one of them with a bias; dropout as a module and as a function; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(self.c1(x)).relu()
        x = F.dropout(self.n2(self.c2(x)).relu(), 0.1, self.training)
        out: Tensor = self.fc(self.drop(x.mean((2, 3))))
        return out


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is a millionth too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *back: Tensor) -> Any:
        return back[0] * (1 + 1e-6)


def _net(seed: int = 0) -> _Net:
    torch.manual_seed(seed)
    return shake_(_Net(), seed, gently=True)


def _recipe(block: str, **options: object) -> dict[str, object]:
    return {"surgeon": 1, "rules": [{"swap": block, "match": {"kernel": 3, "in_channels": 8}, "with": options}]}


def _failed(report: surgeon.Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def _diverging(report: surgeon.Report) -> set[tuple[str, str]]:
    return {(one.kind, one.name) for one in report.tensors if not one.passed}


BLOCKS = [
    *[(block, {"init": init}) for block in ("acblock", "repvgg", "dbb") for init in ("takeover", "split", "scratch")],
    *[("acblock", {"init": init, "form": "online"}) for init in ("takeover", "split", "scratch")],
    ("acblock", {"placement": "border"}),
    ("hetconv", {"p": 2}),
    ("hetconv", {"p": 2, "init": "scratch"}),
]


@pytest.mark.parametrize(("block", "options"), BLOCKS, ids=lambda one: str(one))
def test_what_each_block_and_start_keeps_in_train_mode(block: str, options: dict[str, Any]) -> None:
    """Only a start that takes over a norm, or leaves it where it is, keeps the function in train mode."""
    a = _net()
    b = surgeon.convert(a, _recipe(block, **options), SHAPE)
    init = options.get("init", "takeover")
    keeps_eval = block != "hetconv" and init != "scratch"
    keeps_both = keeps_eval and (init == "takeover" or "form" in options)
    trained = surgeon.verify(a, b, SHAPE, **TRAIN)
    assert trained.verdict == ("equivalent" if keeps_both else "approximate"), trained
    assert any("keeps the function in eval mode only" in one for one in trained.remarks) is (
        keeps_eval and not keeps_both
    )
    assert {one.against for one in trained.tensors} >= ({"A", "the replay"} if keeps_both else {"the replay"})
    evaluated = surgeon.verify(a, b, SHAPE, gradients=True)
    assert evaluated.verdict == ("equivalent" if keeps_eval else "approximate"), evaluated
    assert {one.kind for one in evaluated.tensors} == {"gradient"}


def test_octave_convs_are_trained_as_the_replay_trains_them() -> None:
    torch.manual_seed(0)
    unit = [[nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()] for _ in range(3)]
    a = shake_(nn.Sequential(*(module for one in unit for module in one)), gently=True)
    b = surgeon.convert(a, "octave", (4, 8, 16, 16))
    report = surgeon.verify(a, b, (4, 8, 16, 16), **TRAIN)
    assert report.verdict == "approximate"
    assert {one.kind for one in report.tensors} == {"output", "statistic", "gradient"}
    fused = surgeon.fuse(b)
    assert surgeon.verify(b, fused, (4, 8, 16, 16), **TRAIN).verdict == "approximate"  # its norms are folded
    with torch.no_grad():
        next(one for one in b.modules() if isinstance(one, nn.BatchNorm2d)).momentum = 0.1 + 1e-6
    assert _failed(surgeon.verify(a, b, (4, 8, 16, 16), **TRAIN)) >= {"statistics"}


def test_a_fused_network_in_train_mode_is_what_was_made_of_it() -> None:
    a = surgeon.convert(_net(), "acnet", SHAPE)
    b = surgeon.fuse(a)
    report = surgeon.verify(a, b, SHAPE, **TRAIN)
    assert report.verdict == "approximate"
    assert "what was made of A keeps the function in eval mode only, and B is that" in report.remarks[-1]
    assert surgeon.verify(a, b, SHAPE).equivalent
    assert surgeon.verify(a, b, SHAPE, gradients=True).equivalent


class TestFaults:
    """Each is 1e-6 off, or shows in train mode alone: eval mode without gradients lets it pass."""

    @staticmethod
    def _momentum(net: Any) -> None:
        net.n2.momentum = 0.1 + 1e-6

    @staticmethod
    def _hook(net: Any) -> None:
        net.c2.register_full_backward_hook(lambda module, given, back: tuple(one * (1 + 1e-6) for one in given))

    @staticmethod
    def _hook_of_a_parameter(net: Any) -> None:
        net.fc.weight.register_hook(lambda gradient: gradient * (1 + 1e-6))

    @staticmethod
    def _function(net: Any) -> None:
        net.n2.register_forward_pre_hook(lambda module, given: _Scaled.apply(given[0]))

    @staticmethod
    def _dropout(net: Any) -> None:
        net.drop.p = 0.2

    @staticmethod
    def _still(net: Any) -> None:
        def hook(module: Any, given: Any, out: Any) -> None:
            module.num_batches_tracked -= int(module.training)

        net.n1.register_forward_hook(hook)

    @pytest.mark.parametrize(
        ("fault", "checks", "tensor"),
        [
            (_momentum, {"statistics", "train settings"}, ("statistic", "n2.running_mean")),
            (_hook, {"gradients"}, ("gradient", "n1.weight")),
            (_hook_of_a_parameter, {"gradients"}, ("gradient", "fc.weight")),
            (_function, {"gradients"}, ("gradient", "c1.weight")),
            (_dropout, {"training", "gradients", "train settings"}, ("output", "0")),
            (_still, {"statistics"}, ("statistic", "n1.num_batches_tracked")),
        ],
    )
    def test_is_found_without_a_history(
        self, fault: Callable[[Any], None], checks: set[str], tensor: tuple[str, str]
    ) -> None:
        a = _net()
        b = copy.deepcopy(a)
        fault(b)
        assert surgeon.verify(a, b, SHAPE).equivalent
        report = surgeon.verify(a, b, SHAPE, **TRAIN)
        assert (report.verdict, _failed(report)) == ("different", checks)
        assert tensor in _diverging(report)
        assert tensor[1] in str(report)

    @staticmethod
    def _momentum_in_a_block(net: Any) -> None:
        net.c2.square_bn.momentum = 0.1 + 1e-6

    @pytest.mark.parametrize(
        ("fault", "check"),
        [(_hook_of_a_parameter, "gradients"), (_dropout, "training"), (_momentum_in_a_block, "statistics")],
    )
    @pytest.mark.parametrize("init", ["takeover", "split"])
    def test_is_found_in_a_converted_network(self, fault: Callable[[Any], None], check: str, init: str) -> None:
        a = _net()
        b = surgeon.convert(a, _recipe("acblock", init=init), SHAPE)
        fault(b)
        report = surgeon.verify(a, b, SHAPE, **TRAIN)
        assert report.verdict == "different"
        assert check in _failed(report)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_running_statistic_is_found(self, dtype: torch.dtype) -> None:
        a = _net().to(dtype)
        b = copy.deepcopy(a)
        b.n1.running_var[3] += 1e-6 * b.n1.running_var.abs().max()
        report = surgeon.verify(a, b, SHAPE, mode="train")
        assert "statistics" in _failed(report)
        assert _diverging(report) == {("statistic", "n1.running_var")}

    def test_a_statistic_of_a_block_is_found(self) -> None:
        """The norm lies in the block now, and B is compared with the replay, and that with A, by lineage."""
        a = _net()
        b = surgeon.convert(a, "acnet", SHAPE)
        b.c2.square_bn.eps += 1e-6
        report = surgeon.verify(a, b, SHAPE, mode="train")
        assert report.verdict == "different"
        assert "training" in _failed(report)


class TestRightPairs:
    """None is condemned."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_copies_and_takeovers_of_any_dtype(self, dtype: torch.dtype, seed: int) -> None:
        a = _net(seed).to(dtype)
        b = surgeon.convert(a, _recipe("acblock"), SHAPE)
        for other in (copy.deepcopy(a), copy.deepcopy(a).to(memory_format=torch.channels_last), b):
            report = surgeon.verify(a, other, SHAPE, seed=seed, **TRAIN)
            assert report.equivalent, report
        del b.surgeon_provenance
        report = surgeon.verify(a, b, SHAPE, seed=seed, **TRAIN)
        assert report.equivalent, report
        assert any("have no counterpart in B" in one for one in report.remarks)

    def test_weights_that_were_rounded_in_another_way(self) -> None:
        """One unit in the last place moves gradients as far as that; a tenth of a per cent does not pass for it."""
        a = _net()
        b = copy.deepcopy(a)
        with torch.no_grad():
            for parameter in b.parameters():
                towards = parameter + torch.randn_like(parameter)
                parameter.copy_(torch.nextafter(parameter, towards))
        report = surgeon.verify(a, b, SHAPE, **TRAIN)
        assert report.equivalent, report
        with torch.no_grad():
            b.c1.weight *= 1.001
        assert not surgeon.verify(a, b, SHAPE, **TRAIN)

    def test_a_bias_in_front_of_a_norm_has_a_gradient_of_rounding_alone(self) -> None:
        a = _net().double()
        b = surgeon.convert(a, _recipe("acblock", init="split", form="online"), SHAPE)
        report = surgeon.verify(a, b, SHAPE, **TRAIN)
        assert report.equivalent, report
        assert ("gradient", "c2.bias") in {(one.kind, one.name) for one in report.tensors}

    def test_a_batch_of_one_is_enlarged(self) -> None:
        class Pooled(_Net):
            def forward(self, x: Tensor) -> Tensor:
                pooled: Tensor = self.n1(self.c1(x).mean((2, 3), keepdim=True))  # one number for each image and channel
                return pooled

        torch.manual_seed(0)
        a = Pooled()
        assert surgeon.verify(a, copy.deepcopy(a), (1, 3, 12, 12), mode="train").equivalent

    def test_a_wrapper_and_numbered_layers_are_looked_through(self) -> None:
        a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
        b = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.Dropout(), nn.Flatten())
        b[0], b[1] = copy.deepcopy(a[0]), copy.deepcopy(a[1])
        for one, other in ((a, b), (nn.DataParallel(a), copy.deepcopy(a)), (a, nn.DataParallel(copy.deepcopy(a)))):
            report = surgeon.verify(one, other, SHAPE, **TRAIN)
            assert report.equivalent, report
            assert sum(tensor.kind == "gradient" for tensor in report.tensors) == 5
            assert not [said for said in report.remarks if "counterpart" in said or "not compared" in said]


class TestModes:
    def test_a_norm_that_the_user_froze_stays_frozen(self) -> None:
        a = _net().train()
        a.n1.eval()
        report = surgeon.verify(a, copy.deepcopy(a), SHAPE, mode="train")
        assert report.equivalent
        thawed = copy.deepcopy(a).train()
        found = surgeon.verify(a, thawed, SHAPE, mode="train")
        assert "statistics" in _failed(found)
        assert ("statistic", "n1.num_batches_tracked") in _diverging(found)
        follows = copy.deepcopy(a).eval()  # as a file gives it
        assert surgeon.verify(a, follows, SHAPE, mode="train").equivalent

    def test_a_frozen_norm_that_went_into_a_block_stays_frozen(self) -> None:
        a = _net().train()
        a.n1.eval()
        b = surgeon.convert(a, "acnet", SHAPE)
        assert surgeon.verify(a, b, SHAPE, **TRAIN).equivalent
        assert surgeon.verify(a, b.eval(), SHAPE, **TRAIN).equivalent

    def test_neither_model_is_changed(self) -> None:
        a = _net().train()
        a.n1.eval()
        b = surgeon.convert(a, "acnet", SHAPE)
        kept = [copy.deepcopy(model.state_dict()) for model in (a, b)]
        modes = [[module.training for module in model.modules()] for model in (a, b)]
        torch.manual_seed(5)
        state = torch.get_rng_state()
        surgeon.verify(a, b, SHAPE, **TRAIN)
        assert torch.equal(torch.get_rng_state(), state)
        for model, before, mode in zip((a, b), kept, modes, strict=True):
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert all(parameter.grad is None for parameter in model.parameters())
            assert [module.training for module in model.modules()] == mode
            assert not any(module._forward_hooks for module in model.modules())

    def test_parameters_without_gradients_are_named(self) -> None:
        a = _net()
        a.fc.requires_grad_(False)
        b = copy.deepcopy(a)
        report = surgeon.verify(a, b, SHAPE, gradients=True)
        assert report.equivalent
        assert "gradients of 2 parameters (fc.weight, fc.bias) were not compared: both" in report.remarks[0]
        b.fc.weight.requires_grad_(True)
        report = surgeon.verify(a, b, SHAPE, gradients=True)
        assert report.equivalent
        assert any(one.startswith("fc.weight needs a gradient in one model") for one in report.remarks)

    def test_a_parameter_that_one_model_does_not_use(self) -> None:
        a = _net()
        b = copy.deepcopy(a)
        b.fc.register_forward_pre_hook(lambda module, given: (given[0].detach(),))
        report = surgeon.verify(a, b, SHAPE, gradients=True)
        assert ("gradient", "c1.weight") in _diverging(report)
        assert ("gradient", "fc.weight") not in _diverging(report)

    def test_an_input_that_is_written_on_and_one_that_takes_no_gradient(self) -> None:
        class InPlace(_Net):
            def forward(self, x: Tensor) -> Tensor:
                x -= 0.5
                return super().forward(x)

        class Plain(_Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + torch.from_numpy(x.numpy()))

        for kind, count in ((InPlace, 1), (Plain, 0)):
            torch.manual_seed(0)
            a = kind()
            report = surgeon.verify(a, copy.deepcopy(a), SHAPE, gradients=True)
            assert report.equivalent
            assert sum(one.name.startswith("input") for one in report.tensors) == count
            assert any("gradients of inputs were not compared" in one for one in report.remarks) is not bool(count)

    def test_files_of_programs_are_refused_before_anything_is_run(self) -> None:
        from surgeon.files.exports.compiled import Compiled

        file = Compiled.__new__(Compiled)
        nn.Module.__init__(file)
        for kind in ({"mode": "train"}, {"gradients": True}):
            with pytest.raises(VerifyError, match="neither a train mode nor gradients"):
                surgeon.verify(_net(), file, SHAPE, **kind)


class TestRandomSteps:
    def test_a_module_draws_the_same_whatever_the_others_draw(self) -> None:
        """B has a random module more, which draws nothing that reaches the output."""

        class More(_Net):
            def __init__(self) -> None:
                super().__init__()
                self.also = nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Tensor:
                self.also(x)
                return super().forward(x)

        a, b = _net(), More()
        b.load_state_dict(a.state_dict())
        report = surgeon.verify(a, b, SHAPE, mode="train")
        assert report.equivalent, report
        assert "also draws random numbers in 0 of its calls in A, and in 1 in B" in report.remarks

    def test_what_has_no_name_is_drawn_in_order_and_a_difference_is_said(self) -> None:
        class Twice(_Net):
            def forward(self, x: Tensor) -> Tensor:
                torch.rand(3)
                return super().forward(x)

        a, b = _net(), Twice()
        b.load_state_dict(a.state_dict())
        report = surgeon.verify(a, b, SHAPE, mode="train")
        assert report.verdict == "different"
        assert any("has no names, so it is seeded in order" in one for one in report.remarks)

    def test_calls_of_one_module_draw_different_numbers(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.drop = nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat([self.drop(x), self.drop(x)])

        out = take(Twice(), Inputs((torch.ones(1, 64),)), torch.float64, How(is_training=True)).out
        assert not torch.equal(out[0], out[1])

    def test_blocks_are_not_looked_into(self) -> None:
        net = nn.Sequential(surgeon.convert(_net(), "acnet", SHAPE), nn.Dropout(), nn.RReLU(), nn.ReLU())
        assert [path for path, _ in random_steps._may_draw(net)] == ["0.drop", "1", "2"]


def test_the_command_compares_train_mode_and_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = surgeon.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "acnet", SHAPE)
    surgeon.save(net, tmp_path / "a.pt")
    surgeon.save(net, tmp_path / "b.pt")
    given = (tmp_path / "a.pt", tmp_path / "b.pt", "--input", "4,3,12,12")
    assert run_surgeon("verify", *given, "--mode", "train", "--gradients", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["mode"] == "train"
    assert {"output", "statistic", "gradient"} == {one["kind"] for one in data["tensors"]}
    assert set(data["tensors"][0]) == {"kind", "name", "against", "found", "limit", "diverges"}
    assert {check["name"] for check in data["checks"]} >= set(NAMES)
    assert run_surgeon("verify", *given, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["mode"], plain["tensors"]) == ("eval", [])
    assert not {check["name"] for check in plain["checks"]} & set(NAMES)

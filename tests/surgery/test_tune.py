"""fuse --tune: the fastest exact form of each block is kept, by a clock that counts convs as a test tells it to."""

from __future__ import annotations

import copy
import io
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative, run_surgeon, shake_
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import surgeon
from surgeon.blocks import contract
from surgeon.blocks.base import Deployable
from surgeon.blocks.hetconv import HetConv, HetConvOptions
from surgeon.conv.spec import is_channels_last
from surgeon.errors import BlockError, CaptureError, ModelError, PlanError
from surgeon.surgery import history as histories
from surgeon.surgery import tune
from surgeon.surgery.clocks import Call, HostClock
from surgeon.surgery.fold import fold_blocks_
from surgeon.surgery.fuse import Folded, fold_all_
from surgeon.surgery.look import network_for
from surgeon.surgery.tune import Tuning

SHAPE = (2, 3, 16, 16)
Cost = Callable[[Tensor, Tensor, int], float]  # of a conv: its input, its weight and its groups


class Counts(TorchFunctionMode):
    """Adds up what the convs of a run cost."""

    product = 1.0  # the cost of a product, as a share of that of a 1×1 conv

    def __init__(self, cost: Cost) -> None:
        self.cost, self.total = cost, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv2d, nn.functional.conv2d):
            self.total += self.cost(args[0], args[1], args[6])
        if func is torch.addmm:  # a 1×1 conv as a matrix product
            self.total += self.product * self.cost(args[1], args[2].t()[:, :, None, None], 1)
        return func(*args, **(kwargs or {}))


class Told(HostClock):
    """A clock by which convs take what the test says, and nothing else takes any time."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost, self.measured = cost, 0

    def seconds(self, call: Call, repeats: int) -> float:
        self.measured += 1
        with Counts(self.cost) as counted:
            call()
        return counted.total + 1e-3


def net() -> nn.Module:
    """Two convs that are alike, and one that is not, with norms."""
    torch.manual_seed(0)
    widths = (3, 8, 8, 8, 16)
    layers = [
        (nn.Conv2d(one, other, 3, padding=1, bias=False), nn.BatchNorm2d(other), nn.ReLU())
        for one, other in itertools.pairwise(widths)
    ]
    return shake_(nn.Sequential(*(one for layer in layers for one in layer)), gently=True).eval()


@pytest.fixture
def thin() -> nn.Module:
    rules = [{"swap": "hetconv", "match": {"in_channels": 8}, "with": {"p": 4, "layout": "block"}}]
    return surgeon.convert(net(), {"rules": rules}, SHAPE)


def by_kind(grouped: float, pointwise: float, dense: float) -> Cost:
    def cost(x: Tensor, weight: Tensor, groups: int) -> float:
        return grouped if groups > 1 else pointwise if weight.shape[2:] == (1, 1) else dense

    return cost


def tuned_(model: nn.Module, cost: Cost | Told, **how: Any) -> Folded:
    clock = cost if isinstance(cost, Told) else Told(cost)
    tuning = Tuning(clock_of=lambda place: clock, channels_last=how.pop("channels_last", False))
    return fold_all_(network_for(model, torch.randn(SHAPE)), tuning=tuning, **how)


def kinds(model: nn.Module) -> list[str]:
    return [type(model.get_submodule(path)).__name__ for path in ("3", "6", "9")]


def test_the_fastest_form_is_kept_recorded_and_verified(thin: nn.Module, tmp_path: Path) -> None:
    fused = copy.deepcopy(thin)
    done = tuned_(fused, by_kind(2.0, 1.0, 1.5))
    assert kinds(fused) == ["Conv2d"] * 3
    (step,) = histories.history(fused)[1:]
    assert step.forms == (("3", "dense"), ("6", "dense"), ("9", "dense"))
    assert "forms=<3 blocks>" in repr(step)
    assert done.tuned is not None
    first = done.tuned.blocks[0]
    assert (first.form, first.ratio) == ("dense", pytest.approx(1.501 / 3.001))
    assert (first.is_original, first.is_slower, first.to_original) == (True, False, 1)
    assert done.tuned.ratio == pytest.approx((1.5 * 4) / (1.5 + 9), rel=1e-3)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert relative(fused(x), thin(x)) < 1e-6
    assert surgeon.verify(thin, fused, SHAPE).equivalent
    for name in ("net.pt", "net.safetensors"):
        surgeon.save(fused, tmp_path / name, arch="torchvision:resnet18")  # which is never built here
    again = surgeon.load(tmp_path / "net.pt")
    assert kinds(again) == ["Conv2d"] * 3
    assert histories.history(again) == histories.history(fused)
    assert surgeon.verify(thin, again, SHAPE).equivalent


def test_a_file_of_tensors_is_rebuilt_in_the_forms_that_were_kept(tmp_path: Path) -> None:
    model = surgeon.convert(_small_resnet(), {"rules": [{"swap": "hetconv", "match": {"kernel": 3}}]}, (1, 1, 28, 28))
    fused = copy.deepcopy(model)
    clock = Told(lambda x, weight, groups: 5.0 if groups > 1 and weight.shape[0] > 16 else 1.0)
    fold_all_(network_for(fused, (1, 1, 28, 28)), tuning=Tuning(clock_of=lambda place: clock))
    assert histories.history(fused)[-1].forms
    arch = "surgeon.app.demo.net:SmallResNet"
    surgeon.save(fused, tmp_path / "net.safetensors", arch=arch)
    again = surgeon.load(tmp_path / "net.safetensors", arch=arch)
    assert [type(one) for one in again.modules()] == [type(one) for one in fused.modules()]
    assert surgeon.verify(model, again, (1, 1, 28, 28)).equivalent


def _small_resnet() -> nn.Module:
    from surgeon.app.demo.net import SmallResNet

    torch.manual_seed(0)
    return shake_(SmallResNet(), gently=True).eval()


@pytest.mark.parametrize("layout", ["block", "interleaved", "best"])
def test_a_product_is_kept_written_and_read_as_plain_torch(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [{"swap": "hetconv", "match": {"in_channels": 8}, "with": {"p": 4, "layout": layout}}]
    thin = surgeon.convert(net(), {"rules": rules}, SHAPE)
    fused = copy.deepcopy(thin)
    monkeypatch.setattr(Counts, "product", 0.25)
    done = tuned_(fused, by_kind(1.0, 2.0, 9.0))
    assert done.tuned is not None
    assert {one.form for one in done.tuned.blocks} == {"product"}
    assert all(type(module).__module__.startswith("torch.") for module in fused.modules())
    assert surgeon.verify(thin, fused, SHAPE).equivalent
    surgeon.save(fused, tmp_path / "net.pt")
    again = surgeon.load(tmp_path / "net.pt")
    assert surgeon.verify(thin, again, SHAPE).equivalent
    opened = torch.load(tmp_path / "net.pt", weights_only=False)  # as a program without surgeon does
    x = torch.randn(SHAPE)
    for form in (x, x.to(memory_format=torch.channels_last)):
        with torch.no_grad():
            assert torch.equal(again(form), fused(form))
            assert torch.equal(opened(form), fused(form))
            assert relative(fused(form), thin(form)) < 1e-6
    torch.save(opened, tmp_path / "torch.pt")
    assert surgeon.verify(thin, surgeon.load(tmp_path / "torch.pt"), SHAPE).equivalent
    with torch.no_grad():
        fused[3].pointwise[0, 0] += 1e-5
    report = surgeon.verify(thin, fused, SHAPE)
    assert not report.equivalent
    assert "3" in str(report)
    surgeon.export(again, tmp_path / "net.pt2", SHAPE)


def test_a_graph_that_only_looks_like_a_product_is_refused(thin: nn.Module, tmp_path: Path) -> None:
    block = thin.get_submodule("3")
    assert isinstance(block, HetConv)
    for spoil in ("addmm", "name", "matrix"):
        made = block.forms()["product"]()
        assert isinstance(made, fx.GraphModule)
        if spoil == "addmm":
            node = next(node for node in made.graph.nodes if node.target is torch.addmm)
            node.target = torch.addmv
            made.recompile()
        elif spoil == "name":
            made.register_parameter("other", nn.Parameter(torch.ones(1)))
        else:
            made.pointwise = nn.Parameter(torch.ones(1))
        torch.save(nn.Sequential(made), tmp_path / f"{spoil}.pt")
        with pytest.raises(ModelError):
            surgeon.load(tmp_path / f"{spoil}.pt")


@pytest.mark.parametrize("dense", [5.0, 3.0, 2.95])
def test_the_plain_form_stays_unless_another_is_faster_by_more_than_noise(thin: nn.Module, dense: float) -> None:
    done = tuned_(thin, by_kind(2.0, 1.0, dense))
    assert kinds(thin) == ["GraphModule"] * 3
    assert done.tuned is not None
    assert (done.tuned.forms, done.tuned.ratio) == ({}, None)
    stored = histories.as_data(thin)["history"][-1]
    assert "forms" not in stored  # so that earlier releases read the file
    assert stored["measured"]["tuned"]["blocks"]["3"][0] == "plain"


def test_each_block_is_measured_with_its_own_input(thin: nn.Module) -> None:
    tuned_(thin, lambda x, weight, groups: by_kind(weight.shape[0], 0.0, 10.0)(x, weight, groups))  # 8 and 16 filters
    assert kinds(thin) == ["GraphModule", "GraphModule", "Conv2d"]


def test_blocks_that_are_alike_are_measured_once(thin: nn.Module) -> None:
    clock = Told(by_kind(1.0, 1.0, 9.0))
    tuned_(thin, clock)
    runs = 1 + 3 + tune._ROUNDS  # to warm up, to choose the repeats, and the rounds
    assert clock.measured == 2 * 4 * runs  # two kinds of blocks, in three forms, beside the original


def test_what_wins_has_to_win_again(thin: nn.Module) -> None:
    """The dense form is faster in the first rounds alone, as the luckiest of many forms would be."""
    clock = Told(by_kind(2.0, 1.0, 1.5))
    clock.cost = lambda x, weight, groups: by_kind(2.0, 1.0, 1.5 if clock.measured <= 53 else 3.0)(x, weight, groups)
    done = tuned_(thin, clock)
    assert kinds(thin) == ["GraphModule"] * 3
    assert done.tuned is not None
    assert all(one.ratio == 1 for one in done.tuned.blocks)


def test_nothing_is_kept_where_the_whole_network_is_slower(thin: nn.Module) -> None:
    """Alone the dense form wins; with the first conv of the network in the same run it does not."""

    class Whole(Told):
        def seconds(self, call: Call, repeats: int) -> float:
            seen: list[int] = []
            with Counts(lambda x, weight, groups: seen.append(x.shape[1]) or 0.0):
                call()
            self.cost = by_kind(2.0, 1.0, 9.0 if 3 in seen else 1.5)
            return super().seconds(call, repeats)

    done = tuned_(thin, Whole(by_kind(2.0, 1.0, 1.5)))
    assert done.tuned is not None
    assert done.tuned.is_undone
    assert kinds(thin) == ["GraphModule"] * 3
    assert histories.history(thin)[-1].forms == ()


def test_a_network_in_other_forms_than_its_history_says_is_not_equivalent(thin: nn.Module) -> None:
    fused = copy.deepcopy(thin)
    tuned_(fused, by_kind(2.0, 1.0, 1.5))
    steps = histories.history(fused)
    histories.set_history_(fused, (*steps[:-1], replace(steps[-1], forms=steps[-1].forms[1:])))
    report = surgeon.verify(thin, fused, SHAPE)
    assert not report.equivalent
    assert "3" in str(report)


@pytest.mark.parametrize("forms", [(("3", "folded twice"),), (("0", "dense"),), (("nowhere", "dense"),)])
def test_forms_that_a_history_makes_up_are_one_sentence(thin: nn.Module, forms: tuple[tuple[str, str], ...]) -> None:
    fused = copy.deepcopy(thin)
    tuned_(fused, by_kind(2.0, 1.0, 9.0))
    steps = histories.history(fused)
    histories.set_history_(fused, (*steps[:-1], replace(steps[-1], forms=forms)))
    with pytest.raises(PlanError, match=f"{forms[0][0]} (has no form|is no block)") as caught:
        surgeon.verify(thin, fused, SHAPE)
    assert "Upgrade surgeon" in str(caught.value)


def test_octave_blocks_are_measured_with_their_two_streams_beside_the_conv_on_the_whole_map() -> None:
    rules = {"rules": [{"swap": "octave", "match": {"kernel": 3}, "with": {"min_size": 2}}]}
    octave = surgeon.convert(net(), rules, SHAPE)
    seen: set[int] = set()

    def cost(x: Tensor, weight: Tensor, groups: int) -> float:
        seen.add(x.shape[1])
        return float(x.shape[1])  # four parts take as long as the whole together, and more

    done = tuned_(octave, cost)
    assert done.tuned is not None
    inner = next(one for one in done.tuned.blocks if one.path == "3")
    assert inner.original == pytest.approx(8, abs=0.1)
    assert inner.to_original is not None
    assert inner.to_original > 1.4
    assert inner.is_slower
    assert {4, 8} <= seen
    said = _shown(done)
    assert "are slower here, as deployed, than a conv like the original" in said


def _shown(done: Folded) -> str:
    from rich.console import Console

    from surgeon.display.tuned import tuned_view

    console = Console(width=160, file=io.StringIO())
    assert done.tuned is not None
    console.print(tuned_view(done.tuned))
    return str(console.file.getvalue())


def test_it_is_said_where_multiply_adds_save_nothing(thin: nn.Module) -> None:
    said = _shown(tuned_(copy.deepcopy(thin), by_kind(2.0, 1.0, 1.5)))
    assert "hetconv: 3 of 3 are one dense conv here: the multiply-adds that it saves save no time" in said
    assert "3 of 3 blocks in another form than plain; the network takes ×0.5" in said
    said = _shown(tuned_(copy.deepcopy(thin), by_kind(1.0, 1.0, 5.0)))
    assert "the plain form of every block is the fastest, or as fast as any" in said
    assert "save no time" not in said


def test_what_is_measured_is_cast_and_laid_out_as_it_will_run(thin: nn.Module) -> None:
    seen: set[tuple[torch.dtype, torch.dtype, bool, bool]] = set()

    def cost(x: Tensor, weight: Tensor, groups: int) -> float:
        if groups > 1:
            seen.add((x.dtype, weight.dtype, is_channels_last(x), is_channels_last(weight)))
        return 1.0

    before = {name: tensor.data_ptr() for name, tensor in thin.state_dict().items()}
    done = tuned_(thin, cost, dtype=torch.bfloat16, channels_last=True)
    assert seen == {(torch.bfloat16, torch.bfloat16, True, True)}
    assert done.tuned is not None
    assert (done.tuned.dtype, done.tuned.channels_last) == ("bfloat16", True)
    assert kinds(thin) == ["Conv2d"] * 3  # one conv of two is half of the time
    assert before
    assert not any(is_channels_last(tensor) for tensor in thin.parameters() if tensor.dim() == 4)


def test_the_network_is_as_it_was_where_it_cannot_be_tuned(thin: nn.Module) -> None:
    before = copy.deepcopy(thin)

    def fails(x: Tensor, weight: Tensor, groups: int) -> float:
        raise RuntimeError("no")

    with pytest.raises(CaptureError, match=r"3 does not run alone on cpu: RuntimeError: no.* Give another --input"):
        tuned_(thin, fails)
    assert [type(one) for one in thin.modules()] == [type(one) for one in before.modules()]
    with pytest.raises(CaptureError, match="no input is known to tune the network with"):
        fold_all_(network_for(nn.Sequential(Odd(), copy.deepcopy(thin)), None), tuning=Tuning())
    with pytest.raises(PlanError, match="no forms to tune"):
        fold_all_(network_for(thin, SHAPE), keep_norms=True, tuning=Tuning())
    assert surgeon.verify(before, thin, SHAPE).equivalent


class Odd(nn.Module):
    """Takes no input that could be guessed."""

    def forward(self, x: Tensor, *, key: str) -> Tensor:
        return x[key]  # type: ignore[index]


class Vague(HetConv):
    __module__ = "elsewhere.blocks"

    def forms(self) -> Any:
        return {"dense": self.fold}


class Empty(Vague):
    __module__ = "elsewhere.blocks"

    def forms(self) -> Any:
        return {"plain": lambda: None}


@pytest.mark.parametrize(
    ("kind", "why"), [(Vague, "instead of a dict with the form 'plain'"), (Empty, "is a NoneType")]
)
def test_a_block_of_another_distribution_whose_forms_are_none(kind: type[HetConv], why: str) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    block = kind.from_conv(conv, HetConvOptions(p=2), norm=None, generator=torch.Generator())
    with pytest.raises(BlockError, match=why):
        contract.forms(block)["plain"]()


def test_a_block_has_its_plain_form_if_it_says_nothing() -> None:
    class Plain(Deployable[Any]):
        def deploy(self) -> nn.Module:
            return nn.Identity()

    forms: Mapping[str, Callable[[], nn.Module]] = Deployable.forms(_bare(Plain))
    assert [*forms] == ["plain"]
    assert type(forms["plain"]()) is nn.Identity


def _bare(kind: type[Any]) -> Any:
    made = type("Bare", (kind,), {"__abstractmethods__": frozenset()})
    made.__abstractmethods__ = frozenset()
    block = made.__new__(made)
    nn.Module.__init__(block)
    return block


def test_from_python_and_from_the_command_line(
    thin: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune.clocks, "of", lambda place: Told(by_kind(2.0, 1.0, 1.5)))
    monkeypatch.setattr(
        tune, "Tuning", lambda device=None, channels_last=False: Tuning(device, channels_last, tune.clocks.of)
    )
    fused = surgeon.fuse(thin, SHAPE, tune=True, device="cpu")
    assert kinds(fused) == ["Conv2d"] * 3
    surgeon.save(thin, "thin.pt")
    assert run_surgeon("fuse", "thin.pt", "--tune", "--input=2,3,16,16", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["form"] for one in said["tuned"]["blocks"]] == ["dense"] * 3
    assert said["tuned"]["input"] == "2,3,16,16"
    assert run_surgeon("verify", "thin.pt", "thin.fused.pt", "--input=2,3,16,16") == 0
    capsys.readouterr()
    assert run_surgeon("fuse", "thin.pt", "--tune", "--input=2,3,16,16", "--force") == 0
    assert "tuned on cpu" in capsys.readouterr().out
    assert run_surgeon("fuse", "thin.pt", "--channels-last", "--force") == 2
    assert run_surgeon("fuse", "thin.pt", "--tune", "--keep-norms", "--force") == 2


@pytest.mark.parametrize("layers", [("3",), ("3", "6"), ("6", "9"), ("3", "6", "9")])
def test_octave_blocks_in_any_mixture_of_forms_compute_the_same(layers: tuple[str, ...]) -> None:
    """The form is chosen block by block, and what one hands on, the next one takes."""
    rules = {"rules": [{"swap": "octave", "match": {"kernel": 3}, "with": {"min_size": 2}}]}
    octave = surgeon.convert(net(), rules, SHAPE)
    fused = copy.deepcopy(octave)
    chosen = {path: "stacked" for path in layers if "stacked" in octave.get_submodule(path).forms()}
    network = network_for(fused, torch.randn(SHAPE))
    fold_blocks_(network, forms=chosen)
    assert chosen
    assert {type(fused.get_submodule(path)).__name__ for path in chosen} == {"StackedOctave"}
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert relative(fused(x), octave(x)) < 1e-6

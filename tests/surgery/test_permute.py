"""Low channels that are chosen: `low: least` permutes channels exactly, and plans, files and weights know about it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from helpers import relative, run_surgeon, shake_
from torch import Tensor, nn
from torchvision.models import vgg

import surgeon
from surgeon.analysis.network import Network
from surgeon.errors import CaptureError, ModelError, PlanError, RecipeError
from surgeon.models.call import Inputs
from surgeon.recipes import recipe as recipes
from surgeon.surgery import plan as plans
from surgeon.surgery.check import check
from surgeon.surgery.convert import carry_out_
from surgeon.surgery.decide import plan_for
from surgeon.surgery.permute import permute_
from surgeon.surgery.rank import chosen, lost_by_pooling

SHAPE = (2, 3, 16, 16)


class Block(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return shake_(nn.Sequential(*stem, Block(8), Block(8), *head), gently=True).eval()


STEMS = ["0", "0.0", "conv1", "conv1.*", "features.conv0", "features.0.0"]  # which see raw pixels


def recipe(**options: object) -> dict[str, Any]:
    stay = {"leave": "the stem", "match": {"name": STEMS}, "optional": True}
    swap = {"swap": "octave", "with": {"low": "least", "min_size": 2, **options}}
    return {"surgeon": 1, "title": "T", "rules": [stay, swap]}


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return small()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> surgeon.Plan:
    return surgeon.plan(model, recipe(), SHAPE)


@pytest.fixture(scope="module")
def converted(model: nn.Module, plan: surgeon.Plan) -> nn.Module:
    return surgeon.convert(model, plan, SHAPE)


def noise(seed: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def writers(one: Any) -> set[str]:
    return {axis.tensor for axis in one.tensors if axis.axis == 0}


def test_the_channels_that_lose_least_come_last_in_every_order(model: nn.Sequential, plan: surgeon.Plan) -> None:
    """The filters that see the least beyond a mean, with the norm behind them, are the low ones."""
    assert [len(one.order) for one in plan.permuted] == [8, 8, 8]
    assert plan.unpermuted == ()
    [inner] = [one for one in plan.permuted if "3.conv1.weight" in writers(one)]
    block = model[3]
    scale = block.bn1.weight.double() / (block.bn1.running_var.double() + block.bn1.eps).sqrt()
    kernel = block.conv1.weight.double() * scale[:, None, None, None]
    lost = (kernel - kernel.mean((2, 3), keepdim=True)).square().sum((1, 2, 3))
    low = sorted(lost.argsort()[:4].tolist())
    assert inner.order == (*sorted({*range(8)} - {*low}), *low)


def test_a_sum_permutes_all_its_summands_and_their_scores_are_added(model: nn.Sequential, plan: surgeon.Plan) -> None:
    [trunk] = [one for one in plan.permuted if "0.weight" in {axis.tensor for axis in one.tensors}]
    written = {axis.tensor for axis in trunk.tensors if axis.axis == 0 and "conv" in axis.tensor}
    assert written == {"3.conv2.weight", "4.conv2.weight"}
    assert {axis.tensor for axis in trunk.tensors if axis.axis == 1} == {"3.conv1.weight", "4.conv1.weight", "7.weight"}


def test_the_permuted_network_computes_the_same_and_the_converted_one_is_that_with_its_last_channels_low(
    model: nn.Module, plan: surgeon.Plan, converted: nn.Module
) -> None:
    by_hand = copy.deepcopy(model)
    permute_(by_hand, plan.permuted)
    exact = [copy.deepcopy(one).double()(noise().double()) for one in (by_hand, model)]
    assert relative(exact[0], exact[1]) <= 1e-12
    usual = surgeon.convert(by_hand, recipe(low="last"), SHAPE)
    assert torch.equal(usual(noise()), converted(noise()))
    assert surgeon.history(converted)[0].measured["permuted"] <= 1e-12


def test_low_channels_that_lose_least_lose_less(model: nn.Module) -> None:
    scores = _measured(model)
    network = Network(model, Inputs((noise(),)))
    chosen_plan, _ = plan_for(network, recipes.from_dict(recipe(), ()), bake=False, seed=0, scores=scores)
    lost = {path: [] for path in scores}
    for how in (chosen_plan, surgeon.plan(model, recipe(low="last"), SHAPE)):
        one = copy.deepcopy(model)
        permute_(one, how.permuted)
        for path, score in _measured(one).items():
            lost[path].append(float(score[4:].sum()))
    assert chosen_plan.permuted
    assert all(lost[f"{i}.conv1"][0] < lost[f"{i}.conv1"][1] for i in (3, 4))
    sums = [sum(found[i] for found in lost.values()) for i in (0, 1)]
    assert sums[0] < sums[1]


def _measured(model: nn.Module) -> dict[str, Tensor]:
    norms = {"0": "1", **{f"{i}.conv{j}": f"{i}.bn{j}" for i in (3, 4) for j in (1, 2)}}
    found: dict[str, Tensor] = {}

    def note(path: str, out: Tensor) -> None:
        found[path] = lost_by_pooling(out, model.get_submodule(norms[path]))

    hooked = [(path, model.get_submodule(path)) for path in norms]
    hooks = [conv.register_forward_hook(lambda _, __, out, path=path: note(path, out)) for path, conv in hooked]
    with torch.no_grad():
        model(noise(2))
    for hook in hooks:
        hook.remove()
    return found


def test_a_loss_is_what_pooling_takes_away_in_units_of_the_norm_behind() -> None:
    norm = shake_(nn.BatchNorm2d(4)).eval()
    maps = torch.randn(3, 4, 5, 6)
    pooled = torch.nn.functional.avg_pool2d(maps, 2, 2, ceil_mode=True, count_include_pad=False)
    rough = norm(pooled.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :5, :6])
    lost = (norm(maps) - rough).double().square().mean((0, 2, 3))
    assert torch.allclose(lost_by_pooling(maps, norm), lost, rtol=1e-5)


def test_places_that_are_low_more_often_get_the_channels_that_lose_less() -> None:
    assert chosen(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 2.0])) == [0, 2, 1, 3]
    assert chosen(torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])) == [0, 1, 2, 3]
    assert chosen(torch.tensor([torch.inf, 1.0, 0.5]), torch.tensor([0, 1, 1])) == [0, 1, 2]


def test_plans_without_it_say_nothing_of_it(model: nn.Module) -> None:
    text = surgeon.plan(model, recipe(low="last"), SHAPE).dump()
    assert "permuted" not in text
    assert "low:" not in text.split("convs:")[1]


def test_a_plan_file_is_read_back_replayed_and_may_be_edited(
    model: nn.Module, plan: surgeon.Plan, converted: nn.Module
) -> None:
    again = plans.parse(plan.dump(), "plan.yaml")
    assert again == plan
    fewer = again.model_copy(update={"permuted": again.permuted[:1]})
    assert not torch.equal(surgeon.convert(model, fewer, SHAPE)(noise()), converted(noise()))
    turned = again.permuted[0].model_copy(update={"order": tuple(reversed(range(8)))})
    other = surgeon.convert(model, again.model_copy(update={"permuted": (turned,)}), SHAPE)
    assert surgeon.history(other)[0].measured["permuted"] <= 1e-12


def edited(plan: surgeon.Plan, what: str) -> surgeon.Plan:
    first = plan.permuted[0]
    output = first.tensors[0].model_copy(update={"tensor": "7.weight", "axis": 0})
    changes = {
        "a tensor less": (first.model_copy(update={"tensors": first.tensors[1:]}),),
        "twice": (first, first),
        "of other channels": (first.model_copy(update={"order": (1, 0)}),),
        "of the output": (first.model_copy(update={"order": (1, 0, 2, 3, 4), "tensors": (output,)}),),
    }
    return plan.model_copy(update={"permuted": changes[what]})


@pytest.mark.parametrize("what", ["a tensor less", "twice", "of other channels", "of the output"])
def test_a_plan_that_permutes_what_the_graph_does_not_allow_is_refused(
    model: nn.Module, plan: surgeon.Plan, what: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="permuted") as caught:
        surgeon.convert(model, edited(plan, what), SHAPE)
    assert "Take that entry out of `permuted`" in caught.value.todo
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_order_that_is_no_permutation_is_an_error_in_the_file(plan: surgeon.Plan) -> None:
    order = ", ".join(map(str, plan.permuted[0].order))
    with pytest.raises(RecipeError, match="is not a permutation: it has to hold each of 0 to 7 once"):
        plans.parse(plan.dump().replace(f"[{order}]", "[0, 1, 2, 3, 4, 5, 6, 6]", 1), "plan.yaml")


def test_a_permutation_that_changes_the_network_is_caught_and_undone(model: nn.Module, plan: surgeon.Plan) -> None:
    """As if the graph did not show all that the network does."""
    own, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    wrong = edited(plan, "a tensor less")
    with pytest.raises(CaptureError, match="with its channels permuted, the network is"):
        carry_out_(wrong, Network(own, Inputs((noise(),))))
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.state_dict().items())


def test_an_error_after_permuting_leaves_the_model_as_it_was(
    model: nn.Module, plan: surgeon.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy.deepcopy(model)
    parameters, before = dict(own.named_parameters()), copy.deepcopy(model.state_dict())

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("surgeon.surgery.convert.stream_", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        surgeon.convert_(own, plan, SHAPE)
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.state_dict().items())
    assert all(one is parameters[name] for name, one in own.named_parameters())


def test_in_place_the_parameters_stay_the_objects_that_an_optimizer_knows(model: nn.Module, plan: surgeon.Plan) -> None:
    own = copy.deepcopy(model)
    parameters = {id(one) for one in own.parameters()}
    own(noise()).sum().backward()
    grad = own[1].weight.grad.clone()
    surgeon.convert_(own, plan, SHAPE)
    assert {id(one) for one in own.parameters()} == parameters
    trunk = next(one for one in plan.permuted if "1.weight" in {axis.tensor for axis in one.tensors})
    assert torch.equal(own[1].weight.grad, grad[list(trunk.order)])


def test_verify_compares_with_the_original_in_the_same_order(model: nn.Module, converted: nn.Module) -> None:
    report = surgeon.verify(model, converted, SHAPE)
    assert report.verdict == "approximate"
    assert all(one.passed for one in report.checks)
    worse = copy.deepcopy(converted)
    with torch.no_grad():
        worse[3].conv1.weight[0, 0, 0, 0] += 1e-3
    assert not all(one.passed for one in surgeon.verify(model, worse, SHAPE).checks)


def test_a_history_that_permutes_wrongly_proves_nothing(model: nn.Module, plan: surgeon.Plan) -> None:
    """Such a history may come with a file; its replay would agree with a network that was spoilt in the same way."""
    spoilt = surgeon.convert(model, plan, SHAPE)
    record = spoilt.surgeon_provenance["history"][0]
    record["plan"]["permuted"][0]["tensors"] = record["plan"]["permuted"][0]["tensors"][1:]
    report = surgeon.verify(model, spoilt, SHAPE)
    assert not report.equivalent
    assert any("B's history permutes channels, but" in one for one in report.remarks)


def test_a_fused_network_has_the_order_too(model: nn.Module, converted: nn.Module) -> None:
    fused = surgeon.fuse(converted, SHAPE)
    assert surgeon.verify(converted, fused, SHAPE).equivalent
    assert relative(fused(noise()), converted(noise())) < 1e-5
    bare = OrderedDict(fused.state_dict())
    with pytest.raises(RuntimeError, match="channels of this network were permuted"):
        fused.load_state_dict(bare)


def test_weights_of_the_original_network_are_refused_until_they_are_reordered(
    model: nn.Module, plan: surgeon.Plan
) -> None:
    own, other = surgeon.convert(model, plan, SHAPE), small(seed=5)
    refusal = r"channels of this network were permuted, .*surgeon.reordered\(state, model\)"
    with pytest.raises(RuntimeError, match=refusal):
        own.load_state_dict(other.state_dict())
    for how in (own, plan):
        own.load_state_dict(surgeon.reordered(other.state_dict(), how))
        expected = surgeon.convert(other, plan, SHAPE)
        assert torch.equal(own(noise()), expected(noise()))
    back = small(seed=6)
    back.load_state_dict(surgeon.reordered(own.state_dict(), own, back=True))
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in back.state_dict().items())


def test_weights_of_the_converted_network_load_with_and_without_their_metadata(converted: nn.Module) -> None:
    own, expected = copy.deepcopy(converted), converted(noise())
    own.load_state_dict(converted.state_dict())
    bare = dict(converted.state_dict())
    with pytest.raises(RuntimeError, match="is_done=True"):
        own.load_state_dict(bare)
    own.load_state_dict(surgeon.reordered(bare, own, is_done=True))
    assert torch.equal(own(noise()), expected)
    with pytest.raises(PlanError, match="have the order of the converted network already"):
        surgeon.reordered(converted.state_dict(), converted)
    with pytest.raises(PlanError, match="there is no tensor"):
        surgeon.reordered({f"module.{key}": one for key, one in bare.items()}, converted)


def test_weights_of_another_order_are_refused(model: nn.Module, plan: surgeon.Plan, converted: nn.Module) -> None:
    other = surgeon.convert(model, plan.model_copy(update={"permuted": plan.permuted[:1]}), SHAPE)
    with pytest.raises(RuntimeError, match=r"these weights are for order \w+, and here it is order \w+"):
        other.load_state_dict(converted.state_dict())


def test_files_of_both_kinds_open_with_the_order_they_were_written_in(
    converted: nn.Module, model: nn.Module, tmp_path: Path
) -> None:
    surgeon.save(model, tmp_path / "model.pt")
    surgeon.save(converted, tmp_path / "one.pt")
    surgeon.save(converted, tmp_path / "one.safetensors", arch=str(tmp_path / "model.pt"))
    for name in ("one.pt", "one.safetensors"):
        assert torch.equal(surgeon.load(tmp_path / name, allow=["test_permute"])(noise()), converted(noise()))
    fused = surgeon.fuse(converted, SHAPE)
    surgeon.save(fused, tmp_path / "two.safetensors", arch=str(tmp_path / "model.pt"))
    assert torch.equal(surgeon.load(tmp_path / "two.safetensors", allow=["test_permute"])(noise()), fused(noise()))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="channels of this network were permuted"):
        surgeon.load(tmp_path / "weights.safetensors", arch=str(tmp_path / "one.pt"), allow=["test_permute"])


def test_the_command_line_shows_it(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    surgeon.save(model, tmp_path / "model.pt")
    written = recipes.from_dict(recipe(), ()).text
    (tmp_path / "r.yaml").write_text(written)
    options = ["--allow", "test_permute", "--recipe", tmp_path / "r.yaml", "--input", "2,3,16,16"]
    assert run_surgeon("convert", tmp_path / "model.pt", *options, "-o", tmp_path / "out.pt") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 orders of channels permuted, 24 channels in all" in said
    assert "channels permuted, against their order before, in float64: relative L2" in said


def test_what_keeps_its_order_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(c_in, 8, 3, padding=1) for c_in in (3, 8, 8)]
    model = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ChannelShuffle(2), convs[2])
    found = surgeon.plan(model, recipe(seams="keep"), SHAPE)
    assert [one.path for one in found.unpermuted] == ["2", "4"]
    assert "ChannelShuffle" in found.unpermuted[0].reason
    assert found.unpermuted[1].reason == "it is what the network gives"
    assert found.permuted == ()
    print(found)
    assert "1 conv whose last channels are low: it is what the network gives" in capsys.readouterr().out
    assert surgeon.convert(model, found, SHAPE)(noise()).shape == (2, 8, 16, 16)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_what_is_baked_is_permuted_too() -> None:
    model = small()
    for block in (model[3], model[4]):
        nn.utils.parametrizations.weight_norm(block.conv1)
    converted = surgeon.convert(model, recipe(), SHAPE, bake=True)
    step = surgeon.history(converted)[0]
    assert len(step.plan["baked"]) == 2
    assert len(step.plan["permuted"]) == 3
    assert step.measured["permuted"] <= 1e-12
    assert all(one.passed for one in surgeon.verify(model, converted, SHAPE).checks)
    with pytest.raises(PlanError, match="there is no tensor"):  # it has other ones, which the weight is computed from
        surgeon.reordered(model.state_dict(), converted)


def test_without_an_input_nothing_is_permuted_and_a_plan_that_permutes_is_refused(plan: surgeon.Plan) -> None:
    network = Network(small())
    unseen, surveyed = plan_for(network, recipes.from_dict(recipe(), ()), bake=False, seed=0)
    assert unseen.permuted == ()
    assert {one.reason.partition(",")[0] for one in unseen.unpermuted} == {"no example input is known"}
    with pytest.raises(PlanError) as caught:
        check(plan, surveyed)
    assert "permuted: no example input is known" in str(caught.value)


def test_a_network_without_numbers_keeps_its_order_and_says_so() -> None:
    found = surgeon.plan(small().to("meta"), recipe(), SHAPE)
    assert found.permuted == ()
    assert {one.reason.partition(" that")[0] for one in found.unpermuted} == {"its network holds no numbers"}


NETS = {
    "resnet": lambda: torchvision.models.resnet18(num_classes=10),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
    "vgg": lambda: nn.Sequential(
        vgg.make_layers([8, "M", 16, 16, "M", 16], True),
        nn.Flatten(),
        nn.Linear(4096, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    ),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=10),
    "timm": lambda: timm.create_model("resnet10t", num_classes=10),
}


@pytest.mark.parametrize("kind", NETS)
def test_a_real_network_is_converted_and_its_permutation_is_exact(kind: str) -> None:
    torch.manual_seed(0)
    model, shape = shake_(NETS[kind](), gently=True).eval(), (1, 3, 64, 64)
    made = surgeon.plan(model, recipe(), shape)
    assert made.permuted
    assert made.unpermuted == ()
    exact = Inputs((noise(3, shape).double(),))
    before = copy.deepcopy(model).double()(*exact.args)
    after = copy.deepcopy(model).double()
    permute_(after, made.permuted)
    assert relative(after(*exact.args), before) <= 1e-12
    converted = surgeon.convert(model, made, shape)
    assert surgeon.history(converted)[0].measured["permuted"] <= 1e-12
    assert surgeon.history(converted)[0].measured["streams"] <= 1e-12

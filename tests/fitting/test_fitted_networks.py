"""Networks of many kinds, converted and fitted: what is fitted, what stays as it was, and what verify says of it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shake_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import surgeon
from surgeon.errors import DataError, FitError, SurgeonError

EXAMPLE = (1, 3, 12, 12)
HETCONV = {"rules": [{"swap": "hetconv", "with": {"p": 4}, "match": {"in_channels": 8}}]}
OCTAVE = {"rules": [{"swap": "octave", "with": {"min_size": 2}, "match": {"in_channels": 8}}]}
BOTH = pytest.mark.parametrize("recipe", [HETCONV, OCTAVE], ids=["hetconv", "octave"])


class Net(nn.Module):
    """Three convs, two of them with a norm, the last with a stride; and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(F.relu(self.conv3(self.features(x))).mean((2, 3)))
        return logits


def images(count: int = 64, size: int = 12, channels: int = 3) -> Tensor:
    """Random maps that are smooth, as images are: neighbours are alike."""
    noise = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return F.avg_pool2d(noise, 3, 1, 1) * 2 + noise / 4


def network(kind: type[nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    return shake_(kind(), gently=True).eval()


def figures(model: nn.Module) -> tuple[float, float]:
    """How far a fitted network was from its original as converted, and is now: the relative L2 of the outputs."""
    told = surgeon.history(model)[-1].measured["network"]
    return told["converted"]["relative_l2"], told["fitted"]["relative_l2"]


def sites(model: nn.Module) -> list[str]:
    return [site["path"] for site in surgeon.history(model)[-1].measured["sites"]]


def assert_nearer(model: nn.Module, by: float = 0.8) -> None:
    before, after = figures(model)
    assert 0 < after < by * before


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_networks_of_every_dtype_keep_it(recipe: Any, dtype: torch.dtype) -> None:
    net = network().to(dtype)
    fitted = surgeon.fit(surgeon.convert(net, recipe, EXAMPLE), net, images())
    assert_nearer(fitted)
    assert {p.dtype for p in fitted.parameters()} == {dtype}
    assert fitted(images(2).to(dtype)).isfinite().all()


@BOTH
def test_what_the_history_says_is_what_the_outputs_show(recipe: Any) -> None:
    net, x = network().double(), images().double()
    converted = surgeon.convert(net, recipe, EXAMPLE)
    fitted = surgeon.fit(converted, net, x)
    with torch.no_grad():
        wanted, found = net(x), [converted(x), fitted(x)]
    distances = [float((one - wanted).norm() / wanted.norm()) for one in found]
    assert figures(fitted) == pytest.approx(distances, rel=1e-9)


@BOTH
def test_modes_flags_and_both_given_networks_stay_as_they_were(recipe: Any) -> None:
    net = network().train()
    net.bn1.eval()
    net.conv1.weight.requires_grad_(False)
    converted = surgeon.convert(net, recipe, EXAMPLE)
    before = states(net), states(converted)
    modes = {name: module.training for name, module in converted.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in converted.named_parameters()}
    fitted = surgeon.fit(converted, net, images())
    assert_same(before[0], states(net))
    assert_same(before[1], states(converted))
    assert {name: module.training for name, module in fitted.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in fitted.named_parameters()} == flags
    assert all(parameter.grad is None for one in (net, fitted) for parameter in one.parameters())
    assert_nearer(fitted)


def test_fitting_in_place_gives_what_fitting_a_copy_does() -> None:
    net = network()
    converted = surgeon.convert(net, HETCONV, EXAMPLE)
    copy = surgeon.fit(converted, net, images())
    own = surgeon.fit_(converted, net, images())
    assert own is converted
    assert_same(states(own), states(copy))
    assert [step.operation for step in surgeon.history(own)] == ["convert", "fit"]


def test_convert_with_data_is_convert_and_fit() -> None:
    net = network()
    once = surgeon.convert(net, HETCONV, EXAMPLE, data=images())
    twice = surgeon.fit(surgeon.convert(net, HETCONV, EXAMPLE), net, images())
    assert_same(states(once), states(twice))


def test_fitting_a_fitted_network_again_adds_a_step() -> None:
    net = network()
    fitted = surgeon.fit(surgeon.convert(net, HETCONV, EXAMPLE), net, images())
    again = surgeon.fit(fitted, net, images(96))
    assert [step.operation for step in surgeon.history(again)] == ["convert", "fit", "fit"]
    assert surgeon.verify(net, again, EXAMPLE).verdict == "approximate"


def test_an_error_on_the_way_leaves_the_network_as_it_was() -> None:
    net = network().train()
    converted = surgeon.convert(net, HETCONV, EXAMPLE)
    before, history = states(converted), surgeon.history(converted)

    def stop(what: str, share: float) -> None:
        if share > 0.8:
            assert any(not torch.equal(value, before[name]) for name, value in converted.state_dict().items())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgeon.fit_(converted, net, images(), progress=stop)
    assert_same(before, states(converted))
    assert surgeon.history(converted) == history
    assert all(module.training for module in converted.modules())


def test_progress_says_what_is_fitted_and_runs_forward() -> None:
    net, seen = network(), list[tuple[str, float]]()
    surgeon.convert(net, HETCONV, EXAMPLE, data=images(), progress=lambda what, share: seen.append((what, share)))
    words, shares = zip(*seen, strict=True)
    assert list(shares) == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    assert all(any(path in word for word in words) for path in ("conv2", "conv3", "fc"))


NO_IMAGES = {
    "NaN": images(8).index_fill(0, torch.tensor([3]), float("nan")),
    "one colour": torch.ones(8, 3, 12, 12),
    "none": images(0),
    "four channels": images(8, channels=4),
    "no map": torch.randn(8, 3),
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_images_that_are_none_change_nothing(what: str) -> None:
    net = network()
    converted = surgeon.convert(net, HETCONV, EXAMPLE)
    before = states(converted)
    with pytest.raises(SurgeonError) as caught:
        surgeon.fit_(converted, net, NO_IMAGES[what])
    assert caught.value.exit_code == 2
    assert caught.value.todo
    assert_same(before, states(converted))
    assert len(surgeon.history(converted)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distil": -1}, "distil is -1"),
        ({"distil": "3"}, "distil is '3'"),
        ({"distil": 2.5}, "distil is 2.5"),
        ({"images": 0}, "images is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"labels": [0] * 63}, "there are 63 labels for 64 images"),
        ({"data": None}, "data of type NoneType does not yield batches"),
        ({"data": "photos"}, "the source of images photos is not there"),
        ({"model": "net.pt"}, "a str is not a model"),
        ({"reference": "net.pt"}, "a str is not a model"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_sentence_before_anything_is_done(options: dict[str, Any], said: str) -> None:
    net = network()
    converted = surgeon.convert(net, HETCONV, EXAMPLE)
    done: list[str] = []
    given = {"model": converted, "reference": net, "data": images(), **options}
    with pytest.raises(SurgeonError) as caught:
        surgeon.fit(**given, progress=lambda what, share: done.append(what))
    assert said in caught.value.problem
    assert caught.value.todo
    assert not done


def test_references_that_it_was_not_converted_from_are_refused() -> None:
    net = network()
    converted = surgeon.convert(net, HETCONV, EXAMPLE)
    for model, reference in ((converted, converted), (net, converted), (net, net)):
        with pytest.raises(FitError, match="was not converted from this reference"):
            surgeon.fit(model, reference, images())
    with pytest.raises(FitError, match="the reference has no conv at conv2"):
        surgeon.fit(converted, nn.Sequential(nn.Conv2d(3, 8, 3)), images())


def test_other_weights_in_the_reference_are_told(caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    converted = surgeon.convert(net, HETCONV, EXAMPLE)
    surgeon.fit(converted, net, images(16))
    assert "not those that the network was converted with" not in caplog.text
    with torch.no_grad():
        net.conv3.weight.add_(0.1)
    surgeon.fit(converted, net, images(16))
    assert "not those that the network was converted with" in caplog.text


@BOTH
def test_a_fused_network_is_refused(recipe: Any) -> None:
    net = network()
    fused = surgeon.fuse(surgeon.convert(net, recipe, EXAMPLE))
    with pytest.raises(FitError, match="has been fused") as caught:
        surgeon.fit(fused, net, images())
    assert "fuse it afterwards" in caught.value.todo


def test_acblocks_have_nothing_to_fit_and_stay_beside_what_has() -> None:
    net = network()
    with pytest.raises(FitError, match="ACBlocks compute what their convs did"):
        surgeon.fit(surgeon.convert(net, "acnet", EXAMPLE), net, images())
    rules = [{"swap": "acblock", "match": {"name": "conv2"}}, *HETCONV["rules"]]
    fitted = surgeon.fit(surgeon.convert(net, {"rules": rules}, EXAMPLE), net, images())
    assert sites(fitted) == ["conv3", "fc"]
    assert_nearer(fitted)
    assert surgeon.verify(fitted, surgeon.fuse(fitted), EXAMPLE).equivalent


@BOTH
def test_every_pair_of_original_converted_fitted_and_fused_has_its_verdict(recipe: Any) -> None:
    net = network()
    converted = surgeon.convert(net, recipe, EXAMPLE)
    fitted = surgeon.fit(converted, net, images())
    fused = surgeon.fuse(fitted)
    order = {"original": net, "converted": converted, "fitted": fitted, "fused": fused}
    for (a, one), (b, other) in permutations(order.items(), 2):
        if list(order).index(a) < list(order).index(b):
            wanted = "equivalent" if (a, b) == ("fitted", "fused") else "approximate"
            assert surgeon.verify(one, other, EXAMPLE).verdict == wanted, (a, b)
    broken = surgeon.fuse(fitted)
    with torch.no_grad():
        next(p for name, p in broken.named_parameters() if name.startswith("conv2")).view(-1)[0] += 1e-5
    assert surgeon.verify(fitted, broken, EXAMPLE).verdict == "different"


def test_files_of_both_kinds_hold_the_fitted_network_and_its_history(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    small = {"width_mult": 0.25, "num_classes": 5}
    torch.manual_seed(0)
    net = shake_(torchvision.models.mobilenet_v2(**small), gently=True).eval()
    rule = {"swap": "octave", "with": {"min_size": 2}, "match": {"name": "features.[23].**"}}
    fitted = surgeon.convert(net, {"rules": [rule]}, (1, 3, 32, 32), data=images(16, size=32))
    assert_nearer(fitted, by=1)
    surgeon.save(fitted, tmp_path / "net.pt")
    surgeon.save(fitted, tmp_path / "net.safetensors", arch="torchvision:mobilenet_v2")
    loaded = surgeon.load(tmp_path / "net.pt")
    built = surgeon.load(tmp_path / "net.safetensors", arch="torchvision:mobilenet_v2", arch_args=small)
    for again in (loaded, built):
        assert_same(states(fitted), states(again))
        assert surgeon.history(again) == surgeon.history(fitted)
        assert surgeon.history(again)[-1].measured == surgeon.history(fitted)[-1].measured
        assert surgeon.verify(fitted, again, (1, 3, 32, 32)).equivalent
    assert surgeon.verify(net, built, (1, 3, 32, 32)).verdict == "approximate"
    assert surgeon.verify(built, surgeon.fuse(built), (1, 3, 32, 32)).equivalent


def test_too_few_images_for_a_layer_name_it_and_say_how_many_more() -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(num_classes=5).eval()
    converted = surgeon.convert(net, "hetconv-p4", (1, 3, 32, 32))
    before = states(converted)
    with pytest.raises(DataError, match=r"layer2\.0\.conv1: 128 pixels say too little about the 576 taps") as caught:
        surgeon.fit_(converted, net, images(8, size=32))
    assert "Give at least 5 times as many images" in caught.value.todo
    assert_same(before, states(converted))


def test_tensors_that_are_computed_are_fitted_once_they_are_baked() -> None:
    net = network()
    parametrizations.weight_norm(net.conv2)
    parametrizations.spectral_norm(net.conv3)
    net.eval()
    fitted = surgeon.fit(surgeon.convert(net, HETCONV, EXAMPLE, bake=True), net, images())
    assert sites(fitted) == ["conv2", "conv3", "fc"]
    assert_nearer(fitted)
    assert surgeon.verify(net, fitted, EXAMPLE).verdict == "approximate"
    assert surgeon.verify(fitted, surgeon.fuse(fitted), EXAMPLE).equivalent


class Functional(Net):
    """A conv that is a call of a function with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 6)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(F.relu(self.bn1(self.conv1(x))), self.kernel, None, 1, 1))


@BOTH
def test_a_functional_conv_is_fitted(recipe: Any) -> None:
    net = network(Functional)
    fitted = surgeon.fit(surgeon.convert(net, recipe, EXAMPLE), net, images())
    assert sites(fitted) == ["conv2d", "conv3", "fc"]
    assert_nearer(fitted)
    assert surgeon.verify(net, fitted, EXAMPLE).verdict == "approximate"
    assert surgeon.verify(fitted, surgeon.fuse(fitted), EXAMPLE).equivalent


def test_a_graph_module_stays_one() -> None:
    net = torch.fx.symbolic_trace(network())
    fitted = surgeon.fit(surgeon.convert(net, HETCONV, EXAMPLE), net, images())
    assert isinstance(fitted, torch.fx.GraphModule)
    assert_nearer(fitted)


class Maps(Net):
    """Gives maps by name, as networks for segmentation do, and a number that is no tensor."""

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        return {"out": self.conv3(x), "aux": x.mean((2, 3)), "count": 3}


@BOTH
def test_outputs_by_name_are_compared_as_a_whole(recipe: Any) -> None:
    net = network(Maps)
    fitted = surgeon.fit(surgeon.convert(net, recipe, EXAMPLE), net, images())
    assert_nearer(fitted, by=0.98)
    assert surgeon.verify(fitted, surgeon.fuse(fitted), EXAMPLE).equivalent


def test_a_network_of_timm_whose_norms_activate() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = shake_(timm.create_model("regnetx_002", num_classes=4), gently=True).eval()
    assert any("BatchNormAct2d" in type(module).__name__ for module in net.modules())
    rule = {"swap": "octave", "with": {"min_size": 2}, "match": {"name": "s[12].**"}}
    fitted = surgeon.fit(surgeon.convert(net, {"rules": [rule]}, (1, 3, 32, 32)), net, images(32, size=32))
    assert_nearer(fitted)
    assert surgeon.verify(fitted, surgeon.fuse(fitted), (1, 3, 32, 32)).equivalent


def test_a_whole_network_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = shake_(torchvision.models.resnet18(num_classes=5), gently=True).eval()
    rule = {"swap": "hetconv", "with": {"p": 4}, "match": {"name": "layer1.**"}}
    fitted = surgeon.fit(surgeon.convert(net, {"rules": [rule]}, (1, 3, 32, 32)), net, images(32, size=32), batch=16)
    assert_nearer(fitted)
    first = [f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    assert sites(fitted) == [*first, "layer2.0.downsample.0"]  # the images are too few for the wider convs behind
    told = surgeon.history(fitted)[-1].measured["sites"]
    assert all(site["after"] <= site["before"] * (1 + 1e-6) for site in told)


class Dead(Net):
    """The layer behind the blocks sees zeros: an activation that lets nothing through."""

    def features(self, x: Tensor) -> Tensor:
        return F.relu(super().features(x) - 1e4)


def test_a_layer_behind_that_sees_nothing_stays_and_a_block_that_does_is_named() -> None:
    net = network(Dead)
    rule = {"swap": "hetconv", "with": {"p": 4}, "match": {"name": "conv2"}}
    fitted = surgeon.fit(surgeon.convert(net, {"rules": [rule]}, EXAMPLE), net, images())
    assert sites(fitted) == ["conv2"]
    blind = surgeon.convert(net, {"rules": [{**rule, "match": {"name": "conv3"}}]}, EXAMPLE)
    with pytest.raises(DataError, match="conv3: what it sees is the same at every pixel of every image"):
        surgeon.fit(blind, net, images())

"""verify: what it passes, what it catches, and that it can tell where."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon, shake_
from tiny import SHAPE, ConvNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import surgeon
from surgeon.analysis import example as examples
from surgeon.app.demo.net import SmallResNet
from surgeon.errors import CaptureError, ModelError, VerifyError
from surgeon.proof import verify as equivalence
from surgeon.proof.distance import relative_l2
from surgeon.proof.evidence import Replay
from surgeon.proof.ulps import ulp

INPUT = (1, 1, 28, 28)


def _resnet(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return shake_(SmallResNet(), 1, gently=True).to(dtype)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.pt, net.acnet.pt and net.acnet.fused.pt, in float32."""
    folder = tmp_path_factory.mktemp("verify")
    torch.save(_resnet(), folder / "net.pt")
    assert run_surgeon("convert", folder / "net.pt", "--recipe", "acnet", "--input=1,1,28,28") == 0
    assert run_surgeon("fuse", folder / "net.acnet.pt") == 0
    return folder


def _change_one_tap(source: Path, target: Path, key: str, amount: float = 1e-6) -> None:
    model = torch.load(source, weights_only=False)
    with torch.no_grad():
        model.state_dict()[key].view(-1)[4] += amount
    torch.save(model, target)


def test_one_tap_that_is_1e_6_off_is_caught_and_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = files / "faulty.pt"
    _change_one_tap(files / "net.acnet.fused.pt", faulty, "layer3.0.conv1.weight")
    capsys.readouterr()
    assert run_surgeon("verify", files / "net.acnet.pt", faulty, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    for first, mark in (("first_to_diverge", "diverges"), ("first_to_part", "parts")):  # the new names and the old ones
        assert report[first] == "layer3.0.conv1"
        assert [site["path"] for site in report["sites"] if site[mark]] == ["layer3.0.conv1"]
    mathematics = next(check for check in report["checks"] if check["name"] == "mathematics")
    assert mathematics["passed"]  # no output would have shown it


def test_a_changed_tensor_outside_the_blocks_is_caught_too(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = files / "faulty.pt"
    _change_one_tap(files / "net.acnet.fused.pt", faulty, "fc.weight")
    capsys.readouterr()
    assert run_surgeon("verify", files / "net.acnet.pt", faulty) == 1
    assert "first to diverge: fc" in capsys.readouterr().out


def test_the_untouched_pair_passes_and_says_what_was_measured(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_surgeon("verify", files / "net.acnet.pt", files / "net.acnet.fused.pt", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "equivalent"
    assert {check["name"] for check in report["checks"]} == {
        *("mathematics", "rounding", "stored tensors", "structure", "modules")
    }
    swapped = [site for site in report["sites"] if site["kind_a"] == "ACBlock"]
    assert len(swapped) == 7
    assert all(0 < site["isolated"] < 1e-6 for site in swapped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_that_was_changed_is_caught_although_every_tensor_is_right(dtype: torch.dtype) -> None:
    converted = surgeon.convert(_resnet(dtype), "acnet", INPUT)
    fused = surgeon.fuse(converted)
    assert surgeon.verify(converted, fused, INPUT).equivalent
    fused.layer2[0].downsample[1].eps *= 1.001
    report = surgeon.verify(converted, fused, INPUT)
    assert report.verdict == "different"
    assert [check.name for check in report.checks if not check.passed] == ["structure", "modules"]
    assert report.first_to_diverge == "layer2.0.downsample.1"


def test_a_chain_of_operations_is_replayed_from_its_start(files: Path) -> None:
    assert run_surgeon("verify", files / "net.pt", files / "net.acnet.fused.pt") == 0


def test_several_inputs_are_all_measured(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--input=1,1,28,28", "--input=2,1,33,40"]
    assert run_surgeon("verify", files / "net.acnet.pt", files / "net.acnet.fused.pt", *shapes, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["input"] for row in report["distances"]] == ["1×1×28×28", "2×1×33×40"]


def test_another_network_of_the_same_kind_is_different(files: Path) -> None:
    other = files / "other.pt"
    torch.save(shake_(_resnet(), 2, gently=True), other)
    assert run_surgeon("verify", files / "net.pt", other) == 1


def test_a_random_start_is_approximate_by_design(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_surgeon("convert", files / "net.pt", "--recipe", "acnet-scratch", "--input=1,1,28,28", "--force") == 0
    capsys.readouterr()
    assert run_surgeon("verify", files / "net.pt", files / "net.acnet-scratch.pt", "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "approximate"
    assert report["distances"][0]["own"] > 0.01


def test_an_approximate_model_that_was_changed_afterwards_is_different(files: Path) -> None:
    assert run_surgeon("convert", files / "net.pt", "--recipe", "acnet-scratch", "--input=1,1,28,28", "--force") == 0
    _change_one_tap(files / "net.acnet-scratch.pt", files / "faulty.pt", "layer1.0.conv1.ver_conv.weight")
    assert run_surgeon("verify", files / "net.pt", files / "faulty.pt") == 1


@pytest.mark.parametrize("recipe", ["acnet", "acnet-scratch", {"init": "split"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_is_replayed_as_it_was_stored(recipe: object, dtype: torch.dtype) -> None:
    if isinstance(recipe, dict):
        recipe = {"surgeon": 1, "title": "T", "rules": [{"swap": "acblock", "match": {"kernel": 3}, "with": recipe}]}
    original = _resnet(dtype)
    fused = surgeon.fuse(surgeon.convert(original, recipe, INPUT))
    report = surgeon.verify(original, fused, INPUT)
    assert report.verdict == ("approximate" if recipe == "acnet-scratch" else "equivalent"), report
    with torch.no_grad():
        fused.layer3[0].conv1.weight[0, 0, 0, 0] *= 1 + 8 * torch.finfo(dtype).eps
    report = surgeon.verify(original, fused, INPUT)
    assert (report.verdict, report.first_to_diverge) == ("different", "layer3.0.conv1")
    assert report.first_to_part == report.first_to_diverge  # the old name
    assert report.remarks == ("B's tensors were changed after fuse had made it",)


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_luck_of_a_single_number_is_no_verdict(outputs: int) -> None:
    """Alone, the rounding error of one number is less than half of another's in three of ten cases."""
    for seed in range(12):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, outputs))
        converted = surgeon.convert(shake_(net, seed), "acnet", (1, 2, 8, 8))
        report = surgeon.verify(converted, surgeon.fuse(converted), (1, 2, 8, 8))
        assert report.equivalent, report
        rounding = next(check for check in report.checks if check.name == "rounding")
        assert f"{64 // outputs} inputs of it" in rounding.says


class _TwoHeads(nn.Module):
    """A head that jumps where a number crosses a threshold, and an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.head, self.other = nn.Conv2d(8, 5, 3), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"mask": (self.head(y) * 1e4).sin(), "aux": self.other(y)}


def test_every_output_has_a_limit_of_its_own() -> None:
    a = _TwoHeads()
    b = copy.deepcopy(a)
    assert surgeon.verify(a, b, (1, 3, 16, 16)).equivalent
    with torch.no_grad():
        b.other.weight *= 1.001
    report = surgeon.verify(a, b, (1, 3, 16, 16))
    assert report.verdict == "different"
    assert any("output 1" in check.says for check in report.checks if not check.passed)


def test_where_no_number_is_finite_nothing_is_shown() -> None:
    a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        a[1].running_var[0] = float("nan")
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[2].weight *= 3
    report = surgeon.verify(a, b, (1, 3, 8, 8))
    assert report.verdict == "different"
    assert "hold no finite number" in str(report)


def test_numbers_that_are_not_finite_are_no_fault_where_they_belong() -> None:
    """A buffer that nothing reads, and a conv of NaN: what surgeon makes of them is the same."""
    net = nn.Sequential(ConvNorm(), ConvNorm())
    net.register_buffer("stats", torch.tensor([float("nan"), 1.0]))
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert surgeon.verify(net, converted, SHAPE).equivalent
    assert surgeon.verify(converted, surgeon.fuse(converted), SHAPE).equivalent
    with torch.no_grad():
        net[0].conv.weight[0] = float("nan")
    assert isinstance(surgeon.convert(net, "acnet", SHAPE)[0].conv, surgeon.ACBlock)


class _ByKeyword(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(input=x))


def test_a_norm_may_be_called_by_keyword() -> None:
    net = shake_(_ByKeyword())
    converted = surgeon.convert(net, "acnet", SHAPE)
    assert isinstance(converted.bn, nn.Identity)
    assert surgeon.verify(net, converted, SHAPE).equivalent


class _Detector(nn.Module):
    """Gives as many boxes as there are numbers above a threshold, which rounding moves across it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y[(y * 1e9).sin() > 0]


def test_outputs_whose_shapes_depend_on_rounding_are_compared_in_float64() -> None:
    net = _Detector()
    converted = surgeon.convert(net, "acnet", (1, 3, 12, 12))
    report = surgeon.verify(net, converted, (1, 3, 12, 12))
    assert report.equivalent, report
    assert "depend on rounding" in report.remarks[0]
    with pytest.raises(VerifyError, match="depend on rounding"):
        surgeon.verify(net, copy.deepcopy(net), (1, 3, 12, 12))


@pytest.mark.parametrize("bad", ["net.pt", None, 3, {}])
def test_what_is_no_model_is_said(bad: object) -> None:
    for pair in ((bad, ConvNorm()), (ConvNorm(), bad)):
        with pytest.raises(ModelError, match="is not a model"):
            surgeon.verify(*pair, SHAPE)
    with pytest.raises(CaptureError, match="example 5 is neither"):
        surgeon.verify(ConvNorm(), ConvNorm(), 5)


class TestPairsOfUnknownOrigin:
    """No history: the difference must be explained by how the weights are stored."""

    @pytest.mark.parametrize("outputs", [1, 10, 200])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_folds_by_torchs_own_hand_pass(self, dtype: torch.dtype, outputs: int) -> None:
        for seed in range(8):
            torch.manual_seed(seed)
            net = shake_(
                nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, outputs)), seed
            )
            other = copy.deepcopy(net.eval().double())
            other[0], other[1] = fuse_conv_bn_eval(other[0], other[1]), nn.Identity()
            net, other = net.to(dtype), other.to(dtype)
            report = surgeon.verify(net, other, (1, 3, 8, 8))
            assert report.equivalent, report
            assert report.first_to_diverge is None
            with torch.no_grad():
                other[0].bias[0] += 1e-3
            report = surgeon.verify(net, other, (1, 3, 8, 8))
            assert (report.verdict, report.first_to_diverge) == ("different", "0")

    def _forgotten(self, model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        del model.surgeon_provenance
        return model

    def test_a_fold_by_other_hands_passes(self) -> None:
        converted = surgeon.convert(_resnet(), "acnet", INPUT)
        fused = self._forgotten(surgeon.fuse(converted))
        report = surgeon.verify(converted, fused, INPUT)
        assert report.equivalent, report
        assert report.checks[0].name == "storage"

    def test_the_original_and_its_fold_are_compared_behind_the_norm(self) -> None:
        original = _resnet()
        fused = self._forgotten(surgeon.fuse(surgeon.convert(original, "acnet", INPUT)))
        report = surgeon.verify(original, fused, INPUT)
        assert report.equivalent, report
        assert all(site.isolated < 1e-6 for site in report.sites)

    def test_a_wrong_fold_parts_at_its_site(self) -> None:
        converted = surgeon.convert(_resnet(), "acnet", INPUT)
        fused = self._forgotten(surgeon.fuse(converted))
        with torch.no_grad():
            fused.layer2[0].conv2.bias += 1e-3
        report = surgeon.verify(converted, fused, INPUT)
        assert report.verdict == "different"
        assert report.first_to_diverge == "layer2.0.conv2"

    def test_a_model_equals_itself_in_every_dtype(self) -> None:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            model = _resnet(dtype)
            assert surgeon.verify(model, copy.deepcopy(model), INPUT).equivalent


class _Returns(nn.Module):
    """Gives what `shape` makes of a conv's output."""

    def __init__(self, shape: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.shape = shape

    def forward(self, x: Tensor) -> object:
        return self.shape(self.conv(x))


@pytest.mark.parametrize(
    "other",
    [
        lambda y: (y, y),
        lambda y: [y, y, y],
        lambda y: {"out": y},
        lambda y: y[:, :1],
        lambda y: y.double().float().unsqueeze(0),
        lambda y: y.half(),
        lambda y: "nothing",
        lambda y: [y, object()],
        lambda y: [y[:0], y[:0]],
    ],
    ids=["fewer outputs", "list", "dict", "narrower", "one more axis", "dtype", "no tensor", "an object", "empty"],
)
def test_outputs_that_do_not_match_cannot_be_compared(other: Callable[[Tensor], object]) -> None:
    with pytest.raises(VerifyError):
        surgeon.verify(_Returns(lambda y: [y, y]), _Returns(other), (1, 3, 8, 8))


def test_every_output_counts() -> None:
    a = _Returns(lambda y: {"a": y, "b": [y, y]})
    b = _Returns(lambda y: {"a": y, "b": [y, y * 1.001]})
    assert surgeon.verify(a, copy.deepcopy(a), (1, 3, 8, 8)).equivalent
    assert surgeon.verify(a, b, (1, 3, 8, 8)).verdict == "different"


@dataclass
class _Scores:
    logits: Tensor
    loss: float
    names: tuple[str, ...] = ("a", "b")


def test_dataclasses_and_floats_are_looked_into() -> None:
    def net(by: float, plus: float) -> nn.Module:
        return _Returns(lambda y: [_Scores(y * by, float(y.sum()) + plus)])

    assert surgeon.verify(net(1, 0), net(1, 0), (1, 3, 8, 8)).equivalent
    assert surgeon.verify(net(1, 0), net(1.001, 0), (1, 3, 8, 8)).verdict == "different"
    assert surgeon.verify(net(1, 0), net(1, 0.1), (1, 3, 8, 8)).verdict == "different"


def test_both_parts_of_complex_numbers_count() -> None:
    a = _Returns(lambda y: torch.complex(y, y))
    assert surgeon.verify(a, copy.deepcopy(a), (1, 3, 8, 8)).equivalent
    report = surgeon.verify(a, _Returns(lambda y: torch.complex(y, y * 1.01)), (1, 3, 8, 8))
    assert report.verdict == "different"
    assert report.distances[0].max_abs > 1e-3


def test_outputs_that_are_empty_for_every_input_are_nothing_to_compare() -> None:
    nothing = _Returns(lambda y: {"boxes": y[:0]})
    with pytest.raises(VerifyError, match="no numbers"):
        surgeon.verify(nothing, nothing, (1, 3, 8, 8))
    converted = surgeon.convert(nothing, "acnet", (1, 3, 8, 8))  # there is still every block to check
    assert isinstance(converted.conv, surgeon.ACBlock)


class Versioned(nn.Sequential):
    """As MNASNet of torchvision, it loads nothing that does not say which version of the class has saved it."""

    _version = 2

    def _load_from_state_dict(self, state_dict: object, prefix: str, local_metadata: dict[str, int], *rest: object):
        if local_metadata.get("version") != 2:
            raise ValueError("no version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("recipe", ["acnet", "octave"])
def test_classes_that_ask_for_the_version_of_weights_get_it(recipe: str) -> None:
    convs = [nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)), nn.Conv2d(8, 4, 1)]
    net = Versioned(*convs).eval()
    converted = surgeon.convert(net, recipe, (1, 3, 32, 32))
    assert surgeon.verify(net, converted).verdict == ("equivalent" if recipe == "acnet" else "approximate")
    assert surgeon.verify(converted, surgeon.fuse(converted)).verdict == "equivalent"


def test_two_dtypes_are_named() -> None:
    with pytest.raises(VerifyError, match="A is stored in float32 and B in float64"):
        surgeon.verify(_resnet(), _resnet(torch.float64), INPUT)


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.conv(image) * mask


def test_a_network_of_several_inputs_gets_them() -> None:
    net = _TwoInputs()
    with pytest.raises(CaptureError, match=r"image and mask, for example --input 'image=1,3,8,8;mask=1,3,8,8'"):
        surgeon.convert(net, "acnet", (1, 3, 8, 8))
    example = ((1, 3, 8, 8), (1, 1, 6, 6))
    converted = surgeon.convert(net, "acnet", example)
    assert surgeon.verify(net, converted, example).equivalent
    assert surgeon.verify(net, converted, [example, (torch.ones(2, 3, 9, 9), torch.ones(7, 7))]).equivalent


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_pass_only_where_they_are_identical(bad: float) -> None:
    def spoil(y: Tensor) -> Tensor:
        y = y.clone()
        y[0, 0, 0, 0] = bad
        return y

    assert surgeon.verify(_Returns(spoil), _Returns(spoil), (1, 3, 8, 8)).equivalent
    assert surgeon.verify(_Returns(lambda y: y), _Returns(spoil), (1, 3, 8, 8)).verdict == "different"
    assert surgeon.verify(_Returns(spoil), _Returns(lambda y: y), (1, 3, 8, 8)).verdict == "different"


def test_every_module_keeps_its_own_flag_and_its_tensors() -> None:
    model = _resnet().train()
    model.layer2.eval()
    other = copy.deepcopy(model)
    flags = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    surgeon.verify(model, other, INPUT)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_report_is_true_where_the_models_are_equivalent() -> None:
    model = _resnet()
    assert surgeon.verify(model, model, INPUT)
    assert not surgeon.verify(model, shake_(copy.deepcopy(model), 9), INPUT)


def test_relative_l2_is_not_fooled() -> None:
    ones = torch.ones(4)
    assert relative_l2(2 * ones, ones) == 1
    assert relative_l2(0 * ones, 0 * ones) == 0
    assert relative_l2(ones, 0 * ones) == float("inf")
    nan = torch.tensor([1.0, float("nan")])
    assert relative_l2(nan, nan) == 0
    assert relative_l2(torch.tensor([1.0, float("inf")]), nan) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 1.5, 0.3, -7.0, 1000.0], dtype=dtype)
    above = torch.nextafter(x.abs(), torch.full_like(x, float("inf")))
    assert torch.equal(ulp(x), above.double() - x.abs().double())


class _Single(nn.Module):
    """A network that makes a float32 grid of its own, as torchvision's RAFT does; it does not run in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        grid = y.new_zeros(1, y.shape[2] * y.shape[3], 5).float() + 1
        return torch.bmm(self.head(y).flatten(2), grid)


class TestWhereAModelRunsInItsOwnDtypeOnly:
    shape = (1, 3, 12, 12)

    def test_it_is_proved_block_by_block_and_measured_in_its_own(self) -> None:
        net = shake_(_Single(), 0)
        converted = shake_(surgeon.convert(net, "acnet", self.shape), 1)
        report = surgeon.verify(converted, surgeon.fuse(converted), self.shape)
        assert report.equivalent, report
        assert [check.name for check in report.checks] == [
            *("blocks", "storage", "stored tensors", "structure", "modules")
        ]
        assert report.distances[0].float64 is None
        assert "A does not run in float64" in report.remarks[0]
        assert "expected" in report.remarks[0]
        assert "so outputs were compared in float32" in report.remarks[0]

    def test_a_tap_that_is_1e_6_off_is_caught(self) -> None:
        converted = shake_(surgeon.convert(shake_(_Single(), 0), "acnet", self.shape), 1)
        fused = surgeon.fuse(converted)
        with torch.no_grad():
            fused.body[0].weight[0, 0, 2, 2] += 1e-6
        report = surgeon.verify(converted, fused, self.shape)
        assert (report.verdict, report.first_to_diverge) == ("different", "body.0")

    def test_without_a_history_outputs_are_judged(self) -> None:
        net = shake_(_Single(), 0)
        other = copy.deepcopy(net)
        assert surgeon.verify(net, other, self.shape).equivalent
        with torch.no_grad():
            other.head.weight *= 1 + 1e-4
        assert surgeon.verify(net, other, self.shape).verdict == "different"

    def test_octave_streams_are_checked_in_its_own(self) -> None:
        rule = {"swap": "octave", "match": {"name": "body.*"}, "with": {"min_size": 1}}
        recipe, net = {"surgeon": 1, "title": "t", "rules": [rule]}, shake_(_Single(), 0)
        converted = surgeon.convert(net, recipe, self.shape)
        assert surgeon.plan(net, recipe, self.shape).rewritten
        assert surgeon.verify(net, converted, self.shape).verdict == "approximate"

    def test_what_runs_in_no_dtype_is_said_of_its_own(self) -> None:
        with pytest.raises(VerifyError, match="float32"):
            surgeon.verify(_Single(), _Single(), (1, 4, 12, 12))


class _Chaotic(nn.Module):
    """Makes `gain` units of a unit in the last place."""

    gain = 1e9

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) * self.gain).sin()


class _Ranking(_Chaotic):
    """Sorts by numbers that rounding changes."""

    gain = 1e15

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).flatten()
        return y[(y * self.gain).sin().argsort()]


@pytest.mark.parametrize("kind", [_Chaotic, _Ranking])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestWhereOutputsShowNothing:
    shape = (1, 3, 12, 12)

    def test_a_correct_fold_is_equivalent(self, kind: type[nn.Module], dtype: torch.dtype) -> None:
        net = shake_(kind(), 0, gently=True).to(dtype)
        converted = shake_(surgeon.convert(net, "acnet", self.shape), 1, gently=True)
        report = surgeon.verify(converted, surgeon.fuse(converted), self.shape)
        assert report.equivalent, report
        mathematics, blocks = report.checks[0], next(check for check in report.checks if check.name == "blocks")
        assert 1e-10 < mathematics.measured <= mathematics.limit
        assert "what one unit in the last place of every weight does to A" in mathematics.says
        assert blocks.measured < 1e-12

    def test_a_tap_that_is_1e_6_off_is_caught(self, kind: type[nn.Module], dtype: torch.dtype) -> None:
        net = shake_(kind(), 0, gently=True).to(dtype)
        converted = surgeon.convert(net, "acnet", self.shape)
        fused = surgeon.fuse(converted)
        with torch.no_grad():
            fused.body[0].weight[0, 0, 2, 2] += 1e-6
        report = surgeon.verify(converted, fused, self.shape)
        assert (report.verdict, report.first_to_diverge) == ("different", "body.0")


def test_a_replay_that_does_not_compute_what_a_does_is_caught_block_by_block() -> None:
    net = shake_(_Chaotic(), 0, gently=True)
    net.gain = 1e18
    wrong = copy.deepcopy(net).double()
    with torch.no_grad():
        wrong.body[0].weight *= 1 + 1e-9
    b = copy.deepcopy(net)
    b.load_state_dict(wrong.state_dict())
    report = equivalence.verify(net, b, [examples.make((1, 3, 12, 12))], replay=Replay(wrong, wrong))
    assert [check.name for check in report.checks if not check.passed][:1] == ["blocks"]

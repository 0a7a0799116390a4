"""Where two streams begin and end, conv by conv, as the plan says."""

from __future__ import annotations

import pytest
import torch
import torchvision
from helpers import on_meta, run_surgeon
from small_networks import MobileNetV1, small_densenet
from torch import Tensor, nn

import surgeon
from surgeon.errors import PlanError
from surgeon.octave.region import Region
from surgeon.surgery.plan import Entry

IMAGE = (1, 3, 224, 224)


def plan(net: nn.Module, shape: tuple[int, ...] | None = IMAGE, **options: object) -> dict[str, Entry]:
    rules = [{"leave": "the stem", "match": {"in_channels": {"max": 4}}, "optional": True}]
    rules.append({"swap": "octave", "with": options})
    made = surgeon.plan(net, {"surgeon": 1, "title": "T", "rules": rules}, shape)
    return {entry.path: entry for entry in made.convs}


def shares(entry: Entry) -> tuple[float, float] | None:
    """The shares of low channels before and behind a conv; None where it stays."""
    return (entry.options["alpha_in"], entry.options["alpha_out"]) if entry.swap else None


def meta(name: str, **options: object) -> nn.Module:
    return on_meta(lambda: torchvision.models.get_model(name, weights=None, **options))


def conv(c_in: int = 16, c_out: int = 16, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnext50_32x4d"])
def test_a_bottleneck_resnet_has_the_published_roles(name: str) -> None:
    """Stem plain, alpha_in = 0 behind it; the last stage begins with alpha_out = 0, and the rest of it is plain."""
    for path, entry in plan(meta(name), strided="pool").items():
        stage, begins = path.split(".")[0], path.split(".")[1:] in (["0", "conv1"], ["0", "downsample", "0"])
        if path == "layer4.0.conv2":
            assert shares(entry) == (0, 0)  # pooled, then convolved at stride 1
        elif stage in ("conv1", "layer4"):
            assert shares(entry) == ((0.5, 0) if begins else None), path
        else:
            assert shares(entry) == (0 if stage == "layer1" and begins else 0.5, 0.5), path


def test_mobilenet_v1_has_two_streams_from_the_second_conv_to_the_last_stage() -> None:
    entries = plan(MobileNetV1())
    roles = [shares(entry) for entry in entries.values()]
    assert roles[:3] == [None, None, (0, 0.5)]  # stem; a depthwise conv makes no low channels
    assert set(roles[3:22]) == {(0.5, 0.5)}
    assert roles[22:] == [(0.5, 0), None, None, None, None]


def test_the_last_sum_of_a_basic_stage_is_one_of_streams() -> None:
    """Only small convs read layer3, but its last conv is added to low channels."""
    entries = plan(meta("resnet18"))
    assert shares(entries["layer3.1.conv2"]) == (0.5, 0.5)
    assert shares(entries["layer4.0.conv1"]) is None


@pytest.mark.parametrize(
    ("name", "tail", "becomes"),
    [
        ("resnet18", ("layer4.0.conv1", "layer4.0.downsample.0"), None),
        ("resnet50", ("layer4.0.downsample.0",), (0.5, 0)),
    ],
)
def test_a_strided_tail_is_left_out_if_joining_its_input_writes_less(
    name: str, tail: tuple[str, ...], becomes: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both convs behind layer3 of a ResNet-18 are strided, and their outputs are twice as wide as what they read."""
    recipe = {"rules": [{"leave": "the stem", "match": {"in_channels": 3}}, {"swap": "octave"}]}
    made = surgeon.plan(meta(name), recipe, IMAGE)
    assert {shares(entry) for entry in made.convs if entry.path in tail} == {becomes}
    monkeypatch.setattr(Region, "_spares_a_join", lambda *_: becomes is None)
    other = surgeon.plan(meta(name), recipe, IMAGE)
    assert {shares(entry) for entry in other.convs if entry.path in tail} == {None if becomes else (0.5, 0)}
    for cost in ("macs", "activations"):
        assert getattr(made.total, cost).after <= getattr(other.total, cost).after
    assert made.total != other.total


@pytest.mark.parametrize(("size", "last"), [(2, "layer4"), (6, "layer3"), (12, "layer2"), (20, "layer1")])
def test_min_size_says_where_a_region_ends(size: int, last: str) -> None:
    entries = plan(meta("resnet50"), min_size=size)
    open_ended = {path.split(".")[0] for path, entry in entries.items() if entry.swap and entry.options["alpha_out"]}
    assert max(open_ended) == last
    assert (f"smaller than min_size {size}" in str(entries["layer4.2.conv3"].skip)) is (last != "layer4")


def test_the_size_is_that_of_the_example() -> None:
    assert shares(plan(meta("resnet50"), (1, 3, 97, 97))["layer3.3.conv2"]) is None
    assert shares(plan(meta("resnet50"))["layer3.3.conv2"]) == (0.5, 0.5)


def test_without_an_input_no_map_is_too_small() -> None:
    assert shares(plan(nn.Sequential(conv(), nn.Flatten(0), nn.Unflatten(0, (1, 16, 2, 2)), conv(), conv()), None)["3"])


@pytest.mark.parametrize("strided", ["pool", "keep"])
def test_a_strided_conv_behind_a_region_is_pooled_if_that_is_asked_for(strided: str) -> None:
    entry = plan(meta("resnet50"), strided=strided)["layer4.0.conv2"]
    assert shares(entry) == ((0, 0) if strided == "pool" else None)
    assert strided == "pool" or "smaller than min_size" in str(entry.skip)


@pytest.mark.parametrize("strided", ["pool", "keep"])
def test_a_strided_conv_that_no_region_leads_to_stays(strided: str) -> None:
    """Neither the stem, nor a conv of one pixel, nor one whose streams have ended long before."""
    net = nn.Sequential(conv(16, 16, stride=2), conv(), conv(16, 16, stride=4), conv(16, 16, stride=2), conv())
    assert [shares(entry) for entry in plan(net, (1, 16, 32, 32), strided=strided).values()] == [
        *((0, 0.5), (0.5, 0), None, None, None)
    ]
    twice = nn.Sequential(nn.GroupNorm(2, 16), conv(16, 16, stride=2), nn.GroupNorm(2, 16), conv(16, 16, stride=2))
    assert [shares(entry) for entry in plan(twice, (1, 16, 32, 32), strided=strided).values()] == [None, None]


class Ends(nn.Module):
    """The streams end in a strided conv, which takes the low one at the resolution it has: that costs what it saves."""

    def __init__(self, *, is_joined: bool, is_read: bool) -> None:
        super().__init__()
        self.one, self.two, self.ends, self.last = conv(), conv(), conv(16, 16, stride=2), conv(16, 16)
        self.is_joined, self.is_read = is_joined, is_read

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.two(self.one(x))
        made = (self.ends(x), x) if self.is_joined else (self.ends(x),)
        return (*made, self.last(x)) if self.is_read else made


class StaysItself(Ends):
    """It cannot become a graph, so every conv splits and joins by itself."""

    program = "an attribute with a name that a rewritten graph uses for itself"

    def __init__(self, **how: bool) -> None:
        super().__init__(**how)
        self.program = type(self).program


@pytest.mark.parametrize(
    ("kind", "is_joined", "is_read", "expected"),
    [
        (Ends, True, True, None),
        (StaysItself, False, True, None),
        (Ends, False, True, (0.5, 0)),  # or its input would have to be joined
        (Ends, True, False, (0.5, 0)),  # or the conv before it would have no reason to write low channels
    ],
)
def test_a_swap_that_saves_nothing_is_left_out_if_the_others_cost_no_more_without_it(
    kind: type[Ends], is_joined: bool, is_read: bool, expected: tuple[float, float] | None
) -> None:
    entries = plan(kind(is_joined=is_joined, is_read=is_read), (1, 16, 32, 32))
    assert shares(entries["two"]) == (0.5, 0.5)
    assert shares(entries["ends"]) == expected
    assert (entries["ends"].skip == "swapping it would save nothing") is (expected is None)


def test_a_map_of_one_pixel_has_no_low_channels() -> None:
    assert not any(shares(entry) for entry in plan(nn.Sequential(conv(), conv()), (1, 16, 1, 1), min_size=1).values())


def test_behind_a_concatenation_the_low_channels_lie_where_they_came_from() -> None:
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = conv(3, 8), conv(8, 16), conv(8, 8)
            self.norm, self.reads = nn.BatchNorm2d(32), conv(32, 4)
            self.last = conv(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last(self.reads(self.norm(torch.cat([self.one(x), x, self.two(x)], 1)).relu()))

    entry = plan(Joins(), (1, 3, 32, 32))["reads"]
    assert [tuple(part) for part in entry.options["low_in"]] == [(8, 16), (28, 32)]
    assert entry.options["alpha_in"] == 12 / 32


def test_densenet_reads_scattered_channels() -> None:
    entries = plan(on_meta(small_densenet))
    assert entries["features.denseblock2.denselayer3.conv1"].options["low_in"]
    assert all(entry.swap or entry.skip for entry in entries.values())


def test_what_is_given_is_not_planned() -> None:
    net = nn.Sequential(conv(), nn.ReLU(), conv())
    assert [shares(entry) for entry in plan(net, (1, 16, 32, 32)).values()] == [(0, 0.5), (0.5, 0)]
    given = plan(net, (1, 16, 32, 32), alpha_in=0.25, alpha_out=0.75)
    assert {shares(entry) for entry in given.values()} == {(0.25, 0.75)}


def test_a_conv_that_is_called_twice_keeps_its_streams_to_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.one(x)))

    entries = plan(Twice(), (1, 16, 32, 32))
    assert shares(entries["one"]) == (0.5, 0.5)
    assert shares(entries["two"]) == (0.5, 0)


def test_a_conv_that_its_role_does_not_fit_is_left_out_and_the_others_are_planned_anew() -> None:
    net = nn.Sequential(conv(), conv(16, 16, 3, dilation=2), conv(), conv())  # the second shrinks the map
    entries = plan(net, (1, 16, 32, 32))
    assert "does not keep the size" in str(entries["1"].skip)
    assert shares(entries["0"]) is None
    assert [shares(entries[path]) for path in "23"] == [(0, 0.5), (0.5, 0)]


def test_one_conv_alone_is_no_region() -> None:
    with pytest.raises(PlanError, match="nothing is swapped"):
        surgeon.convert(nn.Sequential(conv(), nn.ReLU()), {"surgeon": 1, "title": "T", "rules": [{"swap": "octave"}]},
                        (1, 16, 32, 32))  # fmt: skip


class CallsWithWords(nn.Sequential):
    """Its own code cannot be traced; that of the modules that it calls can."""

    def forward(self, x: Tensor) -> Tensor:
        for one in self:
            x = one(x) if float(x.sum()) < 1e9 else x
        return x


END = "two streams would end right behind it"
LONELY = {
    f"{END}, at the output of the network": nn.Sequential(conv(), nn.ReLU()),
    f"{END}, in a GroupNorm, which mixes channels": nn.Sequential(conv(), nn.ReLU(), nn.GroupNorm(2, 16), conv()),
    f"{END}, in an Upsample, which needs the whole map": nn.Sequential(
        conv(), nn.Upsample(scale_factor=3, mode="bicubic"), conv()
    ),
    f"{END}: the conv that reads it stays": nn.Sequential(conv(), conv(16, 16, 2)),
    f"{END}: no graph is known of the code that calls its Inner": CallsWithWords(
        type("Inner", (nn.Sequential,), {})(conv(), nn.ReLU()), conv()
    ),
    "the convs that read it have maps too small for two streams": nn.Sequential(conv(), conv(16, 16, stride=4)),
}


@pytest.mark.parametrize("why", LONELY)
def test_a_conv_whose_streams_would_end_at_once_says_where(why: str) -> None:
    assert next(iter(plan(LONELY[why], (1, 16, 32, 32)).values())).skip == f"it reads no low channels, and {why}"


def test_squeezing_convs_work_on_one_pixel_and_stay() -> None:
    entries = plan(meta("mobilenet_v3_small"))
    assert entries["features.1.block.1.fc1"].skip == "it works on one pixel, which has no low frequencies"


def test_the_plan_of_the_command_line_tells_of_streams(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_surgeon("plan", "torchvision:resnet18", "-r", "octave") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "low-passed: 'maxpool' (MaxPool2d), where `out += identity` in BasicBlock.forward (resnet.py:" in told
    assert "this turns the forward of the model itself into a graph" in told
    assert "seam: two streams are joined: 'layer4.0.conv1' (Conv2d) needs the whole map" in told
    assert run_surgeon("plan", "torchvision:resnet50", "-r", "octave") == 0
    assert "no seam is left" in " ".join(capsys.readouterr().out.split())


def test_a_plan_that_low_passes_what_is_not_there_is_refused() -> None:
    net = meta("resnet18")
    made = surgeon.plan(net, "octave", IMAGE)
    wrong = made.model_copy(update={"low_passed": (made.low_passed[0].model_copy(update={"step": "add_99"}),)})
    with pytest.raises(PlanError, match="low_passed add_99: there is no such step"):
        surgeon.convert(net, wrong)

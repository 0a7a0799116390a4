"""Convs that pad their input first, against zeros that are laid around the map by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import relative
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.blocks import registry
from surgeon.conv.padding import PaddedConv2d, same
from surgeon.conv.spec import ConvSpec, Pads
from surgeon.nn import LaterFormatError

Pair = tuple[int, int]
GEOMETRIES = [
    ConvSpec(4, 4, (3, 3), stride=(2, 2), pads_input="same"),
    ConvSpec(4, 8, (5, 3), stride=(2, 3), pads_input="same", bias=False),
    ConvSpec(4, 4, (3, 5), stride=(2, 2), dilation=(3, 2), pads_input="same"),
    ConvSpec(4, 4, (3, 3), stride=(2, 2), groups=4, pads_input="same"),
    ConvSpec(4, 4, (3, 3), pads_input="same"),
    ConvSpec(4, 4, (3, 3), stride=(2, 2), pads_input=(0, 1, 0, 1)),
    ConvSpec(4, 4, (5, 3), dilation=(2, 1), pads_input=(3, 0, 0, 2), groups=2),
]
SIZES = [(9, 12), (10, 11), (12, 9), (11, 10), (13, 13)]
every_geometry = pytest.mark.parametrize("spec", GEOMETRIES, ids=lambda spec: str(spec).replace("→", "-"))


def ends(size: int, kernel: int, stride: int, dilation: int) -> Pair:
    """What TensorFlow documents for SAME: so much that ceil(size / stride) windows fit, the odd one at the end."""
    reach = dilation * (kernel - 1) + 1
    over = size % stride or stride
    total = max(reach - over, 0)
    return total // 2, total - total // 2


def by_hand(spec: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if spec.pads_input == "same":
        (top, bottom), (left, right) = (
            ends(*axis) for axis in zip(x.shape[-2:], spec.kernel, spec.stride, spec.dilation, strict=True)
        )
    else:
        assert isinstance(spec.pads_input, tuple)
        top, bottom, left, right = spec.pads_input
    h, w = x.shape[-2:]
    framed = x.new_zeros(*x.shape[:2], h + top + bottom, w + left + right)
    framed[..., top : top + h, left : left + w] = x
    return F.conv2d(framed, weight, bias, spec.stride, 0, spec.dilation, spec.groups)


def conv_of(spec: ConvSpec) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = spec.build(like=torch.empty(0, dtype=torch.float64))
    conv.reset_parameters()
    return conv


def impulses(spec: ConvSpec, size: Pair) -> Tensor:
    """Maps with one pixel each: at every place of the border, and random numbers besides."""
    h, w = size
    places = [(r, c) for r in range(h) for c in range(w) if r in (0, 1, h - 2, h - 1) or c in (0, 1, w - 2, w - 1)]
    maps = torch.zeros(len(places), spec.c_in, h, w, dtype=torch.float64)
    for i, (r, c) in enumerate(places):
        maps[i, i % spec.c_in, r, c] = 1
    noise = torch.randn(2, spec.c_in, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat([maps, noise])


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 1), (3, 1), (5, 1), (3, 2), (5, 3)])
def test_same_is_what_tensorflow_documents(kernel: int, dilation: int, stride: int) -> None:
    for size in range(1, 40):
        before, after = same(size, kernel, stride, dilation)
        assert (before, after) == ends(size, kernel, stride, dilation)
        windows = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
        assert windows == -(-size // stride)


@every_geometry
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_padded_conv_sees_zeros_around_its_input(spec: ConvSpec, size: Pair) -> None:
    conv = conv_of(spec)
    assert type(conv) is PaddedConv2d
    assert ConvSpec.of(conv) == spec
    x = impulses(spec, size)
    assert torch.equal(conv(x), by_hand(spec, x, conv.weight, conv.bias))


@every_geometry
@pytest.mark.parametrize("options", [{}, {"placement": "border"}, {"init": "split"}], ids=str)
def test_an_acblock_pads_the_same_way_at_every_border(spec: ConvSpec, options: dict[str, str]) -> None:
    kind, conv = registry()["acblock"], conv_of(spec)
    chosen = kind.Options.model_validate(options)
    assert kind.refusal(spec, None, chosen) is None
    block = kind.from_conv(conv, chosen, norm=None, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for name in ("ver_bn", "hor_bn"):
            getattr(block, name).weight.normal_()  # strips that add something
        folded = block.fold()
    assert ConvSpec.of(folded) == spec.change(bias=True)
    for size in SIZES:
        x = impulses(spec, size)
        assert relative(block(x), by_hand(spec, x, folded.weight, folded.bias)) <= 1e-13
        if options.get("init") == "split":
            continue
        assert relative(folded(x), block(x)) <= 1e-13


@every_geometry
def test_a_hetconv_pads_the_same_way_at_every_border(spec: ConvSpec) -> None:
    kind, spec = registry()["hetconv"], spec.change(groups=1)
    for layout in ("block", "interleaved"):
        options = kind.Options.model_validate({"p": 2, "layout": layout})
        block = kind.from_conv(conv_of(spec), options, norm=None, generator=torch.Generator())
        folded = block.fold()
        assert ConvSpec.of(folded) == spec
        for size in SIZES:
            x = impulses(spec, size)
            assert relative(block(x), by_hand(spec, x, folded.weight, folded.bias)) <= 1e-13


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_octave_pools_and_pads_both_sides_alike(size: Pair, groups: int) -> None:
    kind, spec = registry()["octave"], GEOMETRIES[0].change(groups=groups)
    options = kind.Options.model_validate({"alpha": 0.5})
    assert kind.refusal(spec, size, options) is None
    conv = conv_of(spec)
    block = kind.from_conv(conv, options, norm=None, generator=torch.Generator())
    plain = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=groups, dtype=torch.float64)
    plain.load_state_dict(conv.state_dict())
    x = impulses(spec, size)
    assert block(x).shape == conv(x).shape
    twin = kind.from_conv(plain, options, norm=None, generator=torch.Generator())
    assert torch.equal(block(x), twin(x))  # pooled to half, and convolved at stride 1, where SAME is symmetric
    assert relative(block.deploy()(x), block(x)) <= 1e-13
    assert not any(isinstance(one, PaddedConv2d) for one in block.deploy().modules())


def test_octave_refuses_a_padding_that_would_shift_its_streams() -> None:
    kind = registry()["octave"]
    for spec in (GEOMETRIES[5], ConvSpec(4, 4, (3, 3), pads_input=(0, 2, 0, 2))):
        assert "not the same on both sides" in (kind.refusal(spec, (12, 12), kind.Options()) or "")
    even = ConvSpec(4, 4, (2, 2), stride=(2, 2), pads_input="same")
    assert "has no centre" in (kind.refusal(even, (12, 12), kind.Options()) or "")


def test_a_spec_says_how_its_input_is_padded() -> None:
    same_spec, fixed = GEOMETRIES[0], GEOMETRIES[5]
    assert str(same_spec) == "4→4, 3x3, stride=2, padding=same (TensorFlow)"
    assert str(fixed) == "4→4, 3x3, stride=2, padding=0/1"
    assert str(GEOMETRIES[6]) == "4→4, 5x3, padding=3/0x0/2, dilation=2x1, groups=2"
    assert same_spec.to_dict()["pads_input"] == "same"
    assert fixed.to_dict()["pads_input"] == [0, 1, 0, 1]
    assert "pads_input" not in ConvSpec(3, 8, (3, 3)).to_dict()
    assert "pads_input" not in ConvSpec(3, 8, (3, 3)).__getstate__()  # what earlier versions can read
    assert same_spec.pads == Pads(1, 1, 1, 1)
    assert fixed.pads == Pads(0, 1, 0, 1)
    assert fixed.inner == ConvSpec(4, 4, (3, 3), stride=(2, 2))
    assert ConvSpec(1, 1, (4, 4), stride=(2, 2), pads_input="same").at_stride_1.pads == Pads(1, 2, 1, 2)


def test_specs_and_convs_are_copied_and_pickled_with_their_rule() -> None:
    conv = conv_of(GEOMETRIES[0])
    x = impulses(GEOMETRIES[0], (9, 10))
    for one in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(one(x), conv(x))
        assert "pads_input=same" in repr(one)
    assert pickle.loads(pickle.dumps(GEOMETRIES[5])) == GEOMETRIES[5]


@pytest.mark.parametrize("rule", ["SAME", (1, 2), (0, -1, 0, 1), [0, 1, 0, 1], True, None])
def test_a_stored_rule_that_is_none_is_refused(rule: object) -> None:
    conv = conv_of(GEOMETRIES[0])
    state = {**conv.__getstate__(), "pads_input": rule}
    with pytest.raises(ValueError, match="PaddedConv2d has a pads_input that is no rule"):
        PaddedConv2d.__new__(PaddedConv2d).__setstate__(state)
    with pytest.raises(LaterFormatError):
        PaddedConv2d.__new__(PaddedConv2d).__setstate__({**state, "surgeon.format": 99})
    if rule is not None:
        with pytest.raises(ValueError, match="ConvSpec has a pads_input that is no rule"):
            ConvSpec.__new__(ConvSpec).__setstate__({**GEOMETRIES[0].__getstate__(), "pads_input": rule})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to torch.compile or torch.export:DeprecationWarning")
def test_a_trace_pads_other_sizes_as_they_need() -> None:
    conv = conv_of(GEOMETRIES[0]).eval().requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(conv, torch.zeros(1, 4, 8, 8, dtype=torch.float64))
    for size in SIZES:
        x = impulses(GEOMETRIES[0], size)
        assert torch.equal(traced(x), conv(x))

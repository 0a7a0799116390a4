"""Average kernel magnitude matrices against loops over single weights, as the formula of the paper is written."""

from __future__ import annotations

import pytest
import torch
from helpers import shake_
from torch import nn

import surgeon
from surgeon.errors import FigureError, ModelError
from surgeon.figures import magnitudes
from surgeon.figures.layers import layers_of
from surgeon.surgery.bake import all_baked

EXAMPLE = (1, 3, 16, 16)


def by_hand(weight: torch.Tensor) -> list[list[float]]:
    """S and A of the paper, one weight after the other."""
    weight = weight.detach()
    out, channels, kh, kw = weight.shape
    sums = [[0.0] * kw for _ in range(kh)]
    for o in range(out):
        for c in range(channels):
            for y in range(kh):
                for x in range(kw):
                    sums[y][x] += abs(float(weight[o, c, y, x]))
    most = max(max(row) for row in sums)
    return [[one / most for one in row] for row in sums]


def close(found: magnitudes.Matrix, wanted: object, limit: float = 1e-12) -> bool:
    a, b = (torch.as_tensor(one, dtype=torch.float64) for one in (found, wanted))
    return a.shape == b.shape and bool(((a - b).abs() <= limit).all())


def convs(seed: int = 0, **options: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, **options), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, **options))


@pytest.mark.parametrize("size", [(3, 3), (2, 2), (4, 3), (1, 5), (7, 7)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_matrix_is_the_sum_of_magnitudes_divided_by_the_largest(size: tuple[int, int], groups: int) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, size, groups=groups)
    network = surgeon.kernels(nn.Sequential(conv), control=False).networks[0]
    assert [layer.shape for layer in network.layers] == [size]
    assert close(network.layers[0].matrix, by_hand(conv.weight))
    assert max(max(row) for row in network.layers[0].matrix) == 1.0


def test_the_networks_matrix_is_the_mean_over_its_convs_not_of_its_weights() -> None:
    net = convs()
    with torch.no_grad():
        net[0].weight.mul_(1000)  # it would drown the other one in a sum over all weights
    average = surgeon.kernels(net).networks[0].averages[0]
    wanted = (torch.tensor(by_hand(net[0].weight)) + torch.tensor(by_hand(net[2].weight))) / 2
    assert average.layers == 2
    assert close(average.matrix, wanted, 1e-6)  # the loops add up in float64, and wanted is float32


def test_a_matrix_does_not_depend_on_the_scale_of_the_weights() -> None:
    net = convs()
    before = surgeon.kernels(net, control=False).networks[0]
    with torch.no_grad():
        for factor, conv in zip((-7.0, 1e-9), (net[0], net[2]), strict=True):
            conv.weight.mul_(factor)
    after = surgeon.kernels(net, control=False).networks[0]
    assert all(close(a.matrix, b.matrix, 1e-6) for a, b in zip(before.layers, after.layers, strict=True))


def test_shapes_are_averaged_apart_and_3x3_comes_first() -> None:
    net = nn.Sequential(*(nn.Conv2d(2, 2, size) for size in (7, 5, 5, 3, 1, (1, 3))))
    averages = surgeon.kernels(net).networks[0].averages
    assert [(one.shape, one.layers) for one in averages] == [((3, 3), 1), ((5, 5), 2), ((1, 3), 1), ((7, 7), 1)]


def test_strips_strengthen_the_skeleton_by_what_is_planted() -> None:
    """All taps of the square kernel are 1, those of the strips 2 and 3: the sum is known at every place."""
    block = _planted("skeleton")
    layer = surgeon.kernels(nn.Sequential(block), control=False).networks[0].layers[0]
    assert close(layer.matrix, torch.tensor([[1, 3, 1], [4, 6, 4], [1, 3, 1]]) / 6, 1e-6)
    each = {branch.name: branch for branch in layer.branches}
    assert close(each["ver_conv"].matrix, [[0, 1, 0]] * 3)
    assert close(each["hor_conv"].matrix, [[0, 0, 0], [1, 1, 1], [0, 0, 0]])
    assert {name: round(branch.share, 6) for name, branch in each.items()} == {
        "square_conv": round(1 / 6, 6),
        "ver_conv": round(2 / 6, 6),
        "hor_conv": 0.5,
    }


def test_on_the_border_they_strengthen_the_last_row_and_column() -> None:
    layer = surgeon.kernels(nn.Sequential(_planted("border")), control=False).networks[0].layers[0]
    assert close(layer.matrix, torch.tensor([[1, 1, 3], [1, 1, 3], [4, 4, 6]]) / 6, 1e-6)


def _planted(placement: str) -> nn.Module:
    """An ACBlock whose norms do nothing and whose kernels have one number each."""
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False, dtype=torch.float64)
    net = surgeon.convert(nn.Sequential(conv), "acnet", example=(1, 4, 8, 8))
    block = net[0] if placement == "skeleton" else _on_the_border(conv)
    with torch.no_grad():
        for name, number in (("square", 1.0), ("ver", 2.0), ("hor", 3.0)):  # all of one sign, so magnitudes add up
            norm = block.get_submodule(f"{name}_bn")
            norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps))
            block.get_submodule(f"{name}_conv").weight.fill_(number)
    return block


def _on_the_border(conv: nn.Conv2d) -> nn.Module:
    options = surgeon.ACBlock.Options.model_validate({"placement": "border"})
    return surgeon.ACBlock.from_conv(conv, options, norm=None, generator=torch.Generator())


@pytest.mark.parametrize("recipe", ["acnet", "repvgg", "dbb", "acnet-online", "hetconv-p4"])
def test_a_block_is_shown_as_it_is_folded(recipe: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    net = surgeon.convert(nn.Sequential(*layers).double(), recipe, example=(1, 8, 16, 16))
    for parameter in shake_(net).parameters():
        nn.init.normal_(parameter)
    folded = surgeon.fuse(net, dense=recipe == "hetconv-p4")
    a, b = surgeon.kernels([net, folded], (1, 8, 16, 16)).networks
    assert a.layers[0].kind != b.layers[0].kind == "Conv2d"
    assert [one.path for one in a.layers] == [one.path for one in b.layers]
    assert all(close(one.matrix, other.matrix) for one, other in zip(a.layers, b.layers, strict=True))


@pytest.mark.parametrize("layout", ["block", "interleaved", "best"])
def test_a_deployed_hetconv_is_the_dense_kernel_that_it_stands_for(layout: str) -> None:
    torch.manual_seed(0)
    options = surgeon.HetConv.Options.model_validate({"p": 2, "layout": layout})
    conv = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64)
    block = surgeon.HetConv.from_conv(conv, options, norm=None, generator=torch.Generator())
    wanted = surgeon.kernels(nn.Sequential(block.fold())).networks[0].layers[0].matrix
    for form in ("plain", "product"):
        network = surgeon.kernels(nn.Sequential(block.forms()[form]())).networks[0]
        assert [layer.kind for layer in network.layers] == ["sum of convs"]
        assert close(network.layers[0].matrix, wanted)
        drawn = torch.tensor(network.layers[0].untrained)
        assert drawn[1, 1] == 1.0  # every channel has the tap at the centre, half of them the others
        assert ((drawn < 0.7) | (drawn == 1)).all()


@pytest.mark.parametrize("form", ["plain", "stacked"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0.5, 0.5), (0.0, 0.5), (0.5, 0.0)])
def test_a_deployed_octave_has_the_kernel_of_its_conv(
    form: str, stride: int, alpha_in: float, alpha_out: float
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, stride, padding=1, dtype=torch.float64)
    options = surgeon.OctaveConv.Options.model_validate({"alpha_in": alpha_in, "alpha_out": alpha_out})
    block = surgeon.OctaveConv.from_conv(conv, options, norm=None, generator=torch.Generator())
    for held in (block, block.forms()[form]()):
        branches = held.branch_kernels()
        assert torch.equal(sum(one.kernel for one in branches), conv.weight)
        assert len(branches) == (1 + (alpha_in > 0)) * (1 + (alpha_out > 0))
        names = {one.name: one.kernel for one in branches}
        if alpha_in and alpha_out:
            assert torch.equal(names["low to high"][:4, 3:], conv.weight[:4, 3:])
            assert names["low to high"].count_nonzero() == conv.weight[:4, 3:].numel()
        layer = surgeon.kernels(nn.Sequential(held), (1, 6, 8, 8)).networks[0].layers[0]
        assert close(layer.matrix, by_hand(conv.weight))


def test_the_control_is_drawn_anew_and_from_the_seed() -> None:
    net = convs()
    first, again, other = (surgeon.kernels(net, seed=seed).networks[0].averages[0] for seed in (0, 0, 1))
    assert first == again
    assert first.matrix == other.matrix
    assert first.untrained != other.untrained
    assert first.untrained != first.matrix
    assert surgeon.kernels(net, control=False).networks[0].averages[0].untrained is None


def test_the_control_of_a_conv_is_uniform_and_that_of_an_acblock_has_a_skeleton() -> None:
    """E|u| of independent uniform numbers is the same everywhere; where branches overlap, more is added."""
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
    plain, block = surgeon.kernels([net, surgeon.convert(net, "acnet", example=(1, 64, 8, 8))]).networks
    assert min(min(row) for row in plain.averages[0].untrained or ()) > 0.95
    drawn = torch.tensor(block.averages[0].untrained)
    assert drawn[1, 1] == 1.0
    assert (drawn[[0, 0, 2, 2], [0, 2, 0, 2]] < 0.5).all()  # the corners have the square kernel alone
    assert ((drawn[[0, 1, 1, 2], [1, 0, 2, 1]] > 0.6) & (drawn[[0, 1, 1, 2], [1, 0, 2, 1]] < 0.9)).all()


def test_drawing_a_control_changes_neither_the_network_nor_the_random_state() -> None:
    net = surgeon.convert(convs(), "acnet", example=EXAMPLE)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    surgeon.kernels(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_weights_that_are_computed_are_those_of_eval_mode() -> None:
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    with torch.no_grad():
        net[0].parametrizations.weight.original1.normal_()
    found = surgeon.kernels(net, control=False).networks[0].layers[0]
    assert close(found.matrix, by_hand(all_baked(net)[0].weight), 1e-6)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.weight - self.weight.mean((1, 2, 3), keepdim=True) * (2.0 if self.training else 1.0)
        return nn.functional.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Twice(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + super().forward(-x)


def test_a_class_that_computes_its_kernel_is_shown_with_that_of_eval_mode() -> None:
    torch.manual_seed(0)
    conv = Standardised(3, 4, 3)
    with torch.no_grad():
        conv.weight.add_(1)  # which the class takes away
    network = surgeon.kernels(nn.Sequential(conv).train()).networks[0]
    assert close(network.layers[0].matrix, by_hand(conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)), 1e-6)


def test_convs_that_have_no_kernel_of_their_own_are_left_out() -> None:
    net = nn.Sequential(Twice(3, 3, 3), nn.Conv2d(3, 3, 3, dtype=torch.complex64), nn.Conv2d(3, 3, 3))
    network = surgeon.kernels(net).networks[0]
    assert [layer.path for layer in network.layers] == ["2"]
    assert "class Twice does something else than one convolution" in dict(network.left_out)["0"]
    assert "complex" in dict(network.left_out)["1"]


def test_a_functional_conv_is_one_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.kernel)

    net = Net()
    layers = surgeon.kernels(net).networks[0].layers
    assert [layer.kind for layer in layers] == ["conv2d"]
    assert close(layers[0].matrix, by_hand(net.kernel), 1e-6)


def test_a_conv_of_two_names_counts_once() -> None:
    conv = nn.Conv2d(3, 3, 3)
    assert surgeon.kernels(nn.Sequential(conv, nn.ReLU(), conv)).networks[0].averages[0].layers == 1


@pytest.mark.parametrize(("number", "why"), [(0.0, "zero"), (float("nan"), "numbers that are none")])
def test_a_kernel_that_has_no_matrix_is_left_out_with_the_reason(number: float, why: str) -> None:
    net = convs()
    with torch.no_grad():
        net[0].weight.fill_(number)
    network = surgeon.kernels(net).networks[0]
    assert [layer.path for layer in network.layers] == ["2"]
    assert why in dict(network.left_out)["0"]


def test_a_branch_that_is_zero_has_a_matrix_of_zeros() -> None:
    net = surgeon.convert(convs(), "acnet", example=EXAMPLE)  # the other branches start at gamma 0
    layer = surgeon.kernels(net).networks[0].layers[0]
    assert {branch.name: branch.share > 0 for branch in layer.branches} == {
        "square_conv": True,
        "ver_conv": False,
        "hor_conv": False,
    }
    assert layer.branches[1].matrix == ((0.0,) * 3,) * 3


def test_other_convs_are_left_out_and_said_to_be() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3), nn.Conv2d(3, 3, 1))
    network = surgeon.kernels(net).networks[0]
    assert [layer.path for layer in network.layers] == ["0"]
    assert list(dict(network.left_out)) == ["1"]


@pytest.mark.parametrize("net", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1)), nn.ConvTranspose2d(3, 3, 3)])
def test_a_network_without_such_convs_is_refused(net: nn.Module) -> None:
    with pytest.raises(FigureError, match="has no conv whose kernel has more than one tap"):
        surgeon.kernels(net)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(FigureError, match="no network was given"):
        surgeon.kernels([])
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 3, 3))
    with pytest.raises(ModelError, match="hold no numbers"):
        surgeon.kernels(net)


def test_half_precision_is_summed_in_float64() -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 3).half())
    with torch.no_grad():
        net[0].weight.fill_(60000.0)  # a sum of two is no float16 any more
    assert close(surgeon.kernels(net).networks[0].layers[0].matrix, [[1.0] * 3] * 3)


def test_networks_have_letters_and_names() -> None:
    two = surgeon.kernels([convs(), convs()]).networks
    assert [(one.label, one.name) for one in two] == [("(a)", "Sequential 1"), ("(b)", "Sequential 2")]
    named = surgeon.kernels({"mine": convs()}).networks
    assert [(one.label, one.name) for one in named] == [("(a)", "mine")]


def test_layers_lie_in_the_order_of_the_modules() -> None:
    net = convs()
    mixed = nn.Sequential(surgeon.convert(convs(), "acnet", example=EXAMPLE), net)
    assert [layer.path for layer in layers_of(mixed).found] == ["0.0", "0.2", "1.0", "1.2"]


def test_it_prints_and_is_plain_data() -> None:
    found = surgeon.kernels(convs())
    assert "(a) Sequential" in str(found)
    assert "untrained" in found._repr_html_()
    data = found.to_dict()
    assert data["networks"][0]["averages"][0]["shape"] == (3, 3)

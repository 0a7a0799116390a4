"""Whatever is linear becomes one conv, and nothing else does: random graphs, blocks of papers, networks of timm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import relative, run_surgeon, shake_
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_nets import (
    LINEAR,
    SUMS,
    AsymmetricBlock,
    DiverseBranch,
    MobileOneBlock,
    Nested,
    Op,
    OrepaBlock,
    RandomNet,
    RepVGGBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.analysis.network import Network
from surgeon.analysis.run import observe
from surgeon.errors import PlanError
from surgeon.surgery.branches import fold_further_
from surgeon.surgery.further import Done, Further

BOTH = Further(branches=True, norms=True)
NONLINEAR = ("relu", "square", "softmax", "max")


def folded(model: nn.Module, how: Further = BOTH, example: Tensor | None = None) -> tuple[nn.Module, Done]:
    """Fold a copy; with an example, a run shows what a graph does not."""
    made = deepcopy(model)
    run = None if example is None else observe(made, [example])
    return made, fold_further_(Network(made), how, run=run)


def all_close(model: nn.Module, made: nn.Module, channels: int, size: tuple[int, int] = (7, 6)) -> bool:
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = made(x), model(x)
    pairs = zip(*((out if isinstance(out, tuple) else (out,)) for out in (ours, theirs)), strict=True)
    return all(relative(b, a) <= 1e-12 for b, a in pairs)


def convs_in(model: nn.Module) -> int:
    return sum(isinstance(one, nn.Conv2d | nn.Linear) for one in model.modules())


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(one, nn.BatchNorm2d | nn.BatchNorm1d) for one in model.modules())


@st.composite
def operations(draw: st.DrawFn, kinds: tuple[str, ...] = LINEAR, least: int = 2, most: int = 8) -> list[Op]:
    """Draw steps, each of which reads the last value or an earlier one."""
    made: list[Op] = []
    for i in range(draw(st.integers(least, most))):
        kind = draw(st.sampled_from((*kinds, *SUMS)))
        reads = tuple(draw(st.sampled_from((i, i, max(0, i - 1), 0))) for _ in range(2 if kind in SUMS else 1))
        made.append(Op(kind, reads, draw(st.tuples(*[st.integers(0, 5)] * 3))))
    return made


def drawn(ops: list[Op], seed: int, **options: Any) -> RandomNet:
    torch.manual_seed(seed)
    return shake_(RandomNet(ops, **options)).double().eval()


def test_random_linear_graphs_compute_what_they_did() -> None:
    """A thousand of them; in most others something pads between two convs, and that is refused."""
    count = 0

    @settings(deadline=None, derandomize=True, max_examples=1000)
    @given(operations(), st.integers(0, 99))
    def check(ops: list[Op], seed: int) -> None:
        nonlocal count
        model = drawn(ops, seed)
        made, done = folded(model)
        assert all_close(model, made, 4)
        assert convs_in(made) <= convs_in(model)
        count += bool(done.folded)

    check()
    assert count > 250


@settings(deadline=None, derandomize=True, max_examples=300)
@given(operations(), operations(least=1, most=4), st.sampled_from((*NONLINEAR, "shared")), st.integers(0, 99))
def test_nothing_is_folded_across_what_is_not_linear_or_read_elsewhere(
    before: list[Op], after: list[Op], kind: str, seed: int
) -> None:
    """A step in the middle that is not linear, or whose value is also given out: what comes out is still the same."""
    middle = len(before) + (kind != "shared")
    through = [Op(kind, (len(before),))] if kind != "shared" else []
    shifted = [Op(op.kind, tuple(middle + one for one in op.reads), op.numbers) for op in after]
    model = drawn([*before, *through, *shifted], seed, also=() if kind != "shared" else (len(before),))
    made, _ = folded(model)
    assert all_close(model, made, 4)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "RepVGG": (lambda: RepVGGBlock(6), 1),
    "RepVGG in groups": (lambda: RepVGGBlock(6, groups=3), 1),
    "MobileOne": (lambda: MobileOneBlock(6), 1),
    "DBB": (lambda: DiverseBranch(6), 1),
    "OREPA": (lambda: OrepaBlock(6), 1),
    "ACBlock": (lambda: AsymmetricBlock(6), 1),
    "nested": (lambda: Nested(6), 1),
    "nested in each other": (lambda: nn.Sequential(Nested(6), RepVGGBlock(6), DiverseBranch(6)), 3),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_papers_become_one_conv_each(name: str) -> None:
    build, count = BLOCKS[name]
    model = shake_(build()).double().eval()
    made, done = folded(model, Further(branches=True))
    assert all_close(model, made, 6)
    assert all_close(model, made, 6, (8, 9))
    assert (convs_in(made), norms_in(made)) == (count, 0)
    assert len(done.folded) == count


class Broadcasts(nn.Module):
    """A scale of eight channels makes eight maps of one."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.wide, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, :1] * self.gamma
        return F.relu(self.wide(y) + self.point(y))


class Columns(nn.Module):
    """A cut with an ellipsis in front is one of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(4, 4, (1, 2)), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.wide(x) + self.point(x)[..., 1:])


@pytest.mark.parametrize("kind", [Broadcasts, Columns])
def test_what_looks_like_channels_is_not_taken_for_them(kind: type[nn.Module]) -> None:
    model = kind().double().eval()
    made, _ = folded(model)
    assert all_close(model, made, 4)


def test_many_convs_in_a_row_are_looked_at_in_no_time() -> None:
    """Sixteen convs without an activation have a hundred and twenty sequences, most of them with enormous kernels."""
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, bias=False) for _ in range(16))).eval()
    start = time.process_time()
    _, done = folded(model)
    assert time.process_time() - start < 20
    assert not done


def test_variances_that_are_none_are_refused() -> None:
    model = shake_(RepVGGBlock(4)).double().eval()
    with torch.no_grad():
        model.zero.running_var[1] = -1.0
    _, done = folded(model)
    assert "a running variance is negative" in done.refused.values()
    model.zero.running_var[1], model.zero.eps = 0.0, 0.0
    _, done = folded(model)
    assert "the folded numbers are not finite" in done.refused.values()


def test_zeros_between_two_convs_are_refused_with_the_reason() -> None:
    model = shake_(DiverseBranch(6, careless=True)).double().eval()
    made, done = folded(model, Further(branches=True))
    assert all_close(model, made, 6)
    assert convs_in(made) > 1
    assert any("zeros that lie between two convs" in why for why in done.refused.values())


def test_what_costs_more_as_one_conv_is_folded_only_if_it_is_asked_for() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(16, 2, 1, bias=False), nn.Conv2d(2, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.up(self.down(x)) + x)

    model = Wide().double().eval()
    made, done = folded(model)
    assert convs_in(made) == 2
    assert any("7.20 times the multiply-adds" in why for why in done.refused.values())
    made, done = folded(model, Further(branches=True, costlier=True))
    assert convs_in(made) == 1
    assert all_close(model, made, 16)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("repvgg_a0", 64),
        ("mobileone_s0", 64),
        ("fastvit_t8", 64),
        ("repvit_m0_9", 64),
        ("repghostnet_050", 64),
        ("levit_128s", 224),
        ("nextvit_small", 64),
        ("repvgg_d2se", 32),
    ],
)
def test_networks_of_timm_have_no_more_than_what_timm_leaves(name: str, size: int) -> None:
    model = shake_(timm.create_model(name), gently=True).double().eval()
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    made, _ = folded(model, Further(branches=True), x)
    with torch.no_grad():
        assert relative(made(x), model(x)) <= 1e-12
    theirs = timm.utils.reparameterize_model(model)
    count = [sum(one.numel() for one in net.parameters()) for net in (made, theirs)]
    assert count[0] <= count[1]
    assert norms_in(made) <= norms_in(theirs)


class Twice(nn.Module):
    """One conv that is called twice, with a norm on one of the ways (pytorch #104593)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) + F.relu(self.conv(x))


class NormTwice(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) + F.relu(self.norm(x))


class ReadsWeight(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) * self.conv.weight.abs().mean()


class InPlace(Twice):
    """The activation changes what the shortcut reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = F.relu_(y)
        return F.relu(y + self.norm(z))


class AddsToItsInput(Twice):
    """The caller's tensor is changed, and read again."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = F.relu(x)
        x += self.norm(self.conv(x))
        return x.relu() + y


class RowsFirst(Twice):
    """A norm of the transposed map, whose channels are rows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x).transpose(1, 2)))


class WithHook(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(_doubles)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


def _doubles(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


class Kept(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.aside = [self.conv]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + self.aside[0](x))


class SharedOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Twice(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.other[0] = self.one.conv

    def forward(self, x: Tensor) -> Tensor:
        one: Tensor = self.one.norm(self.one.conv(x))
        return F.relu(one) + self.other(x)


class NotTheSameEverywhere(Twice):
    """Pooling with a ragged border, and one that does not count what it pads: neither is the same at every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.relu(self.norm(self.conv(x)) + y)


class Random(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x) + 0 * F.dropout(x, 0.5, training=False)


KIN = (Twice, NormTwice, ReadsWeight, InPlace, AddsToItsInput, RowsFirst, WithHook, Kept, SharedOutside, Random)


@pytest.mark.parametrize("kind", [*KIN, NotTheSameEverywhere])
def test_kin_of_a_conv_called_twice_come_out_right_or_untouched(kind: type[nn.Module]) -> None:
    model = shake_(kind()).double().eval()
    made, _ = folded(model)
    assert all_close(model, made, 4, (4, 4) if kind is RowsFirst else (7, 6))


@pytest.mark.parametrize("name", ["origin", "program", "graph"])
def test_names_that_a_rewritten_graph_needs_are_refused(name: str) -> None:
    """A module of the user's under such a name would be hidden by what a rewritten module keeps there."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Conv2d(4, 4, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.get_submodule(name)(x) + x)

    model = Named().double().eval()
    made, done = folded(model)
    assert all_close(model, made, 4)
    assert any(f"its attribute {name} has a name" in why for why in done.refused.values())


def test_a_conv_that_is_called_twice_keeps_its_weights() -> None:
    model = shake_(Twice()).double().eval()
    made, done = folded(model)
    assert not done
    assert made.state_dict().keys() == model.state_dict().keys()


def test_norms_of_other_layers_are_folded_in() -> None:
    model = shake_(
        nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 4, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5, bias=False),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.BatchNorm1d(5),
            nn.Linear(5, 3),
        )
    )
    model = model.double().eval()
    made, done = folded(model, Further(norms=True), torch.randn(2, 4, 7, 6, dtype=torch.float64))
    assert norms_in(made) == 0
    assert done.norms == ["1"]
    assert all_close(model, made, 4)
    padded = shake_(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())).double().eval()
    assert norms_in(folded(padded, Further(norms=True))[0]) == 1  # its shift would stand where zeros are


def test_a_norm_of_lists_of_vectors_is_not_one_of_vectors() -> None:
    """On (n, l, c) a BatchNorm1d norms the second axis; l may well be as large as c."""
    model = shake_(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())).double().eval()
    lists, vectors = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert [norms_in(folded(model, BOTH, x)[0]) for x in (lists, vectors, None)] == [1, 0, 1]


class AddsTo(nn.Module):
    """`y += z` is traced as y + z: that y is what the caller gave, or what is read later, only the code tells."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.conv, self.same, self.where = nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), where

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(x) if self.where == "an alias" else x.clone()[:] if self.where == "nothing" else F.relu(x)
        z = y[:, :2] if self.where == "a view" else y
        y += self.conv(x)
        return F.relu(y) + z.mean() if self.where == "a view" else F.relu(y) + x


def test_an_activation_in_place_in_front_of_branches_does_no_harm() -> None:
    model = shake_(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), RepVGGBlock(4))).double().eval()

    class Inlined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = model[:2], model[2]

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return F.relu(self.block.three(x) + self.block.zero(x))

    made, done = folded(Inlined().double().eval(), Further(branches=True))
    assert [one.norms for one in done.folded.values()] == [2]
    assert all_close(Inlined().double().eval(), made, 4)


@pytest.mark.parametrize("recipe", ["acnet", "dbb", "repvgg"])
def test_blocks_whose_code_reads_their_parts_are_folded_before_branches(recipe: str) -> None:
    model = shake_(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())).double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    converted = surgeon.convert(model, recipe, x)
    made = surgeon.fuse(converted, x, branches=True, norms=True)
    with torch.no_grad():
        assert relative(made(x), converted(x)) <= 1e-12
    assert isinstance(made[0], nn.Conv2d)


@pytest.mark.parametrize("where", ["an alias", "a view", "nothing"])
def test_what_is_added_in_place_is_found_in_the_code(where: str) -> None:
    model = AddsTo(where).double().eval()
    made, done = folded(model)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        assert relative(made(x.clone()), model(x.clone())) <= 1e-12
    if where == "an alias":
        assert any("changes in place what other steps read" in why for why in done.refused.values())


def test_a_graph_that_would_lose_an_addition_in_place_is_not_written() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x *= 0.5  # which the caller sees
            return F.relu(self.wide(x) + self.point(x))

    model = Outer().double().eval()
    made, done = folded(model)
    given = torch.ones(1, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        made(given)
    assert given.unique().tolist() == [0.5]
    assert any("changes in place what it was given" in why for why in done.refused.values())


def test_norms_stay_where_branches_alone_are_asked_for() -> None:
    model = shake_(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), RepVGGBlock(4))).double().eval()
    made, done = folded(model, Further(branches=True))
    assert [*done.folded] == ["3.three"]
    assert norms_in(made) == 1


def test_a_folded_network_is_proved_by_its_history_and_survives_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shake_(timm.create_model("repghostnet_050"), gently=True).eval()
    made = surgeon.fuse(model, (1, 3, 64, 64), branches=True, norms=True)
    report = surgeon.verify(model, made, (2, 3, 64, 64))
    assert report.equivalent, report
    path = tmp_path / "made.pt"
    surgeon.save(made, path)
    again = surgeon.load(path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(x), made(x))
    assert surgeon.verify(model, again, (2, 3, 64, 64)).equivalent
    with torch.no_grad():
        conv = next(one for one in again.modules() if isinstance(one, nn.Conv2d))
        conv.weight[0, 0, 0, 0] += 1e-6 * conv.weight.abs().max()
    assert not surgeon.verify(model, again, (2, 3, 64, 64)).equivalent


def test_blocks_and_branches_are_folded_together() -> None:
    model = shake_(
        nn.Sequential(RepVGGBlock(4), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    )
    model.eval()
    converted = shake_(surgeon.convert(model, "acnet", (1, 4, 9, 9)))
    made = surgeon.fuse(converted, (1, 4, 9, 9), branches=True, norms=True)
    assert (convs_in(made), norms_in(made)) == (2, 0)
    assert surgeon.verify(converted, made, (1, 4, 9, 9)).equivalent


class ByName(nn.Module):
    """Blocks that are linear as a whole, but called by the name of their input, read, or asked for their class."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.block, self.way = _Linear(), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "class":
            assert isinstance(self.block, _Linear)
        y = self.block(feats=x) if self.way == "keyword" else self.block(x)
        return F.relu(y * self.block.factor if self.way == "attribute" else y)


class _Linear(nn.Module):
    factor = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, feats: Tensor) -> Tensor:
        return self.wide(feats) + self.point(feats)


@pytest.mark.parametrize("way", ["keyword", "attribute", "class"])
def test_a_module_of_the_users_keeps_its_class_and_how_it_is_called(way: str) -> None:
    model = ByName(way).double().eval()
    made = surgeon.fuse(model, (1, 4, 7, 6), branches=True)
    assert all_close(model, made, 4)
    assert convs_in(made) == 1


class Loops(nn.Module):
    """A Sequential that is taken apart by code that no graph shows, and a weight that is read there."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.rows, self.way = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), way

    def forward(self, x: Tensor) -> list[Tensor]:
        if float(x.sum()) > 1e9:
            return [x]
        if self.way == "weight":
            return [self.rows(x), F.conv2d(x, self.rows[0].weight)]
        found = []
        for row in self.rows:
            x = row(x)
            found.append(x)
        return found


@pytest.mark.parametrize("way", ["loop", "weight"])
def test_norms_stay_where_code_without_a_graph_takes_modules_apart(way: str) -> None:
    model = shake_(Loops(way)).double().eval()
    made = surgeon.fuse(model, (1, 4, 7, 6), norms=True)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        assert all(relative(b, a) <= 1e-12 for a, b in zip(model(x), made(x), strict=True))
    assert norms_in(made) == 1


def test_a_graph_that_cannot_be_kept_is_a_reason_and_no_error() -> None:
    class Anything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, *xs: Tensor) -> Tensor:
            return F.relu(self.wide(xs[0]) + self.point(xs[0]))

    model = nn.Sequential(Anything()).double().eval()
    made, done = folded(model)
    assert all_close(model, made, 4)
    assert convs_in(made) in (1, 2)
    assert convs_in(made) == 1 or any("*xs" in why for why in done.refused.values())


def test_a_norm_whose_scale_is_computed_stays() -> None:
    class Softplus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(x)

    model = shake_(RepVGGBlock(4)).eval()
    torch.nn.utils.parametrize.register_parametrization(model.zero, "weight", Softplus())
    made = surgeon.fuse(model, (1, 4, 9, 9), branches=True)
    x = torch.randn(1, 4, 9, 9)
    assert relative(made(x), model(x)) < 1e-6


def test_numbers_are_rounded_once() -> None:
    """A branch inside a branch is folded in two steps; what is stored is the float64 result, rounded."""
    model = shake_(Nested(6)).eval()
    exact, _ = folded(deepcopy(model).double(), Further(branches=True))
    made, _ = folded(model, Further(branches=True))
    ours, theirs = made.state_dict(), exact.state_dict()
    assert all(torch.equal(ours[key], theirs[key].float()) for key in theirs)


def test_what_float16_does_not_hold_is_not_folded() -> None:
    model = shake_(RepVGGBlock(4)).half().eval()
    with torch.no_grad():
        model.one[1].weight.fill_(6e4)
        model.one[1].running_var.fill_(1e-3)
    _, done = folded(model, Further(branches=True))
    assert any("65504" in why for why in done.refused.values())


def test_what_fails_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shake_(nn.Sequential(RepVGGBlock(4), Nested(4))).eval()
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, [type(one) for one in model.modules()]

    def fails(*_: object) -> float:
        raise PlanError("it fails at the end", todo="")

    monkeypatch.setattr("surgeon.surgery.fuse._distance", fails)
    with pytest.raises(PlanError, match="at the end"):
        surgeon.fuse_(model, (1, 4, 9, 9), branches=True)
    assert [type(one) for one in model.modules()] == modules
    assert all(torch.equal(model.state_dict()[key], one) for key, one in before.items())
    with pytest.raises(PlanError, match="to be kept, and to be folded"):
        surgeon.fuse(model, (1, 4, 9, 9), branches=True, keep_norms=True)


def test_the_command_says_what_it_folded_and_what_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, made = tmp_path / "net.pt", tmp_path / "made.pt"
    model = shake_(nn.Sequential(RepVGGBlock(4), DiverseBranch(4, careless=True))).eval()
    torch.save(model, path)
    allow = ("--allow", "linear_nets")
    assert run_surgeon("fuse", path, *allow, "--branches", "-i", "1,4,9,9", "-o", made) == 0
    out = capsys.readouterr().out
    assert "0.three (2 convs, 3 norms, 2 other steps)" in out
    assert "zeros that lie between" in " ".join(out.split())
    assert run_surgeon("verify", path, made, *allow, "-i", "1,4,9,9") == 0
    assert run_surgeon("fuse", path, *allow, "--all", "--blocks", "-i", "1,4,9,9", "-o", tmp_path / "x.pt") == 2
    capsys.readouterr()
    assert run_surgeon("fuse", path, *allow, "--all", "--json", "-i", "1,4,9,9", "-o", tmp_path / "y.pt") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["branches"][0]["convs"] == 2
    assert said["refused"]

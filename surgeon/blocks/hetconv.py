"""HetConv: of the M input channels of a filter, M/P get a K×K kernel and the others a single centre tap.

    y_i = Σ_{j ∈ S(i)} F_ij ∗ x_j  +  Σ_{j ∉ S(i)} w_ij · x_j,   |S(i)| = M/P

It is exactly the dense convolution whose off-centre taps are zero outside the K×K pairs, at 1/P + (1 − 1/P)/K² of its
cost. It is executed as a K×K convolution in P groups and a 1×1 convolution over all channels, 1/P + 1/K²: the pairs
inside a group have their centre tap in the K×K kernel, and the 1×1 kernel is zero there, by construction. Only the taps
that the function has are parameters, so training and weight decay cannot pull two copies of one tap apart. Deployed, it
is these two convs, as plain ones of torch.

Which pairs are K×K is the layout, for filter i of N:

    block         S(i) = the ⌊i·P/N⌋-th run of M/P channels
    interleaved   S(i) = {j : j ≡ i mod P}
    best          P groups of filters and of channels such that the pairs within them hold much off-centre energy,
                  Σ F_ij² over all taps but the centre: what a trained conv loses is what the other pairs hold

With filters and channels sorted by group, groups are runs: everything here happens in that order ("sorted").

Singh et al. 2019, HetConv, arXiv:1903.04120, section 3 and eq. 3–6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon.blocks import base, sum_of_convs
from surgeon.blocks import het_layouts as layouts
from surgeon.blocks.base import Trial
from surgeon.blocks.fittable import Arrangement, Fittable, Path, View
from surgeon.blocks.het_in_one_pass import HetInOnePass
from surgeon.conv import kernels
from surgeon.conv.grouping import share_kept
from surgeon.conv.least_squares import Problem
from surgeon.conv.spec import ConvSpec

Layout = Literal["block", "interleaved", "best"]


class HetConvOptions(base.BlockOptions):
    """How many channels of a filter keep their K×K kernels, which ones, and what they start with."""

    p: int = Field(
        4, ge=2, description="one in p channels of a filter keeps its k×k kernel; p divides both channel counts"
    )
    layout: Layout = Field(
        "block",
        description="the k×k channels of a filter: a run of channels (block), every p-th one (interleaved), or those "
        "where the conv's off-centre energy is (best; costs two gathers of the feature map)",
    )
    init: Literal["project", "scratch"] = Field(
        "project", description="project: as near as possible to the conv's weights; scratch: a random start"
    )

    @model_validator(mode="after")
    def _best_needs_weights(self) -> Self:
        if self.layout == "best" and self.init == "scratch":
            raise ValueError("layout: best is found in trained weights, which init: scratch does not use")
        return self


class HetConv(Fittable[HetConvOptions], base.Foldable[HetConvOptions], base.Deployable[HetConvOptions]):
    """A cheaper stand-in for a dense k×k conv: (n, c_in, h, w) → (n, c_out, h', w'). Approximates it, by design.

    Parameters, with filters and channels sorted: `weight` (out, in/p, kh, kw), the k×k kernels of a group's filters
    over its channels, and `pointwise` (out, in − in/p), the centre taps over the channels of all other groups. Layout
    `best` has two buffers: `channel_order` (in), the channel at each sorted place, and `filter_place` (out), the
    sorted place of each filter.
    """

    __module__ = "surgeon.nn"

    name = "hetconv"
    title = "k×k kernels for one in p channels of a filter, 1×1 for the others; fuse makes two plain convs of it"
    paper = "Singh et al. 2019, HetConv, arXiv:1903.04120"
    Options = HetConvOptions
    folds_for_free = False
    deployed_since = deployed_so_since = 2
    pads_its_input = True
    DERIVED = frozenset({"grouped", "centre", "centre_shift"})
    is_cheaper = True

    def __init__(self, spec: ConvSpec, p: int, layout: Layout, *, like: Tensor) -> None:
        """Lay out parameters like `like`, uninitialised."""
        super().__init__()
        self.spec, self.p, self.layout = spec, p, layout
        self.derive_()
        conv = self.grouped.build(like=like)
        self.weight, self.bias = conv.weight, conv.bias
        self.pointwise = nn.Parameter(like.new_empty(spec.c_out, spec.c_in - spec.c_in // p))
        self.channel_order: Tensor
        self.filter_place: Tensor
        if layout == "best":
            self.register_buffer("channel_order", torch.arange(spec.c_in, device=like.device))
            self.register_buffer("filter_place", torch.arange(spec.c_out, device=like.device))

    def derive_(self) -> None:
        """Find the specs of the two convs, and how the input of the 1×1 one is shifted."""
        kh, kw = self.spec.kernel
        self.grouped = self.spec.inner.change(groups=self.p)
        self.centre, self.centre_shift = self.spec.inner.part((1, 1), row=kh // 2, column=kw // 2)

    @classmethod
    def refusal(cls, spec: ConvSpec, size: tuple[int, int] | None, options: HetConvOptions) -> str | None:
        kh, kw = spec.kernel
        if spec.kernel == (1, 1):
            return "a 1x1 kernel has nothing to leave out"
        if even := [k for k in spec.kernel if k % 2 == 0]:
            return f"kernel {kh}x{kw} has no centre tap: {even[0]} is even"
        if spec.groups != 1:
            return f"it has {spec.groups} groups already; HetConv thins out a dense conv"
        common = math.gcd(spec.c_in, spec.c_out)
        if common % options.p:
            would = [str(p) for p in range(2, common + 1) if common % p == 0]
            counts = f"{spec.c_in} input and {spec.c_out} output channels cannot be cut into {options.p} parts"
            return f"{counts}; {', '.join(would)} would do" if would else f"{counts}, nor into any other number"
        return None

    @classmethod
    def keeps_function(cls, options: HetConvOptions) -> bool:
        return False

    @classmethod
    def note(cls, options: HetConvOptions, norm_obstacle: str | None) -> str | None:
        if options.init == "scratch":
            return "starts at random: what the conv has learnt is lost"
        return "approximates the conv: taps are left out; fit or retrain the network"

    @classmethod
    def settings(cls, options: HetConvOptions) -> list[HetConvOptions]:
        return [options.model_copy(update={"p": p}) for p in sorted({2, 4, 8, 16, options.p})]

    @classmethod
    def remedy(cls, reason: str) -> str | None:
        return "another `p` would change that" if "would do" in reason else None

    @classmethod
    def ideal_share(cls, spec: ConvSpec, options: HetConvOptions) -> float:
        """The paper's share, 1/P + (1 − 1/P)/K² (eq. 6); the zeros of the 1×1 kernel are executed, too."""
        kh, kw = spec.kernel
        return 1 / options.p + (1 - 1 / options.p) / (kh * kw)

    @classmethod
    def kept_energy(cls, weight: Tensor, options: HetConvOptions) -> dict[str, float] | None:
        if options.init == "scratch":
            return None
        energy, known = layouts.off_centre_energy(weight), layouts.fixed_groups(weight, options.p)
        if options.layout == "best":
            known["best"] = layouts.best_groups(layouts.off_centre_energy(weight), options.p)
        return {layout: share_kept(energy, *groups) for layout, groups in known.items()}

    @classmethod
    def kept_in_words(cls, kept: Mapping[str, float], options: HetConvOptions) -> str:
        others = ", ".join(f"{layout} {share:.0%}" for layout, share in kept.items() if layout != options.layout)
        return f"keeps {kept.get(options.layout, math.nan):.0%} of the energy off the centre ({others})"

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, options: HetConvOptions, *, norm: nn.Module | None, generator: torch.Generator
    ) -> Self:
        block = cls(ConvSpec.of(conv), options.p, options.layout, like=conv.weight)
        dense: Tensor = conv.weight
        if options.layout == "best" and not dense.is_meta:
            block._group_(layouts.best_groups(layouts.off_centre_energy(dense), options.p))
        if options.init == "scratch":
            fan_in = block.weight[0].numel() + block.pointwise.shape[1]
            dense = base.uniform(tuple(dense.shape), fan_in, generator, like=dense)
        with torch.no_grad():
            block._project_(dense, conv.bias)
        block.weight.requires_grad_(conv.weight.requires_grad)
        block.pointwise.requires_grad_(conv.weight.requires_grad)
        if block.bias is not None and conv.bias is not None:
            block.bias.requires_grad_(conv.bias.requires_grad)
        return block.train(conv.training)

    @classmethod
    def from_grouped_and_pointwise(cls, grouped: nn.Conv2d, pointwise: nn.Conv2d) -> Self:
        """Convert the pair that other code calls HetConv: a grouped k×k conv plus a dense 1×1 conv, summed.

        Its 1×1 kernel has taps inside the groups too; they are added to the centre taps of the k×k kernels, so the
        function is the same. Both convs as `nn.Conv2d` lays them out (layout `block`); biases are summed.

        Raises:
            ValueError: the convs do not see the same pixels, or are not such a pair.
        """
        spec, other = ConvSpec.of(grouped), ConvSpec.of(pointwise)
        (kh, kw), biases = spec.kernel, [conv.bias for conv in (grouped, pointwise) if conv.bias is not None]
        dense = spec.change(groups=1, bias=bool(biases))
        centre, shift = dense.part((1, 1), row=kh // 2, column=kw // 2)
        if spec.groups < 2 or shift is not None or other != centre.change(bias=other.bias, dilation=other.dilation):
            raise ValueError(f"{spec} and {other} are not a grouped conv and the 1x1 conv at its centre")
        block = cls(dense, spec.groups, "block", like=grouped.weight)
        with torch.no_grad():
            none = grouped.weight.new_zeros(block.pointwise.shape, dtype=torch.float64)
            kernel = block._spread(grouped.weight.double(), none)
            kernel += kernels.embed(pointwise.weight.double(), spec.kernel, row=kh // 2, column=kw // 2)
            block._project_(kernel, torch.stack(biases).double().sum(0) if biases else None)
        return block.train(grouped.training)

    @classmethod
    def trials(cls) -> Iterator[Trial]:
        specs = [
            ConvSpec(8, 12, (3, 3), padding=(1, 1)),
            ConvSpec(8, 4, (3, 3), padding=(0, 2), stride=(2, 1), bias=False),
            ConvSpec(8, 8, (5, 3), padding="same", dilation=(1, 2), padding_mode="circular"),
        ]
        for spec in specs:
            for options in (
                {"p": 2},
                {"p": 4, "layout": "interleaved"},
                {"p": 2, "layout": "interleaved", "init": "scratch"},
                {"p": 4, "layout": "best"},
            ):
                yield Trial(spec, HetConvOptions.model_validate(options))

    def role(self) -> base.Role:
        return {"p": self.p, "layout": self.layout}

    def forward(self, input: Tensor) -> Tensor:
        spec = self.spec
        x = self._sorted(spec.padded(input))
        seen = x if self.centre_shift is None else kernels.shift(x, self.centre_shift, spec.padding_mode)
        y = kernels.convolve(x, self.weight, None, self.grouped)
        y = kernels.add_convolved_(y, seen, self._pointwise_kernel(), self.centre)
        if self.layout == "best":
            y = y.index_select(1, self.filter_place)
        elif self.layout == "interleaved":
            y = F.channel_shuffle(y, self.p)
        return y if self.bias is None else y + self.bias[:, None, None]

    def fold(self) -> nn.Conv2d:
        """Return the dense conv that computes the same, with zeros where HetConv has no taps, at its full cost."""
        with torch.no_grad():
            dense = self._spread(self.weight, self.pointwise)
        conv = self.spec.build_with(dense, self.bias, like=self.weight)
        conv.requires_grad_(self.weight.requires_grad)
        return conv.train(self.training)

    to_dense = fold

    def undeployable(self) -> str | None:
        if self.spec.pads_input is None:
            return None
        return "it pads its input by a rule of its own, which no plain module does"

    def deploy(self) -> nn.Module:
        """Return the sum of a k×k conv in p groups and a 1×1 conv, both plain ones of torch; see `sum_of_convs`.

        The 1×1 conv sees and gives channels in the network's own order, so only the k×k conv needs them sorted.
        """
        spatial, pointwise, orders = self._convs(bias_first=False)
        centre = sum_of_convs.seeing(pointwise, self.centre_shift, self.spec.padding_mode)
        return sum_of_convs.make(spatial, centre, **orders).train(self.training)

    def forms(self) -> Mapping[str, Callable[[], nn.Module]]:
        """`plain`: the sum of two convs; `dense`: one conv, with all the multiply-adds of the one it stands for.

        `product`: the 1×1 conv as a matrix product that adds its result to what the other conv gives. `one pass`: one
        kernel on CUDA.
        """
        found: dict[str, Callable[[], nn.Module]] = {**super().forms(), "dense": self.fold}
        centre = self.centre
        if self.centre_shift is None and centre.stride == (1, 1) and not any(centre.pads) and centre.groups == 1:
            found["product"] = self._product
        return found | ({HetInOnePass.form: self._in_one_pass} if HetInOnePass.fits(self.spec) else {})

    def is_tried_on(self, form: str, device: str) -> bool:
        return form != HetInOnePass.form or HetInOnePass.has_kernel_on(device)

    def _product(self) -> nn.Module:
        spatial, pointwise, orders = self._convs(bias_first=True)
        matrix = nn.Parameter(pointwise.weight.detach()[:, :, 0, 0].clone(), pointwise.weight.requires_grad)
        return sum_of_convs.make(spatial, matrix, **orders).train(self.training)

    def _convs(self, *, bias_first: bool) -> tuple[nn.Conv2d, nn.Conv2d, dict[str, Tensor]]:
        """Make the k×k and the 1×1 conv, one of which has the bias, and the orders around the first."""
        filters, channels = self._orders()
        with torch.no_grad():
            kernel = self._pointwise_kernel()[filters.argsort()][:, channels.argsort()]
            sorted_bias = None if self.bias is None else self.bias[filters]
        biases = (sorted_bias, None) if bias_first else (None, self.bias)
        spatial = self.grouped.build_with(self.weight.detach(), biases[0], like=self.weight)
        pointwise = self.centre.change(dilation=(1, 1)).build_with(kernel, biases[1], like=self.weight)
        spatial.requires_grad_(self.weight.requires_grad)
        pointwise.requires_grad_(self.pointwise.requires_grad)
        orders = {"channel_order": channels.clone(), "filter_place": filters.argsort()}
        return spatial, pointwise, {} if self.layout == "block" else orders

    def _in_one_pass(self) -> nn.Module:
        filters, channels = self._orders()
        orders = None if self.layout == "block" else (channels, filters)
        kernel = self._pointwise_kernel().detach().requires_grad_(self.pointwise.requires_grad)
        return HetInOnePass(self.spec, self.weight, kernel, self.bias, orders).train(self.training)

    def with_norm(self, norm: nn.Module) -> Self:
        block = type(self)(self.spec.change(bias=True), self.p, self.layout, like=self.weight)
        with torch.no_grad():
            if self.layout == "best":
                block.channel_order.copy_(self.channel_order)
                block.filter_place.copy_(self.filter_place)
            kernel = self._spread(self.weight.double(), self.pointwise.double())
            bias = None if self.bias is None else self.bias.double()
            block._project_(*kernels.fold_bn(kernel, bias, kernels.Norm.of(norm).double()))
        return block.train(self.training)

    def views(self, input: Tensor) -> tuple[View, ...]:
        spec = self.spec
        return (View("all", ((0, spec.c_out),), (Path(input, spec.change(bias=False), ((0, spec.c_in),)),)),)

    def take_kernel_(self, kernel: Tensor, bias: Tensor | None) -> None:
        with torch.no_grad():
            self._project_(kernel, bias)

    def arrangements(self, view: View, problem: Problem, kernel: Tensor, weight: Tensor) -> Iterator[Arrangement]:
        """Give the layout; for `best`, the groups that each energy leads to, those of the weights first."""
        for one in self._groupings(problem, kernel, weight):
            yield Arrangement(layouts.kept(one, self.spec.kernel), partial(self._group_, one))

    def _groupings(self, problem: Problem, kernel: Tensor, weight: Tensor) -> Iterator[layouts.Groups]:
        yield self._groups()
        if self.layout == "best":
            for energy in layouts.energies(kernel, problem.second[0]):
                yield layouts.best_groups(energy * weight[:, None], self.p)
            yield from layouts.fixed_groups(kernel, self.p).values()

    def extra_repr(self) -> str:
        return f"{self.spec}, p={self.p}, layout={self.layout}"

    def _sorted(self, x: Tensor) -> Tensor:
        """Bring the channels of (n, in, h, w) into group order."""
        if self.layout == "best":
            return x.index_select(1, self.channel_order)
        return x if self.layout == "block" else F.channel_shuffle(x, self.spec.c_in // self.p)

    def _groups(self) -> layouts.Groups:
        """Give the group of every filter and of every channel."""
        filters, channels = self._orders()
        c_out, c_in = self.spec.c_out, self.spec.c_in
        return filters.argsort() * self.p // c_out, channels.argsort() * self.p // c_in

    def _group_(self, groups: layouts.Groups) -> None:
        """Sort filters and channels by groups; only `best` has others than those of its layout."""
        if self.layout == "best":
            filters, channels = groups
            self.channel_order.copy_(channels.argsort(stable=True))
            self.filter_place.copy_(filters.argsort(stable=True).argsort())

    def _orders(self) -> tuple[Tensor, Tensor]:
        """Give the filter and the channel at each sorted place."""
        if self.layout == "best":
            return self.filter_place.argsort(), self.channel_order
        counts = (torch.arange(count, device=self.weight.device) for count in (self.spec.c_out, self.spec.c_in))
        filters, channels = (c if self.layout == "block" else c.view(-1, self.p).t().flatten() for c in counts)
        return filters, channels

    def _pointwise_kernel(self) -> Tensor:
        """The 1×1 kernel over all sorted channels, (out, in, 1, 1), zero inside the groups."""
        taps = self.pointwise.view(self.p, -1, self.p - 1, self.spec.c_in // self.p).transpose(1, 2)
        full = layouts.with_diagonal(taps).transpose(1, 2)  # (group, filter, group, channel)
        return full.reshape(self.spec.c_out, self.spec.c_in, 1, 1)

    def _cut(self, kernel: Tensor) -> Tensor:
        """View a sorted dense kernel (out, in, kh, kw) as (group, group, filter, channel, kh, kw)."""
        return kernel.view(self.p, -1, self.p, self.spec.c_in // self.p, *self.spec.kernel).transpose(1, 2)

    def _spread(self, weight: Tensor, pointwise: Tensor) -> Tensor:
        """Lay the taps of the block into a dense kernel of zeros (out, in, kh, kw)."""
        (kh, kw), p = self.spec.kernel, self.p
        kernel = weight.new_zeros(self.spec.weight_shape)
        cut = self._cut(kernel)
        taps = pointwise.view(p, -1, p - 1, self.spec.c_in // p).transpose(1, 2)
        cut[..., kh // 2, kw // 2] = layouts.with_diagonal(taps)
        cut.diagonal(dim1=0, dim2=1).copy_(weight.view(p, -1, *weight.shape[1:]).movedim(0, -1))
        filters, channels = self._orders()
        return kernel[filters.argsort()][:, channels.argsort()]

    def _project_(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take over the taps that the block has from a dense kernel (out, in, kh, kw)."""
        kh, kw = self.spec.kernel
        filters, channels = self._orders()
        cut = self._cut(kernel[filters][:, channels].contiguous())
        self.weight.copy_(cut.diagonal(dim1=0, dim2=1).movedim(-1, 0).reshape(self.weight.shape))
        others = layouts.without_diagonal(cut[..., kh // 2, kw // 2])  # (group, other group, filter, channel)
        self.pointwise.copy_(others.transpose(1, 2).reshape(self.pointwise.shape))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

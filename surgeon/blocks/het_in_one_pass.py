"""HetInOnePass: a HetConv as it is deployed on a GPU, if that is measured to be its fastest form.

    y_i = Σ_{t ≠ centre} Σ_{j ∈ S(i)} F_ijt · x_j(t) + Σ_j w_ij · x_j(centre) + b_i

On CUDA, in channels_last, it is one kernel (`one_pass.het`), which computes every tap once. Elsewhere it is a k×k conv
in groups, with zeros in its centre, and a 1×1 conv.

Singh et al. 2019, HetConv, arXiv:1903.04120, section 3 and eq. 3–6.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from surgeon.blocks import base
from surgeon.blocks.sum_of_convs import is_order
from surgeon.conv import kernels
from surgeon.conv.spec import ConvSpec
from surgeon.one_pass import het, where


class HetInOnePass(base.Operator):
    """A HetConv to deploy: (n, c_in, h, w) → (n, c_out, h', w').

    Parameters, with filters and channels sorted by group: `weight` (out, in/p, kh, kw), whose centre taps are zero, and
    `pointwise` (out, in), the centre taps over all channels. `bias` is in the order of the network. Buffers, where
    groups are no runs: `channel_order` (in) and `filter_order` (out), the channel and the filter at each sorted place.
    """

    __module__ = "surgeon.nn"
    DERIVED = frozenset({"grouped", "centre", "centre_shift"})

    form = "one pass"  # as a history calls it

    bias: nn.Parameter | None
    channel_order: Tensor | None
    filter_order: Tensor | None

    def __init__(
        self,
        spec: ConvSpec,
        weight: Tensor,
        pointwise: Tensor,
        bias: Tensor | None,
        orders: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Take a k×k kernel in groups, the 1×1 kernel beside it, with zeros inside the groups, and what sorts them."""
        super().__init__()
        (kh, kw), (c_out, per_in) = spec.kernel, weight.shape[:2]
        self.spec, self.p = spec, spec.c_in // per_in
        self.derive_()
        made, centres = weight.detach().clone(), pointwise.detach().clone().view(self.p, -1, self.p, per_in)
        own = made[:, :, kh // 2, kw // 2].reshape(self.p, -1, per_in)
        for group in range(self.p):
            centres[group, :, group] = own[group]
        made[:, :, kh // 2, kw // 2] = 0
        self.weight = nn.Parameter(made, weight.requires_grad)
        self.pointwise = nn.Parameter(centres.view(c_out, spec.c_in), pointwise.requires_grad)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        )
        for name, order in zip(("channel_order", "filter_order"), orders or (None, None), strict=True):
            self.register_buffer(name, None if order is None else order.clone())

    def derive_(self) -> None:
        """Find the specs of the two convs, and how the input of the 1×1 one is shifted."""
        kh, kw = self.spec.kernel
        self.grouped = self.spec.change(groups=self.p)
        self.centre, self.centre_shift = self.spec.part((1, 1), row=kh // 2, column=kw // 2)

    @staticmethod
    def fits(spec: ConvSpec) -> bool:
        """Whether the kernel pads as a conv of this spec does."""
        return spec.pads_input is None and spec.padding_mode == "zeros"

    @staticmethod
    def has_kernel_on(device: str) -> bool:
        """Whether there may be a kernel on a kind of device."""
        return where.has_triton() and (device == "cuda" or where.on_cpu)

    def forward(self, input: Tensor) -> Tensor:
        orders = self.channel_order, self.filter_order
        if het.has_kernel(input, self.weight, self.pointwise, self.bias, *orders):
            top, _, left, _ = self.spec.pads
            moves = [*self.spec.stride], [top, left], [*self.spec.dilation]
            made: Tensor = het.convolve_op(input, self.weight, self.pointwise, self.bias, *orders, *moves)
            return made
        x = input if orders[0] is None else input.index_select(1, orders[0])
        seen = x if self.centre_shift is None else kernels.shift(x, self.centre_shift, "zeros")
        y = kernels.convolve(x, self.weight, None, self.grouped)
        y = kernels.add_convolved_(y, seen, self.pointwise[:, :, None, None], self.centre)
        if orders[1] is not None:
            y = y.index_select(1, orders[1].argsort())
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.spec}, p={self.p}"

    def __setstate__(self, state: Any) -> None:
        spec, p, held = state.get("spec"), state.get("p"), state.get("_parameters", {})
        if not isinstance(spec, ConvSpec) or type(p) is not int or p < 1 or spec.c_in % p or not self.fits(spec):
            raise ValueError("HetInOnePass does not say which conv it is")
        shapes = {"weight": (spec.c_out, spec.c_in // p, *spec.kernel), "pointwise": (spec.c_out, spec.c_in)}
        if any(not isinstance(held.get(name), Tensor) or held[name].shape != one for name, one in shapes.items()):
            raise ValueError("HetInOnePass holds other kernels than it says")
        if (bias := held.get("bias")) is not None and bias.shape != (spec.c_out,):
            raise ValueError("HetInOnePass holds something else in place of a bias")
        orders = [state.get("_buffers", {}).get(name) for name in ("channel_order", "filter_order")]
        counts = zip(orders, (spec.c_in, spec.c_out), strict=True)
        if any(order is not None for order in orders) and not all(
            is_order(order) and len(order) == count for order, count in counts
        ):
            raise ValueError("HetInOnePass holds something else in place of an order of channels")
        super().__setstate__(state)

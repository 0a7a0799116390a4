"""A conv without its weights: read one from an `nn.Conv2d`, build one, compare two."""

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import nn

from surgeon.conv.numbers import cast
from surgeon.conv.padding import PaddedConv2d, is_rule, padded
from surgeon.nn import FORMAT_KEY, known_format

Pair = tuple[int, int]
_Count = Annotated[int, Field(strict=True, ge=0)]  # as a plan may say it: `true` is no number
_Size = Annotated[int, Field(strict=True, ge=1)]


class Pads(NamedTuple):
    """Rows and columns added on each side of a feature map; a negative number crops."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def is_symmetric(self) -> bool:
        return self.top == self.bottom and self.left == self.right

    @property
    def is_crop(self) -> bool:
        return min(self) < 0


Pads.__module__ = "surgeon.nn"


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """Everything that makes up an `nn.Conv2d` except its numbers. Pairs are (height, width), as in torch.

    `pads_input` is how its input is padded with zeros first, where torch's own conv cannot do that: `same` as
    TensorFlow does, or (top, bottom, left, right). Such a conv has no other padding.
    """

    __module__ = "surgeon.nn"
    FORMAT: ClassVar[int] = 2  # 1 was the list of its fields
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # in plans

    c_in: _Count
    c_out: _Count
    kernel: tuple[_Size, _Size]
    stride: tuple[_Size, _Size] = (1, 1)
    padding: tuple[_Count, _Count] | Annotated[str, Field(pattern="^(same|valid)$")] = (0, 0)
    dilation: tuple[_Size, _Size] = (1, 1)
    groups: _Size = 1
    bias: Annotated[bool, Field(strict=True)] = True
    padding_mode: Annotated[str, Field(pattern="^(zeros|reflect|replicate|circular)$")] = "zeros"
    pads_input: Literal["same"] | tuple[_Count, _Count, _Count, _Count] | None = None

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """Read the spec of `conv`.

        >>> ConvSpec.of(nn.Conv2d(3, 8, 3, padding="same", bias=False))
        ConvSpec(3→8, 3x3, padding=same, no bias)
        """
        padding = conv.padding if isinstance(conv.padding, str) else _pair(conv.padding)
        rule = conv.pads_input if isinstance(conv, PaddedConv2d) else None
        return cls(
            c_in=conv.in_channels,
            c_out=conv.out_channels,
            kernel=_pair(conv.kernel_size),
            stride=_pair(conv.stride),
            padding=padding,
            dilation=_pair(conv.dilation),
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            pads_input=rule,
        )

    def build(self, *, like: torch.Tensor) -> nn.Conv2d:
        """Make the conv, uninitialised, with the dtype, device and memory format of `like`."""
        kind: Any = nn.Conv2d if self.pads_input is None else partial(PaddedConv2d, pads_input=self.pads_input)
        with torch.device("meta"):
            conv: nn.Conv2d = kind(
                self.c_in,
                self.c_out,
                self.kernel,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                bias=self.bias,
                padding_mode=self.padding_mode,
                dtype=like.dtype,
            )
        conv = conv.to_empty(device=like.device)
        return conv.to(memory_format=torch.channels_last) if is_channels_last(like) else conv

    def build_with(self, kernel: torch.Tensor, bias: torch.Tensor | None, *, like: torch.Tensor) -> nn.Conv2d:
        """Make the conv with these numbers, cast once to the dtype of `like`; it has a bias where one is given.

        >>> conv = ConvSpec(1, 1, (1, 1)).build_with(torch.ones(1, 1, 1, 1).double(), None, like=torch.empty(0))
        >>> conv.weight.dtype, conv.bias
        (torch.float32, None)

        Raises:
            PlanError: the dtype does not hold one of them.
        """
        conv = self.change(bias=bias is not None).build(like=like)
        with torch.no_grad():
            conv.weight.copy_(cast(kernel, like.dtype, "weight"))
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(cast(bias, like.dtype, "bias"))
        return conv

    def holding(self, conv: nn.Conv2d) -> nn.Conv2d:
        """Make the conv with the parameters of another one, such as a subclass that this spec was read from."""
        held = self.change(bias=conv.bias is not None).build(
            like=torch.empty(0, dtype=conv.weight.dtype, device="meta")
        )
        held.weight, held.bias = conv.weight, conv.bias
        return held.train(conv.training)

    def change(self, **fields: Any) -> Self:
        """Return this spec with some fields changed."""
        return replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Give its fields as plain data, without those that have their default.

        >>> ConvSpec(3, 8, (3, 3), padding="same").to_dict()
        {'c_in': 3, 'c_out': 8, 'kernel': [3, 3], 'padding': 'same'}
        """
        said = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}

    def __getstate__(self) -> dict[str, Any]:
        state = asdict(self)
        if self.pads_input is None:  # earlier versions do not know the field
            del state["pads_input"]
        return {FORMAT_KEY: self.FORMAT} | state

    def __setstate__(self, state: Any) -> None:
        """Read fields by name, or, as they were stored once, in their order; what is missing has its default."""
        names = [one.name for one in fields(self)]
        state = dict(zip(names, state, strict=False)) if isinstance(state, list | tuple) else dict(state)
        known_format(type(self), state)
        read = ConvSpec(**state)
        if read.pads_input is not None and not is_rule(read.pads_input):
            raise ValueError("a ConvSpec has a pads_input that is no rule")
        for name in names:
            object.__setattr__(self, name, getattr(read, name))

    @property
    def pads(self) -> Pads:
        """The padding in numbers, also where the conv says 'same' or 'valid' (torch puts the odd one last).

        What TensorFlow's SAME pads depends on the size; this is the most, and at stride 1 it is always that.
        """
        if isinstance(self.pads_input, tuple):
            return Pads(*self.pads_input)
        if self.padding == "valid" and self.pads_input is None:
            return Pads(0, 0, 0, 0)
        if "same" in (self.padding, self.pads_input):
            total_h, total_w = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
            return Pads(total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
        assert not isinstance(self.padding, str)
        ph, pw = self.padding
        return Pads(ph, ph, pw, pw)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Pad a map as the conv pads its input first; what comes out is for the `inner` conv."""
        if self.pads_input is None:
            return x
        return padded(x, self.pads_input, self.kernel, self.stride, self.dilation)

    @property
    def inner(self) -> Self:
        """The conv that works on the padded input, where one is padded first."""
        return self if self.pads_input is None else self.change(pads_input=None)

    @property
    def at_stride_1(self) -> Self:
        """The conv that, on a map that was pooled, gives as many pixels as this one does at its own stride."""
        if self.pads_input != "same":
            return self.change(stride=(1, 1))
        top, bottom, left, right = self.pads
        sides = {"padding": (top, left), "pads_input": None}
        is_symmetric = (top, left) == (bottom, right)
        return self.change(stride=(1, 1), **sides if is_symmetric else {"pads_input": (top, bottom, left, right)})

    def part(self, kernel: Pair, *, row: int, column: int) -> tuple[Self, Pads | None]:
        """Give the spec of a conv whose smaller kernel lies at (row, column) of this one and sees what it sees there.

        The second result says how its input must be padded or cropped first, where its own padding cannot do that.

        >>> ConvSpec(1, 1, (3, 3), padding=(1, 1)).part((1, 3), row=2, column=0)
        (ConvSpec(1→1, 1x3), Pads(top=-1, bottom=1, left=1, right=1))
        """
        (kh, kw), (dh, dw), pads = self.kernel, self.dilation, self.pads
        below, right = kh - kernel[0] - row, kw - kernel[1] - column
        sees = Pads(pads.top - row * dh, pads.bottom - below * dh, pads.left - column * dw, pads.right - right * dw)
        if sees.is_symmetric and not sees.is_crop:
            return self.change(kernel=kernel, padding=(sees.top, sees.left)), None
        return self.change(kernel=kernel, padding=(0, 0), padding_mode="zeros"), sees

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.c_in and self.groups > 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(out, in/groups, kh, kw)."""
        return (self.c_out, self.c_in // self.groups, *self.kernel)

    def __str__(self) -> str:
        words = [f"{self.c_in}→{self.c_out}", f"{self.kernel[0]}x{self.kernel[1]}"]
        if self.stride != (1, 1):
            words.append(f"stride={_short(self.stride)}")
        if self.pads_input is not None:
            words.append(f"padding={_in_words(self.pads_input)}")
        elif self.padding not in ((0, 0), "valid"):
            words.append(f"padding={self.padding if isinstance(self.padding, str) else _short(self.padding)}")
        if self.dilation != (1, 1):
            words.append(f"dilation={_short(self.dilation)}")
        if self.groups != 1:
            words.append("depthwise" if self.is_depthwise else f"groups={self.groups}")
        if self.padding_mode != "zeros":
            words.append(f"mode={self.padding_mode}")
        if not self.bias:
            words.append("no bias")
        return ", ".join(words)

    def __repr__(self) -> str:
        return f"ConvSpec({self})"


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a 4-d tensor is stored channels_last, and not also in the ordinary order."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _pair(value: int | tuple[int, ...]) -> Pair:
    if isinstance(value, int):  # set by hand: torch takes it for both axes
        return (value, value)
    return (int(value[0]), int(value[1]))


def _in_words(rule: str | tuple[int, int, int, int]) -> str:
    """Write a padding of the input: `same (TensorFlow)`, or what is before and after, as in `0/1x0/1`."""
    if isinstance(rule, str):
        return f"{rule} (TensorFlow)"
    top, bottom, left, right = rule
    return f"{top}/{bottom}x{left}/{right}" if (top, bottom) != (left, right) else f"{top}/{bottom}"


def _short(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"

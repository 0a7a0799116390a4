"""What blocks tell least squares: their taps times what they say that their filters see is what they give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgeon.blocks.base import Trial
from surgeon.blocks.fittable import Fittable
from surgeon.blocks.hetconv import HetConv
from surgeon.blocks.octave import OctaveConv, OctaveConvOptions
from surgeon.conv import streams
from surgeon.conv.spec import ConvSpec
from surgeon.fitting.passes import laid_out

MORE = [
    Trial(ConvSpec(8, 6, (3, 3), padding=(1, 1), padding_mode="reflect"), OctaveConvOptions.model_validate(options))
    for options in ({"alpha": 0.25}, {"low_in": ((0, 2), (3, 4)), "alpha_out": 0.5}, {"low_in": ((6, 8),)})
]
MORE += [
    Trial(ConvSpec(8, 8, (3, 3), padding=(1, 1), stride=(2, 2)), OctaveConvOptions.model_validate(options))
    for options in ({"downsample": "paper"}, {"downsample": "pool-both", "low_in": ((2, 5),)})
]
MORE += [
    Trial(ConvSpec(8, 8, (3, 3), padding=(1, 1), groups=4), OctaveConvOptions.model_validate({"alpha": alpha}))
    for alpha in (0.25, 0.75)
]
TRIALS = [*((HetConv, trial) for trial in HetConv.trials()), *((OctaveConv, trial) for trial in OctaveConv.trials())]
TRIALS += [(OctaveConv, trial) for trial in MORE]


def _made(kind: type[Fittable], trial: Trial) -> Fittable:
    torch.manual_seed(0)
    conv = trial.spec.build(like=torch.zeros((), dtype=torch.float64))
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_()
    return kind.from_conv(conv, trial.options, norm=None, generator=torch.Generator().manual_seed(0)).eval()


def _predicted(block: Fittable, given: Tensor | tuple[Tensor, Tensor | None], output: Tensor) -> Tensor:
    """Give the output by views: channel by channel, those of the low stream enlarged."""
    kernel = block.fold().weight if isinstance(block, HetConv) else block.weight
    made = torch.full_like(output, torch.nan)
    for view in block.views(given):
        wanted = view.wanted(output)
        images = [view.taps_of(kernel) @ features for features, _ in laid_out(view, wanted)]
        part = torch.cat(images).flatten(1, 2).view(wanted.shape)
        if block.bias is not None:
            part = part + streams.take(block.bias, view.filters, 0)[:, None, None]
        rows = [i for start, stop in view.filters for i in range(start, stop)]
        assert made[:, rows].isnan().all()  # every filter belongs to one view
        made[:, rows] = streams.up(part, output.shape[-2:]) if view.is_low else part
    return made


@pytest.mark.parametrize(("kind", "trial"), TRIALS)
def test_views_give_what_the_block_gives(kind: type[Fittable], trial: Trial) -> None:
    block, x = _made(kind, trial), torch.randn(2, trial.spec.c_in, *trial.size, dtype=torch.float64)
    with torch.no_grad():
        output = block(x)
        assert (_predicted(block, x, output) - output).abs().max() < 1e-12 * output.abs().max()
        if isinstance(block, OctaveConv) and block.low_in:
            pair = streams.split(x, block.low_in)
            high, low = block(pair)
            joined = high if low is None else streams.join(high, low, block.low_out)
            assert (_predicted(block, pair, joined) - joined).abs().max() < 1e-12 * joined.abs().max()


@pytest.mark.parametrize(("kind", "trial"), TRIALS)
def test_taps_come_back_as_they_were_given(kind: type[Fittable], trial: Trial) -> None:
    block = _made(kind, trial)
    view = next(iter(block.views(torch.randn(1, trial.spec.c_in, *trial.size, dtype=torch.float64))))
    kernel = torch.zeros(trial.spec.weight_shape, dtype=torch.float64)
    taps = torch.randn(view.taps_of(kernel).shape, dtype=torch.float64)
    view.put_(taps, kernel)
    assert torch.equal(view.taps_of(kernel), taps)
    bias = torch.randn(trial.spec.c_out, dtype=torch.float64)
    block.take_kernel_(kernel, bias)
    held = block.fold().weight if isinstance(block, HetConv) else block.weight
    kept = held != 0
    assert torch.equal(held[kept], kernel[kept])
    assert kept.any()
    assert block.bias is None or torch.equal(block.bias, bias)

"""What goes to low streams: planted waves, whose frequencies are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import CaptureError
from surgeon.figures.spectra import spectrum_of


def wave(down: int, across: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """A wave with so many cycles down and across a map."""
    y, x = (torch.arange(side, dtype=torch.float64) for side in size)
    phase = down * y[:, None] / size[0] + across * x[None, :] / size[1]
    return torch.cos(2 * math.pi * phase)[None, None]


@pytest.mark.parametrize("cycles", [(1, 0), (0, 3), (3, 3), (2, 1)])
def test_slow_waves_can_be_held(cycles: tuple[int, int]) -> None:
    share, of_all, *_ = spectrum_of(wave(*cycles)) or pytest.fail("nothing was measured")
    assert share == pytest.approx(0, abs=1e-12)
    assert of_all == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("cycles", [(8, 8), (0, 8), (6, 0), (6, 7)])
def test_fast_waves_cannot(cycles: tuple[int, int]) -> None:
    share, *_ = spectrum_of(wave(*cycles)) or pytest.fail("nothing was measured")
    assert share == pytest.approx(1, abs=1e-12)


def test_energies_add_up() -> None:
    """A slow wave of amplitude 2 has four times the energy of a fast one of amplitude 1."""
    share, *_ = spectrum_of(2 * wave(2, 0) + wave(0, 6)) or pytest.fail("nothing was measured")
    assert share == pytest.approx(1 / 5, rel=1e-9)


def test_the_average_of_a_channel_is_no_frequency_but_counts_in_the_share_of_all() -> None:
    share, of_all, *_ = spectrum_of(wave(0, 8) + 10) or pytest.fail("nothing was measured")
    assert share == pytest.approx(1, abs=1e-12)
    assert of_all == pytest.approx(1 / 101, rel=1e-9)  # 1 of a checkerboard's square, 100 of the average's


def test_the_power_lies_in_the_ring_of_the_frequency() -> None:
    _, _, frequencies, power = spectrum_of(wave(0, 4, (32, 32))) or pytest.fail("nothing was measured")
    most = max(zip(power, frequencies, strict=True))[1]
    assert most - 0.0625 <= 4 / 16 <= most + 0.0625  # 4 of the 16 cycles that 32 pixels can have


def test_white_noise_has_power_1_everywhere() -> None:
    noise = torch.randn(64, 8, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share, _, _, power = spectrum_of(noise) or pytest.fail("nothing was measured")
    assert all(one == pytest.approx(1, abs=0.1) for one in power)
    assert share == pytest.approx(1 - 33 * 33 / 64**2, abs=0.01)  # 33 of 64 frequencies of a row can be held


def test_channels_do_not_cancel_each_other() -> None:
    pair = torch.cat([wave(0, 6), -wave(0, 6)], 1)
    share, *_ = spectrum_of(pair) or pytest.fail("nothing was measured")
    assert share == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("x", [torch.ones(1, 2, 8, 8), torch.randn(1, 2, 3, 8), torch.full((1, 1, 8, 8), math.inf)])
def test_what_has_no_frequencies_is_not_measured(x: torch.Tensor) -> None:
    assert spectrum_of(x) is None


def octave(c_in: int, c_out: int, stride: int = 1, **alphas: float) -> nn.Module:
    options = surgeon.OctaveConv.Options.model_validate(alphas)
    conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
    return surgeon.OctaveConv.from_conv(conv, options, norm=None, generator=torch.Generator())


def net_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(octave(2, 4, alpha_in=0), nn.ReLU(), octave(4, 4), octave(4, 4, alpha_out=0))


@pytest.mark.parametrize(("cycles", "wanted"), [((2, 2), 0.0), ((8, 8), 1.0)])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_network_sends_what_is_planted(cycles: tuple[int, int], wanted: float, is_fused: bool) -> None:
    net = net_of()
    net = surgeon.fuse(net) if is_fused else net
    x = wave(*cycles).float().repeat(1, 2, 1, 1)
    network = surgeon.kernels(net, x).networks[0]
    first = network.spectra[0]
    assert (first.path, first.channels, first.low, first.size) == ("0", 2, 2, (16, 16))
    assert first.share == pytest.approx(wanted, abs=1e-6)
    assert not network.is_drawn
    assert [one.path for one in network.spectra] == ["0", "2"]  # the last one sends nothing


def test_a_conv_of_stride_2_sends_what_it_has_pooled() -> None:
    """Three cycles in 16 pixels can be held at half the resolution, but not at a quarter of it."""
    net = nn.Sequential(octave(2, 4, 2, alpha_in=0))
    spectra = [surgeon.kernels(net, wave(n, 0).float().repeat(1, 2, 1, 1)).networks[0].spectra[0] for n in (1, 3)]
    assert [one.size for one in spectra] == [(8, 8), (8, 8)]
    assert spectra[0].share < 0.01
    assert spectra[1].share > 0.7


def test_an_input_is_looked_for_and_said_to_be_random() -> None:
    network = surgeon.kernels(net_of()).networks[0]
    assert network.is_drawn
    assert network.input == "1×2×224×224"
    assert "random numbers, 1×2×224×224" in str(surgeon.kernels(net_of()))
    assert surgeon.kernels(nn.Sequential(nn.Conv2d(2, 2, 3))).networks[0].input == ""


def test_an_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CaptureError, match="does not run on an input"):
        surgeon.kernels(net_of(), (1, 5, 16, 16))


def test_a_run_leaves_modes_and_hooks_as_they_were() -> None:
    net = net_of().train()
    surgeon.kernels(net)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())

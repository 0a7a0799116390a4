"""A fingerprint tells architectures apart, and does not depend on how anything is worded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import ConvNorm, TwoNames, conv3
from torch import nn

import surgeon
from surgeon.analysis.fingerprint import fingerprint, fits, words_of
from surgeon.conv.spec import ConvSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "format1"
OLD = {"residual": "10220df4e2a15fbc", "functional": "cb755b850328c883"}  # as the plans of format 1 have them


def _old(name: str) -> nn.Module:
    return surgeon.load(GOLDEN / f"{name}.pt", allow=("golden_nets",))


@pytest.mark.parametrize(
    "change",
    [
        {"stride": 2},
        {"stride": (1, 2)},
        {"padding": "same"},
        {"padding": 0},
        {"dilation": 2},
        {"groups": 2},
        {"groups": 4},
        {"bias": False},
        {"padding_mode": "reflect"},
    ],
    ids=str,
)
def test_every_field_of_a_conv_counts(change: dict[str, object]) -> None:
    changed = nn.Conv2d(4, 4, 3, **{"padding": 1} | change)
    known = fingerprint(ConvNorm())
    assert not fits(known, ConvNorm(changed))
    assert fits(known, ConvNorm())


def test_names_classes_and_shapes_count() -> None:
    known = fingerprint(ConvNorm())
    assert not fits(known, ConvNorm(bn=nn.InstanceNorm2d(4, affine=True, track_running_stats=True)))
    assert not fits(known, nn.Sequential(ConvNorm()))
    assert not fits(known, TwoNames())
    assert not fits(fingerprint(nn.Linear(2, 3)), nn.Linear(3, 2))


def test_numbers_and_dtypes_do_not_count() -> None:
    assert fits(fingerprint(ConvNorm()), ConvNorm().double())
    with torch.device("meta"):
        assert fits(fingerprint(ConvNorm()), ConvNorm())


def test_no_wording_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _old("residual")
    known = fingerprint(model)
    monkeypatch.setattr(ConvSpec, "__str__", lambda self: "worded otherwise")
    monkeypatch.setattr(ConvSpec, "__repr__", lambda self: "worded otherwise")
    assert fits(known, model)
    assert fits(OLD["residual"], model)


@pytest.mark.parametrize("name", OLD)
def test_the_fingerprints_of_old_files_still_fit(name: str) -> None:
    assert fits(OLD[name], _old(name))
    assert not any(fits(other, _old(name)) for key, other in OLD.items() if key != name)


def test_old_plans_have_what_is_tested_here() -> None:
    text = (GOLDEN / "plan-acblock.yaml").read_text()
    assert f"model: {OLD['residual']}\n" in text
    with safe_open(GOLDEN / "manifest.safetensors", framework="pt") as file:
        assert '"model": "' in file.metadata()["surgeon"]
        assert '"model": "2:' not in file.metadata()["surgeon"]


@pytest.mark.parametrize("known", ["", "2:", "3:10220df4e2a15fbc", "10220df4e2a15fb", "2:10220df4e2a15fbc"])
def test_what_is_no_fingerprint_of_it_does_not_fit(known: str) -> None:
    assert not fits(known, _old("residual"))


@pytest.mark.parametrize(
    ("conv", "words"),
    [
        (nn.Conv2d(3, 8, 3), "3→8, 3x3"),
        (nn.Conv2d(3, 8, 3, padding="valid"), "3→8, 3x3"),
        (nn.Conv2d(4, 4, (3, 5), (2, 1), padding=(1, 2)), "4→4, 3x5, stride=2x1, padding=1x2"),
        (conv3(dilation=2, groups=2), "4→4, 3x3, padding=1, dilation=2, groups=2"),
        (conv3(groups=4, bias=False), "4→4, 3x3, padding=1, depthwise, no bias"),
        (nn.Conv2d(1, 1, 1, padding="same", padding_mode="circular"), "1→1, 1x1, padding=same, mode=circular"),
    ],
)
def test_words_of_format_1(conv: nn.Conv2d, words: str) -> None:
    assert words_of(ConvSpec.of(conv)) == words

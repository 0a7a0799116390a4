"""Fitting site by site: which networks it takes, what it refuses, and that it can be interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.errors import DataError, FitError, PassError, StoreError
from surgeon.fitting import data as images
from surgeon.fitting import fit, foresee, importance, passes, settle, together
from surgeon.fitting.cache import Cache
from surgeon.fitting.fit import Fit, How, fit_
from surgeon.fitting.processes import ALONE
from surgeon.fitting.units import prepared, units
from surgeon.surgery.history import history
from tests.helpers import shake_

HET = {"swap": "hetconv", "match": {"in_channels": 8}, "with": {"p": 4, "layout": "best"}}
OCTAVE = {"swap": "octave", "match": {"in_channels": 8}, "with": {"alpha": 0.5, "min_size": 2}}


def _recipe(rule: dict[str, Any]) -> dict[str, Any]:
    return {"surgeon": 1, "title": "some convs", "rules": [rule]}


class Branches(nn.Module):
    """A stem, two branches that are added up, and a classifier that sees every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.left, self.left_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.after = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 16, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.left_norm(self.left(x))) + self.act(self.right(x))
        logits: Tensor = self.fc(self.act(self.after(x)).flatten(1))
        return logits


class Functional(nn.Module):
    """One of its convs is a function call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.conv2d(self.stem(x).relu(), self.weight, padding=1).relu())
        return out


class Twice(nn.Module):
    """One conv is called twice, and what is written in place lies between its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(self.conv(self.act(self.stem(x))))))


def _timm() -> nn.Module:
    norm = timm.layers.BatchNormAct2d
    inside = [layer for _ in range(2) for layer in (nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8))]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), *inside, nn.Conv2d(8, 4, 1))


def _net(make: Callable[[], nn.Module] = Branches) -> nn.Module:
    torch.manual_seed(0)
    return shake_(make(), gently=True).eval()


def _pair(make: Callable[[], nn.Module] = Branches, rule: dict[str, Any] = HET) -> tuple[nn.Module, nn.Module]:
    net = _net(make)
    return surgeon.convert(net, _recipe(rule), example=(2, 3, 8, 8)).eval(), net


def _images(count: int = 60, batch: int = 16) -> images.Data:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return images.of(F.interpolate(coarse, size=8, mode="bilinear"), batch=batch)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _is_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(one, b[key]) for key, one in a.items())


def _l2(found: Fit) -> tuple[float, float]:
    before, after = found.before.relative_l2, found.after.relative_l2
    assert before is not None
    assert after is not None
    return before, after


@pytest.mark.parametrize("rule", [HET, OCTAVE], ids=["hetconv", "octave"])
@pytest.mark.parametrize("make", [Branches, Functional, Twice, _timm])
def test_fitting_brings_all_kinds_of_networks_nearer(make: Callable[[], nn.Module], rule: dict[str, Any]) -> None:
    converted, net = _pair(make, rule)
    data = _images()
    original = prepared(net, history(converted), data)
    untouched = _state(net)
    found = fit_(converted, original, data)
    before, after = _l2(found)
    assert after < 0.8 * before
    assert all(site.after <= site.before * (1 + 1e-9) for site in found.sites)
    assert any(site.block in ("hetconv", "octave") for site in found.sites)
    assert _is_same(untouched, _state(net))


def test_a_linear_layer_behind_flatten_and_convs_with_and_without_bias_are_fitted() -> None:
    converted, net = _pair()
    found = fit_(converted, net, _images(300))
    assert {site.path: site.block for site in found.sites} == {
        "left": "hetconv",
        "right": "hetconv",
        "after": "hetconv",
        "fc": "Linear",
    }
    assert not torch.equal(converted.left_norm.running_mean, net.left_norm.running_mean)
    assert not torch.equal(converted.right.bias, net.right.bias)
    again, _ = _pair()
    found = fit_(again, net, _images(200), How(refit=False))
    assert {site.path for site in found.sites} == {"left", "right", "after"}
    assert torch.equal(again.fc.weight, net.fc.weight)


def test_branches_share_a_pass_and_come_to_the_numbers_of_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    converted, net = _pair()
    inputs = next(iter(_images())).inputs.batched(2)
    found = units(converted, net, inputs, refit=True)
    groups = together.together(found, converted, inputs, lambda _: True)
    assert [[unit.path for unit in group] for group in groups] == [["left", "right"], ["after"], ["fc"]]
    assert [len(group) for group in together.together(found, converted, inputs, lambda _: False)] == [1] * 4
    fit_(converted, net, _images())
    alone, _ = _pair()
    monkeypatch.setattr(foresee.Foreseen, "fits", lambda *_: False)
    fit_(alone, net, _images())
    assert _is_same(_state(converted), _state(alone))


def test_what_is_written_in_place_behind_a_conv_does_not_change_what_it_gave() -> None:
    made = []
    for in_place in (True, False):
        converted, net = _pair(Twice)
        converted.act.inplace = net.act.inplace = in_place
        fit_(converted, net, _images())
        made.append(_state(converted))
    assert _is_same(*made)


def test_how_a_batch_is_cut_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.conv.least_squares._SMALL", 1e-13)
    whole, net = _pair(lambda: Branches().double())
    fit_(whole, net, _images())
    parts, _ = _pair(lambda: Branches().double())
    monkeypatch.setattr(passes, "_NUMBERS", 5 * 3 * 64)
    monkeypatch.setattr(importance, "_BYTES", 1)
    monkeypatch.setattr(passes, "LAID_OUT", 1)
    fit_(parts, net, _images())
    apart = [float((a - _state(parts)[key]).double().abs().max()) for key, a in _state(whole).items()]
    assert max(apart) < 1e-9


def test_a_site_that_gets_worse_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    converted, net = _pair()
    before = _state(converted)
    for name in ("solve", "solve_together"):
        monkeypatch.setattr(settle, name, lambda problem, start, *_: start * 3)
    with pytest.raises(PassError, match="left is further from its original than it was"):
        fit_(converted, net, _images(), How(metric=False))
    assert _is_same(before, _state(converted))


class Spoilt(Branches):
    """What goes into its last conv is not what it should be."""

    what: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = type(self).what(self.left_norm(self.left(x)))
        logits: Tensor = self.fc(self.act(self.after(x)).flatten(1))
        return logits


class Constant(Spoilt):
    what = staticmethod(torch.zeros_like)


class NaN(Spoilt):
    what = staticmethod(torch.log)


@pytest.mark.parametrize(
    ("make", "count", "said"),
    [
        (Branches, 1, "say too little about the 72 taps of a filter. Give at least"),
        (Constant, 60, "after: what it sees is the same at every pixel of every image. Give images that differ"),
        (NaN, 60, "after: NaN or infinite numbers go in or come out with these images. Look at the images"),
    ],
)
def test_images_that_say_nothing_are_refused_in_one_line(make: type[nn.Module], count: int, said: str) -> None:
    converted, net = _pair(make)
    before = _state(converted)
    with pytest.raises(DataError) as caught:
        fit_(converted, net, _images(count))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _is_same(before, _state(converted))


def test_images_that_the_network_does_not_take_are_refused() -> None:
    converted, net = _pair()
    before = _state(converted)
    with pytest.raises(surgeon.SurgeonError) as caught:
        fit_(converted, net, images.of(torch.rand(40, 3, 8, 9), batch=16))
    assert "\n" not in str(caught.value)
    assert _is_same(before, _state(converted))


class StoppedError(Exception):
    pass


def _until(text: str) -> Callable[[str, float], None]:
    def progress(what: str, share: float) -> None:
        if text in what:
            raise StoppedError

    return progress


@pytest.mark.parametrize("at", ["fitting left", "fitting after", "fitting fc", "measuring it as fitted"])
def test_interrupted_and_resumed_is_uninterrupted(at: str, tmp_path: Path) -> None:
    whole, net = _pair()
    expected = fit_(whole, net, _images(200))
    broken, _ = _pair()
    before, state = _state(broken), tmp_path / "state"
    with pytest.raises(StoppedError):
        fit_(broken, net, _images(200), state=state, progress=_until(at))
    assert _is_same(before, _state(broken))
    said: list[str] = []
    found = fit_(broken, net, _images(200), state=state, progress=lambda what, _: said.append(what))
    assert _is_same(_state(whole), _state(broken))
    assert found.sites == expected.sites
    assert any("fitting left" in one for one in said) is (at == "fitting left")  # what was done is not done again
    assert any("fitting fc" in one for one in said) is (at != "measuring it as fitted")


def test_the_state_of_another_fit_is_refused(tmp_path: Path) -> None:
    converted, net = _pair()
    state = tmp_path / "state"
    fit_(converted, net, _images(), state=state)
    begun, _ = _pair()
    before = _state(begun)
    for data, how, other in (
        (_images(50), None, net),
        (_images(), How(seed=1), net),
        (_images(), None, shake_(_pair()[1], seed=1)),
    ):
        with pytest.raises(StoreError, match="is of a fit with other networks, data or options"):
            fit_(begun, other, data, how, state=state)
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(StoreError, match="is not a state of fit, or is damaged"):
        fit_(begun, net, _images(), state=state)
    assert _is_same(before, _state(begun))


def test_the_cache_keeps_what_depends_on_images_and_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, net = _pair()
    cache = Cache(tmp_path / "cache")
    fit_(first, net, _images(), cache=cache)
    (file,) = cache.folder.iterdir() if cache.folder else []
    for spoil in (False, True):
        again, _ = _pair()
        if spoil:
            file.write_bytes(b"nothing")
        with monkeypatch.context() as patch:
            if not spoil:
                patch.setattr(importance, "_gradients", lambda *_, **__: 1 / 0)
            fit_(again, net, _images(), cache=cache)
        assert _is_same(_state(first), _state(again))
    assert file.stat().st_size > 100  # written anew
    fit_(_pair()[0], net, _images(50), cache=cache)
    assert len(list(file.parent.iterdir())) == 2


def test_the_cache_removes_what_was_not_used_for_long(tmp_path: Path) -> None:
    def made() -> dict[str, Tensor]:
        return {"x": torch.zeros(100)}

    Cache(tmp_path).kept("key0", made)
    cache = Cache(tmp_path, most=3 * (tmp_path / "key0.safetensors").stat().st_size)
    for i in range(3):
        cache.kept(f"key{i}", made)
        os.utime(tmp_path / f"key{i}.safetensors", (i, i))
    cache.kept("key0", lambda: pytest.fail("it is there"))  # used now
    cache.kept("key3", made)
    assert {path.stem for path in tmp_path.iterdir()} == {"key0", "key2", "key3"}
    cache.kept("large", lambda: {"x": torch.zeros(1000)})
    assert not (tmp_path / "large.safetensors").exists()
    blocked = tmp_path / "key0.safetensors"
    assert Cache(blocked).kept("key", made)["x"].shape == (100,)  # no folder can be there


def test_what_fitting_takes_is_foreseen() -> None:
    converted, net = _pair()
    inputs = next(iter(_images())).inputs.batched(2)
    found = units(converted, net, inputs, refit=True)
    foreseen = foresee.foresee(found, converted, net, inputs, 60)
    last = {unit.path: foreseen.needs[unit] for unit in found}
    macs = 64 * 72 * 8 + 2 * 64 * 72 * 8 + 16 * 72 * 8  # of the convs up to the last one; the stem has 3 channels
    assert last["after"].runs == pytest.approx(2 * macs - 2 * 64 * 9 * 8 * 5, rel=0.35)
    assert last["left"].held == 2 * 8 * 72 * (72 + 8)
    assert last["left"].products == 2 * 64 * 72 * (36 + 8)
    assert foreseen.bytes > last["left"].peak > 8 * 5 * 72 * 72
    assert not foreseen.fits(found * 10**6)
    said: list[tuple[str, float]] = []
    foreseen.begun -= 100
    foreseen.progress([found[0]], [[unit] for unit in found], 0, lambda *told: said.append(told))("left", 0.5)
    text, share = said[0]
    assert text.startswith("fitting left, 1 of 4, about ")
    assert 0 < share < 1


def test_gradients_of_an_image_do_not_depend_on_those_beside_it() -> None:
    converted, net = _pair(lambda: Branches().double())
    data = _images(40, batch=20)
    blocks = units(converted, net, next(iter(data)).inputs.batched(2), refit=False)
    made = []
    for most in (1, 2**28):
        importance._BYTES, kept = most, importance._BYTES
        try:
            made.append(importance.metrics(net, blocks, data, 0, ALONE))
        finally:
            importance._BYTES = kept
    for path, metric in made[0].items():
        assert torch.allclose(metric, made[1][path], rtol=1e-9, atol=1e-12)


def test_a_network_without_blocks_is_refused() -> None:
    net = _net()
    with pytest.raises(FitError, match="the network has no block that can be fitted"):
        fit_(net, net, _images())
    assert fit.worth(net, net, _images()).relative_l2 == 0

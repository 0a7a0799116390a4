"""Training against the original: what it reaches, what it leaves alone, and that it can be interrupted."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.app.demo import data as shipped
from surgeon.app.demo.net import SmallResNet
from surgeon.errors import FitError, StoreError, SurgeonError
from surgeon.fitting import data as images
from surgeon.fitting import distil, stages
from surgeon.fitting.augment import Augmentation, takes_images
from surgeon.fitting.compare import Compared
from surgeon.fitting.distil import distil_
from surgeon.fitting.measure import measure
from surgeon.models.call import Inputs
from tests.helpers import shake_

HETCONV = {
    "surgeon": 1,
    "title": "all convs but the stem",
    "rules": [{"swap": "hetconv", "match": {"kernel": 3, "in_channels": {"min": 2}}, "with": {"p": 2}}],
}


def _net(*, is_shaken: bool = False) -> nn.Module:
    """Make a network whose norms have the statistics of the images, or others."""
    torch.manual_seed(0)
    net = shake_(SmallResNet(4), gently=True)
    with torch.no_grad():
        for _ in range(0 if is_shaken else 50):
            net.train()(next(iter(_images(batch=40))).inputs.args[0])
    return net.eval()


def _pair(**options: bool) -> tuple[nn.Module, nn.Module]:
    original = _net(**options)
    return surgeon.convert(original, HETCONV, example=(2, 1, 12, 12)), original


def _images(count: int = 40, **options: Any) -> images.Data:
    x = torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return images.of(x, batch=options.pop("batch", 18), **options)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_brings_the_converted_network_nearer_without_labels() -> None:
    converted, original = _pair()
    untouched = _state(original)
    before = measure(converted, original, _images())
    done = distil_(converted, original, _images(), steps=30)
    after = measure(converted, original, _images())
    assert after.relative_l2 is not None
    assert before.relative_l2 is not None
    assert after.relative_l2 < 0.6 * before.relative_l2
    assert 0 < done.after < done.before
    assert done.best
    assert done.held_back == 4
    assert done.stages == ("layer1", "layer2", "layer3", "avgpool")
    assert _same(untouched, _state(original))


@pytest.mark.parametrize("recipe", [HETCONV, "octave"])
def test_the_demo_network_gets_back_most_of_what_it_could(recipe: Any) -> None:
    original = SmallResNet()
    original.load_state_dict(shipped.weights())
    converted = surgeon.convert(original.eval(), recipe, example=(2, 1, 28, 28))
    pictures = shipped.images()
    test = images.of((pictures.test_x[:200], pictures.test_y[:200]), labels="own")
    before = measure(converted, original, test)
    distil_(converted, original, images.of(pictures.train_x[:100], batch=32), steps=25)
    after = measure(converted, original, test)
    assert before.agreement is not None
    assert after.agreement is not None
    assert after.agreement > 0.8 > before.agreement


def test_the_same_seed_gives_the_same_numbers_and_global_random_states_are_left_alone() -> None:
    made = []
    for seed in (0, 0, 1):
        converted, original = _pair()
        torch.manual_seed(seed + len(made))
        state = torch.get_rng_state()
        distil_(converted, original, _images(), steps=4, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        made.append(_state(converted))
    assert _same(made[0], made[1])
    assert not _same(made[0], made[2])


class Interrupted(Exception):  # noqa: N818
    """Stands for the user's interruption."""


def _interrupting(at: int) -> Any:
    def tell(what: str, share: float) -> None:
        if what.startswith(f"distilling, step {at} "):
            raise Interrupted

    return tell


@pytest.mark.parametrize("at", [7, 8])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, at: int) -> None:
    whole, original = _pair()
    whole = nn.Sequential(whole, Noisy())  # draws in eval mode as well
    broken, original = copy.deepcopy(whole), nn.Sequential(original, nn.Identity())
    options: dict[str, Any] = {"steps": 24, "augmentation": Augmentation()}
    expected = distil_(whole, original, _images(), **options)
    path, before = tmp_path / "state", _state(broken)
    with pytest.raises(Interrupted):
        distil_(broken, original, _images(), **options, checkpoint=path, progress=_interrupting(at))
    assert _same(before, _state(broken))
    assert path.exists()
    said: list[str] = []
    done = distil_(
        broken, original, _images(), **options, checkpoint=path, progress=lambda what, share: said.append(what)
    )
    assert said[0].startswith(f"distilling, step {2 * (at // 2) + 1} ")
    assert done == expected
    assert _same(_state(whole), _state(broken))


class Noisy(nn.Module):
    """Draws from the global generator in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


def test_a_finished_state_gives_the_result_at_once_and_is_of_no_other_training(tmp_path: Path) -> None:
    converted, original = _pair()
    again = copy.deepcopy(converted)
    done = distil_(converted, original, _images(), steps=3, checkpoint=tmp_path / "state")
    said: list[str] = []
    other = distil_(
        again,
        original,
        _images(),
        steps=3,
        checkpoint=tmp_path / "state",
        progress=lambda what, share: said.append(what),
    )
    assert other == done
    assert not said
    assert _same(_state(again), _state(converted))
    with pytest.raises(StoreError, match="is of a training with other networks, data or options"):
        distil_(_pair()[0], original, _images(), steps=4, checkpoint=tmp_path / "state")
    (tmp_path / "state").write_bytes(b"\0" * 100)
    with pytest.raises(StoreError, match="is damaged"):
        distil_(_pair()[0], original, _images(), steps=3, checkpoint=tmp_path / "state")


def test_modes_flags_and_hooks_are_as_they_were_and_what_is_frozen_stays() -> None:
    converted, original = _pair()
    converted.train()
    converted.layer1.eval()
    converted.fc.requires_grad_(False)
    converted.bn1.requires_grad_(False)
    flags = [(m.training, len(m._forward_hooks)) for m in converted.modules()]
    free = [p.requires_grad for p in converted.parameters()]
    before = _state(converted)
    assert distil_(converted, original, _images(), steps=6).best
    after = _state(converted)
    assert flags == [(m.training, len(m._forward_hooks)) for m in converted.modules()]
    assert free == [p.requires_grad for p in converted.parameters()]
    stay = [name for name in after if torch.equal(before[name], after[name])]
    assert [name for name in stay if name.startswith(("fc.", "bn1."))] == [
        n for n in after if n.startswith(("fc.", "bn1."))
    ]
    assert not torch.equal(before["layer2.0.bn1.running_mean"], after["layer2.0.bn1.running_mean"])


def test_norms_whose_statistics_are_not_those_of_the_images_keep_them() -> None:
    converted, original = _pair(is_shaken=True)
    before = _state(converted)
    done = distil_(converted, original, _images(), steps=6)
    after = _state(converted)
    assert done.best
    assert not done.norms_follow
    assert "norms keep their statistics" in str(done)
    assert all(torch.equal(before[name], after[name]) for name in after if "running" in name)
    assert not torch.equal(before["layer2.0.bn1.weight"], after["layer2.0.bn1.weight"])


def test_a_network_of_which_everything_is_frozen_is_trained_and_frozen_again() -> None:
    converted, original = _pair()
    converted.requires_grad_(False)
    assert distil_(converted, original, _images(), steps=6).best
    assert not any(parameter.requires_grad for parameter in converted.parameters())


def test_never_worse_on_the_images_held_back() -> None:
    original = _net()
    before = _state(same := copy.deepcopy(original))
    done = distil_(same, original, _images(), steps=20)
    assert (done.best, done.steps, done.is_early) == (0, distil._PATIENCE, True)
    assert "the network is as it was" in str(done)
    assert _same(before, _state(same))


@pytest.mark.parametrize("where", ["images", "weights"])
def test_nan_stops_with_one_line_and_changes_nothing(where: str) -> None:
    converted, original = _pair()
    x = torch.randn(40, 1, 12, 12)
    if where == "images":
        x[3, 0, 0, 0] = math.nan
    else:
        nn.init.constant_(converted.fc.bias, math.nan)
    before = _state(converted)
    with pytest.raises(SurgeonError, match=r"NaN|not a number|not finite") as caught:
        distil_(converted, original, images.of(x, batch=18), steps=4)
    assert "\n" not in str(caught.value)
    after = _state(converted)
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_trained_and_kept(dtype: torch.dtype) -> None:
    converted, original = (model.to(dtype) for model in _pair())
    before = measure(converted, original, _images())
    done = distil_(converted, original, _images(), steps=12)
    after = measure(converted, original, _images())
    assert done.best
    assert {t.dtype for t in converted.state_dict().values()} <= {dtype, torch.int64}
    assert after.relative_l2 is not None
    assert before.relative_l2 is not None
    assert after.relative_l2 < before.relative_l2


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (1, {}, "1 image, too few to train with"),
        (40, {"steps": 0}, "0 steps of training are asked for"),
        (40, {"rate": math.inf}, "inf is not a learning rate"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(count: int, options: dict[str, Any], said: str) -> None:
    converted, original = _pair()
    with pytest.raises(FitError, match=said):
        distil_(converted, original, _images(count), **{"steps": 2, **options})


def test_images_that_the_network_does_not_take_are_said() -> None:
    converted, original = _pair()
    with pytest.raises(FitError, match="the network cannot run with the images of"):
        distil_(converted, original, images.of(torch.randn(40, 3, 12, 12)), steps=2)


class Lists(nn.Module):
    """A detector of sorts: what it returns has another length for every image, and no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [one[one > 0.3].detach() for one in self.body(x)]


def test_a_detector_is_trained_by_its_stages_alone() -> None:
    torch.manual_seed(0)
    original = Lists().eval()
    converted = copy.deepcopy(original)
    converted.body[2].weight.data.mul_(torch.rand_like(converted.body[2].weight))
    done = distil_(converted, original, _images(), steps=20)
    assert done.stages == ("body.1", "body")
    assert done.after < 0.8 * done.before


def test_networks_with_nothing_in_common_are_refused() -> None:
    original = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(FitError, match="no output and no feature map in common"):
        distil_(nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU()), original, _images(), steps=2)


def test_the_best_weights_are_kept_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "_schedule", lambda step, steps: 1.0 if step < 6 else 100.0)
    converted, original = _pair()
    done = distil_(converted, original, _images(), steps=8)
    assert done.best == 6
    _, held = _images().held_back(4, 0)
    found = stages.find(converted, original, next(iter(held)).inputs)
    with Compared(converted.eval(), original, found) as compared, torch.no_grad():
        assert float(compared.loss(next(iter(held)).inputs)) == pytest.approx(done.after, rel=1e-5)


def test_gradients_are_those_of_the_mean_over_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def note(parameters: list[nn.Parameter], longest: float) -> None:
        norms.append(sum(float(one.grad.double().square().sum()) for one in parameters if one.grad is not None))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", note)
    for all_reduce in (None, lambda tensors: [tensor.mul_(2) for tensor in tensors] and None):
        converted, original = _pair()
        distil_(converted, original, _images(), steps=1, all_reduce=all_reduce)
    assert norms[0] == norms[1] > 0
    rest, _ = _images().held_back(4, 0)
    assert next(iter(rest)).count == 18
    converted, original = _pair()
    found = stages.find(converted, original, next(iter(rest)).inputs)
    converted.eval()
    for norm in converted.modules():
        norm.training = isinstance(norm, nn.BatchNorm2d)
    with Compared(converted, original, found) as compared:
        compared.loss(next(iter(rest)).inputs).backward()
    own = sum(float(one.grad.double().square().sum()) for one in converted.parameters() if one.grad is not None)
    assert norms[0] == pytest.approx(own, rel=1e-4)


def test_processes_with_the_same_images_take_the_steps_of_one() -> None:
    """Two processes whose shares are the same: what is added up is twice what each has, and every mean is the same."""

    def add_up(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    alone, original = _pair()
    together = copy.deepcopy(alone)
    expected = distil_(alone, original, _images(), steps=6)
    assert distil_(together, original, _images(), steps=6, all_reduce=add_up) == expected
    assert _same(_state(alone), _state(together))
    assert expected.best


def test_processes_whose_states_are_of_other_steps_begin_again(tmp_path: Path) -> None:
    converted, original = _pair()
    again = copy.deepcopy(converted)
    expected = distil_(converted, original, _images(), steps=6, checkpoint=tmp_path / "state")

    def other_is_at_the_start(tensors: list[Tensor]) -> None:
        if tensors[0].tolist() == [1.0, 6.0, 36.0]:
            tensors[0].copy_(torch.tensor([2.0, 6.0, 36.0]))

    said: list[str] = []
    done = distil_(
        *(again, original, _images()),
        steps=6,
        checkpoint=tmp_path / "state",
        all_reduce=other_is_at_the_start,
        progress=lambda what, share: said.append(what),
    )
    assert len(said) == 6
    assert done == expected


def test_only_images_are_moved_and_mirrored() -> None:
    x = torch.arange(2.0 * 3 * 20 * 20).reshape(2, 3, 20, 20)
    changed = Augmentation()(Inputs((x,)), torch.Generator().manual_seed(0)).args[0]
    assert changed.shape == x.shape
    assert not torch.equal(changed, x)
    assert set(changed.unique().tolist()) <= set(x.unique().tolist())
    assert not takes_images(Inputs((x, x[:, :1])))
    assert takes_images(Inputs((x,)))
    both = Inputs((x, x))
    assert Augmentation()(both, torch.Generator()) is both

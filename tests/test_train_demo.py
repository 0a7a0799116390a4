"""scripts/train_demo.py trains the networks of the demo and of the benchmark of fitting; here on images of noise."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
import train_demo
from demo_networks import NETWORKS
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.models import resnet18

from surgeon.app.demo import data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fashion-MNIST's four files, with 32 images of noise in each split."""
    for name in ("train", "t10k"):
        pixels = torch.randint(0, 256, (32 * 784,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        head = b"\0\0\x08\x03" + b"".join(side.to_bytes(4, "big") for side in (32, 28, 28))
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(pixels.tolist())))
        labels = b"\0\0\x08\x01" + (32).to_bytes(4, "big") + bytes(i % 10 for i in range(32))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return tmp_path


def _train(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    common = ("--data", str(folder), "--out", str(folder), "--epochs", "1", "--batch", "16", "--threads", "1")
    monkeypatch.setattr("sys.argv", ["train_demo.py", *common, *words])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    train_demo.main()


@pytest.mark.parametrize("words", [(), ("--amp",), ("--train-images", "20")])
def test_another_network_is_trained_and_its_weights_alone_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    path = folder / "vgg.safetensors"
    _train(folder, monkeypatch, "--network", "vgg", "--save", str(path), *words)
    model = NETWORKS["vgg"].build()
    model.load_state_dict(load_file(path))
    assert int(model.get_buffer("features.1.num_batches_tracked")) == 2
    assert not (folder / data.WEIGHTS).exists()


def test_the_demo_is_trained_as_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_demo, "pick", lambda split, per_class, seed: train_demo.Split(*(x[:4] for x in split)))
    _train(folder, monkeypatch, "--width", "4")
    state = load_file(folder / data.WEIGHTS)
    assert load_file(folder / data.IMAGES)["train_x"].shape == (4, 28, 28)
    pixels, labels = train_demo.read_split(folder, "train")
    torch.manual_seed(0)
    model = train_demo.SmallResNet(4).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=2, cycle_momentum=False)
    for index in torch.randperm(32).split(16):
        x = data.normalise(train_demo.augment(pixels[index])).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels[index].long()).backward()
        optimizer.step()
        schedule.step()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_network_that_the_demo_does_not_show_needs_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _train(folder, monkeypatch, "--network", "wide")
    assert "--network wide needs --save FILE" in capsys.readouterr().err


def test_every_network_takes_its_images() -> None:
    pixels = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    for network in NETWORKS.values():
        images = network.images(pixels)
        assert images.shape == (2, 1, network.pixels, network.pixels)
        assert network.build().eval()(images).shape == (2, 10)


def test_the_deep_network_is_torchvisions() -> None:
    ours, theirs = NETWORKS["deep"].build().state_dict(), resnet18(num_classes=10).state_dict()
    assert [*ours] == [*theirs]
    assert {name for name in ours if ours[name].shape != theirs[name].shape} == {"conv1.weight"}

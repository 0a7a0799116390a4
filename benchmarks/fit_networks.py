"""The four networks of benchmarks/fit.py, with their images, and what a network is worth on the test split.

The weights of three of them are trained by scripts/train_demo.py where a folder does not hold them yet.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import demo_networks  # noqa: E402
import train_demo  # noqa: E402

from surgeon.app.demo import data as demo_data  # noqa: E402

WEIGHTS = ROOT / "build" / "fit"
FASHION = Path("/usr/share/datasets/fashion-mnist")
CALIBRATION = 1024  # training images, of which no label is looked at
BATCH = 128


@dataclass(frozen=True, slots=True)
class Kind:
    """A network: its name here and in scripts/train_demo.py, and the smallest low map that octaves may have in it."""

    name: str
    trained_as: str
    words: str
    min_size: int = 6


KINDS = {
    kind.name: kind
    for kind in (
        Kind("demo", "small", "the demo's SmallResNet, 16 channels"),
        Kind("wide", "wide", "the same with 48 channels"),
        Kind("vgg", "vgg", "a VGG of eight 3×3 convs with batch norms", min_size=3),
        Kind("deep", "deep", "torchvision's ResNet-18", min_size=1),
    )
}


@dataclass(frozen=True, slots=True)
class Worth:
    """What a network is worth on the test split, beside the original."""

    accuracy: float
    agreement: float
    distance: float  # relative L2 of the logits, over all images

    def to_dict(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 5) for name in ("accuracy", "agreement", "distance")}


@dataclass
class Case:
    """A trained network in eval mode, and the images of both splits, all on one device."""

    kind: Kind
    device: torch.device
    data: Path = FASHION
    weights: Path = WEIGHTS
    calibrated_on: int = CALIBRATION
    train_images: int | None = None
    test_images: int | None = None
    network: demo_networks.Network = field(init=False)
    plans: dict[tuple[str, float], Any] = field(default_factory=dict)  # for every site alike; some take seconds to make

    def __post_init__(self) -> None:
        self.network = demo_networks.NETWORKS[self.kind.trained_as]

    @cached_property
    def model(self) -> nn.Module:
        model = self.network.build()
        model.load_state_dict(demo_data.weights() if self.kind.trained_as == "small" else load_file(self._trained()))
        return model.eval().to(self.device)

    @cached_property
    def train(self) -> train_demo.Split:
        return train_demo.read_split(self.data, "train", str(self.device), self.train_images)

    @cached_property
    def test(self) -> train_demo.Split:
        return train_demo.read_split(self.data, "t10k", str(self.device), self.test_images)

    @cached_property
    def example(self) -> Tensor:
        return self.images(self.test.pixels[:2]).cpu()

    @cached_property
    def calibration(self) -> Tensor:
        """The training images that networks are fitted to, without labels, on the CPU as a user has them."""
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(0))
        return self.images(self.train.pixels.cpu()[order[: self.calibrated_on]])

    @cached_property
    def logits(self) -> Tensor:
        return self._run(self.model)

    def images(self, pixels: Tensor) -> Tensor:
        """Turn bytes into what the network takes."""
        return self.network.images(pixels)

    def worth(self, model: nn.Module) -> Worth:
        """Measure a network in eval mode."""
        logits, original = self._run(model), self.logits
        chosen = logits.argmax(1)
        apart = (logits - original).double().norm() / original.double().norm()
        return Worth(
            accuracy=(chosen == self.test.labels).double().mean().item(),
            agreement=(chosen == original.argmax(1)).double().mean().item(),
            distance=apart.item(),
        )

    def renorm_(self, model: nn.Module) -> nn.Module:
        """Estimate the running statistics of a network anew, from the calibration images."""
        update_bn([x.to(self.device) for x in self.calibration.split(BATCH)], model)
        return model.eval()

    @torch.no_grad()
    def _run(self, model: nn.Module) -> Tensor:
        model.eval()
        return torch.cat([model(self.images(pixels)).float() for pixels in self.test.pixels.split(250)])

    def _trained(self) -> Path:
        path = self.weights / f"{self.kind.name}.safetensors"
        if not path.exists():
            self.weights.mkdir(parents=True, exist_ok=True)
            command: list[Any] = [sys.executable, ROOT / "scripts" / "train_demo.py", "--network", self.kind.trained_as]
            command += ["--data", self.data, "--device", self.device, "--save", path]
            print(f"training {self.kind.name}, since {path} does not exist", flush=True)
            subprocess.run([*map(str, command)], check=True, cwd=ROOT)
        return path

"""Good files of every format, and the commands that open them; `hostile.py` damages them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import surgeon
from surgeon.app.outputs import write_plan
from surgeon.surgery.history import content_hash

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.append(str(ROOT / "tests" / "nets"))  # the classes that golden files name

SHAPE = "--input=2,3,16,16"
ALLOW = "--allow=golden_nets"
BLOCKS = ("acblock-takeover", "hetconv-best", "octave-streams", "octave-fused", "functional-acblock", "three-steps")


@dataclass(frozen=True)
class Good:
    """A file that opens, and how: `opens` gives the arguments of each command, with `X` for the file."""

    name: str  # its path below the folder of good files, whose suffix says its format
    opens: tuple[tuple[str, ...], ...]
    has_checksum: bool = False  # the format has one for each entry, so damage can be known
    has_hash: bool = False  # a manifest says what its tensors hash to, so damage can be said
    arch: str | None = None


def model_commands(*more: str) -> tuple[tuple[str, ...], ...]:
    return (
        ("survey", "X", SHAPE, ALLOW, *more),
        ("convert", "X", "-r", "acnet", "-o", "out.pt", SHAPE, ALLOW, *more),
        ("fuse", "X", "-o", "out.safetensors", SHAPE, ALLOW, *more),
        ("verify", "X", "GOOD/net.pt", SHAPE, ALLOW, *more),
    )


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


RECIPE = """\
surgeon: 1
title: ACNet, but for the first conv
cites: arXiv:1908.03930
rules:
  - leave: the stem sees raw pixels
    match: {name: "0"}
    optional: true
  - swap: acblock
    match: {kernel: [3, 5], groups: 1, in_channels: {min: 2, max: 512}}
    with: {init: takeover, placement: skeleton}
"""


def make(folder: Path) -> None:
    """Write the files that are not golden ones."""
    model, state = net(), net().state_dict()
    torch.save(model, folder / "net.pt")
    torch.save(state, folder / "state.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(
        {
            "epoch": 3,
            "state_dict": {f"module.{key}": value for key, value in state.items()},
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict(),
            "args": {"lr": 0.1, "name": "run"},
        },
        folder / "checkpoint.pt",
    )
    save_file(state, folder / "weights.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE)
    for recipe, plan in ((folder / "recipe.yaml", "plan.yaml"), ("hetconv-p4", "plan.json")):
        write_plan(surgeon.plan(model, recipe, (2, 3, 16, 16)), folder / plan, force=True)
    torch.save(surgeon.convert(model, "acnet", (2, 3, 16, 16)), folder / "acnet.pt")
    for name in ("format1", "format2-checksums"):
        (folder / name).mkdir()
        for file in (*(f"{block}.pt" for block in BLOCKS), "residual.pt", "manifest.safetensors", "plan-acblock.yaml"):
            (folder / name / file).write_bytes((GOLDEN / name / file).read_bytes())
        (folder / name / "plan-octave.json").write_bytes((GOLDEN / name / "plan-octave.json").read_bytes())


def _files() -> Sequence[Good]:
    found = [Good(name, model_commands(), has_checksum=True) for name in ("net.pt", "acnet.pt")]
    weights = model_commands("--arch=GOOD/net.pt")
    found += [Good(name, weights, has_checksum=True, arch="net.pt") for name in ("state.pt", "checkpoint.pt")]
    found += [Good(name, weights, arch="net.pt") for name in ("legacy.pt", "weights.safetensors")]
    found += [
        Good(
            "recipe.yaml",
            (("plan", "GOOD/net.pt", "-r", "X", SHAPE), ("convert", "GOOD/net.pt", "-r", "X", "-o", "out.pt", SHAPE)),
        )
    ]
    found += [
        Good(name, (("convert", "GOOD/net.pt", "--plan", "X", "-o", "out.pt"),)) for name in ("plan.yaml", "plan.json")
    ]
    for folder in ("format1", "format2-checksums"):
        found += [Good(f"{folder}/{block}.pt", model_commands(), has_checksum=True) for block in BLOCKS]
        found.append(Good(f"{folder}/manifest.safetensors", model_commands(), has_hash=folder != "format1"))
        for plan in ("plan-acblock.yaml", "plan-octave.json"):
            command = ("convert", f"GOOD/{folder}/residual.pt", "--plan", "X", "-o", "out.pt", ALLOW)
            found.append(Good(f"{folder}/{plan}", (command,)))
    return found


FILES: dict[str, Good] = {good.name: good for good in _files()}


def digest(path: Path, arch: Path | None) -> str:
    """Open a model file, and say which network and which numbers came out."""
    model = surgeon.load(path, arch=str(arch) if arch else None, allow=["golden_nets"])
    return f"{content_hash(model)} {model}"

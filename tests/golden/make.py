"""Writes the golden files: one of every kind that surgeon writes, small, by the public API and the command line alone.

    python tests/golden/make.py tests/golden/format3

`format1` was written before the code moved into packages, and `format2` when states, graphs, plans and histories got
numbers of their own, `format2-checksums` when `.safetensors` files got a checksum and state dicts roles; none of them
is ever written again. When a format changes, this is run once more, into a new folder
and with the code as it is then. `tests/test_golden.py` opens all folders, for ever; docs/formats.md says why.
Beside each model lie an input and the output for it, in `expected.safetensors`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "nets")]

import torch
from golden_nets import Functional, Residual
from helpers import run_surgeon, shake_
from safetensors.torch import save_file
from torch import Tensor, nn

import surgeon
from surgeon.nn import SmallResNet

INPUT = (2, 3, 16, 16)
TINY_RESNET = ("--arch-arg", "channels=[8,8,8,8]", "--arch-arg", "num_classes=4", "--arch-arg", "stem_width=8")
ALL = {"kernel": 3}


def _recipe(block: str, options: dict[str, object], match: dict[str, object] = ALL) -> dict[str, object]:
    return {"surgeon": 1, "title": "golden", "rules": [{"swap": block, "match": match, "with": options}]}


RECIPES = {
    "acblock-takeover": _recipe("acblock", {"init": "takeover"}),
    "acblock-split-border": _recipe("acblock", {"init": "split", "placement": "border"}),
    "acblock-scratch": _recipe("acblock", {"init": "scratch", "gamma": 0.5}),
    "hetconv-block": _recipe("hetconv", {"p": 2, "layout": "block"}, {"name": "layer*.conv?"}),
    "hetconv-interleaved": _recipe("hetconv", {"p": 2, "layout": "interleaved"}, {"name": "layer*.conv?"}),
    "hetconv-best": _recipe("hetconv", {"p": 2, "layout": "best"}, {"name": "layer*.conv?"}),
    "octave-local": _recipe("octave", {"alpha": 0.5, "min_size": 1, "seams": "keep"}, {"name": "layer*.**"}),
    "octave-streams": _recipe("octave", {"alpha": 0.5, "min_size": 1}, {"name": "layer*.**"}),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    x = torch.randn(INPUT)
    expected: dict[str, Tensor] = {"input": x}

    def keep(model: nn.Module, name: str) -> None:
        surgeon.save(model, folder / f"{name}.pt")
        with torch.no_grad():
            expected[name] = model.eval()(x)

    nets = {"residual": shake_(Residual(), 1, gently=True), "functional": shake_(Functional(), 1, gently=True)}
    for name, net in nets.items():
        keep(net.eval(), name)
    made = {name: surgeon.convert(nets["residual"], recipe, INPUT) for name, recipe in RECIPES.items()}
    made["functional-acblock"] = surgeon.convert(nets["functional"], _recipe("acblock", {"init": "split"}), INPUT)
    made["octave-fused"] = surgeon.fuse(made["octave-streams"])
    first = surgeon.convert(nets["residual"], _recipe("acblock", {"init": "split"}, {"name": "layer1.*"}), INPUT)
    second = surgeon.convert(first, _recipe("hetconv", {"p": 2, "layout": "best"}, {"name": "layer2.conv1"}), INPUT)
    made["three-steps"] = surgeon.fuse(second)
    for name, model in made.items():
        keep(model, name)
    grey = expected["demo-input"] = torch.randn(2, 1, 28, 28)
    demo = shake_(SmallResNet(width=4), 1, gently=True)
    for name, model in (("demo", demo), ("demo-octave", surgeon.convert(demo, "octave", (1, 1, 28, 28)))):
        surgeon.save(model, folder / f"{name}.pt")
        with torch.no_grad():
            expected[name] = model.eval()(grey)
    for name, net, recipe in (
        ("plan-acblock.yaml", "residual", "acblock-split-border"),
        ("plan-octave.json", "residual", "octave-streams"),
        ("plan-functional.yaml", "functional", "acblock-takeover"),
    ):
        written = folder / "recipe.yaml"
        plan = surgeon.plan(nets[net], RECIPES[recipe], INPUT)
        written.write_text(plan.recipe.text)
        model, shape = folder / f"{net}.pt", "--input=2,3,16,16"
        _run("plan", model, "-r", written, "-o", folder / name, shape, "--allow", "golden_nets")
        written.unlink()
    tensors = folder / "manifest.safetensors"
    _run("convert", "timm:resnet10t", *TINY_RESNET, "-r", "acnet", "--input=2,3,16,16", "-o", tensors)
    with torch.no_grad():
        expected["manifest"] = surgeon.load(tensors).eval()(x)
    save_file(expected, folder / "expected.safetensors")


def _run(*arguments: object) -> None:
    if run_surgeon(*arguments):
        raise SystemExit(f"surgeon {' '.join(map(str, arguments))} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

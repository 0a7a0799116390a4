"""Files that earlier versions have written: they open, compute what they did, and verify, for ever.

`tests/golden/make.py` has written them; a folder for every version of the formats, none of them ever written again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import relative, run_surgeon
from safetensors.torch import load_file

import surgeon

FOLDERS = sorted(path for path in (Path(__file__).parent / "golden").iterdir() if path.name.startswith("format"))
VERDICTS = {  # of each file against the one that it was made from
    "acblock-takeover": ("residual", "equivalent"),
    "acblock-split-border": ("residual", "equivalent"),
    "acblock-scratch": ("residual", "approximate"),
    "hetconv-block": ("residual", "approximate"),
    "hetconv-interleaved": ("residual", "approximate"),
    "hetconv-best": ("residual", "approximate"),
    "octave-local": ("residual", "approximate"),
    "octave-streams": ("residual", "approximate"),
    "octave-fused": ("octave-streams", "equivalent"),
    "functional-acblock": ("functional", "equivalent"),
    "three-steps": ("residual", "approximate"),
    "demo-octave": ("demo", "approximate"),
}
PLANS = {
    "plan-acblock.yaml": ("residual", "acblock-split-border"),
    "plan-octave.json": ("residual", "octave-streams"),
    "plan-functional.yaml": ("functional", "functional-acblock"),
}


every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def _load(file: Path) -> torch.nn.Module:
    return surgeon.load(file, allow=("golden_nets",)).eval()


def test_there_are_folders() -> None:
    assert FOLDERS


@every_folder
def test_every_file_is_opened_by_a_test(folder: Path) -> None:
    known = {f"{name}.pt" for name in (*VERDICTS, "residual", "functional", "demo")}
    known |= {*PLANS, "manifest.safetensors", "expected.safetensors"}
    assert {file.name for file in folder.iterdir()} == known


@every_folder
@pytest.mark.parametrize("name", ["residual", "functional", "demo", "manifest", *VERDICTS])
def test_it_computes_what_it_did(name: str, folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model = _load(folder / ("manifest.safetensors" if name == "manifest" else f"{name}.pt"))
    x = expected["demo-input" if name.startswith("demo") else "input"]
    with torch.no_grad():
        assert relative(model(x), expected[name]) <= 1e-6


@every_folder
@pytest.mark.parametrize("name", VERDICTS)
def test_it_verifies_against_what_it_was_made_from(name: str, folder: Path) -> None:
    origin, verdict = VERDICTS[name]
    report = surgeon.verify(_load(folder / f"{origin}.pt"), _load(folder / f"{name}.pt"))
    assert report.verdict == verdict, report
    assert any(check.name == "stored tensors" for check in report.checks)  # its history was carried out again


@every_folder
@pytest.mark.parametrize("name", VERDICTS)
def test_a_wrong_tap_in_it_is_found(name: str, folder: Path) -> None:
    origin, _ = VERDICTS[name]
    model = _load(folder / f"{name}.pt")
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 4).view(-1)[0] += 1e-3
    assert surgeon.verify(_load(folder / f"{origin}.pt"), model).verdict == "different"


@every_folder
def test_its_history_is_complete(folder: Path) -> None:
    model = _load(folder / "three-steps.pt")
    steps = model.surgeon_provenance["history"]
    assert [step["operation"] for step in steps] == ["convert", "convert", "fuse"]


@every_folder
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_carried_out(plan: str, folder: Path, tmp_path: Path) -> None:
    origin, _ = PLANS[plan]
    made = tmp_path / "made.pt"
    model = folder / f"{origin}.pt"
    assert run_surgeon("convert", model, "--plan", folder / plan, "-o", made, "--allow", "golden_nets") == 0
    assert run_surgeon("verify", model, made, "--allow", "golden_nets") in (0, 3)


@every_folder
def test_it_trains_on(folder: Path) -> None:
    for name in VERDICTS:
        if name == "octave-fused":  # a deployment form
            continue
        model = _load(folder / f"{name}.pt").train()
        channels = 1 if name.startswith("demo") else 3
        model(torch.randn(2, channels, 28, 28)).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())

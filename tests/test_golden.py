"""Files that earlier versions have written: they open, compute what they did, and verify, for ever.

`tests/golden/make.py` has written them; a folder for every version of the formats, none of them ever written again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_nets
import pytest
import torch
from helpers import relative, run_surgeon
from safetensors.torch import load_file

import surgeon
import surgeon.nn

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


PLAIN = """
import json, sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file

warnings.simplefilter("error")
folder, names = Path(sys.argv[1]), sys.argv[2:]
expected, far = load_file(folder / "expected.safetensors"), {}
for name in names:
    model = torch.load(folder / f"{name}.pt", weights_only=False).eval()
    with torch.no_grad():
        made = model(expected["demo-input" if name.startswith("demo") else "input"])
    far[name] = float((made - expected[name]).norm() / expected[name].norm())
print(json.dumps({"far": far, "imported": sorted(name for name in sys.modules if name.startswith("surgeon"))}))
"""


def _opened_by_torch(folder: Path, names: list[str], path: Path, cwd: Path) -> dict[str, Any]:
    """Open files with torch alone, in a process whose path has the installed package and `path`."""
    package = Path(surgeon.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-P", "-c", PLAIN, str(folder), *names],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("folder", FOLDERS[1:], ids=lambda folder: folder.name)
def test_plain_torch_opens_it(folder: Path, tmp_path: Path) -> None:
    """From format 2 on; what is needed besides is the code of one's own network."""
    nets = Path(golden_nets.__file__).parent
    found = _opened_by_torch(folder, ["residual", "functional", "demo", *VERDICTS], nets, tmp_path)
    assert found["far"].keys() == {"residual", "functional", "demo", *VERDICTS}
    assert max(found["far"].values()) <= 1e-6
    assert "surgeon.nn" in found["imported"]
    assert not {"surgeon.api", "surgeon.app.cli", "surgeon.surgery"} & set(found["imported"])


@pytest.mark.parametrize("folder", FOLDERS[1:], ids=lambda folder: folder.name)
def test_plain_torch_opens_the_demo_without_any_other_code(folder: Path, tmp_path: Path) -> None:
    assert max(_opened_by_torch(folder, ["demo", "demo-octave"], tmp_path, tmp_path)["far"].values()) <= 1e-6


def test_files_of_format_1_need_surgeon_to_be_opened(tmp_path: Path) -> None:
    """They name modules that are no more; this shows that the test above can fail."""
    with pytest.raises(AssertionError, match=r"No module named 'surgeon\.demo'"):
        _opened_by_torch(FOLDERS[0], ["demo"], tmp_path, tmp_path)


@pytest.mark.parametrize("folder", FOLDERS[1:], ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", VERDICTS)
def test_it_names_no_class_by_where_its_code_lies(name: str, folder: Path) -> None:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(folder / f"{name}.pt")
    ours = {name for name in names if name.startswith("surgeon.")}
    assert ours <= {f"surgeon.nn.{known}" for known in surgeon.nn.__all__} - {"surgeon.nn.Pads"}


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

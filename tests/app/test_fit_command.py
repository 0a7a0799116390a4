"""`surgeon fit` and `surgeon convert --data`: the files, what is printed, and one line for what cannot be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon, shake_
from safetensors.torch import save_file

import surgeon
from surgeon.app.demo.net import SmallResNet

ARCH = ("--arch", "surgeon.app.demo.net:SmallResNet", "--arch-arg", "width=8")
SHAPE = ("--input", "1,1,12,12")
RECIPE = """surgeon: 1
title: the convs of the first stage
rules:
  - swap: hetconv
    with: {p: 4}
    match: {name: layer1.**}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, what `convert` makes of it, and 64 images of 12×12 with ten classes."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    net = shake_(SmallResNet(width=8), gently=True).eval()
    recipe = {"surgeon": 1, "rules": [{"swap": "hetconv", "with": {"p": 4}, "match": {"name": "layer1.**"}}]}
    surgeon.save(net, folder / "net.pt")
    surgeon.save(surgeon.convert(net, recipe, (1, 1, 12, 12)), folder / "net.het.pt")
    (folder / "het.yaml").write_text(RECIPE)
    save_file({"images": torch.randn(64, 1, 12, 12), "labels": torch.arange(64) % 10}, folder / "x.safetensors")
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in made.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FIT = ("fit", "net.het.pt", "--reference", "net.pt")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """Run a command that works; what it prints on standard output and on standard error."""
    capsys.readouterr()
    code = run_surgeon(*arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_a_fitted_model_is_written_beside_the_converted_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, *FIT, "--data", "x.safetensors")
    assert "written: net.het.fit.pt" in out
    assert "fitted to x.safetensors: " in out
    assert [step.operation for step in surgeon.history(surgeon.load("net.het.fit.pt"))] == ["convert", "fit"]
    rows = [line.split() for line in out.splitlines() if line.startswith("layer1")]
    assert [row[1] for row in rows] == ["hetconv", "hetconv"]
    assert all(float(row[3]) < float(row[2]) for row in rows)


def test_json_has_every_site_and_the_network_before_and_after(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(printed(capsys, *FIT, "--data", "x.safetensors", "--labels", "own", "--json")[0])
    assert (told["path"], told["source"], told["images"]) == ("net.het.fit.pt", "x.safetensors", 64)
    assert {"layer1.0.conv1", "layer1.0.conv2"} <= {site["path"] for site in told["sites"]}
    steps = told["network"]
    assert steps["fitted"]["relative_l2"] < 0.5 * steps["converted"]["relative_l2"]
    assert steps["fitted"].keys() == {"agreement", "relative_l2", "accuracy", "accuracy_before"}
    stored = dict(surgeon.history(surgeon.load("net.het.fit.pt"))[-1].measured)
    assert stored == {name: value for name, value in told.items() if name != "path"}


def test_labels_change_nothing_that_is_fitted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("a.pt", ()), ("b.pt", ("--labels", "own"))):
        out, _ = printed(capsys, *FIT, "--data", "x.safetensors", "-o", name, *more)
        assert ("accuracy of the original on them" in out) == bool(more)
    one, other = (surgeon.load(name).state_dict() for name in ("a.pt", "b.pt"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_images_batch_and_seed_say_which_images(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, *FIT, "--data", "x.safetensors", "--images", "40", "--batch", "16", "--seed", "3")
    assert "40 of 64 images in the order of seed 3, 16 at once" in " ".join(out.split())


def test_convert_with_data_gives_what_fit_does(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, *FIT, "--data", "x.safetensors", "-o", "after.pt")
    out, _ = printed(
        capsys, "convert", "net.pt", "-r", "het.yaml", *SHAPE, "--data", "x.safetensors", "-o", "once.pt", "--json"
    )
    assert json.loads(out)["fit"]["network"]["fitted"]["relative_l2"] > 0
    one, other = (surgeon.load(name).state_dict() for name in ("after.pt", "once.pt"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_convert_with_data_does_not_ask_for_training(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("convert", "net.pt", "-r", "het.yaml", *SHAPE, "-o", "new.pt", "--force")
    assert "2 convs now compute a different function; retrain the network" in printed(capsys, *command)[0]
    out, _ = printed(capsys, *command, "--data", "x.safetensors")
    assert "2 convs now compute a different function; they were fitted to what their convs gave" in out
    one = ("--set", "rules[0].match.name=layer1.0.conv1")
    out, _ = printed(capsys, *command, *one, "--data", "x.safetensors")
    assert "1 conv now computes a different function; it was fitted to what its conv gave" in out


def test_distilling_is_a_step_of_its_own(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, *FIT, "--data", "x.safetensors", "--distil", "3", "--json")
    told = json.loads(out)
    assert told["network"].keys() == {"converted", "fitted", "distilled"}
    assert told["distilled"]["steps"] == 3


def test_a_state_is_gone_on_from_and_one_of_another_fit_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = printed(capsys, *FIT, "--data", "x.safetensors", "--resume", "state", "-o", "a.pt")
    again, _ = printed(capsys, *FIT, "--data", "x.safetensors", "--resume", "state", "-o", "b.pt")
    assert first.replace("a.pt", "b.pt") == again
    assert run_surgeon(*FIT, "--data", "x.safetensors", "--resume", "state", "--images", "30", "-o", "c.pt") == 2
    assert "state is of a fit with other networks, data or options" in capsys.readouterr().err
    assert not Path("c.pt").exists()


def test_noise_is_said_to_be_a_bad_idea(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, *FIT, *SHAPE, "--data", "noise:32")
    assert "noise is a bad idea" in err
    assert "which are not images" in " ".join(out.split())


REFUSED = {  # what is given, and what is said
    "no images": ((*FIT,), "--data is missing: name images to fit to"),
    "no reference": (("fit", "net.het.pt", "--data", "x.safetensors"), "Missing option '--reference'"),
    "what to do with no images": ((*FIT, "--images", "3"), "--images, --batch, --preprocess and --labels say what"),
    "no image": ((*FIT, "--data", "x.safetensors", "--images", "0"), "Invalid value for '--images'"),
    "a number of steps below zero": ((*FIT, "--data", "x.safetensors", "--distil", "-1"), "Invalid value for"),
    "a folder that is not there": ((*FIT, "--data", "photos"), "the source of images photos is not there"),
    "labels that are not there": (
        (*FIT, "--data", "x.safetensors", "--labels", "y.npy"),
        "there is no file of labels y.npy",
    ),
    "preprocessing of what is preprocessed": (
        (*FIT, "--data", "x.safetensors", "--preprocess", "imagenet"),
        "holds floats, which are taken as already preprocessed",
    ),
    "a reference that is not there": (
        ("fit", "net.het.pt", "--reference", "ent.pt", "--data", "x.safetensors"),
        "there is no file ent.pt",
    ),
    "the converted network as its own reference": (
        ("fit", "net.het.pt", "--reference", "net.het.pt", "--data", "x.safetensors"),
        "was not converted from this reference",
    ),
    "a network that was not converted": (
        ("fit", "net.pt", "--reference", "net.pt", "--data", "x.safetensors"),
        "was not converted from this reference",
    ),
    "steps without images": (("convert", "net.pt", "-r", "het.yaml", "--distil", "3"), "give images, --data SOURCE"),
    "labels without images": (("convert", "net.pt", "-r", "het.yaml", "--labels", "own"), "with --data SOURCE"),
    "blocks that keep the function": (
        ("convert", "net.pt", "-r", "acnet", *SHAPE, "--data", "x.safetensors"),
        "ACBlocks compute what their convs did",
    ),
    "the images as the output": (
        (*FIT, "--data", "x.safetensors", "-o", "x.safetensors", "--force"),
        "x.safetensors is among the files that this is made from",
    ),
    "an array of the images as the output": (
        (*FIT, "--data", "x.safetensors:images", "-o", "x.safetensors", "--force"),
        "x.safetensors is among the files that this is made from",
    ),
    "the state as the output": (
        (*FIT, "--data", "x.safetensors", "--resume", "new.pt", "-o", "new.pt"),
        "new.pt is among the files that this is made from",
    ),
    "the reference as the output": (
        (*FIT, "--data", "x.safetensors", "-o", "net.pt", "--force"),
        "net.pt is among the files that this is made from",
    ),
    "a file that is there": ((*FIT, "--data", "x.safetensors", "-o", "het.yaml"), "cannot tell from 'het.yaml'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
    home: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    arguments, said = REFUSED[what]
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    assert run_surgeon(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before


def test_an_existing_file_is_overwritten_with_force_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.het.fit.pt").write_text("mine")
    assert run_surgeon(*FIT, "--data", "x.safetensors") == 2
    assert "net.het.fit.pt exists" in capsys.readouterr().err
    assert Path("net.het.fit.pt").read_text() == "mine"
    printed(capsys, *FIT, "--data", "x.safetensors", "--force")
    assert surgeon.load("net.het.fit.pt")


def test_a_fused_network_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "fuse", "net.het.pt")
    assert run_surgeon("fit", "net.het.fused.pt", "--reference", "net.pt", "--data", "x.safetensors") == 2
    assert "the network has been fused, and its blocks are gone" in capsys.readouterr().err


def test_a_fitted_network_is_approximate_and_its_fused_form_is_proved(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, *FIT, "--data", "x.safetensors", "-o", "fit.pt")
    printed(capsys, "fuse", "fit.pt")
    assert run_surgeon("verify", "fit.pt", "fit.fused.pt") == 0
    for a, b in (("net.pt", "fit.pt"), ("net.pt", "fit.fused.pt"), ("net.het.pt", "fit.pt")):
        assert run_surgeon("verify", a, b) == 3, (a, b)


def test_weights_with_a_manifest_are_the_fitted_network_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(surgeon.load("net.pt").state_dict(), "weights.safetensors")
    convert = ("convert", "weights.safetensors", *ARCH, "-r", "het.yaml", *SHAPE, "--data", "x.safetensors")
    printed(capsys, *convert, "-o", "fit.safetensors")
    printed(capsys, *FIT, "--data", "x.safetensors", "-o", "fit.pt")
    named = {"arch": ARCH[1], "arch_args": {"width": 8}}
    again, whole = surgeon.load("fit.safetensors", **named), surgeon.load("fit.pt")
    assert [step.operation for step in surgeon.history(again)] == ["convert", "fit"]
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in again.state_dict().items())
    printed(capsys, "fuse", "fit.safetensors", *ARCH)
    assert run_surgeon("verify", "fit.safetensors", "fit.fused.safetensors", *ARCH) == 0
    more = ("--reference", "weights.safetensors", "--data", "x.safetensors", "--images", "50")
    printed(capsys, "fit", "fit.safetensors", *ARCH, *more)
    twice = surgeon.history(surgeon.load("fit.fit.safetensors", **named))
    assert [step.operation for step in twice] == ["convert", "fit", "fit"]

"""Example inputs: every way to give one, every wrong way, and networks that take something else than one tensor."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from helpers import relative, run_surgeon, shake_
from tiny import SHAPE, ConvNorm, conv3
from torch import Tensor, nn

import surgeon
from surgeon.analysis import example as examples
from surgeon.analysis.example import guess, make, read
from surgeon.errors import CaptureError, RecipeError
from surgeon.models import call as inputs
from surgeon.models.call import Inputs
from surgeon.surgery import bench
from surgeon.surgery import plan as plans

np = pytest.importorskip("numpy")
image_files = pytest.importorskip("PIL.Image")

# Networks, one per way to be called


class Star(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm()

    def forward(self, *images: Tensor) -> Tensor:
        return sum(self.stem(image).mean((2, 3)) for image in images)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(), nn.BatchNorm2d(4)

    def forward(self, **given: Tensor) -> Tensor:
        return self.bn(self.conv(given["image"])) * given["mask"]


class KeywordsMayBeLeftOut(Keywords):
    """Its norm follows the conv directly only if `scale` is given."""

    def forward(self, **given: Tensor) -> Tensor:
        y = self.conv(given["image"])
        scale = given.get("scale")
        return self.bn(y.relu() if scale is None else y)


class KeywordOnly(Keywords):
    def forward(self, x: Tensor, *, mask: Tensor, gain: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x)) * mask
        return y if gain is None else y * gain


class Optional(Keywords):
    """Its norm follows the conv directly only if `scale` is not given."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y if scale is None else y * scale)


class OptionalNorm(Keywords):
    """It has the norm only if it is told to."""

    def forward(self, x: Tensor, normed: bool = False) -> Tensor:
        return self.bn(self.conv(x)) if normed else self.conv(x)


class Dict(Keywords):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": self.bn(self.conv(batch["image"])) * batch["mask"]}


class DictMayLack(Keywords):
    """Its norm follows the conv directly only if there is a scale."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        y = self.conv(batch["image"])
        return self.bn(y.relu() if batch.get("scale") is None else y)


class List(Keywords):
    """Takes images of several sizes, as detectors do."""

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.bn(self.conv(image[None]))[0] for image in images]


class Nested(Keywords):
    def forward(self, pair: tuple[Tensor, list[Tensor]], flags: dict[str, Tensor]) -> Tensor:
        image, (mask, _) = pair
        return self.bn(self.conv(image)) * mask * flags["keep"]


class Words(Keywords):
    """Takes numbers of words, of which it knows five."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.words(words).mean(1)[:, :, None, None]


class Writes(Keywords):
    """Writes on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x.sub_(1)))


class Positive(Keywords):
    """Takes positive numbers only."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x < 0).any()):
            raise ValueError("a pixel is negative")
        return self.bn(self.conv(x))


def ones() -> Tensor:
    return torch.ones(2, 4, 9, 8)


IMAGE = "2,4,9,8"
# network, how it is called on the command line, and from Python
CALLS: dict[str, tuple[type[nn.Module], str, Any]] = {
    "args": (Star, f"{IMAGE};1,4,6,7", (SHAPE, (1, 4, 6, 7))),
    "kwargs": (Keywords, f"image={IMAGE};mask=2,4,9,8:bool", {"image": SHAPE, "mask": torch.ones(SHAPE).bool()}),
    "kwargs left out": (KeywordsMayBeLeftOut, f"image={IMAGE}", {"image": SHAPE}),
    "kwargs not left out": (KeywordsMayBeLeftOut, f"image={IMAGE};scale=1", {"image": SHAPE, "scale": (1,)}),
    "keyword-only": (
        KeywordOnly,
        f"{IMAGE};mask=1,1,9,8",
        Inputs((torch.ones(SHAPE),), {"mask": torch.ones(1, 4, 1, 1)}),
    ),
    "keyword-only, all": (
        KeywordOnly,
        f"{IMAGE};mask=1,1,9,8;gain=()",
        {"x": SHAPE, "mask": (1, 4, 9, 8), "gain": (1,)},
    ),
    "optional, left out": (Optional, IMAGE, SHAPE),
    "optional, given": (Optional, f"{IMAGE};1,4,1,1", (SHAPE, (1, 4, 1, 1))),
    "optional, a constant": (OptionalNorm, f"{IMAGE};true", (SHAPE, True)),
    "a dict": (Dict, f"{{image={IMAGE};mask=1,1,9,8}}", ({"image": SHAPE, "mask": (1, 1, 9, 8)},)),
    "a dict that lacks something": (DictMayLack, f"{{image={IMAGE}}}", ({"image": SHAPE},)),
    "a list": (List, "[4,9,8;4,7,6]", ([(4, 9, 8), (4, 7, 6)],)),
    "nested": (
        Nested,
        f"({IMAGE};[1,1,9,8;1]);{{keep=9,8:uint8<2}}",
        ((SHAPE, [(1, 1, 9, 8), torch.ones(1)]), {"keep": torch.ones(9, 8)}),
    ),
    "whole numbers": (Words, f"{IMAGE};2,7:int64<5", (SHAPE, torch.tensor([[0, 4, 1], [2, 2, 3]]))),
    "written on": (Writes, IMAGE, SHAPE),
}
every_call = pytest.mark.parametrize(("kind", "text", "example"), CALLS.values(), ids=CALLS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(folder: Path) -> Iterator[str]:
    """A file of a user's own functions, imported anew for every test."""
    Path("own_inputs.py").write_text(
        "import torch\n"
        "def tensor():\n    return torch.randn(2, 4, 9, 8)\n"
        "def several():\n    return torch.ones(2, 4, 9, 8), torch.full((1, 4, 1, 1), 2.0)\n"
        "def named():\n    print('hello'); return {'image': torch.ones(2, 4, 9, 8), 'mask': torch.zeros(9, 8)}\n"
        "def fails():\n    raise KeyError('no such thing')\n"
        "def nothing():\n    return None\n"
        "number = 5\n"
    )
    yield "own_inputs.py"
    sys.modules.pop("own_inputs", None)


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return shake_(kind().double()).eval()


def out(model: nn.Module, example: Any) -> Any:
    leaves, _ = torch.utils._pytree.tree_flatten(make(example).cast(torch.float64).call(model))
    return torch.cat([leaf.flatten() for leaf in leaves])


def asked(text: str, model: nn.Module | None = None) -> Inputs:
    return read(text, model or nn.Identity())


# Networks, from the library


@every_call
def test_it_converts_folds_and_verifies(kind: type[nn.Module], text: str, example: Any) -> None:
    net = network(kind)
    plan = surgeon.plan(net, "acnet", example)
    converted = surgeon.convert(net, plan, example)
    fused = surgeon.fuse(converted)
    with torch.no_grad():
        for model in (converted, fused):
            assert relative(out(model, example), out(net, example)) < 1e-13
    assert [type(m).__name__ for m in converted.modules()].count("ACBlock") == 1
    assert surgeon.verify(net, converted, [example]).equivalent
    assert surgeon.verify(converted, fused, [example]).equivalent
    with torch.no_grad():
        next(m for m in fused.modules() if isinstance(m, nn.Conv2d)).weight[0, 0, 0, 0] += 1e-6
    assert surgeon.verify(converted, fused, [example]).verdict == "different"


@every_call
def test_it_is_surveyed_and_planned_without_any_input(kind: type[nn.Module], text: str, example: Any) -> None:
    net = network(kind)
    assert len(surgeon.survey(net).sites) == 1
    converted = surgeon.convert(net, surgeon.plan(net, "acnet"))
    assert [type(m).__name__ for m in surgeon.fuse(converted).modules()].count("Conv2d") == 1


def test_a_norm_is_taken_over_where_the_example_shows_that_it_follows() -> None:
    def takes(name: str) -> bool:
        kind, text, _ = CALLS[name]
        net = network(kind)
        (entry,) = surgeon.plan(net, "acnet", read(text, net)).convs
        return bool(entry.takes_norm)

    assert takes("args")
    assert takes("kwargs")
    assert takes("keyword-only, all")
    assert takes("optional, left out")
    assert takes("optional, a constant")
    assert not takes("optional, given")
    assert not takes("kwargs left out")
    assert not takes("a dict that lacks something")


def test_what_a_plan_writes_down_is_enough_to_do_it_again() -> None:
    net = network(OptionalNorm)
    assert not surgeon.plan(net, "acnet", SHAPE).convs[0].takes_norm
    plan = surgeon.plan(net, "acnet", (SHAPE, True))
    assert plan.input == "2,4,9,8;true"
    converted = surgeon.convert(net, plan)
    assert surgeon.verify(net, converted).equivalent  # the input is that of the history


def test_an_input_that_the_model_writes_on_stays_as_it_is() -> None:
    net, x = network(Writes), torch.randn(SHAPE, dtype=torch.float64)
    before = x.clone()
    converted = surgeon.convert(net, "acnet", x)
    assert surgeon.verify(net, converted, x).equivalent
    assert torch.equal(x, before)


# Networks, from the command line


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    code = run_surgeon(*arguments, "--json")
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else None, printed.err


@every_call
@pytest.mark.usefixtures("folder")
def test_every_command_takes_it(
    capsys: pytest.CaptureFixture[str], kind: type[nn.Module], text: str, example: Any
) -> None:
    torch.save(shake_(kind()), "net.pt")
    given = (f"--input={text}", "--allow=test_examples", "--allow=tiny")
    code, survey, error = run_json(capsys, "survey", "net.pt", *given)
    assert code == 0, error
    assert survey["convs"][0]["calls"] == len(survey["convs"][0]["shapes"]) > 0
    code, converted, error = run_json(capsys, "convert", "net.pt", "-r", "acnet", *given)
    assert code == 0, error
    assert converted["self_check"]["whole"] < 1e-6
    assert run_json(capsys, "fuse", "net.acnet.pt", *given)[0] == 0
    code, report, error = run_json(capsys, "verify", "net.pt", "net.acnet.fused.pt", *given)
    assert code == 0, error
    assert report["distances"][0]["input"] == str(read(text, nn.Identity()))
    code, timings, error = run_json(capsys, "bench", "net.pt", "net.acnet.pt", "--rounds=3", "--batch=3", *given)
    assert code == 0, error
    assert timings[0]["macs"] > 0


@pytest.mark.usefixtures("folder")
def test_several_inputs_of_verify_are_several_examples(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(KeywordOnly(), "net.pt")
    given = ("--input=2,4,9,8;mask=1", "--input=x=1,4,5,5;mask=1;gain=1", "--allow=test_examples", "--allow=tiny")
    code, report, _ = run_json(capsys, "verify", "net.pt", "net.pt", *given)
    assert code == 0
    assert [row["input"] for row in report["distances"]] == ["2×4×9×8; mask=1", "x=1×4×5×5; mask=1; gain=1"]
    assert run_surgeon("survey", "net.pt", *given) == 2


@pytest.mark.usefixtures("folder")
def test_a_plan_replays_its_example(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(KeywordOnly(), "net.pt")
    allow = ("--allow=test_examples", "--allow=tiny")
    text = "2,4,9,8;mask=1,1,9,8:bool"
    assert run_surgeon("plan", "net.pt", "-r", "acnet", "-o", "plan.yaml", f"--input={text}", *allow) == 0
    assert plans.read("plan.yaml").input == text
    code, done, error = run_json(capsys, "convert", "net.pt", "--plan", "plan.yaml", *allow)
    assert code == 0
    assert done["self_check"]["whole"] < 1e-6
    assert "note" not in error.replace("note: to open", "")


@pytest.mark.usefixtures("folder")
def test_a_plan_whose_shapes_do_not_do_asks_for_the_input_again(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Positive(), "net.pt")
    allow = ("--allow=test_examples", "--allow=tiny")
    ones = f"--input={__file__}:ones"
    assert run_surgeon("plan", "net.pt", "-r", "acnet", "-o", "plan.yaml", ones, *allow) == 0
    assert plans.read("plan.yaml").input == (SHAPE,)
    code, done, error = run_json(capsys, "convert", "net.pt", "--plan", "plan.yaml", *allow)
    assert code == 0
    assert done["self_check"]["whole"] is None
    assert "random input of the shapes in the plan (2×4×9×8) is rejected by the model" in error
    assert "pass --input again" in error
    code, done, error = run_json(capsys, "convert", "net.pt", "--plan", "plan.yaml", "-f", ones, *allow)
    assert done["self_check"]["whole"] < 1e-6


def test_old_plans_with_shapes_still_read() -> None:
    net = network(ConvNorm)
    plan = surgeon.plan(net, "acnet", SHAPE)
    data = plan.to_dict()
    assert data["input"] == [[2, 4, 9, 8]]
    again = plans.parse(json.dumps(data), "plan.json")
    assert again == plan
    assert str(again.inputs) == "2×4×9×8"


@pytest.mark.parametrize("bad", ["own_inputs.py:tensor", "x.pt", "1,3,a", "1,3:int65", "[1,3", [[1, -3]]])
def test_a_plan_names_shapes_and_nothing_else(own: str, bad: Any) -> None:
    torch.save(torch.ones(SHAPE), "x.pt")
    data = surgeon.plan(network(ConvNorm), "acnet", SHAPE).to_dict() | {"input": bad}
    with pytest.raises(RecipeError, match="input"):
        plans.parse(json.dumps(data), "plan.json")


def test_a_network_that_needs_more_says_what_it_takes(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    torch.save(KeywordOnly(), "net.pt")
    code, _, error = run_json(capsys, "survey", "net.pt", "--input=2,4,9,8", "--allow=test_examples", "--allow=tiny")
    assert code == 2
    assert "It takes x and mask (and may take gain), for example --input 'x=1,3,8,8;mask=1,3,8,8' (from Python" in error
    assert "example={'x': (1, 3, 8, 8), 'mask': (1, 3, 8, 8)})." in error
    assert error.count("\n") == 1


# The notation


@pytest.mark.parametrize(
    ("text", "shapes", "written"),
    [
        ("1,3,224,224", ((1, 3, 224, 224),), "1,3,224,224"),
        ("1x3x224x224", ((1, 3, 224, 224),), "1,3,224,224"),
        ("1×3×8×8; mask=1×8:bool", ((1, 3, 8, 8), (1, 8)), "1,3,8,8;mask=1,8:bool"),
        ("(1, 3, 8, 8)", ((1, 3, 8, 8),), "1,3,8,8"),
        ("()", ((),), "()"),
        ("1,3:float16", ((1, 3),), "1,3"),
        ("[3,300,300;3,280,320]", ((3, 300, 300), (3, 280, 320)), "[3,300,300;3,280,320]"),
        ("(1,8;);{a=[2];b=none}", ((1, 8), (2,)), "(1,8;);{a=[2];b=none}"),
        ("x=1;y=2:int64<7", ((1,), (2,)), "x=1;y=2:int64<7"),
    ],
)
def test_a_text_is_read_and_written_again(text: str, shapes: tuple[tuple[int, ...], ...], written: str) -> None:
    call = asked(text)
    assert call.shapes == shapes
    assert call.text == written
    again = asked(str(call))
    assert again.shapes == shapes
    assert again.text == written


@pytest.mark.parametrize(
    ("text", "dtype", "values"),
    [
        ("99:bool", torch.bool, {0, 1}),
        ("999:uint8", torch.uint8, set(range(10))),
        ("999:int64<3", torch.int64, set(range(3))),
        ("9999:int32<12", torch.int32, set(range(12))),
    ],
)
def test_whole_numbers_are_drawn_from_a_sane_range(text: str, dtype: torch.dtype, values: set[int]) -> None:
    (tensor,) = asked(text).tensors
    assert tensor.dtype == dtype
    assert set(tensor.tolist()) == values


def test_draws_follow_the_seed_and_differ_from_each_other() -> None:
    one, two, three = (read("1,3,4,4;1,3,4,4;5:complex64", nn.Identity(), seed=seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, one.tensors, two.tensors))
    assert not torch.equal(one.tensors[0], one.tensors[1])
    assert not torch.equal(one.tensors[0], three.tensors[0])
    assert one.tensors[2].dtype == torch.complex64
    assert torch.equal(one.tensors[0], make((1, 3, 4, 4), seed=1).tensors[0])


WRONG = {
    "not a shape": ("1,3,a", "'1,3,a' is neither a shape"),
    "a zero": ("1,0,3", "'1,0,3' is not a shape"),
    "a negative side": ("1,-3,3", "is not a shape"),
    "empty": ("", "neither a shape"),
    "an empty part": ("1,3;", "neither a shape"),
    "a wrong dtype": ("1,3:int65", "names no dtype that can be drawn"),
    "no dtype": ("1,3:", "names no dtype"),
    "a bound of floats": ("1,3:float32<5", "float32 takes no bound"),
    "a bound that is too large": ("1,3:uint8<300", "uint8 takes a bound from 1 to 256"),
    "a bound that is no number": ("1,3:int64<x", "int64 takes a bound from 1"),
    "brackets": ("[1,3", "the brackets of '[1,3' do not match"),
    "brackets without end": ("[" * 5000, "are nested too deeply"),
    "a bound without end": ("1:int64<" + "9" * 5000, "int64 takes a bound"),
    "a side without end": ("9" * 30, "does not fit into memory"),
    "a side with more digits than Python reads": ("9" * 5000, "is not a shape"),
    "a long text": ("a" * 5000, "neither a shape"),
    "a long name of a file": ("a" * 5000 + ".pt", "there is no file"),
    "brackets the wrong way": ("1]3;[2", "do not match"),
    "a name twice": ("a=1,3;a=1,3", "'a' is given twice"),
    "no name after one": ("a=1,3;1,3", "'1,3' has no name"),
    "a dict without names": ("{1,3}", "'1,3' has no name"),
    "constants alone": ("true;none", "there is no tensor in true;none"),
    "no file": ("lost.pt", "there is no file lost.pt"),
    "no file in a part": ("image=lost.png", "there is no file lost.png"),
    "a suffix of nothing": ("what.txt", "'what.txt' is neither a shape, nor a file, nor a function"),
    "a text file": ("notes.txt", "'notes.txt' is a file that holds no inputs"),
    "a damaged .pt": ("damaged.pt", "damaged.pt is not a model file that surgeon knows"),
    "a module": ("module.pt", "there is no tensor in module.pt"),
    "a damaged .safetensors": ("damaged.safetensors", "damaged.safetensors cannot be read as input"),
    "a damaged .npz": ("damaged.npz", "damaged.npz cannot be read as input"),
    "objects in .npy": ("objects.npy", "objects.npy cannot be read as input"),
    "texts in .npy": ("texts.npy", "texts.npy cannot be read as input"),
    "a damaged picture": ("damaged.png", "damaged.png cannot be read as input"),
    "no tensor in it": ("words.pt", "there is no tensor in words.pt"),
    "no python file": ("lost.py:make", "there is no file lost.py"),
    "no module": ("nowhere.mod:make", "there is no module 'nowhere' here"),
    "no function": ("own_inputs.py:tensors", "own_inputs.py has no 'tensors'"),
    "not a function": ("own_inputs.py:number", "own_inputs.py:number is a int"),
    "a function that fails": ("own_inputs.py:fails", "own_inputs.py:fails failed: KeyError: 'no such thing'"),
    "a function of nothing": ("own_inputs.py:nothing", "there is no tensor in own_inputs.py:nothing"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_gets_one_line_and_exit_2(
    own: str, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    for name in ("damaged.pt", "damaged.safetensors", "damaged.npz", "damaged.png", "notes.txt"):
        Path(name).write_text("not this")
    torch.save(conv3(), "module.pt")
    torch.save({"text": "words"}, "words.pt")
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    np.save("texts.npy", np.array(["a"]))
    torch.save(conv3(), "net.pt")
    capsys.readouterr()
    assert run_surgeon("survey", "net.pt", f"--input={text}") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("surgeon: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("bad", [5, "1,3", (), [], {}, (1, 3, 0, 8), (1, 3, 8.5), {"a": "b"}, None])
def test_an_example_without_a_tensor_is_refused(bad: Any) -> None:
    with pytest.raises(CaptureError, match="neither a shape, nor a tensor"):
        make(bad)


# Files and functions


A, B = torch.arange(12.0).view(1, 3, 2, 2), torch.arange(4)


def _save(path: str, content: Any) -> None:
    writers: dict[str, Callable[[Any, str], None]] = {
        ".pt": torch.save,
        ".safetensors": safetensors.torch.save_file,
        ".npy": lambda content, path: np.save(path, content.numpy()),
        ".npz": lambda content, path: (
            np.savez(path, **{k: v.numpy() for k, v in content.items()})
            if isinstance(content, dict)
            else np.savez(path, *(t.numpy() for t in content))
        ),
    }
    writers[Path(path).suffix](content, path)


@pytest.mark.parametrize(
    ("path", "content", "args", "kwargs"),
    [
        ("x.pt", A, (A,), {}),
        ("x.pt", (A, B), (A, B), {}),
        ("x.pt", [A, B], ([A, B],), {}),
        ("x.pt", {"image": A, "mask": [B, A]}, (), {"image": A, "mask": [B, A]}),
        ("x.safetensors", {"whatever": A}, (A,), {}),
        ("x.safetensors", {"image": A, "mask": B}, (), {"image": A, "mask": B}),
        ("x.npy", A, (A,), {}),
        ("x.npz", {"whatever": A}, (A,), {}),
        ("x.npz", {"image": A, "mask": B}, (), {"image": A, "mask": B}),
        ("x.npz", [A, B], (A, B), {}),
        ("a = [1];b.pt", A, (A,), {}),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_file_gives_its_tensors(path: str, content: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _save(path, content)
    call = asked(path)
    torch.testing.assert_close((call.args, dict(call.kwargs)), (args, kwargs), rtol=0, atol=0)


@pytest.mark.usefixtures("folder")
def test_files_and_shapes_stand_side_by_side() -> None:
    _save("x.pt", A)
    _save("y.npy", B)
    call = asked("x.pt;mask=[y.npy;2,2:bool]")
    assert torch.equal(call.args[0], A)
    assert torch.equal(call.kwargs["mask"][0], B)
    assert call.kwargs["mask"][1].dtype == torch.bool


def test_a_function_is_called(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (own, "own_inputs"):
        (tensor,) = asked(f"{name}:tensor").args
        assert torch.equal(tensor, asked(f"{name}:tensor").args[0])  # what it draws follows the seed
        assert not torch.equal(tensor, read(f"{name}:tensor", nn.Identity(), seed=1).args[0])
        assert [t.shape for t in asked(f"{name}:several").args] == [SHAPE, (1, 4, 1, 1)]
        assert list(asked(f"{name}:named").kwargs) == ["image", "mask"]
        assert asked(f"mask={name}:tensor").kwargs["mask"].shape == SHAPE
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["x.pt", "own_inputs.py:several", "x.npz"])
def test_values_reach_the_commands(own: str, capsys: pytest.CaptureFixture[str], text: str) -> None:
    given = (torch.ones(SHAPE), torch.full((1, 4, 1, 1), 2.0))
    _save("x.pt", given)
    _save("x.npz", given)
    torch.save(Optional(), "net.pt")
    options = (f"--input={text}", "--allow=test_examples", "--allow=tiny")
    code, survey, error = run_json(capsys, "survey", "net.pt", *options)
    assert code == 0, error
    assert survey["input"] == [list(SHAPE), [1, 4, 1, 1]]
    assert run_json(capsys, "verify", "net.pt", "net.pt", *options)[0] == 0


def _draw_picture(path: str, mode: str = "RGB") -> Tensor:
    """Save a picture of 7×5 pixels and give its numbers: (channels, height, width)."""
    channels = len(mode) if mode == "RGB" else 1
    pixels = torch.randint(0, 256, (5, 7, channels), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    image_files.frombytes(mode, (7, 5), bytes(pixels.flatten().tolist())).save(path)
    return pixels.permute(2, 0, 1).double() / 255


@pytest.mark.usefixtures("folder")
def test_a_picture_is_made_to_fit_a_timm_network(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="surgeon")
    pixels = _draw_picture("photo.png")
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net.pretrained_cfg = {"input_size": (3, 5, 7), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.5)}
    (image,) = read("photo.png", net).args
    mean, std = (torch.tensor(net.pretrained_cfg[key]).double().view(1, 3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(image, (pixels - mean) / std)
    by = "the mean (0.5, 0.4, 0.3) and deviation (0.1, 0.2, 0.5) of the model"
    assert caplog.messages == [f"photo.png was scaled to [0, 1], normalised with {by}"]


@pytest.mark.usefixtures("folder")
def test_a_picture_is_resized_and_normalised_as_imagenet_where_nothing_else_is_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _draw_picture("photo.jpg")
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), "net.pt")
    code, survey, error = run_json(capsys, "survey", "net.pt", "--input=photo.jpg")
    assert code == 0
    assert survey["input"] == [[1, 3, 224, 224]]
    assert "photo.jpg was resized from 7×5 to 224×224, scaled to [0, 1], normalised with the mean (0.485," in error
    assert "of ImageNet" in error


@pytest.mark.usefixtures("folder")
def test_a_picture_for_one_channel_is_grey() -> None:
    pixels = _draw_picture("grey.png", "L")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 3 * 5, 2))  # takes 5×7 alone
    (image,) = read("grey.png", net).args
    assert torch.equal(image[0], pixels)


@pytest.mark.usefixtures("folder")
def test_a_picture_for_a_detector_keeps_its_size_and_its_colours(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="surgeon")
    pixels = _draw_picture("photo.png")
    ((image,),) = read("photo.png", _detector()).args
    assert torch.equal(image, pixels)
    assert caplog.messages == ["photo.png was scaled to [0, 1]"]


# What is known without asking


def _detector() -> nn.Module:
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    return build(weights=None, weights_backbone=None, min_size=64, max_size=64, box_score_thresh=0.0)


models = torchvision.models
KNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (lambda: models.resnet18(weights=None), "1×3×224×224"),
    "inception_v3": (lambda: models.inception_v3(weights=None, init_weights=False), "1×3×299×299"),
    "lraspp": (
        lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
        "1×3×224×224",
    ),
    "raft": (lambda: models.optical_flow.raft_small(weights=None), "1×3×128×128; 1×3×128×128"),
    "r3d": (lambda: models.video.r3d_18(weights=None), "1×3×16×112×112"),
    "s3d": (lambda: models.video.s3d(weights=None), "1×3×16×224×224"),
    "vit of 64": (lambda: models.vit_b_16(weights=None, image_size=64), "1×3×64×64"),
    "detector": (_detector, "[3×320×320]"),
    "timm": (lambda: timm.create_model("tf_efficientnet_b1"), "1×3×240×240"),
    "timm in grey": (lambda: timm.create_model("tf_efficientnet_b1", in_chans=1), "1×1×240×240"),
    "timm vit of 64": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), "1×3×64×64"),
    "small images": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(2704, 2)), "1×1×28×28"),
}


@pytest.mark.parametrize(("build", "expected"), KNOWN.values(), ids=KNOWN)
def test_the_size_is_known_without_asking(build: Callable[[], nn.Module], expected: str) -> None:
    found = guess(build())
    assert str(found) == expected
    assert found is not None
    assert found.is_guess


@pytest.mark.parametrize(
    "config", [{"input_size": (3, 0, 0)}, {"input_size": (3, 10**9, 10**9)}, {"input_size": "x"}, 5]
)
def test_guessing_survives_what_a_network_says_of_itself(config: object) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net.pretrained_cfg = config
    assert str(guess(net)) == "1×3×224×224"


def test_an_input_is_found_for_a_network_that_begins_with_a_block() -> None:
    """An octave conv holds a kernel and no conv; as it is deployed, it holds convs that read some of the channels."""
    options = surgeon.OctaveConv.Options.model_validate({"alpha_in": 0.5, "alpha_out": 0.0})
    block = surgeon.OctaveConv.from_conv(nn.Conv2d(6, 4, 3, padding=1), options, norm=None, generator=torch.Generator())
    for first in (block, block.deploy()):
        found = guess(nn.Sequential(first))
        assert found is not None
        assert found.shapes[0][1] == 6
        assert found.is_random


def test_a_guess_that_fails_is_none() -> None:
    assert guess(Nested()) is None
    assert guess(nn.Identity()) is None


def test_a_detector_goes_all_the_way() -> None:
    torch.manual_seed(0)
    net = shake_(_detector().double()).eval()
    images = ([torch.rand(3, 64, 64), torch.rand(3, 48, 60)],)
    recipe = {
        "surgeon": 1,
        "title": "the pyramid",
        "rules": [{"swap": "acblock", "match": {"name": "backbone.fpn.**", "kernel": 3}, "with": {"init": "split"}}],
    }
    converted = surgeon.convert(net, recipe, images)
    fused = surgeon.fuse(converted)
    report = surgeon.verify(converted, fused, images)
    assert report.equivalent, report
    assert report.checks[0].measured > 0  # the blocks are seen in the boxes
    with torch.no_grad():
        fused.backbone.fpn.layer_blocks[0][0].weight[0, 0, 1, 1] += 1e-6
    assert surgeon.verify(converted, fused, images).first_to_diverge == "backbone.fpn.layer_blocks.0.0"


# Inputs


def test_a_batch_is_repeated_and_cut() -> None:
    x, mask, scalar = torch.arange(6.0).view(2, 3), torch.ones(7, 7), torch.tensor(3)
    call = Inputs((x, mask, scalar, True), {"y": {"z": x}})
    for count in (1, 5):
        cut = call.batched(count)
        assert torch.equal(cut.args[0], x[[i % 2 for i in range(count)]])
        assert torch.equal(cut.kwargs["y"]["z"], cut.args[0])
        assert cut.args[1] is mask
        assert cut.args[2:] == (scalar, True)


def test_a_list_of_images_is_the_batch() -> None:
    images, targets = (
        [torch.ones(3, 8, 8), torch.zeros(3, 9, 9)],
        [{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(2, 4)}],
    )
    cut = Inputs((images, targets)).batched(3)
    assert [image.shape[1] for image in cut.args[0]] == [8, 9, 8]
    assert [t["boxes"].shape for t in cut.args[1]] == [(2, 4)] * 3
    maps = [torch.ones(1, 8, 8, 8), torch.ones(1, 16, 4, 4)]
    assert [t.shape[0] for t in Inputs((maps,)).batched(3).args[0]] == [3, 3]


def test_more_of_the_kind_is_noise_in_the_place_of_floats_only() -> None:
    index = torch.tensor([1, 2])
    one, two = Inputs((torch.full((999,), 5.0),), {"index": index}).alike(2, seed=0)
    assert not torch.equal(one.args[0], two.args[0])
    assert abs(one.args[0].mean().item() - 5) < 0.2
    assert torch.equal(one.kwargs["index"], index)
    assert Inputs((index,)).alike(2, seed=0) == []


@pytest.mark.parametrize(
    ("call", "record"),
    [
        (Inputs((A, A)), ((1, 3, 2, 2), (1, 3, 2, 2))),
        (Inputs((A, B)), "1,3,2,2;4:int64<4"),
        (Inputs(([A], None), {"on": True}), "[1,3,2,2];none;on=true"),
        (Inputs((A, 0.5)), None),
        (Inputs((A, 5)), None),
        (Inputs((A,), {"way": "up"}), None),
        (Inputs(({1: A},)), None),
    ],
    ids=str,
)
def test_a_record_is_what_can_be_drawn_again(call: Inputs, record: Any) -> None:
    assert call.record == record
    if record is not None:
        again = inputs.recall(record)
        assert again is not None
        assert again.drawn(0).shapes == call.shapes
        assert again.drawn(0).record == record
    assert str(call)


def test_bench_takes_a_training_step_with_named_inputs() -> None:
    net = Keywords()
    example = make({"image": SHAPE, "mask": SHAPE})
    timings = bench.run([("a", net)], example, [bench.Setting(3, 1, channels_last=True, train=True)], rounds=3)
    assert timings[0].macs == 3 * 4 * 9 * 4 * 9 * 8
    assert all(parameter.grad is None for parameter in net.parameters())


def test_lists_are_examples_for_verify_and_arguments_in_tuples() -> None:
    net = network(List)
    other = copy.deepcopy(net)
    images = [torch.ones(4, 9, 8), torch.ones(4, 5, 5)]
    assert [row.input for row in surgeon.verify(net, other, [(images,), (images[:1],)]).distances] == [
        "[4×9×8; 4×5×5]",
        "[4×9×8]",
    ]
    assert make((images,)).args == (images,)
    assert examples.make(images).args == (images,)

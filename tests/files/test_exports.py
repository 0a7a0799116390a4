"""Exports: what is written, what stands in the file, what is refused, and what opening one can do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from export_nets import (
    SHAPE,
    Activations,
    ByValue,
    Convs,
    Detector,
    NoOperator,
    OneImage,
    Pair,
    Record,
    UNet,
    made,
)
from helpers import relative, run_surgeon
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import surgeon
from surgeon.errors import CaptureError, ModelError, StoreError, SurgeonError, VerifyError
from surgeon.files import exports
from surgeon.files.exports.onnx import Onnx
from surgeon.surgery import export
from surgeon.surgery.export import Exported

NETS: dict[str, tuple[type[nn.Module], str | None, Any]] = {
    "acnet": (Convs, "acnet", SHAPE),
    "octave": (UNet, "octave", SHAPE),
    "hetconv": (Convs, "hetconv-p4", SHAPE),
    "several outputs": (Detector, "acnet", SHAPE),
    "two inputs": (Pair, None, {"image": SHAPE, "scale": (1, 6, 1, 1)}),
    "a record": (Record, None, SHAPE),
    "constants": (Activations, None, SHAPE),
}


@cache
def exported(name: str, suffix: str, folder: Path) -> tuple[nn.Module, Path, Exported]:
    kind, recipe, example = NETS[name]
    net, path = made(kind, recipe), folder / f"{name}{suffix}"
    return net, path, surgeon.export(net, path, example)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.mark.parametrize("name", NETS)
def test_an_onnx_file_computes_in_another_program_what_the_network_does(name: str, folder: Path) -> None:
    net, path, report = exported(name, ".onnx", folder)
    assert report.report.equivalent
    assert report.blocks == 0
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {"image": torch.randn(3, *SHAPE[1:])} | ({"scale": torch.randn(3, 6, 1, 1)} if name == "two inputs" else {})
    assert [one.name for one in session.get_inputs()] == list(given)
    with torch.no_grad():
        out: Any = net(**given)
    wanted = {
        "several outputs": ["fine", "coarse"],
        "two inputs": ["output_0", "output_1"],
        "a record": ["coarse", "scores"],
    }
    assert [one.name for one in session.get_outputs()] == wanted.get(name, ["output"])
    leaves = out.values() if isinstance(out, dict) else vars(out).values() if name == "a record" else out
    found = session.run(None, {key: tensor.numpy() for key, tensor in given.items()})
    for one, expected in zip(found, [leaves] if isinstance(leaves, Tensor) else leaves, strict=True):
        assert relative(torch.from_numpy(one), expected) < 2e-6
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("suffix", exports.suffixes())
def test_a_file_that_was_exported_is_equivalent_in_float64(name: str, suffix: str, folder: Path) -> None:
    net, path, _ = exported(name, suffix, folder)
    report = surgeon.verify(net, surgeon.load(path, unsafe_pickle=True), NETS[name][2])
    assert report.equivalent, report
    assert report.distances[0].float64 is not None
    assert report.distances[0].float64 < 2**-24  # half a unit of float32, in which ONNX holds constants
    assert len(report.checks) >= 3


@pytest.mark.parametrize("suffix", exports.suffixes())
def test_the_verdict_and_the_history_stand_in_the_file(suffix: str, folder: Path) -> None:
    net, path, _ = exported("acnet", suffix, folder)
    said = exports.of_suffix(path).said(path)
    assert said["surgeon.verdict"] == "equivalent"
    steps = json.loads(said["surgeon.history"])["history"]
    assert [step["operation"] for step in steps] == [step.operation for step in surgeon.history(net)]
    assert json.loads(said["surgeon.versions"])["torch"] == str(torch.__version__)
    assert {"storage", "rounding"} <= {check["name"] for check in json.loads(said["surgeon.checks"])}


def test_an_onnx_file_says_nothing_of_the_users_files(folder: Path) -> None:
    _, path, _ = exported("octave", ".onnx", folder)
    raw = path.read_bytes()
    assert b"site-packages" not in raw
    assert str(Path(__file__).parents[1]).encode() not in raw
    assert b"stack_trace" not in raw


def test_a_pt2_opens_without_surgeon(folder: Path) -> None:
    _, path, _ = exported("octave", ".pt2", folder)
    code = (
        "import sys, torch; sys.modules['surgeon'] = None; "
        f"print(tuple(torch.export.load({str(path)!r}).module()(torch.randn(3, 3, 32, 32)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "(3, 2, 32, 32)"


@pytest.mark.parametrize("suffix", exports.suffixes())
def test_any_size_is_taken_on_request(suffix: str, folder: Path) -> None:
    path = folder / f"any{suffix}"
    report = surgeon.export(made(UNet, "octave"), path, SHAPE, dynamic_size=True)
    assert report.inputs == ("image: batch×3×height×width float32",)
    assert any("40×48" in check.says for check in report.report.checks)
    with torch.no_grad():
        assert surgeon.load(path, unsafe_pickle=True)(torch.randn(3, 3, 40, 24)).shape == (3, 2, 40, 24)


def test_other_sizes_are_refused_by_a_file_that_does_not_take_them(folder: Path) -> None:
    net, path, _ = exported("acnet", ".onnx", folder)
    program = surgeon.load(path)
    with pytest.raises(CaptureError, match="the file takes image: batch×3×32×32 float32, and image is 1×3×16×16"):
        program(torch.randn(1, 3, 16, 16))
    with pytest.raises(VerifyError, match=r"the file takes image: batch×3×32×32"):
        surgeon.verify(net, program, (1, 3, 16, 16))


@pytest.mark.parametrize("suffix", exports.suffixes())
def test_a_network_that_takes_one_image_keeps_that(suffix: str, tmp_path: Path) -> None:
    report = surgeon.export(made(OneImage), tmp_path / f"one{suffix}", SHAPE)
    assert report.inputs == ("image: 1×3×32×32 float32",)
    assert "the batch stays 1, since the network takes no other" in report.notes[0]


def test_a_size_that_cannot_vary_is_said(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"cannot be exported for images of any size: .*Leave out --dynamic-size"):
        surgeon.export(made(OneImage), tmp_path / "one.pt2", SHAPE, dynamic_size=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (ByValue, "net.onnx", r"torch cannot export the network: .*data-dependent"),
        (ByValue, "net.pt2", r"torch cannot export the network: .*data-dependent"),
        (NoOperator, "net.onnx", r"torch cannot write the network as ONNX: .*aten::?\.?special_bessel_j0|bessel_j0"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(kind: type[nn.Module], name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match=said) as caught:
        surgeon.export(made(kind), tmp_path / name, SHAPE)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_step_that_onnx_lacks_can_be_written_as_pt2(tmp_path: Path) -> None:
    assert surgeon.export(made(NoOperator), tmp_path / "net.pt2", SHAPE).report.equivalent


def test_what_computes_something_else_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Onnx.write

    def wrongly(self: Onnx, captured: Any, path: Path, *, opset: int | None) -> dict[str, Any]:
        facts = write(self, captured, path, opset=opset)
        model = onnx.load(path)
        for one in model.graph.initializer:
            if one.name == "b.weight":
                array = numpy_helper.to_array(one).copy()
                array[0, 0, 0, 0] *= 1 + 1e-5
                one.CopyFrom(numpy_helper.from_array(array, one.name))
        onnx.save(model, path)
        return facts

    monkeypatch.setattr(Onnx, "write", wrongly)
    with pytest.raises(VerifyError, match=r"does not compute what the network does: .*Nothing was written"):
        surgeon.export(made(Convs), tmp_path / "net.onnx", SHAPE)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert run_surgeon("fuse", "no such model.pt", "-o", tmp_path / "net.onnx") == 2
    assert "needs onnxscript, which is not installed. Install it with: pip install 'conv-surgeon[onnx]'" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_what_is_needed_for_onnx_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, surgeon, surgeon.app.commands; surgeon.fuse; surgeon.export; "
        "from surgeon.files import exports; exports.known(); "
        "print([name for name in ('onnx', 'onnxscript', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_exports_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    surgeon.save(surgeon.convert(net.eval(), "acnet", (1, 3, 8, 8)), "a.pt")
    assert run_surgeon("fuse", "a.pt", "-o", "a.onnx", "--opset", 19) == 0
    out = capsys.readouterr().out
    assert "ONNX, opset 19" in out
    assert "blocks left: 0" in out
    assert "input input: batch×3×8×8 float32" in out
    assert "equivalent: the file was run" in out
    assert run_surgeon("fuse", "a.pt", "-o", "a.onnx") == 2
    assert "a.onnx exists" in capsys.readouterr().err
    assert run_surgeon("fuse", "a.pt", "-o", "a.onnx", "--force", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["exported"]["report"]["equivalent"]
    assert data["exported"]["opset"] == 20
    assert run_surgeon("verify", "a.pt", "a.onnx") == 0
    assert run_surgeon("verify", "a.onnx", "a.pt") == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.onnx", "a.pt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fuse", "a.pt", "-o", "a.tflite"), "cannot tell from 'a.tflite' what to write"),
        (("fuse", "a.pt", "-o", "b.pt", "--opset", 20), "--dynamic-size and --opset are for exports, and b.pt is none"),
        (("fuse", "a.pt", "-o", "b.pt2", "--opset", 20), "a program of torch.export has no opset"),
        (("fuse", "a.pt", "-o", "b.onnx", "--opset", 7), "opset 7 is none that can be written. Give one from 18 to"),
        (("convert", "a.pt", "--recipe", "acnet", "-o", "b.onnx"), "b.onnx would be an export, which `surgeon fuse`"),
        (("verify", "a.pt", "missing.onnx"), "there is no file missing.onnx"),
        (("survey", "a.onnx"), "a.onnx is an ONNX graph: it holds no modules"),
    ],
)
def test_bad_input_is_said_in_a_line(
    arguments: tuple[object, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    surgeon.save(nn.Sequential(nn.Conv2d(3, 4, 3)), "a.pt")
    Path("a.onnx").write_bytes(b"\x08\x07")
    assert run_surgeon(*arguments) == 2
    assert said in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.onnx", "a.pt"]


def test_a_network_that_is_too_large_for_the_file_is_refused_before_any_work() -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(1).expand(2**29 + 1))
    with pytest.raises(StoreError, match=r"the tensors of the network have 2.1[0-9]* GB.*less than 2 GiB"):
        export.write(net, Path("large.onnx"), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_that_onnxruntime_has_no_convs_for_is_refused_before_any_work(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"stored in (bfloat16|float64), in which .*Export it in float32 or float16"):
        surgeon.export(made(Convs).to(dtype), tmp_path / "net.onnx", SHAPE)
    assert surgeon.export(made(Convs).to(dtype), tmp_path / "net.pt2", SHAPE).report.equivalent


def test_half_precision_is_exported(tmp_path: Path) -> None:
    assert surgeon.export(made(Convs).half(), tmp_path / "net.onnx", SHAPE).report.equivalent


def test_a_pt2_of_a_stranger_is_not_opened(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"PK\x03\x04 not one")
    with pytest.raises(ModelError, match=r"opening it can run code that is in it.*--unsafe-pickle"):
        surgeon.load(path)
    with pytest.raises(ModelError, match=r"cannot be opened as a \.pt2"):
        surgeon.load(path, unsafe_pickle=True)


def _graph(**more: Any) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in more.get("data", {}).items():
        weight.external_data.add(key=key, value=str(value))
    held = [weight] if "data" in more else [numpy_helper.from_array(torch.ones(4).numpy(), "w")]
    if "dims" in more:
        held[0].dims[:] = more["dims"]
    node = helper.make_node("Add", ["x", "w"], ["y"], domain=more.get("domain", ""))
    opsets = [helper.make_opsetid(name, 18) for name in {"", more.get("domain", "")}]
    return helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], held), opset_imports=opsets)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("../secret.bin", "takes weights from '../secret.bin', which does not lie beside it"),
        ("{folder}/secret.bin", "which does not lie beside it"),
        ("..", "which does not lie beside it"),
        ("", "which does not lie beside it"),
        ("sub/secret.bin", "which does not lie beside it"),
        ("link.bin", "there is no plain file"),
        ("missing.bin", "there is no plain file"),
        ("pipe", "there is no plain file"),
        ("short.bin", "cannot be read"),
    ],
)
def test_an_onnx_file_reads_no_file_but_those_beside_it(location: str, said: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    for secret in (tmp_path / "secret.bin", inner / "sub" / "secret.bin"):
        secret.write_bytes(torch.ones(4).numpy().tobytes())
    (inner / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inner / "short.bin").write_bytes(b"12")
    if hasattr(os, "mkfifo"):
        os.mkfifo(inner / "pipe")
    place = location.format(folder=tmp_path)
    path = inner / "net.onnx"
    path.write_bytes(_graph(data={"location": place, "offset": 0, "length": 16}).SerializeToString())
    with pytest.raises(ModelError, match=r"net\.onnx") as caught:
        surgeon.load(path)
    assert said in str(caught.value)


def test_weights_beside_an_onnx_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "net.onnx.data").write_bytes(torch.full((4,), 2.0).numpy().tobytes())
    data = {"location": "net.onnx.data", "offset": 0, "length": 16}
    (tmp_path / "net.onnx").write_bytes(_graph(data=data).SerializeToString())
    assert torch.equal(surgeon.load(tmp_path / "net.onnx")(torch.zeros(1, 4)), torch.full((1, 4), 2.0))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_graph(domain="evil.ops").SerializeToString(), "needs operators of evil.ops, which are code"),
        (b"", "holds no graph"),
        (b"\xff\xfe\xfd rubbish", "is no ONNX file, or is damaged"),
        (_graph().SerializeToString()[:-20], "is no ONNX file, or is damaged"),
        (_graph(dims=[5]).SerializeToString(), "is damaged: its tensor 'w' cannot be read"),
        (_graph(dims=[2**40]).SerializeToString(), "is damaged: its tensor 'w' cannot be read"),
    ],
)
def test_an_onnx_file_that_is_none_or_needs_a_library_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=said):
        surgeon.load(tmp_path / "net.onnx")

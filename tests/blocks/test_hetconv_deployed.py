"""What `fuse` makes of HetConvs: plain convs of torch that need no surgeon, export as such, and quantise."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from helpers import relative, run_surgeon, shake_
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import surgeon
from surgeon.blocks import sum_of_convs
from surgeon.blocks.hetconv import HetConv, HetConvOptions
from surgeon.conv.spec import ConvSpec
from surgeon.errors import PlanError, StoreError
from surgeon.surgery import history, replay

LAYOUTS = ("block", "interleaved", "best")
INPUT = (1, 8, 12, 13)


def net() -> nn.Sequential:
    """Convs with padding, with a stride and without padding, each with a norm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for options in ({"padding": 1, "bias": False}, {"padding": 1, "stride": 2}, {}):
        layers += [nn.Conv2d(8, 8, 3, **options), nn.BatchNorm2d(8), nn.ReLU()]
    return shake_(nn.Sequential(*layers), 1, gently=True).eval()


def converted(layout: str = "block", model: nn.Module | None = None) -> nn.Module:
    return surgeon.convert(model or net(), "hetconv-p4", INPUT, overrides=[f"rules[0].with.layout={layout}"])


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, *INPUT[1:]).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_modules_are_torchs_own_and_norms_are_folded(layout: str) -> None:
    thin = converted(layout).double()
    fused = surgeon.fuse(thin)
    assert all(type(module).__module__.startswith("torch.") for module in fused.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad():
        assert relative(fused(images(torch.float64)), thin(images(torch.float64))) <= 1e-14
    assert isinstance(thin[0], HetConv)  # it is as it was


def test_its_convs_cost_what_the_block_costs_and_are_listed() -> None:
    thin = converted()
    fused = surgeon.fuse(thin)
    survey = surgeon.survey(fused, INPUT)
    assert [site.path for site in survey.sites][:3] == ["0.spatial", "0.pointwise", "3.spatial"]
    assert surgeon.survey(thin, INPUT).cost.macs == survey.cost.macs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_proved_written_and_read_in_every_dtype(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    thin = converted(layout, net().to(dtype))
    fused = surgeon.fuse(thin)
    assert surgeon.verify(thin, fused, INPUT).verdict == "equivalent"
    surgeon.save(fused, tmp_path / "fused.pt")
    again = surgeon.load(tmp_path / "fused.pt")
    assert isinstance(again[0], fx.GraphModule)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(images(dtype)), fused(images(dtype)))
    assert surgeon.verify(thin, again, INPUT).verdict == "equivalent"
    assert surgeon.history(surgeon.fuse(again)) == surgeon.history(fused)  # nothing is left to fold


def test_a_changed_tap_is_found_and_named() -> None:
    thin = converted()
    fused = surgeon.fuse(thin)
    with torch.no_grad():
        fused[3].pointwise.weight[0, 3] += 1e-5
    report = surgeon.verify(thin, fused, INPUT)
    assert report.verdict != "equivalent"
    assert "first to diverge: 3" in str(report)


def test_what_was_frozen_stays_frozen() -> None:
    block = converted()[0]
    block.pointwise.requires_grad_(False)
    made = block.train().deploy()
    assert made.training
    assert made.spatial.training
    assert made.spatial.weight.requires_grad
    assert not made.pointwise.weight.requires_grad


def test_it_shares_no_tensor_with_the_block() -> None:
    block = converted("best")[0]
    held = {one.data_ptr() for one in (*block.parameters(), *block.buffers())}
    made = block.deploy()
    assert not held & {one.data_ptr() for one in (*made.parameters(), *made.buffers())}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_opens_it_without_surgeon_and_surgeon_what_torch_then_writes(layout: str, tmp_path: Path) -> None:
    fused = surgeon.fuse(converted(layout))
    surgeon.save(fused, tmp_path / "fused.pt")
    torch.save(images(), tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['surgeon'] = None; import torch; x = torch.load('x.pt')\n"
        "model = torch.load('fused.pt', weights_only=False)\n"
        "torch.save(model, 'again.pt'); torch.save(model(x).detach(), 'y.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, timeout=120)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), fused(images()))
        assert torch.equal(surgeon.load(tmp_path / "again.pt")(images()), fused(images()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_exported_as_convs_and_sums(layout: str) -> None:
    program = torch.export.export(surgeon.fuse(converted(layout)), (images(),))
    steps = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    gathers = {} if layout == "block" else {"aten.index_select.default": 6}
    few = {"aten.conv2d.default": 6, "aten.add.Tensor": 3, "aten.relu.default": 3, "aten.pad.default": 1}
    assert steps == few | gathers


def test_it_is_exported_to_onnx_as_convs_and_sums() -> None:
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(surgeon.fuse(converted()), (images(),), dynamo=True, verbose=False)
    assert program is not None
    assert Counter(node.op_type for node in program.model.graph) == {"Conv": 6, "Add": 3, "Relu": 3, "Pad": 1}


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization announces its successor
def test_it_is_quantised_conv_by_conv() -> None:
    fused = surgeon.fuse(converted())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(fused, get_default_qconfig_mapping("x86"), (images(),))
        prepared(images())
        quantised = convert_fx(prepared)
    convs = [one for one in quantised.modules() if type(one).__module__.startswith("torch.ao.nn.quantized")]
    assert len(convs) == 6
    assert [str(node.target) for node in quantised.graph.nodes].count("dequantize") <= 2
    with torch.no_grad():
        assert relative(quantised(images()), fused(images())) < 0.1


def test_an_earlier_history_leaves_hetconvs_as_they_were() -> None:
    """Before there was a form to deploy, fuse folded the other blocks of a network only."""
    recipe = {
        "surgeon": 1,
        "title": "both",
        "rules": [{"swap": "hetconv", "match": {"name": "0"}, "with": {"p": 4}}, {"swap": "acblock"}],
    }
    made = replay.redo_(surgeon.convert(net(), recipe, INPUT), [history.Operation("fuse", "", "")])
    assert isinstance(made[0], HetConv)
    assert isinstance(made[1], nn.BatchNorm2d)
    assert type(made[3]) is nn.Conv2d
    today = replay.redo_(
        surgeon.convert(net(), recipe, INPUT), [history.Operation("fuse", "", "", rules=history.RULES)]
    )
    assert isinstance(today[0], fx.GraphModule)


def test_a_history_says_by_which_rules_only_where_they_matter() -> None:
    thin = surgeon.fuse(converted()).surgeon_provenance["history"][-1]
    plain = surgeon.fuse(surgeon.convert(net(), "acnet", INPUT)).surgeon_provenance["history"]
    dense = surgeon.fuse(converted(), dense=True).surgeon_provenance["history"]
    assert thin["rules"] == 2
    assert not any("rules" in step for step in (*plain, *dense))


@pytest.mark.parametrize(("rules", "says"), [(history.RULES + 1, "later version"), (0, "not a history")])
def test_rules_of_a_later_version_are_refused(rules: int, says: str) -> None:
    fused = surgeon.fuse(converted())
    fused.surgeon_provenance["history"][-1]["rules"] = rules
    with pytest.raises(StoreError, match=says):
        surgeon.history(fused)


def test_weights_alone_are_put_back_by_its_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "net.pt")
    assert run_surgeon("convert", "net.pt", "-r", "hetconv-p4", "--input", "1,8,12,13", "-o", "thin.pt") == 0
    assert run_surgeon("fuse", "thin.pt", "-o", "fused.safetensors") == 0
    assert run_surgeon("verify", "thin.pt", "fused.safetensors", "--arch", "net.pt") == 0


def test_a_network_with_it_is_converted_again(tmp_path: Path) -> None:
    fused = surgeon.fuse(converted("best"))
    more = surgeon.convert(fused, "acnet", INPUT)
    assert isinstance(more[0].spatial, surgeon.ACBlock)
    surgeon.save(more, tmp_path / "more.pt")
    again = surgeon.fuse(surgeon.load(tmp_path / "more.pt"))
    assert surgeon.verify(fused, again, INPUT).verdict == "equivalent"


class ReadsItsConv(nn.Module):
    """Code that reads the dtype of a conv's weight, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e30:  # what keeps tracing out
            return x
        return self.conv(x.to(self.conv.weight.dtype))


def test_code_that_reads_what_a_block_has_is_named() -> None:
    thin = surgeon.convert(ReadsItsConv().eval(), "hetconv-p4", INPUT)
    with pytest.raises(PlanError, match=r"no attribute 'weight' \(test_hetconv_deployed.py.*--dense"):
        surgeon.fuse(thin)
    assert type(surgeon.fuse(thin, dense=True).conv) is nn.Conv2d


def test_a_block_that_is_the_whole_model_stays() -> None:
    conv = ConvSpec(8, 8, (3, 3)).build(like=torch.empty(0))
    block = HetConv.from_conv(conv, HetConvOptions(p=2), norm=None, generator=torch.Generator())
    assert isinstance(surgeon.fuse(block, INPUT), HetConv)


def test_copies_of_a_network_hold_graphs_of_whole_modules() -> None:
    """A GraphModule copies itself, and needs what lies below it to be complete by then."""
    inner = fx.symbolic_trace(nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), nn.Conv2d(8, 8, 1)))
    outer = nn.Sequential(nn.Sequential(inner), nn.Conv2d(8, 8, 3)).eval()
    made = surgeon.convert(outer, "acnet", INPUT)
    assert surgeon.verify(outer, made, INPUT).verdict == "equivalent"


def test_only_sums_are_ours() -> None:
    made = sum_of_convs.make(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    assert sum_of_convs.is_ours(made)
    made.note = "mine"
    assert not sum_of_convs.is_ours(made)
    assert not sum_of_convs.is_ours(fx.symbolic_trace(nn.Conv2d(4, 4, 1)))
    assert not sum_of_convs.is_ours(nn.Conv2d(4, 4, 1))


def test_one_that_pads_by_a_rule_of_its_own_stays() -> None:
    """No plain module pads by its input's size, as timm's Conv2dSame does."""
    kind = timm.layers.Conv2dSame
    torch.manual_seed(0)
    model = nn.Sequential(kind(8, 8, 3, stride=2), nn.BatchNorm2d(8)).eval()
    thin = surgeon.convert(model, "hetconv-p4", INPUT)
    assert isinstance(thin[0], HetConv)
    kept = surgeon.fuse(thin)
    assert isinstance(kept[0], HetConv)
    assert isinstance(kept[1], nn.BatchNorm2d)
    assert surgeon.verify(thin, kept, INPUT).verdict == "equivalent"

"""A HetConv in one kernel: against the dense conv in float64, deployed, written, read, proved, exported, compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import relative, shake_
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon.blocks.het_in_one_pass import HetInOnePass
from surgeon.blocks.hetconv import HetConv, HetConvOptions
from surgeon.conv.spec import ConvSpec
from surgeon.errors import ModelError
from surgeon.one_pass import het, where
from surgeon.surgery import history
from surgeon.surgery.clocks import Call, HostClock
from surgeon.surgery.fuse import fold_all_
from surgeon.surgery.look import network_for
from surgeon.surgery.tune import Tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("block", "interleaved", "best")
INPUT = (2, 8, 9, 7)
SPECS = [
    ConvSpec(8, 12, (3, 3), padding=(1, 1)),
    ConvSpec(8, 4, (3, 3), padding=(0, 2), stride=(2, 1), bias=False),
    ConvSpec(8, 8, (5, 3), padding="same", dilation=(1, 2)),
    ConvSpec(36, 72, (3, 3), padding=(2, 2), dilation=(2, 2), stride=(2, 2)),
    ConvSpec(4, 4, (1, 7), padding=(1, 1)),
]
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the kernel run, on the CPU by Triton's interpreter, and count how often it does."""
    pytest.importorskip("triton")
    from surgeon.one_pass import het_triton

    calls: list[int] = []
    own = het_triton.convolve_

    def counted(*args: object) -> None:
        calls.append(1)
        own(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(het_triton, "convolve_", counted)
    monkeypatch.setattr(where, "on_cpu", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return calls


def block_of(spec: ConvSpec, layout: str, p: int = 4, dtype: torch.dtype = torch.float64) -> HetConv:
    torch.manual_seed(0)
    conv = spec.build(like=torch.zeros(1, dtype=torch.float64)).eval()
    for tensor in conv.parameters():
        nn.init.normal_(tensor)
    options = HetConvOptions.model_validate({"p": p, "layout": layout})
    made = HetConv.from_conv(conv, options, norm=None, generator=torch.Generator())
    return made.eval().to(DEVICE, dtype)


def made_of(block: HetConv) -> HetInOnePass:
    made = block.forms()["one pass"]()
    assert isinstance(made, HetInOnePass)
    return made


def image(c_in: int = 8, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (9, 7)) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, c_in, *size, dtype=torch.float64).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def by_the_dense_conv(block: HetConv, x: Tensor) -> Tensor:
    dense, spec = block.fold().double(), block.spec
    padding = spec.padding if isinstance(spec.padding, str) else list(spec.padding)
    return F.conv2d(x.double(), dense.weight, dense.bias, spec.stride, padding, spec.dilation)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("spec", "layout"), [*zip(SPECS, (*LAYOUTS, *LAYOUTS), strict=False)], ids=str)
def test_the_kernel_gives_what_the_dense_conv_gives(
    spec: ConvSpec, layout: str, dtype: torch.dtype, kernel: list[int]
) -> None:
    block, x = block_of(spec, layout, dtype=dtype), image(spec.c_in, dtype)
    made = made_of(block)
    with torch.no_grad():
        expected, y = by_the_dense_conv(block, x), made(x)
        assert kernel == [1]
        where.on_cpu = False  # the fixture puts back what was there
        steps = made(x.contiguous())
    for one in (y, steps):
        assert one.dtype == dtype
        assert one.shape == expected.shape
        assert ((one.double() - expected).norm() / expected.norm()).item() <= LIMITS[dtype]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert kernel == [1]


@pytest.mark.parametrize("p", [2, 8])
def test_any_number_of_groups_will_do(p: int, kernel: list[int]) -> None:
    block, x = block_of(ConvSpec(16, 8, (3, 3), padding=(1, 1)), "interleaved", p), image(16)
    with torch.no_grad():
        assert relative(made_of(block)(x), by_the_dense_conv(block, x)) <= 1e-12
    assert kernel


@pytest.mark.parametrize("which", ["weight", "pointwise", "bias", "channel_order", "filter_order"])
def test_one_wrong_number_is_found(which: str, kernel: list[int]) -> None:
    block, x = block_of(SPECS[0], "best"), image()
    made = made_of(block)
    with torch.no_grad():
        tensor = getattr(made, which)
        tensor.copy_(tensor.flip(0)) if which.endswith("order") else tensor.flatten()[:1].add_(1e-6)
        assert relative(made(x), by_the_dense_conv(block, x)) > 1e-9
    assert kernel


@pytest.mark.parametrize("why", ["a gradient", "another layout", "another dtype", "autocast", "somebody watches"])
def test_what_the_kernel_cannot_do_is_done_by_two_convs(why: str, kernel: list[int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    block, x = block_of(SPECS[0], "best", dtype=torch.float32), image(dtype=torch.float32)
    made, expected = made_of(block), by_the_dense_conv(block, x)
    with torch.set_grad_enabled(why == "a gradient"):
        if why == "autocast":
            with torch.autocast(DEVICE, torch.bfloat16):
                assert relative(made(x).double(), expected) <= 2e-2
        elif why == "somebody watches":
            with FlopCounterMode(display=False) as counter:
                made(x)
            assert counter.get_total_flops() > 0
        elif why == "another dtype":
            with pytest.raises(RuntimeError):
                made(x.double())
        else:
            assert relative(made(x.contiguous() if why == "another layout" else x).double(), expected) <= 1e-6
    assert not kernel


def test_orders_beyond_the_map_reach_no_other_memory(kernel: list[int]) -> None:
    made = made_of(block_of(SPECS[0], "best"))
    assert made.channel_order is not None
    assert made.filter_order is not None
    with torch.no_grad():
        made.channel_order[0], made.filter_order[0] = 10**9, -(10**9)
        made(image())
    assert kernel


def test_the_operator_says_its_shape_without_running(kernel: list[int]) -> None:
    made = made_of(block_of(SPECS[1], "best"))
    given = (image(), made.weight.detach(), made.pointwise.detach(), None, made.channel_order, made.filter_order)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(het.convolve_op, (*given, [2, 1], [0, 2], [1, 1]), test_utils=checks)
    assert kernel


def test_only_convs_that_pad_with_zeros_have_this_form() -> None:
    for mode in ("circular", "reflect"):
        assert "one pass" not in block_of(SPECS[0].change(padding_mode=mode), "block").forms()


def test_it_shares_no_tensor_and_what_was_frozen_stays_frozen() -> None:
    block = block_of(SPECS[0], "best")
    block.pointwise.requires_grad_(False)
    made = made_of(block.train())
    held = {one.data_ptr() for one in (*block.parameters(), *block.buffers())}
    assert not held & {one.data_ptr() for one in (*made.parameters(), *made.buffers())}
    assert (made.weight.requires_grad, made.pointwise.requires_grad, made.training) == (True, False, True)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for options in ({"padding": 1, "bias": False}, {"padding": 1, "stride": 2}):
        layers += [nn.Conv2d(8, 8, 3, **options), nn.BatchNorm2d(8), nn.ReLU()]
    return shake_(nn.Sequential(*layers), 1, gently=True).eval()


class Counting(HostClock):
    """A clock by which a call takes as long as there are calls of `F.conv2d` and `F.addmm` in it."""

    def seconds(self, call: Call, repeats: int) -> float:
        from torch.overrides import TorchFunctionMode

        class Counts(TorchFunctionMode):
            total = 1e-3

            def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                self.total += func in (torch.conv2d, torch.addmm)
                return func(*args, **(kwargs or {}))

        with Counts() as counted:
            call()
        return counted.total


def tuned(layout: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    thin = surgeon.convert(net().to(dtype), "hetconv-p4", INPUT, overrides=[f"rules[0].with.layout={layout}"])
    fused = copy.deepcopy(thin)
    tuning = Tuning(clock_of=lambda place: Counting(), channels_last=True, rounds=1)
    fold_all_(network_for(fused, torch.randn(INPUT, dtype=dtype)), tuning=tuning)
    return thin, fused


@pytest.mark.parametrize(
    ("layout", "dtype"), [("block", torch.float32), ("interleaved", torch.bfloat16), ("best", torch.float32)]
)
def test_it_is_measured_kept_proved_written_and_read(
    layout: str, dtype: torch.dtype, kernel: list[int], tmp_path: Path
) -> None:
    thin, fused = tuned(layout, dtype)
    assert isinstance(fused[0], HetInOnePass)
    assert dict(history.history(fused)[-1].forms)["0"] == "one pass"
    assert surgeon.verify(thin, fused, INPUT).verdict == "equivalent"
    surgeon.save(fused, tmp_path / "net.pt")
    again = surgeon.load(tmp_path / "net.pt")
    assert isinstance(again[0], HetInOnePass)
    x = image(dtype=dtype)
    with torch.no_grad():
        assert torch.equal(again.to(DEVICE)(x), fused.to(DEVICE)(x))
        assert relative(fused(x).double(), thin.to(DEVICE)(x).double()) <= 8 * torch.finfo(dtype).eps
    assert surgeon.verify(thin.cpu(), again.cpu(), INPUT).verdict == "equivalent"
    with torch.no_grad():
        fused[0].pointwise[0, 3] += 1e-2
    report = surgeon.verify(thin, fused.cpu(), INPUT)
    assert report.verdict != "equivalent"
    assert "first to diverge: 0" in str(report)


def test_elsewhere_it_is_not_measured(kernel: list[int]) -> None:
    where.on_cpu = False
    _, fused = tuned("block")
    assert not any(isinstance(module, HetInOnePass) for module in fused.modules())


def test_it_costs_what_the_two_convs_cost_and_is_exported_and_written_as_them(
    kernel: list[int], tmp_path: Path
) -> None:
    thin, fused = tuned("block")
    assert [type(fused[i]) for i in (0, 3)] == [HetInOnePass] * 2
    assert surgeon.survey(thin, INPUT).cost.macs == surgeon.survey(fused, INPUT).cost.macs
    program = torch.export.export(fused, (torch.randn(INPUT),))
    assert not any("surgeon" in str(node.target) for node in program.graph.nodes)
    surgeon.export(fused, tmp_path / "net.pt2", INPUT)


def test_compiled_it_is_the_kernel_for_any_batch(kernel: list[int]) -> None:
    block = block_of(SPECS[0], "best", dtype=torch.float32)
    made = made_of(block)
    torch._dynamo.reset()
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend=look)
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, 8, 9, 7, device=DEVICE).contiguous(memory_format=torch.channels_last)
            assert relative(compiled(x).double(), by_the_dense_conv(block, x)) <= 1e-6
    assert any("het_conv" in name for name in seen)


@pytest.mark.parametrize("fault", ["spec", "p", "weight", "bias", "order", "short order"])
def test_a_file_that_holds_something_else_is_refused(fault: str, tmp_path: Path) -> None:
    made = made_of(block_of(SPECS[0], "best").cpu())
    if fault == "spec":
        made.spec = made.spec.change(padding_mode="circular")
    elif fault == "p":
        made.p = 3
    elif fault == "weight":
        made.weight = nn.Parameter(made.weight[:, :1])
    elif fault == "bias":
        made.bias = nn.Parameter(torch.zeros(3))
    else:
        made.channel_order = torch.arange(8) + 1 if fault == "order" else torch.arange(4)
    torch.save(made, tmp_path / "net.pt")
    with pytest.raises(ModelError):
        surgeon.load(tmp_path / "net.pt")

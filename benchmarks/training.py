"""What training with blocks costs: one step of torchvision's ResNet-18 in channels_last, side by side in one run.

    python benchmarks/training.py [--size 224] [--batch 8] [--threads 1] [--rounds 9] [--only original acnet]
    python benchmarks/training.py --device cuda --batch 64 [--arch resnet50] [--ways eager graph]

A step is forward, mean, backward and forgetting the gradients. The rows: the original, twice, of which the second is
the noise; the ACNet that `surgeon convert` makes of it; the same three branches written by hand as they were published;
and the online form, which sums the kernels before the conv. All take turns, and the ratio within a round counts. On
CUDA a step runs under autocast in bfloat16: eagerly, and as a CUDA graph, in which launching kernels costs nothing.
`saved` is what the forward pass keeps for the backward pass, besides parameters, and `peak` on CUDA the memory that a
step takes at most beyond what was held before.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torchvision
from networks import machine
from torch import Tensor, nn

import surgeon
from surgeon.errors import SurgeonError

ROWS = ("original", "original again", "acnet", "by hand", "online")
_AT_LEAST = 0.1  # seconds that one measurement takes
Step = Callable[[], object]


class ByHand(nn.Module):
    """Three convs and three norms side by side, as in the published code."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        (k, _), (p, _), c_in, c_out = conv.kernel_size, conv.padding, conv.in_channels, conv.out_channels
        assert isinstance(p, int)
        self.square_conv, self.square_bn = conv, norm
        self.ver_conv = nn.Conv2d(c_in, c_out, (k, 1), conv.stride, (p, 0), bias=False)
        self.hor_conv = nn.Conv2d(c_in, c_out, (1, k), conv.stride, (0, p), bias=False)
        self.ver_bn, self.hor_bn = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.square_bn(self.square_conv(x))
        return y + self.ver_bn(self.ver_conv(x)) + self.hor_bn(self.hor_conv(x))


def by_hand(model: nn.Module) -> nn.Module:
    """Put published blocks in the place of the 3×3 convs of a ResNet and of their norms."""
    made = copy.deepcopy(model)
    for module in list(made.modules()):
        for i in (1, 2, 3):
            conv, norm = getattr(module, f"conv{i}", None), getattr(module, f"bn{i}", None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and conv.kernel_size == (3, 3):
                setattr(module, f"conv{i}", ByHand(conv, norm))
                setattr(module, f"bn{i}", nn.Identity())
    return made


def networks(arch: str, size: int, only: Sequence[str]) -> dict[str, nn.Module]:
    """Make the rows that are asked for, in their order; the first is what the others are compared with."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None)
    makers: dict[str, Callable[[], nn.Module]] = {
        "original": lambda: model,
        "original again": lambda: copy.deepcopy(model),
        "acnet": lambda: surgeon.convert(model, "acnet", (1, 3, size, size)),
        "by hand": lambda: by_hand(model),
        "online": lambda: surgeon.convert(model, "acnet-online", (1, 3, size, size)),
    }
    made: dict[str, nn.Module] = {}
    for name in only:
        try:
            made[name] = makers[name]()
        except SurgeonError as error:
            print(f"no row for {name}: {error}")
    return made


def step_of(model: nn.Module, x: Tensor) -> Step:
    """One step; on CUDA under autocast, without a cache of casts, which a graph cannot have."""

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
            y = model(x)
        y.float().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def graph_of(step: Step) -> Step:
    """Record a step as a CUDA graph, after some on a stream of their own, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Count what a forward pass keeps for the backward pass, each piece of memory once, parameters not at all."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, int]()

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
            y = model(x)
        total = sum(kept.values())
        del y
    return total


def peak_bytes(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def seconds_of(step: Step, repeats: int, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begun) / repeats


def turns(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Run each of them once in every round, in a newly drawn order."""
    order, found = random.Random(0), dict[str, list[float]]((name, []) for name in steps)
    once = {name: min(seconds_of(step, 1, device) for _ in range(2)) for name, step in steps.items()}
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            found[name].append(seconds_of(steps[name], max(1, round(_AT_LEAST / once[name])), device))
    return found


def profile(step: Step, device: str) -> None:
    """Print where the time of a step goes, by operator."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(3):
            step()
    print(seen.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=12, max_name_column_width=60))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ways", nargs="+", choices=("eager", "graph"), default=["eager"])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--profile", action="store_true", help="show where the time of each goes instead")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    made = {
        name: model.train().to(options.device, memory_format=torch.channels_last)
        for name, model in networks(options.arch, options.size, options.only).items()
    }
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    x = x.contiguous(memory_format=torch.channels_last)
    where = torch.cuda.get_device_name() if x.is_cuda else f"{machine()}, {options.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}, {options.arch}, batch {options.batch}, {options.size} px")
    for way in options.ways:
        eager = {name: step_of(model, x) for name, model in made.items()}
        for step in eager.values():
            step()
        peaks = {name: peak_bytes(step) if x.is_cuda else None for name, step in eager.items()}
        steps = {name: graph_of(step) for name, step in eager.items()} if way == "graph" else eager
        if options.profile:
            for name, step in steps.items():
                print(name)
                profile(step, options.device)
            continue
        seconds = turns(steps, options.rounds, options.device)
        first = seconds[next(iter(seconds))]
        print(f"\n| {way} | ms | × time | saved, MB | peak, MB |\n|---|---|---|---|---|")
        for name, own in seconds.items():
            low, middle, high = statistics.quantiles([a / b for a, b in zip(own, first, strict=True)], n=4)
            ratio = "1" if own is first else f"{middle:.3f} ({low:.3f} … {high:.3f})"
            peak = peaks[name]
            memory = f"{saved_bytes(made[name], x) / 1e6:.0f} | {'–' if peak is None else f'{peak / 1e6:.0f}'}"
            print(f"| {name} | {statistics.median(own) * 1e3:.1f} | {ratio} | {memory} |", flush=True)


if __name__ == "__main__":
    main()

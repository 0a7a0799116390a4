"""What folding is worth where a network is deployed: eager, compiled, and in onnxruntime, side by side in one run.

    python benchmarks/deploy.py [--rounds 15] [--batch 4] [--size 224] [--threads 1] [--only resnet18] [--ways eager]

For torchvision's ResNets: the original with its norms folded, twice, of which the second is the noise; the ACNet made
of it, folded; and the same as it is trained. For timm's RepVGG and MobileOne: what timm's own reparameterisation makes,
twice; what `surgeon fuse --all` makes; and the network as it is trained. All of a kind take turns, and the ratio within
a round counts. onnxruntime is given what torch.onnx.export writes, and as many threads.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
import torchvision
from networks import machine
from torch import Tensor, nn

import surgeon

RESNETS = ("resnet18", "resnet50")
BRANCHED = ("repvgg_a0", "mobileone_s0")
WAYS = ("eager", "compiled", "onnxruntime")
_AT_LEAST = 0.1  # seconds that one measurement takes
Call = Callable[[], object]


def shaken(model: nn.Module) -> nn.Module:
    """Give norms statistics and scales that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in ((module.weight, 0.3, 1.0), (module.running_var, 0.5, 2.0)):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def networks(name: str, size: int) -> dict[str, nn.Module]:
    """The networks of one table; the first is what the others are compared with, the second the same once more."""
    torch.manual_seed(0)
    example = (1, 3, size, size)
    if name in RESNETS:
        model = shaken(getattr(torchvision.models, name)(weights=None))
        plain = [surgeon.fuse(model, example, norms=True) for _ in range(2)]
        trained = shaken(surgeon.convert(model, "acnet", example))
        folded = surgeon.fuse(trained, example, norms=True)
        return {"original": plain[0], "original again": plain[1], "ACNet, folded": folded, "ACNet, as trained": trained}
    model = shaken(timm.create_model(name))
    theirs = [timm.utils.reparameterize_model(model) for _ in range(2)]
    folded = surgeon.fuse(model, example, branches=True, norms=True)
    return {"timm's": theirs[0], "timm's again": theirs[1], "surgeon's": folded, "as trained": model}


def eager(model: nn.Module, x: Tensor) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def compiled(model: nn.Module, x: Tensor) -> Call:
    return eager(torch.compile(model, dynamic=False), x)


def onnxruntime(model: nn.Module, x: Tensor) -> Call:
    """A session of onnxruntime with the network as torch exports it."""
    import onnxruntime as runtime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        session = runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


def turns(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Run each of them once in every round, in a newly drawn order; returns seconds."""
    order, seconds = random.Random(0), dict[str, list[float]]((name, []) for name in calls)
    once = {name: min(timed(call, 1) for _ in range(3)) for name, call in calls.items()}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            seconds[name].append(timed(calls[name], max(1, round(_AT_LEAST / once[name]))))
    return seconds


def timed(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def table(name: str, options: argparse.Namespace) -> None:
    """Measure one network in every way, and print a row for each of its forms."""
    x, models = torch.randn(options.batch, 3, options.size, options.size), networks(name, options.size)
    makers = {"eager": eager, "compiled": compiled, "onnxruntime": onnxruntime}
    found: dict[str, dict[str, str]] = {label: {} for label in models}
    for way in options.ways:
        torch.compiler.reset()
        calls = {label: makers[way](model, x) for label, model in models.items()}
        for call in calls.values():
            call()
        seconds = turns(calls, options.rounds)
        first = seconds[next(iter(seconds))]
        for label, own in seconds.items():
            low, middle, high = statistics.quantiles([a / b for a, b in zip(own, first, strict=True)], n=4)
            found[label][way] = "1" if own is first else f"{middle:.3f} ({low:.3f} … {high:.3f})"
    print(f"\n| {name} | " + " | ".join(options.ways) + " |\n|---" * 1 + "|---" * len(options.ways) + "|")
    for label, cells in found.items():
        print(f"| {label} | " + " | ".join(cells[way] for way in options.ways) + " |", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=(*RESNETS, *BRANCHED), default=[*RESNETS, *BRANCHED])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    print(
        f"{machine()}, torch {torch.__version__}, {options.threads} thread(s), batch {options.batch}, {options.size} px"
    )
    for name in options.only:
        table(name, options)


if __name__ == "__main__":
    main()

"""Polygraphy and `verify`, on the same two ResNet-50s: what each takes, and who names a fault that was planted.

A is a ResNet-50 whose norms have statistics; B is what `surgeon convert -r acnet` and `surgeon fuse` make of it, right
or with one fault. Both are exported by surgeon. Polygraphy runs both ONNX files with onnxruntime on the CPU, every
tensor marked as an output, and compares those of the same name, with its own limits (1e-5, absolute and relative) or
others. Where a norm lies behind a conv in A alone, names in A's file and in B's mean different steps; so both are also
exported with all norms folded.

Every way runs in a process of its own, in turns; its peak memory is given without that of one that imports the same.

    pip install polygraphy
    python benchmarks/beside_polygraphy.py --folder /tmp/pairs --make     # writes the networks
    python benchmarks/beside_polygraphy.py --folder /tmp/pairs --rounds 3
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYER = "layer2.1.conv2"
CASES = ("right", "one tap off by 10 %", "weights scaled by 1.001", "one bias off by 1e-3", "padding mode lost")
LIMITS = (1e-5, 1e-4, 1e-3)


def make(folder: Path, size: int) -> None:
    """Write A, and B for every case, as modules and as ONNX."""
    import torch
    from verify_cost import trained

    import surgeon

    folder.mkdir(exist_ok=True)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    a = trained("resnet50")
    b = surgeon.fuse(surgeon.convert(a, "acnet", x), x)
    for name, model in (("a", a), *((f"b{i}", faulty(b, case)) for i, case in enumerate(CASES))):
        surgeon.save(model, folder / f"{name}.pt", force=True)
        surgeon.export(model, folder / f"{name}.onnx", x, force=True)
        folded = surgeon.fuse(model, x, norms=True)  # so that a conv is the same step in all, under the same name
        surgeon.export(folded, folder / f"{name}.folded.onnx", x, force=True)
    torch.save(x, folder / "x.pt")


def faulty(model: Any, case: str) -> Any:
    """Copy a network, and plant one fault in one layer."""
    import copy

    import torch

    made = copy.deepcopy(model)
    conv = made.get_submodule(LAYER)
    with torch.no_grad():
        if case == CASES[1]:
            conv.weight[0, 0, 1, 1] *= 1.1
        elif case == CASES[2]:
            conv.weight *= 1.001
        elif case == CASES[3]:
            conv.bias[0] += 1e-3
        elif case == CASES[4]:
            conv.padding_mode = "replicate"
            conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return made


def with_polygraphy(folder: Path, i: int, suffix: str) -> dict[str, Any]:
    """Compare two ONNX files, tensor by tensor."""
    from polygraphy import constants
    from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs, OnnxFromPath
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, DataLoader, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL

    def runner(name: str) -> Any:
        model = ModifyOutputs(OnnxFromPath(str(folder / f"{name}{suffix}")), outputs=constants.MARK_ALL)
        return OnnxrtRunner(SessionFromOnnx(BytesFromOnnx(model)), name=name)

    started = time.perf_counter()
    results = Comparator.run([runner("a"), runner(f"b{i}")], data_loader=DataLoader(seed=1))
    said = {}
    for limit in LIMITS:
        compare = SimpleCompareFunc(atol=limit, rtol=limit)
        (found,) = Comparator.compare_accuracy(results, compare_func=compare)[0].values()
        said[f"{limit:g}"] = {name: bool(one) for name, one in found[0].items()}
        if limit == LIMITS[0]:
            seconds = time.perf_counter() - started
    failed = {limit: [name for name, passed in one.items() if not passed] for limit, one in said.items()}
    return {"seconds": seconds, "tensors": len(said["1e-05"]), "failed": failed}


def with_verify(folder: Path, i: int, suffix: str, *, history: bool) -> dict[str, Any]:
    """Compare two files with `verify`."""
    import torch

    import surgeon

    started = time.perf_counter()
    a, b = surgeon.load(folder / f"a{suffix}"), surgeon.load(folder / f"b{i}{suffix}")
    if not history and hasattr(b, "surgeon_provenance"):
        del b.surgeon_provenance
    report = surgeon.verify(a, b, torch.load(folder / "x.pt"))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "verdict": report.verdict, "named": report.first_to_diverge, "sites": len(report.sites)}


WAYS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "Polygraphy": lambda folder, i: with_polygraphy(folder, i, ".onnx"),
    "Polygraphy, norms folded in both": lambda folder, i: with_polygraphy(folder, i, ".folded.onnx"),
    "verify, with the history": lambda folder, i: with_verify(folder, i, ".pt", history=True),
    "verify, without it": lambda folder, i: with_verify(folder, i, ".pt", history=False),
    "verify, the ONNX files": lambda folder, i: with_verify(folder, i, ".onnx", history=False),
}


def one(folder: Path, way: str, i: int) -> dict[str, Any]:
    """Go one way in this process, on one thread."""
    import torch

    torch.set_num_threads(1)
    if way.startswith("Polygraphy"):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import polygraphy.comparator  # noqa: F401
    else:
        import surgeon.api
        import surgeon.surgery.compare  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = WAYS[way](folder, i)
    return found | {"MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000}


def module_of(folder: Path, tensor: str, i: int) -> str:
    """Say which weight the step reads that makes a tensor of A; without weights, which step it is."""
    import onnx

    graph = onnx.load(folder / f"b{i}.folded.onnx", load_external_data=False).graph
    weights = {one.name for one in graph.initializer}
    for node in graph.node:
        if tensor in node.output:
            return next((name for name in node.input if name in weights), node.op_type)
    return "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--make", action="store_true", help="write the networks, and measure nothing")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3, help="of the times, on the first two cases")
    parser.add_argument("--only", nargs=2, metavar=("WAY", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))))
    given = parser.parse_args()
    if given.make:
        make(given.folder, given.size)
        return
    if given.only:
        print(json.dumps(one(given.folder, given.only[0], int(given.only[1]))))
        return
    for i in given.cases:
        rows: dict[str, list[dict[str, Any]]] = {way: [] for way in given.ways}
        for _ in range(given.rounds):
            for way in given.ways:
                command = [sys.executable, __file__, "--folder", str(given.folder), "--only", way, str(i)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows[way].append(json.loads(done.stdout.splitlines()[-1]))
        for way, runs in rows.items():
            took = statistics.median(run["seconds"] for run in runs)
            against = [run["seconds"] / other["seconds"] for run, other in zip(runs, rows[given.ways[0]], strict=True)]
            size = statistics.median(run["MB"] for run in runs)
            said = _said(given.folder, runs[0], i)
            ratio = f"{statistics.median(against):.2f} ({min(against):.2f} … {max(against):.2f})"
            print(f"| {CASES[i]} | {way} | {took:.1f} | {ratio} | {size:.0f} | {said} |", flush=True)


def _said(folder: Path, run: dict[str, Any], i: int) -> str:
    if "verdict" in run:
        return f"{run['verdict']}, first: {run['named']} ({run['sites']} sites)"
    parts = []
    for limit, failed in run["failed"].items():
        first = f", first {failed[0]} ({module_of(folder, failed[0], i)})" if failed else ""
        parts.append(f"at {limit}: {len(failed)} of {run['tensors']} fail{first}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()

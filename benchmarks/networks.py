"""What each bundled recipe brings to ten networks of ten kinds: multiply-adds on paper, and time on the clock.

Every recipe that swaps something is planned; those that make the network cheaper, and the one that costs nothing, are
carried out, and timed in turns with the network as it is, all of them fused, norms too. Weights are random. Results are
kept in networks.json, network by network; docs/networks.md is made of them.

    python benchmarks/networks.py                              # all of them: about 8 minutes on 2 cores
    python benchmarks/networks.py --only resnet50 --rounds 15
    python benchmarks/networks.py --write-docs-only
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networks_page
import torch

import surgeon
from surgeon.analysis import example as examples
from surgeon.models.copies import duplicate
from surgeon.recipes import recipe as recipes
from surgeon.surgery import bench
from surgeon.surgery.advice import Advice, Offer, advise
from surgeon.surgery.foresee import foresee
from surgeon.surgery.make import make
from surgeon.surgery.operate import operate_

RESULTS = Path(__file__).with_suffix(".json")
UNET = {"encoder_name": "resnet34", "encoder_weights": None}
SMALL = {"min_size": 320, "max_size": 320, "score_thresh": 0.99}  # so that nothing depends on what is found


@dataclass(frozen=True, slots=True)
class Net:
    """A network: its name as surgeon takes it, what it is built with, and the example it is timed on."""

    name: str
    example: str = "1,3,224,224"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def short(self) -> str:
        return self.name.partition(":")[2]


NETWORKS = (
    Net("torchvision:resnet50"),
    Net("torchvision:vgg16_bn"),
    Net("torchvision:densenet121"),
    Net("torchvision:mobilenet_v3_large"),
    Net("torchvision:efficientnet_b0"),
    Net("torchvision:regnet_y_800mf"),
    Net("timm:repvgg_a0"),
    Net("segmentation_models_pytorch:Unet", "1,3,256,256", UNET),
    Net("torchvision:retinanet_resnet50_fpn", "[3,320,320]", SMALL),
    Net("torchvision:convnext_tiny"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names or parts of names")
    parser.add_argument("--rounds", type=int, default=7, help="each one runs every form of a network once")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--no-time", action="store_true", help="only plan")
    parser.add_argument("--write-docs-only", action="store_true", help="measure nothing, write docs/networks.md")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = [net for net in NETWORKS if any(part in net.name for part in options.only or [""])]
    for net in wanted if not options.write_docs_only else []:
        start = time.monotonic()
        found = measured(net, 0 if options.no_time else options.rounds)
        known = read() | {net.name: found}
        text = json.dumps({one.name: known[one.name] for one in NETWORKS if one.name in known}, indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
        print(f"{net.name}: {len(found['recipes'])} recipes in {time.monotonic() - start:.0f} s", flush=True)
    networks_page.write(read())


def read() -> dict[str, Any]:
    """Give what was measured so far."""
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return known


def measured(net: Net, rounds: int) -> dict[str, Any]:
    """Plan all recipes on a network, and time those that are of interest."""
    torch.manual_seed(0)
    model = surgeon.load(net.name, arch_args=net.arguments).eval()
    surveyed = surgeon.survey(model, examples.read(net.example, model))
    advice = advise(surveyed, [recipes.load(name) for name in recipes.bundled()])
    timings = timed(surveyed, advice, rounds) if rounds else {}
    rows = {one.recipe: row(one, timings.get(one.recipe)) for one in advice.offers}
    return {
        "input": advice.input,
        "arguments": dict(net.arguments),
        "convs": advice.convs,
        "params": advice.cost.params,
        "macs": advice.cost.macs,
        "ms": 1e3 * timings["plain"].seconds if timings else None,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": {"torch": torch.__version__, "surgeon": surgeon.__version__},
        "free": advice.free.recipe if advice.free else None,
        "recipes": rows,
    }


def timed(surveyed: surgeon.Survey, advice: Advice, rounds: int) -> dict[str, bench.Timing]:
    """Time the network and what the recipes make of it, in turns."""
    models = [("plain", surveyed.model)]
    for offer in advice.offers:
        if offer.saves < 1 or offer is advice.free:
            converted = duplicate(surveyed.model)
            plan = foresee(make(recipes.load(offer.recipe), surveyed), surveyed)
            operate_(converted, plan, surveyed.network)
            models.append((offer.recipe, converted))
    assert surveyed.inputs is not None
    return {one.model: one for one in bench.compare(models, surveyed.inputs, rounds=rounds)}


def row(offer: Offer, timing: bench.Timing | None) -> dict[str, Any]:
    """Give what is kept of a recipe on a network."""
    gained = offer.gained
    macs = gained.macs if gained else None
    found = {
        "swapped": offer.swapped,
        "exact": offer.exact,
        "keeps_function": offer.keeps_function,
        "params": round(gained.params.after / gained.params.before, 4) if gained else None,
        "macs": round(macs.after / macs.before, 4) if macs else None,
        "training_macs": round(offer.training.after / offer.training.before, 4) if offer.training else None,
        "why": offer.error or offer.why,
    }
    if timing is not None:
        low, high = timing.quartiles
        found |= {"time": round(timing.time_ratio, 4), "quartiles": [round(low, 4), round(high, 4)]}
        found |= {"reliable": timing.is_believable}
    return found


def machine() -> str:
    """Name the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

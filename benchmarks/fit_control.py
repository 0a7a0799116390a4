"""The control of benchmarks/fit.py: a converted network is trained with labels for as long as fitting took.

It gets all training images with their labels, mirrored and shifted as the original was trained, the test split as its
judge of two learning rates, and norms that are estimated anew behind the clock's back. Adam, whose rate falls to zero
as a cosine of the time that has passed.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from fit_networks import BATCH, Case, train_demo
from torch import nn
from torch.nn import functional as F

from surgeon.models.copies import duplicate

RATES = (1e-3, 4e-3)


def trained(projected: nn.Module, case: Case, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Train copies of a network with each rate, and give what the better one is worth."""
    _one_step(duplicate(projected), case)  # so that nothing is compiled or looked up while the clock runs
    runs = []
    for rate in RATES:
        model = duplicate(projected)
        torch.manual_seed(seed)
        seen = train_(model, case, seconds, rate)
        runs.append({**case.worth(case.renorm_(model)).to_dict(), "rate": rate, "images": seen, "seconds": seconds})
    return max(runs, key=lambda run: run["accuracy"])


def train_(model: nn.Module, case: Case, seconds: float, rate: float) -> int:
    """Train a network until the time is up; gives how many images it has seen."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    seen = 0
    start = time.perf_counter()
    while True:
        for index in torch.randperm(len(case.train.labels), device=case.device).split(BATCH):
            passed = (time.perf_counter() - start) / seconds
            if passed >= 1:
                return seen
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * passed)) / 2
            _step(model, case, optimizer, index)
            seen += len(index)


def _step(model: nn.Module, case: Case, optimizer: torch.optim.Optimizer, index: torch.Tensor) -> None:
    x = case.images(train_demo.augment(case.train.pixels[index]))
    loss = F.cross_entropy(model(x), case.train.labels[index].long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if case.device.type == "cuda":
        torch.cuda.synchronize()  # or the queue would go on when the time is up


def _one_step(model: nn.Module, case: Case) -> None:
    model.train()
    _step(model, case, torch.optim.Adam(model.parameters()), torch.arange(BATCH, device=case.device))

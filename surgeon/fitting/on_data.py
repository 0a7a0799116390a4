"""Two classifiers on the same images, batch by batch: what `verify --data` and `surgeon.agreement` measure.

Of a batch nothing is kept but counts, exact sums and the few images that differ most, so memory does not grow with the
number of images. Processes that torchrun started take a share of the batches each, and add up what they counted: the
counts are whole numbers and the sums exact, so the result is the same for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.analysis.example import Example
from surgeon.conv.exact import Total
from surgeon.errors import VerifyError
from surgeon.fitting.data import Data
from surgeon.fitting.in_memory import images_for
from surgeon.fitting.measure import chosen, is_scores
from surgeon.fitting.processes import ALONE, Processes, joined
from surgeon.fitting.supply import Batch
from surgeon.models import devices
from surgeon.models.devices import dtype_of
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import ordinary
from surgeon.models.wrappers import checked
from surgeon.proof import calls
from surgeon.proof.agreement import Agreement, Image, Labelled, wilson
from surgeon.proof.distance import matched, tensors

_WORST = 5  # images that are named
_FIVE = 5
_SUM = 1e-3  # by which scores that are shares may be off 1, as in half types
_TODO = "Give models that return scores: (images, classes), or (images, classes, height, width) for every pixel."


def agreement(
    a: nn.Module,
    b: nn.Module,
    data: Any,
    *,
    labels: Any = None,
    images: int | None = None,
    batch: int | None = None,
    preprocess: str | None = None,
    example: Example | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Agreement:
    """Say how far two classifiers agree on images, and with labels how right each of them is.

    `data` is a tensor of images (n, channels, height, width), anything that yields batches, or a source as the command
    line takes it; `labels` is a whole number for each image. Models that classify every pixel are compared pixel by
    pixel, without labels.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(10)).eval()
    >>> photos = torch.randn(16, 3, 8, 8)
    >>> out = net(photos)
    >>> found = agreement(net, net, photos, labels=out.argmax(1))
    >>> found.agreement, found.kl_max, found.labelled.accuracy_b
    (1.0, 0.0, 1.0)

    Raises:
        VerifyError: the outputs are no scores of classes, or a model does not run on the images.
    """
    with ordinary():
        checked(a), checked(b)
        options: dict[str, Any] = {"labels": labels, "images": images, "batch": batch, "preprocess": preprocess}
        read = images_for(data, a, example, **options, seed=seed)
        with joined(devices.of(a)) as processes:
            return measured(a, b, read, seed=seed, processes=processes, progress=progress)


def measured(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    seed: int = 0,
    processes: Processes = ALONE,
    progress: Progress = silent,
) -> Agreement:
    """Run both on the batches of this process, and count what all processes have counted."""
    counted = Counted()
    with processes.agreeing():
        sides = calls.evaluating(a), calls.evaluating(b)
        mine = data.share(processes.rank, processes.count)
        for i, (number, batch) in enumerate(processes.batches(data)):
            progress(f"comparing on data, {counted.images} of {mine.images} images", i / len(mine))
            outs = [calls.call(model, batch.inputs, dtype_of(model), seed) for model in sides]
            counted.see(outs[0], outs[1], batch, data.supply.names(number))
        if data.has_labels and counted.is_map:
            todo = "Leave --labels out: labels are one for each image."
            raise VerifyError("these models classify pixels, and images have one label each", todo=todo)
    return counted.over(processes, data)


@dataclass(slots=True)
class Counted:
    """What was counted so far."""

    images: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(10, dtype=torch.int64))
    kl: Total = field(default_factory=lambda: Total(torch.zeros(1, dtype=torch.float64)))
    most: float = -1.0  # the largest KL
    classes: int = 0
    is_map: bool = False
    worst: list[tuple[tuple[float, float, str], Image]] = field(default_factory=list)

    def see(self, out_a: Any, out_b: Any, batch: Batch, names: Sequence[str]) -> None:
        """Count one batch.

        Raises:
            VerifyError: the outputs are no scores of classes, or differ in shape.
        """
        a, b = _scores(out_a, out_b, batch)
        self.images, self.classes, self.is_map = self.images + len(a), a.shape[1], a.dim() == 4
        size = 1 if self.is_map else len(a)  # maps are large, and float64 makes them larger
        for i in range(0, len(a), size):
            rows = slice(i, i + size)
            labels = None if batch.labels is None or self.is_map else batch.labels[rows].to(a.device)
            self._count(_rows(a[rows]), _rows(b[rows]), labels, names[rows])

    def _count(self, a: Tensor, b: Tensor, labels: Tensor | None, names: Sequence[str]) -> None:
        """Count the items of some images, a row of scores for each."""
        best_a, best_b = chosen(a), chosen(b)
        is_same = (best_a == best_b) & (best_a >= 0)
        is_odd = (best_a < 0) | (best_b < 0)
        kl = divergence(a, b)
        known = kl[~is_odd]
        self.kl.add_(known[known.isfinite()].sum()[None].cpu())
        self.most = max([self.most, *([float(known.max())] if len(known) else [])])
        five = _in_five(best_a, b, is_odd) if a.shape[1] > _FIVE else 0
        found = [len(a), int(is_same.sum()), five, int(is_odd.sum()), int(known.isinf().sum())]
        self.counts += torch.tensor([*found, *_right(best_a, best_b, labels)])
        self._keep((best_a, best_b, labels), ~is_same, kl.masked_fill(is_odd, math.nan), names)

    def _keep(
        self, classes: tuple[Tensor, Tensor, Tensor | None], differs: Tensor, kl: Tensor, names: Sequence[str]
    ) -> None:
        """Keep the images that differ most: the largest mean KL, NaN before all."""
        best_a, best_b, labels = classes
        rows = [one.reshape(len(names), -1) for one in (differs, kl)]
        many, far = rows[0].sum(1).tolist(), rows[1].mean(1).tolist()
        for i, name in enumerate(names):
            if many[i] == 0 and far[i] == 0:
                continue
            mean = None if math.isnan(far[i]) else far[i]
            classes_of = [None if self.is_map else int(best[i]) for best in (best_a, best_b)]
            label = None if labels is None else int(labels[i])
            image = Image(name, mean, int(many[i]), classes_of[0], classes_of[1], label)
            self.worst.append(((-math.inf if mean is None else -mean, -many[i], name), image))
        self.worst = sorted(self.worst, key=lambda one: one[0])[:_WORST]

    def over(self, processes: Processes, data: Data) -> Agreement:
        """Add up what all processes have counted."""
        processes.add_([self.counts])
        (total,) = processes.whole([self.kl])
        others = processes.gathered((self.images, self.most, self.classes, self.is_map, self.worst))
        worst = sorted((one for other in others for one in other[4]), key=lambda one: one[0])[:_WORST]
        items, agreeing, five, odd, unbounded, labelled, right_a, right_b, lost, wrong = self.counts.tolist()
        classes, is_map = max(one[2] for one in others), any(one[3] for one in others)
        in_five = five if classes > _FIVE else None
        has_kl = items > odd
        return Agreement(
            source=data.source,
            preprocessing=data.preprocessing,
            images=sum(one[0] for one in others),
            of="pixels" if is_map else "images",
            items=items,
            classes=classes,
            agreeing=agreeing,
            in_five=in_five,
            odd=odd,
            agreement=agreeing / items,
            interval=None if is_map else wilson(agreeing, items),
            top5_agreement=None if in_five is None else in_five / items,
            kl_mean=(math.inf if unbounded else float(total) / (items - odd)) if has_kl else None,
            kl_max=max(one[1] for one in others) if has_kl else None,
            labelled=Labelled.of(labelled, right_a, right_b, lost, wrong) if labelled else None,
            worst=tuple(image for _, image in worst),
        )


def _rows(scores: Tensor) -> Tensor:
    """Give a row of scores for each item, in float64."""
    return scores.movedim(1, -1).flatten(0, -2).double()


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(A‖B) of every row of scores; below zero is rounding."""
    log_p, log_q = _log_shares(a), _log_shares(b)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(-1).clamp_min(0.0)


def _log_shares(scores: Tensor) -> Tensor:
    """Give log-probabilities: of scores by softmax; rows that are shares already, or their logarithms, are kept."""
    is_share = (scores >= 0).all(-1, keepdim=True) & ((scores.sum(-1, keepdim=True) - 1).abs() < _SUM)
    return torch.where(is_share, scores.clamp_min(0.0).log(), scores.log_softmax(-1))


def _scores(out_a: Any, out_b: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Choose the first output that holds scores of classes, in both models."""
    pairs = [(b.to(a.device), a) for b, a in matched(out_b, out_a, any_dtype=True)]
    found = next(((a, b) for b, a in pairs if is_scores(a, batch.inputs) and len(a) == batch.count), None)
    if found is None:
        shapes = ", ".join("×".join(map(str, one.shape)) or "a number" for one in tensors(out_a))
        raise VerifyError(f"the outputs are no scores of classes ({shapes} for {batch.count} images)", todo=_TODO)
    return found


def _in_five(best_a: Tensor, scores_b: Tensor, is_odd: Tensor) -> int:
    is_in = (scores_b.topk(_FIVE, 1).indices == best_a[:, None]).any(1)
    return int((is_in & ~is_odd).sum())


def _right(best_a: Tensor, best_b: Tensor, labels: Tensor | None) -> list[int]:
    """Count labelled items: all, right in A, right in B, right in A alone, and wrong in both in two ways."""
    if labels is None:
        return [0] * 5
    right_a, right_b = best_a == labels, best_b == labels
    differ = ~right_a & ~right_b & (best_a != best_b)
    return [len(labels), *(int(one.sum()) for one in (right_a, right_b, right_a & ~right_b, differ))]

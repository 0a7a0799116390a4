"""What a converted network is worth beside its original: agreement, relative L2 of the outputs, accuracy, on images.

    agreement   = share of images (of pixels, where every pixel is classified) with the same highest score
    relative L2 = √(Σ‖b − a‖² / Σ‖a‖²)        over all images and all outputs that are numbers, in float64

Everything is kept as sums, which processes that look at different images can add up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgeon.errors import VerifyError
from surgeon.fitting.data import Batch, Data
from surgeon.models.call import Inputs
from surgeon.models.devices import dtype_of
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import ordinary
from surgeon.proof import calls
from surgeon.proof.distance import matched, real, tensors

_IMAGE_CHANNELS = (1, 3, 4)  # an output with as many channels as the input may be a picture


@dataclass(frozen=True, slots=True)
class Worth:
    """Sums over images, of which the figures are made; `a + b` is what both would have given together.

    >>> both = Worth(images=2, scored=2, agreeing=1, apart=1.0, size=4.0) + Worth(images=2, scored=2, agreeing=2)
    >>> both.agreement, both.relative_l2, both.accuracy
    (0.75, 0.5, None)
    """

    images: int = 0
    scored: int = 0  # images, or pixels, that both networks classify
    agreeing: int = 0  # of them, those that both put into the same class
    labelled: int = 0  # of them, those that have a label
    right: int = 0  # of the labelled, those that the converted network classifies correctly
    right_before: int = 0  # and those that the original does
    apart: float = 0.0  # Σ‖b − a‖²
    size: float = 0.0  # Σ‖a‖²
    uncompared: int = 0  # images whose outputs hold no numbers, or others than the original's, as detectors' may

    def __add__(self, other: Worth) -> Worth:
        return Worth(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def agreement(self) -> float | None:
        """The share with the same class; None where the outputs are no class scores."""
        return self.agreeing / self.scored if self.scored else None

    @property
    def relative_l2(self) -> float | None:
        """How far the outputs are from the original's; None where they cannot be compared, infinite for NaN."""
        if self.uncompared or not self.images:
            return None
        if not (math.isfinite(self.apart) and math.isfinite(self.size)):
            return math.inf
        return math.sqrt(self.apart / self.size) if self.size else (math.inf if self.apart else 0.0)

    @property
    def accuracy(self) -> float | None:
        """The converted network's accuracy; None without labels."""
        return self.right / self.labelled if self.labelled else None

    @property
    def accuracy_before(self) -> float | None:
        """The original's accuracy; None without labels."""
        return self.right_before / self.labelled if self.labelled else None


def measure(
    converted: nn.Module, original: nn.Module, data: Data, *, seed: int = 0, progress: Progress = silent
) -> Worth:
    """Compare two networks on data, batch by batch, in eval mode and without gradients, each on its own device.

    Raises:
        VerifyError: one of them does not run on the data.
    """
    found = Worth()
    with ordinary():
        b, a = calls.evaluating(converted), calls.evaluating(original)
        for i, batch in enumerate(data):
            progress(f"measuring, {found.images} of {data.images} images", i / len(data))
            out_b, out_a = (calls.call(model, batch.inputs, dtype_of(model), seed) for model in (b, a))
            found += compared(out_b, out_a, batch)
    return found


def compared(out_b: Any, out_a: Any, batch: Batch) -> Worth:
    """Compare what the converted network gives for one batch with what the original gives."""
    try:
        pairs = [(b.to(a.device), a) for b, a in matched(out_b, out_a, any_dtype=True)]
    except VerifyError:
        if len(tensors(out_a)) == len(tensors(out_b)) == 1:  # two classifiers of other classes, say
            raise
        return Worth(images=batch.count, uncompared=batch.count)
    floating = [(real(b).double(), real(a).double()) for b, a in pairs if a.is_floating_point() or a.is_complex()]
    if not floating:
        return Worth(images=batch.count, uncompared=batch.count)
    apart = sum(float((b - a).square().sum()) for b, a in floating)
    size = sum(float(a.square().sum()) for _, a in floating)
    found = Worth(images=batch.count, apart=apart, size=size)
    scores = next((pair for pair in pairs if is_scores(pair[1], batch.inputs)), None)
    return found if scores is None else found + _classified(*scores, batch.labels)


def is_scores(out: Tensor, inputs: Inputs) -> bool:
    """Whether an output holds a score for every class: (n, classes), or (n, classes, h, w) for every pixel.

    One channel is no choice. A map with the channels of an input that is an image may be an image itself, and is not
    taken for scores.

    >>> import torch
    >>> image = Inputs((torch.zeros(2, 3, 8, 8),))
    >>> [is_scores(torch.zeros(2, *shape), image) for shape in ((10,), (21, 8, 8), (3, 8, 8), (1,))]
    [True, True, False, False]
    """
    if not out.is_floating_point() or out.dim() not in (2, 4) or out.shape[1] < 2:
        return False
    pictured = {t.shape[1] for t in inputs.tensors if t.dim() == 4 and t.shape[1] in _IMAGE_CHANNELS}
    return out.dim() == 2 or out.shape[1] not in pictured


def _classified(b: Tensor, a: Tensor, labels: Tensor | None) -> Worth:
    """Count classes that agree, and those that are right; a score that is NaN decides for no class."""
    chosen_b, chosen_a = (chosen(scores) for scores in (b, a))
    agreeing = int(((chosen_b == chosen_a) & (chosen_b >= 0)).sum())
    found = Worth(scored=chosen_a.numel(), agreeing=agreeing)
    if labels is None or labels.shape != chosen_a.shape:
        return found
    labels = labels.to(chosen_a.device)
    right_b, right_a = (int((one == labels).sum()) for one in (chosen_b, chosen_a))
    return found + Worth(labelled=labels.numel(), right=right_b, right_before=right_a)


def chosen(scores: Tensor) -> Tensor:
    """Give the class of the highest score along axis 1; −1 where a score is NaN."""
    return scores.argmax(1).masked_fill(scores.isnan().any(1), -1)


def totals(worth: Worth) -> Sequence[float]:
    """Give the sums in a row, to be added up over processes; `Worth(*sums)` is made of them again."""
    return dataclasses.astuple(worth)

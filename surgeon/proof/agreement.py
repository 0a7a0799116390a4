"""What two classifiers make of the same images: how often they agree, who is right, and whether that is chance.

    agreement    = share of items with the same highest score in both
    KL(A‖B)      = Σ p·(log p − log q), p and q the softmax of A's and B's scores; of scores that sum to 1, themselves
    McNemar      p = min(1, 2 · Σ_{k ≤ min(b, c)} C(n, k) / 2ⁿ), n = b + c: the items that only A, only B has right
    interval     Wilson's for a share; Agresti and Min's for the difference of two accuracies on the same items

McNemar 1947, Psychometrika 12:153; Wilson 1927, JASA 22:209; Agresti and Min 2005, Statistics in Medicine 24:729. An
item is an image, or a pixel where every pixel is classified. Pixels of one image are not independent of each other, so
for them there is neither test nor interval.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import RenderableType

from surgeon.display.agreement import agreement_view
from surgeon.display.shown import Shown

CHANCE = 0.05  # a p below it is called more than chance
_Z = 1.959963984540054  # 97.5 % of a normal distribution lie below
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Image:
    """One image on which two models differ; `kl` is the mean over its items, None where a score is NaN.

    `a` and `b` are the classes; None for maps, of which `differing` says how many pixels have another class in B.
    """

    name: str
    kl: float | None
    differing: int
    a: int | None = None
    b: int | None = None
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """How right both models are on items with labels; `lost` are right in A alone, and `won` in B alone."""

    items: int
    right_a: int
    right_b: int
    lost: int
    won: int
    changed_wrong: int  # both are wrong, each in its own way
    accuracy_a: float
    accuracy_b: float
    interval_a: Interval  # 95 %
    interval_b: Interval
    difference: float  # of the accuracies, B's less A's
    interval: Interval  # 95 %, of the difference
    p: float  # exact McNemar, two-sided
    says: str

    @classmethod
    def of(cls, items: int, right_a: int, right_b: int, lost: int, changed_wrong: int) -> Labelled:
        """Make the figures of the counts.

        >>> found = Labelled.of(items=100, right_a=90, right_b=85, lost=6, changed_wrong=2)
        >>> found.won, found.p, found.difference
        (1, 0.125, -0.05)
        """
        won = right_b - (right_a - lost)
        p = mcnemar(lost, won)
        return cls(
            *(items, right_a, right_b, lost, won, changed_wrong, right_a / items, right_b / items),
            wilson(right_a, items),
            wilson(right_b, items),
            (won - lost) / items,
            difference(lost, won, items),
            p,
            _sentence(lost, won, p),
        )


@dataclass(frozen=True, slots=True)
class Agreement(Shown):
    """What two classifiers made of images; shares are of `items`, which are images or pixels (`of`)."""

    source: str
    preprocessing: str
    images: int
    of: Literal["images", "pixels"]
    items: int
    classes: int
    agreeing: int  # the same highest score
    in_five: int | None  # A's class is among the five highest of B; None where there are no more than five classes
    odd: int  # items with a score that is NaN, which decide for no class, and of which there is no KL
    agreement: float
    interval: Interval | None  # 95 %, of the agreement; None for pixels
    top5_agreement: float | None
    kl_mean: float | None  # KL(A‖B), in nats; infinite where B gives 0 to a class to which A does not
    kl_max: float | None
    labelled: Labelled | None
    worst: tuple[Image, ...]  # the images that differ most, the first one most of all

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> RenderableType:
        return agreement_view(self)


def mcnemar(lost: int, won: int) -> float:
    """Give the two-sided p of the exact test: how likely is so uneven a split of `lost` + `won` by tossing a coin?

    >>> mcnemar(0, 5), mcnemar(3, 3), mcnemar(0, 0)
    (0.0625, 1.0, 1.0)
    """
    n = lost + won
    chosen, total = 1, 0
    for k in range(min(lost, won) + 1):
        total += chosen
        chosen = chosen * (n - k) // (k + 1)
    return min(1.0, float(2 * total / 2**n))


def wilson(count: int, of: int) -> Interval:
    """Give the 95 % interval of a share.

    >>> [round(end, 4) for end in wilson(90, 100)]
    [0.8256, 0.9448]
    """
    share, z2 = count / of, _Z**2 / of
    middle = share + z2 / 2
    half = _Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def difference(lost: int, won: int, items: int) -> Interval:
    """Give the 95 % interval of (won − lost) / items: Wald's, with half an item more in each of the four counts.

    >>> [round(end, 4) for end in difference(6, 1, 100)]
    [-0.1025, 0.0045]
    """
    n, b, c = items + 2, lost + 0.5, won + 0.5
    middle = (c - b) / n
    half = _Z * math.sqrt(b + c - (c - b) ** 2 / n) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def _sentence(lost: int, won: int, p: float) -> str:
    split = f"of {lost + won} images that only one of them has right, {lost} are A's and {won} are B's"
    if not lost + won:
        return "both are right on the same images"
    if p >= CHANCE:
        return f"{split}: a coin splits them as unevenly with p = {p:.2g}, so this may be chance (exact McNemar)"
    better = "A" if lost > won else "B"
    return f"{split}: p = {p:.2g}, which is more than chance; {better} is better on such images (exact McNemar)"

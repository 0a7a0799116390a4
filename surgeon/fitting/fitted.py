"""Fit a converted network to its original, train it against that if asked to, measure both, and record it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from torch import nn

from surgeon.display.fit import fit_view
from surgeon.display.shown import Shown
from surgeon.errors import FitError
from surgeon.fitting.cache import Cache
from surgeon.fitting.data import Data
from surgeon.fitting.distil import Distilled, distil_
from surgeon.fitting.fit import Fit, How, as_it_was, fit_, worth
from surgeon.fitting.measure import Worth
from surgeon.fitting.processes import ALONE, Processes
from surgeon.fitting.units import prepared
from surgeon.models import devices
from surgeon.models.copies import in_mode
from surgeon.models.progress import Progress, parts, silent
from surgeon.models.sandbox import ordinary
from surgeon.surgery.history import Operation, content_hash, history, record_, versions

_log = logging.getLogger("surgeon")
_BEFORE_FUSING = "Fit the network that convert made, and fuse it afterwards."


@dataclass(frozen=True, slots=True)
class Settings:
    """How to fit, how many steps of distillation follow, and where work in progress is kept.

    `state` is a file in which an interrupted fit is continued, `cache` a folder for what depends on the original and
    the images alone.
    """

    how: How = field(default_factory=How)
    distil: int = 0
    state: Path | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Raise a FitError before any work is done if the number of steps is none."""
        if type(self.distil) is not int or self.distil < 0:
            raise FitError(
                f"distil is {self.distil!r}, and should be a number of steps", todo="Give 200, say, or 0 for none."
            )


@dataclass(frozen=True, slots=True)
class Fitted(Shown):
    """What fitting did: on which images, every site before and after, and the network beside its original.

    `fit` has both; `last` is the network in the end: as fitted, or as distilled where that is nearer.
    """

    source: str
    preprocessing: str
    images: int
    fit: Fit
    distilled: Distilled | None
    last: Worth
    trained: Worth | None = None  # what distillation led to; it is not taken where that is further from the original

    def to_dict(self) -> dict[str, Any]:
        """Give what was measured as plain data, as it stands in a history."""
        steps = {"converted": self.fit.before, "fitted": self.fit.after}
        if self.trained is not None:
            steps["distilled"] = self.trained
        return {
            "source": self.source,
            "preprocessing": self.preprocessing,
            "images": self.images,
            "norms_estimated": self.fit.has_new_statistics,
            "sites": [asdict(site) for site in self.fit.sites],
            **({"not_fitted": list(self.fit.left)} if self.fit.left else {}),
            "network": {name: _figures(one) for name, one in steps.items()},
            **({} if self.distilled is None else {"distilled": asdict(self.distilled) | {"kept": self.is_trained}}),
            "seconds": round(self.fit.seconds, 1),
        }

    @property
    def is_trained(self) -> bool:
        """Whether the network in the end is the distilled one."""
        return self.trained is not None and self.last is self.trained

    def __rich__(self) -> RenderableType:
        return fit_view(self)


def _figures(one: Worth) -> dict[str, float]:
    """Give the figures that there are."""
    names = ("agreement", "relative_l2", "accuracy", "accuracy_before")
    return {name: value for name in names if (value := getattr(one, name)) is not None}


def carry_out_(
    converted: nn.Module,
    reference: nn.Module,
    data: Data,
    settings: Settings,
    *,
    processes: Processes = ALONE,
    progress: Progress = silent,
) -> Fitted:
    """Fit a network itself, record that in its history, and say what was measured; after an error it is as it was.

    Of several processes each takes its share of the images.

    Raises:
        FitError: it was not converted from the reference. DataError: the images say too little about a site.
    """
    steps = _since(reference, converted)
    parent = content_hash(converted)
    modes = {module: module.training for module in converted.modules()}
    place = devices.of(converted)
    try:
        with ordinary(), as_it_was(converted):
            original = prepared(reference if place is None else devices.on(reference, place), steps, data)
            in_mode(converted, False)
            made = _fitted(converted, original, data, settings, processes, progress)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if _is_further(made.last, made.fit.before):
        _log.warning("fitting has not brought the network nearer to its original; more images may, or --distil")
    record_(converted, Operation("fit", parent, content_hash(converted), None, versions(), measured=made.to_dict()))
    return made


def _fitted(
    converted: nn.Module,
    original: nn.Module,
    data: Data,
    settings: Settings,
    processes: Processes,
    progress: Progress,
) -> Fitted:
    """Fit, distil and measure; the network is in eval mode."""
    state, steps = settings.state, settings.distil
    found = fit_(
        converted,
        original,
        data,
        settings.how,
        processes=processes,
        state=state,
        cache=Cache(settings.cache),
        progress=parts(progress, 0, 0.5 if steps else 1),
    )
    if not steps:
        return Fitted(data.source, data.preprocessing, data.images, found, None, found.after)
    fitted = [(one.detach(), one.detach().clone()) for one in (*converted.parameters(), *converted.buffers())]
    trained = distil_(
        converted,
        original,
        _share_to_train(data, processes),
        steps=steps,
        seed=settings.how.seed,
        all_reduce=processes.add_ if processes.count > 1 else None,
        checkpoint=None if state is None else state.with_name(f"{state.name}.distil{processes.rank}"),
        progress=parts(progress, 0.5, 0.95),
    )
    last = worth(converted, original, data, processes)
    if not _is_further(last, found.after):
        return Fitted(data.source, data.preprocessing, data.images, found, trained, last, last)
    for one, number in fitted:
        one.copy_(number)
    return Fitted(data.source, data.preprocessing, data.images, found, trained, found.after, last)


def _is_further(one: Worth, other: Worth) -> bool:
    """Whether a network is further from the original than another: it agrees less, or as much with outputs further off.

    A distance says less than the classes: to all scores of an image the same number can be added.
    """
    if one.agreement is not None and other.agreement is not None and one.agreement != other.agreement:
        return one.agreement < other.agreement
    return one.relative_l2 is not None and other.relative_l2 is not None and one.relative_l2 > other.relative_l2


def _share_to_train(data: Data, processes: Processes) -> Data:
    """Give the images of this process; all processes refuse where one of them has too few."""
    share = data.share(processes.rank, processes.count)
    with processes.agreeing():
        if share.images < 2:
            raise FitError(
                f"it has {share.images} of the {data.images} images, too few to train with and to hold some back",
                todo="Give more images, a smaller --batch, or fewer processes.",
            )
    return share


def _since(reference: nn.Module, converted: nn.Module) -> Sequence[Operation]:
    """Give the operations that led from the reference to the network.

    Raises:
        FitError: there are none, or the network has been fused since.
    """
    steps, known = history(converted), history(reference)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, known, strict=False)))
    since = [step for step in steps[shared:] if step.operation != "fit"]
    fits = [step for step in steps[shared:] if step.operation == "fit"]
    if len(known) > shared or not any(step.operation == "convert" for step in since):
        raise FitError(
            "the network was not converted from this reference",
            todo="Give what `surgeon convert` wrote, and as --reference the network that it was given.",
        )
    if any(step.operation == "fuse" for step in since):
        raise FitError("the network has been fused, and its blocks are gone", todo=_BEFORE_FUSING)
    if steps[-1].result != content_hash(converted) or any("distilled" in step.measured for step in fits):
        raise FitError(
            "the network was trained after it was converted, and fitting would take that away: it starts from the "
            "original's kernels",
            todo="Fit what `surgeon convert` wrote, and train it afterwards.",
        )
    if since[0].parent != content_hash(reference):
        _log.warning("the reference's tensors are not those that the network was converted with")
    return since

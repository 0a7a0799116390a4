"""What each channel of a network would lose at half the resolution, measured on images."""

from __future__ import annotations

from torch import Tensor

from surgeon.analysis import sites
from surgeon.analysis.network import Network
from surgeon.blocks.norms import core_of
from surgeon.blocks.two_streams import TwoStreamOptions
from surgeon.fitting.data import Data
from surgeon.fitting.watch import watched
from surgeon.models.copies import in_mode, shadow
from surgeon.models.progress import Progress, silent
from surgeon.recipes.recipe import Recipe
from surgeon.surgery.rank import Scores, lost_by_pooling


def asks_for_least(recipe: Recipe) -> bool:
    """Whether a recipe lets the channels that lose least become low."""
    options = (rule.options for rule in recipe.rules)
    return any(isinstance(one, TwoStreamOptions) and one.low == "least" for one in options)


def scores(recipe: Recipe, network: Network, data: Data | None) -> Scores | None:
    """Measure what channels lose, where images are given and the recipe asks for it."""
    return losses(network, data) if data is not None and asks_for_least(recipe) else None


def losses(network: Network, data: Data, progress: Progress = silent) -> Scores:
    """Give the mean loss of each output channel of every conv, by the first name of the conv.

    >>> import torch
    >>> from torch import nn
    >>> from surgeon.fitting import data
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False)).requires_grad_(False)
    >>> model[0].weight[:] = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    >>> found = losses(Network(model), data.of(torch.randn(4, 1, 8, 8)))["0"]
    >>> round((found[1] / found[0]).item(), 6)
    4.0
    """
    model = in_mode(shadow(network.model), False)
    known = [site for site in sites.survey(network).sites if site.functional is None and site.spec is not None]
    behind = {site.path: core_of(model.get_submodule(site.norm[0])) if site.norm else None for site in known}
    pairs = [(path, model.get_submodule(path)) for path in behind]
    sums: dict[str, Tensor] = {}
    done = 0

    def note(path: str, _: object, out: Tensor) -> None:
        lost = lost_by_pooling(out, behind[path]) * len(out)
        sums[path] = sums[path] + lost if path in sums else lost

    for batch in data:
        watched(model, pairs, batch.inputs, note)
        done += batch.count
        progress("what channels lose at half the resolution", done / data.images)
    return {path: lost / done for path, lost in sums.items()}

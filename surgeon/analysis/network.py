"""A module that has been looked at: its names, its islands, one run of it and what that costs.

Every function that asks about a network is given a `Network`, so that the network is traced and run only once. Each
answer is found when it is first asked for, and kept. An edit of the module makes its `Network` out of date;
`islands_after_swaps` gives the islands that are still right after convs were swapped for blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import nn

from surgeon.analysis.islands import Capture, Island, capture
from surgeon.analysis.rewritten import graph_of
from surgeon.analysis.run import Run, observe
from surgeon.analysis.shapes import Shapes, shapes_in
from surgeon.models.call import Inputs
from surgeon.models.copies import kept_aside, names
from surgeon.models.cost import Cost, stored


class Network:
    """A module as it is now, and the example call that it is looked at with.

    `run` is what a run with `inputs` has shown, if there was one already. Without `inputs` the module is not run;
    `called_with` can still say how it is called.

    >>> network = Network(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    >>> [island.path for island in network.islands], network.cost.params
    ([''], 224)
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs | None = None,
        *,
        run: Run | None = None,
        called_with: Inputs | None = None,
    ) -> None:
        self.model, self.inputs = model, inputs
        self._run, self._called_with = run, called_with

    @property
    def called_with(self) -> Inputs | None:
        """How it is called, as far as that is known."""
        return self.inputs if self.inputs is not None else self._called_with

    @cached_property
    def names(self) -> dict[nn.Module, tuple[str, ...]]:
        """All names of every module."""
        return names(self.model)

    @cached_property
    def kept_aside(self) -> dict[nn.Module, str]:
        """Modules that are also kept where torch does not look, and where that is."""
        return kept_aside(self.model)

    @cached_property
    def run(self) -> Run:
        """What one run in eval mode shows; nothing where no input is known.

        Raises:
            CaptureError: the model does not accept the input.
        """
        if self._run is not None or self.inputs is None:
            return self._run or Run()
        return observe(self.model, self.inputs)

    @cached_property
    def captured(self) -> Capture:
        """The islands, and the modules whose own Python could not be followed."""
        if self.inputs is None:
            return capture(self.model, self._called_with)
        return capture(self.model, self.inputs, self.run)

    @cached_property
    def shapes(self) -> Mapping[str, Shapes]:
        """The shapes of what the steps of islands give, by the path of the island; of all that is known of them."""
        if self.inputs is None:
            return {}
        try:
            return shapes_in(self.model, self.inputs, self.islands)
        except Exception:  # its graphs do not run as they stand, which other checks find and report
            return {}

    @property
    def islands(self) -> Sequence[Island]:
        return self.captured.islands

    @cached_property
    def cost(self) -> Cost:
        """Parameters and bytes; multiply-adds and activation bytes where an input is known."""
        if self.inputs is None:
            return stored(self.model)
        return replace(stored(self.model), macs=self.run.macs, activations=self.run.activations)

    def forget_(self) -> None:
        """Let go of all that was found, and of the modules that it holds: the module is about to be edited."""
        for name in ("names", "kept_aside", "run", "captured", "shapes", "cost"):
            vars(self).pop(name, None)

    def islands_after_swaps(self, model: nn.Module) -> list[Island]:
        """Give the islands of this module, or a copy of it, after convs and norms were swapped under their names.

        A graph names what it calls, so it is still right. A module that was rewritten has a new graph.
        """
        roots = [(island, model.get_submodule(island.path)) for island in self.islands]
        return [Island(one.path, graph_of(root) or one.graph) for one, root in roots]

"""Sums and differences of two maps, or of a map and numbers."""

from __future__ import annotations

import operator

import torch
from torch import fx

from surgeon.octave.layout import Flow, Layouts, Step
from surgeon.octave.rules.product import Product

FUNCTIONS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
METHODS = {"add", "add_", "sub", "sub_"}


class Sum(Product):
    """join(h, l) + join(h', l') = join(h + h', l + l'), and the same for a number, or one per channel."""

    name = "sum"

    def matches(self, step: Step) -> bool:
        return step.calls((), FUNCTIONS, METHODS)

    def flow(self, step: Step, layouts: Layouts) -> Flow:
        """Let a sum of two octave maps be an octave map; a plain map that is added to one has to be low-passed."""
        nodes = [value for value in step.operands if isinstance(value, fx.Node)]
        maps = [value for value in nodes if not layouts[value].is_point]
        octave = [value for value in maps if layouts[value].is_octave]
        if len(maps) == 2 and len(octave) == 1 and len(nodes) == 2:
            plain = next(value for value in maps if value not in octave)
            if not layouts[plain].low:
                return Flow(layouts[octave[0]], low_pass=(plain,))
        return super().flow(step, layouts)

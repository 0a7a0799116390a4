"""Swap the convolutions of a network you have for other blocks, train it, fold it back, and prove it with numbers.

    plan      = surgeon.plan(model, "acnet", example=(1, 3, 224, 224))
    converted = surgeon.convert(model, plan)
    deployed  = surgeon.fuse(converted)
    report    = surgeon.verify(converted, deployed, example=(1, 3, 224, 224))

`import surgeon` imports neither torch nor anything slow; the names below are imported when they are first used. Notices
go to the logger `surgeon`, and are printed if the program sets up logging.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from surgeon import errors
from surgeon._version import __version__

if TYPE_CHECKING:
    from surgeon.analysis.example import Example
    from surgeon.analysis.sites import Survey
    from surgeon.api import (
        convert,
        convert_,
        fuse,
        fuse_,
        history,
        load,
        new_parameters,
        plan,
        recipes_for,
        save,
        survey,
    )
    from surgeon.blocks.acblock import ACBlock
    from surgeon.blocks.base import Block, BlockOptions, Deployable, Foldable, Trial
    from surgeon.blocks.hetconv import HetConv
    from surgeon.blocks.octave import OctaveConv
    from surgeon.conv.spec import ConvSpec
    from surgeon.figures.kernels import KernelFigures, kernels
    from surgeon.fitting.in_memory import fit, fit_, images
    from surgeon.fitting.on_data import agreement
    from surgeon.models.call import Inputs
    from surgeon.page.make import Page, report
    from surgeon.proof.agreement import Agreement
    from surgeon.proof.report import Check, Report
    from surgeon.recipes.recipe import Recipe
    from surgeon.surgery.advice import Advice
    from surgeon.surgery.compare import verify
    from surgeon.surgery.export import export
    from surgeon.surgery.history import Operation
    from surgeon.surgery.outputs import compare_outputs, save_outputs
    from surgeon.surgery.plan import Plan
    from surgeon.surgery.reorder import reordered

logging.getLogger(__name__).addHandler(logging.NullHandler())  # else Python would print warnings by itself

_HOMES = {
    "ACBlock": "surgeon.blocks.acblock",
    "Advice": "surgeon.surgery.advice",
    "Agreement": "surgeon.proof.agreement",
    "agreement": "surgeon.fitting.on_data",
    **dict.fromkeys(("Block", "BlockOptions", "Deployable", "Foldable", "Trial"), "surgeon.blocks.base"),
    **dict.fromkeys(("Check", "Report"), "surgeon.proof.report"),
    "ConvSpec": "surgeon.conv.spec",
    "Example": "surgeon.analysis.example",
    "export": "surgeon.surgery.export",
    "HetConv": "surgeon.blocks.hetconv",
    "Inputs": "surgeon.models.call",
    **dict.fromkeys(("Page", "report"), "surgeon.page.make"),
    "Operation": "surgeon.surgery.history",
    "OctaveConv": "surgeon.blocks.octave",
    "Plan": "surgeon.surgery.plan",
    "Recipe": "surgeon.recipes.recipe",
    "Survey": "surgeon.analysis.sites",
    "SurgeonError": "surgeon.errors",
    **dict.fromkeys(("KernelFigures", "kernels"), "surgeon.figures.kernels"),
    **dict.fromkeys(("fit", "fit_", "images"), "surgeon.fitting.in_memory"),
    **dict.fromkeys(("compare_outputs", "save_outputs"), "surgeon.surgery.outputs"),
    "reordered": "surgeon.surgery.reorder",
    **dict.fromkeys(("convert", "convert_", "fuse", "fuse_", "history", "load"), "surgeon.api"),
    **dict.fromkeys(("new_parameters", "plan", "recipes_for", "save", "survey"), "surgeon.api"),
    "verify": "surgeon.surgery.compare",
}

__all__ = [
    "ACBlock",
    "Advice",
    "Agreement",
    "Block",
    "BlockOptions",
    "Check",
    "ConvSpec",
    "Deployable",
    "Example",
    "Foldable",
    "HetConv",
    "Inputs",
    "KernelFigures",
    "OctaveConv",
    "Operation",
    "Page",
    "Plan",
    "Recipe",
    "Report",
    "SurgeonError",
    "Survey",
    "Trial",
    "__version__",
    "agreement",
    "compare_outputs",
    "convert",
    "convert_",
    "errors",
    "export",
    "fit",
    "fit_",
    "fuse",
    "fuse_",
    "history",
    "images",
    "kernels",
    "load",
    "new_parameters",
    "plan",
    "recipes_for",
    "reordered",
    "report",
    "save",
    "save_outputs",
    "survey",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgeon' has no attribute {name!r}")
    import random

    state = random.getstate()  # rich draws a number while it is imported
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    finally:
        random.setstate(state)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

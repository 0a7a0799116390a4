"""Outputs of a model in a file, and another model compared with them, on another machine or with other versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.analysis import example as examples
from surgeon.analysis.example import Example
from surgeon.errors import CaptureError
from surgeon.files.atomic import claim, write_atomically
from surgeon.models.progress import Progress, silent
from surgeon.models.sandbox import ordinary
from surgeon.models.wrappers import checked
from surgeon.proof import across, reference
from surgeon.proof.across import Known
from surgeon.proof.reference import Manifest
from surgeon.proof.report import Report
from surgeon.surgery import history as histories
from surgeon.surgery import replay
from surgeon.surgery.look import inputs_for

SUFFIX = ".safetensors"


def save_outputs(
    model: nn.Module,
    path: str | PathLike[str],
    example: Example | Sequence[Example] | None = None,
    *,
    sites: bool = False,
    store_inputs: bool = False,
    name: str = "",
    seed: int = 0,
    force: bool = False,
    progress: Progress = silent,
) -> None:
    """Write what a model gives for an input to a `.safetensors` file, for `compare_outputs` where the model is not.

    `example` is one input or a list of them, as `verify` takes it. Inputs that are drawn are drawn again there, and
    their hashes compared, unless `store_inputs` keeps them; others are kept. With `sites`, what every module gives is
    kept as well, or a sketch of it, so that the first one that differs can be named.

    Raises:
        VerifyError: the model does not run, or gives what cannot be kept. StoreError: the file cannot be written.
    """
    with ordinary():
        checked(model)
        target = claim(Path(path), force=force, suffixes=(SUFFIX,))
        progress("looking for an input", 0)
        is_list = isinstance(example, list) and not all(isinstance(side, int) for side in example)
        given: Any = example if is_list else [example]
        known = [one for one in (inputs_for(model, each, seed=seed) for each in given) if one is not None]
        if not known:
            raise CaptureError("no input is known that the model accepts", todo=examples.PASS_ONE)
        progress("running the model", 0.2)
        said = {
            "model": name or type(model).__name__,
            "content": histories.content_hash(model),
            "history": histories.as_data(model),
            "versions": histories.versions(),
        }
        made = across.saved(model, known, seed=seed, sites=sites, store_inputs=store_inputs, said=said)
        progress(f"writing {target}", 0.9)
        write_atomically(target, lambda part: reference.write(made, part), force=force)


def compare_outputs(model: nn.Module, path: str | PathLike[str], *, progress: Progress = silent) -> Report:
    """Say whether a model computes what another one gave, whose outputs `save_outputs` has kept.

    The report is that of `verify`, with the questions that can be asked without the other model.

    Raises:
        StoreError, ModelError: there is no such file, or it is damaged. VerifyError: the outputs cannot be compared.
    """
    with ordinary():
        checked(model)
        progress("reading the outputs", 0)
        known = reference.read(Path(path))
        progress("comparing", 0.2)
        history = histories.steps_in(known.manifest.history, f"the manifest in {path}")
        steps = replay.steps_since(histories.history(model), history, known.manifest.content)
        facts = Known(
            approximate=any(map(replay.is_approximate, steps)),
            made=steps[-1].operation if steps else "",
            changed=bool(steps) and histories.content_hash(model) != steps[-1].result,
        )
        found = across.against(known, model, facts)
        return replace(found, remarks=(*found.remarks, *_remarks(known.manifest, made=bool(steps))))


def _remarks(manifest: Manifest, *, made: bool) -> list[str]:
    """Say what was not asked, and what differs between there and here."""
    here = histories.versions()
    others = [
        f"{name} {value} there and {here[name]} here"
        for name, value in manifest.versions.items()
        if here.get(name, value) != value
    ]
    asked = "A itself is not at hand: its outputs were compared, and neither its modules nor the code between them"
    redo = ["what B's history says was done to A could not be done again, which needs A"] * made
    return [asked, *redo, *([f"versions differ: {', '.join(others)}"] if others else [])]

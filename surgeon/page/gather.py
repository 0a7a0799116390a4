"""Models in memory, and what was measured of them → what a page shows."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from surgeon.analysis import sites
from surgeon.analysis.network import Network
from surgeon.analysis.sites import Survey
from surgeon.blocks import Block
from surgeon.errors import CaptureError, FigureError, ModelError
from surgeon.figures.kernels import KernelFigures, NetworkKernels, kernels
from surgeon.files.exports.compiled import Compiled
from surgeon.models.copies import kind_of, shadow, to_meta
from surgeon.page.data import Looked, PageData, Part
from surgeon.page.flow import Flow, flows_in
from surgeon.proof.report import Report
from surgeon.surgery import history as histories
from surgeon.surgery.bench import Timing
from surgeon.surgery.operate import operate_
from surgeon.surgery.plan import Plan


def looked_at(name: str, network: Network) -> Looked:
    """Say what a page shows of one model."""
    model = network.model
    return Looked(
        name,
        tuple(_parts(model)),
        survey=None if isinstance(model, Compiled) else sites.survey(network),
        blocks=frozenset(path for path, one in model.named_modules() if isinstance(one, Block)),
        history=histories.history(model),
    )


def _parts(model: nn.Module) -> list[Part]:
    """List the modules of a model; what is inside a block is the block's own matter."""
    found: list[Part] = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        own = sum(one.numel() for one in module.parameters(recurse=False))
        if isinstance(module, Block):
            inside |= {id(one) for one in module.modules()}
            own = sum(one.numel() for one in module.parameters())
        found.append(Part(path, kind_said(module), own))
    return found


def kind_said(module: nn.Module) -> str:
    """Name the class of a module; one whose forward is a graph is named as it was."""
    origin = vars(module).get("origin")
    return origin.rpartition(".")[2] if isinstance(origin, str) else kind_of(module).__name__


def gather(
    models: Sequence[tuple[str, Network]],
    *,
    title: str | None = None,
    plan: Plan | None = None,
    report: Report | None = None,
    timings: Sequence[Timing] = (),
    versions: Mapping[str, str] | None = None,
    date: str | None = None,
    command: str | None = None,
    seed: int = 0,
) -> PageData:
    """Look at models, and put together what is known of them.

    Without a plan, it is the one by which the last of them was converted.
    """
    shown = tuple(looked_at(name, network) for name, network in models)
    return PageData(
        title=title or " and ".join(one.name for one in shown),
        command=command,
        models=shown,
        plan=plan if plan is not None else _carried_out(shown),
        is_planned=plan is not None,
        report=report,
        timings=tuple(timings),
        flows=_flows([network for _, network in models], shown, plan),
        kernels=_kernels(models, seed),
        versions=histories.versions() if versions is None else versions,
        date=date,
    )


def _carried_out(shown: Sequence[Looked]) -> Plan | None:
    """Read the plan that was carried out last from the history of a model."""
    plans = [step.plan for one in reversed(shown) for step in reversed(one.history) if step.plan is not None]
    return Plan.model_validate(plans[0]) if plans else None


def _kernels(models: Sequence[tuple[str, Network]], seed: int) -> KernelFigures | None:
    """Measure the kernels of the models that have some, beside untrained ones; exports and empty weights have none."""
    found: list[NetworkKernels] = []
    for name, network in models:
        if not isinstance(network.model, Compiled):
            with contextlib.suppress(FigureError, ModelError):
                found += kernels({name: network.model}, network.inputs, seed=seed).networks
    labelled = [replace(one, label=f"({letter})") for one, letter in zip(found, string.ascii_lowercase, strict=False)]
    return KernelFigures(tuple(labelled), seed) if labelled else None


def _flows(networks: Sequence[Network], shown: Sequence[Looked], plan: Plan | None) -> tuple[Flow, ...]:
    """Follow two streams through the last model that has some, or through the first one as a plan would make it."""
    for network in reversed(networks):
        if found := flows_in(network.model):
            return found
    if plan is None or not plan.has_streams or not plan.rewritten or not shown or shown[0].survey is None:
        return ()
    made = _as_planned(plan, shown[0].survey)
    return () if made is None else flows_in(made)


def _as_planned(plan: Plan, survey: Survey) -> nn.Module | None:
    """Carry a plan out on a copy without numbers; None where the network cannot be copied so."""
    try:
        made = shadow(survey.model, to_meta)
        operate_(made, plan, survey.network)
    except (CaptureError, RuntimeError, NotImplementedError):
        return None
    return made

"""What every recipe would do to a network: one table, and which recipe to take for what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.sheet import Line

if TYPE_CHECKING:
    from surgeon.surgery.advice import Advice, Offer
    from surgeon.surgery.plan import Change


def advice_view(advice: Advice) -> RenderableType:
    """One row for each recipe, and below them what to take."""
    table = words.table("recipe", "swapped", "keeps the function", "parameters", "MACs", "MACs in training", "remark")
    for offer in advice.offers:
        table.add_row(*_row(offer, advice.convs))
    return Group(Line(_model(advice)), table, *map(Line, _closing(advice)))


def _model(advice: Advice) -> str:
    said = f"{words.convs(advice.convs)}, {words.amount(advice.cost.params)} parameters"
    if advice.cost.macs is None or advice.input is None:
        return f"{said}; no input is known, so multiply-adds are not counted"
    return f"{said}, {words.amount(advice.cost.macs)} multiply-adds at {advice.input}"


def _row(offer: Offer, convs: int) -> tuple[str, ...]:
    counted = f"{offer.swapped} of {convs}"
    if offer.error is not None:
        return (offer.recipe, "none", "", "", "", "", offer.error)
    gained = offer.gained
    params, macs = (gained.params, gained.macs) if gained else (None, None)
    costs = (_factor(params), _factor(macs), _factor(offer.training))
    stay = f"{words.convs(offer.stay)} {'stays' if offer.stay == 1 else 'stay'}: {offer.why}" if offer.why else ""
    return (offer.recipe, counted, _function(offer), *costs, stay)


def _function(offer: Offer) -> str:
    if not offer.swapped:
        return ""
    if not offer.keeps_function:
        return "no, retrain"
    if offer.exact == offer.swapped:
        return "yes"
    return f"yes; {offer.swapped - offer.exact} in eval mode only" if offer.exact else "in eval mode"


def _factor(of: Change | None) -> str:
    return "" if of is None or not of.before else f"×{of.after / of.before:.2f}"


def _closing(advice: Advice) -> Iterator[str]:
    free, most = advice.free, advice.saves_most
    yield "parameters and MACs are those of the network once it is converted and fused, as it is deployed"
    if free is not None:
        trains = f"; {_factor(free.training)} multiply-adds while it is trained" if free.training else ""
        yield f"for training further, at no cost once it is fused: {free.recipe}{trains}"
    if most is not None:
        keeps = "" if most.keeps_function else "; retrain the network"
        yield f"for a cheaper network: {most.recipe} saves most, MACs ×{most.saves:.2f}{keeps}"
        yield f"fewer MACs need not be faster; surgeon plan MODEL -r {most.recipe} --time measures that"
    elif advice.cost.macs:
        yield "no bundled recipe saves 5 % of the multiply-adds of this network"


def advice_data(advice: Advice) -> dict[str, Any]:
    """Give plain data: what the table shows, and the full counts."""
    return {
        "convs": advice.convs,
        "params": advice.cost.params,
        "macs": advice.cost.macs,
        "input": advice.input,
        "recipes": [_offer_data(offer) for offer in advice.offers],
        "free": advice.free and advice.free.recipe,
        "saves_most": advice.saves_most and advice.saves_most.recipe,
    }


def _offer_data(offer: Offer) -> dict[str, Any]:
    gained = offer.gained
    plain = {key: getattr(offer, key) for key in ("recipe", "title", "swapped", "keeps_function", "exact")}
    changes = (gained.params, gained.macs) if gained else (None, None)
    named = zip(("params", "macs", "training_macs"), (*changes, offer.training), strict=True)
    plain |= {name: _change_data(change) for name, change in named}
    return plain | {"why": offer.why, "stay": offer.stay, "error": offer.error}


def _change_data(of: Change | None) -> dict[str, int] | None:
    return None if of is None else {"before": of.before, "after": of.after}

"""What convert and fuse did: the plan in short, what was measured, and what was written."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from surgeon.display import words
from surgeon.display.exported import exported_view
from surgeon.display.fit import fit_view
from surgeon.display.plan import plan_view
from surgeon.display.sheet import Line
from surgeon.display.tuned import tuned_view

_SHOWN = 8

if TYPE_CHECKING:
    from surgeon.app.made import Converted, Fused


def converted_view(converted: Converted) -> RenderableType:
    """The plan in short, the costs, and what was measured."""
    check, lines = converted.check, []
    if check.worst is not None:
        kept = check.sites - check.approximate
        lines.append(
            f"self-check: {words.counted(kept, 'swapped conv')} against the originals, in float64: worst relative L2 "
            f"{check.worst:.1e} ({check.worst_path})"
        )
    if check.permuted is not None:
        lines.append(f"channels permuted, against their order before, in float64: relative L2 {check.permuted:.1e}")
    if check.approximate:
        compute = "computes" if check.approximate == 1 else "compute"
        fitted = "it was fitted to what its conv" if check.approximate == 1 else "they were fitted to what their convs"
        todo = "retrain the network" if converted.fitted is None else f"{fitted} gave"
        lines.append(f"{words.convs(check.approximate)} now {compute} a different function; {todo}")
    if check.streams is not None:
        lines.append(
            f"without seams, against every conv splitting and joining, in float64: relative L2 {check.streams:.1e}"
        )
    if check.whole is not None and converted.fitted is None:
        lines.append(f"whole network, before and after, in its own dtype: relative L2 {check.whole:.1e}")
    if converted.fitted is None:
        return plan_view(converted.plan, every_conv=False, measured=lines, written=converted.path)
    shown = plan_view(converted.plan, every_conv=False, measured=lines)
    return Group(shown, Line(""), fit_view(converted.fitted, converted.path))


def converted_data(converted: Converted) -> dict[str, Any]:
    return {
        "path": str(converted.path),
        "self_check": asdict(converted.check),
        "plan": converted.plan.to_dict(),
        "slower_where_measured": {
            block: [asdict(row) for row in rows] for block, rows in converted.plan.broken_promises.items()
        },
        **({} if converted.fitted is None else {"fit": converted.fitted.to_dict()}),
    }


def fused_view(fused: Fused) -> RenderableType:
    before, after = fused.params
    folded = words.counted(len(fused.folded), "block")
    found = [folded] if fused.folded or not (fused.branches or fused.folded_norms) else []
    norms = len(fused.folded_norms) + sum(not one.has_branches for one in fused.branches)
    found += [words.counted(count, "linear sub-graph")] if (count := len(fused.branches) - _alone(fused)) else []
    found += [words.counted(norms, "norm")] if norms else []
    lines = [f"folded: {', '.join(found)}, {words.amount(before)} → {words.amount(after)} parameters"]
    lines += _of_branches(fused)
    if fused.norms:
        lines.append(f"given back: {words.counted(len(fused.norms), 'norm')}, each behind the conv that it belongs to")
    lines += fused.notes
    if fused.distance is not None:
        lines.append(f"whole network, before and after, in its own dtype: relative L2 {fused.distance:.1e}")
    if fused.dtype is not None:
        lines.append(_of_dtype(fused))
    if fused.python is not None:
        lines.append(f"verified: {fused.python} in {fused.path}/model.py, which needs no surgeon, is equivalent")
    shown: list[RenderableType] = [] if fused.tuned is None else [tuned_view(fused.tuned)]
    shown += map(Line, lines)
    if fused.exported is not None:
        return Group(*shown, exported_view(fused.exported))
    return Group(*shown, Line(f"written: {fused.path}"))


def _of_dtype(fused: Fused) -> str:
    """Say what the smaller dtype costs."""
    said = f"cast to {fused.dtype}"
    if fused.noise is None:
        return f"{said}; no input is known, or it does not run in it here, so what that costs is not measured"
    found, ratio = fused.noise, fused.noise.ratio
    times = "" if ratio is None else f": {ratio:.2f} times what {fused.dtype} alone costs"
    return (
        f"{said}: relative L2 {found.noise:.1e} from the network in float64; the network before it was folded, cast "
        f"alike, {found.rounding:.1e}{times}"
    )


def _alone(fused: Fused) -> int:
    """How many of the sub-graphs are one conv with its norms."""
    return sum(not one.has_branches for one in fused.branches)


def _of_branches(fused: Fused) -> list[str]:
    """Name sub-graphs, and sums that were not folded; the first few of each."""
    made = [f"  {one}" for one in fused.branches if one.has_branches]
    kept = [f"  not folded: {where}: {why}" for where, why in fused.refused.items()]
    return [*_first(made, "more like these"), *_first(kept, "more sums are not folded")]


def _first(lines: list[str], rest: str) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[: _SHOWN - 1], f"  and {len(lines) - _SHOWN + 1} {rest}"]


def fused_data(fused: Fused) -> dict[str, Any]:
    params = {"before": fused.params[0], "after": fused.params[1]}
    exported = {} if fused.exported is None else {"exported": fused.exported.to_dict()}
    plain = asdict(replace(fused, exported=None))
    del plain["exported"]
    return {**plain, "path": str(fused.path), "params": params, **exported}

"""What the command `verify` does: load two models, or programs, and compare them."""

from __future__ import annotations

from typing import Any, Literal

from surgeon.analysis import example as examples
from surgeon.app.commands import opened
from surgeon.app.given import Given
from surgeon.models.progress import Progress, parts, silent
from surgeon.proof.report import Report
from surgeon.surgery import compare


def verify(
    name_a: str,
    name_b: str,
    given: Given,
    progress: Progress = silent,
    *,
    mode: Literal["eval", "train"] = "eval",
    gradients: bool = False,
) -> Report:
    """Load two models and compare them."""
    progress(f"loading {name_a}", 0)
    a = opened(name_a, given)
    progress(f"loading {name_b}", 0.1)
    b = opened(name_b, given)
    inputs = [examples.read(text, a, seed=given.seed) for text in given.inputs]
    how: dict[str, Any] = {"mode": mode, "gradients": gradients}
    return compare.verify(a, b, inputs or None, seed=given.seed, progress=parts(progress, 0.2, 1), **how)

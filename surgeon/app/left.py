"""What `fuse` says of what it left as it is."""

from __future__ import annotations

from collections import Counter

from torch import nn

from surgeon.blocks import Deployable, Foldable
from surgeon.display import words
from surgeon.surgery.further import Further


def nothing_to_fold(further: Further) -> str:
    """Say that there was nothing to fold, of what was asked for."""
    parts = [word for word, is_asked in (("branches", further.branches), ("norm", further.norms)) if is_asked]
    what = " or ".join(["block", *parts])
    hint = "" if further else "; --branches and --norms fold what is not a block of surgeon's"
    return f"the model has no {what} that can be folded; it is written unchanged{hint}"


def what_stays(model: nn.Module, *, keep_norms: bool) -> str | None:
    """Say which blocks were not folded, and why."""
    if cheaper := sorted({m.name for m in model.modules() if isinstance(m, Foldable)}):
        stays = f"{', '.join(cheaper)} is not folded, because it costs less than the conv it folds to"
        return f"{stays}; --dense folds it too"
    whole = Counter(m.name for m in model.modules() if isinstance(m, Deployable))
    if keep_norms and whole:
        return f"{', '.join(sorted(whole))} is left as it is: no conv and norm compute the same"
    if whole:
        blocks = " and ".join(words.counted(count, f"{name} block") for name, count in whole.items())
        return f"{blocks} of convs with groups not folded; the norms behind are folded in"
    return None

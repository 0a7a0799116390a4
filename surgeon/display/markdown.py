"""A report of `verify` as GitHub-flavoured Markdown: verdict, checks, the first site that diverges, distances, data.

Names and sentences may hold text of files and users. Each of its characters that Markdown or HTML could take for markup
is written as a character reference, so it is shown as it is and mentions nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from surgeon.display.agreement import agreement_lines
from surgeon.errors import printable

if TYPE_CHECKING:
    from surgeon.proof.report import Report

_SAID = {
    "equivalent": "✅ equivalent: B computes what A computes",
    "different": "❌ different: B does not compute what A computes",
    "approximate": "⚠️ approximate by design: these distances do not prove that B equals A",
}
_PLAIN = frozenset(" .,:;-/+=%()?'\"×→·‖≤≥±√²…−")
_MOST_ROWS = 12


def markdown(report: Report, a: str, b: str) -> str:
    """Write a report about two models with these names."""
    blocks = [f"### surgeon verify: {_SAID[report.verdict]}", f"A is {code(a)}, B is {code(b)}, in {report.dtype}."]
    if report.first_to_diverge is not None:
        blocks.append(f"**First to diverge:** {code(report.first_to_diverge)}")
    blocks.append(_checks(report))
    if rows := list(_sites(report)):
        shown = _table(("site that diverges", "A", "B", "isolated", "propagated", "stored, ulp"), rows[:_MOST_ROWS])
        more = [f"{len(rows) - _MOST_ROWS} more sites diverge."] if len(rows) > _MOST_ROWS else []
        blocks += [shown, *more]
    if report.distances:
        blocks.append(_distances(report))
    if report.data is not None:
        blocks.append("\n".join(f"- {text(line)}" for line in agreement_lines(report.data)))
        blocks += [_worst(report)] if report.data.worst else []
    if remarks := (*report.why(), *report.remarks):
        blocks.append("\n".join(f"- {text(remark)}" for remark in remarks))
    return "\n\n".join(blocks) + "\n"


def text(said: str) -> str:
    """Write a sentence so that nothing in it is markup.

    >>> text("a|b *c* <d> @me")
    'a&#124;b &#42;c&#42; &#60;d&#62; &#64;<!-- -->me'
    """
    letters = (one if one.isalnum() or one in _PLAIN else f"&#{ord(one)};" for one in printable(said))
    return "".join(letters).replace("&#64;", "&#64;<!-- -->")


def code(name: str) -> str:
    """Write a name in code, so that nothing in it is markup.

    >>> code("layer`1`|x")
    '<code>layer&#96;1&#96;&#124;x</code>'
    """
    return f"<code>{text(name)}</code>"


def _checks(report: Report) -> str:
    rows = []
    for check in report.checks:
        passed = "ok" if check.passed else "**FAIL**"
        rows.append((text(check.name), _number(check.measured), _number(check.limit), passed, text(check.says)))
    return _table(("check", "found", "at most", "", "what it says"), rows)


def _sites(report: Report) -> Iterator[tuple[str, ...]]:
    for site in report.sites:
        if site.diverges:
            distances = map(_number, (site.isolated, site.propagated, site.ulps))
            yield code(site.path), code(site.kind_a), code(site.kind_b), *distances


def _distances(report: Report) -> str:
    titles = ("input", "float64", report.dtype, "max abs", "SQNR dB", "cosine", "top-1 same")
    rows = []
    for row in report.distances:
        top1 = "" if row.top1 is None else f"{row.top1:.1%}"
        numbers = (_number(row.float64), _number(row.own), _number(row.max_abs), _number(row.sqnr_db))
        rows.append((text(row.input), *numbers, f"{row.cosine:.9f}", top1))
    return _table(titles, rows)


def _worst(report: Report) -> str:
    assert report.data is not None
    rows = []
    for one in report.data.worst:
        classes = ["" if value is None else str(value) for value in (one.a, one.b, one.label)]
        rows.append((code(one.name), _number(one.kl), str(one.differing), *classes))
    return _table(("differs most", "KL", f"{report.data.of} that differ", "A", "B", "label"), rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if math.isfinite(value) else "∞" if value > 0 else "NaN" if math.isnan(value) else "−∞"

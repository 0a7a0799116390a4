"""A report of `verify` as JUnit XML, which continuous integration shows as tests.

One test case for each check, one for each site that diverges, and one for the verdict if nothing else fails although it
is not `equivalent`. Text of files and users is shown as it is: what XML does not have is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

from surgeon.errors import printable

if TYPE_CHECKING:
    from surgeon.proof.report import Report

_CLASS = "surgeon.verify"


def junit(report: Report, a: str, b: str, seconds: float) -> str:
    """Write a report about two models with these names; `seconds` is how long comparing them took."""
    cases = list(_unique(_cases(report)))
    failed = sum(1 for case in cases if case.find("failure") is not None)
    counts = {"tests": str(len(cases)), "failures": str(failed), "errors": "0", "time": f"{seconds:.3f}"}
    root = Xml.Element("testsuites", {"name": "surgeon verify", **counts})
    suite = Xml.SubElement(root, "testsuite", {"name": _text(f"{a} against {b}"), "skipped": "0", **counts})
    properties = Xml.SubElement(suite, "properties")
    for name, value in (("A", a), ("B", b), ("verdict", report.verdict), ("dtype", report.dtype)):
        Xml.SubElement(properties, "property", {"name": name, "value": _text(value)})
    suite.extend(cases)
    Xml.SubElement(suite, "system-out").text = _text("\n".join((*report.why(), *report.remarks)))
    Xml.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(root, encoding="unicode") + "\n"


def _cases(report: Report) -> Iterator[Xml.Element]:
    for check in report.checks:
        why = None if check.passed else f"found {check.measured:.6g}, at most {check.limit:.6g}"
        yield _case("check", check.name, why, check.says)
    for site in report.sites:
        if site.diverges:
            far = [f"{name} {value:.3g}" for name, value in _distances(site.isolated, site.propagated, site.ulps)]
            why = f"{site.path} diverges"
            yield _case("site", site.path, why, f"{why} ({site.kind_a} against {site.kind_b}): {', '.join(far)}")
    if report.verdict == "different" and not any(not check.passed for check in report.checks):
        yield _case("verdict", "verdict", "B does not compute what A computes", "\n".join(report.remarks))


def _distances(isolated: float | None, propagated: float | None, ulps: float | None) -> Iterator[tuple[str, float]]:
    for name, value in (("isolated", isolated), ("propagated", propagated), ("stored tensors, ulp", ulps)):
        if value is not None:
            yield name, value


def _case(kind: str, name: str, why: str | None, says: str) -> Xml.Element:
    case = Xml.Element("testcase", {"classname": f"{_CLASS}.{kind}", "name": _text(name), "time": "0"})
    if why is None:
        Xml.SubElement(case, "system-out").text = _text(says)
    else:
        Xml.SubElement(case, "failure", {"message": _text(why), "type": kind}).text = _text(says)
    return case


def _unique(cases: Iterator[Xml.Element]) -> Iterator[Xml.Element]:
    """Number test cases of one name: a question is asked of every input."""
    seen: Counter[tuple[str, str]] = Counter()
    for case in cases:
        key = (case.attrib["classname"], case.attrib["name"])
        seen[key] += 1
        if seen[key] > 1:
            case.set("name", f"{key[1]} ({seen[key]})")
        yield case


def _text(said: str) -> str:
    """Escape controls, half characters and what is no character, which XML has not."""
    return printable(said, keep="\n")

"""What `verify` writes for machines: JSON by a published schema, JUnit XML, and Markdown that shows names as such."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import jsonschema
import numpy as np
import pytest
import torch
from helpers import run_surgeon, shake_
from torch import nn

import surgeon
from surgeon.app.terminal import _finite
from surgeon.display.junit import junit
from surgeon.display.markdown import markdown
from surgeon.proof.report import Bisected, Check, Guess, Report, SiteDistance
from surgeon.proof.schema import json_schema


def _net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 7))
    return shake_(nn.Sequential(*layers).eval(), gently=True)


def _wrong() -> nn.Module:
    net = _net()
    with torch.no_grad():
        net[3].weight[0, 0, 0, 0] += 0.1
    return net


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    surgeon.save(_net(), "net.pt")
    surgeon.save(_wrong(), "wrong.pt")
    photos = np.random.default_rng(0).integers(0, 255, (30, 3, 8, 8), dtype=np.uint8)
    np.savez("photos.npz", images=photos, labels=np.arange(30) % 7)
    return tmp_path


def _closed(schema: Any) -> Any:
    """Forbid fields that the schema does not name."""
    if isinstance(schema, dict):
        found = {key: _closed(value) for key, value in schema.items()}
        return found | ({"additionalProperties": False} if "properties" in found else {})
    return [_closed(one) for one in schema] if isinstance(schema, list) else schema


def _validate(data: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.Draft202012Validator(_closed(json_schema())).validate(data)


def test_reports_of_every_kind_are_what_the_schema_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_surgeon("convert", "net.pt", "-r", "acnet", "-i", "1,3,8,8") == 0
    assert run_surgeon("convert", "net.pt", "-r", "hetconv-p4", "-i", "1,3,8,8", "-o", "het.pt", "--set", _P2) == 0
    given = ("--json", "-i", "1,3,8,8")
    for code, b, more in (
        (0, "net.acnet.pt", ()),
        (1, "wrong.pt", ()),
        (3, "het.pt", ()),
        (1, "wrong.pt", ("--data", "photos.npz", "--labels", "own", "--preprocess", "none")),
    ):
        capsys.readouterr()
        assert run_surgeon("verify", "net.pt", b, *given, *more) == code
        said = json.loads(capsys.readouterr().out)
        _validate(said)
        assert said["schema"] == "verify-1"
        assert (said["data"] is not None) is bool(more)


_P2 = "rules[0].with.p=2"


def test_numbers_that_json_does_not_have_are_within_the_schema() -> None:
    odd = Check("storage", math.inf, math.nan, False, "it is infinite")
    _validate(json.loads(json.dumps(_finite(replace(_report(), checks=(odd,)).to_dict()))))
    with pytest.raises(jsonschema.ValidationError):
        _validate(json.loads(json.dumps(replace(_report(), verdict="maybe").to_dict())))  # type: ignore[arg-type]


def test_the_schema_is_printed_without_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_surgeon("verify", "--schema") == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


_EVIL = "a|b`<b>*x*</b>`@me [l](u)\x1b[2J]]>"


def _report() -> Report:
    site = SiteDistance(_EVIL, "Conv2d", "Conv2d", 0.1, None, math.inf, diverges=True)
    fine = replace(site, path="fine", diverges=False)
    checks = (
        Check("rounding", 1.0, 2.0, True, "fine"),
        Check("rounding", 3.0, 2.0, False, f"beyond {_EVIL}"),
    )
    return Report("different", "float32", checks, (), (fine, site), remarks=(_EVIL, "\ud800\uffff"))


def test_junit_has_a_case_for_every_check_and_every_site_that_diverges() -> None:
    root = Xml.fromstring(junit(_report(), _EVIL, "b.pt", 1.25).encode("utf-8", "backslashreplace"))
    (suite,) = root
    assert root.tag == "testsuites"
    for one in (root, suite):
        assert [one.attrib[key] for key in ("tests", "failures", "errors", "time")] == ["3", "2", "0", "1.250"]
    assert [case.attrib["name"] for case in suite.iter("testcase")][:2] == ["rounding", "rounding (2)"]
    failed = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert [case.attrib["classname"] for case in failed] == ["surgeon.verify.check", "surgeon.verify.site"]
    assert failed[0].find("failure").attrib["message"] == "found 3, at most 2"
    assert failed[1].attrib["name"] == _EVIL.replace("\x1b", "\\x1b")
    assert {one.tag for one in suite} == {"properties", "testcase", "system-out"}


def test_guesses_and_the_smallest_set_are_told_in_every_report() -> None:
    guess = Guess("conv", "bias lost", f"the bias of {_EVIL} is zero", 0.0)
    report = replace(_report(), guesses=(guess,), bisected=Bisected(("conv",), 2, "with conv put right, all is right"))
    (suite,) = Xml.fromstring(junit(report, "a", "b", 0.0).encode("utf-8", "backslashreplace"))
    for said in (suite.findtext("system-out") or "", markdown(report, "a", "b")):
        assert "probably, at conv (bias lost): the bias of a" in said
        assert "bisected: with conv put right, all is right" in said
    assert "<b>" not in markdown(report, "a", "b")


def test_junit_fails_where_only_the_verdict_does() -> None:
    assert Xml.fromstring(junit(Report("different", "float32", (), (), ()), "a", "b", 0.0)).attrib["failures"] == "1"
    assert Xml.fromstring(junit(Report("approximate", "float32", (), (), ()), "a", "b", 0.0)).attrib["failures"] == "0"


def test_names_in_markdown_are_no_markup() -> None:
    made = markdown(_report(), _EVIL, "b.pt")
    assert "### surgeon verify: ❌ different" in made
    shown = "<code>a&#124;b&#96;&#60;b&#62;&#42;x&#42;&#60;/b&#62;&#96;&#64;<!-- -->me"
    assert f"**First to diverge:** {shown}" in made
    for one in ("<b>", "*x*", "`", "\x1b", "@me", "[l]"):
        assert one not in made
    for line in made.splitlines():
        if line.startswith("| "):
            assert line.count("|") in (6, 7)  # of checks, and of sites: no name breaks a row


def test_files_are_written_beside_what_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("verify", "net.pt", "wrong.pt", "-i", "1,3,8,8")
    capsys.readouterr()
    assert run_surgeon(*given, "--junit", "ci.xml", "--markdown", "ci.md", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    failed = [one for one in said["checks"] if not one["passed"]]
    sites = [one for one in said["sites"] if one["diverges"]]
    assert int(Xml.parse("ci.xml").getroot().attrib["failures"]) == len(failed) + len(sites)
    assert (here / "ci.md").read_text().startswith("### surgeon verify: ❌")
    assert run_surgeon(*given, "--markdown", "-") == 1
    assert capsys.readouterr().out == (here / "ci.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--junit", "wrong.pt"), "is among the files that this is made from"),
        (("--junit", "ci.txt"), "End it in .xml"),
        (("--markdown", "ci.html"), "End it in .md"),
        (("--junit", "there.xml"), "there.xml exists"),
        (("--junit", "no/ci.xml"), "there is no folder no"),
        (("--markdown", "-", "--json"), "both print"),
        (("--labels", "own"), "--data SOURCE"),
        (("--data", "nowhere/"), "nowhere"),
        (("--data", "photos.npz:labels"), "not images"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    options: tuple[str, ...], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "there.xml").write_text("mine")
    before = sorted(here.iterdir())
    assert run_surgeon("verify", "net.pt", "wrong.pt", "-i", "1,3,8,8", *options) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert sorted(here.iterdir()) == before
    assert (here / "there.xml").read_text() == "mine"


def test_an_old_report_is_overwritten_on_request(here: Path) -> None:
    (here / "ci.xml").write_text("old")
    assert run_surgeon("verify", "net.pt", "net.pt", "-i", "1,3,8,8", "--junit", "ci.xml", "--force") == 0
    assert (here / "ci.xml").read_text().startswith("<?xml")

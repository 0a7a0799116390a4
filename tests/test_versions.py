"""The oldest versions that are allowed are those that `make test-oldest` runs the tests with."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_is_tried_is_the_oldest_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = (extras[name] for name in ("test", "onnx", "plots", "browser"))
    allowed = [*project["dependencies"], *itertools.chain(*named)]
    bounds = {name: tuple(map(int, version.split("."))) for name, version in _pairs(allowed, ">=")}
    tried = {name: tuple(map(int, version.split("."))) for name, version in _pairs(_lines(), "==")}
    assert tried.pop("torchvision")  # the one that was built for that torch
    assert {name: version[: len(bounds[name])] for name, version in tried.items()} == bounds
    assert not any(any(version[len(bounds[name]) :]) for name, version in tried.items())  # 2.10 is 2.10.0


def _lines() -> list[str]:
    return (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()


def _pairs(lines: list[str], sign: str) -> list[tuple[str, str]]:
    found = (re.fullmatch(rf"([\w-]+){sign}([\d.]+)", line) for line in lines)
    return [(match[1], match[2]) for match in found if match]

"""benchmarks/fit.py: what stands in docs/fit.md is what was measured, rows are kept, and what is compared is fair."""

from __future__ import annotations

import argparse
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fit
import fit_control
import fit_networks
import fit_page
import fit_plots
import fit_record
import fit_ways
import pytest
import torch
import train_demo

import surgeon

PAGE = fit_page.PAGE.read_text(encoding="utf-8")
EMPTY = f"{fit_page.BEGIN}\n{fit_page.END}"


def test_the_page_shows_what_was_measured() -> None:
    assert fit_page.with_results(PAGE, fit_record.read()) == PAGE, "run benchmarks/fit.py --write-docs-only"
    for name, text in fit_page.pictures(fit_record.read()).items():
        assert (fit_page.PICTURES / name).read_text(encoding="utf-8") == text, name


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no lines"):
        fit_page.with_results("# A page", {"networks": {}, "rows": {}})


# The page, of made-up results


def _stage(accuracy: float, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "agreement": accuracy + 0.01, "distance": 1 - accuracy, **more}


def _row(fitted: float, distilled: float, macs: float = 0.7, **more: Any) -> dict[str, Any]:
    stages = {"fit": _stage(fitted, seconds=8.2), "distil": _stage(distilled, seconds=20.0)}
    where = {"device": "a machine", "threads": 2, "torch": "2.14", "surgeon": "1"}
    return {"convs": 6, "of": 9, "macs": macs, "stages": stages, "where": where, **more}


def _results() -> dict[str, Any]:
    sites = _row(0.86, 0.9, 0.38)
    control = _stage(0.85, seconds=20.0, rate=0.004, images=12800)
    sites["stages"] |= {"project": _stage(0.1), "norms": _stage(0.35), "labels": control}
    ways = [_row(0.9, 0.91, 0.71, words="P = 2 at 3 of 6 sites"), _row(0.89, 0, 0.7, words="P = 4 at 2 of 6 sites")]
    del ways[1]["stages"]["distil"]
    network = {"words": "a ResNet", "pixels": 28, "macs": 18_700_000, "params": 80_000, "accuracy": 0.925}
    return {
        "networks": {"demo": network},
        "rows": {
            "sites/demo/hetconv/4": sites,
            "budget/demo/hetconv/0.7": _row(0.91, 0.91, 0.699, plan_seconds=30.4, chosen={"P = 2": 4, "P = 4": 2}),
            "uniform/demo/hetconv/0.7": {"ways": ways},
            "budget/demo/octave/0.6": {"refused": "out of\nreach | here", "where": sites["where"]},
        },
    }


def test_a_row_of_the_page_says_what_was_measured() -> None:
    text = fit_page.with_results(EMPTY, _results())
    assert "| demo | a ResNet | 28 | 0.08 M | 18.7 M | 92.50% |" in text
    assert "| HetConv P = 4 | 6 of 9 | ×0.38 | 10.0 | 35.0 | 85.0 | 86.0 | 90.0 |" in text
    fitted, distilled, control = "87.0%, 0.14, 8 s", "91.0%, 0.10, 20 s", "86.0%, 0.15, 20 s, 12,800, 0.004"
    assert f"| HetConv P = 4 | 11.0%, 0.90 | {fitted} | {distilled} | {control} |" in text
    assert "Measured on a machine (2 threads), torch 2.14." in text


def test_a_budget_stands_above_the_best_uniform_way_of_its_cost() -> None:
    text = fit_page.with_results(EMPTY, _results())
    chosen, uniform = (
        "| HetConv ×0.7 | 4 × P = 2, 2 × P = 4, 3 stay | ×0.699 |",
        "|  | uniform: P = 2 at 3 of 6 sites | ×0.710 |",
    )
    first = f"{chosen} 91.00 | 92.0%, 0.090 | 91.00 | 92.0%, 0.090 | 30 / 8 / 20 |"
    second = f"{uniform} 90.00 | 91.0%, 0.100 | 91.00 | 92.0%, 0.090 | 8 / 20 |"
    assert f"{first}\n{second}\n" in text
    assert "P = 4 at 2 of 6" not in text
    assert "After fitting the budget is better than the best uniform way at 1 of 1 points." in text
    assert "distilling the budget is better than the best uniform way at 0 of 1 points, and as good at 1." in text
    assert "| Octave ×0.6 | out of reach / here |" in text


def test_a_lost_comparison_is_counted_as_one() -> None:
    results = _results()
    results["rows"]["uniform/demo/hetconv/0.7"]["ways"][1]["stages"]["fit"]["accuracy"] = 0.92
    assert "at 0 of 1 points.\n" in fit_page.with_results(EMPTY, results)


def test_a_picture_has_a_point_for_every_number_and_fewer_errors_stand_lower() -> None:
    lines = (
        fit_plots.Line("one", "#111111", [(0.4, 0.3), (0.7, 0.1)]),
        fit_plots.Line("other", "#222222", [(0.4, 0.2)], "diamond", dashed=True),
        fit_plots.Line("not measured", "#333333", []),
    )
    text = fit_plots.picture([fit_plots.Panel("a < b", 0.08, lines), fit_plots.Panel("empty", 0.1, ())], 3, "t")
    drawn = ElementTree.fromstring(text)
    circles = list(drawn.iter("{http://www.w3.org/2000/svg}circle"))
    left, right = sorted(circles[:2], key=lambda mark: float(mark.attrib["cx"]))
    assert len(circles) == 3  # one in the legend
    assert float(left.attrib["cy"]) < float(right.attrib["cy"])
    words = [one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "one", "other", "the original"} <= {*words}
    assert not {"not measured", "empty"} & {*words}


def test_every_picture_of_the_page_is_drawn() -> None:
    drawn = fit_page.pictures(_results())
    text = fit_page.with_results(EMPTY, _results())
    assert {*re.findall(r"images/([\w-]+\.svg)", text)} == {*drawn}
    for one in drawn.values():
        assert "demo, HetConv" in one


# What is kept


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(fit_record, "RESULTS", tmp_path / "fit.json")
    return tmp_path / "fit.json"


def test_rows_that_are_added_at_once_are_all_kept(records: Path) -> None:
    def add(number: int) -> None:
        for i in range(10):
            fit_record.add("rows", f"{number}/{i}", {"i": i})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(fit_record.read()["rows"]) == 40


def test_what_another_machine_measured_is_added(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_page, "write", lambda results: None)
    fit_record.add("rows", "sites/demo/hetconv/2", {"here": 1})
    other = tmp_path / "other.json"
    other.write_text('{"networks": {"demo": {}}, "rows": {"sites/demo/hetconv/4": {"there": 1}}}', encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["fit.py", "--merge", str(other)])
    fit.main()
    assert [*fit_record.read()["rows"]] == ["sites/demo/hetconv/2", "sites/demo/hetconv/4"]
    assert [*fit_record.read()["networks"]] == ["demo"]


def _options(*words: str) -> argparse.Namespace:
    return fit.parse(["--only", "demo", "--tables", "sites", "--blocks", "hetconv", *words])


def test_a_row_is_measured_once_and_kept_when_the_next_one_fails(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def row(self: fit.Run, task: fit.Task) -> dict[str, Any]:
        asked.append(task.value)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return _results()["rows"]["sites/demo/hetconv/4"] | {"took": 1}

    monkeypatch.setattr(fit.Run, "row", row)
    monkeypatch.setattr(fit, "original", lambda case: {"accuracy": 0.9})
    with pytest.raises(KeyboardInterrupt):
        fit.measure(_options())
    assert [*fit_record.read()["rows"]] == ["sites/demo/hetconv/2"]
    fit.measure(_options())
    assert asked == [2, 4, 4, 8]
    fit.measure(_options())
    assert asked == [2, 4, 4, 8]
    fit.measure(_options("--again", "--seconds", "0"))
    assert asked == [2, 4, 4, 8]


def test_the_deep_network_has_budgets_only() -> None:
    found = [*fit.tasks(fit.parse([]))]
    assert len(found) == 3 * 2 * 3 + 2 * 4 * 2 * 3
    assert {task.table for task in found if task.kind == "deep"} == {"budget", "uniform"}


# What is compared


@pytest.fixture(scope="module")
def case() -> fit_networks.Case:
    """The demo's network, and images of noise in place of Fashion-MNIST."""
    made = fit_networks.Case(fit_networks.KINDS["demo"], torch.device("cpu"), calibrated_on=64)
    generator = torch.Generator().manual_seed(0)
    for name in ("train", "test"):
        pixels = torch.randint(0, 256, (160, 28, 28), dtype=torch.uint8, generator=generator)
        made.__dict__[name] = train_demo.Split(pixels, torch.arange(160, dtype=torch.uint8) % 10)
    return made


def test_a_uniform_way_never_costs_less_than_what_it_is_compared_with(case: fit_networks.Case) -> None:
    for block in fit_ways.VALUES:
        ways = [*fit_ways.uniform(block, case, 0.7)]
        assert ways
        for _, plan in ways:
            assert 0.7 <= fit_ways.share(plan) <= 0.7 + fit_ways.AT_MOST
            assert len({(entry.swap, entry.options.get("p")) for entry in plan.swaps}) == 1


def test_what_costs_much_more_is_not_compared(case: fit_networks.Case) -> None:
    least = fit_ways.share(fit_ways.every_site("hetconv", 2, case))
    words = [words for words, _ in fit_ways.uniform("hetconv", case, least - 2 * fit_ways.AT_MOST)]
    assert words
    assert not any(word.startswith("P = 2") for word in words)


def test_the_control_has_the_better_of_its_rates_and_the_time_it_is_given(
    case: fit_networks.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    projected = surgeon.convert(case.model, fit_ways.every_site("hetconv", 4, case), case.example)
    before = {name: tensor.clone() for name, tensor in projected.state_dict().items()}
    seen = {0.1: 3, 0.2: 5}
    monkeypatch.setattr(fit_control, "RATES", tuple(seen))
    monkeypatch.setattr(fit_control, "train_", lambda model, case, seconds, rate: seen[rate])
    worths = iter([fit_networks.Worth(0.7, 0.6, 0.1), fit_networks.Worth(0.6, 0.9, 0.0)])
    monkeypatch.setattr(fit_networks.Case, "worth", lambda self, model: next(worths))
    found = fit_control.trained(projected, case, 2.5)
    assert found == {"accuracy": 0.7, "agreement": 0.6, "distance": 0.1, "rate": 0.1, "images": 3, "seconds": 2.5}
    assert all(torch.equal(before[name], tensor) for name, tensor in projected.state_dict().items())


def test_training_stops_when_the_time_is_up_and_has_changed_the_network(case: fit_networks.Case) -> None:
    model = surgeon.convert(case.model, fit_ways.every_site("hetconv", 4, case), case.example)
    weight = next(parameter for parameter in model.parameters() if parameter.ndim == 4)
    before = weight.detach().clone()
    assert fit_control.train_(model, case, 0.5, 1e-3) > 0
    assert not torch.equal(before, weight)
    assert fit_control.train_(model, case, 1e-9, 1e-3) == 0


def test_the_original_is_worth_all_of_itself(case: fit_networks.Case) -> None:
    worth = case.worth(case.model)
    assert (worth.agreement, worth.distance) == (1, 0)
    other = case.worth(surgeon.convert(case.model, fit_ways.every_site("hetconv", 8, case), case.example))
    assert other.agreement < 1
    assert other.distance > 0.1


def test_a_row_is_measured(case: fit_networks.Case, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "trained", lambda projected, case, seconds: {**case.worth(projected).to_dict()})
    run = fit.Run(case, steps=2)
    found = run.row(fit.Task("sites", "demo", "hetconv", 4))
    assert [*found["stages"]] == ["fit", "project", "norms", "distil", "labels"]
    assert found["stages"]["fit"]["distance"] < found["stages"]["project"]["distance"]
    assert found["stages"]["distil"] != found["stages"]["fit"]
    assert found["macs"] == pytest.approx(0.383, abs=0.001)


def test_a_budget_and_its_uniform_ways_are_measured(case: fit_networks.Case, records: Path) -> None:
    run = fit.Run(case, steps=2)
    budget = run.row(fit.Task("budget", "demo", "hetconv", 0.7))
    assert budget["macs"] <= 0.7
    assert sum(budget["chosen"].values()) == budget["convs"]
    fit_record.add("rows", "budget/demo/hetconv/0.7", budget)
    ways = run.row(fit.Task("uniform", "demo", "hetconv", 0.7))["ways"]
    assert all(way["macs"] >= budget["macs"] for way in ways)
    assert sum("distil" in way["stages"] for way in ways) == 1

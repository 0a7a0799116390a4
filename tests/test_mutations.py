"""A slice of the faults and right folds that `verify` is tried with, and the instrument itself: its oracle can see."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import jobs
import mutation_page
import mutations
import pytest
import torch
from mutation_faults import FAULTS
from mutation_folds import FOREIGN, OWN, Maker
from mutation_oracle import Oracle

import surgeon


def _line(key: str) -> jobs.Line:
    return next(mutations.examine([key]))


def test_there_are_enough_kinds_networks_and_folds() -> None:
    found = [key for _, group in mutations.keys(seeds=1) for key in group]
    assert len(found) == len(set(found))
    assert len([kind for kind in FAULTS.values() if not kind.is_right]) >= 40
    assert len(mutations.SUBJECTS) >= 5
    assert sum(key.startswith("fold|") for key in found) >= 3000


def test_a_slice_of_it_takes_the_same_cases_every_time() -> None:
    options = argparse.Namespace(seeds=1, kinds=["*"], only=["*"], slice=300)
    chosen = [key for batch in mutations.batches(options) for key in batch.keys]
    assert chosen == [key for batch in mutations.batches(options) for key in batch.keys]
    assert 60 < len(chosen) < 200


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("subject", "fault"),
    [
        ("resnet", "two output channels swapped"),
        ("vgg", "gamma without sigma"),
        ("mobile", "kernels mirrored"),
        ("odd", "mean with the wrong sign"),
        ("unet", "a filter negated"),
        ("vgg hetconv", "one tap zero"),
    ],
)
def test_a_fault_of_a_fold_is_found_and_named(subject: str, fault: str, dtype: str) -> None:
    line = _line(f"fault|{subject}|{dtype}|lineage|{fault}|0")
    assert line["is_due"]
    assert line["verdict"] == "different"
    assert line["is_named"], line


@pytest.mark.parametrize(
    "key",
    [
        "fold|resnet|float32|plain|16|fuse acblock|0",
        "fold|mobile|float16|trained|16|fuse split|0",
        "fold|vgg|bfloat16|huge and tiny gamma|16|fuse scratch|1",
        "fold|dense|float32|zero gamma|16|fuse border|0",
        "fold|unet|float64|tiny variance|16|fuse octave|0",
        "fold|vgg|float32|huge bias|16|fuse hetconv to dense|0",
        "fold|softmax|float32|plain|16|torch fuse_conv_bn_eval in float32|0",
        "fold|theirs|bfloat16|plain|16|timm repvgg in float32|0",
        "fold|theirs|float32|plain|16|demo's network, fuse acblock|0",
    ],
)
def test_a_right_fold_is_not_condemned(key: str) -> None:
    line = _line(key)
    assert line["verdict"] == "equivalent", line
    assert not line["is_condemned"]


def test_a_case_is_the_same_whenever_it_is_done() -> None:
    key = "fault|pair|float32|none|one tap off by 10 %|0"
    first, second = _line(key), _line(key)
    assert first | {"seconds": 0} == second | {"seconds": 0}


@pytest.fixture(scope="module")
def right() -> torch.nn.Module:
    return surgeon.fuse(Maker("resnet", torch.float32, "plain", 16, 1).converted("acblock"), (2, 3, 16, 16))


def test_the_oracle_finds_nothing_in_a_copy(right: torch.nn.Module) -> None:
    moved = Oracle(right, 16, 0).moved(copy.deepcopy(right))
    assert (moved.output, moved.site, moved.wild, moved.units) == (0, 0, 0, 0)
    assert not moved.is_due(has_lineage=True)


def test_the_oracle_finds_a_tap_and_its_layer(right: torch.nn.Module) -> None:
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong.get_submodule("stages.1.two.0").weight[0, 0, 1, 1] += 1e-5
    moved = Oracle(right, 16, 0).moved(wrong)
    assert moved.path == "stages.1.two.0"
    assert moved.is_due(has_lineage=True)
    assert not moved.is_due(has_lineage=False)  # nobody could tell it from rounding


def test_the_oracle_finds_what_shows_on_large_inputs_only(right: torch.nn.Module) -> None:
    wrong = copy.deepcopy(right)
    wrong.set_submodule("stem.2", torch.nn.Hardtanh(0, 100))
    moved = Oracle(right, 16, 0).moved(wrong)
    assert moved.output == 0
    assert moved.wild > 1e-3
    assert moved.is_due(has_lineage=True)


def test_all_weights_one_unit_up_is_more_than_rounding(right: torch.nn.Module) -> None:
    wrong = copy.deepcopy(right)
    for parameter in wrong.parameters():
        parameter.data = torch.nextafter(parameter.data, torch.full_like(parameter.data, torch.inf))
    assert Oracle(right, 16, 0).moved(wrong).is_due(has_lineage=True)


def test_a_layer_is_named_by_itself_or_by_what_it_lies_in() -> None:
    found = {"first": None, "diverging": ["a.b"], "says": ["at c.d: it differs."]}
    assert mutations.is_named("a.b", found)
    assert mutations.is_named("a.b.square_conv", found)
    assert mutations.is_named("c.d", found)
    assert not mutations.is_named("a.bc", found)
    assert not mutations.is_named("c", found)
    assert mutations.is_named(None, found) is None


@pytest.mark.parametrize("name", [*OWN, *FOREIGN])
def test_every_kind_of_fold_can_be_made(name: str) -> None:
    maker = Maker("vgg", torch.float32, "plain", 16, 0)
    a, b = {**OWN, **FOREIGN}[name](maker)
    x = torch.randn(2, 1 if name.startswith("demo") else 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(a.double()(x.double()), b.double()(x.double()), rtol=1e-3, atol=1e-5)


def test_what_is_recorded_is_not_done_again_and_the_dead_are_recorded(tmp_path: Path) -> None:
    def work(keys: tuple[str, ...]) -> jobs.Iterator[jobs.Line]:
        for key in keys:
            if key == "dies":
                raise SystemExit(3)
            if key == "hangs":
                jobs.time.sleep(60)
            yield {"key": key, "found": True}

    out = tmp_path / "some.jsonl"
    out.write_text('{"key": "a", "found": false}\n')
    jobs.carry_out([jobs.Batch(("a", "dies", "b", "hangs", "c"), work)], out, jobs=2, timeout=1, show=False)
    lines = {line["key"]: line for line in jobs.recorded(out)}
    assert lines["a"] == {"key": "a", "found": False}
    assert lines["b"]["found"] is lines["c"]["found"] is True
    assert lines["dies"]["died"] == "the process ended with 1"
    assert lines["hangs"]["died"] == "not done after 1 s"


def test_the_table_counts_what_was_missed_and_what_was_condemned(tmp_path: Path) -> None:
    fault = {"is_right": False, "is_due": True, "is_missed": True, "is_named": False, "verdict": "equivalent"}
    lines = [
        {"key": "fault|n|float32|none|F|0", **fault},
        {"key": "fault|n|float32|none|F|1", **fault, "is_missed": False, "is_named": True, "verdict": "different"},
        {"key": "fold|n|float32|plain|16|R|0", "is_right": True, "is_condemned": True, "verdict": "different"},
        {"key": "fault|n|float32|none|G|0", "not_here": True},
        {"key": "fault|n|float32|none|H|0", "died": "the process ended with -9"},
    ]
    text = mutation_page.table(lines)
    assert "| F | 2 | 2 | 1 | 1 of 1 | 0 | 1 |" in text
    assert "| R | 1 | 0 | 0 | 1 | 0 | 0 |" in text
    assert "1 were missed" in text.replace("of which\n", "of which ")
    assert "died or hung: 1" in text
    page = tmp_path / "verify.md"
    page.write_text("before\n<!-- mutations -->\nold\n<!-- /mutations -->\nafter\n")
    jobs.write_between(page, "mutations", text)
    jobs.write_between(page, "mutations", text)
    assert page.read_text().count("died or hung") == 1
    assert page.read_text().endswith("after\n")
    with pytest.raises(SystemExit, match="has no lines <!-- other -->"):
        jobs.write_between(page, "other", text)
    assert json.dumps(lines)

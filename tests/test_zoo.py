"""A slice of the sweep over torchvision and timm, and the sweep itself: it survives what its networks do not."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
import zoo
import zoo_brings
import zoo_network
import zoo_page
from torch import Tensor, nn
from zoo_record import Brings, Case, Record

import surgeon
from surgeon.surgery.plan import Change


class Expected(NamedTuple):
    """How many convs acnet swaps, how many dense 3×3 convs there are and it swaps, and whether it is one island."""

    swapped: int | None
    dense: int
    dense_swapped: int | None
    is_whole: bool = True


NETS = {
    "torchvision:squeezenet1_1": Expected(9, 9, 9),
    "torchvision:shufflenet_v2_x0_5": Expected(20, 1, 1),
    "timm:test_byobnet": Expected(6, 6, 6),
    "timm:test_coatnet": Expected(4, 2, 2),
    "timm:test_convnext": Expected(None, 0, None),
    "timm:test_efficientnet": Expected(6, 4, 4),
    "timm:test_efficientnet_gn": Expected(6, 4, 4),
    "timm:test_mambaout": Expected(5, 5, 5),
    "timm:test_nfnet": Expected(0, 6, 0),  # its convs compute their weights
    "timm:test_resnet": Expected(10, 10, 10),
    "timm:test_vit": Expected(None, 0, None, is_whole=False),
    "timm:starnet_s050": Expected(5, 5, 5),
}
WITHOUT_OCTAVES = (
    *("timm:test_convnext", "timm:test_nfnet", "timm:test_vit"),
    *("timm:test_efficientnet_gn", "timm:test_mambaout"),  # norms that mix channels stand between their convs
)
OWN_CHECK_ONLY = ("torchvision:shufflenet_v2_x0_5",)  # the sweep verifies octaves in networks of up to 40 convs


@pytest.mark.parametrize("name", NETS)
def test_no_network_crashes_or_comes_out_wrong(name: str) -> None:
    record = zoo_network.examine(Case(name, ""))
    assert zoo_page.complaints(record) == []
    assert record.dtype == "float64"
    assert record.moved_by_input is not None
    assert record.moved_by_input > 1e-3
    found = Expected(record.swapped, record.dense or 0, record.dense_swapped, zoo_page.is_whole(record))
    assert found == NETS[name]
    if record.swapped:
        assert max(record.apart["convert"], record.apart["fuse"]) <= 1e-12
        assert (record.verdicts["convert"], record.verdicts["fuse"]) == ("equivalent", "equivalent")
    assert bool(record.octaves) == (name not in WITHOUT_OCTAVES)
    if record.octaves:
        assert record.verdicts.get("octave") == (None if name in OWN_CHECK_ONLY else "approximate")
        assert record.apart["octave fused"] <= 1e-12
    assert sum(record.dense_skipped.values()) == (record.dense or 0) - (record.dense_swapped or 0)


def _study(model: nn.Module) -> zoo_network.Study:
    example = (torch.rand(1, 3, 16, 16, dtype=torch.float64),)
    record = Record("net", "", dtype="float64")
    return zoo_network.Study(Case("net", ""), record, model, example, zoo_network.outputs(model, example))


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    return zoo_network.shake_(net.double().eval())


def test_a_tap_that_is_off_by_a_millionth_is_wrong() -> None:
    study = _study(_net())
    fused = surgeon.fuse(surgeon.convert(study.model, "acnet"))
    zoo_network.compare("fuse", fused, study.model, study.before, study)
    assert study.record.wrong == []
    with torch.no_grad():
        fused[0].weight[0, 0, 2, 2] += 1e-6
    zoo_network.compare("fuse", fused, study.model, study.before, study)
    assert len(study.record.wrong) == 1


class _Sorting(nn.Module):
    """Gives numbers in the order of scores that are equal but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten()
        return y[(y * 1e15).sin().argsort()]


def test_an_order_that_rounding_decides_is_not_wrong() -> None:
    torch.manual_seed(0)
    study = _study(_Sorting().double())
    moved = zoo_network.nudged(study.model, seed=9)
    zoo_network.compare("fuse", moved, study.model, study.before, study)
    assert study.record.apart["fuse"] > 0.1
    assert study.record.wrong == []
    with torch.no_grad():
        moved.conv.weight *= 3
    zoo_network.compare("fuse", moved, study.model, study.before, study)
    assert len(study.record.wrong) == 1


def test_a_lost_key_a_new_number_and_another_class_are_wrong() -> None:
    net, after, record = _net(), _net(), Record("net", "", step="keep")
    zoo_network.check_kept(net, after, {"0", "1"}, record)
    assert record.wrong == []
    after[3] = nn.Conv2d(8, 4, 3, bias=False)
    after[4] = nn.Identity()
    zoo_network.check_kept(net, after, {"0", "1"}, record)
    assert record.wrong == [
        "keep: the class of 4 is not what it was",
        "keep: the key 3.bias was lost or is new",
        "keep: 3.weight has changed",
    ]


def test_after_shaking_nothing_is_constant() -> None:
    tensors = [t for t in _net().state_dict().values() if t.is_floating_point()]
    assert all(tensor.std() > 0 for tensor in tensors)


def test_calibrated_statistics_are_near_those_of_the_signal() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double().eval()
    example = (torch.rand(1, 3, 16, 16, dtype=torch.float64) * 1000,)
    out = zoo_network.outputs(zoo_network.calibrate_(net, example), example)[0]
    assert 0.3 < out.std() < 3


def test_every_architecture_is_listed() -> None:
    names = [case.name for case in zoo.cases(every=True, chosen={})]
    assert {f"torchvision:{name}" for name in torchvision.models.list_models()} <= {*names}
    assert sum(name.startswith("timm:") for name in names) > 1000


def test_of_timm_one_of_each_family_is_chosen_and_remembered() -> None:
    chosen = {
        f"{family} of timm {timm.__version__}": (timm.list_models(module=family)[0], 1)
        for family in timm.list_modules()
    }
    found = [case for case in zoo.cases(every=False, chosen=chosen) if case.name.startswith("timm:")]
    assert [case.family for case in found] == timm.list_modules()
    assert {case.name.removeprefix("timm:") for case in found} == {name for name, _ in chosen.values()}


def test_small_networks_come_first_and_larger_ones_of_a_family_go_a_shorter_way() -> None:
    found = zoo.small_first([Case("timm:b", "f", 2), Case("timm:a", "f", 1), Case("torchvision:c", "f", 3)])
    assert [(case.name, case.is_brief) for case in found] == [
        ("timm:a", False),
        ("torchvision:c", False),
        ("timm:b", True),
    ]


def test_the_smallest_is_counted_without_making_it() -> None:
    assert zoo.size_of("test_resnet") < zoo.size_of("resnet18")


def _worker(work: Callable[[], None], folder: Path) -> zoo.Worker:
    into = folder / "net.json"
    into.with_suffix(".log").write_text("Traceback\nlast words\n")
    return zoo.Worker(Case("net", "family"), zoo.Child.begin(work), into, time.monotonic())


def test_a_crashing_process_leaves_a_record_of_the_step_it_was_in(tmp_path: Path) -> None:
    worker = _worker(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path)
    worker.into.write_text(json.dumps({"name": "net", "family": "family", "step": "convert", "sites": 7}))
    worker.process.wait()
    record = worker.finished(timeout=60)
    assert record is not None
    assert record.status == "failed"
    assert record.sites == 7
    assert record.errors == [{"step": "convert", "error": "the process ended with -9", "place": "last words"}]


def test_a_hanging_process_is_ended(tmp_path: Path) -> None:
    worker = _worker(lambda: time.sleep(600), tmp_path)
    assert worker.finished(timeout=60) is None
    record = worker.finished(timeout=0)
    assert record is not None
    assert record.errors[0]["error"] == "not done after 0 s"
    assert worker.process.returncode == -9


def test_what_does_not_fit_into_memory_is_left_out_with_the_reason() -> None:
    def work() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    record = Record("net", "")
    assert record.attempt("convert", work) is None
    assert (record.status, record.left_out) == ("left out", "convert does not fit into the memory that it may use")


def test_a_line_that_was_cut_short_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "zoo.jsonl"
    file.write_text('{"name": "a"}\n{"name": "b", "fam')
    assert list(zoo.recorded(file)) == [{"name": "a"}]
    assert list(zoo.recorded(tmp_path / "none.jsonl")) == []


def test_the_page_counts_what_was_found() -> None:
    fine = Record("a", "", dtype="float64", sites=4, swapped=3, dense=4, dense_swapped=3, islands=1)
    fine.octaves, fine.seams = 2, {"join: 'add_3' needs the whole map": 1}
    fine.apart = {"convert": 0.0, "fuse": 2e-11}
    fine.brings = Brings("1×3×224×224", 100, 4, True, 3, 2, {"bn1 has a hook": 1}, 0.5, 0.7, 2, stays={"x": 1, "y": 2})
    fine.skipped = fine.dense_skipped = {"it shares its weights with head.conv": 1}
    failed = Record(
        "b",
        "",
        sites=1,
        seams={"join: 'add_1' needs the whole map": 1},
        errors=[{"step": s, "error": "E: a | b", "place": "x.py:1"} for s in "pq"],
    )
    page = zoo_page.page([fine, failed, Record("c", "", left_out="it has no Conv2d")], Counter({"surgeon 1": 2}))
    assert "- 3 architectures: 1 failed, 1 left out, 1 right." in page
    assert "| a | 4 | 3 | 3 of 4 | 2 of 3 | 0e+00 | 2e-11 | 2 | ×0.70 | 1 | whole | 0 | right |" in page
    assert "| b | p, q: E: a \\| b (x.py:1) |" in page
    assert "| 1 | 1 | it shares its weights with … |" in page
    assert "| 2 | join: 'add' needs the whole map |" in page
    assert "| c | it has no Conv2d |" in page
    assert "that take it over, and are exact in train mode: 2 of 3, 66.7%." in page
    assert "`octave` leaves ×0.70 of the multiply-adds in the median of 1 networks" in page
    assert "- Swaps of `octave` that save nothing: 0." in page
    assert "| 1 | 1 | bn1 has a hook |" in page
    assert "| a | ×0.70 | 2 | 2: y |" in page


def test_what_a_conversion_brings_is_counted() -> None:
    record = zoo_brings.plan_only(Case("timm:test_resnet", ""))
    found = record.brings
    assert found is not None
    assert record.errors == []
    assert (found.fronts, found.taken, found.left, found.idle) == (10, 10, {}, [])
    assert found.has_batch_norms
    assert found.dense == 10
    assert found.hetconv is not None
    assert found.octave is not None
    assert found.octave < 1
    assert found.why


def test_a_swap_without_streams_is_idle() -> None:
    net = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
    plan = surgeon.plan(net, {"rules": [{"swap": "octave", "with": {"alpha": 0.5}}]}, (1, 16, 32, 32))
    assert plan.swaps
    surveyed = surgeon.survey(net, (1, 16, 32, 32))
    assert not any(zoo_brings._is_idle(entry, plan, surveyed) for entry in plan.swaps)
    plain = plan.swaps[0].model_copy(update={"options": {"alpha_in": 0.0, "alpha_out": 0.0}})
    assert zoo_brings._is_idle(plain, plan, surveyed)
    dear = Change(before=1, after=10**12)
    for_nothing = plan.swaps[-1].model_copy(update={"macs": dear})
    costly = plan.model_copy(update={"total": plan.total.model_copy(update={"macs": dear, "activations": dear})})
    assert zoo_brings._is_idle(for_nothing, costly, surveyed)


def test_convs_in_front_of_a_norm_of_any_class_are_found() -> None:
    class OwnNorm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    net = nn.Sequential(nn.Conv2d(3, 8, 3), OwnNorm(8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)).eval()
    assert zoo_brings.in_front_of_norms(net, (torch.rand(1, 3, 16, 16),)) == ({"0"}, True)


def test_files_of_several_machines_are_merged() -> None:
    planned = {"name": "a", "family": "f", "plans_only": True, "brings": {"octave": 0.5}}
    whole = {"name": "a", "family": "f", "sites": 3, "versions": {}}
    for lines in ([planned, whole], [whole, planned]):
        (record,) = zoo.merged(lines).values()
        assert (record.sites, record.left_out, record.brings) == (3, None, Brings(octave=0.5))
    (record,) = zoo.merged([planned]).values()
    assert (record.left_out, record.brings) == (zoo_page.NOT_RUN, Brings(octave=0.5))

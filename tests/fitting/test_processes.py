"""One, two and four processes come to the same numbers, and end together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.conv.exact import Total
from surgeon.errors import DataError
from surgeon.fitting import data as images
from surgeon.fitting import fit
from surgeon.fitting.fitted import Settings, carry_out_
from surgeon.fitting.processes import ALONE, Processes, joined

RECIPE = {
    "surgeon": 1,
    "title": "the convs inside",
    "rules": [{"match": {"in_channels": 8}, "swap": "hetconv", "with": {"p": 4, "layout": "best"}}],
}


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, 2, padding=1),
        nn.Flatten(),
        nn.Linear(192, 5),
    )
    net = net.double().eval()
    return surgeon.convert(net, RECIPE, example=(1, 3, 8, 8)), net


def _images(batch: int) -> images.Data:
    return images.of(torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1)), batch=batch)


def _fitted(processes: Processes, batch: int) -> dict[str, Tensor]:
    converted, net = _pair()
    fit.fit_(converted, net, _images(batch), processes=processes)
    return converted.state_dict()


def _broken(processes: Processes, batch: int) -> str:
    converted, net = _pair()
    if processes.rank == 1:
        fit.importance._gradients = _failing
    return _refused(processes, converted, net, _images(batch))


def _failing(*_: object, **__: object) -> None:
    raise DataError("a picture is gone", todo="Look for it.")


def _other_images(processes: Processes, batch: int) -> str:
    return _refused(processes, *_pair(), _images(batch + processes.rank))


def _too_few(processes: Processes, batch: int) -> str:
    return _refused(processes, *_pair(), images.of(torch.rand(1, 3, 8, 8), batch=batch))


def _trained(processes: Processes, batch: int) -> str:
    converted, net = _pair()
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    with pytest.raises(surgeon.SurgeonError) as caught:
        carry_out_(converted, net, _images(batch), Settings(distil=2), processes=processes)
    assert all(torch.equal(before[key], value) for key, value in converted.state_dict().items())
    return str(caught.value)


def _gone(processes: Processes, batch: int) -> str:
    if processes.rank == 1:
        os._exit(0)
    return _refused(processes, *_pair(), _images(batch))


def _refused(processes: Processes, converted: nn.Module, net: nn.Module, data: images.Data) -> str:
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    with pytest.raises(surgeon.SurgeonError) as caught:
        fit.fit_(converted, net, data, processes=processes)
    assert all(torch.equal(before[key], value) for key, value in converted.state_dict().items())
    return str(caught.value)


def _one(work: Callable[..., Any], batch: int, rank: int, count: int, folder: Path) -> None:
    """Join as torchrun lets a process join, work, and leave behind what was made."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    with joined() as processes:
        torch.save(work(processes, batch), folder / f"made-{rank}")


def _in_processes(work: Callable[..., Any], batch: int, count: int, folder: Path, *, most: int = 0) -> list[Any]:
    """Do some work in several processes at once; `most` says how many may end without a result."""
    kind = multiprocessing.get_context("forkserver")
    kind.set_forkserver_preload([__name__, "surgeon.fitting.fit"])
    folder.mkdir()
    started = [kind.Process(target=_one, args=(work, batch, rank, count, folder)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * count
    found = [folder / f"made-{rank}" for rank in range(count)]
    assert sum(not file.exists() for file in found) == most
    return [torch.load(file) for file in found if file.exists()]


def _is_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(one, b[key]) for key, one in a.items())


@pytest.mark.parametrize(("count", "batch"), [(2, 16), (4, 20)])  # 4 and 3 batches, so one process has none
def test_processes_come_to_the_very_numbers_of_one_alone(count: int, batch: int, tmp_path: Path) -> None:
    alone = _fitted(ALONE, batch)
    assert not _is_same(alone, _pair()[0].state_dict())
    found = _in_processes(_fitted, batch, count, tmp_path / "work")
    assert all(_is_same(alone, one) for one in found)


def test_all_processes_end_in_one_line_where_one_of_them_fails(tmp_path: Path) -> None:
    first, second = _in_processes(_broken, 16, 2, tmp_path / "work")
    assert second == "a picture is gone. Look for it."
    assert first == f"process 1 of 2: {second}"


def test_all_processes_say_that_there_are_too_few_images(tmp_path: Path) -> None:
    first, second = _in_processes(_too_few, 16, 2, tmp_path / "work")
    assert "say too little about" in first
    assert first == second


def test_processes_that_were_given_other_images_are_refused(tmp_path: Path) -> None:
    first, second = _in_processes(_other_images, 16, 2, tmp_path / "work")
    assert second.startswith("this process has other networks, images or options than the first one")
    assert first == f"process 1 of 2: {second}"


def test_training_is_refused_by_all_where_one_has_no_images(tmp_path: Path) -> None:
    *others, last = _in_processes(_trained, 25, 3, tmp_path / "work")
    assert last.startswith("it has 0 of the 50 images, too few to train with")
    assert others == [f"process 2 of 3: {last}"] * 2


def test_a_process_that_is_gone_is_said_in_one_line(tmp_path: Path) -> None:
    (said,) = _in_processes(_gone, 16, 2, tmp_path / "work", most=1)
    assert said.startswith("another process cannot be reached, or has ended. ")


def test_batches_are_shared_by_their_number_among_all() -> None:
    whole = images.of(torch.rand(11, 3, 4, 4), batch=2)
    shares = [list(Processes(rank, 3).batches(whole)) for rank in range(3)]
    assert [[i for i, _ in share] for share in shares] == [[0, 3], [1, 4], [2, 5]]
    assert [i for i, _ in Processes(1, 3).batches(whole, 4)] == [1]
    everything = {i: batch for share in shares for i, batch in share}
    for i, batch in ALONE.batches(whole):
        assert torch.equal(batch.inputs.tensors[0], everything[i].inputs.tensors[0])


def test_totals_do_not_depend_on_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(40, generator=generator).double() * 10.0**power for power in range(-8, 8)]
    found = set()
    for order in range(6):
        left, right = Total(parts[0]), Total(parts[0])
        for i in torch.randperm(len(parts), generator=torch.Generator().manual_seed(order)).tolist():
            (left if i % 2 else right).add_(parts[i])
        left.add_total_(right.sum, right.rest)
        found.add(tuple(left.rounded.tolist()))
    assert len(found) == 1
    assert len({tuple(sum(parts[i:] + parts[:i]).tolist()) for i in range(6)}) > 1  # plain sums do

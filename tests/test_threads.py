"""A process is left as it was found: by several threads at once, and whatever state the caller is in."""

from __future__ import annotations

import builtins
import contextlib
import io
import math
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import shake_
from torch import Tensor, nn

import surgeon
from surgeon.models import sandbox

EXAMPLE = (1, 3, 16, 16)


class Net(nn.Module):
    """It asks what a thread can get wrong: whether a value is a tensor, and what a function of math gives for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.third = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        side = math.sqrt(x.shape[2] * x.shape[3])
        return self.third(self.second(self.first(x))) / side


class Noisy(Net):
    """It prints, warns, and draws from every generator that there is."""

    def forward(self, x: Tensor) -> Tensor:
        print("from the forward")
        warnings.warn("from the forward", stacklevel=1)
        drawn = torch.rand(1) + random.random() + numpy.random.rand()
        return super().forward(x) + float(drawn)


def net(seed: int = 0, kind: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shake_(kind(), seed).eval()


def in_threads(count: int, work: Callable[[int], None]) -> list[BaseException]:
    """Run it in several threads that begin together; what they raised."""
    raised: list[BaseException] = []
    together = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            together.wait()
            work(i)
        except BaseException as error:
            raised.append(error)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return raised


def process() -> list[Any]:
    """What belongs to the process, and surgeon changes for a while."""
    usual: list[int] = []
    fresh = threading.Thread(target=lambda: usual.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    return [
        builtins.isinstance,
        nn.Module.__call__,
        nn.Module.__getattr__,
        sys.stdout,
        list(warnings.filters),
        warnings.showwarning,
        torch.get_num_threads(),
        usual,
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"),
    ]


def random_states() -> list[Any]:
    _, keys, *rest = numpy.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), *rest]


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_four_threads_at_once_get_what_one_gets_and_leave_the_process_as_it_was() -> None:
    models = [net(i) for i in range(4)]  # made here, for they are drawn from the generator that threads share
    expected = [surgeon.convert(model, "acnet", EXAMPLE) for model in models]
    found: dict[int, nn.Module] = {}

    def work(i: int) -> None:
        model = models[i]
        for _ in range(3):
            found[i] = surgeon.convert(model, "acnet", EXAMPLE)
            assert surgeon.verify(model, found[i], EXAMPLE).equivalent
            assert surgeon.verify(found[i], surgeon.fuse(found[i]), EXAMPLE).equivalent

    with torch_threads(2):
        before = process()
        assert in_threads(4, work) == []
        assert process() == before
    assert all(same(found[i], expected[i]) for i in range(4))


def test_threads_that_rewrite_graphs_take_turns() -> None:
    model = net()
    expected = surgeon.convert(model, "octave", EXAMPLE)
    found: dict[int, nn.Module] = {}

    def work(i: int) -> None:
        found[i] = surgeon.convert(model, "octave", EXAMPLE)

    assert in_threads(3, work) == []
    assert all(same(one, expected) for one in found.values())


def test_a_forward_in_another_thread_computes_what_it_always_does() -> None:
    model, x = net(7), torch.randn(EXAMPLE, generator=torch.Generator().manual_seed(1))
    expected, wrong, runs = model(x), [], []
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            try:
                runs.append(torch.equal(model(x), expected))
            except BaseException as error:
                wrong.append(error)

    worker = threading.Thread(target=run)
    worker.start()
    try:
        for i in range(4):
            surgeon.convert(net(i), "acnet", EXAMPLE)
    finally:
        done.set()
        worker.join()
    assert wrong == []
    assert runs
    assert all(runs)


def test_what_another_thread_calls_while_fx_traces_goes_to_torch_itself() -> None:
    """Every call that the traced forward makes stops, lets another thread run a module, and goes on."""
    other, x = net(3), torch.randn(EXAMPLE)
    expected, found = other(x), []

    class Waiting(Net):
        def forward(self, x: Tensor) -> Tensor:
            worker = threading.Thread(target=lambda: found.append((other(x_), other.first[0].weight, sys.stdout)))
            worker.start()
            worker.join()
            return super().forward(x)

    x_ = x
    assert len(surgeon.survey(net(0, Waiting), EXAMPLE).sites) == 3
    assert len(found) >= 2
    assert all(torch.equal(out, expected) and weight is other.first[0].weight for out, weight, _ in found)


def test_only_the_prints_and_warnings_of_surgeons_thread_go_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            def others() -> None:
                print("from another thread")
                with pytest.warns(UserWarning, match="from another thread"):
                    warnings.warn("from another thread", stacklevel=1)
                seen.append(True)

            seen: list[bool] = []
            worker = threading.Thread(target=others)
            worker.start()
            worker.join()
            assert seen
            return super().forward(x)

    with sandbox.quietly():
        print("from this thread")
        warnings.warn("from this thread", stacklevel=1)
        net(0, Shared)(torch.zeros(EXAMPLE))
    printed = capsys.readouterr()
    assert printed.out == "from another thread\n"
    assert "from this thread" in printed.err


def test_who_redirects_output_meanwhile_gets_back_what_was_there() -> None:
    out, mine = sys.stdout, io.StringIO()
    redirected = contextlib.redirect_stdout(mine)
    with redirected:
        running = sandbox.quietly()
        running.__enter__()
    running.__exit__(None, None, None)
    assert sys.stdout is out
    running = sandbox.quietly()
    running.__enter__()
    with contextlib.redirect_stdout(mine):
        running.__exit__(None, None, None)
    print("still printed", file=sys.stdout)  # it goes to where everybody prints
    sys.stdout = out
    assert mine.getvalue() == ""


def _load(tmp_path: Path) -> None:
    converted = surgeon.convert(net(), "acnet", EXAMPLE)
    surgeon.save(converted, tmp_path / "net.safetensors", arch=f"{_file(tmp_path)}:Drawn")
    surgeon.load(tmp_path / "net.safetensors", arch=f"{_file(tmp_path)}:Drawn")
    surgeon.load("torchvision:squeezenet1_1")


def _file(tmp_path: Path) -> Path:
    path = tmp_path / "drawn_net.py"
    path.write_text(
        "import random, numpy, torch\nfrom test_threads import Net\n"
        "def Drawn():\n    numpy.random.rand(), random.random(), torch.rand(1)\n    return Net()\n"
    )
    return path


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "convert": lambda model, _: surgeon.convert(model, "acnet-scratch", EXAMPLE),
    "convert to octave": lambda model, _: surgeon.convert(net(), "octave", EXAMPLE),
    "fuse": lambda model, _: surgeon.fuse(surgeon.convert(model, "acnet", EXAMPLE)),
    "verify": lambda model, _: surgeon.verify(model, surgeon.convert(model, "acnet", EXAMPLE), EXAMPLE),
    "survey": lambda model, _: surgeon.survey(model, EXAMPLE),
    "plan": lambda model, _: surgeon.plan(model, "acnet", EXAMPLE),
    "guess": lambda model, _: surgeon.survey(model),
    "load": lambda _, tmp_path: _load(tmp_path),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_of_the_process_moves(name: str, tmp_path: Path) -> None:
    model = net(0, Noisy)
    states, before = random_states(), process()
    CALLS[name](model, tmp_path)
    assert process() == before
    assert random_states() == states


@pytest.mark.parametrize("name", ["convert", "verify"])
def test_nothing_of_the_process_moves_when_a_forward_fails(name: str, tmp_path: Path) -> None:
    class Failing(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("of the user")

    states, before = random_states(), process()
    with pytest.raises(surgeon.SurgeonError, match="of the user"):
        CALLS[name](net(0, Failing), tmp_path)
    assert process() == before
    assert random_states() == states


def test_a_seed_is_the_beginning_of_every_generator() -> None:
    def drawn() -> list[float]:
        return [torch.rand(1).item(), random.random(), numpy.random.rand()]

    with sandbox.random_states_kept(2**40 + 3):
        first = drawn()
    with sandbox.random_states_kept(2**40 + 3):
        assert drawn() == first
    with sandbox.random_states_kept(4):
        assert all(one != other for one, other in zip(drawn(), first, strict=True))


def test_a_device_has_its_random_state_put_back_where_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}
    current: list[int] = [0]

    class Device(contextlib.AbstractContextManager[None]):
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: states[index].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: states.update({index: state}))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: states.update({current[-1]: torch.tensor([seed])}))
    with sandbox.random_states_kept(5):
        assert {index: state.item() for index, state in states.items()} == {0: 5, 1: 5}
    assert {index: state.item() for index, state in states.items()} == {0: 1, 1: 2}


def test_a_device_that_nobody_uses_is_not_seeded_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("it was seeded for good"))
    with sandbox.random_states_kept(5):
        torch.rand(1)


def test_the_number_of_threads_is_put_back_for_this_thread_and_for_new_ones() -> None:
    """Another thread has set a number of its own; torch gives that to threads that begin later."""
    with torch_threads(3):
        assert in_threads(1, lambda _: torch.set_num_threads(2)) == []
        before = process()
        with sandbox.one_thread(), sandbox.threads(5), sandbox.one_thread():
            assert torch.get_num_threads() == 1
        assert process() == before
        assert torch.get_num_threads() == 3


# States of a caller. What they change is given back, and nothing of them is in the results.
STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta": lambda: torch.device("meta"),
    "set meta": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("recipe", ["acnet", "acnet-scratch", "hetconv-p4", "octave"])
def test_what_the_caller_is_in_changes_no_result(recipe: str, state: str) -> None:
    def made() -> tuple[nn.Module, nn.Module, surgeon.Report]:
        converted = surgeon.convert(model, recipe, EXAMPLE)
        return converted, (fused := surgeon.fuse(converted)), surgeon.verify(converted, fused, EXAMPLE)

    model = net()
    expected = made()
    with STATES[state]():
        before = process()
        found = made()
        assert process() == before
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])
    assert found[2].to_dict() == expected[2].to_dict()
    for one in found[:2]:
        assert all(parameter.requires_grad and not parameter.is_inference() for parameter in one.parameters())
        one.train()(torch.randn(2, 3, 16, 16)).mean().backward()


@pytest.mark.parametrize("state", STATES)
def test_what_the_caller_is_in_changes_no_network_that_is_built_or_read(state: str, tmp_path: Path) -> None:
    surgeon.save(surgeon.convert(net(), "acnet", EXAMPLE), tmp_path / "net.pt")
    arguments = {"allow": ["test_threads"]}
    built, read = surgeon.load("torchvision:squeezenet1_1"), surgeon.load(tmp_path / "net.pt", **arguments)
    with STATES[state]():
        built_now, read_now = surgeon.load("torchvision:squeezenet1_1"), surgeon.load(tmp_path / "net.pt", **arguments)
        surgeon.save(read_now, tmp_path / "again.pt")
    assert same(built_now, built)
    assert same(read_now, read)
    assert same(surgeon.load(tmp_path / "again.pt", **arguments), read)
    assert not any(parameter.is_inference() for parameter in (*built_now.parameters(), *read_now.parameters()))


def test_a_network_that_was_made_in_inference_mode_is_converted() -> None:
    with torch.inference_mode():
        model = net().double()
        converted = surgeon.convert(model, "acnet", EXAMPLE)
    assert surgeon.verify(model, converted, EXAMPLE).equivalent
    converted.train()(torch.randn(2, 3, 16, 16, dtype=torch.float64)).mean().backward()


def test_threads_of_which_one_has_another_default_dtype_do_not_disturb_each_other() -> None:
    """The default dtype belongs to the process: nobody may find the one that surgeon has set for a while."""
    expected = surgeon.convert(net(), "acnet-scratch", EXAMPLE)
    found: dict[int, nn.Module] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = surgeon.convert(model, "acnet-scratch", EXAMPLE)

    model = net()
    with default_dtype(torch.float64):
        assert in_threads(3, work) == []
        assert torch.get_default_dtype() == torch.float64
    assert all(same(one, expected) for one in found.values())

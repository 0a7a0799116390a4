"""The one file that changes the process, and puts back what was there.

Whatever surgeon has to change around a user's code is changed here, by a context manager that saves, sets and restores
in one place. One re-entrant lock is held by whoever changes something that belongs to the whole process, so two threads
that use surgeon at once take turns at tracing and at running models; arithmetic and planning go on side by side.

What belongs to the thread that uses surgeon, so that no other thread sees it:
    grad mode, inference mode, autocast, the default device (torch keeps them per thread)

What belongs to the process, but answers each thread differently:
    sys.stdout            what surgeon's thread prints goes to stderr; what others print goes where it always went
    warnings.filters      warnings of surgeon's thread are dropped; those of others are as before
    builtins.isinstance   while surgeon's thread traces, its placeholders answer it as what they stand for; other
                          threads get the usual answers
    nn.Module.__call__, nn.Module.__getattr__
                          torch.fx replaces them for the whole process while it traces, and its replacement fails with
                          a NameError for a module that is not being traced. So they are replaced once more, by
                          functions that send surgeon's thread to fx and every other thread to torch's own: a forward
                          in another thread computes what it always does, a little later. Between the two replacements
                          lie some lines of fx; a call that comes in there is let through by the tracer itself.

What belongs to the process, and is seen by all of its threads while it lasts:
    random states         what another thread draws from the global generators while surgeon runs a model comes from
                          there, and is drawn again after it; give a thread a torch.Generator of its own
    torch's threads       a thread that first uses torch while surgeon computes with one thread keeps to one
    torch.load            what a file that surgeon opens may hold, any file opened at that moment may hold
    the default dtype     it is float32 during a call of surgeon if it was another one before
    torch.fx              if the user traces in another thread at the same time, patches are undone in another order
                          than they were made, as always when two threads trace
    torch.jit, torch.compile   a function that asks isinstance cannot be compiled in another thread at that moment;
                          before torch 2.14, torch.compile refuses in every thread to run while one of them traces
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

_LOCK = threading.RLock()
_READING: list[int] = []  # the threads inside `unpickling`
_GPUS = ("cuda", "xpu")  # kinds of which there may be several devices, each with a random state
_LEGACY_SEEDS = 2**32  # NumPy takes no larger ones


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Compute as in a fresh process: no inference mode, no autocast, new tensors on the CPU and in float32."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", *_GPUS):
            if torch.is_autocast_enabled(kind):
                torch.set_autocast_enabled(kind, False)
                stack.callback(torch.set_autocast_enabled, kind, True)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        with _LOCK:  # whoever holds it may have changed the dtype
            if (dtype := torch.get_default_dtype()) != torch.float32:
                stack.enter_context(_LOCK)
                torch.set_default_dtype(torch.float32)
                stack.callback(torch.set_default_dtype, dtype)
        yield


@contextlib.contextmanager
def quietly(seed: int | None = None) -> Iterator[None]:
    """Run a user's code without gradients; prints go to stderr, warnings are dropped, random states are put back.

    With a seed, every random state starts from it.
    """
    with _LOCK, random_states_kept(seed), _printing_to_stderr(), warnings_of_this_thread("ignore"), torch.no_grad():
        yield


@contextlib.contextmanager
def random_states_kept(seed: int | None = None) -> Iterator[None]:
    """Put back every random state of the process: torch's on all devices, NumPy's, and Python's own."""
    with _LOCK:
        put_back = _random_states()
        if seed is not None:
            _seed(seed)
        try:
            yield
        finally:
            for one in put_back:
                one()


class OwnRandomStates:
    """Random states for a user's code that runs a step at a time: it draws as if nobody else did in between."""

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._kept: list[Callable[[], Any]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Run one step quietly; the first one starts from the seed, every other where the one before it ended."""
        with quietly(self._seed):
            for one in self._kept:
                one()
            try:
                yield
            finally:
                self._seed, self._kept = None, _random_states()


def drawn_from() -> list[Any]:
    """Give the random states of the process that Python's own code draws from, to be compared."""
    numpy_random = sys.modules.get("numpy.random")
    of_numpy = [repr(part) for part in numpy_random.get_state(legacy=False).items()] if numpy_random else []
    return [random.getstate(), of_numpy, torch.get_rng_state().tolist()]


def draws(work: Callable[[], object]) -> bool:
    """Whether some work draws random numbers: from the same states it comes to the same others.

    Other threads may draw at the same time, but hardly twice the same. It changes the states, which a caller keeps.
    """
    seen: list[Any] = []
    for _ in range(5):
        _seed(0)
        start = drawn_from()
        work()
        if (end := drawn_from()) == start:
            return False
        if end in seen:
            return True
        seen.append(end)
    return True


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with this many threads.

    Each thread of the process has its own number: the one that was set last when the thread first used torch. So two
    numbers have to be put back.
    """
    own = torch.get_num_threads()
    if own == count:
        yield
        return
    with _LOCK:
        usual = _asked_elsewhere(torch.get_num_threads)
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(own)
            if usual != own:
                _asked_elsewhere(functools.partial(torch.set_num_threads, usual))


def one_thread() -> contextlib.AbstractContextManager[None]:
    """Let torch compute with one thread: on small convs, several would wait for each other longer than they work."""
    return threads(1)


Guard = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextlib.contextmanager
def tracing(answer: Callable[..., bool]) -> Iterator[Guard]:
    """Let torch.fx trace in this thread, with `answer(isinstance, value, kinds)` for what is asked of a value in it.

    Yields a guard that keeps fx's patches to this thread: it wraps the function that fx calls when they are made.
    """
    owner, ask = threading.get_ident(), builtins.isinstance
    own_call, own_getattr = nn.Module.__call__, nn.Module.__getattr__

    def answered(value: Any, kinds: Any) -> bool:
        return answer(ask, value, kinds) if threading.get_ident() == owner else ask(value, kinds)

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            fx_call, fx_getattr = nn.Module.__call__, nn.Module.__getattr__
            with (
                _replaced(nn.Module, "__call__", _by_thread(owner, fx_call, own_call)),
                _replaced(nn.Module, "__getattr__", _by_thread(owner, fx_getattr, own_getattr)),
            ):
                return function(*args, **kwargs)

        return guarded

    with _LOCK, _replaced(builtins, "isinstance", answered):
        yield guard


@contextlib.contextmanager
def unpickling(admitted: Sequence[Any]) -> Iterator[None]:
    """Let torch.load make these things, and no others that another thread has admitted for a file of its own."""
    with _LOCK, torch.serialization.safe_globals(list(admitted)):
        _READING.append(threading.get_ident())
        try:
            yield
        finally:
            _READING.pop()


def is_unpickling() -> bool:
    """Whether this thread is reading a file that may make no more than what was admitted."""
    return threading.get_ident() in _READING


@contextlib.contextmanager
def gradients_and_autocast(wanted: bool) -> Iterator[None]:
    """Switch both on or both off in this thread; an autocast for a GPU can be switched on where there is no GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", wanted)
    try:
        with torch.set_grad_enabled(wanted):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@contextlib.contextmanager
def warnings_of_this_thread(action: str) -> Iterator[None]:
    """Treat the warnings of this thread as `action` says, and leave those of other threads to the existing filters.

    Unlike with warnings.catch_warnings, nothing is lost if another thread changes the filters meanwhile.
    """
    ours = _OfThisThread()
    item: Any = (action, ours, Warning, None, 0)  # what is asked with a message is whether it matches
    warnings.filters.insert(0, item)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        ours.owner = None
        with contextlib.suppress(ValueError):  # somebody else has put other filters there
            warnings.filters.remove(item)  # type: ignore[attr-defined]


class _OfThisThread:
    """Takes the place of the message pattern in a filter of warnings."""

    def __init__(self) -> None:
        self.owner: int | None = threading.get_ident()

    def match(self, message: str) -> bool:
        return threading.get_ident() == self.owner


class _Output:
    """Stands for sys.stdout: prints of one thread go to stderr, those of the others to where they went before."""

    def __init__(self, before: Any) -> None:
        vars(self).update(_before=before, _owner=threading.get_ident())

    def _target(self) -> Any:
        return sys.stderr if threading.get_ident() == vars(self)["_owner"] else vars(self)["_before"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target(), name, value)

    def close_(self) -> None:
        """Let whoever has kept this object print to where everybody does."""
        vars(self)["_owner"] = None


@contextlib.contextmanager
def _printing_to_stderr() -> Iterator[None]:
    output = _Output(sys.stdout)
    with _replaced(sys, "stdout", output):
        try:
            yield
        finally:
            output.close_()


@contextlib.contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute, and put back what was there, unless somebody else has replaced it since."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if getattr(holder, name) is value:
            setattr(holder, name, before)


def _by_thread(owner: int, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (ours if threading.get_ident() == owner else theirs)(*args, **kwargs)

    return chosen


def _random_states() -> list[Callable[[], Any]]:
    """Read every random state that there is, without creating one; returns the functions that put them back."""
    put_back: list[Callable[[], Any]] = [
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
        functools.partial(random.setstate, random.getstate()),
    ]
    if numpy_random := sys.modules.get("numpy.random"):
        put_back.append(functools.partial(numpy_random.set_state, numpy_random.get_state()))
    for kind, index in _devices():
        module = getattr(torch, kind)
        put_back.append(functools.partial(module.set_rng_state, module.get_rng_state(index), index))
    if torch.backends.mps.is_available():
        put_back.append(functools.partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return put_back


def _devices() -> Iterator[tuple[str, int]]:
    """List the devices that have a random state by now; one that nobody has used yet is not woken for it."""
    for kind in _GPUS:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available() and module.is_initialized():
            yield from ((kind, index) for index in range(module.device_count()))


def _seed(seed: int) -> None:
    """Seed every random state; torch.manual_seed would also seed devices that are not in use yet, for good."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed(seed % _LEGACY_SEEDS)
    for kind, index in _devices():
        module = getattr(torch, kind)
        with module.device(index):
            module.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def _asked_elsewhere(function: Callable[[], Any]) -> Any:
    """Call a function in a thread that has never used torch."""
    found: list[Any] = []
    worker = threading.Thread(target=lambda: found.append(function()))
    worker.start()
    worker.join()
    return found[0]

"""A network whose forward became a graph stays its user's: its class, its methods, its signature, also in files."""

from __future__ import annotations

import abc
import copy
import inspect
import io
import pickle
import sys
import typing
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.analysis import rewritten
from surgeon.analysis.rewritten import Rewritten
from surgeon.files.save import to_open_again
from surgeon.nn import Stored


def refusal(path: str) -> str:
    with pytest.raises(surgeon.errors.SurgeonError) as caught:
        surgeon.load(path)
    return str(caught.value)


SHAPE = (1, 3, 32, 32)
HERE = (__name__,)


class Net(nn.Module):
    """The user's network."""

    _version = 2
    made = 0

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.c, self.head = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 4, 1)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Net.made += 1

    def forward(self, input: Tensor, /, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """Say what is where."""
        made: Tensor = self.head(self.c(self.b(self.a(input)).relu()).relu()) * scale
        return made

    def predict(self, image: Tensor) -> Tensor:
        made: Tensor = self(image).argmax(1)
        return made

    def again(self) -> Self:
        return type(self)(8)

    @property
    def depth(self) -> int:
        return 4

    @classmethod
    def title(cls) -> str:
        return cls.__doc__ or ""


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def predict(self, image: Tensor) -> Tensor: ...


class OfAMetaclass(Net, Abstract):
    pass


@pytest.fixture
def image() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def network(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def converted(kind: type[nn.Module] = Net) -> Any:
    made = surgeon.convert(network(kind), "octave", SHAPE)
    assert isinstance(made, Rewritten)
    return made


def stored(model: nn.Module, allow: tuple[str, ...] = ()) -> Any:
    surgeon.save(model, "net.pt", force=True)
    return surgeon.load("net.pt", allow=allow)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_signature_is_that_of_the_class() -> None:
    net, made = network(), converted()
    assert inspect.signature(made.forward) == inspect.signature(net.forward)
    assert inspect.signature(type(made).forward) == inspect.signature(Net.forward)
    assert typing.get_type_hints(type(made).forward) == typing.get_type_hints(Net.forward)
    assert made.forward.__doc__ == "Say what is where."


def test_inputs_are_given_as_the_class_takes_them(image: Tensor) -> None:
    made = converted()
    assert torch.equal(made(image, None, scale=1.0), made(image))
    with pytest.raises(AssertionError, match="scale has been specialized"):
        made(image, scale=2.0)
    with pytest.raises(TypeError):
        made(image, None, 1.0)


def test_methods_and_class_are_there(image: Tensor) -> None:
    made = converted()
    assert isinstance(made, Net)
    assert made.predict(image).shape == (1, 32, 32)
    assert (made.depth, made.title(), made._version) == (4, "The user's network.", 2)
    assert type(made.again()) is Net
    assert type(type(made)()) is Net
    assert type(made).__module__ == "surgeon.nn"
    assert repr(made).startswith(f"Rewritten(\n  was {__name__}.Net, ")


def test_two_networks_of_one_class_have_one_class_and_no_subclass_is_announced() -> None:
    before = Net.made
    assert type(converted()) is type(converted())
    assert Net.made == before


def test_a_class_with_a_metaclass_is_kept() -> None:
    assert isinstance(converted(OfAMetaclass), Abstract)


def test_copies_and_pickles_keep_the_class(image: Tensor) -> None:
    made = converted()
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    whole = torch.load(buffer, weights_only=False)
    for again in (copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made)), whole):
        assert type(again) is type(made)
        assert torch.equal(again.predict(image), made.predict(image))


def test_another_process_is_given_the_class(image: Tensor) -> None:
    made = converted()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=_predicted, args=(queue, made, image))
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    assert queue.get() == made.predict(image).sum().item()


def _predicted(queue: Any, model: Any, image: Tensor) -> None:
    assert isinstance(model, Net)
    assert isinstance(model, Rewritten)
    queue.put(model.predict(image).sum().item())


def test_a_file_is_data_and_opens_without_the_class(image: Tensor) -> None:
    made = converted()
    again = stored(made)
    assert b"predict" not in Path("net.pt").read_bytes()
    named = torch.serialization.get_unsafe_globals_in_checkpoint("net.pt")
    assert [name for name in named if not name.startswith(("torch.", "surgeon.nn."))] == []
    assert torch.equal(again(image), made(image))
    assert not isinstance(again, Net)
    taken = [str(one).partition(":")[0] for one in inspect.signature(again.forward).parameters.values()]
    assert taken == ["input", "mask=None", "scale=1.0"]
    with pytest.raises(AttributeError, match=rf'was a {__name__}.Net.*allow=\("{__name__}",\)'):
        again.predict(image)
    assert surgeon.verify(made, again, SHAPE).equivalent
    assert surgeon.verify(network(), surgeon.fuse(again), SHAPE).verdict == "approximate"
    assert stored(again, HERE).predict(image).shape == (1, 32, 32)


def test_a_file_gets_its_class_back_from_a_reader_that_admits_it(image: Tensor) -> None:
    made = converted()
    again = stored(made, HERE)
    assert type(again) is type(made)
    assert torch.equal(again.predict(image), made.predict(image))
    assert surgeon.verify(made, again, SHAPE).equivalent
    assert surgeon.verify(again, surgeon.fuse(again), SHAPE).equivalent
    said = f"net.pt opens as it is; with --allow {__name__} it has the methods of Net, too"
    assert to_open_again(made, Path("net.pt"), None) == said


def test_a_library_is_admitted() -> None:
    net = nn.Sequential(*(layer for c in (3, 16, 16) for layer in (nn.Conv2d(c, 16, 3, padding=1), nn.ReLU())))
    again = stored(surgeon.convert(net.eval(), "octave", SHAPE))
    assert isinstance(again, Rewritten)
    assert isinstance(again, nn.Sequential)
    assert type(again[:4]) is nn.Sequential
    assert again[:4](torch.randn(SHAPE)).shape == (1, 16, 32, 32)


def _doctored(origin: str, **attributes: Any) -> Any:
    made = converted()
    vars(made).update(origin=origin, **attributes)
    return stored(made, HERE)


@pytest.mark.parametrize(
    "origin",
    [
        "os.system",
        "torch.nn.modules.conv.Conv2d",
        "torch.nn.modules.batchnorm.BatchNorm2d",
        "surgeon.nn.HetConv",
        "x",
        ".",
    ],
)
def test_no_other_class_is_taken_from_a_file(origin: str) -> None:
    again = _doctored(origin)
    assert type(again).__mro__[1:4] == (Rewritten, Stored, nn.Module)


def test_no_name_is_imported_because_a_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unwanted.py").write_text("from torch import nn\nclass Net(nn.Module):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = converted()
    vars(made).update(origin="unwanted.Net")
    surgeon.save(made, "net.pt")
    assert type(surgeon.load("net.pt"))._theirs is None
    assert type(torch.load("net.pt", weights_only=False))._theirs is None
    assert "unwanted" not in sys.modules
    assert type(surgeon.load("net.pt", allow=("unwanted",)))._theirs is sys.modules["unwanted"].Net


def test_a_weights_only_reader_of_torch_takes_no_class(image: Tensor) -> None:
    made = converted()
    surgeon.save(made, "net.pt")
    named = [surgeon.nn.ConvSpec, surgeon.nn.OctaveConv, Rewritten, nn.Conv2d]
    with torch.serialization.safe_globals(named):
        again = torch.load("net.pt", weights_only=True)
    assert again._theirs is None
    assert torch.equal(again(image), made(image))


def test_an_attribute_in_a_file_hides_no_method() -> None:
    assert _doctored(f"{__name__}.Net")._theirs is Net
    assert _doctored(f"{__name__}.Net", predict=torch.zeros(1))._theirs is None


def test_a_step_reaches_no_attribute_of_the_class() -> None:
    """The graph of a file is compared with the class again, once it has it."""
    made = converted()
    made._buffers["made"] = torch.zeros(())
    steps = made.program["steps"]
    steps.append(["odd", "get_attr", "made", [], {"dict": []}])
    assert stored(made)._theirs is None
    assert stored(made, HERE)._theirs is None


@pytest.mark.parametrize(
    "signature",
    [None, [], [["input"]], [["input", "any"]], [["in put", "either"]], [["import", "either"]], [["a", "either"]] * 3],
)
def test_a_signature_that_is_none_is_refused(signature: Any) -> None:
    made = converted()
    made.program["signature"] = signature
    torch.save(made, "net.pt")
    assert "cannot be unpickled" in refusal("net.pt")


def test_what_calls_a_rewritten_class_with_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = converted()
    monkeypatch.setattr(Rewritten, "__reduce_ex__", lambda self, _: (Rewritten, (1,), self.__getstate__()))
    torch.save(made, "net.pt")
    assert "calls surgeon.nn.Rewritten with arguments" in refusal("net.pt")


def test_classes_that_cannot_be_kept_are_named() -> None:
    class Final(type):
        def __new__(mcs, name: str, bases: tuple[type, ...], space: dict[str, Any], **_: Any) -> Final:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("nobody inherits it")
            return super().__new__(mcs, name, bases, space)

    class Alone(nn.Module, metaclass=Final):
        pass

    class Slotted(nn.Module):
        __slots__ = ("size",)

    assert "nobody inherits it" in str(rewritten.unkept(Alone))
    assert "__slots__" in str(rewritten.unkept(Slotted))
    assert rewritten.unkept(Net) is None

"""The one kind of GraphModule that a file may hold, and everything near it, which is refused and never run."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_pickle
from torch import Tensor, fx, nn

import surgeon
from surgeon.blocks import sum_of_convs
from surgeon.errors import ModelError, StoreError
from surgeon.files import load as source
from surgeon.files.names import Trust
from surgeon.files.written import check_writable

MARKER = Path("marker")
RUNS = f"open({str(MARKER)!r}, 'w').close()"


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def a_sum(*, ordered: bool = False) -> fx.GraphModule:
    torch.manual_seed(0)
    orders = {"channel_order": torch.tensor([2, 0, 1, 3]), "filter_place": torch.tensor([3, 1, 0, 2])}
    convs = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.Conv2d(4, 4, 1)
    return sum_of_convs.make(*convs, **(orders if ordered else {}))


def doctored(change: Callable[[dict[str, Any]], object], imports: str = "", *, ordered: bool = False) -> nn.Module:
    """Put a sum whose state or imports were changed into a network."""
    function, (body, known) = a_sum(ordered=ordered).__reduce__()
    body["_modules"] = dict(body["_modules"])
    change(body)
    net = nn.Sequential(nn.Identity())
    net._modules["0"] = Calls(function, body, known + imports)  # type: ignore[assignment]
    return net


def line(text: str) -> Callable[[dict[str, Any]], object]:
    """Add a line to the source."""
    return lambda body: body.update(_code=f"{body['_code']}\n{text}\n")


def in_place_of(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def change(body: dict[str, Any]) -> None:
        assert old in body["_code"]
        body["_code"] = body["_code"].replace(old, new)

    return change


def child(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["_modules"].update({name: value})


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not MARKER.exists()


def refusal(path: str = "net.pt", trust: Trust = Trust(allow=("torch", "os", "posix"))) -> str:  # noqa: B008 - frozen
    with pytest.raises(ModelError) as caught:
        source.load(path, trust=trust)
    return str(caught.value)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("imports", ["", "\nimport torch\n"])
def test_an_honest_one_is_read_without_running_it(ordered: bool, imports: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(doctored(lambda body: body, imports, ordered=ordered), "net.pt")
    monkeypatch.setattr(fx.graph_module, "reduce_graph_module", None)
    model, x = surgeon.load("net.pt"), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(model(x), a_sum(ordered=ordered)(x))


def test_other_spaces_and_comments_are_the_same_source() -> None:
    torch.save(doctored(in_place_of("return add", "return  add  # the sum")), "net.pt")
    assert isinstance(surgeon.load("net.pt")[0], fx.GraphModule)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(line(RUNS), id="a line behind"),
        pytest.param(lambda body: body.update(_code=f"{RUNS}\n{body['_code']}"), id="a line before"),
        pytest.param(in_place_of("return add", f"{RUNS}; return add"), id="a statement within"),
        pytest.param(in_place_of("self, input", f"self, input={RUNS}"), id="a default"),
        pytest.param(in_place_of("def forward", f"@({RUNS})\ndef forward"), id="a decorator"),
        pytest.param(in_place_of("self, input", f"self, input: ({RUNS})"), id="an annotation"),
        pytest.param(in_place_of("spatial + pointwise", "spatial - pointwise"), id="a difference"),
        pytest.param(in_place_of("self.pointwise", "self.spatial"), id="another module"),
        pytest.param(in_place_of("def forward", "async def forward"), id="a coroutine"),
        pytest.param(lambda body: body.update(_code=body["_code"] * 2), id="twice"),
        pytest.param(lambda body: body.update(_code=""), id="none"),
        pytest.param(lambda body: body.update(_code="(" * 1900), id="what cannot be parsed"),
        pytest.param(lambda body: body.update(_code="\0"), id="what is no text of Python"),
        pytest.param(lambda body: body.update(_code=7), id="a number"),
        pytest.param(lambda body: body.pop("_code"), id="without source"),
        pytest.param(lambda body: body.update(code=body.pop("_code")), id="under its earlier name"),
        pytest.param(lambda body: body.update(forward=torch.relu), id="a forward"),
        pytest.param(lambda body: body.update(note="mine"), id="an attribute"),
        pytest.param(lambda body: body.update(_tracer_cls=nn.Linear), id="another tracer"),
        pytest.param(lambda body: body.update(_tracer_extras={"fn": torch.relu}), id="extras"),
        pytest.param(lambda body: body.update(meta={"x": nn.Identity()}), id="meta with a module"),
        pytest.param(lambda body: body.update(_replace_hooks=[torch.relu]), id="a hook of graphs"),
        pytest.param(lambda body: body.update(_parameters={"p": nn.Parameter(torch.ones(1))}), id="a parameter"),
        pytest.param(lambda body: body.update(_buffers={"b": torch.ones(1)}), id="a buffer"),
        pytest.param(lambda body: body.pop("_modules"), id="without modules"),
        pytest.param(child("more", nn.Identity()), id="one module more"),
        pytest.param(lambda body: body["_modules"].pop("spatial"), id="one module less"),
    ],
)
def test_anything_else_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    torch.save(doctored(change), "net.pt")
    assert "a program that runs when it is opened" in refusal()


@pytest.mark.parametrize(
    "imports",
    [
        f"\n{RUNS}",
        "\nimport os",
        "\nfrom torch import device as add",
        "\nimport torch as NoneType",
        "\n(",
        "\n#" * 9999,
    ],
    ids=["a call", "os", "another name", "a hidden name", "no Python", "too long"],
)
def test_other_imports_are_refused(imports: str) -> None:
    torch.save(doctored(lambda body: body, imports), "net.pt")
    assert "a program that runs when it is opened" in refusal()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (child("spatial", torch.ones(3)), "something else in place of modules"),
        (child("spatial", None), "something else in place of modules"),
    ],
)
def test_what_the_graph_calls_is_a_module(change: Callable[[dict[str, Any]], object], says: str) -> None:
    torch.save(doctored(change), "net.pt")
    assert says in refusal()


@pytest.mark.parametrize(
    "order",
    [torch.tensor([0, 1, 2, 9]), torch.tensor([0, 0, 1, 2]), torch.tensor([0.0, 1, 2, 3]), torch.zeros(4, 4).long(), 7],
)
def test_an_order_is_an_order(order: Tensor | int) -> None:
    torch.save(doctored(lambda body: body["_buffers"].update(channel_order=order), ordered=True), "net.pt")
    assert "in place of an order of channels" in refusal()


def test_a_subclass_is_refused() -> None:
    class Own(fx.GraphModule):
        pass

    made = a_sum()
    own = Own(made, made.graph)
    assert not sum_of_convs.is_ours(nn.Sequential(own))
    assert not sum_of_convs.is_ours(own)
    args = own.__reduce__()[1]
    for other in ("reduce_package_graph_module", "_deserialize_graph_module", "_make_graph_module"):
        module = fx._lazy_graph_module if other == "_make_graph_module" else fx.graph_module
        net = nn.Sequential(nn.Identity())
        net._modules["0"] = Calls(getattr(module, other), *args)  # type: ignore[assignment]
        torch.save(net, "net.pt")
        assert "a program that runs when it is opened" in refusal()


@pytest.mark.parametrize("wrap", [lambda held: held, lambda held: [held], functools.partial], ids=["it", "in", "of"])
def test_the_call_cannot_wait_for_a_forward(wrap: Callable[[object], object]) -> None:
    net = nn.Sequential(a_sum())
    net.note = wrap(fx.graph_module.reduce_graph_module)  # type: ignore[assignment]
    torch.save(net, "net.pt")
    assert "a program that runs when it is opened" in refusal()


def test_the_name_of_the_tracer_stands_for_nothing() -> None:
    tracer = fx._symbolic_trace.Tracer
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    net.note = tracer  # type: ignore[assignment]
    torch.save(net, "net.pt")
    assert "a program that runs when it is opened" in refusal()
    net = nn.Sequential(a_sum())
    net.note = tracer  # type: ignore[assignment]
    torch.save(net, "net.pt")
    assert surgeon.load("net.pt").note is not tracer  # type: ignore[comparison-overlap]


def test_a_state_that_changes_after_it_was_compared_is_refused() -> None:
    """The same dict, with another source once it has been looked at: SETITEM on what the memo holds."""
    function, (body, imports) = a_sum().__reduce__()
    body = {name: value for name, value in body.items() if name != "_modules"} | {"_modules": {}}
    body["_modules"] = {"spatial": nn.Identity(), "pointwise": nn.Identity()}
    file = io.BytesIO()
    pickle.Pickler(file, protocol=2).dump((body, Calls(function, body, imports)))
    program = file.getvalue()
    assert program.startswith(b"\x80\x02}q\x00")  # the dict gets place 0
    assert program.endswith(b".")
    change = b"h\x00X\x05\x00\x00\x00_codeX\x04\x00\x00\x00evils\x86"
    write_pickle(Path("net.pt"), program[2:-1] + change)
    assert "already checked" in refusal(trust=Trust())


def test_a_graph_of_the_users_is_not_written_and_said_so() -> None:
    net = nn.Sequential(fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3))))
    with pytest.raises(StoreError, match="is a GraphModule, whose file would be a program"):
        check_writable(net)
    sums = nn.Sequential(a_sum(), nn.ReLU())
    check_writable(sums)
    surgeon.save(sums, "net.pt")
    assert isinstance(surgeon.load("net.pt")[0], fx.GraphModule)

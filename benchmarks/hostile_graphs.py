"""Files whose inside is drawn at random: stored graphs, states of modules, histories, storages, opcodes."""

from __future__ import annotations

import collections
import copy
import functools
import io
import random
from collections.abc import Sequence
from typing import Any

import torch
from hostile_damage import rezipped
from hostile_files import net
from hostile_pickles import Call, Crafty, Named, Places
from hostile_texts import spoil
from torch import nn

import surgeon
from surgeon.nn import Rewritten

PATHS = (
    "st._untyped_storage.from_file",
    "t.set_",
    "t.copy_",
    "__class__",
    "__class__.__init__.__globals__",
    "forward.__func__.__globals__",
    "_modules.0",
    "0.weight.data.numpy.tofile",
    "0.forward",
    "0.weight.map_",
    "..",
    "",
    "0..weight",
    "0.weight",
    "0.__dict__",
    "_parameters",
    "parameters",
    "apply",
    "load_state_dict",
    "register_forward_hook",
    "state_dict",
    "program",
    "graph",
    "0.weight.register_hook",
    "0.weight.untyped_storage",
    "evil",
    "evil.__call__",
    "evil.args",
    "0.weight.grad_fn",
    "share_memory",
    "0.\x00",
    "a" * 5000,
)
FUNCTIONS = (
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "_operator.attrgetter",
    "_operator.getitem",
    "operator.methodcaller",
    "torch.save",
    "torch.load",
    "torch.hub.load",
    "torch.from_file",
    "torch.ops.load_library",
    "torch.nn.functional.relu",
    "torch.add",
    "torch.jit.load",
    "torch.set_num_threads",
    "torch.manual_seed",
    "torch.utils.cpp_extension.load",
    "streams.split",
    "streams.os",
    "kernels.torch.load",
    "surgeon.load",
    "surgeon.nn.importlib",
    "torch.Tensor.apply_",
    "torch._C._nn.relu",
    "math.__loader__",
    "builtins.__import__",
    "",
    "x",
    "\x1b[31m",
    "torch.empty",
    "torch.full",
    "builtins.int",
    "builtins.list",
    "torch.vmap",
    "torch.compile",
    "torch.func.functional_call",
)
METHODS = (
    "tofile",
    "numpy",
    "set_",
    "apply_",
    "map_",
    "map2_",
    "register_hook",
    "share_memory_",
    "__reduce__",
    "__reduce_ex__",
    "__class__",
    "__setattr__",
    "__getattribute__",
    "data_ptr",
    "storage",
    "untyped_storage",
    "cuda",
    "relu",
    "view",
    "mean",
    "resize_",
    "backward",
    "requires_grad_",
    "__setstate__",
    "format",
    "join",
    "system",
    "",
    "pin_memory",
    "type",
    "new",
    "tolist",
    "item",
    "repeat",
    "expand",
    "to_sparse",
    "module_load",
    "record_stream",
)
TARGETS = {
    "call_module": PATHS,
    "get_attr": PATHS,
    "call_function": FUNCTIONS,
    "call_method": METHODS,
    "output": ("x",),
    "placeholder": ("x", "*args"),
    "exec": ("CODE",),
    7: ("x",),
}


def graph(at: Places, dice: random.Random) -> nn.Module:
    """Make a rewritten island whose graph tries something; a fourth of them is odd in its form as well."""
    island = Rewritten.__new__(Rewritten)
    nn.Module.__init__(island)
    island.add_module("0", nn.Conv2d(8, 8, 1))
    island.register_buffer("t", torch.zeros(0, dtype=torch.uint8))
    island.register_buffer("p", torch.tensor(list(b"written!!"), dtype=torch.uint8))
    steps = writing(at) if dice.random() < 0.2 else [step(i, at, dice) for i in range(dice.randint(1, 4))]
    output = {"node": dice.choice(("x", "s0"))}
    program: Any = {"format": dice.choice((1, 2)), "inputs": [["x"]], "steps": steps, "output": output}
    if dice.random() < 0.25:
        program[dice.choice(list(program))] = dice.choice((None, [], {}, -1, 99, "x", [[["x"]]] * 3))
    vars(island).update(st=torch.zeros(4).storage(), origin="x", program=program)
    model = net()
    model.insert(2, island)
    return model


def writing(at: Places) -> list[Any]:
    """Give steps that map a file into memory, and copy bytes over it."""
    none: Any = {"dict": []}
    return [
        ["s0", "call_module", "st._untyped_storage.from_file", [at.canary, True, 9], none],
        ["s1", "get_attr", "p", [], none],
        ["s2", "call_module", "t.set_", [{"node": "s0"}], none],
        ["s3", "call_module", "t.copy_", [{"node": "s1"}], none],
    ]


def step(i: int, at: Places, dice: random.Random) -> list[Any]:
    """Draw a step of a graph."""
    nodes = {"node": dice.choice(["x", f"s{i - 1}", "nowhere"])}
    given = (
        nodes,
        at.canary,
        at.marker,
        True,
        9,
        1 << 40,
        [at.canary, True, 9],
        {"list": []},
        {"function": "os.system"},
    )
    more = ({"slice": [None, None, None]}, {"dtype": "float64"}, None)
    args = [dice.choice((*given, *more)) for _ in range(dice.randint(0, 3))]
    kwargs = dice.choice(({"dict": []}, {"dict": []}, {"dict": [["x", 1]]}, {}, None))
    kind = dice.choice(list(TARGETS))
    return [f"s{i}", kind, dice.choice(TARGETS[kind]), args, kwargs]


def states(at: Places, dice: random.Random) -> nn.Module:
    """Make a module whose state is not what its class has: parts are missing, odd, or of another kind."""
    model = net()
    victim = dice.choice([model, *model])
    state = vars(victim)
    for _ in range(dice.randint(1, 3)):
        key = dice.choice(
            [*state, "_modules", "_parameters", "_buffers", "forward", "__call__", "__class__", "_call_impl"]
        )
        choices = (
            None,
            {},
            [],
            7,
            "x",
            {"weight": 3},
            {"x": None},
            net(),
            torch.zeros(2),
            {0: model},
            copy.copy(state),
            -1,
            (1 << 40, 1),
            float("nan"),
        )
        if dice.random() < 0.3:
            state.pop(key, None)
        else:
            state[key] = dice.choice(choices)
    return model


@functools.cache
def whole(block: str) -> nn.Module:
    """Give a network with blocks whose history and graph are right."""
    recipe = {"surgeon": 1, "title": "t", "rules": [{"swap": block, "match": {"kernel": 3}}]}
    settings = ["rules[0].with.min_size=1", "rules[0].with.alpha=0.5"] if block == "octave" else []
    return surgeon.convert(net(), recipe, (2, 3, 16, 16), overrides=settings)


def histories(at: Places, dice: random.Random) -> nn.Module:
    """Spoil the history that a network carries with it."""
    model = copy.deepcopy(whole("acblock"))
    spoil(vars(model)["surgeon_provenance"], dice, dice.randint(1, 3))
    return model


def programs(at: Places, dice: random.Random) -> nn.Module:
    """Spoil the graph of a rewritten island."""
    model = copy.deepcopy(whole("octave"))
    islands = [module for module in model.modules() if isinstance(module, Rewritten)]
    spoil(vars(islands[0])["program"], dice, dice.randint(1, 3))
    return model


def storages(at: Places, dice: random.Random) -> bytes:
    """Make a zip whose persistent ids name storages that are not there, huge, or elsewhere."""
    ids: Sequence[Any] = (
        ("storage", Named("torch.FloatStorage"), "../../../etc/passwd", "cpu", 4),
        ("storage", Named("torch.FloatStorage"), at.secret, "cpu", 4),
        ("storage", Named("torch.FloatStorage"), "0", "cpu", 1 << 50),
        ("storage", Named("torch.FloatStorage"), "0", "cpu", -1),
        ("storage", Named("torch.FloatStorage"), "0", "cuda:0", 4),
        ("storage", Named("torch.FloatStorage"), "0", "x" * 9999, 4),
        ("storage", Named("os.system"), "0", "cpu", 4),
        ("storage", Named("torch.QInt8Storage"), "0", "cpu", 4),
        ("module", Named("hostile_payload.Evil"), "x.py", "import os"),
        ("module", Named("torch.nn.Linear"), at.secret, "x"),
        "x", 7, None, (), ("storage",), [Call("os.system", f"touch {at.marker}")],
    )  # fmt: skip

    class WithIds(Crafty):
        def persistent_id(self, value: Any) -> Any:
            return value.id if isinstance(value, _Id) else None

    out = io.BytesIO()
    held = _Id(dice.choice(ids))
    tensor = Call(
        "torch._utils._rebuild_tensor_v2",
        held,
        dice.choice((0, -1, 1 << 40)),
        (dice.choice((4, 1 << 40)),),
        (dice.choice((1, -1, 0)),),
        False,
        collections.OrderedDict(),
    )
    WithIds(out, 2).dump(dice.choice([{"weight": tensor}, tensor, held]))
    if dice.random() < 0.2:
        return out.getvalue()
    return in_archive(out.getvalue())


class _Id:
    def __init__(self, value: Any) -> None:
        self.id = value


GLOBALS = (
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ctorch.nn.modules.linear\nLinear\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"csurgeon.nn\nRewritten\n",
    b"ios\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93",
)
OPCODES = (
    *(b"(", b")", b"}", b"]", b"t", b"R", b"b", b"o", b"\x81", b"\x92", b"0", b"1", b"2", b"a", b"e", b"s"),
    *(
        b"u",
        b"Q",
        b"h\x00",
        b"q\x00",
        b"N",
        b"\x88",
        b"K\x07",
        b"\x8a\x01\x01",
        b"X\x01\x00\x00\x00x",
        b"J\xff\xff\xff\xff",
        b"G@\t!\xfbTD-\x18",
        b"\x82\x01",
        b"P0\n",
        b"\x94",
        b"\x97",
        b"B\xff\xff\xff\x7f",
    ),
)


def opcodes(at: Places, dice: random.Random) -> bytes:
    """Make a pickle of random opcodes, with names that matter among its arguments."""
    begin = b"\x80" + dice.choice((b"\x02", b"\x04", b"\x05"))
    parts = [dice.choice(GLOBALS if dice.random() < 0.3 else OPCODES) for _ in range(dice.randint(3, 40))]
    return in_archive(b"".join([begin, *parts, b"."]))


def in_archive(program: bytes) -> bytes:
    """Write a file of torch.save whose pickle is this one."""
    archive = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, archive)
    return rezipped(
        archive.getvalue(), lambda entries: [(n, program if n.endswith("data.pkl") else c) for n, c in entries]
    )


def of_state(kind: str, at: Places, dice: random.Random) -> bytes:
    """Write a file of one of the kinds that are drawn at random."""
    if kind in ("storages", "opcodes"):
        return {"storages": storages, "opcodes": opcodes}[kind](at, dice)
    makers = {"graphs": graph, "states": states, "histories": histories, "programs": programs}
    model = makers[kind](at, dice)
    out = io.BytesIO()
    torch.save(model, out)
    return out.getvalue()


DRAWN = ("graphs", "states", "histories", "programs", "storages", "opcodes")

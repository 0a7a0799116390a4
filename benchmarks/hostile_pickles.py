"""Files that try to run, read or write something, by every road that a pickle or a stored graph offers.

Each payload is harmless in itself: at most it writes a marker, or one word into a file made for that (the canary).
"""

from __future__ import annotations

import collections
import copy
import functools
import io
import pickle
import random
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from hostile_damage import rezipped, spoil
from hostile_files import net
from torch import nn

import surgeon
from surgeon.nn import Rewritten

MARK = "surgeon-hostile-marker"


@dataclass(frozen=True)
class Places:
    """Files that a payload would touch: `marker` must not come to be, `canary` not change, `secret` not be shown."""

    marker: str
    canary: str
    secret: str


class Named:
    """Stands for a name, which need not exist here: it is pickled as `module.name`."""

    def __init__(self, name: str) -> None:
        self.module, _, self.name = name.rpartition(":") if ":" in name else name.rpartition(".")

    def __call__(self) -> None:
        raise AssertionError("it is pickled, never called")


class Call:
    """Is pickled as a call of a named function, with the state that is given to the result."""

    def __init__(self, name: str, *args: Any, state: Any = None) -> None:
        self.call, self.args, self.state = Named(name), args, state

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.call, self.args) if self.state is None else (self.call, self.args, self.state)


class Crafty(pickle._Pickler):
    """Writes `Named` as the name that it stands for."""

    dispatch: ClassVar[Any] = dict(pickle._Pickler.dispatch)

    def _save_named(self, named: Named) -> None:
        self.write(pickle.GLOBAL + f"{named.module}\n{named.name}\n".encode())
        self.memoize(named)

    dispatch[Named] = _save_named


def _dump(value: Any, file: Any, protocol: int = 2) -> None:
    Crafty(file, protocol).dump(value)


crafty: Any = types.SimpleNamespace(Pickler=Crafty, dump=_dump, __name__="crafty")


# ---- what is tried --------------------------------------------------------------------------------------------------

Payload = Callable[[Places, random.Random], Any]
PAYLOADS: dict[str, Payload] = {}


def calls(name: str, *args: Any) -> None:
    """Name a payload that calls a function; MARKER, CANARY, SECRET and CODE stand for what is put in later."""

    def payload(at: Places, dice: random.Random) -> Any:
        words = {
            "MARKER": at.marker,
            "CANARY": at.canary,
            "SECRET": at.secret,
            "TOUCH": f"touch {at.marker}",
            "CODE": f"open({at.marker!r}, 'w').write({MARK!r})",
        }
        return Call(name, *[words.get(arg, arg) if isinstance(arg, str) else arg for arg in args])

    PAYLOADS[f"{name}({', '.join(map(str, args))})"[:60]] = payload


for _system in (
    "os.system",
    "posix.system",
    "nt.system",
    "subprocess.getoutput",
    "commands.getoutput",
    "os.popen",
    "pty.spawn",
):
    calls(_system, "TOUCH")
for _run in ("subprocess.Popen", "subprocess.run", "subprocess.call", "subprocess.check_output"):
    calls(_run, ["touch", "x"])
for _eval in (
    "builtins.eval",
    "builtins.exec",
    "__builtin__.eval",
    "__builtin__.execfile",
    "timeit.timeit",
    "cProfile.run",
    "profile.run",
    "pdb.run",
    "code.interact",
    "bdb:Bdb.run",
    "trace:Trace.run",
    "numpy.testing._private.utils.runstring",
    "torch.fx.graph_module._exec_with_source",
    "torch.fx._lazy_graph_module._make_graph_module",
    "torch._inductor.codecache:PyCodeCache.load",
    "torch.jit.frontend.get_jit_def",
    "torch.jit._script.script",
):
    calls(_eval, "CODE")
calls("builtins.compile", "CODE", "x", "exec")
calls("builtins.__import__", "hostile_payload")
calls("importlib.import_module", "hostile_payload")
calls("runpy.run_module", "hostile_payload")
calls("runpy.run_path", "hostile_payload.py")
calls("hostile_payload.main")
calls("hostile_payload.Evil")
calls("surgeon.hostile_payload.main")
calls("torch.nn.hostile_payload")
calls("builtins.open", "MARKER", "w")
calls("_io.open", "MARKER", "w")
calls("io.FileIO", "CANARY", "w")
calls("pathlib:Path.write_text", "CANARY", "x")
calls("pathlib:Path.read_text", "SECRET")
calls("os.open", "MARKER", 66)
calls("os.remove", "CANARY")
calls("os.rename", "CANARY", "MARKER")
calls("os._exit", 0)
calls("os.abort")
calls("builtins.exit", 0)
calls("sys.exit", 0)
calls("builtins.breakpoint")
calls("builtins.input", "SECRET")
calls("builtins.print", MARK)
calls("time.sleep", 3600)
calls("shutil.rmtree", "CANARY")
calls("shutil.copy", "SECRET", "MARKER")
calls("logging.FileHandler", "MARKER")
calls("tempfile.NamedTemporaryFile")
calls("sqlite3.connect", "MARKER")
calls("zipfile.ZipFile", "MARKER", "w")
calls("socket.create_connection", ("127.0.0.1", 9))
calls("urllib.request.urlopen", "http://127.0.0.1:9/")
calls("urllib.request.urlretrieve", "file:///etc/hostname", "MARKER")
calls("webbrowser.open", "http://127.0.0.1:9/")
calls("ctypes.CDLL", "libc.so.6")
calls("_ctypes.dlopen", "libc.so.6")
calls("torch.ops.load_library", "libc.so.6")
calls("torch.hub.load", "x/y", "z")
calls("torch.hub.load_state_dict_from_url", "http://127.0.0.1:9/")
calls("torch.hub.download_url_to_file", "file:///etc/hostname", "MARKER")
calls("torch.utils.model_zoo.load_url", "http://127.0.0.1:9/")
calls("torch.utils.cpp_extension.load_inline", "x", "CODE")
calls("torch.load", "SECRET")
calls("torch.save", [1], "MARKER")
calls("torch.serialization.load", "SECRET")
calls("torch.jit.load", "SECRET")
calls("torch.package.PackageImporter", "SECRET")
calls("torch.storage._load_from_bytes", b"cos\nsystem\n(S'true'\ntR.")
calls("torch:UntypedStorage.from_file", "CANARY", True, 9)
calls("torch:FloatStorage.from_file", "CANARY", True, 2)
calls("torch:FloatStorage._new_shared", 1 << 40)
calls("torch.UntypedStorage", 1 << 50)
calls("torch.from_file", "CANARY", True, 2)
calls("torch.randn", 1 << 50)
calls("torch._C._set_worker_pids", 1)
calls("torch.set_default_device", "cuda")
calls("torch.manual_seed", 5)
calls("torch._utils._rebuild_parameter", "x", True, {})
calls("torch._utils._rebuild_tensor_v2", "x", 0, (1 << 40,), (1,), False, {})
calls("torch._utils._rebuild_device_tensor_from_numpy", "x")
calls("torch._utils._set_obj_state", "x", {})
calls("torch._tensor._rebuild_from_type_v2", "x", "y", (), {})
calls("torch.multiprocessing.reductions.rebuild_storage_filename", "x", "CANARY", "x", 9)
calls("torch.distributed.init_process_group", "gloo")
calls("torchvision.io.write_file", "CANARY", "x")
calls("torchvision.io.read_file", "SECRET")
calls("torchvision.datasets.MNIST", "MARKER", True, None, None, True)
calls("torchvision.models.resnet18")
calls("torchvision.models.get_model", "resnet18")
calls("timm.models.load_checkpoint", "x", "SECRET")
calls("timm.models.create_model", "resnet10t", True)
calls("timm.create_model", "resnet10t", True)
calls("timm.task.distillation.DistillationTeacher", "resnet10t")
calls("timm.utils.checkpoint_saver.CheckpointSaver", "x")
calls("numpy.load", "SECRET", None, True)
calls("numpy.memmap", "CANARY", "uint8", "w+", 0, 9)
calls("numpy.fromfile", "SECRET")
calls("numpy.savetxt", "MARKER", [1])
calls("numpy.core.multiarray._reconstruct", "x", (0,), b"b")
calls("numpy._core.multiarray.scalar", "x", b"")
calls("surgeon.load", "SECRET")
calls("surgeon.api.load", "SECRET")
calls("surgeon.api.save", "x", "MARKER")
calls("surgeon.app.cli.main", ["recipes"])
calls("surgeon.files.atomic.write_atomically", "MARKER", "x")
calls("surgeon.files.architectures.Architecture", "os:system")
calls("surgeon.models.sandbox.ordinary")
calls("surgeon.nn.current_name", "os.system")
calls("surgeon.nn.os.system", "TOUCH")
calls("surgeon.nn.importlib.import_module", "hostile_payload")
calls("surgeon.nn:importlib.import_module", "hostile_payload")
calls("surgeon.nn:Stored.__setstate__", {})
calls("surgeon.graph.Rewritten", "x")
calls("surgeon.graph.os", "x")
calls("surgeon.spec.ConvSpec", 1)
calls("surgeon.pairs.PairNorm", 1 << 40)
calls("surgeon.demo.net.SmallResNet", 1 << 30)
calls("functools.partial", Named("os.system"), "TOUCH")
calls("functools.reduce", Named("os.system"), ["TOUCH"], "x")
calls("builtins.map", Named("os.system"), ["TOUCH"])
calls("builtins.getattr", Named("os.path"), "os")
calls("builtins.setattr", Named("torch.nn.Module"), "forward", Named("os.system"))
calls("builtins.type", "X", (), {})
calls("builtins.super", Named("torch.nn.Module"))
calls("builtins.bytearray", 1 << 45)
calls("operator.attrgetter", "__class__.__init__.__globals__")
calls("operator.methodcaller", "system", "TOUCH")
calls("_operator.itemgetter", 0)
calls("types.FunctionType", "x", {})
calls("types.CodeType", 0)
calls("types.SimpleNamespace")
calls("copyreg._reconstructor", Named("torch.nn.Module"), Named("builtins.object"), None)
calls("copyreg.__newobj__", Named("torch.nn.Linear"), 1 << 30, 1 << 30)
calls("copyreg.add_extension", "os", "system", 1)
calls("collections.defaultdict", Named("os.system"))
calls("collections.Counter", 1 << 40)
calls("weakref.ref", Named("torch.nn.Module"))
calls("pickle.loads", b"cos\nsystem\n(S'true'\ntR.")
calls("_pickle.loads", b"cos\nsystem\n(S'true'\ntR.")
calls("marshal.loads", b"x")
calls("dill.loads", b"x")
calls("joblib.load", "SECRET")
calls("torch.nn.Linear", 1 << 30, 1 << 30)
calls("torch.nn.Conv2d", 1 << 20, 1 << 20, 99)
calls("torch.nn:Module.__setstate__", "x")
calls("torch.nn:Module.load_state_dict", "x", {})
calls("torch.nn.modules.module.register_module_forward_hook", Named("os.system"))
calls("torch.nn.init.normal_", "x")
calls("torch.nn.functional.sys", "x")
calls("torch.nn.modules.module.torch.load", "SECRET")
calls("torch.nn:modules.module.torch.load", "SECRET")
calls("torch.nn.modules.module:torch.serialization.os.system", "TOUCH")
calls("torchvision.models.resnet.torch.hub.load", "x")
calls("torchvision:models.resnet.torch.hub.load", "x", "y")
calls("timm.models.resnet.torch", "x")
calls("timm.layers.torch.load", "SECRET")
calls("torch.fx.graph_module.reduce_graph_module", {"_code": "import os"}, "import os")
calls("torch.fx.GraphModule", {}, "x")
calls("torch.fx._symbolic_trace.symbolic_trace", "x")
calls("torch.jit.ScriptModule")
calls("torch.ao.quantization.quantize_fx.torch", "x")


# ---- where it is put ------------------------------------------------------------------------------------------------


def _module(evil: Any) -> nn.Module:
    model = net()
    vars(model)["evil"] = evil
    return model


def _hidden(name: str) -> Callable[[Any], nn.Module]:
    def put(evil: Any) -> nn.Module:
        model = net()
        vars(model[0])[name] = evil
        return model

    return put


def _hook(kind: str) -> Callable[[Any], nn.Module]:
    def put(evil: Any) -> nn.Module:
        model = net()
        vars(model[2])[kind] = collections.OrderedDict([(0, evil)])
        return model

    return put


def _child(evil: Any) -> nn.Module:
    model = net()
    model._modules["7"] = evil
    return model


def _history(evil: Any) -> nn.Module:
    model = net()
    vars(model)["surgeon_provenance"] = {"format": 2, "history": [evil]}
    return model


SPOTS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda evil: evil,
    "attribute of a module": _module,
    "forward of a conv": _hidden("forward"),
    "padding of a conv": _hidden("padding"),
    "a hook": _hook("_forward_hooks"),
    "a hook of the state dict": _hook("_state_dict_hooks"),
    "a child": _child,
    "history": _history,
    "value of a state dict": lambda evil: net().state_dict() | {"evil": evil},
    "beside a state dict": lambda evil: {"state_dict": net().state_dict(), "args": [evil]},
    "key of a dict": lambda evil: {(1, "x"): [evil], "model": net()},
}
FORMS = ("zip", "protocol 4", "legacy")


def pickled(evil: Any, spot: str, form: str) -> bytes:
    """Write a file with a payload in it."""
    value = SPOTS[spot](evil)
    out = io.BytesIO()
    if form == "bare":
        _dump(value, out)
    else:
        protocol = 4 if form == "protocol 4" else 2  # from 4 on, a name may have dots
        is_zip = form != "legacy"
        torch.save(value, out, pickle_module=crafty, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return out.getvalue()


# ---- stored graphs --------------------------------------------------------------------------------------------------

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
    names = [["x"]]
    steps: list[Any] = []
    for i in range(dice.randint(1, 4)):
        kind = dice.choice(list(TARGETS))
        args = [
            dice.choice(
                (
                    {"node": dice.choice(["x", f"s{i - 1}", "nowhere"])},
                    at.canary,
                    at.marker,
                    True,
                    9,
                    1 << 40,
                    [at.canary, True, 9],
                    {"list": []},
                    {"slice": [None, None, None]},
                    {"dtype": "float64"},
                    {"function": "os.system"},
                    None,
                )
            )
            for _ in range(dice.randint(0, 3))
        ]
        kwargs = dice.choice(({"dict": []}, {"dict": []}, {"dict": [["x", 1]]}, {}, None))
        steps.append([f"s{i}", kind, dice.choice(TARGETS[kind]), args, kwargs])
    program: Any = {
        "format": dice.choice((1, 2)),
        "inputs": names,
        "steps": steps,
        "output": {"node": dice.choice(("x", "s0"))},
    }
    if dice.random() < 0.25:
        program[dice.choice(list(program))] = dice.choice((None, [], {}, -1, 99, "x", [[["x"]]] * 3))
    vars(island).update(st=torch.zeros(4).storage() if dice.random() < 0.1 else 1, origin="x", program=program)
    model = net()
    model.insert(2, island)
    return model


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
    archive = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, archive)
    return rezipped(
        archive.getvalue(), lambda entries: [(n, out.getvalue() if n.endswith("data.pkl") else c) for n, c in entries]
    )


class _Id:
    def __init__(self, value: Any) -> None:
        self.id = value


def opcodes(at: Places, dice: random.Random) -> bytes:
    """Make a pickle of random opcodes, with names that matter among its arguments."""
    names = (
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
    simple = (
        b"(",
        b")",
        b"}",
        b"]",
        b"t",
        b"R",
        b"b",
        b"o",
        b"\x81",
        b"\x92",
        b"0",
        b"1",
        b"2",
        b"a",
        b"e",
        b"s",
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
    )
    body = (
        b"\x80"
        + dice.choice((b"\x02", b"\x04", b"\x05"))
        + b"".join(dice.choice(names if dice.random() < 0.3 else simple) for _ in range(dice.randint(3, 40)))
        + b"."
    )
    archive = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, archive)
    return rezipped(
        archive.getvalue(), lambda entries: [(n, body if n.endswith("data.pkl") else c) for n, c in entries]
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


def places(folder: Path) -> Places:
    return Places(str(folder / "marker"), str(folder / "canary"), str(folder / "secret"))

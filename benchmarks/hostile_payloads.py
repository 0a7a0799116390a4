"""What a pickle may try: a call of every function that runs, reads, writes, fetches, ends or fills something."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hostile_pickles import MARK, Call, Named, Places

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
for _line in (
    "",
    "open('x', 'w')\n",
    "__import__('os').system('touch x')\n",
):  # the one graph that is read, and near it
    _sum = "def forward(self, input):\n  s = self.spatial(input)\n  return s + self.pointwise(input)"
    _held = {"spatial": None, "pointwise": None}
    _state = {"_code": _line + _sum, "_parameters": {}, "_buffers": {}, "_modules": _held}
    calls("torch.fx.graph_module.reduce_graph_module", _state, f"{_line}import torch")
calls("torch.fx.GraphModule", {}, "x")
calls("torch.fx._symbolic_trace.symbolic_trace", "x")
calls("torch.jit.ScriptModule")
calls("torch.ao.quantization.quantize_fx.torch", "x")

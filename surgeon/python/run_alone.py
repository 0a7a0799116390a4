"""The program that runs a written network in a process of its own, where only torch can be imported.

It is given as text to a fresh interpreter, so it imports nothing of surgeon: `python -c PROGRAM FOLDER PATHS BLOCKED`.
"""

PROGRAM = """
import importlib.util, json, sys

folder, paths, blocked = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.path[:] = paths


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"the written network imports {name}")
        return None


sys.meta_path.insert(0, Blocked())
import torch

spec = importlib.util.spec_from_file_location("model", f"{folder}/model.py")
module = importlib.util.module_from_spec(spec)
sys.modules["model"] = module
spec.loader.exec_module(module)
torch.manual_seed(0)


def cast(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(cast(one, dtype) for one in value)
    return {key: cast(one, dtype) for key, one in value.items()} if isinstance(value, dict) else value


def leaves(value):
    if isinstance(value, (tuple, list)):
        return [leaf for one in value for leaf in leaves(one)]
    return [leaf for one in value.values() for leaf in leaves(one)] if isinstance(value, dict) else [value]


given = torch.load(f"{folder}/inputs.pt", weights_only=True)
made = {}
with torch.no_grad():
    for name in given["dtypes"]:
        dtype = getattr(torch, name)
        model = module.load()
        for one in (*model.parameters(), *model.buffers()):
            if one.is_floating_point() and name == "float64":
                one.data = one.data.to(dtype)
        made[name] = leaves(model(*cast(given["args"], dtype), **cast(given["kwargs"], dtype)))
torch.save(made, f"{folder}/outputs.pt")
"""

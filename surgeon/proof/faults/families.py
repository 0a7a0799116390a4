"""What kind of thing a layer is, in a word: an activation, a pooling, a norm."""

from __future__ import annotations

from torch import Tensor, nn

from surgeon.blocks import Operator

_FAMILIES = {
    "activation": "activation",
    "pooling": "pooling",
    "batchnorm": "norm",
    "normalization": "norm",
    "instancenorm": "norm",
    "upsampling": "interpolation",
    "dropout": "dropout",
    "conv": "conv",
    "linear": "layer",
}


def family(module: nn.Module) -> str:
    """Name what a module is, by where torch defines its class.

    >>> family(nn.ReLU6()), family(nn.MaxPool2d(2)), family(nn.Sequential())
    ('activation', 'pooling', 'layer')
    """
    if isinstance(getattr(module, "running_var", None), Tensor):
        return "norm"
    if isinstance(module, Operator):
        return "conv"
    for kind in type(module).__mro__:
        package, _, name = kind.__module__.rpartition(".")
        if package == "torch.nn.modules" and name in _FAMILIES:
            return _FAMILIES[name]
    return "layer"

"""Plain functions and values of torch and of Python that a file may hold without being admitted by the user.

A network may keep `torch.relu`, `F.leaky_relu`, `math.sqrt` or `int` as an attribute. None of the functions listed here
runs code that it is given, opens a file or reaches anything but its arguments. They are held, never called, while a
file is read. torch pickles its own functions as `getattr(torch._C._VariableFunctionsClass, 'relu')`; a file gets
neither of the two, but `function_of_torch`, which looks a name up in this list, and a mark.
"""

from __future__ import annotations

import datetime
import decimal
import math
import operator
from typing import Any

import torch

GETATTR = "builtins.getattr"
VARIABLE_FUNCTIONS = "torch._C._VariableFunctionsClass"

OF_TORCH = frozenset(
    """
    abs acos acosh add amax amin asin asinh atan atan2 atanh cat ceil celu celu_ clamp clamp_ clamp_max clamp_min clip
    clone cos cosh cosine_similarity div erf erfc exp exp2 expm1 flatten floor frac hardshrink log log10 log1p log2
    log_softmax logit max maximum mean min minimum mul multiply nan_to_num neg negative pixel_shuffle pixel_unshuffle
    positive pow prelu reciprocal relu relu_ round rrelu rrelu_ rsqrt selu selu_ sgn sigmoid sigmoid_ sign sin sinc sinh
    softmax sqrt square stack sub subtract sum tan tanh tanh_ threshold threshold_ true_divide trunc where
    """.split()  # noqa: SIM905 - a list of this length is read as text
)
_FUNCTIONAL = """
    _threshold adaptive_avg_pool2d alpha_dropout celu dropout dropout2d elu feature_alpha_dropout glu hardsigmoid
    hardswish hardtanh interpolate leaky_relu log_softmax mish normalize pad relu relu6 rrelu selu sigmoid silu softmax
    softmin softsign tanh tanhshrink
"""
_OF_C = "avg_pool2d elu_ gelu hardtanh_ leaky_relu_ log_sigmoid softplus softshrink"
_INIT = """
    constant_ dirac_ eye_ kaiming_normal_ kaiming_uniform_ normal_ ones_ orthogonal_ sparse_ trunc_normal_ uniform_
    xavier_normal_ xavier_uniform_ zeros_
"""
_MATH = """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees erf erfc exp expm1 fabs floor fmod hypot
    isfinite isinf isnan log log10 log1p log2 pow radians sin sinh sqrt tan tanh trunc
"""
_OPERATORS = "add mul neg sub truediv"

# Functions that are found by an import of torch, which has happened. Those of `init` write on the tensors that they are
# given, as a module does with its buffers.
NAMES = frozenset(
    {f"torch.nn.functional.{name}" for name in _FUNCTIONAL.split()}
    | {f"torch._C._nn.{name}" for name in _OF_C.split()}
    | {f"torch.nn.init.{name}" for name in _INIT.split()}
    | {"torch._C._special.special_expit"}
)


class _Mark:
    """What a file gets in place of the class that torch's functions hang on."""


def function_of_torch(_: object, name: str) -> Any:
    """Look up a function of torch that is listed; this is what `getattr` means in a file."""
    if name not in OF_TORCH:
        raise AttributeError(f"torch.{name} is no function that a file may hold")
    return getattr(torch, name)


# Kinds of values that are made by a call, with what `calls` says of their arguments.
VALUES: dict[str, object] = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
        *(decimal.Decimal, range, slice),
    )
}
STANDARD: dict[str, object] = {
    GETATTR: function_of_torch,
    VARIABLE_FUNCTIONS: _Mark,
    **VALUES,
    **{f"builtins.{kind.__name__}": kind for kind in (bool, dict, float, int, list, str, tuple)},
    **{f"builtins.{function.__name__}": function for function in (abs, len, max, min, round, sum)},
    **{f"math.{name}": getattr(math, name) for name in _MATH.split()},
    **{
        f"{module}.{name}": getattr(operator, name)
        for name in _OPERATORS.split()
        for module in ("operator", "_operator")
    },
}

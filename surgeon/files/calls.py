"""What a pickle may call, and with which arguments: an explicit list, since a file acts by calls only.

torch's weights-only reader calls whatever a file may name, with arguments of the file's choice: a class among them is
constructed, `bytearray` fills as much memory as it is told to, and a tensor is made of memory that is not its own.
An honest file calls these few functions, in the few forms that `torch.save` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from surgeon.blocks import sum_of_convs
from surgeon.files import arrays, functions
from surgeon.files.values import UNKNOWN, Value, bytes_per_number, fits

BLANK = "surgeon.nn.Rewritten"  # a class whose objects are made by calling it, since in memory they are of others

Rule = Callable[[Sequence[Value]], bool]
_ENCODINGS = ("latin1", "latin-1", "ascii")
_VIEW, _PARAMETER = "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter"
TYPES = {"torch.Tensor": Tensor, "torch.nn.parameter.Parameter": nn.Parameter}
_PATHS = tuple(f"pathlib.{pure}{kind}Path" for pure in ("Pure", "") for kind in ("Posix", "Windows"))


def is_listed(name: str) -> bool:
    """Whether a function may be called at all."""
    return name in RULES


def is_allowed(called: str, arguments: Value) -> bool:
    """Whether a file may call this function with these arguments."""
    rule = RULES.get(called)
    return rule is not None and arguments.is_tuple and rule(arguments.parts)


def is_tensor(value: Value) -> bool:
    """Whether a value is a tensor, a parameter among them."""
    return value.made_by in _TENSORS


def has_new_attributes(state: Value, kind: type) -> bool:
    """Whether a state is a dict of attributes that a class does not have itself."""
    if state.opcode != "EMPTY_DICT":
        return False
    keys = [key.literal for key in state.parts[::2]]
    return all(isinstance(key, str) and not hasattr(kind, key) for key in keys)


def _literals(*kinds: type | tuple[type, ...]) -> Rule:
    """Take as many plain values, or fewer, of these types."""

    def rule(args: Sequence[Value]) -> bool:
        return len(args) <= len(kinds) and all(
            isinstance(arg.literal, kind) for arg, kind in zip(args, kinds, strict=False)
        )

    return rule


def _is_encoded(args: Sequence[Value]) -> bool:
    """Take text that stands for bytes: (text, 'latin1')."""
    return len(args) == 2 and isinstance(args[0].literal, str) and args[1].literal in _ENCODINGS


def _holds_bytes(args: Sequence[Value]) -> bool:
    return not args or _is_encoded(args) or (len(args) == 1 and args[0].made_by == "_codecs.encode")


def _lists(args: Sequence[Value]) -> bool:
    """Take one list of what can be in a set; what the keys of dicts may be is asked of its members, too."""
    return not args or (len(args) == 1 and args[0].opcode == "EMPTY_LIST")


def _is_view(args: Sequence[Value]) -> bool:
    """Take a storage and where in it the tensor lies: (storage, offset, sizes, strides, …)."""
    if len(args) < 4 or args[0].opcode != "BINPERSID":
        return False
    storage_kind = args[0].parts[0].parts[1].name
    width = bytes_per_number(storage_kind) or 1
    return fits(args[0], args[1].literal, args[2].sizes, args[3].sizes, width) and all(map(_is_inert, args[4:]))


def _is_typed_view(args: Sequence[Value]) -> bool:
    """Take (storage, offset, sizes, strides, requires_grad, hooks, dtype, …)."""
    width = bytes_per_number(args[6].name) if len(args) > 6 else None
    is_view = width is not None and fits(args[0], args[1].literal, args[2].sizes, args[3].sizes, width)
    return is_view and all(map(_is_inert, [*args[4:6], *args[7:]]))


def _is_quantised_view(args: Sequence[Value]) -> bool:
    """Take (storage, offset, sizes, strides, (scheme, scale, zero point, …), requires_grad, hooks)."""
    if len(args) < 5 or not args[4].is_tuple:
        return False
    scheme = [part for part in args[4].parts if not part.name.startswith("torch.per_") and not is_tensor(part)]
    return all(part.literal is not UNKNOWN for part in scheme) and _is_view([*args[:4], *args[5:]])


def _is_parameter(args: Sequence[Value]) -> bool:
    """Take (tensor, requires_grad, hooks)."""
    return len(args) in (2, 3) and is_tensor(args[0]) and all(map(_is_inert, args[1:]))


def _is_parameter_with_state(args: Sequence[Value]) -> bool:
    """Take (tensor, requires_grad, hooks, attributes)."""
    return len(args) == 4 and _is_parameter(args[:3]) and has_new_attributes(args[3], nn.Parameter)


def _is_typed(args: Sequence[Value]) -> bool:
    """Take (function, type, its arguments, attributes), of functions that make plain tensors."""
    if len(args) != 4 or args[0].name not in _TENSORS or args[1].name not in TYPES:
        return False
    return is_allowed(args[0].name, args[2]) and has_new_attributes(args[3], TYPES[args[1].name])


def _is_sparse(args: Sequence[Value]) -> bool:
    """Take (layout, (tensor, …, sizes, …)); torch checks that they fit each other once everything is read."""
    is_pair = len(args) == 2 and args[0].made_by == "torch.serialization._get_layout" and args[1].is_tuple
    return is_pair and all(is_tensor(part) or _is_inert(part) or part.made_by == "torch.Size" for part in args[1].parts)


def _is_without_numbers(args: Sequence[Value]) -> bool:
    """Take (dtype, sizes, strides, requires_grad) of a tensor on the meta device."""
    return len(args) == 4 and bytes_per_number(args[0].name) is not None and all(map(_is_inert, args[1:]))


def _is_inert(value: Value) -> bool:
    """Whether something is a plain value, or an empty dict, as the hooks of a tensor are."""
    if value.made_by == "collections.OrderedDict":
        return len(value.parts) == 2  # nothing has been put into it
    return value.literal is not UNKNOWN or (value.opcode == "EMPTY_DICT" and _is_flags(value))


def _is_flags(value: Value) -> bool:
    return all(part.literal is not UNKNOWN for part in value.parts)


def _is_counted(args: Sequence[Value]) -> bool:
    return not args or (len(args) == 1 and args[0].opcode == "EMPTY_DICT" and _is_flags(args[0]))


def _is_named(args: Sequence[Value]) -> bool:
    """Take one function or class; that it is an admitted one is asked where it is taken."""
    return len(args) == 1 and (args[0].opcode == "GLOBAL" or args[0].made_by == functions.GETATTR)


def _is_function_of_torch(args: Sequence[Value]) -> bool:
    """Take (the class that torch's functions hang on, the name of one that is listed)."""
    is_pair = len(args) == 2 and args[0].name == functions.VARIABLE_FUNCTIONS
    return is_pair and isinstance(args[1].literal, str) and args[1].literal in functions.OF_TORCH


def _is_date(args: Sequence[Value]) -> bool:
    """Take bytes, and perhaps a time zone."""
    is_zoned = len(args) == 2 and args[1].made_by == "datetime.timezone"
    return (len(args) == 1 or is_zoned) and args[0].made_by == "_codecs.encode"


def _is_zone(args: Sequence[Value]) -> bool:
    """Take how far a time zone is from UTC, and perhaps its name."""
    is_named = len(args) == 2 and isinstance(args[1].literal, str)
    return (len(args) == 1 or is_named) and args[0].made_by == "datetime.timedelta"


def _is_sum(args: Sequence[Value]) -> bool:
    """Take (state, imports) of a GraphModule whose source is one that surgeon knows; see `sum_of_convs`."""
    if len(args) != 2 or args[0].opcode != "EMPTY_DICT":
        return False
    names = [key.literal for key in args[0].parts[::2]]
    state = dict(zip(names, args[0].parts[1::2], strict=True))
    if len(state) != len(names) or not state.keys() <= sum_of_convs.OF_MODULES | sum_of_convs.OF_GRAPHS:
        return False
    code, *held = (state.get(name) for name in (sum_of_convs.CODE, "_parameters", "_buffers", "_modules"))
    if code is None or any(one is None or one.opcode != "EMPTY_DICT" for one in held):
        return False
    parameters, buffers, modules = ([key.literal for key in one.parts[::2]] for one in held if one is not None)
    unread = [value for name, value in state.items() if name in sum_of_convs.OF_GRAPHS]
    is_plain = all(map(_is_plain, unread)) and all(len(set(one)) == len(one) for one in (modules, parameters))
    held_names = map(frozenset, (buffers, modules, parameters))
    return is_plain and sum_of_convs.knows(code.literal, args[1].literal, *held_names)


def _is_plain(value: Value) -> bool:
    """Whether something holds only numbers, text and containers of them, or is the tracer that torch notes."""
    return all(
        part.literal is not UNKNOWN or part.name == sum_of_convs.TRACER or part.opcode in ("EMPTY_DICT", "EMPTY_LIST")
        for part in value.all_parts()
    )


def _is_number(args: Sequence[Value]) -> bool:
    """Take the digits of a decimal number; with more of them, what is computed with it would take long."""
    return len(args) == 1 and isinstance(args[0].literal, str) and len(args[0].literal) <= 100


RULES: dict[str, Rule] = {
    BLANK: lambda args: not args,
    "collections.OrderedDict": lambda args: not args,
    "collections.Counter": _is_counted,
    "types.SimpleNamespace": lambda args: not args,
    "functools.partial": _is_named,
    functions.GETATTR: _is_function_of_torch,
    **{f"datetime.{kind}": _is_date for kind in ("date", "datetime", "time")},
    "datetime.timedelta": _literals(int, int, int),
    "datetime.timezone": _is_zone,
    "decimal.Decimal": _is_number,
    "builtins.range": _literals(int, int, int),
    "builtins.slice": _literals((int, type(None)), (int, type(None)), (int, type(None))),
    "torch.Size": lambda args: len(args) == 1 and args[0].sizes is not None,
    "torch.device": lambda args: bool(args) and _literals(str, int)(args),
    "torch.serialization._get_layout": lambda args: bool(args) and _literals(str)(args),
    "_codecs.encode": _is_encoded,
    "builtins.bytearray": _holds_bytes,
    "builtins.bytes": lambda args: not args,
    "builtins.set": _lists,
    "builtins.frozenset": _lists,
    "builtins.complex": _literals((int, float), (int, float)),
    **dict.fromkeys(_PATHS, lambda args: all(isinstance(arg.literal, str) for arg in args)),
    _VIEW: _is_view,
    f"{_VIEW}_v2": _is_view,
    f"{_VIEW}_v3": _is_typed_view,
    "torch._utils._rebuild_qtensor": _is_quantised_view,
    "torch._utils._rebuild_sparse_tensor": _is_sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _is_without_numbers,
    _PARAMETER: _is_parameter,
    f"{_PARAMETER}_with_state": _is_parameter_with_state,
    "torch._tensor._rebuild_from_type_v2": _is_typed,
    sum_of_convs.REDUCE: _is_sum,
    **arrays.RULES,
}
_TENSORS = frozenset(
    name for name in RULES if name.startswith("torch._utils._rebuild") or name == "torch._tensor._rebuild_from_type_v2"
)

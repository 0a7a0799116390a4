"""What was done to a model: a list of steps that the model carries with it.

For every operation it holds the hash of all tensors before and after, the plan with the recipe's text, and versions. It
is plain data in an attribute of the model, so it survives training and the user's own torch.save; a file of tensors
holds it in its manifest. It may come from a file: nothing in it is trusted before it has been checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from surgeon._version import __version__
from surgeon.errors import StoreError
from surgeon.models.call import Inputs, recall
from surgeon.surgery.plan import Plan

_ATTRIBUTE = "surgeon_provenance"
FORMAT = 3  # of histories and manifests; 1 and 2 are read as well, and 2 is written where nothing was fitted
RULES = 3  # by which `fuse` folds; before 3, nothing went into the calls of octave convs; before 2, HetConvs stayed
_LATER = (
    "rules",
    "keep_norms",
    "returned",
    "branches",
    "norms",
    "within",
    "before",
    "dtype",
    "forms",
)  # fields that older releases do not know, so that they read all that they can
_MOST_STEPS = 64  # that are done again, when a file asks for it


@dataclass(frozen=True, slots=True, repr=False)
class Operation:
    """One thing that was done to a model: `plan` is what convert carried out, `measured` what it measured.

    `parent` and `result` hash all tensors before and after.

    A field that is added later needs a default, so that the steps in older files can be read.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    operation: Literal["convert", "fit", "fuse"]
    parent: str
    result: str
    plan: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    dense: bool = False  # fuse: blocks that cost less than their conv were folded too
    rules: int = 1  # fuse: the rules of folding that it followed
    keep_norms: bool = False  # fuse: every block became the conv and the norm that it had been made of
    returned: tuple[str, ...] = ()  # fuse: the blocks that did so because the network around them folds itself
    branches: bool = False  # fuse: linear sub-graphs became one conv each
    norms: bool = False  # fuse: norms were folded into the convs beside them
    within: tuple[str, ...] = ()  # fuse: the modules in whose graphs this was done, '' for the model itself
    before: tuple[str, ...] = ()  # fuse: the norms that were folded into the convs before them, under their names
    dtype: Literal["float16", "bfloat16"] | None = None  # fuse: what the network was cast to in the end
    forms: tuple[tuple[str, str], ...] = ()  # fuse: blocks that were deployed in another form than the plain one
    measured: dict[str, Any] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        """Say in one line what was done: a plan and its recipe would fill pages."""
        facts = [f"{name}=True" for name in ("dense", "keep_norms", "branches", "norms") if getattr(self, name)]
        if self.plan is not None:
            convs, recipe = self.plan.get("convs", ()), self.plan.get("recipe", {})
            swapped = sum("swap" in entry for entry in convs)
            facts.append(f"plan=<{recipe.get('name')}: {swapped} of {len(convs)} convs swapped>")
        if self.forms:
            facts.append(f"forms=<{len(self.forms)} blocks>")
        if self.operation == "fit":
            steps = list(self.measured.get("network", {}).items())
            facts.append(f"images={self.measured.get('images')}")
            facts += [f"{name}={_rounded(figures)}" for name, figures in steps]
        hashes = f"parent={self.parent[:8]!r}…, result={self.result[:8]!r}…"
        return f"Operation({', '.join([repr(self.operation), *facts, hashes])})"


def _rounded(figures: Mapping[str, float]) -> str:
    """Write figures of a network with three digits."""
    return "<" + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()) + ">"


def versions() -> dict[str, str]:
    """List the versions of surgeon, torch and Python that run now."""
    return {"surgeon": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def history(model: nn.Module) -> tuple[Operation, ...]:
    """Say what surgeon has done to a model, oldest first."""
    return steps_in(as_data(model))


def record_(model: nn.Module, step: Operation) -> None:
    """Add an operation to a model's history."""
    set_history_(model, (*history(model), step))


def set_history_(model: nn.Module, steps: Sequence[Operation]) -> None:
    """Give a model another history."""
    stored = {"format": format_of(steps), "history": [_stored(step) for step in steps]}
    setattr(model, _ATTRIBUTE, stored)


def format_of(steps: Sequence[Operation]) -> int:
    """The lowest format that holds these steps, so that earlier releases read what they can."""
    return FORMAT if any(step.operation == "fit" for step in steps) else 2


def _stored(step: Operation) -> dict[str, Any]:
    """Give an operation as plain data; a field that was added later is left out where it says nothing."""
    defaults = {one.name: one.default for one in fields(step) if one.name in _LATER}
    return {name: value for name, value in asdict(step).items() if name not in defaults or value != defaults[name]}


def as_data(model: nn.Module) -> dict[str, Any]:
    """Give a model's history as it is stored."""
    stored: dict[str, Any] = vars(model).get(_ATTRIBUTE, {"format": 2, "history": []})
    return stored


def steps_in(data: Any, where: str = f"the attribute {_ATTRIBUTE} of the model") -> tuple[Operation, ...]:
    """Read a history as it is stored; `where` that is, for messages.

    Raises:
        StoreError: it is not a history, or a later version has written it.
    """
    try:
        check_format(data, where)
        if len(data["history"]) > _MOST_STEPS:
            raise foreign(where)
        steps = _HISTORY.validate_python(data["history"])
        for step in steps:
            if (step.plan is None) != (step.operation != "convert") or step.rules < 1:
                raise foreign(where)
            if step.rules > RULES:
                raise _later(where)
            if step.plan is not None:
                Plan.model_validate(step.plan)
    except ValidationError as error:
        raise (_later(where) if _only_adds(error) else foreign(where)) from error
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise foreign(where) from error
    return steps


def check_format(data: Any, where: str) -> None:
    """Refuse a history or manifest whose format number is of a later version, or is no valid number."""
    number = data.get("format", 1)
    if type(number) is not int or number < 1:
        raise foreign(where)
    if number > FORMAT:
        raise _later(where)


def foreign(where: str) -> StoreError:
    """Make the error for data that is not a history or a manifest."""
    start = "Delete it, or save" if where.startswith("the attribute") else "Save"
    return StoreError(
        f"{where} is not a history that surgeon {__version__} can read",
        todo=f"{start} the weights alone, and name their network with --arch.",
    )


def _later(where: str) -> StoreError:
    return StoreError(
        f"{where} was written by a later version of surgeon than {__version__}",
        todo="Upgrade: pip install -U conv-surgeon.",
    )


def _only_adds(error: ValidationError) -> bool:
    """Whether fields that this version does not know are all that is wrong with a history."""
    return all(fault["type"] in ("unexpected_keyword_argument", "extra_forbidden") for fault in error.errors())


def planned_inputs(steps: Sequence[Operation]) -> Inputs | None:
    """Give the inputs of the last plan that was carried out, still to be drawn."""
    records = (step.plan.get("input") for step in reversed(steps) if step.plan is not None)
    return recall(next(records, None))


def content_hash(model: nn.Module) -> str:
    """Hash names, dtypes, shapes and bytes of all stored tensors."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # a module's own extra state
            digest.update(f"{key} {value!r}\n".encode(errors="backslashreplace"))
            continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode(errors="backslashreplace"))
        if not value.is_meta:
            _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Hash the bytes of a tensor in memory."""
    tensor = tensor.detach().cpu().contiguous()
    if size := tensor.numel() * tensor.element_size():
        digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))


_HISTORY = TypeAdapter(tuple[Operation, ...])

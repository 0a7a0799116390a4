"""The forms of a plan: for every conv of a network what will be done to it, or the reason why nothing is.

A plan is a file too (YAML or JSON): it can be printed, pruned by hand, and applied exactly. `make` makes one, `check`
asks whether it fits a network, `foresee` says what it leads to, and `operate` carries it out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, GetCoreSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema
from rich.console import RenderableType

from surgeon.analysis.sites import Site
from surgeon.blocks import Block, BlockOptions, registry
from surgeon.blocks.two_streams import TwoStreamBlock
from surgeon.conv.spec import ConvSpec
from surgeon.display.plan import plan_view
from surgeon.display.shown import Shown
from surgeon.errors import CaptureError, Fault, RecipeError
from surgeon.models import call as calls
from surgeon.models.call import Inputs
from surgeon.recipes import forms
from surgeon.recipes import marks as yamlmarks
from surgeon.recipes.forms import Form
from surgeon.recipes.marks import quoted
from surgeon.recipes.recipe import text_of
from surgeon.surgery import deployed, promises
from surgeon.surgery.permute import OrderKept, Permuted
from surgeon.surgery.promises import Measured

_HOW_TO_PLAN = "`surgeon plan MODEL --recipe acnet -o plan.yaml` writes one that works."


_Whole = Annotated[int, Field(strict=True)]  # `true` and '1' are no numbers
_Count = Annotated[int, Field(strict=True, ge=0)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Change(Form):
    """A number before and after; for a conv over all its calls, with its norm where the block takes that over."""

    before: _Count
    after: _Count


class FunctionalStep(Form):
    """A functional convolution that becomes a module: its step in an island's graph, and its parameters there."""

    island: str
    step: str
    spec: ConvSpec
    weight: str
    bias: str = ""

    @classmethod
    def of(cls, site: Site) -> Self | None:
        """Describe the functional convolution at a site; None where the site is a module."""
        one = site.functional
        if one is None or one.spec is None:
            return None
        return cls(island=one.island, step=one.step, spec=one.spec, weight=one.weight, bias=one.bias)


class FieldsOrWords:
    """How a plan describes a conv: by its fields, without those at their defaults, or in words.

    Words are the geometry in format 1, and in every format the class of a conv that is not a Conv2d.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            lambda value, fields: value if isinstance(value, str) else fields(value),
            handler.generate_schema(ConvSpec),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value if isinstance(value, str) else value.to_dict()
            ),
        )


class Entry(Form):
    """What happens to one conv: it is swapped (`swap`), or it is not (`skip`, a reason)."""

    path: str
    aliases: tuple[str, ...] = ()  # further names of the same module
    spec: Annotated[ConvSpec | str, FieldsOrWords()] = Field(alias="conv")  # a plan fits only a conv that has the same
    functional: FunctionalStep | None = None
    calls: _Count | None = None
    size: tuple[_Count, _Count] | None = None  # of the input
    rule: str | None = None
    swap: str | None = None
    options: dict[str, Any] = Field(default_factory=dict, alias="with")
    takes_norm: tuple[str, ...] = ()  # all names of the norm that the block takes over
    note: str | None = None
    skip: str | None = None
    params: Change | None = None
    macs: Change | None = None
    activations: Change | None = None  # bytes that are written
    ideal_macs: _Count | None = (
        None  # after the swap, as the block's paper counts them, where that is less than executed
    )
    loses: dict[str, float] | None = None  # by setting: the outputs' error with it alone; see `sensitivity`
    kept_energy: dict[str, float] | None = None  # for a block that thins a conv out, by each way of doing so

    @field_validator("swap")
    @classmethod
    def _is_a_block(cls, name: str | None) -> str | None:
        if name is not None and name not in registry():
            near = forms.did_you_mean(name, registry())
            raise ValueError(f"no block called {quoted(name)}; there are {', '.join(registry())}{near}")
        return name

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if self.swap is not None and self.skip is not None:
            raise ValueError("has both swap and skip; delete one")
        if self.swap is None and self.skip is None:
            raise ValueError("needs either swap (a block) or skip (a reason)")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    @property
    def conv(self) -> str:
        """Its geometry in words."""
        return str(self.spec)

    @property
    def block(self) -> type[Block]:
        assert self.swap is not None
        return registry()[self.swap]

    @property
    def block_options(self) -> BlockOptions:
        return self.block.Options.model_validate(self.options)

    @property
    def folded(self) -> deployed.Folded | None:
        """The plain conv that `fuse` makes of the block; None where it makes none."""
        if self.swap is None or isinstance(self.spec, str):
            return None
        return deployed.folded(self.block, self.spec, self.block_options, with_norm=bool(self.takes_norm))

    @property
    def keeps_function(self) -> bool:
        return self.swap is None or self.block.keeps_function(self.block_options)


class _Dumper(yamlmarks.Dumper):
    """Writes convs and lists of numbers on one line, and texts of several lines as blocks: users edit them."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style="c_in" in mapping or "axis" in mapping or flow_style)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        is_flat = not any(isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=is_flat or flow_style)

    def represent_text(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)


class RecipeText(Form):
    """The recipe that a plan was made from, as it was written, and what `--set` changed in it."""

    name: str
    text: str
    overrides: tuple[str, ...] = ()


class Total(Form):
    """Costs of the whole model; MACs and bytes of activations are for one run with the plan's input."""

    params: Change
    macs: Change | None = None
    activations: Change | None = None
    ideal_macs: _Count | None = None


class Timed(Form):
    """How long one run takes: of the network as it is, and of the converted one, both fused as they are deployed."""

    before: _Positive  # seconds, the median of all rounds
    after: _Positive
    ratio: _Positive  # the median of the ratios within a round
    quartiles: tuple[_Positive, _Positive]  # of these ratios
    is_reliable: bool  # whether the quartiles are close together
    rounds: _Count
    device: str
    threads: _Count


class Budgeted(Form):
    """What was measured to choose a plan: relative errors of the outputs, on images that were held back."""

    asked: str | None = None  # the budget, as the user wrote it
    predicted: Annotated[float, Field(ge=0)]  # from the errors of single sites
    measured: Annotated[float, Field(ge=0)] | None = None  # of the network, fitted on a part of the images
    images: _Count
    held_back: _Count


@dataclass(frozen=True, slots=True)
class Gained:
    """What the whole model costs as it is, and once it is converted and fused, as it is deployed."""

    params: Change
    macs: Change | None
    is_folded: bool  # whether `fuse` makes something cheaper than what is trained


class LowPassed(Form):
    """A map that is low-passed where it is added to an octave map; without this entry there is a seam instead."""

    island: str
    step: str
    operand: str
    said: str = ""  # both, in the user's words


class SeamLeft(Form):
    """A place where two streams have to be joined or split, and why; `local`: an island that stays conv by conv."""

    island: str
    kind: Literal["join", "split", "local"]
    reason: str


class Plan(Shown, Form):
    """What will be done to one model, conv by conv."""

    format: Literal[1, 2] = Field(alias="surgeon-plan")
    model: str  # fingerprint of the architecture
    input: tuple[tuple[_Count, ...], ...] | str | None = (
        None  # shapes of positional tensors, or text as --input takes it
    )
    seed: _Whole = 0
    recipe: RecipeText
    total: Total
    baked: tuple[str, ...] = ()  # convs whose computed tensors are made permanent before they are swapped
    permuted: tuple[Permuted, ...] = ()  # channels that change places before convs are swapped, exactly
    unpermuted: tuple[OrderKept, ...] = ()
    saves_little: str | None = None  # why, of a plan that was meant to save multiply-adds
    rewritten: tuple[str, ...] = ()  # islands that become graphs, so that octave streams go from conv to conv
    low_passed: tuple[LowPassed, ...] = ()
    seams: tuple[SeamLeft, ...] = ()
    time: Timed | None = None  # where it was measured
    budget: Budgeted | None = None  # where it was chosen by what sites lose
    convs: tuple[Entry, ...]

    @field_validator("format", mode="before")
    @classmethod
    def _is_known(cls, value: object) -> object:
        if isinstance(value, bool | float):
            raise ValueError(f"{quoted(value)} is not one of 1 or 2")
        if type(value) is int and value > 2:
            raise ValueError(f"format {value} was written by a later version of surgeon: pip install -U conv-surgeon")
        return value

    @field_validator("input")
    @classmethod
    def _is_readable(cls, value: tuple[tuple[int, ...], ...] | str | None) -> tuple[tuple[int, ...], ...] | str | None:
        try:
            calls.recall(value)
        except CaptureError as error:
            raise ValueError(error.problem) from error
        return value

    @property
    def inputs(self) -> Inputs | None:
        """The call that the numbers are measured with; its tensors are still to be drawn."""
        return calls.recall(self.input)

    @property
    def stream_blocks(self) -> tuple[str, ...]:
        """The names of the blocks that hand two streams on."""
        return tuple(sorted({str(entry.swap) for entry in self.swaps if issubclass(entry.block, TwoStreamBlock)}))

    @property
    def has_streams(self) -> bool:
        return bool(self.stream_blocks)

    @property
    def swaps(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.convs if entry.swap is not None)

    @property
    def keeps_function(self) -> bool:
        return all(entry.keeps_function for entry in self.convs)

    @property
    def gained(self) -> Gained:
        """Say what the model costs as it is, and once it is converted and fused."""
        saved_params = saved_macs = 0
        for entry in self.swaps:
            made = entry.folded
            if made is not None and entry.params is not None:
                saved_params += entry.params.after - made.params
            if made is not None and entry.macs is not None:
                saved_macs += entry.macs.after - round(made.share * entry.macs.before)
        params, macs = self.total.params, self.total.macs
        return Gained(
            params=Change(before=params.before, after=max(0, params.after - saved_params)),
            macs=macs and Change(before=macs.before, after=max(0, macs.after - saved_macs)),
            is_folded=saved_params > 0 or saved_macs > 0,
        )

    @property
    def broken_promises(self) -> dict[str, tuple[Measured, ...]]:
        """Where blocks of this plan, meant to save time, were measured to cost some instead."""
        return promises.broken(sorted({str(entry.swap) for entry in self.swaps if entry.block.is_cheaper}))

    def __rich__(self) -> RenderableType:
        return plan_view(self)

    def to_dict(self) -> dict[str, Any]:
        """Give plain data, without defaults."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def dump(self, *, as_json: bool = False) -> str:
        """Write the plan as YAML, or as JSON; `read` reads both."""
        if as_json:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
            return "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def read(source: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        RecipeError: the file is wrong; all errors are reported at once, each with file:line:column.
    """
    path = Path(source)
    return parse(text_of(path), path.name)


def parse(text: str, name: str) -> Plan:
    """Read a plan from text; `name` is the file name that error positions show."""
    marked = yamlmarks.read(text, name, todo=_HOW_TO_PLAN)
    try:
        return forms.validate(Plan, marked, todo=_HOW_TO_PLAN)
    except RecipeError as error:
        raise RecipeError([_with_conv(fault, marked.data) for fault in error.faults], todo=error.todo) from error


def _with_conv(fault: Fault, data: Any) -> Fault:
    """Name the conv beside the number of its entry."""
    entry = re.match(r"convs\[(\d+)\]", fault.path)
    found = data["convs"][int(entry[1])] if entry else None
    path = found.get("path") if isinstance(found, dict) else None
    if entry is None or not isinstance(path, str):
        return fault
    return replace(fault, path=f"{entry[0]} ({path}){fault.path[entry.end() :]}")

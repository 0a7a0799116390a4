"""What a model gave, in a file: with it another model is compared where this one is not at hand.

A `.safetensors` file whose header holds a manifest, JSON under `surgeon.outputs`, and a checksum of all:

    input.I.D.K     tensor K of draw D of input I, if it is kept; otherwise it is drawn again, and its hash compared
    exact.I.D.K     tensor K of the output in float64 (in the model's own dtype if it runs in no other)
    own.I.D.K       the same in the model's own dtype
    site.I.J        the output of module J in float64, or a sketch of it (see `sketch`), if sites were asked for

A file comes from somewhere: it is validated before anything in it is used, and what is drawn for it has a limit.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from surgeon.errors import CaptureError, StoreError, VerifyError
from surgeon.files.formats.safetensors import read_tensors, write_tensors
from surgeon.models.call import Inputs, recall
from surgeon.proof.nested import built, flattened

FORMAT = 1
_KEY = "surgeon.outputs"
_MOST_DRAWN = 2**24  # numbers: a file asks for no more; a larger input is kept
_DTYPES = {
    str(one).removeprefix("torch."): one for one in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_MAKE = "Make one: surgeon verify A --save-outputs FILE.safetensors"
_AGAIN = "Save it again: surgeon verify A --save-outputs FILE"

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0)]
Far = Annotated[float, Field(ge=0)]
Shape = list[Count]
DType = Literal["float64", "float32", "float16", "bfloat16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Noise(_Strict):
    """What moving all weights by a few units in their last place does to one output."""

    l2: Far
    flips: Count


class Site(_Strict):
    """A module whose output is kept: its class, its own tensors, and what moving the weights does to its output."""

    path: Name
    kind: Name
    tensors: dict[Name, Shape]
    numbers: Count  # that are kept
    noise: Far  # relative L2


class Given(_Strict):
    """One input, and what came of it."""

    label: Name
    record: list[Shape] | str | None  # from which it is drawn again; None if it is kept
    call: list[Any] | None  # the structure of an input that is kept
    hashes: list[list[Hash]]  # of its tensors: of the input itself, and of every further one of its kind
    out: list[Any]  # the structure of an output
    noise: list[Noise]  # of every output
    flat: list[Count]  # outputs that do not move when the input does
    sites: list[Site]


class Manifest(_Strict):
    """What the header of the file says."""

    format: Literal[1]
    model: Name
    dtype: DType
    exact: DType
    seed: Count
    kinds: list[Name]  # the classes of all modules
    tensors: dict[Name, Hash]  # stored tensor → hash of its dtype, shape and bytes
    content: Hash  # of them all, as histories write it
    history: Any
    versions: dict[Name, Name]
    inputs: Annotated[list[Given], Field(min_length=1, max_length=1000)]


@dataclass(slots=True)
class Reference:
    """A manifest and the tensors that it speaks of."""

    manifest: Manifest
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.manifest.dtype]

    @property
    def exact(self) -> torch.dtype:
        return _DTYPES[self.manifest.exact]

    def draws(self, i: int) -> list[Inputs]:
        """Give an input and the further ones of its kind, as they were.

        Raises:
            StoreError: torch draws other numbers here; or this is no such file.
        """
        given = self.manifest.inputs[i]
        if given.record is None:
            draws = [self._kept(i, d, given) for d in range(len(given.hashes))]
        else:
            first = self._drawn(given)
            draws = [first, *first.alike(len(given.hashes) - 1, self.manifest.seed)]
        if [_hashes(draw) for draw in draws] != given.hashes:
            if given.record is None:
                raise _foreign(f"the input {given.label} is not the one that its hash was made of")
            raise StoreError(
                f"the input {given.label} is drawn again from its seed, and torch {torch.__version__} draws other "
                f"numbers here than torch {self.manifest.versions.get('torch', 'there')} did",
                todo="Save the outputs with --store-inputs there, so that the file brings its inputs.",
            )
        return draws

    def outputs(self, i: int, kind: Literal["exact", "own"]) -> list[Any]:
        """Give what came of every draw of an input."""
        kind = "own" if self.exact == self.dtype else kind
        given = self.manifest.inputs[i]
        found = []
        for d in range(len(given.hashes)):
            found.append(built(given.out, self._row(f"{kind}.{i}.{d}")))
        return found

    def _drawn(self, given: Given) -> Inputs:
        record = given.record if isinstance(given.record, str) else [tuple(shape) for shape in given.record or ()]
        try:
            recalled = recall(record)
            if recalled is None or recalled.numel * len(given.hashes) > _MOST_DRAWN:
                raise _foreign(f"the input {given.label} is too large")
            return recalled.drawn(self.manifest.seed)
        except CaptureError as error:
            raise _foreign(f"the input {given.label} cannot be drawn") from error

    def _kept(self, i: int, d: int, given: Given) -> Inputs:
        call = built(given.call, self._row(f"input.{i}.{d}"))
        match call:
            case (tuple() as args, dict() as named):
                return Inputs(args, named)
        raise _foreign("an input is no call")

    def _row(self, prefix: str) -> list[Tensor]:
        found: list[Tensor] = []
        while (one := self.tensors.get(f"{prefix}.{len(found)}")) is not None:
            found.append(one)
        return found


def drawn_again(inputs: Inputs, hashes: list[list[str]], seed: int) -> list[Shape] | str | None:
    """Give the record from which an input is drawn again, bit by bit; None if it cannot be, and has to be kept."""
    record = inputs.record
    recalled = recall(record)
    if recalled is None or recalled.numel > _MOST_DRAWN or _hashes(recalled.drawn(seed)) != hashes[0]:
        return None
    return record if isinstance(record, str) else [list(shape) for shape in record or ()]


def _hashes(inputs: Inputs) -> list[str]:
    return [hash_of(one) for one in inputs.tensors]


def keep(held: dict[str, Tensor], prefix: str, value: Any) -> list[Any]:
    """Add the tensors of a value under such names; its structure."""
    tensors: list[Tensor] = []
    described = flattened(value, tensors)
    held |= {f"{prefix}.{k}": one.detach().cpu().clone().contiguous() for k, one in enumerate(tensors)}
    return described


def write(reference: Reference, path: Path) -> None:
    """Write the file; the caller sees to it that it takes its place in one step."""
    text = json.dumps(reference.manifest.model_dump(mode="json"))
    try:
        write_tensors(reference.tensors, {_KEY: text}, path)
    except UnicodeEncodeError as error:
        raise VerifyError("a name in the model holds half a character", todo="Rename it.") from error


def read(path: Path) -> Reference:
    """Read such a file.

    Raises:
        ModelError: it is damaged. StoreError: it is another one, or a later release has written it.
    """
    if not path.is_file():
        raise StoreError(f"there is no file of outputs {path}", todo=_MAKE)
    if path.suffix != ".safetensors":
        raise StoreError(f"{path} is no file of outputs, which end in .safetensors", todo=_MAKE)
    tensors, header = read_tensors(path)
    if _KEY not in header:
        raise StoreError(f"{path} holds no outputs that `verify --save-outputs` wrote", todo=_AGAIN)
    try:
        data = json.loads(header[_KEY])
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
            raise StoreError(f"{path} was written by a later surgeon", todo="Upgrade surgeon, or save it again here.")
        reference = Reference(Manifest.model_validate(data), tensors)
    except (ValidationError, ValueError, RecursionError) as error:
        raise _foreign(f"the manifest in {path} is not one") from error
    if bad := next(_not_whole(reference), None):
        raise _foreign(f"{path}: {bad}")
    return reference


def _not_whole(reference: Reference) -> Iterator[str]:
    """Say what the manifest promises and the file does not hold."""
    kinds = ("own",) if reference.exact == reference.dtype else ("own", "exact")
    wanted = {kind: reference.dtype if kind == "own" else reference.exact for kind in kinds}
    for i, given in enumerate(reference.manifest.inputs):
        if not 0 < len(given.hashes) <= 1000:
            yield f"the input {given.label} has no draws, or too many"
        for kind in kinds:
            row = reference._row(f"{kind}.{i}.0")
            if not row:
                yield f"the outputs for {given.label} are missing"
            if any(one.is_floating_point() and kind == "exact" and one.dtype != wanted[kind] for one in row):
                yield f"the outputs for {given.label} are in another dtype than it says"
            for d in range(1, len(given.hashes)):
                others = reference._row(f"{kind}.{i}.{d}")
                if [one.shape for one in others] != [one.shape for one in row]:
                    yield f"the outputs for {given.label} differ in shape"
        for j, site in enumerate(given.sites):
            kept = reference.tensors.get(f"site.{i}.{j}")
            if kept is None or kept.dtype != torch.float64 or kept.shape != (site.numbers,):
                yield f"the output of the module {site.path} is missing"


def _foreign(what: str) -> StoreError:
    return StoreError(f"{what}, or was changed after it was written", todo=_AGAIN)


def hash_of(tensor: Tensor) -> str:
    """Hash dtype, shape and bytes of a tensor."""
    held = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{held.dtype} {tuple(held.shape)}\n".encode())
    if size := held.numel() * held.element_size():
        digest.update((ctypes.c_char * size).from_address(held.data_ptr()))
    return digest.hexdigest()


SKETCH = 1024  # numbers


def sketch(tensor: Tensor) -> Tensor:
    """Give few numbers of which the distance of two large tensors can be told.

        sketch(x)ⱼ = Σ {sᵢ · xᵢ : i mod 1024 = j}, with signs sᵢ that are as good as random

    E‖sketch(x) − sketch(y)‖² = ‖x − y‖², to about 3 % (Charikar, Chen, Farach-Colton 2002). Signs are made by integer
    arithmetic of the place i, so they are the same on every machine. A tensor of no more numbers is its own sketch.
    """
    flat = tensor.detach().double().flatten()
    if len(flat) <= SKETCH:
        return flat
    signs = _signs(len(flat), flat.device)
    padded = torch.nn.functional.pad(flat * signs, (0, -len(flat) % SKETCH))
    return padded.view(-1, SKETCH).sum(0)


def _signs(count: int, device: torch.device) -> Tensor:
    """Mix the bits of the numbers below `count` (as in splitmix64, with 32 bits) to signs."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    for factor in (0x45D9F3B, 0x45D9F3B):
        mixed = ((mixed >> 16) ^ mixed) * factor & 0xFFFFFFFF
    return (((mixed >> 16) ^ mixed) & 1).double() * 2 - 1

"""Example inputs: those that the user gives, and those that surgeon finds by itself.

On the command line a value may also be

    x.pt                      what torch.save wrote, read without running it
    x.safetensors, x.npz      tensors by name; x.npy holds one
    photo.jpg                 a picture, made to fit the model: 1×3×height×width
    file.py:make_inputs       a function without arguments, or pkg.mod:make_inputs

Such a value, given alone, is the whole call: a tuple holds its positional arguments, a dict its named ones, and
anything else is its only argument.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import isfile  # unlike Path.is_file, it accepts names that are too long
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgeon._torch_compat import pytree
from surgeon.analysis.network import Network
from surgeon.analysis.run import Run, observe
from surgeon.blocks.base import Operator
from surgeon.errors import CaptureError, ModelError
from surgeon.files import architectures, formats
from surgeon.files.names import Trust
from surgeon.models import call as calls
from surgeon.models import notation
from surgeon.models.call import Inputs
from surgeon.models.copies import where
from surgeon.models.draw import Draw, Shape
from surgeon.models.sandbox import quietly

_log = logging.getLogger("surgeon")
Example = Shape | Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Inputs

# What torchvision's networks take, by the beginning of their module's name; the first entry that fits is used.
_TORCHVISION = {
    "torchvision.models.inception": "1,3,299,299",
    "torchvision.models.detection": "[3,320,320]",
    "torchvision.models.segmentation": "1,3,224,224",
    "torchvision.models.optical_flow": "1,3,128,128;1,3,128,128",
    "torchvision.models.video.resnet": "1,3,16,112,112",
    "torchvision.models.video": "1,3,16,224,224",
}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of the channels
_MOST = 2**24  # numbers in an input that a file or a model, not the user, asks for
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_SHAPE = re.compile(r"\(.*|[-\d][-\d\s,x×]*(:.*)?")
_FUNCTION = re.compile(r"[^;=\[\]{}()<>]+:[^\W\d][\w.]*")
_READ = "surgeon reads .pt, .safetensors, .npz, .npy and pictures."
PASS_ONE = "Pass one: --input 1,3,224,224 (from Python, example=(1, 3, 224, 224))."
_TODO = "Give a shape, --input 1,3,224,224, a file, or file.py:make_inputs."


def make(example: Example, *, seed: int = 0) -> Inputs:
    """Turn what the user gives into the arguments of one call.

    A shape becomes seeded normal random numbers in float64, a tensor stays as it is. A tuple holds positional
    arguments, a dict named ones, a list is one argument; all of them may hold shapes and tensors. What is in an
    `Inputs` stays as it is.

    >>> make({"image": (1, 3, 8, 8), "masks": [torch.ones(4, 4)]}).shapes
    ((1, 3, 8, 8), (4, 4))

    Raises:
        CaptureError: it holds no tensor and no shape.
    """
    call = example if isinstance(example, Inputs) else _arguments(_asked(example))
    if not call.has_tensors:
        raise CaptureError(
            f"example {example!r} is neither a shape, nor a tensor, nor several of them",
            todo="Give a shape such as (1, 3, 224, 224).",
        )
    return call.drawn(seed)


def read(text: str, model: nn.Module, *, seed: int = 0) -> Inputs:
    """Read the value of `--input` for a model; what was done to a picture is logged.

    Raises:
        CaptureError: the value cannot be used as an input.
    """

    def value(part: str) -> Any:
        return notation.draw(part) if _SHAPE.fullmatch(part) else _value(part, model, seed)

    is_whole = isfile(text) or (_FUNCTION.fullmatch(text) and not _SHAPE.fullmatch(text))
    call = _arguments(_value(text, model, seed)) if is_whole else calls.parse(text, value)
    if not call.has_tensors:
        raise CaptureError(f"there is no tensor in {text}", todo="Give tensors, alone or in lists, tuples and dicts.")
    return call.drawn(seed)


def guess(model: nn.Module, *, seed: int = 0) -> Inputs | None:
    """Find an input that the model accepts, or None. What its library says is tried first, then common sizes."""
    return next((inputs for inputs, _ in _guessed(model, seed)), None)


def look(model: nn.Module, records: Sequence[Sequence[Shape] | str | None] = (), *, seed: int = 0) -> Network:
    """Look at a network with the input that a plan or history has written down, or with one that it accepts.

    Random tensors of the recorded shapes are tried first. If no input is found that it accepts, it is not run.
    """
    for inputs, run in itertools.chain(_recalled(records, model, seed), _guessed(model, seed)):
        return Network(model, inputs, run=run)
    return Network(model)


def _guessed(model: nn.Module, seed: int) -> Iterator[tuple[Inputs, Run]]:
    """Give inputs that the model accepts, and what the run with each has shown.

    They are run without values; where the model looks at values, so that this says nothing, one of them is run with.
    """
    was_run = False
    for call, needs_values in _candidates(model):
        try:
            inputs = call.drawn(seed)
            run = observe(model, inputs, meta_only=not needs_values)
        except CaptureError as error:
            if was_run or needs_values or call.numel > _MOST or not _asks_for_values(error.__cause__):
                continue
            was_run = True
            try:
                run = observe(model, inputs)
            except CaptureError:
                continue
        yield Inputs(inputs.args, inputs.kwargs, is_guess=True, is_random=True), run


def _asks_for_values(error: BaseException | None) -> bool:
    """Whether a run on the meta device ended because the model, or torch, wanted to know a value."""
    said = str(error).lower()
    return isinstance(error, NotImplementedError) or "meta tensor" in said or "meta device" in said


def _recalled(
    records: Sequence[Sequence[Shape] | str | None], model: nn.Module, seed: int
) -> Iterator[tuple[Inputs, Run]]:
    for record in records:
        try:
            call = calls.recall(record)
            if call is not None and call.numel > _MOST:
                _log.warning(
                    f"a plan or history in the file asks for an input of {call.numel:,} numbers, which is not run "
                    f"unless you ask for it: --input '{call.text[:100]}'"
                )
                continue
            inputs = None if call is None else call.drawn(seed)
            run = observe(model, inputs) if inputs is not None and inputs.tensors else None
        except CaptureError:
            continue
        if inputs is not None and run is not None:
            yield inputs, run


def _is_shape(part: object) -> TypeGuard[Sequence[int]]:
    return isinstance(part, tuple | list) and bool(part) and all(type(side) is int and side > 0 for side in part)


def _is_modest(shape: object) -> bool:
    """Whether something is a shape, and not one that takes all memory: a file may have said so."""
    return _is_shape(shape) and math.prod(shape) <= _MOST


def _asked(example: Any) -> Any:
    """Replace every shape by a `Draw`, a tensor that is still to be drawn."""
    return pytree.tree_map(lambda leaf: Draw(tuple(leaf)) if _is_shape(leaf) else leaf, example, is_leaf=_is_shape)


def _arguments(value: Any) -> Inputs:
    if isinstance(value, Inputs):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return Inputs(kwargs=dict(value))
    return Inputs(value if isinstance(value, tuple) else (value,))


def _value(text: str, model: nn.Module, seed: int) -> Any:
    """Read a file or call a function."""
    path = Path(text)
    if not isfile(text) and _FUNCTION.fullmatch(text):
        return _returned(text, seed)
    if path.suffix.lower() not in (*_READERS, *_PICTURES):
        what = "a file that holds no inputs" if isfile(text) else "neither a shape, nor a file, nor a function"
        raise CaptureError(f"--input {text!r} is {what}", todo=_READ if isfile(text) else _TODO)
    if not isfile(text):
        raise CaptureError(f"there is no file {text} to take as input", todo=_TODO)
    try:
        if path.suffix.lower() in _PICTURES:
            return _picture(path, model, seed)
        return _READERS[path.suffix.lower()](path)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(str(error.name), error.name)
        raise CaptureError(f"{text} cannot be read without {package}", todo=f"pip install {package}") from error
    except ModelError as error:
        raise CaptureError(f"--input: {error.problem}", todo=error.todo) from error
    except Exception as error:
        raise CaptureError(f"{text} cannot be read as input: {where(error)}", todo=_READ) from error


def _returned(name: str, seed: int) -> Any:
    """Call the user's function, with every random state seeded."""
    try:
        function = architectures.find(name)
    except ModelError as error:
        raise CaptureError(f"--input {name}: {error.problem}", todo=error.todo) from error
    with quietly(seed):
        try:
            return function()
        except Exception as error:
            raise CaptureError(
                f"{name} failed: {where(error)}", todo="It is called without arguments, and must return tensors."
            ) from error


def _tensors(path: Path) -> Any:
    return formats.of_file(path).read(path, Trust())


def _safetensors(path: Path) -> Any:
    return _alone(load_file(path))


def _numpy(path: Path) -> Any:
    import numpy

    found = numpy.load(path, allow_pickle=False)
    if path.suffix.lower() == ".npy":
        return torch.from_numpy(found)
    arrays = {name: torch.from_numpy(found[name]) for name in found.files}
    if list(arrays) == [f"arr_{i}" for i in range(len(arrays))]:  # what numpy.savez calls arrays without names
        return tuple(arrays.values())
    return _alone(arrays)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _tensors,
    ".pth": _tensors,
    ".safetensors": _safetensors,
    ".npy": _numpy,
    ".npz": _numpy,
}


def _alone(found: dict[str, Tensor]) -> Any:
    return next(iter(found.values())) if len(found) == 1 else found


def _picture(path: Path, model: nn.Module, seed: int) -> Any:
    """Give a picture the size, the channels and the normalisation that the model is known to take."""
    from PIL import Image, ImageOps

    known = guess(model, seed=seed)
    like = known.tensors[0] if known is not None else None
    first = _first_channels(model)
    channels = like.shape[-3] if like is not None and like.dim() in (3, 4) else 3 if first is None else first
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    done = ["scaled to [0, 1]"]
    if like is not None and like.dim() == 4 and picture.size != (size := (like.shape[3], like.shape[2])):
        done.insert(0, f"resized from {picture.width}×{picture.height} to {size[0]}×{size[1]}")
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).double() / 255
    image = pixels.view(picture.height, picture.width, -1).permute(2, 0, 1)  # (channels, height, width)
    if like is not None and like.dim() == 3:  # a detector, which normalises and resizes by itself
        _log.info(f"{path} was {' and '.join(done)}")
        return [image]
    image, normalised = _normalised(image, getattr(model, "pretrained_cfg", None))
    _log.info(f"{path} was {', '.join([*done, *normalised])}")
    return image[None]


def _normalised(image: Tensor, config: object) -> tuple[Tensor, list[str]]:
    """Subtract the mean and divide by the deviation that timm names, or ImageNet's; and say which were used."""
    mean, deviation, whose = *_IMAGENET, "ImageNet"
    if isinstance(config, dict) and config.get("mean") and config.get("std"):
        mean, deviation, whose = tuple(config["mean"]), tuple(config["std"]), "the model"
    if len(mean) != len(image):
        return image, []
    mean_, deviation_ = (torch.tensor(numbers, dtype=image.dtype).view(-1, 1, 1) for numbers in (mean, deviation))
    return (image - mean_) / deviation_, [f"normalised with the mean {mean} and deviation {deviation} of {whose}"]


def _first_channels(model: nn.Module) -> int | None:
    """Say how many channels the first conv reads, or the block in its place."""
    found = (m for m in model.modules() if isinstance(m, nn.Conv2d | Operator))
    return next((m.spec.c_in if isinstance(m, Operator) else m.in_channels for m in found), None)


def _candidates(model: nn.Module) -> Iterator[tuple[Inputs, bool]]:
    """Give calls to try, and whether to try them with real values: those listed for torchvision are known to work."""
    first = _first_channels(model)
    for channels, *sides in filter(_is_modest, _known_sizes(model)):
        for depth in dict.fromkeys([channels, channels if first is None else first]):
            yield Inputs((Draw((1, depth, *sides)),)), False
    homes = [kind.__module__ for kind in type(model).__mro__]
    known = (call for start, call in _TORCHVISION.items() if any(home.startswith(start) for home in homes))
    if call := next(known, None):
        yield calls.parse(call), True
    if first is not None:
        for side in (224, 299, 256, 64, 32, 28):
            yield Inputs((Draw((1, first, side, side)),)), False


def _known_sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Give the input sizes that networks of timm and torchvision record: channels, height, width."""
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)  # a timm transformer that was built for it
    if isinstance(sides, tuple) and len(sides) == 2:
        yield (3, *sides)
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        yield tuple(config["input_size"])
    if isinstance(side := getattr(model, "image_size", None), int):  # torchvision's vision transformers
        yield (3, side, side)

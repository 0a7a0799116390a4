"""How pictures become what a model was trained to see: its own way where that is known, else what the user says.

    the shorter side resized, the middle cut out, bytes scaled to [0, 1], then (x - mean) / deviation

timm's networks say it themselves (`pretrained_cfg`). For torchvision's it is what its weights for the architecture say;
which architecture of a class it is shows in the number of parameters. Pillow resizes, as it does for both libraries.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgeon.errors import DataError
from surgeon.models.call import Inputs

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SIDE, _RESIZED = 224, 256
_WAYS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
_NUMBERS = '"size=64,mean=0.2860,std=0.3530"'
HOW = f"imagenet, none (only scaled to [0, 1]) or {_NUMBERS}"
_TODO = f"Give --preprocess {HOW}; from Python, preprocess=…"
_NO_PICTURES = ("torchvision.models.video", "torchvision.models.optical_flow")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What is done to pictures, and who says so. Sizes are (height, width); None leaves pictures as they are."""

    whose: str
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    resized: tuple[int, int] | None = None  # what is covered by the picture before its middle is cut out
    way: str = "bilinear"
    squashed: bool = False  # both sides are resized, whatever the picture's shape
    channels: int | None = None  # None where the model does not show it
    is_detector: bool = False  # it takes a list of pictures of any size, and resizes and normalises by itself
    size_is_given: bool = False  # the user has named the size, so that arrays are resized as well

    def tensor(self, picture: Image) -> Tensor:
        """Make of a picture what the model takes, in float32: (channels, height, width)."""
        if "transparency" in picture.info:  # Pillow warns unless its colours are looked up in two steps
            picture = picture.convert("RGBA")
        picture = self._cut_out(picture.convert("L" if self.channels == 1 else "RGB"))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = pixels.view(picture.height, picture.width, -1).permute(2, 0, 1)
        return self.normalised(image.contiguous())

    def normalised(self, pixels: Tensor) -> Tensor:
        """Scale bytes (…, channels, height, width) to [0, 1], and normalise them."""
        images = pixels.float() / 255
        if not self.mean:
            return images
        mean, deviation = (torch.tensor(one).view(-1, 1, 1) for one in (self.mean, self.deviation))
        return (images - mean) / deviation

    @property
    def of_bytes(self) -> str:
        """Say what is done to bytes that are not resized."""
        if not self.mean:
            return f"scaled to [0, 1] ({self.whose})"
        mean, deviation = ("/".join(f"{one:.4g}" for one in some) for some in (self.mean, self.deviation))
        return f"scaled to [0, 1], normalised with mean {mean} and deviation {deviation} ({self.whose})"

    def __str__(self) -> str:
        colour = "read as greyscale" if self.channels == 1 else "read as RGB"
        return ", ".join([colour, *self._resizing(), self.of_bytes])

    def _resizing(self) -> Iterator[str]:
        if self.size is None or self.resized is None:
            yield "left as large as they are"
        elif self.squashed:
            yield f"resized to {_by(self.resized)} ({self.way})"
        else:
            target = str(self.resized[0]) if self.resized[0] == self.resized[1] else f"cover {_by(self.resized)}"
            yield f"the shorter side resized to {target} ({self.way})"
        if self.size is not None and (self.size != self.resized or not self.squashed):
            yield f"the middle {_by(self.size)} cut out"

    def _cut_out(self, picture: Image) -> Image:
        """Resize a picture and cut out its middle, both rounded as torchvision does it."""
        from PIL import Image as Pillow

        if self.size is None or self.resized is None:
            return picture
        (height, width), way = self.resized, Pillow.Resampling[self.way.upper()]
        if not self.squashed:
            if picture.height * width <= picture.width * height:
                width = max(width, int(height * picture.width / picture.height))
            else:
                height = max(height, int(width * picture.height / picture.width))
        if picture.size != (width, height):
            picture = picture.resize((width, height), way)
        top, left = round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)
        return picture.crop((left, top, left + self.size[1], top + self.size[0]))


def known(model: nn.Module | None, given: str | None, *, example: Inputs | None = None) -> Preprocessing:
    """Find how pictures are made what a model takes; `example` is an input that it is known to take.

    Raises:
        DataError: neither the model nor the user says so, or what the user says cannot be read.
    """
    first, channels = _first(example), channels_of(model, example)
    found = _given(given, channels) if given is not None else _own(model)
    if found is None:
        name = "of this network" if model is None else f"of {type(model).__name__}"
        raise DataError(f"the preprocessing {name} is not known", todo=_TODO)
    if len(found.mean) not in (0, channels or len(found.mean)):
        if len(set(zip(found.mean, found.deviation, strict=True))) > 1:
            raise DataError(
                f"mean and deviation of {len(found.mean)} channels ({found.whose}) do not fit a network of {channels}",
                todo=f"Give --preprocess with {channels} number{'s' * (channels != 1)}, such as {_NUMBERS}",
            )
        found = replace(found, mean=found.mean[:1] * (channels or 1), deviation=found.deviation[:1] * (channels or 1))
    found = replace(found, channels=channels)
    if first is not None and first.dim() == 4 and not found.size_is_given and not found.is_detector:
        return _sized(found, (int(first.shape[2]), int(first.shape[3])))
    return found


def check_takes_pictures(found: Preprocessing) -> None:
    """Refuse networks whose input has another number of channels than pictures."""
    if found.channels not in (None, 1, 3):
        raise DataError(
            f"pictures have 1 or 3 channels, and the network takes {found.channels}",
            todo="Give arrays (.npy, .npz, .safetensors) or a loader, file.py:loader.",
        )


def check_depth(picture: Image, name: str) -> None:
    """Refuse a picture that has more than 8 bits for each pixel and channel, which Pillow would cut off."""
    if picture.mode.startswith(("I", "F")):
        raise DataError(
            f"{name} has more than 8 bits for each pixel", todo="Save it with 8 bits, or give arrays (.npy) of floats."
        )


def channels_of(model: nn.Module | None, example: Inputs | None) -> int | None:
    """How many channels a network takes, by an input that it is known to take, or by its first conv."""
    first = _first(example)
    if first is not None and first.dim() in (3, 4):
        return int(first.shape[-3])
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None) if model is not None else None
    return None if conv is None else conv.in_channels


def _first(example: Inputs | None) -> Tensor | None:
    return example.tensors[0] if example is not None and example.tensors else None


def _sized(found: Preprocessing, size: tuple[int, int]) -> Preprocessing:
    """Take another size, with the same share of a picture cut off at its borders."""
    if found.size is None or found.resized is None:
        return replace(found, size=size, resized=size)
    if found.size == size:
        return found
    old, new = zip(found.resized, found.size, strict=True), size
    height, width = (math.floor(side * whole / cut + 0.5) for (whole, cut), side in zip(old, new, strict=True))
    return replace(found, size=size, resized=(height, width))


def _given(text: str, channels: int | None) -> Preprocessing:
    """Read what `--preprocess` says."""
    whose = f"--preprocess {text}"
    if text == "none":
        return Preprocessing(whose)
    if text == "imagenet":
        return Preprocessing(whose, *_IMAGENET, (_SIDE, _SIDE), (_RESIZED, _RESIZED))
    settings: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name in settings or name not in ("size", "resize", "mean", "std", "interpolation"):
            raise _unread(text, f"{part.strip()!r}")
        settings[name] = value.strip()
    if ("mean" in settings) != ("std" in settings):
        raise _unread(text, "a mean without std" if "mean" in settings else "a std without mean")
    mean, deviation = (_numbers(text, settings.get(name, "")) for name in ("mean", "std"))
    if len(mean) != len(deviation) or any(one <= 0 for one in deviation):
        raise _unread(text, "std, which has as many numbers as mean, all above 0")
    if len(mean) == 1 and channels:
        mean, deviation = mean * channels, deviation * channels
    size, resized = (_size(text, settings[name]) if name in settings else None for name in ("size", "resize"))
    size = size or resized
    resized = resized or size
    if size and resized and (resized[0] < size[0] or resized[1] < size[1]):
        raise _unread(text, "a resize smaller than size")
    if (way := settings.get("interpolation", "bilinear")) not in _WAYS:
        raise _unread(text, f"interpolation={way}, which is none of {', '.join(_WAYS)}")
    return Preprocessing(whose, mean, deviation, size, resized, way, size_is_given=size is not None)


def _numbers(text: str, value: str) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, value.split("/"))) if value else ()
    except ValueError:
        raise _unread(text, repr(value)) from None
    if not all(map(math.isfinite, numbers)):
        raise _unread(text, repr(value))
    return numbers


def _size(text: str, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})(?:[x×]([1-9]\d{0,4}))?", value)
    if found is None:
        raise _unread(text, f"the size {value!r}")
    return int(found[1]), int(found[2] or found[1])


def _unread(text: str, what: str) -> DataError:
    todo = f"Give {HOW}; there are also resize=72 and interpolation=bicubic, and three numbers are 0.485/0.456/0.406."
    return DataError(f"--preprocess {text!r} cannot be read: {what}", todo=todo)


def _own(model: nn.Module | None) -> Preprocessing | None:
    """Find what the model's library says."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("mean") and config.get("std") and config.get("input_size"):
        return _timm(config)
    homes = [kind.__module__ for kind in type(model).__mro__]
    home = next((one for one in homes if one.startswith("torchvision.models.")), None)
    return None if home is None or model is None else _torchvision(home, model)


def _timm(config: dict[str, Any]) -> Preprocessing:
    """Do what timm does when it evaluates: `timm.data.create_transform` of its `resolve_data_config`."""
    whose = f"timm's {config.get('architecture') or 'pretrained_cfg'}"
    mode, way = config.get("crop_mode") or "center", config.get("interpolation") or "bilinear"
    if mode not in ("center", "squash") or way not in _WAYS:
        raise DataError(f"{whose} wants pictures in a way that surgeon does not know: {mode}, {way}", todo=_TODO)
    height, width = (int(side) for side in config["input_size"][1:])
    share = float(config.get("crop_pct") or 0.875)
    resized = (math.floor(height / share), math.floor(width / share))
    mean, deviation = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    return Preprocessing(whose, mean, deviation, (height, width), resized, way, squashed=mode == "squash")


def _torchvision(home: str, model: nn.Module) -> Preprocessing | None:
    """Do what torchvision's weights for this architecture do, the oldest ones where there are several."""
    if home.startswith(_NO_PICTURES):
        raise DataError(
            f"{type(model).__name__} of torchvision does not take single pictures",
            todo="Give a loader that yields what it takes: file.py:loader",
        )
    if home.startswith("torchvision.models.detection."):
        return Preprocessing("as torchvision's detectors take them", is_detector=True)
    models = importlib.import_module("torchvision.models")
    builders = {name: models.get_model_builder(name) for name in models.list_models()}
    names = [name for name, builder in builders.items() if builder.__module__ == home]
    weights = [one for name in names for one in models.get_model_weights(name)]
    if not weights:
        return None
    count = sum(parameter.numel() for parameter in model.parameters())
    chosen = next((one for one in weights if one.meta.get("num_params") == count), weights[0])
    is_exact = chosen.meta.get("num_params") == count
    ways = vars(chosen.transforms())
    resized, size = (
        int(ways[key][0]) for key in ("resize_size", "crop_size" if "crop_size" in ways else "resize_size")
    )
    whose = f"torchvision's {chosen}" if is_exact else f"torchvision's for {type(model).__name__}, {chosen}"
    mean, deviation = (tuple(map(float, ways[key])) for key in ("mean", "std"))
    way = str(ways["interpolation"].value)
    return Preprocessing(whose, mean, deviation, (size, size), (max(resized, size),) * 2, way)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"

"""The device and the dtype of a network, and how a network is moved to a device.

Random numbers are drawn on the CPU and moved, so that every device gets the same. Files are written from the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgeon.errors import ModelError
from surgeon.models.copies import Model, shadow

CPU = torch.device("cpu")
NO_FLOAT64 = ("mps",)  # surgeon proves in float64, which these devices do not have
_KINDS = ("cpu", "cuda", "mps")
_TODO = "Give cpu, cuda, cuda:1 or mps."


def named(text: str) -> torch.device:
    """Find the device that is called so: cpu, cuda, cuda:1, mps.

    >>> named("cpu")
    device(type='cpu')

    Raises:
        ModelError: there is no such device here.
    """
    kind, _, index = text.partition(":")
    if kind not in _KINDS or (index and not (kind == "cuda" and index.isdecimal())) or text.endswith(":"):
        raise ModelError(f"{text!r} is not the name of a device", todo=_TODO)
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if not there:
        said = f"no {kind} device is available to torch here: {_why_not(kind)}"
        raise ModelError(said, todo="Give --device cpu, or leave it out.")
    if index and int(index) >= there:
        last = "cuda:0 is the only one" if there == 1 else f"there are cuda:0 to cuda:{there - 1}"
        raise ModelError(f"there is no device {text} here: {last}", todo=_TODO)
    return torch.device(text)


def _why_not(kind: str) -> str:
    """Say why torch has no such device."""
    if kind == "mps":
        return "it is Apple's" if not torch.backends.mps.is_built() else "this macOS or this Mac is too old"
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return "this torch was built without CUDA"
    return "torch finds no GPU, or no driver for it"


def of(model: nn.Module) -> torch.device | None:
    """Where all parameters of a model lie (of one without any, its buffers); None where that is not one place."""
    places = {tensor.device for tensor in model.parameters()} or {tensor.device for tensor in model.buffers()}
    return places.pop() if len(places) == 1 else None


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating point parameter; torch's default for a model without any.

    >>> dtype_of(nn.Linear(2, 2).half())
    torch.float16
    """
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def moved(model: Model, device: torch.device) -> Model:
    """Move a model itself, and return it; one without numbers, on the meta device, stays there.

    Raises:
        ModelError: it does not fit there.
    """
    if (place := of(model)) == device or (place is not None and place.type == "meta"):
        return model
    try:
        return model.to(device)
    except (RuntimeError, NotImplementedError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(f"the model cannot be moved to {device}: {why}", todo="Give --device cpu.") from error


def on(model: Model, device: torch.device) -> Model:
    """Give the model, or a copy on the device if any of its tensors lies elsewhere; meta tensors stay as they are."""
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta}
    return shadow(model, lambda tensor: _onto(tensor, device)) if places - {device} else model


def _onto(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.is_meta else tensor.to(device)

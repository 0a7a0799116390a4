"""A short hash that tells one architecture from another, in every form that was ever written to a file.

Plans, histories and manifests hold it. Form 2 hashes the fields of convs. Form 1 hashed their geometry in words, as
`words_of` writes them to this day, whatever `str(ConvSpec)` says.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from surgeon.conv.padding import PaddedConv2d
from surgeon.conv.spec import ConvSpec


def fingerprint(model: nn.Module) -> str:
    """Hash names and classes of modules, fields of convs, and names and shapes of stored tensors.

    >>> fingerprint(nn.Conv2d(3, 8, 3))
    '2:813879623b4644e2'
    """
    modules = [
        [name, type(module).__qualname__, _fields(module)]
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [[key, list(shape)] for key, shape in _shapes(model).items()]
    text = json.dumps([modules, tensors], sort_keys=True, separators=(",", ":"))
    return f"2:{_short_hash(text)}"


def fits(known: str, model: nn.Module) -> bool:
    """Whether a fingerprint, in any form, belongs to a model."""
    return known == (fingerprint(model) if ":" in known else _in_words(model))


def words_of(spec: ConvSpec) -> str:
    """Write a conv as fingerprints of form 1, and plans of format 1, have it. This never changes.

    >>> words_of(ConvSpec(8, 8, (3, 5), stride=(2, 2), padding=(1, 2), groups=8, bias=False))
    '8→8, 3x5, stride=2, padding=1x2, depthwise, no bias'
    """
    groups = "depthwise" if 1 < spec.groups == spec.c_in else f"groups={spec.groups}"
    padding = spec.padding if isinstance(spec.padding, str) else _pair(spec.padding)
    words = {
        f"{spec.c_in}→{spec.c_out}": True,
        f"{spec.kernel[0]}x{spec.kernel[1]}": True,
        f"stride={_pair(spec.stride)}": spec.stride != (1, 1),
        f"padding={padding}": spec.padding not in ((0, 0), "valid"),
        f"dilation={_pair(spec.dilation)}": spec.dilation != (1, 1),
        groups: spec.groups != 1,
        f"mode={spec.padding_mode}": spec.padding_mode != "zeros",
        "no bias": not spec.bias,
        f"pads {spec.pads_input}": spec.pads_input is not None,  # no plan of format 1 had such a conv
    }
    return ", ".join(word for word, is_said in words.items() if is_said)


def _in_words(model: nn.Module) -> str:
    """Hash an architecture in form 1."""
    lines = []
    for name, module in model.named_modules(remove_duplicate=False):
        geometry = words_of(ConvSpec.of(module)) if type(module) is nn.Conv2d else ""
        lines.append(f"{name} {type(module).__qualname__} {geometry}")
    lines += [f"{key} {tuple(shape)}" for key, shape in _shapes(model).items()]
    return _short_hash("\n".join(lines))


def _fields(module: nn.Module) -> dict[str, object]:
    """Give the fields of a plain conv that differ from their default, so that a new field changes no hash."""
    if type(module) is not nn.Conv2d and not isinstance(module, PaddedConv2d):
        return {}
    return ConvSpec.of(module).to_dict()


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


def _pair(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"

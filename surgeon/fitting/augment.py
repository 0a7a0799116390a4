"""Images moved and mirrored, so that a few of them show more; the original gives the targets for these as well."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.models.call import Inputs

SHIFT = 0.07  # of the shorter side, each way


@dataclasses.dataclass(frozen=True, slots=True)
class Augmentation:
    """How images are changed: moved by up to `shift` of the shorter side, and half of them mirrored, if at all."""

    shift: float = SHIFT
    mirror: bool = True

    def __call__(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        """Change every image of a call, if it takes images and nothing else."""
        is_wanted = (self.shift > 0 or self.mirror) and takes_images(inputs)
        return inputs.map(lambda x: self._changed(x, generator)) if is_wanted else inputs

    def in_words(self, inputs: Inputs) -> str:
        """Say what is done to the images of a call like this one."""
        if not takes_images(inputs):
            return "inputs as they are"
        ways = [f"moved by up to {self.shift:.0%}"] * (self.shift > 0) + ["mirrored"] * self.mirror
        return f"images {' and '.join(ways)} at random" if ways else "images as they are"

    def _changed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, _, h, w = x.shape
        reach = min(round(self.shift * min(h, w)), min(h, w) - 1)
        offsets = torch.randint(0, 2 * reach + 1, (n, 2), generator=generator).tolist()
        padded = F.pad(x, (reach, reach, reach, reach), mode="replicate") if reach else x
        moved = [image[:, top : top + h, left : left + w] for image, (top, left) in zip(padded, offsets, strict=True)]
        mirrored = [self.mirror and flip < 0.5 for flip in torch.rand(n, generator=generator).tolist()]
        return torch.stack([image.flip(-1) if flip else image for image, flip in zip(moved, mirrored, strict=True)])


def takes_images(inputs: Inputs) -> bool:
    """Whether a call is given one tensor of images (n, c, h, w): beside others, such as masks, nothing may be moved."""
    return len(inputs.tensors) == 1 and inputs.tensors[0].dim() == 4 and inputs.tensors[0].is_floating_point()

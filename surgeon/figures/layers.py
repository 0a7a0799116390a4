"""A network → its convs and blocks whose kernels have more than one tap, with the kernel of each in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgeon.analysis import sites
from surgeon.analysis.network import Network
from surgeon.blocks import Block, base, contract
from surgeon.blocks.anatomy import BranchKernel
from surgeon.blocks.base import Foldable, Operator
from surgeon.conv.spec import ConvSpec
from surgeon.errors import SurgeonError
from surgeon.surgery.bake import all_baked


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A conv or a block of a network: its first name, what it is, and where its numbers are."""

    path: str
    kind: str
    spec: ConvSpec
    held: Operator | Tensor  # the block, or the weight of the conv

    @property
    def branches(self) -> Sequence[BranchKernel]:
        """The kernels that its kernel is the sum of; none for a plain conv."""
        return contract.branch_kernels(self.held) if isinstance(self.held, Operator) else ()

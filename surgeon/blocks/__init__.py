"""The blocks: what a conv can become. `base` is the contract, `registry` finds every block by its name in recipes."""

from surgeon.blocks.base import Block, BlockOptions, Deployable, Foldable, Operator, Together, Trial, Wanted
from surgeon.blocks.discover import registry

__all__ = ["Block", "BlockOptions", "Deployable", "Foldable", "Operator", "Together", "Trial", "Wanted", "registry"]

"""Tiny networks, one per hazard and named for it. They take SHAPE; the convs are such that ACBlocks want them."""

from tiny.arguments import *  # noqa: F403
from tiny.basic import *  # noqa: F403
from tiny.calls import *  # noqa: F403
from tiny.names import *  # noqa: F403
from tiny.running import *  # noqa: F403
from tiny.tensors import *  # noqa: F403
from tiny.tracing import *  # noqa: F403

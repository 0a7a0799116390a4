"""What one call of a model is given: its notation, both ways, and the dtype that a model takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgeon.models import notation
from surgeon.models.call import Inputs
from surgeon.models.devices import dtype_of
from surgeon.models.draw import Draw

WRITTEN: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "1,3,8,8": ((Draw((1, 3, 8, 8)),), {}),
    "()": ((Draw(()),), {}),
    "2,10:int64<1000": ((Draw((2, 10), torch.int64, 1000),), {}),
    "[3,8,8;3,9,7];scale=2:bool": (([Draw((3, 8, 8)), Draw((3, 9, 7))],), {"scale": Draw((2,), torch.bool)}),
    "(1,8;1,8;);{a=1,3;b=[true;none]}": (
        ((Draw((1, 8)), Draw((1, 8))), {"a": Draw((1, 3)), "b": [True, None]}),
        {},
    ),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_read_is_written_as_it_was(text: str) -> None:
    args, kwargs = notation.read(text)
    assert (args, kwargs) == WRITTEN[text]
    assert notation.write(args, kwargs) == text


def test_values_can_be_read_in_another_way() -> None:
    assert notation.read("a;[b;c];x=d", str.upper) == (("A", ["B", "C"]), {"x": "D"})


class _Steps(nn.Module):
    """A model whose first parameter holds whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
        self.conv = nn.Conv2d(1, 1, 1, dtype=torch.float16)
        self.last = nn.Conv2d(1, 1, 1, dtype=torch.float64)


def test_the_dtype_of_a_model_is_that_of_its_first_floating_point_parameter() -> None:
    assert dtype_of(_Steps()) == torch.float16
    assert dtype_of(nn.ReLU()) == torch.get_default_dtype()


def test_inputs_are_cast_to_it_but_for_whole_numbers() -> None:
    drawn = Inputs((Draw((1, 1, 4, 4)), Draw((2,), torch.int64))).drawn(0)
    assert [t.dtype for t in drawn.tensors] == [torch.float64, torch.int64]
    assert [t.dtype for t in drawn.cast_for(_Steps()).tensors] == [torch.float16, torch.int64]
    assert [t.dtype for t in drawn.cast_for(_Steps(), torch.float32).tensors] == [torch.float32, torch.int64]

"""The scorer of guesses and of bisecting: it knows every fault of the study, and says what is right and what is not."""

from __future__ import annotations

import guesses
import pytest
from mutation_faults import FAULTS


def test_every_fault_of_the_study_has_a_kind() -> None:
    assert guesses.KINDS.keys() == {name for name, fault in FAULTS.items() if not fault.is_right}


@pytest.mark.parametrize(
    "key",
    [
        "fault|resnet|float32|lineage|two input channels swapped|0",
        "fault|vgg|float32|none|gamma without sigma|0",
        "fault|mobile|float32|copy|eps of another norm|0",
        "fault|unet|bfloat16|lineage|a layer skipped|0",
    ],
)
def test_a_fault_of_the_study_is_guessed_and_bisected(key: str) -> None:
    line = next(guesses.examine([key]))
    assert line["is_due"]
    assert line["is_right"], line
    assert line["is_smallest"], line


def test_the_table_counts_what_was_right() -> None:
    lines = [
        {"key": "fault|a|b|c|bias zero|0", "is_due": True, "kind": "bias lost", "is_right": True},
        {"key": "fault|a|b|c|bias zero|1", "is_due": True, "kind": "scale", "is_right": False},
        {"key": "fault|a|b|c|bias zero|2", "is_due": True, "kind": None, "is_right": False},
        {"key": "fault|a|b|c|bias zero|3", "is_due": False},
    ]
    text = guesses.table(lines)
    assert "3 faults; the kind was guessed right for 1 (33.3%), for 1 nothing was guessed, and for 1 something" in text
    assert "| bias zero | 3 | 1 | bias lost | nothing, scale |" in text

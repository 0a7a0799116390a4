"""Heat maps in a terminal: what fits, and what each cell says."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from surgeon.display.heat import Panel, Panels, colour, is_dark

THREE = ((0.1, 0.25, 1.0), (0.0, 0.5, 0.6), (0.999, 0.9996, 0.33))


def lines(panels: list[Panel], width: int) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width, color_system=None).print(Panels(panels), crop=False)
    return screen.getvalue().splitlines()


def test_a_matrix_is_its_numbers() -> None:
    assert [line.rstrip() for line in lines([Panel("(a) net", THREE)], 80)] == [
        "(a) net",
        " .100  .250 1.000",
        " .000  .500  .600",
        " .999 1.000  .330",
    ]


def test_panels_stand_side_by_side_while_there_is_room() -> None:
    panels = [Panel(f"({letter})", THREE) for letter in "abcde"]
    found = lines(panels, 80)
    assert found[0].split() == ["(a)", "(b)", "(c)", "(d)"]
    assert found[0].index("(b)") == found[1].index(".100", 5) - 1
    assert found[5].split() == ["(e)"]


@pytest.mark.parametrize("columns", [1, 3, 7, 13, 19, 31, 51])
@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_line_is_wider_than_the_terminal(columns: int, width: int) -> None:
    rows = [[i / columns for i in range(columns)]] * 2
    found = lines([Panel("(a) a name that is long enough to be cut in its middle somewhere", rows)] * 3, width)
    assert max(map(len, found)) <= max(width, columns)


def test_a_name_is_cut_in_its_middle() -> None:
    assert lines([Panel("(a) model.acnet.trained.fused.pt", ((1.0,),))], 20)[0] == "(a) model…d.fused.pt"


def test_panels_of_different_heights_end_where_they_end() -> None:
    found = lines([Panel("(a)", ((1.0,),)), Panel("(b)", ((1.0,), (0.5,)))], 80)
    assert len(found) == 3
    assert found[2].strip() == ".500"


def test_what_steers_a_terminal_is_escaped() -> None:
    assert "\x1b" not in "".join(lines([Panel("(a) \x1b[2J", THREE)], 80))


def test_letters_can_be_read_on_every_colour() -> None:
    """The contrast that WCAG 2 asks of large text is 3, of small text 4.5."""

    def luminance(rgb: tuple[int, int, int]) -> float:
        parts = [one / 255 for one in rgb]
        linear = [one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for i in range(101):
        back, ink = luminance(colour(i / 100)), 1.0 if is_dark(i / 100) else 0.0
        assert (max(back, ink) + 0.05) / (min(back, ink) + 0.05) >= 4.5, i

"""The contract of a section: when it is shown, what it is called, where it stands, and what is in it.

To add a section is to add a file to the folder `sections/` with one subclass of `Section`; a template or a style sheet
of its own (`templates/NAME.html`, `templates/NAME.css`) is found by its name. What a section has to keep to:

- It reads the `PageData` alone, and gives the same markup for the same data.
- Its heading is the `<h2>` that the page writes; headings inside it begin at `<h3>`.
- No attribute `style`, no `<style>` and no `<script>` in its markup: the page forbids them (Content-Security-Policy).
  Sizes that depend on numbers are attributes of SVG (`width`, `x`, `fill` …); colours are classes of `page.css`.
- Every drawing is an `<svg role="img">` with a `<title>` and a `<desc>`, and has a table that says the same.
- Wide things lie in `<div class="scroll" tabindex="0" role="region" aria-label="…">`, which scrolls by itself.
"""

from __future__ import annotations

import abc
from typing import ClassVar

from markupsafe import Markup

from surgeon.page.data import PageData


class Section(abc.ABC):
    """One section of the page. Its docstring says what a reader learns from it."""

    title: ClassVar[str]  # its heading
    anchor: ClassVar[str]  # its id in the page, which links lead to
    place: ClassVar[int]  # sections stand in this order

    @abc.abstractmethod
    def applies(self, data: PageData) -> bool:
        """Whether there is something to show."""

    @abc.abstractmethod
    def body(self, data: PageData) -> Markup:
        """Make what stands below the heading."""

"""The drawing of two streams: a row for each step, a lane for each stream, and shortcuts as arcs beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from surgeon.page.flow import Flow, FlowStep
from surgeon.page.markup import element

_ROW, _HALF = 50, 12  # height of a row, and half the height of a box
_GAP, _TRACK = 44, 11  # between the lanes, and between arcs
_TOP, _TEXT = 34, 30  # above the first row, and from the low lane to the words
_LETTER = 7.1  # the width of a letter of a path


def drawing(flow: Flow, reasons: Mapping[int, str]) -> Markup:
    """Draw a flow; `reasons` say why streams are joined or split at a step."""
    return _Drawing(flow.steps, reasons).made(flow.island)


class _Drawing:
    """Where things lie: lanes from left to right, steps from top to bottom."""

    def __init__(self, steps: Sequence[FlowStep], reasons: Mapping[int, str]) -> None:
        self.steps, self.reasons = steps, reasons
        self.tracks = _tracks(steps)
        count = max(self.tracks.values(), default=-1) + 1
        self.high = 30.0 + _TRACK * count
        self.low = self.high + _GAP
        self.text = self.low + _TEXT

    def made(self, island: str) -> Markup:
        longest = max((max(len(one.name), len(_words(one))) for one in self.steps), default=0)
        longest = max(longest, *(len(reason) + 6 for reason in self.reasons.values()), 0)
        width, height = self.text + _LETTER * longest + 8, _TOP + _ROW * len(self.steps)
        about = f"{len(self.steps)} steps from top to bottom; the table below lists them."
        head = [element("title", f"Two streams through {island or 'the network'}"), element("desc", about)]
        lines = [part for i, step in enumerate(self.steps) for source in step.reads for part in self.edge(source, i)]
        boxes = [self.step(i, step) for i, step in enumerate(self.steps)]
        names = [
            element("text", "high", x=self.high, y=14, text_anchor="middle", class_="lane-name fill-high"),
            element("text", "low", x=self.low, y=14, text_anchor="middle", class_="lane-name fill-low"),
        ]
        size = {"width": round(width), "height": height, "viewBox": f"0 0 {round(width)} {height}"}
        return element("svg", *head, *names, *lines, *boxes, role="img", class_="lanes", **size)

    def y(self, i: int) -> float:
        return _TOP + _ROW * i + 2.0 * _HALF - 6

    def edge(self, source: int, i: int) -> Iterator[Markup]:
        """Draw what a step reads of another one, in one lane or in two."""
        lanes = [("stroke-high lane", self.high, 0.0)]
        if self.steps[source].low:
            lanes.append(("stroke-low lane low", self.low, 5.0))
        if self.steps[i].kind == "split" and self.steps[source].low == 0:
            lanes = lanes[:1]
        start, end = self.y(source) + _HALF, self.y(i) - _HALF
        track = self.tracks.get((source, i))
        for colour, x, offset in lanes:
            if track is None:
                yield element("path", d=f"M{x:g} {start:g}V{end:g}", class_=colour)
                continue
            out = self.high - 26 - _TRACK * track + (offset - 2.5 if len(lanes) > 1 else 0)
            y_out, y_in = start + 4 + offset, end - 4 - offset
            yield element(
                "path",
                d=f"M{x:g} {start:g}V{y_out:g}H{out + 5:g}Q{out:g} {y_out:g} {out:g} {y_out + 5:g}V{y_in - 5:g}"
                f"Q{out:g} {y_in:g} {out + 5:g} {y_in:g}H{x:g}V{end:g}",
                class_=f"{colour} arc",
            )

    def step(self, i: int, step: FlowStep) -> Markup:
        """Draw one step with its words; the mark is a matter of its kind."""
        marks = {"octave": self.octave, "sum": self.sum, "join": self.join, "split": self.split}
        drawn = marks.get(step.kind, self.plain)(i, step)
        y = self.y(i)
        said = [element("text", step.name, x=self.text, y=y - 1, class_="path")]
        words = f"seam: {self.reasons[i]}" if i in self.reasons else _words(step)
        said.append(element("text", words, x=self.text, y=y + 13, class_="fill-bad" if i in self.reasons else "muted"))
        return element("g", *drawn, *said)

    def box(self, left: float, right: float, y: float, colour: str) -> Markup:
        size = {"x": left, "y": y - _HALF, "width": right - left, "height": 2 * _HALF, "rx": 6}
        return element("rect", **size, class_=colour)

    def octave(self, i: int, step: FlowStep) -> list[Markup]:
        """Draw a box over both lanes, and in it the paths that lead from streams to streams."""
        y = self.y(i)
        has_low_in = any(self.steps[one].low for one in step.reads)
        ways = [("high", "high"), *[("high", "low")] * bool(step.low), *[("low", "high")] * has_low_in]
        ways += [("low", "low")] * (has_low_in and step.low > 0)
        x = {"high": self.high, "low": self.low}
        right = self.low if step.low or has_low_in else self.high
        lines = [
            element("path", d=f"M{x[one]:g} {y - _HALF + 3:g}L{x[other]:g} {y + _HALF - 3:g}", class_=f"stroke-{other}")
            for one, other in ways
        ]
        return [self.box(self.high - 14, right + 14, y, "octave"), *lines]

    def sum(self, i: int, step: FlowStep) -> list[Markup]:
        lanes = [(self.high, "high"), *[(self.low, "low")] * bool(step.low)]
        return [part for x, colour in lanes for part in self.plus(x, self.y(i), colour)]

    def plus(self, x: float, y: float, colour: str) -> Iterator[Markup]:
        yield element("path", d=f"M{x:g} {y - _HALF:g}V{y + _HALF:g}", class_=f"stroke-{colour} lane")
        yield element("circle", cx=x, cy=y, r=8, class_=f"mark stroke-{colour}")
        yield element("path", d=f"M{x - 4:g} {y:g}H{x + 4:g}M{x:g} {y - 4:g}V{y + 4:g}", class_=f"stroke-{colour}")

    def join(self, i: int, step: FlowStep) -> list[Markup]:
        y = self.y(i)
        bend = f"M{self.low:g} {y - _HALF:g}Q{self.low:g} {y:g} {self.high + 8:g} {y:g}"
        return [*self.seam(y, i), element("path", d=bend, class_="stroke-low lane low")]

    def split(self, i: int, step: FlowStep) -> list[Markup]:
        y = self.y(i)
        bend = f"M{self.high + 8:g} {y:g}Q{self.low:g} {y:g} {self.low:g} {y + _HALF:g}"
        return [*self.seam(y, i), element("path", d=bend, class_="stroke-low lane low")]

    def seam(self, y: float, i: int) -> list[Markup]:
        x = self.high
        lane = element("path", d=f"M{x:g} {y - _HALF:g}V{y + _HALF:g}", class_="stroke-high lane")
        diamond = element("path", d=f"M{x:g} {y - 8:g}l8 8l-8 8l-8 -8z", class_="seam" if i in self.reasons else "turn")
        return [lane, diamond]

    def plain(self, i: int, step: FlowStep) -> list[Markup]:
        right = self.low if step.low else self.high
        return [self.box(self.high - 14, right + 14, self.y(i), f"plain {step.kind}")]


def _words(step: FlowStep) -> str:
    """Say what a step does, what follows it, and how many channels each stream has behind it."""
    said = [step.label] if step.label else []
    said += step.then
    if step.low:
        said.append(f"{step.high or '?'} high, {step.low} low")
    elif step.high is not None and step.kind in ("conv", "octave", "join"):
        said.append(f"{step.high} channels")
    return " · ".join(said)


def _tracks(steps: Sequence[FlowStep]) -> dict[tuple[int, int], int]:
    """Give every arc, which leads past other steps, a track of its own among those beside it; short ones inside."""
    arcs = [(source, i) for i, step in enumerate(steps) for source in step.reads if source != i - 1]
    made: dict[tuple[int, int], int] = {}
    for source, i in sorted(arcs, key=lambda arc: (arc[1] - arc[0], arc)):
        taken = {track for (start, end), track in made.items() if start < i and source < end}
        made[source, i] = next(track for track in range(len(arcs) + 1) if track not in taken)
    return made

"""What the zoo is about: an architecture, and the record of what was found out about it."""

from __future__ import annotations

import json
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

NO_CONV = "it has no Conv2d"
NO_MEMORY = ("can't allocate memory", "MemoryError", "std::bad_alloc")
# Detectors: small images instead of 800 pixels, and what they find is not thrown away because random scores are low.
SMALL = {"min_size": 128, "max_size": 160}
ARGUMENTS = {
    "faster_rcnn": {**SMALL, "box_score_thresh": 0.0},
    "mask_rcnn": {**SMALL, "box_score_thresh": 0.0, "box_detections_per_img": 10},
    "keypoint_rcnn": {**SMALL, "box_score_thresh": 0.0, "box_detections_per_img": 10},
    "retinanet": {**SMALL, "score_thresh": 0.0},
    "fcos": {**SMALL, "score_thresh": 0.0},
    "ssd": {"score_thresh": 0.0},
    "ssdlite": {"score_thresh": 0.0},
}
Found = TypeVar("Found")


@dataclass
class Brings:
    """What conversions bring, counted at the size that the network is made for."""

    input: str = ""
    macs: int | None = None
    dense: int = 0  # 3×3 convs with groups=1
    has_batch_norms: bool = False
    fronts: int = 0  # convs directly in front of a batch norm of any class that acnet swaps
    taken: int = 0  # of these, the ones whose ACBlock takes the norm over: they are exact in train mode, too
    left: dict[str, int] = field(default_factory=dict)  # why others do not, by reason
    hetconv: float | None = None  # the share of the multiply-adds that is left; None where no conv is claimed
    octave: float | None = None
    octaves: int = 0  # convs that octave swaps
    folded_first: bool = False  # octave is for the network once it has folded itself, as its plan asks for
    idle: list[str] = field(default_factory=list)  # of these, the ones that save nothing
    stays: dict[str, int] = field(default_factory=dict)  # why others stay under octave, by reason

    @property
    def why(self) -> str:
        """The reason why most convs stay under octave."""
        return max(self.stays, key=lambda reason: self.stays[reason], default="")


class Case(NamedTuple):
    """An architecture: `name` as surgeon takes it, `family` the module that defines it."""

    name: str
    family: str
    parameters: int = 0  # by which a sweep is ordered; 0 where nobody has counted
    is_brief: bool = False  # a smaller network of this family has gone the whole way

    @property
    def arguments(self) -> dict[str, Any]:
        return ARGUMENTS.get(self.family, {}) if self.name.startswith("torchvision:") else {}


@dataclass
class Record:
    """What was found out about one network; it is written after every step, so that a crash loses nothing."""

    name: str
    family: str
    left_out: str | None = None  # why it cannot be examined here
    parameters: int | None = None
    dtype: str = ""
    input: list[list[int]] = field(default_factory=list)
    moved_by_input: float | None = None  # relative L2 between its outputs for two inputs: 0 would show nothing
    sites: int | None = None
    swapped: int | None = None
    skipped: dict[str, int] = field(default_factory=dict)  # by reason
    dense: int | None = None  # 3×3 convs with groups=1, Conv2d and its subclasses
    dense_swapped: int | None = None
    dense_skipped: dict[str, int] = field(default_factory=dict)
    islands: int | None = None
    octaves: int | None = None  # convs that the octave recipe swaps
    rewritten: int | None = None  # islands whose graph it rewrites
    seams: dict[str, int] = field(default_factory=dict)  # that it leaves, by reason
    opaque: dict[str, str] = field(default_factory=dict)  # path → why it could not be traced
    apart: dict[str, float] = field(default_factory=dict)  # relative L2 to the original, by step
    moved_by_rounding: float | None = None  # by one unit in the last place of every weight, where `apart` is unusual
    verdicts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    brings: Brings | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    megabytes: int | None = None
    step: str = ""  # what is going on
    into: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.brings, dict):  # as it is read from a file
            self.brings = Brings(**self.brings)

    @property
    def status(self) -> str:
        if self.left_out:
            return "left out"
        return "failed" if self.errors else "wrong" if self.wrong else "right"

    def attempt(self, step: str, work: Callable[..., Found], *given: Any) -> Found | None:
        """Do one step; time it, and note the error if there is one."""
        self.step, start = step, time.perf_counter()
        self.write()
        try:
            return work(*given)
        except Exception as error:
            self.note_error(error)
            return None
        finally:
            self.seconds[step] = round(time.perf_counter() - start, 2)
            self.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            self.write()

    def note_error(self, error: Exception) -> None:
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        self.note(said[:400], f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}")

    def note(self, error: str, place: str) -> None:
        if any(sign in error + place for sign in NO_MEMORY):
            self.left_out = f"{self.step} does not fit into the memory that it may use"
        else:
            self.errors.append({"step": self.step or "start", "error": error, "place": place})

    def write(self) -> None:
        if self.into is not None:
            Path(self.into).write_text(json.dumps(asdict(self)), encoding="utf-8")

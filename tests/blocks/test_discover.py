"""Blocks of other distributions: found, used from Python and the command line, and refused where they cannot be."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import run_surgeon
from torch import nn

import surgeon
import surgeon.nn
from surgeon.blocks import registry
from surgeon.errors import BlockError
from surgeon.recipes import recipe as recipes

MODULE = '''
"""A conv and a scale for every filter, which folds into it."""

import torch
from torch import nn
import surgeon


class {name}Options(surgeon.BlockOptions):
    start: float = 1.0


class {name}(surgeon.Foldable[{name}Options]):
    name = "{block}"
    title = "a conv and a scale for every filter"
    paper = "none"
    Options = {name}Options

    def __init__(self, conv, options):
        super().__init__()
        self.spec = surgeon.ConvSpec.of(conv)
        self.weight, self.bias = conv.weight, conv.bias
        self.scale = nn.Parameter(torch.full_like(conv.weight[:, :1, :1, :1], options.start))

    @classmethod
    def refusal(cls, spec, size, options):
        return "its groups are its own" if spec.groups > 1 else None

    @classmethod
    def keeps_function(cls, options):
        return options.start == 1

    @classmethod
    def from_conv(cls, conv, options, *, norm, generator):
        return cls(conv, options).train(conv.training)

    @classmethod
    def trials(cls):
        yield surgeon.Trial(surgeon.ConvSpec(4, 6, (3, 3)), {name}Options())

    def forward(self, input):
        return nn.functional.conv2d(
            input, self.weight * self.scale, self.bias, self.spec.stride, self.spec.padding, self.spec.dilation
        )

    def fold(self):
        conv = self.spec.build(like=self.weight)
        with torch.no_grad():
            conv.weight.copy_((self.weight.double() * self.scale.double()).to(self.weight.dtype))
            if conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)
'''
BLURRED = '''
"""A conv of blurred maps, which is fitted to the conv that it stands for."""

import torch
from torch import nn
import surgeon
from surgeon.blocks.fittable import Fittable, Path, View


class BlurredOptions(surgeon.BlockOptions):
    size: int = 3


class Blurred(Fittable[BlurredOptions]):
    name = "blurred"
    title = "a conv of blurred maps"
    paper = "none"
    Options = BlurredOptions

    def __init__(self, conv, options):
        super().__init__()
        self.spec, self.size = surgeon.ConvSpec.of(conv), options.size
        self.weight, self.bias = nn.Parameter(conv.weight.clone()), None

    @classmethod
    def refusal(cls, spec, size, options):
        return "it has groups or a bias" if spec.groups > 1 or spec.bias else None

    @classmethod
    def keeps_function(cls, options):
        return options.size == 1

    @classmethod
    def from_conv(cls, conv, options, *, norm, generator):
        return cls(conv, options).train(conv.training)

    @classmethod
    def trials(cls):
        yield surgeon.Trial(surgeon.ConvSpec(4, 6, (3, 3), bias=False), BlurredOptions())

    def blurred(self, x):
        return nn.functional.avg_pool2d(x, self.size, 1, self.size // 2)

    def forward(self, x):
        return nn.functional.conv2d(self.blurred(x), self.weight, None, self.spec.stride, self.spec.padding)

    def views(self, x):
        return [View("all", ((0, self.spec.c_out),), (Path(self.blurred(x), self.spec, ((0, self.spec.c_in),)),))]

    def take_kernel_(self, kernel, bias):
        self.weight.copy_(kernel)
'''
FLOW = """
import torch
from torch import nn
import surgeon

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)).eval()
torch.save(net, "net.pt")
recipe = {"surgeon": 1, "title": "T", "rules": [{"swap": "scaled", "with": {"start": 1.0}}]}
plan = surgeon.plan(net, recipe, (1, 3, 8, 8))
assert [entry.skip for entry in plan.convs] == [None, "its groups are its own"], plan
converted = surgeon.convert(net, plan)
assert type(converted[0]).__name__ == "Scaled"
fused = surgeon.fuse(converted)
assert type(fused[0]) is nn.Conv2d
assert surgeon.verify(net, converted, (1, 3, 8, 8)).verdict == "equivalent"
assert surgeon.verify(converted, fused, (1, 3, 8, 8)).verdict == "equivalent"
with torch.no_grad():
    converted[0].scale[0] += 1e-3
assert surgeon.verify(converted, fused, (1, 3, 8, 8)).verdict == "different"

from surgeon.app.cli import main
for command in (
    "convert net.pt --recipe scaled.yaml --input 1,3,8,8",
    "fuse net.scaled.pt --allow scaled_block",
    "verify net.scaled.pt net.scaled.fused.pt --input 1,3,8,8 --allow scaled_block",
    "blocks",
):
    try:
        main(command.split())
    except SystemExit as stop:
        assert not stop.code, command
"""
RECIPE = "{surgeon: 1, title: T, rules: [{swap: scaled, with: {start: 1.0}}]}"
TOGETHER = """
from surgeon.blocks import Together

def assign(survey, wanted):
    made = Together()
    for i, (path, one) in enumerate(wanted.items()):
        if i % 2:
            made.skips[path] = "every second one stays"
        else:
            made.options[path] = one.options.model_copy(update={"start": 2.0})
    return made
"""


def install(folder: Path, distribution: str, module: str, text: str, target: str) -> None:
    """Lay a distribution out as an installer does: its module, and what its metadata say."""
    folder.mkdir(exist_ok=True)
    importlib.invalidate_caches()
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[surgeon.blocks]\n{module} = {target}\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    text = MODULE.format(name="Scaled", block="scaled")
    install(tmp_path / "site", "scaledblocks", "scaled_block", text, "scaled_block:Scaled")
    return tmp_path / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install the distributions of a folder in this process."""
    monkeypatch.syspath_prepend(site)
    registry.cache_clear()
    yield site
    registry.cache_clear()
    for name in ("scaled_block", "scaled_together", "other"):
        sys.modules.pop(name, None)


REFUSED = {
    "our name": (
        MODULE.format(name="Other", block="acblock"),
        "other:Other",
        "the distribution otherblocks brings a block called 'acblock', and so does surgeon itself",
    ),
    "the name of another distribution's": (
        MODULE.format(name="Other", block="scaled"),
        "other:Other",
        "the distribution scaledblocks brings a block called 'scaled', and so does the distribution otherblocks",
    ),
    "no such class": (
        "",
        "other:Other",
        "other:Other, which the distribution otherblocks brings as a block, cannot be imported: AttributeError",
    ),
    "an import that fails": ("import no_such_package", "other:Other", "No module named 'no_such_package'"),
    "no block": (
        "class Other: ...",
        "other:Other",
        "which the distribution otherblocks brings as a block, is not a subclass",
    ),
    "an abstract block": (
        "import surgeon\nclass Other(surgeon.Foldable): ...",
        "other:Other",
        "does not define fold, from_conv, keeps_function, refusal, trials",
    ),
    "a block without a title": (
        MODULE.format(name="Other", block="other").replace("title =", "heading ="),
        "other:Other",
        "needs a string as its `title`",
    ),
    "a block without options": (
        MODULE.format(name="Other", block="other").replace("Options = Other", "Settings = Other"),
        "other:Other",
        "needs a subclass of surgeon.BlockOptions as its `Options`",
    ),
}


def test_a_block_of_another_distribution_is_one_like_ours(site: Path) -> None:
    (site.parent / "scaled.yaml").write_text(RECIPE)
    root = str(Path(surgeon.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), root]), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", FLOW], cwd=site.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equivalent: B computes what A computes" in done.stdout
    assert "scaled: a conv and a scale for every filter" in done.stdout


def test_the_command_line_says_which_distribution_is_in_the_way(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, target, why = REFUSED["our name"]
    install(installed, "otherblocks", "other", text, target)
    assert run_surgeon("blocks") == 2
    told = capsys.readouterr().err
    assert why in " ".join(told.split())
    assert "Traceback" not in told


def test_its_planner_plans_its_convs_together(installed: Path) -> None:
    text = MODULE.format(name="Scaled", block="scaled")
    (installed / "scaled_block.py").write_text(
        text.replace('    paper = "none"', '    paper = "none"\n    planner = "scaled_together:assign"')
    )
    (installed / "scaled_together.py").write_text(TOGETHER)
    net = nn.Sequential(*(nn.Conv2d(c, 8, 3, groups=g) for c, g in ((3, 1), (8, 1), (8, 1), (8, 1), (8, 2))))
    recipe = recipes.parse(RECIPE, "scaled.yaml")
    entries = surgeon.plan(net, recipe, (1, 3, 16, 16)).convs
    assert [entry.options.get("start") for entry in entries] == [2, None, 2, None, None]
    assert [entry.skip for entry in entries[1::2]] == ["every second one stays"] * 2
    assert entries[4].skip == "its groups are its own"  # what a planner gives a role is asked whether it fits


def test_a_planner_that_is_not_there_is_refused(installed: Path) -> None:
    text = MODULE.format(name="Scaled", block="scaled")
    (installed / "scaled_block.py").write_text(
        text.replace('    paper = "none"', '    paper = "none"\n    planner = "scaled_together:assign"')
    )
    with pytest.raises(BlockError, match="scaled_together:assign, which a block names as its planner, cannot be"):
        surgeon.plan(nn.Sequential(nn.Conv2d(3, 8, 3)), recipes.parse(RECIPE, "r.yaml"), (1, 3, 9, 9))


TWO_STREAMS = """
import copy
import surgeon
from surgeon.blocks.two_streams import TwoStreamBlock, TwoStreamOptions

class Other(TwoStreamBlock[TwoStreamOptions]):
    name, title, paper, Options = "other", "t", "p", TwoStreamOptions

    def __init__(self, conv, options):
        super().__init__()
        self.spec, self.downsample = surgeon.ConvSpec.of(conv), options.downsample
        self.low_in, self.low_out = options.ranges(self.spec)
        self.keeps_seams = options.seams == "keep"
        self.inner = surgeon.OctaveConv(conv, options)

    refusal = classmethod(lambda cls, spec, size, options: "too few" if spec.c_out == 6 else None)
    keeps_function = classmethod(lambda cls, options: False)
    trials = classmethod(lambda cls: iter(()))

    @classmethod
    def from_conv(cls, conv, options, *, norm, generator):
        return cls(conv, options).train(conv.training)

    def core(self, high, low):
        return self.inner.core(high, low)

    def deploy(self):
        return copy.deepcopy(self)
"""


def test_a_block_of_two_streams_has_options_of_one(installed: Path) -> None:
    text = TWO_STREAMS.replace('"p", TwoStreamOptions', '"p", surgeon.BlockOptions')
    install(installed, "otherblocks", "other", text, "other:Other")
    with pytest.raises(BlockError, match="is a TwoStreamBlock, and needs a subclass of TwoStreamOptions"):
        registry()


def test_streams_go_from_our_convs_to_those_of_another_distribution(installed: Path) -> None:
    install(installed, "otherblocks", "other", TWO_STREAMS, "other:Other")
    net = nn.Sequential(*(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8)), nn.Conv2d(8, 6, 3, padding=1)).eval()
    rules = [
        {"swap": "octave", "match": {"name": "0"}, "with": {"min_size": 1}},
        {"swap": "other", "with": {"min_size": 1}},
    ]
    plan = surgeon.plan(net, {"surgeon": 1, "title": "T", "rules": rules}, (1, 3, 16, 16))
    assert [entry.swap for entry in plan.convs] == ["octave", "other", "other", None]
    assert [entry.options.get("alpha_out") for entry in plan.convs] == [0.5, 0.5, 0, None]
    assert plan.convs[3].skip == "too few"
    assert plan.rewritten == ("",)
    assert not plan.seams
    assert plan.stream_blocks == ("octave", "other")
    assert isinstance(surgeon.convert(net, plan), surgeon.nn.Rewritten)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_distribution_that_brings_it(installed: Path, what: str) -> None:
    text, target, why = REFUSED[what]
    install(installed, "otherblocks", "other", text, target)
    with pytest.raises(BlockError) as caught:
        registry()
    assert why in caught.value.problem
    assert "distribution otherblocks" in caught.value.problem
    assert "ninstall it" in caught.value.todo


def test_a_block_that_is_named_twice_is_one(installed: Path) -> None:
    install(installed, "otherblocks", "other", "from scaled_block import Scaled", "other:Scaled")
    assert list(registry()) == ["acblock", "dbb", "hetconv", "octave", "repvgg", "scaled"]


def test_a_block_that_is_not_what_it_claims_to_be_is_named_with_its_package(installed: Path) -> None:
    text = MODULE.format(name="Lying", block="lying").replace("return options.start == 1", "return True")
    install(installed, "otherblocks", "other", text, "other:Lying")
    recipe = {"surgeon": 1, "title": "T", "rules": [{"swap": "lying", "with": {"start": 2.0}}]}
    with pytest.raises(BlockError, match=r"the block 'lying' of other is not what it claims to be: 0 is .*e.* from"):
        surgeon.convert(nn.Sequential(nn.Conv2d(3, 8, 3)), recipe, (1, 3, 8, 8))


BROKEN = {  # what a block does, and what is said of it
    "its from_conv raises": ("return cls(conv, options).train(conv.training)", "raise RuntimeError('no luck')",
        "its from_conv raised RuntimeError: no luck"),
    "its from_conv gives something else": ("return cls(conv, options).train(conv.training)", "return conv",
        "its from_conv returned a Conv2d instead of a Broken"),
    "its refusal raises": ('return "its groups are its own" if spec.groups > 1 else None', "return 1 / 0",
        "its refusal raised ZeroDivisionError"),
    "its refusal is no sentence": ('return "its groups are its own" if spec.groups > 1 else None', "return 5",
        "its refusal returned 5 instead of a sentence or None"),
    "its fold raises": ("def fold(self):", "def fold(self):\n        raise RuntimeError('no luck')",
        "its fold raised RuntimeError: no luck"),
    "its fold gives nothing": ("def fold(self):", "def fold(self):\n        return None",
        "its fold returned a NoneType instead of a Conv2d"),
    "its fold gives another conv": ("def fold(self):", "def fold(self):\n        return nn.Conv2d(1, 1, 1)",
        "its fold returned a conv 1→1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_block_that_breaks_its_contract_is_named_with_its_package(installed: Path, what: str) -> None:
    line, instead, said = BROKEN[what]
    text = MODULE.format(name="Broken", block="broken")
    assert line in text
    install(installed, "otherblocks", "other", text.replace(line, instead), "other:Broken")
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    recipe = {"surgeon": 1, "title": "T", "rules": [{"swap": "broken"}]}
    with pytest.raises(BlockError) as caught:
        surgeon.fuse(surgeon.convert(net, recipe, (1, 3, 8, 8)))
    assert said in caught.value.problem
    assert "the block 'broken' of other" in caught.value.problem
    assert type(net[0]) is nn.Conv2d


def test_a_block_of_another_distribution_is_fitted(installed: Path) -> None:
    install(installed, "otherblocks", "other", BLURRED, "other:Blurred")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    recipe = {"surgeon": 1, "title": "T", "rules": [{"swap": "blurred", "match": {"kernel": 3}}]}
    coarse = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(coarse, size=10, mode="bilinear")  # smooth, so that blurring can be made up for
    fitted = surgeon.convert(net.eval(), recipe, (1, 3, 10, 10), data=images)
    told = surgeon.history(fitted)[-1].measured
    assert [(site["path"], site["block"]) for site in told["sites"]] == [("0", "blurred"), ("3", "Conv2d")]
    assert told["sites"][0]["after"] < told["sites"][0]["before"]
    assert told["network"]["fitted"]["relative_l2"] < 0.9 * told["network"]["converted"]["relative_l2"]


NOT_FITTED = {  # what a block that should be fitted does, and what is said of it
    "its views raise": ("def views(self, x):", "def views(self, x):\n        raise RuntimeError('no luck')",
        "its views raised RuntimeError: no luck"),
    "its views are none": ("def views(self, x):", "def views(self, x):\n        return 5",
        "its views returned 5 instead of a list of views"),
    "a filter is missing": ('View("all", ((0, self', 'View("all", ((1, self', "its views have the filters [1, 2, 3"),
    "its arrangements raise": ("def take_k", "def arrangements(self, *_):\n        return 1 / 0\n\n    def take_k",
        "its arrangements raised ZeroDivisionError"),
    "its take_kernel_ raises": ("self.weight.copy_(kernel)", "self.weights.copy_(kernel)",
        "its take_kernel_ raised AttributeError"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_FITTED)
def test_a_block_that_breaks_its_contract_in_a_fit_is_named_with_its_package(installed: Path, what: str) -> None:
    line, instead, said = NOT_FITTED[what]
    assert line in BLURRED
    install(installed, "otherblocks", "other", BLURRED.replace(line, instead), "other:Blurred")
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).eval()
    converted = surgeon.convert(net, {"surgeon": 1, "title": "T", "rules": [{"swap": "blurred"}]}, (1, 3, 10, 10))
    before = {name: value.clone() for name, value in converted.state_dict().items()}
    with pytest.raises(BlockError) as caught:
        surgeon.fit_(converted, net, torch.randn(16, 3, 10, 10))
    assert said in caught.value.problem
    assert "the block 'blurred' of other" in caught.value.problem
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())

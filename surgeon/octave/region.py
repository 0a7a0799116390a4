"""The convs of one island that a recipe gives to blocks of two streams, and the role of each.

`roles` has the rules that lead to a role, and plans all islands of a network together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from surgeon.analysis import rewritten
from surgeon.analysis.islands import Island
from surgeon.analysis.obstacles import custom_call
from surgeon.analysis.sites import Site, Survey
from surgeon.analysis.uses import used_of_its_class
from surgeon.blocks import Operator, Together
from surgeon.blocks.two_streams import TwoStreamOptions
from surgeon.conv import streams
from surgeon.models.copies import kind_of
from surgeon.octave.layout import Flow, Layout, Step
from surgeon.octave.rewrite import LowPass
from surgeon.octave.rules import rule_of

NO_LOW = "alpha is 0"


@dataclass(slots=True)
class Roles(Together[TwoStreamOptions]):
    """What was planned: the options of the convs that are swapped, why others are not, and what is low-passed."""

    low_passes: list[LowPass] = field(default_factory=list)


class Region:
    """The octave convs of one island."""

    def __init__(
        self,
        survey: Survey,
        island: Island,
        sites: Mapping[str, Site],
        wanted: Mapping[str, TwoStreamOptions],
        roles: Roles,
        open_ended: set[str],
    ) -> None:
        model = survey.model
        root = model.get_submodule(island.path)
        self.survey = survey
        self.island, self.roles, self.wanted, self.open_ended = island, roles, wanted, open_ended
        self.low_passed: list[fx.Node] = []
        self.modules = dict(root.named_modules(remove_duplicate=False))
        first = {module: path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
        paths = {node: first[self.modules[str(node.target)]] for node in island.graph.nodes if node.op == "call_module"}
        self.paths = {node: path for node, path in paths.items() if path in wanted}
        self.sites = {node: sites[path] for node, path in self.paths.items()}
        self.calls = Counter(self.paths.values())
        self.layouts: dict[fx.Node, Layout] = {}
        self.seams: set[fx.Node] = set()  # steps for which streams are joined

    def assign(self) -> None:
        if not self.paths:
            return
        for node in self.island.graph.nodes:
            flow = self._octave(node) if node in self.paths else self._plain(node)
            if flow.low_pass and (flow.seam or not self._has_channels(flow.low_pass[0], flow.layout.channels)):
                flow = Flow(flow.layout.plain)
            self.layouts[node] = flow.layout
            self.seams |= {node} if flow.seam else set()
            self.low_passed += flow.low_pass
            self.roles.low_passes += [self._low_pass(node, one) for one in flow.low_pass]

    def _low_pass(self, node: fx.Node, operand: fx.Node) -> LowPass:
        said = f"{self._step(operand).said}, where {self._step(node).said} adds it to two streams"
        return LowPass(self.island.path, node.name, operand.name, said)

    def _has_channels(self, node: fx.Node, count: int | None) -> bool:
        """Whether a value is a map of so many channels: its layout says so, a conv that reads it, or a run."""
        known = {self.layouts[node].channels} - {None}
        readers = [self.modules[str(user.target)] for user in node.users if user.op == "call_module"]
        known |= {conv.in_channels for conv in readers if isinstance(conv, nn.Conv2d)}
        if not known:
            shape = self.survey.network.shapes.get(self.island.path, {}).get(node.name, ())
            known = {shape[-3]} if len(shape) in (3, 4) else set()
        return known == {count}

    def _plain(self, node: fx.Node) -> Flow:
        step = self._step(node)
        return rule_of(step).flow(step, self.layouts)

    def _step(self, node: fx.Node) -> Step:
        return Step(node, self.modules)

    def added_to_streams(self) -> Iterator[str]:
        """Name the convs that could write low channels but do not, so that their output would have to be low-passed."""
        for node in self.low_passed:
            source = self._origin(node)
            if source is None or source not in self.paths or not self._may_open(source):
                continue
            if self.wanted[self.paths[source]].alpha_out is None:
                yield self.paths[source]

    def _may_open(self, node: fx.Node) -> bool:
        site, options = self.sites[node], self.roles.options.get(self.paths[node])
        assert site.spec is not None
        reads_low = options is not None and bool(options.alpha_in)
        return self._is_large(site, self.wanted[self.paths[node]]) and (site.spec.groups == 1 or reads_low)

    def _octave(self, node: fx.Node) -> Flow:
        """Give a conv its role, and the layout of its output."""
        path, site = self.paths[node], self.sites[node]
        spec = site.spec
        assert spec is not None
        options = self.roles.options.get(path) or self._role(node, site)
        if not any(options.alphas) and not self._is_pooled(node, options):
            self.roles.skips[path] = self._why_plain(node, options)
            return self._plain(node)
        self.roles.options[path] = options
        low = () if options.seams == "keep" else options.ranges(spec)[1]
        return Flow(Layout(spec.c_out, low))

    def _is_pooled(self, node: fx.Node, options: TwoStreamOptions) -> bool:
        """Whether a conv without low channels is pooled: it has stride 2, and reads a conv that a region ends with."""
        spec, source = self.sites[node].spec, self._origin(self._step(node).operand)
        if spec is None or spec.stride != (2, 2) or options.strided == "keep" or source not in self.paths:
            return False
        before = self.roles.options.get(self.paths[source])
        return before is not None and bool(before.alphas[0])

    def _origin(self, node: fx.Node | None) -> fx.Node | None:
        """The step that has made the channels of a value, before steps that change each of them alone."""
        while node is not None and rule_of(self._step(node)).is_channelwise:
            node = self._step(node).operand
        return node

    def needed(self, flat: Collection[str]) -> Iterator[str]:
        """Name the convs that are swapped even if they are among the `flat` ones, which save no multiply-adds.

        Such a conv writes low channels, or reads some for which joining them would be dearer, or was to be pooled.
        """
        is_left = self._is_left()
        for node, path in self.paths.items():
            options, spec = self.roles.options.get(path), self.sites[node].spec
            if options is None or spec is None or options.seams == "keep" or self.calls[path] > 1:
                continue
            low_in, low_out = options.ranges(spec)
            spares_join = low_in and not is_left and self._spares_a_join(node, flat)
            if low_out or spares_join or self._is_pooled(node, options):
                yield path

    def _is_left(self) -> bool:
        """Whether the island cannot become a graph, so that each of its convs splits and joins by itself."""
        root = self.survey.model.get_submodule(self.island.path)
        graph = self.island.graph
        obstacle = rewritten.obstacle(root, graph, custom_call) or rewritten.unwritable(root, graph)
        return bool(obstacle or used_of_its_class(self.survey.model, self.island.path))

    def _spares_a_join(self, node: fx.Node, flat: Collection[str]) -> bool:
        """Whether what a conv reads would have to be joined without it, and that would write more than is written now.

        All flat convs that read the map are taken together. At stride 2, in maps of the size of the input, one writes
        the pooled high channels (¼) and its output twice more (¼ each; once with groups); a join: up(low), all.
        """
        source = self._step(node).operand
        if source is None or not self.layouts[source].is_octave or any(user in self.seams for user in source.users):
            return False
        low, written = streams.count(self.layouts[source].low), 0.0
        channels = self.layouts[source].channels or 0
        for user in source.users:
            spec = self.sites[user].spec if self.paths.get(user) in flat else None
            if spec is not None:
                written += (channels - low) / 4 + spec.c_out / (2 if spec.groups == 1 else 4)
        return written < low + channels

    def _role(self, node: fx.Node, site: Site) -> TwoStreamOptions:
        options, spec = self.wanted[self.paths[node]], site.spec
        assert spec is not None
        if self.calls[self.paths[node]] > 1 or options.seams == "keep":
            return fixed_role(options)
        layout = self._step(node).layout_before(self.layouts)
        layout = layout.plain if layout.is_point else layout
        low_in = layout.low if options.alpha_in is None else streams.last(options.alpha_in, spec.c_in)
        alpha_in = options.alphas[0] if low_in == streams.last(options.alphas[0], spec.c_in) else None
        reads_low = bool(low_in)
        alpha_out = options.alpha_out
        if alpha_out is None:
            is_read = self._has_large_reader(node) or self.paths[node] in self.open_ended
            is_open = self._is_large(site, options) and is_read and (spec.groups == 1 or reads_low)
            alpha_out = self._share(spec.c_out, options.alpha) if is_open else 0.0
        update: dict[str, object] = {"alpha_in": alpha_in if reads_low else 0.0, "alpha_out": alpha_out}
        if reads_low and alpha_in is None:
            alpha_in = streams.share(streams.count(low_in), spec.c_in)
            are_last = low_in == streams.last(alpha_in, spec.c_in)
            update |= {"alpha_in": alpha_in, "low_in": None if are_last else low_in}
        return options.model_copy(update=update)

    def _share(self, channels: int, alpha: float) -> float:
        """The share of low channels in a map: so many less than alpha says that no conv with groups has one cut.

        All maps with as many channels have the same share, so that they can be added.
        """
        specs = [site.spec for site in self.sites.values() if site.spec is not None and site.spec.groups > 1]
        groups = {spec.c_in // spec.groups for spec in specs if spec.c_in == channels}
        groups |= {spec.c_out // spec.groups for spec in specs if spec.c_out == channels}
        low, unit = math.floor(alpha * channels), math.lcm(*groups)
        return streams.share(low - low % unit, channels) if low % unit and low > unit else alpha

    def _is_large(self, site: Site, options: TwoStreamOptions) -> bool:
        """Whether the low map of a conv's output has sides of at least `min_size`; an unknown size counts as large."""
        sides = [side for call in site.runs for side in call.shape_out[-2:]]
        return all(-(-side // 2) >= options.min_size for side in sides) and max(sides, default=2) > 1

    def _has_large_reader(self, node: fx.Node) -> bool:
        readers, _ = self._readers(node)
        return any(self._is_large(self.sites[one], self.wanted[self.paths[one]]) for one in readers)

    def _readers(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """Give what reads a conv through steps that two streams can go through: wanted convs, and where streams end."""
        seen, waiting = {node}, list(node.users)
        readers, ends = [], []
        while waiting:
            user = waiting.pop(0)
            if user in seen:
                continue
            seen.add(user)
            if user in self.paths:
                readers.append(user)
            elif rule_of(self._step(user)).carries:
                waiting += user.users
            else:
                ends.append(user)
        return readers, ends

    def _why_plain(self, node: fx.Node, options: TwoStreamOptions) -> str:
        site = self.sites[node]
        given = self.wanted[self.paths[node]]
        if not options.alpha or (given.alpha_in, given.alpha_out) == (0, 0):
            return NO_LOW
        if self._step(node).layout_before(self.layouts).is_point:
            return "it works on one pixel, which has no low frequencies"
        if not self._is_large(site, options):
            h, w = site.runs[0].shape_out[-2:]
            least = f"its low map would be {-(-h // 2)}×{-(-w // 2)}, smaller than min_size {options.min_size}"
            return f"{least}, and its input has no low channels"
        assert site.spec is not None
        if site.spec.groups > 1:
            return "its input has no low channels, and its groups cannot make any"
        return f"it reads no low channels, and {self._why_unread(node)}"

    def _why_unread(self, node: fx.Node) -> str:
        """Say why no octave conv reads what a conv gives."""
        readers, ends = self._readers(node)
        if readers:
            return "the convs that read it have maps too small for two streams"
        if not ends:
            return "nothing reads it"
        step = self._step(ends[0])
        if step.node.op == "output" and self.island.path:
            kind = kind_of(self.survey.model.get_submodule(self.island.path)).__name__
            return f"two streams would end right behind it: no graph is known of the code that calls its {kind}"
        if step.node.op == "output":
            return "two streams would end right behind it, at the output of the network"
        if isinstance(step.module, nn.Conv2d | Operator):
            return "two streams would end right behind it: the conv that reads it stays"
        return f"two streams would end right behind it, {step.need_of_all}"


def fixed_role(options: TwoStreamOptions) -> TwoStreamOptions:
    """The role of a conv that splits and joins by itself: what its options say."""
    before, behind = options.alphas
    return options.model_copy(update={"alpha_in": before, "alpha_out": behind})

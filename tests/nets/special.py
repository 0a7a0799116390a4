"""Small networks of kinds that libraries of classifiers do not have, written from their papers.

T2TViT      Yuan et al. 2021, Tokens-to-Token ViT, arXiv:2101.11986, section 3.1: soft split, token transformer,
            re-structurisation; with patch convolutions on the maps in between.
Hybrid      ConvNeXt blocks (Liu et al. 2022, arXiv:2201.03545, section 2), then attention over what a conv embeds.
Detector    one-stage, anchor-free: CSP bottlenecks, pooling pyramid, top-down neck, a head per scale whose distances
            are distributions (Li et al. 2020, Generalized Focal Loss, arXiv:2006.04388, section 3.2); layers say where
            their inputs come from, as detection toolkits write them.
UNet        Ronneberger et al. 2015, arXiv:1505.04597, with a residual encoder, as segmentation toolkits build it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Transformers


class Attention(nn.Module):
    def __init__(self, width_in: int, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width_in, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Attention and a perceptron; where the width changes, as in a token transformer, attention has no shortcut."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width_in), Attention(width_in, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.is_residual = width_in == width

    def forward(self, tokens: Tensor) -> Tensor:
        attended = self.attention(self.norm1(tokens))
        tokens = tokens + attended if self.is_residual else attended
        return tokens + self.mlp(self.norm2(tokens))


class T2TViT(nn.Module):
    """Classifies (n, 3, 32, 32): tokens are made of overlapping patches three times, and made maps again in between."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.split1 = nn.Unfold(7, stride=4, padding=2)
        self.split2 = nn.Unfold(3, stride=2, padding=1)
        self.split3 = nn.Unfold(3, stride=2, padding=1)
        self.transformer1 = TransformerLayer(3 * 7 * 7, width)
        self.transformer2 = TransformerLayer(width * 3 * 3, width)
        self.patch1 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU())
        self.patch2 = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.project = nn.Linear(width * 3 * 3, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("place", torch.sin(torch.arange(5 * width).view(1, 5, width) / 7.0))
        self.layers = nn.ModuleList([TransformerLayer(width, width) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2] // 4, x.shape[-1] // 4
        tokens = self.transformer1(self.split1(x).transpose(1, 2))
        x = self.patch1(tokens.transpose(1, 2).unflatten(2, (h, w)))
        tokens = self.transformer2(self.split2(x).transpose(1, 2))
        x = tokens.transpose(1, 2).unflatten(2, (h // 2, w // 2))
        x = x + self.patch2(x)
        tokens = self.project(self.split3(x).transpose(1, 2))
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.place
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens)[:, 0])


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, then a perceptron on the channels in channels-last, scaled, beside a shortcut that may drop it."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.scale * self.shrink(F.gelu(self.expand(y)))).permute(0, 3, 1, 2)
        if self.training and self.drop:
            kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop
            y = y * kept / (1 - self.drop)
        return x + y


class Hybrid(nn.Module):
    """Classifies (n, 3, 32, 32): ConvNeXt blocks, then attention over what a conv embeds."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), ChannelNorm(width))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, drop) for drop in (0.0, 0.2)))
        self.down = nn.Sequential(ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, stride=2))
        self.embed = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width))
        self.place = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.layers = nn.Sequential(*(TransformerLayer(2 * width, 2 * width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.down(self.blocks(self.stem(x))))
        tokens = (x + self.place(x)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(tokens)).mean(1))


# Detection


class Conv(nn.Module):
    """Conv, norm, SiLU."""

    def __init__(self, c_in: int, c_out: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, width: int, *, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(width, width, 3), Conv(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """A CSP stage: one half passes by, the other goes through bottlenecks, and the result of each is kept."""

    def __init__(self, c_in: int, c_out: int, n: int = 1, *, shortcut: bool = False) -> None:
        super().__init__()
        half = c_out // 2
        self.cv1, self.cv2 = Conv(c_in, c_out), Conv((2 + n) * half, c_out)
        self.m = nn.ModuleList(Bottleneck(half, shortcut=shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(m(parts[-1]) for m in self.m)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """One max pooling three times over, for three sizes of window."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.pool(x)
        y2 = self.pool(y1)
        return self.cv2(torch.cat((x, y1, y2, self.pool(y2)), 1))


class Concat(nn.Module):
    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(maps), 1)


class DFL(nn.Module):
    """The mean of a distribution over bins, as a 1×1 conv whose weights are the bins and are never trained."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, anchors = x.shape
        return self.conv(x.view(n, 4, self.bins, anchors).transpose(2, 1).softmax(1)).view(n, 4, anchors)


class Detect(nn.Module):
    """Two branches per scale, for boxes and for classes; in eval mode boxes are decoded around anchors it remembers."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int], classes: int = 3, bins: int = 8) -> None:
        super().__init__()
        self.classes, self.bins, self.strides = classes, bins, tuple(strides)
        self.shape: tuple[int, ...] | None = None
        self.anchors = self.scales = torch.empty(0)
        box, kind = 16, max(8, classes)
        self.boxes = nn.ModuleList(
            nn.Sequential(Conv(w, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * bins, 1)) for w in widths
        )
        self.kinds = nn.ModuleList(
            nn.Sequential(Conv(w, kind, 3), Conv(kind, kind, 3), nn.Conv2d(kind, classes, 1)) for w in widths
        )
        self.dfl = DFL(bins)

    def forward(self, maps: list[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        for i in range(len(self.boxes)):
            maps[i] = torch.cat((self.boxes[i](maps[i]), self.kinds[i](maps[i])), 1)
        if self.training:
            return maps
        shape = tuple(maps[0].shape)
        if self.shape != shape:
            self.anchors, self.scales = self.places(maps)
            self.shape = shape
        flat = torch.cat([m.flatten(2) for m in maps], 2)
        boxes, kinds = flat.split((4 * self.bins, self.classes), 1)
        before, after = self.dfl(boxes).chunk(2, 1)
        centre, size = self.anchors + (after - before) / 2, before + after
        return torch.cat((torch.cat((centre, size), 1) * self.scales, kinds.sigmoid()), 1), maps

    def places(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The centre of every pixel of every map, and the stride of its map: (2, pixels) and (1, pixels)."""
        anchors, scales = [], []
        for m, stride in zip(maps, self.strides, strict=True):
            h, w = m.shape[-2:]
            y, x = torch.meshgrid(torch.arange(h).to(m) + 0.5, torch.arange(w).to(m) + 0.5, indexing="ij")
            anchors.append(torch.stack((x, y)).flatten(1))
            scales.append(torch.full((1, h * w), float(stride)).to(m))
        return torch.cat(anchors, 1), torch.cat(scales, 1)


class Detector(nn.Module):
    """Maps of strides 4 and 8 of (n, 3, 64, 64); every layer says in `f` whose outputs it reads, -1 the last one's."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        layers: list[tuple[int | list[int], nn.Module]] = [
            (-1, Conv(3, 8, 3, 2)),  # 0
            (-1, Conv(8, 16, 3, 2)),
            (-1, C2f(16, 16, 2, shortcut=True)),  # 2: stride 4
            (-1, Conv(16, 32, 3, 2)),
            (-1, C2f(32, 32, 1, shortcut=True)),
            (-1, SPPF(32)),  # 5: stride 8
            (-1, nn.Upsample(scale_factor=2, mode="nearest")),
            ([-1, 2], Concat()),
            (-1, C2f(48, 16)),  # 8: stride 4
            (-1, Conv(16, 16, 3, 2)),
            ([-1, 5], Concat()),
            (-1, C2f(48, 32)),  # 11: stride 8
            ([8, 11], Detect((16, 32), (4, 8), classes)),
        ]
        for i, (source, layer) in enumerate(layers):
            layer.f, layer.i = source, i
        self.model = nn.Sequential(*(layer for _, layer in layers))
        read = {j for source, _ in layers for j in (source if isinstance(source, list) else [source]) if j != -1}
        self.save = sorted(read)

    def forward(self, x: Tensor) -> object:
        saved: list[Tensor | None] = []
        for layer in self.model:
            if layer.f != -1:
                x = saved[layer.f] if isinstance(layer.f, int) else [x if j == -1 else saved[j] for j in layer.f]
            x = layer(x)
            saved.append(x if layer.i in self.save else None)
        return x


# Segmentation


class ResidualBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DecoderBlock(nn.Module):
    """Upsample, join with what the encoder had at that size, two convs."""

    def __init__(self, c_in: int, c_skip: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(c_in + c_skip, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out))
        self.conv2 = nn.Sequential(nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1)
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class UNet(nn.Module):
    """(n, 3, h, w) → (n, classes, h, w); refuses sizes that its encoder cannot halve."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.encoder = nn.ModuleList([ResidualBlock(8, 8, 1), ResidualBlock(8, 16, 2), ResidualBlock(16, 32, 2)])
        self.decoder = nn.ModuleList([DecoderBlock(32, 16, 16), DecoderBlock(16, 8, 8), DecoderBlock(8, 0, 8)])
        self.head = nn.Sequential(nn.Conv2d(8, classes, 3, padding=1), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if h % 8 or w % 8:
            raise RuntimeError(f"an image of {h}×{w} cannot be halved three times")
        features = [self.stem(x)]
        for block in self.encoder:
            features.append(block(features[-1]))
        y, *skips = features[:0:-1]
        for i, block in enumerate(self.decoder):
            y = block(y, skips[i] if i < len(skips) else None)
        return self.head(y)

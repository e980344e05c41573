"""From normalised pictures to patch tokens: the release's linear patches, or a stack of convolutions.

Legend: B pictures, S image side, p patch side, P = (S / p)^2 patches, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2_ds.model.config import M2EncoderConfig


class PatchProjection(nn.Conv2d):
    """[B, 3, S, S] -> [B, P, D]: a convolution whose stride is its kernel, computed as one matrix product."""

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__(3, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        (b, c, s, _), p = x.shape, self.kernel_size[0]
        g = s // p
        patches = x.view(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, c * p * p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ConvStage(nn.Module):
    """3x3 convolution, LayerNorm over channels, GELU on [B, H, W, C]: the layout in which all three are fastest.

    A residual where the shape stays. No statistic of the batch, so a picture's tokens do not depend on its neighbours
    or on the number of ranks.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self._normalised(x))
        return x + y if self.residual else y

    def fit(self, x: Tensor) -> None:
        """Scale and shift so that every channel has mean 0 and variance 1 before the GELU over inputs [B, H, W, C]."""
        mean, std = _moments(self._normalised(x))
        self.norm.bias.sub_(mean).div_(std)
        self.norm.weight.div_(std)

    def _normalised(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """[B, 3, S, S] -> [B, P, D] by 3x3 convolutions, halving the side log2(p) times (arXiv 2106.14881).

    Small pictures and little data want the locality that a linear patch has to learn. ``stem_full_width`` puts a
    convolution at full resolution first.
    """

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        stages = []
        channels = 3
        if config.stem_full_width:
            stages.append(ConvStage(channels, config.stem_full_width, stride=1))
            channels = config.stem_full_width
        for i in range(int(math.log2(config.patch_size))):
            width = min(config.stem_width << i, config.hidden_size)
            for j in range(config.stem_depth):
                stages.append(ConvStage(channels, width, stride=2 if j == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*stages)
        self.out = nn.Linear(channels, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stages(x.permute(0, 2, 3, 1).contiguous()).flatten(1, 2))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set scales and shifts by pictures [B, 3, S, S]: every channel of every stage to mean 0 and variance 1.

        As fresh weights give it, the larger part of what a stage hands on is the same for all pictures, and training
        stands still near ln(batch) until that is unlearned. (arXiv 1511.06422, for scales and shifts.)
        """
        x = x.permute(0, 2, 3, 1).contiguous()
        for stage in self.stages:
            assert isinstance(stage, ConvStage)
            stage.fit(x)
            x = stage(x)
        mean, std = _moments(self.out(x))
        self.out.bias.sub_(mean).div_(std)
        self.out.weight.div_(std[:, None])


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the last axis' channels over all others."""
    x = x.flatten(0, -2)
    return x.mean(0), x.std(0) + 1e-3

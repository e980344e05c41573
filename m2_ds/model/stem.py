"""From normalised pictures to patch tokens: the release's linear patches, or a stack of convolutions.

Legend: B pictures, S image side, p patch side, P = (S / p)^2 patches, D width.
"""

import math

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

    No statistic of the batch, so a picture's tokens do not depend on its neighbours or on the number of ranks.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.gelu(self.norm(x))


class ConvStem(nn.Module):
    """[B, 3, S, S] -> [B, P, D] by 3x3 convolutions, halving the side log2(p) times (arXiv 2106.14881).

    Small pictures and little data want the locality that a linear patch has to learn.
    """

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        stages = []
        channels = 3
        for i in range(int(math.log2(config.patch_size))):
            width = min(config.stem_width << i, config.hidden_size)
            for j in range(config.stem_depth):
                stages.append(ConvStage(channels, width, stride=2 if j == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*stages)
        self.out = nn.Linear(channels, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stages(x.permute(0, 2, 3, 1).contiguous()).flatten(1, 2))

"""What is exported against what it was exported from: onnxruntime's embeddings beside torch's.

Legend: B pictures or captions, S image side, L tokens, E embedding.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from m2_ds.convert.onnx.folder import OnnxConfig
from m2_ds.convert.onnx.graph import Tower

BAR = 1e-4  # largest difference of a component of a unit vector
_BATCHES = (1, 2, 5)

CAPTIONS = [
    "a red apple on a wooden table",
    "两只狗在草地上奔跑",
    "a small blue bird",
    "一个穿红衣服的小女孩在吹泡泡",
    "the skyline of a large city at night, seen from a boat on the river",
    "一杯咖啡和一本打开的书",
    "an old bicycle leans against a brick wall",
    "雪山下的湖",
    "two people play chess in the park",
    "夜晚的城市天际线, 远处有一座桥",
    "a plate of noodles with vegetables and an egg",
    "穿着宇航服的猫",
    "black and white photograph of an empty street",
    "三个绿色的正方形",
    "fireworks over the sea",
    "生日蛋糕上的蜡烛",
]
"""Captions to compare precisions on, where there is no data set."""


class Encoder(Protocol):
    """What an M2Encoder and an OnnxModel have in common."""

    def encode_image(self, images: Tensor) -> Tensor: ...

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor: ...


def largest_difference(reference: Encoder, exported: Encoder, config: OnnxConfig) -> dict[Tower, float]:
    """Between embeddings of random pictures and captions: several B, L up to ``max_text_length``, and padding.

    Raises ValueError where it is above `BAR`, or where embeddings are not finite.
    """
    found: dict[Tower, float] = {"image": 0.0, "text": 0.0}
    with torch.no_grad():
        for batch in _BATCHES:
            images = smooth_pictures(batch, config.image_size)
            found["image"] = _worse(
                found["image"], reference.encode_image(images), exported.encode_image(images), f"pictures [{batch}]"
            )
        for ids, mask in _captions(config):
            what = f"captions {list(ids.shape)}"
            found["text"] = _worse(
                found["text"], reference.encode_text(ids, mask), exported.encode_text(ids, mask), what
            )
    return found


def cosines(reference: Encoder, other: Encoder, texts: tuple[Tensor, Tensor], image_size: int) -> dict[Tower, Tensor]:
    """Of the embeddings of one picture, or caption, by two models: [B] each, over built-in pictures and ``texts``."""
    images = smooth_pictures(16, image_size)
    with torch.no_grad():
        return {
            "image": (reference.encode_image(images) * other.encode_image(images)).sum(-1),
            "text": (reference.encode_text(*texts) * other.encode_text(*texts)).sum(-1),
        }


def smooth_pictures(count: int, size: int) -> Tensor:
    """uint8 [count, 3, S, S]: random colours on grids of 2 to 8, enlarged, and noise. The same at every call."""
    generator = torch.Generator().manual_seed(count)
    pictures = []
    for number in range(count):
        grid = torch.rand(1, 3, 2 + number % 7, 2 + number % 7, generator=generator)
        picture = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)[0]
        pictures.append(picture + 0.1 * torch.randn(3, size, size, generator=generator))
    return (torch.stack(pictures).clamp(0, 1) * 255).round().to(torch.uint8)


def _captions(config: OnnxConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Random ids and masks [B, L]; of every batch the longest caption has L tokens, the others any number down to 1."""
    generator = torch.Generator().manual_seed(0)
    longest = config.max_text_length
    for length in sorted({1, 2, longest // 3 + 1, longest}):
        for batch in _BATCHES:
            lengths = torch.randint(1, length + 1, (batch,), generator=generator)
            lengths[batch // 2] = length
            ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
            yield ids, (torch.arange(length) < lengths[:, None]).long()


def _worse(so_far: float, want: Tensor, found: Tensor, what: str) -> float:
    if want.shape != found.shape:
        raise ValueError(f"{what}: the exported graph gives {list(found.shape)}, the model {list(want.shape)}")
    difference = float((want.float() - found).abs().max())
    if not difference <= BAR:  # NaN is not
        raise ValueError(
            f"{what}: the exported graph differs from the model by {difference:.1e}, and {BAR:.0e} is allowed. "
            "Nothing was written. Weights that are not finite look so, too; otherwise try another --opset"
        )
    return max(so_far, difference)

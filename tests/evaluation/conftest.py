"""A small data set of coloured squares, and a model that knows colours by name (and nothing else)."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from m2_ds.data.shards import Caption, HardNegative, Record, ShardWriter, open_dataset

COLOURS = {
    "red": ("红色", (255, 0, 0)),
    "green": ("绿色", (0, 255, 0)),
    "blue": ("蓝色", (0, 0, 255)),
    "yellow": ("黄色", (255, 255, 0)),
    "cyan": ("青色", (0, 255, 255)),
    "white": ("白色", (255, 255, 255)),
}
WARM = {"red", "yellow"}


class ColourModel(nn.Module):
    """Features of a picture: its mean colour around grey; of a text: the same of the colour that its ids stand for."""

    def __init__(self, blind=False):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.blind = blind
        self.batches = []

    def encode_image(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
        self.batches.append(len(images))
        mean = images.float().mean((2, 3)) - 100
        return normalize(torch.ones_like(mean) if self.blind else mean, dim=1)

    def encode_text(self, ids, mask):
        colour = (ids * mask).float()[:, 1:4] - 100
        return normalize(torch.ones_like(colour) if self.blind else colour, dim=1)


class ColourProcessor:
    """Texts become [length, r, g, b] of the first colour word in them, padded at random length."""

    def images(self, images):
        return torch.stack(
            [torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).contiguous() for image in images]
        )

    def texts(self, texts):
        rows = []
        for text in texts:
            found = [rgb for en, (zh, rgb) in COLOURS.items() if en in text or zh in text]
            rows.append([1, *(found[0] if found else (100, 100, 100))])
        width = 4 + len(texts) % 3
        ids = torch.tensor([row + [7] * (width - 4) for row in rows])
        mask = torch.tensor([[1] * 4 + [0] * (width - 4)] * len(rows))
        return ids, mask


def square(rgb, size=16):
    content = io.BytesIO()
    Image.new("RGB", (size, size), rgb).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Split "test": one picture a colour; two captions in English, one in Chinese; hard negatives; warm or cold."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    with ShardWriter(folder, "colours", group_rows=4) as writer:
        names = list(COLOURS)
        for place, (en, (zh, rgb)) in enumerate(COLOURS.items()):
            other = names[place - 1]
            record = Record(
                key=f"c{place}",
                image=square(rgb),
                captions=[
                    Caption(f"a {en} square", "en", 1.0, "name"),
                    Caption(f"{en}, square, flat", "en", 0.5, "keywords"),
                    Caption(f"{zh}方块", "zh", 1.0, "name"),
                ],
                hard_negatives=[
                    HardNegative(f"a {other} square", "en", "colour"),
                    HardNegative("a square", "en", "shape"),
                    HardNegative(f"{COLOURS[other][0]}方块", "zh", "colour"),
                ],
                group=en,
                category="warm" if en in WARM else "cold",
                source="drawn",
                license="CC0-1.0",
                width=16,
                height=16,
            )
            writer.add("test", record)
    return open_dataset(folder)


@pytest.fixture
def model():
    return ColourModel()


@pytest.fixture
def processor():
    return ColourProcessor()

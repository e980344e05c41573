"""A small data set of coloured squares, and a model that knows colours by name (and nothing else)."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import normalize

from m2_ds.convert.canonical import write_config
from m2_ds.data.shards import Caption, HardNegative, Record, ShardWriter, open_dataset
from m2_ds.data.text_train import train as train_tokenizer
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import init_weights

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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The colours as files: `list/*.png` with list.jsonl beside, and `imagenet/val/{cold,warm}/*.png`."""
    folder = tmp_path_factory.mktemp("files")
    lines = []
    for place, (en, (zh, rgb)) in enumerate(COLOURS.items()):
        for path in (
            folder / f"list/{en}.png",
            folder / f"imagenet/val/{'warm' if en in WARM else 'cold'}/{place}.PNG",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(square(rgb))
        lines.append({"image": f"list/{en}.png", "caption": [f"{zh}方块", f"一个{zh}的方块"]})
    (folder / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    names = {"cold": {"en": ["green", "blue", "cyan", "white"], "zh": ["绿色", "蓝色", "青色", "白色"]}}
    names["warm"] = {"en": ["red", "yellow"], "zh": ["红色", "黄色"]}
    (folder / "classes.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A canonical folder: a small model with random weights, and a tokenizer that knows the colours."""
    folder = tmp_path_factory.mktemp("weights")
    texts = [f"a {en} square, flat" for en in COLOURS] + [f"一个{zh}的方块" for zh, _ in COLOURS.values()]
    texts += ["the text of number 0123456789", "a fox jumps over the lazy dog"]
    (folder / "lines.txt").write_text("\n".join(texts * 3), encoding="utf-8")
    tokenizer = train_tokenizer(folder, corpus=(), text=(folder / "lines.txt",), vocab_size=310, coverage=1.0)
    config = M2EncoderConfig.preset("test")
    network = M2Encoder(config)
    init_weights(network, config, seed=0)
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, folder / "model.safetensors")
    write_config(folder, config)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def model():
    return ColourModel()


@pytest.fixture
def processor():
    return ColourProcessor()

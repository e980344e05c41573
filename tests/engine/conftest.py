"""A small data set of coloured shapes with captions in two languages, a tokenizer, and a recipe that reads both."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from m2_ds.data.shards import Caption, Record, ShardWriter
from m2_ds.data.text_train import train as train_tokenizer
from m2_ds.engine.setup import quiet
from m2_ds.parallel.mesh import Mesh

COLOURS = {
    "red": ("红色", (230, 30, 30)),
    "green": ("绿色", (30, 180, 30)),
    "blue": ("蓝色", (30, 30, 230)),
    "yellow": ("黄色", (230, 230, 30)),
    "purple": ("紫色", (150, 30, 150)),
    "grey": ("灰色", (128, 128, 128)),
}
SHAPES = {"circle": "圆形", "square": "正方形", "bar": "长条", "cross": "十字"}
TRAIN, TEST = 72, 26
LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def picture(colour: str, shape: str, number: int) -> bytes:
    size, content = 40, io.BytesIO()
    image = Image.new("RGB", (size, size), (255, 255, 255))
    draw, fill = ImageDraw.Draw(image), COLOURS[colour][1]
    left, top = 4 + number % 5, 4 + number % 7
    right, bottom = left + 18 + number % 4, top + 18 + number % 3
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill)
    elif shape == "bar":
        draw.rectangle((left, top, right, top + 6), fill)
    else:
        draw.line((left, top, right, bottom), fill, 5)
        draw.line((left, bottom, right, top), fill, 5)
    image.save(content, "PNG")
    return content.getvalue()


def record(number: int, split: str, image: bytes | None = None) -> Record:
    colour = list(COLOURS)[number % 6]
    shape = list(SHAPES)[number // 6 % 4]
    zh, zh_shape = COLOURS[colour][0], SHAPES[shape]
    return Record(
        key=f"{split}-{number}",
        image=picture(colour, shape, number) if image is None else image,
        captions=[
            Caption(f"a {colour} {shape}", "en", 1.0, "short"),
            Caption(f"a {shape} that is {colour}, on white paper", "en", 0.5, "long"),
            Caption(f"{zh}的{zh_shape}", "zh", 1.0, "short"),
            Caption(f"白纸上的一个{zh_shape}，颜色是{zh}", "zh", 0.5, "long"),
        ],
        group=f"{colour} {shape}",
        category=shape,
        source="drawn",
        license="CC0-1.0",
        width=40,
        height=40,
    )


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits "train" (24 groups of 3 pictures) and "test"."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    with ShardWriter(folder, "shapes", group_rows=16) as writer:
        for split, count in (("train", TRAIN), ("test", TEST)):
            for number in range(count):
                writer.add(split, record(number, split))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = {caption.text for number in range(TRAIN) for caption in record(number, "x").captions}
    text = folder / "lines.txt"
    text.write_text("\n".join(sorted(lines)), encoding="utf-8")
    train_tokenizer(folder / "tokenizer", corpus=(), text=(text,), vocab_size=330, coverage=1.0, max_length=32)
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def deepspeed_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of ds_configs/, ZeRO-3 ones with every weight partitioned (by default small ones are not)."""
    folder = tmp_path_factory.mktemp("ds_configs")
    found = {}
    for file in sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json")):
        content = json.loads(file.read_text())
        if content["zero_optimization"]["stage"] == 3:
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        found[file.stem] = folder / file.name
        found[file.stem].write_text(json.dumps(content))
    return found


@pytest.fixture(scope="session")
def recipe(shapes: Path, tokenizer_folder: Path, deepspeed_files: dict[str, Path]) -> dict[str, Any]:
    """Everything that makes numbers hard to keep equal is on: noise, repeats, clipping, rules, both levels."""
    return {
        "folder": "unset",
        "steps": 8,
        "global_batch": 16,
        "seed": 3,
        "tokenizer": str(tokenizer_folder),
        "model": {"preset": "test", "drop_path": 0.2, "patch_drop": 0.3, "position_std": 0.02},
        "data": {
            "sources": [{"path": str(shapes), "split": "train"}],
            "captions": "each",
            "augment": {"crop_scale": [0.8, 1.0], "degrees": 10, "brightness": 0.2},
        },
        "loss": {"unimodal_weight": 0.5, "vl_weight": 1.0, "repeats": "positive"},
        "optim": {
            "lr": 2e-3,
            "weight_decay": 0.1,
            "grad_clip": 0.5,
            "rules": [
                {"pattern": r"backbone\.encoder\..*\.B\.", "lr_scale": 0.5},
                {"pattern": r"vision_embed", "lr_scale": 2.0, "weight_decay": 0.3},
                {"pattern": r"layers\.0\.ffn\.A\.fc1", "freeze": True},
            ],
            "schedule": {"kind": "cosine", "warmup_steps": 2},
        },
        "engine": {"deepspeed": str(deepspeed_files["zero1"]), "threads": 1},
        "checkpoint": {"every": 0},
        "log": {"every": 1},
    }


@pytest.fixture(scope="session")
def broken_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training split again; every ninth picture is cut short."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    with ShardWriter(folder, "shapes", group_rows=16) as writer:
        for number in range(TRAIN):
            whole = record(number, "train")
            writer.add("train", record(number, "train", whole.image[:60]) if number % 9 == 0 else whole)
    return folder


@pytest.fixture(scope="session")
def _job_of_one() -> Iterator[tuple[Mesh, dict[str, str]]]:
    """One for all test files: DeepSpeed keeps its process groups for good. And what it put into the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER_SETS:
            patch.setenv(name, "")  # so that what is set below is taken back
            patch.delenv(name)
        patch.setenv("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
        quiet()
        mesh = Mesh.start(timeout_minutes=2)
        environment = {name: os.environ[name] for name in LAUNCHER_SETS}
    yield mesh, environment
    mesh.stop()


@pytest.fixture(scope="module")
def solo(_job_of_one: tuple[Mesh, dict[str, str]]) -> Iterator[Mesh]:
    """A job of one process, in this process. Not for ZeRO-3, which changes torch's linear layer for good."""
    mesh, environment = _job_of_one
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield mesh

"""The goldens' model with a small tokenizer beside it, as the release's files and as a folder for transformers."""

import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m2_ds import cli
from m2_ds.data.text import Tokenizer
from m2_ds.data.text_train import train as train_tokenizer
from tests.convert.checkpoints import as_layout, converted, random_state, write

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"
TEXTS = [
    "a red fox jumps over the lazy dog",
    "一只红色的狐狸跳过懒狗",
    "two blue circles and a green square",
    "两个蓝色的圆和一个绿色的方块",
    "a dog",
    "狗",
    "",
]
LONG = "a red fox jumps over the lazy dog 一只红色的狐狸跳过懒狗, two blue circles and a green square"


def glm_model() -> Path:
    """The release's tokenizer file, which is not ours to hand on; a machine may have it."""
    named = os.environ.get("M2_GLM_MODEL")
    return Path(named) if named else Path(__file__).parents[3] / "shared/data/glm_zh_en.model"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "lines.txt").write_text("\n".join(TEXTS * 3), encoding="utf-8")
    return train_tokenizer(folder, corpus=(), text=(folder / "lines.txt",), vocab_size=310, coverage=1.0)


@pytest.fixture(scope="session", params=["ckpt_pl.ckpt", "ckpt_deepspeed.ckpt"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A checkpoint in one of the release's layouts, with its configuration and a tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copy(GOLDENS / "variant_a" / request.param, folder / "m2.ckpt")
    shutil.copy(GOLDENS / "variant_a/config.json", folder / "m2.json")
    (folder / "tokenizer.model").write_bytes(tokenizer._model)
    return folder / "m2.ckpt"


@pytest.fixture(scope="session")
def exported(released: Path) -> Path:
    out = released.parent / "m2-goldens"
    cli.run(cli.load("export hugging-face"), "m2 export hugging-face", [str(released), str(out)])
    return out


@pytest.fixture(scope="session")
def released_file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """As `released`, in the one layout that most of the release's files have."""
    folder = tmp_path_factory.mktemp("released_file")
    shutil.copy(GOLDENS / "variant_a/ckpt_pl.ckpt", folder / "m2.ckpt")
    shutil.copy(GOLDENS / "variant_a/config.json", folder / "m2.json")
    (folder / "tokenizer.model").write_bytes(tokenizer._model)
    return folder / "m2.ckpt"


@pytest.fixture(scope="session")
def onnx_folder(released_file: Path) -> Path:
    """Its graphs in both precisions."""
    out = released_file.parent / "m2-onnx"
    cli.run(cli.load("export onnx"), "m2 export onnx", [str(released_file), str(out), "--int8"])
    return out


# -- files to damage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("release"), as_layout(random_state(dtype=torch.float16), "lightning"))


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = as_layout(random_state(dtype=torch.float16), "deepspeed")
    return write(tmp_path_factory.mktemp("legacy"), content, legacy=True)


@pytest.fixture(scope="module")
def canonical(release: Path) -> Path:
    return converted(release, release.parent / "canonical", shard_size="100kB")


@pytest.fixture
def bounded() -> Iterator[None]:
    """No test that uses this may take much memory or time, whatever a file claims."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB
    assert time.monotonic() - start < 60

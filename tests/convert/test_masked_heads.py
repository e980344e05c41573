"""Heads of masked objectives: kept where they can be, left out, and said so, where the release's network alone goes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import m2_ds
from m2_ds.convert.canonical import read_weights, write_config
from m2_ds.convert.hugging_face import M2EncoderModel
from m2_ds.convert.hugging_face.export import export
from m2_ds.convert.release import read_release
from m2_ds.data.text import Tokenizer
from m2_ds.model.weights import MASKED_HEADS
from tests.convert.checkpoints import CONFIG, assert_same_bits, converted, random_state

WITH_HEADS = CONFIG.model_copy(update={"masked_text_head": True, "masked_image_head": 192})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "canonical"
    folder.mkdir()
    save_file(random_state(WITH_HEADS), folder / "model.safetensors")
    write_config(folder, WITH_HEADS)
    return folder


def test_canonical_keeps_them_and_the_release_has_none(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_state(WITH_HEADS)
    assert sum(name.startswith(MASKED_HEADS) for name in state) == 12
    assert_same_bits(read_weights(converted(trained, tmp_path / "again")), state)
    capsys.readouterr()
    released = converted(trained, tmp_path / "released", to="release")
    assert "12 tensors of masked objectives' heads are left out" in " ".join(capsys.readouterr().out.split())
    plain = {name: tensor for name, tensor in state.items() if not name.startswith(MASKED_HEADS)}
    assert_same_bits(read_release(released / "released.ckpt"), plain)
    assert m2_ds.load(released / "released.ckpt")[0].config == CONFIG


def test_a_published_folder_has_none_and_transformers_loads_both(
    trained: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model, _ = m2_ds.load(trained)
    export(model, tokenizer, tmp_path / "published")
    assert not any(name.startswith(MASKED_HEADS) for name in load_file(tmp_path / "published" / "model.safetensors"))
    assert not json.loads((tmp_path / "published" / "config.json").read_text())["masked_text_head"]
    for folder in (tmp_path / "published", trained):
        loaded = M2EncoderModel.from_pretrained(folder)
        assert isinstance(loaded, M2EncoderModel) and loaded.config.network().vocab_size == CONFIG.vocab_size
    assert AutoModel.from_pretrained(trained).config.masked_image_head == 192

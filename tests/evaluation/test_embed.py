"""Embedding a split, over any batch size and number of ranks, and through Parquet."""

import math
import re

import pytest
import torch

from m2_ds.data.shards import Caption, Record, ShardWriter
from m2_ds.evaluation import batches
from m2_ds.evaluation.embed import embed_split, embed_texts, list_split
from m2_ds.evaluation.embedding_files import read_embeddings, write_embeddings
from m2_ds.parallel.mesh import Group
from tests.evaluation.conftest import ColourModel


def test_pictures_and_captions_in_order(model, processor, colours):
    found = embed_split(model, processor, colours.split("test"), 4, "cpu", ["en", "zh"])
    assert found.keys == [f"c{i}" for i in range(6)] and found.groups[0] == "red" and found.categories[0] == "warm"
    assert found.image.shape == (6, 3) and found.image.dtype == torch.float32
    assert model.batches == [4, 2]
    english = found.texts["en"]
    assert len(english.texts) == 12 and english.owner.tolist() == [i // 2 for i in range(12)]
    # The model puts a picture and its captions at the same place.
    for texts in found.texts.values():
        assert torch.allclose(texts.features[texts.text], found.image[texts.owner], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_and_threads_change_nothing(model, processor, colours, batch_size):
    split = colours.split("test")
    one = embed_split(model, processor, split, 2, "cpu", ["zh"], threads=1)
    other = embed_split(model, processor, split, batch_size, "cpu", ["zh"], threads=3)
    assert torch.equal(one.image, other.image) and torch.equal(one.texts["zh"].features, other.texts["zh"].features)


@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_ranks_share_the_work_and_run_equally_often(processor, colours, monkeypatch, size, batch_size):
    """Ranks one after another: first what each would send is kept, then all receive what all sent."""
    split = colours.split("test")
    whole = embed_split(ColourModel(), processor, split, batch_size, "cpu", ["en"])
    monkeypatch.setattr(batches, "broadcast_object", lambda value, group: value)
    sent = [[] for _ in range(size)]
    runs = []
    for rank in range(size):
        monkeypatch.setattr(
            batches,
            "all_gather_rows",
            lambda mine, group, kind: sent[group.rank].append(mine) or torch.cat([mine] * size),
        )
        model = ColourModel()
        embed_split(model, processor, split, batch_size, "cpu", ["en"], group=Group(rank, size, None))
        runs.append(len(model.batches))
    assert len(set(runs)) == 1, "partitioned weights would wait for ever"
    assert runs[0] == math.ceil(math.ceil(6 / batch_size) / size)
    for rank in range(size):
        turns = iter(zip(*sent))
        monkeypatch.setattr(batches, "all_gather_rows", lambda mine, group, kind, turns=turns: torch.cat(next(turns)))
        together = embed_split(
            ColourModel(), processor, split, batch_size, "cpu", ["en"], group=Group(rank, size, None)
        )
        assert torch.equal(together.image, whole.image)
        assert torch.equal(together.texts["en"].features, whole.texts["en"].features)


def test_kinds_limit_and_missing_languages(model, processor, colours):
    split = colours.split("test")
    found = embed_split(model, processor, split, 4, "cpu", ["en"], caption_kinds=["name"], limit=3)
    assert len(found.keys) == 3 and found.texts["en"].texts == ["a red square", "a green square", "a blue square"]
    with pytest.raises(ValueError, match="no captions in 'fr'.*'en': 12"):
        embed_split(model, processor, split, 4, "cpu", ["fr"])
    with pytest.raises(ValueError, match=re.escape("of kinds ['ocr']")):
        embed_split(model, processor, split, 4, "cpu", ["en"], caption_kinds=["ocr"])


def test_a_broken_picture_is_named(model, processor, tmp_path):
    with ShardWriter(tmp_path / "set", "set") as writer:
        writer.add(
            "test",
            Record("k1", b"nonsense", [Caption("a red square", "en")], "g", "s", "l", 1, 1),
        )
    from m2_ds.data.shards import open_dataset

    with pytest.raises(ValueError, match=r"picture 'k1' of split 'test' in .*set can't be decoded"):
        embed_split(model, processor, open_dataset(tmp_path / "set").split("test"), 4, "cpu", ["en"])


def test_texts_listed_twice_are_embedded_once(colours):
    listing = list_split(colours.split("test"))
    listing.captions[1].append({"text": "a red square", "language": "en", "weight": 1.0, "kind": "name"})
    texts, text, owner = listing.texts("en", ["name"])
    assert len(texts) == 6 and text.tolist() == [0, 1, 0, 2, 3, 4, 5] and owner.tolist() == [0, 1, 1, 2, 3, 4, 5]


def test_texts_of_equal_tokens_share_a_row_and_come_back_in_order(model, processor):
    texts = ["blue", "red", "a blue one", "yellow, or so", "red again"]
    found = embed_texts(model, processor, texts, 2, "cpu")
    alone = torch.cat([embed_texts(model, processor, [text], 1, "cpu") for text in texts])
    assert torch.equal(found, alone) and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_parquet_keeps_everything(model, processor, colours, tmp_path):
    found = embed_split(model, processor, colours.split("test"), 4, "cpu", ["en", "zh"])
    write_embeddings(found, tmp_path)
    back = read_embeddings(tmp_path)
    assert torch.equal(back.image, found.image)
    assert (back.keys, back.groups, back.categories) == (found.keys, found.groups, found.categories)
    assert list(back.texts) == ["en", "zh"]
    for language, texts in found.texts.items():
        other = back.texts[language]
        assert other.texts == texts.texts and torch.equal(other.features, texts.features)
        assert sorted(zip(other.text.tolist(), other.owner.tolist())) == sorted(
            zip(texts.text.tolist(), texts.owner.tolist())
        )
    (tmp_path / "images.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="images.parquet holds no embeddings"):
        read_embeddings(tmp_path)

"""Embeddings that are kept: an evaluation goes on, is repeated for nothing, and takes nothing of something else."""

import logging

import pytest
import torch

from m2_ds.evaluation import cache as module
from m2_ds.evaluation.cache import Cache, Identity, Vectors, model_digest
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.run import evaluate
from tests.evaluation.conftest import ColourModel, ColourProcessor
from tests.support.ranks import run_ranks

PREPARED = ["8 px"], ["colours"]


def configuration(pictures, **more):
    tasks = [
        {"kind": "retrieval", "list": pictures / "list.jsonl", "language": "zh", "name": "colours"},
        {"kind": "zeroshot", "folder": pictures / "imagenet/val", "classes": str(pictures / "classes.json")},
    ]
    return EvaluationConfig(tasks=tasks, **{"batch_size": 2, "threads": 1, **more})


def measure(pictures, folder, model=None, **more):
    """(metrics, batches of pictures, calls for texts)"""
    model = model or ColourModel()
    cache = Cache(folder, Identity.of(model, *PREPARED))
    calls = []
    encode = model.encode_text
    model.encode_text = lambda ids, mask: calls.append(len(ids)) or encode(ids, mask)
    content = evaluate(model, ColourProcessor(), configuration(pictures, **more), cache=cache)
    return content["metrics"], model.batches, calls


class Dies(ColourModel):
    """Is killed, as it were, at its batch number `at`."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def encode_image(self, images):
        if len(self.batches) == self.at:
            raise KeyboardInterrupt
        return super().encode_image(images)


def files(folder):
    return sorted(path.name.split("-")[0] + path.suffix for path in folder.rglob("*") if path.is_file())


def test_what_is_there_is_not_computed_again(pictures, tmp_path):
    first, batches, calls = measure(pictures, tmp_path)
    assert batches == [2, 2, 2] * 2 and calls
    assert files(tmp_path) == ["pictures.safetensors"] * 2 + ["texts.safetensors"] * 3
    again, batches, calls = measure(pictures, tmp_path)
    assert (again, batches, calls) == (first, [], [])


def test_other_weights_compute_everything(pictures, tmp_path):
    _, batches, calls = measure(pictures, tmp_path)
    other = ColourModel()
    with torch.no_grad():
        other.logit_scale.add_(1e-6)
    assert measure(pictures, tmp_path, model=other)[1:] == (batches, calls)


def test_other_class_names_embed_texts_alone(pictures, tmp_path):
    for name in ("list.jsonl", "list", "imagenet"):
        (tmp_path / name).symlink_to(pictures / name)
    names = (pictures / "classes.json").read_text()
    (tmp_path / "classes.json").write_text(names)
    measure(tmp_path, tmp_path / "kept")
    (tmp_path / "classes.json").write_text(names.replace("yellow", "white"))
    _, batches, calls = measure(tmp_path, tmp_path / "kept")
    assert batches == [] and calls


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_evaluation_that_was_killed_goes_on(pictures, tmp_path, monkeypatch, at):
    whole, _, _ = measure(pictures, tmp_path / "other")
    monkeypatch.setattr(module, "FLUSH_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        measure(pictures, tmp_path / "kept", model=Dies(at))
    found, batches, _ = measure(pictures, tmp_path / "kept")
    assert found == whole and len(batches) == 6 - at
    assert not [name for name in files(tmp_path / "kept") if name.endswith(".part")]


def test_an_error_loses_nothing_that_was_computed(pictures, tmp_path):
    with pytest.raises(KeyboardInterrupt):  # long before FLUSH_S
        measure(pictures, tmp_path, model=Dies(2))
    assert len(measure(pictures, tmp_path)[1]) == 4


def test_other_weights_preparation_batches_or_data_are_other_keys(pictures):
    model = ColourModel()
    with torch.no_grad():
        other = ColourModel()
        other.logit_scale.add_(1e-6)
    assert model_digest(model) == model_digest(ColourModel()) != model_digest(other)
    assert model_digest(model) != model_digest(model.bfloat16())
    identity = Identity("weights", "pictures", "texts")
    cache = Cache(pictures, identity)
    assert cache.pictures("data", 64).key == cache.pictures("data", 64).key
    keys = {
        cache.pictures("data", 64).key,
        cache.pictures("data", 32).key,
        cache.pictures("other", 64).key,
        cache.texts(["a"], 64).key,
        cache.texts(["a", "b"], 64).key,
        Cache(pictures, Identity("weights 2", "pictures", "texts")).pictures("data", 64).key,
        Cache(pictures, Identity("weights", "pictures 2", "texts")).pictures("data", 64).key,
        Cache(pictures, Identity("weights", "pictures", "texts 2")).texts(["a"], 64).key,
    }
    assert len(keys) == 8


def test_a_file_of_something_else_or_a_damaged_one_is_not_used_and_said_so(tmp_path, caplog):
    cache = Cache(tmp_path, Identity("weights", "pictures", "texts"))
    store, other = cache.pictures("data"), cache.pictures("others")
    vectors = Vectors(torch.arange(3), torch.randn(3, 4), torch.arange(3))
    store.finish(vectors)
    assert all(torch.equal(a, b) for a, b in zip(cache.pictures("data").load(), vectors))
    store._path.rename(other._path)
    with caplog.at_level(logging.WARNING):
        assert other.load() is None
        assert "holds embeddings of something else" in caplog.text
        other._path.write_bytes(other._path.read_bytes()[:-9])
        assert other.load() is None and "is damaged" in caplog.text
    other.finish(vectors)
    assert other.load() is not None


def test_those_of_other_weights_are_deleted_when_asked(pictures, tmp_path):
    measure(pictures, tmp_path)
    (tmp_path / "mine").mkdir()
    other = Cache(tmp_path, Identity("0123456789abcdef" * 4, "p", "t"))
    other.pictures("data").finish(Vectors(torch.arange(1), torch.ones(1, 1), torch.arange(1)))
    other.forget_others()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0123456789abcdef", "mine"]


def test_a_picture_that_was_skipped_is_not_taken_as_whole_later(pictures, tmp_path):
    lines = (pictures / "list.jsonl").read_text()
    (tmp_path / "list").symlink_to(pictures / "list")
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    (tmp_path / "list.jsonl").write_text(lines + '{"image": "bad.png", "caption": ["x"]}\n')
    (tmp_path / "imagenet").symlink_to(pictures / "imagenet")
    (tmp_path / "classes.json").symlink_to(pictures / "classes.json")
    measure(tmp_path, tmp_path / "kept", skip_broken=True)
    with pytest.raises(ValueError, match="'bad.png' .* can't be decoded"):
        measure(tmp_path, tmp_path / "kept")


def on_a_rank(mesh, pictures, folder):
    """All ranks share the cache, and write what they have after every batch."""
    module.FLUSH_S = 0.0
    model = ColourModel()
    cache = Cache(folder, Identity.of(model, *PREPARED))
    content = evaluate(model, ColourProcessor(), configuration(pictures), cache=cache, group=mesh.data_parallel)
    return content["metrics"], len(model.batches)


@pytest.mark.distributed
def test_ranks_go_on_with_what_another_left_and_give_the_same_numbers(pictures, tmp_path):
    whole, _, _ = measure(pictures, tmp_path / "alone")
    with pytest.raises(KeyboardInterrupt):
        measure(pictures, tmp_path / "kept", model=Dies(2))
    # Of the list's three batches one is left, which both ranks compute; the folder's three take two turns.
    for metrics, batches in run_ranks(2, on_a_rank, pictures, tmp_path / "kept"):
        assert metrics == whole and batches == 1 + 2
    assert not [name for name in files(tmp_path / "kept") if name.endswith(".part")]
    assert measure(pictures, tmp_path / "kept")[1:] == ([], [])

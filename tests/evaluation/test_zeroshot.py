"""Class names, templates, class features and accuracy."""

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from m2_ds.evaluation.class_names import load_classes
from m2_ds.evaluation.zeroshot import (
    class_features,
    classify,
    labels_of,
    probabilities,
    write_predictions,
)


def test_class_features_are_the_normalised_mean_of_unit_vectors(model, processor):
    names, templates = [["red", "yellow"], ["blue"]], ["{}", "a {} square"]
    found = class_features(model, processor, names, templates, 3, "cpu")

    def unit(*rgb):
        return normalize(torch.tensor(rgb).float() - 100, dim=0)

    warm = normalize(unit(255, 0, 0) + unit(255, 255, 0), dim=0)
    assert torch.allclose(found, torch.stack([warm, unit(0, 0, 255)]), atol=1e-6)


def test_accuracy_by_hand():
    classes = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    result = classify(image, classes, torch.tensor([0, 1, 1, 2]), ["a", "b", "c"])
    assert result.top1 == 0.75 and result.top5 == 1.0
    assert result.by_class == {"a": 1.0, "b": 0.5, "c": 1.0}
    assert result.metrics() == {"top1": 75.0, "top5": 100.0, "mean_class": pytest.approx(250 / 3)}


def test_constant_features_guess():
    same = normalize(torch.ones(10, 4), dim=1)
    result = classify(same[:6], same, torch.arange(6), [str(i) for i in range(10)])
    assert result.top1 == pytest.approx(0.1) and result.top5 == pytest.approx(0.5)
    with pytest.raises(ValueError, match="diverged"):
        classify(same * float("nan"), same, torch.arange(10), [str(i) for i in range(10)])


def test_probabilities_as_the_release_computes_them():
    image, classes = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    scale = torch.tensor([2.0]).log()
    expected = torch.tensor([[2.0, 0.0]]).softmax(1)
    assert torch.allclose(probabilities(image, classes, scale), expected)


def test_tiles_do_not_matter(monkeypatch):
    image, classes = torch.randn(50, 8), torch.randn(7, 8)
    labels = torch.arange(50) % 7
    whole = classify(image, classes, labels, list("abcdefg"))
    monkeypatch.setattr("m2_ds.evaluation.zeroshot.TILE", 8)
    assert classify(image, classes, labels, list("abcdefg")) == whole


def test_predictions_hold_the_likeliest_classes(tmp_path):
    image = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.0, 0.8]])
    write_predictions(
        tmp_path / "p.parquet", ["x", "y"], image, torch.eye(3), torch.tensor([0, 1]), ["a", "b", "c"], 1.0
    )
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [(row["key"], row["class"], row["top5"]) for row in rows] == [
        ("x", "a", ["a", "b", "c"]),
        ("y", "b", ["c", "a", "b"]),
    ]
    expected = (image * torch.tensor(1.0).exp()).softmax(1).sort(1, descending=True).values
    assert torch.allclose(torch.tensor([row["probability"] for row in rows]), expected)


def test_labels(tmp_path):
    classes = load_classes("emoji_groups")
    assert labels_of(["flags", "smileys-emotion"], classes, "here").tolist() == [8, 0]
    assert labels_of(["8", "0"], classes, "here").tolist() == [8, 0]
    with pytest.raises(ValueError, match=r"here: categories \['9'\] are not among"):
        labels_of(["8", "9"], classes, "here")
    with pytest.raises(ValueError, match=r"here: categories \['None', 'tree'\] are not among"):
        labels_of(["tree", None, "flags"], classes, "here")

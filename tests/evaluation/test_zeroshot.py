"""Class names, templates, class features and accuracy."""

import json

import pytest
import torch
from torch.nn.functional import normalize

from m2_ds.evaluation.zeroshot import (
    class_features,
    classify,
    labels_of,
    load_classes,
    load_templates,
    probabilities,
)

TREE = {"w": {"en": ["warm", "hot"], "zh": "暖"}, "c": {"en": ["cold"], "zh": ["冷"]}}


def test_class_files_of_three_forms_agree(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(TREE))
    (tmp_path / "c.yaml").write_text("w: {en: [warm, hot], zh: 暖}\nc: {en: [cold], zh: [冷]}\n", encoding="utf-8")
    (tmp_path / "c.csv").write_text("id,en,zh\nw,warm|hot,暖\nc,cold,冷\n", encoding="utf-8-sig")
    found = [load_classes(tmp_path / name) for name in ("c.json", "c.yaml", "c.csv")]
    assert found[0] == found[1] == found[2]
    assert found[0].ids == ["w", "c"]
    assert found[0].names == {"en": [["warm", "hot"], ["cold"]], "zh": [["暖"], ["冷"]]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", "{", "can't be read"),
        ("c.json", json.dumps({"w": {"en": "warm"}}), "at least two classes"),
        ("c.json", json.dumps({"w": {"en": "warm", "zh": "暖"}, "c": {"en": "cold"}}), "class 'c' has no name in 'zh'"),
        ("c.json", json.dumps({"w": ["warm"], "c": ["cold"]}), r"\{language: \[names\]\}"),
        ("c.csv", "name,en\nw,warm\n", "a column 'id'"),
    ],
)
def test_bad_class_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_classes(tmp_path / name)
    assert name in str(error.value)


def test_shipped_classes_and_templates():
    classes = load_classes("emoji_groups")
    assert len(classes.ids) == 9 and set(classes.names) == {"en", "zh"}
    for language in ("en", "zh"):
        templates = load_templates(language)
        assert len(templates) == len(set(templates)) >= 10
    with pytest.raises(ValueError, match="no templates ship for language 'fr'"):
        load_templates("fr")
    with pytest.raises(ValueError, match="or 'emoji_groups'"):
        load_classes("emoji_group")


def test_templates_from_a_file(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("- 'une photo de {}'\n", encoding="utf-8")
    assert load_templates("fr", path) == ["une photo de {}"]
    path.write_text("- 'une photo'\n")
    with pytest.raises(ValueError, match="that each hold {} once"):
        load_templates("fr", path)
    with pytest.raises(ValueError, match=r"no prompt templates at .*none\.yaml"):
        load_templates("fr", tmp_path / "none.yaml")


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


def test_labels(tmp_path):
    classes = load_classes("emoji_groups")
    assert labels_of(["flags", "smileys-emotion"], classes, "here").tolist() == [8, 0]
    with pytest.raises(ValueError, match=r"here: categories \['None', 'tree'\] are not among"):
        labels_of(["tree", None, "flags"], classes, "here")

"""Tasks of a configuration end to end with a model whose answers are known."""

import json
import re

import pytest
from pydantic import ValidationError

from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.run import evaluate, run_evaluations, summary
from tests.evaluation.conftest import ColourModel


@pytest.fixture
def config(colours, tmp_path):
    classes = tmp_path / "classes.yaml"
    classes.write_text("warm: {en: [red, yellow], zh: [红色, 黄色]}\ncold: {en: [blue, cyan], zh: [蓝色, 青色]}\n")
    place = {"dataset": colours.folder, "splits": ["test"]}
    return EvaluationConfig(
        batch_size=4,
        tasks=[
            {"kind": "retrieval", **place, "caption_kinds": ["name"]},
            {"kind": "retrieval", **place, "name": "every caption"},
            {"kind": "zeroshot", **place, "classes": str(classes)},
            {"kind": "hard_negatives", **place},
        ],
    )


def test_metrics_of_every_task(model, processor, config):
    found = run_evaluations(model, processor, config)
    for language in ("en", "zh"):
        for direction in ("text_to_image", "image_to_text"):
            assert [found[f"colours/test/{language}/{direction}/r{k}"] for k in (1, 5, 10)] == [100, 100, 100]
        assert found[f"colours/test/{language}/mean_recall"] == 100
        # Green and white are as cold as they are warm to this model; the others are right.
        assert found[f"colours/test/{language}/zeroshot/top1"] >= 400 / 6
        assert found[f"colours/test/{language}/hard_negatives/colour/accuracy"] == 100
    assert found["every caption/test/en/text_to_image/r1"] == 100
    # "a square" is grey to the model, and no closer than the true captions.
    assert found["colours/test/en/hard_negatives/shape/accuracy"] == 100
    assert all(isinstance(value, float) for value in found.values())


def test_pictures_are_embedded_once_for_all_tasks(model, processor, config):
    run_evaluations(model, processor, config)
    assert model.batches == [4, 2]


def test_a_blind_model_guesses(processor, config):
    found = run_evaluations(ColourModel(blind=True), processor, config)
    assert found["colours/test/en/text_to_image/r1"] == pytest.approx(100 / 6)
    assert found["colours/test/zh/image_to_text/r5"] == pytest.approx(500 / 6)
    assert found["colours/test/en/zeroshot/top1"] == pytest.approx(50)
    assert found["colours/test/en/hard_negatives/all/accuracy"] == pytest.approx(50)
    assert found["colours/test/en/hard_negatives/all/strict"] == 0


def test_files_hold_what_is_returned(model, processor, config, tmp_path):
    content = evaluate(model, processor, config, tmp_path / "out", facts={"model": "m", "step": 7})
    assert json.loads((tmp_path / "out/details.json").read_text(encoding="utf-8")) == content
    metrics = json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))
    assert metrics["facts"] == {"parameters": 1, "model": "m", "step": 7}
    assert metrics["metrics"] == run_evaluations(model, processor, config)
    entry = next(entry for entry in content["entries"] if entry["kind"] == "retrieval")
    assert entry["facts"]["median_rank"] == {"image_to_text": 1.0, "text_to_image": 1.0}
    table = summary(content)
    assert (
        re.search(r"colours/test\s+en\s+100\.0 / 100\.0 / 100\.0", table) and "hard_negatives colours/test zh" in table
    )


def test_galleries_show_right_answers_and_mistakes(model, processor, config):
    gallery = evaluate(model, processor, config)["galleries"][0]
    assert gallery["pictures_in_all"] == 6 and set(gallery["languages"]) == {"en", "zh"}
    for query in gallery["queries"]:
        for result in query["by_language"].values():
            assert result["top"][0] == {"picture": query["picture"], "score": 1.0, "right": True}
            assert not any(item["right"] for item in result["top"][1:])
    assert gallery["mistakes"]["en"] == {"text_to_image": [], "image_to_text": []}
    assert all(uri.startswith("data:image/webp;base64,") for uri in gallery["thumbnails"].values())

    blind = evaluate(ColourModel(blind=True), processor, config)["galleries"][0]
    mistake = blind["mistakes"]["zh"]["text_to_image"][0]
    assert mistake["rank"] > 1 and len(mistake["top"]) == 5
    assert {item["picture"] for item in mistake["top"]} | {mistake["right"]} <= set(map(int, blind["thumbnails"]))
    assert [query["picture"] for query in blind["queries"]] == [query["picture"] for query in gallery["queries"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": ["fr"]}, r"split 'test' of .* has no captions in 'fr'"),
        ({"splits": ["none"]}, "no split 'none'"),
        ({"kind": "hard_negatives", "languages": ["fr"]}, "has no hard negatives in 'fr'"),
        ({"kind": "zeroshot", "classes": "emoji_groups"}, r"categories \['cold', 'warm'\] are not among the classes"),
    ],
)
def test_what_a_task_lacks_is_named(model, processor, colours, change, message):
    task = {"kind": "retrieval", "dataset": colours.folder, "splits": ["test"], **change}
    with pytest.raises(ValueError, match=message):
        run_evaluations(model, processor, EvaluationConfig(tasks=[task]))


def test_configuration_refuses_what_it_does_not_know(colours):
    place = {"dataset": colours.folder, "splits": ["test"]}
    with pytest.raises(ValidationError, match="'retrieval', 'zeroshot', 'hard_negatives'"):
        EvaluationConfig(tasks=[{"kind": "captioning", **place}])
    with pytest.raises(ValidationError, match="give one of them another name"):
        EvaluationConfig(tasks=[{"kind": "retrieval", **place}, {"kind": "retrieval", **place}])

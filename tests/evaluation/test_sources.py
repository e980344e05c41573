"""Lists and folders as sources: rows, captions, classes, and what is said about broken ones."""

import json
import os
import re

import pytest

from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.embed import embed_split, list_split
from m2_ds.evaluation.run import evaluate, run_evaluations, summary
from m2_ds.evaluation.sources import FolderSource, ListSource, identity
from tests.evaluation.conftest import ColourModel


def retrieval(root, **more):
    return {"kind": "retrieval", "list": root / "list.jsonl", "language": "zh", **more}


def zeroshot(root, **more):
    return {"kind": "zeroshot", "folder": root / "imagenet/val", "classes": str(root / "classes.json"), **more}


def write_list(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_rows_of_a_list_are_its_different_pictures(tmp_path):
    first, other = {"image": "a.png", "caption": ["x", "y\u2028z"]}, {"image": "b.png", "caption": "x"}
    path = write_list(tmp_path / "l.jsonl", first, other, "", {"image": "a.png", "caption": ["w"]})
    source = ListSource(path, None, "en")
    assert len(source) == 2 and source.languages == {"en": 4} and source.name == "l"
    listing = list_split(source)
    assert listing.keys == listing.groups == ["a.png", "b.png"]
    assert listing.texts("en")[0] == ["x", "y\u2028z", "w"]
    assert listing.texts("en")[2].tolist() == [0, 0, 0, 1]
    assert [line.row for line in source.lines] == [0, 1, 0]
    assert ListSource(path, None, "en", str.upper).lines[1].captions == ["X"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"l.jsonl, line 2 is no JSON"),
        ('["a.png"]', r"l.jsonl, line 2: field 'image'"),
        ({"caption": ["x"]}, r"l.jsonl, line 2: field 'image'"),
        ({"image": "a.png"}, r"l.jsonl, line 2: field 'caption'.*found None"),
        ({"image": "a.png", "caption": []}, r"l.jsonl, line 2: field 'caption'"),
        ({"image": "a.png", "caption": ["x", " "]}, r"l.jsonl, line 2: field 'caption'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_list(tmp_path / "l.jsonl", {"image": "a.png", "caption": ["x"]}, line)
    with pytest.raises(ValueError, match=message):
        ListSource(path, None, "en")


def test_lists_that_are_missing_empty_or_not_text(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such list"):
        ListSource(tmp_path / "none.jsonl", None, "en")
    with pytest.raises(ValueError, match="holds no pictures"):
        ListSource(write_list(tmp_path / "l.jsonl", ""), None, "en")
    (tmp_path / "l.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="is not UTF-8"):
        ListSource(tmp_path / "l.jsonl", None, "en")


def test_retrieval_on_a_list(model, processor, pictures):
    config = EvaluationConfig(tasks=[retrieval(pictures, name="colours")], batch_size=4)
    content = evaluate(model, processor, config)
    assert content["metrics"]["colours/list/zh/mean_recall"] == 100
    assert content["entries"][0]["facts"]["captions"] == 12
    assert content["galleries"][0]["pictures_in_all"] == 6
    blind = run_evaluations(ColourModel(blind=True), processor, config)
    assert blind["colours/list/zh/text_to_image/r1"] == pytest.approx(100 / 6)


def test_titles_without_a_name(model, processor, pictures):
    config = EvaluationConfig(tasks=[retrieval(pictures), zeroshot(pictures)])
    found = run_evaluations(model, processor, config)
    assert f"{pictures.name}/list/zh/mean_recall" in found and "imagenet/val/en/zeroshot/top1" in found


def test_missing_pictures_are_counted_before_anything_is_computed(model, processor, pictures, tmp_path):
    path = write_list(
        tmp_path / "l.jsonl", *({"image": f"list/{name}.png", "caption": ["红色"]} for name in ("red", "pink", "ochre"))
    )
    task = {"kind": "retrieval", "list": path, "images": pictures, "language": "zh"}
    with pytest.raises(
        ValueError, match=r"2 of the 3 pictures of .*l\.jsonl are not below .*the first one 'list/pink.png'"
    ):
        run_evaluations(model, processor, EvaluationConfig(tasks=[task]))
    assert model.batches == []
    assert run_evaluations(model, processor, EvaluationConfig(tasks=[{**task, "limit": 1}]))


def test_classification_of_a_folder_and_of_a_flat_one(model, processor, pictures, tmp_path):
    config = EvaluationConfig(tasks=[zeroshot(pictures)], batch_size=4)
    content = evaluate(model, processor, config)
    found = content["metrics"]
    assert found["imagenet/val/zh/zeroshot/top1"] >= 400 / 6
    facts = content["entries"][0]["facts"]
    assert facts["counts"] == {"cold": 4, "warm": 2} and facts["pictures"] == 6 and facts["by_class"]["warm"] == 100

    paths = sorted((pictures / "imagenet/val").rglob("*.PNG"))
    for labels in ([path.parent.name for path in paths], [path.parent.name == "warm" for path in paths]):
        lines = [
            f"{path.relative_to(pictures)} {int(x) if isinstance(x, bool) else x}" for path, x in zip(paths, labels)
        ]
        (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n")
        task = zeroshot(pictures, folder=pictures, labels=tmp_path / "labels.txt", name="imagenet")
        flat = evaluate(model, processor, EvaluationConfig(tasks=[task]))
        assert [entry["metrics"] for entry in flat["entries"]] == [entry["metrics"] for entry in content["entries"]]


def test_names_without_ids_take_the_folders_in_order(model, processor, pictures, tmp_path):
    (tmp_path / "en.json").write_text(json.dumps([["green", "blue", "cyan", "white"], ["red", "yellow"]]))
    task = zeroshot(pictures, classes={"en": tmp_path / "en.json"}, languages=["en"])
    found = run_evaluations(model, processor, EvaluationConfig(tasks=[task]))
    whole = run_evaluations(model, processor, EvaluationConfig(tasks=[zeroshot(pictures)]))
    assert found == {name: value for name, value in whole.items() if "/en/" in name}
    (tmp_path / "en.json").write_text(json.dumps(["cold", "warm", "hot"]))
    with pytest.raises(ValueError, match="lists 3 names without ids, but there are 2 classes"):
        run_evaluations(model, processor, EvaluationConfig(tasks=[task]))


def test_bad_folders_and_labels_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no folders with pictures"):
        FolderSource(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").touch()
    (tmp_path / "a/.hidden").touch()
    assert FolderSource(tmp_path).classes == ["a"]
    (tmp_path / "a/2.doc").touch()
    with pytest.raises(ValueError, match=re.escape("({'.doc': 1}) lie in the classes' folders")):
        FolderSource(tmp_path)
    for text, message in (("1.png\n", "line 1: expected a picture's path"), ("1.png a\n\n1.png b\n", "line 3.*before")):
        (tmp_path / "labels.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            FolderSource(tmp_path, tmp_path / "labels.txt")
    with pytest.raises(ValueError, match="no such file of labels"):
        FolderSource(tmp_path, tmp_path / "none.txt")
    (tmp_path / "labels.txt").write_text("my picture.png a\n")
    assert FolderSource(tmp_path, tmp_path / "labels.txt").keys == ["my picture.png"]


@pytest.fixture
def with_a_broken_one(pictures, tmp_path):
    """The list with one more picture, between the others, that can't be decoded."""
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    lines = (pictures / "list.jsonl").read_text().splitlines()
    lines = [json.dumps({**json.loads(line), "image": str(pictures / json.loads(line)["image"])}) for line in lines]
    lines.insert(3, json.dumps({"image": "bad.png", "caption": ["红色方块", "白色"]}))
    return write_list(tmp_path / "list.jsonl", *lines)


@pytest.mark.parametrize("protocol", ["fair", "release"])
def test_broken_pictures_end_an_evaluation_or_are_counted(model, processor, pictures, with_a_broken_one, protocol):
    task = {"kind": "retrieval", "list": with_a_broken_one, "language": "zh", "protocol": protocol, "name": "colours"}
    with pytest.raises(ValueError, match=r"picture 'bad\.png' of split 'list' in .*skip_broken"):
        run_evaluations(model, processor, EvaluationConfig(tasks=[task]))
    found = evaluate(model, processor, EvaluationConfig(tasks=[task], skip_broken=True, batch_size=2))
    whole = evaluate(model, processor, EvaluationConfig(tasks=[retrieval(pictures, protocol=protocol, name="colours")]))
    assert found["metrics"] == whole["metrics"]
    facts = found["entries"][0]["facts"]
    assert facts["skipped"] == ["bad.png"] and facts["pictures"] == 6 and facts["captions"] == 12
    assert "colours/list: 1 pictures can't be decoded and are left out" in summary(found)
    assert "bad.png" not in found["galleries"][0]["picture_keys"].values()


def test_equal_pictures_tie_whatever_batches_they_were_in(processor, pictures, tmp_path):
    """A model whose numbers depend on the batch, as matrix products do in their last bits."""

    class Unsteady(ColourModel):
        def encode_image(self, images):
            return super().encode_image(images) + len(self.batches) * 1e-6

    data = (pictures / "list/red.png").read_bytes()
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(data)
    lines = [{"image": f"{number}.png", "caption": [f"红色{number}"]} for number in range(4)]
    source = ListSource(write_list(tmp_path / "l.jsonl", *lines), None, "zh")
    found = embed_split(Unsteady(), processor, source, 1, "cpu", ["zh"])
    assert (found.image == found.image[0]).all()
    assert (found.texts["zh"].features == found.texts["zh"].features[0]).all(), "the same tokens, the same vector"


def test_identity_tells_what_was_changed(pictures, tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    source = ListSource(write_list(tmp_path / "l.jsonl", {"image": "a.png", "caption": "x"}), None, "en")
    before = identity(source, 1)
    assert identity(source, 1) == before
    stat = os.stat(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"two")
    os.utime(tmp_path / "a.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(source, 1) != before, "the same size and time, but written again"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "retrieval"}, "reads one of dataset, list"),
        (
            {"kind": "retrieval", "dataset": "d", "splits": ["s"], "list": "l", "language": "en"},
            "set are dataset, list",
        ),
        ({"kind": "retrieval", "dataset": "d"}, "name at least one split"),
        ({"kind": "retrieval", "list": "l"}, "which language"),
        ({"kind": "retrieval", "list": "l", "language": "en", "languages": ["en", "zh"]}, "a list is of one language"),
        ({"kind": "retrieval", "list": "l", "language": "en", "splits": ["s"]}, "`list` has none"),
        ({"kind": "retrieval", "list": "l", "language": "en", "caption_kinds": ["tts"]}, "neither kinds nor groups"),
        ({"kind": "retrieval", "dataset": "d", "splits": ["s"], "protocol": "release"}, "belong to `list`"),
        ({"kind": "zeroshot", "dataset": "d", "splits": ["s"], "classes": "c", "labels": "l"}, "belong to `folder`"),
        ({"kind": "zeroshot", "folder": "f", "classes": {"en": "c"}}, "no file for language 'zh'"),
        ({"kind": "hard_negatives", "splits": ["s"]}, "reads one of dataset"),
    ],
)
def test_tasks_that_contradict_themselves_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(tasks=[task])


def test_a_resolved_configuration_can_be_read_back(pictures):
    config = EvaluationConfig(tasks=[retrieval(pictures, protocol="release"), zeroshot(pictures)])
    assert EvaluationConfig.model_validate(config.model_dump(mode="json")) == config
    assert EvaluationConfig.model_validate_json(config.model_dump_json()) == config

"""Files of class names and templates, in every form."""

import json

import pytest

from m2_ds.evaluation.class_names import load_classes, load_templates

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


SYNONYMS = [["tench", "Tinca tinca"], ["goldfish"]]


@pytest.mark.parametrize(
    ("name", "content", "ids"),
    [
        ("c.json", json.dumps({"n01440764": SYNONYMS[0], "n01443537": "goldfish"}), None),
        ("c.json", json.dumps([SYNONYMS[0], "goldfish"]), ["n01440764", "n01443537"]),
        ("c.yaml", "- [tench, Tinca tinca]\n- goldfish\n", ["n01440764", "n01443537"]),
        ("c.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n", None),
    ],
)
def test_files_of_one_language(tmp_path, name, content, ids):
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = load_classes(tmp_path / name, ["en"], ids)
    assert found.ids == ["n01440764", "n01443537"] and found.names == {"en": SYNONYMS}
    with pytest.raises(ValueError, match="names of one language, and languages are not given"):
        load_classes(tmp_path / name, None, ids)
    with pytest.raises(ValueError, match=r"\['en', 'zh'\] are asked for: give one language, or a file for each"):
        load_classes(tmp_path / name, ["en", "zh"], ids)


def test_the_numbered_form_is_put_in_order(tmp_path):
    content = {"10": ["n00000010", "ten"], "2": ["n00000002", "two"], "0": ["n00000099", "zero"]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    found = load_classes(tmp_path / "c.json", ["en"])
    assert found.ids == ["n00000099", "n00000002", "n00000010"] and found.names["en"] == [["zero"], ["two"], ["ten"]]


def test_names_without_ids_are_numbered_unless_ids_are_given(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(["a", "b"]))
    assert load_classes(tmp_path / "c.json", ["en"]).ids == ["0", "1"]
    with pytest.raises(ValueError, match="lists 2 names without ids, but there are 3 classes"):
        load_classes(tmp_path / "c.json", ["en"], ["x", "y", "z"])


def test_a_file_for_each_language(tmp_path):
    (tmp_path / "en.json").write_text(json.dumps({"w": "warm", "c": "cold"}))
    (tmp_path / "zh.txt").write_text("c 冷\nw 暖\n", encoding="utf-8")
    files = {"en": tmp_path / "en.json", "zh": tmp_path / "zh.txt"}
    found = load_classes(files, ["en", "zh"])
    assert found.ids == ["w", "c"] and found.names == {"en": [["warm"], ["cold"]], "zh": [["暖"], ["冷"]]}
    assert list(load_classes(files, ["zh"]).names) == ["zh"]
    (tmp_path / "zh.txt").write_text("c 冷\nh 热\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"zh\.txt: classes \['h', 'w'\] are in one of the files"):
        load_classes(files, ["en", "zh"])


def test_a_language_that_is_not_there(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(TREE))
    with pytest.raises(ValueError, match=r"no class names in 'fr'; it has \['en', 'zh'\]"):
        load_classes(tmp_path / "c.json", ["fr"])


@pytest.mark.parametrize("content", ["n1\nn2 x\n", "n1 x\nn1 y\n"])
def test_a_bad_line_of_text_is_named(tmp_path, content):
    (tmp_path / "c.txt").write_text(content)
    with pytest.raises(ValueError, match=r"c\.txt, line [12]: expected an id of its own"):
        load_classes(tmp_path / "c.txt", ["en"])

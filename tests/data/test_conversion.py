"""Other people's formats: every usable record arrives, every other is counted and named, wrong names stop."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_ds.data.records import Caption, HardNegative, Record
from m2_ds.data.shards import open_dataset
from m2_ds.data.sources import inspect, jsonl, tar
from m2_ds.data.sources.captions import FieldError, detect_language, read_captions
from m2_ds.data.sources.conversion import by_split
from tests.support.pairs import encoded, picture

PNG, JPEG, WEBP = (encoded(picture(k, 20), kind) for k, kind in enumerate(("PNG", "JPEG", "WEBP")))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a red fox", "en"),
        ("一只红色的狐狸", "zh"),
        ("我的 iPhone 手机", "zh"),
        ("plate of mapo tofu (豆腐) on a table", "en"),
        ("café à Paris", "en"),
        ("赤い狐です", None),
        ("レストラン", None),
        ("붉은 여우", None),
        ("красная лиса", None),
        ("12:30 !!", None),
        ("", None),
        ("10 只狗", "zh"),
    ],
)
def test_language_by_script(text: str, language: str | None) -> None:
    assert detect_language(text) == language


@given(st.text())
def test_any_text_has_a_language_or_none(text: str) -> None:
    assert detect_language(text) in ("en", "zh", None)


def test_captions_in_every_form() -> None:
    dog, gou = Caption("a dog", "en"), Caption("一条狗", "zh")
    assert read_captions("a  dog\n") == [dog]
    assert read_captions(["a dog", "一条狗"]) == [dog, gou]
    assert read_captions({"en": "a dog", "zh": ["一条狗"]}) == [dog, gou]
    assert read_captions({"de": "ein Hund"}) == [Caption("ein Hund", "de")]
    assert read_captions("ein Hund", "de") == [Caption("ein Hund", "de")]
    assert read_captions([{"text": "a dog", "weight": 2, "kind": "alt"}, ""]) == [Caption("a dog", "en", 2.0, "alt")]
    assert read_captions(["犬です", "a dog"]) == [dog]
    for value, reason in [
        (None, "no caption"),
        (["", " "], "no caption"),
        ("犬です", "unknown language"),
        (3, "bad fields"),
        ([{"text": "a", "weight": 0}], "bad fields"),
        ([{"text": 7}], "bad fields"),
    ]:
        with pytest.raises(FieldError) as error:
            read_captions(value)
        assert error.value.reason == reason


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def records(folder: Path, split: str = "train") -> dict[str, Record]:
    there = open_dataset(folder).split(split)
    return {record.key: record for record in there.read(range(len(there)))}


def skipped(folder: Path) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert all(set(line) == {"file", "record", "reason", "detail"} for line in lines)
    return [(Path(line["file"]).name, line["record"], line["reason"]) for line in lines]


def test_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = {
        "captions": {"en": ["a dog", "the dog"], "zh": "狗"},
        "group": "dogs",
        "license": "CC0-1.0",
        "category": "animal",
        "hard_negatives": [{"text": "a cat", "kind": "noun"}],
    }
    write_tar(
        tmp_path / "a-000.tar",
        {
            "x/001.jpg": JPEG,
            "x/001.txt": b"a red fox",
            "x/002.png": PNG,
            "x/002.json": json.dumps(full).encode(),
            "x/003.jpg": JPEG[:100],
            "x/003.txt": b"cut",
            "x/004.jpg": JPEG,
            "x/005.txt": b"no picture",
            "x/006.webp": WEBP,
            "x/006.txt": "狐狸".encode(),
            "x/007.jpg": JPEG,
            "x/007.txt": "きつね".encode(),
            "x/008.jpg": JPEG,
            "x/008.json": b"{",
            "x/009.jpg": JPEG,
            "x/009.txt": b"\xff\xfe",
        },
    )
    write_tar(
        tmp_path / "a-001.tar", {"001.jpeg": JPEG, "001.json": b'{"caption": "two foxes"}', "001.txt": b"not this"}
    )
    write_tar(tmp_path / "v.tar", {"1.png": PNG, "1.txt": b"for validation"})
    tar.convert(
        tmp_path / "out",
        (str(tmp_path / "a-{000..001}.tar"), f"val={tmp_path}/v*.tar"),
        license="CC-BY-4.0",
        workers=1,
    )
    train = records(tmp_path / "out")
    assert list(train) == ["a-000/x/001", "a-000/x/002", "a-000/x/006", "a-001/001"]
    fox, dog = train["a-000/x/001"], train["a-000/x/002"]
    assert (fox.image, fox.width, fox.height, fox.license) == (JPEG, 20, 20, "CC-BY-4.0")
    assert (fox.captions, fox.group, fox.source) == ([Caption("a red fox", "en")], "a-000/x/001", "out")
    assert dog.captions == [Caption("a dog", "en"), Caption("the dog", "en"), Caption("狗", "zh")]
    assert (dog.group, dog.license, dog.category) == ("dogs", "CC0-1.0", "animal")
    assert dog.hard_negatives == [HardNegative("a cat", "en", "noun")]
    assert train["a-001/001"].captions == [Caption("two foxes", "en")]
    assert list(records(tmp_path / "out", "val")) == ["v/1"]
    assert skipped(tmp_path / "out") == [
        ("a-000.tar", "x/003", "broken picture"),
        ("a-000.tar", "x/004", "no caption"),
        ("a-000.tar", "x/005", "missing picture"),
        ("a-000.tar", "x/007", "unknown language"),
        ("a-000.tar", "x/008", "bad fields"),
        ("a-000.tar", "x/009", "bad fields"),
    ]
    printed = capsys.readouterr().out
    assert "records used: 5; left out: 6 (bad fields: 2, " in printed
    assert str(tmp_path / "out" / "skipped.jsonl") in printed


@pytest.mark.parametrize("at", [0, 100, 512 + 40])
def test_a_tar_cut_short_gives_what_is_whole_and_says_so(tmp_path: Path, at: int) -> None:
    members = {}
    for number in range(40):
        members |= {f"{number:03}.png": PNG * 5, f"{number:03}.txt": b"a thing"}
    write_tar(tmp_path / "cut.tar", members)
    content = (tmp_path / "cut.tar").read_bytes()
    # Between two files, inside a header, or inside a picture.
    cut = content.index(b"020.png") + at
    (tmp_path / "cut.tar").write_bytes(content[:cut])
    write_tar(tmp_path / "whole.tar", {"1.png": PNG, "1.txt": b"a thing"})
    tar.convert(tmp_path / "out", (str(tmp_path / "cut.tar"), str(tmp_path / "whole.tar")), workers=1)
    assert list(records(tmp_path / "out")) == [f"cut/{number:03}" for number in range(20)] + ["whole/1"]
    assert "broken tar" in [reason for file, _, reason in skipped(tmp_path / "out") if file == "cut.tar"]


def test_a_file_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match="not one record could be used .*broken tar: 1"):
        tar.convert(tmp_path / "out", (str(tmp_path / "no.tar"),), workers=1)
    with pytest.raises(ValueError, match="holds no data set"):
        open_dataset(tmp_path / "out")


def test_a_wrong_pattern_stops_before_anything_is_written(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-0.tar", {"1.png": PNG, "1.txt": b"a thing"})
    for pattern, missing in [("a-{0..1}.tar", "a-1.tar"), ("b-*.tar", r"b-\*.tar")]:
        with pytest.raises(ValueError, match=f"{missing}: no such file"):
            tar.convert(tmp_path / "out", (str(tmp_path / pattern),))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no files given"):
        tar.convert(tmp_path / "out", ())


def test_tars_of_one_name_do_not_collide(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", {"1.png": PNG, "1.txt": b"a thing"})
    tar.convert(tmp_path / "out", (str(tmp_path / "{one,two}" / "0.tar"),), workers=1)
    assert len(records(tmp_path / "out")) == 2


def write_jsonl(path: Path, lines: list[Any]) -> None:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_bytes(JPEG)
    (tmp_path / "pictures" / "2.png").write_bytes(PNG)
    (tmp_path / "pictures" / "cut.jpg").write_bytes(JPEG[:100])
    write_jsonl(
        tmp_path / "train.jsonl",
        [
            {"image": "1.jpg", "caption": "a red fox"},
            "",
            {"image": "2.png", "captions": {"en": "a dog", "zh": ["狗", "一条狗"]}, "group": "dogs"},
            {"image": "1.jpg", "caption": "一只红狐狸"},
            {"image": "none.jpg", "caption": "not there"},
            {"image": "cut.jpg", "caption": "cut"},
            {"caption": "no picture named"},
            {"image": "2.png"},
            "{broken",
            "[1, 2]",
            {"image": "2.png", "caption": {"text": "a hound", "weight": "heavy"}},
        ],
    )
    write_jsonl(tmp_path / "val.jsonl", [{"image": "2.png", "caption": "for validation", "key": "v"}])
    jsonl.convert(
        tmp_path / "out",
        (str(tmp_path / "train.jsonl"), f"val={tmp_path / 'val.jsonl'}"),
        images=tmp_path / "pictures",
        name="animals",
        workers=1,
    )
    train = records(tmp_path / "out")
    # Two lines about one picture: two records of one group, so that neither caption is wrong for the other.
    assert [(key, record.group) for key, record in train.items()] == [
        ("1.jpg", "1.jpg"),
        ("2.png", "dogs"),
        ("1.jpg#2", "1.jpg"),
    ]
    assert train["2.png"].captions == [Caption("a dog", "en"), Caption("狗", "zh"), Caption("一条狗", "zh")]
    assert train["1.jpg"].image == JPEG
    assert list(records(tmp_path / "out", "val")) == ["v"]
    assert open_dataset(tmp_path / "out").name == "animals"
    assert skipped(tmp_path / "out") == [
        ("train.jsonl", "line 5", "missing picture"),
        ("train.jsonl", "line 6", "broken picture"),
        ("train.jsonl", "line 7", "missing picture"),
        ("train.jsonl", "line 8", "no caption"),
        ("train.jsonl", "line 9", "bad line"),
        ("train.jsonl", "line 10", "bad line"),
        ("train.jsonl", "line 11", "bad fields"),
    ]


def test_jsonl_fields_can_be_named_and_folders_default_to_the_files(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(JPEG)
    write_jsonl(tmp_path / "a.jsonl", [{"path": "1.jpg", "caption": "not this", "alt": "ein Fuchs"}])
    jsonl.convert(
        tmp_path / "out",
        (str(tmp_path / "a.jsonl"),),
        image_field="path",
        caption_field="alt",
        language="de",
        workers=1,
    )
    assert records(tmp_path / "out")["1.jpg"].captions == [Caption("ein Fuchs", "de")]


def test_jsonl_wrong_names_stop(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"image": "1.jpg", "caption": "x"}])
    with pytest.raises(ValueError, match="b.jsonl: no such file"):
        jsonl.convert(tmp_path / "out", (str(tmp_path / "b.jsonl"),))
    with pytest.raises(ValueError, match="pictures: no such folder"):
        jsonl.convert(tmp_path / "out", (str(tmp_path / "a.jsonl"),), images=tmp_path / "pictures")


def test_processes_change_nothing(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            name: content
            for k in range(200)
            for name, content in ((f"{k:03}.png", encoded(picture(k))), (f"{k:03}.txt", f"number {k}".encode()))
        },
    )
    for workers in (1, 2):
        tar.convert(tmp_path / str(workers), (str(tmp_path / "a.tar"),), name="same", workers=workers)
    one, two = (tmp_path / name / "train" / "train-00000.parquet" for name in "12")
    assert one.read_bytes() == two.read_bytes()


def test_splits_in_arguments() -> None:
    assert by_split(("a.tar", "val=b.tar", "x/y=1.tar")) == [
        ("train", "a.tar"),
        ("val", "b.tar"),
        ("train", "x/y=1.tar"),
    ]


def test_inspect_and_verify_print_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": PNG, "1.json": b'{"caption": ["a dog", "\\u72d7"]}'})
    tar.convert(tmp_path / "out", (str(tmp_path / "a.tar"),), workers=1)
    capsys.readouterr()
    inspect.inspect(tmp_path / "out")
    printed = capsys.readouterr().out
    for words in ("train", "1 en, 1 zh", "20x20 1", "[zh, caption, 1] 狗", "unknown 1"):
        assert words in printed
    inspect.verify(tmp_path / "out")
    assert "1 shards are whole" in capsys.readouterr().out

"""Every kind of input gives the same pairs; what is wrong with a record or a file is told, and costs nothing else."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_ds.data.records import Caption, Record
from m2_ds.data.shards import ShardWriter
from m2_ds.prepare.config import PrepareConfig
from m2_ds.prepare.pairs import Pair
from m2_ds.prepare.readers import BrokenShard, read_unit
from m2_ds.prepare.units import plan
from tests.prepare.raw import caption, changed, config, image, plain, write_tar

COUNT = 7


def pictures(folder: Path, count: int = COUNT) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(image(number))
    return folder


def read(settings: PrepareConfig) -> tuple[list[Pair], list[str]]:
    """(pairs, troubles of files) of all units."""
    pairs, broken = [], []
    for unit in plan(settings)[0]:
        try:
            for pair in read_unit(unit, Path(unit.file), settings):
                pairs.append(pair)
        except BrokenShard as error:
            broken.append(str(error))
    return pairs, broken


def content(pair: Pair) -> tuple[str, bytes]:
    data = pair.image.read_bytes() if isinstance(pair.image, Path) else pair.image
    assert data is not None and len(pair.captions) == 1 and pair.drop is None
    return pair.captions[0].text, data


def make(kind: str, folder: Path) -> dict[str, Any]:
    """Files of a kind with records 0 .. 6, and how a configuration names them."""
    rows = [{"caption": caption(n), "image": f"{n}.png", "punsafe": n / 10} for n in range(COUNT)]
    if kind == "tar":
        return {"kind": "tar", "files": str(write_tar(folder / "a.tar", map(plain, range(COUNT))))}
    if kind == "tar with txt":
        records = [(f"{n}", {"png": image(n), "txt": caption(n).encode()}) for n in range(COUNT)]
        return {"kind": "tar", "files": str(write_tar(folder / "a.tar", records))}
    if kind == "parquet":
        images = [image(n) for n in range(COUNT)]
        table = pa.table({"TEXT": [row["caption"] for row in rows], "jpg": images})
        options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
        pq.write_table(table, folder / "a.parquet", row_group_size=2, **options)
        return {"kind": "parquet", "files": str(folder / "a.parquet")}
    if kind == "parquet of structs":  # as datasets writes pictures
        images = [{"bytes": image(n), "path": None} for n in range(COUNT)]
        pq.write_table(pa.table({"text": [row["caption"] for row in rows], "image": images}), folder / "a.parquet")
        return {"kind": "parquet", "files": str(folder / "a.parquet")}
    if kind == "jsonl":
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
        return {"kind": "jsonl", "files": str(folder / "a.jsonl"), "entry": {"images": pictures(folder / "pictures")}}
    if kind == "csv":
        with open(folder / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return {"kind": "csv", "files": str(folder / "a.csv"), "entry": {"images": pictures(folder / "pictures")}}
    if kind == "shards":
        with ShardWriter(folder / "set", "set", group_rows=2) as writer:
            for n in range(COUNT):
                made = Record(f"k{n}", image(n), [Caption(caption(n), "en")], f"g{n}", "old", "CC0-1.0", 64, 64)
                writer.add("train", made)
        return {"kind": "shards", "files": str(folder / "set")}
    records = [(f"{n:09d}", {"jpg": image(n), "txt": caption(n).encode(), "json": status(n)}) for n in range(COUNT)]
    out = folder / "00000"
    if kind == "img2dataset tar":
        write_tar(folder / "00000.tar", records)
    elif kind == "img2dataset folder":
        out.mkdir()
        for name, files in records:
            for suffix, data in files.items():
                (out / f"{name}.{suffix}").write_bytes(data)
    else:
        columns = {"key": [name for name, _ in records], "caption": [row["caption"] for row in rows]}
        table = pa.table(columns | {"jpg": [image(n) for n in range(COUNT)], "status": ["success"] * COUNT})
        pq.write_table(table, folder / "00000.parquet")
    return {"kind": "img2dataset", "files": str(folder)}


def status(number: int) -> bytes:
    return json.dumps({"caption": caption(number), "status": "success", "url": "http://x/1", "key": "1"}).encode()


KINDS = ["tar", "tar with txt", "parquet", "parquet of structs", "jsonl", "csv", "shards"]
KINDS += ["img2dataset tar", "img2dataset folder", "img2dataset parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_pairs(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path)
    pairs, broken = read(config(tmp_path / "out", **made, unit_records=3))
    assert [content(pair) for pair in pairs] == [(caption(n), image(n)) for n in range(COUNT)]
    assert len({pair.key for pair in pairs}) == COUNT and not broken
    assert all(pair.key.startswith("raw/") or kind == "shards" for pair in pairs)
    again, _ = read(config(tmp_path / "out", **made))
    assert [pair.key for pair in again] == [pair.key for pair in pairs]


FAILURES = {"key": ["000000100", "000000101"], "caption": ["x", "y"], "status": ["failed_to_download", "success"]}


def test_img2datasets_failures_are_counted(tmp_path: Path) -> None:
    made = make("img2dataset tar", tmp_path)
    pq.write_table(pa.table(FAILURES | {"error_message": ["HTTP 404", None]}), tmp_path / "00000.parquet")
    pairs, _ = read(config(tmp_path / "out", **made))
    assert [(pair.key, pair.drop.rule) for pair in pairs if pair.drop] == [("raw/00000/000000100", "not_downloaded")]
    assert "HTTP 404" in pairs[-1].drop.detail  # type: ignore[union-attr]


@given(st.lists(st.text(alphabet='ab",\r\n 猫', max_size=6), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_csv_is_cut_between_records(tmp_path_factory: pytest.TempPathFactory, texts: list[str], records: int) -> None:
    folder = tmp_path_factory.mktemp("csv")
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "caption"], *([f"{n}.png", f"x{text}y"] for n, text in enumerate(texts))])
    pairs, broken = read(config(folder / "out", str(folder / "a.csv"), "csv", unit_records=records))
    assert [pair.captions[0].text for pair in pairs] == [" ".join(f"x{text}y".split()) for text in texts]
    assert [pair.key for pair in pairs] == [f"raw/a/{n}" for n in range(2, len(texts) + 2)] and not broken


def test_lines_that_are_no_records(tmp_path: Path) -> None:
    good = json.dumps({"caption": caption(1), "image": "1.png"}).encode()
    lines = [good, b"{cut", b"[1]", b'{"caption": "\xff"}', b"", b"\x00", b"[" * 100_000, good]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    pairs, broken = read(config(tmp_path / "out", str(tmp_path / "a.jsonl"), "jsonl"))
    assert [pair.drop.rule if pair.drop else None for pair in pairs] == [None, *["bad_line"] * 5, None]
    assert "line 2" in pairs[1].drop.detail and not broken  # type: ignore[union-attr]
    (tmp_path / "a.csv").write_bytes(b'image,caption\n1.png,"a, b"\n1.png\n1.png,\xff\xfe\n1.png,x,y\n1.png,z\x00z\n')
    pairs, broken = read(config(tmp_path / "out", str(tmp_path / "a.csv"), "csv"))
    assert [pair.drop.rule if pair.drop else None for pair in pairs] == [None, "bad_line", "bad_line", "bad_line", None]


def test_files_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2_ds.prepare.readers._MOST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"caption": "x"}).encode() + b"\n" + b"x" * 5000)
    pairs, broken = read(config(tmp_path / "out", str(tmp_path / "a.jsonl"), "jsonl"))
    assert len(pairs) == 1 and "line 2 is longer" in broken[0]
    (tmp_path / "a.csv").write_bytes(b'image,caption\n1.png,"never closed' + b"x" * (1 << 24))
    pairs, broken = read(config(tmp_path / "out", str(tmp_path / "a.csv"), "csv"))
    assert not pairs and "field larger" in broken[0]


def test_what_pandas_left_out_is_no_caption(tmp_path: Path) -> None:
    table = pa.table({"text": [float("nan"), 1.0], "image": [image(0), image(1)]})
    pq.write_table(table, tmp_path / "a.parquet")
    pairs, _ = read(config(tmp_path / "out", str(tmp_path / "a.parquet"), "parquet"))
    assert [pair.drop.rule for pair in pairs if pair.drop] == ["no_caption", "bad_fields"]


def test_text_in_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, *pa.array([b"\xff\xfe", b"good one"], pa.binary()).buffers()[1:]]
    )
    pq.write_table(pa.table({"text": text, "image": [image(0), image(1)]}), tmp_path / "a.parquet")
    pairs, _ = read(config(tmp_path / "out", str(tmp_path / "a.parquet"), "parquet"))
    assert [pair.drop.rule if pair.drop else None for pair in pairs] == ["bad_line", None]


def test_a_tar_that_was_cut_gives_what_comes_before(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", map(plain, range(6)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    pairs, broken = read(config(tmp_path / "out", str(path)))
    good = [pair for pair in pairs if pair.drop is None and isinstance(pair.image, bytes)]
    assert [pair.captions[0].text for pair in good[:3]] == [caption(n) for n in range(3)] and len(broken) == 1


def test_a_parquet_file_with_damaged_pages_or_none(tmp_path: Path) -> None:
    make("parquet", tmp_path)
    path = tmp_path / "a.parquet"
    damaged = bytearray(path.read_bytes())
    middle = damaged.index(image(4)[100:200])
    damaged[middle : middle + 30] = bytes(30)
    path.write_bytes(damaged)
    pairs, broken = read(config(tmp_path / "out", str(path), "parquet", unit_records=2))
    assert [pair.captions[0].text for pair in pairs] == [caption(n) for n in (0, 1, 2, 3, 6)] and len(broken) == 1
    path.write_bytes(damaged[:-500])
    assert read(config(tmp_path / "out", str(path), "parquet"))[1]
    path.write_bytes(b"")
    assert read(config(tmp_path / "out", str(path), "parquet"))[1]


def test_a_file_of_another_schema(tmp_path: Path) -> None:
    make("parquet", tmp_path)
    pq.write_table(pa.table({"alt": ["x"], "jpg": [b"y"]}), tmp_path / "b.parquet")
    settings = config(tmp_path / "out", str(tmp_path / "*.parquet"), "parquet")
    pairs, broken = read(settings)
    assert len(pairs) == COUNT and "no column for captions" in broken[0] and "alt" in broken[0]
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ValueError, match=r"input 'raw'.*b\.parquet.*no column for captions.*inputs\.fields"):
        plan(settings)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
def test_pictures_outside_their_folder_are_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image(0))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"caption": caption(1), "image": name}))
    pairs, _ = read(config(tmp_path / "out", str(folder / "a.jsonl"), "jsonl"))
    assert pairs[0].drop and pairs[0].drop.rule == "missing_picture"


def test_fields_are_mapped(tmp_path: Path) -> None:
    row = {"alt": ["one fox", "two foxes"], "file": "1.png", "id": 7, "lang": "en", "by": "me", "lic": "CC-BY", "g": 3}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    fields = {"captions": ["alt"], "image": ["file"], "key": "id", "language": "lang", "source": "by"}
    entry = {"fields": fields | {"license": "lic", "group": "g"}}
    (pair,), _ = read(config(tmp_path / "out", str(tmp_path / "a.jsonl"), "jsonl", entry=entry))
    assert (pair.key, pair.source, pair.license, pair.group) == ("raw/7", "me", "CC-BY", "3")
    assert [(c.text, c.language) for c in pair.captions] == [("one fox", "en"), ("two foxes", "en")]


def test_names_of_files(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_tar(tmp_path / folder / "0.tar", [plain(1)])
    pairs, _ = read(config(tmp_path / "out", str(tmp_path / "*" / "0.tar")))
    assert [pair.key for pair in pairs] == ["raw/x/0/00001", "raw/y/0/00001"]
    with pytest.raises(ValueError, match=r"1\.tar: no such file \(5 in all\)"):
        plan(config(tmp_path / "out", str(tmp_path / "x" / "{0..5}.tar")))
    units, _ = plan(config(tmp_path / "out", str(tmp_path / "x" / "{0..5}.tar"), skip_broken_shards=True))
    assert len(units) == 6 and sorted(unit.number for unit in units) == list(range(6))


def test_a_broken_json_in_a_tar_is_the_records_trouble(tmp_path: Path) -> None:
    broken = changed(1, lambda files: files.update(json=b'{"caption'))
    path = write_tar(tmp_path / "a.tar", [plain(0), broken, plain(2)])
    pairs, troubles = read(config(tmp_path / "out", str(path)))
    assert [pair.drop.rule if pair.drop else None for pair in pairs] == [None, "bad_fields", None] and not troubles

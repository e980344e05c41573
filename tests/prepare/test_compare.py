"""Rules that compare records, by hand; the result is the same however rows are grouped and exchanged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasketch import MinHash
from PIL import Image

from m2_ds.data.records import Caption, Record
from m2_ds.data.shards import ShardWriter
from m2_ds.prepare.captions import band_hashes, bands_of, trigrams
from tests.prepare.raw import caption, dropped, encoded, image, kept, pixels, plain, prepare, rules, snapshot, write_tar


def near(number: int) -> bytes:
    """Another picture file of what image(number) shows, smaller."""
    return encoded(Image.fromarray(pixels(number)).resize((56, 56), Image.Resampling.BICUBIC))


def record(name: int, data: bytes, text: str | None = None) -> tuple[str, dict[str, bytes]]:
    content = {"caption": text or caption(name)}
    return f"{name:05d}", {"png": data, "json": json.dumps(content).encode()}


def test_of_equal_and_near_pictures_the_first_stays(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [plain(1), record(2, image(1)), plain(3), record(4, near(3))])
    write_tar(tmp_path / "1.tar", [record(5, image(3)), record(6, near(1)), plain(7), record(8, near(3))])
    prepare(tmp_path / "out", str(tmp_path / "*.tar"))
    equal, alike = "duplicate_picture", "near_duplicate_picture"
    assert rules(tmp_path / "out") == {"00002": equal, "00004": alike, "00005": equal, "00006": alike, "00008": equal}
    told = {row["key"]: row["detail"] for row in dropped(tmp_path / "out")}
    assert told["raw/1/00005"] == "same bytes as raw/0/00003" and told["raw/0/00004"] == "looks like raw/0/00003"


def test_of_duplicates_the_largest_stays(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [record(1, near(9)), record(2, image(9)), record(3, image(9))])
    prepare(tmp_path / "out", str(tmp_path / "*.tar"), duplicates={"representative": "largest"})
    assert rules(tmp_path / "out") == {"00001": "near_duplicate_picture", "00003": "duplicate_picture"}


def test_the_input_that_comes_first_wins(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [plain(1)])
    inputs = [{"name": name, "kind": "tar", "files": str(tmp_path / f"{name}.tar")} for name in ("b", "a")]
    _, records = prepare(tmp_path / "out", "", inputs=inputs)
    assert [r.key for r in records] == ["b/b/00001"]


def test_what_is_not_asked_for_stays(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [plain(1), record(2, image(1)), record(3, near(1))])
    prepare(tmp_path / "out", str(tmp_path / "*.tar"), duplicates={"exact": False, "near_distance": None})
    assert not rules(tmp_path / "out")


def test_a_record_that_another_rule_took_is_nobodys_original(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [record(1, image(1), "short"[:3]), record(2, image(1)), plain(3)])
    prepare(tmp_path / "out", str(tmp_path / "*.tar"))
    assert rules(tmp_path / "out") == {"00001": "short_caption"}


def test_equal_keys(tmp_path: Path) -> None:
    rows = [{"key": k, "caption": caption(n), "image": f"{n}.png"} for n, k in enumerate(["a", "b", "a", "c"])]
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(image(n))
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, records = prepare(tmp_path / "out", str(tmp_path / "x.jsonl"), "jsonl", unit_records=1, exchange_rows=1)
    assert [r.key for r in records] == ["raw/a", "raw/b", "raw/c"]
    assert [(row["rule"], row["key"]) for row in dropped(tmp_path / "out")] == [("duplicate_key", "raw/a")]


MIXED = [plain(n) for n in range(12)] + [record(20 + n, image(n)) for n in range(0, 12, 2)]
MIXED += [record(40 + n, near(n)) for n in range(0, 12, 3)]
MIXED += [record(60 + n, image(100 + n), "the same words for all") for n in range(6)]


@pytest.mark.parametrize(("each", "rows"), [(2, 5), (5, 12), (28, 1000)])
def test_the_result_does_not_depend_on_how_rows_are_exchanged(each: int, rows: int, tmp_path: Path) -> None:
    order = np.random.default_rng(5).permutation(len(MIXED))
    shuffled = [MIXED[n] for n in order]
    for number, low in enumerate(range(0, len(shuffled), each)):
        write_tar(tmp_path / "in" / f"{number:03d}.tar", shuffled[low : low + each])
    options: dict[str, Any] = {"exchange_rows": rows, "duplicates": {"caption_repeats": 2}, "output": {"samples": 0}}
    prepare(tmp_path / "out", str(tmp_path / "in" / "*.tar"), **options)
    # By hand: the first of each picture stays, and the first two of the words that six have.
    shown, words, expected = set(), 0, {}
    for n in order:
        name = int(MIXED[n][0])
        picture = name % 20 if name < 60 else name
        if picture in shown:
            expected[f"{name:05d}"] = "duplicate"
        elif name >= 60 and words >= 2:
            expected[f"{name:05d}"] = "repeated_caption"
        words += name >= 60 and picture not in shown
        shown.add(picture)
    found = rules(tmp_path / "out")
    told = {name: "duplicate" if "duplicate" in rule else rule for name, rule in found.items()}
    assert told == expected


def test_repeated_captions_go_one_by_one(tmp_path: Path) -> None:
    spam = "Download this free stock photo for your next project"
    with ShardWriter(tmp_path / "set", "set") as writer:
        for n in range(6):
            captions = [Caption(spam + "!" * (n % 3), "en"), Caption(caption(n), "en", 2.0, "own")]
            writer.add("train", Record(f"{n}", image(n), captions, f"{n}", "s", "CC0-1.0", 64, 64))
    options = {"duplicates": {"caption_repeats": 4}}
    ledger, records = prepare(tmp_path / "out", str(tmp_path / "set"), "shards", **options)
    assert [len(r.captions) for r in records] == [2, 2, 2, 2, 1, 1] and records[5].captions[0].kind == "own"
    assert ledger.dropped == {("caption", "repeated_caption", "s", "en"): 2} and ledger.balanced()
    assert all(spam in row["text"] and spam in row["detail"] for row in dropped(tmp_path / "out"))
    exact = {"duplicates": {"caption_repeats": 1, "caption_similarity": 1}}
    ledger, _ = prepare(tmp_path / "exact", str(tmp_path / "set"), "shards", **exact)
    assert ledger.dropped.total() == 3 and snapshot(tmp_path / "exact") != snapshot(tmp_path / "out")
    assert kept(tmp_path / "exact")[3].captions[0].text == caption(3)


def test_similar_texts_meet_in_a_band_and_others_seldom() -> None:
    draw = np.random.default_rng(3)
    words = [f"{draw.integers(16**4):x}" for _ in range(3000)]
    texts = [" ".join(draw.choice(words, 10)) for _ in range(200)]
    changed = [" ".join([*text.split()[:-1], "word"]) for text in texts]
    bands = bands_of(0.8)
    one, other = band_hashes(texts, bands), band_hashes(changed, bands)
    jaccard = np.array(
        [len(trigrams(a) & trigrams(b)) / len(trigrams(a) | trigrams(b)) for a, b in zip(texts, changed)]
    )
    meet = (one == other).any(axis=1)
    assert (jaccard > 0.7).all() and meet[jaccard >= 0.8].mean() > 0.9
    assert (one[:, None] == one[None]).any(axis=2).sum() == 200  # none but with itself
    # The share of equal minimum hashes estimates the similarity: datasketch's own estimate agrees with the sets.
    made = [MinHash(num_perm=128) for _ in range(2)]
    for hashes, text in zip(made, (texts[0], changed[0])):
        hashes.update_batch([gram.encode() for gram in trigrams(text)])
    assert abs(made[0].jaccard(made[1]) - jaccard[0]) < 0.15

"""Target shares: quotas by hand, limits that hold them exactly, splits, and mixtures of one data set a source."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_ds.data.reader import open_dataset
from m2_ds.data.records import Caption, Record
from m2_ds.data.shards import ShardWriter
from m2_ds.prepare.balance import quotas
from m2_ds.prepare.config import BalanceConfig
from m2_ds.prepare.run import run
from tests.prepare.raw import caption, config, image, kept, prepare, snapshot, tars


def quota(there: dict[tuple[str, str], int], **shares: object) -> dict[tuple[str, str], int]:
    return quotas(there, BalanceConfig.model_validate(shares))


def test_quotas_by_hand() -> None:
    two = {("a", "en"): 100, ("b", "en"): 50}
    assert quota(two, sources={"a": 1, "b": 1}) == {("a", "en"): 50, ("b", "en"): 50}
    assert quota(two, sources={"a": 3, "b": 1}) == {("a", "en"): 100, ("b", "en"): 33}
    assert quota(two, sources={"b": 1}) == {("a", "en"): 0, ("b", "en"): 50}
    assert quota(two, max_records=30) == {("a", "en"): 20, ("b", "en"): 10}
    four = {("a", "en"): 90, ("a", "zh"): 10, ("b", "en"): 20, ("b", "zh"): 80}
    assert quota(four, languages={"en": 1, "zh": 1}) == {
        ("a", "en"): 74, ("a", "zh"): 10, ("b", "en"): 16, ("b", "zh"): 80
    }  # fmt: skip
    both = quota(four, languages={"en": 1, "zh": 1}, sources={"a": 1, "b": 1})
    assert both["a", "en"] + both["a", "zh"] == both["b", "en"] + both["b", "zh"]
    assert both["a", "en"] + both["b", "en"] == both["a", "zh"] + both["b", "zh"]


def test_shares_that_can_not_be_had() -> None:
    with pytest.raises(ValueError, match=r"balance\.sources.*'c'.*there are \['a', 'b'\]"):
        quota({("a", "en"): 1, ("b", "en"): 1}, sources={"c": 1})
    with pytest.raises(ValueError, match="no selection gives"):
        quota({("a", "en"): 9, ("b", "zh"): 9}, sources={"a": 0.9, "b": 0.1}, languages={"en": 0.1, "zh": 0.9})


@given(
    st.dictionaries(st.tuples(st.sampled_from("abc"), st.sampled_from(["en", "zh"])), st.integers(1, 500), min_size=1),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(1, 400),
)
@settings(max_examples=60, deadline=None)
def test_quotas_never_ask_for_more_than_there_is(
    there: dict[tuple[str, str], int], shares: list[int], most: int
) -> None:
    sources = {source: share for source, share in zip("abc", shares) if any(s == source for s, _ in there)}
    found = quota(there, sources=sources, max_records=most)
    assert found.keys() == there.keys() and all(0 <= found[name] <= there[name] for name in there)
    total = sum(found.values())
    assert total <= most
    for source, share in sources.items():
        mine = sum(count for (s, _), count in found.items() if s == source)
        assert abs(mine - total * share / sum(sources.values())) <= 3  # whole records


def bilingual(folder: Path, count: int) -> str:
    """Two thirds English, a quarter of the rest in both languages."""
    with ShardWriter(folder, "set", group_rows=7, shard_bytes=20_000) as writer:
        for n in range(count):
            captions = [Caption(caption(n), "en")] if n % 3 else [Caption(f"第{n}张图片的说明", "zh")]
            captions += [Caption(caption(n), "en")] * (n % 12 == 0)
            writer.add("train", Record(f"{n}", image(n), captions, f"g{n // 2}", "s", "CC0-1.0", 64, 64))
    return str(folder)


def test_languages_reach_their_shares_exactly(tmp_path: Path) -> None:
    source = bilingual(tmp_path / "set", 60)
    balance = {"languages": {"en": 0.5, "zh": 0.25, "en+zh": 0.25}}
    plain_ledger, everything = prepare(tmp_path / "all", source, "shards")
    assert plain_ledger.kept == {("s", "en"): 40, ("s", "zh"): 15, ("s", "en+zh"): 5}
    ledger, records = prepare(tmp_path / "out", source, "shards", balance=balance)
    assert ledger.kept == {("s", "en"): 10, ("s", "zh"): 5, ("s", "en+zh"): 5} and ledger.balanced()
    assert [r for r in everything if r.key in {s.key for s in records}] == records
    prepare(tmp_path / "again", source, "shards", balance=balance, unit_records=7, output={"samples": 0})
    assert kept(tmp_path / "again") == records


def test_splits_share_no_group(tmp_path: Path) -> None:
    source = bilingual(tmp_path / "set", 80)
    prepare(tmp_path / "out", source, "shards", output={"splits": {"val": 0.3}})
    train, val = kept(tmp_path / "out"), kept(tmp_path / "out", "val")
    assert len(train) + len(val) == 80 and 8 < len(val) < 44
    assert not {r.group for r in train} & {r.group for r in val}


def test_weights_make_a_data_set_of_each_source(tmp_path: Path) -> None:
    inputs = [
        {"name": "web", "kind": "tar", "files": tars(tmp_path / "web", 12)},
        {"name": "books", "kind": "shards", "files": bilingual(tmp_path / "set", 9)},
    ]
    balance = {"how": "weights", "sources": {"web": 3, "books": 1}, "languages": {"en": 1, "zh": 1}}
    duplicates = {"exact": False, "near_distance": None}
    ledger = run(config(tmp_path / "out", "", inputs=inputs, balance=balance, duplicates=duplicates))
    assert ledger.kept.total() == 21
    mixture = yaml.safe_load((tmp_path / "out" / "mixture.yaml").read_text())["data"]
    assert [(Path(s["path"]).name, s["weight"]) for s in mixture["sources"]] == [("web", 3.0), ("books", 1.0)]
    assert mixture["languages"] == {"en": 1.0, "zh": 1.0}
    sizes = {Path(s["path"]).name: len(open_dataset(s["path"]).split("train")) for s in mixture["sources"]}
    assert sizes == {"web": 12, "books": 9}


def test_many_shards_keep_order_checksums_and_statistics(tmp_path: Path) -> None:
    source = bilingual(tmp_path / "set", 60)
    output = {"shard_mb": 1, "group_rows": 8, "samples": 0}
    prepare(tmp_path / "out", source, "shards", output=output, unit_records=5)
    made = open_dataset(tmp_path / "out")
    made.verify()
    assert [r.key for r in kept(tmp_path / "out")] == [str(n) for n in range(60)]
    counted = Counter(c.language for r in kept(tmp_path / "out") for c in r.captions)
    info = made.manifest.splits["train"]
    assert info.languages == dict(counted) and info.sources == {"s": 60} and info.rows == 60
    assert json.loads((tmp_path / "out" / "counts.json").read_text())["ledger"]["kept"]["s\ten"] == 40
    assert len(snapshot(tmp_path / "out")) >= 5

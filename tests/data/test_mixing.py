"""Languages in the mixture: exact by source and window, replaced where a record lacks one, and counted."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from m2_ds.data.config import DataConfig
from m2_ds.data.order import Order, window_cells, window_counts
from m2_ds.data.records import Record
from m2_ds.data.stream import PairBatch, PairDataset, build_loader
from tests.support.pairs import ByteTokenizer, make_dataset, text_of

shares = st.dictionaries(st.integers(0, 1), st.floats(0.2, 5), min_size=1, max_size=2)


@settings(max_examples=150, deadline=None)
@given(weights=st.lists(st.floats(0.3, 5), min_size=1, max_size=6), data=st.data(), window=st.integers(60, 300))
def test_places_of_languages_are_exact_to_the_nearest(weights: list[float], data: st.DataObject, window: int) -> None:
    languages = [data.draw(shares) for _ in weights]
    counts = window_counts(weights, window)
    exact = np.zeros((len(weights), 2))
    for source, of in enumerate(languages):
        for language, share in of.items():
            exact[source, language] = counts[source] * share / sum(of.values())
    assume((exact[exact > 0] >= 1).all())
    found = np.zeros((len(weights), 2))
    for source, cells in enumerate(window_cells(counts, languages)):
        for language, places in cells:
            found[source, language] = places
    assert (found.sum(1) == counts).all()
    assert np.abs(found - exact).max() < 1
    assert np.abs((found - exact).sum(0)).max() < 1 + 1e-6  # over all sources together, too
    assert (found[exact == 0] == 0).all()


def test_every_window_has_its_places_of_every_source_and_language() -> None:
    order = Order([[50] * 4, [30] * 2], [2.0, 1.0], seed=3, window=48, groups=2, languages=[{0: 1.0, 1: 2.0}, {1: 1.0}])
    for window in (0, 1, 77):
        places = order(np.arange(48 * window, 48 * window + 48))
        found = Counter(zip(places.source.tolist(), places.language.tolist()))
        assert sorted(found.items()) == [((0, 0), 11), ((0, 1), 21), ((1, 1), 16)]
    orders = {tuple(order(np.arange(48 * k, 48 * k + 48)).language.tolist()) for k in range(6)}
    assert len(orders) == 6


def test_a_row_is_not_tied_to_a_language() -> None:
    """A source whose rows fill the window evenly meets each row in both languages over the epochs."""
    order = Order([[16]], [1.0], seed=0, window=32, groups=1, languages=[{0: 1.0, 1: 1.0}])
    places = order(np.arange(16 * 20))
    assert all(len(set(places.language[places.row == row].tolist())) == 2 for row in range(16))


def test_a_language_without_a_place_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"sources\.1: the share of language zh gives it no place.*337 is enough"):
        window_cells(np.array([7, 3]), [{0: 1.0}, {0: 100.0, 1: 1.0}], ["en", "zh"])


def config(*sources: dict[str, Any], **changes: Any) -> DataConfig:
    base = {"image_size": 16, "mixing_window": 24, "shuffle_groups": 3, "sources": list(sources)}
    return DataConfig.model_validate(base | changes)


def batches(config: DataConfig, count: int, size: int = 24) -> list[PairBatch]:
    return list(islice(build_loader(config, ByteTokenizer(), global_batch=size, micro_batch=size, seed=5), count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """both/: two languages; en/: English alone; some/: every third record without Chinese."""
    folder = tmp_path_factory.mktemp("mixing")

    def english(_: int, made: Record) -> Record:
        return replace(made, captions=made.captions[:2])

    def some(number: int, made: Record) -> Record:
        return english(number, made) if number % 3 == 0 else made

    make_dataset(folder / "both", 60, name="both")
    make_dataset(folder / "en", 40, name="en", change=english)
    make_dataset(folder / "some", 48, name="some", change=some)
    return folder


def cells(batch: PairBatch) -> Counter[tuple[str, int]]:
    return Counter((key.split("/")[0], language) for key, language in zip(batch.keys, batch.language[0].tolist()))


def test_weights_hold_by_source_and_language(folder: Path) -> None:
    sources = [{"path": folder / "both", "weight": 2}, {"path": folder / "en", "weight": 1}]
    for batch in batches(config(*sources, languages={"en": 1.0, "zh": 3.0}), 6):
        assert cells(batch) == {("both", 0): 4, ("both", 1): 12, ("en", 0): 8}  # en has no Chinese and gets none
        assert batch.other_language == 0
        for b, language in enumerate(batch.language[0].tolist()):
            assert ("第" in text_of(batch.ids[0, b])) == (language == 1)


def test_a_source_may_have_shares_of_its_own(folder: Path) -> None:
    sources = [
        {"path": folder / "both", "weight": 2, "languages": {"en": 3, "zh": 1}},
        {"path": folder / "some", "weight": 1, "languages": {"en": 1}},
    ]
    for batch in batches(config(*sources), 3):
        assert cells(batch) == {("both", 0): 12, ("both", 1): 4, ("some", 0): 8}


def test_a_record_without_its_language_gives_another_and_is_counted(folder: Path) -> None:
    found = batches(config({"path": folder / "some"}), 8)
    lacking = [int(key.split("/")[1]) % 3 == 0 for batch in found for key in batch.keys]
    language = [language for batch in found for language in batch.language[0].tolist()]
    assert all(of == 0 for of, lacks in zip(language, lacking) if lacks)
    places = PairDataset(config({"path": folder / "some"}), ByteTokenizer(), 5).order(np.arange(24 * 8))
    wanted = sum(lacks and of == 1 for of, lacks in zip(places.language.tolist(), lacking))
    assert wanted > 10 and sum(batch.other_language for batch in found) == wanted
    assert all(batch.skipped == {} for batch in found)


def test_shares_that_a_source_cannot_have_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"sources\.0.*captions in \['en'\], but \['zh'\] are asked for"):
        batches(config({"path": folder / "en", "languages": {"zh": 1}}), 1)
    with pytest.raises(ValueError, match=r"sources\.0\.languages: \['de'\] are not among data\.languages"):
        config({"path": folder / "en", "languages": {"de": 1}})
    with pytest.raises(ValueError, match="shares must be positive"):
        config({"path": folder / "en", "languages": {"en": 0}})
    with pytest.raises(ValueError, match="captions: each takes a caption in every language"):
        config({"path": folder / "both", "languages": {"en": 1}}, captions="each")


def test_epochs_are_counted_by_source(folder: Path) -> None:
    sources = [{"path": folder / "both", "weight": 2}, {"path": folder / "en", "weight": 1}]
    dataset = PairDataset(config(*sources), ByteTokenizer(), 5)
    keys = [key.split("/")[0] for batch in batches(config(*sources), 30, size=7) for key in batch.keys]
    for samples in (0, 1, 7, 24, 100, 210):
        seen = Counter(keys[:samples])
        assert dataset.epochs(samples) == {"both": seen["both"] / 60, "en": seen["en"] / 40}
        state = dataset.state(samples)
        assert state["seed"] == 5 and state["samples"] == samples
        assert [source["pairs"] for source in state["sources"]] == [seen["both"], seen["en"]]
    assert {"name", "split", "rows", "pairs", "epochs", "manifest"} == state["sources"][0].keys()


def test_sources_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, 20, name="both", val=9)
    one, other, val = {"path": folder / "both"}, {"path": tmp_path}, {"path": tmp_path, "split": "val"}

    def names(*sources: dict[str, Any]) -> list[str]:
        return PairDataset(config(*sources), ByteTokenizer(), 0).source_names()

    assert names(one) == ["both"]
    assert names(one, val) == ["both:train", "both:val"]
    assert names(one, other) == ["both:train:0", "both:train:1"]

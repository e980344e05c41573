#!/usr/bin/env python
"""How many texts a second one core turns into ids, beside how many a loader needs.

    python benchmarks/tokenizer.py --tokenizer runs/tokenizer sp.model [--dataset DATASET]

Texts are a dataset's captions, or CC-CEDICT's words and senses; "long" joins 12 of them (truncated at the model's 52).
"""

import json
import random
import statistics
import time
from itertools import islice
from pathlib import Path

import tyro

from m2_ds.data.shards import open_dataset
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.data.text_train import cedict_lines


def texts_per_second(tokenizer: Tokenizer, texts: list[str], batch: int, repeats: int) -> float:
    """Median over the repeats; the batches are padded tensors, as a loader makes them."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for first in range(0, len(texts), batch):
            tokenizer.encode(texts[first : first + batch])
        rates.append(len(texts) / (time.perf_counter() - start))
    return statistics.median(rates)


def measure(
    tokenizer: tuple[Path, ...],
    dataset: Path | None = None,
    split: str = "train",
    pictures_per_second: float = 2500.0,
    captions: int = 2,
    texts: int = 20_000,
    batch: int = 256,
    repeats: int = 5,
    out: Path | None = None,
) -> None:
    """Measure each tokenizer on one core.

    Args:
        tokenizer: folders or .model files.
        dataset: a shard dataset whose captions are used instead of CC-CEDICT.
        split: the dataset's split.
        pictures_per_second: pictures that one core decodes; what the texts have to keep up with.
        captions: captions a picture.
        texts: texts in the measurement.
        batch: texts in a call.
        repeats: repetitions; the median counts.
        out: JSON file for the results.
    """
    if dataset is None:
        found = list(islice(cedict_lines(), texts))
    else:
        rows = open_dataset(dataset).split(split).iter(columns=["captions"])
        found = list(islice((c["text"] for row in rows for c in row["captions"]), texts))
    draw = random.Random(0)
    sets = {"short": found, "long": [" ".join(draw.choices(found, k=12)) for _ in range(len(found) // 8)]}
    needed = pictures_per_second * captions
    results = []
    print(f"{'tokenizer':40} {'texts':6} {'characters':>10} {'tokens':>7} {'texts/s':>10} {'x needed':>9}")
    for path in tokenizer:
        model = load_tokenizer(path)
        for name, chosen in sets.items():
            rate = texts_per_second(model, chosen, batch, repeats)
            row = {
                "tokenizer": str(path),
                "kind": model.kind,
                "texts": name,
                "characters_per_text": sum(map(len, chosen)) / len(chosen),
                "tokens_per_text": int(model.encode(chosen)[1].sum()) / len(chosen),
                "texts_per_second": rate,
                "times_needed": rate / needed,
            }
            results.append(row)
            print(
                f"{path!s:40} {name:6} {row['characters_per_text']:10.1f} {row['tokens_per_text']:7.1f} "
                f"{rate:10,.0f} {row['times_needed']:9.1f}"
            )
    print(f"needed: {needed:,.0f} texts/s ({pictures_per_second:,.0f} pictures/s a core x {captions} captions)")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"needed_texts_per_second": needed, "rows": results}, indent=2))


if __name__ == "__main__":
    tyro.cli(measure)

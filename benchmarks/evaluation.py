"""Embedding pictures and captions for evaluation, beside doing it one by one as the M2-Encoder release does.

    python benchmarks/evaluation.py --data data/emoji --tokenizer data/tokenizer-emoji

Both embed the same pictures and their captions in both languages with the same random weights, in turns, on the same
number of threads. One by one: a picture is opened, resized and encoded before the next one; every caption, repeated
ones too, is padded to 52 tokens, which are all computed; all tokens go through all layers. How far vectors are from
those is measured, too. Legend: E embedding.
"""

import copy
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from tables import machine, publish
from torch import Tensor

from m2_ds.api import Processor
from m2_ds.data.reader import open_dataset
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.evaluation.embed import default_batch, embed_split
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.multiway import ALL_A, ALL_B
from m2_ds.model.weights import init_weights

HERE = Path(__file__).resolve().parent
LENGTH = 52  # tokens that the release pads every caption to
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Case:
    """A model's shape, and how many of the pictures are embedded."""

    name: str
    preset: str
    changes: dict[str, Any]
    pictures: int


HALF = {"hidden_size": 384, "num_heads": 6, "embed_dim": 384}
CASES = (
    Case("tiny: 192 wide, 6 + 2 layers, 48 px", "tiny", {}, 1660),
    Case("0.4b at half its width: 384, 9 + 3 layers, 224 px", "0.4b", HALF, 400),
    Case("0.4b: 768, 9 + 3 layers, 224 px", "0.4b", {}, 100),
)


class OneByOne:
    """The release's way. No part of its code: the same network, told to compute what the release computes."""

    def __init__(self, model: M2Encoder, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def image(self, data: bytes) -> Tensor:
        """[E] of one picture's bytes."""
        size = self.model.config.image_size
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        encoder = self.model.backbone.encoder
        x = encoder.add_positions(self.model.backbone.vision_embed(images), "A")
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        hidden = encoder(x, ALL_A, attention_mask=mask)
        return self.model.itc_vl_image_proj(self.model.backbone_vl(hidden, ALL_A, attention_mask=mask))[0]

    def text(self, text: str) -> Tensor:
        """[E] of one caption."""
        ids, valid = self.tokenizer.encode([text], length=LENGTH)
        encoder = self.model.backbone.encoder
        # A mask of all tokens: with it no padding is left out.
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        x = encoder.add_positions(self.model.backbone.text_embed(ids), "B")
        hidden = encoder(x, ALL_B, valid.bool(), attention_mask=mask)
        return self.model.itc_vl_text_proj(self.model.backbone_vl(hidden, ALL_A, valid.bool(), attention_mask=mask))[0]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure_case(case: Case, data: Path, tokenizer: Tokenizer, turns: int, threads: int) -> dict[str, Any]:
    """Seconds of all sides, turn by turn, and largest differences of vectors from those made one by one."""
    config = M2EncoderConfig.preset(
        case.preset, vocab_size=tokenizer.vocab_size, max_text_length=LENGTH, **case.changes
    )
    model = M2Encoder(config)
    init_weights(model, config, seed=0)
    model.eval()
    rounded = copy.deepcopy(model).bfloat16()
    split = open_dataset(data).split("test_new_vendor")
    records = split.read(range(min(case.pictures, len(split))))
    captions = [caption.text for record in records for caption in record.captions if caption.language in LANGUAGES]
    slow, processor = OneByOne(model, tokenizer), Processor(config.image_size, tokenizer)

    def one_by_one() -> dict[str, Tensor]:
        with torch.no_grad():
            image_s, images = timed(lambda: torch.stack([slow.image(record.image) for record in records]))
            text_s, texts = timed(lambda: torch.stack([slow.text(text) for text in captions]))
        shares.append(image_s / (image_s + text_s))
        return {"images": images, **dict(zip(captions, texts))}

    def ours(model: M2Encoder) -> dict[str, Tensor]:
        found = embed_split(
            model, processor, split, default_batch("cpu"), "cpu", LANGUAGES, limit=len(records), threads=threads
        )
        texts = {text: row for part in found.texts.values() for text, row in zip(part.texts, part.features)}
        return {"images": found.image, **texts}

    shares: list[float] = []
    sides = {"one by one": one_by_one, "m2_ds": lambda: ours(model), "m2_ds, bf16": lambda: ours(rounded)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with torch.no_grad():  # what is made at the first call
        slow.image(records[0].image)
        slow.text(captions[0])
    for _ in range(turns):
        vectors = {}
        for side, work in sides.items():
            spent, vectors[side] = timed(work)
            seconds[side].append(spent)
        print(case.name, {side: [round(value, 1) for value in values] for side, values in seconds.items()}, flush=True)
    expected = vectors["one by one"]
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "case": case.name,
        "pictures": len(records),
        "captions": len(captions),
        "different_captions": len(set(captions)),
        "seconds": medians,
        "ratio": {side: medians["one by one"] / value for side, value in medians.items()},
        "share_of_pictures": statistics.median(shares),
        "turns": seconds,
        "difference": {
            side: max(float((expected[name] - found[name]).norm(dim=-1).max()) for name in expected)
            for side, found in vectors.items()
        },
    }


def measure(
    *,
    data: Path = Path("data/emoji"),
    tokenizer: Path = Path("data/tokenizer-emoji"),
    turns: int = 3,
    torch_threads: int = 2,
    threads: int = 2,
    cases: tuple[int, ...] = tuple(range(len(CASES))),
    pictures: int | None = None,
    out: Path = HERE / "results" / "evaluation.json",
) -> None:
    """Measure all sides in turns; print a table, and write it and every number.

    Args:
        data: the emoji data set; its split test_new_vendor is embedded.
        tokenizer: a tokenizer folder.
        turns: turns of each side.
        torch_threads: threads of the arithmetic, of every side.
        threads: threads of m2_ds that decode pictures.
        cases: which models, by number.
        pictures: of each case at most; by default as many as the case says.
        out: results; a table of the same name ending in .md is written beside it.
    """
    torch.set_num_threads(torch_threads)
    loaded = load_tokenizer(tokenizer, max_length=LENGTH)
    chosen = [CASES[number] for number in cases]
    if pictures is not None:
        chosen = [replace(case, pictures=min(pictures, case.pictures)) for case in chosen]
    rows = [measure_case(case, data, loaded, turns, threads) for case in chosen]
    about = machine("torch", "pillow") | {"torch_threads": torch_threads, "batch_size": default_batch("cpu")}
    publish(out, {"about": about, "cases": rows}, table(rows, about))


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "# Embedding for evaluation, beside one by one as the release does it",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['torch_threads']} threads on every side, batches of "
        f"{about['batch_size']} pictures and {4 * about['batch_size']} texts; {about['date']}. Medians of turns taken "
        "alternately, random weights. Pictures and captions (English and Chinese) of the emoji split test_new_vendor.",
        "",
        "| model | pictures | captions | side | s | times as fast | turns, s | largest distance of a unit vector |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for side, seconds in row["seconds"].items():
            turns = ", ".join(f"{value:.1f}" for value in row["turns"][side])
            lines.append(
                f"| {row['case']} | {row['pictures']:,} | {row['captions']:,} | {side} | {seconds:.1f} "
                f"| {row['ratio'][side]:.2f} | {turns} | {row['difference'][side]:.1e} |"
            )
    lines += [
        "",
        "One by one, pictures took "
        + ", ".join(f"{100 * row['share_of_pictures']:.0f}% ({row['case'].split(':')[0]})" for row in rows)
        + " of the time. Of the captions "
        + ", ".join(f"{row['different_captions']:,} of {row['captions']:,}" for row in rows)
        + " are different.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(measure, description=__doc__)

